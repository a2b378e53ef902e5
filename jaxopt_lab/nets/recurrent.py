"""Recurrent networks over sequences, of any depth and widths."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets import initializers

__all__ = ["Recurrent"]


class Recurrent(nn.Module):
    r"""Cells that run along a sequence, layer on layer, and a dense layer on what the last one ends with: labels or numbers.

    .. math:: s_n = \mathrm{cell}(s_{n-1}, x_n), \quad s_0 = 0, \qquad y = W h_N + b

    with :math:`h_n` what the cell puts out. In both directions a layer puts out :math:`[h_n, h'_n]`, where h' runs from the end,
    and y takes :math:`[h_N, h'_1]`: what has seen all of the sequence.

    Takes `[B, N, features]`, or tokens `[B, N]`, integers, if there is a vocabulary; optionally the lengths `[B]`, at least 1, of
    which nothing behind is read. Returns `[B, classes]`, or `[B, N, classes]` of every step.

    Attributes:
      widths: of each layer; in both directions, of each direction.
      classes: how many outputs.
      cell: makes cells, such as `nn.OptimizedLSTMCell`, `nn.GRUCell` or `nn.SimpleCell`.
      bidirectional: a second cell for each layer, from the end to the beginning.
      vocabulary: how many tokens there are, if the inputs are tokens.
      embedding: the length of a token's vector.
      every_step: outputs for each step, of what the last layer puts out there.
      dropout: the probability that an entry of what a layer puts out is dropped.
      kernel_init: any initialiser, of the kernels that inputs meet; those of `nets.initializers` by name.
      recurrent_init: that of the kernels that states meet.
      dtype: what is computed in, the states too; by default that of the inputs and parameters.
      param_dtype: what the parameters are stored in.

    >>> shapes = jax.eval_shape(Recurrent(widths=(4,)).init, jax.random.key(0), jnp.ones((1, 28, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))  # 4 gates of 3 x 4 + 4 x 4 + 4, and 4 x 10 + 10
    178

    Source: Hochreiter and Schmidhuber, "Long short-term memory", 1997; Cho et al., "Learning phrase representations using RNN
    encoder-decoder for statistical machine translation", 2014; Schuster and Paliwal, "Bidirectional recurrent neural networks",
    1997.
    """

    widths: Sequence[int] = (128,)
    classes: int = 10
    cell: Callable[..., Any] = nn.OptimizedLSTMCell
    bidirectional: bool = False
    vocabulary: int | None = None
    embedding: int = 128
    every_step: bool = False
    dropout: float = 0.0
    kernel_init: nn.initializers.Initializer = initializers.xavier_uniform
    recurrent_init: nn.initializers.Initializer = initializers.orthogonal
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, lengths: Array | None = None, train: bool = False) -> Array:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.vocabulary is not None:
            x = nn.Embed(self.vocabulary, self.embedding, name="tokens", **types)(x)
        if x.ndim != 3:
            raise ValueError(f"inputs must be [B, N, features], or tokens [B, N] and a vocabulary; got {x.shape}")
        if lengths is not None and lengths.shape != x.shape[:1]:
            raise ValueError(f"lengths must be one a row, [{x.shape[0]}]; got {lengths.shape}")
        if not self.widths:
            raise ValueError("widths must be those of one layer or more; got none")
        for k, width in enumerate(self.widths):
            outputs = [self._run(x, lengths, width, f"layer_{k}", reverse=False)]
            if self.bidirectional:
                outputs.append(self._run(x, lengths, width, f"layer_{k}_reverse", reverse=True))
            x = jnp.concatenate([nn.Dropout(self.dropout, deterministic=not train)(y) for y in outputs], axis=-1)
        if not self.every_step:
            width = self.widths[-1]
            x = jnp.concatenate([_last(x[..., :width], lengths), x[:, 0, width:]], axis=-1)
        return nn.Dense(self.classes, name="head", kernel_init=self.kernel_init, **types)(x)

    def _run(self, x: Array, lengths: Array | None, width: int, name: str, *, reverse: bool) -> Array:
        """What a cell puts out at every step, `[B, N, width]`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kernels = {"kernel_init": self.kernel_init, "recurrent_kernel_init": self.recurrent_init}
        cell = self.cell(width, name=name, **kernels, **types)
        # Flax begins in the type of the parameters, which a loop cannot keep where what is computed has another.
        kind = self.dtype or jnp.result_type(x, self.param_dtype)
        shapes = jax.eval_shape(lambda: cell.initialize_carry(jax.random.key(0), x[:, 0].shape))
        carry = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, kind), shapes)
        options = {"initial_carry": carry, "seq_lengths": lengths, "reverse": reverse, "keep_order": True}
        return nn.RNN(cell)(x, **options)


def _last(x: Array, lengths: Array | None) -> Array:
    """What `[B, N, width]` holds at the last step of each row."""
    if lengths is None:
        return x[:, -1]
    return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
