"""Codes of fewer than eight bits, several to a byte."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_lab.core.types import Array

__all__ = ["Packed", "moved", "pack", "packing_axis", "strip", "take", "unpack"]

_PLANES = (4, 2, 1)


class Packed(eqx.Module):
    """Unsigned codes of 1 to 7 bits, packed along one axis without a bit to spare but for the padding of that axis.

    A code is cut into planes of 4, 2 and 1 bits (7 = 4 + 2 + 1, the lowest bits first), and a plane holds 2, 4 or 8 neighbours of
    the axis in a byte, the first in the lowest bits. So other axes keep their sharding, and leading axes may come and go.

    Attributes:
      planes: uint8 arrays of the shape of the codes but for `axis`, which has `ceil(width / 2)`, `ceil(width / 4)` or
        `ceil(width / 8)` entries.
      bits: of a code, 1 to 7 (static).
      axis: the packed axis, counted from the end (static).
      width: how many codes there are along it (static).
    """

    planes: tuple[Array, ...]
    bits: int = eqx.field(static=True)
    axis: int = eqx.field(static=True)
    width: int = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes."""
        sides = list(self.planes[0].shape)
        sides[self.axis] = self.width
        return tuple(sides)

    @property
    def ndim(self) -> int:
        """How many axes the codes have."""
        return self.planes[0].ndim

    @property
    def per_byte(self) -> int:
        """How many neighbours start together on a byte of every plane."""
        return 8 // min(_planes(self.bits))


@partial(jax.jit, static_argnames=("bits", "axis"))
def pack(codes: Array, bits: int, axis: int = -1) -> Packed:
    r"""Packs codes in :math:`[0, 2^b)` along an axis.

    Args:
      codes: integers, shape `[...]` of one axis or more; higher bits than the lowest `bits` are dropped.
      bits: 1 to 7; eight need no packing.
      axis: along which neighbours share a byte.

    Raises:
      ValueError: `bits` is out of range, or the array has no such axis.

    >>> packed = pack(jnp.array([1, 2, 3, 15], jnp.uint8), 4)
    >>> [plane.tolist() for plane in packed.planes]
    [[33, 243]]
    >>> unpack(packed)
    Array([ 1,  2,  3, 15], dtype=uint8)
    """
    if bits not in range(1, 8):
        raise ValueError(f"bits={bits}: codes of 1 to 7 bits are packed")
    if not -codes.ndim <= axis < codes.ndim:
        raise ValueError(f"axis={axis} is no axis of codes of shape {codes.shape}")
    axis = axis % codes.ndim
    planes, low = [], 0
    for wide in _planes(bits):
        planes.append(_squeezed((codes >> low).astype(jnp.uint8) & (2**wide - 1), wide, axis))
        low += wide
    return Packed(tuple(planes), bits, axis - codes.ndim, codes.shape[axis])


def packing_axis(shape: Sequence[int], bits: int) -> int:
    """The axis along which codes are best packed, counted from the end: -2, or -1 where that takes fewer bytes.

    Codes packed along any axis but the last unpack into rows as they lie, several times faster on a CPU.

    >>> packing_axis((64, 32), 4), packing_axis((3, 3, 1, 32), 4), packing_axis((5,), 4)
    (-2, -1, -1)
    """

    def nbytes(axis: int) -> int:
        n = shape[axis]
        return sum(-(-n * wide // 8) for wide in _planes(bits)) * (math.prod(shape) // max(n, 1))

    return -1 if len(shape) < 2 or nbytes(-1) < nbytes(-2) else -2


@jax.jit
def unpack(packed: Packed) -> Array:
    """The codes again, uint8.

    >>> unpack(pack(jnp.array([[5], [0], [6]]), 3, axis=0)).tolist()
    [[5], [0], [6]]
    """
    axis = packed.axis + packed.ndim

    def spread(plane: Array, wide: int) -> Array:
        # Shifted side by side, not stacked from parts: a CPU runs this four times faster.
        codes = (jnp.expand_dims(plane, axis + 1) >> _shifts(wide, plane.ndim, axis)) & jnp.uint8(2**wide - 1)
        sides = (*plane.shape[:axis], plane.shape[axis] * (8 // wide), *plane.shape[axis + 1 :])
        return codes.reshape(sides)[(slice(None),) * axis + (slice(packed.width),)]

    return _joined(packed, spread)


def moved(codes: Array | Packed, move: Callable[[Array], Array], places: Sequence[int | None]) -> Array | Packed | None:
    """Codes after a move of whole bytes: an array as `move` moves it, and the planes of packed codes each moved alike.

    Args:
      codes: an array, or packed codes.
      move: takes an array to its new place; it must keep the packed axis whole and in order.
      places: where each axis ends up, or None for those that go.

    Returns:
      The codes in their new place; None where the packed axis goes.

    >>> packed = moved(pack(jnp.array([[1, 2, 3], [4, 5, 6]]), 3), jnp.transpose, (1, 0))
    >>> packed.axis, unpack(packed).tolist()
    (-2, [[1, 4], [2, 5], [3, 6]])
    """
    if not isinstance(codes, Packed):
        return move(codes)
    place = places[codes.axis]
    if place is None:
        return None
    planes = tuple(map(move, codes.planes))
    return Packed(planes, codes.bits, place - planes[0].ndim, codes.width)


def strip(codes: Array | Packed, index: Any, count: int, unit: int = 1, axis: int = 0) -> Any:
    """One of the `count` strips of an array: along an axis, every `count`-th group of `unit` neighbours.

    Where the axis is sharded in fewer parts than there are groups in a strip, every device holds a part of each strip.

    Args:
      codes: an array, or packed codes; the length of the axis is a multiple of `count * unit`.
      index: which strip; it may be traced.
      count: how many strips there are.
      unit: how many neighbours stay together. Where the axis is the packed one, a multiple of `per_byte`.
      axis: counted from the front.

    >>> strip(jnp.arange(12), 1, count=3, unit=2).tolist()
    [2, 3, 8, 9]
    >>> unpack(strip(pack(jnp.arange(12), 4), 1, count=3, unit=2)).tolist()
    [2, 3, 8, 9]
    """
    if isinstance(codes, Packed):
        packed = axis == codes.axis + codes.ndim
        pairs = zip(codes.planes, _planes(codes.bits), strict=True)
        planes = tuple(strip(plane, index, count, unit * wide // 8 if packed else unit, axis) for plane, wide in pairs)
        return Packed(planes, codes.bits, codes.axis, codes.width // count if packed else codes.width)
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    groups = codes.reshape(*before, -1, count, unit, *after)
    return lax.dynamic_index_in_dim(groups, index, axis + 1, keepdims=False).reshape(*before, -1, *after)


def take(packed: Packed, indices: Array, look_up: Callable[[Array, Array], Array], spread: Callable[[Array], Array]) -> Array:
    """The codes at some indices of the packed axis, without unpacking the others; uint8.

    Args:
      packed: the codes.
      indices: integers in `[0, width)`.
      look_up: `(plane, indices) -> bytes`, the look-up of one byte of the packed axis for each index.
      spread: takes a number for each index to the shape of what `look_up` gives, or one that broadcasts to it.

    >>> packed = pack(jnp.array([1, 2, 3, 15, 7]), 4)
    >>> take(packed, jnp.array([4, 1]), lambda plane, i: plane[i], lambda x: x).tolist()
    [7, 2]
    """

    def read(plane: Array, wide: int) -> Array:
        per = 8 // wide
        found = look_up(plane, indices // per)
        shift = spread((wide * (indices % per)).astype(jnp.uint8))
        return (found >> jnp.broadcast_to(shift, found.shape)) & jnp.uint8(2**wide - 1)

    return _joined(packed, read)


def _planes(bits: int) -> list[int]:
    return [plane for plane in _PLANES if bits & plane]


def _joined(packed: Packed, read: Callable[[Array, int], Array]) -> Array:
    """The codes from their planes, each read as numbers of so many bits."""
    codes, low = None, 0
    for plane, wide in zip(packed.planes, _planes(packed.bits), strict=True):
        part = read(plane, wide) << low
        codes, low = part if codes is None else codes | part, low + wide
    assert codes is not None  # there is a plane for every number of bits from 1 to 7
    return codes


def _squeezed(codes: Array, wide: int, axis: int) -> Array:
    """Neighbours of `wide` bits along `axis`, `8 // wide` to a byte."""
    per, width = 8 // wide, codes.shape[axis]
    padded = jnp.pad(codes, [(0, -width % per if a == axis else 0) for a in range(codes.ndim)])
    groups = padded.reshape(*codes.shape[:axis], -(-width // per), per, *codes.shape[axis + 1 :])
    # No two codes share a bit, so that their sum is their union.
    return jnp.sum(groups << _shifts(wide, codes.ndim, axis), axis=axis + 1, dtype=jnp.uint8)


def _shifts(wide: int, ndim: int, axis: int) -> Array:
    """How far each code of a byte is shifted, along the axis after `axis`."""
    return (wide * jnp.arange(8 // wide, dtype=jnp.uint8)).reshape((1,) * (axis + 1) + (-1,) + (1,) * (ndim - 1 - axis))
