"""Initialisers by name, as objects `(key, shape, dtype) -> array`: `nets.MLP(kernel_init=nets.initializers.he_normal)`.

With fan-in :math:`m` (inputs of a unit) and fan-out :math:`n`, the variance of an entry is

    xavier   2 / (m + n)     Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010
    he       2 / m           He et al., "Delving deep into rectifiers", 2015
    lecun    1 / m           LeCun et al., "Efficient BackProp", 1998

either normal (truncated at two standard deviations) or uniform; `orthogonal` draws a random matrix with orthonormal rows or columns
(Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural networks", 2013).

>>> he_uniform(jax.random.key(0), (3, 2)).shape
(3, 2)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab.core.types import Array

__all__ = ["he_normal", "he_uniform", "lecun_normal", "lecun_uniform", "orthogonal", "xavier_normal", "xavier_uniform", "zeros"]

xavier_uniform = jax.nn.initializers.glorot_uniform()
xavier_normal = jax.nn.initializers.glorot_normal()
he_uniform = jax.nn.initializers.he_uniform()
he_normal = jax.nn.initializers.he_normal()
lecun_uniform = jax.nn.initializers.lecun_uniform()
lecun_normal = jax.nn.initializers.lecun_normal()
zeros = jax.nn.initializers.zeros


def orthogonal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
    """A random matrix whose rows or columns, whichever are fewer, are orthonormal; decomposed in float32 where `dtype` is narrower.

    Raises:
      ValueError: the shape has fewer than two axes.

    >>> matrix = orthogonal(jax.random.key(0), (3, 2), jnp.bfloat16)
    >>> matrix.dtype, bool(jnp.allclose(matrix.T @ matrix, jnp.eye(2), atol=0.05))
    (dtype(bfloat16), True)
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    return jax.nn.initializers.orthogonal()(key, tuple(shape), wide, out_sharding).astype(dtype)
