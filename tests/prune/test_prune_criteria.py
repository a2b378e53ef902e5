"""What ranks weights: scores by hand, and what layer-adaptive magnitude does that magnitude does not."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import prune

SCORE = prune.layer_adaptive().score


def test_layer_adaptive_scores_are_shares_of_what_is_as_large():
    w = jax.random.normal(jax.random.key(0), (40, 25)) * (jax.random.uniform(jax.random.key(1), (40, 25)) > 0.3)
    flat = np.asarray(w, np.float64).ravel()
    exact = np.array([0.0 if not x else x**2 / np.sum(flat[np.abs(flat) >= abs(x)] ** 2) for x in flat])
    scores = np.asarray(SCORE("kernel", w, w)).ravel()
    np.testing.assert_array_equal(scores == 0, flat == 0)
    # A bin is counted whole, so a score is never too high; half of the largest ten weights share no bin.
    assert (scores <= exact * (1 + 1e-5)).all()
    assert np.median(scores[exact > 0] / exact[exact > 0]) > 0.97
    order = np.argsort(np.abs(flat))
    assert (np.diff(scores[order]) >= 0).all()
    for dtype in (jnp.bfloat16, jnp.float16):
        assert bool(jnp.isfinite(SCORE("kernel", w.astype(dtype), w)).all())
    assert not bool(SCORE("kernel", jnp.zeros(3), jnp.zeros(3)).any())
    np.testing.assert_allclose(SCORE("kernel", jnp.array([1.0, jnp.nan, -2.0]), jnp.zeros(3)), [0.2, np.nan, 1.0])


def test_layer_adaptive_magnitude_does_not_see_the_scale_of_a_leaf_and_empties_none():
    params = {"small": jax.random.normal(jax.random.key(0), (10,)) * 1e-3, "large": jax.random.normal(jax.random.key(1), (500,))}
    adaptive, _ = prune.one_shot(prune.layer_adaptive(), params, 0.98, where="*")
    plain, _ = prune.one_shot(prune.magnitude(), params, 0.98, where="*")
    kept = lambda tree: {name: int(jnp.sum(w != 0)) for name, w in tree.items()}  # noqa: E731
    assert kept(plain)["small"] == 0
    assert kept(adaptive)["small"] >= 1
    assert sum(kept(adaptive).values()) == sum(kept(plain).values()) == 10
    scaled, _ = prune.one_shot(prune.layer_adaptive(), {**params, "small": params["small"] * 2.0**20}, 0.98, where="*")
    assert kept(scaled) == kept(adaptive)


def test_layer_adaptive_scores_of_a_sharded_leaf_are_found_without_gathering_it():
    w = jax.random.normal(jax.random.key(0), (64, 48))
    mesh = Mesh(np.array(jax.devices()), ("d",))
    program = jax.jit(lambda w: SCORE("kernel", w, w)).lower(jax.device_put(w, NamedSharding(mesh, PartitionSpec("d")))).compile()
    assert "all-gather" not in program.as_text()
    assert "all-reduce" in program.as_text()
