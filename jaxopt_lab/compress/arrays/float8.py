"""Floats of eight bits, written out: what a byte stands for."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxopt_lab.core.types import Array

__all__ = ["FORMATS", "largest", "to_float8", "values"]

FORMATS = tuple(map(jnp.dtype, (jnp.float8_e4m3fn, jnp.float8_e5m2)))
"""Four bits of exponent and three of mantissa, for weights; or five and two, of wider range."""


def largest(dtype: DTypeLike) -> float:
    """The largest finite number of a format.

    >>> largest(jnp.float8_e4m3fn), largest(jnp.float8_e5m2)
    (448.0, 57344.0)

    Raises:
      ValueError: it is not one of `FORMATS`.
    """
    if jnp.dtype(dtype) not in FORMATS:
        raise ValueError(f"dtype={jnp.dtype(dtype)}: floats of eight bits are {' and '.join(map(str, FORMATS))}")
    return float(jnp.finfo(dtype).max)


def to_float8(x: Array, dtype: DTypeLike) -> Array:
    """`x` rounded to the nearest float8, half to even; what is too large becomes the largest, where a cast gives NaN or infinity.

    >>> to_float8(jnp.array([1.0, 1.0625, -1e6]), jnp.float8_e4m3fn)
    Array([1, 1, -448], dtype=float8_e4m3fn)
    """
    return jnp.clip(x, -largest(dtype), largest(dtype)).astype(dtype)


def values(bits: Array, format: DTypeLike, dtype: Any) -> Array:
    """The numbers that bytes stand for, exactly: the float8 array with these bits, widened to `dtype`.

    By way of float16, whose bits are those of a float8 shifted, since XLA's own conversion takes seven times as long on a CPU.

    Args:
      bits: uint8.
      format: one of `FORMATS`.
      dtype: float32, or another that holds the format.

    >>> values(jnp.array([0x38, 0xC0, 0x01], jnp.uint8), jnp.float8_e4m3fn, jnp.float32)
    Array([ 1.000000e+00, -2.000000e+00,  1.953125e-03], dtype=float32)
    """
    wide = bits.astype(jnp.uint16)
    if jnp.dtype(format) == jnp.float8_e5m2:
        return lax.bitcast_convert_type(wide << 8, jnp.float16).astype(dtype)
    # The exponent has one bit less, and its zero lies eight lower: hence the factor 2^8. All ones are NaN, and no number.
    small = lax.bitcast_convert_type(((wide & 0x80) << 8) | ((wide & 0x7F) << 7), jnp.float16)
    number = small.astype(jnp.promote_types(dtype, jnp.float32)) * 256
    return jnp.where((bits & 0x7F) == 0x7F, jnp.nan, number).astype(dtype)
