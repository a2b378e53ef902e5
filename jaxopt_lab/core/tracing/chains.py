r"""What the output of a product goes through channel by channel, before anything else is done with it.

A bias, a normalisation by running statistics, a learned scale: each is affine with coefficients that depend on parameters and
constants alone, and so are they together, :math:`z = A y + B`. They are found by what they do, not by their names: the walk follows
the output `y` of a product from one use to the next. A label says of a value whether it depends on the inputs, which parameters it
comes from, and along which axes it may differ. A chain that goes into a further product, and nowhere else, is a link between the
two.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from jaxopt_lab.core.tracing import views
from jaxopt_lab.core.tracing.programs import FORMS, Place, Program, Rules, flow, trace
from jaxopt_lab.core.tracing.views import Step, View
from jaxopt_lab.core.tracing.walks import Site, follow
from jaxopt_lab.core.types import Array, PyTree

__all__ = ["Affine", "Link", "affine", "find", "links", "relaid", "summed"]

Address = tuple[int, ...]


class Affine(NamedTuple):
    """A product whose output `y` becomes `z = A y + B`, each channel by itself.

    Attributes:
      site: the product; its parameter meets nothing else, unless it is among `reads`.
      weight_axis: the parameter's own axis that numbers the channels.
      end: where the equation stands whose result is `z`, the last one that reads a parameter.
      axis: the axis of `z` that numbers the channels.
      steps: the transposes and reshapes that lay `y` out as `z`.
      formula: the operations in order, each with what it reads.
      reads: the parameters that A and B depend on, in that order.
      scales: those that A depends on. Without any the product is followed by a bias alone.
      own: those that the program reads nowhere else, the weight apart.
    """

    site: Site
    weight_axis: int
    end: Address
    axis: int
    steps: tuple[Step, ...] = ()
    formula: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.site.parameter.shape[self.weight_axis]

    def laid_out(self, y: Array) -> Array:
        """`y` with its axes where `z` has them."""
        for step in self.steps:
            y = step.operation.bind(y, **step.params)
        return y

    def on_weight(self, vector: Array) -> Array:
        """`[channels]` in a shape that broadcasts to the weight."""
        return vector.reshape([-1 if a == self.weight_axis else 1 for a in range(len(self.site.parameter.shape))])

    def on_output(self, vector: Array, z: Array) -> Array:
        """`[channels]` in a shape that broadcasts to `z`."""
        return vector.reshape([-1 if a == self.axis else 1 for a in range(z.ndim)])


class Link(NamedTuple):
    """Two products of which the second sums over the channels of the first, with a chain between them and nothing else.

    Attributes:
      first: the product whose output goes on, and the chain from there to the operand of the second; its `end` is the last equation
        before that one, and its `formula` may be empty.
      second: the other product; its parameter meets nothing else.
      inner: the axis of the second parameter that is summed over the channels.
      outputs: the axis of the first product's output that numbers the channels.
      onward: the axes of the second parameter and of its output that number the channels there; None where they do not match one to
        one.
      bias: the second product and the additions that follow it at once, up to the last that reads a parameter; None where there are
        none.
    """

    first: Affine
    second: Site
    inner: int
    outputs: int
    onward: tuple[int, int] | None
    bias: Affine | None


def affine(apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> tuple[Affine, ...]:
    """Where the output of a product goes through additions and multiplications that read parameters, and nothing but that.

    A chain ends where the value is used twice (a residual), meets an input or an operation of another kind (an activation), or
    coefficients that differ along other axes than the channels. It is found in bare functions, Linen and NNX alike, through `jit`
    and rematerialisation. Left out are products under loops (stacked layers among them), branches, `shard_map` and functions with
    derivatives of their own; weights that are more than a view of one parameter, that are used twice, or whose channels lie on
    several axes.

    Args:
      apply, params, args, kwargs: as in `walk`.

    Returns:
      One `Affine` for each chain that reads a parameter, in the order of the program.

    Raises:
      TypeError: `params` holds a compressed leaf.

    >>> params = {"kernel": jnp.ones((3, 2)), "scale": jnp.ones((1, 2)), "bias": jnp.ones((1, 2))}
    >>> (chain,) = affine(lambda p, x: jax.nn.relu(p["scale"] * (x @ p["kernel"]) + p["bias"]), params, jnp.ones((5, 3)))
    >>> chain.site.path, chain.formula, chain.scales
    ('kernel', ('mul scale', 'add bias'), ('scale',))
    """
    return find(trace(apply, params, *args, **kwargs)[0])


def find(program: Program) -> tuple[Affine, ...]:
    """`affine` of a program that is traced already.

    >>> from jaxopt_lab.core.tracing import programs
    >>> params = {"b": jnp.ones((1, 2)), "w": jnp.ones((3, 2))}
    >>> program, _ = programs.trace(lambda p, x: x @ p["w"] - p["b"], params, jnp.ones((1, 3)))
    >>> [chain.formula for chain in find(program)]
    [('sub b',)]
    """
    notes = _noted(program)
    return tuple(chain for head in notes.heads if (chain := notes.whole(head)) is not None)


def links(program: Program) -> tuple[Link, ...]:
    """Where the output of a product goes through a chain, be it an empty one, into a further product, and nowhere else.

    Both are products of one parameter each with what comes from the inputs, in places where `affine` looks; neither parameter is
    used elsewhere. Convolutions in groups are no second products.

    Args:
      program: as `programs.trace` gives it.

    Returns:
      One `Link` for each such pair, in the order of the program.

    >>> from jaxopt_lab.core.tracing import programs
    >>> params = {"a": jnp.ones((3, 2)), "b": jnp.ones((1, 2)), "c": jnp.ones((2, 4))}
    >>> program, _ = programs.trace(lambda p, x: (x @ p["a"] + p["b"]) @ p["c"], params, jnp.ones((5, 3)))
    >>> [(link.first.site.path, link.first.formula, link.second.path, link.inner) for link in links(program)]
    [('a', ('add b',), 'c', 0)]
    """
    notes = _noted(program)
    return tuple(link for head in notes.heads if (link := notes.link(head)) is not None)


def relaid(steps: Sequence[Step], value: Array, axis: int, entries: int) -> Array:
    """A value after transposes, reshapes and casts that were made for another number of entries along one of its axes.

    Args:
      steps: they leave that axis whole.
      value: with any number of entries along `axis`.
      axis: of the value.
      entries: how many there were along it.

    >>> steps = [Step("reshape", {"new_sizes": (1, 6, 2), "dimensions": None, "sharding": None}, operation=lax.reshape_p)]
    >>> relaid(steps, jnp.ones((2, 3, 4)), 2, 2).shape
    (1, 6, 4)
    """
    now, shape = value.shape[axis], tuple(entries if a == axis else n for a, n in enumerate(value.shape))
    for step in steps:
        after = _shape_after(step, shape)
        view = views.VIEWS[step.primitive](views.stored("", jax.ShapeDtypeStruct(shape, value.dtype)), step.params, after)
        assert view is not None
        (axis,) = (k for k, factors in enumerate(view.factors) if any(own == axis for own, _ in factors))
        sizes = [now if k == axis else n for k, n in enumerate(after)]
        if step.primitive == "reshape":
            value = value.reshape(sizes)
        elif step.primitive == "broadcast_in_dim":
            value = lax.broadcast_in_dim(value, sizes, step.params["broadcast_dimensions"])
        else:
            value = step.operation.bind(value, **step.params)
        shape = after
    return value


def summed(site: Site, axis: int) -> int | None:
    """The axis of the parameter that is summed over the channels of the input, if its `axis` numbers those and is summed alone.

    Alone but for the width and height of a convolution. None where there is no such axis, or the parameter is not stored as it is
    met.

    >>> from jaxopt_lab.core.tracing import sites
    >>> (site,) = sites(lambda w, x: x @ w.T, jnp.ones((2, 3)), jnp.ones((5, 3)))
    >>> summed(site, 1), summed(site, 0)
    (1, None)
    """
    if site.primitive == "dot_general":
        contracted, batch = site.params["dimension_numbers"]
        alone = tuple(contracted[site.other]) == (axis,) and not batch[site.other]
        return _whole_axis(site, contracted[site.operand][0]) if alone else None
    if site.primitive == "conv_general_dilated" and site.operand == 1:
        numbers = site.params["dimension_numbers"]
        alone = numbers.lhs_spec[1] == axis and site.params["feature_group_count"] == site.params["batch_group_count"] == 1
        return _whole_axis(site, numbers.rhs_spec[1]) if alone else None
    return None


def _noted(program: Program) -> "_Notes":
    notes = _Notes({site.address: site for site in follow(program).sites})
    labels = [_Value(paths=frozenset([path])) for path in program.paths]
    others = [_Value(data=True)] * (len(program.jaxpr.jaxpr.invars) - len(labels))
    # Nothing of loops and branches is looked into, so that their rules are never asked.
    rules = Rules(notes.equation, *[_never] * 5, _Value(), FORMS.keys() - _CALLS)
    notes.meet(flow(program.jaxpr, [*labels, *others], rules), ())
    return notes


# Primitives that call one program, once, and mean by it what the program says.
_CALLS = frozenset(("jit", "remat2", "checkpoint", "closed_call", "core_call"))

# Operations of a chain besides those that lay it out anew: A y + B stays of that form.
_AFFINE = frozenset(("add", "add_any", "sub", "mul", "div", "neg"))

_LAYOUTS = frozenset(("broadcast_in_dim", "copy", "name", "reshape", "squeeze", "transpose"))

# Operations whose result differs along no axis along which no operand does.
_POINTWISE = _AFFINE | frozenset(
    ("abs", "clamp", "exp", "integer_pow", "log", "logistic", "max", "min", "pow", "rsqrt", "select_n", "sqrt", "square", "tanh")
)


class _Value(NamedTuple):
    """What a value is.

    Attributes:
      data: it depends on the inputs.
      paths: the parameters that it is computed from, where it does not.
      varies: the axes along which its entries may differ, where it does not; None is all.
      chain: the chain whose end it is so far.
    """

    data: bool = False
    paths: frozenset[str] = frozenset()
    varies: frozenset[int] | None = None
    chain: Affine | None = None

    def along(self, shape: tuple[int, ...]) -> frozenset[int]:
        """`varies`, of a value of this shape."""
        return frozenset(a for a, n in enumerate(shape) if n > 1 and (self.varies is None or a in self.varies))


def _never(*_: Any) -> Any:
    raise AssertionError("a rule of loops or branches was asked")


class _Notes:
    """What a walk finds: the products that may begin a chain, and who uses what."""

    def __init__(self, sites: Mapping[Address, Site]):
        self.sites = sites
        self.heads: list[Affine] = []
        # For each value of a chain, by the address of its equation, what its uses made of it: a longer chain, or none.
        self.uses: dict[Address, list[Affine | None]] = {}
        # By the same address, the product that a chain goes into, and the axis of its parameter that is summed over the channels.
        self.into: dict[Address, tuple[Site, int]] = {}
        # Where each parameter, or what is computed of it, meets an input or leaves the program.
        self.met: dict[str, set[Address]] = {}

    def equation(self, eqn: Any, labels: list[_Value], place: Place, settled: bool) -> list[_Value]:
        del settled
        if not any(label.data for label in labels):
            if eqn.effects:
                self.meet(labels, place.address)
            paths = frozenset().union(*(label.paths for label in labels))
            varies = _differing(eqn, labels) if len(eqn.outvars) == 1 else None
            return [_Value(paths=paths, varies=varies)] * len(eqn.outvars)
        longer = _longer(eqn, labels, place.address)
        self.meet(labels, place.address, longer)
        site = self.sites.get(place.address)
        if site is None or not labels[site.other].data:
            return [_Value(data=True, chain=longer)] * len(eqn.outvars)
        before = labels[site.other].chain
        if before is not None and (inner := summed(site, before.axis)) is not None:
            self.into[before.end] = site, inner
        if (channels := _channels(site)) is not None:
            weight_axis, axis = channels
            longer = Affine(site, weight_axis, place.address, axis)
            self.heads.append(longer)
        return [_Value(data=True, chain=longer)] * len(eqn.outvars)

    def meet(self, labels: Sequence[_Value], address: Address, longer: Affine | None = None) -> None:
        """Notes a use of values; `longer` is what it made of the chain among them."""
        for label in labels:
            if label.chain is not None:
                self.uses.setdefault(label.chain.end, []).append(longer)
            for path in label.paths:
                self.met.setdefault(path, set()).add(address)

    def whole(self, head: Affine) -> Affine | None:
        """The chain from a product to the last operation that reads a parameter, while every value has one use."""
        lengths = self.lengths(head)
        reading = [k for k in range(1, len(lengths)) if lengths[k].reads != lengths[k - 1].reads]
        return self.settled(lengths[: reading[-1] + 1]) if reading else None

    def link(self, head: Affine) -> Link | None:
        """The link that a product begins."""
        lengths = self.lengths(head)
        end = lengths[-1].end
        if end not in self.into or self.uses[end] != [None] or (chain := self.settled(lengths)) is None:
            return None
        (second, inner), channels = self.into[end], _channels(head.site)
        if self.met[second.path] != {second.address}:
            return None
        assert channels is not None
        return Link(chain, second, inner, channels[1], _channels(second), self.bias(second))

    def bias(self, site: Site) -> Affine | None:
        """The part of the chain behind a product that only adds; None where that reads no parameter."""
        lengths = self.lengths(next((head for head in self.heads if head.end == site.address), None))
        adding = [k for k, chain in enumerate(lengths) if all(step.startswith("add") for step in chain.formula)]
        reading = [k for k in adding if k and lengths[k].reads != lengths[k - 1].reads]
        return self.settled(lengths[: reading[-1] + 1]) if reading else None

    def lengths(self, head: Affine | None) -> list[Affine]:
        """The chain of a product at each of its lengths, while every value has one use."""
        lengths = [] if head is None else [head]
        while lengths and len(uses := self.uses.get(lengths[-1].end, [])) == 1 and uses[0] is not None:
            lengths.append(uses[0])
        return lengths

    def settled(self, lengths: Sequence[Affine]) -> Affine | None:
        """The last of these; None where the weight is met outside of the chain."""
        found, kept = lengths[-1], {chain.end for chain in lengths}
        path = found.site.path
        if not self.met[path] <= kept:
            return None
        reads = tuple(dict.fromkeys(found.reads))
        return found._replace(
            reads=reads,
            scales=tuple(dict.fromkeys(found.scales)),
            own=tuple(own for own in reads if self.met[own] <= kept and own != path),
        )


def _channels(site: Site) -> tuple[int, int] | None:
    """The axes of the parameter and of the output that number the channels; None where they do not match one to one."""
    if site.primitive == "dot_general":
        contracted, batch = (sides[site.operand] for sides in site.params["dimension_numbers"])
        free = [a for a in range(len(site.weight.shape)) if a not in (*contracted, *batch)]
        out = len(site.output.shape) - 1 if site.operand else len(batch)
    elif site.primitive == "conv_general_dilated" and site.operand == 1:
        numbers = site.params["dimension_numbers"]
        free, out = [numbers.rhs_spec[0]], numbers.out_spec[1]
    else:
        return None
    own = _whole_axis(site, free[0]) if len(free) == 1 else None
    return None if own is None else (own, out)


def _whole_axis(site: Site, axis: int) -> int | None:
    """The parameter's own axis that one of the operand is, entry by entry; None where it is none."""
    floating = jnp.issubdtype(site.output.dtype, jnp.floating) and jnp.issubdtype(site.weight.dtype, jnp.floating)
    view: View | None = views.stored(site.path, site.parameter)
    turned: set[int] = set()
    for step in site.view:
        # An operation that takes an index or other arrays besides may have changed the order.
        if view is None or step.operation is None:
            return None
        if step.primitive == "rev":
            turned |= {own for a in step.params["dimensions"] for own, _ in view.factors[a]}
        view = views.VIEWS[step.primitive](view, step.params, _shape_after(step, view.shape))
    if not floating or view is None or len(view.factors[axis]) != 1:
        return None
    ((own, n),) = view.factors[axis]
    whole = n == site.parameter.shape[own] == site.weight.shape[axis]
    return own if whole and own not in turned else None


def _shape_after(step: Step, shape: tuple[int, ...]) -> tuple[int, ...]:
    out = jax.eval_shape(lambda x: step.operation.bind(x, **step.params), jax.ShapeDtypeStruct(shape, jnp.float32))
    return (out[step.output] if isinstance(out, (list, tuple)) else out).shape


def _seen_through(eqn: Any) -> View | None:
    """The result of an operation on one operand as a view of it; None where it is none."""
    name = eqn.primitive.name
    if len(eqn.invars) != 1 or name not in views.VIEWS or name == "rev":
        return None
    operand = jax.ShapeDtypeStruct(eqn.invars[0].aval.shape, eqn.invars[0].aval.dtype)
    return views.VIEWS[name](views.stored("", operand), eqn.params, eqn.outvars[0].aval.shape)


def _differing(eqn: Any, labels: list[_Value]) -> frozenset[int] | None:
    """The axes along which a result may differ; None is all."""
    if eqn.primitive.name in _POINTWISE:
        return frozenset().union(*(label.along(v.aval.shape) for label, v in zip(labels, eqn.invars, strict=True)))
    if (view := _seen_through(eqn)) is None or view.lost:
        return None
    differing = labels[0].along(eqn.invars[0].aval.shape)
    return frozenset(a for a, factors in enumerate(view.factors) if any(own in differing for own, _ in factors))


def _longer(eqn: Any, labels: list[_Value], address: Address) -> Affine | None:
    """The chain among the operands with one more operation; None where this one is not for a chain."""
    held = [k for k, label in enumerate(labels) if label.data]
    chain = labels[held[0]].chain if len(held) == 1 and len(eqn.outvars) == 1 else None
    if chain is None or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None
    name, chain = eqn.primitive.name, chain._replace(end=address)
    if name == "convert_element_type":
        return chain
    if name in _LAYOUTS:
        return _laid_out(eqn, chain)
    kept = eqn.outvars[0].aval.shape == eqn.invars[held[0]].aval.shape
    return _combined(eqn, labels, chain) if kept and name in _AFFINE and (name, held) != ("div", [1]) else None


def _laid_out(eqn: Any, chain: Affine) -> Affine | None:
    view = _seen_through(eqn)
    if view is None or view.lost:
        return None
    axes = [a for a, factors in enumerate(view.factors) if any(own == chain.axis for own, _ in factors)]
    if len(axes) != 1 or view.factors[axes[0]] != ((chain.axis, chain.channels),) or view.shape[axes[0]] != chain.channels:
        return None
    return chain._replace(axis=axes[0], steps=(*chain.steps, Step(eqn.primitive.name, eqn.params, operation=eqn.primitive)))


def _combined(eqn: Any, labels: list[_Value], chain: Affine) -> Affine | None:
    name, others = eqn.primitive.name, [(label, v) for label, v in zip(labels, eqn.invars, strict=True) if not label.data]
    if any(label.along(v.aval.shape) - {chain.axis} for label, v in others):
        return None
    paths = tuple(sorted(path for label, _ in others for path in label.paths))
    # Two digits, since the same number is another one in a shorter type.
    read = paths or tuple(f"{float(v.val):.2g}" if isinstance(v, Literal) else "constant" for _, v in others)
    return chain._replace(
        formula=(*chain.formula, " ".join((name, *read))),
        reads=(*chain.reads, *paths),
        scales=(*chain.scales, *(paths if name in ("mul", "div") else ())),
    )
