r"""Scales of channels that leave the function as it is, and make it rounder: :math:`x W = (x / s) (s W)`."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from jaxopt_lab.compress.arrays.gptq import output_error
from jaxopt_lab.core.checks import require
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["awq_scale", "equalization_scale", "output_shift", "smooth_scale"]


def awq_scale(
    w: Array, moment: Array, size: Array, round_trip: Callable[[Array], Array], *, steps: int = 20, most: float = 1.0
) -> tuple[Array, Array]:
    r"""The scale of each input that protects the weights of large inputs best, on a grid of powers.

    .. math:: \min_\alpha \mathrm{tr}(d^\top H d), \qquad d = w - Q(s w) / s, \qquad
              s_i = \bar x_i^\alpha / \sqrt{\max_k \bar x_k^\alpha \min_k \bar x_k^\alpha}

    The power 0, which leaves everything as it is, is in the grid and wins ties: the error is never above that of :math:`Q(w)`.

    Args:
      w: weights `[n, m]`, inputs by outputs.
      moment: second moment of the inputs, :math:`H = X^\top X`, `[n, n]`; any multiple of it.
      size: mean absolute value of each input, :math:`\bar x`, `[n]`. Inputs that are always 0 count as the smallest one that is
        not.
      round_trip: what becomes of weights `[n, m]` when they are stored, :math:`Q`; it is traced.
      steps: how many powers are tried, evenly spaced from 0.
      most: the largest power.

    Returns:
      `(scale, power)`: `[n]`, positive, and `[]`.

    Raises:
      ValueError: there are fewer than two steps.

    >>> w, size = jnp.array([[0.4], [7.0]]), jnp.array([10.0, 1.0])
    >>> scale, power = awq_scale(w, jnp.diag(size**2), size, jnp.round, steps=3)
    >>> [round(float(s), 2) for s in scale], float(power)
    ([3.16, 0.32], 1.0)

    Source: Lin et al., "AWQ: activation-aware weight quantization for on-device LLM compression and acceleration", 2024.
    """
    require(lambda steps: steps >= 2, "be at least 2", steps=steps)
    w, size = wide(w), wide(size)
    alive = size > 0
    least = jnp.min(jnp.where(alive, size, jnp.inf))
    # Powers of logarithms about their middle: the scale is normalised before anything can overflow.
    log = jnp.log(jnp.where(alive, size, jnp.where(alive.any(), least, 1)))
    log = log - (jnp.max(log) + jnp.min(log)) / 2

    def at(i: Array) -> tuple[Array, Array]:
        power = i.astype(log.dtype) * (most / (steps - 1))
        scale = jnp.exp(power * log)
        rounded = wide(round_trip(scale[:, None] * w)) / scale[:, None]
        return jnp.sum(output_error(w, rounded, moment)), power

    errors, powers = lax.map(at, jnp.arange(steps))
    power = powers[jnp.nanargmin(errors)]
    return jnp.exp(power * log), power


def smooth_scale(largest: Array, w: Array, strength: float = 0.5) -> Array:
    r"""The scale of each input that shares the outliers of the inputs out between inputs and weights.

    .. math:: s_i = \max |x_i|^\alpha / \max_c |w_{ic}|^{1 - \alpha}

    Args:
      largest: the largest absolute value of each input, `[n]`.
      w: weights `[n, m]`, inputs by outputs.
      strength: :math:`\alpha`, in [0, 1]: how much of the difficulty goes to the weights.

    Returns:
      `[n]`, positive; 1 where the input or its weights are all 0.

    Raises:
      ValueError: the strength is out of range.

    >>> smooth_scale(jnp.array([16.0, 1.0, 0.0]), jnp.array([[1.0, -0.5], [0.25, 4.0], [1.0, 1.0]]))
    Array([4. , 0.5, 1. ], dtype=float32)

    Source: Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language models", 2023.
    """
    require(lambda strength: (strength >= 0) & (strength <= 1), "lie in [0, 1]", strength=strength)
    x, y = wide(largest), jnp.max(jnp.abs(wide(w)), axis=1)
    return _ratio(x, y, strength, 1 - strength)


def equalization_scale(first: Array, second: Array) -> Array:
    r"""The scale of each channel between two layers that gives it the same range in both.

    .. math:: s_c = \sqrt{\max_i |w^{(1)}_{ic}| \,/\, \max_k |w^{(2)}_{ck}|}

    For an activation with :math:`f(s x) = s f(x)` between them, as a rectifier is, the layers :math:`(w^{(1)} / s, b^{(1)} / s)`
    and :math:`s \, w^{(2)}` are the same function.

    Args:
      first: weights of the first layer, `[n, c]`.
      second: weights of the second layer, `[c, m]`.

    Returns:
      `[c]`, positive; 1 where a channel has no weights in one of the layers.

    >>> equalization_scale(jnp.array([[8.0, 1.0, 0.0]]), jnp.array([[2.0], [4.0], [1.0]]))
    Array([2. , 0.5, 1. ], dtype=float32)

    Source: Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019.
    """
    ranges = jnp.max(jnp.abs(wide(first)), axis=0), jnp.max(jnp.abs(wide(second)), axis=1)
    return _ratio(*ranges, 0.5, 0.5)


def output_shift(w: Array, rounded: Array, mean: Array) -> Array:
    r"""How far a rounded weight moves each output on average: :math:`E[x] (\hat w - w)`, which a bias can take back.

    Args:
      w: weights `[n, m]`, inputs by outputs.
      rounded: what stands for them, `[n, m]`.
      mean: of each input, `[n]`.

    Returns:
      `[m]`.

    >>> output_shift(jnp.array([[1.2], [0.4]]), jnp.array([[1.0], [0.5]]), jnp.array([2.0, 1.0])).round(3)
    Array([-0.3], dtype=float32)

    Source: Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019.
    """
    return jnp.matmul(wide(mean), wide(rounded) - wide(w), precision=lax.Precision.HIGHEST)


def _ratio(x: Array, y: Array, of_x: float, of_y: float) -> Array:
    usable = (x > 0) & (y > 0)
    ratio = jnp.where(usable, x, 1) ** of_x / jnp.where(usable, y, 1) ** of_y
    return jnp.where(usable & jnp.isfinite(ratio) & (ratio > 0), ratio, 1)
