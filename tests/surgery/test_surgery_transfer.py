"""Weights by path: what is taken whole, in part and not at all, in trees of all kinds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_lab import compress, nets
from jaxopt_lab.core import tree
from jaxopt_lab.surgery.transfer import Part, transfer


def _mlp(*features, classes=4, seed=0):
    model, rng = nets.from_linen(nets.MLP(features=features, classes=classes)), np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 5)))
    return model, jax.tree.map(lambda s: jax.device_put(np.asarray(rng.normal(size=s.shape), s.dtype)), shapes)


def test_a_wider_and_deeper_network_starts_from_a_smaller_one():
    _, small = _mlp(6)
    _, large = _mlp(8, 7, seed=1)
    params, report = transfer(small, large, where=["**/Dense_0/*", "**/Dense_1/*"], partial=True)
    assert report.whole == ()
    assert report.parts == (
        Part("params/Dense_0/bias", (6,), (8,)),
        Part("params/Dense_0/kernel", (5, 6), (5, 8)),
        Part("params/Dense_1/bias", (4,), (7,)),
        Part("params/Dense_1/kernel", (6, 4), (8, 7)),
    )
    expected = np.array(large["params"]["Dense_1"]["kernel"])
    expected[:6, :4] = small["params"]["Dense_1"]["kernel"]
    np.testing.assert_array_equal(params["params"]["Dense_1"]["kernel"], expected)
    # And the other way round, it is cut.
    back, report = transfer(params, small, partial=True)
    np.testing.assert_array_equal(back["params"]["Dense_0"]["kernel"], small["params"]["Dense_0"]["kernel"])
    assert report.unused == ("params/Dense_2/bias", "params/Dense_2/kernel")


def test_other_shapes_are_kept_unless_corners_are_asked_for():
    _, old = _mlp(6)
    model, new = _mlp(6, classes=9, seed=1)
    params, report = transfer(old, new)
    assert report.whole == ("params/Dense_0/bias", "params/Dense_0/kernel")
    assert report.unlike == (Part("params/Dense_1/bias", (4,), (9,)), Part("params/Dense_1/kernel", (6, 4), (6, 9)))
    assert report.unused == ("params/Dense_1/bias", "params/Dense_1/kernel")
    np.testing.assert_array_equal(params["params"]["Dense_0"]["kernel"], old["params"]["Dense_0"]["kernel"])
    np.testing.assert_array_equal(params["params"]["Dense_1"]["kernel"], new["params"]["Dense_1"]["kernel"])
    assert str(report).splitlines() == [
        "2 leaves taken whole",
        "params/Dense_1/bias: kept, (4,) does not fit (9,)",
        "params/Dense_1/kernel: kept, (6, 4) does not fit (6, 9)",
        "params/Dense_1/bias: of the source, not used",
        "params/Dense_1/kernel: of the source, not used",
    ]
    # Another rank never fits.
    _, report = transfer({"a": jnp.ones(3), "b": jnp.ones((3, 1))}, {"a": jnp.zeros(3), "b": jnp.zeros(3)}, partial=True)
    assert report.unlike == (Part("b", (3, 1), (3,)),)
    assert model.predict(params, jnp.ones((2, 5))).shape == (2, 9)


@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


jax.tree_util.register_dataclass(Layer, ["kernel", "bias"], [])


def test_trees_of_all_kinds_are_read_by_path():
    rng = nnx.Rngs(0)
    graph, state = nnx.split(nnx.Sequential(nnx.Linear(5, 6, rngs=rng), nnx.Linear(6, 4, rngs=rng)))
    _, linen = _mlp(6)
    places = {"params/Dense_0": "layers/0", "params/Dense_1": "layers/1"}
    filled, report = transfer(linen, state, rename=places)
    assert len(report.whole) == 4
    assert not report.kept
    x = jax.random.normal(jax.random.key(1), (3, 5))
    first, second = linen["params"]["Dense_0"], linen["params"]["Dense_1"]
    expected = (x @ first["kernel"] + first["bias"][None]) @ second["kernel"] + second["bias"][None]
    np.testing.assert_allclose(nnx.merge(graph, filled)(x), expected, rtol=1e-5, atol=1e-5)

    target = (Layer(jnp.zeros((5, 6), jnp.bfloat16), jnp.zeros(6)), Layer(jnp.zeros((6, 4)), jnp.zeros(4)))
    taken, _ = transfer(filled, target, rename=lambda path: path.removeprefix("layers/") if path.endswith("kernel") else None)
    assert taken[0].kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(taken[0].kernel, first["kernel"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(taken[1].kernel, second["kernel"])
    assert not np.any(taken[1].bias)


def test_the_longest_beginning_renames_and_whole_parts_count():
    source = {"net": {"a": 1.0, "head": 2.0}, "network": 3.0, "last": 4.0}
    target = {"body": {"a": 0.0}, "out": 0.0, "network": 0.0, "last": 5.0}
    params, report = transfer(source, target, rename={"net": "body", "net/head": "out", "last": None})
    assert jax.tree.map(float, params) == {"body": {"a": 1.0}, "out": 2.0, "network": 3.0, "last": 5.0}
    assert (report.kept, report.unused) == (("last",), ("last",))
    params, _ = transfer({"a": 1.0}, {"x": {"a": 0.0}}, rename={"": "x"})
    assert float(params["x"]["a"]) == 1.0


def test_codes_are_read_and_keys_are_taken():
    source = {"w": jnp.array([[1.27], [0.0]]), "key": jax.random.key(3)}
    stored = compress.quantize(source, where="w")
    params, _ = transfer(stored, {"w": jnp.zeros((2, 1)), "key": jax.random.key(0)})
    np.testing.assert_array_equal(params["w"], compress.decompress(stored)["w"])
    assert params["key"] == source["key"]
    with pytest.raises(TypeError, match="w of the target is stored as Quantized: fill dense weights"):
        transfer(source, stored)


def test_it_can_be_compiled():
    _, small = _mlp(6)
    _, large = _mlp(8, seed=1)
    compiled = jax.jit(lambda a, b: transfer(a, b, partial=True)[0])(small, large)
    jax.tree.map(np.testing.assert_array_equal, compiled, transfer(small, large, partial=True)[0])
    assert tree.paths(compiled) == tree.paths(large)


def test_what_cannot_be_transferred_is_named():
    with pytest.raises(ValueError, match=r"no path of the source is one of the target; the nearest: b/kernel for a/kernel"):
        transfer({"b": {"kernel": 1.0}}, {"a": {"kernel": 1.0}})
    with pytest.raises(ValueError, match=r"no shape fits; first of 1: w, \(2,\) -> \(3,\); partial=True takes corners"):
        transfer({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="rename takes both a and b to c"):
        transfer({"a": 1.0, "b": 1.0}, {"c": 1.0}, rename={"a": "c", "b": "c"})
    with pytest.raises(ValueError, match="no path of the source begins with encode; the nearest: encoder/w"):
        transfer({"encoder": {"w": 1.0}}, {"w": 1.0}, rename={"encode": ""})
    with pytest.raises(ValueError, match="nothing matches where="):
        transfer({"w": 1.0}, {"w": 1.0}, where="v")


def test_numbers_that_would_be_others_are_kept():
    source, target = {"a": jnp.array([2.7]), "b": jnp.array([3])}, {"a": jnp.zeros(1, int), "b": jnp.zeros(1)}
    params, report = transfer(source, target)
    assert (params["a"].tolist(), params["b"].tolist()) == ([0], [3.0])
    assert [part.path for part in report.unlike] == ["a"]
