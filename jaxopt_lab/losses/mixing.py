"""Mixtures of a batch with a shuffled copy of itself, inputs and labels alike.

Apply them to full batches, before the step: a padded row would be mixed in like any other.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxopt_lab.core.checks import require
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["cutmix", "mixup"]


def mixup(key: Array, x: ArrayLike, y: ArrayLike, alpha: ArrayLike = 0.2) -> tuple[Array, Array]:
    r"""Averages every example with another, and their labels with the same weight.

    .. math:: \tilde x_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}, \quad \tilde y_i = \lambda y_i + (1 - \lambda) y_{\pi(i)}, \quad
              \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    One :math:`\lambda` and one permutation :math:`\pi` a batch, as in the paper's algorithm.

    Args:
      key: a typed key.
      x: floating inputs, shape `[B, ...]`.
      y: label distributions, one-hot as a rule (`jax.nn.one_hot`), shape `[B, classes]`.
      alpha: positive; small values mix little, 1 mixes uniformly. It may be traced.

    Returns:
      `(x, y)` in their shapes and types, for `cross_entropy` with distributions.

    Raises:
      ValueError: `alpha` is not positive, or the batches differ in length.
      TypeError: `x` or `y` is not floating.

    >>> x, y = mixup(jax.random.key(0), jnp.eye(4), jnp.eye(4), alpha=1.0)
    >>> bool((x == y).all()), y.sum(axis=-1).round(4)
    (True, Array([1., 1., 1., 1.], dtype=float32))

    Source: Zhang et al., "mixup: beyond empirical risk minimization", 2018.
    """
    x, y = _batch(x, y, alpha)
    weight_key, order_key = jax.random.split(key)
    weight = _weight(weight_key, alpha)
    order = jax.random.permutation(order_key, len(x))
    return _mix(x, x[order], weight), _mix(y, y[order], weight)


def cutmix(key: Array, images: ArrayLike, y: ArrayLike, alpha: ArrayLike = 1.0) -> tuple[Array, Array]:
    r"""Pastes a rectangle of another image into every image, and mixes the labels by area.

    .. math:: \tilde x_i = M \odot x_i + (1 - M) \odot x_{\pi(i)}, \quad \tilde y_i = m\, y_i + (1 - m)\, y_{\pi(i)}

    where :math:`M` is 0 on one rectangle of about :math:`1 - \lambda` of the area, cut off at the border,
    :math:`\lambda \sim \mathrm{Beta}(\alpha, \alpha)`, and :math:`m` is the mean of :math:`M`.

    Args:
      key: a typed key.
      images: floating images, shape `[B, height, width, channels]`.
      y: label distributions, one-hot as a rule, shape `[B, classes]`.
      alpha: positive; it may be traced.

    Returns:
      `(images, y)` in their shapes and types.

    Raises:
      ValueError: `alpha` is not positive, `images` has not four axes, or the batches differ in length.
      TypeError: `images` or `y` is not floating.

    >>> images, y = cutmix(jax.random.key(0), jnp.ones((4, 8, 8, 1)), jnp.eye(4))
    >>> images.shape, y.sum(axis=-1).round(4)
    ((4, 8, 8, 1), Array([1., 1., 1., 1.], dtype=float32))

    Source: Yun et al., "CutMix: regularization strategy to train strong classifiers", 2019.
    """
    images, y = _batch(images, y, alpha)
    if images.ndim != 4:
        raise ValueError(f"images must have the shape [B, height, width, channels]; got {images.shape}")
    weight_key, order_key, row_key, column_key = jax.random.split(key, 4)
    side = jnp.sqrt(1 - _weight(weight_key, alpha))  # of the rectangle, as a fraction of the image's
    order = jax.random.permutation(order_key, len(images))

    def outside(centre_key: Array, length: int) -> Array:
        """Whether each of `length` pixels lies outside the stretch around a random centre."""
        pixels = jnp.arange(length, dtype=side.dtype) + 0.5
        centre = jax.random.uniform(centre_key, (), side.dtype) * length
        return jnp.abs(pixels - centre) >= side * length / 2

    _, height, width, _ = images.shape
    kept = outside(row_key, height)[:, None] | outside(column_key, width)[None, :]  # [height, width]
    mixed = jnp.where(kept[None, :, :, None], images, images[order])
    return mixed, _mix(y, y[order], jnp.mean(kept.astype(jnp.float32)))


def _weight(key: Array, alpha: ArrayLike) -> Array:
    alpha = jnp.asarray(alpha, jnp.float32)
    return jax.random.beta(key, alpha, alpha)


def _mix(a: Array, b: Array, weight: Array) -> Array:
    share = weight.astype(wide(a).dtype)
    return (share * wide(a) + (1 - share) * wide(b)).astype(a.dtype)


def _batch(x: ArrayLike, y: ArrayLike, alpha: ArrayLike) -> tuple[Array, Array]:
    require(lambda alpha: alpha > 0, "be positive", alpha=alpha)
    x, y = jnp.asarray(x), jnp.asarray(y)
    for name, value, hint in (("inputs", x, "scale them to floats"), ("labels", y, "use jax.nn.one_hot")):
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} to be mixed must be floating, got {value.dtype}; {hint} first")
    if y.ndim != 2 or not x.ndim or len(x) != len(y):
        raise ValueError(f"inputs [B, ...] and labels [B, classes] of one batch are needed; got {x.shape} and {y.shape}")
    return x, y
