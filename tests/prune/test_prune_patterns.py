"""Criteria, distributions and patterns by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import prune


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


@pytest.mark.parametrize("axis", [-2, -1, 0, 2])
def test_n_of_m_keeps_n_of_every_group(axis):
    scores = jax.random.uniform(jax.random.key(0), (4, 8, 12))
    mask = np.moveaxis(np.asarray(prune.n_of_m(1, 4, axis=axis).fixed(scores)), axis, -1)
    assert (mask.reshape(-1, 4).sum(1) == 1).all()


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


@pytest.mark.parametrize("shape", [(13,), (16, 3), (3, 3, 1, 6), (2, 5), (1,)])
def test_packing_round_trips(shape):
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, shape)
    packed = prune.pack(mask)
    np.testing.assert_array_equal(prune.unpack(packed), mask)
    assert packed.bits.size <= -(-mask.size // 8) * (8 if max(shape) < 8 else 2)
    np.testing.assert_array_equal(jax.vmap(prune.unpack)(jax.vmap(prune.pack)(jnp.stack([mask, ~mask]))), jnp.stack([mask, ~mask]))
