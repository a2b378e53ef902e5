"""What a value is of a stored parameter: which of the parameter's own axes lie where, after transposes, reshapes and slices.

An axis of a value is written as factors `(axis, size)`, the slowest first: which axis of the parameter they index, and how many
entries of it. A kernel `(in, heads * size)` that is reshaped to `(in, heads, size)` has the factors `((0, in),)`, `((1, heads),)`
and `((1, size),)`: a sum over the last two axes is one over the parameter's axis 1, a sum over the last one alone is not over any.

A primitive that only looks at its operand otherwise is one row of `VIEWS`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

__all__ = ["VIEWS", "Axes", "Factors", "Step", "View", "concatenated", "gathered", "sharded", "step_of_scan", "stored"]

Factors = tuple[tuple[int, int], ...]
"""The factors of one axis of a value, `(axis of the parameter, entries)`, the slowest first; none for an axis of copies."""


class Axes(NamedTuple):
    """The axes of a parameter, in its own numbering, by what a product does with them.

    Attributes:
      contracted: summed over.
      free: kept, and found in the output.
      batch: kept, and shared with the input, as the weights of a layer under `vmap` are.
      picked: not met as a whole: each time an index chooses one entry (a scan over stacked layers, a lookup).
    """

    contracted: tuple[int, ...] = ()
    free: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    picked: tuple[int, ...] = ()


class Step(NamedTuple):
    """One operation between the stored parameter and the operand of a product.

    Attributes:
      primitive: its name; "scan" for the entry that each step of a scan takes of a stacked parameter.
      params: the parameters of the equation.
      output: which of its results, where it has several (`split`).
      operation: the primitive itself where the operation is a function of the parameter alone; None where it also takes an index
        (`dynamic_slice`, `gather`, `scan`), other arrays (`concatenate`) or the number of a device.
    """

    primitive: str
    params: Mapping[str, Any]
    output: int = 0
    operation: Any = None


class View(NamedTuple):
    """A value that holds entries of one parameter, unchanged but for its dtype.

    Attributes:
      path: of the parameter.
      parameter: its shape and dtype as stored.
      shape: of the value.
      factors: for each axis of the value.
      picked: axes of the parameter of which an entry was chosen.
      lost: axes of the parameter that cannot be told apart any more.
      joined: `(axis of the value, entries)` for each axis along which the value was concatenated with others.
      steps: the operations, in order.
      scans: at which depths of nesting it was cut by a scan.
    """

    path: str
    parameter: jax.ShapeDtypeStruct
    shape: tuple[int, ...]
    factors: tuple[Factors, ...]
    picked: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()
    joined: tuple[tuple[int, int], ...] = ()
    steps: tuple[Step, ...] = ()
    scans: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """How many entries of the value are this parameter's: all, unless it was concatenated with others."""
        own = dict(self.joined)
        return math.prod(own.get(axis, n) for axis, n in enumerate(self.shape))

    def axes(self, contracted: Iterable[int], batch: Iterable[int] = (), picked: Iterable[int] = ()) -> Axes | None:
        """The parameter's own axes by what is done with those of the value; None where one is met in two ways, or was lost."""
        done = dict.fromkeys(contracted, "contracted") | dict.fromkeys(batch, "batch") | dict.fromkeys(picked, "picked")
        met: dict[int, set[str]] = {axis: set() for axis in range(len(self.parameter.shape))}
        for axis, factors in enumerate(self.factors):
            for own, _ in factors:
                met[own].add(done.get(axis, "free"))
        if self.lost or any(len(ways) > 1 for ways in met.values()):
            return None
        ways = {axis: next(iter(ways), "picked") for axis, ways in met.items()}
        return Axes(**{way: tuple(axis for axis in ways if ways[axis] == way) for way in Axes._fields})


def stored(path: str, parameter: jax.ShapeDtypeStruct) -> View:
    """The parameter as it is stored.

    >>> stored("kernel", jax.ShapeDtypeStruct((3, 2), "float32")).factors
    (((0, 3),), ((1, 2),))
    """
    return View(path, parameter, parameter.shape, tuple(((axis, n),) for axis, n in enumerate(parameter.shape)))


def _moved(
    view: View, shape: Sequence[int], origin: Sequence[int | None], factors: Mapping[int, Factors | None] | None = None
) -> View:
    """The view whose axis `i` was axis `origin[i]` of the old one, or is new (None); `factors` overrides, None in it is lost.

    Axes of the parameter that no axis of the new view holds were picked.
    """
    factors = dict(factors or {})
    new: list[Factors] = []
    lost = set(view.lost)
    for axis, old in enumerate(origin):
        own = factors[axis] if axis in factors else () if old is None else view.factors[old]
        if own is None:
            lost |= {a for a, _ in view.factors[old]} if old is not None else set()
        new.append(own or ())
    kept = {a for own in new for a, _ in own} | lost
    gone = {a for own in view.factors for a, _ in own} - kept
    place = {old: axis for axis, old in enumerate(origin) if old is not None}
    return view._replace(
        shape=tuple(shape),
        factors=tuple(new),
        picked=view.picked | gone,
        lost=frozenset(lost),
        joined=tuple((place[axis], own) for axis, own in view.joined),
    )


def _identity(view: View, params: Mapping[str, Any], shape: tuple[int, ...]) -> View:
    del params, shape
    return view


def _transpose(view: View, params: Mapping[str, Any], shape: tuple[int, ...]) -> View:
    return _moved(view, shape, params["permutation"])


def _squeeze(view: View, params: Mapping[str, Any], shape: tuple[int, ...]) -> View | None:
    kept = [axis for axis in range(len(view.shape)) if axis not in params["dimensions"]]
    return _moved(view, shape, kept) if {axis for axis, _ in view.joined} <= set(kept) else None


def _broadcast_in_dim(view: View, params: Mapping[str, Any], shape: tuple[int, ...]) -> View | None:
    origin = {axis: old for old, axis in enumerate(params["broadcast_dimensions"])}
    return _moved(view, shape, [origin.get(axis) for axis in range(len(shape))])


def _reshape(view: View, params: Mapping[str, Any], shape: tuple[int, ...]) -> View | None:
    """Walks both shapes in blocks of equal size; inside a block the factors are dealt out again."""
    if params.get("dimensions") is not None or 0 in shape:
        return None
    joined = {axis for axis, _ in view.joined}
    origin: list[int | None] = [None] * len(shape)
    factors: dict[int, Factors | None] = {}
    lost: set[int] = set()
    for old, new in _blocks(view.shape, shape):
        if len(old) == len(new) == 1:
            origin[new[0]] = old[0]
            continue
        if joined & set(old):
            return None
        whole = all(math.prod(n for _, n in view.factors[axis]) == view.shape[axis] for axis in old)
        dealt = _dealt([f for axis in old for f in view.factors[axis]], [shape[axis] for axis in new]) if whole else None
        if dealt is None:
            lost |= {a for axis in old for a, _ in view.factors[axis]}
        factors |= dict.fromkeys(new, ()) if dealt is None else dict(zip(new, dealt, strict=True))
    out = _moved(view, shape, origin, factors)
    return out._replace(lost=out.lost | lost, picked=out.picked - lost)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Consecutive axes of both shapes that hold the same entries, as finely as the shapes allow."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        # An axis of length 1 on one side only belongs to no other.
        if i < len(old) and old[i] == 1 and (j == len(new) or new[j] != 1):
            blocks.append(([i], []))
            i += 1
            continue
        if j < len(new) and new[j] == 1 and (i == len(old) or old[i] != 1):
            blocks.append(([], [j]))
            j += 1
            continue
        first_i, first_j = i, j
        left, right = old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        blocks.append((list(range(first_i, i)), list(range(first_j, j))))
    return blocks


def _dealt(factors: Sequence[tuple[int, int]], sides: Sequence[int]) -> list[Factors] | None:
    """The factors dealt out to axes of these lengths in order, split where they must be; None where they do not divide."""
    left = [factor for factor in factors if factor[1] > 1]
    dealt = []
    for side in sides:
        own: list[tuple[int, int]] = []
        room = side
        while room > 1:
            axis, n = left.pop(0)
            taken = min(n, room)
            if max(n, room) % taken:
                return None
            own.append((axis, taken))
            room //= taken
            if n > taken:
                left.insert(0, (axis, n // taken))
        dealt.append(tuple(own))
    return dealt


def _cut(factors: Factors, old: int, new: int) -> Factors | None:
    """The factors of an axis that was cut from `old` to `new` entries; None where they cannot be told apart any more."""
    if new == old:
        return factors
    if new == 1:
        return tuple((axis, 1) for axis, _ in factors)
    return ((factors[0][0], new),) if len(factors) == 1 else () if not factors else None


def _narrowed(view: View, shape: Sequence[int]) -> View | None:
    """The view cut to `shape` along some axes."""
    own = dict(view.joined)
    if any(axis in own and n != view.shape[axis] for axis, n in enumerate(shape)):
        return None
    factors = {axis: _cut(view.factors[axis], view.shape[axis], n) for axis, n in enumerate(shape)}
    return _moved(view, shape, range(len(shape)), factors)


def _slice(view: View, params: Mapping[str, Any], shape: tuple[int, ...]) -> View | None:
    del params
    return _narrowed(view, shape)


# By name of the primitive: `(view of the operand, parameters of the equation, shape of the result) -> view of the result`, or None
# where what comes out is no view.
VIEWS: dict[str, Callable[[View, Mapping[str, Any], tuple[int, ...]], View | None]] = {
    **dict.fromkeys(
        (
            "convert_element_type", "reduce_precision", "copy", "copy_p", "stop_gradient", "name", "rev", "sharding_constraint",
            "layout_constraint", "reshard", "mesh_cast", "pcast", "pvary",
        ),
        _identity,
    ),
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "slice": _slice,
    "split": _slice,
    "dynamic_slice": _slice,
}  # fmt: skip


def gathered(view: View, params: Mapping[str, Any], shape: tuple[int, ...]) -> View | None:
    """The view of what `gather` takes by indices that no input decides; axes of which it takes several entries are lost.

    >>> table = jax.ShapeDtypeStruct((7, 4), "float32")
    >>> numbers = jax.lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
    >>> gathered(stored("table", table), {"dimension_numbers": numbers, "slice_sizes": (1, 4)}, (3, 4)).lost
    frozenset({0})
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    cut = _narrowed(view, sizes)
    if cut is None:
        return None
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(len(sizes)) if axis not in dropped]
    place = dict(zip(numbers.offset_dims, kept, strict=True))
    if {axis for axis, _ in view.joined} & dropped:
        return None
    out = _moved(cut, shape, [place.get(axis) for axis in range(len(shape))])
    copies = math.prod(n for axis, n in enumerate(shape) if axis not in place)
    mixed = frozenset(a for axis in (*numbers.start_index_map, *numbers.operand_batching_dims) for a, _ in view.factors[axis])
    return out if copies == 1 else out._replace(lost=out.lost | mixed, picked=out.picked - mixed)


def concatenated(views: Sequence[tuple[View, ...]], dimension: int, shape: tuple[int, ...]) -> tuple[View, ...] | None:
    """The views that a concatenation holds: of each operand its own, in order; None where one was concatenated along it before.

    >>> kernel = stored("kernel", jax.ShapeDtypeStruct((3, 2), "float32"))
    >>> (both, _) = concatenated([(kernel,), (kernel,)], 1, (3, 4))
    >>> both.shape, both.joined, both.size
    ((3, 4), ((1, 2),), 6)
    """
    out = []
    for view in (view for operand in views for view in operand):
        if dimension in dict(view.joined):
            return None
        step = Step("concatenate", {"dimension": dimension})
        out.append(view._replace(shape=shape, joined=(*view.joined, (dimension, view.shape[dimension])), steps=(*view.steps, step)))
    return tuple(out)


def step_of_scan(view: View, depth: int) -> View | None:
    """The entry of a stacked parameter that a step of a scan takes: its leading axis is picked.

    >>> step_of_scan(stored("kernel", jax.ShapeDtypeStruct((5, 3, 2), "float32")), 0).picked
    frozenset({0})
    """
    if 0 in dict(view.joined):
        return None
    out = _moved(view, view.shape[1:], range(1, len(view.shape)))
    return out._replace(steps=(*view.steps, Step("scan", {})), scans=(*view.scans, depth))


def sharded(view: View, shape: tuple[int, ...]) -> View | None:
    """The part of shape `shape` that one device holds under `shard_map`.

    >>> sharded(stored("kernel", jax.ShapeDtypeStruct((8, 2), "float32")), (2, 2)).factors
    (((0, 2),), ((1, 2),))
    """
    out = _narrowed(view, shape)
    return out and out._replace(steps=(*view.steps, Step("shard_map", {})))
