"""Merged linear layers: a zoo of pairs against their unmerged selves, two by hand, what is kept apart, and what is refused."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxopt_lab import compress, nets, tracing
from jaxopt_lab.core import tree
from jaxopt_lab.surgery.merge import merge_linear


def _image(*shape: int) -> jax.Array:
    return jax.device_put(np.asarray(np.random.default_rng(1).normal(size=shape), np.float32))


def _random(variables, dtype=jnp.float32):
    """Weights, and statistics that are nothing like those of the start."""
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        value = rng.uniform(0.3, 2.0, leaf.shape) if path.endswith("var") else rng.normal(size=leaf.shape)
        return jnp.asarray(0.7 * value, dtype)

    names, leaves, treedef = tree.flatten(variables)
    return jax.tree.unflatten(treedef, [drawn(name, leaf) for name, leaf in zip(names, leaves, strict=True)])


class Layers(nn.Module):
    """Layers in a row, an activation, and a dense layer."""

    layers: tuple

    @nn.compact
    def __call__(self, x):
        for layer in self.layers:
            x = layer(x, use_running_average=True) if isinstance(layer, nn.BatchNorm) else layer(x)
        return nn.Dense(2, name="head")(nn.relu(x))


def _linen(*layers, shape):
    model = nets.from_linen(Layers(layers))
    return model.predict, _random(jax.eval_shape(model.init, jax.random.key(0), jnp.ones(shape)))


def _convolved(x, w, padding="SAME", groups=1, dilation=(1, 1), strides=(1, 1)):
    return lax.conv_general_dilated(x, w, strides, padding, None, dilation, ("NHWC", "HWIO", "NHWC"), feature_group_count=groups)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 4, use_bias=False, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return nnx.relu(self.norm(x))


def _nnx(shape):
    del shape
    graph, state = nnx.split(Nnx(nnx.Rngs(0)))
    return (lambda state, x: nnx.merge(graph, state)(x)), _random(state)


def _bare(apply, **shapes):
    return lambda shape: (apply, _random({name: jnp.ones(own) for name, own in shapes.items()}))


def _by_place(shape):
    """Leaves of tuples, among which nothing can be added."""
    del shape
    params = _random((((jnp.ones((5, 6)), jnp.ones((1, 6)))), jnp.ones((6, 3))))
    return (lambda p, x: jnp.tanh((x @ p[0][0] - p[0][1]) @ p[1])), params


def _from_the_left(p, x):
    y = lax.dot_general(p["a"], x, (((0,), (1,)), ((), ())))
    return jnp.tanh(lax.dot_general(3.0 * y, p["b"], (((0,), (1,)), ((), ()))))


def _channels_first(p, x):
    x = x.transpose(0, 3, 1, 2)
    y = lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NHWC"))
    return jnp.tanh(lax.conv_general_dilated(y, p["b"], (1, 1), "VALID", dimension_numbers=("NHWC", "OHWI", "NCHW")))


_ROWS, _PIXELS = (2, 5), (2, 7, 8, 3)
# `(shape) -> (apply, params)`, the shape of the input, `where`, and for each merge the paths, the shape, the bias, what is dropped.
_A, _B = "params/layers_0/kernel", "params/layers_1/kernel"
_MODELS = {
    "dense": (
        functools.partial(_linen, nn.Dense(8), nn.Dense(4)), _ROWS, "**/kernel", [(_A, _B, (5, 4), "params/layers_1/bias", 2)],
    ),
    "a stack": (
        functools.partial(_linen, *(nn.Dense(8, use_bias=k % 2 == 0) for k in range(5))), _ROWS, "**/kernel",
        [
            (_A, _B, (5, 8), "params/layers_1/bias", 2),
            ("params/layers_2/kernel", "params/layers_3/kernel", (8, 8), "params/layers_3/bias", 2),
            (_B, "params/layers_3/kernel", (5, 8), "params/layers_3/bias", 2),
            ("params/layers_3/kernel", "params/layers_4/kernel", (5, 8), "params/layers_4/bias", 2),
        ],
    ),
    "a normalisation between": (
        functools.partial(_linen, nn.Dense(8), nn.BatchNorm(), nn.Dense(4)), _ROWS, "**/kernel",
        [(_A, "params/layers_2/kernel", (5, 4), "params/layers_2/bias", 6)],
    ),
    "a normalisation behind": (
        functools.partial(_linen, nn.Dense(8), nn.Dense(4, use_bias=False), nn.BatchNorm()), _ROWS, "**/kernel",
        [(_A, _B, (5, 4), "params/layers_1/bias", 2)],
    ),
    "wide, then narrow": (
        functools.partial(_linen, nn.Conv(9, (3, 3), strides=2), nn.Conv(4, (1, 1))), _PIXELS, "**/kernel",
        [(_A, _B, (3, 3, 3, 4), "params/layers_1/bias", 2)],
    ),
    "transposed, then narrow": (
        functools.partial(_linen, nn.ConvTranspose(9, (3, 3), strides=(2, 2), transpose_kernel=True), nn.Conv(4, (1, 1))), _PIXELS,
        "**/kernel", [(_A, _B, (3, 3, 4, 3), "params/layers_1/bias", 2)],
    ),
    "wide, then dense on channels": (
        _bare(lambda p, x: jnp.tanh((_convolved(x, p["a"]) - p["c"]) @ p["b"]), a=(3, 3, 3, 9), b=(9, 4), c=(1, 1, 1, 9)), _PIXELS,
        ["a", "b"], [("a", "b", (3, 3, 3, 4), "bias", 2)],
    ),
    "narrow, then wide": (
        _bare(
            lambda p, x: _convolved(_convolved(x, p["a"]) + p["c"], p["b"], "VALID", dilation=(2, 2)) + p["d"],
            a=(1, 1, 3, 9), b=(3, 3, 9, 4), c=(1, 1, 1, 9), d=(1, 1, 1, 4),
        ), _PIXELS, ["a", "b"], [("a", "b", (3, 3, 3, 4), "bias", 3)],
    ),
    "narrow without a shift, then padded": (
        _bare(lambda p, x: _convolved(-2.0 * _convolved(x, p["a"]), p["b"]), a=(1, 1, 3, 9), b=(3, 3, 9, 4)), _PIXELS, ["a", "b"],
        [("a", "b", (3, 3, 3, 4), None, 1)],
    ),
    "wide, then wide": (
        _bare(
            lambda p, x: _convolved(_convolved(x, p["a"], strides=(2, 1)) + p["c"], p["b"], "VALID", 1, (1, 2), (1, 2)),
            a=(3, 3, 3, 30), b=(3, 3, 30, 2), c=(1, 1, 1, 30),
        ), _PIXELS, ["a", "b"], [("a", "b", (7, 7, 3, 2), "bias", 2)],
    ),
    "channels first": (
        _bare(_channels_first, a=(9, 3, 3, 3), b=(2, 2, 2, 9)), _PIXELS, ["a", "b"], [("a", "b", (2, 4, 4, 3), None, 1)],
    ),
    "NNX": (_nnx, _ROWS, "**/kernel", [("layers/0/kernel", "layers/1/kernel", (5, 4), "layers/1/bias", 2)]),
    "laid out anew": (
        _bare(
            lambda p, x: jnp.tanh(jnp.einsum("bci,oc->boi", (x.reshape(2, 1, 5) @ p["a"].T).transpose(0, 2, 1), p["b"])),
            a=(6, 5), b=(3, 6),
        ), _ROWS, ["a", "b"], [("a", "b", (3, 5), None, 1)],
    ),
    "from the left": (_bare(_from_the_left, a=(5, 6), b=(3, 6)), _ROWS, ["a", "b"], [("a", "b", (3, 5), None, 1)]),
    "heads behind": (
        _bare(lambda p, x: jnp.tanh(jnp.einsum("bi,ihd->bhd", x @ p["a"], p["b"])), a=(5, 12), b=(12, 2, 3)), _ROWS, ["a", "b"],
        [("a", "b", (5, 2, 3), None, 1)],
    ),
    "several axes summed, then dense": (
        _bare(lambda p, x: jnp.tanh(jnp.einsum("bij,ijo->bo", x[:, :4].reshape(2, 2, 2), p["a"]) * p["s"] @ p["b"]),
              a=(2, 2, 9), s=(1, 9), b=(9, 3)),
        _ROWS, ["a", "b"], [("a", "b", (2, 2, 3), None, 2)],
    ),
    "leaves of tuples": (_by_place, _ROWS, ["0/0", "1"], [("0/0", "1", (5, 3), "0/1", 1)]),
}  # fmt: skip


@functools.lru_cache
def _merged(name):
    made, shape, where, _ = _MODELS[name]
    x = _image(*shape)
    apply, params = made(shape=shape)
    return apply, params, x, *merge_linear(apply, params, x, where=where)


@pytest.mark.parametrize("name", _MODELS)
def test_merged_is_the_same_function_of_a_smaller_tree(name):
    apply, params, x, merged_apply, merged, plan = _merged(name)
    assert [(m.first, m.second, m.shape, m.bias, len(m.dropped)) for m in plan.merges] == _MODELS[name][3]
    left = set(tree.paths(params))
    for m in plan.merges:
        left = (left - {*m.dropped}) | ({m.bias} - {None})
    assert set(tree.paths(merged)) == left
    assert tree.size(merged) < tree.size(params)
    # Neither the old products nor their weights are left in the program.
    assert tracing.count(merged_apply, merged, x).macs < tracing.count(apply, params, x).macs
    expected = jax.jit(apply)(params, x)
    np.testing.assert_allclose(jax.jit(merged_apply)(merged, x), expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_merge_by_hand():
    params = {
        "a": {"w": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "scale": jnp.array([[2.0, 0.5]]), "shift": jnp.array([[1.0, -1.0]])},
        "b": {"w": jnp.array([[1.0, 0.0], [2.0, 1.0]]), "bias": jnp.array([10.0, 20.0])},
    }

    def apply(p, x):
        return (x @ p["a"]["w"] * p["a"]["scale"] + p["a"]["shift"]) @ p["b"]["w"] + p["b"]["bias"][None]

    merged_apply, merged, plan = merge_linear(apply, params, jnp.ones((1, 2)), where="**/w")
    assert jax.tree.map(lambda a: a.tolist(), merged) == {"b": {"w": [[4.0, 1.0], [1.0, 0.5]], "bias": [9.0, 19.0]}}
    assert str(plan) == "a/w into b/w: (2, 2), shift in b/bias, without a/w, a/scale, a/shift"
    assert plan.merges[0].formula == ("mul a/scale", "add a/shift")
    assert merged_apply(merged, jnp.array([[1.0, 2.0]])).tolist() == [[15.0, 21.0]]


def test_two_convolutions_by_hand():
    """A difference of differences, of every other entry."""
    params = {"a": jnp.array([-1.0, 1.0]).reshape(2, 1, 1), "b": jnp.array([2.0, -2.0]).reshape(2, 1, 1)}

    def apply(p, x):
        for w in (p["a"], p["b"]):
            x = lax.conv_general_dilated(x, w, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        return x

    x = jnp.array([1.0, 4.0, 9.0, 16.0]).reshape(1, 4, 1)
    merged_apply, merged, _ = merge_linear(apply, params, x, where=["a", "b"])
    assert merged["b"].ravel().tolist() == [-2.0, 2.0, 2.0, -2.0]
    assert merged_apply(merged, x).tolist() == apply(params, x).tolist() == [[[-8.0]]]


# `apply`, shapes of the leaves, and the reason.
_APART = {
    "low rank": (lambda p, x: x @ p["a"] @ p["b"], {"a": (3, 1), "b": (1, 4)}, r"12 parameters instead of 7, \d+ multiplications"),
    "the second pads": (
        lambda p, x: _convolved(x @ p["a"] + p["c"], p["b"]), {"a": (3, 9), "b": (3, 3, 9, 2), "c": (1, 1, 1, 9)},
        "the second pads, and would not see the shift of the first",
    ),
    "both pad": (lambda p, x: _convolved(_convolved(x, p["a"]), p["b"]), {"a": (3, 3, 3, 9), "b": (3, 3, 9, 2)}, "the second pads"),
    "in groups": (
        lambda p, x: _convolved(x, p["a"], groups=3) @ p["b"], {"a": (3, 3, 1, 9), "b": (9, 2)}, "the first works in groups",
    ),
    "dilated": (
        lambda p, x: _convolved(_convolved(x, p["a"], dilation=(2, 2)), p["b"], "VALID"), {"a": (3, 3, 3, 9), "b": (2, 2, 9, 2)},
        "the first is dilated",
    ),
    "no place": (
        lambda p, x: (x @ p["a"][0] + 1.0) @ p["b"][0], {"a": [(3, 9)], "b": [(9, 2)]}, "there is no place for a bias beside b/0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _APART)
def test_what_is_kept_apart_is_named(name):
    apply, shapes, reason = _APART[name]
    params = _random(jax.tree.map(jnp.ones, shapes, is_leaf=lambda node: isinstance(node, tuple)))
    same_apply, same, plan = merge_linear(apply, params, _image(1, 5, 5, 3), where=["a/**", "b/**"])
    assert same_apply is apply
    assert same is params
    (apart,) = plan.apart
    assert re.fullmatch(f"kept apart: {apart.first} and {apart.second}: {reason}.*", str(plan))


def test_a_larger_layer_is_made_for_those_who_ask():
    apply = lambda p, x: jnp.tanh(x @ p["a"] @ p["b"])  # noqa: E731
    params, x = _random({"a": jnp.ones((5, 1)), "b": jnp.ones((1, 4))}), _image(2, 5)
    merged_apply, merged, _ = merge_linear(apply, params, x, where=["a", "b"], grow=True)
    assert merged["b"].shape == (5, 4)
    np.testing.assert_allclose(merged_apply(merged, x), apply(params, x), rtol=1e-5, atol=1e-6)


def test_merged_weights_are_quantised_differentiated_and_batched():
    _, _, x, merged_apply, merged, _ = _merged("dense")
    stored = compress.quantize(merged, where=_B)
    assert isinstance(stored["params"]["layers_1"]["kernel"], compress.Quantized)
    got = jax.jit(compress.lift(merged_apply))(stored, x)
    expected = jax.jit(merged_apply)(compress.decompress(stored), x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))

    apply, params, x, merged_apply, merged, _ = _merged("a normalisation between")
    # What merging does to weights has the same derivative as what it does to the function.
    through = jax.jit(jax.grad(lambda p: merged_apply(merge_linear(apply, p, x)[1], x).sum()))(params)
    direct = jax.jit(jax.grad(lambda p: apply(p, x).sum()))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), through, direct)
    several = jax.tree.map(lambda a: jnp.stack([a, -a]), merged)
    both = jax.jit(jax.vmap(merged_apply, (0, None)))(several, x)
    np.testing.assert_allclose(both[0], jax.jit(merged_apply)(merged, x), rtol=1e-5, atol=1e-5)


def test_batch_and_length_stay_free():
    apply, params, _, merged_apply, merged, _ = _merged("wide, then wide")
    other = _image(3, 12, 9, 3)
    expected = jax.jit(apply)(params, other)
    np.testing.assert_allclose(
        jax.jit(merged_apply)(merged, other), expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max())
    )


def test_half_precision_keeps_precise_shifts():
    x = _image(2, 5).astype(jnp.bfloat16)
    model = nets.from_linen(Layers((nn.Dense(8), nn.Dense(4))))
    variables = _random(jax.eval_shape(model.init, jax.random.key(0), x), jnp.bfloat16)
    merged_apply, merged, _ = merge_linear(model.predict, variables, x)
    layer = merged["params"]["layers_1"]
    assert (layer["kernel"].dtype, layer["bias"].dtype) == (jnp.bfloat16, jnp.float32)
    got, expected = jax.jit(merged_apply)(merged, x), jax.jit(model.predict)(variables, x)
    assert got.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), rtol=0.05, atol=0.3)


def test_what_is_read_elsewhere_is_left_alone():
    params, x = (
        _random({"a": jnp.ones((5, 6)), "b": jnp.ones((6, 3)), "shift": jnp.ones((1, 6)), "c": jnp.ones((3, 5))}),
        _image(2, 5),
    )
    where = ["a", "b", "c"]
    for apply in (
        lambda p, x: (x @ p["a"] @ p["b"], jnp.sum(p["a"])),
        lambda p, x: (y := x @ p["a"], y @ p["b"]),
        lambda p, x: x @ p["a"] @ p["b"] @ p["b"].T,
        lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    ):
        with pytest.raises(ValueError, match="none of a, b, c goes straight into another of them"):
            merge_linear(apply, params, x, where=where)

    def shared(p, x, more=False):
        y = (x @ p["a"] + p["shift"]) @ p["b"]
        return y + p["shift"][:, :3], y.sum() if more else p["shift"].sum()

    merged_apply, merged, plan = merge_linear(shared, params, x, where=where)
    assert plan.merges[0].dropped == ("a",)
    assert plan.merges[0].behind == ("add shift",)
    assert set(merged) == {"b", "bias", "shift", "c"}
    # The sum before the last addition is in no leaf any more.
    with pytest.raises(ValueError, match="a was merged into b, but in this call"):
        merged_apply(merged, x, more=True)
    for got, expected in zip(merged_apply(merged, x), shared(params, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_call_with_other_arguments_is_refused_or_right():
    def apply(p, x, gain=1.0, twice=False):
        y = gain * (x @ p["a"] + p["c"])
        return y @ p["b"], y.sum() if twice else None

    params, x = _random({"a": jnp.ones((5, 6)), "b": jnp.ones((6, 3)), "c": jnp.ones((1, 6))}), _image(2, 5)
    merged_apply, merged, _ = merge_linear(apply, params, x, where=["a", "b"])
    np.testing.assert_allclose(merged_apply(merged, x)[0], apply(params, x)[0], rtol=1e-5, atol=1e-5)
    for other in ({"gain": 2.0}, {"twice": True}):
        with pytest.raises(ValueError, match=r"^a was merged into b, but in this call .*call it as in inference"):
            merged_apply(merged, x, **other)
    with pytest.raises(ValueError, match="this is not the merged tree; first of 3 paths that it lacks or has too many: a"):
        merged_apply(params, x)


def test_what_cannot_be_merged_is_named():
    apply, params, x, *_ = _merged("dense")
    with pytest.raises(ValueError, match="nothing matches where='kernels'"):
        merge_linear(apply, params, x, where="kernels")
    with pytest.raises(TypeError, match="params/layers_0/kernel is stored as Quantized: merge first, compress then"):
        merge_linear(apply, compress.quantize(params, where=_A), x)
