"""Channelwise chains behind products: what they are made of by hand, where they must end, and their coefficients by numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxopt_lab.core import tracing
from jaxopt_lab.core.tracing import affine, coefficients, programs

_X = jnp.linspace(-1.0, 1.0, 15).reshape(5, 3)
_IMAGE = jnp.linspace(-1.0, 1.0, 2 * 5 * 5 * 3).reshape(2, 5, 5, 3)


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


def _params(**more):
    row = {name: _normal(1, 4, seed=k) for k, name in enumerate(("mean", "scale", "bias"))}
    return {"kernel": _normal(3, 4, seed=9), "var": jnp.array([[0.5, 1.0, 2.0, 3.0]]), **row, **more}


def _norm(p, y):
    return (y - p["mean"]) / jnp.sqrt(p["var"] + 1e-3) * p["scale"] + p["bias"]


_FORMULA = ("sub mean", "div var", "mul scale", "add bias")


@jax.custom_jvp
def _reversed_gradient(x):
    return x


_reversed_gradient.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))


@jax.custom_vjp
def _thrice(x):
    return 3.0 * x


_thrice.defvjp(lambda x: (3.0 * x, None), lambda _, g: (g,))


def _biased(use):
    """What is done with the output of a dense layer that has a bias."""
    return lambda p, x: use(p, x @ p["kernel"] + p["bias"])


def _plain(use):
    return lambda p, x: use(p, x @ p["kernel"])


# Each with the formula that is found, and the axis of the channels at its end.
_BIAS = ("add bias",)
_FOUND = {
    "as written": (_plain(lambda p, y: jax.nn.relu(_norm(p, y))), _FORMULA, 1),
    "last of all": (_plain(_norm), _FORMULA, 1),
    "jitted in parts": (lambda p, x: jax.nn.silu(jax.jit(_norm)(p, jax.jit(jnp.dot)(x, p["kernel"]))), _FORMULA, 1),
    "rematerialised": (lambda p, x: jax.checkpoint(lambda x: jnp.exp(_norm(p, x @ p["kernel"])))(x), _FORMULA, 1),
    "cast": (_plain(lambda p, y: _norm(p, y.astype(jnp.bfloat16)).astype(jnp.bfloat16)), _FORMULA, 1),
    "from the left": (lambda p, x: _norm(p, (p["kernel"].T @ x.T).T), _FORMULA, 1),
    "laid out anew": (_plain(lambda p, y: jnp.exp(_norm(p, y.reshape(5, 1, 4).transpose(0, 2, 1)[..., 0]))), _FORMULA, 1),
    "channels first": (
        _plain(lambda p, y: y.T * p["scale"].T + jnp.broadcast_to(p["bias"], (5, 4)).T), ("mul scale", "add bias"), 0,
    ),
    "constants between": (_plain(lambda p, y: (2.0 * y * p["scale"]) / 3.0), ("mul 2", "mul scale"), 1),
    "subtracted from": (_plain(lambda p, y: p["bias"] - y), ("sub bias",), 1),
    "a bias alone": (_biased(lambda p, y: y), _BIAS, 1),
    "ended by a residual": (_biased(lambda p, y: y + jnp.tanh(y * p["scale"])), _BIAS, 1),
    "ended by an output": (_biased(lambda p, y: (y, y * p["scale"])), _BIAS, 1),
    "ended by two uses inside": (_biased(lambda p, y: jax.jit(lambda a, b: a * p["scale"] + b)(y, y)), _BIAS, 1),
    "ended by a use inside and one outside": (_biased(lambda p, y: jax.jit(lambda y: y * p["scale"])(y) + y), _BIAS, 1),
    "ended by an activation": (_biased(lambda p, y: jax.nn.relu(y) * p["scale"]), _BIAS, 1),
    "ended by rows of their own": (_biased(lambda p, y: y * p["rows"]), _BIAS, 1),
    "ended by running sums": (_biased(lambda p, y: y * jnp.cumsum(jnp.broadcast_to(p["scale"], (5, 4)), axis=0)), _BIAS, 1),
    "ended by an input": (lambda p, x: (x @ p["kernel"] + p["bias"]) * x[:, :1], _BIAS, 1),
    "ended by a derivative of its own": (_biased(lambda p, y: _reversed_gradient(y) * p["scale"]), _BIAS, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", _FOUND)
def test_a_chain_is_what_is_affine_in_each_channel(name):
    apply, formula, axis = _FOUND[name]
    params = _params(rows=_normal(5, 1))
    (chain,) = affine(apply, params, _X)
    assert (chain.site.path, chain.weight_axis, chain.formula, chain.axis) == ("kernel", 1, formula, axis)
    _check_coefficients(apply, params, atol=1e-2 if name == "cast" else 1e-5)


def _check_coefficients(apply, params, atol=1e-5):
    """z = A y + B, with y and z as the program computes them, and A and B of the parameters alone."""
    (chain,) = affine(apply, params, _X)
    values = coefficients(apply, params, jax.ShapeDtypeStruct(_X.shape, _X.dtype))[chain.site.path]
    assert values.scale.shape == values.shift.shape == (chain.channels,)
    assert values.scale.dtype == values.shift.dtype == jnp.float32
    program, inputs = programs.trace(apply, params, _X)
    names = {chain.site.address: ["y"], chain.end: ["z"]}
    look = programs.Seen(names, lambda name, state, operands, output: output, lambda name, depth: False)
    _, seen = programs.run(program.jaxpr, inputs, {"y": None, "z": None}, look)
    y, z = chain.laid_out(seen["y"]), seen["z"]
    expected = chain.on_output(values.scale, z) * y + chain.on_output(values.shift, z)
    np.testing.assert_allclose(np.asarray(z, np.float32), expected, rtol=1e-5, atol=atol)


_NOTHING = {
    "no parameter behind": lambda p, x: jnp.tanh(2.0 * (x @ p["kernel"]) + 1.0),
    "used twice at once": _plain(lambda p, y: y * p["scale"] + y),
    "squared": _plain(lambda p, y: y * y * p["scale"]),
    "in the denominator": lambda p, x: p["scale"] / (x @ p["kernel"]),
    "a weight that decides": lambda p, x: (x @ p["kernel"] + p["bias"], jnp.sum(p["kernel"] ** 2)),
    "a weight that is used twice": lambda p, x: (x @ p["kernel"] + p["bias"]) @ p["kernel"].T,
    "a weight that is more than a view": lambda p, x: x @ (p["kernel"] * 2.0) + p["bias"],
    "a weight turned round": lambda p, x: x @ p["kernel"][:, ::-1] + p["bias"],
    "half a weight": lambda p, x: x @ p["kernel"][:, :2] + p["bias"][:, :2],
    "two weights in one": lambda p, x: x @ jnp.concatenate([p["kernel"], p["other"]], 1) + jnp.tile(p["bias"], (1, 2)),
    "channels on two axes": lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["kernel"].reshape(3, 2, 2)) + p["bias"].reshape(1, 2, 2),
    "channels flattened with rows": lambda p, x: (x @ p["kernel"]).reshape(1, 20) * jnp.tile(p["scale"], (1, 5)),
    "one channel made several": lambda p, x: jnp.broadcast_to(x @ p["column"], (5, 4)) * p["scale"],
    "a derivative of its own": lambda p, x: _thrice(x @ p["kernel"]) * p["scale"],
    "stacked layers": lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w * p["rows"][:, :1]), None), x, p["stack"])[0],
    "a branch": lambda p, x: lax.cond(True, lambda: x @ p["kernel"] + p["bias"], lambda: jnp.ones((5, 4))),
    "statistics of the batch": _plain(lambda p, y: (y - y.mean(0, keepdims=True)) * p["scale"]),
}


@pytest.mark.parametrize("name", _NOTHING)
def test_what_is_no_chain_is_left_out(name):
    params = _params(rows=_normal(5, 1), other=_normal(3, 4), column=_normal(3, 1), stack=_normal(2, 3, 3))
    assert affine(_NOTHING[name], params, _X) == ()
    assert coefficients(_NOTHING[name], params, _X) == {}


def test_leaves_that_are_read_elsewhere_are_not_the_chains_own():
    def apply(p, x):
        return _norm(p, x @ p["kernel"]), jnp.sum(p["bias"]), x * p["mean"][:, :3]

    (chain,) = affine(apply, _params(), _X)
    assert chain.reads == ("mean", "var", "scale", "bias")
    assert chain.scales == ("var", "scale")
    assert chain.own == ("var", "scale")


def test_a_scale_may_come_from_the_weight_itself():
    def apply(p, x):
        return x @ p["kernel"] * (p["scale"] / jnp.linalg.norm(p["kernel"], axis=0, keepdims=True))

    (chain,) = affine(apply, _params(), _X)
    assert (chain.formula, chain.own) == (("mul kernel scale",), ("scale",))
    _check_coefficients(apply, _params())


class Normed(nn.Module):
    layer: nn.Module
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, train=False):
        return nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(self.layer(x)))


_LAYERS = {
    "dense": (nn.Dense(4), 1),
    "depthwise": (nn.Conv(6, (3, 3), feature_group_count=3, use_bias=False), 3),
    "transposed": (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), 3),
    # Its kernel is turned round along its width and height, and its inputs and outputs change places.
    "transposed kernel": (nn.ConvTranspose(4, (3, 3), strides=(2, 2), transpose_kernel=True), 2),
}


@pytest.mark.parametrize("name", _LAYERS)
def test_batch_norm_of_linen_by_numpy(name):
    layer, axis = _LAYERS[name]
    model = Normed(layer)
    shapes = jax.eval_shape(model.init, jax.random.key(0), _IMAGE)
    variables = jax.tree.map(lambda s: jax.random.uniform(jax.random.key(len(s.shape)), s.shape, minval=0.5), shapes)
    (chain,) = affine(model.apply, variables, _IMAGE)
    assert (chain.weight_axis, chain.axis) == (axis, 3)
    scale, shift = jax.jit(lambda v: coefficients(model.apply, v, _IMAGE))(variables)["params/layer/kernel"]
    mean, var = (np.asarray(variables["batch_stats"]["BatchNorm_0"][name], np.float64) for name in ("mean", "var"))
    gamma, beta = (np.asarray(variables["params"]["BatchNorm_0"][name], np.float64) for name in ("scale", "bias"))
    bias = np.asarray(variables["params"]["layer"].get("bias", 0.0), np.float64)
    expected = gamma / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    np.testing.assert_allclose(shift, beta + (bias - mean) * expected, rtol=1e-5, atol=1e-6)


def test_batch_norm_of_nnx_is_found():
    module = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    (chain,) = affine(lambda state, x: nnx.merge(graph, state)(x), state, _X)
    assert chain.site.path == "layers/0/kernel"
    assert set(chain.own) == {"layers/0/bias", *(f"layers/1/{name}" for name in ("mean", "var", "scale", "bias"))}


def test_statistics_stay_precise_where_a_model_computes_in_half():
    model = Normed(nn.Dense(4, dtype=jnp.bfloat16), dtype=jnp.bfloat16)
    variables = model.init(jax.random.key(0), _X)
    variables["batch_stats"]["BatchNorm_0"]["var"] = jnp.array([0.3, 0.7, 1.1, 1.9])
    scale, _ = coefficients(model.apply, variables, _X.astype(jnp.bfloat16))["params/layer/kernel"]
    np.testing.assert_allclose(scale, 1 / np.sqrt(np.array([0.3, 0.7, 1.1, 1.9]) + 1e-5), rtol=1e-6)


def test_coefficients_are_differentiable_and_batched():
    def apply(p, x):
        return _norm(p, x @ p["kernel"])

    params = _params()
    grads = jax.jit(jax.grad(lambda p: coefficients(apply, p, _X)["kernel"].scale.sum()))(params)
    np.testing.assert_allclose(grads["scale"], 1 / np.sqrt(np.asarray(params["var"]) + 1e-3), rtol=1e-6)
    np.testing.assert_allclose(grads["var"], -0.5 * params["scale"] * (params["var"] + 1e-3) ** -1.5, rtol=1e-5)
    assert not np.any(grads["kernel"])
    several = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
    shifts = jax.jit(jax.vmap(lambda p: coefficients(apply, p, _X)["kernel"].shift))(several)
    np.testing.assert_allclose(shifts[0], coefficients(apply, params, _X)["kernel"].shift, rtol=1e-6)


def test_coefficients_of_a_function_that_prints():
    def apply(p, x):
        y = x @ p["kernel"]
        jax.debug.callback(lambda x: None, x)
        return y * p["scale"]

    np.testing.assert_array_equal(coefficients(apply, _params(), _X)["kernel"].scale, _params()["scale"][0])
    with pytest.raises(ValueError, match="the function prints or calls back on its way: give it arrays"):
        coefficients(apply, _params(), jax.ShapeDtypeStruct(_X.shape, _X.dtype))


def test_what_is_put_into_a_program_goes_on():
    program, inputs = programs.trace(lambda w, x: jnp.tanh(jax.jit(jnp.dot)(x, w)) + 1.0, jnp.ones((3, 2)), _X)
    (site,) = tracing.sites(lambda w, x: jnp.tanh(jax.jit(jnp.dot)(x, w)) + 1.0, jnp.ones((3, 2)), _X)
    seen = programs.Seen(
        {site.address: ["dot"]},
        lambda name, state, operands, output: output,
        lambda name, depth: False,
        lambda name, state, output: jnp.zeros_like(output),
    )
    (out,), states = programs.run(program.jaxpr, inputs, {"dot": jnp.zeros((5, 2))}, seen)
    assert np.all(np.asarray(out) == 1.0)
    np.testing.assert_allclose(states["dot"], _X @ jnp.ones((3, 2)), rtol=1e-6)
