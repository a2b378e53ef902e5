"""Products with a stored weight that is made dense a strip at a time, so that the dense weight as a whole is never written."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_lab.core.types import Array, PyTree

__all__ = ["count", "dot_general"]

_STRIP = 2**19


def count(rows: int, columns: int, period: int = 1, strip: int = _STRIP) -> int:
    """In how many strips of about `strip` weights a weight `[rows, columns]` can be cut; 1 where it is small, or cannot be cut.

    A strip takes every so many-th group of `period` rows rather than neighbours: a weight that is sharded by rows then has a part
    of each strip on every device.

    >>> count(4096, 4096), count(4096, 4096, period=2048), count(64, 64)
    (32, 2, 1)
    """
    periods = rows // period if rows % period == 0 else 1
    most = min(rows * columns // strip, periods)
    return next((n for n in range(most, 1, -1) if periods % n == 0), 1)


def dot_general(
    x: Array,
    arrays: Sequence[Array],
    shared: PyTree,
    dense: Callable[[Sequence[Array], PyTree], Array],
    *,
    period: int,
    strips: int,
    contract: int,
    axis: int,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    r"""`lax.dot_general(x, w)` with one contracted axis, where `w = dense(arrays, shared)` is `[rows, columns]`.

    .. math:: y = \sum_s x_s w_s \quad \text{or} \quad y_s = x w_s^\top

    over strips of rows :math:`w_s`. Strips are smaller than a cache, so that each is written and read there. Where a derivative is
    taken, the product and its derivatives are those of the dense weight: the same as without strips.

    Args:
      x: floating point, of any rank.
      arrays: what the weight is made of; the first axis of each runs along the rows, in as many equal parts as there are periods.
      shared: arrays that every strip needs whole.
      dense: makes the rows of some of the periods dense, in their order.
      period: how many rows belong together.
      strips: how many, as `count` gives.
      contract: the axis of the weight that is summed over, 0 or 1.
      axis: the axis of `x` that is.
      precision: of each product, as in `lax.dot_general`.
      preferred_element_type: of the result, as in `lax.dot_general`; sums run in at least float32.

    >>> table, codes = jnp.array([0.0, 1.0]), jnp.array([[0, 1], [1, 1], [0, 0], [1, 0]])
    >>> look_up = lambda arrays, table: table[arrays[0]]
    >>> dot_general(jnp.arange(4.0), [codes], table, look_up, period=1, strips=2, contract=0, axis=0)
    Array([4., 1.], dtype=float32)
    """
    shape = jax.eval_shape(dense, arrays, shared)
    dtype = preferred_element_type or jnp.promote_types(x.dtype, shape.dtype)
    options = {"precision": precision, "preferred_element_type": jnp.promote_types(dtype, jnp.float32)}
    periods, last = shape.shape[0] // period // strips, (((1,), (contract,)), ((), ()))

    def strip(array: Array, j: Array) -> Array:
        parted = array.reshape(periods, strips, -1, *array.shape[1:])
        return lax.dynamic_index_in_dim(parted, j, 1, keepdims=False).reshape(-1, *array.shape[1:])

    @jax.custom_jvp
    def product(x: Array, arrays: Sequence[Array], shared: PyTree) -> Array:
        def summed(j: Array, y: Array) -> Array:
            part = lax.dynamic_index_in_dim(x.reshape(-1, periods, strips, period), j, 2, keepdims=False)
            rows = dense([strip(array, j) for array in arrays], shared)
            return y + lax.dot_general(part.reshape(-1, periods * period), rows, last, **options)

        def placed(j: Array, y: Array) -> Array:
            part = lax.dot_general(x, dense([strip(array, j) for array in arrays], shared), last, **options)
            return lax.dynamic_update_index_in_dim(y, part.reshape(-1, periods, period), j, 2)

        wide = options["preferred_element_type"]
        if contract == 0:
            y = lax.fori_loop(0, strips, summed, jnp.zeros((x.shape[0], shape.shape[1]), wide))
        else:
            y = lax.fori_loop(0, strips, placed, jnp.zeros((x.shape[0], periods, strips, period), wide))
        return y.reshape(x.shape[0], shape.shape[1 - contract]).astype(dtype)

    @product.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
        def whole(x: Array, arrays: Sequence[Array], shared: PyTree) -> Array:
            return lax.dot_general(x, dense(arrays, shared), last, precision=precision, preferred_element_type=dtype)

        return jax.jvp(whole, primals, tangents)

    free = [n for a, n in enumerate(x.shape) if a != axis % x.ndim]
    y = product(jnp.moveaxis(x, axis, -1).reshape(math.prod(free), x.shape[axis]), list(arrays), shared)
    return y.reshape(*free, y.shape[-1])
