"""Weights as integer codes of one to eight bits: the leaf, `quantize`, which puts it into a tree, and `bits_for_range`."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp

from jaxopt_lab.compress.arrays import affine, packing
from jaxopt_lab.compress.arrays.packing import Packed
from jaxopt_lab.compress.leaves.scaled import Group, Scaled, group_of, store
from jaxopt_lab.core import tree
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["Quantized", "bits_for_range", "quantize"]


class Quantized(Scaled):
    r"""A weight stored as integer codes with a scale for each channel or group, and a zero point where it is asymmetric.

    .. math:: w \approx s \, (q - z)

    Invariants: `scale` (and `zero_point`) have the rank of `codes`, and each side divides theirs; the scale is positive (at one bit
    it may be 0). Nothing trains: the codes are the weight, frozen. See `Scaled` for what runs on the codes.

    Attributes:
      codes: int8; or `Packed` for fewer than eight bits, which holds :math:`q + 2^{b-1}` (one bit without a zero point: 1 for +1, 0
        for -1).
      scale: float32 or wider.
      zero_point: int8 of the shape of `scale`, or None.
      dense_dtype: the dtype of the weight that it stands for (static).
      swapped: whether the last two axes of the weight have changed places in all three (static).

    >>> w = Quantized(jnp.array([[2, -4], [6, 0]], jnp.int8), jnp.array([[0.5, 0.25]]))
    >>> w.materialise()
    Array([[ 1., -1.],
           [ 3.,  0.]], dtype=float32)
    """

    codes: Array | Packed
    scale: Array
    zero_point: Array | None = None
    dense_dtype: Any = eqx.field(static=True, default=jnp.float32, converter=jnp.dtype)
    swapped: bool = eqx.field(static=True, default=False)

    scales: ClassVar[tuple[str, ...]] = ("scale", "zero_point")

    @classmethod
    def of(
        cls,
        codes: Array,
        scale: Array,
        zero_point: Array | None = None,
        *,
        bits: int = 8,
        dense_dtype: Any = jnp.float32,
        swapped: bool = False,
    ) -> "Quantized":
        """The leaf of codes as `affine.to_codes` gives them, packed where they have fewer than eight bits.

        Args:
          codes: int8, of the shape of the weight, in `affine.code_range(bits, zero_point is None)`.
          scale: of their rank, each side dividing theirs.
          zero_point: int8 of the shape of `scale`, or None.
          bits: of a code, 1 to 8.
          dense_dtype: the dtype of the weight.
          swapped: whether to store the last two axes in each other's place.
        """
        affine.code_range(bits)
        if swapped:
            codes, scale = jnp.swapaxes(codes, -1, -2), jnp.swapaxes(scale, -1, -2)
            zero_point = None if zero_point is None else jnp.swapaxes(zero_point, -1, -2)
        if bits == 8:
            return cls(codes, scale, zero_point=zero_point, dense_dtype=dense_dtype, swapped=swapped)
        unsigned = codes > 0 if bits == 1 and zero_point is None else codes + 2 ** (bits - 1)
        packed = packing.pack(unsigned.astype(jnp.uint8), int(bits), packing.packing_axis(codes.shape, bits))
        return cls(packed, scale, zero_point=zero_point, dense_dtype=dense_dtype, swapped=swapped)

    @classmethod
    def from_weight(
        cls,
        w: Array,
        bits: int = 8,
        axis: int | tuple[int, ...] | None = -1,
        symmetric: bool = True,
        group: Group = None,
        scale: Callable[..., Any] | None = None,
        swapped: bool = False,
    ) -> "Quantized":
        """The leaf of a weight, rounded as `quantize` does, which says what the arguments are."""
        if swapped and w.ndim < 2:
            raise ValueError("swapped=True exchanges two axes; it has fewer")
        choose: Callable[..., Any] = scale or (affine.choose_scale if symmetric else affine.choose_scale_and_zero)
        chosen = choose(w, axis, bits=bits, group=group_of(group, w.ndim, axis))
        step, zero_point = (chosen, None) if symmetric else chosen
        codes = affine.to_codes(w, step, zero_point, bits)
        return cls.of(codes, step, zero_point, bits=bits, dense_dtype=w.dtype, swapped=swapped)

    @property
    def bits(self) -> int:
        """How many bits a code has."""
        return self.codes.bits if isinstance(self.codes, Packed) else 8

    def signed_codes(self) -> Array:
        """The codes as `of` takes them: int8, unpacked, of the shape of the weight."""
        codes = packing.unpack(self.codes) if isinstance(self.codes, Packed) else self.codes
        signed = self.decode(codes, {}, jnp.int8)
        return jnp.swapaxes(signed, -1, -2) if self.swapped else signed

    def decode(self, codes, fields, dtype):
        zero_point = fields.get("zero_point")
        if self.bits == 8:
            return affine.levels(codes, zero_point, dtype)
        if self.bits == 1 and self.zero_point is None:
            return 2 * codes.astype(dtype) - 1
        # Two small integers, exact in every dtype: subtracting the sum of them costs one operation and not two.
        half = 2 ** (self.bits - 1)
        if zero_point is None:
            return codes.astype(dtype) - half
        return affine.levels(codes, zero_point.astype(jnp.int16) + half, dtype)

    def format(self) -> str:
        return f"int{self.bits} {super().format()}" + ("" if self.zero_point is None else ", asymmetric")


def quantize(
    params: PyTree,
    bits: int | Mapping[str, int] = 8,
    axis: int | tuple[int, ...] | None = -1,
    symmetric: bool = True,
    where: Where = "**/kernel",
    *,
    group: Group = None,
    scale: Callable[..., Any] | None = None,
    swapped: bool = False,
) -> PyTree:
    r"""Stores the chosen weights as codes of a few bits, rounded to nearest (half to even).

    .. math:: w \approx s \, (q - z), \qquad s = \max |w| / (2^{b-1} - 1), \; z = 0 \quad \text{if symmetric}

    Weights that are exactly 0 stay exactly 0, but for one symmetric bit, which is the sign times the mean size. Call the model on
    the result with `lift`.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      bits: 1 to 8, for all weights or by path, as `bits_for_range` gives them. Eight are stored as int8, fewer are packed.
      axis: the axis along which every index has its own scale. -1 is the output axis of Flax's kernels, 0 that of weights stored as
        (out, in); several as a tuple, as weights stacked for a scan over layers need: `(0, -1)`; None is one scale a tensor.
      symmetric: codes in :math:`\pm(2^{b-1} - 1)` without a zero point; otherwise all :math:`2^b` codes over the channel's own
        range.
      where: which leaves (see `tree.select`).
      group: `(size, axis)`: every `size` neighbours along this axis have scales of their own. A size alone means the axis that
        products sum over, taken to be -2, as in Flax's kernels; or -1 where axis -2 has scales of its own, as in (out, in).
      scale: how the range of each channel is chosen: `affine.choose_scale` (the whole range, the default), `affine.mse_scale` (of
        least squared error), or any function of `(w, axis, bits=, group=)`; without symmetry it gives a scale and a zero point, as
        `affine.choose_scale_and_zero` and `affine.mse_scale_and_zero` do.
      swapped: store the last two axes in each other's place. Nothing shows but the speed: integer products, as of
        `DynamicQuantized`, want the summed axis last; look-ups want it as it is.

    Returns:
      `params` with `Quantized` leaves.

    Raises:
      ValueError: bits, an axis or a group out of range, a path without bits, a group whose size does not divide its axis, a weight
        that is not finite, or nothing matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already.

    >>> params = {"Dense_0": {"kernel": jnp.array([[1.0, 0.0], [-2.0, 4.0]]), "bias": jnp.zeros(2)}}
    >>> quantize(params)["Dense_0"]["kernel"].codes
    Array([[  64,    0],
           [-127,  127]], dtype=int8)
    >>> quantize(params, bits=4, group=1)["Dense_0"]["kernel"].signed_codes()
    Array([[ 7,  0],
           [-7,  7]], dtype=int8)

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018; one
    bit: Rastegari et al., "XNOR-Net", 2016.
    """
    for width in bits.values() if isinstance(bits, Mapping) else (bits,):
        affine.code_range(width)

    def made(w: Array, path: str) -> Quantized:
        if isinstance(bits, Mapping) and path not in bits:
            raise ValueError(f"bits has no entry for it; give one, or leave it out of `where`. It has {', '.join([*bits][:3])}")
        width = bits[path] if isinstance(bits, Mapping) else bits
        return Quantized.from_weight(w, width, axis, symmetric, group, scale, swapped)

    return store(params, where, made)


def bits_for_range(
    params: PyTree,
    error: float,
    where: Where = "**/kernel",
    *,
    axis: int | tuple[int, ...] | None = -1,
    symmetric: bool = True,
    group: Group = None,
    scale: Callable[..., Any] | None = None,
) -> dict[str, int]:
    r"""The fewest bits, at most eight, that keep each weight's error relative to its size.

    .. math:: b = \min \{ b : \mathrm{rms}(\hat w_b - w) \le \epsilon \, \mathrm{rms}(w) \}

    A weight whose largest entries are far from its usual ones, a wide dynamic range, has a coarse step, and needs more bits. The
    error is measured, each width in turn; nothing is predicted. Call it on values, outside of `jit`.

    Args:
      params: any tree.
      error: :math:`\epsilon`, the largest relative error: about 0.1 is met by 4 or 5 bits, 0.01 by 8.
      where: which leaves (see `tree.select`).
      axis: as in `quantize`, and so are the others: they should be those with which the bits will be used.
      symmetric: as in `quantize`.
      group: as in `quantize`.
      scale: as in `quantize`.

    Returns:
      The bits by path, for `quantize(params, bits=...)`.

    Raises:
      ValueError: eight bits are not enough for a weight, `error` is not positive, and what `quantize` raises.
      TypeError: as `quantize` does.

    >>> params = {"even": jnp.array([[-1.0], [1.0]]), "wide": jnp.array([[0.01], [1.0], [0.02]])}
    >>> bits_for_range(params, 0.01, "**")
    {'even': 1, 'wide': 7}
    """
    if not error > 0:
        raise ValueError(f"error={error} must be positive: no width stores a weight without error")

    def fewest(w: Array, path: str) -> int:
        size = _rms(wide(w))
        for bits in range(1, 9):
            found = _rms(wide(Quantized.from_weight(w, bits, axis, symmetric, group, scale).materialise()) - wide(w))
            if found <= error * size:
                return bits
        raise ValueError(f"8 bits leave a relative error of {found / size:.3g}, above error={error}; leave it out of `where`")

    return store(tree.selected(params, where), "**", fewest)


def _rms(x: Array) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))
