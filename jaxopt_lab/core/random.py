"""Keys whose draws do not depend on how a batch is spread over devices."""

import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import random as jex_random

from jaxopt_lab.core.types import Array

__all__ = ["rows_key"]


def rows_key(key: Array, first: Array, batch: int, stride: int = 1) -> Array:
    """A key for the rows `first, first + stride, ...` of a larger batch, `batch` of them.

    A draw whose leading axis is `batch` gives exactly those rows of the draw that `key` gives for the whole batch; a draw of any
    other shape is the one that `key` gives. `split` and `fold_in` keep the property, and a split in `batch` keys gives those rows'
    own, so a model that is handed this key on one of many devices draws the very dropout masks that it would draw on a single
    one, whatever framework it is written in. The shape alone tells: a draw for something else that happens to have `batch` as its
    leading axis is taken for rows, and one that lays the rows out otherwise (flattened, time first) is not.

    Args:
      key: a typed key, shape `[]`, of the (default) threefry implementation.
      first: the index in the whole batch of the first row here; may be traced.
      batch: how many rows there are here: on this device, or in this part of a batch.
      stride: how far apart they are in the whole batch: 1 on a device of many, `k` where `k` parts take turns.

    Raises:
      TypeError: the key is not a typed threefry key: other generators do not count their draws by position.
      ValueError: `jax_threefry_partitionable` is off; then threefry does not either. Or the stride is not at least 1.

    >>> key = jax.random.key(7)
    >>> whole = jax.random.uniform(key, (6, 2))
    >>> part = jax.random.uniform(rows_key(key, 4, batch=2), (2, 2))
    >>> bool((part == whole[4:]).all())
    True
    >>> odd = jax.random.uniform(rows_key(key, 1, batch=3, stride=2), (3, 2))
    >>> bool((odd == whole[1::2]).all())
    True

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 (counter-based generators).
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or str(jax.random.key_impl(key)) != "threefry2x32":
        raise TypeError(f"rows_key needs a typed threefry2x32 key, as jax.random.key(seed) gives; got {key.dtype}")
    if not getattr(jax.config, "jax_threefry_partitionable"):  # noqa: B009 (an option, not an attribute, to type checkers)
        raise ValueError("rows_key needs jax_threefry_partitionable, JAX's default; switch it on again")
    if stride < 1:
        raise ValueError(f"stride must be at least 1; got {stride}")
    data = jnp.append(jax.random.key_data(key), jnp.asarray(first).astype(jnp.uint32))
    return jax.random.wrap_key_data(data, impl=_implementation(batch, stride))


@lru_cache(maxsize=64)
def _implementation(batch: int, stride: int):
    """Threefry with the index of the first row carried beside the key: key data `[3]`."""
    threefry = "threefry2x32"

    def plain(data: Array) -> Array:
        return jax.random.wrap_key_data(data[:2], impl=threefry)

    def tagged(keys: Array, data: Array) -> Array:
        words = jax.random.key_data(keys)
        return jnp.concatenate([words, jnp.broadcast_to(data[2:], (*words.shape[:-1], 1))], axis=-1)

    def seed(value: Array) -> Array:
        return jnp.append(jax.random.key_data(jax.random.key(value, impl=threefry)), jnp.uint32(0))

    def words(data: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        # Partitionable threefry: what is drawn at flat index i is a function of the key and of i alone, so a row needs its index.
        row = math.prod(shape[1:])
        before = _product(data[2] + stride * jax.lax.iota(jnp.uint32, batch), row)
        skipped_low, skipped_high = (jnp.broadcast_to(word.reshape(batch, *(1 for _ in shape[1:])), shape) for word in before)
        within = jnp.broadcast_to(jax.lax.iota(jnp.uint32, row).reshape(1, *shape[1:]), shape)
        low = within + skipped_low
        high = skipped_high + (low < within).astype(jnp.uint32)
        return jex_random.threefry2x32_p.bind(*(jnp.broadcast_to(word, shape) for word in (data[0], data[1])), high, low)

    def split(data: Array, shape: tuple[int, ...]) -> Array:
        # In two is how streams are split; one key for each row is the only reason to split in as many as there are rows.
        if shape != (batch,) or shape == (2,):
            return tagged(jax.random.split(plain(data), shape), data)
        return jnp.stack([*words(data, shape), jnp.zeros(shape, jnp.uint32)], axis=-1)

    def fold_in(data: Array, value: Any) -> Array:
        return tagged(jax.random.fold_in(plain(data), value), data)

    def random_bits(data: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
        if not shape or shape[0] != batch:
            return jax.random.bits(plain(data), shape, f"uint{bit_width}")
        upper, lower = words(data, shape)
        if bit_width == 64:
            return (upper.astype(jnp.uint64) << 32) | lower.astype(jnp.uint64)
        return (upper ^ lower).astype(f"uint{bit_width}")

    return jex_random.define_prng_impl(
        key_shape=(3,),
        seed=seed,
        split=split,
        random_bits=random_bits,
        fold_in=fold_in,
        name=f"rows_of_{batch}_by_{stride}",
        tag=f"r{batch}by{stride}",
    )


def _product(a: Array, b: int) -> tuple[Array, Array]:
    """The low and high 32-bit words of `a * b`."""
    mask = jnp.uint32(0xFFFF)
    a_low, a_high = a & mask, a >> 16
    b_low, b_high = jnp.uint32(b & 0xFFFF), jnp.uint32(b >> 16)
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    cross = a_low * b_high + (middle & mask)
    low = (cross << 16) | ((a_low * b_low) & mask)
    return low, a_high * b_high + (middle >> 16) + (cross >> 16)
