"""Landing, straight-through, and the predicate that stays one under vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.core import numerics


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_landing_is_exact_on_zeros_and_one_rounding_off_where_weights_move_little(dtype, wrap):
    keys = jax.random.split(jax.random.key(0))
    params = {"w": (jax.random.normal(keys[0], (64,)) * 10.0 ** jnp.linspace(-4, 4, 64)).astype(dtype)}
    updates = {"w": jax.random.normal(keys[1], (64,)).astype(dtype)}

    def project(tree):
        return jax.tree.map(lambda x: jnp.where(jnp.abs(x) < 1, 0, 0.9 * x).astype(x.dtype), tree)

    target = project(optax.apply_updates(params, updates))["w"]
    landed = optax.apply_updates(params, wrap(lambda p, u: numerics.landing(project, p, u))(params, updates))["w"]
    assert landed.dtype == dtype
    assert (np.asarray(landed)[np.asarray(target == 0)] == 0).all()
    np.testing.assert_allclose(
        np.asarray(landed, np.float64), np.asarray(target, np.float64), rtol=float(jnp.finfo(dtype).eps), atol=0
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_landing_far_below_misses_by_one_rounding_of_the_larger_number(dtype):
    draws = np.random.default_rng(0)
    signs, sizes = draws.choice([-1.0, 1.0], size=(2, 4000)), draws.uniform(1.0, 2.0, size=(2, 4000))
    # In float16 the target must stay above the subnormal numbers, below 6.1e-5.
    ratios = 2.0 ** -draws.integers(0, 12 if dtype == jnp.float16 else 30, size=4000)
    x = jnp.asarray(signs[0] * sizes[0], dtype)
    for old, new in ((x, jnp.asarray(signs[1] * sizes[1] * ratios, dtype)), (x * jnp.asarray(ratios, dtype), x)):
        landed = optax.apply_updates(old, numerics.land(old, new))
        x64, y64, landed64 = (np.asarray(a, np.float64) for a in (old, new, landed))
        missed = np.abs(landed64 - y64)
        assert landed.dtype == dtype
        assert (missed <= float(jnp.finfo(dtype).eps) * np.maximum(np.abs(x64), np.abs(y64))).all()
        if dtype != jnp.float32:
            # The difference is in float32, and so exact enough while the target is not tiny.
            near = np.abs(y64) > 2.0 ** (-14 if dtype == jnp.bfloat16 else -11) * np.abs(x64)
            assert near.any()
            np.testing.assert_array_equal(landed64[near], y64[near])
    if dtype == jnp.float32:
        # Not to one rounding of the target: a hundred million falls to 0.1 only in steps of its own last place.
        assert jnp.float32(1e8) + numerics.land(jnp.float32(1e8), jnp.float32(0.1)) == 0.0


def test_straight_through_value_and_gradient():
    x = jnp.array([-1.6, 0.3, 2.5])
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(lambda x: numerics.straight_through(x, jnp.round(x)) ** 2)))(x)
    np.testing.assert_array_equal(value, jnp.round(x) ** 2)
    np.testing.assert_array_equal(gradient, 2 * jnp.round(x))
    _, tangent = jax.jvp(lambda x: numerics.straight_through(x, jnp.inf * x), (x,), (jnp.ones(3),))
    np.testing.assert_array_equal(tangent, 1.0)


def test_clipped_straight_through():
    gradient = jax.vmap(jax.grad(lambda x: numerics.clipped_straight_through(x, jnp.sign(x), -1.0, 1.0)))
    np.testing.assert_array_equal(gradient(jnp.array([-1.5, -1.0, 0.2, 1.0, 1.5])), [0, 1, 1, 1, 0])


def test_any_over_batch_keeps_the_cond_and_its_gradient():
    def f(due, x):
        y = jax.lax.cond(numerics.any_over_batch(due), lambda x: jnp.where(due, x**3, x), lambda x: x, x)
        return y.sum()

    due, x = jnp.array([False, True]), jnp.array([[2.0], [3.0]])
    batched = jax.vmap(f)
    assert "cond[" in str(jax.make_jaxpr(batched)(due, x))
    np.testing.assert_array_equal(batched(due, x), [2, 27])
    np.testing.assert_array_equal(jax.vmap(jax.grad(f, argnums=1))(due, x), [[1], [27]])
    np.testing.assert_array_equal(jax.vmap(batched)(due[None], x[None]), [[2, 27]])
    np.testing.assert_array_equal(jax.vmap(f, in_axes=(None, 0))(jnp.array(True), x), [8, 27])
