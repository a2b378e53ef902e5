"""The table of layers: totals and rows by hand, the order of the calls, what it accepts, how it prints."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxopt_lab import nets, tracing, tree


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="z_first")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(2, name="a_last")(x.mean((1, 2)) * self.param("gain", nn.initializers.ones, ()))


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_the_table_by_hand():
    found = nets.describe(Small(), shaped(1, 5, 6, 3))
    assert found.layers == (
        nets.Layer("z_first", {"kernel": (3, 3, 3, 4)}, 108, 5 * 6 * 108),
        nets.Layer("norm", {"bias": (4,), "scale": (4,)}, 8, 0),
        nets.Layer("gain", {"gain": ()}, 1, 0),
        nets.Layer("a_last", {"bias": (2,), "kernel": (4, 2)}, 10, 8),
    )
    assert (found.parameters, found.macs, found.others, found.state) == (127, 3248, 0, 8)
    assert str(found).splitlines() == [
        "layer                      shapes              parameters   MACs",
        "z_first                    kernel 3x3x3x4             108  3,240",
        "norm                       bias 4, scale 4              8      0",
        "gain                       ()                           1      0",
        "a_last                     bias 2, kernel 4x2          10      8",
        "total                                                 127  3,248",
        "(state, not in the total)                               8",
    ]


def test_layers_stand_in_the_order_of_the_calls():
    found = nets.describe(nets.ResNet(depth=26), shaped(1, 32, 32, 3))
    convolutions = [layer.path for layer in found.layers if layer.path.startswith("Conv")]
    assert convolutions == [f"Conv_{k}" for k in range(25)]  # Not Conv_0, Conv_1, Conv_10, as a tree sorts them.
    assert [layer.path for layer in found.layers][:3] == ["Conv_0", "BatchNorm_0", "Conv_1"]
    assert found.layers[-1].path == "Dense_0"


def test_what_is_never_read_comes_last():
    def init(key, x):
        return {"a": jnp.zeros((7,)), "b": jnp.zeros((3, 2)), "c": jnp.zeros((2, 5))}

    model = nets.from_functions(init, lambda params, x: x @ params["b"] @ params["c"])
    found = nets.describe(model, shaped(4, 3))
    assert found.layers == (
        nets.Layer("b", {"b": (3, 2)}, 6, 24),
        nets.Layer("c", {"c": (2, 5)}, 10, 40),
        nets.Layer("a", {"a": (7,)}, 7, 0),
    )


def test_totals_of_a_published_network():
    module = nets.VisionTransformer(classes=1000, depth=2)
    image = shaped(1, 224, 224, 3)
    found = nets.describe(module, image)
    # Two products of attention a block, over 196 patches and the class token.
    assert found.others == 2 * 2 * 197 * 197 * 768
    assert found.macs == found.others + sum(layer.macs for layer in found.layers)
    params = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    assert found.parameters == tree.size(params)
    assert found.macs == tracing.count(lambda p, x: module.apply({"params": p}, x), params, image).macs
    assert f"(products without a parameter)  {found.others:>40,}".split() == str(found).splitlines()[-2].split()
    assert {layer.path: layer.shapes for layer in found.layers}["position"] == {"position": (1, 197, 768)}


def test_no_weight_is_made():
    """The kernel alone would take 4 TB."""
    assert nets.describe(nn.Dense(10**6, use_bias=False), shaped(1, 10**6)).macs == 10**12


def test_a_call_inside_jit_or_remat_is_seen():
    inner = nn.remat(nets.MLP)(features=(4,), classes=2)
    found = nets.describe(nn.Sequential([nn.jit(nn.Dense)(3), inner]), shaped(1, 5))
    assert [(layer.path, layer.macs) for layer in found.layers] == [
        ("layers_0", 15),
        ("layers_1/Dense_0", 12),
        ("layers_1/Dense_1", 8),
    ]


def test_models_of_every_kind():
    linen = nets.describe(nets.from_linen(nn.Sequential([nn.Dense(3)])), shaped(2, 4))
    graph = nets.describe(nets.from_nnx(lambda rngs: nnx.Sequential(nnx.Linear(4, 3, rngs=rngs))), shaped(2, 4))
    assert [layer[1:] for layer in graph.layers] == [layer[1:] for layer in linen.layers]
    bare = nets.describe(nets.from_functions(lambda key, x: jnp.ones((4,)), lambda w, x: x @ w), shaped(2, 4))
    assert (bare.parameters, bare.macs) == (4, 8)
    text = nets.describe(nn.Embed(7, 3), shaped(2, 4, dtype=jnp.int32))
    assert (text.parameters, text.macs) == (21, 0)


def test_other_things_are_told_the_way():
    with pytest.raises(TypeError, match=r"nets\.from_nnx\(model\)"):
        nets.describe(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), shaped(1, 2))
    with pytest.raises(TypeError, match="from_functions"):
        nets.describe(lambda x: x, shaped(1, 2))


def test_long_rows_go_on_in_the_next_line():
    deep = nn.Sequential([nn.Sequential([nn.Sequential([nn.OptimizedLSTMCell(100_000, name="a" * 60)])])])
    carry = (shaped(1, 100_000), shaped(1, 100_000))
    found = nets.describe(deep, carry, shaped(1, 100_000))
    wide = nets.Layer("b" * 100, {f"kernel_{k}": (1000, 1000, 1000) for k in range(5)}, 5 * 10**9, 10**12)
    text = str(found._replace(layers=(*found.layers, wide)))
    assert max(map(len, text.splitlines())) < 120
    head, *rows = text.splitlines()
    assert all(len(row) <= len(head) for row in rows)
    # Nothing is cut off, and no name stands apart from its shape.
    assert "".join(row[:44].strip() for row in rows).count("b") == 100
    assert all(text.count(f"kernel_{k} 1000x1000x1000") == 1 for k in range(5))
