r"""What a further evaluation is worth, as a logarithm: improvement, hypervolume, feasibility.

Values are maximised. With boxes (l_k, u_k) that tile what no value dominates yet, the expected gain of a value with independent
normal objectives m is, for one objective as for many,

    \sum_k \prod_m (EI_m(l_km) - EI_m(u_km)),    EI_m(a) = E max(0, y_m - a)

which for one objective is the expected improvement: one box, from the best value to infinity.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Array

__all__ = ["boxes", "log_feasible", "log_gain", "log_h", "log_improvement"]


def log_h(z: Array) -> Array:
    r"""log(\phi(z) + z \Phi(z)), any shape, to rounding in the far tail, where h is smaller than the smallest float.

    Three forms: as it stands above -1; below, \phi(z) (1 + z \Phi(z) / \phi(z)); far below, the series
    \phi(z) (1 / z^2 - 3 / z^4 + 15 / z^6 - ...), whose terms no longer cancel. Differentiable everywhere.

    Source: Ament et al., "Unexpected Improvements to Expected Improvement for Bayesian Optimization", 2023.

    >>> [round(float(log_h(jnp.asarray(z))), 3) for z in (1.0, -3.0, -100.0)]
    [0.08, -7.87, -5010.13]
    """
    far = -12.0 if z.dtype == jnp.float64 else -6.0
    half_log_tau = 0.5 * math.log(2 * math.pi)
    # Each form is given a point of its own range elsewhere, so that its derivative is a number there too.
    near_z = jnp.maximum(z, -1.0)
    near = jnp.log(jnp.exp(-0.5 * near_z**2 - half_log_tau) + near_z * jax.scipy.special.ndtr(near_z))
    middle_z = jnp.clip(z, far, -1.0)
    ratio = jnp.exp(jax.scipy.special.log_ndtr(middle_z) + 0.5 * middle_z**2 + half_log_tau)
    middle = -0.5 * middle_z**2 - half_log_tau + jnp.log1p(middle_z * ratio)
    far_z = jnp.minimum(z, far)
    inverse = 1 / far_z**2
    # (2 k + 1)!! with alternating signs, from the last term inwards.
    series = jnp.ones_like(z)
    for k in range(10 if z.dtype == jnp.float64 else 6, 0, -1):
        series = 1 - (2 * k + 1) * inverse * series
    distant = -0.5 * far_z**2 - half_log_tau - 2 * jnp.log(-far_z) + jnp.log(series)
    return jnp.where(z > -1, near, jnp.where(z > far, middle, distant))


def log_improvement(mean: Array, variance: Array, best: Array) -> Array:
    """The logarithm of E max(0, y - best) for y of N(mean, variance); shapes as of one another.

    Source: Jones, Schonlau and Welch 1998; the logarithm after Ament et al. 2023.

    >>> round(float(log_improvement(jnp.asarray(0.0), jnp.asarray(1.0), jnp.asarray(0.0))), 4)  # log(1 / sqrt(2 pi))
    -0.9189
    """
    deviation = jnp.sqrt(variance)
    return jnp.log(deviation) + log_h((mean - best) / deviation)


def _log1m_exp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0."""
    near = jnp.maximum(x, -0.7)
    return jnp.where(x > -0.7, jnp.log(-jnp.expm1(near)), jnp.log1p(-jnp.exp(jnp.minimum(x, -0.7))))


def log_gain(mean: Array, variance: Array, lower: Array, upper: Array | None = None) -> Array:
    """The logarithm of the expected gain in hypervolume; of the expected improvement where there is one objective.

    Args:
      mean, variance: of the objectives [M].
      lower, upper: of the boxes [K, M]; `upper` may be infinite, and is None where all of it is. A box whose `lower` is infinite
        is padding.

    Returns:
      A scalar.

    Source: the boxes after Yang, Emmerich, Deutz and Back 2019; the logarithm after Ament et al. 2023.

    >>> one = jax.jit(log_gain)(jnp.zeros(1), jnp.ones(1), jnp.zeros((1, 1)))
    >>> round(float(one), 4)
    -0.9189
    """
    real = jnp.isfinite(lower)
    low = jnp.where(real, lower, 0)
    over = log_improvement(mean[None, :], variance[None, :], low)
    if upper is None:
        return jax.nn.logsumexp(jnp.where(real.all(-1), over.sum(-1), -jnp.inf))
    bounded = jnp.isfinite(upper)
    # The two differ by less than rounding where a box is thin: a floor keeps the logarithm and its derivative numbers.
    beyond = log_improvement(mean[None, :], variance[None, :], jnp.where(bounded, upper, low + 1))
    gap = jnp.minimum(beyond - over, -1e-12)
    sides = over + jnp.where(bounded, _log1m_exp(gap), 0)
    return jax.nn.logsumexp(jnp.where(real.all(-1), sides.sum(-1), -jnp.inf))


def log_feasible(mean: Array, variance: Array, threshold: Array) -> Array:
    """The logarithm of the probability that every constraint is at or below its threshold; [C] each, a scalar.

    Source: Gardner et al., "Bayesian Optimization with Inequality Constraints", 2014.

    >>> round(float(jnp.exp(log_feasible(jnp.zeros(2), jnp.ones(2), jnp.zeros(2)))), 4)
    0.25
    """
    return jax.scipy.special.log_ndtr((threshold - mean) / jnp.sqrt(variance)).sum()


def boxes(front: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes that tile what lies above the reference point and is dominated by no point of a front; for any number of objectives.

    The last objective is cut at each value of the front; within a slab those points count that reach above it, with one
    objective less. Two objectives give one box more than points, three about half of the square of their number.

    Args:
      front: points [n, M], to be maximised; dominated ones are harmless.
      reference: below every point that counts [M].

    Returns:
      Lower and upper corners [K, M]; upper ones may be infinite.

    Source: slicing by objectives (While et al. 2006), here for the complement.

    >>> [corner.tolist() for corner in boxes(np.array([[1.0, 2.0], [2.0, 1.0]]), np.zeros(2))]
    [[[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]], [[inf, 1.0], [inf, 2.0], [inf, inf]]]
    """
    front = front[(front > reference).all(1)]
    if front.shape[1] == 1:
        best = max([reference[0], *front[:, 0]])
        return np.array([[best]]), np.array([[np.inf]])
    cuts = np.unique(np.concatenate([reference[-1:], front[:, -1]]))
    lowers, uppers = [], []
    for low, high in zip(cuts, [*cuts[1:], np.inf], strict=True):
        inner = boxes(_undominated(front[front[:, -1] > low][:, :-1]), reference[:-1])
        lowers.append(np.column_stack([inner[0], np.full(len(inner[0]), low)]))
        uppers.append(np.column_stack([inner[1], np.full(len(inner[1]), high)]))
    return np.concatenate(lowers), np.concatenate(uppers)


def _undominated(points: np.ndarray) -> np.ndarray:
    """The points [n, M] that no other is above in one objective and nowhere below; each once."""
    points = np.unique(points, axis=0)
    over = (points[:, None] >= points[None]).all(-1)
    return points[over.sum(0) == 1]
