"""Rounding that is learned: for each weight, up or down, by the error of the outputs."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxopt_lab.compress.arrays import affine
from jaxopt_lab.compress.arrays.gptq import output_error
from jaxopt_lab.core.checks import require
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["adaround", "rectified_sigmoid"]

_LOW, _HIGH = -0.1, 1.1


def rectified_sigmoid(v: Array) -> Array:
    r"""A sigmoid that reaches 0 and 1: :math:`h(v) = \mathrm{clip}(\sigma(v) (\zeta - \gamma) + \gamma, 0, 1)`, 1.1 and -0.1.

    >>> rectified_sigmoid(jnp.array([-9.0, 0.0, 9.0]))
    Array([0. , 0.5, 1. ], dtype=float32)

    Source: Louizos, Welling and Kingma, "Learning sparse neural networks through L0 regularization", 2018.
    """
    return jnp.clip(jax.nn.sigmoid(v) * (_HIGH - _LOW) + _LOW, 0, 1)


def adaround(
    w: Array,
    moment: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    bits: int = 4,
    steps: int = 1000,
    learning_rate: float = 1e-2,
    strength: float = 1.0,
    beta: tuple[float, float] = (20.0, 2.0),
    warmup: float = 0.2,
) -> Array:
    r"""Codes of small output error: whether each weight is rounded up or down is learned by gradient descent.

    .. math:: \min_v \sum_c \frac{d_c^\top H d_c}{\bar h s_c^2} + \lambda \sum_{ic} \big(1 - |2 h(v_{ic}) - 1|^\beta\big), \qquad
              d = w - s \,\mathrm{clip}(\lfloor w / s \rfloor + h(v))

    with :math:`h` the rectified sigmoid, which starts at the fraction that rounding would drop, :math:`\bar h` the mean of the
    diagonal of :math:`H`, and :math:`s_c^2` the mean square of an output's scales: the error is in units of the codes, so that
    :math:`\lambda` has no unit. The penalty comes after a warm-up; :math:`\beta` then falls along a cosine, and :math:`h` ends at 0
    or 1. Weights that are exactly 0 keep the code of 0. Each output keeps the codes of rounding to nearest where those are no
    worse.

    Args:
      w: weights `[n, m]`, inputs by outputs.
      moment: second moment of the inputs, :math:`H = X^\top X`, `[n, n]`; any multiple of it.
      scale: positive, `[1, m]`, or `[n / g, m]` for groups of `g` neighbouring inputs; a last side of 1 is one for all outputs.
      zero_point: int8 of the shape of `scale`, or None for symmetric codes.
      bits: of a code, 2 to 8.
      steps: of Adam, each a product of `[n, n]` and `[n, m]` and its gradient.
      learning_rate: of Adam.
      strength: :math:`\lambda`.
      beta: where :math:`\beta` starts and ends.
      warmup: the share of the steps without the penalty, in [0, 1).

    Returns:
      The codes in int8, `[n, m]`.

    Raises:
      ValueError: a setting is out of range, or the shapes do not fit.

    >>> w, moment, scale = jnp.array([[0.44], [0.4]]), jnp.array([[1.0, 0.9], [0.9, 1.0]]), jnp.ones((1, 1))
    >>> adaround(w, moment, scale, bits=4).tolist()  # each alone would be rounded down
    [[1], [0]]

    Source: Nagel et al., "Up or down? Adaptive rounding for post-training quantization", 2020.
    """
    require(lambda bits: bits >= 2, "be at least 2: one bit is a sign, with nothing to round to", bits=bits)
    require(lambda steps: steps >= 1, "be at least 1", steps=steps)
    require(lambda warmup: (warmup >= 0) & (warmup < 1), "lie in [0, 1)", warmup=warmup)
    nearest = affine.to_codes(w, scale, zero_point, bits)
    w, moment = wide(w), wide(moment)
    before = output_error(w, affine.from_codes(nearest, scale, zero_point, w.dtype), moment)
    low, high = affine.code_range(bits, symmetric=zero_point is None)
    steps_of_scale = affine.divided(w, scale)
    floor = jnp.floor(steps_of_scale)
    # Levels are codes less their zero point: their bounds are too.
    zeros = jnp.zeros_like(w) if zero_point is None else affine.levels(jnp.zeros_like(w), zero_point, w.dtype)
    fixed = w == 0
    unit = affine.scaled(jnp.ones_like(w), scale)
    weigh = unit / jnp.sqrt(jnp.mean(jnp.square(unit), axis=0, keepdims=True))
    mean = jnp.mean(jnp.diagonal(moment))
    normal = moment / jnp.where(mean > 0, mean, 1)

    def levels(h: Array) -> Array:
        return jnp.where(fixed, 0, jnp.clip(floor + h, low + zeros, high + zeros))

    def loss(v: Array, progress: Array) -> Array:
        h = rectified_sigmoid(v)
        error = jnp.sum(output_error(weigh * steps_of_scale, weigh * levels(h), normal))
        late = jnp.clip((progress - warmup) / (1 - warmup), 0, 1)
        power = beta[1] + (beta[0] - beta[1]) * (1 + jnp.cos(jnp.pi * late)) / 2
        penalty = jnp.sum(1 - jnp.abs(2 * h - 1) ** power)
        return error + jnp.where(progress < warmup, 0, strength) * penalty

    adam = optax.adam(learning_rate)

    def step(state: tuple, t: Array) -> tuple[tuple, None]:
        v, moments = state
        gradient = jax.grad(loss)(v, t.astype(w.dtype) / steps)
        updates, moments = adam.update(gradient, moments)
        return (optax.apply_updates(v, updates), moments), None

    fraction = (steps_of_scale - floor - _LOW) / (_HIGH - _LOW)
    start = jnp.log(fraction) - jnp.log1p(-fraction)
    (v, _), _ = lax.scan(step, (start, adam.init(start)), jnp.arange(steps))
    learned = jnp.round(levels((rectified_sigmoid(v) >= 0.5).astype(w.dtype)) - zeros).astype(jnp.int8)
    after = output_error(w, affine.from_codes(learned, scale, zero_point, w.dtype), moment)
    return jnp.where((after < before)[None], learned, nearest)
