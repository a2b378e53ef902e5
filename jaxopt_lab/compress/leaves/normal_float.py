"""Weights as normal floats of a few bits with a scale a block: the leaf, and `quantize_normal`, which puts it into a tree."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from jaxopt_lab.compress.arrays import affine, normal_float, packing
from jaxopt_lab.compress.arrays.packing import Packed
from jaxopt_lab.compress.leaves.scaled import Group, Scaled, group_of, store
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["NormalFloat", "quantize_normal"]


class NormalFloat(Scaled):
    r"""A weight stored as the numbers of levels that a normal distribution fills evenly, with a scale for each block.

    .. math:: w \approx s \, v_q

    with the levels :math:`v` of `normal_float.table`: where weights are many, levels are dense.

    Attributes:
      codes: `Packed`.
      scale: float32 or wider, of the rank of `codes`; each side divides theirs.
      dense_dtype: the dtype of the weight that it stands for (static).
      swapped: whether the last two axes of the weight have changed places in both (static).

    >>> NormalFloat(packing.pack(jnp.array([[15, 7, 0, 0]]), 4), jnp.array([[0.5, 2.0]])).materialise()
    Array([[ 0.5,  0. , -2. , -2. ]], dtype=float32)
    """

    codes: Packed
    scale: Array
    dense_dtype: Any = eqx.field(static=True, default=jnp.float32, converter=jnp.dtype)
    swapped: bool = eqx.field(static=True, default=False)

    def decode(self, codes, fields, dtype):
        return normal_float.values(codes, dtype, self.codes.bits)

    def format(self) -> str:
        return f"normal float {self.codes.bits} {super().format()}"


def quantize_normal(
    params: PyTree,
    block: Group = 64,
    where: Where = "**/kernel",
    *,
    bits: int = 4,
    axis: int | tuple[int, ...] | None = -1,
) -> PyTree:
    r"""Stores the chosen weights as normal floats: the nearest of 16 levels (NF4), in blocks that have a scale each.

    .. math:: w \approx s \, v_q, \qquad s = \max |w| \text{ of the block}

    Weights that are exactly 0 stay exactly 0.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      block: how many neighbours share a scale: a size, along the axis that products sum over, or `(size, axis)`, as `group` of
        `quantize`; None for whole channels.
      where: which leaves (see `tree.select`).
      bits: 4 as published, or 2 or 3.
      axis: the axis (or axes) along which every index has its own scale, as in `quantize`.

    Returns:
      `params` with `NormalFloat` leaves.

    Raises:
      ValueError: bits or an axis out of range, a block that does not divide its axis, a weight that is not finite, or nothing
        matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already.

    >>> w = jnp.array([[1.0], [0.1], [-4.0], [0.0]])
    >>> quantize_normal({"kernel": w}, block=2, where="kernel")["kernel"].materialise().tolist()
    [[1.0], [0.0795803...], [-4.0], [0.0]]

    Source: Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", 2023.
    """
    normal_float.table(bits)

    def made(w: Array, path: str) -> NormalFloat:
        scale = affine.choose_scale(w, axis, group=group_of(block, w.ndim, axis), largest=1)
        codes = normal_float.nearest(affine.divided(w.astype(scale.dtype), scale), bits)
        return NormalFloat(packing.pack(codes, bits, packing.packing_axis(codes.shape, bits)), scale, w.dtype)

    return store(params, where, made)
