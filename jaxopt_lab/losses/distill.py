r"""Distillation: a student learns from a teacher's softened probabilities.

Logits are `[..., classes]`, losses `[...]`, computed in at least float32. No gradient flows to the teacher. Write
:math:`p^\tau = \mathrm{softmax}(z / \tau)`. All losses carry the factor :math:`\tau^2`, which keeps the size of their gradients
while the temperature changes; a temperature may be traced, or an array with one value per example.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxopt_lab.core.checks import require
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array
from jaxopt_lab.losses._arrays import expected, same_shape

__all__ = ["TopK", "soft_targets", "soft_targets_binary", "soft_targets_top_k", "top_k_targets"]


def soft_targets(student_logits: ArrayLike, teacher_logits: ArrayLike, temperature: ArrayLike = 4.0) -> Array:
    r"""The divergence of a student from its teacher at a temperature.

    .. math:: \ell = \tau^2\, \mathrm{KL}(p^\tau_{teacher} \,\|\, p^\tau_{student}), \qquad
              \partial \ell / \partial z_{student} = \tau\, (p^\tau_{student} - p^\tau_{teacher})

    Args:
      student_logits: shape `[..., classes]`.
      teacher_logits: the same shape; taken as a constant.
      temperature: :math:`\tau`, positive; higher ones show more of the teacher's view of the wrong classes.

    Returns:
      One value of at least 0 per example, shape `[...]`; 0 where student and teacher agree.

    Raises:
      ValueError: the shapes differ, or the temperature is not positive.

    >>> teacher = jnp.array([[4.0, 0.0], [4.0, 0.0]])
    >>> [f"{value:.3f}" for value in soft_targets(jnp.array([[4.0, 0.0], [0.0, 0.0]]), teacher, temperature=2.0)]
    ['0.000', '1.311']

    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.
    """
    student, teacher = wide(student_logits), wide(teacher_logits)
    same_shape(student_logits=student, teacher_logits=teacher)
    log_s, log_t = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    return _divergence(log_s, log_t, temperature)


def soft_targets_binary(student_logits: ArrayLike, teacher_logits: ArrayLike, temperature: ArrayLike = 4.0) -> Array:
    r"""`soft_targets` for a yes-or-no question with a single logit: the divergence of two Bernoulli distributions.

    .. math:: \ell = \tau^2\, \mathrm{KL}(p^\tau_{teacher} \,\|\, p^\tau_{student}), \qquad
              p^\tau = \mathrm{Bernoulli}(\sigma(z / \tau))

    Args:
      student_logits: shape `[...]`, one logit per question.
      teacher_logits: the same shape; taken as a constant.
      temperature: :math:`\tau`, positive.

    Returns:
      One value of at least 0 per logit, shape `[...]`.

    Raises:
      ValueError: the shapes differ, or the temperature is not positive.

    >>> [f"{value:.3f}" for value in soft_targets_binary(jnp.array([4.0, 0.0]), jnp.array([4.0, 4.0]), temperature=2.0)]
    ['0.000', '1.311']

    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.
    """
    student, teacher = wide(student_logits), wide(teacher_logits)
    same_shape(student_logits=student, teacher_logits=teacher)
    # A logit z is the two-class softmax over (z, 0).
    student, teacher = (jnp.stack([z, jnp.zeros_like(z)], axis=-1) for z in (student, teacher))
    return soft_targets(student, teacher, temperature)


class TopK(NamedTuple):
    """A teacher's softened distribution, its k likeliest classes one by one and all others as one: 8 k + 4 bytes an example."""

    log_probabilities: Array
    """Of the likeliest classes at the temperature of `top_k_targets`, falling; shape `[..., k]`."""
    indices: Array
    """Their classes, int32; shape `[..., k]`."""
    log_rest: Array
    """The log-probability of all other classes together; shape `[...]`; minus infinity where there are none."""


def top_k_targets(teacher_logits: ArrayLike, k: int, temperature: ArrayLike = 4.0) -> TopK:
    r"""Keeps what a student needs of a teacher's logits, so that a whole data set of them fits in memory.

    .. math:: \log p^\tau_c \text{ for the } k \text{ likeliest classes}, \qquad \log \sum_{others} p^\tau_c

    Args:
      teacher_logits: shape `[..., classes]`.
      k: how many classes to keep, from 1 to all.
      temperature: :math:`\tau`, positive; the one that the student will be trained at, since the rest depends on it.

    Returns:
      A `TopK`, a tree of arrays with the examples in front: it slices, shards and travels in a batch like any other field.

    Raises:
      ValueError: `k` does not lie between 1 and the number of classes, or the temperature is not positive.

    >>> top_k_targets(jnp.log(jnp.array([0.1, 0.6, 0.3])), k=2, temperature=1.0).indices
    Array([1, 2], dtype=int32)

    Source: Tan et al., "Multilingual neural machine translation with knowledge distillation", 2019 (the top k of a teacher).
    """
    teacher = wide(teacher_logits)
    if not teacher.ndim or not 1 <= k <= teacher.shape[-1]:
        raise ValueError(f"k must lie between 1 and the number of classes; got k={k} for logits of shape {teacher.shape}")
    log_t = _log_softmax(teacher, temperature)
    log_top, indices = jax.lax.top_k(log_t, k)
    return TopK(log_top, indices, _log_rest(log_t, indices))


def soft_targets_top_k(student_logits: ArrayLike, targets: TopK, temperature: ArrayLike = 4.0) -> Array:
    r"""`soft_targets` against a teacher of which only the top k was kept; the other classes count as one.

    .. math:: \ell = \tau^2 \left( \sum_{c \in top} p_c \log \frac{p_c}{q_c} + p_{rest} \log \frac{p_{rest}}{q_{rest}} \right)

    Never more than `soft_targets`, equal to it when k is all the classes, and 0 where student and teacher agree.

    Args:
      student_logits: shape `[..., classes]`.
      targets: what `top_k_targets` kept, with the same leading shape; taken as constants.
      temperature: :math:`\tau`, the one that `targets` were made at.

    Returns:
      One value of at least 0 per example, shape `[...]`.

    Raises:
      ValueError: the shapes do not fit, or the temperature is not positive.

    >>> teacher = jnp.array([3.0, 1.0, 0.0, -1.0])
    >>> targets = top_k_targets(teacher, k=2, temperature=2.0)
    >>> print(f"{soft_targets_top_k(jnp.zeros(4), targets, temperature=2.0):.4f}")
    1.0809
    >>> print(f"{soft_targets(jnp.zeros(4), teacher, temperature=2.0):.4f}")
    1.1061

    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.
    """
    student = wide(student_logits)
    if student.ndim != targets.indices.ndim or student.shape[:-1] != targets.indices.shape[:-1]:
        raise ValueError(
            f"student_logits has shape {student.shape} and the top k {targets.indices.shape}; all axes but the last must be equal"
        )
    log_s = _log_softmax(student, temperature)
    log_top = jnp.take_along_axis(log_s, targets.indices, axis=-1)
    if targets.indices.shape[-1] == student.shape[-1]:
        return _divergence(log_top, wide(targets.log_probabilities), temperature)
    log_s = jnp.concatenate([log_top, _log_rest(log_s, targets.indices)[..., None]], axis=-1)
    log_t = jnp.concatenate([wide(targets.log_probabilities), wide(targets.log_rest)[..., None]], axis=-1)
    return _divergence(log_s, log_t, temperature)


def _log_softmax(logits: Array, temperature: ArrayLike) -> Array:
    require(lambda temperature: temperature > 0, "be positive", temperature=temperature)
    return jax.nn.log_softmax(logits / _beside(temperature, logits))


def _log_rest(log_p: Array, indices: Array) -> Array:
    """The log of the probability that lies outside the classes `indices`."""
    if indices.shape[-1] == log_p.shape[-1]:
        return jnp.full(log_p.shape[:-1], -jnp.inf, log_p.dtype)
    # By a sum over the others: one minus the sum of the top would cancel where the top holds nearly everything.
    others = jnp.put_along_axis(log_p, indices, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1)


def _divergence(log_s: Array, log_t: Array, temperature: ArrayLike) -> Array:
    log_t = jax.lax.stop_gradient(log_t)
    divergence = expected(jnp.exp(log_t), log_t - log_s)
    return jnp.square(_beside(temperature, divergence)) * divergence


def _beside(temperature: ArrayLike, x: Array) -> Array:
    """One temperature for each example stands for all that follows its axis: `[B]` beside `[B, T, C]` is `[B, 1, 1]`."""
    temperature = jnp.asarray(temperature, x.dtype)
    return temperature.reshape(temperature.shape + (1,) * (x.ndim - temperature.ndim))
