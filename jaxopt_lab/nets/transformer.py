"""Vision transformers of any depth and widths."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers

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
      heads: of the attention; they share the width evenly.
      mlp_width: the hidden width of each block's perceptron.
      classes: how many outputs.
      class_token: whether the logits are taken from a class token; from the mean over the patches otherwise.
      dropout: the probability that an entry is dropped: of the first states, of a hidden state, of what a block adds.
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the inputs and parameters. The softmax is in float32 at least.
      param_dtype: what the parameters are stored in.

    >>> shapes = jax.eval_shape(VisionTransformer(classes=1000).init, jax.random.key(0), jnp.ones((1, 224, 224, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
    86567656

    Source: Dosovitskiy et al., "An image is worth 16x16 words: transformers for image recognition at scale", 2021.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    classes: int = 10
    class_token: bool = True
    dropout: float = 0.0
    activation: Callable[[Array], Array] = nn.gelu
    kernel_init: nn.initializers.Initializer = initializers.xavier_uniform
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not shared evenly by heads={self.heads}")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        options = {"kernel_init": self.kernel_init, **types}
        x = nn.Dense(self.width, name="patches", **options)(_patches(x, self.patch))
        if self.class_token:
            token = self.param("token", nn.initializers.zeros, (1, 1, self.width), self.param_dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)).astype(x.dtype), x], axis=1)
        position = self.param("position", nn.initializers.normal(_POSITION_SCALE), (1, *x.shape[1:]), self.param_dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x + position.astype(x.dtype))
        for k in range(self.depth):
            x = _Block(self.heads, self.mlp_width, self.dropout, self.activation, options, types, name=f"block_{k}")(x, train)
        x = nn.LayerNorm(name="norm", **types)(x)
        return nn.Dense(self.classes, name="head", **options)(x[:, 0] if self.class_token else x.mean(1))


class _Block(nn.Module):
    """Attention and a perceptron, each added to what a LayerNorm before it saw."""

    heads: int
    mlp_width: int
    dropout: float
    activation: Callable[[Array], Array]
    options: Any
    """Of the dense layers."""
    types: Any
    """Of the LayerNorms."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def dense(width: int, name: str):
            return nn.Dense(width, name=name, **self.options)

        def drop(x: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        width = x.shape[-1]
        y = nn.LayerNorm(name="norm_attention", **self.types)(x)
        query, key, value = (
            dense(width, name)(y).reshape(*y.shape[:-1], self.heads, -1)  # [B, N, heads, width / heads]
            for name in ("query", "key", "value")
        )
        x = x + drop(dense(width, "out")(_attention(query, key, value).reshape(y.shape)))
        y = nn.LayerNorm(name="norm_mlp", **self.types)(x)
        y = drop(self.activation(dense(self.mlp_width, "hidden")(y)))
        return x + drop(dense(width, "mlp_out")(y))


def _attention(query: Array, key: Array, value: Array) -> Array:
    r""":math:`\mathrm{softmax}(q k^\top / \sqrt d) \, v` of each head; all `[B, N, heads, d]`."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(wide(scores)).astype(value.dtype), value)


def _patches(x: Array, side: int) -> Array:
    """The patches of images `[B, H, W, C]`, row by row: `[B, H W / side^2, side^2 C]`."""
    if x.ndim == 3:
        x = x[..., None]
    batch, height, width, channels = x.shape
    if height % side or width % side:
        raise ValueError(f"patch={side} does not divide the sides of images of {height} x {width}; take another, or pad them")
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, side * side * channels)
