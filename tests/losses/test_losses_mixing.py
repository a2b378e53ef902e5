"""What mixing must keep: labels mix exactly as inputs do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.losses import cutmix, mixup

KEY = jax.random.key(3)
IDS = jnp.arange(8)
ONE_HOT = jax.nn.one_hot(IDS, 8)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_averages_pairs_with_one_weight(alpha):
    with jax.numpy_dtype_promotion("strict"):
        x, y = jax.jit(mixup)(KEY, ONE_HOT[:, :, None], ONE_HOT, alpha)
    np.testing.assert_array_equal(x[:, :, 0], y)
    y = np.asarray(y)
    own = np.diag(y)
    assert ((own == own.min()) | (own == 1.0)).all()  # the share is lambda, or all where the permutation left an example in place
    assert ((y > 0).sum(axis=-1) == np.where(own == 1.0, 1, 2)).all()
    np.testing.assert_allclose(y.sum(axis=-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(y.sum(axis=0), 1.0, rtol=1e-6)  # each example is a partner exactly once


def test_mixup_weights_follow_the_beta_distribution():
    keys = jax.random.split(KEY, 4000)
    x = jnp.array([[0.0], [1.0]])
    mixed = jax.jit(jax.vmap(lambda key: mixup(key, x, x, 0.4)[0][0, 0]))(keys)
    # Half the permutations of two change nothing; of the others the mean is 1/2 and the variance 1 / (4 (2 alpha + 1)).
    moved = np.asarray(mixed)[np.asarray(mixed) != 0.0]
    np.testing.assert_allclose(moved.mean(), 0.5, atol=0.03)
    np.testing.assert_allclose(moved.var(), 1 / (4 * 1.8), atol=0.01)


def test_cutmix_pastes_one_rectangle_and_counts_its_area():
    images = jnp.broadcast_to(IDS.astype(jnp.float32)[:, None, None, None], (8, 10, 12, 3))
    sizes = set()
    for seed in range(12):
        with jax.numpy_dtype_promotion("strict"):
            mixed, y = map(np.asarray, _cutmix(jax.random.key(seed), images))
        for i in range(8):
            partner = int(np.argmax(np.where(np.arange(8) == i, 0.0, y[i])))
            pasted = (mixed[i, :, :, 0] == partner) & (y[i, i] < 1)
            np.testing.assert_allclose(y[i, partner] if y[i, i] < 1 else 0.0, pasted.mean(), atol=1e-6)
            np.testing.assert_array_equal(mixed[i, :, :, 0][~pasted], i)
            np.testing.assert_array_equal(mixed[i], np.repeat(mixed[i, :, :, :1], 3, axis=-1))
            rows, columns = pasted.any(1), pasted.any(0)
            np.testing.assert_array_equal(pasted, rows[:, None] & columns[None, :])
            assert (np.diff(np.flatnonzero(rows)) == 1).all()
            sizes.add(int(pasted.sum()))
        np.testing.assert_allclose(y.sum(axis=-1), 1.0, rtol=1e-6)
    assert len(sizes) > 6


@jax.jit
def _cutmix(key, images):
    return cutmix(key, images, ONE_HOT)


def test_types_are_kept_and_keys_decide():
    x, y = mixup(KEY, ONE_HOT.astype(jnp.bfloat16), ONE_HOT)
    assert (x.dtype, y.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(mixup(KEY, ONE_HOT, ONE_HOT)[0], mixup(KEY, ONE_HOT, ONE_HOT)[0])
    assert (mixup(jax.random.key(4), ONE_HOT, ONE_HOT)[0] != mixup(KEY, ONE_HOT, ONE_HOT)[0]).any()


def test_bad_input_is_named_in_one_line():
    with pytest.raises(TypeError, match=r"^labels to be mixed must be floating, got int32; use jax.nn.one_hot first$"):
        mixup(KEY, ONE_HOT, IDS)
    with pytest.raises(TypeError, match=r"^inputs to be mixed must be floating, got uint8; scale them to floats first$"):
        mixup(KEY, jnp.zeros((8, 2), jnp.uint8), ONE_HOT)
    with pytest.raises(
        ValueError, match=r"^inputs \[B, ...\] and labels \[B, classes\] of one batch are needed; got \(3, 2\) and \(8, 8\)$"
    ):
        mixup(KEY, jnp.zeros((3, 2)), ONE_HOT)
    with pytest.raises(ValueError, match=r"^images must have the shape \[B, height, width, channels\]; got \(8, 2\)$"):
        cutmix(KEY, jnp.zeros((8, 2)), ONE_HOT)
    with pytest.raises(ValueError, match=r"^alpha must be positive; got 0.0$"):
        mixup(KEY, ONE_HOT, ONE_HOT, alpha=0.0)
