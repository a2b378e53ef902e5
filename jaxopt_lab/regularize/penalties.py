r"""Penalties: functions of a parameter tree that give one float32 scalar, to be added to a loss.

Each takes `where` after the tree, which chooses leaves (see `core.tree.select`), and all else by keyword; a compressed leaf is
penalised through its latent weight. Sums are taken in at least float32, and every gradient is finite: where a penalty has a
corner, it is one of its subgradients. The matrix penalties see a weight `[..., outputs]` as the matrix :math:`W` of shape
`[inputs, outputs]`, convolution kernels included, and choose all leaves of two or more axes (`matrices`) unless told otherwise.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import naming
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array, PyTree, Where
from jaxopt_lab.regularize._arrays import absolute, as_matrix, group_norms, group_size

__all__ = ["elastic_net", "group_lasso", "l1", "l2", "matrices", "nuclear", "orthogonal", "spectral"]


def matrices(path: str, leaf: Any) -> bool:
    """The selector of leaves with two or more axes: kernels and embeddings, not biases and scales.

    >>> tree.select({"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}, matrices)
    {'bias': False, 'kernel': True}
    """
    del path
    return jnp.ndim(leaf) >= 2


def l1(params: PyTree, where: Where = "**") -> Array:
    r"""The sum of absolute values.

    .. math:: R(w) = \sum_i |w_i|, \qquad \partial R / \partial w_i = \mathrm{sign}(w_i), \ 0 \text{ at } 0

    Args:
      params: a tree of weights of any shapes.
      where: the leaves that count.

    Returns:
      A scalar.

    Raises:
      ValueError: nothing matches `where`.
      TypeError: a chosen leaf is not floating, or is stored without a latent weight.

    >>> l1({"bias": jnp.array([1.0]), "kernel": jnp.array([[3.0, -4.0]])}, where="kernel")
    Array(7., dtype=float32)

    Source: Tibshirani, "Regression shrinkage and selection via the lasso", 1996.
    """
    return _sum(lambda w: jnp.sum(absolute(w)), params, where)


def l2(params: PyTree, where: Where = "**") -> Array:
    r"""Half the sum of squares, so that its strength means what a weight decay means.

    .. math:: R(w) = \tfrac12 \sum_i w_i^2, \qquad \partial R / \partial w_i = w_i

    The half is deliberate: a strength of :math:`\lambda` then adds :math:`\lambda w` to the gradient, as
    `optax.add_decayed_weights` does, and `elastic_net` agrees with scikit-learn's.

    Args:
      params: a tree of weights of any shapes.
      where: the leaves that count.

    Returns:
      A scalar.

    Raises:
      ValueError: nothing matches `where`.
      TypeError: a chosen leaf is not floating, or is stored without a latent weight.

    >>> l2({"kernel": jnp.array([[3.0, -4.0]])})
    Array(12.5, dtype=float32)

    Source: Hoerl and Kennard, "Ridge regression", 1970.
    """
    return _sum(lambda w: jnp.sum(w * w) / 2, params, where)


def elastic_net(params: PyTree, where: Where = "**", *, l1: ArrayLike = 1.0, l2: ArrayLike = 1.0) -> Array:
    r"""A mixture of the two: sparse like L1, but stable where weights are correlated.

    .. math:: R(w) = \lambda_1 \sum_i |w_i| + \frac{\lambda_2}{2} \sum_i w_i^2, \qquad
              \partial R / \partial w_i = \lambda_1\, \mathrm{sign}(w_i) + \lambda_2 w_i

    Args:
      params: a tree of weights of any shapes.
      where: the leaves that count.
      l1: the strength :math:`\lambda_1`.
      l2: the strength :math:`\lambda_2`.

    Returns:
      A scalar.

    Raises:
      ValueError: nothing matches `where`.
      TypeError: a chosen leaf is not floating, or is stored without a latent weight.

    >>> elastic_net({"kernel": jnp.array([[3.0, -4.0]])}, l1=1.0, l2=0.1)
    Array(8.25, dtype=float32)

    Source: Zou and Hastie, "Regularization and variable selection via the elastic net", 2005.
    """

    def penalty(w: Array) -> Array:
        return jnp.asarray(l1, w.dtype) * jnp.sum(absolute(w)) + jnp.asarray(l2, w.dtype) * jnp.sum(w * w) / 2

    return _sum(penalty, params, where)


def group_lasso(params: PyTree, where: Where = matrices, *, axis: int = -1) -> Array:
    r"""The sum of the norms of groups, which drives whole units to zero together.

    .. math:: R(w) = \sum_g \sqrt{n_g}\, \lVert w_g \rVert_2, \qquad
              \partial R / \partial w_g = \sqrt{n_g}\, w_g / \lVert w_g \rVert_2, \ 0 \text{ at } 0

    A group is a slice along `axis`: with -1 all that feeds one output unit or channel. The root of its size :math:`n_g` makes large
    and small groups pay alike.

    Args:
      params: a tree of weights.
      where: the leaves that count; all of two or more axes by default.
      axis: the axis that numbers the groups, in every chosen leaf.

    Returns:
      A scalar.

    Raises:
      ValueError: nothing matches `where`, or a chosen leaf lacks the axis.
      TypeError: a chosen leaf is not floating, or is stored without a latent weight.

    >>> kernel = jnp.array([[3.0, 0.0], [4.0, 0.0]])
    >>> print(f"{group_lasso({'kernel': kernel}):.4f}")
    7.0711

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.
    """
    return _sum(lambda w: jnp.sum(group_norms(w, axis)) * group_size(w, axis) ** 0.5, params, where)


def orthogonal(params: PyTree, where: Where = matrices) -> Array:
    r"""How far the columns of each matrix are from orthonormal.

    .. math:: R(W) = \lVert W^\top W - I \rVert_F^2, \qquad \nabla R = 4\, W (W^\top W - I)

    A matrix with more columns than rows cannot reach 0: its least value is `outputs - inputs`, attained when its rows are
    orthonormal. The two Gram matrices give the same gradient, so the smaller one is computed.

    Args:
      params: a tree of weights `[..., outputs]`.
      where: the leaves that count; all of two or more axes by default.

    Returns:
      A scalar.

    Raises:
      ValueError: nothing matches `where`, or a chosen leaf has fewer than two axes.
      TypeError: a chosen leaf is not floating, or is stored without a latent weight.

    >>> orthogonal({"kernel": 2 * jnp.eye(3)})
    Array(27., dtype=float32)

    Source: Brock et al., "Neural photo editing with introspective adversarial networks", 2017; Bansal et al., 2018.
    """

    def penalty(w: Array) -> Array:
        w = as_matrix(w)
        inputs, outputs = w.shape
        small = w.T @ w if outputs <= inputs else w @ w.T
        # |W'W - I|^2 and |WW' - I|^2 differ by the constant outputs - inputs.
        return jnp.sum((small - jnp.eye(len(small), dtype=w.dtype)) ** 2) + float(max(outputs - inputs, 0))

    return _sum(penalty, params, where)


def spectral(params: PyTree, where: Where = matrices) -> Array:
    r"""The sum over matrices of the largest singular value: what a layer can stretch a vector by.

    .. math:: R(W) = \sigma_1(W), \qquad \nabla R = u_1 v_1^\top

    By an exact decomposition, not by power iteration: no state, no start vector, and the gradient is exact. It costs
    :math:`O(m n \min(m, n))` a matrix, so apply it to the layers that matter. At a repeated :math:`\sigma_1` the gradient is that
    of one of its pairs.

    Args:
      params: a tree of weights `[..., outputs]`.
      where: the leaves that count; all of two or more axes by default.

    Returns:
      A scalar.

    Raises:
      ValueError: nothing matches `where`, or a chosen leaf has fewer than two axes.
      TypeError: a chosen leaf is not floating, or is stored without a latent weight.

    >>> print(f"{spectral({'kernel': jnp.diag(jnp.array([3.0, -5.0]))}):.4f}")
    5.0000

    Source: Yoshida and Miyato, "Spectral norm regularization for improving the generalizability of deep learning", 2017.
    """
    return _sum(lambda w: jnp.linalg.svd(as_matrix(w), compute_uv=False)[0], params, where)


def nuclear(params: PyTree, where: Where = matrices) -> Array:
    r"""The sum of all singular values, the convex surrogate of the rank.

    .. math:: R(W) = \lVert W \rVert_* = \sum_i \sigma_i(W), \qquad \nabla R = U V^\top

    Args:
      params: a tree of weights `[..., outputs]`.
      where: the leaves that count; all of two or more axes by default.

    Returns:
      A scalar.

    Raises:
      ValueError: nothing matches `where`, or a chosen leaf has fewer than two axes.
      TypeError: a chosen leaf is not floating, or is stored without a latent weight.

    >>> print(f"{nuclear({'kernel': jnp.diag(jnp.array([3.0, -5.0]))}):.4f}")
    8.0000

    Source: Fazel, "Matrix rank minimization with applications", 2002.
    """
    return _sum(lambda w: jnp.sum(jnp.linalg.svd(as_matrix(w), compute_uv=False)), params, where)


def _sum(penalty: Callable[[Array], Array], params: PyTree, where: Where) -> Array:
    """Adds up a penalty of arrays over the chosen leaves; empty arrays cost nothing."""
    total = jnp.zeros((), jnp.float32)
    for path, leaf in tree.selected(params, where).items():
        w = tree.latent(leaf, path)
        if not jnp.issubdtype(jnp.result_type(w), jnp.floating):
            raise TypeError(f"{path} is {jnp.result_type(w)}, and a penalty needs floating weights; leave it out of `where`")
        if jnp.size(w):
            with naming(path):
                total += penalty(wide(w)).astype(total.dtype)
    return total
