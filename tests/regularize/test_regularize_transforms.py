"""The links of a chain: what they add, and where the parameters land behind any optimiser."""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quax
from flax import nnx

from jaxopt_lab import regularize
from jaxopt_lab.regularize import prox

RNG = np.random.default_rng(0)
PARAMS = {"a": {"bias": RNG.normal(size=3), "kernel": RNG.normal(size=(4, 3))}, "b": {"kernel": RNG.normal(size=(3, 2))}}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
GRADIENTS = jax.tree.map(lambda x: jax.device_put(np.asarray(RNG.normal(size=x.shape), np.float32)), PARAMS)

ADDED = {
    "l1": (regularize.add_l1(0.3), lambda p: 0.3 * regularize.l1(p)),
    "l2": (regularize.add_l2(0.3, where="**/kernel"), lambda p: 0.3 * regularize.l2(p, where="**/kernel")),
    "elastic_net": (regularize.add_elastic_net(0.3, 0.2), partial(regularize.elastic_net, l1=0.3, l2=0.2)),
    "group_lasso": (
        regularize.add_group_lasso(0.3, "**/kernel", axis=0),
        lambda p: 0.3 * regularize.group_lasso(p, "**/kernel", axis=0),
    ),
    "orthogonal": (regularize.add_penalty(regularize.orthogonal, 0.3), lambda p: 0.3 * regularize.orthogonal(p)),
    "nuclear": (regularize.add_penalty(regularize.nuclear, 0.3), lambda p: 0.3 * regularize.nuclear(p)),
    "schedule": (regularize.add_l1(lambda t: 0.3 + 0.0 * t), lambda p: 0.3 * regularize.l1(p)),
}


@pytest.mark.parametrize("name", ADDED)
def test_adding_a_penalty_adds_the_gradient_of_its_term_in_the_loss(name):
    tx, term = ADDED[name]
    updates, _ = jax.jit(tx.update)(GRADIENTS, tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(np.add, GRADIENTS, jax.jit(jax.grad(term))(PARAMS))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), updates, expected)


def test_l2_is_weight_decay():
    ours, theirs = regularize.add_l2(0.1), optax.add_decayed_weights(0.1)
    a, _ = ours.update(GRADIENTS, ours.init(PARAMS), PARAMS)
    b, _ = theirs.update(GRADIENTS, theirs.init(PARAMS), PARAMS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), a, b)


def test_a_schedule_counts_updates_and_a_number_keeps_no_state():
    tx = regularize.add_l1(lambda t: 2.0 * t)
    state, pulls = tx.init(jnp.ones(())), []
    for _ in range(3):
        pull, state = jax.jit(tx.update)(jnp.zeros(()), state, jnp.ones(()))
        pulls.append(float(pull))
    assert pulls == [0.0, 2.0, 4.0]
    assert state == regularize.CountState(3)
    assert jax.tree.leaves(regularize.add_l1(0.1).init(PARAMS)) == []


def test_a_strength_may_be_traced_and_batched():
    def pulled(strength):
        tx = regularize.add_l1(strength)
        return tx.update(jnp.zeros(2), tx.init(jnp.ones(2)), jnp.ones(2))[0]

    np.testing.assert_allclose(jax.jit(jax.vmap(pulled))(jnp.array([0.1, 0.5])), [[0.1, 0.1], [0.5, 0.5]], rtol=1e-6)
    injected = optax.inject_hyperparams(regularize.add_l1)(strength=0.25)
    updates, _ = injected.update(jnp.zeros(2), injected.init(jnp.ones(2)), jnp.ones(2))
    np.testing.assert_array_equal(updates, 0.25)


RATE = 0.1
OPTIMISERS = {
    "sgd": optax.sgd(RATE),
    "momentum": optax.sgd(RATE, momentum=0.9, nesterov=True),
    "adam": optax.adam(RATE),
    "adamw": optax.adamw(RATE, weight_decay=0.1),
    "lion": optax.lion(RATE),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.rmsprop(RATE)),
    "schedule-free": optax.contrib.schedule_free_sgd(RATE),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_parameters_land_on_the_operator_behind_any_optimiser(name):
    bare = OPTIMISERS[name]
    tx = optax.chain(bare, regularize.proximal(prox.soft_threshold, 2.0, RATE, where="**/kernel"))

    @jax.jit
    def step(params, state):
        free, _ = bare.update(GRADIENTS, state[0], params)
        updates, state = tx.update(GRADIENTS, state, params)
        return optax.apply_updates(params, updates), optax.apply_updates(params, free), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, free, state = step(params, state)
        np.testing.assert_array_equal(params["a"]["bias"], free["a"]["bias"])
        for layer in ("a", "b"):
            expected = prox.soft_threshold(free[layer]["kernel"], 2.0 * RATE)
            np.testing.assert_allclose(params[layer]["kernel"], expected, atol=1e-6)
            sure = jnp.abs(free[layer]["kernel"]) < 2.0 * RATE - 1e-5
            np.testing.assert_array_equal(jnp.where(sure, params[layer]["kernel"], 0.0), 0.0)
    assert (params["a"]["kernel"] == 0.0).any()


def test_proximal_descent_solves_the_lasso_where_the_subgradient_has_no_zeros():
    """With orthonormal columns the solution is known: the soft threshold of the least-squares one."""
    q = jnp.linalg.qr(jax.device_put(np.asarray(RNG.normal(size=(20, 6)), np.float32)))[0]
    y = q @ jnp.array([2.0, -1.0, 0.5, 0.05, 0.0, -0.02]) + 0.01
    solution = prox.soft_threshold(q.T @ y, 0.2)
    assert (solution == 0.0).sum() == 3

    @partial(jax.jit, static_argnums=0)
    def solve(tx):
        def body(_, carry):
            w, state = carry
            updates, state = tx.update(q.T @ (q @ w - y), state, w)
            return optax.apply_updates(w, updates), state

        return jax.lax.fori_loop(0, 100, body, (jnp.ones(6), tx.init(jnp.ones(6))))[0]

    landed = solve(optax.chain(optax.sgd(0.5), regularize.proximal(prox.soft_threshold, 0.2, 0.5)))
    circling = solve(optax.chain(regularize.add_l1(0.2), optax.sgd(0.5)))
    np.testing.assert_array_equal(landed == 0.0, solution == 0.0)
    np.testing.assert_allclose(landed, solution, atol=1e-5)
    assert (circling != 0.0).all()


def test_strength_and_rate_may_both_be_schedules():
    tx = regularize.proximal(prox.soft_threshold, lambda t: 1.0 * t, lambda t: 0.5**t)
    w, state = jnp.full((1,), 4.0), tx.init(jnp.ones(1))
    for expected in (4.0, 3.5, 3.0, 2.625):  # minus t / 2^t
        updates, state = jax.jit(tx.update)(jnp.zeros(1), state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w, expected, rtol=1e-6)


def test_group_lasso_cuts_whole_units_and_nuclear_the_rank():
    w = jnp.array([[2.0, 0.1, 1.0], [2.0, 0.1, 1.0]])
    for operator, check in (
        (prox.group_lasso, lambda w: np.testing.assert_array_equal(w[:, 1], 0.0)),
        (prox.singular_value_threshold, lambda w: np.testing.assert_array_less(np.linalg.svd(w)[1][1], 1e-6)),
    ):
        tx = regularize.proximal(operator, 0.5, 1.0)
        updates, _ = tx.update(jnp.zeros_like(w), tx.init(w), w)
        check(optax.apply_updates(w, updates))


def test_projected_lands_inside():
    tx = optax.chain(optax.sgd(1.0, momentum=0.9), regularize.projected(partial(prox.box, low=-0.5, high=0.5), where="**/kernel"))
    updates, _ = jax.jit(tx.update)(GRADIENTS, tx.init(PARAMS), PARAMS)
    landed = optax.apply_updates(PARAMS, updates)
    assert jnp.abs(landed["a"]["kernel"]).max() <= 0.5 + 1e-6
    np.testing.assert_array_equal(landed["a"]["bias"], PARAMS["a"]["bias"] - GRADIENTS["a"]["bias"])


def test_sixteen_bit_parameters_land_on_exact_zeros():
    w = jax.device_put(np.asarray(RNG.normal(size=(8, 8)), jnp.bfloat16))
    tx = optax.chain(optax.adamw(0.1), regularize.proximal(prox.soft_threshold, 5.0, 0.1))
    updates, _ = jax.jit(tx.update)(jnp.ones_like(w), tx.init(w), w)
    landed = optax.apply_updates(w, updates)
    assert landed.dtype == jnp.bfloat16
    assert (landed == 0.0).sum() > 10
    added, _ = regularize.add_l1(0.5).update(jnp.zeros_like(w), optax.EmptyState(), w)
    assert added.dtype == jnp.bfloat16


def test_it_batches_over_models_and_strengths():
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)

    def landed(params, strength):
        tx = optax.chain(optax.adam(RATE), regularize.proximal(prox.soft_threshold, strength, RATE))
        updates, _ = tx.update(GRADIENTS, tx.init(params), params)
        return optax.apply_updates(params, updates)

    batched = jax.jit(jax.vmap(landed))(stacked, jnp.array([1.0, 3.0]))
    single = landed(jax.tree.map(lambda x: x[1], stacked), 3.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y, atol=1e-6), batched, single)


def test_it_works_inside_multi_steps_and_takes_extra_arguments():
    tx = optax.MultiSteps(optax.chain(optax.sgd(RATE), regularize.proximal(prox.soft_threshold, 2.0, RATE)), every_k_schedule=2)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
    free = jax.tree.map(lambda w, g: w - RATE * g, PARAMS, GRADIENTS)
    np.testing.assert_allclose(params["a"]["kernel"], prox.soft_threshold(free["a"]["kernel"], 0.2), atol=1e-6)
    for link in (
        regularize.add_l1(0.1),
        regularize.proximal(prox.soft_threshold, 0.1, 0.1),
        regularize.projected(prox.nonnegative),
    ):
        link.update(GRADIENTS, link.init(PARAMS), PARAMS, value=jnp.float32(1.0))


@flax.struct.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


def test_every_kind_of_tree_lands_alike():
    kernel, bias = PARAMS["a"]["kernel"], PARAMS["a"]["bias"]
    state = nnx.State({"bias": nnx.Param(bias), "kernel": nnx.Param(kernel)})
    tx = optax.chain(regularize.add_l1(0.5), optax.sgd(RATE), regularize.proximal(prox.soft_threshold, 2.0, RATE))
    expected = None
    for params in ({"bias": bias, "kernel": kernel}, (bias, kernel), Layer(kernel, bias), state):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        landed = optax.apply_updates(params, updates)
        assert jax.tree.structure(landed) == jax.tree.structure(params)
        leaves = sorted(jax.tree.leaves(landed), key=jnp.ndim)
        expected = expected or leaves
        jax.tree.map(np.testing.assert_array_equal, leaves, expected)


class Fake(quax.ArrayValue):
    latent = "w"
    w: jax.Array
    step: jax.Array

    def aval(self):
        return jax.core.ShapedArray(self.w.shape, self.w.dtype)

    def materialise(self):
        return jnp.round(self.w / self.step) * self.step


class Codes(quax.ArrayValue):
    codes: jax.Array

    def aval(self):
        return jax.core.ShapedArray(self.codes.shape, jnp.float32)

    def materialise(self):
        return self.codes.astype(jnp.float32)


def test_compressed_leaves_land_in_their_latent_weight_and_codes_are_left_alone():
    w = PARAMS["a"]["kernel"]
    params = {"codes": Codes(jnp.ones((2, 3), jnp.int8)), "kernel": Fake(w, jnp.float32(0.5))}
    gradients = {"codes": Codes(np.zeros((2, 3), jax.dtypes.float0)), "kernel": Fake(GRADIENTS["a"]["kernel"], jnp.float32(0.25))}
    land = regularize.proximal(prox.soft_threshold, 0.5, 1.0, where="kernel")
    updates, _ = land.update(gradients, land.init(params), params)
    np.testing.assert_allclose(w + updates["kernel"].w, prox.soft_threshold(w + GRADIENTS["a"]["kernel"], 0.5), atol=1e-6)
    assert updates["kernel"].step == 0.25
    assert updates["codes"] is gradients["codes"]
    added, _ = regularize.add_l1(0.5, where="kernel").update(gradients, optax.EmptyState(), params)
    np.testing.assert_allclose(added["kernel"].w, GRADIENTS["a"]["kernel"] + 0.5 * jnp.sign(w), rtol=1e-6)
    with pytest.raises(TypeError, match=r"^codes is stored as Codes, which has no latent weight"):
        regularize.add_l1(0.5).update(gradients, optax.EmptyState(), params)
    with pytest.raises(TypeError, match=r"^codes is stored as Codes, which has no latent weight"):
        regularize.projected(prox.nonnegative).update(gradients, optax.EmptyState(), params)


LINKS = {
    "add_penalty": regularize.add_l1(0.1),
    "proximal": regularize.proximal(prox.soft_threshold, 0.1, 0.1),
    "projected": regularize.projected(prox.nonnegative),
}


@pytest.mark.parametrize("name", LINKS)
def test_bad_calls_are_named_in_one_line(name):
    tx = LINKS[name]
    with pytest.raises(ValueError, match=rf"^{name} needs the parameters: call tx.update\(updates, state, params\)$"):
        tx.update(GRADIENTS, tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"^b has shape \(4,\) and its update \(4, 1\); they must be equal$"):
        tx.update({"b": jnp.ones((4, 1))}, tx.init(PARAMS), {"b": jnp.ones(4)})
    with pytest.raises(ValueError, match=rf"^{name} got 1 updates for 3 parameters; their trees must have the same structure$"):
        tx.update({"b": jnp.ones(4)}, tx.init(PARAMS), PARAMS)


def test_bad_settings_are_named_in_one_line():
    with pytest.raises(ValueError, match=r"^strength must be at least 0; got -0.1$"):
        regularize.add_l1(-0.1)
    with pytest.raises(ValueError, match=r"^learning_rate must be at least 0; got nan$"):
        regularize.proximal(prox.soft_threshold, 0.1, float("nan"))
    misspelt = regularize.proximal(prox.soft_threshold, 0.1, 0.1, where="**/kernal")
    with pytest.raises(ValueError, match=r"^nothing matches where='\*\*/kernal'"):
        misspelt.update(GRADIENTS, optax.EmptyState(), PARAMS)
    with pytest.raises(TypeError, match=r"^ids is int32, and projected needs floating weights; leave it out of `where`$"):
        regularize.projected(prox.nonnegative).update({"ids": jnp.ones(2)}, optax.EmptyState(), {"ids": jnp.ones(2, jnp.int32)})
    low_rank = regularize.proximal(prox.singular_value_threshold, 0.1, 0.1)
    with pytest.raises(ValueError, match=r"^bias: an array of shape \(3,\) is not a matrix; choose `where` to fit$"):
        low_rank.update(GRADIENTS["a"], optax.EmptyState(), PARAMS["a"])
    with pytest.raises(ValueError, match=r"^b has shape \(4,\) and projected was given \(\) to land on$"):
        regularize.projected(jnp.sum).update({"b": jnp.ones(4)}, optax.EmptyState(), {"b": jnp.ones(4)})
