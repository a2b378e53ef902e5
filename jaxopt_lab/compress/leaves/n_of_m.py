"""Weights of which n in every m are not 0: the leaf, and `store_n_of_m`, which puts it into a tree."""

import dataclasses
import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jaxopt_lab.compress.arrays import packing, sparse
from jaxopt_lab.compress.leaf import Leaf, checked
from jaxopt_lab.compress.leaves import strips
from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["NM", "store_n_of_m"]


class NM(Leaf):
    r"""A weight with N:M sparsity: the n weights of every m that may differ from 0, and where in their group they stand.

    .. math:: w_{g, p} = \sum_s v_{g, s} [p_{g, s} = p]

    The values train, the places are fixed: whatever an optimiser does, the pattern holds. Products with a matrix make it dense a
    strip at a time; everything else runs on the dense weight. It is stored for its bytes: 2:4 takes 17/32 of float32.

    Invariant: the positions of a group are distinct.

    Attributes:
      values: floating point, `[..., g * n, ...]` with groups along `axis`.
      positions: from 0 to m - 1, of the shape of `values`: packed, or uint8.
      n, m: how many of how many (static).
      axis: the one along which groups run, counted from the end (static).

    >>> w = NM(jnp.array([-3.0, 2.0]), jnp.array([1, 3], jnp.uint8), 2, 4, -1)
    >>> w.materialise()
    Array([ 0., -3.,  0.,  2.], dtype=float32)

    Source: Mishra et al., "Accelerating sparse deep neural networks", 2021.
    """

    values: Array
    positions: packing.Packed | Array
    n: int = eqx.field(static=True)
    m: int = eqx.field(static=True)
    axis: int = eqx.field(static=True)

    trains: ClassVar[tuple[str, ...]] = ("values",)

    def __check_init__(self):
        if self.values.shape != self.positions.shape or not -self.values.ndim <= self.axis < 0:
            raise ValueError(
                f"values {self.values.shape} need positions of their shape, and an axis counted from the end: got "
                f"{self.positions.shape} and axis={self.axis}"
            )

    def aval(self):
        shape = list(self.values.shape)
        shape[self.axis] = shape[self.axis] // self.n * self.m
        return jax.typeof(self.values).update(shape=tuple(shape))

    def materialise(self) -> Array:
        return sparse.from_groups(self.values, _unpacked(self.positions), self.n, self.m, self.axis)

    def format(self) -> str:
        return f"{self.values.dtype} {self.n}:{self.m} along axis {self.axis}"

    def stepwise(self, length):
        along = [self.axis, *([self.positions.axis] if isinstance(self.positions, packing.Packed) else [])]
        return NotImplemented if -self.values.ndim in along else self

    def dot_general(self, x, **params):
        # Medians of one CPU run on two cores, 4096 x 4096 in 2:4, against a float32 weight, in strips / as a whole: 2.9 / 22 at
        # batch 1 and 1.25 / 4.3 at batch 64. A product that gathers the inputs takes twice as long as strips at batch 1.
        positions = self.positions
        together = positions.per_byte if isinstance(positions, packing.Packed) and positions.axis == -2 else 1
        # Whole bytes of positions, and whole groups.
        unit = math.lcm(together, self.n) // self.n * self.m if self.axis == -2 else together
        return strips.dot_general(x, self, _strip, unit, **params)

    def convert_element_type(self, *, new_dtype, **params):
        if not jnp.issubdtype(new_dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, values=self.values.astype(new_dtype))

    def transpose(self, *, permutation):
        axis = permutation.index(self.values.ndim + self.axis) - self.values.ndim
        return dataclasses.replace(
            self,
            values=lax.transpose(self.values, permutation),
            positions=lax.transpose(_unpacked(self.positions), permutation),
            axis=axis,
        )


_to_groups, _pack = jax.jit(sparse.to_groups, static_argnums=(1, 2, 3)), jax.jit(packing.pack, static_argnums=(1, 2))


def _strip(leaf: NM, index: Any, count: int, unit: int) -> Array:
    slots = unit // leaf.m * leaf.n if leaf.axis == -2 else unit
    values: Any = packing.strip(leaf.values, index, count, slots)
    positions = packing.strip(leaf.positions, index, count, slots)
    return sparse.from_groups(values, _unpacked(positions), leaf.n, leaf.m, leaf.axis)


def _unpacked(positions: packing.Packed | Array) -> Array:
    return packing.unpack(positions) if isinstance(positions, packing.Packed) else positions


def store_n_of_m(params: PyTree, n: int = 2, m: int = 4, axis: int = -2, where: Where = "**/kernel") -> PyTree:
    """Stores the chosen weights, of which at most `n` in every `m` are not 0, without their zeros: exactly as they are.

    Prune first, with `prune.sparsify` or `prune.one_shot` and the pattern `prune.n_of_m(n, m)`, whose axis is counted alike.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      n: how many of a group are stored, at least 1.
      m: the length of a group, at most 256.
      axis: the axis along which groups run; -2 is the input axis of Flax's kernels, -1 that of weights stored as (out, in).
      where: which leaves (see `tree.select`).

    Returns:
      `params` with `NM` leaves. Under `jit` zeros cannot be counted: of a group with more, the `n` largest stay.

    Raises:
      ValueError: n or m is out of range, a weight lacks the axis or `m` does not divide it, it has a group with more than `n`
        weights that are not 0, it is not finite, or nothing matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already.

    >>> params = {"Dense_0": {"kernel": jnp.array([[0.0], [5.0], [0.0], [-6.0]]), "bias": jnp.zeros(1)}}
    >>> store_n_of_m(params, 2, 4)["Dense_0"]["kernel"].values.tolist()
    [[5.0], [-6.0]]
    >>> store_n_of_m(params, 1, 4)
    Traceback (most recent call last):
      ...
    ValueError: Dense_0/kernel of shape (4, 1) has 2 weights that are not 0 in a group of 4 along axis -2; prune it to 1:4 first

    Source: Mishra et al., "Accelerating sparse deep neural networks", 2021.
    """
    if not 1 <= n < m <= 256:
        raise ValueError(f"store_n_of_m: n weights of m are stored, 1 <= n < m <= 256; got n={n}, m={m}")
    names, leaves, treedef = tree.flatten(params)
    flags = jax.tree.leaves(tree.select(params, where))
    stored = [_store(leaf, name, n, m, axis) if flag else leaf for name, leaf, flag in zip(names, leaves, flags, strict=True)]
    return jax.tree.unflatten(treedef, stored)


def _store(leaf: Any, path: str, n: int, m: int, axis: int) -> NM:
    w = checked(leaf, path)
    if not -w.ndim <= axis < w.ndim or w.shape[axis] % m:
        raise ValueError(
            f"{path} of shape {w.shape} has no axis {axis} that {m} divides: leave it out of `where`, or choose another axis"
        )
    if not isinstance(w, Tracer) and w.size and (most := int(jnp.max(sparse.group_counts(w, m, axis)))) > n:
        raise ValueError(
            f"{path} of shape {w.shape} has {most} weights that are not 0 in a group of {m} along axis {axis}; "
            f"prune it to {n}:{m} first"
        )
    values, positions = _to_groups(w, n, m, axis)
    bits = (m - 1).bit_length()
    if bits < 8:
        positions = _pack(positions, bits, packing.packing_axis(values.shape, bits))
    return NM(values, positions, n, m, axis % w.ndim - w.ndim)
