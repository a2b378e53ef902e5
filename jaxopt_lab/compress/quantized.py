"""Weights as int8 codes with a scale a channel: the leaf, and `quantize`, which puts it into a tree."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jaxopt_lab.compress import affine
from jaxopt_lab.compress.leaf import Leaf
from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["Quantized", "quantize"]


class Quantized(Leaf):
    r"""A weight stored as integer codes with a scale for each channel, and a zero point where it is asymmetric.

    .. math:: w \approx s \, (q - z)

    Invariants: `scale` (and `zero_point`) have the rank of `codes` and, along each axis, its length or 1; the scale is positive.
    Nothing trains: the codes are the weight, frozen. Products with axes that do not carry a scale run on the codes, and the scale
    multiplies what comes out; everything else runs on :math:`s (q - z)`, computed in the scale's dtype and rounded once.

    Attributes:
      codes: int8, the shape of the weight.
      scale: float32 or wider, broadcastable to `codes`.
      zero_point: int8 of the shape of `scale`, or None.
      dense_dtype: the dtype of the weight that it stands for (static).

    >>> w = Quantized(jnp.array([[2, -4], [6, 0]], jnp.int8), jnp.array([[0.5, 0.25]]))
    >>> w.materialise()
    Array([[ 1., -1.],
           [ 3.,  0.]], dtype=float32)
    """

    codes: Array
    scale: Array
    zero_point: Array | None = None
    dense_dtype: Any = eqx.field(static=True, default=jnp.float32, converter=jnp.dtype)

    def __check_init__(self):
        fits = self.codes.ndim == self.scale.ndim and all(
            s in (1, n) for s, n in zip(self.scale.shape, self.codes.shape, strict=True)
        )
        if not fits or (self.zero_point is not None and self.zero_point.shape != self.scale.shape):
            zero = "" if self.zero_point is None else f" and zero_point {self.zero_point.shape}"
            raise ValueError(
                f"codes {self.codes.shape} need a scale of their rank, each side 1 or equal: got {self.scale.shape}{zero}"
            )

    def aval(self):
        return jax.typeof(self.codes).update(dtype=self.dense_dtype)

    def materialise(self) -> Array:
        return affine.from_codes(self.codes, self.scale, self.zero_point, self.dense_dtype)

    def format(self) -> str:
        channels = [a for a, n in enumerate(self.scale.shape) if n > 1]
        where = f"per channel {'x'.join(str(a) for a in channels)}" if channels else "per tensor"
        return f"{self.codes.dtype} {where}" + ("" if self.zero_point is None else ", asymmetric")

    def dot_general(self, x, *, dimension_numbers, precision, preferred_element_type, **params):
        (_, contract), (_, batch) = dimension_numbers
        if any(self.scale.shape[a] > 1 for a in contract):
            return NotImplemented
        # The scale after the product rather than inside the weight. Medians of one CPU run on two cores, against a float32 weight,
        # scale after / inside: 2048 x 2048 2.5 / 2.2 at batch 1 and 0.82 / 0.79 at batch 64; 4096 x 4096 3.6 / 3.9 and 1.30 / 1.28.
        # The time goes into widening the codes, so the two are equal; outside, the sum is of exact integers, and only one rounding
        # is lost to bfloat16. Products of levels grow 127 times larger than those of weights: they need float32's range.
        dtype = jnp.promote_types(x.dtype, self.dense_dtype)
        wide = jnp.promote_types(dtype, self.scale.dtype)
        out = lax.dot_general(
            x,
            affine.levels(self.codes, self.zero_point, self.dense_dtype),
            dimension_numbers,
            precision=precision,
            preferred_element_type=wide,
            **params,
        )
        own = [*batch, *(a for a in range(self.scale.ndim) if a not in (*contract, *batch))]
        scale = lax.squeeze(lax.transpose(self.scale, (*own, *contract)), tuple(range(len(own), self.scale.ndim)))
        between = tuple(range(len(batch), len(batch) + out.ndim - scale.ndim))
        return (out * lax.expand_dims(scale, between)).astype(preferred_element_type or dtype)

    def conv_general_dilated(self, x, *, dimension_numbers, **params):
        channel = dimension_numbers.rhs_spec[0]
        # Half precision cannot hold sums of levels, and a convolution that widens its output has no gradient.
        if self.dense_dtype == jnp.float16 or any(n > 1 for a, n in enumerate(self.scale.shape) if a != channel):
            return NotImplemented
        weights = affine.levels(self.codes, self.zero_point, self.dense_dtype)
        out = lax.conv_general_dilated_p.bind(x, weights, dimension_numbers=dimension_numbers, **params)
        scale = lax.broadcast_in_dim(
            self.scale.reshape(-1),
            tuple(self.scale.size if a == dimension_numbers.out_spec[1] else 1 for a in range(out.ndim)),
            (dimension_numbers.out_spec[1],),
        )
        return (out * scale).astype(out.dtype)

    def gather(self, indices, *, dimension_numbers, slice_sizes, fill_value, **params):
        shape, indexed = self.codes.shape, dimension_numbers.start_index_map
        whole = all(slice_sizes[a] == n for a, n in enumerate(shape) if a not in indexed)
        if not whole or dimension_numbers.operand_batching_dims or fill_value is not None:
            return NotImplemented

        def look_up(array: Array, fill: Any) -> Array:
            sizes = tuple(size if a in indexed else array.shape[a] for a, size in enumerate(slice_sizes))
            return lax.gather_p.bind(
                array, indices, dimension_numbers=dimension_numbers, slice_sizes=sizes, fill_value=fill, **params
            )

        def look_up_shared(array: Array, fill: Any) -> Array:
            full = tuple(n if a in indexed else m for a, (n, m) in enumerate(zip(shape, array.shape, strict=True)))
            return look_up(jnp.broadcast_to(array, full), fill)

        # Rows that are out of bounds come back as NaN, as a float table gives them: through the scale, since codes have no NaN.
        by_row = any(self.scale.shape[a] > 1 for a in indexed)
        by_column = any(n > 1 for a, n in enumerate(self.scale.shape) if a not in indexed)
        if by_row and by_column:
            return NotImplemented
        codes = look_up(self.codes, None)
        kept = [a for a in range(self.codes.ndim) if a not in dimension_numbers.collapsed_slice_dims]

        def spread(array: Array) -> Array:
            if by_row:
                return look_up_shared(array, None)
            removed = lax.squeeze(array, tuple(dimension_numbers.collapsed_slice_dims))
            sides = dict(zip(dimension_numbers.offset_dims, (array.shape[a] for a in kept), strict=True))
            return lax.broadcast_in_dim(
                removed, tuple(sides.get(a, 1) for a in range(codes.ndim)), tuple(dimension_numbers.offset_dims)
            )

        scale = spread(self.scale)
        if not by_row:
            inside = jnp.ones(tuple(n if a in indexed else 1 for a, n in enumerate(shape)), self.scale.dtype)
            scale = scale * look_up(inside, None)
        zero_point = None if self.zero_point is None else spread(self.zero_point)
        return affine.from_codes(codes, scale, zero_point, self.dense_dtype)

    def convert_element_type(self, *, new_dtype, **params):
        if not jnp.issubdtype(new_dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, dense_dtype=new_dtype)

    def transpose(self, *, permutation):
        return self._map(lambda field: lax.transpose(field, permutation))

    def squeeze(self, *, dimensions):
        return self._map(lambda field: lax.squeeze(field, dimensions))

    def broadcast_in_dim(self, *, shape, broadcast_dimensions, **params):
        def spread(field: Array) -> Array:
            sides = dict(zip(broadcast_dimensions, field.shape, strict=True))
            full = field.shape == self.codes.shape
            return lax.broadcast_in_dim(
                field, shape if full else tuple(sides.get(a, 1) for a in range(len(shape))), broadcast_dimensions
            )

        return self._map(spread)

    def reshape(self, *, new_sizes, dimensions, **params):
        sides = None if dimensions is not None else _reshaped(self.codes.shape, self.scale.shape, new_sizes)
        if sides is None:
            return NotImplemented
        return dataclasses.replace(
            self,
            codes=self.codes.reshape(new_sizes),
            scale=self.scale.reshape(sides),
            zero_point=None if self.zero_point is None else self.zero_point.reshape(sides),
        )

    def _map(self, fn) -> "Quantized":
        zero_point = None if self.zero_point is None else fn(self.zero_point)
        return dataclasses.replace(self, codes=fn(self.codes), scale=fn(self.scale), zero_point=zero_point)


def _reshaped(old: Sequence[int], scale: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of the scale once a weight of shape `old` has shape `new`; None if an axis with scales merges with one without.

    Walks both shapes in blocks of equal size: inside a block the scale is shared by all or given for each.
    """
    sides, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first_old, first_new = i, j
        left, right = (old[i] if i < len(old) else 1), (new[j] if j < len(new) else 1)
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif left > right and j < len(new):
                right, j = right * new[j], j + 1
            else:
                return None
        scales = math.prod(scale[first_old:i])
        if scales not in (1, left):
            return None
        sides += [1 if scales == 1 else n for n in new[first_new:j]]
    return tuple(sides)


def quantize(
    params: PyTree,
    bits: int = 8,
    axis: int | tuple[int, ...] | None = -1,
    symmetric: bool = True,
    where: Where = "**/kernel",
) -> PyTree:
    r"""Stores the chosen weights as 8-bit codes, rounded to nearest (half to even).

    .. math:: w \approx s \, (q - z), \qquad s = \max |w| / 127, \; z = 0 \quad \text{if symmetric}

    Weights that are exactly 0 stay exactly 0. Call the model on the result with `lift`.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      bits: 8, the width that is stored.
      axis: the axis along which every index has its own scale. -1 is the output axis of Flax's kernels, 0 that of weights stored as
        (out, in); several as a tuple, as weights stacked for a scan over layers need: `(0, -1)`; None is one scale a tensor.
      symmetric: codes in [-127, 127] without a zero point; otherwise all 256 codes over the channel's own range.
      where: which leaves (see `tree.select`).

    Returns:
      `params` with `Quantized` leaves.

    Raises:
      ValueError: `bits` is not 8, an axis lies outside a weight, a weight is not finite, or nothing matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already.

    >>> params = {"Dense_0": {"kernel": jnp.array([[1.0, 0.0], [-2.0, 4.0]]), "bias": jnp.zeros(2)}}
    >>> quantize(params)["Dense_0"]["kernel"].codes
    Array([[  64,    0],
           [-127,  127]], dtype=int8)

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """
    if bits != 8:
        raise ValueError(f"bits={bits}: 8-bit codes are what Quantized stores; use bits=8")
    names, leaves, treedef = tree.flatten(params)
    flags = jax.tree.leaves(tree.select(params, where))
    stored = [
        _quantize_leaf(leaf, name, axis, symmetric) if flag else leaf for name, leaf, flag in zip(names, leaves, flags, strict=True)
    ]
    return jax.tree.unflatten(treedef, stored)


def _quantize_leaf(leaf: Any, path: str, axis: int | tuple[int, ...] | None, symmetric: bool) -> Quantized:
    if tree.is_compressed(leaf):
        raise TypeError(f"{path} is compressed already, as {type(leaf).__name__}; leave it out of `where`, or decompress it first")
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{path} has dtype {dtype}; only floating-point weights are quantised: leave it out of `where`")
    w = jnp.asarray(leaf)
    try:
        affine.channel_axes(axis, w.ndim)
    except ValueError as error:
        raise ValueError(f"{path} of shape {w.shape}: {error}") from None
    if not isinstance(w, Tracer) and not bool(jnp.isfinite(w).all()):
        raise ValueError(f"{path} of shape {w.shape} holds NaN or infinite weights, which have no codes")
    scale, zero_point = (affine.choose_scale(w, axis), None) if symmetric else affine.choose_scale_and_zero(w, axis)
    return Quantized(affine.to_codes(w, scale, zero_point), scale, zero_point, w.dtype)
