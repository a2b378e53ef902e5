r"""Ranges of activations from what is seen of them: statistics that are kept batch by batch, and the clipping range they lead to.

An observer is four pure functions on bare arrays: a state to begin with, its change by an array, the union of two states, and the
range :math:`[l, h]` that it proposes for quantising what it saw. States are trees of arrays of fixed shapes, so an observer runs
under `jit`, in the carry of a `scan` and under `vmap`.

The smallest and largest value spoil few bits for one outlier. `percentile` cuts a fixed fraction, `mse` what costs least in squared
error, `entropy` what costs least information, and `laplace` and `gauss` what the best range of that distribution is.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.compress.arrays import histograms
from jaxopt_lab.compress.arrays.histograms import Extremes, Histogram, extremes, no_extremes, union
from jaxopt_lab.core.checks import require
from jaxopt_lab.core.types import Array, PyTree

__all__ = [
    "Moments",
    "MovingExtremes",
    "Observer",
    "Range",
    "entropy",
    "gauss",
    "gauss_clipping",
    "laplace",
    "laplace_clipping",
    "min_max",
    "moving_average",
    "mse",
    "per_channel",
    "percentile",
]


class Range(NamedTuple):
    """The interval that is kept: `low` and `high`, float32, of one shape."""

    low: Array
    high: Array


class Observer(NamedTuple):
    """A statistic of arrays, and the range it proposes.

    Attributes:
      init: `x -> state`, from the shape and dtype of what will be seen.
      update: `(state, x) -> state`.
      merge: `(state, state) -> state` of two that have seen different arrays.
      range: `state -> Range`. Low is infinity and high its negative where nothing was seen; NaN and infinity that were seen come
        out.
    """

    init: Callable[[Any], PyTree]
    update: Callable[[PyTree, Array], PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]
    range: Callable[[PyTree], Range]


def min_max() -> Observer:
    r"""The smallest and the largest value: :math:`l = \min x, \; h = \max x`.

    >>> observer = min_max()
    >>> state = observer.update(observer.init(None), jnp.array([1.0, -3.0]))
    >>> observer.range(observer.update(state, jnp.array([2.0])))
    Range(low=Array(-3., dtype=float32), high=Array(2., dtype=float32))
    """

    def update(state: Extremes, x: Array) -> Extremes:
        return union(state, extremes(x))

    return Observer(lambda x: no_extremes(), update, union, lambda state: Range(state.low, state.high))


class MovingExtremes(NamedTuple):
    """Averages of the extremes of batches, and the number of those, int32."""

    low: Array
    high: Array
    count: Array


def moving_average(decay: float = 0.9) -> Observer:
    r"""Averages of the extremes of batches that forget: :math:`l \leftarrow d\, l + (1 - d) \min x`, and so for :math:`h`.

    The first batch sets them. Merging weighs each side by its number of batches, since an average does not tell the order they came
    in.

    Args:
      decay: :math:`d`, from 0 to 1: how much of the average a batch leaves.

    Raises:
      ValueError: `decay` is not in [0, 1).

    >>> observer = moving_average(0.75)
    >>> state = observer.update(observer.init(None), jnp.array([0.0, 4.0]))
    >>> observer.range(observer.update(state, jnp.array([-4.0, 8.0])))
    Range(low=Array(-1., dtype=float32), high=Array(5., dtype=float32))

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """
    require(lambda decay: (decay >= 0) & (decay < 1), "lie in [0, 1)", decay=decay)

    def update(state: MovingExtremes, x: Array) -> MovingExtremes:
        new = extremes(x)
        low, high = (
            jnp.where(state.count == 0, b, decay * a + (1 - decay) * b) for a, b in ((state.low, new.low), (state.high, new.high))
        )
        return MovingExtremes(low, high, state.count + 1)

    def merge(a: MovingExtremes, b: MovingExtremes) -> MovingExtremes:
        count = a.count + b.count
        share = a.count.astype(jnp.float32) / jnp.maximum(count, 1)
        # A side that saw nothing is infinite, and 0 times infinity is no number.
        low, high = (
            jnp.where(a.count == 0, y, jnp.where(b.count == 0, x, share * x + (1 - share) * y))
            for x, y in ((a.low, b.low), (a.high, b.high))
        )
        return MovingExtremes(low, high, count)

    return Observer(
        lambda x: MovingExtremes(*no_extremes(), jnp.zeros((), jnp.int32)),
        update,
        merge,
        lambda state: Range(jnp.where(state.count == 0, jnp.inf, state.low), jnp.where(state.count == 0, -jnp.inf, state.high)),
    )


def percentile(percent: float = 99.99, bins: int = 2048) -> Observer:
    r"""Cuts a fraction of the values off each end: :math:`F(l) = 1 - p, \; F(h) = p`, with :math:`F` from a histogram.

    Values are taken to be spread evenly within a bin; a bin is at most 2/`bins` of the range from the smallest to the largest value
    and 0.

    Args:
      percent: :math:`100\, p`, above 50 and up to 100.
      bins: of the histogram, at least 8.

    Raises:
      ValueError: an argument is out of range.

    >>> observer = percentile(90.0)
    >>> see = jax.jit(lambda x: observer.range(observer.update(observer.init(x), x)))
    >>> low, high = see(jnp.arange(1001.0))
    >>> round(float(low)), round(float(high))
    (100, 900)
    """
    require(lambda percent: (percent > 50) & (percent <= 100), "lie in (50, 100]", percent=percent)

    def chosen(state: Histogram) -> Range:
        return Range(histograms.quantile(state, 1 - percent / 100), histograms.quantile(state, percent / 100))

    return _histogram_observer(bins, chosen)


def mse(bits: int = 8, symmetric: bool = False, bins: int = 2048, steps: int = 128) -> Observer:
    r"""The range whose rounding and clipping cost the least squared error, by a histogram.

    .. math:: \min_{l, h} \sum_i \frac{c_i}{w} \int_{x_i}^{x_i + w} (Q_{l, h}(x) - x)^2 \, dx

    with values spread evenly within bins of width :math:`w`, and :math:`Q` the rounding to :math:`2^b` codes of which one is 0.
    Each end is searched among `steps` fractions of the extreme value, the other being held, twice over; the extremes are among the
    candidates, so the result is never worse than theirs.

    Args:
      bits: :math:`b`, from 2 to 16.
      symmetric: one range :math:`[-h, h]` of :math:`2^b - 1` codes.
      bins: of the histogram, at least 8.
      steps: candidates for each end.

    Raises:
      ValueError: an argument is out of range.

    >>> observer = mse(bits=2)
    >>> see = jax.jit(lambda x: observer.range(observer.update(observer.init(x), x)))
    >>> low, high = see(jnp.array([1.0] * 3000 + [2.0, 3.0, 30.0]))
    >>> float(low), float(high) < 6
    (0.0, True)

    Source: Sung et al., "Resiliency of deep neural networks under quantization", 2015 (clipping by the L2 error).
    """
    _check_bits(bits)
    require(lambda steps: steps >= 2, "be at least 2, the candidates for an end", steps=steps)
    fractions = np.arange(1, steps + 1, dtype=np.float32) / np.float32(steps)

    def asymmetric(state: Histogram) -> Range:
        low, high = jnp.minimum(state.low, 0), jnp.maximum(state.high, 0)
        errors = jax.vmap(lambda low, high: histograms.squared_error(state, *_levels(low, high, bits)), (0, 0))
        kept = Range(low, high)
        for _ in range(2):
            highs = fractions * high
            kept = kept._replace(high=highs[jnp.argmin(errors(jnp.full(steps, kept.low), highs))])
            lows = fractions * low
            kept = kept._replace(low=lows[jnp.argmin(errors(lows, jnp.full(steps, kept.high)))])
        return kept

    def one_sided(state: Histogram) -> Range:
        largest = jnp.maximum(-state.low, state.high)
        most = 2 ** (bits - 1) - 1
        errors = jax.vmap(lambda high: histograms.squared_error(state, high / most, -most, most))(fractions * largest)
        high = (fractions * largest)[jnp.argmin(errors)]
        return Range(-high, high)

    return _histogram_observer(bins, one_sided if symmetric else asymmetric)


def entropy(bits: int = 8, bins: int = 2048) -> Observer:
    r"""The range that loses the least information: :math:`\min_T \mathrm{KL}(P_T \,\|\, Q_T)`.

    :math:`P_T` is the histogram of :math:`|x|` up to :math:`T` with all that lies beyond in its last bin; :math:`Q_T` is the part
    up to :math:`T` alone, brought to :math:`2^{b-1}` levels (:math:`2^b` where nothing is negative) and spread over its non-empty
    bins again.

    Args:
      bits: :math:`b`, from 2 to 16.
      bins: of the histogram; candidates for :math:`T` lie at its edges, so at least twice the levels are needed.

    Raises:
      ValueError: an argument is out of range.

    >>> observer = entropy()
    >>> x = jax.random.normal(jax.random.key(0), (4096,)).at[0].set(100.0)
    >>> see = jax.jit(lambda x: observer.range(observer.update(observer.init(x), x)))
    >>> bool(see(x).high < 20)
    True

    Source: Migacz, "8-bit inference with TensorRT", 2017.
    """
    _check_bits(bits)
    require(lambda bins: bins >= 2 ** (bits + 1), f"be at least {2 ** (bits + 1)} for {bits} bits", bins=bins)

    def chosen(state: Histogram) -> Range:
        place = state.first + jnp.arange(bins)
        folded = jnp.zeros(bins, jnp.float32).at[jnp.where(place >= 0, place, -1 - place)].add(state.counts, mode="drop")
        divergences = _divergences(folded, jnp.where(state.low >= 0, 2**bits, 2 ** (bits - 1)))
        best = jnp.argmin(divergences)
        limit = jnp.where(
            jnp.isfinite(divergences[best]), (best.astype(jnp.float32) + 1.5) * state.width, jnp.maximum(-state.low, state.high)
        )
        return Range(jnp.maximum(state.low, -limit), jnp.minimum(state.high, limit))

    return _histogram_observer(bins, chosen)


class Moments(NamedTuple):
    """Moments of the values seen.

    Attributes:
      count: how many, float32.
      mean: of the values.
      squares: the sum of squared distances from the mean.
      distances: the sum of distances from the mean, each batch's own.
      low, high: the smallest and the largest value.
    """

    count: Array
    mean: Array
    squares: Array
    distances: Array
    low: Array
    high: Array


def laplace(bits: int = 8) -> Observer:
    r"""The best range if values are Laplacian: :math:`\mu \pm \alpha_b\, \beta`, with :math:`\beta` their mean distance from
    :math:`\mu`.

    Where no value is negative they are taken for what a ReLU leaves of such a distribution around 0, of which :math:`\beta =
    2\,\mathrm{E}\,x`, and whose one half has all the codes: :math:`[0, \alpha_{b+1}\, \beta]`. Never beyond the extremes. The
    distances of a batch are taken from its own mean.

    Args:
      bits: :math:`b`, from 2 to 16; for :math:`\alpha_b` see `laplace_clipping`.

    Raises:
      ValueError: `bits` is out of range.

    >>> observer = laplace(bits=4)
    >>> see = jax.jit(lambda x: observer.range(observer.update(observer.init(x), x)))
    >>> low, high = see(jax.random.laplace(jax.random.key(0), (100_000,)))
    >>> round(float(low), 1), round(float(high), 1)
    (-5.0, 5.0)

    Source: Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment", 2019.
    """
    _check_bits(bits)
    both, half = laplace_clipping(bits), laplace_clipping(bits + 1)

    def chosen(state: Moments) -> Range:
        scale = jnp.where(state.low >= 0, 2 * state.mean, state.distances / jnp.maximum(state.count, 1))
        return _clipped(state, both * scale, half * scale)

    return _moments_observer(chosen)


def gauss(bits: int = 8) -> Observer:
    r"""The best range if values are normal: :math:`\mu \pm \alpha_b\, \sigma`.

    Where no value is negative they are taken for what a ReLU leaves of such a distribution around 0, of which
    :math:`\sigma^2 = 2\,\mathrm{E}\,x^2`: :math:`[0, \alpha_{b+1}\, \sigma]`. Never beyond the extremes.

    Args:
      bits: :math:`b`, from 2 to 16; for :math:`\alpha_b` see `gauss_clipping`.

    Raises:
      ValueError: `bits` is out of range.

    >>> observer = gauss(bits=4)
    >>> see = jax.jit(lambda x: observer.range(observer.update(observer.init(x), x)))
    >>> low, high = see(jax.random.normal(jax.random.key(0), (100_000,)))
    >>> round(float(low), 1), round(float(high), 1)
    (-2.6, 2.6)

    Source: Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment", 2019.
    """
    _check_bits(bits)
    both, half = gauss_clipping(bits), gauss_clipping(bits + 1)

    def chosen(state: Moments) -> Range:
        variance = state.squares / jnp.maximum(state.count, 1)
        scale = jnp.sqrt(jnp.where(state.low >= 0, 2 * (variance + state.mean**2), variance))
        return _clipped(state, both * scale, half * scale)

    return _moments_observer(chosen)


@functools.lru_cache(maxsize=64)
def laplace_clipping(bits: int) -> float:
    r"""Where to clip a Laplace distribution of scale 1: the :math:`\alpha` of least error.

    .. math:: 2 e^{-\alpha} + \frac{\alpha^2}{3 \cdot 4^b}

    is the error of clipping at :math:`\pm \alpha` and rounding to :math:`2^b` steps in between.

    Args:
      bits: :math:`b`, from 2 to 17.

    Raises:
      ValueError: `bits` is out of range.

    >>> [round(laplace_clipping(bits), 2) for bits in (2, 3, 4)]
    [2.83, 3.9, 5.03]

    Source: Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment", 2019.
    """
    _check_bits(bits, most=17)
    return _root(lambda a: a / (3 * 4**bits) - math.exp(-a))


@functools.lru_cache(maxsize=64)
def gauss_clipping(bits: int) -> float:
    r"""Where to clip a normal distribution of deviation 1: the :math:`\alpha` of least error.

    .. math:: (1 + \alpha^2) \, \mathrm{erfc}(\alpha / \sqrt 2) - \sqrt{2 / \pi}\, \alpha e^{-\alpha^2 / 2} + \frac{\alpha^2}{3
    \cdot 4^b}

    is the error of clipping at :math:`\pm \alpha` and rounding to :math:`2^b` steps in between.

    Args:
      bits: :math:`b`, from 2 to 17.

    Raises:
      ValueError: `bits` is out of range.

    >>> [round(gauss_clipping(bits), 2) for bits in (2, 3, 4)]
    [1.71, 2.15, 2.56]

    Source: Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment", 2019.
    """
    _check_bits(bits, most=17)
    peak = math.sqrt(2 / math.pi)
    return _root(lambda a: a * math.erfc(a / math.sqrt(2)) - peak * math.exp(-a * a / 2) + a / (3 * 4**bits))


def per_channel(observer: Observer, axis: int = -1) -> Observer:
    """An observer for each index of an axis; ranges are `[channels]`.

    Args:
      observer: what to keep of each channel.
      axis: of what is seen; the features of an input as a rule.

    Raises:
      ValueError: what is to be seen has no such axis.

    >>> observer = per_channel(min_max())
    >>> x = jnp.array([[1.0, -2.0], [3.0, 0.0]])
    >>> observer.range(observer.update(observer.init(x), x)).high
    Array([3., 0.], dtype=float32)
    """

    def init(x: Any) -> PyTree:
        shape = jnp.shape(x)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"axis={axis} is no axis of what is to be seen, of shape {shape}")
        state = observer.init(jax.ShapeDtypeStruct((*shape[:axis], *shape[axis:][1:]), jnp.result_type(x)))
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (shape[axis], *jnp.shape(leaf))), state)

    return Observer(
        init, jax.vmap(observer.update, (0, axis)), jax.vmap(observer.merge), lambda state: Range(*jax.vmap(observer.range)(state))
    )


def _check_bits(bits: int, most: int = 16) -> None:
    require(lambda bits: np.isin(bits, range(2, most + 1)), f"be a whole number from 2 to {most}", bits=bits)


def _histogram_observer(bins: int, chosen: Callable[[Histogram], Range]) -> Observer:
    require(lambda bins: bins >= 8, "be at least 8", bins=bins)

    def proposed(state: Histogram) -> Range:
        # What was not finite is not counted, but must come out.
        usable = jnp.isfinite(state.low) & jnp.isfinite(state.high)
        low, high = chosen(state._replace(low=jnp.where(usable, state.low, 0), high=jnp.where(usable, state.high, 0)))
        return Range(jnp.where(usable, low, state.low), jnp.where(usable, high, state.high))

    return Observer(lambda x: histograms.empty(bins), histograms.counted, histograms.merged, proposed)


def _divergences(counts: Array, levels: Array) -> Array:
    """What `entropy` minimises, for the first 1, 2, ... bins kept; infinite for fewer than levels and beyond the last used."""
    index, bins = jnp.arange(counts.shape[0]), counts.shape[0]
    sums, filled = (jnp.pad(jnp.cumsum(part), (1, 0)) for part in (counts, (counts > 0).astype(jnp.float32)))
    used = bins - jnp.argmax(counts[::-1] > 0)

    def divergence(kept: Array) -> Array:
        merged = kept // levels
        start = jnp.minimum(index // jnp.maximum(merged, 1), levels - 1) * merged
        end = jnp.where(start == (levels - 1) * merged, kept, start + merged)
        spread = jnp.where(counts > 0, (sums[end] - sums[start]) / jnp.maximum(filled[end] - filled[start], 1), 0)
        p = jnp.where(index < kept, counts, 0) + jnp.where(index == kept - 1, sums[-1] - sums[kept], 0)
        q = jnp.where(p > 0, jnp.maximum(spread, 1e-4), 0)
        p, q = p / jnp.sum(p), q / jnp.sum(q)
        terms = jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1) / jnp.where(q > 0, q, 1)), 0)
        return jnp.where((kept >= levels) & (kept <= used), jnp.sum(terms), jnp.inf)

    return jax.lax.map(divergence, jnp.arange(1, bins + 1), batch_size=64)


def _levels(low: Array, high: Array, bits: int) -> tuple[Array, Array, Array]:
    """The scale of an asymmetric range that holds 0, and its lowest and highest level in units of it."""
    scale = (high - low) / (2**bits - 1)
    scale = jnp.where(scale > 0, scale, 1)
    lowest = jnp.round(low / scale)
    return scale, lowest, lowest + 2**bits - 1


def _moments_observer(chosen: Callable[[Moments], Range]) -> Observer:
    def init(x: Any) -> Moments:
        zero = jnp.zeros((), jnp.float32)
        return Moments(zero, zero, zero, zero, *no_extremes())

    def update(state: Moments, x: Array) -> Moments:
        x = jnp.asarray(x).astype(jnp.float32)
        mean = jnp.mean(x)
        return merge(state, Moments(jnp.float32(x.size), mean, jnp.sum((x - mean) ** 2), jnp.sum(jnp.abs(x - mean)), *extremes(x)))

    def merge(a: Moments, b: Moments) -> Moments:
        count = a.count + b.count
        share, apart = b.count / jnp.maximum(count, 1), b.mean - a.mean
        return Moments(
            count,
            a.mean + share * apart,
            a.squares + b.squares + a.count * share * apart**2,
            a.distances + b.distances,
            *union(Extremes(a.low, a.high), Extremes(b.low, b.high)),
        )

    return Observer(init, update, merge, chosen)


def _clipped(state: Moments, both: Array, half: Array) -> Range:
    """`mean ± both`, or `[0, half]` where nothing is negative; never beyond the extremes, which also tell what was not finite."""
    usable = jnp.isfinite(state.low) & jnp.isfinite(state.high)
    low = jnp.maximum(state.low, jnp.where(state.low >= 0, 0, state.mean - both))
    high = jnp.minimum(state.high, jnp.where(state.low >= 0, half, state.mean + both))
    return Range(jnp.where(usable, low, state.low), jnp.where(usable, high, state.high))


def _root(f: Callable[[float], float]) -> float:
    """The zero of a function that is negative at 0 and positive far out, by bisection."""
    low, high = 0.0, 64.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2
