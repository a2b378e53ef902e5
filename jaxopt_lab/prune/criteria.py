"""What makes a weight worth keeping: one elementwise function each."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_lab.core.types import Array

__all__ = ["Criterion", "layer_adaptive", "magnitude", "random", "saliency"]

_BINS = 1 << 15


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


def layer_adaptive() -> Criterion:
    r"""The square of a weight against all in its leaf that are as large: layer-adaptive magnitude (LAMP).

    .. math:: s_i = w_i^2 \Big/ \sum_{j:\, |w_j| \ge |w_i|} w_j^2

    Within a leaf it ranks as `magnitude` does. With `global_()` it decides how much each leaf keeps: small leaves that are used
    often, such as the first convolutions, keep more than by magnitude, and no leaf is emptied.

    The sum is over bins of magnitude, each :math:`2^{-7}` of its value wide, with the weight's own bin counted whole: nothing is
    sorted, and a sharded leaf is not gathered. Where weights lie closer together than that, the score is too low by their share.

    >>> layer_adaptive().score("kernel", jnp.array([1.0, -2.0, 0.0]), jnp.zeros(3))
    Array([0.2, 1. , 0. ], dtype=float32)

    Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", 2021.
    """

    def score(path: str, weight: Array, gradient: Array) -> Array:
        del path, gradient
        size = jnp.abs(weight.astype(jnp.float32))
        # Positive floats are ordered as their bits are: sign, exponent and seven bits of the mantissa.
        bins = (jax.lax.bitcast_convert_type(size, jnp.uint32) >> 16).astype(jnp.int32)
        square = jnp.square(size)
        counted = jnp.where(jnp.isnan(square), 0, square)
        as_large = jnp.cumsum(jnp.zeros(_BINS, jnp.float32).at[bins].add(counted)[::-1])[::-1]
        # A NaN stays one, and so a weight, as it does under the other criteria.
        return jnp.where(square == 0, 0, square / jnp.where(as_large > 0, as_large, 1)[bins])

    return Criterion(score)


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
