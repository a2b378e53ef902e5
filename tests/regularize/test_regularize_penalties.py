"""Every penalty is one row: its value and gradient by numpy on each matrix view, and what must hold for all."""

from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quax
from flax import nnx

from jaxopt_lab import regularize

RNG = np.random.default_rng(0)
PARAMS = {
    "conv": {"bias": RNG.normal(size=4), "kernel": RNG.normal(size=(2, 2, 3, 4))},
    "dense": {"bias": RNG.normal(size=6), "kernel": RNG.normal(size=(3, 6))},
}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)


class Row(NamedTuple):
    penalty: object
    value: object  # of one [inputs, outputs] numpy matrix in float64
    gradient: object
    matrices_only: bool


def _svd(w):
    return np.linalg.svd(w, full_matrices=False)


ROWS = {
    "l1": Row(regularize.l1, lambda w: np.abs(w).sum(), np.sign, False),
    "l2": Row(regularize.l2, lambda w: (w**2).sum() / 2, lambda w: w, False),
    "elastic_net": Row(
        partial(regularize.elastic_net, l1=0.3, l2=0.7),
        lambda w: 0.3 * np.abs(w).sum() + 0.35 * (w**2).sum(),
        lambda w: 0.3 * np.sign(w) + 0.7 * w,
        False,
    ),
    "group_lasso": Row(
        regularize.group_lasso,
        lambda w: np.sqrt(len(w)) * sum(np.sqrt((column**2).sum()) for column in w.T),
        lambda w: np.sqrt(len(w)) * w / np.linalg.norm(w, axis=0),
        True,
    ),
    "orthogonal": Row(
        regularize.orthogonal,
        lambda w: ((w.T @ w - np.eye(w.shape[1])) ** 2).sum(),
        lambda w: 4 * w @ (w.T @ w - np.eye(w.shape[1])),
        True,
    ),
    "spectral": Row(regularize.spectral, lambda w: _svd(w)[1][0], lambda w: np.outer(_svd(w)[0][:, 0], _svd(w)[2][0]), True),
    "nuclear": Row(regularize.nuclear, lambda w: _svd(w)[1].sum(), lambda w: _svd(w)[0] @ _svd(w)[2], True),
}


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    return ROWS[request.param]


def test_value_and_gradient_are_those_of_numpy(row):
    with jax.numpy_dtype_promotion("strict"):
        value, gradient = jax.jit(jax.value_and_grad(row.penalty))(PARAMS)
    assert (value.dtype, value.shape) == (jnp.float32, ())
    expected = 0.0
    for name, layer in PARAMS.items():
        for kind, w in layer.items():
            w64 = np.asarray(w, np.float64)
            if kind == "bias" and row.matrices_only:
                np.testing.assert_array_equal(gradient[name][kind], 0.0)
                continue
            matrix = w64.reshape(-1, w64.shape[-1])
            expected += row.value(matrix)
            np.testing.assert_allclose(gradient[name][kind], row.gradient(matrix).reshape(w.shape), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_gradients_are_finite_at_zero_and_at_repeated_singular_values(row):
    corners = jnp.stack([jnp.zeros((3, 3)), jnp.eye(3), jnp.ones((3, 3)).at[:, 0].set(0.0)])
    assert jnp.isfinite(jax.jit(jax.vmap(jax.grad(row.penalty)))(corners)).all()


@pytest.mark.parametrize("name", ["l1", "l2", "elastic_net", "group_lasso", "orthogonal"])
def test_zero_weights_are_not_pushed(name):
    """A subgradient other than 0 would move what is already gone; only the singular vectors of nothing are free."""
    np.testing.assert_array_equal(jax.grad(ROWS[name].penalty)({"kernel": jnp.zeros((3, 4))})["kernel"], 0.0)


def test_it_batches_over_models(row):
    stacked = jax.tree.map(lambda x: np.stack([x, 2 * x]), PARAMS)
    batched = jax.jit(jax.vmap(row.penalty))(stacked)
    penalty = jax.jit(row.penalty)
    for k, factor in enumerate((1, 2)):
        alone = jax.tree.map(lambda x: factor * np.asarray(x), PARAMS)  # noqa: B023
        np.testing.assert_allclose(batched[k], penalty(alone), rtol=1e-5)


def test_sixteen_bit_weights_are_summed_in_float32(row):
    small = {"kernel": jnp.full((64, 64), 0.1, jnp.bfloat16) + jnp.eye(64, dtype=jnp.bfloat16)}
    with jax.numpy_dtype_promotion("strict"):
        value, gradient = jax.jit(jax.value_and_grad(row.penalty))(small)
    assert value.dtype == jnp.float32
    assert gradient["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(value, row.value(np.asarray(small["kernel"], np.float64)), rtol=1e-4)


@flax.struct.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


def test_every_kind_of_tree_counts_alike(row):
    kernel, bias = PARAMS["dense"]["kernel"], PARAMS["dense"]["bias"]
    state = nnx.State({"bias": nnx.Param(bias), "kernel": nnx.Param(kernel)})
    values = [row.penalty(tree) for tree in ({"bias": bias, "kernel": kernel}, (bias, kernel), Layer(kernel, bias), state)]
    assert values == [values[0]] * 4
    assert row.penalty(kernel) == row.penalty({"kernel": kernel})


def test_where_chooses_leaves(row):
    chosen = row.penalty(PARAMS, "dense/kernel")
    assert chosen == row.penalty(PARAMS, where="dense/kernel")
    np.testing.assert_array_equal(chosen, row.penalty({"kernel": PARAMS["dense"]["kernel"]}))
    assert chosen < row.penalty(PARAMS)


class Fake(quax.ArrayValue):
    latent = "w"
    w: jax.Array
    step: jax.Array

    def aval(self):
        return jax.core.ShapedArray(self.w.shape, self.w.dtype)

    def materialise(self):
        return jnp.round(self.w / self.step) * self.step


class Codes(quax.ArrayValue):
    codes: jax.Array

    def aval(self):
        return jax.core.ShapedArray(self.codes.shape, jnp.float32)

    def materialise(self):
        return self.codes.astype(jnp.float32)


def test_a_compressed_leaf_counts_by_its_latent_weight(row):
    w = PARAMS["dense"]["kernel"]
    compressed = {"kernel": Fake(w, jnp.float32(0.5))}
    assert row.penalty(compressed) == row.penalty({"kernel": w})
    slope = jax.jit(jax.grad(row.penalty))
    gradient = slope(compressed)["kernel"]
    np.testing.assert_array_equal(gradient.w, slope({"kernel": w})["kernel"])
    assert gradient.step == 0.0


def test_a_leaf_without_latent_weight_is_refused_by_name(row):
    with pytest.raises(TypeError, match=r"^a/kernel is stored as Codes, which has no latent weight.*$"):
        row.penalty({"a": {"kernel": Codes(jnp.ones((2, 3), jnp.int8))}})


def test_integer_leaves_are_refused_by_name(row):
    with pytest.raises(TypeError, match=r"^ids is int32, and a penalty needs floating weights; leave it out of `where`$"):
        row.penalty({"ids": jnp.ones((2, 3), jnp.int32)})


def test_groups_along_another_axis():
    w = PARAMS["dense"]["kernel"]
    rows = regularize.group_lasso({"kernel": w}, axis=0)
    np.testing.assert_allclose(rows, np.sqrt(6) * np.linalg.norm(w, axis=1).sum(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^kernel: an array of shape \(3, 6\) has no axis 2; choose `axis` or `where` to fit$"):
        regularize.group_lasso({"kernel": w}, axis=2)


@pytest.mark.parametrize("penalty", [regularize.orthogonal, regularize.spectral, regularize.nuclear])
def test_a_vector_is_no_matrix(penalty):
    with pytest.raises(ValueError, match=r"^bias: an array of shape \(6,\) is not a matrix; choose `where` to fit$"):
        penalty(PARAMS["dense"], where="bias")


def test_orthonormal_columns_cost_nothing_and_wide_matrices_their_excess():
    q = jnp.linalg.qr(PARAMS["dense"]["kernel"].T)[0]  # [6, 3]
    np.testing.assert_allclose(regularize.orthogonal(q), 0.0, atol=1e-10)
    np.testing.assert_allclose(regularize.orthogonal(q.T), 3.0, rtol=1e-6)


def test_strengths_of_the_elastic_net_may_be_traced():
    gradient = jax.jit(jax.grad(lambda strength: regularize.elastic_net(PARAMS, l1=strength, l2=0.5)))(0.1)
    np.testing.assert_allclose(gradient, regularize.l1(PARAMS), rtol=1e-6)
