"""The best points of an acquisition: many candidates scored, the best refined together, in one compiled program."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.search.gp.acquisition import log_feasible, log_gain
from jaxopt_lab.search.gp.process import Process, posterior

__all__ = ["Question", "fantasies", "refined", "score"]


class Question(NamedTuple):
    """What is asked of the processes; F fantasies, M objectives, C constraints, K boxes.

    Attributes:
      objectives: processes with a leading axis [M].
      weights: of each fantasy, in place of those of the objectives [F, M, N].
      lower, upper: of the boxes of each fantasy [F, K, M]; see `acquisition.log_gain`. `upper` is None where all is infinite.
      some: 1, or 0 where no feasible value is known and feasibility is all that counts; a scalar.
      constraints: processes with a leading axis [C]; None without.
      thresholds: at or below which a constraint is feasible [C].
    """

    objectives: Process
    weights: Array
    lower: Array
    upper: Array | None
    some: Array
    constraints: Process | None = None
    thresholds: Array | None = None


def _score(question: Question, x: Array) -> Array:
    def moments(process, weights):
        # Fantasies share where values are and not what they are: one variance, a mean each.
        mean, variance = posterior(process._replace(weights=weights[0]), x)
        if weights.shape[0] == 1:
            return mean[None], variance
        return jax.vmap(lambda w: posterior(process._replace(weights=w), x)[0])(weights), variance

    means, variances = jax.vmap(moments, in_axes=(0, 1))(question.objectives, question.weights)  # [M, F, B], [M, B]
    over_points = jax.vmap(log_gain, in_axes=(1, 1, None, None))
    gains = jax.vmap(over_points, in_axes=(1, None, 0, None if question.upper is None else 0))(
        means, variances, question.lower, question.upper
    )  # [F, B]
    value = question.some * (jax.nn.logsumexp(gains, axis=0) - jnp.log(gains.shape[0]))
    if question.constraints is not None:
        mean, variance = jax.vmap(posterior, in_axes=(0, None))(question.constraints, x)  # [C, B]
        value = value + jax.vmap(log_feasible, in_axes=(1, 1, None))(mean, variance, question.thresholds)
    return value


@jax.jit
def score(question: Question, x: Array) -> Array:
    """The logarithm of the expected gain, times the probability of feasibility, at points [B, D]; [B].

    >>> from jaxopt_lab.search.gp.process import Data, Hyper, condition
    >>> one = Data(jnp.zeros((1, 1)), jnp.ones(1), jnp.array([True]), jnp.array([False]), jnp.array([True]))
    >>> known = condition(Hyper(jnp.zeros(1), jnp.zeros(()), jnp.log(1e-3)), one)
    >>> stack = jax.tree.map(lambda x: x[None], known)
    >>> question = Question(stack, stack.weights[None], jnp.zeros((1, 1, 1)), None, jnp.ones(()))
    >>> round(float(jnp.exp(score(question, jnp.zeros((1, 1))))[0]), 2)  # the value there is 1, the best so far 0
    1.0
    """
    return _score(question, x)


class _Search(NamedTuple):
    x: Array  # [B, D]
    value: Array  # [B]
    last: Array  # the point before [B, D]
    gradient: Array  # at that point [B, D]
    curvature: Array  # of the inverse of minus the second derivatives [B, D, D]
    going: Array  # [B]
    step: Array


_RATES = (1.0, 0.3, 0.09, 0.02, 1e-3)


@partial(jax.jit, static_argnames=("steps",))
def refined(question: Question, x: Array, lengths: Array, low: Array, high: Array, steps: int = 40) -> tuple[Array, Array]:
    """Points climbed to their local maxima, all at once, by a projected BFGS whose line search tries its rates at the same time.

    Args:
      question: what is asked.
      x: where to start [B, D].
      lengths: the scale of each dimension [D]; the first steps go along the gradient in units of it.
      low, high: between which a point stays [B, D]; equal in a dimension that must not move.
      steps: the largest number of steps; it stops where no point gains 1e-7 any more.

    Returns:
      Points [B, D] and their scores [B], never below those of the start.

    >>> from jaxopt_lab.search.gp.process import Data, Hyper, condition
    >>> one = Data(jnp.zeros((1, 1)), jnp.ones(1), jnp.array([True]), jnp.array([False]), jnp.array([True]))
    >>> known = condition(Hyper(jnp.zeros(1), jnp.zeros(()), jnp.log(1e-3)), one)
    >>> stack = jax.tree.map(lambda x: x[None], known)
    >>> question = Question(stack, stack.weights[None], jnp.zeros((1, 1, 1)), None, jnp.ones(()))
    >>> start, end = jnp.full((1, 1), 0.5), jnp.ones((1, 1))
    >>> x, value = refined(question, start, jnp.ones(1), 0 * end, end)
    >>> bool(x[0, 0] < 0.3), bool(value[0] > score(question, start)[0])
    (True, True)

    Source: BFGS with an active set (Bertsekas 1982); in place of the batched L-BFGS-B of Optuna, which comes back to Python a step.
    """
    rates = jnp.asarray(_RATES, x.dtype)
    eye = jnp.eye(x.shape[1], dtype=x.dtype)

    def value_and_gradient(x):
        value, pull = jax.vjp(lambda x: _score(question, x), x)
        gradient = pull(jnp.ones_like(value))[0]
        return value, jnp.where(jnp.isfinite(gradient), gradient, 0)

    def direction(x, up, curvature):
        free = (low < high) & ~((x <= low) & (up < 0)) & ~((x >= high) & (up > 0))
        up = jnp.where(free, up, 0)
        newton = jnp.where(free, jnp.einsum("bij,bj->bi", curvature, up), 0)
        newton = jnp.where((newton * up).sum(-1, keepdims=True) > 0, newton, up * lengths[None, :] ** 2)
        # A first step has no curvature yet: at most a third of the range.
        return newton * jnp.minimum(1, 0.3 / jnp.maximum(jnp.abs(newton).max(-1, keepdims=True), 1e-30))

    def step(s):
        value, gradient = value_and_gradient(s.x)
        curvature = _updated(s.curvature, s.x - s.last, s.gradient - gradient, eye, s.step == 1)
        p = direction(s.x, gradient, curvature)
        tries = jnp.clip(s.x[None] + rates[:, None, None] * p[None], low[None], high[None])
        values = _score(question, tries.reshape(-1, x.shape[1])).reshape(tries.shape[:2])
        values = jnp.where(jnp.isfinite(values), values, -jnp.inf)
        best = values.argmax(0)
        reached = jnp.take_along_axis(values, best[None], 0)[0]
        gained = (reached > value) & s.going
        moved = jnp.where(gained[:, None], jnp.take_along_axis(tries, best[None, :, None], 0)[0], s.x)
        going = gained & (reached > value + 1e-7)
        return _Search(moved, jnp.where(gained, reached, value), s.x, gradient, curvature, going, s.step + 1)

    begin = jnp.broadcast_to(eye * lengths[None, :] ** 2, (*x.shape, x.shape[1]))
    nothing = jnp.zeros(len(x), x.dtype)
    start = _Search(x, nothing, x, jnp.zeros_like(x), begin, nothing == 0, jnp.zeros((), int))
    end = jax.lax.while_loop(lambda s: s.going.any() & (s.step < steps), step, start)
    return end.x, end.value


def _updated(inverse: Array, s: Array, y: Array, eye: Array, first: Array) -> Array:
    """The BFGS update of an inverse [B, D, D] for steps s and differences of gradients y [B, D]; none where they do not curve."""
    sy, yhy = (s * y).sum(-1), jnp.einsum("bi,bij,bj->b", y, inverse, y)
    curves = sy > 1e-10 * jnp.sqrt((s * s).sum(-1) * (y * y).sum(-1))
    safe = jnp.where(curves, sy, 1)
    inverse = inverse * jnp.where(first & curves, safe / jnp.maximum(yhy, 1e-30), 1)[:, None, None]
    left = eye[None] - s[:, :, None] * y[:, None, :] / safe[:, None, None]
    new = left @ inverse @ jnp.swapaxes(left, 1, 2) + s[:, :, None] * s[:, None, :] / safe[:, None, None]
    return jnp.where((curves & ((s * y).sum(-1) > 0))[:, None, None], new, inverse)


def fantasies(process: Process, y: Array, pending: Array, normals: Array) -> Array:
    """Values drawn for pending points, one row a fantasy: joint draws of the posterior by the process's own factor.

    The process holds the pending points as its last real observations; only what stands before them is known. With the
    covariance L L' of all, values are y = L e: the known part of e follows from y, the pending part is drawn.

    Args:
      process: over known and pending points [N].
      y: values [N], anything at pending points.
      pending: which points are pending [N], bool; all of them after the known ones.
      normals: standard normal numbers [F, N]; all 0 for the posterior mean.

    Returns:
      Values [F, N]: `y` where known.

    >>> from jaxopt_lab.search.gp.process import Data, Hyper, condition
    >>> two = Data(jnp.zeros((2, 1)), jnp.zeros(2), jnp.array([True, True]), jnp.array([False]), jnp.array([True]))
    >>> process = condition(Hyper(jnp.zeros(1), jnp.log(0.5), jnp.log(0.5)), two)
    >>> fantasies(process, jnp.array([1.0, 0.0]), jnp.array([False, True]), jnp.zeros((1, 2))).round(3).tolist()
    [[1.0, 0.5]]

    Source: the fantasies of Snoek, Larochelle and Adams 2012.
    """
    factor = jax.scipy.linalg.solve_triangular(process.inverse, jnp.eye(len(y), dtype=y.dtype), lower=True)
    known = process.inverse @ jnp.where(pending, 0, y)
    # Rows of the lower triangle before the pending ones see known values only.
    white = jnp.where(pending[None, :], normals, jnp.where(pending, 0, known)[None, :])
    return jnp.where(pending[None, :], white @ factor.T, y[None, :])
