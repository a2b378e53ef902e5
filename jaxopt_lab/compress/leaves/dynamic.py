"""Products of integers with integers: leaves that also round what they are multiplied by, and what puts them into a tree."""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jaxopt_lab.compress.arrays import affine
from jaxopt_lab.compress.leaves.product import Product, at_once, by_layer, own_axes, with_gradient_of
from jaxopt_lab.compress.leaves.quantized import Quantized
from jaxopt_lab.compress.leaves.scaled import store
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["DynamicQuantized", "IntegerProduct", "StaticQuantized", "dynamic", "static"]


class IntegerProduct(Quantized):
    r"""The base of integer weights whose products and convolutions run on integers from end to end.

    .. math:: x w \approx s_x s_w \sum (q_x - z_x) \, q_w

    The activations are rounded to `input_bits` bits, the sum is exact in int32, and the scales follow. The gradient passes the
    rounding by: it is that of the product with the dense weight, so that earlier layers train. Codes are symmetric; a product over
    an axis that carries scales cannot run so, and runs as that of a `Quantized` weight. So does all else.

    Attributes:
      input_bits: of a code of the activations, 2 to 8 (static).
    """

    input_bits: int = eqx.field(static=True, kw_only=True, default=8)

    @abstractmethod
    def rounding(self, x: Array, rows: tuple[int, ...], batch: tuple[int, ...]) -> tuple[Array, Array | None]:
        """The scale and the zero point (or None) of the activations, of their rank.

        Args:
          x: the activations, in at least float32.
          rows: the axes of `x` whose every index is rounded by itself; the others are summed over.
          batch: the axes of the weight that the first axes of `x` belong to.
        """

    def kept(self, x: Array, scale: Array, zero_point: Array | None) -> Array:
        """The activations, without a gradient where their rounding shall have none."""
        return x

    def fits(self, batch: tuple[int, ...]) -> bool:
        """Whether a product with these axes of the weight as batch axes can be rounded."""
        return True

    def __check_init__(self):
        if self.zero_point is not None:
            raise ValueError(f"{type(self).__name__} needs symmetric codes: the weight's zero point has no place in its products")

    def product(self, x, dimension_numbers, precision, dtype, **params):
        (summed, contract), (shared, batch) = dimension_numbers
        integral = all(self.scale.shape[a] == 1 for a in contract) and self.fits(tuple(batch))
        if not integral or params.get("out_sharding") is not None:
            return super().product(x, dimension_numbers, precision, dtype, **params)
        dtype = dtype or jnp.promote_types(x.dtype, self.dense_dtype)
        wide = jnp.promote_types(jnp.promote_types(x.dtype, self.dense_dtype), self.scale.dtype)
        # Batch axes, rows, and what is summed over; out come batch axes, rows, and the weight's own.
        free = [a for a in range(x.ndim) if a not in (*summed, *shared)]
        outer, inner = [x.shape[a] for a in (*shared, *free)], [x.shape[a] for a in summed]
        batches, row = tuple(range(len(batch))), len(batch)
        rows = lax.transpose(x, (*shared, *free, *summed)).astype(wide)
        rows = rows.reshape(*outer[:row], math.prod(outer[row:]), *inner)
        numbers = ((tuple(range(row + 1, rows.ndim)), contract), (batches, batch))

        def integer(x: Array, leaf: Any) -> Array:
            multiply = functools.partial(lax.dot_general, dimension_numbers=numbers, preferred_element_type=jnp.int32)
            # On a CPU one row takes 20 times as long as two.
            out, x_scale = _integers(x, leaf, (*batches, row), batch, multiply, row, row, alone=x.shape[row] == 1)
            own = own_axes(leaf.ndim, dimension_numbers)
            scale = lax.transpose(leaf.scale, (*batch, *own, *contract))
            scale = scale.reshape(*scale.shape[:row], 1, *scale.shape[row : row + len(own)])
            return out.astype(wide) * x_scale * scale

        rows = self.kept(rows, *self.rounding(rows, (*batches, row), tuple(batch)))
        how = Product(numbers, True, precision, wide)
        out = with_gradient_of(functools.partial(at_once, how), integer, rows, self)
        return out.reshape(*outer, *out.shape[row + 1 :]).astype(dtype)

    def conv_general_dilated(self, x, *, dimension_numbers, **params):
        before, after = dimension_numbers.lhs_spec[0], dimension_numbers.out_spec[0]
        convolve = functools.partial(lax.conv_general_dilated_p.bind, dimension_numbers=dimension_numbers, **params)
        integral = not self.swapped and self.scaled_by(dimension_numbers.rhs_spec[0]) and self.fits(())
        if not integral or params["batch_group_count"] != 1:
            return super().conv_general_dilated(x, dimension_numbers=dimension_numbers, **params)

        def dense(x: Array, leaf: Any) -> Array:
            return convolve(x, leaf.materialise())

        like = jax.eval_shape(dense, x, self)
        wide = jnp.promote_types(x.dtype, self.scale.dtype)

        def integer(x: Array, leaf: Any) -> Array:
            multiply = functools.partial(convolve, preferred_element_type=jnp.dtype(jnp.int32))
            out, x_scale = _integers(x.astype(wide), leaf, (before,), (), multiply, before, after)
            return (out.astype(wide) * x_scale * leaf.along(dimension_numbers.out_spec[1], out.ndim)).astype(like.dtype)

        kept = self.kept(x, *self.rounding(x.astype(wide), (before,), ()))
        return with_gradient_of(dense, integer, kept, self)


class DynamicQuantized(IntegerProduct):
    r"""A weight of integer codes, and activations rounded as they come: each row by its own largest.

    .. math:: x w \approx s_x s_w \sum q_x q_w, \qquad s_x = \max |x| / (2^{b-1} - 1)

    over what is summed: a row is what a product sums over, or an example of a convolution. Fields as in `Quantized`, and
    `input_bits`.

    >>> w = DynamicQuantized(jnp.array([[2], [-4]], jnp.int8), jnp.array([[0.5]]))
    >>> numbers = {"dimension_numbers": (((1,), (0,)), ((), ())), "precision": None, "preferred_element_type": None}
    >>> w.dot_general(jnp.array([[1.27, 0.004], [0.0, 127.0]]), **numbers)
    Array([[   1.27],
           [-254.  ]], dtype=float32)
    """

    def rounding(self, x, rows, batch):
        return affine.choose_scale(lax.stop_gradient(x), rows, bits=self.input_bits), None

    def format(self) -> str:
        return f"{super().format()}, inputs int{self.input_bits} by row"


class StaticQuantized(IntegerProduct):
    r"""A weight of integer codes, and activations rounded in a range that is fixed beforehand.

    .. math:: x w \approx s_x s_w \sum (q_x - z_x) \, q_w, \qquad q_x = \mathrm{clip}(\mathrm{round}(x / s_x) + z_x)

    The activations need no look at their range. Those outside of it are cut off, and have no gradient. The fields are those of
    `Quantized`, and two more.

    Attributes:
      input_scale: of the activations, of the rank of the weight; each side is 1, but for axes along which layers are stacked.
      input_zero: int8 of the shape of `input_scale`, or None.

    >>> w = StaticQuantized(jnp.array([[2], [-4]], jnp.int8), jnp.array([[0.5]]), input_scale=jnp.array([[0.5]]))
    >>> numbers = {"dimension_numbers": (((1,), (0,)), ((), ())), "precision": None, "preferred_element_type": None}
    >>> w.dot_general(jnp.array([[1.2, 0.0], [0.0, 127.0]]), **numbers)
    Array([[   1.],
           [-127.]], dtype=float32)
    """

    input_scale: Array = eqx.field(kw_only=True)
    input_zero: Array | None = eqx.field(kw_only=True, default=None)

    scales: ClassVar[tuple[str, ...]] = ("scale", "zero_point", "input_scale", "input_zero")

    def fits(self, batch):
        return all(n == 1 for a, n in enumerate(self.input_scale.shape) if a not in batch)

    def product(self, x, dimension_numbers, precision, dtype, **params):
        (_, contract), (_, batch) = dimension_numbers
        layers = [a for a, n in enumerate(self.input_scale.shape) if n > 1 and a not in (*contract, *batch)]
        run = super().product
        if not layers or params.get("out_sharding") is not None:
            return run(x, dimension_numbers, precision, dtype, **params)
        # Stacked layers that meet the same activations round them each in its own range.
        return by_layer(
            layers, self.codes.shape, x, dimension_numbers, lambda x, numbers: run(x, numbers, precision, dtype, **params)
        )

    def rounding(self, x, rows, batch):
        def laid(field: Array) -> Array:
            others = [a for a in range(field.ndim) if a not in batch]
            sides = [field.shape[a] for a in batch]
            return lax.transpose(field, (*batch, *others)).reshape(*sides, *(1 for _ in range(x.ndim - len(sides))))

        return laid(self.input_scale), None if self.input_zero is None else laid(self.input_zero)

    def kept(self, x, scale, zero_point):
        low, high = affine.code_range(self.input_bits, symmetric=zero_point is None)
        zero = 0 if zero_point is None else zero_point.astype(scale.dtype)
        # Half a step beyond the last code still rounds to it.
        inside = (x >= (low - zero - 0.5) * scale) & (x <= (high - zero + 0.5) * scale)
        return jnp.where(inside, x, lax.stop_gradient(x))

    def format(self) -> str:
        return f"{super().format()}, inputs int{self.input_bits} in a fixed range"


def dynamic(params: PyTree, where: Where = "**/kernel", *, axis: int | tuple[int, ...] | None = -1, input_bits: int = 8) -> PyTree:
    """Lets the chosen weights multiply in int8: their inputs are rounded as they come, each row by its own largest.

    Floating-point weights are stored in int8 first; `Quantized` ones keep their codes. Two-dimensional ones whose outputs come last
    are stored with the summed axis last (`swapped`), in which order integer products on a CPU are two to five times as fast.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      where: which leaves (see `tree.select`).
      axis: of weights that are not stored yet, the axis (or axes) whose every index has its own scale, as in `quantize`; it should
        not be one that products sum over.
      input_bits: of a code of the inputs, 2 to 8; fewer than 8 are no faster.

    Returns:
      `params` with `DynamicQuantized` leaves.

    Raises:
      ValueError: `input_bits` is out of range, a stored weight has a zero point or groups, one that is not has an axis out of range
        or is not finite, or nothing matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed otherwise.

    >>> dynamic({"kernel": jnp.array([[1.0, 0.5], [-2.0, 4.0]])}, "kernel")["kernel"].signed_codes()
    Array([[  64,   16],
           [-127,  127]], dtype=int8)

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018;
    ranges found at run time: Dettmers et al., "LLM.int8()", 2022.
    """
    return _replaced(params, where, axis, input_bits, lambda weight, path: DynamicQuantized(**weight))


def static(
    params: PyTree,
    ranges: Mapping[str, tuple[Any, Any]],
    where: Where = "**/kernel",
    *,
    axis: int | tuple[int, ...] | None = -1,
    symmetric: bool = False,
    input_bits: int = 8,
) -> PyTree:
    r"""Lets the chosen weights multiply in int8: their inputs are rounded in ranges that calibration found.

    .. math:: s_x = \frac{h - l}{2^b - 1}, \; z_x = \mathrm{round}(-2^{b-1} - l / s_x) \quad \text{or} \quad
              s_x = \frac{\max(|l|, |h|)}{2^{b-1} - 1}

    with the range from :math:`l = \min(low, 0)` to :math:`h = \max(high, 0)`.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      ranges: by the path of the weight, the lowest and the highest input that it meets: `{path: (low, high)}`. Paths that are not
        chosen may be among them. The ends of weights stacked along leading axes may be arrays over those.
      where: which leaves (see `tree.select`).
      axis: as in `dynamic`.
      symmetric: without a zero point: cheaper by one row, and coarser where inputs have one sign, as after a ReLU.
      input_bits: :math:`b`, of a code of the inputs, 2 to 8; fewer than 8 are no faster.

    Returns:
      `params` with `StaticQuantized` leaves; floating-point and `Quantized` weights are taken as by `dynamic`.

    Raises:
      ValueError: a chosen path has no range, a range is empty or not finite, and what `dynamic` raises.
      TypeError: as `dynamic` does.

    >>> leaf = static({"kernel": jnp.ones((2, 2))}, {"kernel": (0.0, 5.1)}, "kernel")["kernel"]
    >>> leaf.input_scale, leaf.input_zero
    (Array([[0.02]], dtype=float32), Array([[-128]], dtype=int8))

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """

    def made(weight: dict[str, Any], path: str) -> StaticQuantized:
        scale = weight["scale"]
        low, high = ends_of(ranges, path, weight["codes"].shape, scale.dtype)
        ends, each = jnp.stack([low, high], axis=-1), tuple(range(low.ndim))
        step, zero = (
            (affine.choose_scale(ends, each, bits=input_bits), None)
            if symmetric
            else affine.choose_scale_and_zero(ends, each, bits=input_bits)
        )
        return StaticQuantized(**weight, input_scale=step[..., 0], input_zero=None if zero is None else zero[..., 0])

    return _replaced(params, where, axis, input_bits, made)


def ends_of(ranges: Mapping[str, tuple[Any, Any]], path: str, shape: Sequence[int], dtype: Any) -> tuple[Array, Array]:
    """The ends of the range of a weight's inputs, of its rank: each side 1, but for those of stacked layers.

    >>> [end.tolist() for end in ends_of({"kernel": (jnp.array([0.0, -1.0]), 2.0)}, "kernel", (2, 3, 4), jnp.float32)]
    [[[[0.0]], [[-1.0]]], [[[2.0]], [[2.0]]]]

    Raises:
      ValueError: there is none, or it is not finite or not in order, or does not fit.
    """
    if path not in ranges:
        raise ValueError("ranges has no entry for it; calibrate it, or leave it out of `where`")
    low, high = jnp.broadcast_arrays(*(jnp.asarray(end, dtype) for end in ranges[path]))
    known = not isinstance(low, Tracer) and not isinstance(high, Tracer)
    sound = known and bool((jnp.isfinite(low) & jnp.isfinite(high) & (low <= high)).all())
    if low.shape != tuple(shape[: low.ndim]) or low.ndim >= max(len(shape), 1) or (known and not sound):
        raise ValueError(
            f"ranges gives {ranges[path]}; a range is two finite numbers, (low, high), or arrays of them along stacked layers"
        )
    sides = (*low.shape, *(1,) * (len(shape) - low.ndim))
    return low.reshape(sides), high.reshape(sides)


def integral(leaf: Quantized) -> str | None:
    """Why a stored weight cannot be multiplied as integers; None where it can.

    >>> integral(Quantized.from_weight(jnp.ones((4, 2)), group=2))
    'it has groups, whose scales cannot follow a sum of integers; quantize it without'
    """
    if leaf.zero_point is not None:
        return "it has a zero point, which has no place in a product of integers; quantize it with symmetric=True"
    if any(1 < m < n for m, n in zip(leaf.scale.shape, leaf.codes.shape, strict=True)):
        return "it has groups, whose scales cannot follow a sum of integers; quantize it without"
    return None


def _replaced(
    params: PyTree, where: Where, axis: Any, input_bits: int, make: Callable[[dict[str, Any], str], IntegerProduct]
) -> PyTree:
    if input_bits not in range(2, 9):
        raise ValueError(f"input_bits={input_bits}: activations are rounded to 2 to 8 bits")

    def made(weight: Any, path: str) -> IntegerProduct:
        leaf = weight if isinstance(weight, Quantized) else Quantized.from_weight(weight, axis=axis)
        if why := integral(leaf):
            raise ValueError(why)
        return make(fields_of(leaf) | {"input_bits": input_bits}, path)

    return store(params, where, made, accept=Quantized)


def fields_of(leaf: Quantized) -> dict[str, Any]:
    """The fields of a stored weight in the order in which integers are multiplied best: that of a matrix with the outputs first.

    >>> fields_of(Quantized.from_weight(jnp.ones((4, 2))))["codes"].shape
    (2, 4)
    """
    if leaf.ndim == 2 and leaf.scale.shape[0] == 1 and not leaf.swapped:
        leaf = Quantized.of(leaf.signed_codes(), leaf.scale, bits=leaf.bits, dense_dtype=leaf.dense_dtype, swapped=True)
    return {name: getattr(leaf, name) for name in ("codes", "scale", "dense_dtype", "swapped")}


def _integers(
    x: Array,
    leaf: IntegerProduct,
    rows: tuple[int, ...],
    batch: Any,
    multiply: Callable[[Array, Array], Array],
    before: int,
    after: int,
    alone: bool = False,
) -> tuple[Array, Array]:
    """The sums of integers, and the scales of the activations laid out like them.

    Args:
      x: the activations.
      leaf: the weight.
      rows: as in `IntegerProduct.rounding`.
      batch: as in `IntegerProduct.rounding`.
      multiply: `(codes, codes) -> sums`, in int32.
      before: the axis of `x` along which rows are added.
      after: the same axis in the sums.
      alone: whether to add one in any case.
    """
    scale, zero_point = leaf.rounding(x, rows, tuple(batch))
    codes, n = affine.to_codes(x, scale, zero_point, leaf.input_bits), x.shape[before]
    if alone or zero_point is not None:
        # A row of ones: it gives the sums of the weights, where they are inside, which the zero point multiplies.
        ones = jnp.ones((*x.shape[:before], 1, *x.shape[before + 1 :]), jnp.int8)
        codes = lax.concatenate([codes, ones], before)
    out = multiply(codes, leaf.levels(jnp.int8))
    sums, out = lax.slice_in_dim(out, n, None, axis=after), lax.slice_in_dim(out, 0, n, axis=after)

    def laid(field: Array) -> Array:
        # Beyond the rows every side is 1: batch axes come first in both, and rows at their place.
        moved = jnp.moveaxis(field, before, after)
        return lax.expand_dims(lax.squeeze(moved, tuple(range(after + 1, moved.ndim))), tuple(range(after + 1, out.ndim)))

    if zero_point is not None:
        out = out - laid(zero_point).astype(jnp.int32) * sums
    return out, laid(scale)
