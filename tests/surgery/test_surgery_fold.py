"""BatchNorm folded: the same outputs from a smaller tree, in every kind of model, and one-line errors where it cannot be."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_lab import compress, nets
from jaxopt_lab.checkpoint import load_tree, save_tree
from jaxopt_lab.core import tree
from jaxopt_lab.surgery import fold_batch_norm


def _image(*shape: int) -> jax.Array:
    return jax.device_put(np.asarray(np.random.default_rng(1).normal(size=shape), np.float32))


def _random(variables, dtype=jnp.float32):
    """Weights, and statistics that are nothing like those of the start."""
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        spread = rng.uniform(0.3, 2.0, leaf.shape) * rng.choice([-1.0, 1.0], leaf.shape)
        value = (
            rng.uniform(0.3, 2.0, leaf.shape)
            if path.endswith("var")
            else spread
            if leaf.ndim < 2
            else 0.4 * rng.normal(size=leaf.shape)
        )
        return jnp.asarray(value, dtype)

    names, leaves, treedef = tree.flatten(variables)
    return jax.tree.unflatten(treedef, [drawn(name, leaf) for name, leaf in zip(names, leaves, strict=True)])


def _linen(module, *inputs, dtype=jnp.float32):
    model = nets.from_linen(module)
    return model.predict, _random(jax.eval_shape(model.init, jax.random.key(0), *inputs), dtype)


class Layers(nn.Module):
    """A layer, its normalisation, an activation, and a dense layer that only a bias follows."""

    layer: nn.Module
    norm: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.relu(self.norm(self.layer(x), use_running_average=not train))
        return nn.Dense(3)(y.reshape(y.shape[0], -1))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 4, use_bias=False, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])
        self.norms = nnx.List([nnx.BatchNorm(n, use_running_average=True, rngs=rngs) for n in (4, 3)])

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return x


def _nnx():
    graph, state = nnx.split(Nnx(nnx.Rngs(0)))
    return (lambda state, x: nnx.merge(graph, state)(x)), _random(state)


def _bare(params, x):
    for layer in params:
        y = x @ layer["w"] + layer["b"][None]
        x = jnp.tanh((y - layer["mean"][None]) * jax.lax.rsqrt(layer["var"] + 1e-3)[None] * layer["scale"][None])
    return x


def _bare_params():
    return _random([{"w": jnp.ones((5, 5)), **{name: jnp.ones(5) for name in ("b", "mean", "var", "scale")}} for _ in range(2)])


_ROWS, _PIXELS = (2, 5), (2, 6, 6, 3)
# `(apply, variables)`, an input, `where`, and for each fold the weight, the shift and how many leaves go.
_MODELS = {
    "dense": (
        lambda x: _linen(Layers(nn.Dense(4), nn.BatchNorm()), x), _ROWS, "**/kernel",
        [("params/layer/kernel", "params/layer/bias", 4)],
    ),
    "no scale": (
        lambda x: _linen(Layers(nn.Dense(4), nn.BatchNorm(use_scale=False)), x), _ROWS, "**/kernel",
        [("params/layer/kernel", "params/layer/bias", 3)],
    ),
    "no bias": (
        lambda x: _linen(Layers(nn.Dense(4, use_bias=False), nn.BatchNorm(use_bias=False)), x), _ROWS, "**/kernel",
        [("params/layer/kernel", "params/layer/bias", 3)],
    ),
    "depthwise": (
        lambda x: _linen(Layers(nn.Conv(6, (3, 3), feature_group_count=3), nn.BatchNorm()), x), _PIXELS, "**/kernel",
        [("params/layer/kernel", "params/layer/bias", 4)],
    ),
    "transposed": (
        lambda x: _linen(Layers(nn.ConvTranspose(4, (3, 3), transpose_kernel=True), nn.BatchNorm()), x), _PIXELS, "**/kernel",
        [("params/layer/kernel", "params/layer/bias", 4)],
    ),
    "residual": (
        lambda x: _linen(nets.ResNet(depth=6, widths=(3, 4), projection=True), x), _PIXELS, "**/kernel",
        [(f"params/Conv_{k}/kernel", f"params/Conv_{k}/bias", 4) for k in range(6)],
    ),
    "NNX": (
        lambda x: _nnx(), _ROWS, "**/kernel",
        [("layers/0/kernel", "layers/0/bias", 4), ("layers/1/kernel", "layers/1/bias", 4)],
    ),
    "NNX as a model": (
        lambda x: (model := nets.from_nnx(Nnx(nnx.Rngs(0))), (model.predict, _random(model.init(jax.random.key(0)))))[1],
        _ROWS, "**/kernel",
        [(f"params/layers/{k}/kernel", f"params/layers/{k}/bias", 4) for k in range(2)],
    ),
    "bare": (
        lambda x: (_bare, _bare_params()), _ROWS, "**/w", [("0/w", "0/bias", 4), ("1/w", "1/bias", 4)],
    ),
}  # fmt: skip


@functools.lru_cache
def _folded(name):
    made, shape, where, _ = _MODELS[name]
    x = _image(*shape)
    apply, variables = made(x)
    return apply, variables, x, *fold_batch_norm(apply, variables, x, where=where)


@pytest.mark.parametrize("name", _MODELS)
def test_folded_is_the_same_function_of_a_smaller_tree(name):
    apply, variables, x, folded_apply, folded, plan = _folded(name)
    assert [(fold.weight, fold.bias, len(fold.dropped)) for fold in plan.folds] == _MODELS[name][3]
    gone, new = {path for fold in plan.folds for path in fold.dropped}, {fold.bias for fold in plan.folds}
    assert set(tree.paths(folded)) == (set(tree.paths(variables)) - gone) | new
    # The length of the batch is free.
    x = jnp.concatenate([x, 0.5 * x])
    expected = jax.jit(apply)(variables, x)
    np.testing.assert_allclose(jax.jit(folded_apply)(folded, x), expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_fold_by_hand():
    params = {
        "kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]),
        "norm": {"mean": jnp.array([[1.0, 2.0]]), "var": jnp.array([[4.0, 0.25]]), "beta": jnp.array([[10.0, 20.0]])},
    }

    def apply(p, x):
        return (x @ p["kernel"] - p["norm"]["mean"]) / jnp.sqrt(p["norm"]["var"]) + p["norm"]["beta"]

    _, folded, plan = fold_batch_norm(apply, params, jnp.ones((1, 2)), where="kernel")
    assert jax.tree.map(lambda a: a.tolist(), folded) == {"kernel": [[0.5, 4.0], [1.5, 8.0]], "bias": [9.5, 16.0]}
    assert str(plan) == "kernel: 2 channels, shift in bias, without norm/mean, norm/var, norm/beta"
    assert plan.folds[0].formula == ("sub norm/mean", "div norm/var", "add norm/beta")


def test_folded_weights_are_quantised_differentiated_and_batched():
    _, _, x, folded_apply, folded, _ = _folded("residual")
    stored = compress.quantize(folded, axis=None)
    assert isinstance(stored["params"]["Conv_3"]["kernel"], compress.Quantized)
    got = jax.jit(compress.lift(folded_apply))(stored, x)
    np.testing.assert_allclose(got, jax.jit(folded_apply)(compress.decompress(stored), x), rtol=1e-4, atol=1e-4)

    _, _, x, folded_apply, folded, _ = _folded("dense")
    grads = jax.jit(jax.grad(lambda folded: folded_apply(folded, x).sum()))(folded)
    assert jax.tree.structure(grads) == jax.tree.structure(folded)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))
    several = jax.tree.map(lambda a: jnp.stack([a, -a]), folded)
    both = jax.jit(jax.vmap(folded_apply, (0, None)))(several, x)
    np.testing.assert_allclose(both[0], folded_apply(folded, x), rtol=1e-5, atol=1e-6)


def test_folding_itself_can_be_compiled():
    apply, variables, x, _, folded, _ = _folded("dense")
    again = jax.jit(lambda variables: fold_batch_norm(apply, variables, x)[1])(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, folded)


@pytest.mark.parametrize("name", ["residual", "NNX"])
def test_a_folded_tree_comes_back_from_a_checkpoint(name, tmp_path):
    _, _, x, folded_apply, folded, _ = _folded(name)
    save_tree(tmp_path / "folded", folded)
    got = load_tree(tmp_path / "folded")
    assert np.array_equal(jax.jit(folded_apply)(got, x), jax.jit(folded_apply)(folded, x))


def test_a_fake_quantised_weight_is_folded_by_its_latent_weight():
    apply, variables, x, _, folded, _ = _folded("dense")
    latent = compress.fake_quantize(variables, where="**/layer/kernel")
    folded_apply, got, _ = fold_batch_norm(apply, latent, x)
    leaf = got["params"]["layer"]["kernel"]
    assert isinstance(leaf, compress.StraightThrough)
    np.testing.assert_array_equal(leaf.w, folded["params"]["layer"]["kernel"])
    assert jax.jit(compress.lift(folded_apply))(compress.freeze(got), x).shape == (2, 3)


def test_half_precision_keeps_precise_shifts():
    x = _image(2, 5).astype(jnp.bfloat16)
    apply, variables = _linen(Layers(nn.Dense(4), nn.BatchNorm()), x, dtype=jnp.bfloat16)
    folded_apply, folded, _ = fold_batch_norm(apply, variables, x)
    assert folded["params"]["layer"]["kernel"].dtype == jnp.bfloat16
    assert folded["params"]["layer"]["bias"].dtype == jnp.float32
    got, expected = folded_apply(folded, x), apply(variables, x)
    assert got.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), rtol=0.05, atol=0.1)


def test_leaves_of_tuples_give_their_place():
    params = ((_image(5, 4),), tuple(_random([jnp.ones((1, 4))] * 3)))

    def apply(params, x):
        (kernel,), (mean, scale, shift) = params
        return jnp.tanh((x @ kernel - mean) * scale + shift)

    x = _image(2, 5)
    folded_apply, folded, plan = fold_batch_norm(apply, params, x, where="0/0")
    assert (plan.folds[0].bias, plan.folds[0].dropped) == ("1/2", ("1/0", "1/1"))
    assert folded[1][:2] == (None, None)
    np.testing.assert_allclose(folded_apply(folded, x), apply(params, x), rtol=1e-5, atol=1e-6)


def test_two_weights_in_one_mapping_take_a_place_each():
    params = _random(
        {f"{name}{k}": jnp.ones((5, 5) if name == "w" else (1, 5)) for k in range(2) for name in ("w", "scale", "shift")}
    )

    def apply(p, x):
        for k in range(2):
            x = jnp.tanh(x @ p[f"w{k}"] * p[f"scale{k}"] + p[f"shift{k}"])
        return x

    x = _image(2, 5)
    folded_apply, folded, plan = fold_batch_norm(apply, params, x, where="w*")
    assert [fold.bias for fold in plan.folds] == ["bias", "shift1"]
    assert set(folded) == {"w0", "w1", "bias", "shift1"}
    np.testing.assert_allclose(folded_apply(folded, x), apply(params, x), rtol=1e-5, atol=1e-6)


def test_what_is_read_elsewhere_stays():
    def apply(p, x):
        return x @ p["kernel"] * p["scale"] + p["shift"], p["scale"].sum()

    params = _random({"kernel": jnp.ones((5, 4)), "scale": jnp.ones((1, 4)), "shift": jnp.ones((1, 4))})
    x = _image(2, 5)
    folded_apply, folded, _ = fold_batch_norm(apply, params, x, where="kernel")
    assert set(folded) == {"kernel", "bias", "scale"}
    for got, expected in zip(folded_apply(folded, x), apply(params, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_call_with_other_arguments_is_refused_or_right():
    def apply(p, x, train=False, gain=1.0, temperature=1.0):
        y = gain * (x @ p["kernel"])
        mean = y.mean(0, keepdims=True) if train else p["mean"]
        return (y - mean) * p["scale"] / temperature

    params = _random({"kernel": jnp.ones((5, 4)), "scale": jnp.ones((1, 4)), "mean": jnp.ones((1, 4))})
    x = _image(2, 5)
    folded_apply, folded, _ = fold_batch_norm(apply, params, x, where="kernel")
    np.testing.assert_allclose(folded_apply(folded, x, temperature=3.0), apply(params, x, temperature=3.0), rtol=1e-5, atol=1e-6)
    for other in ({"train": True}, {"gain": 2.0}):
        with pytest.raises(ValueError, match=r"^kernel was folded with .*call it as in inference"):
            folded_apply(folded, x, **other)
    with pytest.raises(ValueError, match="this is not the folded tree; first of 3 paths that it lacks or has too many: bias"):
        folded_apply(params, x)


def test_a_call_that_reads_what_is_gone_is_refused():
    def apply(p, x, more=False):
        return x @ p["kernel"] * p["scale"] + p["bias"], p["bias"].sum() if more else None

    params = _random({"kernel": jnp.ones((5, 4)), "scale": jnp.ones((1, 4)), "bias": jnp.ones((1, 4))})
    folded_apply, folded, _ = fold_batch_norm(apply, params, _image(2, 5), where="kernel")
    assert set(folded) == {"kernel", "bias"}
    with pytest.raises(ValueError, match="or is read elsewhere, too"):
        folded_apply(folded, _image(2, 5), more=True)


def test_what_cannot_be_folded_is_named():
    apply, variables, x, *_ = _folded("dense")
    with pytest.raises(ValueError, match="no normalisation by running statistics follows params/Dense_0/kernel; give"):
        fold_batch_norm(apply, variables, x, where="**/Dense_0/kernel")
    with pytest.raises(ValueError, match="nothing matches where='kernels'"):
        fold_batch_norm(apply, variables, x, where="kernels")
    with pytest.raises(TypeError, match="params/layer/kernel is stored as Quantized, which has no latent weight"):
        fold_batch_norm(apply, compress.quantize(variables), x)
    with pytest.raises(ValueError, match=r"^0 has no place for a bias"):
        fold_batch_norm(lambda p, x: jnp.tanh(x @ p[0] * p[1]), (_image(5, 4), _image(1, 4)), x, where="0")
