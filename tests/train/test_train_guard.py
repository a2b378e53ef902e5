"""A step that is not finite leaves the state bit for bit as it was, and says what was not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import compress, nets, parallel, prune, train
from jaxopt_lab.train import guard

KEY = jax.random.key(2)
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((8, 3), dtype=np.float32), RNG.standard_normal(8, dtype=np.float32)
GOOD = {"x": X, "y": Y}
# A NaN in one row of the data.
BAD = {"x": np.where(np.arange(8)[:, None] == 5, np.float32(np.nan), X), "y": Y}
LINEAR = nets.from_functions(lambda key, x: jax.random.normal(key, (3,)), lambda w, x: x @ w)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.Dropout(0.2, deterministic=not train)(nn.relu(x)))[:, 0]


NET = nets.from_linen(Net())


def squared(outputs, batch):
    return (outputs - batch["y"]) ** 2


def bits(state):
    """The state but for its step and key, as numpy."""
    return jax.tree.map(np.asarray, (state.params, state.model_state, state.opt_state))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, bits(one), bits(other))


def differs(one, other):
    return any((a != b).any() for a, b in zip(*(jax.tree.leaves(bits(state)) for state in (one, other)), strict=True))


def test_a_moment_that_overflows():
    """A gradient whose square is infinite would leave Adam's weight where it is for good, with every parameter finite."""
    step = jax.jit(train.make_step(LINEAR, lambda y, batch: y, optax.adam(0.1), guard=True))
    start = train.init(LINEAR, optax.adam(0.1), KEY, X)
    after, metrics = step(start, {"x": np.full((8, 3), 1e20, np.float32)})
    same(after, start)
    assert guard.offender(after, metrics["nonfinite"]) == "opt_state 0/nu"
    # What was infinite from the beginning, by intention, is none of it.
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    step = jax.jit(train.make_step(LINEAR, squared, plateau, guard=True))
    state = train.init(LINEAR, plateau, KEY, X)
    assert np.isinf(state.opt_state[1].best_value)
    assert step(state, GOOD)[1]["skipped"] == 0


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.1),
        prune.sparsify(optax.sgd(0.1, momentum=0.9), 0.5, begin=0, end=9, every=1, where="**/kernel"),
        pytest.param(optax.MultiSteps(optax.adam(0.1), 2), marks=pytest.mark.slow),
    ],
    ids=["adam", "sparsify", "MultiSteps"],
)
def test_a_nan_in_one_row_of_the_data(tx):
    step = train.make_step(NET, squared, tx, guard=True)
    one, plain = jax.jit(step), jax.jit(train.make_step(NET, squared, tx))
    start, _ = plain(train.init(NET, tx, KEY, X), GOOD)
    after, metrics = one(start, BAD)
    same(after, start)
    assert (int(after.step), int(start.step)) == (2, 1)
    assert (float(metrics["skipped"]), metrics["skipped"].dtype, metrics["nonfinite"].dtype) == (1, jnp.float32, jnp.int32)
    assert guard.offender(after, metrics["nonfinite"]) == "loss"
    assert np.isnan(metrics["loss"])
    # Without the guard there would be no number left, in the running statistics no more than in the parameters.
    unguarded, _ = plain(start, BAD)
    assert np.isnan(unguarded.model_state["batch_stats"]["BatchNorm_0"]["mean"]).all()
    on, metrics = one(after, GOOD)
    expected, expected_metrics = plain(after, GOOD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), bits(on), bits(expected))
    assert (float(metrics["skipped"]), int(metrics["nonfinite"])) == (0, -1)
    assert set(metrics) == {*expected_metrics, "skipped", "nonfinite"}
    assert differs(on, after)


def moved_by(rate):
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u: -jnp.float32(rate) * u, updates))


def rooted(params, x):
    return params["a"] * x + jnp.sqrt(params["b"])


def counted(variables, x, train):
    return variables["params"]["w"] * x, {"seen": {"sum": variables["seen"]["sum"] * 1e30, "steps": variables["seen"]["steps"] + 1}}


ROOTED = nets.from_functions(lambda key, x: {"a": jnp.ones(()), "b": jnp.zeros(())}, rooted)
COUNTED = nets.from_functions(
    lambda key, x: {"params": {"w": jnp.ones(())}, "seen": {"steps": jnp.int32(0), "sum": jnp.float32(1e30)}},
    counted,
    stateful=True,
)
SCALAR = nets.from_functions(lambda key, x: {"w": jnp.ones(())}, lambda p, x: p["w"] * x)


@pytest.mark.parametrize(
    ("model", "tx", "name"),
    [
        # The derivative of a square root at 0 is infinite, and its value is not.
        (ROOTED, moved_by(0.1), "gradient of b"),
        (COUNTED, moved_by(0.1), "model_state seen/sum"),
        # 1 - 3e38 * 2 is beyond float32.
        (SCALAR, moved_by(3e38), "parameter w"),
        # Of an optimiser that fails on finite gradients.
        (SCALAR, moved_by(np.nan), "parameter w"),
    ],
)
def test_what_was_not_finite_is_named(model, tx, name):
    batch = {"x": np.array([1, 3], np.float32)}
    state = train.init(model, tx, KEY, batch)
    after, metrics = jax.jit(train.make_step(model, lambda out, batch: out, tx, guard=True))(state, batch)
    same(after, state)
    assert float(metrics["skipped"]) == 1
    assert np.isfinite(metrics["loss"])
    assert guard.offender(jax.eval_shape(lambda: state), int(metrics["nonfinite"])) == name


def test_the_first_one_counts():
    state = train.init(ROOTED, moved_by(0.1), KEY, X[:, 0])
    assert guard.names(state) == ["loss", "gradient of a", "gradient of b", "parameter a", "parameter b"]
    assert guard.names(state._replace(params=1.0))[1] == "gradient of (the only one)"
    trees = jnp.float32(0), {"a": jnp.ones(2), "b": jnp.int32(3)}, jnp.array([1, jnp.inf]), jnp.array([jnp.nan])
    assert int(guard.first_nonfinite(*trees)) == 3
    assert int(guard.first_nonfinite(*trees[:2])) == -1
    for index in (5, -2):
        with pytest.raises(ValueError, match=rf"nonfinite={index} is not of this state, of which 5 things"):
            guard.offender(state, index)


def test_keys_and_codes_are_chosen_too():
    new, old = ({"key": jax.random.key(k), "codes": jnp.full(2, k, jnp.int8), "none": ()} for k in (1, 2))
    for keep, expected in ((True, new), (False, old)):
        chosen = jax.jit(guard.select)(jnp.bool_(keep), new, old)
        assert chosen["key"] == expected["key"]
        np.testing.assert_array_equal(chosen["codes"], expected["codes"])
        assert chosen["codes"].dtype == jnp.int8


def test_each_of_many_configurations_has_its_own():
    def run(rate, batch):
        tx = optax.sgd(rate, momentum=0.9)
        state = train.init(LINEAR, tx, KEY, X)
        return state, *train.make_step(LINEAR, squared, tx, guard=True)(state, batch)

    batches = jax.tree.map(lambda *rows: np.stack(rows), GOOD, BAD, GOOD)
    old, new, metrics = jax.jit(jax.vmap(run))(jnp.array([0.1, 0.1, jnp.inf]), batches)
    assert metrics["skipped"].tolist() == [0, 1, 1]
    assert [guard.offender(old, index) for index in metrics["nonfinite"]] == ["nothing", "loss", "parameter (the only one)"]
    assert (new.params[0] != old.params[0]).all()
    np.testing.assert_array_equal(new.params[1:], old.params[1:])


def test_all_devices_pass_over_what_one_meets():
    tx = optax.sgd(0.1, momentum=0.9)
    step = parallel.pmap(train.make_step(NET, squared, tx, guard=True, axis_name="d"))
    state = train.init(NET, tx, KEY, X)
    state, metrics = step(state, GOOD)
    after, metrics_after = step(state, BAD)
    same(after, state)
    assert (float(metrics["skipped"]), float(metrics_after["skipped"])) == (0, 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(bits(after)))


def test_compressed_leaves():
    variables = jax.jit(NET.init)(KEY, X)
    variables = {**variables, "params": compress.quantize(variables["params"], where="**/kernel")}
    tx = optax.adam(0.1)
    step = jax.jit(train.make_step(NET, squared, tx, guard=True))
    state, metrics = step(train.init(NET, tx, KEY, X, variables=variables), GOOD)
    assert float(metrics["skipped"]) == 0
    after, metrics = step(state, BAD)
    same(after, state)
    assert float(metrics["skipped"]) == 1


def test_in_the_loops_of_fit():
    tx = optax.adam(0.1)
    step = train.make_step(NET, squared, tx, guard=True)
    batches = (GOOD, GOOD, BAD, GOOD, GOOD, GOOD)
    start = state = train.init(NET, tx, KEY, X)
    result = train.fit(step, start, lambda t: batches[t], steps=6, chunk=3, progress=False)
    one = jax.jit(step)
    for batch in batches:
        state, _ = one(state, batch)
    assert int(result.state.step) == 6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), bits(result.state), bits(state))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(bits(result.state)))
