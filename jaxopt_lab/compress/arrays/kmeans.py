"""One-dimensional k-means: the few values that stand for many weights. It knows nothing of leaves or models."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["Clusters", "Start", "assign", "density", "k_means", "linear", "plus_plus"]

Start = Callable[[Array, Array, int], Array]
"""`(w, mass, k) -> centroids [k]`, ascending; `mass` is the shape of `w` or a single number."""

_LANES = 256
_FEW = 32


class Clusters(NamedTuple):
    """Weights in clusters.

    Attributes:
      centroids: `[k]`, ascending, in at least float32.
      labels: the index of the centroid of each weight, int32 `[...]` like the weights.
      inertia: the sum of squared distances to them, `[]`.
    """

    centroids: Array
    labels: Array
    inertia: Array


def linear(w: Array, mass: Array, k: int) -> Array:
    """Centroids at equal distances over the range of the weights, which serves the few large ones too.

    >>> linear(jnp.array([-1.0, 0.0, 0.1, 3.0]), jnp.ones(()), 3)
    Array([-1.,  1.,  3.], dtype=float32)

    Source: Han, Mao and Dally, "Deep compression", 2016.
    """
    low, high = _range(w, mass)
    at = jnp.linspace(0, 1, k, dtype=w.dtype)
    # Each end scaled on its own: the span of two large floats may overflow.
    return jnp.sort((1 - at) * low + at * high)


def density(w: Array, mass: Array, k: int) -> Array:
    r"""Centroids at the quantiles :math:`(i + 1/2) / k`, so that each begins with an equal share of the mass.

    Found by halving intervals and counting, to :math:`2^{-24}` of the range.

    >>> density(jnp.arange(1.0, 9.0), jnp.ones(()), 4).round(2)
    Array([1., 3., 5., 7.], dtype=float32)

    Source: Han, Mao and Dally, "Deep compression", 2016.
    """
    low, high = _range(w, mass)
    share = (jnp.arange(k, dtype=w.dtype) + 0.5) / k * _totals(mass, jnp.zeros(w.shape, jnp.int32), 1)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low / 2 + high / 2
        reached = jnp.cumsum(_totals(mass, _place(w, middle), k + 1))[:-1] >= share
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    return lax.fori_loop(0, 24, halve, (jnp.full(k, low), jnp.full(k, high)))[1]


def plus_plus(key: Array) -> Start:
    r"""A start that draws the centroids from the weights, each next one with probability :math:`\propto m_i \min_c (w_i - c)^2`.

    Args:
      key: decides the draws.

    >>> plus_plus(jax.random.key(0))(jnp.array([0.0, 0.0, 5.0, 0.0, -7.0]), jnp.ones(()), 3)
    Array([-7.,  0.,  5.], dtype=float32)

    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007.
    """

    def start(w: Array, mass: Array, k: int) -> Array:
        def draw(i: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
            centroids, nearest = state
            # First a slice of the leading axis, by its sum, then a weight in it: noise for those alone and not for every weight.
            chance = jnp.where(i == 0, mass, mass * nearest)
            slices = jnp.log(jnp.sum(chance, axis=range(1, w.ndim)))
            at = jax.random.categorical(jax.random.fold_in(key, 2 * i), slices)
            # Picked by a sum: an index would bring a weight that is sharded along this axis together.
            chosen = lax.broadcasted_iota(jnp.int32, w.shape, 0) == at
            values, inside = (jnp.sum(jnp.where(chosen, x, 0), axis=0).reshape(-1) for x in (w, chance))
            drawn = values[jax.random.categorical(jax.random.fold_in(key, 2 * i + 1), jnp.log(inside))]
            return centroids.at[i].set(drawn), jnp.minimum(nearest, jnp.square(w - drawn))

        mass = jnp.broadcast_to(mass, w.shape)
        nothing_yet = jnp.zeros(k, w.dtype), jnp.full(w.shape, jnp.inf, w.dtype)
        return jnp.sort(lax.fori_loop(0, k, draw, nothing_yet)[0])

    return start


def assign(w: Array, centroids: Array) -> Array:
    """The index of the nearest centroid of each weight, the lower one of two that are equally near.

    By the midpoints between neighbours: memory for the weights and not for their distances to all centroids.

    Args:
      w: weights `[...]`.
      centroids: `[k]`, ascending.

    Returns:
      int32 `[...]`.

    >>> assign(jnp.array([-5.0, 0.4, 0.5, 0.6]), jnp.array([0.0, 1.0]))
    Array([0, 0, 0, 1], dtype=int32)
    """
    return _place(wide(w), centroids[:-1] / 2 + centroids[1:] / 2)


def k_means(
    w: Array,
    k: int,
    mass: Array | None = None,
    *,
    start: Start = linear,
    iterations: int | Array = 30,
    preserve_zero: bool = False,
) -> Clusters:
    r"""Lloyd's algorithm: each weight goes to its nearest centroid, each centroid to the mean of its weights.

    .. math:: \min_c \sum_i m_i \min_j (w_i - c_j)^2

    A centroid without weights shares those of the cluster with the largest sum of squares, on either side of its mean; where every
    cluster is a point it stays as it is. Means are summed as differences from the old ones, in 256 parts, so that millions of
    float32 weights lose no digits. Runs under `jit`, `vmap` and on sharded weights, which are never gathered.

    Args:
      w: floating-point weights `[...]`, at least one.
      k: how many centroids.
      mass: how much each weight counts, `[...]` and not negative; None counts them alike.
      start: where the centroids begin: `linear`, `density`, `plus_plus(key)`, or any `Start`.
      iterations: how many; it may be traced.
      preserve_zero: one of the centroids is exactly 0 and stays there, and weights that are exactly 0 are its own; the other
        `k - 1` start on the weights that are not.

    Raises:
      ValueError: fewer than one centroid (two with `preserve_zero`), or no weights.

    >>> clusters = k_means(jnp.array([1.0, 2.0, 9.0, 0.0]), 2)
    >>> clusters.centroids, clusters.labels, clusters.inertia
    (Array([1., 9.], dtype=float32), Array([0, 0, 1, 0], dtype=int32), Array(2., dtype=float32))
    >>> k_means(jnp.array([1.0, 2.0, 9.0, 0.0]), 3, preserve_zero=True).centroids
    Array([0. , 1.5, 9. ], dtype=float32)

    Source: Lloyd, "Least squares quantization in PCM", 1982.
    """
    if k < 1 + preserve_zero:
        raise ValueError(f"k={k}: at least {1 + preserve_zero} centroids are needed" + (", one of which is 0" * preserve_zero))
    if not w.size:
        raise ValueError(f"weights of shape {w.shape} are none: there is nothing to cluster")
    shape, w = w.shape, jnp.atleast_1d(wide(w))
    mass = jnp.ones((), w.dtype) if mass is None else jnp.broadcast_to(jnp.asarray(mass, w.dtype), w.shape)
    if preserve_zero:
        others = start(w, jnp.where(w == 0, 0, mass), k - 1)
        centroids = jnp.sort(jnp.append(others.astype(w.dtype), 0))
    else:
        centroids = start(w, mass, k).astype(w.dtype)

    def labelled(centroids: Array) -> tuple[Array, Array]:
        labels = assign(w, centroids)
        if preserve_zero:
            labels = jnp.where(w == 0, _zero(centroids), labels)
        return labels, w - centroids.at[labels].get(mode="promise_in_bounds")

    def step(i: int, centroids: Array) -> Array:
        labels, off = labelled(centroids)
        held, shift, spread = (_totals(mass * off**power, labels, k) for power in range(3))
        filled = held > 0
        shift = jnp.where(filled, shift, 0) / jnp.where(filled, held, 1)
        fixed = (jnp.arange(k) == _zero(centroids)) if preserve_zero else jnp.zeros(k, bool)
        moved = jnp.where(fixed, 0, centroids + shift)
        spread = jnp.where(fixed, spread, spread - held * shift**2)
        # The last step takes means and nothing else.
        return jnp.sort(jnp.where(i < iterations - 1, _relocated(moved, held, spread, fixed, shift), moved))

    centroids = lax.fori_loop(0, iterations, step, centroids)
    labels, off = labelled(centroids)
    return Clusters(centroids, labels.reshape(shape), jnp.sum(_totals(mass * off**2, labels, k)))


def _relocated(centroids: Array, held: Array, spread: Array, fixed: Array, shift: Array) -> Array:
    """Centroids `[k]`, of which those that hold nothing have gone to the widest clusters."""
    k = centroids.shape[0]
    empty = (held == 0) & ~fixed
    spread = jnp.where(held > 0, spread, 0)
    widest = jnp.argsort(-spread, stable=True)
    # The first empty centroid goes to the widest cluster, the second to the next.
    donor = widest[jnp.cumsum(empty) - 1]
    goes = empty & (spread[donor] > 0)
    deviation = jnp.sqrt(jnp.maximum(spread, 0) / jnp.where(held > 0, held, 1))
    # Split at its mean, a cluster has weights on both sides. One that stays at 0 is split on the side where its weights lie.
    side = jnp.where(fixed & (shift < 0), -1, 1)
    halved = jnp.zeros(k, bool).at[jnp.where(goes, donor, k)].set(True, mode="drop") & ~fixed
    return jnp.where(goes, (centroids + side * deviation)[donor], jnp.where(halved, centroids - deviation, centroids))


def _zero(centroids: Array) -> Array:
    """Where the centroid 0 stands."""
    return jnp.argmax(centroids == 0).astype(jnp.int32)


def _range(w: Array, mass: Array) -> tuple[Array, Array]:
    """The smallest and largest weight that has a mass; 0 and 0 if none has."""
    low, high = jnp.min(jnp.where(mass > 0, w, jnp.inf)), jnp.max(jnp.where(mass > 0, w, -jnp.inf))
    return jnp.where(low <= high, low, 0), jnp.where(low <= high, high, 0)


def _place(w: Array, bounds: Array) -> Array:
    """How many of the ascending bounds lie below each weight."""
    # Comparing with all of them is one vectorised pass while they are few; a binary search is ten of them.
    method = "compare_all" if bounds.shape[0] < _FEW else "scan_unrolled"
    return jnp.searchsorted(bounds, w, method=method).astype(jnp.int32)


def _totals(values: Array, labels: Array, k: int) -> Array:
    """The sum of the values with each label, `[k]`; in many parts, since a long sum in one float32 loses digits."""
    values = jnp.broadcast_to(values, labels.shape)
    lane = lax.broadcasted_iota(jnp.int32, labels.shape, int(np.argmax(labels.shape))) % _LANES
    parts = jnp.zeros(_LANES * k, values.dtype).at[lane * k + labels].add(values, mode="promise_in_bounds")
    return jnp.sum(parts.reshape(_LANES, k), axis=0)
