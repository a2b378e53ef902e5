"""Batch statistics over the whole batch, wherever its rows lie: padding left out, every device's rows counted."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab.core.types import Array

__all__ = ["layer_moments", "moments", "row_mask", "running_average"]


def moments(
    x: Array,
    axes: Sequence[int],
    *,
    mask: Array | None = None,
    axis_name: str | None = None,
    axis_index_groups=None,
    fast: bool = True,
) -> tuple[Array, Array]:
    r"""The mean and variance of the unmasked entries over `axes` and, where named, over devices.

    .. math:: \mu = \frac{\sum_d \sum_i m_i x_i}{\sum_d \sum_i m_i}, \qquad
              \sigma^2 = \max(0, \mathrm{E}[x^2] - \mu^2) \;\text{(fast)} \;\text{or}\; \mathrm{E}[(x - \mu)^2]

    Sums and counts travel, not means: a mean of the devices' means is another number as soon as one of them holds padding.

    Args:
      x: any shape; computed in at least float32.
      axes: non-negative axes that are averaged over.
      mask: bool, broadcastable to `x`; False entries do not count.
      axis_name: the mapped axis, if any.
      axis_index_groups: groups of devices within it that share their statistics.
      fast: the one-pass variance, as Flax computes it by default.

    >>> x = jnp.array([[1.0], [3.0], [100.0]])
    >>> mean, variance = moments(x, (0,), mask=jnp.array([[True], [True], [False]]))
    >>> mean.tolist(), variance.tolist()
    ([2.0], [1.0])
    """
    axes = tuple(axes)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is None:
        counted = jnp.full([1] * x.ndim, math.prod(x.shape[axis] for axis in axes), x.dtype)
        count = counted.reshape([1 for axis in range(x.ndim) if axis not in axes])
    else:
        mask = jnp.broadcast_to(mask, x.shape)
        count = mask.sum(axes, dtype=x.dtype)

    def total(*values):
        sums = tuple(jnp.sum(value, axes, where=mask) for value in values)
        return sums if axis_name is None else jax.lax.psum(sums, axis_name, axis_index_groups=axis_index_groups)

    if axis_name is not None:
        count = jax.lax.psum(count, axis_name, axis_index_groups=axis_index_groups)
    # Of nothing at all the mean is 0, not NaN: its gradient would reach every parameter.
    count = jnp.maximum(count, 1)
    if fast:
        first, second = total(x, jnp.square(x))
        mean = first / count
        return mean, jnp.maximum(0.0, second / count - jnp.square(mean))
    mean = total(x)[0] / count
    return mean, total(jnp.square(x - jnp.expand_dims(mean, axes)))[0] / count


def row_mask(weight: Array, x: Array) -> Array:
    """The rows of `x` whose example has a weight: bool `[N, 1, ..., 1]`, from weights `[B]`.

    A layer may have merged the batch with other axes, the batch first (`[B, T, C]` to `[B T, C]`): then a weight is repeated.

    Raises:
      ValueError: the leading axis of `x` is no multiple of the batch.

    >>> row_mask(jnp.array([1.0, 0.0]), jnp.ones((4, 3))).ravel().tolist()
    [True, True, False, False]
    """
    if x.shape[0] % weight.shape[0]:
        raise ValueError(f"batch statistics with padding need the batch ({weight.shape[0]}) as leading axis; got {x.shape}")
    rows = jnp.repeat(weight != 0, x.shape[0] // weight.shape[0])
    return rows.reshape(-1, *[1] * (x.ndim - 1))


def layer_moments(
    layer: Any, x: Array, mask: Array | None = None, *, weight: Array | None = None, axis_name: str | None = None
) -> tuple[Array, Array]:
    """The mean and variance that a BatchNorm of either of Flax's worlds normalises `x` by in training.

    Args:
      layer: `nn.BatchNorm` or `nnx.BatchNorm`: its axes, its own device axis and its groups, and how it takes the variance.
      x: what it is called on.
      mask: what it is called with, broadcastable to `x`.
      weight: `[B]`; rows whose weight is 0 do not count either.
      axis_name: the mapped axis, unless the layer names its own.

    >>> import flax.linen as nn
    >>> mean, variance = layer_moments(nn.BatchNorm(axis=0), jnp.array([[1.0, 3.0], [4.0, 4.0]]))
    >>> mean.tolist(), variance.tolist()
    ([2.0, 4.0], [1.0, 0.0])
    """
    if weight is not None:
        rows = row_mask(weight, x)
        mask = rows if mask is None else rows & mask.astype(bool)
    kept = {axis % x.ndim for axis in (layer.axis if isinstance(layer.axis, (tuple, list)) else (layer.axis,))}
    return moments(
        x,
        [axis for axis in range(x.ndim) if axis not in kept],
        mask=mask,
        axis_name=layer.axis_name or axis_name,
        axis_index_groups=layer.axis_index_groups,
        fast=layer.use_fast_variance,
    )


def running_average(layer: Any, old: Array, new: Array) -> Array:
    r"""The running statistic after a step: :math:`\mu s + (1 - \mu) s_B` with the layer's momentum :math:`\mu`.

    >>> import flax.linen as nn
    >>> running_average(nn.BatchNorm(momentum=0.75), jnp.array([1.0]), jnp.array([3.0]))
    Array([1.5], dtype=float32)
    """
    return layer.momentum * old + (1 - layer.momentum) * new
