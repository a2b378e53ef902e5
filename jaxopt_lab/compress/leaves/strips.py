"""Products with a matrix that is made dense a strip at a time, for leaves that are no levels times scales."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxopt_lab.compress.arrays import packing
from jaxopt_lab.compress.leaf import Leaf
from jaxopt_lab.compress.leaves.product import with_gradient_of
from jaxopt_lab.core.types import Array

__all__ = ["cut", "dot_general"]

_STRIP = 2**19
_TOGETHER = 16


def cut(rows: int, columns: int, unit: int = 1, strip: int = _STRIP) -> tuple[int, int]:
    """In how many strips of about `strip` weights a matrix is made dense, and how many neighbouring rows stay together in them.

    A strip takes every so many-th group of rows: a weight that is sharded by rows then has a part of each strip on every device.
    Groups of up to 16 rows are read faster than single ones.

    Args:
      rows, columns: of the matrix.
      unit: how many rows belong together.
      strip: in weights; the default is two megabytes of float32, which a core keeps at hand.

    Returns:
      `(count, unit)`, the latter a multiple of the one given; a count of 1 where the matrix is small, or cannot be cut.

    >>> cut(4096, 4096), cut(4096, 4096, unit=256), cut(64, 64)
    ((32, 16), (16, 256), (1, 1))
    """
    most = rows * columns // strip
    units = [u for k in range(5) if rows % (u := unit * 2**k) == 0 and (k == 0 or u <= _TOGETHER)]
    # Strips of more than four times the size would leave the cache.
    counts = range(max(-(-most // 4), 2), most + 1)
    found = [(count, u) for u in units for count in counts if rows // u % count == 0]
    return max(found, default=(1, unit))


def dot_general(
    x: Array,
    leaf: Leaf,
    strip: Callable[[Any, Any, int, int], Array],
    unit: int,
    *,
    dimension_numbers: tuple,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any = None,
    **params: Any,
) -> Array:
    r"""`lax.dot_general(x, leaf)` of a large matrix, summed over one of its axes; `NotImplemented` of anything else.

    .. math:: y = \sum_s x_s w_s \quad \text{or} \quad y_s = x w_s^\top

    over strips of rows :math:`w_s`, on a CPU: each is written and read in the cache. Elsewhere it is the product with the dense
    weight, and so are its derivatives everywhere.

    Args:
      x: of any rank.
      leaf: the weight.
      strip: `(leaf, index, count, unit)` -> one strip of it, dense, as `packing.strip` would cut it; `index` may be traced.
      unit: how many of the leaf's rows belong together.
      dimension_numbers, precision, preferred_element_type: as in `lax.dot_general`; sums run in at least float32.
      out_sharding: a sharding asked of the output, for which the product runs on the dense weight.
      params: others are left to the dense product.

    >>> from jaxopt_lab.compress.leaves.clustered import cluster
    >>> w = cluster({"kernel": jnp.ones((4, 2))}, k=2)["kernel"]
    >>> options = {"dimension_numbers": (((0,), (0,)), ((), ())), "precision": None, "preferred_element_type": None}
    >>> dot_general(jnp.ones(4), w, lambda w, *_: w.materialise(), 1, **options)
    NotImplemented
    """
    ((axes, contract), (batch, _)), shape = dimension_numbers, leaf.shape
    if len(shape) != 2 or len(contract) != 1 or batch or out_sharding is not None or params:
        return NotImplemented
    count, unit = cut(*shape, unit)
    if count == 1:
        return NotImplemented
    dtype = preferred_element_type or jnp.promote_types(x.dtype, leaf.dtype)
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )

    def whole(x: Array, leaf: Leaf) -> Array:
        return product(x, leaf.materialise())

    def in_strips(x: Array, leaf: Leaf) -> Array:
        def part(index: Any) -> Array:
            own: Any = packing.strip(x, index, count, unit, axes[0] % x.ndim) if contract[0] == 0 else x
            return product(own, strip(leaf, index, count, unit))

        if contract[0] == 0:
            # Begun with the first strip: a carry of zeros would not vary over the devices of a `shard_map`, where the others do.
            return lax.fori_loop(1, count, lambda index, total: total + part(index), part(0))
        parts = lax.map(part, jnp.arange(count))
        groups = parts.reshape(*parts.shape[:-1], shape[0] // count // unit, unit)
        return jnp.moveaxis(groups, 0, -2).reshape(*parts.shape[1:-1], shape[0])

    def by_platform(x: Array, leaf: Leaf) -> Array:
        return lax.platform_dependent(x, leaf, cpu=in_strips, default=whole)

    return with_gradient_of(whole, by_platform, x, leaf).astype(dtype)
