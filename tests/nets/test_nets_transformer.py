"""The vision transformer: the published count, numpy's forward pass, what it is indifferent to, types, bad fields."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import compress, nets, tree

KEY = jax.random.key(0)
SMALL = nets.VisionTransformer(patch=2, width=6, depth=1, heads=2, mlp_width=5, classes=3)


def made(module, *shape):
    """The model, its variables with all of them drawn at random (zeros hide faults), and an input."""
    model = nets.from_linen(module)
    shapes = jax.eval_shape(model.init, KEY, jnp.ones(shape))
    leaves, treedef = jax.tree.flatten(shapes)
    draw = np.random.default_rng(0)
    values = [jax.device_put(np.asarray(0.5 * draw.standard_normal(leaf.shape), leaf.dtype)) for leaf in leaves]
    return model, jax.tree.unflatten(treedef, values), jax.device_put(np.asarray(draw.standard_normal(shape), np.float32))


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        # Torchvision's vit_b_16 and vit_l_16, as they publish them.
        ({"classes": 1000}, 86_567_656),
        ({"classes": 1000, "width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}, 304_326_632),
        # The token and its position are gone.
        ({"classes": 1000, "class_token": False}, 86_567_656 - 2 * 768),
    ],
)
def test_published_counts(fields, parameters):
    shapes = jax.eval_shape(nets.VisionTransformer(**fields).init, KEY, jnp.ones((1, 224, 224, 3)))
    assert tree.size(shapes) == parameters


def norm(x, layer):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * layer["scale"] + layer["bias"]


def dense(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def forward(params, image, module):
    """The logits of one image, in numpy, head by head and patch by patch."""
    side, size = module.patch, module.width // module.heads
    rows, columns = (n // side for n in image.shape[:2])
    patches = [image[r * side : (r + 1) * side, c * side : (c + 1) * side].reshape(-1) for r in range(rows) for c in range(columns)]
    z = np.stack([dense(patch, params["patches"]) for patch in patches])
    if module.class_token:
        z = np.concatenate([params["token"][0], z])
    z = z + params["position"][0]
    for k in range(module.depth):
        block = params[f"block_{k}"]
        y = norm(z, block["norm_attention"])
        q, k_, v = (dense(y, block[name]) for name in ("query", "key", "value"))
        heads = []
        for h in range(module.heads):
            part = slice(h * size, (h + 1) * size)
            scores = np.exp(q[:, part] @ k_[:, part].T / math.sqrt(size))
            heads.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
        z = z + dense(np.concatenate(heads, 1), block["out"])
        hidden = dense(norm(z, block["norm_mlp"]), block["hidden"])
        gelu = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        z = z + dense(gelu, block["mlp_out"])
    z = norm(z, params["norm"])
    return dense(z[0] if module.class_token else z.mean(0), params["head"])


@pytest.mark.parametrize("class_token", [True, False])
def test_as_numpy_computes_it(class_token):
    module = SMALL.clone(class_token=class_token, depth=2)
    model, variables, x = made(module, 2, 4, 6, 2)
    wanted = [forward(jax.tree.map(np.asarray, variables["params"]), image, module) for image in np.asarray(x)]
    found = jax.jit(model.predict)(variables, x)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)
    # Each image by itself, as under vmap.
    alone = jax.jit(jax.vmap(lambda image: model.predict(variables, image[None])[0]))(x)
    np.testing.assert_allclose(alone, found, rtol=2e-4, atol=2e-5)


def test_patches_that_move_with_their_positions_change_nothing():
    model, variables, x = made(SMALL, 1, 4, 4, 1)
    predict = jax.jit(model.predict)
    position = variables["params"]["position"]
    # The two rows of patches change places, and so do their positions behind the token's.
    turned = {"params": {**variables["params"], "position": position[:, np.array([0, 3, 4, 1, 2])]}}
    logits, rolled = predict(variables, x), jnp.roll(x, 2, axis=1)
    np.testing.assert_allclose(predict(turned, rolled), logits, rtol=1e-4, atol=1e-5)
    assert np.abs(predict(variables, rolled) - logits).max() > 1e-3


def test_a_missing_channel_axis_is_one_channel():
    model, variables, x = made(SMALL, 1, 4, 4, 1)
    predict = jax.jit(model.predict)
    np.testing.assert_array_equal(predict(variables, x[..., 0]), predict(variables, x))


def test_dropout_acts_in_training_only():
    model, variables, x = made(SMALL.clone(dropout=0.5), 2, 4, 4, 1)
    train = jax.jit(jax.vmap(lambda key: model.apply(variables, x, train=True, key=key)[0]))
    outputs = train(jax.random.split(KEY, 2))
    assert (outputs[0] != outputs[1]).any()
    assert not np.allclose(outputs[0], jax.jit(model.predict)(variables, x))


def test_types_of_parameters_and_of_computation():
    half = nets.from_linen(SMALL.clone(dtype=jnp.bfloat16, param_dtype=jnp.float16))
    variables = jax.eval_shape(half.init, KEY, jnp.ones((1, 4, 4, 1)))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float16)}
    assert jax.eval_shape(half.predict, variables, jnp.ones((1, 4, 4, 1))).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        double = nets.from_linen(SMALL.clone(param_dtype=jnp.float64))
        x = jnp.ones((1, 4, 4, 1), jnp.float64)
        variables = jax.eval_shape(double.init, jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float64)}
        assert jax.eval_shape(double.predict, variables, x).dtype == jnp.float64


def test_bfloat16_is_near_float32():
    model, variables, x = made(SMALL, 2, 4, 4, 1)
    half = nets.from_linen(SMALL.clone(dtype=jnp.bfloat16))
    wanted = np.asarray(jax.jit(model.predict)(variables, x))
    np.testing.assert_allclose(
        np.asarray(jax.jit(half.predict)(variables, x), np.float32), wanted, atol=0.05 * np.abs(wanted).max()
    )


def test_every_weight_is_a_kernel_that_is_stored_in_few_bits():
    model, variables, x = made(SMALL, 2, 4, 4, 1)
    stored = jax.jit(compress.quantize)(variables)
    kernels = tree.selected(stored, "**/kernel")
    assert len(kernels) == 6 * SMALL.depth + 2
    # One scale for each output of a dense layer: nothing that heads or pixels share.
    assert all(leaf.scale.shape == (1, leaf.shape[1]) for leaf in kernels.values())
    wanted = jax.jit(lambda v: model.predict(compress.decompress(v), x))(stored)
    np.testing.assert_allclose(jax.jit(compress.lift(model.predict))(stored, x), wanted, rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_gradient():
    model, variables, x = made(SMALL, 2, 4, 4, 1)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(model.predict(v, x)))))(variables)
    flat = jax.tree_util.tree_leaves_with_path(grads)
    # A bias of the keys adds the same to all scores of a query, which the softmax takes away again.
    assert all(np.abs(leaf).max() > 1e-5 for path, leaf in flat if "'key'" not in jax.tree_util.keystr(path[:-1]))
    assert all(np.abs(leaf["key"]["kernel"]).max() > 1e-5 for name, leaf in grads["params"].items() if name.startswith("block"))


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"heads": 4}, (1, 4, 4, 1), "width=6 is not shared evenly by heads=4"),
        ({}, (1, 4, 5, 1), "patch=2 does not divide the sides of images of 4 x 5"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(SMALL.clone(**fields).init, KEY, jnp.ones(shape))
