"""Every network of `nets`, slimmed: against its masked self, or, where channels are normalised together, one built narrower."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import nets
from jaxopt_lab.core import tree
from jaxopt_lab.surgery import coupled_channels, mask, slim

KEY = jax.random.key(0)

SMALL, IMAGE = (2, 8, 8, 3), (2, 16, 16, 3)
STEPS, TOKENS = (2, 5, 3), None


def _decoder(width, heads, mlp_width, depth=1, **fields):
    return nets.Decoder(11, 8, width, depth, heads, mlp_width=mlp_width, **fields)


# Grouped queries, rotated, gated, as LLaMA's are.
_LATER = {"rotary": 100.0, "gated": True, "use_bias": False, "norm": nn.RMSNorm, "activation": nn.silu, "tied": False}

_GROUPS = partial(nn.GroupNorm, num_groups=2)

# Where a branch is narrow, all of it might be rectified away: there the activation has a slope everywhere.
MASKED = {
    "mlp": (nets.MLP((8, 6), classes=3), (2, 5)),
    "lenet": (nets.LeNet((4, 6), (8,), classes=3), (2, 12, 12, 1)),
    "resnet": (nets.ResNet(depth=6, widths=(4, 6), classes=3), SMALL),
    "resnet_18": (nets.ImageNetResNet(widths=[[(w, w)] * 2 for w in (4, 4, 6, 8)], stem=4, classes=3), IMAGE),
    "bottleneck": (nets.ImageNetResNet(widths=[[(4, 4, 8)] * 2, [(6, 6, 12)]], stem=4, classes=3), SMALL),
    "squeeze_excitation": (
        nets.ImageNetResNet(widths=[[(4, 4, 8)], [(6, 6, 8)]], stem=4, squeeze_excitation=2, classes=3),
        IMAGE,
    ),
    "vgg": (nets.VGG(((4, 4), (6,)), (8,), classes=3), SMALL),
    "vgg_bn": (nets.VGG(((4,), (6,)), (8,), classes=3, batch_norm=True), SMALL),
    "inception": (
        nets.Inception((((4, 4, 6, 2, 4, 2),), ((4, 2, 4, 2, 4, 2),)), (3, 2), (4, 4, 6), classes=3, activation=nn.elu),
        IMAGE,
    ),
    "densenet": (nets.DenseNet((((6, 4), (6, 4)), ((6, 4),)), stem=4, classes=3, activation=nn.elu), IMAGE),
    "mobilenet": (nets.MobileNetV2((((4,),), ((12, 6), (12, 6))), (1, 2), 6, 8, classes=3), IMAGE),
    "unet": (nets.UNet(((4, 4), (6,), (8,))), SMALL),
    "unet_bn": (nets.UNet(((4,), (6,)), norm=nn.BatchNorm), SMALL),
    "lstm": (nets.Recurrent((6, 4), classes=3, bidirectional=True), STEPS),
    "gru": (nets.Recurrent((6,), classes=3, cell=nn.GRUCell, vocabulary=11, embedding=4), TOKENS),
    # Both outputs are states: their width is protected, and no LayerNorm loses a channel.
    "bert": (nets.BERT(11, 8, 2, width=8, depth=1, heads=2, mlp_width=8), TOKENS),
}
NARROWED = {
    "unet_group": (nets.UNet(((4,), (8,)), norm=_GROUPS), nets.UNet(((2,), (4,)), norm=_GROUPS), SMALL),
    "fused": (_decoder(8, 4, 8), _decoder(4, 2, 4), TOKENS),
    "scanned": (_decoder(8, 4, 8, scan=True, remat=True), _decoder(4, 2, 4, scan=True), TOKENS),
    "separate": (
        _decoder(16, 4, 8, kv_heads=2, fused=False, **_LATER),
        _decoder(8, 2, 4, kv_heads=1, fused=False, **_LATER),
        TOKENS,
    ),
    # Each layer of its own widths.
    "own_widths": (
        _decoder(16, (4, 2), (8, 6), 2, kv_heads=2, head_size=(4, 2), fused=False, **_LATER),
        _decoder(8, (2, 1), (4, 3), 2, kv_heads=1, head_size=(4, 2), fused=False, **_LATER),
        TOKENS,
    ),
    "fused_grouped": (_decoder(16, 4, 8, kv_heads=2, rotary=100.0), _decoder(8, 2, 4, kv_heads=1, rotary=100.0), TOKENS),
    "vit": (nets.VisionTransformer(4, 8, 2, 2, 8, classes=3), nets.VisionTransformer(4, 4, 2, 1, 4, classes=3), SMALL),
    "mixer": (nets.Mixer(4, 8, 2, 6, 8, classes=3), nets.Mixer(4, 4, 2, 3, 4, classes=3), SMALL),
}

# The others with `scripts/test -m slow`.
_OFTEN = ("squeeze_excitation", "unet_group", "separate")


def _rows(names):
    marked = [pytest.param(name, marks=() if name in _OFTEN else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", marked)


def _made(module, shape):
    """The model, variables of which none is the 0 or 1 that it starts with, and an input."""
    model, draw = nets.from_linen(module), np.random.default_rng(0)
    x = (
        jnp.arange(10).reshape(2, 5) % 11
        if shape is TOKENS
        else jax.device_put(np.asarray(draw.standard_normal(shape), np.float32))
    )

    def drawn(path, leaf):
        values, name = 0.5 * draw.standard_normal(leaf.shape), path[-1].key
        # Of a few units that are rectified, most are to pass.
        values = np.exp(values) if name in ("scale", "var") else values + 0.5 * (name == "bias")
        return jnp.asarray(values, leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(drawn, jax.eval_shape(model.init, KEY, x)), x


def _checked(model, variables, x):
    """The network slimmed, what it computes, and the plan, after what holds of all."""
    small_model, small, plan = slim(model, variables, x, ratio=0.5)
    assert tree.size(small) < 0.75 * tree.size(variables)

    def loss(params):
        out = small_model.predict({**small, "params": params}, x)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(small["params"])
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, small["params"])
    for path, leaf in tree.selected(grads, "**").items():
        assert np.isfinite(leaf).all(), path
    # A bias of the keys adds the same to all scores of a query.
    moving = [path for path, leaf in tree.selected(grads, "**").items() if np.abs(leaf).max() > 0]
    assert len(moving) > 0.8 * len(tree.paths(grads))
    coupling = coupled_channels(model.predict, variables, x)
    assert all(entry.reason for entry in coupling.protected)
    listed = {member.path for group in coupling.groups for member in group.members} | {entry.path for entry in coupling.protected}
    assert listed == set(tree.paths(variables))
    return small, plan, out


def _near(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max() + 1))


@_rows(MASKED)
def test_slim_equals_masked(name):
    model, variables, x = _made(*MASKED[name])
    _, plan, out = _checked(model, variables, x)
    _near(out, jax.jit(model.predict)(mask(variables, plan), x))


@_rows(NARROWED)
def test_slim_equals_the_network_built_narrower(name):
    module, narrow, shape = NARROWED[name]
    model, variables, x = _made(module, shape)
    small, _, out = _checked(model, variables, x)
    narrow_model = nets.from_linen(narrow)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, jax.eval_shape(narrow_model.init, KEY, x))
    _near(out, jax.jit(narrow_model.predict)(small, x))


def test_every_network_has_a_row():
    modules = [module for module, *_ in (*MASKED.values(), *NARROWED.values())]
    networks = {value for value in vars(nets).values() if isinstance(value, type) and issubclass(value, nn.Module)}
    assert {type(module) for module in modules} == networks
