"""Calibration of whole models: against inputs worked out by hand, for each way a model is written."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxopt_lab import compress, nets
from jaxopt_lab.compress.arrays import observers
from jaxopt_lab.compress.post import calibrate
from jaxopt_lab.core import tracing


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


def _chain(params, x):
    return jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["kernel"] + params["second"]["bias"][None]


@functools.cache
def _chain_set():
    params = {
        "first": {"kernel": np.asarray(_normal(3, 4))},
        "second": {"kernel": np.asarray(_normal(4, 2, seed=1)), "bias": np.ones(2, np.float32)},
    }
    x = np.asarray(_normal(120, 3, seed=2))
    return params, x, [{"x": x[:40]}, {"x": x[40:80]}, {"x": x[80:]}]


@pytest.mark.parametrize("max_bytes", [None, 8])
def test_ranges_are_those_of_the_inputs_worked_out_by_hand(max_bytes):
    params, x, batches = _chain_set()
    ranges = calibrate(_chain, params, batches, max_bytes=max_bytes)
    hidden = np.tanh(x @ params["first"]["kernel"])
    assert list(ranges) == ["first/kernel", "second/kernel"]
    for ends, inputs in zip(ranges.values(), (x, hidden), strict=True):
        np.testing.assert_allclose(ends, (inputs.min(), inputs.max()), rtol=1e-6)


def test_an_observer_of_channels_sees_the_channels():
    params, x, batches = _chain_set()
    ranges = calibrate(_chain, params, batches, observers.per_channel(observers.min_max()))
    np.testing.assert_allclose(ranges["first/kernel"], (x.min(axis=0), x.max(axis=0)), rtol=1e-6)


def test_an_observer_chooses_the_range_and_int8_products_follow_it():
    """From batches to a model in integers: an outlier in the calibration set spoils the extremes, and not a percentile."""
    params, x, batches = _chain_set()
    outlier = np.zeros((40, 3), np.float32)
    outlier[0, 1] = 500
    predict = jax.jit(compress.lift(_chain))

    def error(ranges):
        return float(np.mean((predict(compress.static(params, ranges), x) - np.asarray(_chain(params, x))) ** 2))

    spoiled = [*batches, {"x": outlier}]
    assert error(calibrate(_chain, params, batches)) < 1e-3
    plain = error(calibrate(_chain, params, spoiled))
    assert error(calibrate(_chain, params, spoiled, observers.percentile(99.0))) < 0.1 * plain


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(3)(jnp.mean(x, axis=(1, 2)))


def test_a_linen_model_in_training_mode():
    model = nets.from_linen(Net())
    x = np.asarray(_normal(6, 5, 5, 2))
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def apply(variables, x):
        return model.apply(variables, x, train=True)[0]

    ranges = calibrate(apply, variables, [x])
    assert list(ranges) == ["params/Conv_0/kernel", "params/Dense_0/kernel"]
    np.testing.assert_allclose(ranges["params/Conv_0/kernel"], (x.min(), x.max()), rtol=1e-6)
    _, taps = jax.jit(tracing.tapped(apply, lambda site, live: live.input, where="params/Dense_0/kernel"))(variables, x)
    hidden = np.asarray(taps["params/Dense_0/kernel"].value)
    np.testing.assert_allclose(ranges["params/Dense_0/kernel"], (hidden.min(), hidden.max()), rtol=1e-5)
    # Statistics of the batch, not the stored ones, or the mean of a ReLU would not lie about there.
    assert 0.1 < hidden.mean() < 0.7


def test_an_nnx_model():
    model = nets.from_nnx(lambda rngs: nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs)))
    x = np.asarray(_normal(6, 3))
    variables = model.init(jax.random.key(0))
    ranges = calibrate(model.predict, variables, [{"x": x}])
    kernel = np.asarray(variables["params"]["layers"][0]["kernel"])
    hidden = np.maximum(x @ kernel, 0)
    np.testing.assert_allclose(list(ranges.values()), [(x.min(), x.max()), (hidden.min(), hidden.max())], rtol=1e-5)


def _scanned(params, x):
    return (
        lax.scan(lambda x, own: (jnp.tanh(x @ own), None), x, params["layers"]["kernel"])[0] @ params["kernel"] @ params["kernel"]
    )


def test_layers_of_a_scan_have_ranges_of_their_own_and_a_weight_met_twice_has_the_union():
    params = {"layers": {"kernel": 2 * _normal(3, 4, 4)}, "kernel": _normal(4, 4, seed=1)}
    x = _normal(5, 4, seed=2)
    ranges = calibrate(_scanned, params, [{"x": x}])
    seen, last = [], np.asarray(x)
    for own in np.asarray(params["layers"]["kernel"]):
        seen.append((last.min(), last.max()))
        last = np.tanh(last @ own)
    np.testing.assert_allclose(np.transpose(ranges["layers/kernel"]), seen, rtol=1e-5)
    both = [last, last @ np.asarray(params["kernel"])]
    np.testing.assert_allclose(ranges["kernel"], (min(v.min() for v in both), max(v.max() for v in both)), rtol=1e-5)


def test_what_has_no_range_is_refused_by_name():
    params, x, batches = _chain_set()
    with pytest.raises(ValueError, match="`batches` is empty"):
        calibrate(_chain, params, [])
    with pytest.raises(ValueError, match=r"batch 1, whose inputs are \(4, 2\), is not like the first"):
        calibrate(_chain, params, [batches[0], {"x": x[:4, :2]}])
    with pytest.raises(ValueError, match="first/kernel met inputs that hold NaN or infinite values"):
        calibrate(_chain, params, [{"x": np.full((2, 3), np.nan, np.float32)}])
    with pytest.raises(ValueError, match="second/bias meets no product"):
        calibrate(_chain, params, batches, where="**/bias")
    with pytest.raises(ValueError, match="nothing matches"):
        calibrate(_chain, params, batches, where="**/weight")
    with pytest.raises(TypeError, match="first/kernel is stored as Quantized"):
        calibrate(_chain, compress.quantize(params), batches)
    table = {"table": jnp.ones((5, 2)), "kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="table is only looked up in"):
        calibrate(lambda params, x: params["table"][x] @ params["kernel"], table, [np.arange(3)], where="*")
    with pytest.raises(ValueError, match="kernel met no input in all the batches"):
        calibrate(lambda params, x: lax.cond(x[0, 0] > 9, lambda: x @ params["kernel"], lambda: x), table, [np.ones((1, 2))])
