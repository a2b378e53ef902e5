"""The networks: parameter counts by hand, shapes, dropout, types, initialisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import nets, tree

KEY = jax.random.key(0)


def count(module, *shape):
    return tree.size(jax.eval_shape(module.init, KEY, jnp.ones(shape))["params"])


TABLE = {
    "mlp": (nets.MLP(features=(32,)), (2, 8, 8), 64 * 32 + 32 + 32 * 10 + 10),
    "no_hidden": (nets.MLP(features=()), (2, 5), 5 * 10 + 10),
    "lenet": (nets.LeNet(), (2, 28, 28, 1), 61_706),
    "lenet_32": (nets.LeNet(padding=("VALID", "VALID")), (2, 32, 32, 1), 61_706),
    "lenet_digits": (nets.LeNet(), (2, 8, 8), 156 + 2_416 + 64 * 120 + 120 + 120 * 84 + 84 + 850),
    "lenet_wide": (nets.LeNet(channels=(2, 3), features=(4,)), (2, 28, 28, 1), 52 + 153 + 75 * 4 + 4 + 50),
    "resnet_20": (nets.ResNet(depth=20), (2, 32, 32, 3), 269_722),
    # Option B adds two 1x1 convolutions and the scales and biases of their BatchNorm.
    "resnet_20_b": (nets.ResNet(depth=20, projection=True), (2, 32, 32, 3), 269_722 + 16 * 32 + 64 + 32 * 64 + 128),
    # Two blocks a stage more: per stage 4 w^2 9 + 4 * 2 w.
    "resnet_32": (nets.ResNet(depth=32), (2, 32, 32, 3), 269_722 + 36 * (16**2 + 32**2 + 64**2) + 8 * 112),
    "resnet_two_stages": (nets.ResNet(depth=6, widths=(2, 3), classes=4), (2, 8, 8, 1), 18 + 4 + 80 + 54 + 81 + 12 + 16),
}


@pytest.mark.parametrize(("module", "shape", "parameters"), TABLE.values(), ids=TABLE)
def test_parameter_counts(module, shape, parameters):
    assert count(module, *shape) == parameters


@pytest.mark.parametrize(("module", "shape", "_"), TABLE.values(), ids=TABLE)
def test_logits_have_one_column_a_class(module, shape, _):
    model = nets.from_linen(module)
    variables = jax.eval_shape(model.init, KEY, jnp.ones(shape))
    assert jax.eval_shape(model.predict, variables, jnp.ones(shape)).shape == (2, module.classes)


SMALL = {
    "mlp": (nets.MLP(features=(8,), dropout=0.5), (2, 4)),
    "lenet": (nets.LeNet(channels=(2, 2), features=(8,), dropout=0.5), (2, 8, 8, 1)),
    "resnet": (nets.ResNet(depth=4, widths=(8,), dropout=0.5), (2, 4, 4, 1)),
}


@pytest.mark.parametrize(("module", "shape"), SMALL.values(), ids=SMALL)
def test_dropout_acts_in_training_only(module, shape):
    model = nets.from_linen(module)
    x = jax.random.normal(KEY, shape)
    variables = jax.jit(model.init)(KEY, x)
    outputs = jax.jit(jax.vmap(lambda key: model.apply(variables, x, train=True, key=key)[0]))(jax.random.split(KEY, 2))
    assert (outputs[0] != outputs[1]).any()


@pytest.mark.parametrize(("module", "shape"), SMALL.values(), ids=SMALL)
def test_types_of_parameters_and_of_computation(module, shape):
    half = module.clone(dtype=jnp.bfloat16, param_dtype=jnp.float16)
    model = nets.from_linen(half)
    variables = jax.eval_shape(model.init, KEY, jnp.ones(shape))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(jnp.float16)}
    assert jax.eval_shape(model.predict, variables, jnp.ones(shape)).dtype == jnp.bfloat16


def test_a_depth_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"6n \+ 2.*got 21"):
        count(nets.ResNet(depth=21), 1, 8, 8, 3)
    with pytest.raises(ValueError, match="projection=True"):
        count(nets.ResNet(depth=6, widths=(4, 2)), 1, 8, 8, 3)


VARIANCES = {
    "xavier_uniform": 2 / 500,
    "xavier_normal": 2 / 500,
    "he_uniform": 2 / 300,
    "he_normal": 2 / 300,
    "lecun_uniform": 1 / 300,
    "lecun_normal": 1 / 300,
}


@pytest.mark.parametrize(("name", "variance"), VARIANCES.items())
def test_variance_of_an_initialiser(name, variance):
    values = getattr(nets.initializers, name)(KEY, (300, 200))
    np.testing.assert_allclose(values.var(), variance, rtol=0.03)
    if name.endswith("uniform"):
        assert np.abs(values).max() <= np.sqrt(3 * variance)


def test_orthogonal_columns():
    values = nets.initializers.orthogonal(KEY, (6, 3))
    np.testing.assert_allclose(values.T @ values, np.eye(3), atol=1e-5)
    assert not nets.initializers.zeros(KEY, (2,)).any()


def test_the_initialiser_is_the_kernels_only():
    params = nets.MLP(features=(4,), kernel_init=nets.initializers.zeros).init(KEY, jnp.ones((1, 3)))["params"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(params))
