"""Keys whose draws do not depend on how a batch is spread over devices."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import random as jex_random

from jaxopt_lab.core.types import Array

__all__ = ["rows_key"]


def rows_key(key: Array, first: Array, batch: int) -> Array:
    """A key for the rows `first ... first + batch` of a larger batch.

    A draw whose leading axis is `batch` gives exactly those rows of the draw that `key` gives for the whole batch; a draw of any
    other shape is the one that `key` gives. `split` and `fold_in` keep the property, so a model that is handed this key on one of
    many devices draws the very dropout masks that it would draw on a single one, whatever framework it is written in.

    Args:
      key: a typed key, shape `[]`, of the (default) threefry implementation.
      first: the index of this device's first row in the whole batch; may be traced.
      batch: how many rows this device holds.

    Raises:
      TypeError: the key is not a typed threefry key: other generators do not count their draws by position.

    >>> key = jax.random.key(7)
    >>> whole = jax.random.uniform(key, (6, 2))
    >>> part = jax.random.uniform(rows_key(key, 4, batch=2), (2, 2))
    >>> bool((part == whole[4:]).all())
    True

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 (counter-based generators).
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or str(jax.random.key_impl(key)) != "threefry2x32":
        raise TypeError(f"rows_key needs a typed threefry2x32 key, as jax.random.key(seed) gives; got {key.dtype}")
    data = jnp.append(jax.random.key_data(key), jnp.asarray(first).astype(jnp.uint32))
    return jax.random.wrap_key_data(data, impl=_implementation(batch))


@lru_cache(maxsize=64)
def _implementation(batch: int):
    """Threefry with the index of the first row carried beside the key: key data `[3]`."""
    threefry = "threefry2x32"

    def plain(data: Array) -> Array:
        return jax.random.wrap_key_data(data[:2], impl=threefry)

    def tagged(keys: Array, data: Array) -> Array:
        words = jax.random.key_data(keys)
        return jnp.concatenate([words, jnp.broadcast_to(data[2:], (*words.shape[:-1], 1))], axis=-1)

    def seed(value: Array) -> Array:
        return jnp.append(jax.random.key_data(jax.random.key(value, impl=threefry)), jnp.uint32(0))

    def split(data: Array, shape: tuple[int, ...]) -> Array:
        return tagged(jax.random.split(plain(data), shape), data)

    def fold_in(data: Array, value: Any) -> Array:
        return tagged(jax.random.fold_in(plain(data), value), data)

    def random_bits(data: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
        if not shape or shape[0] != batch:
            return jax.random.bits(plain(data), shape, f"uint{bit_width}")
        # Partitionable threefry: the bits at flat index i are a function of the key and of i alone, so a row needs only its index.
        row = 1
        for n in shape[1:]:
            row *= n
        flat = jax.lax.iota(jnp.uint32, batch * row).reshape(shape)
        skipped_low, skipped_high = _product(data[2], row)
        low = flat + skipped_low
        high = skipped_high + (low < flat).astype(jnp.uint32)
        upper, lower = jex_random.threefry2x32_p.bind(*(jnp.broadcast_to(word, shape) for word in (data[0], data[1])), high, low)
        if bit_width == 64:
            return (upper.astype(jnp.uint64) << 32) | lower.astype(jnp.uint64)
        return (upper ^ lower).astype(f"uint{bit_width}")

    return jex_random.define_prng_impl(
        key_shape=(3,), seed=seed, split=split, random_bits=random_bits, fold_in=fold_in, name=f"rows_of_{batch}", tag=f"r{batch}"
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
