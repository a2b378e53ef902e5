"""What the losses share: float32 logits, one-line checks, sums in which nothing times minus infinity is nothing."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxopt_lab.core.types import Array

__all__ = ["expected", "require", "same_shape"]


def expected(probabilities: Array, values: Array) -> Array:
    r"""The mean of values over the last axis, :math:`\sum_i p_i v_i`, where an impossible value counts 0 even if it is infinite.

    >>> expected(jnp.array([1.0, 0.0]), jnp.array([2.0, -jnp.inf]))
    Array(2., dtype=float32)
    """
    possible = probabilities != 0
    return jnp.sum(jnp.where(possible, probabilities * jnp.where(possible, values, 0.0), 0.0), axis=-1)


def require(holds: Callable, must: str, **value: ArrayLike) -> None:
    """Raises a one-line ValueError unless the setting holds; a traced one is taken on trust.

    >>> require(lambda k: k > 0, "be positive", k=0)
    Traceback (most recent call last):
      ...
    ValueError: k must be positive; got 0
    """
    ((name, given),) = value.items()
    if not isinstance(given, Tracer) and not np.all(holds(np.asarray(given))):
        raise ValueError(f"{name} must {must}; got {given}")


def same_shape(**arrays: Array) -> None:
    """Raises a one-line ValueError unless the two arrays have the same shape: broadcasting hides mistakes.

    >>> same_shape(student=jnp.ones(3), teacher=jnp.ones((3, 1)))
    Traceback (most recent call last):
      ...
    ValueError: student has shape (3,) and teacher (3, 1); they must be equal
    """
    (first, a), (second, b) = arrays.items()
    if a.shape != b.shape:
        raise ValueError(f"{first} has shape {a.shape} and {second} {b.shape}; they must be equal")
