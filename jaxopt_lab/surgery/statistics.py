"""Running statistics taken anew, once weights have changed under them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import require
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.rows import count_rows, inputs
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.nets.model import Model, check_model

__all__ = ["reestimate"]


def reestimate(
    model: Model,
    variables: PyTree,
    batches: Callable[[int], Mapping[str, Any]],
    *,
    steps: int,
    key: Array | None = None,
) -> PyTree:
    r"""The same variables, whose running statistics are plain means over some batches.

    In training a statistic moves as :math:`s' = m s + (1 - m) b` with the value b of the batch. Here it becomes

    .. math:: s = \frac{\sum_t r_t \, b_t}{\sum_t r_t}

    over the rows :math:`r_t` of the batches, without those of weight 0. No layer is known by name. A leaf moves so if its
    next value is linear in the old one with one slope :math:`0 < m < 1` for all of its entries, which is seen by running the model
    from three old values; b is read off from 0. Leaves that move otherwise (counts, keys, the vector of a power iteration) stay,
    and so do the weights. It is for statistics that are those of another network: after an average of weights, pruning, slimming.

    As in training, the variance of a batch is about its own mean: batches should be as large as they were there.

    Args:
      model: as of `nets.from_linen` and its like.
      variables: `{"params": ..., <state>}`, with dense weights.
      batches: `step -> batch`, as `train.fit` takes them: dicts with "x" and, where there is padding, "weight".
      steps: how many batches.
      key: a typed PRNG key for models that draw in training (dropout); step t draws with `fold_in(key, t)`.

    Returns:
      Variables of the same structure and dtypes.

    Raises:
      TypeError: `model` is not a `Model`, or a leaf is compressed.
      ValueError: no leaf of the state moves as a running mean, `steps` is less than 1, or all rows have weight 0.

    >>> from jaxopt_lab import nets
    >>> def apply(variables, x, train):
    ...     mean = 0.9 * variables["stats"]["mean"] + 0.1 * x.mean() if train else variables["stats"]["mean"]
    ...     return x - mean, {"stats": {"mean": mean}}
    >>> model = nets.from_functions(lambda key, x: {"params": {}, "stats": {"mean": jnp.zeros(())}}, apply, stateful=True)
    >>> batches = lambda step: {"x": jnp.array([[1.0], [2.0 + step]])}
    >>> new = reestimate(model, model.init(jax.random.key(0), jnp.ones((1, 1))), batches, steps=3)
    >>> round(float(new["stats"]["mean"]), 4)
    2.0

    Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization", 2018, section 3.2 (batch
    normalisation).
    """
    check_model(model)
    require(lambda steps: steps >= 1, "be at least 1", steps=steps)
    state = {name: value for name, value in variables.items() if name != "params"}
    # As wide as sums are, so that slopes are precise whatever the statistics are stored in.
    own = {name: wide(leaf) for name, leaf in zip(*tree.flatten(state)[:2], strict=True) if _is_floating(leaf)}
    program = jax.jit(functools.partial(_next, model))

    def following(values: dict[str, Array], step: int, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        drawn = None if key is None else jax.random.fold_in(key, step)
        new = program(variables["params"], state, own | values, batch, drawn)
        return {name: np.asarray(leaf, np.float64) for name, leaf in new.items()}

    batch = batches(0)
    slopes = _slopes(own, functools.partial(following, step=0, batch=batch))
    if not slopes:
        raise ValueError(f"no leaf of the state moves as a running mean in training; it has {', '.join(own) or 'no floating leaf'}")
    zeros, rows, totals = {name: jnp.zeros_like(own[name]) for name in slopes}, 0, dict.fromkeys(slopes, 0.0)
    for step in range(steps):
        batch = batches(step) if step else batch
        count = int(jnp.sum(jnp.asarray(batch["weight"]) != 0)) if "weight" in batch else count_rows(batch)
        if count:
            new, rows = following(zeros, step, batch), rows + count
            totals = {name: total + count * new[name] / (1 - slopes[name]) for name, total in totals.items()}
    if not rows:
        raise ValueError(f"all rows of {steps} batches have weight 0")
    stored = dict(zip(*tree.flatten(state)[:2], strict=True))
    means = {name: jnp.asarray(total / rows, jnp.result_type(stored[name])) for name, total in totals.items()}
    return {**variables, **tree.replaced(state, means)}


def _next(model: Model, params: PyTree, state: PyTree, values: dict[str, Array], batch: Mapping[str, Any], key: Any) -> dict:
    """The next value of each floating leaf of the state, once they are `values`."""
    weight = jnp.asarray(batch["weight"], jnp.float32) if "weight" in batch else None
    _, new = model.apply({"params": params, **tree.replaced(state, values)}, *inputs(batch), train=True, key=key, weight=weight)
    return {name: leaf for name, leaf in zip(*tree.flatten(new)[:2], strict=True) if name in values}


def _slopes(own: Mapping[str, Array], following: Callable[[dict[str, Array]], dict[str, np.ndarray]]) -> dict[str, float]:
    """m of each leaf that moves as a running mean."""

    def seen(names: list[str]) -> dict[str, float]:
        zero = following({name: jnp.zeros_like(own[name]) for name in names})
        far = {name: 1.0 + float(np.max(np.abs(zero[name]), initial=0.0)) for name in names}
        above, below = (following({name: jnp.full_like(own[name], sign * far[name]) for name in names}) for sign in (1, -1))
        found = {name: _slope(np.stack([above[name] - zero[name], zero[name] - below[name]]) / far[name]) for name in names}
        return {name: slope for name, slope in found.items() if slope is not None}

    together = seen(list(own))
    # One that is no mean may have upset what comes behind it.
    return together if len(together) == len(own) else {name: slope for one in own for name, slope in seen([one]).items()}


def _slope(slopes: np.ndarray) -> float | None:
    """The one slope that all of these are, but for rounding; None where they differ or it is not that of a mean."""
    if not slopes.size or not np.all(np.isfinite(slopes)) or np.ptp(slopes) > 1e-5:
        return None
    mean = float(np.mean(slopes))
    # A momentum is written in few digits, and 1 - m has fewer right ones than m.
    mean = round(mean, 5) if abs(mean - round(mean, 5)) < 5e-7 else mean
    return mean if 1e-4 < mean < 1 - 1e-6 else None


def _is_floating(leaf: Any) -> bool:
    return not tree.is_compressed(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
