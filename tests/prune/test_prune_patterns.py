"""Criteria, distributions and patterns by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import prune
from jaxopt_lab.core import tree


@pytest.mark.parametrize(("sparsity", "expected"), [(0.9, (0.92043, 0.76981, 0.0)), (0.8, (0.83776, 0.53064, 0.0))])
def test_erdos_renyi_kernel_on_lenet_300_100(sparsity, expected):
    shapes = [(784, 300), (300, 100), (100, 10)]
    shares = prune.erdos_renyi_kernel().allocate(shapes, sparsity)
    assert tuple(round(share, 5) for share in shares) == expected
    sizes = np.array([np.prod(shape) for shape in shapes])
    assert np.dot(shares, sizes) == pytest.approx(sparsity * sizes.sum())


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_erdos_renyi_kernel_at_the_ends(sparsity):
    assert prune.erdos_renyi_kernel().allocate([(3, 3, 4, 8), (8, 8)], sparsity) == pytest.approx((sparsity, sparsity))


def test_n_of_m_by_hand():
    weights = jnp.array([[1.0, -5.0, 2.0, 2.0], [4.0, 4.0, 4.0, 0.0], [0.0, 1.0, 2.0, 3.0], [9.0, 0.0, 1.0, 1.0]])
    # Down the columns: two of each four. Column 2 is (2, 4, 2, 1): of the two equal ones the first would stay, were there room.
    expected = np.array([[0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(prune.n_of_m(2, 4).fixed(jnp.abs(weights)), expected)


@pytest.mark.parametrize("axis", [-2, -1, 0])
def test_n_of_m_keeps_n_of_every_group(axis):
    scores = np.random.default_rng(0).random((4, 8, 4), np.float32)
    mask = np.moveaxis(np.asarray(jax.jit(prune.n_of_m(1, 4, axis=axis).fixed)(scores)), axis, -1)
    groups = np.moveaxis(scores, axis, -1).reshape(-1, 4)
    np.testing.assert_array_equal(mask.reshape(-1, 4), groups == groups.max(1, keepdims=True))


def test_nan_counts_as_the_largest_whatever_the_pattern():
    nan, inf = jnp.nan, jnp.inf
    weights = {"kernel": jnp.array([nan, inf, 0.0, 9.0, inf, nan, -0.0, -nan])[:, None]}
    # What an invalid operation gives may have its sign bit set.
    assert jnp.signbit(weights["kernel"][-1, 0])
    expected = np.array([1, 0, 0, 1, 0, 1, 0, 1], bool)[:, None]
    np.testing.assert_array_equal(prune.n_of_m(1, 2).fixed(weights["kernel"]), expected)

    def kept(*sparsity, **options):
        return jax.jit(lambda: prune.one_shot(prune.magnitude(), weights, *sparsity, **options)[1]["kernel"])()

    np.testing.assert_array_equal(kept(pattern=prune.n_of_m(1, 2)), expected)
    np.testing.assert_array_equal(kept(5 / 8), np.isnan(weights["kernel"]))
    np.testing.assert_array_equal(kept(distribution=prune.threshold(10.0)), ~(np.abs(weights["kernel"]) < 10))


def test_a_threshold_is_a_number():
    for tau in ("0.1", None, [0.1]):
        with pytest.raises(TypeError, match=r"^threshold: tau must be a number or a schedule; got "):
            prune.threshold(tau)
    with pytest.raises(ValueError, match="tau is NaN"):
        prune.threshold(jnp.float32(jnp.nan))
    assert prune.threshold(jnp.float32(0.5)).below == prune.threshold(np.float32(0.5)).below == 0.5


def test_block_by_hand():
    scores = jnp.array([[1.0, 1.0, 0.0, 9.0, 2.0], [1.0, 1.0, 0.0, 0.0, 2.0], [7.0, 7.0, 1.0, 1.0, 3.0]])
    pattern = prune.block(2, 2)
    np.testing.assert_allclose(pattern.units(scores), [[1, 2.25, 2], [7, 1, 3]])
    mask = pattern.expand(jnp.array([[False, True, True], [False, True, False]]), (3, 5))
    np.testing.assert_array_equal(mask, [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 0]])


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: prune.n_of_m(3, 2), None),
        (lambda: prune.n_of_m(-1, 2), None),
        (lambda: prune.block(0, 1), None),
        (lambda: prune.n_of_m(2, 4), (6, 4)),
        (lambda: prune.n_of_m(2, 4), (4,)),
        (lambda: prune.block(2, 2), (4,)),
    ],
)
def test_what_does_not_fit_is_named(make, shape):
    with pytest.raises(ValueError, match=r"got|a/kernel has shape"):
        make().check("a/kernel", shape)


def test_random_draws_by_path_and_stays():
    score = prune.random(jax.random.key(0)).score
    weight = jnp.ones(50)
    np.testing.assert_array_equal(score("a", weight, weight), score("a", weight, weight))
    assert (score("a", weight, weight) != score("b", weight, weight)).all()


def test_packing_round_trips_in_the_fewest_bytes():
    # Whole bytes along the axis that wastes the fewest bits: ceil(d / 8) of them, times the other axes.
    sizes = {(13,): 2, (16, 3): 2 * 3, (3, 16): 3 * 2, (3, 3, 1, 6): 9, (2, 5): 2, (3, 9, 5): 3 * 9, (1,): 1}
    masks = [np.random.default_rng(1).random((2, *shape)) < 0.5 for shape in sizes]

    @jax.jit
    def packed_and_back(masks):
        packed = [(prune.pack(mask[0]), jax.vmap(prune.pack)(mask)) for mask in masks]
        return packed, [(prune.unpack(one), jax.vmap(prune.unpack)(two)) for one, two in packed]

    packed, back = packed_and_back(masks)
    assert [tree.nbytes(one) for one, _ in packed] == list(sizes.values())
    for mask, (one, two) in zip(masks, back, strict=True):
        np.testing.assert_array_equal(one, mask[0])
        np.testing.assert_array_equal(two, mask)
