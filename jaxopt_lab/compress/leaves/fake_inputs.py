"""Weights whose inputs are rounded in training as they will be when integers multiply: the leaves, and what makes them."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jaxopt_lab.compress.arrays import affine, fake
from jaxopt_lab.compress.leaf import Leaf
from jaxopt_lab.compress.leaves.dense import Dense
from jaxopt_lab.compress.leaves.dynamic import DynamicQuantized, IntegerProduct, StaticQuantized, ends_of, fields_of, integral
from jaxopt_lab.compress.leaves.product import by_layer
from jaxopt_lab.compress.leaves.quantized import Quantized
from jaxopt_lab.compress.leaves.scaled import store
from jaxopt_lab.compress.leaves.transformed import ByChannel
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["PACT", "DynamicInputs", "FakeInputs", "LearnedInputs", "fake_quantize_inputs"]


class FakeInputs(ByChannel):
    r"""A weight of any form whose inputs act as the values that codes of a few bits could stand for.

    .. math:: x W \to \big(x + a \, (Q_b(x) - x)\big) \, W

    with the amount :math:`a` from 0 (off) to 1, where it is exactly :math:`Q_b(x)`. Products and convolutions round what they are
    given, and go on with the inner leaf's own rule; everything else sees the weight alone.

    Attributes:
      inner: the weight, which trains as it does by itself.
      amount: float32 of the rank of the weight, each side 1, but for axes along which layers are stacked; frozen.
      bits: of a code (static).
    """

    inner: Leaf
    amount: Array
    bits: int = eqx.field(static=True)

    latent: ClassVar[str | None] = "inner"
    vectors: ClassVar[tuple[str, ...]] = ("amount",)

    @classmethod
    def of(cls, inner: Leaf, amount: Array, bits: int, ends: tuple[Array, Array] | None) -> "FakeInputs":
        """The leaf of a weight, at the start of its training.

        Args:
          inner: the weight.
          amount: as the field.
          bits: of a code.
          ends: the lowest and the highest input, laid out like `amount`, known to be finite and in order; or None.
        """
        del ends
        return cls(inner, amount, bits)

    @abstractmethod
    def quantized(self, x: Array, summed: tuple[int, ...], **vectors: Array) -> Array:
        r""":math:`Q_b(x)` of an input in at least float32; arguments as in `bring`."""

    @abstractmethod
    def product(self, weight: Quantized) -> IntegerProduct:
        """The leaf that rounds its inputs to integers as this one does at the amount 1, and multiplies by integer weights."""

    def materialise(self) -> Array:
        return self.inner.materialise()

    def bring(self, x, axes, summed, *, amount, **vectors):
        values = wide(x)
        rounded = self.quantized(values, summed, **vectors)
        return jnp.where(amount >= 1, rounded, values + amount * (rounded - values)).astype(x.dtype)

    def dot_general(self, x, *, dimension_numbers, **params):
        (_, contract), (_, batch) = dimension_numbers
        layers = [a for a, n in enumerate(self.amount.shape) if n > 1 and a not in (*contract, *batch)]
        if not layers or params.get("out_sharding") is not None:
            return super().dot_general(x, dimension_numbers=dimension_numbers, **params)
        run = super().dot_general
        # Stacked layers that meet the same inputs round them each in its own way.
        return by_layer(layers, self.shape, x, dimension_numbers, lambda x, numbers: run(x, dimension_numbers=numbers, **params))

    def freeze(self):
        inner = self.inner.freeze()
        if isinstance(inner, Quantized) and integral(inner) is None:
            return self.product(inner)
        return dataclasses.replace(self, inner=inner, amount=jnp.ones_like(self.amount))

    def annealed(self, amount: Any, bits: Any, count: Array) -> dict[str, Array]:
        """The frozen fields of the step numbered `count`: the amount that is given. `bits` are those of the weight alone."""
        del bits, count
        return {} if amount is None else {"amount": jnp.broadcast_to(jnp.asarray(amount, jnp.float32), self.amount.shape)}

    def format(self) -> str:
        return f"{self.inner.format()}, inputs {self.bits} bits by {type(self).__name__}"


class DynamicInputs(FakeInputs):
    r"""Each row of the inputs is rounded by its own largest value; the gradient passes straight through.

    .. math:: Q_b(x) = s \, \lfloor x / s \rceil, \qquad s = \max |x| / (2^{b-1} - 1)

    over what is summed: a row is what a product sums over, or an example of a convolution. Frozen, it is `DynamicQuantized`.

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """

    def quantized(self, x, summed, **vectors):
        rows = tuple(a for a in range(x.ndim) if a not in summed)
        scale = affine.choose_scale(lax.stop_gradient(x), rows, bits=self.bits)
        return fake.straight_through_codes(x, scale, 2 ** (self.bits - 1) - 1)

    def product(self, weight):
        return DynamicQuantized(**fields_of(weight), input_bits=self.bits)

    def _convolved(self, x, dimension_numbers, grouped):
        batch = dimension_numbers.lhs_spec[0]
        summed = tuple(a for a in range(x.ndim) if a != batch)
        return self.bring(x, {}, summed, amount=self.amount.reshape((1,) * x.ndim)) if self.amount.size == 1 else NotImplemented


class _Ranged(FakeInputs):
    """The inputs are rounded in one range, which trains."""

    signed: eqx.AbstractVar[bool]

    @abstractmethod
    def unit(self) -> Array:
        """The distance of two values that codes stand for, laid out like `amount`."""

    def product(self, weight):
        step = self.unit()
        zero = None if self.signed else jnp.full(step.shape, -(2 ** (self.bits - 1)), jnp.int8)
        return StaticQuantized(**fields_of(weight), input_scale=step, input_zero=zero, input_bits=self.bits)

    def _convolved(self, x, dimension_numbers, grouped):
        # One range for all channels, so that groups of them are no matter.
        return super()._convolved(x, dimension_numbers, grouped=False)


class LearnedInputs(_Ranged):
    r"""The inputs are rounded in equal steps, and the step is trained beside the weights (see `arrays.fake.learned_step`).

    Frozen, it is `StaticQuantized`.

    Attributes:
      step: of the layout of `amount`; trained, never decayed. Its sign does not matter.
      signed: whether codes reach from :math:`-2^{b-1} + 1` to :math:`2^{b-1} - 1`, or from 0 to :math:`2^b - 1` (static).

    Source: Esser et al., "Learned step size quantization", 2020.
    """

    step: Array
    signed: bool = eqx.field(static=True)

    trains: ClassVar[tuple[str, ...]] = ("inner", "step")
    vectors: ClassVar[tuple[str, ...]] = ("amount", "step")

    @classmethod
    def of(cls, inner, amount, bits, ends):
        low, high = _needed(cls, ends)
        signed = bool((low < 0).any())
        step = jnp.maximum(jnp.abs(low), jnp.abs(high)) / _range(bits, signed)[1]
        return cls(inner, amount, bits, jnp.where(step > 0, step, 1), signed)

    def quantized(self, x, summed, *, step):
        low, high = _range(self.bits, self.signed)
        return fake.learned_step(x, step, high, low, count=max(x[:1].size, 1))

    def unit(self):
        return jnp.abs(self.step)


class PACT(_Ranged):
    r"""The inputs are clipped to [0, ceiling] and rounded, and the ceiling is trained (see `arrays.fake.pact`).

    What is negative becomes 0: it is for inputs that have none, as after a rectifier. The paper decays the ceiling; here a penalty
    of one's own would. Frozen, it is `StaticQuantized`.

    Attributes:
      ceiling: positive, of the layout of `amount`; trained.

    Source: Choi et al., "PACT: parameterized clipping activation for quantized neural networks", 2018.
    """

    ceiling: Array

    trains: ClassVar[tuple[str, ...]] = ("inner", "ceiling")
    vectors: ClassVar[tuple[str, ...]] = ("amount", "ceiling")
    signed: ClassVar[bool] = False

    @classmethod
    def of(cls, inner, amount, bits, ends):
        low, high = _needed(cls, ends)
        if bool((low < 0).any()):
            raise ValueError(f"PACT cuts off what is negative, and inputs reach down to {float(low.min()):g}; use LearnedInputs")
        return cls(inner, amount, bits, jnp.where(high > 0, high, 1))

    def quantized(self, x, summed, *, ceiling):
        return fake.pact(x, ceiling, self.bits)

    def unit(self):
        return self.ceiling / (2**self.bits - 1)


def fake_quantize_inputs(
    params: PyTree,
    bits: int = 8,
    where: Where = "**/kernel",
    *,
    leaf: type[FakeInputs] = DynamicInputs,
    ranges: Mapping[str, tuple[Any, Any]] | None = None,
    amount: float = 1.0,
) -> PyTree:
    r"""Lets the chosen weights train with inputs as if those were codes of a few bits; `freeze` then stores integer products.

    The weights themselves stay what they are: dense ones, those of `fake_quantize`, or any other leaf. Frozen with weights that
    `fake_quantize` rounds to nearest with one scale a channel, both sides are integers (`DynamicQuantized`, `StaticQuantized`);
    with others the inputs go on being rounded in floating point.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      bits: 2 to 8, of the inputs.
      where: which leaves (see `tree.select`).
      leaf: how inputs are rounded, and what trains: `DynamicInputs`, `LearnedInputs` or `PACT`.
      ranges: by path, the lowest and the highest input at the start, as `calibrate` gives them: `{path: (low, high)}`. All but
        `DynamicInputs` need them.
      amount: from 0 (off) to 1, where training starts; `compress.anneal` moves it on a schedule.

    Returns:
      `params` with `FakeInputs` leaves.

    Raises:
      ValueError: bits or amount out of range, a chosen path has no range or one that is not finite and in order, `PACT` for inputs
        below 0, or nothing matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or rounds its inputs already.

    >>> from jaxopt_lab.compress.lift import lift
    >>> params = fake_quantize_inputs({"kernel": jnp.array([[1.0], [10.0]])}, bits=2, where="kernel")
    >>> lift(lambda params, x: x @ params["kernel"])(params, jnp.array([[4.0, 1.0], [0.0, 0.5]]))
    Array([[4.],
           [5.]], dtype=float32)

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits}: inputs are rounded to 2 to 8 bits")
    if not 0 <= amount <= 1:
        raise ValueError(f"amount={amount} must lie in [0, 1]: 0 leaves the inputs as they are, 1 rounds them")

    def made(weight: Any, path: str) -> FakeInputs:
        if isinstance(weight, (FakeInputs, IntegerProduct)):
            raise TypeError(f"it is stored as {type(weight).__name__}, which rounds its inputs already; leave it out of `where`")
        inner = weight if isinstance(weight, Leaf) else Dense(weight)
        ends = None if ranges is None else ends_of(ranges, path, inner.aval().shape, jnp.float32)
        sides = (1,) * len(inner.aval().shape) if ends is None else ends[0].shape
        return leaf.of(inner, jnp.full(sides, amount, jnp.float32), bits, ends)

    return store(params, where, made, accept=Leaf)


def _range(bits: int, signed: bool) -> tuple[int, int]:
    """The least and the largest code, in steps."""
    return affine.code_range(bits) if signed else (0, 2**bits - 1)


def _needed(leaf: type[FakeInputs], ends: tuple[Array, Array] | None) -> tuple[Array, Array]:
    if ends is None:
        raise ValueError(f"{leaf.__name__} starts from a range of the inputs; give ranges=calibrate(apply, params, batches)")
    if any(isinstance(end, Tracer) for end in ends):
        raise ValueError(f"{leaf.__name__} reads the range of the inputs, and it is traced: call fake_quantize_inputs outside jit")
    return ends
