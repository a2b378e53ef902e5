"""Histograms that grow with what they see: counts on a grid of powers of two, the same in whatever order values come."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxopt_lab.core.types import Array

__all__ = ["Extremes", "Histogram", "counted", "empty", "extremes", "merged", "no_extremes", "quantile", "squared_error", "union"]

_FINEST = -126  # the smallest normal power of two


class Extremes(NamedTuple):
    """The smallest and the largest value seen."""

    low: Array
    high: Array


def no_extremes() -> Extremes:
    """Those of nothing: infinity, and its negative.

    >>> no_extremes()
    Extremes(low=Array(inf, dtype=float32), high=Array(-inf, dtype=float32))
    """
    return Extremes(jnp.full((), jnp.inf, jnp.float32), jnp.full((), -jnp.inf, jnp.float32))


def extremes(x: ArrayLike) -> Extremes:
    """The smallest and the largest value of an array, float32.

    >>> extremes(jnp.array([1.0, -3.0, 2.0]))
    Extremes(low=Array(-3., dtype=float32), high=Array(2., dtype=float32))
    """
    x = jnp.asarray(x).astype(jnp.float32)
    return Extremes(jnp.min(x, initial=jnp.inf), jnp.max(x, initial=-jnp.inf))


def union(a: Extremes, b: Extremes) -> Extremes:
    """The extremes of both.

    >>> union(extremes(1.0), extremes(2.0))
    Extremes(low=Array(1., dtype=float32), high=Array(2., dtype=float32))
    """
    return Extremes(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))


class Histogram(NamedTuple):
    r"""Counts of values on a grid of :math:`2^e`: bin :math:`i` holds :math:`[(f + i) 2^e, (f + i + 1) 2^e)`.

    0 is always an edge, and always inside. When values fall outside, :math:`e` grows and bins are merged in twos: edges of the
    coarse grid are edges of the fine one, so no count is ever split or guessed. The histogram is the same in whatever order and
    batches the values came.

    Attributes:
      counts: float32 `[bins]`, whole numbers up to 2^24 and rounded beyond; values that are not finite are not counted.
      exponent: :math:`e`, int32.
      first: :math:`f`, int32.
      low, high: the smallest and the largest value seen, finite or not.
    """

    counts: Array
    exponent: Array
    first: Array
    low: Array
    high: Array

    @property
    def edges(self) -> Array:
        """The bins' edges, `[bins + 1]`."""
        return self.width * (self.first + jnp.arange(self.counts.shape[-1] + 1)).astype(jnp.float32)

    @property
    def width(self) -> Array:
        """The width of a bin."""
        return _power(self.exponent)


def empty(bins: int) -> Histogram:
    """A histogram of nothing, on the finest grid.

    >>> empty(8).counts.shape
    (8,)
    """
    return Histogram(jnp.zeros(bins, jnp.float32), jnp.int32(_FINEST), jnp.int32(0), *no_extremes())


def counted(state: Histogram, x: ArrayLike) -> Histogram:
    """The histogram with the values of an array added.

    >>> state = counted(empty(8), jnp.array([0.0, 0.5, 3.0, 7.0]))
    >>> state.counts.astype(int).tolist(), float(state.width)
    ([2, 0, 0, 1, 0, 0, 0, 1], 1.0)
    """
    bins = state.counts.shape[0]
    x = jnp.asarray(x).astype(jnp.float32).reshape(-1)
    seen = union(Extremes(state.low, state.high), extremes(x))
    new = _regridded(state, seen, extremes(jnp.where(jnp.isfinite(x), x, 0)))
    index = jnp.floor(x / new.width).astype(jnp.int32) - new.first
    # In whole numbers: a float stops counting at 2^24.
    counts = jnp.zeros(bins, jnp.int32).at[jnp.where(jnp.isfinite(x), index, bins)].add(1, mode="drop")
    return new._replace(counts=new.counts + counts)


def merged(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of what both have seen.

    >>> both = merged(counted(empty(8), jnp.array([7.0])), counted(empty(8), jnp.array([-9.0])))
    >>> both.counts.astype(int).tolist(), both.edges[:2].tolist()
    ([1, 0, 0, 0, 1, 0, 0, 0], [-12.0, -8.0])
    """
    seen = union(Extremes(a.low, a.high), Extremes(b.low, b.high))
    left, right = (_regridded(state, seen, _covered(other)) for state, other in ((a, b), (b, a)))
    exponent, first = jnp.maximum(left.exponent, right.exponent), jnp.minimum(left.first, right.first)
    left, right = (_moved(state, exponent, first) for state in (left, right))
    return left._replace(counts=left.counts + right.counts)


def quantile(state: Histogram, fraction: float) -> Array:
    """The value below which a fraction of the counts lies, spread evenly within bins; never beyond the extremes.

    >>> float(quantile(counted(empty(8), jnp.arange(8.0)), 0.5))
    4.0
    """
    below = jnp.cumsum(state.counts)
    target = fraction * below[-1]
    index = jnp.clip(jnp.searchsorted(below, target), 0, state.counts.shape[0] - 1)
    count = state.counts[index]
    inside = (target - (below[index] - count)) / jnp.maximum(count, 1)
    return jnp.clip(state.width * (state.first + index + inside), state.low, state.high)


def squared_error(state: Histogram, scale: Array, lowest: ArrayLike, highest: ArrayLike) -> Array:
    r"""The squared error of rounding the counted values, spread evenly within bins, to some levels of a scale, summed.

    With the nearest level :math:`n` of :math:`x`, :math:`n_l \le n \le n_h`, and :math:`u = x / s - n`, the integral of the squared
    error up to :math:`x` is

    .. math:: s^3 \left( \frac{n}{12} + \frac{u^3}{3} \right)

    inside the range as beyond it.

    Args:
      state: the histogram.
      scale: :math:`s`, positive.
      lowest: :math:`n_l`, a whole number.
      highest: :math:`n_h`.

    >>> state = counted(empty(8), jnp.array([0.5, 7.5]))
    >>> round(float(squared_error(state, jnp.float32(1.0), 0, 8)), 4)
    0.1667
    """
    scale = jnp.where(scale > 0, scale, 1)
    steps = state.edges / scale
    level = jnp.clip(jnp.round(steps), lowest, highest)
    integral = level / 12 + (steps - level) ** 3 / 3
    return jnp.sum(state.counts * jnp.diff(integral)) * scale**3 / state.width


def _power(exponent: Array) -> Array:
    """`2 ** exponent`, exactly."""
    return jnp.ldexp(jnp.ones_like(exponent, jnp.float32), exponent)


def _covered(state: Histogram) -> Extremes:
    """The extremes of what was counted, to a bin, and 0."""
    place = jnp.where(state.counts > 0, state.first + jnp.arange(state.counts.shape[0]), 0)
    return Extremes(jnp.min(place).astype(jnp.float32) * state.width, jnp.max(place).astype(jnp.float32) * state.width)


def _regridded(state: Histogram, seen: Extremes, also: Extremes) -> Histogram:
    """The histogram on the finest grid, no finer than its own, that holds its values, those between `also`, and 0."""
    bins = state.counts.shape[0]
    low, high = union(_covered(state), also)
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    # The smallest power of two that is no less than the mean width. Divided first: the span of two large floats may overflow.
    fraction, exponent = jnp.frexp(high / bins - low / bins)
    exponent = jnp.maximum(exponent - (fraction == 0.5), _FINEST)
    width = _power(exponent)
    needed = jnp.floor(high / width) - jnp.floor(low / width) + 1
    exponent = jnp.maximum(exponent + (needed > bins), state.exponent)
    first = jnp.floor(low / _power(exponent)).astype(jnp.int32)
    return _moved(state, exponent, first)._replace(low=seen.low, high=seen.high)


def _moved(state: Histogram, exponent: Array, first: Array) -> Histogram:
    """The same counts on a grid that is as fine or coarser and holds them all."""
    bins = state.counts.shape[0]
    # Shifting a whole number divides it by a power of two and rounds down; beyond 31 places nothing changes any more.
    place = (state.first + jnp.arange(bins)) >> jnp.clip(exponent - state.exponent, 0, 31)
    index = jnp.where(state.counts > 0, place - first, bins)
    counts = jnp.zeros(bins, jnp.float32).at[index].add(state.counts, mode="drop")
    return state._replace(counts=counts, exponent=exponent.astype(jnp.int32), first=first.astype(jnp.int32))
