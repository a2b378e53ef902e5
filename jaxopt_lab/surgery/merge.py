"""Adjacent linear layers, merged into one."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.tracing.chains import Affine, Link, links, relaid, summed
from jaxopt_lab.core.tracing.programs import Program, Seen, run, trace
from jaxopt_lab.core.tracing.substitution import Coefficients, amounts, needed
from jaxopt_lab.core.tracing.walks import PRODUCTS, Site
from jaxopt_lab.core.types import Array, PyTree, Where
from jaxopt_lab.surgery.edits import GONE, Beside, by_path, edited, filled, keys, place_of_bias

__all__ = ["Apart", "Merge", "MergePlan", "merge_linear"]


class Merge(NamedTuple):
    """Two layers that became one.

    Attributes:
      first: the path of the weight that is gone.
      second: that of the weight that stands for both.
      shape: of it now.
      bias: the path of what is added behind it now; None where the first layer added nothing, so that nothing new is.
      dropped: paths that the tree lost.
      formula: the operations between the two products, in order.
      behind: additions behind the second product that the bias now stands for as well.
    """

    first: str
    second: str
    shape: tuple[int, ...]
    bias: str | None
    dropped: tuple[str, ...]
    formula: tuple[str, ...]
    behind: tuple[str, ...]


class Apart(NamedTuple):
    """Two layers that could have become one, and did not.

    Attributes:
      first, second: paths of their weights.
      reason: why.
    """

    first: str
    second: str
    reason: str


class MergePlan(NamedTuple):
    """What was merged, in that order, and what was kept apart; it prints as a list.

    Attributes:
      merges: a merged layer may be the first or second of a later merge.
      apart: in the order of the program.
    """

    merges: tuple[Merge, ...]
    apart: tuple[Apart, ...]

    def __str__(self) -> str:
        rows = []
        for m in self.merges:
            shift = f", shift in {m.bias}" if m.bias else ""
            rows.append(f"{m.first} into {m.second}: {m.shape}{shift}, without {', '.join(m.dropped)}")
        return "\n".join([*rows, *(f"kept apart: {a.first} and {a.second}: {a.reason}" for a in self.apart)])


def merge_linear(
    apply: Callable[..., Any], params: PyTree, *example: Any, where: Where = "**/kernel", grow: bool = False
) -> tuple[Callable[..., Any], PyTree, MergePlan]:
    r"""Merges each linear layer into the next one where nothing but channelwise affine operations lies between them.

    .. math:: (A \, (x W_1) + B) \, W_2 + b_2 = x \, (W_1 A W_2) + (B W_2 + b_2)

    A and B are of parameters and constants alone: a bias, a normalisation by running statistics, a learned scale (see
    `core.tracing.chains`); the output of the first layer goes nowhere else. This is repeated until nothing is left, so that a stack
    of linear layers becomes a single one. Nothing is known of layers: products in bare functions, Linen and NNX are alike.

    Dense layers merge with each other; a convolution with one of width 1 before or behind it (a dense layer on its channels counts
    as one); and two convolutions if the second one neither pads nor works in groups, into one with a kernel of
    :math:`(k_2 - 1) d_2 s_1 + k_1` and a stride of :math:`s_1 s_2`. Where the second one pads, the first must add nothing, since
    padding would not see it. A pair whose merged layer would have more parameters or multiplications than the two, as those of low
    rank have, is kept apart; the plan names it and the reason.

    The merged weight stands at the path of the second one, beside whose output everything behind it stands already: its bias, what
    numbers its channels. It is laid out as the weight of the two that it stands in for, the second one if the first has width 1.
    :math:`B W_2 + b_2` is stored as `.../bias` there, in the place of the bias that was there, or as a new entry of the mapping;
    where the weight lies in none, in the place of a leaf that becomes free. Where B is none, the bias stays as it is. Leaves that
    nothing reads any more are dropped: entries of mappings vanish, elsewhere None stands. Products of weights are taken in at least
    float32, and shifts are kept so.

    Args:
      apply: `apply(params, *args, **kwargs)`, in inference: `model.predict`, a Linen `module.apply`, one that merges an NNX module,
        a bare function.
      params: any tree of parameters and statistics.
      example: inputs, arrays or shapes. They decide where the walk goes, and which layer has more multiplications.
      where: which weights (see `tree.select`); both of a pair must be chosen.
      grow: merge those pairs, too, whose merged layer is larger than they are.

    Returns:
      `(apply, params, plan)`. The new function takes the new tree, and all other arguments of any shapes. It traces the old one
      anew in each call, so jit it. Arguments without a shape (`train=False`) must leave what lies between the layers as it was.

    Raises:
      ValueError: nothing matches `where`, or no layer that does goes straight into another one that does.
      TypeError: a weight of a pair is compressed: merge first, compress then.

    >>> params = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones((1, 4))}, "b": {"kernel": jnp.ones((4, 2))}}
    >>> apply = lambda p, x: jnp.tanh((x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"])
    >>> merged_apply, merged, plan = merge_linear(apply, params, jnp.ones((1, 3)))
    >>> print(plan)
    a/kernel into b/kernel: (3, 2), shift in b/bias, without a/kernel, a/bias
    >>> merged
    {'b': {'kernel': Array([[4., 4.],
           [4., 4.],
           [4., 4.]], dtype=float32), 'bias': Array([4., 4.], dtype=float32)}}
    >>> bool(jnp.allclose(merged_apply(merged, jnp.ones((5, 3))), apply(params, jnp.ones((5, 3)))))
    True

    Source: Ding et al., "Diverse branch block: building a convolution as an inception-like unit", 2021, transforms I and III; Guo
    et al., "ExpandNets: linear over-parameterization to train compact convolutional networks", 2020.
    """
    chosen = set(tree.selected(params, where))
    merges: list[Merge] = []
    while True:
        apply, params, done, apart = _pass(apply, params, example, chosen, grow)
        if not done and not apart and not merges:
            raise ValueError(
                f"none of {', '.join(sorted(chosen)[:5])} goes straight into another of them; check `where`, and give the `apply` "
                "of inference, on an example"
            )
        merges += done
        if not done:
            return apply, params, MergePlan(tuple(merges), tuple(apart))


def _pass(
    apply: Callable[..., Any], params: PyTree, example: tuple[Any, ...], chosen: set[str], grow: bool
) -> tuple[Callable[..., Any], PyTree, list[Merge], list[Apart]]:
    """Merges pairs that have no layer in common, those that save most first."""
    names, leaves, treedef = tree.flatten(params)
    stored, dense = dict(zip(names, leaves, strict=True)), decompress(params)
    program, inputs = trace(apply, dense, *example)
    apart: dict[tuple[str, str], Apart] = {}
    pairs: list[tuple[Link, _Way]] = []
    for link in links(program):
        one, two = _pair(link)
        if not {one, two} <= chosen:
            continue
        for path in (one, two):
            if tree.is_compressed(stored[path]):
                raise TypeError(f"{path} is stored as {type(stored[path]).__name__}: merge first, compress then")
        way = _way(link)
        reason = way if isinstance(way, str) else "" if grow else way.loss
        if isinstance(way, str) or reason:
            apart[one, two] = Apart(one, two, reason)
        else:
            pairs.append((link, way))
    ways, taken, known, made = keys(dense), set(), list(names), []
    for link, way in sorted(pairs, key=lambda pair: -pair[1].saved):
        one, two = _pair(link)
        if taken & {one, two}:
            continue
        place, own = None, way.bias.own if way.bias else ()
        if way.shifts and (place := place_of_bias(two, ways[two], known, own, [*link.first.own, *own])) is None:
            apart[one, two] = Apart(one, two, f"there is no place for a bias beside {two}")
            continue
        taken |= {one, two}
        known += [place[0]] if place else []
        made.append((way, place))

    def computed(arrays: list[Any]) -> list[tuple[Array, Array | None]]:
        own, given = dict(zip(program.paths, arrays, strict=True)), [*arrays, *inputs[len(arrays) :]]
        between = amounts(program, given, [way.link.first for way, _ in made if way.link.first.formula])
        behind = amounts(program, given, [way.bias for way, _ in made if way.bias])
        return [_merged(way, own, between, behind) for way, _ in made]

    # One program, and not one for each operation.
    arrays = jax.jit(computed)(inputs[: len(program.paths)]) if made else []
    merges, changed = [], dict(stored)
    for (way, place), (weight, shift) in zip(made, arrays, strict=True):
        (one, two), (bias, new) = _pair(way.link), place or (None, False)
        own = (*way.link.first.own, *(way.bias.own if way.bias else ()))
        dropped = tuple(path for path in dict.fromkeys((one, *own)) if path != bias)
        merges.append(Merge(one, two, way.shape, bias, dropped, way.link.first.formula, way.behind))
        beside = {bias: shift} if bias and not new else {}
        changed |= dict.fromkeys(dropped, GONE) | {two: Beside(weight, shift) if new else weight} | beside
    if not merges:
        return apply, params, [], list(apart.values())
    gone = {path for merge in merges for path in (*merge.dropped, merge.second, merge.bias)}
    dead = {name: jax.ShapeDtypeStruct(jnp.shape(stored[name]), jnp.result_type(stored[name])) for name in gone & stored.keys()}
    merged = edited(jax.tree.unflatten(treedef, [changed[name] for name in names]))
    return _rewritten(apply, merges, treedef, names, dead), merged, merges, list(apart.values())


def _rewritten(
    apply: Callable[..., Any], merges: Sequence[Merge], treedef: Any, names: list[str], dead: Mapping[str, Any]
) -> Callable[..., Any]:
    """`apply` of the merged tree; `dead` are the leaves of the old one whose values it does not have."""
    expected = {*names, *(m.bias for m in merges if m.bias)} - {path for m in merges for path in m.dropped}

    @functools.wraps(apply, updated=())
    def merged_apply(merged: PyTree, *args: Any, **kwargs: Any) -> Any:
        own = by_path(merged, expected, "merged")
        program, inputs = trace(apply, filled(names, treedef, own, dead), *args, **kwargs)
        found = {link.second.path: link for link in links(program)}
        ways = {merge.second: _same(found.get(merge.second), merge, dead) for merge in merges}
        biases = {merge.second: own[merge.bias] for merge in merges if merge.bias}
        weights = {merge.second: own[merge.second] for merge in merges}
        # The old products are not computed: nothing comes of them any more.
        run_needed, given = needed(
            lambda arrays: _run(program, arrays[0], ways, arrays[1], arrays[2]),
            [inputs, weights, biases],
        )
        return jax.tree.unflatten(jax.tree.structure(program.outputs), run_needed(*given))

    return merged_apply


def _same(link: Link | None, merge: Merge, dead: Mapping[str, Any]) -> "_Way":
    """How the pair is merged in this call, once it is seen to be the one that was, and to be alone in reading what is gone."""
    way = None if link is None or _pair(link)[0] != merge.first else _way(link)
    if isinstance(way, _Way) and (way.link.first.formula, way.behind, way.shape) == (merge.formula, merge.behind, merge.shape):
        own = {*way.link.first.own, *(way.bias.own if way.bias else ())}
        if {*merge.dropped, merge.bias} & dead.keys() <= {merge.first, *own}:
            return way
    raise ValueError(
        f"{merge.first} was merged into {merge.second}, but in this call that is not where its output goes, or what lay between is "
        "read elsewhere, too: call it as in inference, with the arguments that the example had"
    )


def _pair(link: Link) -> tuple[str, str]:
    return link.first.site.path, link.second.path


def _run(
    program: Program, inputs: Sequence[Any], ways: Mapping[str, "_Way"], weights: Mapping[str, Any], biases: Mapping[str, Any]
) -> list[Any]:
    """The outputs of a program in which the second product of each pair is that of the merged weight with the first one's input."""
    names: dict[tuple[int, ...], list[str]] = {}
    for path, way in ways.items():
        for address in (way.link.first.site.address, way.link.second.address, *([way.bias.end] if way.bias else [])):
            names.setdefault(address, []).append(path)

    def look(path: str, state: tuple, operands: Sequence[Any], output: Array) -> tuple:
        # A pair meets its first product, its second one, and the end of its bias; what is put stands first.
        way = ways[path]
        if not state:
            return output, operands[way.link.first.site.other]
        if len(state) == 2:
            y = way.product(state[1], weights[path]).astype(output.dtype)
            return (_added(y, biases[path], way.link.onward[1]) if way.shifts and not way.bias else y,)
        return (_added(way.bias.laid_out(state[0]), biases[path], way.bias.axis).astype(output.dtype),)

    seen = Seen(names, look, lambda path, depth: False, lambda path, state, output: state[0])
    return run(program.jaxpr, inputs, dict.fromkeys(ways, ()), seen)[0]


def _added(y: Array, shift: Array, axis: int) -> Array:
    return (wide(y) + shift.reshape([-1 if a == axis else 1 for a in range(y.ndim)])).astype(y.dtype)


def _merged(
    way: "_Way", own: Mapping[str, Array], between: Mapping[str, Coefficients], behind: Mapping[str, Coefficients]
) -> tuple[Array, Array | None]:
    """The weight for both, and what is added behind it, if anything is.

    By path come the parameters, and what the chains between the two and behind them amount to.
    """
    link, (one, two) = way.link, _pair(way.link)
    first, second = own[one], own[two]
    scaled = wide(first) * link.first.on_weight(between[one].scale) if one in between else wide(first)
    weight = way.weight(scaled, wide(second)).astype(jnp.promote_types(first.dtype, second.dtype))
    if not way.shifts:
        return weight, None
    matrix = jnp.moveaxis(wide(second), (link.inner, link.onward[0]), (0, 1))
    shift = jnp.tensordot(between[one].shift, matrix.sum(tuple(range(2, matrix.ndim))), 1, precision=lax.Precision.HIGHEST)
    return weight, shift + behind[two].shift if two in behind else shift


# How a pair is merged.


@dataclasses.dataclass(frozen=True)
class _Way:
    """A pair, and what stands for it.

    Attributes:
      link: the pair.
      shape: of the merged weight, as it is stored.
      macs: multiplications of its product.
      weight: `(first weight, already scaled, second weight) -> merged weight`.
      product: `(input of the first product, merged weight) -> output of the second`, but for the dtype.
    """

    link: Link
    shape: tuple[int, ...]
    macs: int
    weight: Callable[[Array, Array], Array]
    product: Callable[[Array, Any], Array]

    @property
    def shifts(self) -> bool:
        """Whether the first layer adds something."""
        return _shifts(self.link)

    @property
    def bias(self) -> Affine | None:
        """The additions behind the second product that the shift is put into; None where it stays, or there are none."""
        return self.link.bias if self.shifts else None

    @property
    def behind(self) -> tuple[str, ...]:
        """Those additions, as operations."""
        return self.bias.formula if self.bias else ()

    @property
    def saved(self) -> int:
        """How many multiplications fewer there are."""
        return self.link.first.site.macs + self.link.second.macs - self.macs

    @property
    def loss(self) -> str:
        """What gets larger; empty where nothing does."""
        before = math.prod(self.link.first.site.parameter.shape) + math.prod(self.link.second.parameter.shape)
        now = [(math.prod(self.shape), before, "parameters"), (self.macs, self.macs + self.saved, "multiplications")]
        return ", ".join(f"{new} {what} instead of {old}" for new, old, what in now if new > old)


def _shifts(link: Link) -> bool:
    return any(step.startswith(("add", "sub")) for step in link.first.formula)


def _way(link: Link) -> _Way | str:
    """How the pair is merged; or why it is not."""
    one, two = link.first.site, link.second
    if one.primitive == "conv_general_dilated" and one.params["feature_group_count"] * one.params["batch_group_count"] > 1:
        return "the first works in groups"
    if _shifts(link) and link.onward is None:
        return "there is a shift, and several axes number the channels of the second"
    seen = _shifts(link) and two.primitive == "conv_general_dilated" and not _unpadded(two)
    if not seen and (axis := _pointwise(one)) is not None and (outer := summed(one, axis)) is not None and _plain(two):
        return _as_second(link, axis, outer)
    if link.onward is not None and _pointwise(two) is not None and _plain(one):
        return _as_first(link)
    if seen:
        return "the second pads, and would not see the shift of the first"
    return _as_convolution(link)


def _as_second(link: Link, axis: int, outer: int) -> _Way:
    """The second product, of other inputs: those of a first one that only mixes channels, which lie along `axis`."""
    first, two, channels = link.first, link.second, link.first.channels
    entries = first.site.parameter.shape[outer]

    def weight(w: Array, v: Array) -> Array:
        matrix = jnp.moveaxis(w, (outer, first.weight_axis), (0, 1)).reshape(entries, channels)
        return _mixed(v, matrix, link.inner)

    def product(x: Array, w: Any) -> Array:
        x = relaid(first.steps, _through(first.site, x, axis), link.outputs, channels)
        return _product(two, x, relaid(two.view, w, link.inner, channels))

    shape = tuple(entries if a == link.inner else n for a, n in enumerate(two.parameter.shape))
    return _Way(link, shape, two.macs * entries // channels, weight, product)


def _as_first(link: Link) -> _Way:
    """The first product, with other outputs: those of a second one that only mixes channels."""
    first, two, channels = link.first, link.second, link.first.channels
    own, (outer, _) = first.weight_axis, link.onward
    entries, axis = two.parameter.shape[outer], _pointwise(two)

    def weight(w: Array, v: Array) -> Array:
        return _mixed(w, jnp.moveaxis(v, (outer, link.inner), (0, 1)).reshape(entries, channels), own)

    def product(x: Array, w: Any) -> Array:
        y = _product(first.site, x, relaid(first.site.view, w, own, channels))
        return _through(two, relaid(first.steps, y, link.outputs, channels), axis)

    shape = tuple(entries if a == own else n for a, n in enumerate(first.site.parameter.shape))
    return _Way(link, shape, first.site.macs * entries // channels, weight, product)


def _as_convolution(link: Link) -> _Way | str:
    """A convolution with the convolution of both kernels."""
    one, two = link.first.site, link.second
    if {one.primitive, two.primitive} != {"conv_general_dilated"}:
        return "both sum over more than channels"
    numbers, further = one.params["dimension_numbers"], two.params["dimension_numbers"]
    if link.first.steps or numbers.out_spec != further.lhs_spec:
        return "the convolutions are laid out differently"
    if any(step.primitive != "convert_element_type" for step in (*one.view, *two.view)):
        return "a kernel is not stored as it is met"
    if not _unpadded(two):
        return "the second pads"
    if any(n > 1 for n in one.params["rhs_dilation"]):
        return "the first is dilated"
    strides, dilation = one.params["window_strides"], two.params["rhs_dilation"]
    sides = [(one.weight.shape[a], two.weight.shape[b]) for a, b in zip(numbers.rhs_spec[2:], further.rhs_spec[2:], strict=True)]
    holes = [s * d for s, d in zip(strides, dilation, strict=True)]
    sizes = {a: (j - 1) * hole + i for a, hole, (i, j) in zip(further.rhs_spec[2:], holes, sides, strict=True)}
    sizes |= {
        further.rhs_spec[0]: two.weight.shape[further.rhs_spec[0]],
        further.rhs_spec[1]: one.weight.shape[numbers.rhs_spec[1]],
    }
    shape = tuple(sizes[a] for a in range(len(sizes)))
    params = two.params | {
        "window_strides": tuple(s * t for s, t in zip(strides, two.params["window_strides"], strict=True)),
        "padding": one.params["padding"],
        "lhs_dilation": one.params["lhs_dilation"],
        "rhs_dilation": (1,) * len(sides),
        "dimension_numbers": further._replace(lhs_spec=numbers.lhs_spec),
    }
    macs = PRODUCTS[two.primitive].macs(params, (one.input.shape, shape), two.output.shape)
    merged = two._replace(params=params, input=one.input)

    def weight(w: Array, v: Array) -> Array:
        outer, inner, *spatial = numbers.rhs_spec
        both = lax.conv_general_dilated(
            w.transpose(inner, outer, *spatial),
            lax.rev(v.transpose(further.rhs_spec), range(2, v.ndim)),
            (1,) * len(sides),
            [((j - 1) * hole,) * 2 for hole, (_, j) in zip(holes, sides, strict=True)],
            rhs_dilation=holes,
            precision=lax.Precision.HIGHEST,
        )
        return jnp.moveaxis(both, (1, 0, *range(2, v.ndim)), further.rhs_spec)

    return _Way(link, shape, macs, weight, lambda x, w: _product(merged, x, w))


# What may be done to a stored weight of which one axis gets another length.
_VIEWS = frozenset(("broadcast_in_dim", "convert_element_type", "copy", "name", "reshape", "rev", "squeeze", "transpose"))


def _plain(site: Site) -> bool:
    return all(step.primitive in _VIEWS for step in site.view)


def _unpadded(site: Site) -> bool:
    """Whether a convolution sees nothing but its input: no padding, and no zeros between entries."""
    return not any(map(any, site.params["padding"])) and all(n == 1 for n in site.params["lhs_dilation"])


def _pointwise(site: Site) -> int | None:
    """The axis of the input that a product mixes, place by place; None where it does more."""
    if site.primitive == "dot_general":
        contracted, batch = site.params["dimension_numbers"]
        return contracted[site.other][0] if len(contracted[0]) == 1 and not batch[0] else None
    params, numbers = site.params, site.params["dimension_numbers"]
    alone = params["feature_group_count"] == params["batch_group_count"] == 1 and _unpadded(site)
    width = [site.weight.shape[a] for a in numbers.rhs_spec[2:]]
    return numbers.lhs_spec[1] if alone and all(n == 1 for n in (*width, *params["window_strides"])) else None


def _through(site: Site, x: Array, axis: int) -> Array:
    """The input of a product that mixes channels, laid out as its output."""
    if site.primitive == "dot_general":
        return jnp.moveaxis(x, axis, -1 if site.operand else 0)
    numbers = site.params["dimension_numbers"]
    return jnp.moveaxis(x, numbers.lhs_spec, numbers.out_spec)


def _product(site: Site, x: Array, w: Any) -> Array:
    """The product of a site, of other operands."""
    return site.product(x.astype(site.input.dtype), w.astype(site.weight.dtype))


def _mixed(w: Array, matrix: Array, axis: int) -> Array:
    """`w` with `matrix @ entries` along an axis."""
    return jnp.moveaxis(jnp.tensordot(matrix, w, (1, axis), precision=lax.Precision.HIGHEST), 0, axis)
