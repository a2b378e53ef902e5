"""Which weights are cut together."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["Pattern", "block", "n_of_m", "unstructured"]


class Pattern(NamedTuple):
    """The units that live and die together.

    Attributes:
      units: scores `[...]` -> one score a unit, itself an array of any shape.
      expand: `(mask of the units, shape of the weight) -> mask of the weight`.
      fixed: for a pattern that sets its own sparsity, scores -> mask of the weight; None for one that takes a sparsity.
      check: `(path, shape)`; raises a ValueError that names both where the pattern does not fit.
    """

    units: Callable[[Array], Array]
    expand: Callable[[Array, tuple[int, ...]], Array]
    fixed: Callable[[Array], Array] | None = None
    check: Callable[[str, tuple[int, ...]], None] = lambda path, shape: None


def unstructured() -> Pattern:
    """Every weight is its own unit.

    >>> unstructured().units(jnp.ones((2, 3))).shape
    (2, 3)
    """
    return Pattern(units=lambda scores: scores, expand=lambda mask, shape: mask)


def block(rows: int, columns: int) -> Pattern:
    """Tiles of the last two axes: a tile scores the mean of its members and is kept or cut whole.

    A tile at the edge of an axis that does not divide evenly is smaller, and is scored by the members it has. On a sharded weight
    the tiles should divide each shard: one that straddles two makes the compiler move the weight between devices.

    Args:
      rows: the tile's extent along the last axis but one (a kernel's input axis).
      columns: its extent along the last axis (a kernel's output axis).

    Raises:
      ValueError: an extent below 1; later, a weight with fewer than two axes.

    >>> block(2, 2).units(jnp.array([[1.0, 3.0, 8.0], [1.0, 3.0, 4.0]]))
    Array([[2., 6.]], dtype=float32)

    Source: Narang, Undersander and Diamos, "Block-sparse recurrent neural networks", 2017.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"block: a tile is at least 1 x 1; got {rows} x {columns}")

    def pooled(x: Array) -> Array:
        height, width = x.shape[-2:]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -height % rows), (0, -width % columns)])
        tiles = x.reshape(*x.shape[:-2], x.shape[-2] // rows, rows, x.shape[-1] // columns, columns)
        return tiles.sum(axis=(-3, -1))

    def units(scores: Array) -> Array:
        scores = wide(scores)
        return pooled(scores) / pooled(jnp.ones(scores.shape, scores.dtype))

    def expand(mask: Array, shape: tuple[int, ...]) -> Array:
        return jnp.repeat(jnp.repeat(mask, rows, axis=-2), columns, axis=-1)[..., : shape[-2], : shape[-1]]

    def check(path: str, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise ValueError(f"block({rows}, {columns}) needs two axes or more; {path} has shape {shape}: leave it out of `where`")

    return Pattern(units, expand, check=check)


def n_of_m(n: int, m: int, *, axis: int = -2) -> Pattern:
    """Exactly `n` of every `m` consecutive weights stay: the N:M sparsity of sparse tensor cores (2:4).

    The largest scores stay; of equal ones the first, and NaN counts as the largest, as in `kth_largest`.

    Args:
      n: how many stay, from 0 to m.
      m: the length of a group.
      axis: the axis along which groups run; -2 is the input axis of Flax's kernels, the one that a matrix product sums over.

    Raises:
      ValueError: n or m out of range; later, a weight whose axis `m` does not divide, named by its path.

    >>> n_of_m(1, 2).fixed(jnp.array([[3.0, 1.0], [2.0, 5.0]]))
    Array([[ True, False],
           [False,  True]], dtype=bool)

    Source: Mishra et al., "Accelerating sparse deep neural networks", 2021.
    """
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n_of_m: n weights of m stay, 0 <= n <= m and m >= 1; got n={n}, m={m}")

    def fixed(scores: Array) -> Array:
        at = axis % scores.ndim
        groups = scores.reshape(*scores.shape[:at], scores.shape[at] // m, m, *scores.shape[at + 1 :])
        order = jnp.argsort(groups, axis=at + 1, stable=True, descending=True)
        return (jnp.argsort(order, axis=at + 1) < n).reshape(scores.shape)

    def check(path: str, shape: tuple[int, ...]) -> None:
        if not -len(shape) <= axis < len(shape) or shape[axis] % m:
            raise ValueError(
                f"n_of_m({n}, {m}) needs an axis {axis} that {m} divides; {path} has shape {shape}: leave it out of `where`, or "
                "choose another axis"
            )

    return Pattern(units=lambda scores: scores, expand=lambda mask, shape: mask, fixed=fixed, check=check)


def unit_count(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """How many units a weight of this shape has, without computing any."""
    return math.prod(jax.eval_shape(pattern.units, jax.ShapeDtypeStruct(shape, jnp.float32)).shape)
