"""Which learning rates a run bears: one short run through all of them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Array
from jaxopt_lab.data.blocks import block
from jaxopt_lab.search.grouping import strong
from jaxopt_lab.search.trial import Trial, check_trial, check_typed_key

__all__ = ["RateRange", "rate_range_test"]

_BLOCK_BYTES = 1 << 26
_LEAST_STEPS = 10


class RateRange(NamedTuple):
    """What became of the loss at each rate.

    Attributes:
      rates: `[T]`, rising by a constant factor.
      losses: `[T]`, as the step reported them before it took the rate's update.
      smoothed: `[T]`; NaN from where the run diverged.
      steepest: the rate at which the smoothed loss falls fastest; None if it nowhere does.
      minimum: the rate at which it is least: too large already; None if it nowhere falls.
      tenth: a tenth of that, the usual advice.
      diverged: the first step at which the loss was not finite, or its smoothed value above the limit; None if there is none, and
        then a larger `high` may have more to tell.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    steepest: float | None
    minimum: float | None
    tenth: float | None
    diverged: int | None


def rate_range_test(
    trial: Trial,
    *,
    key: Array,
    batches: Callable[[int], Any],
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 200,
    config: Callable[[Array], Any] = lambda rate: {"rate": rate},
    metric: str = "loss",
    smoothing: float = 0.95,
    limit: float = 4.0,
) -> RateRange:
    r"""Raises the learning rate from step to step until the loss explodes, by one compiled loop.

    .. math:: \eta_t = \eta_{low} (\eta_{high} / \eta_{low})^{t / (T - 1)}

    The rate is a traced number of the configuration, as it is for `population`, so any optimiser that is built of one will do, and
    whatever momentum it has goes on from rate to rate.

    Args:
      trial: its `init(key, config)` and `step(state, batch, config) -> (state, metrics)` are used; `evaluate` is not.
      key: a typed key.
      batches: `batches(step) -> batch`, of one shape; its method `stack(step, k)`, if it has one, gives k of them at once.
      low, high: the first rate and the last.
      steps: T, at least 10.
      config: the configuration of a rate.
      metric: the name of the loss among the step's metrics.
      smoothing: :math:`\beta` of the average of the losses, corrected for its start.
      limit: how far above its least the smoothed loss counts as diverged, in units of what it fell since its first steps.

    Raises:
      TypeError: the trial or the key is of another kind.
      ValueError: rates that do not rise from above 0, too few steps, a smoothing outside [0, 1), or a step without the metric.

    >>> import optax
    >>> def init(key, config):
    ...     return jnp.ones(4), optax.sgd(config["rate"]).init(jnp.ones(4))
    >>> def step(state, batch, config):
    ...     params, opt_state = state
    ...     loss, grad = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
    ...     updates, opt_state = optax.sgd(config["rate"]).update(grad, opt_state)
    ...     return (optax.apply_updates(params, updates), opt_state), {"loss": loss}
    >>> trial = Trial(init, step, lambda state: 0.0)
    >>> found = rate_range_test(trial, key=jax.random.key(0), batches=lambda step: {}, low=1e-4, smoothing=0.0)
    >>> bool(0.01 < found.steepest < 0.1 < found.minimum < 1.2), found.diverged is not None  # 1 is where it stops to contract
    (True, True)

    Source: Smith, "Cyclical learning rates for training neural networks", 2017; the smoothing and the tenth are those of Howard
    and Gugger's fastai, 2018.
    """
    check_trial(trial)
    check_typed_key(key)
    if not 0 < low < high < math.inf:
        raise ValueError(f"rates must rise from above 0; got low={low}, high={high}")
    if steps < _LEAST_STEPS:
        raise ValueError(f"steps must be at least {_LEAST_STEPS}; got {steps}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must lie in [0, 1); got {smoothing}")
    rates = np.geomspace(low, high, steps)
    losses = _swept(trial, key, batches, rates.astype(jnp.result_type(float)), config, metric)
    smoothed, diverged = _smoothed(losses, smoothing, limit)
    steepest, minimum = _suggested(np.log(rates), smoothed)
    at = [None if index is None else float(rates[index]) for index in (steepest, minimum)]
    return RateRange(rates, losses, smoothed, at[0], at[1], None if at[1] is None else at[1] / 10, diverged)


def _swept(
    trial: Trial, key: Array, batches: Callable, rates: np.ndarray, config: Callable[[Array], Any], metric: str
) -> np.ndarray:
    """The loss before the update of each rate."""

    def one(state, given):
        rate, batch = given
        new, metrics = trial.step(state, batch, config(rate))
        if metric not in metrics:
            raise ValueError(f"the step has no metric {metric!r}; it has {', '.join(metrics) or 'none'}")
        loss = metrics[metric]
        if jnp.shape(loss):
            raise ValueError(f"metric {metric!r} must be a scalar; its shape is {jnp.shape(loss)}")
        return jax.tree.map(strong, new), jnp.asarray(loss, jnp.result_type(float))

    sweep = jax.jit(lambda state, given: jax.lax.scan(one, state, given), donate_argnums=0)
    state = jax.jit(lambda key, rate: jax.tree.map(strong, trial.init(key, config(rate))))(key, rates[0])
    nbytes = sum(np.size(x) * np.dtype(jnp.result_type(x)).itemsize for x in jax.tree.leaves(batches(0)))
    length = -(-len(rates) // -(-len(rates) * nbytes // _BLOCK_BYTES)) if nbytes else len(rates)
    losses, at, ahead = [], 0, None
    while at < len(rates):
        given, count, ahead = block(batches, at, min(length, len(rates) - at), ahead)
        state, found = sweep(state, (rates[at : at + count], given))
        losses.append(np.asarray(found, float))
        at += count
    return np.concatenate(losses)


def _smoothed(losses: np.ndarray, beta: float, limit: float) -> tuple[np.ndarray, int | None]:
    """An exponential average, and where it leaves all bounds; NaN from there."""
    smoothed, average, least, first = np.full(len(losses), np.nan), 0.0, math.inf, -math.inf
    for t, loss in enumerate(losses):
        if not math.isfinite(loss):
            return smoothed, t
        average = beta * average + (1 - beta) * loss
        value = average / (1 - beta ** (t + 1))
        # In ranges above the least, so that a loss may be negative; where it never fell, a tenth of its size stands for the range.
        if t >= _LEAST_STEPS and value > least + limit * max(first - least, 0.1 * abs(least)):
            return smoothed, t
        least = min(least, value)
        if t < _LEAST_STEPS:
            first = max(first, value)
        smoothed[t] = value
    return smoothed, None


def _suggested(log_rates: np.ndarray, smoothed: np.ndarray) -> tuple[int | None, int | None]:
    """Where the smoothed loss falls fastest over the logarithm of the rate, and where it is least."""
    known = int(np.isfinite(smoothed).sum())
    if known < 3:
        return None, None
    minimum = int(np.argmin(smoothed[:known]))
    if minimum == 0:
        return None, None
    # Of the line through the neighbourhood: differences of neighbours are the noise of single batches.
    half = max(len(log_rates) // 20, 1)
    slope = np.full(minimum + 1, np.inf)
    for t in range(minimum + 1):
        near = slice(max(t - half, 0), min(t + half, minimum) + 1)
        if near.stop - near.start > 2:
            slope[t] = np.polyfit(log_rates[near], smoothed[near], 1)[0]
    return (int(np.argmin(slope)), minimum) if slope.min() < 0 else (None, minimum)
