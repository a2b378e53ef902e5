"""Every operator is one row: by hand, by what defines it, and by what must hold for all."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import regularize
from jaxopt_lab.regularize import prox

_X = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
X = jnp.asarray(_X)


class Row(NamedTuple):
    operator: object
    objective: object  # R(z), for the operator of t R
    exact_zeros: int | None = None  # how many entries of X are cut at t = 0.5


ROWS = {
    "soft_threshold": Row(prox.soft_threshold, regularize.l1, int((np.abs(_X) <= 0.5).sum())),
    "hard_threshold": Row(
        lambda x, t: prox.hard_threshold(x, jnp.sqrt(2 * t)), lambda z: (z != 0).sum(), int((np.abs(_X) <= 1).sum())
    ),
    "shrink": Row(prox.shrink, regularize.l2),
    "elastic_net": Row(
        lambda x, t: prox.elastic_net(x, t, 0.8, 0.4),
        partial(regularize.elastic_net, l1=0.8, l2=0.4),
        int((np.abs(_X) <= 0.4).sum()),
    ),
    "group_soft_threshold": Row(prox.group_soft_threshold, lambda z: jnp.linalg.norm(z, axis=0).sum()),
    "group_soft_threshold rows": Row(partial(prox.group_soft_threshold, axis=0), lambda z: jnp.linalg.norm(z, axis=1).sum()),
    "group_lasso": Row(prox.group_lasso, regularize.group_lasso),
    "group_lasso rows": Row(partial(prox.group_lasso, axis=0), partial(regularize.group_lasso, axis=0)),
    "singular_value_threshold": Row(prox.singular_value_threshold, regularize.nuclear),
}


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    return ROWS[request.param]


def test_it_minimises_the_objective_that_defines_it(row):
    t = 0.5

    @jax.jit
    @jax.vmap
    def objective(z):
        return t * row.objective(z) + ((z - X) ** 2).sum() / 2

    best = np.asarray(jax.jit(row.operator)(X, t))
    rng = np.random.default_rng(2)
    scales = np.repeat([1e-2, 1e-1, 1.0], 200)[:, None, None]
    noise = rng.normal(size=(600, 4, 3)) * scales
    # Perturb whole, in few entries, and along the value itself, where the corners are.
    around = np.concatenate(
        [best + noise, best + noise * (rng.random((600, 4, 3)) < 0.15), best * (1 + scales * rng.normal(size=(600, 1, 1)))]
    )
    others = objective(jnp.asarray(around, jnp.float32))
    assert objective(best[None])[0] <= others.min() + 1e-5


def test_no_threshold_changes_nothing_and_a_large_one_leaves_exact_zeros(row):
    np.testing.assert_allclose(row.operator(X, 0.0), X, atol=1e-6)
    if row.operator is not prox.shrink:
        landed = row.operator(X, 1e3)
        np.testing.assert_array_equal(landed, 0.0)
    if row.exact_zeros is not None:
        assert (row.operator(X, 0.5) == 0.0).sum() == row.exact_zeros > 0


def test_zeros_stay_zeros(row):
    landed = row.operator(jnp.zeros((4, 3)), 0.1)
    np.testing.assert_array_equal(landed, 0.0)


def test_a_nan_shows(row):
    assert jnp.isnan(row.operator(X.at[1, 1].set(jnp.nan), 0.5)[1, 1])


def test_types_jit_and_vmap(row):
    with jax.numpy_dtype_promotion("strict"):
        half = row.operator(X.astype(jnp.bfloat16), jnp.float32(0.25))
        steps = jnp.array([0.1, 0.5])
        batched = jax.jit(jax.vmap(row.operator, in_axes=(None, 0)))(X, steps)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), row.operator(X, 0.25), atol=0.02)
    for k in range(2):
        np.testing.assert_allclose(batched[k], row.operator(X, steps[k]), atol=1e-6)


# The operator, what it is given, what comes out.
LITERALS = {
    "soft": (prox.soft_threshold, ([-3.0, -1.0, 0.5, 1.5], 1.0), [-2.0, 0.0, 0.0, 0.5]),
    "hard": (prox.hard_threshold, ([-3.0, -1.0, 0.5, 1.5], 1.0), [-3.0, 0.0, 0.0, 1.5]),
    "shrink": (prox.shrink, ([-3.0, 1.5], 2.0), [-1.0, 0.5]),
    "net": (prox.elastic_net, ([-3.0, 0.5, 2.0], 0.5, 2.0, 2.0), [-1.0, 0.0, 0.5]),
    "group": (prox.group_soft_threshold, ([[3.0, 0.6], [4.0, 0.8]], 1.0), [[2.4, 0.0], [3.2, 0.0]]),
    "group rows": (partial(prox.group_soft_threshold, axis=0), ([[3.0, 4.0], [0.6, 0.8]], 1.0), [[2.4, 3.2], [0.0, 0.0]]),
    "lasso": (prox.group_lasso, (np.full((4, 1), 2.0), 1.0), np.full((4, 1), 1.0)),
    "singular": (prox.singular_value_threshold, ([[0.0, 3.0], [1.0, 0.0]], 1.5), [[0.0, 1.5], [0.0, 0.0]]),
    "box": (prox.box, ([-3.0, 0.5, 2.0], -1.0, 1.0), [-1.0, 0.5, 1.0]),
    "nonnegative": (prox.nonnegative, (np.array([-3.0, 0.5]),), [0.0, 0.5]),
    "max_norm": (prox.max_norm, ([[3.0, 0.3], [4.0, 0.4]], 1.0), [[0.6, 0.3], [0.8, 0.4]]),
}


@pytest.mark.parametrize("name", LITERALS)
def test_by_hand(name):
    operator, given, expected = LITERALS[name]
    np.testing.assert_allclose(operator(*given), np.asarray(expected), atol=1e-6)


PROJECTIONS = {
    "box": (lambda x: prox.box(x, -0.3, 0.4), lambda y: ((y >= -0.3) & (y <= jnp.float32(0.4))).all()),
    "nonnegative": (prox.nonnegative, lambda y: (y >= 0).all()),
    "max_norm": (lambda x: prox.max_norm(x, 0.7), lambda y: (jnp.linalg.norm(y, axis=0) <= 0.7 + 1e-6).all()),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_projection_is_feasible_idempotent_and_nearest(name):
    project, feasible = PROJECTIONS[name]
    landed = project(X)
    assert feasible(landed)
    assert not feasible(X)
    np.testing.assert_allclose(project(landed), landed, atol=1e-6)
    others = jax.vmap(project)(
        jax.device_put(np.asarray(np.asarray(X) + np.random.default_rng(3).normal(size=(200, 4, 3)), np.float32))
    )
    assert ((landed - X) ** 2).sum() <= ((others - X[None]) ** 2).sum((1, 2)).min()
    assert project(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_convolution_kernels_are_seen_as_matrices():
    w = jax.device_put(np.asarray(np.random.default_rng(4).normal(size=(2, 2, 3, 5)), np.float32))
    landed = prox.singular_value_threshold(w, 1.0)
    np.testing.assert_allclose(landed.reshape(12, 5), prox.singular_value_threshold(w.reshape(12, 5), 1.0), atol=1e-6)
    singular = np.linalg.svd(landed.reshape(12, 5), compute_uv=False)
    np.testing.assert_allclose(singular, np.maximum(np.linalg.svd(w.reshape(12, 5), compute_uv=False) - 1, 0), atol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"^an array of shape \(3,\) is not a matrix; choose `where` to fit$"):
        prox.singular_value_threshold(jnp.ones(3), 1.0)
    with pytest.raises(ValueError, match=r"^an array of shape \(3,\) has no axis -2; choose `axis` or `where` to fit$"):
        prox.group_soft_threshold(jnp.ones(3), 1.0, axis=-2)
