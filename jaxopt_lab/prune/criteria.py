"""What makes a weight worth keeping: one elementwise function each."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_lab.core.types import Array

__all__ = ["Criterion", "magnitude", "random", "saliency"]


class Criterion(NamedTuple):
    """How weights are ranked.

    Attributes:
      score: `(path, weight [...], gradient [...]) -> scores [...]`; the largest stay.
      uses_gradient: whether the gradient is looked at (`one_shot` computes none otherwise).
    """

    score: Callable[[str, Array, Array], Array]
    uses_gradient: bool = False


def magnitude() -> Criterion:
    r"""The absolute value: :math:`s = |w|`.

    >>> magnitude().score("kernel", jnp.array([-3.0, 2.0]), jnp.zeros(2))
    Array([3., 2.], dtype=float32)

    Source: Han et al., "Learning both weights and connections for efficient neural networks", 2015.
    """
    return Criterion(lambda path, weight, gradient: jnp.abs(weight))


def saliency() -> Criterion:
    r"""The first-order change of the loss when a weight goes: :math:`s = |w \, \partial L / \partial w|`.

    >>> saliency().score("kernel", jnp.array([-3.0, 2.0]), jnp.array([1.0, 4.0]))
    Array([3., 8.], dtype=float32)

    Source: Molchanov et al., "Importance estimation for neural network pruning", 2019; at initialisation, Lee et al., "SNIP", 2019.
    """
    return Criterion(lambda path, weight, gradient: jnp.abs(weight * gradient.astype(weight.dtype)), uses_gradient=True)


def random(key: Array) -> Criterion:
    r"""A fixed uniform draw for every weight: :math:`s \sim U(0, 1)`, the baseline that a criterion must beat.

    Args:
      key: a typed PRNG key; each path draws from it by its own name, the same at every mask update.

    >>> random(jax.random.key(0)).score("kernel", jnp.ones(2), jnp.zeros(2)).shape
    (2,)
    """

    def score(path: str, weight: Array, gradient: Array) -> Array:
        del gradient
        return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), weight.shape)

    return Criterion(score)
