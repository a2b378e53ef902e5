"""Weighted means over a data set, in one compilation however the last batch ends."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.rows import count_rows, inputs, pad_rows
from jaxopt_lab.core.tree import any_compressed
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.losses import accuracy, per_example
from jaxopt_lab.nets.model import Model, predictor
from jaxopt_lab.train.state import State, variables

__all__ = ["evaluate"]

Metric = Callable[[Any, dict], Array]

# One object for good: what is compiled is kept by it.
_ACCURACY: Mapping[str, Metric] = {"accuracy": per_example(accuracy)}


def evaluate(
    model: Model | Callable[..., Any],
    state: State | PyTree,
    data: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    metrics: Mapping[str, Metric] | None = None,
    batch_size: int = 256,
) -> dict[str, float]:
    r"""Weighted means of per-example metrics: :math:`\sum_i w_i m_i / \sum_i w_i`.

    Args:
      model: a `Model`, or `predict(variables, *inputs) -> outputs`. Compressed leaves go through `compress.lift`.
      state: a training state, or the variables themselves.
      data: arrays `{"x": [N, ...], "y": [N], ...}`, or an iterable of batches, each with or without "weight" (`[B]`).
      metrics: `(outputs, batch) -> [B]` by name, such as `losses.per_example` makes; `losses.accuracy` by default.
      batch_size: how many rows at once where `data` is arrays. The last batch is padded with rows of weight 0, so that there is one
        compilation; it is kept while `model` and the metrics are the same objects.

    Raises:
      TypeError: `model` is a module of Flax (`nets.from_linen` and `nets.from_nnx` make it a model) or no function.
      ValueError: there is no "x", no data, or a metric is not `[B]`.

    >>> predict = lambda variables, x: x * variables["params"]
    >>> data = {"x": np.eye(3, dtype=np.float32), "y": np.array([0, 1, 1])}
    >>> result = evaluate(predict, {"params": 2.0}, data, batch_size=2)
    >>> round(result["accuracy"], 4)
    0.6667
    """
    whole = variables(state) if isinstance(state, State) else state
    predict = predictor(model)
    chosen = tuple((metrics or _ACCURACY).items())
    sums = _summing(predict, chosen, any_compressed(whole))
    totals = [sums(whole, batch) for batch in _padded(data, batch_size)]
    if not totals:
        raise ValueError("there is nothing to evaluate on: data holds no rows")
    *values, weight = np.sum(np.asarray(jax.device_get(totals), np.float64), axis=0)
    if not weight:
        raise ValueError("there is nothing to evaluate on: every row has weight 0")
    return {name: float(value / weight) for (name, _), value in zip(chosen, values, strict=True)}


@lru_cache(maxsize=32)
def _summing(predict: Callable, metrics: tuple[tuple[str, Metric], ...], stored: bool) -> Callable:
    """`(variables, batch) -> [weighted sums..., sum of weights]`, compiled."""
    if stored:
        from jaxopt_lab import compress

        predict = compress.lift(predict)

    @jax.jit
    def sums(whole, batch):
        weight = batch["weight"].astype(jnp.float32)
        outputs = predict(whole, *inputs(batch))
        values = [metric(outputs, batch) for _, metric in metrics]
        for (name, _), value in zip(metrics, values, strict=True):
            if jnp.shape(value) != weight.shape:
                raise ValueError(f"metric {name} must return one value per example, {weight.shape}; it returned {jnp.shape(value)}")
        # A weight of 0 also silences the metric's NaN on a padded row.
        return [jnp.sum(jnp.where(weight > 0, weight * value, 0.0)) for value in values] + [jnp.sum(weight)]

    return sums


def _padded(data: Mapping | Iterable[Mapping], batch_size: int) -> Iterator[dict]:
    """Batches with weights, all of the first one's size unless a later one is larger."""
    size = 0
    for batch in _sliced(data, batch_size) if isinstance(data, Mapping) else data:
        rows = count_rows(batch)
        size = size or rows
        yield pad_rows(batch, max(rows, size))


def _sliced(arrays: Mapping, batch_size: int) -> Iterator[dict]:
    for first in range(0, count_rows(arrays), batch_size):
        yield jax.tree.map(lambda v: v[first : first + batch_size], dict(arrays))  # noqa: B023
