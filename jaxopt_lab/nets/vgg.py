"""VGG networks, with every width as a field."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers
from jaxopt_lab.nets.blocks import layers

__all__ = ["VGG"]


class VGG(nn.Module):
    r"""Stages of 3x3 convolutions, each pooled 2x2, and three dense layers; as its fields stand, VGG-16.

    Every convolution and dense layer has a bias. The first dense layer takes the last map whole, row by row, so its kernel belongs
    to one size of image: 7 x 7 x 512 inputs at 224 x 224.

    Takes `[B, H, W, C]`, of sides that can be halved once a stage, and returns logits `[B, classes]`.

    Attributes:
      widths: for each stage, the widths of its convolutions.
      features: the widths of the hidden dense layers.
      classes: how many outputs.
      batch_norm: a BatchNorm behind every convolution.
      dropout: the probability that a hidden dense unit is dropped.
      momentum: of the running statistics, if there are any.
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(VGG().init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
    138357544

    Source: Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", 2015, table 1, column D.
    """

    widths: Sequence[Sequence[int]] = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    features: Sequence[int] = (4096, 4096)
    classes: int = 1000
    batch_norm: bool = False
    dropout: float = 0.5
    momentum: float = 0.9
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: nn.initializers.Initializer = initializers.he_normal
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        dense, conv, norm = layers(self, train)
        sides = x.shape[1:3]
        for s, stage in enumerate(self.widths):
            for k, width in enumerate(stage):
                x = conv(width, (3, 3), padding=1, use_bias=True, name=f"stage_{s}_conv_{k}")(x)
                x = self.activation(norm(name=f"stage_{s}_norm_{k}")(x) if self.batch_norm else x)
            if min(x.shape[1:3]) < 2:
                raise ValueError(
                    f"images of {sides[0]} x {sides[1]} are too small for {len(self.widths)} stages; give fewer widths"
                )
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for k, width in enumerate(self.features):
            x = self.activation(dense(width, name=f"dense_{k}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(self.classes, name="head")(x)
