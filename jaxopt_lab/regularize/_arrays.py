"""What penalties and operators share: the matrix view, norms of groups."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["absolute", "as_matrix", "group_norms", "group_size", "in_wide"]


def in_wide(operator: Callable[..., Array], x: Array, *numbers: float | Array) -> Array:
    """`operator(x, *numbers)` with all of them in the type of `wide(x)`, and its result in the floating type of `x`.

    >>> in_wide(lambda x, t: x * t, jnp.ones(2, jnp.bfloat16), 0.5)
    Array([0.5, 0.5], dtype=bfloat16)
    """
    x = jnp.asarray(x)
    y = wide(x)
    result = operator(y, *(jnp.asarray(number, y.dtype) for number in numbers))
    return result.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else result


def absolute(x: Array) -> Array:
    """`|x|` with the gradient `sign(x)`: 0 at 0, where that of `jnp.abs` is 1.

    >>> import jax
    >>> jax.grad(absolute)(0.0), jax.grad(absolute)(-2.0)
    (Array(0., dtype=float32, weak_type=True), Array(-1., dtype=float32, weak_type=True))
    """
    return x * jnp.sign(x)


def as_matrix(x: Array) -> Array:
    """The matrix view `[inputs, outputs]` of a weight `[..., outputs]`: all axes but the last are its inputs.

    >>> as_matrix(jnp.ones((3, 3, 8, 16))).shape
    (72, 16)
    """
    if x.ndim < 2:
        raise ValueError(f"an array of shape {x.shape} is not a matrix; choose `where` to fit")
    return x.reshape(-1, x.shape[-1])


def group_norms(x: Array, axis: int) -> Array:
    """The norm of each slice along `axis`, all other axes kept as 1; its gradient at a zero group is 0, not NaN.

    >>> group_norms(jnp.array([[3.0, 0.0], [4.0, 0.0]]), axis=-1)
    Array([[5., 0.]], dtype=float32)
    """
    squares = jnp.sum(x * x, axis=_others(x, axis), keepdims=True)
    alive = squares != 0  # a NaN is alive, and shows
    return jnp.where(alive, jnp.sqrt(jnp.where(alive, squares, 1.0)), 0.0)


def group_size(x: Array, axis: int) -> int:
    """How many weights each slice along `axis` holds.

    >>> group_size(jnp.ones((3, 3, 8, 16)), axis=-1)
    72
    """
    return x.size // x.shape[axis] if x.size else 0


def _others(x: Array, axis: int) -> tuple[int, ...]:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"an array of shape {x.shape} has no axis {axis}; choose `axis` or `where` to fit")
    return tuple(k for k in range(x.ndim) if k != axis % x.ndim)
