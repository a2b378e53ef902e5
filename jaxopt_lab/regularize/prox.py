r"""Proximal operators and projections: functions of one array and, for most, a step `t`.

.. math:: \mathrm{prox}_{tR}(x) = \arg\min_z \; t\,R(z) + \tfrac12 \lVert z - x \rVert^2

Each computes in at least float32 and returns the type of `x`. What is cut is exactly 0.0. `t` may be traced. The penalties beside
this module have theirs here: `l1` has `soft_threshold`, `l2` has `shrink`, `nuclear` has `singular_value_threshold`, and
`elastic_net` and `group_lasso` are called alike.

Source: Parikh and Boyd, "Proximal algorithms", 2014.
"""

import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.regularize._arrays import as_matrix, group_norms, group_size, in_wide

__all__ = [
    "box",
    "elastic_net",
    "group_lasso",
    "group_soft_threshold",
    "hard_threshold",
    "max_norm",
    "nonnegative",
    "shrink",
    "singular_value_threshold",
    "soft_threshold",
]


def soft_threshold(x: Array, t: float | Array) -> Array:
    r"""Moves every entry towards zero by `t`, and those within `t` of it onto it: the operator of :math:`t \lVert x \rVert_1`.

    .. math:: y_i = \mathrm{sign}(x_i) \max(|x_i| - t, 0)

    Args:
      x: any shape.
      t: the threshold, at least 0.

    Returns:
      The shape and type of `x`.

    >>> soft_threshold(jnp.array([-3.0, 0.5, 1.5]), 1.0)
    Array([-2. ,  0. ,  0.5], dtype=float32)

    Source: Donoho, "De-noising by soft-thresholding", 1995.
    """
    return in_wide(lambda x, t: x - jnp.clip(x, -t, t), x, t)


def hard_threshold(x: Array, t: float | Array) -> Array:
    r"""Keeps entries above `t` in absolute value, and zeroes the others.

    .. math:: y_i = x_i\, \mathbf{1}[|x_i| > t]

    It is the operator of :math:`\lambda \lVert x \rVert_0` at :math:`t = \sqrt{2 \lambda}`.

    Args:
      x: any shape.
      t: the threshold, at least 0.

    Returns:
      The shape and type of `x`.

    >>> hard_threshold(jnp.array([-3.0, 0.5, 1.5]), 1.0)
    Array([-3. ,  0. ,  1.5], dtype=float32)

    Source: Blumensath and Davies, "Iterative thresholding for sparse approximations", 2008.
    """
    return in_wide(lambda x, t: jnp.where(jnp.abs(x) <= t, 0.0, x), x, t)


def shrink(x: Array, t: float | Array) -> Array:
    r"""Scales towards zero: the operator of :math:`\tfrac{t}{2} \lVert x \rVert_2^2`.

    .. math:: y = x / (1 + t)

    Args:
      x: any shape.
      t: the step, at least 0.

    Returns:
      The shape and type of `x`.

    >>> shrink(jnp.array([-3.0, 1.5]), 0.5)
    Array([-2.,  1.], dtype=float32)
    """
    return in_wide(lambda x, t: x / (1 + t), x, t)


def elastic_net(x: Array, t: float | Array, l1: float | Array = 1.0, l2: float | Array = 1.0) -> Array:
    r"""Soft-thresholds, then shrinks: the operator of the penalty `elastic_net`.

    .. math:: y_i = \frac{\mathrm{sign}(x_i) \max(|x_i| - t \lambda_1, 0)}{1 + t \lambda_2}

    Args:
      x: any shape.
      t: the step, at least 0.
      l1: the strength :math:`\lambda_1`.
      l2: the strength :math:`\lambda_2`.

    Returns:
      The shape and type of `x`.

    >>> elastic_net(jnp.array([-3.0, 0.5, 1.5]), 1.0, l1=1.0, l2=1.0)
    Array([-1.  ,  0.  ,  0.25], dtype=float32)

    Source: Zou and Hastie, "Regularization and variable selection via the elastic net", 2005.
    """
    return in_wide(lambda x, t, l1, l2: (x - jnp.clip(x, -t * l1, t * l1)) / (1 + t * l2), x, t, l1, l2)


def group_soft_threshold(x: Array, t: float | Array, axis: int = -1) -> Array:
    r"""Shortens every group by `t`, and zeroes those no longer than `t`: the operator of :math:`t \sum_g \lVert x_g \rVert_2`.

    .. math:: y_g = x_g \max(1 - t / \lVert x_g \rVert_2,\ 0)

    Args:
      x: any shape with that axis.
      t: the threshold, at least 0.
      axis: the axis that numbers the groups; a group is all that shares an index along it.

    Returns:
      The shape and type of `x`.

    Raises:
      ValueError: `x` lacks the axis.

    >>> group_soft_threshold(jnp.array([[3.0, 0.3], [4.0, 0.4]]), 2.5)
    Array([[1.5, 0. ],
           [2. , 0. ]], dtype=float32)

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.
    """
    return in_wide(lambda x, t: _shorten(x, t, axis), x, t)


def group_lasso(x: Array, t: float | Array, axis: int = -1) -> Array:
    r"""`group_soft_threshold` with each group's threshold times the root of its size: the operator of `regularize.group_lasso`.

    .. math:: y_g = x_g \max(1 - t \sqrt{n_g} / \lVert x_g \rVert_2,\ 0)

    Args:
      x: any shape with that axis.
      t: the step, at least 0.
      axis: the axis that numbers the groups.

    Returns:
      The shape and type of `x`.

    Raises:
      ValueError: `x` lacks the axis.

    >>> group_lasso(jnp.full((4, 2), 1.5), 0.5)[0].round(4)
    Array([1., 1.], dtype=float32)
    """
    return in_wide(lambda x, t: _shorten(x, t * group_size(x, axis) ** 0.5, axis), x, t)


def _shorten(x: Array, t: Array, axis: int) -> Array:
    norms = group_norms(x, axis)
    cut = norms <= t
    return jnp.where(cut, 0.0, x * (1 - t / jnp.where(cut, 1.0, norms)))


def singular_value_threshold(x: Array, t: float | Array) -> Array:
    r"""Soft-thresholds the singular values: the operator of :math:`t \lVert W \rVert_*`, which lowers the rank.

    .. math:: W = U \Sigma V^\top, \qquad Y = U \max(\Sigma - t, 0) V^\top

    Args:
      x: a weight `[..., outputs]`, seen as the matrix `[inputs, outputs]`.
      t: the threshold, at least 0.

    Returns:
      The shape and type of `x`; where all singular values fall below `t`, exactly zero. Its rank is low to rounding.

    Raises:
      ValueError: `x` has fewer than two axes.

    >>> singular_value_threshold(jnp.diag(jnp.array([3.0, 1.0])), 1.5).round(4)
    Array([[1.5, 0. ],
           [0. , 0. ]], dtype=float32)

    Source: Cai, Candès and Shen, "A singular value thresholding algorithm for matrix completion", 2010.
    """

    def threshold(x: Array, t: Array) -> Array:
        u, s, vt = jnp.linalg.svd(as_matrix(x), full_matrices=False)
        return ((u * jnp.maximum(s - t, 0.0)[None, :]) @ vt).reshape(x.shape)

    return in_wide(threshold, x, t)


def box(x: Array, low: float | Array, high: float | Array) -> Array:
    r"""Clips to an interval: the projection onto :math:`[l, h]^n`.

    .. math:: y_i = \min(\max(x_i, l), h)

    Args:
      x: any shape.
      low: the least value.
      high: the greatest value.

    Returns:
      The shape and type of `x`.

    >>> box(jnp.array([-3.0, 0.5, 1.5]), -1.0, 1.0)
    Array([-1. ,  0.5,  1. ], dtype=float32)
    """
    return in_wide(jnp.clip, x, low, high)


def nonnegative(x: Array) -> Array:
    r"""Cuts negative entries: the projection onto :math:`x \ge 0`.

    .. math:: y_i = \max(x_i, 0)

    Args:
      x: any shape.

    Returns:
      The shape and type of `x`.

    >>> nonnegative(jnp.array([-3.0, 0.5]))
    Array([0. , 0.5], dtype=float32)
    """
    return jnp.maximum(x, 0)


def max_norm(x: Array, limit: float | Array, axis: int = -1) -> Array:
    r"""Shortens every group to at most `limit`: the projection onto :math:`\lVert x_g \rVert_2 \le c`.

    .. math:: y_g = x_g \min(1,\ c / \lVert x_g \rVert_2)

    Args:
      x: any shape with that axis.
      limit: the greatest norm :math:`c`, at least 0.
      axis: the axis that numbers the groups; with -1 the incoming weights of each unit.

    Returns:
      The shape and type of `x`.

    Raises:
      ValueError: `x` lacks the axis.

    >>> max_norm(jnp.array([[3.0, 0.3], [4.0, 0.4]]), 1.0)
    Array([[0.6, 0.3],
           [0.8, 0.4]], dtype=float32)

    Source: Srebro and Shraibman, "Rank, trace-norm and max-norm", 2005.
    """

    def shorten(x: Array, limit: Array) -> Array:
        norms = group_norms(x, axis)
        long = norms > limit
        return jnp.where(long, x * (limit / jnp.where(long, norms, 1.0)), x)

    return in_wide(shorten, x, limit)
