"""Products with weights that are levels times scales, large ones strip by strip where that pays."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxopt_lab.compress.arrays import packing
from jaxopt_lab.core.types import Array

__all__ = ["Product", "at_once", "by_layer", "own_axes", "product", "with_gradient_of"]

_STRIP = 2**19
"""How many weights are decoded at a time on a CPU: two megabytes in float32, which a core keeps at hand."""


class Product(NamedTuple):
    """What a product is, apart from its operands.

    Attributes:
      dimension_numbers: of `lax.dot_general`, the weight on the right.
      dense: whether the weight is multiplied by its scales first, as it must be where a summed axis carries them.
      precision: of `lax.dot_general`.
      dtype: of what comes out.
    """

    dimension_numbers: tuple
    dense: bool
    precision: Any
    dtype: Any


def product(x: Array, leaf: Any, dimension_numbers: tuple, precision: Any, preferred_element_type: Any, **params: Any) -> Array:
    """`lax.dot_general(x, leaf)` for a `Scaled` leaf, not swapped: on the levels, with the scale after, or on the dense weight.

    A program of the whole weight first writes it widened to memory, and then reads it: on a CPU that is the time of a product with
    few rows. Decoding it strip by strip keeps it in the cache. Against a float32 weight of 4096 x 4096, by CPU time, whole / in
    strips: int8 10 / 0.8 at batch 1, 5.2 / 0.7 at 8, 2.4 / 1.1 at 64, 1.1 / 1.0 at 1024. Other platforms were not measured, and
    get the whole product, which their compilers can fuse; a loop would take it apart.

    Scales along a summed axis are multiplied in, strip by strip. Scaling the sums of each group instead takes 0.9 to 1.2 times as
    long in a loop over the groups, and 3 to 8 times in one product (groups of 32 and 128, batches 1 to 64).

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> w = quantize({"kernel": jnp.array([[1.27], [2.54]])})["kernel"]
    >>> product(jnp.ones((1, 2)), w, (((1,), (0,)), ((), ())), None, None)
    Array([[3.82]], dtype=float32)
    """
    (_, contract), (_, batch) = dimension_numbers
    dense = any(leaf.scale.shape[a] > 1 for a in contract)
    dtype = jnp.promote_types(x.dtype, leaf.dense_dtype)
    # Sums of levels grow far larger than those of weights: they need float32's range, and one rounding is enough.
    wide = jnp.promote_types(dtype, leaf.scale.dtype)
    how = Product(dimension_numbers, dense, precision, wide)
    cut = (1, 1) if 0 in batch or params.get("out_sharding") is not None else _cut(leaf)
    if cut[0] > 1:
        out = with_gradient_of(functools.partial(at_once, how), functools.partial(_by_platform, how, cut), x, leaf)
    else:
        out = at_once(how, x, leaf, **params)
    if not dense:
        out = out * _after(leaf.scale, dimension_numbers, out.ndim)
    return out.astype(preferred_element_type or dtype)


def at_once(how: Product, x: Array, leaf: Any, **params: Any) -> Array:
    """The product with the whole weight: its levels, or its dense self where `how.dense`.

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> w = quantize({"kernel": jnp.array([[1.27], [2.54]])})["kernel"]
    >>> at_once(Product((((1,), (0,)), ((), ())), False, None, jnp.float32), jnp.ones((1, 2)), w)
    Array([[191.]], dtype=float32)
    """
    weight = leaf.materialise() if how.dense else leaf.levels(leaf.dense_dtype)
    return lax.dot_general(x, weight, how.dimension_numbers, precision=how.precision, preferred_element_type=how.dtype, **params)


def own_axes(ndim: int, dimension_numbers: tuple) -> list[int]:
    """The axes of the right operand that are neither summed nor shared: the last axes of the product, in order.

    >>> own_axes(3, (((2,), (1,)), ((0,), (0,))))
    [2]
    """
    (_, contract), (_, batch) = dimension_numbers
    return [a for a in range(ndim) if a not in (*contract, *batch)]


def by_layer(layers: Sequence[int], shape: Sequence[int], x: Array, dimension_numbers: tuple, run: Callable[..., Array]) -> Array:
    """A product of stacked layers that each do something of their own to the same input: one with more batch axes.

    Args:
      layers: the axes of the weight that number the layers, none of which is summed over or shared.
      shape: of the weight.
      x: the input.
      dimension_numbers: of `lax.dot_general`, the weight on the right.
      run: `(x, dimension_numbers) -> product`, whose batch axes begin with the layers.

    >>> w = jnp.arange(6.0).reshape(3, 2, 1)
    >>> numbers = (((0,), (1,)), ((), ()))
    >>> by_layer([0], w.shape, jnp.ones(2), numbers, lambda x, numbers: lax.dot_general(x, w, numbers)).ravel()
    Array([1., 5., 9.], dtype=float32)
    """
    (summed, contract), (shared, batch) = dimension_numbers
    more, own = len(layers), own_axes(len(shape), dimension_numbers)
    x = jnp.broadcast_to(x, (*(shape[a] for a in layers), *x.shape))
    numbers = (tuple(a + more for a in summed), contract), ((*range(more), *(a + more for a in shared)), (*layers, *batch))
    out = run(x, numbers)
    outer, rest = out.ndim - len(own) + more, [a for a in own if a not in layers]
    return lax.transpose(out, (*range(more, outer), *(layers.index(a) if a in layers else outer + rest.index(a) for a in own)))


def with_gradient_of(differentiated: Callable[..., Array], evaluated: Callable[..., Array], x: Array, leaf: Any) -> Array:
    """The value of `evaluated(x, leaf)`, with the derivatives of `differentiated(x, leaf)` in `x` and in the floats of the leaf.

    >>> jax.grad(lambda x: with_gradient_of(lambda x, w: x * w, lambda x, w: jnp.round(x) * w, x, 3.0))(1.2)
    Array(3., dtype=float32, weak_type=True)
    """
    return _valued(differentiated, evaluated, x, leaf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _valued(differentiated: Callable[..., Array], evaluated: Callable[..., Array], x: Array, leaf: Any) -> Array:
    del differentiated
    return evaluated(x, leaf)


def _valued_jvp(differentiated: Callable, evaluated: Callable, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    values, structure = jax.tree.flatten(primals)
    moves = jax.tree.leaves(tangents, is_leaf=lambda t: type(t) is SymbolicZero)
    moving = [i for i, move in enumerate(moves) if type(move) is not SymbolicZero]

    def along(*moved: Array) -> Array:
        given = dict(zip(moving, moved, strict=True))
        return differentiated(*jax.tree.unflatten(structure, [given.get(i, value) for i, value in enumerate(values)]))

    out = _valued(differentiated, evaluated, *primals)
    _, tangent = jax.jvp(along, [values[i] for i in moving], [moves[i] for i in moving])
    return out, tangent


_valued.defjvp(_valued_jvp, symbolic_zeros=True)


def _by_platform(how: Product, cut: tuple[int, int], x: Array, leaf: Any) -> Array:
    cpu, default = functools.partial(_by_strips, how, *cut), functools.partial(at_once, how)
    return lax.platform_dependent(x, leaf, cpu=cpu, default=default)


def _by_strips(how: Product, count: int, unit: int, x: Array, leaf: Any) -> Array:
    """The product, a strip of the weight at a time: their sums, or their outputs beside each other."""
    (summed, contract), _ = how.dimension_numbers
    strip, x = leaf.strips(count, unit), x.astype(how.dtype)

    def part(index: Any) -> Array:
        xs = packing.strip(x, index, count, unit, summed[contract.index(0)]) if 0 in contract else x
        weight = leaf.dense(*strip(index)) if how.dense else leaf.decode(*strip(index), how.dtype)
        return lax.dot_general(
            xs, weight.astype(how.dtype), how.dimension_numbers, precision=how.precision, preferred_element_type=how.dtype
        )

    if 0 in contract:
        # Begun with the first strip: a carry of zeros would not vary over the devices of a `shard_map`, where the others do.
        return lax.scan(lambda total, index: (total + part(index), None), part(0), jnp.arange(1, count))[0]
    parts = lax.map(part, jnp.arange(count))
    own = own_axes(len(leaf.shape), how.dimension_numbers)
    along = parts.ndim - len(own) + own.index(0)
    before, after = parts.shape[1:along], parts.shape[along + 1 :]
    groups = jnp.moveaxis(parts.reshape(count, *before, -1, unit, *after), 0, along)
    return groups.reshape(*before, leaf.shape[0], *after)


def _cut(leaf: Any) -> tuple[int, int]:
    """In how many strips a weight is decoded, and how many neighbours stay together; `(1, 1)` where it is small, or comes out odd.

    Up to 16 rows that stay together are read faster, a third at one row of input. Not more: strips of what lies apart leave a part
    to every device of a sharded weight.
    """
    n, most = leaf.shape[0], math.prod(leaf.shape) // _STRIP
    units = [unit for k in range(5) if n % (unit := leaf.unit * 2**k) == 0 and (k == 0 or unit <= 16)]
    found = [(count, unit) for unit in units if (count := _divisor(n // unit, most)) * 4 >= most >= 4]
    return max(found, default=(1, 1))


def _divisor(n: int, most: int) -> int:
    """The largest divisor of `n` up to `most`; 1 where there is no other."""
    return next((d for d in range(min(n, most), 1, -1) if n % d == 0), 1)


def _after(scale: Array, dimension_numbers: tuple, ndim: int) -> Array:
    """The scale in the places that its axes take in the product, of rank `ndim`."""
    (_, contract), (_, batch) = dimension_numbers
    own = [*batch, *own_axes(scale.ndim, dimension_numbers)]
    scale = lax.squeeze(lax.transpose(scale, (*own, *contract)), tuple(range(len(own), scale.ndim)))
    between = tuple(range(len(batch), len(batch) + ndim - scale.ndim))
    return lax.expand_dims(scale, between)
