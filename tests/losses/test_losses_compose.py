"""Losses on (outputs, batch)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.losses import combine, cross_entropy, distill, per_example

RNG = np.random.default_rng(0)
OUTPUTS = jax.device_put(np.asarray(RNG.normal(size=(6, 3)), np.float32))
BATCH = {
    "y": jax.device_put(np.asarray(RNG.integers(0, 3, size=6), np.int32)),
    "teacher": jax.device_put(np.asarray(RNG.normal(size=(6, 3)), np.float32)),
    "tau": jnp.linspace(1.0, 5.0, 6),
}


def test_fields_are_passed_in_order_and_settings_by_name():
    np.testing.assert_array_equal(per_example(cross_entropy)(OUTPUTS, BATCH), cross_entropy(OUTPUTS, BATCH["y"]))
    np.testing.assert_array_equal(
        per_example(cross_entropy, label_smoothing=0.2)(OUTPUTS, BATCH), cross_entropy(OUTPUTS, BATCH["y"], 0.2)
    )
    np.testing.assert_array_equal(
        per_example(distill.soft_targets, "teacher", "tau")(OUTPUTS, BATCH),
        distill.soft_targets(OUTPUTS, BATCH["teacher"], BATCH["tau"]),
    )


def test_more_than_one_value_per_example_is_averaged():
    targets = {"y": jnp.zeros((2, 3, 4))}
    outputs = jnp.arange(24.0).reshape(2, 3, 4)
    values = per_example(optax.squared_error)(outputs, targets)
    np.testing.assert_allclose(values, [(np.arange(12) ** 2).mean(), (np.arange(12, 24) ** 2).mean()], rtol=1e-6)


def test_a_combination_is_the_weighted_sum_and_differentiates():
    def loss(outputs, weight):
        both = combine(
            (1 - weight, per_example(cross_entropy)), (weight, per_example(distill.soft_targets, "teacher", temperature=2.0))
        )
        return both(outputs, BATCH)

    hard, soft = cross_entropy(OUTPUTS, BATCH["y"]), distill.soft_targets(OUTPUTS, BATCH["teacher"], 2.0)
    with jax.numpy_dtype_promotion("strict"):
        value = jax.jit(loss)(OUTPUTS, jnp.float32(0.7))
        slope = jax.jit(jax.jacobian(loss, argnums=1))(OUTPUTS, jnp.float32(0.7))
    np.testing.assert_allclose(value, 0.3 * hard + 0.7 * soft, rtol=1e-5)
    np.testing.assert_allclose(slope, soft - hard, rtol=1e-4, atol=1e-5)


def test_the_top_k_travels_in_the_batch():
    batch = {"teacher": distill.top_k_targets(BATCH["teacher"], 3, temperature=2.0)}
    loss = per_example(distill.soft_targets_top_k, "teacher", temperature=2.0)
    np.testing.assert_allclose(
        jax.jit(loss)(OUTPUTS, batch), distill.soft_targets(OUTPUTS, BATCH["teacher"], 2.0), rtol=1e-4, atol=1e-6
    )


def test_what_is_wrong_is_named_in_one_line():
    with pytest.raises(KeyError, match=r"the batch has no field 'x'; it has 'y', 'teacher', 'tau'"):
        per_example(cross_entropy, "x")(OUTPUTS, BATCH)

    def mean_loss(outputs, labels):
        return cross_entropy(outputs, labels).mean()

    with pytest.raises(ValueError, match=r"^mean_loss gave a scalar, and a step needs one value per example; leave its mean out$"):
        per_example(mean_loss)(OUTPUTS, BATCH)
    with pytest.raises(ValueError, match=r"^combine needs at least one pair \(weight, loss\)$"):
        combine()
