"""Supervised losses and scores that make `loss(outputs, batch)` one line."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxopt_lab.core.checks import require
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array
from jaxopt_lab.losses._arrays import expected

__all__ = ["accuracy", "cross_entropy"]


def cross_entropy(logits: ArrayLike, labels: ArrayLike, label_smoothing: ArrayLike = 0.0) -> Array:
    r"""The cross-entropy of softmax logits with class ids or with distributions over the classes.

    .. math:: \ell = -\sum_c q_c \log \mathrm{softmax}(z)_c, \qquad q = (1 - \epsilon)\, y + \epsilon / C

    Args:
      logits: :math:`z`, shape `[..., classes]`; computed in at least float32.
      labels: integers of shape `[...]`, or distributions :math:`y` (one-hot, mixed, soft) of shape `[..., classes]`.
      label_smoothing: :math:`\epsilon` in [0, 1], the share of the uniform distribution; it may be traced.

    Returns:
      One value per example, shape `[...]`. A class id outside 0 ... classes - 1 gives NaN, never the loss of another class.

    Raises:
      ValueError: the shapes do not fit, or `label_smoothing` lies outside [0, 1].

    >>> logits = jnp.array([[0.0, jnp.log(3.0)], [0.0, jnp.log(3.0)]])
    >>> [f"{value:.3f}" for value in cross_entropy(logits, jnp.array([1, 0]))]
    ['0.288', '1.386']
    >>> [f"{value:.3f}" for value in cross_entropy(logits, jnp.array([[0.0, 1.0], [0.5, 0.5]]))]
    ['0.288', '0.837']

    Source: Szegedy et al., "Rethinking the inception architecture", 2016 (label smoothing).
    """
    require(lambda epsilon: (epsilon >= 0) & (epsilon <= 1), "lie in [0, 1]", label_smoothing=label_smoothing)
    log_p = jax.nn.log_softmax(wide(logits))
    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        _check_ids(log_p, labels)
        labels = labels.astype(jnp.int32)
        inside = (labels >= 0) & (labels < log_p.shape[-1])
        picked = jnp.take_along_axis(log_p, jnp.where(inside, labels, 0)[..., None], axis=-1)[..., 0]
        loss = jnp.where(inside, -picked, jnp.nan)
    else:
        _check_distributions(log_p, labels)
        loss = -expected(labels.astype(log_p.dtype), log_p)
    if isinstance(label_smoothing, (int, float)) and label_smoothing == 0:  # a masked class, at minus infinity, stays harmless
        return loss
    epsilon = jnp.asarray(label_smoothing, log_p.dtype)
    return (1 - epsilon) * loss - epsilon * jnp.mean(log_p, axis=-1)


def accuracy(logits: ArrayLike, labels: ArrayLike) -> Array:
    r"""Whether the largest logit is the label's, and finite: 1.0 or 0.0 per example.

    .. math:: a = \mathbf{1}[\arg\max_c z_c = y]\ \mathbf{1}[|\max_c z_c| < \infty]

    Args:
      logits: shape `[..., classes]`; ties go to the lowest class.
      labels: integers of shape `[...]`, or distributions of shape `[..., classes]`, whose largest entry is the label.

    Returns:
      float32 of shape `[...]`, so that a weighted mean of it is the accuracy. Logits with a NaN or plus infinity are wrong:
      a model that overflows has learnt nothing to be right about. A class masked out by minus infinity is harmless, as it is to
      `cross_entropy`; where all are, the example is wrong.

    Raises:
      ValueError: the shapes do not fit.

    >>> accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1]))
    Array([1., 0.], dtype=float32)
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        _check_ids(logits, labels)
    else:
        _check_distributions(logits, labels)
        labels = jnp.argmax(labels, axis=-1)
    right = jnp.argmax(logits, axis=-1) == labels.astype(jnp.int32)
    # A NaN is the maximum of what it stands among.
    return (right & jnp.isfinite(jnp.max(logits, axis=-1))).astype(jnp.float32)


def _check_ids(logits: Array, labels: Array) -> None:
    if logits.shape[:-1] != labels.shape or not logits.ndim:
        raise ValueError(
            f"integer labels of shape {labels.shape} need logits [..., classes] of the same leading shape; got {logits.shape}"
        )


def _check_distributions(logits: Array, labels: Array) -> None:
    if logits.shape != labels.shape or not logits.ndim:
        raise ValueError(f"label distributions of shape {labels.shape} need logits of the same shape; got {logits.shape}")
