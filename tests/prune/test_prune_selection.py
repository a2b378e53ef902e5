"""The threshold is exact, ties keep the lowest flat index, and sharded leaves stay where they are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab import prune

KTH = jax.jit(prune.kth_largest)
KEEP = jax.jit(lambda scores, k: prune.keep_largest(scores, k, joint=True))
SHAPES = [(7, 5), (64,), (3, 3, 4)]

DRAWS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "many ties": lambda rng, shape: rng.integers(-3, 3, size=shape) / 2,
    "all equal": lambda rng, shape: np.full(shape, 0.25),
    "all zero, both signs": lambda rng, shape: np.where(rng.random(shape) < 0.5, -0.0, 0.0),
    "cut before": lambda rng, shape: np.where(rng.random(shape) < 0.6, -np.inf, np.abs(rng.normal(size=shape))),
    "forty decades": lambda rng, shape: 10.0 ** rng.uniform(-38, 38, size=shape),
    "subnormal": lambda rng, shape: rng.integers(0, 9, size=shape) * 1e-45,
    "infinite": lambda rng, shape: np.where(rng.random(shape) < 0.2, np.inf, rng.normal(size=shape)),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_against_a_stable_sort(draw):
    rng = np.random.default_rng(0)
    for seed in range(6):
        scores = [DRAWS[draw](rng, shape).astype(np.float32) for shape in SHAPES]
        flat = np.concatenate([score.ravel() for score in scores])
        if draw == "subnormal":
            # XLA on CPU reads subnormal numbers as zero, and so do we.
            flat = np.zeros_like(flat)
        n = flat.size
        order = np.argsort(-flat, kind="stable")
        for k in (0, 1, int(rng.integers(2, n - 1)), n - 1, n)[: 5 if seed == 0 else 3]:
            expected = np.zeros(n, bool)
            expected[order[:k]] = True
            masks = KEEP(scores, jnp.array([k]))
            np.testing.assert_array_equal(np.concatenate([np.asarray(mask).ravel() for mask in masks]), expected)
            if k:
                np.testing.assert_array_equal(KTH(scores, jnp.uint32(k)), flat[order[k - 1]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    x = jax.random.normal(jax.random.key(0), (999,)).astype(dtype)
    assert KTH(x, 100) == jnp.sort(x)[-100]


def test_mixed_precision_competes_in_the_wider():
    scores = [jnp.array([1.0, 2.0], jnp.bfloat16), jnp.array([1.5, 0.5])]
    assert KTH(scores, 2) == 1.5


def test_nan_is_the_largest():
    assert jnp.isnan(KTH(jnp.array([1.0, jnp.nan, 3.0]), 1))
    negative = jax.lax.bitcast_convert_type(jnp.uint32(0xFFC00000), jnp.float32)
    scores = jnp.stack([jnp.float32(1.0), negative, jnp.float32(3.0)])
    np.testing.assert_array_equal(KEEP([scores], jnp.array([2]))[0], [False, True, True])
    np.testing.assert_array_equal(KEEP([jnp.array([1.0, jnp.nan, 3.0])], jnp.array([2]))[0], [False, True, True])


def test_each_leaf_by_itself():
    masks = jax.jit(lambda keep: prune.keep_largest([jnp.arange(4.0), jnp.arange(3.0)], keep, joint=False))(jnp.array([1, 2]))
    np.testing.assert_array_equal(masks[0], [False, False, False, True])
    np.testing.assert_array_equal(masks[1], [False, True, True])


def test_python_floats_are_scores_too():
    assert jax.jit(lambda: prune.kth_largest([1.0, np.float32(3.0), jnp.array([2.0])], 2))() == 2.0


def test_errors():
    with pytest.raises(TypeError, match=r"^kth_largest: a/0 is int32; scores must be floating: convert it$"):
        prune.kth_largest({"a": [jnp.arange(5)]}, 1)
    with pytest.raises(TypeError, match=r"^keep_largest: array 1 is bool"):
        prune.keep_largest([jnp.ones(2), jnp.ones(2, bool)], jnp.array([1]), joint=True)
    with pytest.raises(ValueError, match="from 1 to the number of scores, 3; got 4"):
        prune.kth_largest(jnp.ones(3), 4)
    with pytest.raises(ValueError, match="got 0"):
        prune.kth_largest({}, 1)


def collectives(program):
    """The collectives of a compiled program with the largest number of elements in each one's result."""
    found = {}
    for shapes, name in re.findall(r"= (.*?) (all-[a-z]+|collective-[a-z]+|reduce-scatter)[a-z-]*\(", program):
        for dims in re.findall(r"\[([\d,]*)\]", shapes):
            found[name] = max(found.get(name, 0), int(np.prod([int(d) for d in dims.split(",") if d])))
    return found


@pytest.mark.parametrize("spec", [P("a", "b"), P(None, "a"), P(("a", "b"))])
def test_sharded_leaves_are_never_gathered(spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    scores = jax.random.normal(jax.random.key(0), (64, 32))
    sharded = jax.device_put(scores, NamedSharding(mesh, spec))
    threshold = np.sort(np.ravel(scores))[-300]
    for fn, expected in (
        (prune.kth_largest, threshold),
        (lambda x, k: prune.keep_largest([x], k[None], joint=True)[0], scores >= threshold),
    ):
        compiled = jax.jit(fn).lower(sharded, jnp.uint32(300)).compile()
        found = collectives(compiled.as_text())
        assert set(found) == {"all-reduce"}
        assert found["all-reduce"] == 1
        np.testing.assert_array_equal(compiled(sharded, jnp.uint32(300)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.7},
        {"sparsity": 0.7, "distribution": prune.uniform(), "packed": True},
        {"sparsity": 0.7, "pattern": prune.block(4, 4)},
        {"pattern": prune.n_of_m(2, 4)},
        {"sparsity": 0.7, "end": 4, "growth": prune.gradient_growth(0.3)},
        {"distribution": prune.threshold(0.5)},
    ],
    ids=["global", "packed", "block", "2:4", "growth", "threshold"],
)
def test_a_whole_update_gathers_nothing(options):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("a", "b"))
    weights = jax.device_put(jax.random.normal(jax.random.key(0), (64, 32)), sharding)
    tx = prune.sparsify(optax.sgd(0.1), where="**", **options)
    state = jax.jit(tx.init)(weights)

    def step(weights, state):
        updates, state = tx.update(weights, state, weights)
        return jax.lax.with_sharding_constraint(optax.apply_updates(weights, updates), sharding), state

    found = collectives(jax.jit(step).lower(weights, state).compile().as_text())
    assert set(found) <= {"all-reduce"}
    assert found.get("all-reduce", 1) == 1


def test_under_vmap_the_tie_search_stays_conditional():
    scores = jnp.stack([jnp.arange(6.0), jnp.ones(6)])
    many = jax.vmap(lambda score: prune.keep_largest([score], jnp.array([2]), joint=True)[0])
    assert "cond[" in str(jax.make_jaxpr(many)(scores))
    np.testing.assert_array_equal(jax.jit(many)(scores), [[0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0]])
