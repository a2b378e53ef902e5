"""Residual networks of the CIFAR kind, of any depth and widths."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers
from jaxopt_lab.nets.blocks import layers

__all__ = ["ResNet"]


class ResNet(nn.Module):
    r"""A 3x3 convolution, stages of residual blocks, a global mean and a dense layer; `depth = 2 n len(widths) + 2`.

    A block is :math:`y = \sigma(s(x) + \mathrm{BN}(W_2 * \sigma(\mathrm{BN}(W_1 * x))))`. The first block of every later stage
    halves the map. By default its shortcut has no parameters (option A of the paper: every second pixel, new channels zero), so
    ResNet-20 has the paper's 0.27 M parameters, 269,722; `projection=True` takes a 1x1 convolution with BatchNorm instead (option
    B: 272,474).

    Takes `[B, H, W, C]` and returns logits `[B, classes]`.

    Attributes:
      depth: 20, 32, 44, 56, 110 for three stages: `6n + 2`.
      widths: the channels of each stage; as many stages as there are entries.
      classes: how many outputs.
      projection: 1x1 convolutions on the shortcuts that change shape.
      dropout: the probability that a feature of the global mean is dropped.
      momentum: of the running statistics.
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(ResNet(depth=20).init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    269722

    Source: He, Zhang, Ren and Sun, "Deep residual learning for image recognition", 2015, section 4.2.
    """

    depth: int = 20
    widths: Sequence[int] = (16, 32, 64)
    classes: int = 10
    projection: bool = False
    dropout: float = 0.0
    momentum: float = 0.9
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: nn.initializers.Initializer = initializers.he_normal
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        blocks, rest = divmod(self.depth - 2, 2 * len(self.widths))
        if rest or blocks < 1:
            raise ValueError(f"depth must be {2 * len(self.widths)}n + 2 for {len(self.widths)} stages; got {self.depth}")
        dense, conv, norm = layers(self, train)
        x = self.activation(norm()(conv(self.widths[0], (3, 3))(x)))
        for stage, width in enumerate(self.widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                y = self.activation(norm()(conv(width, (3, 3), strides=stride)(x)))
                y = norm()(conv(width, (3, 3))(y))
                if stride == 1 and x.shape[-1] == width:
                    shortcut = x
                elif self.projection:
                    shortcut = norm()(conv(width, (1, 1), strides=stride)(x))
                else:
                    shortcut = _padded(x, width, stride)
                x = self.activation(shortcut + y)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return dense(self.classes)(x)


def _padded(x: Array, width: int, stride: int) -> Array:
    """Every `stride`-th pixel of `x`, `[B, H, W, C]`, with zero channels appended up to `width`."""
    if width < x.shape[-1]:
        raise ValueError(f"a shortcut without parameters cannot narrow {x.shape[-1]} channels to {width}; use projection=True")
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))
