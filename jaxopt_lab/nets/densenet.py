"""Densely connected networks, with every width as a field."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers
from jaxopt_lab.nets.blocks import layers

__all__ = ["DenseNet"]


class DenseNet(nn.Module):
    r"""Blocks of layers that each see all maps before them, transitions between them; as its fields stand, DenseNet-121.

    .. math:: x_l = [x_{l-1}, \; W_2 * \sigma(\mathrm{BN}(W_1 * \sigma(\mathrm{BN}(x_{l-1}))))]

    with 1x1 and 3x3 convolutions; the brackets join channels. A 7x7 convolution and pooling come first, a transition (BatchNorm,
    1x1 convolution, 2x2 mean) between two blocks, and BatchNorm, a global mean and a dense layer last.

    Takes `[B, H, W, C]`, of sides of at least 29 for four blocks, and returns logits `[B, classes]`.

    Attributes:
      widths: for each block, for each of its layers, the widths of its two convolutions; the second is the growth.
      transitions: the width of each transition, one fewer than there are blocks; by default half of what comes in.
      stem: the width of the first convolution.
      classes: how many outputs.
      dropout: the probability that an entry of what a layer adds is dropped.
      momentum: of the running statistics.
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(DenseNet().init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    7978856

    Source: Huang, Liu, van der Maaten and Weinberger, "Densely connected convolutional networks", 2017, table 1.
    """

    widths: Sequence[Sequence[Sequence[int]]] = (((128, 32),) * 6, ((128, 32),) * 12, ((128, 32),) * 24, ((128, 32),) * 16)
    transitions: Sequence[int] | None = None
    stem: int = 64
    classes: int = 1000
    dropout: float = 0.0
    momentum: float = 0.9
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: nn.initializers.Initializer = initializers.he_normal
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        between = len(self.widths) - 1
        if self.transitions is not None and len(self.transitions) != between:
            raise ValueError(f"transitions must be {between}, one between two blocks each; got {tuple(self.transitions)}")
        dense, conv, norm = layers(self, train)
        sides = x.shape[1:3]
        x = conv(self.stem, (7, 7), strides=2, padding=3, name="stem")(x)
        x = self.activation(norm(name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for b, block in enumerate(self.widths):
            for k, (inner, growth) in enumerate(block):
                y = _Layer(inner, growth, self.activation, conv, norm, name=f"block_{b}_layer_{k}")(x)
                y = nn.Dropout(self.dropout, deterministic=not train)(y)
                x = jnp.concatenate([x, y], axis=-1)
            if b == between:
                continue
            if min(x.shape[1:3]) < 2:
                raise ValueError(
                    f"images of {sides[0]} x {sides[1]} are too small for {len(self.widths)} blocks; give fewer widths"
                )
            width = x.shape[-1] // 2 if self.transitions is None else self.transitions[b]
            x = conv(width, (1, 1), name=f"transition_{b}")(self.activation(norm(name=f"transition_{b}_norm")(x)))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = self.activation(norm(name="norm")(x)).mean((1, 2))
        return dense(self.classes, name="head")(x)


class _Layer(nn.Module):
    """What a layer adds to the maps before it."""

    inner: int
    growth: int
    activation: Callable[[Array], Array]
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(self.inner, (1, 1), name="conv_0")(self.activation(self.norm(name="norm_0")(x)))
        return self.conv(self.growth, (3, 3), padding=1, name="conv_1")(self.activation(self.norm(name="norm_1")(x)))
