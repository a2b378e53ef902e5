"""Weights that are levels times scales: what every such format can do without becoming dense, and how it gets into a tree."""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_lab.compress.arrays import affine, packing
from jaxopt_lab.compress.arrays.packing import Packed
from jaxopt_lab.compress.leaf import Leaf, checked, fills_with_nan
from jaxopt_lab.compress.leaves.product import product
from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import naming
from jaxopt_lab.core.shapes import equal_blocks
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["Group", "Scaled", "group_of", "store"]

Group = int | tuple[int, int] | None
"""How many neighbours share a scale, and perhaps along which axis."""


class Scaled(Leaf):
    r"""The base of formats in which a weight is a level, which its code stands for, times a scale.

    .. math:: w \approx s \, v(q)

    A format declares the fields below, and says what its codes stand for: `decode`. Invariants: `scale` (and every other field
    named in `scales`) has the rank of `codes`, and its side along each axis divides theirs: 1 is one for all, the whole side one
    for each index, another one for each group of neighbours.

    Products with axes that do not carry a scale run on the levels, and the scale multiplies what comes out; where a summed axis
    carries scales they are multiplied in first (see `product`). Everything else runs on the dense weight, computed in the scale's
    dtype and rounded once. Nothing trains.

    Attributes:
      codes: what is stored, an array or `Packed`.
      scale: float32 or wider.
      dense_dtype: the dtype of the weight that it stands for (static).
      swapped: whether the last two axes of the weight have changed places in all that is stored (static).
      scales: the fields that are laid out like `scale`.
    """

    codes: eqx.AbstractVar[Array | Packed]
    scale: eqx.AbstractVar[Array]
    dense_dtype: eqx.AbstractVar[Any]
    swapped: eqx.AbstractVar[bool]
    scales: ClassVar[tuple[str, ...]] = ("scale",)

    @abstractmethod
    def decode(self, codes: Array, fields: Mapping[str, Array], dtype: Any) -> Array:
        """The levels of some codes in a floating-point dtype.

        Args:
          codes: any part of what is stored, unpacked; floats of eight bits come as uint8.
          fields: those named in `scales` that are not None, cut to the same part.
          dtype: of the levels.
        """

    def __check_init__(self):
        shape = tuple(self.codes.shape)
        for name, field in self.fields().items():
            if field.ndim != len(shape) or any(m < 1 or n % m for m, n in zip(field.shape, shape, strict=True)):
                raise ValueError(
                    f"codes {shape} need a {name} of their rank, each side 1, equal or of groups that divide: got {field.shape}"
                )

    def aval(self):
        like = jax.typeof(self.codes.planes[0] if isinstance(self.codes, Packed) else self.codes)
        return like.update(shape=_swap(self.codes.shape) if self.swapped else tuple(self.codes.shape), dtype=self.dense_dtype)

    def format(self) -> str:
        sides = _swap(self.scale.shape) if self.swapped else self.scale.shape
        axes = list(enumerate(zip(self.shape, sides, strict=True)))
        channels = [str(a) for a, (n, m) in axes if 1 < m == n]
        groups = [f", groups of {n // m} along {a}" for a, (n, m) in axes if 1 < m < n]
        where = f"per channel {'x'.join(channels)}" if channels else "" if groups else "per tensor"
        return (where + "".join(groups)).removeprefix(", ") + (", swapped" if self.swapped else "")

    def fields(self) -> dict[str, Array]:
        """The fields named in `scales`, but for those that are None."""
        return {name: field for name in self.scales if (field := getattr(self, name)) is not None}

    def stored(self) -> "Scaled":
        """What is stored, as a weight of its own: the leaf without the exchange of axes."""
        return dataclasses.replace(self, swapped=False)

    def plain(self) -> "Scaled":
        """The leaf with its codes in the weight's own order of axes."""
        return self.stored().transpose(permutation=_swap(range(self.ndim)), moving=True) if self.swapped else self

    def levels(self, dtype: Any) -> Array:
        """The levels of the whole weight in a floating-point dtype."""
        levels = self.decode(_unpacked(self.codes), self.fields(), dtype)
        return jnp.swapaxes(levels, -1, -2) if self.swapped else levels

    def dense(self, codes: Array, fields: Mapping[str, Array]) -> Array:
        """The weights that some codes stand for, computed in the scale's dtype and rounded once. Arguments as in `decode`."""
        scale = fields["scale"]
        return affine.scaled(self.decode(codes, fields, scale.dtype), scale).astype(self.dense_dtype)

    def materialise(self) -> Array:
        weight = self.dense(_unpacked(self.codes), self.fields())
        return jnp.swapaxes(weight, -1, -2) if self.swapped else weight

    def stepwise(self, length):
        packed = isinstance(self.codes, Packed) and self.codes.axis == -self.ndim
        # Stored last, the first axis of a matrix cannot be cut off; groups of it would be torn.
        if packed or (self.swapped and self.ndim == 2) or any(f.shape[0] not in (1, length) for f in self.fields().values()):
            return NotImplemented
        fields = {name: jnp.broadcast_to(field, (length, *field.shape[1:])) for name, field in self.fields().items()}
        return dataclasses.replace(self, **fields)

    @property
    def unit(self) -> int:
        """How many neighbours along the first axis of what is stored must stay together, since they share bytes or scales."""
        n = self.codes.shape[0]
        runs = [n // field.shape[0] for field in self.fields().values() if field.shape[0] > 1]
        codes = self.codes
        return math.lcm(*runs, codes.per_byte if isinstance(codes, Packed) and codes.axis == -codes.ndim else 1)

    def strips(self, count: int, unit: int) -> Callable[[Any], tuple[Array, dict[str, Array]]]:
        """A function of a number below `count`, which gives that strip's codes and fields as `decode` takes them.

        A strip is every `count`-th group of `unit` neighbours (a multiple of `self.unit`) along the first axis of what is stored,
        which must come out even.
        """
        n, codes = self.codes.shape[0], _viewed(self.codes)

        def field_of(field: Array, index: Any) -> Array:
            return packing.strip(field, index, count, unit * field.shape[0] // n) if field.shape[0] > 1 else field

        def strip(index: Any) -> tuple[Array, dict[str, Array]]:
            fields = {name: field_of(field, index) for name, field in self.fields().items()}
            return _unpacked(packing.strip(codes, index, count, unit)), fields

        return strip

    def product(self, x: Array, dimension_numbers: tuple, precision: Any, dtype: Any, **params: Any) -> Array:
        """`lax.dot_general(x, self)` of a leaf that is not swapped."""
        return product(x, self, dimension_numbers, precision, dtype, **params)

    def dot_general(self, x, *, dimension_numbers, precision, preferred_element_type, **params):
        if not self.swapped:
            return self.product(x, dimension_numbers, precision, preferred_element_type, **params)
        (summed, contract), (shared, batch) = dimension_numbers
        last, order = self.ndim - 1, _swap(range(self.ndim))
        # Axes of the weight keep their order in the product: the last two change places again where both of them are there.
        both = not {last, last - 1} & {*contract, *batch}
        if both and params.get("out_sharding") is not None:
            return NotImplemented
        numbers = (summed, tuple(order[a] for a in contract)), (shared, tuple(order[a] for a in batch))
        out = self.stored().product(x, numbers, precision, preferred_element_type, **params)
        return jnp.swapaxes(out, -1, -2) if both else out

    def conv_general_dilated(self, x, *, dimension_numbers, **params):
        if self.swapped:
            return self.plain().conv_general_dilated(x, dimension_numbers=dimension_numbers, **params)
        # Half precision cannot hold sums of levels, and a convolution that widens its output has no gradient.
        if self.dense_dtype == jnp.float16 or not self.scaled_by(dimension_numbers.rhs_spec[0]):
            return NotImplemented
        out = lax.conv_general_dilated_p.bind(x, self.levels(self.dense_dtype), dimension_numbers=dimension_numbers, **params)
        return (out * self.along(dimension_numbers.out_spec[1], out.ndim)).astype(out.dtype)

    def scaled_by(self, axis: int) -> bool:
        """Whether the only scales are one for each index of an axis of what is stored, or a single one."""
        return all(m == 1 or (a == axis and m == self.codes.shape[a]) for a, m in enumerate(self.scale.shape))

    def along(self, axis: int, ndim: int) -> Array:
        """The scales of a leaf that is `scaled_by` one axis, laid along an axis of something of rank `ndim`."""
        sides = tuple(self.scale.size if a == axis else 1 for a in range(ndim))
        return lax.broadcast_in_dim(self.scale.reshape(-1), sides, (axis,))

    def gather(self, indices, *, dimension_numbers, slice_sizes, fill_value, **params):
        if self.swapped:
            return self.plain().gather(
                indices, dimension_numbers=dimension_numbers, slice_sizes=slice_sizes, fill_value=fill_value, **params
            )
        shape, indexed, offsets = self.shape, dimension_numbers.start_index_map, tuple(dimension_numbers.offset_dims)
        whole = all(slice_sizes[a] == n for a, n in enumerate(shape) if a not in indexed)
        if not whole or dimension_numbers.operand_batching_dims or not fills_with_nan(fill_value):
            return NotImplemented
        collapsed = tuple(dimension_numbers.collapsed_slice_dims)

        def look_up(array: Array, at: Array = indices) -> Array:
            sizes = tuple(size if a in indexed else array.shape[a] for a, size in enumerate(slice_sizes))
            # Codes out of bounds are whatever their dtype gives: their scale makes them NaN.
            return lax.gather(array, at, dimension_numbers, sizes, **params)

        codes = _codes_at(_viewed(self.codes), indices, look_up, dimension_numbers)

        def scale_at(field: Array) -> Array:
            if any(field.shape[a] > 1 for a in indexed):
                if [slice_sizes[a] for a in indexed] == [1]:
                    (a,) = indexed
                    return look_up(field, indices // (shape[a] // field.shape[a]))
                for a in indexed:
                    field = jnp.repeat(field, shape[a] // field.shape[a], axis=a) if field.shape[a] > 1 else field
                return look_up(jnp.broadcast_to(field, [shape[a] if a in indexed else m for a, m in enumerate(field.shape)]))
            removed = lax.squeeze(field, collapsed)
            sides = dict(zip(offsets, removed.shape, strict=True))
            return lax.broadcast_in_dim(removed, tuple(sides.get(a, 1) for a in range(codes.ndim)), offsets)

        fields = {name: scale_at(field) for name, field in self.fields().items()}
        if all(self.scale.shape[a] == 1 for a in indexed):
            # Rows that are out of bounds come back as NaN, as a float table gives them: through the scale, since codes have no NaN.
            inside = jnp.ones(tuple(n if a in indexed else 1 for a, n in enumerate(shape)), self.scale.dtype)
            fields["scale"] = fields["scale"] * look_up(inside)
        return self.dense(codes, fields)

    def convert_element_type(self, *, new_dtype, **params):
        if not jnp.issubdtype(new_dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, dense_dtype=new_dtype)

    def transpose(self, *, permutation, moving=False):
        order = tuple(permutation)
        if self.ndim > 1 and order == _swap(range(self.ndim)) and not moving:
            # Only noted: everything stays where it is, in the order in which products read it.
            return dataclasses.replace(self, swapped=not self.swapped)
        leaf = self.plain()
        places = [order.index(a) for a in range(leaf.ndim)]
        return leaf._moved(packing.moved(leaf.codes, lambda codes: lax.transpose(codes, order), places), lax.transpose, order)

    def squeeze(self, *, dimensions):
        gone, last = {a % self.ndim for a in dimensions}, self.ndim - 1
        if self.swapped:
            if gone & {last, last - 1}:
                return self.plain().squeeze(dimensions=dimensions)
            return _swapped(self.stored().squeeze(dimensions=dimensions))
        left = [a for a in range(self.ndim) if a not in gone]
        places = [left.index(a) if a in left else None for a in range(self.ndim)]
        codes = packing.moved(self.codes, lambda codes: lax.squeeze(codes, dimensions), places)
        return self._moved(codes, lax.squeeze, dimensions)

    def broadcast_in_dim(self, *, shape, broadcast_dimensions, **params):
        ndim, into = len(shape), tuple(broadcast_dimensions)
        if self.swapped:
            if into[-2:] != (ndim - 2, ndim - 1):
                return self.plain().broadcast_in_dim(shape=shape, broadcast_dimensions=into, **params)
            return _swapped(self.stored().broadcast_in_dim(shape=_swap(shape), broadcast_dimensions=into, **params))
        if isinstance(self.codes, Packed) and self.codes.width != shape[into[self.codes.axis]]:
            return NotImplemented

        def spread_codes(codes: Array) -> Array:
            # The packed axis has fewer bytes than codes, and keeps them.
            own = {d: m for d, m, n in zip(into, codes.shape, self.codes.shape, strict=True) if m != n}
            return lax.broadcast_in_dim(codes, tuple(own.get(a, n) for a, n in enumerate(shape)), into)

        def spread(field: Array, into: tuple[int, ...]) -> Array:
            sides = dict(zip(into, field.shape, strict=True))
            return lax.broadcast_in_dim(field, tuple(sides.get(a, 1) for a in range(ndim)), into)

        return self._moved(packing.moved(self.codes, spread_codes, into), spread, into)

    def reshape(self, *, new_sizes, dimensions, **params):
        if self.swapped:
            return self.plain().reshape(new_sizes=new_sizes, dimensions=dimensions, **params)
        old, new = self.shape, tuple(new_sizes)
        sides = {name: affine.reshaped_sides(old, field.shape, new) for name, field in self.fields().items()}
        if dimensions is not None or None in sides.values():
            return NotImplemented
        places = _places(old, new)

        def move(codes: Array) -> Array:
            # Every axis but the packed one has as many bytes as codes.
            changed = {places[a]: m for a, (m, n) in enumerate(zip(codes.shape, old, strict=True)) if m != n}
            return codes.reshape([changed.get(a, n) for a, n in enumerate(new)])

        codes = packing.moved(self.codes, move, places)
        if codes is None:
            return NotImplemented
        return dataclasses.replace(self, codes=codes, **{name: field.reshape(sides[name]) for name, field in self.fields().items()})

    def _moved(self, codes: Array | Packed | None, move: Callable[..., Array], *where: Any) -> Any:
        """The leaf with these codes, and every field moved alike; `NotImplemented` where the codes could not be."""
        if codes is None:
            return NotImplemented
        return dataclasses.replace(self, codes=codes, **{name: move(field, *where) for name, field in self.fields().items()})


def store(
    params: PyTree, where: Where, make: Callable[[Any, str], Any], *, accept: type[Leaf] | tuple[type[Leaf], ...] = ()
) -> PyTree:
    """Replaces the chosen weights of a tree by leaves; an error of `make` gets the path and the shape in front.

    Args:
      params: any tree.
      where: which leaves (see `tree.select`).
      make: `(weight, path) -> leaf`.
      accept: compressed leaves that `make` takes as they are.

    Raises:
      ValueError: what `make` raises, a weight is not finite, or nothing matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already.

    >>> store({"a": jnp.ones(2), "b": jnp.ones(3)}, "a", lambda w, path: f"{path} {w.shape}")
    {'a': 'a (2,)', 'b': Array([1., 1., 1.], dtype=float32)}
    """

    def made(leaf: Any, path: str) -> Any:
        weight = leaf if isinstance(leaf, accept) else checked(leaf, path)
        with naming(path, weight.shape):
            return make(weight, path)

    names, leaves, treedef = tree.flatten(params)
    flags = jax.tree.leaves(tree.select(params, where))
    rows = zip(names, leaves, flags, strict=True)
    return jax.tree.unflatten(treedef, [made(leaf, name) if flag else leaf for name, leaf, flag in rows])


def group_of(group: Group, ndim: int, axis: affine.Axes) -> tuple[int, int] | None:
    """`(size, axis)` of groups of which perhaps only the size is given: then along the axis that a product is taken to sum over.

    It is axis -2, which Flax's kernels are summed over; or -1 where axis -2 has scales of its own, as the output axis of weights
    stored as (out, in) has.

    >>> group_of(32, 2, -1), group_of(32, 4, -1), group_of(32, 2, 0), group_of((16, 0), 2, -1), group_of(None, 2, -1)
    ((32, -2), (32, -2), (32, -1), (16, 0), None)
    """
    if group is None or isinstance(group, tuple):
        return group
    return group, -1 if ndim - 2 in affine.channel_axes(axis, ndim) else -2


def _swap(axes: Sequence[int]) -> tuple[int, ...]:
    *leading, a, b = axes
    return (*leading, b, a)


def _swapped(leaf: Any) -> Any:
    return leaf if leaf is NotImplemented else dataclasses.replace(leaf, swapped=True)


def _unpacked(codes: Array | Packed) -> Array:
    plain = _viewed(codes)
    return packing.unpack(plain) if isinstance(plain, Packed) else plain


def _viewed(codes: Array | Packed) -> Array | Packed:
    """Floats of eight bits as their bits: on a CPU, XLA would widen the whole array before it cuts or gathers any of it."""
    if isinstance(codes, Packed) or codes.dtype.itemsize > 1 or not jnp.issubdtype(codes.dtype, jnp.floating):
        return codes
    return lax.bitcast_convert_type(codes, jnp.uint8)


def _places(old: Sequence[int], new: Sequence[int]) -> list[int | None]:
    """Where each axis lies after a reshape; None for those that are cut, merged or gone."""
    places: list[int | None] = [None] * len(old)
    for before, after in equal_blocks(old, new) or []:
        froms = [a for a in range(before.start, before.stop) if old[a] > 1]
        intos = [a for a in range(after.start, after.stop) if new[a] > 1]
        if len(froms) == len(intos) == 1:
            places[froms[0]] = intos[0]
    return places


def _codes_at(codes: Array | Packed, indices: Array, look_up: Callable[..., Array], dimension_numbers: Any) -> Array:
    """The unpacked codes that a gather reads, unpacking no others where that can be."""
    if not isinstance(codes, Packed):
        return look_up(codes)
    indexed, collapsed = dimension_numbers.start_index_map, dimension_numbers.collapsed_slice_dims
    packed, offsets = codes.axis % codes.ndim, dimension_numbers.offset_dims
    if packed not in indexed:
        kept = [a for a in range(codes.ndim) if a not in collapsed]
        places = [offsets[kept.index(a)] if a in kept else None for a in range(codes.ndim)]
        found = packing.moved(codes, look_up, places)
        return packing.unpack(found) if isinstance(found, Packed) else look_up(packing.unpack(codes))
    if tuple(indexed) != (packed,) or packed not in collapsed:
        return look_up(packing.unpack(codes))
    ndim = indices.ndim - 1 + len(offsets)
    batch = [a for a in range(ndim) if a not in offsets]

    def spread(numbers: Array) -> Array:
        return lax.expand_dims(numbers.reshape(numbers.shape[:-1]), [a for a in range(ndim) if a not in batch])

    # What lies outside reads some row all the same; its scale is NaN.
    return packing.take(codes, jnp.clip(indices, 0, codes.width - 1), look_up, spread)
