"""Weights as floats of eight bits with a scale: the leaf, and `quantize_float`, which puts it into a tree."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxopt_lab.compress.arrays import affine, float8
from jaxopt_lab.compress.leaves.scaled import Group, Scaled, group_of, store
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["Float8", "quantize_float"]


class Float8(Scaled):
    r"""A weight stored as floats of eight bits with a scale for each channel or group.

    .. math:: w \approx s \, v, \qquad v \in \mathrm{float8}

    Unlike integer codes, they are as exact for small weights as for large ones, down to the smallest.

    Attributes:
      codes: float8_e4m3fn or float8_e5m2.
      scale: float32 or wider, of the rank of `codes`; each side divides theirs.
      dense_dtype: the dtype of the weight that it stands for (static).
      swapped: whether the last two axes of the weight have changed places in both (static).

    >>> Float8(jnp.array([[1.0, -448.0]], jnp.float8_e4m3fn), jnp.array([[0.5, 0.25]])).materialise()
    Array([[   0.5, -112. ]], dtype=float32)
    """

    codes: Array
    scale: Array
    dense_dtype: Any = eqx.field(static=True, default=jnp.float32, converter=jnp.dtype)
    swapped: bool = eqx.field(static=True, default=False)

    def decode(self, codes, fields, dtype):
        return float8.values(codes, self.codes.dtype, dtype)

    def format(self) -> str:
        return f"{self.codes.dtype} {super().format()}"


def quantize_float(
    params: PyTree,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    axis: int | tuple[int, ...] | None = -1,
    group: Group = None,
    where: Where = "**/kernel",
) -> PyTree:
    r"""Stores the chosen weights as floats of eight bits, rounded to nearest (half to even).

    .. math:: w \approx s \, v, \qquad s = \max |w| / v_{max}

    with the largest finite :math:`v_{max}`: 448 for e4m3, 57344 for e5m2. Weights that are exactly 0 stay exactly 0.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      dtype: `float8_e4m3fn`, whose steps are an eighth of a power of two; or `float8_e5m2`, a quarter, of wider range.
      axis: the axis (or axes) along which every index has its own scale, as in `quantize`; None is one scale a tensor.
      group: `(size, axis)` or a size, as in `quantize`.
      where: which leaves (see `tree.select`).

    Returns:
      `params` with `Float8` leaves.

    Raises:
      ValueError: another dtype, an axis out of range, a group that does not divide, a weight that is not finite, or nothing matches
        `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already.

    >>> quantize_float({"kernel": jnp.array([[1.0], [0.7], [0.001]])}, where="kernel")["kernel"].codes
    Array([[448],
           [320],
           [0.4375]], dtype=float8_e4m3fn)

    Source: Micikevicius et al., "FP8 formats for deep learning", 2022.
    """
    largest = float8.largest(dtype)

    def made(w: Array, path: str) -> Float8:
        scale = affine.choose_scale(w, axis, group=group_of(group, w.ndim, axis), largest=largest)
        return Float8(float8.to_float8(affine.divided(w.astype(scale.dtype), scale), dtype), scale, w.dtype)

    return store(params, where, made)
