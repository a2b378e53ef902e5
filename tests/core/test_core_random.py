"""A key for some rows draws what the plain key draws there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.core.random import _product, rows_key

KEY = jax.random.key(3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_the_whole_draw(dtype):
    whole = jax.random.normal(KEY, (12, 5, 3), dtype)
    part = jax.jit(lambda first: jax.random.normal(rows_key(KEY, first, 4), (4, 5, 3), dtype))
    for first in (0, 4, 8):
        np.testing.assert_array_equal(part(first), whole[first : first + 4])


@pytest.mark.parametrize(("shape", "dtype"), [((5, 3), jnp.float32), ((), jnp.float32), ((7,), jnp.uint8)])
def test_every_third_row(shape, dtype):
    draw = jax.random.normal if dtype == jnp.float32 else jax.random.bits
    whole = draw(KEY, (12, *shape), dtype)
    part = jax.jit(lambda first: draw(rows_key(KEY, first, 4, stride=3), (4, *shape), dtype))
    for first in (0, 1, 2):
        np.testing.assert_array_equal(part(first), whole[first::3])
    keys = jax.random.split(rows_key(jax.random.split(KEY)[1], 1, 4, stride=3), 4)
    expected = jax.random.split(jax.random.split(KEY)[1], 12)[1::3]
    np.testing.assert_array_equal(jax.random.key_data(keys)[:, :2], jax.random.key_data(expected))


def test_rows_beyond_the_range_of_a_word():
    # Row 5 + 2^30 of 8 numbers begins beyond 2^32, where the counter takes its second word.
    draw = jax.jit(lambda key, first, count: jax.random.bits(rows_key(key, first, count, 2**30), (count, 8)), static_argnums=2)
    rows = draw(KEY, 5, 2)
    np.testing.assert_array_equal(rows, np.concatenate([draw(KEY, first, 1) for first in (5, 5 + 2**30)]))
    # Without that word row 5 + 2^30 would be row 5 again, since 2^30 rows of 8 are twice 2^32.
    assert (rows[0] != rows[1]).all()


def test_other_shapes_are_drawn_alike():
    for shape in ((), (3, 7), (5, 4)):
        np.testing.assert_array_equal(jax.random.uniform(rows_key(KEY, 8, 4), shape), jax.random.uniform(KEY, shape))


def test_split_and_fold_in_keep_the_rows():
    for derive in (lambda key: jax.random.split(key)[1], lambda key: jax.random.fold_in(key, 5)):
        whole = jax.random.bits(derive(KEY), (12, 7), "uint8")
        np.testing.assert_array_equal(jax.random.bits(derive(rows_key(KEY, 8, 4)), (4, 7), "uint8"), whole[8:])


def test_a_model_draws_the_same_dropout():
    dropout = nn.Dropout(0.5, deterministic=False)
    whole = dropout.apply({}, jnp.ones((8, 3)), rngs={"dropout": KEY})
    part = dropout.apply({}, jnp.ones((4, 3)), rngs={"dropout": rows_key(KEY, 4, 4)})
    np.testing.assert_array_equal(part, whole[4:])


def test_vmap_over_keys():
    keys = jax.random.split(KEY, 3)
    parts = jax.vmap(lambda key: jax.random.uniform(rows_key(key, 2, 2), (2, 3)))(keys)
    wholes = jax.vmap(lambda key: jax.random.uniform(key, (4, 3)))(keys)
    np.testing.assert_array_equal(parts, wholes[:, 2:])


@pytest.mark.parametrize(("a", "b"), [(4_000_000_000, 3_999_999_999), (5, 7), (2**31, 2), (0, 9), (65537, 65537)])
def test_the_product_in_two_words(a, b):
    low, high = _product(jnp.uint32(a), b)
    assert (int(high) << 32) + int(low) == a * b


def test_other_generators_are_refused():
    with pytest.raises(TypeError, match="threefry"):
        rows_key(jax.random.key(0, impl="rbg"), 0, 4)
    with pytest.raises(TypeError, match="threefry"):
        rows_key(jax.random.PRNGKey(0), 0, 4)


def test_a_stride_is_positive():
    with pytest.raises(ValueError, match=r"^stride must be at least 1; got 0$"):
        rows_key(KEY, 0, 4, stride=0)


def test_an_unpartitionable_generator_is_refused():
    with jax.threefry_partitionable(False), pytest.raises(ValueError, match="jax_threefry_partitionable"):
        rows_key(KEY, 0, 4)


def test_a_key_for_each_row():
    keys = jax.random.split(rows_key(KEY, 4, 4), 4)
    whole = jax.vmap(lambda key: jax.random.normal(key, (4, 2)))(jax.random.split(KEY, 12))
    np.testing.assert_array_equal(jax.vmap(lambda key: jax.random.normal(key, (4, 2)))(keys), whole[4:8])
    np.testing.assert_array_equal(jax.random.gamma(rows_key(KEY, 4, 4), 1.0, (4,)), jax.random.gamma(KEY, 1.0, (12,))[4:8])
