"""Residual networks of the ImageNet kind, of any depth and of any width inside each block."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers
from jaxopt_lab.nets.blocks import layers

__all__ = ["ImageNetResNet"]

_WIDTHS = (64, 128, 256, 512)
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""By depth, how many blocks each stage has; from 50 layers on they are bottlenecks."""


class ImageNetResNet(nn.Module):
    r"""A 7x7 convolution, pooling, four stages of residual blocks, a global mean and a dense layer: ResNet-18 to ResNet-152.

    A block is :math:`y = \sigma(s(x) + F(x))`, where F is of convolutions with BatchNorm and :math:`\sigma` between them: two of
    3x3 (basic), or 1x1, 3x3 and 1x1 (bottleneck). The first block of every later stage halves the map in its first 3x3
    convolution. s is a 1x1 convolution with BatchNorm where a stage begins, and the identity elsewhere, and in the first stage of
    basic blocks too if that leaves the shape alone. Padding is symmetric. `ResNet` is the one for small images.

    Takes `[B, H, W, C]` and returns logits `[B, classes]`.

    Attributes:
      depth: 18, 34, 50, 101 or 152; read where `widths` is not given.
      widths: for each stage, for each of its blocks, the widths of its convolutions: two make a basic block, three a bottleneck. By
        default the paper's; a network that lost channels inside its blocks is described by what is left.
      stem: the width of the first convolution.
      squeeze_excitation: if given, each channel of a block's F(x) is scaled by what two dense layers make of the means of all, with
        so many times fewer hidden units than there are channels (16 in the paper).
      classes: how many outputs.
      dropout: the probability that a feature of the global mean is dropped.
      momentum: of the running statistics.
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(ImageNetResNet(depth=18).init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    11689512

    Source: He, Zhang, Ren and Sun, "Deep residual learning for image recognition", 2015, section 4.1; a bottleneck halves the map
    where torchvision's does. Hu, Shen and Sun, "Squeeze-and-excitation networks", 2018.
    """

    depth: int = 18
    widths: Sequence[Sequence[Sequence[int]]] | None = None
    stem: int = 64
    squeeze_excitation: int | None = None
    classes: int = 1000
    dropout: float = 0.0
    momentum: float = 0.9
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: nn.initializers.Initializer = initializers.he_normal
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        dense, conv, norm = layers(self, train)
        x = conv(self.stem, (7, 7), strides=2, padding=3, name="stem")(x)
        x = self.activation(norm(name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for s, stage in enumerate(_published(self.depth) if self.widths is None else self.widths):
            for b, widths in enumerate(stage):
                stride = 2 if s and not b else 1
                options = (self.squeeze_excitation, self.activation, dense, conv, norm)
                x = _Block(widths, stride, not b, *options, name=f"stage_{s}_block_{b}")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return dense(self.classes, name="head")(x)


class _Block(nn.Module):
    """Two or three convolutions, added to what came in."""

    widths: Sequence[int]
    stride: int
    first: bool
    """Whether a stage begins with it."""
    reduction: int | None
    activation: Callable[[Array], Array]
    dense: Any
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if len(self.widths) not in (2, 3):
            raise ValueError(f"widths of {self.name} must be two (3x3, 3x3) or three (1x1, 3x3, 1x1); got {tuple(self.widths)}")
        sides = (3, 3) if len(self.widths) == 2 else (1, 3, 1)
        halving = sides.index(3)
        y = x
        for k, (width, side) in enumerate(zip(self.widths, sides, strict=True)):
            y = self.activation(y) if k else y
            stride = self.stride if k == halving else 1
            y = self.conv(width, (side, side), strides=stride, padding=side // 2, name=f"conv_{k}")(y)
            y = self.norm(name=f"norm_{k}")(y)
        y = y if self.reduction is None else self._scaled(y)
        if self.first and (self.stride > 1 or len(sides) == 3 or x.shape != y.shape):
            x = self.conv(self.widths[-1], (1, 1), strides=self.stride, padding=0, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        if x.shape != y.shape:
            raise ValueError(
                f"{self.name} takes {x.shape[-1]} channels and puts out {y.shape[-1]}; the blocks of a stage end alike"
            )
        return self.activation(x + y)

    def _scaled(self, y: Array) -> Array:
        hidden = y.shape[-1] // self.reduction
        if hidden < 1:
            raise ValueError(f"squeeze_excitation={self.reduction} leaves no unit of the {y.shape[-1]} channels of {self.name}")
        scale = self.activation(self.dense(hidden, name="squeeze")(y.mean((1, 2), keepdims=True)))
        return y * nn.sigmoid(self.dense(y.shape[-1], name="excite")(scale))


def _published(depth: int) -> Sequence[Sequence[Sequence[int]]]:
    """The widths of the paper's network of so many layers."""
    if depth not in _BLOCKS:
        raise ValueError(f"depth must be one of {', '.join(map(str, _BLOCKS))}, or give widths; got {depth}")
    return [[(w, w) if depth < 50 else (w, w, 4 * w)] * count for w, count in zip(_WIDTHS, _BLOCKS[depth], strict=True)]
