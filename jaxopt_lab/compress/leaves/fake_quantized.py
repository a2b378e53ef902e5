"""Weights that train as if they were stored in few bits: the leaves, `fake_quantize`, which puts them into a tree, and `freeze`."""

import dataclasses
import zlib
from abc import abstractmethod
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxopt_lab.compress.arrays import affine, fake, packing
from jaxopt_lab.compress.leaf import Leaf, checked
from jaxopt_lab.compress.leaves.clustered import Clustered
from jaxopt_lab.compress.leaves.quantized import Quantized
from jaxopt_lab.core import tree
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["DoReFa", "FakeQuantized", "LearnedStep", "StraightThrough", "fake_quantize", "freeze"]


class FakeQuantized(Leaf):
    r"""A latent weight that acts as the values that `bits` bits could stand for; the gradient reaches the latent weight.

    .. math:: \hat w = w + a \, (Q_b(w) - w)

    with the amount :math:`a` from 0 (off) to 1, where it is exactly :math:`Q_b(w)`. Bits and amount are arrays, so a schedule
    changes them without a new compilation (`compress.anneal`).

    Attributes:
      w: the latent weight; it trains, decays, and is what penalties and `sparsify` act on.
      bits: float32 `[]`, a whole number; frozen.
      amount: float32 `[]`; frozen.
      seed: uint32 `[2]`, the data of the key that rounds at random, or None: to nearest; frozen.
      axis: the axes whose every index has its own scale, counted from the end (static).
    """

    w: Array
    bits: Array
    amount: Array
    seed: Array | None
    axis: tuple[int, ...] = eqx.field(static=True)

    trains: ClassVar[tuple[str, ...]] = ("w",)
    latent: ClassVar[str | None] = "w"
    fewest: ClassVar[int] = 2
    by_channel: ClassVar[bool] = True

    @classmethod
    def of(cls, w: Array, bits: Array, amount: Array, seed: Array | None, axis: tuple[int, ...]) -> "FakeQuantized":
        """The leaf of a weight, at the start of its training."""
        return cls(w, bits, amount, seed, axis)

    @abstractmethod
    def quantized(self) -> Array:
        r""":math:`Q_b(w)`, in at least float32."""

    def aval(self):
        return jax.typeof(self.w)

    def stepwise(self, length):
        # What the layers share, be it a scale or draws, no step would know alone.
        if -self.w.ndim not in self.axis or self.seed is not None or not self.by_channel:
            return NotImplemented
        bits, amount = (jnp.broadcast_to(field, (length,)) for field in (self.bits, self.amount))
        return dataclasses.replace(self, bits=bits, amount=amount)

    def materialise(self) -> Array:
        w, quantized = wide(self.w), self.quantized()
        return jnp.where(self.amount >= 1, quantized, w + self.amount * (quantized - w)).astype(self.w.dtype)

    def format(self) -> str:
        bits = "" if isinstance(self.bits, Tracer) else f", {float(jnp.mean(self.bits)):g} bits"
        return f"{type(self).__name__} of {self.w.dtype}{bits}"

    def annealed(self, amount: Any, bits: Any, count: Array) -> dict[str, Array]:
        """The frozen fields of the step numbered `count`: the amount and the bits that are given, and a key of its own."""
        fields = {}
        if amount is not None:
            fields["amount"] = jnp.broadcast_to(jnp.asarray(amount, jnp.float32), self.amount.shape)
        if bits is not None:
            fields["bits"] = jnp.broadcast_to(jnp.maximum(jnp.round(jnp.asarray(bits, jnp.float32)), self.fewest), self.bits.shape)
        if self.key is not None:
            fields["seed"] = jax.random.key_data(jax.random.fold_in(self.key, count))
        return fields

    @property
    def high(self) -> Array:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def key(self) -> Array | None:
        """The key that rounds at random."""
        return None if self.seed is None else jax.random.wrap_key_data(self.seed)

    @property
    def shared(self) -> tuple[int, ...]:
        """The axes along which weights share a scale."""
        return tuple(a for a in range(self.w.ndim) if a - self.w.ndim not in self.axis)


class StraightThrough(FakeQuantized):
    """The scale follows the largest weight of each channel; the gradient passes straight through.

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """

    @property
    def scale(self) -> Array:
        """The scale of each channel, as `quantize` would choose it."""
        # One layer of a stack has no axis of layers.
        channels = tuple(a for a in self.axis if a >= -self.w.ndim)
        return affine.choose_scale(jax.lax.stop_gradient(self.w), channels, largest=self.high)

    def quantized(self) -> Array:
        return fake.straight_through_codes(self.w, self.scale, self.high, key=self.key)

    def freeze(self) -> Quantized:
        return _stored(self, self.scale)


class LearnedStep(FakeQuantized):
    """The step of each channel is trained beside the weights.

    Attributes:
      step: of the rank of `w`, with length 1 along the axes that share it; trained, never decayed. Its sign does not matter.

    Source: Esser et al., "Learned step size quantization", 2020.
    """

    step: Array

    trains: ClassVar[tuple[str, ...]] = ("w", "step")

    @classmethod
    def of(cls, w: Array, bits: Array, amount: Array, seed: Array | None, axis: tuple[int, ...]) -> "LearnedStep":
        shared = tuple(a for a in range(w.ndim) if a - w.ndim not in axis)
        return cls(w, bits, amount, seed, axis, fake.learned_step_start(w, shared, 2 ** (bits - 1) - 1))

    def quantized(self) -> Array:
        return fake.learned_step(self.w, self.step, self.high)

    def freeze(self) -> Quantized:
        return _stored(self, jnp.abs(self.step))


class DoReFa(FakeQuantized):
    """Weights squashed into [-1, 1] and rounded to equally spaced values, of which none is 0: what is sparse does not stay sparse.

    There is one scale in all, 1, whatever `axis` says. Stored as a codebook of those values.

    Source: Zhou et al., "DoReFa-Net: training low bitwidth convolutional neural networks with low bitwidth gradients", 2016.
    """

    fewest: ClassVar[int] = 1
    by_channel: ClassVar[bool] = False

    def quantized(self) -> Array:
        return fake.dorefa(self.w, self.bits)

    def freeze(self) -> Clustered:
        bits = _bits(self)
        steps = 2**bits - 1
        indices = jnp.round((self.quantized() + 1) * (steps / 2)).astype(jnp.uint8)
        packed = indices if bits == 8 else packing.pack(indices, bits, packing.packing_axis(indices.shape, bits))
        codebook = 2 * jnp.arange(steps + 1, dtype=jnp.float32) / steps - 1
        return Clustered(codebook.reshape((1,) * self.w.ndim + (-1,)), packed, dense_dtype=self.w.dtype)


def fake_quantize(
    params: PyTree,
    bits: int = 8,
    axis: int | tuple[int, ...] | None = -1,
    where: Where = "**/kernel",
    *,
    leaf: type[FakeQuantized] = StraightThrough,
    amount: float = 1.0,
    key: Array | None = None,
) -> PyTree:
    r"""Lets the chosen weights train as if they were stored in few bits; `freeze` then stores them so.

    Train the result as any tree: `make_step` sees the leaves; in a loop of one's own, call the model through `lift`, differentiate
    with `allow_int=True` and wrap the optimiser in `compress.optimizer`. A weight that is 0 stays 0, so what `sparsify` cuts in the
    latent weights is cut in the stored ones. Weights that share values (`cluster`) go on sharing them: it is their codebooks that
    are rounded, each in a scale of its own whatever `axis` says, and that train.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      bits: 2 to 8 (`DoReFa` goes down to 1).
      axis: the axis (or axes) along which every index has its own scale, as in `quantize`; None is one scale a tensor.
      where: which leaves (see `tree.select`).
      leaf: how weights are rounded and what gradient they get: `StraightThrough`, `LearnedStep` or `DoReFa`.
      amount: from 0 (off) to 1, where training starts; `compress.anneal` moves it on a schedule.
      key: a typed PRNG key: round at random instead of to nearest (with `StraightThrough`). The draws are fixed until
        `compress.anneal`, which draws anew at every update.

    Returns:
      `params` with `FakeQuantized` leaves.

    Raises:
      ValueError: bits, amount or an axis out of range, weights that are not finite, a key that the leaf has no use for, or nothing
        matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already otherwise than by `cluster`.

    >>> params = fake_quantize({"kernel": jnp.array([[0.3], [-1.4], [3.0]])}, bits=3, where="kernel")
    >>> params["kernel"].materialise().tolist(), params["kernel"].w.shape
    ([[0.0], [-1.0], [3.0]], (3, 1))

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """
    if bits not in range(leaf.fewest, 9):
        raise ValueError(f"bits={bits}: {leaf.__name__} trains weights of {leaf.fewest} to 8 bits")
    if not 0 <= amount <= 1:
        raise ValueError(f"amount={amount} must lie in [0, 1]: 0 leaves the weights as they are, 1 rounds them")
    if key is not None and leaf is not StraightThrough:
        raise ValueError(f"key: {leaf.__name__} rounds to nearest; drop the key, or use leaf=StraightThrough")
    seeds = {} if key is None else _seeds(key, tree.selected(params, where))

    def rounded(path: str, w: Array, axis: int | tuple[int, ...] | None) -> FakeQuantized:
        channels = tuple(a - w.ndim for a in affine.channel_axes(axis, w.ndim))
        return leaf.of(w, jnp.float32(bits), jnp.float32(amount), seeds.get(path), channels)

    def made(path: str, weight: Any) -> Leaf:
        if isinstance(weight, Clustered) and not isinstance(weight.codebook, Leaf):
            values = weight.codebook
            return dataclasses.replace(weight, codebook=rounded(path, values, tuple(range(values.ndim - 1))))
        return rounded(path, checked(weight, path), axis)

    names, leaves, treedef = tree.flatten(params)
    flags = jax.tree.leaves(tree.select(params, where))
    rows = zip(names, leaves, flags, strict=True)
    return jax.tree.unflatten(treedef, [made(name, x) if flag else x for name, x, flag in rows])


def freeze(params: PyTree) -> PyTree:
    """Stores what was trained: each `FakeQuantized` leaf becomes the leaf of codes that it acted as, and `FakeInputs` around one
    a leaf that multiplies integers; codebooks keep the values that they were rounded to. Others stay.

    The stored weights are those that the leaf at the amount 1 showed to the model, to one rounding of their own dtype.

    Raises:
      ValueError: a leaf's bits are traced: how many bits a code takes must be known. Call it outside of `jit`.

    >>> params = fake_quantize({"kernel": jnp.array([[0.3], [-1.4], [3.0]])}, bits=3, where="kernel")
    >>> freeze(params)["kernel"].materialise().tolist()
    [[0.0], [-1.0], [3.0]]
    """
    return jax.tree.map(lambda leaf: leaf.freeze() if isinstance(leaf, Leaf) else leaf, params, is_leaf=tree.is_compressed)


def _stored(leaf: FakeQuantized, scale: Array) -> Quantized:
    bits = _bits(leaf)
    return Quantized.of(affine.to_codes(leaf.w, scale, bits=bits), scale, bits=bits, dense_dtype=leaf.w.dtype)


def _bits(leaf: FakeQuantized) -> int:
    """The bits of a leaf, which must be known."""
    if isinstance(leaf.bits, Tracer):
        raise ValueError(
            f"freeze needs to know how many bits a code takes, and those of {leaf.format()} are traced: call it outside of jit"
        )
    return int(leaf.bits)


def _seeds(key: Array, chosen: dict[str, Any]) -> dict[str, Array]:
    return {path: jax.random.key_data(jax.random.fold_in(key, zlib.crc32(path.encode()))) for path in chosen}
