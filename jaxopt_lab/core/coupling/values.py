"""The labels of a value: of each of its axes, or of several axes together where they were one before a reshape."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxopt_lab.core.coupling.labels import Labels

__all__ = ["Field", "Sum", "Value", "counted", "fixed", "fresh", "kept", "reshaped", "separated", "single", "tidy", "united"]


ADDS = "a unit of zeros would add to the sum over it"
"""Why units are protected over which something is summed that zeros do not make zero."""


class Field(NamedTuple):
    """Axes of a value that have labels together.

    Attributes:
      axes: one axis; or several that a reshape made of one, of which it is not decided yet along which one may cut.
      labels: one for every index, or for every tuple of indices: an array with the sizes of the axes.
    """

    axes: tuple[int, ...]
    labels: np.ndarray


class Sum(NamedTuple):
    """An axis that was summed over.

    Attributes:
      labels: of its indices.
      zero: whether a cut one would have added nothing.
    """

    labels: np.ndarray
    zero: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What the walk knows of a value. Two of them are equal if they are the same object.

    Attributes:
      shape: of the value.
      fields: each axis is in one of them.
      summed: the axes that were summed over to make it, if nothing but that was done since: what a mean divides by.
      zero: the axes at whose cut indices its entries are 0 where the parameters are masked: they add nothing to a sum.
      numbers: labels of an axis, if its entries are nothing but indices along that: what `argmax`, `top_k` or an iota gives.
    """

    shape: tuple[int, ...]
    fields: tuple[Field, ...]
    summed: tuple[Sum, ...] = ()
    zero: frozenset[int] = frozenset()
    numbers: np.ndarray | None = None

    @property
    def terms(self) -> list["Value"]:
        """The axes that were summed over, each as a value of its own."""
        return [Value((len(own.labels),), (Field((0,), own.labels),)) for own in self.summed]

    def field(self, axis: int) -> Field:
        """The field that an axis is in."""
        return next(field for field in self.fields if axis in field.axes)

    def labels(self, axis: int) -> np.ndarray:
        """The labels of an axis that has its own."""
        (own,) = (field.labels for field in self.fields if field.axes == (axis,))
        return own

    def moved(self, shape: Sequence[int], places: Callable[[int], int]) -> "Value":
        """The value with its axes elsewhere; `places` must keep the order within a field, or labels are transposed alike."""
        fields = []
        for axes, labels in self.fields:
            new = [places(a) for a in axes]
            order = sorted(range(len(new)), key=new.__getitem__)
            fields.append(Field(tuple(new[k] for k in order), labels.transpose(order)))
        return Value(tuple(shape), tuple(fields), self.summed, frozenset(map(places, self.zero)), self.numbers)


def fresh(labels: Labels, shape: Sequence[int]) -> Value:
    """A value whose every index has a label of its own.

    >>> fresh(Labels(), (2, 3)).labels(1).tolist()
    [2, 3, 4]
    """
    return Value(tuple(shape), tuple(Field((a,), labels.fresh(n)) for a, n in enumerate(shape)))


def fixed(labels: Labels, value: Value, reason: str, axes: Iterable[int] | None = None, *, counted: bool = False) -> None:
    """Nothing is cut along some axes of a value, or along any; `counted` as in `Labels.fix`.

    >>> labels = Labels()
    >>> value = fresh(labels, (2, 3))
    >>> fixed(labels, value, "it is an input", [0])
    >>> labels.is_fixed(value.labels(0)).tolist(), labels.is_fixed(value.labels(1)).tolist()
    ([True, True], [False, False, False])
    """
    for a in range(len(value.shape)) if axes is None else axes:
        labels.fix(value.field(a).labels, reason, counted=counted)


def counted(labels: Labels, value: Value) -> None:
    """A sum that is used as it is, and not as a mean: it needs the units that are no zeros when they are masked.

    >>> labels = Labels()
    >>> terms = labels.fresh(3)
    >>> counted(labels, Value((), (), (Sum(terms, zero=False),)))
    >>> labels.is_fixed(terms).tolist()
    [True, True, True]
    """
    for own in value.summed:
        if not own.zero:
            labels.fix(own.labels, ADDS, counted=True)


def separated(
    labels: Labels, value: Value, axes: Iterable[int] | None = None, *, inner: bool = False, whole: Iterable[int] = ()
) -> Value:
    """The value with labels of their own for some axes, or for all.

    Where axes were one, cutting has to leave a rectangle: whole slices along the outermost of them (the heads of an attention), or
    along the innermost where `inner` (the channels within each group), and never along an axis that has to stay `whole`, since
    single entries of it are taken out. What is not cut is fixed.

    >>> labels = Labels()
    >>> heads = reshaped(labels, fresh(labels, (6,)), (3, 2), [(slice(0, 1), slice(0, 2))])
    >>> labels.root(separated(labels, heads).labels(0)).tolist(), labels.is_fixed(separated(labels, heads).labels(1)).tolist()
    ([0, 2, 4], [True, True])
    """
    wanted = set(range(len(value.shape)) if axes is None else axes)
    fields: list[Field] = []
    for field in value.fields:
        if len(field.axes) == 1 or not wanted & set(field.axes):
            fields.append(field)
            continue
        held = {k for k, a in enumerate(field.axes) if a in whole}
        long = [k for k, n in enumerate(field.labels.shape) if n > 1]
        sides = [k for k in long if k not in held] or long or [0]
        carrier = sides[-1] if inner else sides[0]
        constant = _carrier(labels, field.labels)
        carrier = carrier if constant is None or constant in held else constant
        if carrier in held:
            labels.fix(field.labels, "single entries of it are taken out")
        others = tuple(k for k in range(field.labels.ndim) if k != carrier)
        labels.all_one(field.labels, others)
        if any(k > carrier for k in long):
            labels.block(field.labels)
        for k, a in enumerate(field.axes):
            if k == carrier:
                fields.append(Field((a,), field.labels[tuple(slice(None) if j == k else 0 for j in range(field.labels.ndim))]))
                continue
            own = labels.fresh(field.labels.shape[k])
            labels.fix(own, "it is a part of an axis that is cut along another part")
            fields.append(Field((a,), own))
    return dataclasses.replace(value, fields=tuple(sorted(fields, key=lambda field: field.axes)))


def _carrier(labels: Labels, joint: np.ndarray) -> int | None:
    """Along which axis alone labels differ already; None where along several, or along none."""
    roots = labels.root(joint)
    differ = [k for k, n in enumerate(roots.shape) if n > 1 and (roots != roots.take([0], axis=k)).any()]
    return differ[0] if len(differ) == 1 else None


def single(labels: Labels, own: np.ndarray) -> None:
    """One index of an axis that goes on alone: an axis that is gone, or that is copied, cannot be without it.

    >>> labels = Labels()
    >>> channels = labels.fresh(3)
    >>> labels.own(channels)
    >>> single(labels, channels[:1])
    >>> labels.is_fixed(channels).tolist()
    [True, False, False]
    """
    if labels.is_owned(own).any():
        labels.fix(own, "it is taken out by itself")


def tidy(labels: Labels, value: Value) -> Value:
    """The value with fields of their own for axes of length 1, which no cut concerns.

    >>> labels = Labels()
    >>> tidy(labels, Value((1, 3), (Field((0, 1), labels.fresh(1, 3)),))).labels(1).tolist()
    [0, 1, 2]
    """
    fields: list[Field] = []
    for axes, own in value.fields:
        long = [k for k, n in enumerate(own.shape) if n != 1]
        if len(axes) == 1 or len(long) == len(axes):
            fields.append(Field(axes, own))
            continue
        fields += [Field((a,), labels.fresh(1)) for k, a in enumerate(axes) if k not in long]
        if not long:
            single(labels, own)
        if long:
            fields.append(Field(tuple(axes[k] for k in long), own.reshape([own.shape[k] for k in long])))
    return dataclasses.replace(value, fields=tuple(sorted(fields, key=lambda field: field.axes)))


def united(labels: Labels, values: Sequence[Value]) -> Value:
    """Values of one shape whose indices are the same, side by side.

    >>> labels = Labels()
    >>> both = united(labels, [fresh(labels, (2,)), fresh(labels, (2,))])
    >>> labels.root(np.arange(4)).tolist()
    [0, 1, 0, 1]
    """
    first, *others = values
    for other in others:
        mine, theirs = ({field.axes for field in value.fields} for value in (first, other))
        loose = {a for axes in mine ^ theirs for a in axes}
        first, alike = separated(labels, first, loose), separated(labels, other, loose)
        for field in first.fields:
            labels.unite(field.labels, alike.field(field.axes[0]).labels)
    return dataclasses.replace(first, summed=(), zero=frozenset.intersection(*(value.zero for value in values)), numbers=None)


def reshaped(labels: Labels, value: Value, shape: Sequence[int], blocks: Iterable[tuple[slice, slice]]) -> Value:
    """The value in another shape; `blocks` pair runs of axes of equal size, of the old shape and of the new one.

    >>> labels = Labels()
    >>> flat = reshaped(labels, fresh(labels, (6,)), (3, 2), [(slice(0, 1), slice(0, 2))])
    >>> flat.field(0).axes, flat.field(0).labels.tolist()
    ((0, 1), [[0, 1], [2, 3], [4, 5]])
    """
    fields: list[Field] = []
    zero: set[int] = set()
    for before, after in blocks:
        old, new = range(before.start, before.stop), range(after.start, after.stop)
        flat = _flat(labels, value, old)
        sizes = [shape[a] for a in new]
        long = [a for a in new if shape[a] != 1]
        zero |= {*long} if all(a in value.zero for a in old if value.shape[a] != 1) else set()
        fields += [Field((a,), labels.fresh(1)) for a in new if shape[a] == 1]
        if long:
            fields.append(Field(tuple(long), flat.reshape([n for n in sizes if n != 1])))
        else:
            single(labels, flat)
    fields.sort(key=lambda field: field.axes)
    return Value(tuple(shape), tuple(fields), value.summed, frozenset(zero), value.numbers)


def _flat(labels: Labels, value: Value, axes: Sequence[int]) -> np.ndarray:
    """A label for each index of some neighbouring axes taken as one."""
    long = tuple(a for a in axes if value.shape[a] != 1)
    for a in axes:
        if a not in long:
            single(labels, value.field(a).labels)
    if not long:
        return labels.fresh(1)
    if any(field.axes == long for field in value.fields):
        return value.field(long[0]).labels.reshape(-1)
    value = separated(labels, value, long)
    # An index of the whole is kept if it is along each axis; one label can say so for one axis that may be cut.
    loose = [a for a in long if not labels.is_fixed(value.labels(a)).all()]
    owned = [a for a in loose if labels.is_owned(value.labels(a)).any()]
    carrier = (owned or loose or list(long))[-1]
    for a in loose:
        if a == carrier:
            continue
        labels.fix(value.labels(a), "it is merged with an axis that may be cut")
    sizes = [value.shape[a] for a in axes]
    k = list(axes).index(carrier)
    spread = value.labels(carrier).reshape([sizes[k] if j == k else 1 for j in range(len(sizes))])
    return np.broadcast_to(spread, sizes).reshape(-1)


def kept(labels: Labels, copies: np.ndarray, value: Value) -> list[np.ndarray]:
    """For each axis of a value the indices that are left, in order; those of which there are several stand there as often.

    Whole slices next to each other that are one unit, such as a head, are copied together.

    Args:
      labels: all of them.
      copies: for every label how many there are of it: 0 where it is cut.
      value: whose axes they are.

    Raises:
      ValueError: what is left along axes that were one is no rectangle.

    >>> labels = Labels()
    >>> [indices.tolist() for indices in kept(labels, np.array([1, 0, 2]), fresh(labels, (3,)))]
    [[0, 2, 2]]
    """
    found: dict[int, np.ndarray] = {}
    for axes, own in value.fields:
        left = copies[labels.root(own)]
        carrier = _carrier(labels, own) if len(axes) > 1 else 0
        for k, a in enumerate(axes):
            others = tuple(j for j in range(left.ndim) if j != k)
            along = left.max(axis=others, initial=0)
            # Of axes that were one, only that along which one may cut can have copies.
            if k != carrier or (along <= 1).all():
                found[a] = np.flatnonzero(along)
            else:
                roots = labels.root(own).min(axis=others)
                apart = (np.diff(roots) != 0) | ~labels.is_block(roots[1:])
                runs = np.split(np.arange(len(along)), np.flatnonzero(apart) + 1)
                found[a] = np.concatenate([np.tile(run, along[run[0]]) for run in runs])
        if math.prod(len(found[a]) for a in axes) != left.sum():
            raise ValueError(f"what is kept of axes {axes} of a value of shape {value.shape} is no rectangle")
    return [found[a] for a in range(len(value.shape))]
