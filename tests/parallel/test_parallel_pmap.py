"""A step on eight devices is the step on one: dropout, BatchNorm, ragged batches and penalties included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxopt_lab import compress, nets, parallel, train

KEY = jax.random.key(5)


class ConvNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Conv(3, (2, 2))(x))
        x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Graph(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(16, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(8, momentum=0.9, rngs=rngs), nnx.Dropout(0.4, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x.reshape(x.shape[0], -1))))))


def own_dropout(params, x, *, train, key):
    x = x.reshape(x.shape[0], -1)
    return (x * jax.random.bernoulli(key, 0.5, x.shape) if train else x) @ params


MODELS = {
    "mlp_dropout": nets.from_linen(nets.MLP(features=(8,), classes=3, dropout=0.5)),
    "conv_norm": nets.from_linen(ConvNorm()),
    "nnx": nets.from_nnx(Graph),
    "functions": nets.from_functions(lambda key, x: jax.random.normal(key, (16, 3)), own_dropout),
}


def loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def penalty(params):
    return 0.05 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def batch_of(rows, weight=None):
    rng = np.random.default_rng(rows)
    batch = {"x": rng.standard_normal((rows, 4, 4, 1), dtype=np.float32), "y": rng.integers(0, 3, rows).astype(np.int32)}
    return batch if weight is None else {**batch, "weight": weight}


BATCHES = {
    "whole": batch_of(16),
    "ragged": batch_of(13),
    "fewer_than_devices": batch_of(5),
    "weighted": batch_of(16, np.linspace(0.2, 2, 16, dtype=np.float32)),
    "padded_already": batch_of(13, np.array([1.0] * 10 + [0.0] * 3, np.float32)),
}


def close(one, many, tolerance=1e-6):
    assert jax.tree.structure(one) == jax.tree.structure(many)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance), one, many)


@pytest.fixture(scope="module", params=MODELS)
def steps(request):
    """One device's step, eight devices', and the state both start from."""
    model, tx = MODELS[request.param], optax.sgd(0.1)
    state = train.init(model, tx, KEY, batch_of(2))
    alone = train.make_step(model, loss, tx, penalty=penalty)
    together = train.make_step(model, loss, tx, penalty=penalty, axis_name="d")
    return jax.jit(alone), parallel.pmap(together), state


# It drops as the one with a convolution does.
AGAIN = [("mlp_dropout", "ragged")]
CASES = [
    pytest.param(name, batch, marks=[pytest.mark.slow] if (name, batch) in AGAIN else [])
    for name in MODELS
    for batch in BATCHES
    if name == "conv_norm" or batch == "ragged"
]


@pytest.mark.parametrize(("steps", "batch"), CASES, indirect=["steps"])
def test_one_sgd_update_equals_that_of_one_device(steps, batch):
    alone, together, state = steps
    one, one_metrics = alone(state, BATCHES[batch])
    many, many_metrics = together(state, BATCHES[batch])
    close(one.params, many.params)
    close(one.model_state, many.model_state)
    close(one_metrics, many_metrics, 3e-6)
    assert int(many.step) == 1
    # A step that changed nothing would agree as well.
    assert max(float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (state.params, one.params)), strict=True)) > 1e-3


def shard_mapped(check_vma):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    specs = (jax.P(), jax.P("d")), (jax.P(), jax.P())
    return lambda step: jax.shard_map(step, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=check_vma)


def vmapped(step):
    def run(state, batch):
        everywhere = jax.vmap(step, in_axes=(None, 0), axis_name="d")(state, parallel.split_rows(batch, 8))
        return jax.tree.map(lambda leaf: leaf[3], everywhere)

    return run


@pytest.mark.parametrize("wrap", [shard_mapped(True), shard_mapped(False), vmapped], ids=["tracked", "untracked", "vmap"])
def test_the_step_is_right_under_any_mapping(wrap):
    """A gradient that is summed once too often, or not at all, is the usual mistake; plain gradient descent shows it."""
    model, tx, batch = MODELS["nnx"], optax.sgd(0.1), BATCHES["whole"]
    state = train.init(model, tx, KEY, batch_of(2))
    one, _ = jax.jit(train.make_step(model, loss, tx, penalty=penalty))(state, batch)
    many, _ = jax.jit(wrap(train.make_step(model, loss, tx, penalty=penalty, axis_name="d")))(state, batch)
    close(one.params, many.params)
    close(one.model_state, many.model_state)


def test_compressed_leaves():
    model, tx = MODELS["mlp_dropout"], optax.sgd(0.1)
    variables = {"params": compress.quantize(jax.jit(model.init)(KEY, batch_of(2)["x"])["params"], where="**/kernel")}
    state = train.init(model, tx, KEY, batch_of(2), variables=variables)
    one, _ = jax.jit(train.make_step(model, loss, tx))(state, BATCHES["ragged"])
    many, _ = parallel.pmap(train.make_step(model, loss, tx, axis_name="d"))(state, BATCHES["ragged"])
    close(one.params, many.params)
    assert (one.params["Dense_0"]["bias"] != state.params["Dense_0"]["bias"]).any()


def test_a_line_search_goes_alike_on_every_device():
    model, tx = MODELS["functions"], optax.chain(optax.sgd(50.0), optax.scale_by_backtracking_linesearch(12))
    alone = jax.jit(train.make_step(model, loss, tx, penalty=penalty))
    together = parallel.pmap(train.make_step(model, loss, tx, penalty=penalty, axis_name="d"))
    one = many = train.init(model, tx, KEY, batch_of(2))
    for _ in range(2):
        one, _ = alone(one, BATCHES["ragged"])
        many, _ = together(many, BATCHES["ragged"])
        close(one.params, many.params, 1e-5)
    close(one.opt_state, many.opt_state, 1e-4)
    assert int(optax.tree.get(one.opt_state, "num_linesearch_steps")) > 1
    assert 0 < float(optax.tree.get(one.opt_state, "learning_rate")) < 1


def test_the_state_is_ordinary_and_comes_back_in_without_a_copy(steps):
    _, together, state = steps
    new, _ = together(state, BATCHES["whole"])
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    placed = together.place(new)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (new, placed)), strict=True))
    with jax.transfer_guard_device_to_device("disallow"):
        again, _ = together(new, BATCHES["whole"])
    assert len(again.step.sharding.device_set) == 8


def test_a_state_on_another_device_is_taken(steps):
    _, together, state = steps
    elsewhere = jax.device_put(state, jax.devices()[3])
    close(together(state, BATCHES["ragged"])[0].params, together(elsewhere, BATCHES["ragged"])[0].params, 0)


@pytest.mark.parametrize("steps", ["nnx"], indirect=True)
def test_under_fit_in_both_loops(steps):
    alone, together, state = steps
    one = state
    for _ in range(4):
        one, _ = alone(one, BATCHES["ragged"])
    for chunk in (1, 2):
        many = train.fit(together, state, lambda t: BATCHES["ragged"], steps=4, chunk=chunk, progress=False).state
        close(one.params, many.params, 1e-5)
        close(one.model_state, many.model_state, 1e-5)
    assert int(state.step) == 0


def test_on_some_of_the_devices():
    model, tx = MODELS["nnx"], optax.sgd(0.1)
    state = train.init(model, tx, KEY, batch_of(2))
    one, _ = jax.jit(train.make_step(model, loss, tx))(state, BATCHES["ragged"])
    three = parallel.pmap(train.make_step(model, loss, tx, axis_name="d"), jax.devices()[:3])
    many, _ = three(state, BATCHES["ragged"])
    close(one.params, many.params)
    assert len(many.step.sharding.device_set) == 3


def test_another_generator_still_trains():
    model, tx = MODELS["mlp_dropout"], optax.sgd(0.1)
    state = train.init(model, tx, jax.random.key(0, impl="rbg"), batch_of(2))
    new, metrics = parallel.pmap(train.make_step(model, loss, tx, axis_name="d"))(state, BATCHES["whole"])
    assert np.isfinite(metrics["loss"])
    assert int(new.step) == 1


def test_a_step_without_an_axis_is_refused():
    step = train.make_step(MODELS["functions"], loss, optax.sgd(0.1))
    with pytest.raises(ValueError, match="axis_name"):
        parallel.pmap(step)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"y": np.ones(3)}, '"x"; this one has y'),
        ({"x": np.ones((3, 2)), "y": np.ones(4)}, r'"y".*\(3,\).*\(4,\)'),
        ({"x": np.ones((3, 2)), "t": np.float32(1)}, r'"t".*its shape is \(\)'),
    ],
)
def test_a_batch_that_cannot_be_split_is_named(batch, message):
    with pytest.raises(ValueError, match=message):
        parallel.split_rows(batch, 2)


def test_rows_are_dealt_in_order():
    split = parallel.split_rows({"x": jnp.arange(5), "weight": np.full(5, 2.0)}, 3)
    assert split["x"].tolist() == [[0, 1], [2, 3], [4, 0]]
    assert split["weight"].tolist() == [[2, 2], [2, 2], [2, 0]]
    assert "weight" not in parallel.split_rows({"x": jnp.arange(4)}, 2)
