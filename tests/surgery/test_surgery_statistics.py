"""Running statistics taken anew: by numpy on one layer of either of Flax's worlds, and what of the state must stay."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_lab import nets
from jaxopt_lab.surgery import slim
from jaxopt_lab.surgery.statistics import reestimate

KEY = jax.random.key(0)
_X = np.random.default_rng(0).normal(2.0, 3.0, size=(3, 8, 5)).astype(np.float32)


class Normed(nn.Module):
    """A layer, its normalisation, a count of calls, a norm as of power iteration, the last and the largest value that was seen."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="layer")(x)
        state = {
            name: self.variable("others", name, lambda: jnp.ones(4)) for name in ("iterated", "last", "largest", "count", "still")
        }
        if train:
            x = x / jnp.linalg.norm(state["iterated"].value)
            state["iterated"].value = jnp.roll(state["iterated"].value, 1) / jnp.linalg.norm(state["iterated"].value)
            state["last"].value = x.mean(0)
            state["largest"].value = jnp.maximum(state["largest"].value, x.max(0))
            state["count"].value = state["count"].value + 1
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.99, name="norm")(x))
        return nn.Dense(2, name="head")(nn.Dropout(0.5, deterministic=not train)(x))


def _layer(variables, scale=1.0):
    layer = variables["params"]["layer"]
    return (_X @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)) * scale


def test_one_layer_by_numpy():
    model = nets.from_linen(Normed())
    variables = model.init(KEY, jnp.asarray(_X[0]))
    weight = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0], [0] * 8], np.float32)
    new = reestimate(model, variables, lambda step: {"x": _X[step], "weight": weight[step]}, steps=3, key=KEY)
    # The iterated vector divides what comes before the normalisation, in training as it is.
    y = _layer(variables, 0.5)
    batches = [y[0], y[1][:3]]
    mean = sum(len(rows) * rows.mean(0) for rows in batches) / 11
    var = sum(len(rows) * rows.var(0) for rows in batches) / 11
    np.testing.assert_allclose(new["batch_stats"]["norm"]["mean"], mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["norm"]["var"], var, rtol=1e-5)
    # Nothing else moves, and what the statistics were does not matter.
    assert new["params"] is variables["params"]
    jax.tree.map(np.testing.assert_array_equal, new["others"], variables["others"])
    other = {**variables, "batch_stats": jax.tree.map(lambda a: a + 100.0, variables["batch_stats"])}
    again = reestimate(model, other, lambda step: {"x": _X[step], "weight": weight[step]}, steps=3, key=KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again["batch_stats"], new["batch_stats"])


def test_statistics_of_nnx_and_in_half_precision():
    module = nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0)))
    model = nets.from_nnx(module)
    variables = model.init(KEY)
    variables["state"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["state"])
    new = reestimate(model, variables, lambda step: {"x": _X[step]}, steps=3)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    layer = variables["params"]["layers"][0]
    y = _X @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
    stats = new["state"]["layers"][1]
    assert stats["mean"].dtype == jnp.bfloat16
    np.testing.assert_allclose(stats["mean"].astype(np.float32), y.mean((0, 1)), rtol=2**-8)
    np.testing.assert_allclose(stats["var"].astype(np.float32), y.var(1).mean(0), rtol=2**-8)


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for width in (12, 8):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(width)(x)))
        return nn.Dense(3)(x)


def test_a_slimmed_network_is_better_for_it():
    """Once it is cut, its statistics are of another network: the loss against the whole one falls when they are its own."""
    model, x = nets.from_linen(Deep()), jnp.asarray(_X.reshape(24, 5))
    shapes, rng = jax.eval_shape(model.init, KEY, x), np.random.default_rng(1)
    variables = jax.tree.map(
        lambda s: jax.device_put(np.asarray(rng.normal(size=s.shape) if len(s.shape) > 1 else np.ones(s.shape), s.dtype)), shapes
    )
    variables = reestimate(model, variables, lambda step: {"x": x}, steps=1)
    small_model, small, _ = slim(model, variables, x, ratio=0.3)
    renewed = reestimate(small_model, small, lambda step: {"x": x[12 * step : 12 * (step + 1)]}, steps=2)
    expected, predict = jax.jit(model.predict)(variables, x), jax.jit(small_model.predict)
    before, after = (float(np.mean((np.asarray(predict(own, x)) - np.asarray(expected)) ** 2)) for own in (small, renewed))
    assert after < 0.8 * before


def test_what_cannot_be_done_is_named():
    model = nets.from_functions(lambda key, x: jnp.ones(5), lambda w, x: x @ w)
    batches = lambda step: {"x": _X[step]}  # noqa: E731
    with pytest.raises(ValueError, match="no leaf of the state moves as a running mean in training; it has no floating leaf"):
        reestimate(model, {"params": jnp.ones(5)}, batches, steps=1)
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        reestimate(model, {"params": {}}, batches, steps=0)
    with pytest.raises(TypeError, match="model must be a Model"):
        reestimate(nn.Dense(3), {"params": {}}, batches, steps=1)

    def apply(variables, x, train):
        mean = 0.5 * variables["stats"]["mean"] + 0.5 * x.mean(0) if train else variables["stats"]["mean"]
        return x, {"stats": {"mean": mean}}

    variables = {"params": {}, "stats": {"mean": jnp.zeros(5)}}
    averaging = nets.from_functions(lambda key, x: variables, apply, stateful=True)
    with pytest.raises(ValueError, match="all rows of 2 batches have weight 0"):
        reestimate(averaging, variables, lambda step: {"x": _X[step], "weight": np.zeros(8)}, steps=2)
