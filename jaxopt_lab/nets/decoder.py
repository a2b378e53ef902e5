"""Causal language models of any depth and widths."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets.blocks import Block, of_layers, repeated

__all__ = ["Decoder"]

_initial = nn.initializers.normal(0.02)


class Decoder(nn.Module):
    r"""Tokens embedded, then blocks of attention to what came before, and the logits of the next token; GPT-2, the small one.

    .. math:: z_0 = E_t + P_i, \qquad z'_l = z_{l-1} + \mathrm{MSA}(\mathrm{N}(z_{l-1})), \qquad
              z_l = z'_l + \mathrm{MLP}(\mathrm{N}(z'_l)), \qquad y = \mathrm{N}(z_L) E^\top

    with a normalisation N. The LLaMA of 7 billion weights is

        Decoder(32000, width=4096, depth=32, heads=32, mlp_width=11008, gated=True, fused=False, rotary=10_000.0, tied=False,
                use_bias=False, dropout=0.0, norm=nn.RMSNorm, activation=nn.silu)

    Every product with a weight is a dense layer's, with a kernel `[inputs, outputs]`, but for the tied read-out.

    Takes tokens `[B, N]`, integers, and optionally a mask `[B, N]`, False where a token is padding, which none then attends to.
    Returns logits `[B, N, vocabulary]`.

    Attributes:
      vocabulary: how many tokens there are.
      positions: the longest N, where positions are learned.
      width: the length of a token's state.
      depth: how many blocks.
      heads: of the queries, one number for all blocks or one for each.
      kv_heads: of the keys and values, likewise; each serves `heads / kv_heads` heads of queries in a row. By default as many as
        there are heads.
      head_size: the length of one head, likewise; by default the heads share the width evenly.
      mlp_width: the hidden width of a block's perceptron, likewise.
      gated: the perceptron is :math:`W_o(\sigma(W_g x) \odot W_h x)`, and not :math:`W_o \, \sigma(W_h x)`.
      fused: queries, keys and values come from one dense layer, in this order, and not from three.
      rotary: the base of the angles by which queries and keys are turned with their positions; learned positions if it is None.
      tied: the logits are products with the embeddings, and not a dense layer of their own without a bias.
      use_bias: whether the dense layers of the blocks have biases.
      dropout: the probability that an entry is dropped: of the first states, of the attention, of what a block adds.
      remat: keep only what enters each block for the backward pass, and compute the rest again.
      scan: loop over one traced block; the parameters of all lie in `blocks`, stacked, and not in `block_0`, `block_1`, ...
      norm: makes normalisations: `nn.LayerNorm`, `nn.RMSNorm`, or either with an epsilon.
      activation: an elementwise function.
      kernel_init: any initialiser; those of `nets.initializers` by name.
      residual_init: that of the kernels whose products are added to the state; by default `kernel_init` divided by the root of the
        number of sums, as GPT-2's are drawn.
      dtype: what is computed in; by default that of the parameters. The softmax is in float32 at least.
      param_dtype: what the parameters are stored in.

    >>> import jax
    >>> shapes = jax.eval_shape(Decoder().init, jax.random.key(0), jnp.ones((1, 16), int))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
    124439808

    Source: Radford et al., "Language models are unsupervised multitask learners", 2019; Touvron et al., "LLaMA: open and efficient
    foundation language models", 2023; Ainslie et al., "GQA: training generalized multi-query transformer models from multi-head
    checkpoints", 2023.
    """

    vocabulary: int = 50257
    positions: int = 1024
    width: int = 768
    depth: int = 12
    heads: int | Sequence[int] = 12
    kv_heads: int | Sequence[int] | None = None
    head_size: int | Sequence[int] | None = None
    mlp_width: int | Sequence[int] = 3072
    gated: bool = False
    fused: bool = True
    rotary: float | None = None
    tied: bool = True
    use_bias: bool = True
    dropout: float = 0.1
    remat: bool = False
    scan: bool = False
    norm: Callable[..., nn.Module] = partial(nn.LayerNorm, epsilon=1e-5)
    activation: Callable[[Array], Array] = nn.gelu
    kernel_init: nn.initializers.Initializer = _initial
    residual_init: nn.initializers.Initializer | None = None
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, mask: Array | None = None, train: bool = False) -> Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        length = tokens.shape[1]
        embedded = partial(nn.Embed, features=self.width, embedding_init=_initial, **types)
        dense, norm = partial(nn.Dense, kernel_init=self.kernel_init, **types), partial(self.norm, **types)
        table = embedded(self.vocabulary, name="tokens")
        x = table(tokens)
        if self.rotary is None:
            if length > self.positions:
                raise ValueError(
                    f"tokens of shape {tokens.shape} are longer than positions={self.positions}; cut them, or take more"
                )
            x = x + embedded(self.positions, name="positions")(jnp.arange(length)[None])
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        allowed = jnp.tri(length, dtype=bool)[None]
        allowed = allowed if mask is None else allowed & mask[:, None]
        same = {name: getattr(self, name) for name in ("gated", "fused", "rotary", "activation", "dropout")}
        same |= {"weights_dropout": self.dropout, "train": train, "norm": norm}
        same["dense"] = partial(dense, use_bias=self.use_bias)
        same["dense_out"] = partial(same["dense"], kernel_init=self._residual_init())
        blocks = of_layers(self, "heads", "kv_heads", "head_size", "mlp_width", **same)
        x = norm(name="norm")(repeated(Block, blocks, x, allowed, scan=self.scan, remat=self.remat))
        return table.attend(x) if self.tied else dense(self.vocabulary, use_bias=False, name="head")(x)

    def _residual_init(self) -> nn.initializers.Initializer:
        if self.residual_init is not None:
            return self.residual_init
        # Each block adds two products.
        return lambda key, shape, dtype: (2 * self.depth) ** -0.5 * self.kernel_init(key, shape, dtype)
