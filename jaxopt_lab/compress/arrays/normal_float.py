"""Normal floats: the levels that a normal distribution fills evenly."""

import functools
from statistics import NormalDist
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Array

__all__ = ["nearest", "table", "values"]


@functools.cache
def table(bits: int = 4) -> tuple[float, ...]:
    r"""The :math:`2^b` levels of a normal float, in order, from -1 to 1, 0 among them.

    .. math:: v \propto \Phi^{-1}(p), \qquad p = \tfrac12 \ldots 1 - \delta, \qquad
        \delta = \tfrac12 \left(\tfrac{1}{2 \cdot 2^b} + \tfrac{1}{2 (2^b - 1)}\right)

    at :math:`2^{b-1} + 1` evenly spaced :math:`p` from the middle up, and :math:`2^{b-1}` from the middle down, which share the 0.

    Args:
      bits: 2 to 4.

    Raises:
      ValueError: `bits` is out of range.

    >>> [round(level, 4) for level in table(2)]
    [-1.0, 0.0, 0.4358, 1.0]

    Source: Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", 2023.
    """
    if bits not in (2, 3, 4):
        raise ValueError(f"bits={bits}: normal floats have 2 to 4 bits")
    count, quantile = 2**bits, NormalDist().inv_cdf
    last = 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2
    above = [quantile(p) for p in np.linspace(0.5, last, count // 2 + 1)[1:]]
    below = [quantile(p) for p in np.linspace(0.5, last, count // 2)[1:]]
    # Both reach the same last quantile, which becomes 1.
    return (*(-v / above[-1] for v in reversed(below)), 0.0, *(v / above[-1] for v in above))


def nearest(x: Array, bits: int = 4) -> Array:
    """The number of the level nearest to each of `x`, uint8; half way between two it is the lower one.

    >>> nearest(jnp.array([-1.0, 0.0, 0.03, 0.05, 2.0]))
    Array([ 0,  7,  7,  8, 15], dtype=uint8)
    """
    levels = np.asarray(table(bits))
    middles = jnp.asarray((levels[1:] + levels[:-1]) / 2, x.dtype)
    return jnp.searchsorted(middles, x, side="left", method="compare_all").astype(jnp.uint8)


def values(codes: Array, dtype: Any, bits: int = 4) -> Array:
    """The levels of these numbers, in `dtype`.

    By choosing between halves of the table, bit by bit: on a CPU that is faster than a look-up, and accelerators have none.

    >>> values(jnp.array([0, 7, 8, 15], jnp.uint8), jnp.float32)
    Array([-1.        ,  0.        ,  0.07958031,  1.        ], dtype=float32)
    """

    def choose(levels: tuple[float, ...]) -> Array:
        half = len(levels) // 2
        if not half:
            return jnp.full(codes.shape, levels[0], dtype)
        return jnp.where(codes & half, choose(levels[half:]), choose(levels[:half]))

    return choose(table(bits))
