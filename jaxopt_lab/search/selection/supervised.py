"""A model, a loss and an optimiser as a trial, the form that populations and cross-validation train."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jaxopt_lab import train
from jaxopt_lab.core.rows import inputs
from jaxopt_lab.core.types import Array
from jaxopt_lab.losses.compose import BatchLoss
from jaxopt_lab.nets.model import Model, check_model
from jaxopt_lab.search.trial import Trial

__all__ = ["supervised"]


def supervised(
    model: Model,
    loss: BatchLoss,
    tx: optax.GradientTransformation | Callable[[Any], optax.GradientTransformation],
    example: Any,
    *,
    metric: BatchLoss | None = None,
) -> Trial:
    r"""A trial of `train.init` and `train.make_step`, scored by :math:`\sum_i w_i m_i / \sum_i w_i` over rows held out.

    Its step has the metric "loss" of `make_step`. The score takes a state and rows, as cross-validation has it.

    Args:
      model: as of `nets.from_linen` and its like.
      loss: `(outputs, batch) -> [B]`.
      tx: the optimiser, or `config -> optimiser`; the numbers it takes from the configuration may be traced.
      example: a batch with the entry "x", or an input `[B, ...]`; only shapes and types matter to most models.
      metric: `(outputs, rows) -> [B]`, what it is scored by; the loss if None.

    Raises:
      TypeError: `model` is not a `Model`.
      ValueError: when trained: the metric is not one value per row.

    >>> import jax
    >>> import numpy as np
    >>> from jaxopt_lab import nets
    >>> from jaxopt_lab.losses import cross_entropy, per_example
    >>> model = nets.from_linen(nets.MLP(features=()))
    >>> trial = supervised(model, per_example(cross_entropy), lambda config: optax.adam(config["rate"]), np.ones((1, 4)))
    >>> state = trial.init(jax.random.key(0), {"rate": 0.1})
    >>> rows = {"x": np.ones((3, 4)), "y": np.array([1, 2, 3]), "weight": np.ones(3)}
    >>> trial.evaluate(state, rows).shape
    ()
    """
    check_model(model)
    optimiser = (lambda config: tx) if isinstance(tx, optax.GradientTransformation) else tx
    measured = metric or loss

    def init(key: Array, config: Any) -> train.State:
        return train.init(model, optimiser(config), key, example)

    def step(state: train.State, batch: dict[str, Any], config: Any) -> tuple[train.State, dict[str, Array]]:
        return train.make_step(model, loss, optimiser(config))(state, batch)

    def evaluate(state: train.State, rows: dict[str, Any]) -> Array:
        weight = rows["weight"]
        values = measured(model.predict(train.variables(state), *inputs(rows)), rows)
        if jnp.shape(values) != jnp.shape(weight):
            raise ValueError(f"the metric must return one value per row, {jnp.shape(weight)}; it returned {jnp.shape(values)}")
        # A weight of 0 also silences the metric's NaN on a row that only fills up.
        return jnp.sum(jnp.where(weight > 0, weight * values, 0.0)) / jnp.sum(weight)

    return Trial(init, step, evaluate)
