"""A step by parts is the step by the whole batch, on one device and on eight, for the memory of a part."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import compress, nets, parallel, train
from jaxopt_lab.train import microbatches

KEY = jax.random.key(2)
RNG = np.random.default_rng(0)


def batch_of(rows, weight=None):
    batch = {"x": RNG.standard_normal((rows, 5), dtype=np.float32), "y": RNG.integers(0, 3, rows).astype(np.int32)}
    return batch if weight is None else {**batch, "weight": np.asarray(weight, np.float32)}


BATCHES = {
    "whole": batch_of(16),
    "ragged": batch_of(13),
    "weighted": batch_of(13, [*np.linspace(0.2, 2, 10), 0, 0, 0]),
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(3)(nn.Dropout(0.4, deterministic=not train)(nn.relu(x)))


NET = nets.from_linen(Net())
DROPOUT = nets.from_linen(nets.MLP(features=(8,), classes=3, dropout=0.5))
SGD = optax.sgd(0.1)


def loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def penalty(params):
    return 0.05 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def close(one, other, tolerance=1e-6):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other)


def outcome(step, state, batch):
    new, metrics = step(state, batch)
    return new.params, new.model_state, metrics


def over_devices(step):
    """Under a map that tracks what differs between devices."""
    mesh = Mesh(np.array(jax.devices()), ("d",))
    return jax.shard_map(step, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("d")), out_specs=PartitionSpec())


@pytest.fixture(scope="module")
def by_the_whole():
    return jax.jit(train.make_step(DROPOUT, loss, SGD, penalty=penalty))


@pytest.mark.parametrize("name", BATCHES)
def test_an_update_is_that_of_the_whole_batch(by_the_whole, name):
    state = train.init(DROPOUT, SGD, KEY, batch_of(2))
    parts = 3 if name == "ragged" else 4
    step = jax.jit(train.make_step(DROPOUT, loss, SGD, penalty=penalty, microbatches=parts))
    expected = outcome(by_the_whole, state, BATCHES[name])
    close(expected, outcome(step, state, BATCHES[name]))
    assert max(float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (state.params, expected[0])), strict=True)) > 1e-3


def test_running_statistics_advance_part_by_part():
    state = train.init(NET, SGD, KEY, batch_of(2))
    new, _ = jax.jit(train.make_step(NET, loss, SGD, microbatches=2))(state, BATCHES["whole"])
    hidden = BATCHES["whole"]["x"] @ np.asarray(state.params["Dense_0"]["kernel"])
    mean, var = np.zeros(4), np.ones(4)
    for part in (hidden[0::2], hidden[1::2]):
        mean, var = 0.9 * mean + 0.1 * part.mean(0), 0.9 * var + 0.1 * part.var(0)
    close(new.model_state["batch_stats"]["BatchNorm_0"], {"mean": mean, "var": var}, 3e-6)


def test_a_part_of_padding_alone_leaves_the_statistics():
    state = train.init(NET, SGD, KEY, batch_of(2))
    step = jax.jit(train.make_step(NET, loss, SGD, microbatches=4))
    # Rows 0 and 1 are parts of their own, whose variance is 0, and the other two parts have none.
    ran = step(state, batch_of(2))[0].model_state["batch_stats"]["BatchNorm_0"]["var"]
    np.testing.assert_allclose(ran, np.full(4, 0.9**2), rtol=1e-6)
    nothing = step(state, {**BATCHES["whole"], "weight": np.zeros(16, np.float32)})[0]
    close((nothing.params, nothing.model_state), (state.params, state.model_state), 0)


def test_eight_devices():
    """Of the mapped step, of one that tracks what differs between devices, and of the plain one over sharded rows."""
    mesh = Mesh(np.array(jax.devices()), ("d",))
    state = train.init(NET, SGD, KEY, batch_of(2))
    options = {"penalty": penalty, "microbatches": 2}
    alone = train.make_step(NET, loss, SGD, **options)
    mapped = train.make_step(NET, loss, SGD, **options, axis_name="d")
    expected = outcome(jax.jit(alone), state, BATCHES["whole"])
    close(expected, outcome(parallel.pmap(mapped), state, BATCHES["whole"]))
    rows, everywhere = PartitionSpec("d"), PartitionSpec()
    close(expected, outcome(jax.jit(over_devices(mapped)), state, BATCHES["whole"]))
    placed = jax.device_put(state, NamedSharding(mesh, everywhere)), jax.device_put(BATCHES["whole"], NamedSharding(mesh, rows))
    compiled = jax.jit(alone).lower(*placed).compile()
    close(expected, outcome(compiled, *placed))
    # No rows go from one device to another, be it to be dealt out or to be drawn for.
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not [kind for kind in ("all-gather", "all-to-all", "collective-permute") if kind in text]


def test_state_that_does_not_depend_on_the_rows():
    """A counter, and a number that is the same on every device, come through a loop that tracks what differs between devices."""

    def apply(variables, x, train):
        return x @ variables["params"], {"seen": {"steps": variables["seen"]["steps"] + 1, "rate": jnp.float32(0.5)}}

    first = {"params": jnp.ones((5, 3)), "seen": {"steps": jnp.int32(0), "rate": jnp.float32(0)}}
    model = nets.from_functions(lambda key, x: first, apply, stateful=True)
    step = train.make_step(model, loss, SGD, microbatches=2, axis_name="d")
    new, _ = jax.jit(over_devices(step))(train.init(model, SGD, KEY, batch_of(2)), BATCHES["whole"])
    assert jax.tree.map(float, new.model_state) == {"seen": {"steps": 2, "rate": 0.5}}


def test_compressed_leaves():
    model = nets.from_linen(nets.MLP(features=(), classes=3))
    variables = {"params": compress.quantize(jax.jit(model.init)(KEY, batch_of(2)["x"])["params"], where="**/kernel")}
    state = train.init(model, SGD, KEY, batch_of(2), variables=variables)
    whole, parts = (jax.jit(train.make_step(model, loss, SGD, microbatches=k)) for k in (1, 2))
    close(outcome(whole, state, BATCHES["ragged"]), outcome(parts, state, BATCHES["ragged"]))
    mapped = train.make_step(model, loss, SGD, microbatches=2, axis_name="d")
    close(outcome(parts, state, BATCHES["whole"]), outcome(jax.jit(over_devices(mapped)), state, BATCHES["whole"]))


def test_a_line_search():
    model = nets.from_functions(lambda key, x: jax.random.normal(key, (5, 3)), lambda w, x: x @ w)
    tx = optax.chain(optax.sgd(50.0), optax.scale_by_backtracking_linesearch(12))
    whole, parts = (jax.jit(train.make_step(model, loss, tx, microbatches=k)) for k in (1, 2))
    state = train.init(model, tx, KEY, batch_of(2))
    close(outcome(whole, state, BATCHES["whole"]), outcome(parts, state, BATCHES["whole"]), 1e-5)


def test_sums_of_16_bit_gradients_are_kept_in_32():
    model = nets.from_functions(lambda key, x: jnp.zeros((), jnp.bfloat16), lambda w, x: w * x)
    # 256 + 1 + ... + 1 is 256 where each 1 is added to a number of 8 bits; it is 263, rounded once to 264.
    batch = {"x": jnp.array([256, *[1] * 7], jnp.bfloat16)}
    tx = optax.sgd(1.0)
    state = train.init(model, tx, KEY, batch)
    new, _ = train.make_step(model, lambda out, batch: out, tx, microbatches=8)(state, batch)
    assert (float(new.params), new.params.dtype) == (-264 / 8, jnp.bfloat16)


def test_another_generator_still_drops():
    state = train.init(DROPOUT, SGD, jax.random.key(0, impl="rbg"), batch_of(2))
    _, metrics = jax.jit(train.make_step(DROPOUT, loss, SGD, microbatches=2))(state, BATCHES["whole"])
    assert np.isfinite(metrics["loss"])


def test_memory_falls_with_the_parts():
    model = nets.from_linen(nets.MLP(features=(64, 64), classes=3))
    batch = {"x": np.ones((512, 64), np.float32), "y": np.zeros(512, np.int32)}
    state = train.init(model, SGD, KEY, batch)
    sizes = [
        jax.jit(train.make_step(model, loss, SGD, microbatches=k))
        .lower(state, batch)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for k in (1, 8)
    ]
    assert sizes[1] < 0.4 * sizes[0]


def test_dealt_rows():
    dealt = microbatches.deal({"x": (np.arange(6), np.arange(12).reshape(6, 2)), "weight": np.arange(6.0)}, 3)
    for j in range(3):
        part = microbatches.part(dealt, j)
        np.testing.assert_array_equal(part["x"][0], np.arange(6)[j::3])
        np.testing.assert_array_equal(part["x"][1], np.arange(12).reshape(6, 2)[j::3])
        np.testing.assert_array_equal(part["weight"], np.arange(6)[j::3])
    assert "weight" not in microbatches.deal({"x": np.arange(6)}, 2)


def test_parts_that_make_no_sense():
    with pytest.raises(ValueError, match=r"^microbatches must be at least 1; got 0$"):
        train.make_step(DROPOUT, loss, SGD, microbatches=0)
    with pytest.raises(TypeError, match="float"):
        train.make_step(DROPOUT, loss, SGD, microbatches=2.5)
    step = train.make_step(DROPOUT, loss, SGD, microbatches=2)
    with pytest.raises(ValueError, match=r'entry "t" of the batch must have the leading axis \(16,\)'):
        step(train.init(DROPOUT, SGD, KEY, batch_of(2)), {**BATCHES["whole"], "t": np.float32(1)})


def test_all_four_at_once():
    """In a compiled loop on one device, and in `fit` on eight: a NaN is passed over, and two updates are made."""
    options = {"penalty": penalty, "microbatches": 2, "precision": jnp.float16, "remat": True, "guard": True}
    tx = train.loss_scaled(optax.sgd(0.1, momentum=0.9))
    step, state = train.make_step(NET, loss, tx, **options), train.init(NET, tx, KEY, batch_of(2))
    whole = BATCHES["whole"]
    bad = {**whole, "x": np.where(np.arange(16)[:, None] == 3, np.float32(np.nan), whole["x"])}
    stacked = jax.tree.map(lambda *rows: np.stack(rows), whole, bad, whole)
    last, metrics = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))(state, stacked)
    assert metrics["skipped"].tolist() == [0, 1, 0]
    assert [train.guard.offender(state, index) for index in metrics["nonfinite"]] == ["nothing", "loss", "nothing"]
    assert float(train.loss_scale(last.opt_state)) == 2.0**14
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((last.params, last.model_state, last.opt_state)))
    together = parallel.pmap(train.make_step(NET, loss, tx, **options, axis_name="d"))
    many = train.fit(together, state, lambda t: (whole, bad, whole)[t], steps=3, chunk=1, progress=False).state
    # Numbers of 11 bits, summed in another order.
    close((last.params, last.model_state), (many.params, many.model_state), 2.0**-10)
    assert max(float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (state.params, last.params)), strict=True)) > 0.05
    assert float(train.loss_scale(many.opt_state)) == 2.0**14
    for stays in (last, many):
        assert {leaf.dtype for leaf in jax.tree.leaves((stays.params, stays.model_state))} == {jnp.dtype("float32")}
