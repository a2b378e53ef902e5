"""Which cut weights come back while others go: the second half of dynamic sparse training."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_lab.core.types import Array, Schedule

__all__ = ["Growth", "gradient_growth", "random_growth"]


class Growth(NamedTuple):
    """How cut weights are ranked for coming back, and how many change places.

    Attributes:
      score: `(path, weight [...], gradient [...], count []) -> scores [...]`; the largest of those not kept
        come back: at zero, or with its value where a weight was dropped at this very update.
      fraction: of the live weights, the share that is exchanged at a mask update: a number from 0 to 1, or a schedule of the
        count of updates. A traced one is clipped.
    """

    score: Callable[[str, Array, Array, Array], Array]
    fraction: float | Schedule


def gradient_growth(fraction: float | Schedule = 0.3) -> Growth:
    r"""Back come the weights whose loss would fall fastest: :math:`s = |\partial L / \partial w|`, with the dense gradient.

    Args:
      fraction: the share exchanged; a cosine to zero in the paper: `schedules.cosine(0.3, end)`.

    >>> gradient_growth().score("kernel", jnp.zeros(2), jnp.array([-3.0, 2.0]), jnp.int32(0))
    Array([3., 2.], dtype=float32)

    Source: Evci et al., "Rigging the lottery: making all tickets winners", 2020.
    """
    return Growth(lambda path, weight, gradient, count: jnp.abs(gradient), fraction)


def random_growth(key: Array, fraction: float | Schedule = 0.3) -> Growth:
    r"""Back come weights drawn at random, anew at every mask update: :math:`s \sim U(0, 1)`.

    Args:
      key: a typed PRNG key; each path and update draws from its own `fold_in`.
      fraction: the share exchanged.

    >>> random_growth(jax.random.key(0)).score("kernel", jnp.zeros(2), jnp.zeros(2), jnp.int32(0)).shape
    (2,)

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity", 2018 (SET).
    """

    def score(path: str, weight: Array, gradient: Array, count: Array) -> Array:
        del gradient
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(path.encode())), count), weight.shape)

    return Growth(score, fraction)
