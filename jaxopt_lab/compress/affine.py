"""Affine quantisation of bare arrays: choosing scales, rounding to codes, and back. It knows nothing of leaves or models."""

import jax.numpy as jnp

from jaxopt_lab.core.types import Array

__all__ = ["channel_axes", "choose_scale", "choose_scale_and_zero", "from_codes", "levels", "to_codes"]


def channel_axes(axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """The axes that keep a scale of their own, counted from the front and sorted; None is no axis (one scale for the tensor).

    Raises:
      ValueError: an axis lies outside the array, or is named twice.

    >>> channel_axes(-1, 4), channel_axes((0, -1), 3), channel_axes(None, 2)
    ((3,), (0, 2), ())
    """
    given = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if any(not -ndim <= a < ndim for a in given) or len({a % ndim for a in given}) < len(given):
        raise ValueError(f"axis={axis} does not name distinct axes of an array with {ndim} dimensions; use None for one scale")
    return tuple(sorted(a % ndim for a in given))


def choose_scale(w: Array, axis: int | tuple[int, ...] | None = -1, *, largest: int = 127) -> Array:
    r"""The symmetric scale of each channel: :math:`s = \max |w| / 127`.

    A channel of zeros (or one so small that its scale would underflow) gets the scale 1, so that its codes are exact zeros.

    Args:
      w: floating-point weights, shape `[...]`.
      axis: the axis (or axes) along which every index has its own scale; None for one scale in all.
      largest: the largest code.

    Returns:
      Scales in at least float32, of the rank of `w`, with length 1 along every axis that shares them.

    >>> choose_scale(jnp.array([[1.27, 0.0], [-2.54, 0.0]]))
    Array([[0.02, 1.  ]], dtype=float32)

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """
    wide, shared = _wide(w, axis)
    return _usable(jnp.max(jnp.abs(wide), axis=shared, keepdims=True) / largest)


def choose_scale_and_zero(w: Array, axis: int | tuple[int, ...] | None = -1) -> tuple[Array, Array]:
    r"""The asymmetric scale and zero point of each channel, whose range always includes 0.

    .. math:: s = (\max(w, 0) - \min(w, 0)) / 255, \qquad z = \mathrm{round}(-128 - \min(w, 0) / s)

    Args:
      w: floating-point weights, shape `[...]`.
      axis: as in `choose_scale`.

    Returns:
      `(scale, zero_point)`: floats in at least float32 and int8, both of the rank of `w` with length 1 along every shared axis.

    >>> choose_scale_and_zero(jnp.array([0.0, 1.275, 2.55]), axis=None)
    (Array([0.01], dtype=float32), Array([-128], dtype=int8))

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """
    wide, shared = _wide(w, axis)
    low = jnp.minimum(jnp.min(wide, axis=shared, keepdims=True), 0)
    high = jnp.maximum(jnp.max(wide, axis=shared, keepdims=True), 0)
    # Divided before they are subtracted: the span of two large floats may overflow.
    scale = _usable(high / 255 - low / 255)
    return scale, jnp.clip(jnp.round(-128 - low / scale), -128, 127).astype(jnp.int8)


def to_codes(w: Array, scale: Array, zero_point: Array | None = None) -> Array:
    r"""Rounds weights to int8 codes: :math:`q = \mathrm{clip}(\mathrm{round}(w / s) + z)`, half to even.

    Symmetric codes lie in [-127, 127], asymmetric ones in [-128, 127]. A weight that is exactly 0 gets the code of 0, always.

    Args:
      w: floating-point weights, shape `[...]`.
      scale: of the rank of `w`, broadcastable to it.
      zero_point: int8 of the shape of `scale`, or None for symmetric codes.

    >>> to_codes(jnp.array([0.5, 1.5, -2.5, 0.0, 900.0]), jnp.array([1.0]))
    Array([   0,    2,   -2,    0,  127], dtype=int8)
    """
    # Clipped as integers would be: the sum of a large quotient and the zero point must saturate, not wrap.
    steps = jnp.round(w.astype(scale.dtype) / scale)
    if zero_point is None:
        return jnp.clip(steps, -127, 127).astype(jnp.int8)
    return jnp.clip(steps + zero_point.astype(scale.dtype), -128, 127).astype(jnp.int8)


def levels(codes: Array, zero_point: Array | None, dtype) -> Array:
    """The integers :math:`q - z` in a floating-point dtype; they lie in [-255, 255], which even bfloat16 holds exactly.

    >>> levels(jnp.array([-128, 127], jnp.int8), jnp.array([-128], jnp.int8), jnp.bfloat16)
    Array([0, 255], dtype=bfloat16)
    """
    return codes.astype(dtype) if zero_point is None else codes.astype(dtype) - zero_point.astype(dtype)


def from_codes(codes: Array, scale: Array, zero_point: Array | None, dtype) -> Array:
    r"""The weights that the codes stand for: :math:`\hat w = s (q - z)`, rounded once to `dtype`.

    >>> from_codes(jnp.array([[1, -2]], jnp.int8), jnp.array([[0.5, 2.0]]), None, jnp.float32)
    Array([[ 0.5, -4. ]], dtype=float32)
    """
    return (levels(codes, zero_point, scale.dtype) * scale).astype(dtype)


def _wide(w: Array, axis: int | tuple[int, ...] | None) -> tuple[Array, tuple[int, ...]]:
    """`w` in at least float32, and the axes that share a scale."""
    channels = channel_axes(axis, w.ndim)
    return w.astype(jnp.promote_types(w.dtype, jnp.float32)), tuple(a for a in range(w.ndim) if a not in channels)


def _usable(scale: Array) -> Array:
    return jnp.where(scale >= jnp.finfo(scale.dtype).tiny, scale, 1)
