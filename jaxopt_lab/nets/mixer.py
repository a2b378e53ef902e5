"""Mixers: perceptrons over patches and over channels, of any depth and widths."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers
from jaxopt_lab.nets.blocks import of_layers, patches, repeated

__all__ = ["Mixer"]


class Mixer(nn.Module):
    r"""Square patches as rows of a table, and perceptrons that mix its rows and its columns in turn; Mixer-B/16.

    .. math:: U = X + \mathrm{MLP}_1(\mathrm{LN}(X)^\top)^\top, \qquad Y = U + \mathrm{MLP}_2(\mathrm{LN}(U)), \qquad
              \mathrm{MLP}(x) = \sigma(x W_1 + b_1) W_2 + b_2

    with X of one row a patch. After another LayerNorm the logits are taken from the mean over the patches. Every product with a
    weight is a dense layer's, with a kernel `[inputs, outputs]`. The perceptron over patches belongs to one size of image.

    Takes `[B, H, W, C]` (or `[B, H, W]`, one channel), of sides that the patch divides, and returns logits `[B, classes]`.

    Attributes:
      patch: the side of a patch, in pixels.
      width: the length of a patch's state.
      depth: how many blocks.
      patch_width: the hidden width of the perceptron over patches, one for all blocks or one for each.
      mlp_width: that of the perceptron over channels, likewise.
      classes: how many outputs.
      dropout: the probability that an entry of what is added is dropped.
      remat: keep only what enters each block for the backward pass, and compute the rest again.
      scan: loop over one traced block; the parameters of all lie in `blocks`, stacked, and not in `block_0`, `block_1`, ...
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(Mixer(classes=1000).init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
    59880472

    Source: Tolstikhin et al., "MLP-Mixer: an all-MLP architecture for vision", 2021, table 1.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    patch_width: int | Sequence[int] = 384
    mlp_width: int | Sequence[int] = 3072
    classes: int = 10
    dropout: float = 0.0
    remat: bool = False
    scan: bool = False
    activation: Callable[[Array], Array] = nn.gelu
    kernel_init: nn.initializers.Initializer = initializers.xavier_uniform
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense, norm = partial(nn.Dense, kernel_init=self.kernel_init, **types), partial(nn.LayerNorm, **types)
        x = dense(self.width, name="patches")(patches(x, self.patch))
        same = {"dropout": self.dropout, "activation": self.activation, "train": train, "dense": dense, "norm": norm}
        blocks = of_layers(self, "patch_width", "mlp_width", **same)
        x = repeated(_Block, blocks, x, scan=self.scan, remat=self.remat)
        return dense(self.classes, name="head")(norm(name="norm")(x).mean(1))


class _Block(nn.Module):
    """A perceptron over patches and one over channels, each added to what a LayerNorm before it saw."""

    patch_width: int
    mlp_width: int
    dropout: float
    activation: Callable[[Array], Array]
    train: bool
    dense: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def added(y: Array, width: int, name: str) -> Array:
            hidden = self.activation(self.dense(width, name=f"{name}_hidden")(y))
            y = self.dense(y.shape[-1], name=f"{name}_out")(hidden)
            return nn.Dropout(self.dropout, deterministic=not self.train)(y)

        y = self.norm(name="norm_patches")(x).swapaxes(1, 2)  # [B, width, N]
        x = x + added(y, self.patch_width, "patches").swapaxes(1, 2)
        return x + added(self.norm(name="norm_mlp")(x), self.mlp_width, "mlp")
