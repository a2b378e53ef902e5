"""Weights that share a few values: a codebook and an index for each, and `cluster`, which puts them into a tree."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_lab.compress.arrays import affine, kmeans, packing
from jaxopt_lab.compress.leaf import Leaf, checked, fills_with_nan
from jaxopt_lab.compress.leaves import strips
from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import naming
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["Clustered", "cluster"]


class Clustered(Leaf):
    r"""A weight of which each entry is one of the few values of a codebook.

    .. math:: w_i = c_{a_i}

    The codebook trains: the gradient of a value is the sum of the gradients of the weights that share it. Look-ups of embedding
    rows and products with a matrix run on the indices; everything else runs on the dense weight.

    Invariant: the codebook has an axis more than the weight, and along each of the weight's axes its length or 1.

    Attributes:
      codebook: `[..., k]`, float32 or wider: `[1, ..., 1, k]` if all weights share it. It is a leaf itself while it trains as codes
        of few bits (see `fake_quantize`).
      indices: of the shape of the weight, packed; or uint8 if they have eight bits.
      zero: whether the index 0 stands for exactly 0, which never trains, and the codebook begins at 1 (static).
      dense_dtype: the dtype of the weight that it stands for (static).

    >>> w = Clustered(jnp.array([[[-1.0, 0.5]]]), jnp.array([[0, 1], [1, 1]], jnp.uint8))
    >>> w.materialise()
    Array([[-1. ,  0.5],
           [ 0.5,  0.5]], dtype=float32)

    Source: Han, Mao and Dally, "Deep compression: compressing deep neural networks with pruning, trained quantization and Huffman
    coding", 2016.
    """

    codebook: Array | Leaf
    indices: packing.Packed | Array
    zero: bool = eqx.field(static=True, default=False)
    dense_dtype: Any = eqx.field(static=True, default=jnp.float32, converter=jnp.dtype)

    trains: ClassVar[tuple[str, ...]] = ("codebook",)

    def __check_init__(self):
        sides, shape = self.codebook.shape[:-1], self.indices.shape
        if self.codebook.ndim != len(shape) + 1 or any(side not in (1, n) for side, n in zip(sides, shape, strict=True)):
            raise ValueError(
                f"indices {shape} need a codebook of one axis more, each side but the last 1 or equal: got {self.codebook.shape}"
            )

    def aval(self):
        return jax.typeof(jax.tree.leaves(self.indices)[0]).update(shape=self.indices.shape, dtype=self.dense_dtype)

    def materialise(self) -> Array:
        return self._values(self._table, self.indices)

    def format(self) -> str:
        bits = self.indices.bits if isinstance(self.indices, packing.Packed) else 8
        channels = [str(a) for a, n in enumerate(self.codebook.shape[:-1]) if n > 1]
        where = f" per channel {'x'.join(channels)}" if channels else ""
        kind = f" ({self.codebook.format()})" if isinstance(self.codebook, Leaf) else ""
        return f"{self.codebook.shape[-1]} shared values{kind}{' and 0' if self.zero else ''}{where}, {bits} bits"

    def stepwise(self, length):
        if isinstance(self.indices, packing.Packed) and self.indices.axis == -len(self.shape):
            return NotImplemented
        return dataclasses.replace(self, codebook=jnp.broadcast_to(self.values, (length, *self.codebook.shape[1:])))

    def freeze(self):
        return dataclasses.replace(self, codebook=self.codebook.freeze().materialise()) if isinstance(self.codebook, Leaf) else self

    def dot_general(self, x, **params):
        # Medians of one CPU run on two cores, 4096 x 4096 at k = 16, against a float32 weight, in strips / as a whole: 1.4 / 7.1 at
        # batch 1 and 1.0 / 1.9 at batch 64.
        if len(self.shape) != 2 or self.codebook.shape[0] > 1:
            return NotImplemented
        indices = self.indices
        unit = indices.per_byte if isinstance(indices, packing.Packed) and indices.axis == -2 else 1
        return strips.dot_general(x, dataclasses.replace(self, codebook=self.values), _strip, unit, **params)

    def gather(self, indices, *, dimension_numbers, slice_sizes, mode, fill_value, **params):
        shape, row, offsets = self.indices.shape, dimension_numbers.start_index_map, tuple(dimension_numbers.offset_dims)
        whole = all(size == (1 if a in row else n) for a, (size, n) in enumerate(zip(slice_sizes, shape, strict=True)))
        batched = dimension_numbers.operand_batching_dims or dimension_numbers.start_indices_batching_dims
        if len(row) != 1 or row != dimension_numbers.collapsed_slice_dims or not whole or batched:
            return NotImplemented
        if self._channels or not fills_with_nan(fill_value):
            return NotImplemented
        (axis,), n, ndim = row, shape[row[0]], indices.ndim - 1 + len(offsets)

        def rows(array: Array, at: Array) -> Array:
            sizes = tuple(1 if a == axis else size for a, size in enumerate(array.shape))
            return lax.gather(array, at, dimension_numbers, sizes, mode="promise_in_bounds")

        def spread(array: Array) -> Array:
            return jnp.expand_dims(array[..., 0], offsets)

        at, codes = jnp.clip(indices, 0, n - 1), self.indices
        if isinstance(codes, packing.Packed) and codes.axis + len(shape) == axis:
            found = packing.take(codes, at, rows, spread)
        else:
            left = [a for a in range(len(shape)) if a != axis]
            places = [offsets[left.index(a)] if a in left else None for a in range(len(shape))]
            found = _unpacked(packing.moved(codes, lambda array: rows(array, at), places))
        out = self._values(self._table.reshape((1,) * ndim + (-1,)), found)
        if mode == lax.GatherScatterMode.FILL_OR_DROP:
            # Rows that are out of bounds come back as NaN, as a float table gives them.
            out = jnp.where(spread((indices >= 0) & (indices < n)), out, jnp.nan)
        return out

    def convert_element_type(self, *, new_dtype, **params):
        if not jnp.issubdtype(new_dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, dense_dtype=new_dtype)

    def transpose(self, *, permutation):
        codebook = lax.transpose(self.values, (*permutation, len(permutation)))
        places = [permutation.index(a) for a in range(len(permutation))]
        return self._moved(codebook, lambda array: lax.transpose(array, permutation), places)

    def squeeze(self, *, dimensions):
        kept = [a for a in range(len(self.shape)) if a not in dimensions]
        places = [kept.index(a) if a in kept else None for a in range(len(self.shape))]
        return self._moved(lax.squeeze(self.values, dimensions), lambda array: lax.squeeze(array, dimensions), places)

    def broadcast_in_dim(self, *, shape, broadcast_dimensions, sharding=None, **params):
        if sharding is not None:
            return NotImplemented
        old = self.shape

        def spread(array: Array) -> Array:
            # An axis that is shorter than the weight's keeps its length: one that is packed.
            sides = list(shape)
            for a, n, own in zip(broadcast_dimensions, old, array.shape, strict=True):
                sides[a] = own if own != n else shape[a]
            return lax.broadcast_in_dim(array, sides, broadcast_dimensions)

        sides = [1] * len(shape)
        for a, side in zip(broadcast_dimensions, self.codebook.shape[:-1], strict=True):
            sides[a] = side
        places = [a if n == shape[a] else None for a, n in zip(broadcast_dimensions, old, strict=True)]
        return self._moved(self.values.reshape(*sides, -1), spread, places)

    def reshape(self, *, new_sizes, dimensions, sharding=None, **params):
        own = max(self._channels, default=-1) + 1
        if dimensions is not None or sharding is not None or tuple(new_sizes[:own]) != self.indices.shape[:own]:
            return NotImplemented
        sides = self.codebook.shape[:own] + (1,) * (len(new_sizes) - own)
        indices = _unpacked(self.indices).reshape(new_sizes)
        return dataclasses.replace(self, codebook=self.values.reshape(*sides, -1), indices=indices)

    @property
    def values(self) -> Array:
        """The codebook as an array."""
        return self.codebook.materialise() if isinstance(self.codebook, Leaf) else self.codebook

    @property
    def _channels(self) -> list[int]:
        """The axes along which codebooks differ."""
        return [a for a, n in enumerate(self.codebook.shape[:-1]) if n > 1]

    @property
    def _table(self) -> Array:
        """The values by their index."""
        values = self.values
        return jnp.concatenate([jnp.zeros((*values.shape[:-1], 1), values.dtype), values], axis=-1) if self.zero else values

    def _values(self, table: Array, indices: packing.Packed | Array) -> Array:
        """The dense weights of indices `[...]` in a table `[..., k]`."""
        own, (*sides, k) = _unpacked(indices), table.shape
        if math.prod(sides) > 1:
            own = own.astype(jnp.int32) + k * jnp.arange(math.prod(sides), dtype=jnp.int32).reshape(sides)
        return table.reshape(-1).at[own].get(mode="promise_in_bounds").astype(self.dense_dtype)

    def _moved(self, codebook: Array, move: Callable[[Array], Array], places: Sequence[int | None]) -> "Clustered":
        """The leaf after a move of the axes of its indices: where each ends up, whole, or None."""
        indices = packing.moved(self.indices, move, places)
        return dataclasses.replace(self, codebook=codebook, indices=move(_unpacked(self.indices)) if indices is None else indices)


def _strip(leaf: Clustered, index: Any, count: int, unit: int) -> Array:
    return leaf._values(leaf._table, packing.strip(leaf.indices, index, count, unit))


def cluster(
    params: PyTree,
    k: int = 16,
    where: Where = "**/kernel",
    *,
    axis: int | tuple[int, ...] | None = None,
    start: kmeans.Start = kmeans.linear,
    iterations: int = 30,
    preserve_zero: bool = False,
    importance: PyTree | None = None,
) -> PyTree:
    r"""Lets the chosen weights share `k` values each, found by k-means: :math:`\lceil \log_2 k \rceil` bits a weight.

    Train the values afterwards with `compress.optimizer`: they are all of such a leaf that moves.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      k: how many values, 2 to 256.
      where: which leaves (see `tree.select`).
      axis: the axis (or axes) along which every index has a codebook of its own, as weights stacked for a scan over layers need: 0;
        None is one codebook a weight.
      start: where the values begin: `kmeans.linear`, `kmeans.density`, `kmeans.plus_plus(key)`, or any `kmeans.Start`.
      iterations: of k-means.
      preserve_zero: one of the `k` values is exactly 0, and stays it in training: a pruned weight stays pruned.
      importance: a tree like `params` whose arrays say how much an error of each weight counts (a mean of squared gradients, say);
        None counts all alike.

    Returns:
      `params` with `Clustered` leaves.

    Raises:
      ValueError: `k` is out of range, an axis lies outside a weight, a weight is empty or not finite, `importance` does not fit, or
        nothing matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already.

    >>> params = {"Dense_0": {"kernel": jnp.array([[1.0, 2.0], [9.0, 0.0]]), "bias": jnp.zeros(2)}}
    >>> cluster(params, k=2)["Dense_0"]["kernel"].materialise()
    Array([[1., 1.],
           [9., 1.]], dtype=float32)

    Source: Han, Mao and Dally, "Deep compression: compressing deep neural networks with pruning, trained quantization and Huffman
    coding", 2016.
    """
    if not 2 <= k <= 256:
        raise ValueError(f"k={k}: weights share 2 to 256 values")
    names, leaves, treedef = tree.flatten(params)
    flags = jax.tree.leaves(tree.select(params, where))
    masses: list[Any] = [None] * len(leaves)
    if importance is not None:
        others, masses, _ = tree.flatten(importance)
        if others != names:
            odd = sorted(set(others) ^ set(names))
            raise ValueError(f"importance has other paths than params; first of {len(odd)}: {', '.join(odd[:3])}")
    options = {"k": k, "start": start, "iterations": iterations, "preserve_zero": preserve_zero}
    stored = [
        _cluster_leaf(leaf, name, mass, axis, options) if flag else leaf
        for name, leaf, mass, flag in zip(names, leaves, masses, flags, strict=True)
    ]
    return jax.tree.unflatten(treedef, stored)


_k_means = jax.jit(kmeans.k_means, static_argnames=("k", "start", "preserve_zero"))


def _cluster_leaf(leaf: Any, path: str, mass: Any, axis: int | tuple[int, ...] | None, options: dict[str, Any]) -> Clustered:
    w = checked(leaf, path)
    with naming(path, w.shape):
        channels = affine.channel_axes(axis, w.ndim)
    if not w.size:
        raise ValueError(f"{path} of shape {w.shape} has no weights to cluster; leave it out of `where`")
    if mass is not None and jnp.shape(mass) != w.shape:
        raise ValueError(f"importance of {path} has shape {jnp.shape(mass)}, and the weight {w.shape}")
    order = (*channels, *(a for a in range(w.ndim) if a not in channels))
    find = lambda w, mass: _k_means(w, mass=mass, **options)  # noqa: E731
    for _ in channels:
        find = jax.vmap(find)
    clusters = find(lax.transpose(w, order), None if mass is None else lax.transpose(jnp.asarray(mass), order))
    labels = lax.transpose(clusters.labels, tuple(order.index(a) for a in range(w.ndim)))
    codebook = clusters.centroids.reshape(*(n if a in channels else 1 for a, n in enumerate(w.shape)), -1)
    if options["preserve_zero"]:
        codebook, labels = _zero_first(codebook, labels)
    bits, indices = (options["k"] - 1).bit_length(), labels.astype(jnp.uint8)
    if bits < 8 and w.ndim:
        indices = packing.pack(indices, bits, packing.packing_axis(w.shape, bits))
    return Clustered(codebook, indices, options["preserve_zero"], w.dtype)


def _zero_first(codebook: Array, labels: Array) -> tuple[Array, Array]:
    """The values but for the one that is 0, and indices of which 0 means it."""
    zero = jnp.argmax(codebook == 0, axis=-1, keepdims=True)
    others = lax.broadcasted_iota(zero.dtype, (*codebook.shape[:-1], codebook.shape[-1] - 1), codebook.ndim - 1)
    here = zero[..., 0]
    labels = jnp.where(labels == here, 0, labels + (labels < here))
    return jnp.take_along_axis(codebook, others + (others >= zero), axis=-1), labels


def _unpacked(indices: Any) -> Array:
    return packing.unpack(indices) if isinstance(indices, packing.Packed) else indices
