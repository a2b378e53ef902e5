"""Inception networks, with every width as a field."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers
from jaxopt_lab.nets.blocks import layers

__all__ = ["Inception"]

_EPSILON = 1e-3


class Inception(nn.Module):
    r"""Blocks of four branches whose maps are joined, pooling between stages, a global mean and a dense layer: GoogLeNet.

    .. math:: y = [B_1(x), \; B_3(B_1(x)), \; B_k(B_1(x)), \; B_1(\mathrm{pool}(x))], \qquad B_s(x) = \sigma(\mathrm{BN}(W * x))

    with W of s x s and a kernel of its own for each letter; the brackets join channels, and the pool is the maximum of 3x3. The
    stem is 7x7, pooled, 1x1, 3x3, pooled. As the fields stand it is the form that torchvision publishes, without the auxiliary
    heads: BatchNorm behind each convolution (epsilon 0.001) in place of the local normalisations of the stem, 3x3 in the third
    branch, and a dropout of 0.2. The paper has `kernel=5` and `dropout=0.4`. Padding is symmetric; a pool of stride 2 takes in the
    rest of a map, as in the paper.

    Takes `[B, H, W, C]` and returns logits `[B, classes]`.

    Attributes:
      widths: for each stage, for each of its blocks, six widths in the order of the paper's table: 1x1; 1x1 before 3x3, 3x3; 1x1
        before k x k, k x k; 1x1 behind the pool.
      pools: for each stage, the side of the pool behind the stage before it.
      stem: the widths of the first three convolutions.
      kernel: k.
      classes: how many outputs.
      dropout: the probability that a feature of the global mean is dropped.
      momentum: of the running statistics.
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(Inception().init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    6624904

    Source: Szegedy et al., "Going deeper with convolutions", 2015, table 1; Ioffe and Szegedy, "Batch normalization: accelerating
    deep network training by reducing internal covariate shift", 2015.
    """

    widths: Sequence[Sequence[Sequence[int]]] = (
        ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
        (
            (192, 96, 208, 16, 48, 64),
            (160, 112, 224, 24, 64, 64),
            (128, 128, 256, 24, 64, 64),
            (112, 144, 288, 32, 64, 64),
            (256, 160, 320, 32, 128, 128),
        ),
        ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
    )
    pools: Sequence[int] = (3, 3, 2)
    stem: Sequence[int] = (64, 64, 192)
    kernel: int = 3
    classes: int = 1000
    dropout: float = 0.2
    momentum: float = 0.9
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: nn.initializers.Initializer = initializers.he_normal
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if len(self.pools) != len(self.widths):
            raise ValueError(f"pools must be {len(self.widths)}, one before each stage of widths; got {tuple(self.pools)}")
        if len(self.stem) != 3 or self.kernel % 2 == 0:
            raise ValueError(f"stem must be three widths, and kernel odd; got {tuple(self.stem)} and {self.kernel}")
        dense, conv, norm = layers(self, train)
        options = (self.activation, conv, norm)
        x = _pooled(_Unit(self.stem[0], 7, 2, *options, name="stem_0")(x), 3)
        for k, side in ((1, 1), (2, 3)):
            x = _Unit(self.stem[k], side, 1, *options, name=f"stem_{k}")(x)
        for s, (stage, side) in enumerate(zip(self.widths, self.pools, strict=True)):
            x = _pooled(x, side)
            for b, widths in enumerate(stage):
                x = _Block(widths, self.kernel, *options, name=f"stage_{s}_block_{b}")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return dense(self.classes, name="head")(x)


class _Block(nn.Module):
    """Four branches side by side."""

    widths: Sequence[int]
    kernel: int
    activation: Callable[[Array], Array]
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if len(self.widths) != 6:
            raise ValueError(f"widths of {self.name} must be six, in the order of the paper's table; got {tuple(self.widths)}")

        def unit(x: Array, width: int, side: int, name: str) -> Array:
            return _Unit(width, side, 1, self.activation, self.conv, self.norm, name=name)(x)

        one, before_two, two, before_three, three, four = self.widths
        pooled = nn.max_pool(x, (3, 3), padding=((1, 1), (1, 1)))
        branches = [
            unit(x, one, 1, "branch_0"),
            unit(unit(x, before_two, 1, "branch_1_reduce"), two, 3, "branch_1"),
            unit(unit(x, before_three, 1, "branch_2_reduce"), three, self.kernel, "branch_2"),
            unit(pooled, four, 1, "branch_3"),
        ]
        return jnp.concatenate(branches, axis=-1)


class _Unit(nn.Module):
    """A convolution, BatchNorm and the activation."""

    width: int
    side: int
    stride: int
    activation: Callable[[Array], Array]
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(self.width, (self.side, self.side), strides=self.stride, padding=self.side // 2, name="conv")(x)
        return self.activation(self.norm(epsilon=_EPSILON, name="norm")(x))


def _pooled(x: Array, side: int) -> Array:
    """The maximum of every second window; the last one may reach over the edge."""
    padding = [(0, (n - side) % 2 if n > side else side - n) for n in x.shape[1:3]]
    return nn.max_pool(x, (side, side), strides=(2, 2), padding=padding)
