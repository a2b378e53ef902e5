r"""Fake quantisation of bare arrays: values that codes could stand for, with a gradient to train through.

Write :math:`v = w / s`, :math:`\lfloor \cdot \rceil` for rounding half to even, and :math:`[l, h]` for the range of the codes: for
:math:`b` bits :math:`h = 2^{b-1} - 1` and :math:`l = -h`. Everything is computed in at least float32.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxopt_lab.core.numerics import straight_through, wide
from jaxopt_lab.core.types import Array

__all__ = ["dorefa", "learned_step", "learned_step_start", "pact", "stochastic_round", "straight_through_codes"]


def straight_through_codes(w: Array, scale: Array, high: ArrayLike, *, key: Array | None = None) -> Array:
    r"""Rounds to the nearest value that a code stands for; the gradient passes straight through inside the range of the codes.

    .. math:: \hat w = s \,\mathrm{clip}(\lfloor v \rceil, -h, h), \qquad
              \partial \hat w / \partial w = \mathbf{1}[-h \le \lfloor v \rceil \le h]

    Args:
      w: weights, shape `[...]`.
      scale: positive, broadcastable to `w`; taken as a constant.
      high: the largest code, a whole number of at least 1; it may be traced.
      key: rounds at random, up with the probability of the fraction; to nearest without one.

    >>> straight_through_codes(jnp.array([0.3, -0.8, 9.0]), jnp.array([0.5]), 3)
    Array([ 0.5, -1. ,  1.5], dtype=float32)

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """
    scale = jax.lax.stop_gradient(wide(scale))
    v = wide(w) / scale
    codes = jnp.round(v) if key is None else stochastic_round(v, key)
    # Of the code and not of `v`: the largest weight of a channel, from which the scale comes, may lie a rounding beyond `high`.
    inside = jnp.abs(codes) <= high
    return scale * straight_through(jnp.where(inside, v, jax.lax.stop_gradient(v)), jnp.clip(codes, -high, high))


def learned_step(w: Array, step: Array, high: ArrayLike, low: ArrayLike | None = None, *, count: int | None = None) -> Array:
    r"""Learned step size quantisation: the step has a gradient of its own.

    .. math:: \hat w = s \,\lfloor \mathrm{clip}(v, l, h) \rceil, \qquad \frac{\partial \hat w}{\partial s} = g \begin{cases}
              \lfloor v \rceil - v & l \le v \le h \\ l & v < l \\ h & v > h \end{cases}, \qquad g = 1 / \sqrt{n h}

    The gradient of `w` is 1 inside the range and 0 outside. :math:`n` is the number of weights that share a step; :math:`g`
    balances the step's gradient against those of the weights.

    Args:
      w: weights (or activations), shape `[...]`.
      step: positive, of the rank of `w` and broadcastable to it.
      high: the largest code; it may be traced.
      low: the least one; :math:`-h` if not given.
      count: :math:`n`, if it is another: of activations, those of one example.

    >>> jax.grad(lambda s: learned_step(jnp.array([0.6, 2.0]), s, 1).sum())(jnp.array([1.0]))
    Array([0.98994946], dtype=float32)

    Source: Esser et al., "Learned step size quantization", 2020.
    """
    high = jnp.asarray(high, wide(step).dtype)
    low = -high if low is None else jnp.asarray(low, high.dtype)
    g = 1 / jnp.sqrt((w.size // step.size if count is None else count) * high)
    step = straight_through(wide(step) * g, wide(step))
    v = wide(w) / step
    # Not `jnp.clip`, whose gradient at the bounds is one half.
    clipped = jnp.where(v > high, high, jnp.where(v < low, low, v))
    return step * straight_through(clipped, jnp.round(clipped))


def learned_step_start(w: Array, shared: tuple[int, ...], high: ArrayLike) -> Array:
    r"""Where the training of a step begins: :math:`s = 2 \,\mathrm{mean} |w| / \sqrt{h}`.

    Args:
      w: weights, shape `[...]`.
      shared: the axes along which weights share a step.
      high: the largest code.

    Returns:
      Steps of the rank of `w`, positive: 1 for a channel of zeros.

    >>> learned_step_start(jnp.array([[1.0, 0.0], [-3.0, 0.0]]), (0,), 4)
    Array([[2., 1.]], dtype=float32)

    Source: Esser et al., "Learned step size quantization", 2020.
    """
    step = 2 * jnp.mean(jnp.abs(wide(w)), axis=shared, keepdims=True) / jnp.sqrt(jnp.asarray(high, jnp.float32))
    return jnp.where(step > 0, step, 1)


def dorefa(w: Array, bits: ArrayLike) -> Array:
    r"""DoReFa weights: squashed into [-1, 1], and rounded to :math:`2^b` equally spaced values, 0 not among them.

    .. math:: \hat w = \frac{2}{2^b - 1} \left\lfloor (2^b - 1) \left( \frac{\tanh w}{2 \max |\tanh w|} + \frac12 \right)
              \right\rceil - 1

    The gradient passes straight through the rounding. The scale of the weights is lost: what follows must bring it back, as a
    normalisation does.

    Args:
      w: weights, shape `[...]`; the maximum is over all of them.
      bits: at least 1; it may be traced.

    >>> dorefa(jnp.array([-2.0, 0.1, 2.0]), 2)
    Array([-1.        ,  0.33333337,  1.        ], dtype=float32)

    Source: Zhou et al., "DoReFa-Net: training low bitwidth convolutional neural networks with low bitwidth gradients", 2016.
    """
    squashed = jnp.tanh(wide(w))
    largest = jnp.max(jnp.abs(squashed))
    steps = 2.0 ** jnp.asarray(bits, squashed.dtype) - 1
    unit = steps * (squashed / (2 * jnp.where(largest > 0, largest, 1)) + 0.5)
    return 2 / steps * straight_through(unit, jnp.round(unit)) - 1


def pact(x: Array, alpha: Array, bits: ArrayLike) -> Array:
    r"""Parametrised clipping activation: a rectifier with a trained ceiling, rounded to :math:`2^b` values.

    .. math:: y = \mathrm{clip}(x, 0, \alpha), \qquad \hat y = \frac{\alpha}{2^b - 1} \left\lfloor \frac{2^b - 1}{\alpha} y
              \right\rceil, \qquad \partial \hat y / \partial \alpha = \mathbf{1}[x \ge \alpha]

    Args:
      x: activations, shape `[...]`.
      alpha: the ceiling, positive, broadcastable to `x`; trained, with a decay of its own in the paper.
      bits: at least 1; it may be traced.

    >>> pact(jnp.array([-1.0, 0.4, 5.0]), jnp.array([3.0]), 2)
    Array([0., 0., 3.], dtype=float32)

    Source: Choi et al., "PACT: parameterized clipping activation for quantized neural networks", 2018.
    """
    x, alpha = wide(x), wide(alpha)
    y = jnp.where(x >= alpha, alpha, jnp.where(x > 0, x, 0))
    steps = 2.0 ** jnp.asarray(bits, x.dtype) - 1
    return straight_through(y, jax.lax.stop_gradient(alpha / steps * jnp.round(y * (steps / alpha))))


def stochastic_round(x: Array, key: Array) -> Array:
    r"""Rounds up with the probability of the fraction, so that the mean is kept: :math:`\lfloor x + u \rfloor, u \sim U(0, 1)`.

    Args:
      x: shape `[...]`.
      key: a typed PRNG key.

    >>> stochastic_round(jnp.array([2.0, -3.0]), jax.random.key(0))
    Array([ 2., -3.], dtype=float32)

    Source: Gupta et al., "Deep learning with limited numerical precision", 2015.
    """
    return jnp.floor(x + jax.random.uniform(key, x.shape, x.dtype))
