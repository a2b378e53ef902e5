"""BatchNorm folded while training: what trains is what is stored, by numpy, by folding afterwards, and by gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import compress, losses, nets, train
from jaxopt_lab.compress.folded import rounded_as_folded
from jaxopt_lab.surgery import fold_batch_norm


class Net(nn.Module):
    """Two convolutions whose channels the normalisations scale very differently."""

    @nn.compact
    def __call__(self, x, train=False):
        for options in ({}, {"feature_group_count": 4, "use_bias": False}):
            x = nn.Conv(4, (3, 3), **options)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(3)(x.mean((1, 2)))


_X = jax.device_put(np.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 2)), np.float32))
_BATCH = {"x": _X, "y": jnp.arange(8) % 3}
_CONVOLUTIONS = "**/Conv_*/kernel"


@functools.lru_cache
def _model():
    model = nets.from_linen(Net())
    variables = jax.jit(model.init)(jax.random.key(0), _X)
    for k, last in enumerate((0.0, 0.5)):
        variables["params"][f"BatchNorm_{k}"] = {"scale": jnp.array([0.1, 3.0, -1.0, last]), "bias": jnp.full(4, 0.2)}
    return model, variables


@functools.lru_cache
def _programs(axis):
    """The model whose kernels are rounded as they will be stored, its training step and its inference, once for all bits."""
    model, variables = _model()
    rounded = rounded_as_folded(model, compress.fake_quantize(variables, axis=axis, where=_CONVOLUTIONS), _X)
    step = train.make_step(rounded, losses.per_example(losses.cross_entropy), optax.sgd(0.3))
    return rounded, jax.jit(step), jax.jit(compress.lift(rounded.predict)), jax.jit(compress.lift(model.predict))


@functools.lru_cache
def _trained(bits, axis):
    """The variables before and after a few steps, and the losses."""
    model, step, _, _ = _programs(axis)
    latent = compress.fake_quantize(_model()[1], bits=bits, axis=axis, where=_CONVOLUTIONS)
    state = train.init(model, optax.sgd(0.3), jax.random.key(0), _BATCH, variables=latent)
    seen = []
    for _ in range(4):
        state, metrics = step(state, _BATCH)
        seen.append(float(metrics["loss"]))
    return latent, train.variables(state), seen


@pytest.mark.parametrize(("bits", "axis"), [(8, None), pytest.param(4, None, marks=pytest.mark.slow), (4, -1)])
def test_what_trained_is_what_is_stored(bits, axis):
    latent, variables, seen = _trained(bits, axis)
    _, _, predict, unfolded = _programs(axis)
    assert seen[-1] < seen[0]
    assert jax.tree.structure(variables) == jax.tree.structure(latent)
    trained = predict(variables, _X)

    folded_apply, folded, plan = fold_batch_norm(_model()[0].predict, variables, _X, where=_CONVOLUTIONS)
    assert [fold.weight for fold in plan.folds] == ["params/Conv_0/kernel", "params/Conv_1/kernel"]
    stored = compress.freeze(folded)
    assert isinstance(stored["params"]["Conv_0"]["kernel"], compress.Quantized)
    np.testing.assert_allclose(jax.jit(compress.lift(folded_apply))(stored, _X), trained, rtol=1e-5, atol=1e-5)

    # Rounded before folding, weights that share a scale are others; those with scales of their own are not.
    difference = np.abs(unfolded(variables, _X) - trained).max()
    assert difference < 1e-5 if axis == -1 else difference > 1e-3


def test_training_goes_on_with_the_statistics_of_the_batch():
    """By numpy: weights rounded with the running statistics, outputs normalised by those of the batch, which then run on."""

    def norm(v, x, train):
        y = x @ v["params"]["kernel"]
        new = {"var": 0.5 * v["state"]["var"] + 0.5 * y.var(0)} if train else v["state"]
        scale = v["params"]["scale"] / jnp.sqrt(y.var(0) if train else v["state"]["var"])
        return y * scale[None], {"state": new}

    model = nets.from_functions(lambda key, x: variables, norm, stateful=True)
    w, gamma, var = np.array([[1.0, 0.3], [-0.2, 0.25]]), np.array([2.0, 3.0]), np.array([4.0, 1.0])
    variables = {"params": {"kernel": jnp.asarray(w), "scale": jnp.asarray(gamma)}, "state": {"var": jnp.asarray(var)}}
    variables = jax.tree.map(lambda a: a.astype(jnp.float32), variables)
    latent = compress.fake_quantize(variables, bits=3, axis=None)
    x = np.array([[1.0, 2.0], [0.5, -1.0], [-3.0, 0.0]])
    outputs, state = compress.lift(rounded_as_folded(model, latent, x).apply)(latent, jnp.asarray(x, jnp.float32), train=True)

    a = gamma / np.sqrt(var)
    unit = np.abs(w * a).max() / 3
    rounded = np.round(w * a / unit) * unit / a
    y = x @ rounded
    np.testing.assert_allclose(outputs, y * gamma / y.std(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["state"]["var"], 0.5 * var + 0.5 * y.var(0), rtol=1e-5)


def test_gradients_are_those_of_the_folded_weight():
    """Straight through the rounding, for the latent weight and, by both of its ways, for the scale."""

    def apply(p, x):
        return jnp.tanh((x @ p["kernel"]) * p["scale"] + p["bias"])

    rng = np.random.default_rng(2)
    params = {"kernel": rng.normal(size=(5, 4)), "scale": rng.uniform(0.2, 3.0, (1, 4)), "bias": rng.normal(size=(1, 4))}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    latent = compress.fake_quantize(params, bits=3, axis=None, where="kernel")
    x = jax.device_put(np.asarray(rng.normal(size=(6, 5)), np.float32))
    lifted = compress.lift(rounded_as_folded(apply, latent, x, where="kernel"))
    got = jax.jit(jax.grad(lambda p: lifted(p, x).sum(), allow_int=True))(latent)

    unit = jnp.abs(params["kernel"] * params["scale"]).max() / 3

    def folded(p):
        exact = p["kernel"] * p["scale"]
        rounded = exact + jax.lax.stop_gradient(jnp.round(exact / unit) * unit - exact)
        return jnp.tanh(x @ rounded + p["bias"]).sum()

    expected = jax.jit(jax.grad(folded))(params)
    np.testing.assert_allclose(got["kernel"].w, expected["kernel"], rtol=1e-4, atol=1e-5)
    for name in ("scale", "bias"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5)


def test_a_channel_that_the_normalisation_silences_stays_alive():
    latent, variables, seen = _trained(4, None)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(variables))
    assert np.all(np.isfinite(seen))
    # Its scale was 0 and has a gradient; its weights get one as soon as it is not.
    assert variables["params"]["BatchNorm_0"]["scale"][3] != 0
    before, after = (v["params"]["Conv_0"]["kernel"].w[..., 3] for v in (latent, variables))
    assert np.any(np.asarray(before != after))


def test_rounded_inputs_stay_rounded_and_other_leaves_as_they_are():
    def apply(p, x):
        return (x @ p["kernel"]) * p["scale"]

    params = {"kernel": jnp.array([[1.0, 0.3], [0.2, 0.1]]), "scale": jnp.array([[1.0, 10.0]])}
    x = jnp.array([[1.0, 0.26]])
    rounded = compress.lift(rounded_as_folded(apply, params, x, where="kernel"))
    latent = compress.fake_quantize(params, bits=2, axis=None, where="kernel")
    np.testing.assert_allclose(rounded(latent, x), [[0.0, 3.0]], atol=1e-6)
    inputs = compress.fake_quantize_inputs(latent, bits=2, where="kernel")
    # The inputs become [1, 0].
    np.testing.assert_allclose(rounded(inputs, x), x.round() @ jnp.array([[0.0, 3.0], [0.0, 0.0]]), atol=1e-6)
    stored = compress.quantize(params, where="kernel")
    np.testing.assert_array_equal(rounded(stored, x), compress.lift(apply)(stored, x))


def test_dense_weights_pass_as_they_are():
    model, variables = _model()
    rounded = rounded_as_folded(model, variables, _X)
    np.testing.assert_array_equal(jax.jit(rounded.predict)(variables, _X), jax.jit(model.predict)(variables, _X))
    loss = lambda predict: lambda params: predict({**variables, "params": params}, _X).sum()  # noqa: E731
    ours, theirs = (jax.jit(jax.grad(loss(m.predict)))(variables["params"]) for m in (rounded, model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    several = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), variables)
    both = jax.jit(jax.vmap(rounded.predict, (0, None)))(several, _X)
    np.testing.assert_allclose(both[0], model.predict(variables, _X), rtol=1e-5, atol=1e-6)


def test_leaves_are_batched_outside_of_a_lift():
    (_, variables, _), (model, _, predict, _) = _trained(4, None), _programs(None)
    several = jax.tree.map(lambda a: jnp.stack([a, a]), variables)
    both = jax.jit(jax.vmap(compress.lift(model.predict), (0, None)))(several, _X)
    np.testing.assert_allclose(both[1], predict(variables, _X), rtol=1e-5, atol=1e-6)


def test_a_model_without_normalisation_is_refused():
    with pytest.raises(ValueError, match="no normalisation by running statistics follows kernel; check `where`"):
        rounded_as_folded(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((2, 2))}, jnp.ones((1, 2)), where="kernel")
