"""Weights with zeros stored without them: N of every M with their positions, or all that are not 0 with a mask of bits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_lab.compress.arrays import packing
from jaxopt_lab.core.types import Array

__all__ = ["from_groups", "from_mask", "group_counts", "to_groups", "to_mask"]


def group_counts(w: Array, m: int, axis: int) -> Array:
    """How many weights are not 0 in each group of `m` consecutive ones along an axis, which `m` divides.

    >>> group_counts(jnp.array([1.0, 0.0, 0.0, 0.0, 2.0, 3.0, 0.0, 4.0]), 4, 0)
    Array([1, 3], dtype=int32)
    """
    at = axis % w.ndim
    return jnp.sum(_split(w, at, m) != 0, axis=at + 1, dtype=jnp.int32)


def to_groups(w: Array, n: int, m: int, axis: int) -> tuple[Array, Array]:
    """The `n` largest of every `m` consecutive weights along an axis, in their order, and where in their group they stood.

    Of equal ones the first stay; a group with fewer than `n` that are not 0 keeps zeros too, so that all groups are alike.

    Args:
      w: weights `[..., g * m, ...]`.
      n: how many stay.
      m: the length of a group.
      axis: the one along which groups run.

    Returns:
      Values and positions (uint8, from 0 to `m - 1`), `[..., g * n, ...]`.

    >>> to_groups(jnp.array([0.0, -3.0, 0.0, 2.0, 0.0, 0.0, 0.0, 4.0]), 2, 4, 0)
    (Array([-3.,  2.,  0.,  4.], dtype=float32), Array([1, 3, 0, 3], dtype=uint8))
    """
    at = axis % w.ndim
    groups = _split(w, at, m)
    order = jnp.argsort(-jnp.abs(groups), axis=at + 1, stable=True)
    positions = jnp.sort(lax.slice_in_dim(order, 0, n, axis=at + 1), axis=at + 1)
    values = jnp.take_along_axis(groups, positions, axis=at + 1)
    shape = (*w.shape[:at], w.shape[at] // m * n, *w.shape[at + 1 :])
    return values.reshape(shape), positions.reshape(shape).astype(jnp.uint8)


def from_groups(values: Array, positions: Array, n: int, m: int, axis: int) -> Array:
    r"""The dense weights of groups: :math:`w_{g, p} = \sum_s v_{g, s} [p_{g, s} = p]`, the inverse of `to_groups`.

    >>> from_groups(jnp.array([-3.0, 2.0, 4.0, 0.0]), jnp.array([1, 3, 3, 0], jnp.uint8), 2, 4, 0)
    Array([ 0., -3.,  0.,  2.,  0.,  0.,  0.,  4.], dtype=float32)
    """
    at = axis % values.ndim
    slots = [jnp.expand_dims(_split(field, at, n), at + 2) for field in (values, positions)]
    places = lax.broadcasted_iota(positions.dtype, (1,) * (at + 2) + (m,) + (1,) * (values.ndim - at - 1), at + 2)
    # At most one slot of a sum is not 0: it is exact in any type.
    dense = jnp.sum(jnp.where(slots[1] == places, slots[0], 0), axis=at + 1, dtype=values.dtype)
    return dense.reshape(*values.shape[:at], values.shape[at] // n * m, *values.shape[at + 1 :])


def to_mask(w: np.ndarray, stacked: int = 0, axis: int = -1) -> tuple[np.ndarray, packing.Packed]:
    """The weights that are not 0, in order, and a mask of one bit a weight; on the host, since how many they are is a shape.

    Args:
      w: weights `[...]`, with an axis or more behind those of the stack.
      stacked: how many leading axes have values for each index: as many as the fullest needs, the rest of them zeros.
      axis: the one along which bits share a byte, counted from the end; the values are in the order in which it runs fastest.

    Returns:
      Values `[..., size]`, and the packed mask.

    >>> values, mask = to_mask(np.array([[0.0, 3.0], [4.0, 0.0]]))
    >>> values, packing.unpack(mask).tolist()
    (array([3., 4.]), [[0, 1], [1, 0]])
    """
    lead, each = w.shape[:stacked], math.prod(w.shape[stacked:])
    parts = np.moveaxis(w, axis, -1).reshape(math.prod(lead), each)
    values = np.zeros((len(parts), max(map(np.count_nonzero, parts), default=0)), w.dtype)
    for row, part in zip(values, parts, strict=True):
        kept = part[part != 0]
        row[: len(kept)] = kept
    return values.reshape(*lead, values.shape[1]), _pack((w != 0).astype(np.uint8), 1, axis)


def from_mask(values: Array, mask: packing.Packed) -> Array:
    r"""The dense weights of a mask: the inverse of `to_mask`.

    .. math:: w_i = b_i \, v_{\sum_{j < i} b_j}

    The sum runs over bytes, an eighth of the weights; inside a byte its bits are counted.

    >>> from_mask(jnp.array([3.0, 4.0]), packing.pack(jnp.array([[0, 1], [1, 0]], jnp.uint8), 1))
    Array([[0., 3.],
           [4., 0.]], dtype=float32)
    """
    if not values.size:
        return jnp.zeros(mask.shape, values.dtype)
    plane = jnp.moveaxis(mask.planes[0], mask.axis, -1)
    rows = plane.reshape(-1, plane.shape[-1])
    ones = lax.population_count(rows).astype(jnp.int32)
    in_row = jnp.sum(ones, axis=1, keepdims=True)
    first = jnp.cumsum(ones, axis=1) - ones + jnp.cumsum(in_row, axis=0) - in_row
    bit = jnp.arange(8, dtype=jnp.uint8).reshape(1, 1, 8)
    before = lax.population_count(rows[:, :, None] & ((jnp.uint8(1) << bit) - 1))
    found = values.at[first[:, :, None] + before.astype(jnp.int32)].get(mode="clip")
    dense = jnp.where((rows[:, :, None] >> bit) & 1 == 1, found, 0)
    dense = dense.reshape(rows.shape[0], -1)[:, : mask.width].reshape(*plane.shape[:-1], mask.width)
    return jnp.moveaxis(dense, -1, mask.axis)


_pack = jax.jit(packing.pack, static_argnums=(1, 2))


def _split(x: Array, at: int, m: int) -> Array:
    """The axis `at` as groups of `m`: the axes `at` and `at + 1`."""
    return x.reshape(*x.shape[:at], x.shape[at] // m, m, *x.shape[at + 1 :])
