"""MobileNetV2, with every width as a field."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers
from jaxopt_lab.nets.blocks import layers

__all__ = ["MobileNetV2"]


class MobileNetV2(nn.Module):
    r"""Inverted residual blocks: widened by 1x1, filtered channel by channel, narrowed by 1x1 without an activation.

    .. math:: F(x) = \mathrm{BN}(P * \sigma(\mathrm{BN}(D *_c \sigma(\mathrm{BN}(E * x)))))

    with :math:`*_c` a 3x3 convolution of each channel by itself. The first block of a stage puts out F(x), the later ones
    :math:`x + F(x)`. A 3x3 convolution comes first; a 1x1 convolution, a global mean and a dense layer last. Padding is symmetric.

    Takes `[B, H, W, C]` and returns logits `[B, classes]`.

    Attributes:
      widths: for each stage, for each of its blocks, the width inside it and the width that it puts out; a block of the latter
        alone lacks E.
      strides: for each stage, that of its first block.
      stem: the width of the first convolution.
      features: the width of the last convolution.
      classes: how many outputs.
      dropout: the probability that a feature of the global mean is dropped.
      momentum: of the running statistics.
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(MobileNetV2().init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    3504872

    Source: Sandler, Howard, Zhu, Zhmoginov and Chen, "MobileNetV2: inverted residuals and linear bottlenecks", 2018, table 2; the
    dropout is torchvision's.
    """

    widths: Sequence[Sequence[Sequence[int]]] = (
        ((16,),),
        ((96, 24), (144, 24)),
        ((144, 32), *((192, 32),) * 2),
        ((192, 64), *((384, 64),) * 3),
        ((384, 96), *((576, 96),) * 2),
        ((576, 160), *((960, 160),) * 2),
        ((960, 320),),
    )
    strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1)
    stem: int = 32
    features: int = 1280
    classes: int = 1000
    dropout: float = 0.2
    momentum: float = 0.9
    activation: Callable[[Array], Array] = nn.relu6
    kernel_init: nn.initializers.Initializer = initializers.he_normal
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if len(self.strides) != len(self.widths):
            raise ValueError(f"strides must be {len(self.widths)}, one for each stage of widths; got {tuple(self.strides)}")
        dense, conv, norm = layers(self, train)
        x = conv(self.stem, (3, 3), strides=2, padding=1, name="stem")(x)
        x = self.activation(norm(name="stem_norm")(x))
        for s, (stage, stride) in enumerate(zip(self.widths, self.strides, strict=True)):
            for b, widths in enumerate(stage):
                options = (self.activation, conv, norm)
                x = _Block(widths, 1 if b else stride, bool(b), *options, name=f"stage_{s}_block_{b}")(x)
        x = self.activation(norm(name="features_norm")(conv(self.features, (1, 1), name="features")(x)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return dense(self.classes, name="head")(x)


class _Block(nn.Module):
    """An inverted residual block."""

    widths: Sequence[int]
    stride: int
    residual: bool
    activation: Callable[[Array], Array]
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if len(self.widths) not in (1, 2):
            raise ValueError(f"widths of {self.name} must be (inside, out), or (out,); got {tuple(self.widths)}")
        *inside, out = self.widths
        if self.residual and x.shape[-1] != out:
            raise ValueError(f"{self.name} takes {x.shape[-1]} channels and puts out {out}; the blocks of a stage end alike")
        y = x
        for width in inside:
            y = self.activation(self.norm(name="expand_norm")(self.conv(width, (1, 1), name="expand")(y)))
        width = y.shape[-1]
        y = self.conv(width, (3, 3), strides=self.stride, padding=1, feature_group_count=width, name="depthwise")(y)
        y = self.activation(self.norm(name="depthwise_norm")(y))
        y = self.norm(name="project_norm")(self.conv(out, (1, 1), name="project")(y))
        return x + y if self.residual else y
