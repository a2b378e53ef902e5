"""What the losses share: sums in which nothing times minus infinity is nothing, and a one-line check of shapes."""

import jax.numpy as jnp

from jaxopt_lab.core.types import Array

__all__ = ["expected", "same_shape"]


def expected(probabilities: Array, values: Array) -> Array:
    r"""The mean of values over the last axis, :math:`\sum_i p_i v_i`, where an impossible value counts 0 even if it is infinite.

    >>> expected(jnp.array([1.0, 0.0]), jnp.array([2.0, -jnp.inf]))
    Array(2., dtype=float32)
    """
    possible = probabilities != 0
    return jnp.sum(jnp.where(possible, probabilities * jnp.where(possible, values, 0.0), 0.0), axis=-1)


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
