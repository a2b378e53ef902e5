"""Forms under a budget of bytes: the best of all choices, and what is said where none fits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import compress
from jaxopt_lab.compress import budget
from jaxopt_lab.core import tree


def _normal(seed, *shape):
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


PARAMS = {
    "a": {"kernel": _normal(0, 16, 8), "bias": _normal(1, 8)},
    "b": {"kernel": _normal(2, 8, 8)},
    "c": {"kernel": _normal(3, 8, 4)},
}
X = _normal(4, 32, 16)


def _forward(params):
    h = jnp.tanh(X @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.tanh(h @ params["b"]["kernel"]) @ params["c"]["kernel"]


TARGET = _forward(PARAMS)


def _loss(params):
    return jnp.mean((_forward(params) - TARGET) ** 2)


def _apart(params):
    """Weights whose errors do not meet, and of which some matter more."""
    return sum(c * jnp.sum((params[n]["kernel"] - PARAMS[n]["kernel"]) ** 2) for n, c in (("a", 1.0), ("b", 30.0), ("c", 900.0)))


def test_the_choice_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = [rng.normal(size=k) for k in (2, 3, 4)]
        sizes = [rng.integers(1, 50, size=k) for k in (2, 3, 4)]
        limit = int(rng.integers(20, 120))
        every = list(itertools.product(*(range(len(cost)) for cost in costs)))
        fits = [p for p in every if sum(s[k] for s, k in zip(sizes, p, strict=True)) <= limit]
        best = min((sum(c[k] for c, k in zip(costs, p, strict=True)) for p in fits), default=None)
        got = budget._choose(costs, sizes, limit)
        assert (got is None) == (best is None)
        if got is not None:
            assert sum(s[k] for s, k in zip(sizes, got, strict=True)) <= limit
            assert sum(c[k] for c, k in zip(costs, got, strict=True)) == pytest.approx(best)


@pytest.mark.slow
def test_mixed_bits_fit_and_beat_equal_bits_of_the_same_size():
    uniform = compress.quantize(PARAMS, bits=4)
    forms = [functools.partial(compress.quantize, bits=bits) for bits in (2, 3, 4, 6, 8)]
    found = compress.allocate(_apart, PARAMS, tree.nbytes(uniform), forms)
    assert found.nbytes <= tree.nbytes(uniform)
    assert found.forms["a/kernel"] < found.forms["c/kernel"]
    assert found.growth == pytest.approx(float(_apart(compress.decompress(found.params))), rel=1e-5)
    assert found.growth < 0.7 * float(_apart(compress.decompress(uniform)))

    bits = compress.allocate_bits(_apart, PARAMS, tree.nbytes(uniform), bits=(2, 3, 4, 6, 8))
    assert bits == {path: (2, 3, 4, 6, 8)[k] for path, k in found.forms.items()}
    jax.tree.map(np.testing.assert_array_equal, compress.quantize(PARAMS, bits=bits), found.params)
    # With room for all, every weight takes the form that costs least.
    assert set(compress.allocate_bits(_loss, PARAMS, 10**6, bits=(2, 8)).values()) == {8}


def test_forms_of_different_kinds_compete():
    forms = [
        functools.partial(compress.low_rank, rank=2),
        functools.partial(compress.cluster, k=4),
        functools.partial(compress.quantize, bits=8),
        lambda params, where: params,
    ]
    found = compress.allocate(_loss, PARAMS, 600, forms)
    assert found.nbytes == tree.nbytes(found.params) <= 600
    assert found.growth == pytest.approx(sum(found.sensitivity[path][k] for path, k in found.forms.items()))
    for path, costs in found.sensitivity.items():
        assert costs.shape == (4,)
        assert costs[3] == pytest.approx(0.0, abs=1e-7)
        assert costs[2] < costs[1], path
    assert compress.allocate(_loss, PARAMS, 10**6, forms).forms == dict.fromkeys(found.forms, 3)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"^nbytes=100: the smallest choice of forms takes \d+ bytes"):
        compress.allocate_bits(_loss, PARAMS, 100)
    with pytest.raises(ValueError, match=r"^there are no forms"):
        compress.allocate(_loss, PARAMS, 100, [])
    with pytest.raises(ValueError, match=r"^the loss of the tree as it is must be finite; it is inf"):
        compress.allocate_bits(lambda params: jnp.inf * params["a"]["bias"][0] ** 2, PARAMS, 10**6)
    with pytest.raises(ValueError, match=r"^nothing matches where='none'"):
        compress.allocate_bits(_loss, PARAMS, 10**6, where="none")
    for at_once in (1, 4):
        with pytest.raises(ValueError, match=r"^the loss must be a scalar; its shape is \(32, 4\)"):
            compress.allocate_bits(_forward, PARAMS, 10**6, at_once=at_once)
    with pytest.raises(ValueError, match=r"^at_once must be at least 1; got 0"):
        compress.allocate_bits(_loss, PARAMS, 10**6, at_once=0)


def test_losses_of_several_trees_at_once_are_the_same():
    forms = [functools.partial(compress.quantize, bits=bits) for bits in (2, 4)]
    alone, mapped = (compress.allocate(_loss, PARAMS, 10**6, forms, at_once=n) for n in (1, 4))
    for path, values in alone.sensitivity.items():
        np.testing.assert_allclose(mapped.sensitivity[path], values, rtol=1e-4, atol=1e-7)
    assert mapped.forms == alone.forms
