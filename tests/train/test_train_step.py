"""The step against numpy, what it hands to the optimiser, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxopt_lab import compress, nets, parallel, prune, train
from jaxopt_lab.core import rows

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


def test_a_line_search_is_that_of_optax():
    tx = optax.lbfgs(memory_size=3)
    weight = np.array([1, 2, 0.5, 0, 0, 3], np.float32)

    def objective(w):
        return jnp.sum(weight * (X @ w - Y) ** 2) / weight.sum() + 0.1 * jnp.sum(w**2)

    @jax.jit
    def plain(w, opt_state):
        value, grad = jax.value_and_grad(objective)(w)
        updates, opt_state = tx.update(grad, opt_state, w, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(w, updates), opt_state

    step = jax.jit(train.make_step(LINEAR, squared, tx, penalty=lambda w: 0.1 * jnp.sum(w**2)))
    state = train.init(LINEAR, tx, KEY, X)
    w, opt_state, values = state.params, state.opt_state, []
    for _ in range(4):
        state, metrics = step(state, {**BATCH, "weight": weight})
        w, opt_state = plain(w, opt_state)
        values.append(float(metrics["loss"] + metrics["penalty"]))
        np.testing.assert_allclose(state.params, w, rtol=1e-3, atol=1e-5)
    assert values[0] > values[1] > values[2] > values[3]


def descending(rate, seen=None):
    """Gradient descent whose gradient is that of `value_fn`, taken by JAX; and `value_fn` must be `value` here."""

    def update(updates, state, params, *, value, grad, value_fn):
        again, pull = jax.value_and_grad(value_fn)(params)
        if seen is not None:
            seen.update(value=value, again=again, grad=grad, pull=pull, beyond=value_fn(jax.tree.map(lambda w: w + 1, params)))
        return jax.tree.map(lambda g: -rate * g, pull), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


@pytest.mark.parametrize("axis_name", [None, "d"])
def test_the_value_function_is_the_objective_with_its_gradient(axis_name):
    seen = {}

    def run(batch):
        step = train.make_step(LINEAR, squared, descending(0.1, seen), penalty=lambda w: 0.1 * jnp.sum(w**2), axis_name=axis_name)
        state, _ = step(train.init(LINEAR, step.tx, KEY, X), batch)
        return state.params, dict(seen)

    if axis_name is None:
        params, found = jax.jit(run)(BATCH)
    else:
        # Four devices of two rows; two rows are padding.
        over = jax.jit(jax.vmap(run, axis_name=axis_name))(parallel.split_rows(rows.pad_rows(BATCH, 8), 4))
        params, found = jax.tree.map(lambda x: x[0], over)
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.stack([x[0]] * 4)), over)
    start = train.init(LINEAR, optax.sgd(0.1), KEY, X).params
    loss, w = by_hand(start, np.ones(6), 0.1, 0.1)
    np.testing.assert_allclose(params, w, rtol=1e-5)
    np.testing.assert_allclose(found["value"], loss + 0.1 * np.sum(np.square(start)), rtol=1e-5)
    np.testing.assert_allclose(found["again"], found["value"], rtol=1e-6)
    np.testing.assert_allclose(found["pull"], found["grad"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["beyond"], by_hand(start + 1, np.ones(6), 0)[0] + 0.1 * np.sum((start + 1) ** 2), rtol=1e-5)


def test_the_value_function_draws_the_dropout_of_the_step():
    model = nets.from_linen(nets.MLP(features=(16,), classes=1, dropout=0.5))

    @jax.jit
    def values(state):
        seen = {}
        train.make_step(model, lambda out, batch: out[:, 0] ** 2, descending(0.1, seen))(state, BATCH)
        return seen["value"], seen["again"]

    value, again = values(train.init(model, descending(0.1), KEY, X))
    assert float(value) == float(again) != 0


def test_the_value_function_fills_up_what_is_masked_out():
    model = nets.from_functions(lambda key, x: {"a": jnp.ones(3), "b": jnp.ones(())}, lambda p, x: x @ p["a"] + p["b"])
    masked = optax.masked(descending(0.1), {"a": True, "b": False}, mask_compatible_extra_args=True)
    tx = optax.chain(masked, optax.masked(optax.set_to_zero(), {"a": False, "b": True}))
    state = train.init(model, tx, KEY, X)
    new, _ = train.make_step(model, squared, tx)(state, BATCH)
    error = X @ np.ones(3) + 1 - Y
    np.testing.assert_allclose(new.params["a"], 1 - 0.1 * (2 * error[:, None] * X).mean(0), rtol=1e-5)
    assert float(new.params["b"]) == 1.0


def test_a_line_search_on_compressed_leaves():
    model = nets.from_linen(nets.MLP(features=(4,), classes=1))
    stored = {"params": compress.quantize(model.init(KEY, X)["params"], where="**/kernel")}
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10))
    step = jax.jit(train.make_step(model, lambda out, batch: (out[:, 0] - batch["y"]) ** 2, tx))
    state, losses = train.init(model, tx, KEY, X, variables=stored), []
    for _ in range(3):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 1)], ids=["bare", "MultiSteps"])
def test_a_plateau_is_seen_by_the_value(wrap):
    tx = wrap(optax.chain(optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=2)))
    step, state = jax.jit(train.make_step(LINEAR, squared, tx)), train.init(LINEAR, tx, KEY, X)
    scales = []
    for _ in range(6):
        state, _ = step(state, BATCH)
        scales.append(float(optax.tree.get(state.opt_state, "scale")))
    # The first value is the best one; after every two more that are no better the rate is halved.
    assert scales == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("tx", [optax.apply_if_finite(optax.adamw(0.1), 2), optax.MultiSteps(optax.adam(0.1), 2)])
def test_any_optimiser(tx):
    state = train.init(LINEAR, tx, KEY, X)
    new, metrics = jax.jit(train.make_step(LINEAR, squared, tx))(state, BATCH)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert np.isfinite(metrics["loss"])


ADAM, SGD = optax.adam(0.1), optax.sgd(0.1)


@pytest.mark.parametrize(
    ("tx", "other", "message"),
    [
        (ADAM, SGD, r"is \(EmptyState, EmptyState\), the optimiser's is \(ScaleByAdamState, EmptyState\); start from"),
        (SGD, ADAM, r"is \(ScaleByAdamState, EmptyState\), the optimiser's is \(EmptyState, EmptyState\); start from"),
        (prune.sparsify(SGD, 0.5, where="**"), SGD, r"is \(EmptyState, EmptyState\), the optimiser's is SparsifyState\(\("),
        (optax.MultiSteps(ADAM, 2), ADAM, r"optimiser's is MultiStepsState\(\(ScaleByAdamState, EmptyState\)"),
    ],
)
def test_a_state_of_another_optimiser_is_named(tx, other, message):
    model = nets.from_functions(lambda key, x: {"w": jnp.ones(3)}, lambda p, x: x @ p["w"])
    with pytest.raises(ValueError, match=message) as error:
        train.make_step(model, squared, tx)(train.init(model, other, KEY, X), BATCH)
    assert "\n" not in str(error.value)


def test_a_state_of_other_parameters_is_named():
    model = nets.from_functions(lambda key, x: {"w": jnp.ones(3)}, lambda p, x: x @ p["w"])
    state = train.init(model, ADAM, KEY, X)._replace(opt_state=ADAM.init({"v": jnp.ones(3)}))
    with pytest.raises(ValueError, match=r"of other parameters \(0/mu/v\)"):
        train.make_step(model, squared, ADAM)(state, BATCH)


def test_what_is_no_model_is_named():
    for module, way in ((nets.MLP(), "linen"), (nnx.Linear(3, 1, rngs=nnx.Rngs(0)), "nnx"), (lambda w, x: x @ w, "functions")):
        for call in (lambda m: train.init(m, SGD, KEY, X), lambda m: train.make_step(m, squared, SGD)):
            message = rf"^model must be a Model; this {type(module).__name__} becomes one by nets\.from_{way}\("
            with pytest.raises(TypeError, match=message):
                call(module)


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
    with pytest.raises(ValueError, match='"x"; this one has y'):
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
