"""Vision transformers of any depth and widths."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers
from jaxopt_lab.nets.blocks import Block, of_layers, patches, repeated

__all__ = ["VisionTransformer"]

_POSITION_SCALE = 0.02
"""The standard deviation of the positions at first."""


class VisionTransformer(nn.Module):
    r"""Square patches as words: each a dense layer and a learned position, blocks of attention, and a dense layer.

    .. math:: z_0 = [t; x_1 E; \ldots; x_n E] + P, \qquad
              z'_l = z_{l-1} + \mathrm{MSA}(\mathrm{LN}(z_{l-1})), \qquad z_l = z'_l + \mathrm{MLP}(\mathrm{LN}(z'_l))

    with :math:`x_i` the flattened patches and :math:`t` the class token. After another LayerNorm the logits are taken from the
    token, or from the mean over the patches. The fields as they stand are those of ViT-B/16. Every product with a weight is a dense
    layer's, with a kernel `[inputs, outputs]`; that of `patches`, reshaped to `[patch, patch, C, width]`, is the kernel of the
    convolution that embeds patches elsewhere. The positions belong to one size of image.

    Takes `[B, H, W, C]` (or `[B, H, W]`, one channel), of sides that the patch divides, and returns logits `[B, classes]`.

    Attributes:
      patch: the side of a patch, in pixels.
      width: the length of a patch's state.
      depth: how many blocks.
      heads: of the attention, one number for all blocks or one for each.
      mlp_width: the hidden width of a block's perceptron, likewise.
      head_size: the length of one head, likewise; by default the heads share the width evenly.
      classes: how many outputs.
      class_token: whether the logits are taken from a class token; from the mean over the patches otherwise.
      dropout: the probability that an entry is dropped: of the first states, of a hidden state, of what a block adds.
      remat: keep only what enters each block for the backward pass, and compute the rest again.
      scan: loop over one traced block; the parameters of all lie in `blocks`, stacked, and not in `block_0`, `block_1`, ...
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters. The softmax is in float32 at least.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(VisionTransformer(classes=1000).init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
    86567656

    Source: Dosovitskiy et al., "An image is worth 16x16 words: transformers for image recognition at scale", 2021.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int | Sequence[int] = 12
    mlp_width: int | Sequence[int] = 3072
    head_size: int | Sequence[int] | None = None
    classes: int = 10
    class_token: bool = True
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
        dense = partial(nn.Dense, kernel_init=self.kernel_init, **types)
        x = dense(self.width, name="patches")(patches(x, self.patch))
        if self.class_token:
            token = self.param("token", nn.initializers.zeros, (1, 1, self.width), self.param_dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)).astype(x.dtype), x], axis=1)
        position = self.param("position", nn.initializers.normal(_POSITION_SCALE), (1, *x.shape[1:]), self.param_dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x + position.astype(x.dtype))
        norm = partial(nn.LayerNorm, **types)
        same = {"activation": self.activation, "train": train, "dense": dense, "norm": norm}
        same |= {"dropout": self.dropout, "hidden_dropout": self.dropout}
        blocks = of_layers(self, "heads", "head_size", "mlp_width", **same)
        x = repeated(Block, blocks, x, scan=self.scan, remat=self.remat)
        x = norm(name="norm")(x)
        return dense(self.classes, name="head")(x[:, 0] if self.class_token else x.mean(1))
