"""The causal language model: numpy's forward pass, causality, padding, layers fused and apart, types, initialisers, bad fields."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import compress, nets, tree

KEY = jax.random.key(0)
LLAMA = {"gated": True, "fused": False, "rotary": 50.0, "tied": False, "use_bias": False, "norm": nn.RMSNorm, "activation": nn.silu}
SMALL = {
    "gpt": nets.Decoder(11, 7, width=6, depth=2, heads=2, mlp_width=5, dropout=0.5),
    # Queries in groups, and widths of each layer's own.
    "llama": nets.Decoder(11, width=6, depth=2, heads=4, kv_heads=(2, 1), head_size=(4, 2), mlp_width=(5, 3), dropout=0.5, **LLAMA),
}
TOKENS = jax.device_put(np.random.default_rng(1).integers(0, 11, (2, 7)))


def drawn(module):
    """The variables, all of them drawn at random: zeros and ones hide faults."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, KEY, TOKENS)
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(0.7 * draw.standard_normal(leaf.shape), leaf.dtype)), shapes)


@functools.cache
def made(name):
    model = nets.from_linen(SMALL[name])
    return model, drawn(SMALL[name]), jax.jit(model.predict)


def norm(module, layer, x):
    if module.norm is nn.RMSNorm:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * layer["scale"] + layer["bias"]


def dense(layer, x):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def turned(x, base):
    """Pairs as complex numbers, times numbers of length one."""
    half = x.shape[1] // 2
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], 1)


def forward(module, params, tokens, mask):
    """The logits of one row, head by head and query by query."""
    x = params["tokens"]["embedding"][tokens]
    if module.rotary is None:
        x = x + params["positions"]["embedding"][: len(tokens)]
    for k in range(module.depth):
        block = params[f"block_{k}"]
        heads, shared, size = (2, 2, 3) if module.fused else (4, (2, 1)[k], (4, 2)[k])
        y = norm(module, block["norm_attention"], x)
        if module.fused:
            query, key, value = np.split(dense(block["qkv"], y), 3, -1)
        else:
            query, key, value = (dense(block[name], y) for name in ("query", "key", "value"))
        out = np.zeros((len(tokens), heads * size))
        for h in range(heads):
            own, its = (np.s_[:, j * size : (j + 1) * size] for j in (h, h // (heads // shared)))
            q, k_, v = query[own], key[its], value[its]
            if module.rotary is not None:
                q, k_ = turned(q, module.rotary), turned(k_, module.rotary)
            for n in range(len(tokens)):
                seen = [m for m in range(n + 1) if mask[m]]
                weights = np.exp(k_[seen] @ q[n] / math.sqrt(size))
                out[n, own[1]] = weights / weights.sum() @ v[seen]
        x = x + dense(block["out"], out)
        y = norm(module, block["norm_mlp"], x)
        hidden = dense(block["hidden"], y)
        if module.gated:
            gate = dense(block["gate"], y)
            hidden = gate / (1 + np.exp(-gate)) * hidden
        else:
            hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + dense(block["mlp_out"], hidden)
    x = norm(module, params["norm"], x)
    return x @ params["tokens"]["embedding"].T if module.tied else dense(params["head"], x)


@pytest.mark.parametrize("name", SMALL)
def test_as_numpy_computes_it(name):
    _, variables, predict = made(name)
    mask = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1]], bool)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    wanted = [forward(SMALL[name], params, *row) for row in zip(np.asarray(TOKENS), mask, strict=True)]
    found = predict(variables, TOKENS, jnp.asarray(mask))
    assert found.shape == (2, 7, 11)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_a_later_token_changes_nothing_before_it(name):
    _, variables, predict = made(name)
    plain = predict(variables, TOKENS)
    for n in range(7):
        other = predict(variables, TOKENS.at[:, n].set((TOKENS[:, n] + 3) % 11))
        np.testing.assert_array_equal(other[:, :n], plain[:, :n])
        assert (np.abs(other - plain)[:, n:].max(-1) > 1e-4).all()


@pytest.mark.parametrize("name", SMALL)
def test_padding_is_not_seen(name):
    _, variables, predict = made(name)
    for begin, end in ((0, 4), (2, 7)):
        where = jnp.broadcast_to((jnp.arange(7)[None] >= begin) & (jnp.arange(7)[None] < end), (2, 7))
        plain = predict(variables, TOKENS, where)
        other = predict(variables, jnp.where(where, TOKENS, (TOKENS + 3) % 11), where)
        np.testing.assert_array_equal(other[:, begin:end], plain[:, begin:end])
        assert np.isfinite(plain).all()
        # Causality hides what comes later anyway, but not what comes before.
        hidden = np.allclose(plain[:, begin:end], predict(variables, TOKENS)[:, begin:end], rtol=1e-5, atol=1e-5)
        assert hidden == (begin == 0)


def test_one_layer_for_queries_keys_and_values_or_three():
    fused = nets.Decoder(11, 7, width=6, depth=1, heads=3, kv_heads=1, mlp_width=5)
    variables = drawn(fused)
    block = variables["params"]["block_0"]
    ends = (6, 8)
    parts = zip(*(jnp.split(block["qkv"][name], ends, axis=-1) for name in ("kernel", "bias")), strict=True)
    apart = {name: {"kernel": kernel, "bias": bias} for name, (kernel, bias) in zip(("query", "key", "value"), parts, strict=True)}
    others = {name: layer for name, layer in block.items() if name != "qkv"}
    moved = {"params": {**variables["params"], "block_0": {**others, **apart}}}
    wanted = jax.jit(fused.apply)(variables, TOKENS)
    np.testing.assert_allclose(jax.jit(fused.clone(fused=False).apply)(moved, TOKENS), wanted, rtol=1e-5, atol=1e-5)


def test_rotations_have_no_longest_sequence():
    shapes = jax.eval_shape(SMALL["llama"].init, KEY, TOKENS)
    longer = jax.eval_shape(SMALL["llama"].clone(positions=2).apply, shapes, jnp.ones((1, 5000), int))
    assert longer.shape == (1, 5000, 11)
    assert "positions" not in shapes["params"]


@pytest.mark.parametrize("name", ["gpt", pytest.param("llama", marks=pytest.mark.slow)])
def test_dropout_acts_in_training_only(name):
    model, variables, predict = made(name)
    train = jax.jit(jax.vmap(lambda key: model.apply(variables, TOKENS, train=True, key=key)[0]))
    outputs = train(jax.random.split(KEY, 2))
    assert (outputs[0] != outputs[1]).any()
    assert not np.allclose(outputs[0], predict(variables, TOKENS))


@pytest.mark.parametrize("name", SMALL)
def test_types_of_parameters_and_of_computation(name):
    half = nets.from_linen(SMALL[name].clone(dtype=jnp.bfloat16, param_dtype=jnp.float16))
    variables = jax.eval_shape(half.init, KEY, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float16)}
    assert jax.eval_shape(half.predict, variables, TOKENS).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        double = nets.from_linen(SMALL[name].clone(param_dtype=jnp.float64))
        variables = jax.eval_shape(double.init, jax.random.key(0), TOKENS)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float64)}
        assert jax.eval_shape(double.predict, variables, TOKENS).dtype == jnp.float64


def test_bfloat16_is_near_float32():
    _, variables, predict = made("llama")
    half = nets.from_linen(SMALL["llama"].clone(dtype=jnp.bfloat16))
    wanted = np.asarray(predict(variables, TOKENS))
    found = np.asarray(jax.jit(half.predict)(variables, TOKENS), np.float32)
    np.testing.assert_allclose(found, wanted, atol=0.05 * np.abs(wanted).max())


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_added_to_the_state_begins_smaller(scan):
    module = nets.Decoder(11, 7, width=128, depth=2, heads=2, mlp_width=128, scan=scan)
    params = jax.jit(module.init)(KEY, TOKENS)["params"]
    for path, leaf in tree.selected(params, "**/kernel").items():
        added = path.split("/")[-2] in ("out", "mlp_out")
        np.testing.assert_allclose(leaf.std(), 0.01 if added else 0.02, rtol=0.03, err_msg=path)


def test_what_is_added_to_the_state_may_begin_at_zero():
    module = nets.Decoder(11, 7, width=6, depth=1, heads=2, mlp_width=5, residual_init=nets.initializers.zeros)
    params = jax.jit(module.init)(KEY, TOKENS)["params"]
    for path, leaf in tree.selected(params, "**/kernel").items():
        assert leaf.any() == (path.split("/")[-2] not in ("out", "mlp_out")), path


@pytest.mark.parametrize("name", SMALL)
def test_the_initialiser_is_every_kernels(name):
    seen = []

    def zeros(key, shape, dtype):
        seen.append(shape)
        return jnp.zeros(shape, dtype)

    variables = jax.eval_shape(SMALL[name].clone(kernel_init=zeros).init, KEY, TOKENS)
    assert sorted(seen) == sorted(leaf.shape for leaf in tree.selected(variables, "**/kernel").values())


def test_weights_are_stored_in_few_bits():
    model, variables, _ = made("llama")
    stored = jax.jit(compress.quantize)(variables)
    assert len(tree.selected(stored, "**/kernel")) == 7 * 2 + 1
    wanted = jax.jit(lambda v: model.predict(compress.decompress(v), TOKENS))(stored)
    np.testing.assert_allclose(jax.jit(compress.lift(model.predict))(stored, TOKENS), wanted, rtol=1e-4, atol=1e-4)


WRONG = {
    "width": ({"heads": 4}, "width=6 is not shared evenly by heads=4"),
    "kv": ({"kv_heads": 4}, "heads=2 are not shared evenly by kv_heads=4"),
    "odd": ({"rotary": 10.0}, "rotary turns pairs of features: the length of a head must be even; got 3"),
    "positions": ({"positions": 6}, r"tokens of shape \(2, 7\) are longer than positions=6; cut them, or take more"),
    "own": ({"kv_heads": (1, 2, 1)}, r"kv_heads must be one number, or 2 for depth=2; got \(1, 2, 1\)"),
    "unlike": ({"kv_heads": (1, 2), "scan": True}, "scan=True repeats one block, and kv_heads differ between layers"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_fields_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(SMALL["gpt"].clone(**fields).init, KEY, TOKENS)
