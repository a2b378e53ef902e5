"""The implicit hypergradient: ridge regression in closed form, the unrolled training at its end, and what the solvers leave."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.search.hypergradient import conjugate_gradient, hypergradient, implicit, neumann, nystrom, reverse, truncated

RNG = np.random.default_rng(1)
# In float32, which both of JAX's modes take as they are.
X, Y, HELD_X, HELD_Y = (RNG.normal(size=shape).astype(np.float32) for shape in ((30, 5), 30, (20, 5), 20))
HYPER = {"decay": np.full(5, 0.3), "weights": RNG.uniform(0.5, 1.5, size=30)}
KEY = jax.random.key(0)


def inner_loss(w, hyper):
    """Ridge regression with a decay for each coefficient and a weight for each example."""
    return 0.5 * jnp.mean(hyper["weights"] * (X @ w - Y) ** 2) + 0.5 * jnp.sum(hyper["decay"] * w**2)


def step(state, batch, hyper):
    return {"params": state["params"] - 0.2 * jax.grad(inner_loss)(state["params"], hyper)}


def outer(state):
    return jnp.mean((HELD_X @ state["params"] - HELD_Y) ** 2)


def closed(hyper):
    weighted = X * hyper["weights"][:, None] / 30
    return jnp.linalg.solve(weighted.T @ X + jnp.diag(hyper["decay"]), weighted.T @ Y)


SOLVERS = {
    "conjugate gradients": conjugate_gradient(10, tolerance=1e-12),
    "neumann": neumann(400, 0.2),
    "nystrom, all columns": nystrom(5, 1e-9, KEY),
}


def call(method, steps=400, outer=outer, hyper=None):
    state = {"params": jnp.zeros(5)}
    return hypergradient(step, outer, HYPER if hyper is None else hyper, state, {"t": np.arange(steps)}, steps=steps, method=method)


def test_at_the_minimum_it_is_the_closed_form_and_the_unrolled_one():
    with jax.enable_x64(True):
        hyper = jax.tree.map(jnp.asarray, HYPER)
        value, expected = jax.value_and_grad(lambda hyper: outer({"params": closed(hyper)}))(hyper)
        unrolled = call(reverse(), hyper=hyper)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-12), unrolled.gradient, expected)
        for solver in SOLVERS.values():
            found = call(implicit(inner_loss, solver=solver), hyper=hyper)
            assert found.value == pytest.approx(float(value), rel=1e-10)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), found.gradient, expected)
            assert found.checks["slope"] < 1e-10
            assert found.checks["residual"] < 1e-8
        # J terms at the training's own rate are the last J steps.
        short, back = call(implicit(inner_loss, solver=neumann(6, 0.2)), hyper=hyper), call(truncated(6), hyper=hyper)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-12), short.gradient, back.gradient)
        assert short.checks["residual"] > 0.05


def test_a_condition_instead_of_a_loss_and_a_direct_part():
    def outer_both(state, hyper):
        return outer(state) + 3.0 * jnp.sum(hyper["decay"])

    loss = implicit(inner_loss, solver=SOLVERS["conjugate gradients"])
    condition = implicit(inner_gradient=jax.grad(inner_loss), solver=SOLVERS["conjugate gradients"], params=lambda s: s["params"])
    plain, first, second = call(loss), call(loss, outer=outer_both), call(condition, outer=outer_both)
    np.testing.assert_allclose(first.gradient["decay"], plain.gradient["decay"] + 3.0, rtol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), second.gradient, first.gradient)


def test_a_condition_that_is_no_gradient():
    # w = A w + h: the Jacobian I - A is not symmetric, and the transposed system is solved.
    A = jnp.array([[0.5, 0.4], [0.0, 0.3]])
    goal = jnp.array([1.0, 2.0])

    def fixed_point(w, batch, h):
        return A @ w + h

    method = implicit(inner_gradient=lambda w, h: w - A @ w - h, solver=neumann(60, 1.0))
    found = hypergradient(fixed_point, lambda w: goal @ w, jnp.ones(2), jnp.zeros(2), jnp.zeros(60), steps=60, method=method)
    np.testing.assert_allclose(found.gradient, jnp.linalg.solve(jnp.eye(2) - A.T, goal), rtol=1e-5)


@pytest.mark.parametrize("damping", [0.5])
def test_damping_means_the_same_to_every_solver(damping):
    H = jnp.array(RNG.normal(size=(6, 6)), jnp.float32)
    H = H @ H.T / 6
    b = jnp.array(RNG.normal(size=6), jnp.float32)
    expected = jnp.linalg.solve(H + damping * jnp.eye(6), b)
    for solver in (conjugate_gradient(20, damping), neumann(300, 0.2, damping), nystrom(6, damping, KEY)):
        np.testing.assert_allclose(solver(lambda u: H @ u, b), expected, rtol=1e-4, atol=1e-5)
    # Some columns of a matrix of low rank are enough.
    low = H[:, :2] @ H[:, :2].T
    found = nystrom(3, damping, KEY)(lambda u: low @ u, b)
    np.testing.assert_allclose(found, jnp.linalg.solve(low + damping * jnp.eye(6), b), rtol=1e-3, atol=1e-4)


def test_it_says_how_far_to_trust_it():
    early, late = (call(implicit(inner_loss), steps=steps) for steps in (2, 100))
    assert early.checks["slope"] > 100 * late.checks["slope"]
    few, many = (call(implicit(inner_loss, solver=conjugate_gradient(k))) for k in (1, 10))
    assert few.checks["residual"] > 1e-2 > 1e3 * many.checks["residual"]


def test_rates_are_not_seen_and_bad_input_is_named():
    def with_rate(w, batch, hyper):
        return w - hyper["rate"] * (w - hyper["goal"])

    hyper, loss = {"rate": 0.5, "goal": 2.0}, lambda w, hyper: 0.5 * (w - hyper["goal"]) ** 2
    with pytest.warns(UserWarning, match="does not depend on rate, or only through"):
        found = hypergradient(with_rate, lambda w: w**2, hyper, 0.0, jnp.zeros(30), steps=30, method=implicit(loss))
    assert found.gradient["rate"] == 0
    assert found.gradient["goal"] == pytest.approx(4.0, rel=1e-4)

    def counted(state, batch, hyper):
        return {"w": with_rate(state["w"], batch, hyper), "count": state["count"] + 1}

    start = {"w": 0.0, "count": 0}
    for method, message in (
        (implicit(loss), "implicit: count of the parameters is int32; give params="),
        (implicit(inner_gradient=lambda w, h: jnp.ones(2), params=lambda s: s["w"]), "gives 2 numbers for 1 parameters"),
        (implicit(loss, solver=nystrom(2, 0.1, KEY), params=lambda s: s["w"]), r"nystrom\(rank=2\) has more columns"),
    ):
        with pytest.raises(ValueError, match=message):
            hypergradient(counted, lambda s: s["w"] ** 2, hyper, start, jnp.zeros(3), steps=3, method=method)
    for wrong in (lambda: neumann(0, 0.1), lambda: nystrom(1, 0.0, KEY), lambda: conjugate_gradient(damping=-1.0)):
        with pytest.raises(ValueError, match="a solver needs positive settings; got"):
            wrong()
    with pytest.raises(ValueError, match="takes one of inner_loss and inner_gradient"):
        implicit(loss, inner_gradient=loss)
