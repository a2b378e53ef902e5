"""The step against numpy, what it hands to the optimiser, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import compress, nets, train

KEY = jax.random.key(2)
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((6, 3), dtype=np.float32), RNG.standard_normal(6, dtype=np.float32)
BATCH = {"x": X, "y": Y}
LINEAR = nets.from_functions(lambda key, x: jax.random.normal(key, (3,)), lambda w, x: x @ w)


def squared(outputs, batch):
    return (outputs - batch["y"]) ** 2


def by_hand(w, weight, rate, decay=0.0):
    """The loss and one step of gradient descent on a weighted mean of squares plus decay |w|^2, example by example."""
    w = np.asarray(w, np.float64)
    loss, gradient = 0.0, np.zeros(3)
    for x, y, one in zip(X, Y, weight, strict=True):
        loss += one * (x @ w - y) ** 2 / sum(weight)
        gradient += one * 2 * (x @ w - y) * x / sum(weight)
    return loss, w - rate * (gradient + 2 * decay * w)


@pytest.mark.parametrize("weight", [None, np.array([1, 2, 0.5, 0, 0, 3], np.float32)], ids=["plain", "weighted"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_one_step_of_gradient_descent(weight, decay, wrap):
    tx = optax.sgd(0.1)
    penalty = (lambda w: decay * jnp.sum(w**2)) if decay else None
    state = train.init(LINEAR, tx, KEY, X)
    batch = BATCH if weight is None else {**BATCH, "weight": weight}
    new, metrics = wrap(train.make_step(LINEAR, squared, tx, penalty=penalty))(state, batch)
    loss, w = by_hand(state.params, np.ones(6) if weight is None else weight, 0.1, decay)
    np.testing.assert_allclose(new.params, w, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert set(metrics) == ({"loss", "penalty"} if decay else {"loss"})
    if decay:
        np.testing.assert_allclose(metrics["penalty"], decay * np.sum(np.square(state.params)), rtol=1e-5)
    assert (int(new.step), new.step.dtype) == (1, jnp.int32)
    assert new.key == state.key


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_batch_of_padding_alone_moves_nothing(wrap):
    tx = optax.sgd(0.1)
    state = train.init(LINEAR, tx, KEY, X)
    new, metrics = wrap(train.make_step(LINEAR, squared, tx))(state, {**BATCH, "weight": np.zeros(6, np.float32)})
    np.testing.assert_array_equal(new.params, state.params)
    assert (float(metrics["loss"]), int(new.step)) == (0.0, 1)


def test_many_seeds_at_once():
    tx = optax.adam(0.1)
    step = train.make_step(LINEAR, squared, tx)
    keys = jax.random.split(KEY, 3)
    states = jax.vmap(lambda key: train.init(LINEAR, tx, key, X))(keys)
    together, _ = jax.jit(jax.vmap(step, in_axes=(0, None)))(states, BATCH)
    for k, key in enumerate(keys):
        alone, _ = step(train.init(LINEAR, tx, key, X), BATCH)
        np.testing.assert_allclose(together.params[k], alone.params, rtol=1e-5)


def test_dropout_follows_the_state_key_and_the_step():
    model = nets.from_linen(nets.MLP(features=(16,), classes=1, dropout=0.5))
    step = jax.jit(train.make_step(model, lambda out, batch: out[:, 0] ** 2, optax.sgd(0.0)))
    state = train.init(model, optax.sgd(0.0), KEY, X)
    one, first = step(state, BATCH)
    _, again = step(state, BATCH)
    _, second = step(one, BATCH)
    _, other = step(state._replace(key=jax.random.key(9)), BATCH)
    assert float(first["loss"]) == float(again["loss"])
    assert len({float(m["loss"]) for m in (first, second, other)}) == 3


def test_the_optimiser_gets_parameters_and_the_value():
    seen = {}

    def update(updates, state, params, *, value):
        seen.update(params=params, value=value)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state = train.init(LINEAR, tx, KEY, X)
    _, metrics = train.make_step(LINEAR, squared, tx, penalty=lambda w: jnp.sum(w**2))(state, BATCH)
    np.testing.assert_allclose(seen["value"], metrics["loss"] + metrics["penalty"], rtol=1e-6)
    np.testing.assert_array_equal(seen["params"], state.params)


@pytest.mark.parametrize(
    "tx", [optax.contrib.reduce_on_plateau(), optax.apply_if_finite(optax.adamw(0.1), 2), optax.MultiSteps(optax.adam(0.1), 2)]
)
def test_any_optimiser(tx):
    state = train.init(LINEAR, tx, KEY, X)
    new, metrics = jax.jit(train.make_step(LINEAR, squared, tx))(state, BATCH)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert np.isfinite(metrics["loss"])


def test_several_inputs():
    model = nets.from_functions(lambda key, a, b: jnp.ones(()), lambda w, a, b: w * (a - b))
    state = train.init(model, optax.sgd(0.5), KEY, (Y, Y))
    new, _ = train.make_step(model, lambda out, batch: out, optax.sgd(0.5))(state, {"x": (Y + 2, Y)})
    np.testing.assert_allclose(new.params, 0.0, atol=1e-6)


def test_compressed_leaves_train_what_they_declare():
    model = nets.from_linen(nets.MLP(features=(4,), classes=1))
    variables = model.init(KEY, X)
    stored = {"params": compress.quantize(variables["params"], where="**/kernel")}
    tx = optax.adamw(0.1)
    state = train.init(model, tx, KEY, X, variables=stored)
    step = train.make_step(model, lambda out, batch: (out[:, 0] - batch["y"]) ** 2, tx)
    new, metrics = jax.jit(step)(state, BATCH)
    assert np.isfinite(metrics["loss"])
    assert (new.params["Dense_1"]["bias"] != state.params["Dense_1"]["bias"]).any()
    for old, now in zip(*(jax.tree.leaves(s.params["Dense_0"]["kernel"]) for s in (state, new)), strict=True):
        np.testing.assert_array_equal(old, now)
    result = train.evaluate(model, new, {"x": X, "y": np.zeros(6, np.int32)})
    assert result == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"y": Y}, '"x"; this one has y'),
        ([X, Y], '"x"; this one has type list'),
        ({"x": np.float32(1), "y": Y}, "leading batch axis"),
        ({**BATCH, "weight": np.ones(5)}, r'"weight".*\(6,\).*\(5,\)'),
        ({**BATCH, "weight": np.ones((6, 1))}, r"\(6,\).*\(6, 1\)"),
    ],
)
def test_a_bad_batch_is_named(batch, message):
    step = train.make_step(LINEAR, squared, optax.sgd(0.1))
    with pytest.raises(ValueError, match=message) as error:
        step(train.init(LINEAR, step.tx, KEY, X), batch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loss", [lambda out, batch: jnp.mean(out), lambda out, batch: out[:, None]])
def test_a_loss_that_is_not_one_value_an_example_is_named(loss):
    step = train.make_step(LINEAR, loss, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"one value per example, shape \(6,\); it returned \("):
        step(train.init(LINEAR, step.tx, KEY, X), BATCH)


def test_an_update_that_would_broadcast_is_named():
    tx = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u[:, None], updates))
    model = nets.from_functions(lambda key, x: {"w": jnp.ones(3)}, lambda p, x: x @ p["w"])
    with pytest.raises(ValueError, match=r"update of w has shape \(3, 1\), the parameter \(3,\)"):
        train.make_step(model, squared, tx)(train.init(model, tx, KEY, X), BATCH)


def test_init_refuses_what_it_cannot_start_from():
    tx = optax.sgd(0.1)
    with pytest.raises(TypeError, match="typed key"):
        train.init(LINEAR, tx, jnp.zeros(2, jnp.uint32), X)
    with pytest.raises(ValueError, match='"x"; it has y'):
        train.init(LINEAR, tx, KEY, {"y": Y})
    with pytest.raises(ValueError, match='"params"; they have w'):
        train.init(LINEAR, tx, KEY, X, variables={"w": 1})
    given = train.init(LINEAR, tx, KEY, BATCH, variables={"params": jnp.ones(3)})
    np.testing.assert_array_equal(given.params, np.ones(3))
    assert train.variables(given)["params"] is given.params


def test_a_padded_row_may_have_no_finite_loss():
    tx = optax.sgd(0.1)
    state = train.init(LINEAR, tx, jax.random.key(0), X)
    step = train.make_step(LINEAR, lambda outputs, batch: jnp.where(batch["weight"] == 0, jnp.nan, squared(outputs, batch)), tx)
    new, metrics = step(state, {**BATCH, "weight": np.array([1, 1, 1, 1, 1, 0], np.float32)})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new.params, metrics)))


def test_a_batch_of_padding_leaves_batch_statistics_alone():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(x))[:, 0]

    model, tx = nets.from_linen(Net()), optax.sgd(0.1)
    state = train.init(model, tx, jax.random.key(0), X)
    new, _ = train.make_step(model, squared, tx)(state, {**BATCH, "weight": np.zeros(6, np.float32)})
    jax.tree.map(np.testing.assert_array_equal, (new.params, new.model_state), (state.params, state.model_state))


def test_an_optimiser_that_takes_no_value():
    tx = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2)
    step = train.make_step(LINEAR, squared, tx)
    state = train.init(LINEAR, tx, jax.random.key(0), X)
    for _ in range(4):
        state, metrics = step(state, BATCH)
    assert np.isfinite(metrics["loss"])
