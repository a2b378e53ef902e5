"""What networks share: blocks in a row under scan and remat, layers of their own widths, rotations, attention."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import nets, tree
from jaxopt_lab.nets import blocks

KEY = jax.random.key(0)
TOKENS, IMAGE = (2, 6), (2, 4, 4, 3)

DEEP = {
    "bert": (nets.BERT(11, 8, 2, width=6, depth=2, heads=2, mlp_width=5, dropout=0.5), TOKENS),
    "vit": (nets.VisionTransformer(2, 6, 2, 2, 5, classes=3, dropout=0.5), IMAGE),
    "decoder": (nets.Decoder(11, 8, 6, 2, 2, mlp_width=5, dropout=0.5), TOKENS),
    "mixer": (nets.Mixer(2, 6, 2, 4, 5, classes=3, dropout=0.5), IMAGE),
}


def _rows(often):
    """The names; those that are not `often` run with `scripts/test -m slow`."""
    return [pytest.param(name, marks=() if name in often else pytest.mark.slow) for name in DEEP]


@functools.cache
def made(name):
    """The variables, all of them drawn at random (zeros hide faults), and an input."""
    module, shape = DEEP[name]
    draw = np.random.default_rng(0)
    x = jax.device_put(draw.integers(0, 11, shape) if shape is TOKENS else draw.standard_normal(shape).astype(np.float32))
    shapes = jax.eval_shape(module.init, KEY, x)
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(0.5 * draw.standard_normal(leaf.shape), leaf.dtype)), shapes), x


def stacked(params):
    """`block_0`, `block_1`, ... as `blocks`, with an axis of layers."""
    rows = [params[f"block_{k}"] for k in range(2)]
    others = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
    return {**others, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)}


def ran(module, params, x, **options):
    """The outputs, and the gradients of a sum of sines of them."""
    model = nets.from_linen(module)

    def loss(params):
        outputs = model.apply({"params": params}, x, **options)[0]
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(outputs)), outputs

    grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
    return outputs, grads


def near(got, want):
    def check(path, a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, got, want)


@pytest.mark.parametrize("name", _rows({"decoder", "mixer"}))
def test_a_scan_computes_what_the_blocks_in_a_row_do(name):
    module, (variables, x) = DEEP[name][0], made(name)
    outputs, grads = ran(module, variables["params"], x)
    looped = module.clone(scan=True, remat=True)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(looped.init, KEY, x)["params"])
    assert shapes == jax.tree.map(jnp.shape, stacked(variables["params"]))
    near(ran(looped, stacked(variables["params"]), x), (outputs, stacked(grads)))


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", _rows({"decoder"}))
def test_what_is_computed_again_is_the_same_in_training(name, scan):
    module, (variables, x) = DEEP[name][0].clone(scan=scan), made(name)
    params = stacked(variables["params"]) if scan else variables["params"]
    options = {"train": True, "key": KEY}
    near(ran(module.clone(remat=True), params, x, **options), ran(module, params, x, **options))


@pytest.mark.parametrize("name", DEEP)
def test_remat_keeps_less(name):
    """Bytes that the backward pass reads: what enters a block, and not what is inside it."""
    module, (variables, x) = DEEP[name][0], made(name)

    def kept(module):
        def call(params):
            return module.apply({"params": params}, x)

        _, backward = jax.eval_shape(lambda params: jax.vjp(call, params), variables["params"])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    assert kept(module.clone(remat=True)) < 0.75 * kept(module)


def test_layers_of_a_scan_differ_at_first_and_as_they_drop():
    dropped = jax.jit(lambda: _Dropped().apply({}, jnp.ones(4096), rngs={"dropout": KEY}))()
    # Both layers keep a quarter of all, and scale it by four; one mask used twice would keep a half.
    assert set(np.unique(dropped)) == {0.0, 4.0}
    np.testing.assert_allclose((dropped > 0).mean(), 0.25, atol=0.03)
    kernel = jax.jit(_Dense().init)(KEY, jnp.ones((1, 300)))["params"]["blocks"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01
    # The inputs of one layer, and not of all, are what an initialiser counts.
    np.testing.assert_allclose(kernel.var((1, 2)), 1 / 300, rtol=0.03)


class _Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return blocks.repeated(nn.Dropout, [{"rate": 0.5, "deterministic": False}] * 2, x, scan=True)


class _Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return blocks.repeated(nn.Dense, [{"features": 300, "kernel_init": nets.initializers.lecun_normal}] * 2, x, scan=True)


@pytest.mark.parametrize("scan", [False, True])
def test_no_block_at_all(scan):
    module = nets.Decoder(11, 8, 6, depth=0, scan=scan)
    variables = jax.eval_shape(module.init, KEY, jnp.ones((1, 3), int))
    assert set(variables["params"]) == {"tokens", "positions", "norm"}


def test_layers_of_their_own_widths():
    fields = {"depth": 2, "heads": (2, 3), "head_size": (5, 4), "mlp_width": (7, 8)}
    for module, x in (
        (nets.BERT(11, 8, 2, width=6, **fields), jnp.ones(TOKENS, int)),
        (nets.VisionTransformer(2, 6, classes=3, **fields), jnp.ones(IMAGE)),
        (nets.Decoder(11, 8, 6, fused=False, kv_heads=(1, 3), **fields), jnp.ones(TOKENS, int)),
    ):
        params = jax.eval_shape(module.init, KEY, x)["params"]
        shared = (5, 12) if isinstance(module, nets.Decoder) else (10, 12)
        for k, (inside, keys, hidden) in enumerate(zip((10, 12), shared, (7, 8), strict=True)):
            block = {name: layer["kernel"].shape for name, layer in params[f"block_{k}"].items() if "kernel" in layer}
            wanted = {"query": (6, inside), "key": (6, keys), "value": (6, keys), "out": (inside, 6)}
            assert block == {**wanted, "hidden": (6, hidden), "mlp_out": (hidden, 6)}
        with pytest.raises(ValueError, match=r"scan=True repeats one block, and heads and .*mlp_width differ between layers"):
            jax.eval_shape(module.clone(scan=True).init, KEY, x)
        with pytest.raises(ValueError, match=r"heads must be one number, or 3 for depth=3; got \(2, 3\)"):
            jax.eval_shape(module.clone(depth=3).init, KEY, x)


def test_rotated_products_know_distances_only():
    draw = np.random.default_rng(0)
    query, key = (jax.device_put(np.asarray(np.broadcast_to(draw.standard_normal(6), (1, 9, 6)), np.float32)) for _ in range(2))
    products = np.asarray(blocks.rotated(query, 20.0)[0] @ blocks.rotated(key, 20.0)[0].T)
    for distance in range(-8, 9):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert np.abs(products[0] - products[0, 0])[1:].min() > 1e-3
    # Position 0 stays, and no length changes.
    np.testing.assert_array_equal(blocks.rotated(query)[0, 0], query[0, 0])
    np.testing.assert_allclose(jnp.linalg.norm(blocks.rotated(query), axis=-1), jnp.linalg.norm(query, axis=-1), rtol=1e-5)


def test_rotations_of_heads_and_of_16_bits():
    x = jax.random.normal(KEY, (2, 300, 2, 3, 4))
    each = jax.jit(blocks.rotated)(x)
    np.testing.assert_allclose(each[:, :, 1, 2], blocks.rotated(x[:, :, 1, 2]), rtol=1e-5, atol=1e-6)
    # In bfloat16 a position of 299 would be 300: the angles are computed in float32.
    half = jax.jit(blocks.rotated)(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), each, atol=0.03)


def test_attention_where_none_may_attend_is_even():
    query, key = jax.random.normal(KEY, (1, 3, 1, 2, 4)), jax.random.normal(KEY, (1, 3, 1, 4))
    weights = blocks.attention_weights(query, key, jnp.asarray([[[1, 0, 0], [1, 1, 0], [0, 0, 0]]], bool))
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(weights[..., 0, :], np.broadcast_to([1.0, 0, 0], (1, 1, 2, 3)))
    assert (weights[..., 1, 2] == 0).all()
    np.testing.assert_allclose(weights[..., 2, :], 1 / 3, rtol=1e-6)


def test_every_parameter_of_a_scanned_network_has_a_gradient():
    module, (variables, x) = DEEP["decoder"][0].clone(scan=True, remat=True), made("decoder")
    _, grads = ran(module, stacked(variables["params"]), x)
    size = 6
    for path, leaf in tree.selected(grads, "**").items():
        rows = leaf[: x.shape[1]] if path == "positions/embedding" else leaf
        # A bias of the keys adds the same to all scores of a query.
        rows = np.delete(rows, np.s_[size : 2 * size], -1) if path.endswith("qkv/bias") else rows
        assert (np.abs(rows).max(-1) > 1e-6).all(), path
