r"""The covariance of a search: Matern-5/2 over distances that know of categories and of dimensions that are not there.

    k(x, x') = s m(\sum_d w_d \delta_d(x_d, x'_d)),    m(r^2) = (1 + \sqrt 5 r + 5 r^2 / 3) exp(-\sqrt 5 r)

with one inverse squared length scale `w_d` a dimension, and `\delta` the squared difference for numbers and 0 or 1 for categories.
"""

import jax
import jax.numpy as jnp

from jaxopt_lab.core.types import Array

__all__ = ["INACTIVE", "covariance", "matern", "squared_distances"]

INACTIVE = -1e6
"""The coordinate of a dimension that a point does not have. No other coordinate may come near: those of a range are in [0, 1]."""


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
