r"""The covariance of a search: Matern-5/2 over distances that know of categories and of dimensions that are not there.

    k(x, x') = s m(\sum_d w_d \delta_d(x_d, x'_d)),    m(r^2) = (1 + \sqrt 5 r + 5 r^2 / 3) exp(-\sqrt 5 r)

with one inverse squared length scale `w_d` a dimension, and `\delta` the squared difference for numbers and 0 or 1 for categories.
"""

import jax
import jax.numpy as jnp

from jaxopt_lab.core.types import Array

__all__ = ["INACTIVE", "covariance", "matern", "squared_distances", "warped"]

INACTIVE = -1e6
"""The coordinate of a dimension that a point does not have. No other coordinate may come near: those of a range are in [0, 1]."""


_CORNER = 1e-4  # A warp starts this far into the unit interval, as its slope at the ends of it is 0 or infinite.


def warped(x: Array, categorical: Array, warps: Array) -> Array:
    r"""Points with each number bent by a monotone map of [0, 1] onto itself, the distribution function of Kumaraswamy.

    .. math:: 1 - (1 - x^a)^b

    Where a = b = 1 it is the identity. a < 1 < b spreads what is near 0, the reverse what is near 1, both above 1 the middle. It is
    taken between 1e-4 and 1 - 1e-4 and stretched to [0, 1] again, so that values and derivatives are finite everywhere. Categories,
    `INACTIVE` and what lies out of the range stay as they are.

    Args:
      x: points [n, d], as of `squared_distances`.
      categorical: which dimensions are categories [d], bool.
      warps: the logarithms of a and b [2, d].

    Returns:
      [n, d].

    >>> x = jnp.array([[0.0], [0.25], [1.0]])
    >>> warped(x, jnp.array([False]), jnp.log(jnp.array([[0.5], [1.0]]))).round(2)[:, 0].tolist()  # about the square root
    [0.0, 0.5, 1.0]

    Source: Snoek, Swersky, Zemel and Adams, "Input warping for Bayesian optimization of non-stationary functions", 2014.
    """
    a, b = jnp.exp(warps[0])[None, :], jnp.exp(warps[1])[None, :]

    def bent(u: Array) -> Array:
        return -jnp.expm1(b * jnp.log(-jnp.expm1(a * jnp.log(u))))

    low, high = (bent(jnp.full((1, 1), end, x.dtype)) for end in (_CORNER, 1 - _CORNER))
    # Each number is given a point of the interval, so that its derivative is a number there too.
    inside = ~categorical[None, :] & (x >= 0) & (x <= 1)
    unit = jnp.where(inside, x, 0.5)
    return jnp.where(inside, (bent(_CORNER + (1 - 2 * _CORNER) * unit) - low) / (high - low), x)


@jax.custom_jvp
def matern(squared: Array) -> Array:
    r"""Matern-5/2 correlation of a squared distance, any shape; its derivative at 0 is the limit, -5/6.

    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, equation 4.17.

    >>> [round(float(jax.value_and_grad(matern)(r)[i]), 4) for r in (0.0, 1.0) for i in (0, 1)]
    [1.0, -0.8333, 0.524, -0.2882]
    """
    root = jnp.sqrt(5 * squared)
    return (1 + root + root**2 / 3) * jnp.exp(-root)


@matern.defjvp
def _matern_jvp(primals, tangents):
    # sqrt has no derivative at 0, where every diagonal of a covariance lies; the whole has.
    root = jnp.sqrt(5 * primals[0])
    decay = jnp.exp(-root)
    return (1 + root + root**2 / 3) * decay, -5 / 6 * (1 + root) * decay * tangents[0]


def squared_distances(a: Array, b: Array, categorical: Array) -> Array:
    """The squared distance in each dimension.

    A category differs or does not (Hamming). A dimension that only one of two points has (`INACTIVE` in the other) is as far as
    two ends of a range are; one that neither has tells nothing, so the points are alike in it.

    Args:
      a, b: points [n, d] and [m, d]: numbers scaled to [0, 1], indices of categories, `INACTIVE`.
      categorical: which dimensions are categories [d], bool.

    Returns:
      [n, m, d].

    >>> a, b = jnp.array([[0.5, 2.0, INACTIVE]]), jnp.array([[0.25, 1.0, 0.3]])
    >>> squared_distances(a, b, jnp.array([False, True, False])).tolist()
    [[[0.0625, 1.0, 1.0]]]
    """
    left, right = a[:, None, :], b[None, :, :]
    either = categorical[None, None, :] | (left <= INACTIVE) | (right <= INACTIVE)
    return jnp.where(either, (left != right).astype(a.dtype), (left - right) ** 2)


def covariance(a: Array, b: Array, categorical: Array, inverse_squares: Array, scale: Array) -> Array:
    """The covariance of points, `scale * matern(weighted squared distance)`.

    Args:
      a, b, categorical: as of `squared_distances`.
      inverse_squares: one over the squared length scale [d].
      scale: the variance, a scalar.

    Returns:
      [n, m].

    Source: the Hamming distance for categories as in Optuna's GPSampler; distances between dimensions of which one is absent after
    Hutter and Osborne, "A Kernel for Hierarchical Parameter Spaces", 2013.

    >>> x = jnp.array([[0.0], [1.0]])
    >>> covariance(x, x, jnp.array([False]), jnp.ones(1), jnp.ones(())).round(3).tolist()
    [[1.0, 0.52...], [0.52..., 1.0]]
    """
    return scale * matern((squared_distances(a, b, categorical) * inverse_squares[None, None, :]).sum(-1))
