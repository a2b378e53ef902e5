"""What several networks are made of: layers with their fields, patches, attention, the block of a transformer, blocks in a row."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["Block", "attention_weights", "layers", "of_layers", "patches", "per_layer", "repeated", "rotated"]


def layers(net: Any, train: bool = False) -> tuple[Callable[..., nn.Module], ...]:
    """`nn.Dense`, `nn.Conv` without a bias and `nn.BatchNorm` with the initialiser, the types and the momentum of a network.

    >>> from jaxopt_lab.nets import VGG
    >>> dense, conv, norm = layers(VGG(momentum=0.8, param_dtype=jnp.bfloat16))
    >>> conv(3, (1, 1)).use_bias, norm().momentum, norm().use_running_average, dense(2).param_dtype.dtype
    (False, 0.8, True, dtype(bfloat16))
    """
    types = {"dtype": net.dtype, "param_dtype": net.param_dtype}
    options = {"kernel_init": net.kernel_init, **types}
    norm = partial(nn.BatchNorm, use_running_average=not train, momentum=net.momentum, **types)
    return partial(nn.Dense, **options), partial(nn.Conv, use_bias=False, **options), norm


def patches(x: Array, side: int) -> Array:
    """The patches of images `[B, H, W, C]`, or `[B, H, W]`, row by row: `[B, H W / side^2, side^2 C]`.

    Raises:
      ValueError: `side` does not divide the sides of the images.

    >>> patches(jnp.arange(8.0).reshape(1, 2, 4), 2).tolist()
    [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    if x.ndim == 3:
        x = x[..., None]
    batch, height, width, channels = x.shape
    if height % side or width % side:
        raise ValueError(f"patch={side} does not divide the sides of images of {height} x {width}; take another, or pad them")
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, side * side * channels)


def per_layer(name: str, value: Any, depth: int) -> tuple:
    """A field that is one value for all layers, or a sequence of one for each, as the latter.

    Raises:
      ValueError: a sequence has another length than there are layers.

    >>> per_layer("heads", 4, 3), per_layer("heads", (4, 2), 2)
    ((4, 4, 4), (4, 2))
    """
    if not isinstance(value, Sequence):
        return (value,) * depth
    if len(value) != depth:
        raise ValueError(f"{name} must be one number, or {depth} for depth={depth}; got {tuple(value)}")
    return tuple(value)


def of_layers(net: Any, *own: str, **same: Any) -> list[dict[str, Any]]:
    """The fields of each of a network's `depth` blocks: those of its own, as `per_layer` reads them, and those of all.

    >>> from jaxopt_lab.nets import Mixer
    >>> of_layers(Mixer(depth=2, mlp_width=(5, 4)), "patch_width", "mlp_width", train=False)
    [{'patch_width': 384, 'mlp_width': 5, 'train': False}, {'patch_width': 384, 'mlp_width': 4, 'train': False}]
    """
    values = {name: per_layer(name, getattr(net, name), net.depth) for name in own}
    return [{name: each[k] for name, each in values.items()} | same for k in range(net.depth)]


def repeated(
    kind: type[nn.Module],
    fields: Sequence[Mapping[str, Any]],
    x: Array,
    *args: Any,
    scan: bool = False,
    remat: bool = False,
) -> Array:
    """Blocks one behind the other, called inside a compact method: `block_0`, `block_1`, ..., or `blocks` under scan.

    Args:
      kind: of the blocks.
      fields: of each block.
      x: what the first takes; the others take what the one before puts out.
      args: what all take besides.
      scan: trace one block and loop over the layers: programs stay small and compile fast, and every parameter gets a leading
        axis of layers.
      remat: keep only what enters each block for the backward pass, and compute the rest again.

    Raises:
      ValueError: under scan, blocks that are not alike.

    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return repeated(nn.Dense, [{"features": 3}] * 2, x, scan=True)
    >>> jax.tree.map(jnp.shape, Net().init(jax.random.key(0), jnp.ones((1, 3)))["params"])
    {'blocks': {'bias': (2, 3), 'kernel': (2, 3, 3)}}
    """
    if remat:
        # A loop keeps the two passes apart by itself.
        kind = nn.remat(kind, prevent_cse=not scan)
    if not scan or not fields:
        for k, own in enumerate(fields):
            x = kind(**own, name=f"block_{k}")(x, *args)
        return x
    unlike = [name for name in fields[0] if any(own[name] != fields[0][name] for own in fields)]
    if unlike:
        raise ValueError(f"scan=True repeats one block, and {' and '.join(unlike)} differ between layers; take scan=False")
    loop = nn.scan(
        lambda block, x, *args: (block(x, *args), None),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=len(fields),
    )
    return loop(kind(**fields[0], name="blocks"), x, *args)[0]


def rotated(x: Array, base: float = 10_000.0) -> Array:
    r"""Pairs of features turned by an angle that grows with the position, so that products know distances.

    .. math:: (x_i, x_{i + d/2}) \mapsto (x_i \cos n\theta_i - x_{i + d/2} \sin n\theta_i,\;
              x_i \sin n\theta_i + x_{i + d/2} \cos n\theta_i), \qquad \theta_i = b^{-2i/d}

    at position :math:`n`, for :math:`i < d/2`.

    Args:
      x: `[B, N, ..., d]`, d even; the angles are computed in float32 at least.
      base: b.

    >>> rotated(jnp.array([[[1.0, 0.0], [1.0, 0.0]]])).round(3).tolist()
    [[[1.0, 0.0], [0.54..., 0.841...]]]

    Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021; the pairs are those of GPT-NeoX.
    """
    size, kind = x.shape[-1], wide(x).dtype
    frequency = base ** (-2 * jnp.arange(size // 2, dtype=kind) / size)
    angles = jnp.arange(x.shape[1], dtype=kind)[:, None] * frequency[None]
    angles = angles.reshape(1, x.shape[1], *(1,) * (x.ndim - 3), size // 2)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    one, two = jnp.split(wide(x), 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, one * sin + two * cos], axis=-1).astype(x.dtype)


def attention_weights(query: Array, key: Array, mask: Array | None = None) -> Array:
    r""":math:`\mathrm{softmax}(q k^\top / \sqrt d)` of each head, `[B, kv heads, queries of one, N, N]`, over the last axis.

    Args:
      query: `[B, N, kv heads, queries of one, d]`.
      key: `[B, N, kv heads, d]`.
      mask: `[B or 1, N or 1, N]`, False where none attends; a query that attends nowhere weighs all alike. The softmax is in
        float32 at least.

    >>> query, key = jnp.zeros((1, 2, 1, 1, 4)), jnp.zeros((1, 2, 1, 4))
    >>> attention_weights(query, key, jnp.tri(2, dtype=bool)[None]).tolist()
    [[[[[1.0, 0.0], [0.5, 0.5]]]]]
    """
    scores = wide(jnp.einsum("bqkgd,bskd->bkgqs", query, key) * query.shape[-1] ** -0.5)
    if mask is not None:
        # The lowest number, not minus infinity: where all is padding, the softmax is even and not NaN.
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores).astype(query.dtype)


class Block(nn.Module):
    """Attention and a perceptron, each added to what it saw: the block of a transformer, `(x, mask) -> x` of `[B, N, width]`.

    Attributes:
      heads: of the queries.
      mlp_width: the hidden width of the perceptron.
      dense: makes dense layers, `(width, name=...)`.
      norm: makes normalisations, `(name=...)`.
      train: whether entries are dropped.
      activation: an elementwise function.
      norm_first: a normalisation before the attention and the perceptron each, and not behind the sums.
      dropout: the probability that an entry of what is added is dropped.
      weights_dropout: that of an attention weight.
      hidden_dropout: that of a hidden entry of the perceptron.
      kv_heads: of the keys and values; each serves `heads / kv_heads` heads of queries; by default as many as there are heads.
      head_size: the length of one head; by default the heads share the width.
      fused: queries, keys and values from one dense layer, in this order.
      gated: the perceptron is :math:`W_o(\\sigma(W_g x) \\odot W_h x)`.
      rotary: the base of the angles by which queries and keys are turned, if they are.
      dense_out: makes the dense layers whose products are added to the state; by default `dense`.
    """

    heads: int
    mlp_width: int
    dense: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    train: bool
    activation: Callable[[Array], Array] = nn.gelu
    norm_first: bool = True
    dropout: float = 0.0
    weights_dropout: float = 0.0
    hidden_dropout: float = 0.0
    kv_heads: int | None = None
    head_size: int | None = None
    fused: bool = False
    gated: bool = False
    rotary: float | None = None
    dense_out: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        for name, branch in (("norm_attention", self._attended), ("norm_mlp", self._perceived)):
            norm = self.norm(name=name)
            x = x + self._dropped(branch(norm(x) if self.norm_first else x, mask), self.dropout)
            x = x if self.norm_first else norm(x)
        return x

    def _attended(self, x: Array, mask: Array | None) -> Array:
        shared, size = self._shared(x.shape[-1])
        counts = (self.heads, shared, shared)
        if self.fused:
            ends = (self.heads * size, (self.heads + shared) * size)
            parts = jnp.split(self.dense(sum(counts) * size, name="qkv")(x), ends, axis=-1)
        else:
            names = ("query", "key", "value")
            parts = [self.dense(count * size, name=name)(x) for name, count in zip(names, counts, strict=True)]
        query = parts[0].reshape(*x.shape[:-1], shared, self.heads // shared, size)
        key, value = (part.reshape(*x.shape[:-1], shared, size) for part in parts[1:])
        if self.rotary is not None:
            query, key = rotated(query, self.rotary), rotated(key, self.rotary)
        weights = self._dropped(attention_weights(query, key, mask), self.weights_dropout)
        y = jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(*x.shape[:-1], self.heads * size)
        return self._out(x.shape[-1], "out")(y)

    def _perceived(self, x: Array, mask: Array | None) -> Array:
        del mask
        hidden = self.dense(self.mlp_width, name="hidden")(x)
        y = self.activation(self.dense(self.mlp_width, name="gate")(x)) * hidden if self.gated else self.activation(hidden)
        return self._out(x.shape[-1], "mlp_out")(self._dropped(y, self.hidden_dropout))

    def _out(self, width: int, name: str) -> nn.Module:
        return (self.dense if self.dense_out is None else self.dense_out)(width, name=name)

    def _dropped(self, x: Array, rate: float) -> Array:
        return nn.Dropout(rate, deterministic=not self.train)(x) if rate else x

    def _shared(self, width: int) -> tuple[int, int]:
        """How many heads of keys there are, and the length of one."""
        shared = self.heads if self.kv_heads is None else self.kv_heads
        if self.heads % shared:
            raise ValueError(f"heads={self.heads} are not shared evenly by kv_heads={shared}")
        if self.head_size is None and width % self.heads:
            raise ValueError(f"width={width} is not shared evenly by heads={self.heads}")
        size = width // self.heads if self.head_size is None else self.head_size
        if self.rotary is not None and size % 2:
            raise ValueError(f"rotary turns pairs of features: the length of a head must be even; got {size}")
        return shared, size
