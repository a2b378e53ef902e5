"""The classical networks: published counts, numpy's forward pass, training, types, bad fields."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import nets, tracing, tree

KEY = jax.random.key(0)
IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


def counted(module, *example):
    """Parameters, and multiplications of one call, from shapes alone."""
    model = nets.from_linen(module)
    variables = jax.eval_shape(model.init, KEY, *example)
    return tree.size(variables["params"]), tracing.count(model.predict, variables, *example).macs


PUBLISHED = {
    # Torchvision's documentation of each: `num_params`, and `GFLOPS`, which are multiplications of convolutions and dense layers.
    "resnet_18": (nets.ImageNetResNet(depth=18), 11_689_512, 1.814),
    "resnet_34": (nets.ImageNetResNet(depth=34), 21_797_672, 3.664),
    "resnet_50": (nets.ImageNetResNet(depth=50), 25_557_032, 4.089),
    "vgg_16": (nets.VGG(), 138_357_544, 15.470),
    "densenet_121": (nets.DenseNet(), 7_978_856, 2.834),
    "mobilenet_v2": (nets.MobileNetV2(), 3_504_872, 0.301),
    "googlenet": (nets.Inception(), 6_624_904, 1.498),
}


@pytest.mark.parametrize(("module", "parameters", "billions"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_counts(module, parameters, billions):
    found, macs = counted(module, IMAGE)
    assert found == parameters
    assert round(macs / 1e9, 3) == billions


def test_resnet_18_whole_and_with_half_of_its_channels():
    """Torch-Pruning's figures for both, without what it adds for BatchNorm, ReLU, pooling and the last bias."""
    half = nets.ImageNetResNet(widths=[[(width, width)] * 2 for width in (32, 64, 128, 256)], stem=32)
    assert counted(nets.ImageNetResNet(), IMAGE) == (11_689_512, 1_814_073_344)
    assert counted(half, IMAGE) == (3_055_880, 483_149_824)


def test_inception_with_the_kernels_of_the_paper():
    """The paper's 5x5 in place of 3x3 costs 16 products more in each of nine blocks: 16 to 48 channels wide, to 32 to 128."""
    widths = [block for stage in nets.Inception().widths for block in stage]
    more = sum(16 * inside * out for _, _, _, inside, out, _ in widths)
    assert tree.size(jax.eval_shape(nets.Inception(kernel=5).init, KEY, IMAGE)["params"]) == 6_624_904 + more


DEEPER = {
    "resnet_152": (nets.ImageNetResNet(depth=152), 60_192_808),
    "vgg_16_bn": (nets.VGG(batch_norm=True), 138_365_992),
    "densenet_169": (nets.DenseNet(widths=[[(128, 32)] * layers for layers in (6, 12, 32, 32)]), 14_149_480),
    # As timm and pytorchcv count them.
    "se_resnet_18": (nets.ImageNetResNet(depth=18, squeeze_excitation=16), 11_778_592),
    "se_resnet_50": (nets.ImageNetResNet(depth=50, squeeze_excitation=16), 28_088_024),
    "se_resnet_101": (nets.ImageNetResNet(depth=101, squeeze_excitation=16), 49_326_872),
    # As timm counts them.
    "mixer_b_16": (nets.Mixer(classes=1000, scan=True), 59_880_472),
    "mixer_b_32": (nets.Mixer(32, classes=1000, scan=True), 60_293_428),
    "mixer_l_16": (nets.Mixer(16, 1024, 24, 512, 4096, classes=1000, scan=True), 208_196_168),
}


# Each of these is a network of another row, with more or fewer of its blocks.
AGAIN = (
    "resnet_152",
    "densenet_169",
    "se_resnet_50",
    "se_resnet_101",
    "mixer_b_32",
    "mixer_l_16",
    "gpt2_medium",
    "gpt2_large",
)


def rows(table):
    return [pytest.param(*row, id=name, marks=pytest.mark.slow if name in AGAIN else ()) for name, row in table.items()]


@pytest.mark.parametrize(("module", "parameters"), rows(DEEPER))
def test_published_counts_of_deeper_ones(module, parameters):
    assert tree.size(jax.eval_shape(module.init, KEY, IMAGE)["params"]) == parameters


def test_published_counts_of_bert():
    """The parameters of the released BERT-base, uncased; 22.5 GFLOPs at 128 tokens (Jiao et al., "TinyBERT", 2020, table 1)."""
    parameters, macs = counted(nets.BERT(), jax.ShapeDtypeStruct((1, 128), jnp.int32))
    assert parameters == 109_482_240
    by_hand = 12 * (128 * (4 * 768 * 768 + 2 * 768 * 3072) + 2 * 128 * 128 * 768) + 768 * 768
    assert macs == by_hand
    assert abs(2 * macs / 22.5e9 - 1) < 0.01


def _llama(*sizes, **fields):
    names = ("vocabulary", "width", "depth", "heads", "kv_heads", "mlp_width")
    kind = {"gated": True, "fused": False, "rotary": 10_000.0, "tied": False, "use_bias": False, "dropout": 0.0, "scan": True}
    return nets.Decoder(**dict(zip(names, sizes, strict=True)), **kind, norm=nn.RMSNorm, activation=nn.silu)


LANGUAGE = {
    # OpenAI's weights as Hugging Face's GPT2LMHeadModel counts them.
    "gpt2": (nets.Decoder(scan=True), 124_439_808),
    "gpt2_medium": (nets.Decoder(width=1024, depth=24, heads=16, mlp_width=4096, scan=True), 354_823_168),
    "gpt2_large": (nets.Decoder(width=1280, depth=36, heads=20, mlp_width=5120, scan=True), 774_030_080),
    "gpt2_xl": (nets.Decoder(width=1600, depth=48, heads=25, mlp_width=6400, scan=True), 1_557_611_200),
    # As their safetensors count them.
    "tinyllama": (_llama(32_000, 2048, 22, 32, 4, 5632), 1_100_048_384),
    "llama_7b": (_llama(32_000, 4096, 32, 32, 32, 11_008), 6_738_415_616),
}


@pytest.mark.parametrize(("module", "parameters"), rows(LANGUAGE))
def test_published_counts_of_language_models(module, parameters):
    assert tree.size(jax.eval_shape(module.init, KEY, jnp.ones((1, 8), int))) == parameters


@pytest.mark.parametrize("scan", [False, True])
def test_multiplications_of_gpt_2(scan):
    """Twelve squares of the width a block and token, what attention takes of all 128, and the tied read-out."""
    parameters, macs = counted(nets.Decoder(scan=scan), jax.ShapeDtypeStruct((1, 128), jnp.int32))
    assert parameters == 124_439_808
    assert macs == 12 * (128 * 12 * 768 * 768 + 2 * 128 * 128 * 768) + 128 * 768 * 50_257


def test_multiplications_of_a_mixer():
    parameters, macs = counted(nets.Mixer(classes=1000, scan=True, remat=True), IMAGE)
    assert parameters == 59_880_472
    assert macs == 196 * 768 * 768 + 12 * 2 * 196 * 768 * (384 + 3072) + 768 * 1000


def test_published_counts_of_u_net():
    """31.0 million: the paper's levels from one channel to two classes. The multiplications are by hand, at 64 x 64."""
    parameters, macs = counted(nets.UNet(), jax.ShapeDtypeStruct((1, 64, 64, 1), jnp.float32))
    assert parameters == 31_030_658
    down = [9 * side**2 * (inside * out + out * out) for side, inside, out in _LEVELS]
    # Joined with what was seen, a map is twice as wide as it comes out; the transposed convolutions take the map below.
    up = [side**2 * (9 * (2 * out * out + out * out) + 2 * out * out) for side, _, out in _LEVELS[:-1]]
    assert macs == sum(down) + sum(up) + 64 * 64 * 64 * 2


_LEVELS = ((64, 1, 64), (32, 64, 128), (16, 128, 256), (8, 256, 512), (4, 512, 1024))


SMALL = {
    "basic": nets.ImageNetResNet(widths=[[(3, 4)], [(5, 6), (2, 6)]], stem=4, classes=3, dropout=0.5),
    "bottleneck": nets.ImageNetResNet(widths=[[(2, 3, 4)], [(3, 2, 6), (2, 5, 6)]], stem=4, classes=3, dropout=0.5),
    "vgg": nets.VGG(widths=((3,), (4, 2)), features=(8, 5), classes=3),
    "vgg_bn": nets.VGG(widths=((3,), (4, 2)), features=(8,), classes=3, batch_norm=True),
    "densenet": nets.DenseNet(widths=(((4, 2), (3, 3)), ((2, 2),)), stem=4, classes=3, dropout=0.5),
    "mobilenet": nets.MobileNetV2(widths=(((3,),), ((6, 4), (5, 4))), strides=(1, 2), stem=4, features=7, classes=3),
    "bert": nets.BERT(vocabulary=11, positions=6, width=6, depth=2, heads=2, mlp_width=5),
    "squeeze": nets.ImageNetResNet(widths=[[(4, 4)], [(2, 3, 6)]], stem=4, squeeze_excitation=2, classes=3, dropout=0.5),
    "inception": nets.Inception(
        (((2, 3, 4, 2, 3, 2),), ((3, 2, 2, 2, 4, 1),)), (3, 2), stem=(3, 4, 5), kernel=5, classes=3, dropout=0.5
    ),
    "unet": nets.UNet(((3, 4), (5,), (6, 4)), ((2, 3), (4, 5, 3)), classes=3),
    "unet_norm": nets.UNet(((3,), (4,)), classes=3, norm=nn.BatchNorm, dropout=0.5),
    "unet_groups": nets.UNet(((4,), (6,)), classes=3, norm=functools.partial(nn.GroupNorm, num_groups=2)),
    "mixer": nets.Mixer(2, 5, 2, patch_width=(4, 3), mlp_width=(7, 6), classes=3, dropout=0.5),
}

KINDS = [name for name in SMALL if name not in ("bottleneck", "vgg", "unet", "unet_groups")]
SHAPES = {"inception": (2, 27, 34, 3), "unet": (2, 8, 12, 2), "unet_norm": (2, 4, 6, 2), "unet_groups": (2, 4, 6, 2)}
SHAPES["mixer"] = (2, 4, 6, 2)


def inputs(name):
    draw = np.random.default_rng(1)
    if name == "bert":
        return (jax.device_put(draw.integers(0, 11, (2, 5))), jax.device_put(draw.integers(0, 2, (2, 5))), jnp.arange(5)[None] < 4)
    # Sides that do not halve evenly: padding on the wrong side, or a rest of a map kept, shows.
    return (jax.device_put(np.asarray(draw.standard_normal(SHAPES.get(name, (2, 11, 14, 3))), np.float32)),)


@functools.cache
def made(name):
    """The model, and its variables with all of them drawn at random: zeros and ones hide faults."""
    model = nets.from_linen(SMALL[name])
    shapes = jax.eval_shape(model.init, KEY, *inputs(name))
    draw = np.random.default_rng(0)

    def drawn(path, leaf):
        values = 0.5 * draw.standard_normal(leaf.shape)
        return jnp.asarray(np.exp(values) if "'var'" in jax.tree_util.keystr(path) else values, leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(drawn, shapes)


class Layers:
    """The layers of one scope in numpy, on one image `[H, W, C]` or on rows `[N, width]`, each by the name of its parameters."""

    def __init__(self, params, state):
        self.params, self.state = params, state

    @classmethod
    def of(cls, variables):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        return cls(wide["params"], wide.get("batch_stats", {}))

    def inside(self, name):
        return Layers(self.params[name], self.state.get(name, {}))

    def conv(self, name, x, stride=1):
        layer = self.params[name]
        kernel = layer["kernel"]
        side, _, per, width = kernel.shape
        each = width * per // x.shape[-1]
        x = np.pad(x, ((side // 2, side // 2), (side // 2, side // 2), (0, 0)))
        out = np.zeros([*((n - side) // stride + 1 for n in x.shape[:2]), width])
        for r, c, k in np.ndindex(*out.shape):
            group = slice(k // each * per, k // each * per + per)
            window = x[r * stride : r * stride + side, c * stride : c * stride + side, group]
            out[r, c, k] = (window * kernel[..., k]).sum()
        return out + layer.get("bias", 0.0)

    def norm(self, name, x, epsilon=1e-5):
        layer, state = self.params[name], self.state[name]
        return (x - state["mean"]) / np.sqrt(state["var"] + epsilon) * layer["scale"] + layer["bias"]

    def layer_norm(self, name, x, epsilon=1e-12):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * self.params[name]["scale"] + self.params[name]["bias"]

    def dense(self, name, x):
        return x @ self.params[name]["kernel"] + self.params[name]["bias"]


def pooled(x, side, stride, pad, how):
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)), constant_values=-np.inf)
    shape = [(n - side) // stride + 1 for n in x.shape[:2]]
    windows = [[how(x[r * stride :][:side, c * stride :][:, :side], (0, 1)) for c in range(shape[1])] for r in range(shape[0])]
    return np.asarray(windows)


def pooled_to_the_end(x, side):
    """As `pooled` with stride 2, without padding; the last window takes what is left of the map."""
    shape = [math.ceil((n - side) / 2) + 1 for n in x.shape[:2]]
    return np.asarray([[x[2 * r :][:side, 2 * c :][:, :side].max((0, 1)) for c in range(shape[1])] for r in range(shape[0])])


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def resnet(module, net, x):
    x = pooled(relu(net.norm("stem_norm", net.conv("stem", x, 2))), 3, 2, 1, np.max)
    for s, stage in enumerate(module.widths):
        for b, widths in enumerate(stage):
            block, y = net.inside(f"stage_{s}_block_{b}"), x
            stride = 2 if s > 0 and b == 0 else 1
            if len(widths) == 2:
                y = relu(block.norm("norm_0", block.conv("conv_0", y, stride)))
                y = block.norm("norm_1", block.conv("conv_1", y))
            else:
                y = relu(block.norm("norm_0", block.conv("conv_0", y)))
                y = relu(block.norm("norm_1", block.conv("conv_1", y, stride)))
                y = block.norm("norm_2", block.conv("conv_2", y))
            if module.squeeze_excitation:
                means = block.dense("excite", relu(block.dense("squeeze", y.mean((0, 1)))))
                y = y / (1 + np.exp(-means))
            if "shortcut" in block.params:
                x = block.norm("shortcut_norm", block.conv("shortcut", x, stride))
            x = relu(x + y)
    return net.dense("head", x.mean((0, 1)))


def vgg(module, net, x):
    for s, stage in enumerate(module.widths):
        for k in range(len(stage)):
            x = net.conv(f"stage_{s}_conv_{k}", x)
            x = relu(net.norm(f"stage_{s}_norm_{k}", x) if module.batch_norm else x)
        x = pooled(x, 2, 2, 0, np.max)
    x = x.reshape(-1)
    for k in range(len(module.features)):
        x = relu(net.dense(f"dense_{k}", x))
    return net.dense("head", x)


def densenet(module, net, x):
    x = pooled(relu(net.norm("stem_norm", net.conv("stem", x, 2))), 3, 2, 1, np.max)
    for b, block in enumerate(module.widths):
        if b:
            x = net.conv(f"transition_{b - 1}", relu(net.norm(f"transition_{b - 1}_norm", x)))
            x = pooled(x, 2, 2, 0, np.mean)
        for k in range(len(block)):
            layer = net.inside(f"block_{b}_layer_{k}")
            y = layer.conv("conv_0", relu(layer.norm("norm_0", x)))
            x = np.concatenate([x, layer.conv("conv_1", relu(layer.norm("norm_1", y)))], -1)
    return net.dense("head", relu(net.norm("norm", x)).mean((0, 1)))


def mobilenet(module, net, x):
    def relu6(x):
        return np.clip(x, 0, 6)

    x = relu6(net.norm("stem_norm", net.conv("stem", x, 2)))
    for s, stage in enumerate(module.widths):
        for b, widths in enumerate(stage):
            block, y = net.inside(f"stage_{s}_block_{b}"), x
            if len(widths) == 2:
                y = relu6(block.norm("expand_norm", block.conv("expand", y)))
            y = relu6(block.norm("depthwise_norm", block.conv("depthwise", y, 1 if b else module.strides[s])))
            y = block.norm("project_norm", block.conv("project", y))
            x = x + y if b else y
    x = relu6(net.norm("features_norm", net.conv("features", x)))
    return net.dense("head", x.mean((0, 1)))


def bert(module, net, tokens, segments, mask):
    z = sum(net.params[name]["embedding"][at] for name, at in (("tokens", tokens), ("segments", segments)))
    z = net.layer_norm("norm", z + net.params["positions"]["embedding"][: len(tokens)])
    size = module.width // module.heads
    for k in range(module.depth):
        block = net.inside(f"block_{k}")
        q, k_, v = (block.dense(name, z) for name in ("query", "key", "value"))
        heads = []
        for h in range(module.heads):
            part = slice(h * size, (h + 1) * size)
            scores = np.exp(q[:, part] @ k_[mask][:, part].T / math.sqrt(size))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[mask][:, part])
        z = block.layer_norm("norm_attention", z + block.dense("out", np.concatenate(heads, 1)))
        hidden = block.dense("hidden", z)
        z = block.layer_norm("norm_mlp", z + block.dense("mlp_out", gelu(hidden)))
    return z, np.tanh(net.dense("pooler", z[0]))


def inception(module, net, x):
    def unit(net, name, x, stride=1):
        inner = net.inside(name)
        return relu(inner.norm("norm", inner.conv("conv", x, stride), 1e-3))

    x = pooled_to_the_end(unit(net, "stem_0", x, 2), 3)
    x = unit(net, "stem_2", unit(net, "stem_1", x))
    for s, stage in enumerate(module.widths):
        x = pooled_to_the_end(x, module.pools[s])
        for b in range(len(stage)):
            block = net.inside(f"stage_{s}_block_{b}")
            branches = [unit(block, "branch_0", x)]
            branches += [unit(block, f"branch_{k}", unit(block, f"branch_{k}_reduce", x)) for k in (1, 2)]
            x = np.concatenate([*branches, unit(block, "branch_3", pooled(x, 3, 1, 1, np.max))], -1)
    return net.dense("head", x.mean((0, 1)))


def unet(module, net, x):
    def level(x, name):
        for k in range(sum(key.startswith(f"{name}_conv") for key in net.params)):
            x = net.conv(f"{name}_conv_{k}", x)
            if module.norm is nn.BatchNorm:
                x = net.norm(f"{name}_norm_{k}", x)
            elif module.norm is not None:
                groups = [_standard(part) for part in np.split(x, 2, axis=-1)]
                layer = net.params[f"{name}_norm_{k}"]
                x = np.concatenate(groups, -1) * layer["scale"] + layer["bias"]
            x = relu(x)
        return x

    seen = []
    for k in range(len(module.widths) - 1):
        seen.append(level(x, f"down_{k}"))
        x = pooled(seen[-1], 2, 2, 0, np.max)
    x = level(x, "bottom")
    for k, across in enumerate(reversed(seen)):
        layer, y = net.params[f"up_{k}"], np.zeros((*across.shape[:2], net.params[f"up_{k}"]["bias"].size))
        for r, c in np.ndindex(2, 2):
            y[r::2, c::2] = x @ layer["kernel"][1 - r, 1 - c] + layer["bias"]
        x = level(np.concatenate([across, y], -1), f"up_{k}")
    return net.conv("head", x)


def _standard(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6)


def mixer(module, net, x):
    side, parts = module.patch, []
    for r, c in np.ndindex(*(n // side for n in x.shape[:2])):
        parts.append(x[r * side :][:side, c * side :][:, :side].reshape(-1))
    x = net.dense("patches", np.stack(parts))
    for k in range(module.depth):
        block = net.inside(f"block_{k}")
        x = x + block.dense("patches_out", gelu(block.dense("patches_hidden", block.layer_norm("norm_patches", x, 1e-6).T))).T
        x = x + block.dense("mlp_out", gelu(block.dense("mlp_hidden", block.layer_norm("norm_mlp", x, 1e-6))))
    return net.dense("head", net.layer_norm("norm", x, 1e-6).mean(0))


FORWARD = {"basic": resnet, "bottleneck": resnet, "vgg": vgg, "vgg_bn": vgg, "densenet": densenet, "mobilenet": mobilenet}
FORWARD |= {"squeeze": resnet, "inception": inception, "unet": unet, "unet_norm": unet, "unet_groups": unet, "mixer": mixer}


@pytest.mark.parametrize("name", FORWARD)
def test_as_numpy_computes_it(name):
    model, variables = made(name)
    (x,) = inputs(name)
    net = Layers.of(variables)
    wanted = [FORWARD[name](SMALL[name], net, image) for image in np.asarray(x, np.float64)]
    found = jax.jit(model.predict)(variables, x)
    # A label, or a map of them.
    assert found.shape == ((2, *x.shape[1:3], 3) if name.startswith("unet") else (2, 3))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_bert_as_numpy_computes_it():
    model, variables = made("bert")
    tokens, segments, mask = inputs("bert")
    net = Layers.of(variables)
    states, first = jax.jit(model.predict)(variables, tokens, segments, jnp.broadcast_to(mask, tokens.shape))
    for b in range(2):
        wanted, wanted_first = bert(SMALL["bert"], net, *map(np.asarray, (tokens[b], segments[b], mask[0])))
        np.testing.assert_allclose(states[b], wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(first[b], wanted_first, rtol=1e-4, atol=1e-4)


def test_bert_without_segments_and_where_all_is_padding():
    model, variables = made("bert")
    tokens, segments, _ = inputs("bert")
    predict = jax.jit(model.predict)
    plain = predict(variables, tokens)
    same = predict(variables, tokens, 0 * segments, jnp.ones((2, 5), bool))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, same)
    nothing = predict(variables, tokens, segments, jnp.zeros((2, 5), bool))
    assert all(np.isfinite(leaf).all() for leaf in nothing)


# What trains and is typed like another of these.
ALIKE = [
    pytest.param(name, marks=pytest.mark.slow if name in ("squeeze", "vgg_bn", "densenet", "mobilenet") else ()) for name in KINDS
]


@pytest.mark.parametrize("name", ALIKE)
def test_training_drops_and_moves_every_statistic(name):
    model, variables = made(name)
    train = jax.jit(jax.vmap(lambda key: model.apply(variables, *inputs(name), train=True, key=key)))
    outputs, state = train(jax.random.split(KEY, 2))
    outputs = jax.tree.leaves(outputs)[0]
    assert (outputs[0] != outputs[1]).any()
    assert np.isfinite(outputs).all()
    old = variables.get("batch_stats", {})
    assert bool(old) == (name not in ("bert", "mixer"))
    moved = jax.tree.map(lambda a, b: bool((a[0] != b).all()), state.get("batch_stats", {}), old)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", ALIKE)
def test_types_of_parameters_and_of_computation(name):
    half = nets.from_linen(SMALL[name].clone(dtype=jnp.bfloat16, param_dtype=jnp.float16))
    variables = jax.eval_shape(half.init, KEY, *inputs(name))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(jnp.float16)}
    outputs = jax.eval_shape(half.predict, variables, *inputs(name))
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.bfloat16)}
    with jax.enable_x64(True):
        double = nets.from_linen(SMALL[name].clone(param_dtype=jnp.float64))
        given = [x.astype(jnp.float64) if x.dtype == jnp.float32 else x for x in inputs(name)]
        variables = jax.eval_shape(double.init, jax.random.key(0), *given)
        outputs = jax.eval_shape(double.predict, variables, *given)
        assert {leaf.dtype for leaf in jax.tree.leaves((variables["params"], outputs))} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize("name", KINDS)
def test_the_initialiser_is_every_kernels(name):
    seen = []

    def zeros(key, shape, dtype):
        seen.append(shape)
        return jnp.zeros(shape, dtype)

    variables = jax.eval_shape(SMALL[name].clone(kernel_init=zeros).init, KEY, *inputs(name))
    assert sorted(seen) == sorted(leaf.shape for leaf in tree.selected(variables, "**/kernel").values())


WRONG = {
    "depth": (nets.ImageNetResNet(depth=20), "depth must be one of 18, 34, 50, 101, 152, or give widths; got 20"),
    "block": (nets.ImageNetResNet(widths=[[(4,)]]), r"widths of stage_0_block_0 must be two .* or three .*; got \(4,\)"),
    "basic": (nets.ImageNetResNet(widths=[[(4, 4), (4, 5)]]), "stage_0_block_1 takes 4 channels and puts out 5"),
    "vgg": (nets.VGG(), "images of 16 x 18 are too small for 5 stages"),
    "densenet": (nets.DenseNet(widths=[[(1, 1)]] * 4), "images of 16 x 18 are too small for 4 blocks"),
    "transitions": (nets.DenseNet(transitions=(2,)), r"transitions must be 3, .*; got \(2,\)"),
    "strides": (nets.MobileNetV2(strides=(1, 2)), r"strides must be 7, .*; got \(1, 2\)"),
    "inverted": (nets.MobileNetV2(widths=[[(1, 2, 3)]], strides=[1]), r"widths of stage_0_block_0 must be .*; got \(1, 2, 3\)"),
    "mobilenet": (nets.MobileNetV2(widths=[[(8,), (6, 9)]], strides=[1]), "stage_0_block_1 takes 8 channels and puts out 9"),
    "squeeze": (nets.ImageNetResNet(squeeze_excitation=65), "squeeze_excitation=65 leaves no unit of the 64 channels of stage_0"),
    "pools": (nets.Inception(pools=(3, 2)), r"pools must be 3, one before each stage of widths; got \(3, 2\)"),
    "stem": (nets.Inception(stem=(3, 4)), r"stem must be three widths, and kernel odd; got \(3, 4\) and 3"),
    "kernel": (nets.Inception(kernel=2), r"kernel odd; got \(64, 64, 192\) and 2"),
    "branches": (nets.Inception([[(1, 2, 3)]], [2]), r"widths of stage_0_block_0 must be six, .*; got \(1, 2, 3\)"),
    "halved": (nets.UNet(), r"images of 16 x 18 cannot be halved 4 times; pad them to 16n"),
    "ups": (nets.UNet(((4,), (4,)), ups=()), "ups must be 1, one for each level of widths but the bottom; got 0"),
    "patch": (nets.Mixer(), "patch=16 does not divide the sides of images of 16 x 18"),
    "layers": (nets.Mixer(2, depth=2, mlp_width=(3,)), r"mlp_width must be one number, or 2 for depth=2; got \(3,\)"),
    "unlike": (nets.Mixer(2, depth=2, mlp_width=(3, 4), scan=True), "scan=True repeats one block, and mlp_width differ"),
    "heads": (nets.BERT(heads=5), "width=768 is not shared evenly by heads=5"),
    "positions": (nets.BERT(positions=4), r"tokens of shape \(1, 6\) are longer than positions=4"),
}


@pytest.mark.parametrize(("module", "message"), WRONG.values(), ids=WRONG)
def test_fields_that_do_not_fit_are_named(module, message):
    x = jnp.ones((1, 6), int) if isinstance(module, nets.BERT) else jnp.ones((1, 16, 18, 3))
    with pytest.raises(ValueError, match=message) as caught:
        jax.eval_shape(module.init, KEY, x)
    assert "\n" not in str(caught.value)
