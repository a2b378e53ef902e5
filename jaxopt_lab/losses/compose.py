"""From losses on arrays to losses on `(outputs, batch)`, the form that a training step takes."""

from collections.abc import Callable, Mapping
from functools import reduce
from operator import add
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxopt_lab.core.types import Array, PyTree

__all__ = ["BatchLoss", "combine", "per_example"]

BatchLoss = Callable[[PyTree, Mapping[str, Any]], Array]
"""`loss(outputs, batch) -> [B]`: one value per example."""


def per_example(loss: Callable[..., Array], *fields: str, **settings: Any) -> BatchLoss:
    """Turns a loss on arrays into one on `(outputs, batch)` that reads its other arguments from the batch by name.

    .. math:: f(o, b) = loss(o, b[field_1], b[field_2], ...; settings)

    A loss that gives more than one value per example (every output, every token) is averaged over all axes but the first, so that
    `optax.squared_error` and sequence models need nothing else.

    Args:
      loss: a function of arrays: `cross_entropy`, `distill.soft_targets`, any of Optax's.
      *fields: names in the batch, passed after the outputs in their order; "y" if none is given.
      **settings: keyword arguments of `loss`, the same for every batch.

    Returns:
      `loss(outputs, batch) -> [B]`.

    Raises:
      KeyError: when called: the batch lacks a field; the message lists those it has.
      ValueError: when called: `loss` gave a scalar, whose examples cannot be told apart any more.

    >>> import optax
    >>> loss = per_example(optax.squared_error, "target")
    >>> loss(jnp.array([[1.0, 2.0], [0.0, 0.0]]), {"target": jnp.zeros((2, 2))})
    Array([2.5, 0. ], dtype=float32)
    """
    fields = fields or ("y",)

    def batch_loss(outputs: PyTree, batch: Mapping[str, Any]) -> Array:
        for field in fields:
            if field not in batch:
                raise KeyError(f"the batch has no field {field!r}; it has {', '.join(map(repr, batch))}")
        values = loss(outputs, *(batch[field] for field in fields), **settings)
        if jnp.ndim(values) == 0:
            name = getattr(loss, "__name__", repr(loss))
            raise ValueError(f"{name} gave a scalar, and a step needs one value per example; leave its mean out")
        return jnp.mean(values, axis=tuple(range(1, jnp.ndim(values))))

    return batch_loss


def combine(*terms: tuple[ArrayLike, BatchLoss]) -> BatchLoss:
    r"""A weighted sum of losses: supervision and a teacher, say.

    .. math:: f(o, b) = \sum_k a_k f_k(o, b)

    Args:
      *terms: pairs `(weight, loss)`; a weight is a number and may be traced.

    Returns:
      `loss(outputs, batch) -> [B]`.

    Raises:
      ValueError: there are no terms.

    >>> from jaxopt_lab.losses import cross_entropy, distill
    >>> loss = combine((0.1, per_example(cross_entropy)), (0.9, per_example(distill.soft_targets, "teacher", temperature=4.0)))
    >>> batch = {"y": jnp.array([1, 0]), "teacher": jnp.array([[-2.0, 2.0], [1.0, -1.0]])}
    >>> [f"{value:.3f}" for value in loss(jnp.array([[-2.0, 2.0], [-1.0, 1.0]]), batch)]
    ['0.002', '1.976']
    """
    if not terms:
        raise ValueError("combine needs at least one pair (weight, loss)")

    def batch_loss(outputs: PyTree, batch: Mapping[str, Any]) -> Array:
        def term(weight: ArrayLike, loss: BatchLoss) -> Array:
            value = loss(outputs, batch)
            return jnp.asarray(weight, value.dtype) * value

        return reduce(add, (term(weight, loss) for weight, loss in terms))

    return batch_loss
