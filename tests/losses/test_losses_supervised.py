"""Cross-entropy and accuracy against Optax, by hand, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.losses import accuracy, cross_entropy

RNG = np.random.default_rng(0)
LOGITS = jax.device_put(np.asarray(3 * RNG.normal(size=(5, 2, 4)), np.float32))
IDS = jax.device_put(np.asarray(RNG.integers(0, 4, size=(5, 2)), np.int32))
ONE_HOT = jax.nn.one_hot(IDS, 4)
SOFT = jax.device_put(np.asarray(RNG.dirichlet(np.ones(4), size=(5, 2)), np.float32))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_it_is_the_cross_entropy_of_optax_with_smoothed_labels(smoothing):
    for labels, dense in ((IDS, ONE_HOT), (ONE_HOT, ONE_HOT), (SOFT, SOFT)):
        expected = optax.softmax_cross_entropy(LOGITS, optax.smooth_labels(dense, smoothing))
        with jax.numpy_dtype_promotion("strict"):
            loss = jax.jit(cross_entropy)(LOGITS, labels, smoothing)
        assert loss.shape == (5, 2)
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(cross_entropy(LOGITS, labels, smoothing), expected, rtol=1e-5, atol=1e-6)


def test_by_hand_without_leading_axes():
    loss = cross_entropy(jnp.log(jnp.array([0.5, 0.25, 0.25])), 1, label_smoothing=0.3)
    np.testing.assert_allclose(loss, 0.7 * np.log(4) + 0.1 * (np.log(2) + 2 * np.log(4)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_any_integer_type_and_numpy_arrays_will_do(dtype):
    with jax.numpy_dtype_promotion("strict"):
        loss = cross_entropy(np.asarray(LOGITS), np.asarray(IDS).astype(dtype))
        score = accuracy(np.asarray(LOGITS), np.asarray(IDS).astype(dtype))
    np.testing.assert_array_equal(loss, cross_entropy(LOGITS, IDS))
    np.testing.assert_array_equal(score, accuracy(LOGITS, IDS))


def test_small_types_for_many_classes():
    """An id type too narrow for the number of classes is still compared rightly."""
    logits = jnp.zeros((1, 300))
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([255], jnp.uint8)), np.log(300), rtol=1e-6)


def test_sixteen_bit_logits_are_computed_in_float32():
    logits = LOGITS.astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        loss, gradient = jax.value_and_grad(lambda z: cross_entropy(z, SOFT.astype(jnp.bfloat16), 0.1).sum())(logits)
    assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    exact = cross_entropy(logits.astype(jnp.float32), SOFT.astype(jnp.bfloat16).astype(jnp.float32), 0.1).sum()
    np.testing.assert_allclose(loss, exact, rtol=1e-6)


def test_an_id_outside_the_classes_is_nan_and_never_another_class():
    np.testing.assert_array_equal(jnp.isnan(cross_entropy(jnp.zeros((4, 3)), jnp.array([0, 3, -1, 2]))), [False, True, True, False])


def test_a_class_masked_out_by_minus_infinity_is_harmless():
    logits = jnp.array([[1.0, 2.0, -jnp.inf]])
    for labels in (jnp.array([1]), jnp.array([[0.0, 1.0, 0.0]])):
        loss, gradient = jax.value_and_grad(lambda z: cross_entropy(z, labels).sum())(logits)  # noqa: B023
        np.testing.assert_allclose(loss, np.log1p(np.exp(-1)), rtol=1e-6)
        p = 1 / (1 + np.exp(-1))
        np.testing.assert_allclose(gradient, [[1 - p, p - 1, 0.0]], atol=1e-6)


def test_smoothing_may_be_traced():
    slope = jax.jit(jax.grad(lambda s: cross_entropy(LOGITS, IDS, s).sum()))(0.2)
    np.testing.assert_allclose(slope, (cross_entropy(LOGITS, IDS, 1.0) - cross_entropy(LOGITS, IDS)).sum(), rtol=1e-4)


def test_accuracy_by_hand():
    nan, inf = jnp.nan, jnp.inf
    logits = jnp.array(
        [[0.1, 0.9], [0.9, 0.1], [0.5, 0.5], [nan, 0.0], [0.0, nan], [inf, 0.0], [2.0, -inf], [-inf, 2.0], [-inf, -inf]]
    )
    ids = jnp.array([1, 1, 0, 0, 0, 0, 0, 0, 0])
    with jax.numpy_dtype_promotion("strict"):
        for labels in (ids, jax.nn.one_hot(ids, 2)):
            np.testing.assert_array_equal(accuracy(logits, labels), [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    assert accuracy(LOGITS, IDS).shape == (5, 2)
    np.testing.assert_array_equal(jax.vmap(accuracy)(LOGITS, IDS), accuracy(LOGITS, IDS))


@pytest.mark.parametrize("function", [cross_entropy, accuracy])
def test_shapes_that_do_not_fit_are_named(function):
    message = r"^integer labels of shape \(5, 1\) need logits \[..., classes\] of the same leading shape; got \(5, 4\)$"
    with pytest.raises(ValueError, match=message):
        function(jnp.zeros((5, 4)), jnp.zeros((5, 1), jnp.int32))
    with pytest.raises(ValueError, match=r"^label distributions of shape \(5,\) need logits of the same shape; got \(5, 4\)$"):
        function(jnp.zeros((5, 4)), jnp.zeros(5))


def test_bad_smoothing_is_named():
    with pytest.raises(ValueError, match=r"^label_smoothing must lie in \[0, 1\]; got 1.5$"):
        cross_entropy(LOGITS, IDS, 1.5)
