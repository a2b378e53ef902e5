"""Convolution kernels as a small kernel between two mixes of channels: the leaf, and `tucker2`, which puts it into a tree."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray

from jaxopt_lab.compress.arrays import factor
from jaxopt_lab.compress.leaf import Leaf, checked
from jaxopt_lab.compress.leaves.low_rank import pointwise, shrunk
from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import naming
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["Tucker2", "tucker2"]


class Tucker2(Leaf):
    r"""A convolution kernel stored as three factors, which all train: channels in, a core with few channels, channels out.

    .. math:: W_{s,i,o} = \sum_{p,q} U_{i,p} \; C_{s,p,q} \; V_{q,o}

    A convolution runs as one of size 1, one with the core, which takes strides, padding and dilation, and one of size 1. A
    convolution in groups, and all that is none, runs on the dense kernel.

    Attributes:
      first: :math:`U`, `[..., inputs, p]`.
      core: :math:`C`, the axes of the kernel in its own order, with `p` and `q` channels.
      last: :math:`V`, `[..., q, outputs]`.
      inputs: the kernel's axis of input channels, counted from the end (static).
      outputs: that of output channels (static).
      dense_dtype: the dtype of the kernel that it stands for (static).

    >>> kernel = Tucker2(jnp.ones((4, 1)), jnp.ones((3, 3, 1, 2)), jnp.ones((2, 5)))
    >>> kernel.materialise().shape
    (3, 3, 4, 5)
    """

    first: Array
    core: Array
    last: Array
    inputs: int = eqx.field(static=True, default=-2)
    outputs: int = eqx.field(static=True, default=-1)
    dense_dtype: Any = eqx.field(static=True, default=jnp.float32, converter=jnp.dtype)
    trains: ClassVar[tuple[str, ...]] = ("first", "core", "last")

    def __check_init__(self):
        ranks = (self.core.shape[self.inputs], self.core.shape[self.outputs])
        if self.inputs >= 0 or self.outputs >= 0 or ranks != (self.first.shape[-1], self.last.shape[-2]):
            raise ValueError(
                f"factors {self.first.shape} and {self.last.shape} do not fit a core {self.core.shape} with "
                f"inputs={self.inputs} and outputs={self.outputs}, counted from the end: they are [inputs, p] and [q, outputs]"
            )

    def aval(self):
        sides = list(self.core.shape)
        sides[self.inputs], sides[self.outputs] = self.first.shape[-2], self.last.shape[-1]
        return ShapedArray(tuple(sides), self.dense_dtype)

    def stepwise(self, length):
        return self if self.first.ndim > 2 else NotImplemented

    def materialise(self) -> Array:
        stack, axes = range(self.first.ndim - 2), list(range(self.core.ndim))
        inputs, outputs = axes[self.inputs], axes[self.outputs]
        narrow = [{inputs: "p", outputs: "q"}.get(axis, axis) for axis in axes]
        between = ["p" if axis == inputs else axis for axis in axes]
        how = {"dtype": jnp.promote_types(self.core.dtype, jnp.float32), "precision": lax.Precision.HIGHEST}
        half = factor.contract(self.core, narrow, self.last, [*stack, "q", outputs], between, **how)
        return factor.contract(self.first, [*stack, inputs, "p"], half, between, axes, **how).astype(self.dense_dtype)

    def format(self) -> str:
        return f"{self.core.dtype} Tucker-2 ranks {self.first.shape[-1]}x{self.last.shape[-2]}"

    def conv_general_dilated(self, x, *, dimension_numbers, precision, feature_group_count, batch_group_count, **params):
        lhs_spec, rhs_spec, out_spec = dimension_numbers
        channels = (self.core.ndim + self.outputs, self.core.ndim + self.inputs)
        grouped = max(feature_group_count, batch_group_count) > 1
        if grouped or rhs_spec[:2] != channels or self.first.ndim > 2 or params.get("out_sharding") is not None:
            return NotImplemented
        first, core, last = (each.astype(x.dtype) for each in (self.first, self.core, self.last))
        wanted = params.pop("preferred_element_type")
        h = pointwise(x, first, lhs_spec[1], 0, precision=precision)
        h = lax.conv_general_dilated(h, core, dimension_numbers=dimension_numbers, precision=precision, **params)
        return pointwise(h, last, out_spec[1], 0, dtype=wanted, precision=precision)

    def convert_element_type(self, *, new_dtype, **params):
        if not jnp.issubdtype(new_dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, dense_dtype=new_dtype)

    def transpose(self, *, permutation):
        if self.first.ndim > 2:
            return NotImplemented
        ndim = self.core.ndim
        inputs, outputs = (permutation.index(ndim + axis) - ndim for axis in (self.inputs, self.outputs))
        return dataclasses.replace(self, core=lax.transpose(self.core, permutation), inputs=inputs, outputs=outputs)


def tucker2(
    params: PyTree,
    ranks: tuple[factor.Rank, factor.Rank] | Mapping[str, tuple[factor.Rank, factor.Rank]] | None = None,
    energy: float | None = None,
    inputs: int = -2,
    outputs: int = -1,
    stacked: int = 0,
    iterations: int = 5,
    where: Where = "**/kernel",
) -> PyTree:
    r"""Stores the chosen convolution kernels as a small kernel between two mixes of channels.

    .. math:: W_{s,i,o} \approx \sum_{p,q} U_{i,p} \; C_{s,p,q} \; V_{q,o}

    Matrices have no places and stay as they are (`low_rank` is for them), and so does a kernel that would not shrink; `summary`
    shows which. Kernels of convolutions in groups are best left out of `where`: they run dense. The factors train: give the result
    to `optimizer`, and call the model on it with `lift`.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      ranks: of input and output channels, for all, cut to the channels that a kernel has; or by path, where kernels without ranks
        stay dense. Each may be a rule such as `by_evidence`.
      energy: instead of ranks, the share :math:`e` in (0, 1] of its square that the kernel keeps in each of its two unfoldings: the
        relative error is at most :math:`\sqrt{2 (1 - e)}`.
      inputs: the axis of input channels: -2 in Flax's kernels, 1 in those stored as (out, in, height, width).
      outputs: the axis of output channels: -1 and 0.
      stacked: how many leading axes number separate kernels, which share their ranks.
      iterations: how often the factors are fitted in turns.
      where: which leaves (see `tree.select`).

    Returns:
      `params` with `Tucker2` leaves.

    Raises:
      ValueError: ranks and energy are both given or neither, one is out of range, no kernel would shrink, one with ranks of its own
        would not, the axes do not fit, a weight is not finite, a path is unknown, or nothing matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already; or it is traced, and the ranks left to its
        singular values: that choice is made on the host.

    >>> params = {"Conv_0": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.zeros(16)}}
    >>> tucker2(params, ranks=(2, 4))["Conv_0"]["kernel"].core.shape
    (3, 3, 2, 4)

    Source: Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications", 2016.
    """
    if (ranks is None) == (energy is None):
        raise ValueError("tucker2 takes ranks or an energy: give one of them")
    chosen = tree.selected(params, where)
    own = isinstance(ranks, Mapping)
    pairs = tree.by_path("ranks", ranks if energy is None else (factor.by_energy(energy),) * 2, chosen)

    def store(path: str, leaf: Any) -> Any:
        w = checked(leaf, path)
        if path not in pairs or (w.ndim < 3 + stacked and not own):
            return leaf
        with naming(path, w.shape):
            stored = _tucker2(w, pairs[path], inputs, outputs, stacked, iterations)
            numbers = tree.size(stored)
            if own and numbers >= w.size:
                raise ValueError(f"ranks={pairs[path]} store {numbers} numbers, no fewer than the kernel: give smaller ones")
        return stored if numbers < w.size else leaf

    stored = {path: store(path, leaf) for path, leaf in chosen.items()}
    shrunk(stored, f"energy={energy}" if ranks is None else f"ranks={ranks}")
    return tree.replaced(params, stored)


def _tucker2(w: Array, ranks: tuple, inputs: int, outputs: int, stacked: int, iterations: int) -> Tucker2:
    """One kernel as a leaf; factors have the kernel's dtype."""
    if any(not -w.ndim <= axis < w.ndim for axis in (inputs, outputs)):
        raise ValueError(f"inputs={inputs} and outputs={outputs} are no axes of it")
    channels = (inputs % w.ndim, outputs % w.ndim)
    places = [axis for axis in range(stacked, w.ndim) if axis not in channels]
    if len({*range(stacked), *places, *channels}) < w.ndim or len(places) != w.ndim - stacked - 2 or not places:
        raise ValueError(
            f"inputs={inputs}, outputs={outputs} and stacked={stacked} leave no kernel with places between two channels"
        )
    order = (*range(stacked), *places, *channels)
    stack, sides = w.shape[:stacked], tuple(w.shape[axis] for axis in places)
    matrix = lax.transpose(w, order).reshape(*stack, math.prod(sides), w.shape[channels[0]], w.shape[channels[1]])
    first, core, last = factor.tucker2(matrix, ranks, iterations)
    core = core.reshape(*stack, *sides, first.shape[-1], last.shape[-2])
    core = lax.transpose(core, [order.index(axis) for axis in range(w.ndim)])
    first, core, last = (each.astype(w.dtype) for each in (first, core, last))
    return Tucker2(first, core, last, channels[0] - w.ndim, channels[1] - w.ndim, w.dtype)
