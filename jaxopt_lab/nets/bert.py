"""The encoder of BERT, of any depth and widths."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets.blocks import Block, of_layers, repeated

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
      heads: of the attention, one number for all blocks or one for each.
      mlp_width: the hidden width of a block's perceptron, likewise.
      head_size: the length of one head, likewise; by default the heads share the width evenly.
      dropout: the probability that an entry is dropped: of the first states, of the attention, of what a block adds.
      remat: keep only what enters each block for the backward pass, and compute the rest again.
      scan: loop over one traced block; the parameters of all lie in `blocks`, stacked, and not in `block_0`, `block_1`, ...
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      dtype: what is computed in; by default that of the parameters. The softmax is in float32 at least.
      param_dtype: what the parameters are stored in.

    >>> import jax
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
    heads: int | Sequence[int] = 12
    mlp_width: int | Sequence[int] = 3072
    head_size: int | Sequence[int] | None = None
    dropout: float = 0.1
    remat: bool = False
    scan: bool = False
    activation: Callable[[Array], Array] = nn.gelu
    kernel_init: nn.initializers.Initializer = _initial
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Array, segments: Array | None = None, mask: Array | None = None, train: bool = False
    ) -> tuple[Array, Array]:
        length = tokens.shape[1]
        if length > self.positions:
            raise ValueError(f"tokens of shape {tokens.shape} are longer than positions={self.positions}; cut them, or take more")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def embedded(indices: Array, count: int, name: str) -> Array:
            return nn.Embed(count, self.width, embedding_init=_initial, name=name, **types)(indices)

        x = embedded(tokens, self.vocabulary, "tokens")
        x = x + embedded(jnp.arange(length)[None], self.positions, "positions")
        x = x + embedded(jnp.zeros_like(tokens) if segments is None else segments, self.segments, "segments")
        dense = partial(nn.Dense, kernel_init=self.kernel_init, **types)
        norm = partial(nn.LayerNorm, _EPSILON, **types)
        x = nn.Dropout(self.dropout, deterministic=not train)(norm(name="norm")(x))
        same = {"activation": self.activation, "train": train, "dense": dense, "norm": norm, "norm_first": False}
        same |= {"dropout": self.dropout, "weights_dropout": self.dropout}
        blocks = of_layers(self, "heads", "head_size", "mlp_width", **same)
        allowed = None if mask is None else mask[:, None]
        x = repeated(Block, blocks, x, allowed, scan=self.scan, remat=self.remat)
        return x, jnp.tanh(dense(self.width, name="pooler")(x[:, 0]))
