"""A chosen weight as the matrices that its inputs meet, inputs by outputs, and statistics of those inputs.

Whatever the layout of a weight (in by out, out by in, heads apart, convolution windows, stacked layers), `Layout` says which of its
axes are summed over, which are kept and which number separate matrices, as the walk of `core.tracing` found it in the program.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_lab.core import tracing
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.tracing import Live, Reducer, Site
from jaxopt_lab.core.types import Array, PyTree

__all__ = [
    "COUNT",
    "LARGEST",
    "SECOND",
    "SIZE",
    "TOTAL",
    "Layout",
    "Matrices",
    "Met",
    "Statistic",
    "as_matrices",
    "first_of",
    "input_rows",
    "meeting",
    "statistics",
]

# Steps of a view that leave every entry in its place.
_IN_PLACE = frozenset(
    (
        "convert_element_type", "reduce_precision", "copy", "copy_p", "stop_gradient", "name", "sharding_constraint",
        "layout_constraint", "reshard", "mesh_cast", "pcast", "pvary",
    )
)  # fmt: skip


class Layout(NamedTuple):
    """The axes of a weight by what its products do with them, each in order.

    Attributes:
      shape: of the weight.
      stack: axes that number separate matrices.
      inputs: axes that are summed over.
      outputs: axes that are kept.
      channels: those of `inputs` along which an input itself is laid out; a convolution's window is not among them.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    channels: tuple[int, ...]

    def sizes(self, axes: Iterable[int]) -> tuple[int, ...]:
        """The lengths of some axes."""
        return tuple(self.shape[a] for a in axes)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes as `matrices` lays them: stack, inputs, outputs."""
        return (*self.stack, *self.inputs, *self.outputs)

    def matrices(self, w: Array) -> Array:
        """The weight as matrices `[k, n, m]`, inputs by outputs."""
        sides = (math.prod(self.sizes(axes)) for axes in (self.stack, self.inputs, self.outputs))
        return jnp.transpose(w, self.order).reshape(tuple(sides))

    def restored(self, matrices: Array) -> Array:
        """What has the shape `[k, n, m]` in the layout of the weight; sides that hold less than n or m are those of scales.

        A side of n is 1, the whole, or one for every so many neighbours along the last input axis; a side of m is 1 or the whole.
        """
        _, n, m = matrices.shape
        inputs, outputs = self.sizes(self.inputs), self.sizes(self.outputs)
        if n == 1:
            inputs = (1,) * len(inputs)
        elif n < math.prod(inputs):
            inputs = (*inputs[:-1], n // math.prod(inputs[:-1]))
        if m == 1:
            outputs = (1,) * len(outputs)
        cut = matrices.reshape(*self.sizes(self.stack), *inputs, *outputs)
        return jnp.transpose(cut, np.argsort(np.array(self.order, int)))

    def by_channel(self, values: Array, reduce: Callable[..., Array]) -> Array:
        """One value for each channel, in the places of all inputs `[k, n]`: what lies in a window is reduced to one."""
        cut = values.reshape(-1, *self.sizes(self.inputs))
        windows = tuple(1 + i for i, a in enumerate(self.inputs) if a not in self.channels)
        return jnp.broadcast_to(reduce(cut, axis=windows, keepdims=True), cut.shape).reshape(values.shape)

    def channel_scale(self, scale: Array) -> Array:
        """A scale `[k, n]`, the same all over a window, in the layout of the weight, with 1 along windows and outputs."""
        cut = scale.reshape(-1, *self.sizes(self.inputs))
        for i, a in enumerate(self.inputs):
            if a not in self.channels:
                cut = lax.slice_in_dim(cut, 0, 1, axis=1 + i)
        sides = (*self.sizes(self.stack), *cut.shape[1:], *(1 for _ in self.outputs))
        return jnp.transpose(cut.reshape(sides), np.argsort(np.array(self.order, int)))


class Met(NamedTuple):
    """How one site meets the matrices of a weight.

    Attributes:
      path: of the weight.
      layout: of the weight.
      scanned: how many of the first axes are taken apart by scans around the site.
      rows: which input of the matrices each summed entry of the product is, `[n']`.
      stacks: which matrix each batch entry of the product meets, those taken apart by scans left aside, `[b]`.
    """

    path: str
    layout: Layout
    scanned: int
    rows: np.ndarray
    stacks: np.ndarray


class Matrices(NamedTuple):
    """The chosen weights as matrices.

    Attributes:
      layouts: by path, in the order in which the program meets the weights.
      met: by name of the site.
    """

    layouts: dict[str, Layout]
    met: dict[str, Met]


class Statistic(NamedTuple):
    """A statistic of the inputs of each matrix.

    Attributes:
      square: whether it is `[n, n]` rather than `[n]`.
      of: inputs `[b, rows, n]` in at least float32 to their statistic `[b, n]` or `[b, n, n]`.
      join: how those of two batches come together: "add" or "max".
    """

    square: bool
    of: Callable[[Array], Array]
    join: str = "add"


# Sums of products of two inputs, of inputs, of their sizes; the largest sizes; how many rows there were.
SECOND = Statistic(True, lambda x: jnp.einsum("bri,brj->bij", x, x, precision=lax.Precision.HIGHEST))
TOTAL = Statistic(False, lambda x: jnp.sum(x, axis=1))
SIZE = Statistic(False, lambda x: jnp.sum(jnp.abs(x), axis=1))
LARGEST = Statistic(False, lambda x: jnp.max(jnp.abs(x), axis=1), "max")
COUNT = Statistic(False, lambda x: jnp.full((x.shape[0], x.shape[2]), x.shape[1], x.dtype))


def first_of(batches: Iterable[Any]) -> tuple[tuple[Any, ...], Iterable[Any]]:
    """The inputs of the first batch, and the batches with the first among them.

    Raises:
      ValueError: there are none.

    >>> inputs, batches = first_of(iter([{"x": 1}, {"x": 2}]))
    >>> inputs, list(batches)
    ((1,), [{'x': 1}, {'x': 2}])
    """
    rest = iter(batches)
    try:
        first = next(rest)
    except StopIteration:
        raise ValueError("`batches` is empty: there are no inputs to round by") from None
    x = first["x"] if isinstance(first, Mapping) and "x" in first else first
    return x if isinstance(x, tuple) else (x,), itertools.chain([first], rest) if rest is batches else batches


def meeting(site: Site) -> Met:
    """How a site meets its weight.

    Raises:
      NotImplementedError: the weight is not met as matrices, inputs by outputs; the message names its path and says why.

    >>> w, x = jnp.ones((4, 3)), jnp.ones((2, 3))
    >>> (site,) = tracing.sites(lambda w, x: x @ w["kernel"].T, {"kernel": w}, x)
    >>> meeting(site).layout
    Layout(shape=(4, 3), stack=(), inputs=(1,), outputs=(0,), channels=(1,))
    """
    if site.axes is None or (site.primitive == "conv_general_dilated" and site.operand == 0):
        raise _unmet(site, f"its axes cannot be told apart in {site.primitive}")
    groups = max(site.params.get("feature_group_count", 1), site.params.get("batch_group_count", 1))
    if groups > 1:
        raise _unmet(site, f"it is a convolution in {groups} groups, each of which meets other inputs")
    stack = tuple(sorted((*site.axes.batch, *site.axes.picked)))
    layout = Layout(site.parameter.shape, stack, site.axes.contracted, site.axes.free, site.axes.contracted)
    scanned = _scanned(site)
    rows = _followed(site, _numbers(layout.shape, layout.inputs))
    stacks = _followed(site, _numbers(layout.shape, stack[scanned:]))
    if site.primitive == "conv_general_dilated":
        spec = site.params["dimension_numbers"].rhs_spec
        rows, stacks = (np.transpose(ids, spec)[:1] for ids in (rows, stacks))
        of_channels = rows.reshape(rows.shape[1], -1)[:, 0]
        ids = np.unravel_index(of_channels, layout.sizes(layout.inputs))
        layout = layout._replace(channels=tuple(a for a, i in zip(layout.inputs, ids, strict=True) if np.any(i != i[0])))
        return Met(site.path, layout, scanned, rows.reshape(-1), stacks.reshape(1, -1)[:, 0])
    contract, batch = (numbers[site.operand] for numbers in site.params["dimension_numbers"])
    free = [a for a in range(rows.ndim) if a not in (*contract, *batch)]
    sides = (math.prod(rows.shape[a] for a in batch), math.prod(rows.shape[a] for a in contract), -1)
    rows, stacks = (np.transpose(ids, (*batch, *contract, *free)).reshape(sides)[:, :, 0] for ids in (rows, stacks))
    if (rows != rows[:1]).any() or (stacks != stacks[:, :1]).any():
        raise _unmet(site, "it meets different inputs in different parts of a batch")
    return Met(site.path, layout, scanned, rows[0], stacks[:, 0])


def as_matrices(apply: Callable[..., Any], params: PyTree, inputs: Sequence[Any], paths: Iterable[str]) -> Matrices:
    """Some weights, by path, as the matrices that `apply(params, *inputs)` takes them for; look-ups are left aside.

    Raises:
      ValueError: a weight meets no product, or several in different layouts, or is computed with on its way to one.
      NotImplementedError: as `meeting`.

    >>> found = as_matrices(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((3, 2))}, (jnp.ones((1, 3)),), ["kernel"])
    >>> found.layouts["kernel"].inputs
    (0,)
    """
    walked = tracing.walk(apply, params, *inputs)
    wanted = set(paths)
    met = {site.name: meeting(site) for site in walked.sites if site.path in wanted and site.primitive != "gather"}
    found: dict[str, Layout] = {}
    for path, layout, *_ in met.values():
        known = found.setdefault(path, layout)
        if known[:-1] != layout[:-1]:
            raise ValueError(
                f"{path} of shape {layout.shape} is summed over its axes {known.inputs} in one product and {layout.inputs} in "
                "another; leave it out of `where`"
            )
        found[path] = known._replace(channels=tuple(a for a in known.channels if a in layout.channels))
    if lost := [unknown for unknown in walked.unknown if unknown.path in wanted]:
        raise ValueError(
            f"{lost[0].path} goes through {lost[0].primitive}, behind which its inputs cannot be told; leave it out of `where`"
        )
    if idle := sorted(wanted - set(found)):
        others = ", ".join(walked.others.get(idle[0], ())) or "nothing else"
        raise ValueError(f"{idle[0]} meets no matrix product or convolution (it meets {others}); leave it out of `where`")
    return Matrices(found, met)


def input_rows(site: Site, live: Live) -> Array:
    """What a product sums over, `[b, rows, n]`, in at least float32: b for its batch axes, convolutions as patches.

    >>> x = jnp.ones((2, 5, 3))
    >>> (site,) = tracing.sites(lambda w, x: x @ w["kernel"], {"kernel": jnp.ones((3, 4))}, x)
    >>> input_rows(site, Live(x, None, None)).shape
    (1, 10, 3)
    """
    x = wide(live.input)
    if site.primitive == "conv_general_dilated":
        numbers = site.params["dimension_numbers"]
        window = [site.weight.shape[a] for a in numbers.rhs_spec[2:]]
        options = {key: site.params[key] for key in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")}
        # Features of a patch come channel by channel, and a channel's window in the order of the kernel's own.
        patches = lax.conv_general_dilated_patches(x, window, **options, dimension_numbers=numbers, precision=lax.Precision.HIGHEST)
        return jnp.moveaxis(patches, numbers.out_spec[1], -1).reshape(1, -1, patches.shape[numbers.out_spec[1]])
    contract, batch = (numbers[site.other] for numbers in site.params["dimension_numbers"])
    rest = [a for a in range(x.ndim) if a not in (*contract, *batch)]
    sides = (math.prod(x.shape[a] for a in axes) for axes in (batch, rest, contract))
    return jnp.transpose(x, (*batch, *rest, *contract)).reshape(tuple(sides))


def statistics(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    chosen: Matrices,
    wanted: Sequence[Statistic],
    *,
    paths: Iterable[str] | None = None,
    max_bytes: int | None = None,
) -> dict[str, tuple[Array, ...]]:
    """Statistics of what each chosen weight meets over a set of batches, all its products together.

    Args:
      apply: `apply(params, *inputs)`.
      params: dense.
      batches: as `tracing.collect` takes them.
      chosen: the weights.
      wanted: which statistics.
      paths: of the weights to gather them for; None is all.
      max_bytes: as in `tracing.collect`.

    Returns:
      By path, for each statistic `[k, n]` or `[k, n, n]`.

    Raises:
      ValueError: the inputs hold NaN or infinite values, and what `tracing.collect` raises.

    >>> apply, params, x = lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0]])
    >>> chosen = as_matrices(apply, params, (x,), ["kernel"])
    >>> statistics(apply, params, [{"x": x}, {"x": 2 * x}], chosen, [SECOND])["kernel"][0].tolist()
    [[[5.0, 10.0], [10.0, 20.0]]]
    """

    def start(site: Site, live: Live) -> tuple[Array, ...] | None:
        if site.name not in chosen.met:
            return None
        _, layout, scanned, _, _ = chosen.met[site.name]
        n, k = math.prod(layout.sizes(layout.inputs)), math.prod(layout.sizes(layout.stack[scanned:]))
        dtype = wide(jnp.zeros((), live.input.dtype)).dtype
        return tuple(jnp.zeros((k, *_sides(one, n)), dtype) for one in wanted)

    def update(site: Site, state: tuple[Array, ...], live: Live) -> tuple[Array, ...]:
        x, (_, _, _, rows, stacks) = input_rows(site, live), chosen.met[site.name]
        return tuple(_joined(one, old, one.of(x), rows, stacks) for one, old in zip(wanted, state, strict=True))

    taken = set(chosen.layouts if paths is None else paths)
    states = tracing.collect(apply, params, batches, Reducer(start, update), lambda path, leaf: path in taken, max_bytes=max_bytes)
    found: dict[str, tuple[Array, ...]] = {}
    for name, state in states.items():
        path, layout, *_ = chosen.met[name]
        n = math.prod(layout.sizes(layout.inputs))
        new = tuple(value.reshape(-1, *_sides(one, n)) for one, value in zip(wanted, state, strict=True))
        found[path] = tuple(map(_both, wanted, found[path], new)) if path in found else new
    finite = jax.jit(lambda values: jax.tree.map(lambda value: jnp.isfinite(value).all(), values))(found)
    for path, known in finite.items():
        if not all(map(bool, known)):
            raise ValueError(f"{path} meets inputs that hold NaN or infinite values, or overflow when they are squared")
    return found


def _sides(one: Statistic, n: int) -> tuple[int, ...]:
    return (n, n) if one.square else (n,)


def _both(one: Statistic, a: Array, b: Array) -> Array:
    return a + b if one.join == "add" else jnp.maximum(a, b)


def _joined(one: Statistic, state: Array, new: Array, rows: np.ndarray, stacks: np.ndarray) -> Array:
    """The state with what one batch adds, put where the matrices have those inputs."""
    new = new.astype(state.dtype)
    if np.array_equal(rows, np.arange(state.shape[1])) and np.array_equal(stacks, np.arange(state.shape[0])):
        return _both(one, state, new)
    place = (stacks[:, None, None], rows[:, None], rows[None, :]) if one.square else (stacks[:, None], rows[None, :])
    place = tuple(np.broadcast_to(ids.reshape((1,) * (new.ndim - ids.ndim) + ids.shape), new.shape) for ids in place)
    return state.at[place].add(new) if one.join == "add" else state.at[place].max(new)


def _numbers(shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """For each entry of an array, its number along some axes, counted in order."""
    sides = [n if a in axes else 1 for a, n in enumerate(shape)]
    return np.broadcast_to(np.arange(math.prod(sides), dtype=np.int32).reshape(sides), shape)


def _scanned(site: Site) -> int:
    """How many of the parameter's first axes the scans around a site take apart."""
    moves = [step.primitive for step in site.view if step.primitive not in _IN_PLACE]
    count = moves.count("scan")
    if moves[:count] != ["scan"] * count:
        raise _unmet(site, "its axes change places before a scan takes it apart")
    return count


def _followed(site: Site, ids: np.ndarray) -> np.ndarray:
    """Numbers of the parameter's entries, moved as the entries are on their way to the product."""
    moved: Any = ids
    for k, step in enumerate(site.view):
        if step.primitive in _IN_PLACE:
            continue
        if step.primitive == "scan":
            moved = moved[0]
        elif step.primitive == "concatenate" and all(later.primitive in _IN_PLACE for later in site.view[k + 1 :]):
            # Its own entries are told by themselves, along axes that are kept.
            continue
        elif step.operation is None:
            raise _unmet(site, f"{step.primitive} takes parts of it that only the running program knows")
        else:
            out = step.operation.bind(jnp.asarray(moved), **step.params)
            moved = out[step.output] if step.operation.multiple_results else out
    return np.asarray(moved)


def _unmet(site: Site, why: str) -> NotImplementedError:
    return NotImplementedError(f"{site.path} of shape {site.parameter.shape}: {why}; leave it out of `where`")
