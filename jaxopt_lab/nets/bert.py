"""The encoder of BERT, of any depth and widths."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["BERT"]

_initial = nn.initializers.truncated_normal(0.02)

_EPSILON = 1e-12


class BERT(nn.Module):
    r"""Tokens, positions and segments embedded and summed, then blocks of attention over both directions; BERT-base.

    .. math:: z_0 = \mathrm{LN}(E_t + P_i + S_s), \qquad
              z'_l = \mathrm{LN}(z_{l-1} + \mathrm{MSA}(z_{l-1})), \qquad z_l = \mathrm{LN}(z'_l + \mathrm{MLP}(z'_l))

    The LayerNorms stand behind the sums, unlike those of `VisionTransformer`. The pooled state is :math:`\tanh(W z_L + b)` of the
    first token. Every product with a weight is a dense layer's, with a kernel `[inputs, outputs]`.

    Takes tokens `[B, N]`, integers; optionally their segments `[B, N]`, integers, by default all 0; and a mask `[B, N]`, False
    where a token is padding, which none then attends to. Returns the states `[B, N, width]` and the pooled state `[B, width]`.

    Attributes:
      vocabulary: how many tokens there are.
      positions: the longest N.
      segments: how many segments there are.
      width: the length of a token's state.
      depth: how many blocks.
      heads: of the attention; they share the width evenly.
      mlp_width: the hidden width of each block's perceptron.
      dropout: the probability that an entry is dropped: of the first states, of the attention, of what a block adds.
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the parameters. The softmax is in float32 at least.
      param_dtype: what the parameters are stored in.

    >>> shapes = jax.eval_shape(BERT().init, jax.random.key(0), jnp.ones((1, 128), int))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
    109482240

    Source: Devlin, Chang, Lee and Toutanova, "BERT: pre-training of deep bidirectional transformers for language understanding",
    2019.
    """

    vocabulary: int = 30522
    positions: int = 512
    segments: int = 2
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    dropout: float = 0.1
    activation: Callable[[Array], Array] = nn.gelu
    kernel_init: nn.initializers.Initializer = _initial
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Array, segments: Array | None = None, mask: Array | None = None, train: bool = False
    ) -> tuple[Array, Array]:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not shared evenly by heads={self.heads}")
        length = tokens.shape[1]
        if length > self.positions:
            raise ValueError(f"tokens of shape {tokens.shape} are longer than positions={self.positions}; cut them, or take more")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def embedded(indices: Array, count: int, name: str) -> Array:
            return nn.Embed(count, self.width, embedding_init=_initial, name=name, **types)(indices)

        x = embedded(tokens, self.vocabulary, "tokens")
        x = x + embedded(jnp.arange(length)[None], self.positions, "positions")
        x = x + embedded(jnp.zeros_like(tokens) if segments is None else segments, self.segments, "segments")
        x = nn.LayerNorm(_EPSILON, name="norm", **types)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        options = {"kernel_init": self.kernel_init, **types}
        for k in range(self.depth):
            block = _Block(self.heads, self.mlp_width, self.dropout, self.activation, options, types, name=f"block_{k}")
            x = block(x, mask, train)
        return x, jnp.tanh(nn.Dense(self.width, name="pooler", **options)(x[:, 0]))


class _Block(nn.Module):
    """Attention and a perceptron, each added to what it saw, and a LayerNorm behind each sum."""

    heads: int
    mlp_width: int
    dropout: float
    activation: Callable[[Array], Array]
    options: Any
    """Of the dense layers."""
    types: Any
    """Of the LayerNorms."""

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, train: bool) -> Array:
        def dense(width: int, name: str):
            return nn.Dense(width, name=name, **self.options)

        def drop(x: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        def norm(name: str):
            return nn.LayerNorm(_EPSILON, name=name, **self.types)

        width = x.shape[-1]
        query, key, value = (
            dense(width, name)(x).reshape(*x.shape[:-1], self.heads, -1)  # [B, N, heads, width / heads]
            for name in ("query", "key", "value")
        )
        weights = drop(_weights(query, key, mask))
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        x = norm("norm_attention")(x + drop(dense(width, "out")(attended)))
        y = dense(width, "mlp_out")(self.activation(dense(self.mlp_width, "hidden")(x)))
        return norm("norm_mlp")(x + drop(y))


def _weights(query: Array, key: Array, mask: Array | None) -> Array:
    r""":math:`\mathrm{softmax}(q k^\top / \sqrt d)` of each head, `[B, heads, N, N]`, from `[B, N, heads, d]`."""
    scores = wide(jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5)
    if mask is not None:
        # The lowest number, not minus infinity: where all is padding, the softmax is even and not NaN.
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores).astype(query.dtype)
