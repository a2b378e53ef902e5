"""Sums of leaves: products part by part, residuals whose error may only fall, and factors that train beside what is frozen."""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxopt_lab import compress
from jaxopt_lab.checkpoint import manifest
from jaxopt_lab.compress.arrays import factor
from jaxopt_lab.compress.leaves.low_rank import LowRank, low_rank
from jaxopt_lab.compress.leaves.sum import Frozen, Sum, add_low_rank, split_low_rank
from jaxopt_lab.core import tree

_close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


def _array(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def _coarse(step: float = 0.5):
    """A function that stores weights as multiples of a fixed step, without a range: what is rounded is off by half a step."""
    return lambda params: {path: Coarse(jnp.round(w / step).astype(jnp.int8), jnp.float32(step)) for path, w in params.items()}


class Coarse(compress.Leaf):
    """Integers times a step; it declines everything."""

    codes: jax.Array
    step: jax.Array
    trains: ClassVar[tuple[str, ...]] = ()

    def aval(self):
        return jax.core.ShapedArray(self.codes.shape, self.step.dtype)

    def materialise(self):
        return self.codes * self.step


def _sum(shape: tuple[int, ...], layout: str, seed: int = 0) -> Sum:
    """Codes, factors and a leaf that declines."""
    codes = compress.quantize({"kernel": _array(*shape, seed=seed)})["kernel"]
    own = lambda kind: tuple(n for n, label in zip(shape, layout, strict=True) if label == kind)  # noqa: E731
    factors = LowRank(_array(*own("r"), 2, seed=seed + 1), _array(2, *own("c"), seed=seed + 2), layout)
    return Sum((codes, factors, Coarse(jnp.ones(shape, jnp.int8), jnp.float32(0.25))))


def test_a_sum_is_that_of_its_parts():
    w = Sum((Frozen(jnp.eye(2)), LowRank(jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 4.0]]))))
    np.testing.assert_array_equal(w.materialise(), [[4, 4], [6, 9]])
    assert w.format() == "float32 frozen + float32 rank 1"
    row = compress.summary({"kernel": w}, {"kernel": jnp.array([[4.0, 4.0], [6.0, 11.0]])})["kernel"]
    assert row[:5] == ("float32 frozen + float32 rank 1", (2, 2), 32, 16, 1.0)
    # Parts are summed before they are rounded: 1 + 2**-9 + 2**-9 is 1 + 2**-8, while each alone would vanish beside 1.
    parts = [
        LowRank(jnp.full((1, 1), v, jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16), "rc", jnp.bfloat16) for v in (1, 2**-8, 2**-8)
    ]
    assert float(Sum(tuple(parts)).materialise()[0, 0]) == 1 + 2**-7


def test_every_rule_equals_that_of_the_dense_weight():
    matrix, kernel = _sum((6, 5), "rc"), _sum((3, 3, 4, 5), "rrrc", seed=3)
    x, image, rows = _array(3, 6), _array(2, 5, 5, 4), jnp.array([[0, 5], [-1, 9]])
    convolve = lambda w: lax.conv_general_dilated(  # noqa: E731
        image, w, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    fns = [
        (matrix, lambda w: x @ w),
        (matrix, lambda w: w.T @ x.T),
        (matrix, lambda w: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)),
        (matrix, lambda w: jnp.take(w, rows, axis=0)),
        (matrix, lambda w: x @ jnp.broadcast_to(w[None].squeeze(0), (6, 5)).reshape(6, 5, 1)[..., 0]),
        (matrix, jnp.tanh),
        (matrix, lambda w: w.astype(jnp.int32)),
        (kernel, convolve),
        (kernel, lambda w: jnp.einsum("bi,hwio->bhwo", image[0, 0], w)),
    ]

    @jax.jit
    def both(leaves):
        return [(compress.lift(fn)(leaf), fn(leaf.materialise())) for leaf, (_, fn) in zip(leaves, fns, strict=True)]

    for k, (got, want) in enumerate(both([leaf for leaf, _ in fns])):
        assert got.dtype == want.dtype
        _close(got, want, rtol=0.02 if k == 2 else 1e-3, atol=0.1 if k == 2 else 1e-4)


def test_only_the_parts_that_decline_become_dense():
    called = []

    class Watched(LowRank):
        def materialise(self):
            called.append("dense")
            return super().materialise()

        def dot_general(self, x, **params):
            called.append("thin")
            return super().dot_general(x, **params)

    watched = Watched(_array(6, 1), _array(1, 5))
    coarse = Coarse(jnp.ones((6, 5), jnp.int8), jnp.float32(0.25))
    apply = lambda w, x: x @ w  # noqa: E731
    x = _array(3, 6)
    both = Sum((coarse, watched, Frozen(_array(6, 5, seed=4))))
    text = str(jax.make_jaxpr(compress.lift(apply))(both, x))
    assert called == ["thin"]
    assert text.count("dot_general[") == 3  # two thin ones, and one with the sum of the parts that decline
    _close(compress.lift(apply)(both, x), x @ both.materialise(), rtol=1e-4, atol=1e-4)
    declined = str(jax.make_jaxpr(compress.lift(apply))(Sum((coarse, coarse)), x))
    assert declined.count("dot_general[") == 1


def test_factors_first_take_what_is_large_and_codes_the_rest():
    w = 20 * _array(16, 1) @ _array(1, 12, seed=1) + _array(16, 12, seed=2)
    params = {"a": {"kernel": w}, "b": {"kernel": _array(4, 4)}}
    stored = split_low_rank(params, rank=1, rest=compress.quantize, where="a/kernel")
    leaf = stored["a"]["kernel"]
    assert leaf.format() == "int8 per channel 1 + float32 rank 1"
    assert not tree.is_compressed(stored["b"]["kernel"])
    low = low_rank(params, rank=1, where="a/kernel")["a"]["kernel"]
    _close(leaf.parts[1].materialise(), low.materialise())
    rest = compress.quantize({"kernel": w - low.materialise()})["kernel"]
    np.testing.assert_allclose(leaf.parts[0].codes, rest.codes, atol=1)
    error = lambda stored: float(jnp.linalg.norm(w - stored["a"]["kernel"].materialise()))  # noqa: E731
    assert error(stored) < 0.2 * error(compress.quantize(params, where="a/kernel"))
    some = split_low_rank(params, {"b/kernel": 2}, compress.quantize)
    assert [type(some[name]["kernel"]) is Sum for name in "ab"] == [False, True]
    by_rule = split_low_rank(params, factor.by_evidence, compress.quantize, where="a/kernel")
    assert by_rule["a"]["kernel"].parts[1].a.shape == (16, 1)


def test_the_error_falls_with_the_iterations():
    w = _array(14, 12)
    store = jax.jit(lambda w, n: split_low_rank({"kernel": w}, rank=3, rest=_coarse(), iterations=n), static_argnums=1)
    errors = [float(jnp.linalg.norm(w - store(w, n)["kernel"].materialise())) for n in (1, 2, 6)]
    assert errors[0] > errors[1] >= errors[2] - 1e-5
    # Without codes that matter the factors alone are the best, and nothing is left to gain.
    alone = split_low_rank({"kernel": w}, rank=3, rest=_coarse(100.0), iterations=3)["kernel"]
    _close(alone.materialise(), low_rank({"kernel": w}, rank=3)["kernel"].materialise(), atol=1e-4)


@pytest.mark.slow
def test_split_weights_work_under_vmap_and_in_a_scan():
    w = _array(2, 8, 8)
    store = lambda w: split_low_rank({"kernel": w}, rank=2, rest=functools.partial(compress.quantize, axis=None), iterations=2)  # noqa: E731
    many = jax.jit(jax.vmap(store))(w)
    apply = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["kernel"])[0]  # noqa: E731
    stacked = split_low_rank({"kernel": w}, 2, functools.partial(compress.quantize, axis=(0, -1)), stacked=1)
    for stored in (many, stacked):
        leaf = stored["kernel"]
        assert leaf.aval().shape == (2, 8, 8)
        got = jax.jit(compress.lift(apply))(stored, x := _array(3, 8, seed=5))
        dense = jnp.stack([jax.tree.map(lambda field, k=k: field[k], leaf).materialise() for k in range(2)])
        _close(got, apply({"kernel": dense}, x), rtol=1e-3, atol=1e-4)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x.mean((1, 2)))))


@functools.cache
def _net() -> tuple[Any, jax.Array]:
    x = _array(4, 5, 5, 2)
    return jax.jit(Net().init)(jax.random.key(0), x), x


@pytest.mark.slow
def test_new_factors_change_nothing_and_then_they_alone_train():
    variables, x = _net()
    half = compress.quantize(variables, where="**/Dense_0/kernel")
    stored = add_low_rank(half, 2, jax.random.key(1))
    formats = {path: row.format for path, row in compress.summary(stored).items() if "kernel" in path}
    assert formats == {
        "params/Conv_0/kernel": "float32 frozen + float32 rank 2",
        "params/Dense_0/kernel": "int8 per channel 1 + float32 rank 2",
        "params/Dense_1/kernel": "float32 frozen + float32 rank 2",
    }
    factors = [leaf.parts[-1] for leaf in tree.selected(stored, "**/kernel").values()]
    assert all(float(jnp.abs(each.b).max()) == 0 < float(jnp.abs(each.a).min()) for each in factors)
    tx = compress.optimizer(optax.adamw(0.05, weight_decay=0.1))

    @jax.jit
    def run(stored, x):
        def loss(stored):
            return jnp.sum((compress.lift(Net().apply)(stored, x) - 1) ** 2)

        def step(carry, _):
            stored, state = carry
            grads = jax.grad(loss, allow_int=True)(stored)
            updates, state = tx.update(grads, state, stored)
            return optax.apply_updates(stored, updates), state

        before = compress.lift(Net().apply)(stored, x), Net().apply(compress.decompress(half), x), loss(stored)
        carry = (stored, tx.init(stored))
        for _ in range(3):
            carry = step(carry, None)
        return before, carry[0], loss(carry[0])

    (got, want, first), trained, last = run(stored, x)
    _close(got, want)
    assert float(last) < 0.7 * float(first)
    for path, leaf in tree.selected(trained, "**/kernel").items():
        old = tree.selected(stored, "**/kernel")[path]
        jax.tree.map(np.testing.assert_array_equal, leaf.parts[0], old.parts[0])
        assert float(jnp.abs(leaf.parts[1].b).max()) > 0
        assert jax.tree.structure(leaf) == jax.tree.structure(old)


def test_gradients_of_the_parts_are_those_through_the_dense_sum():
    variables, x = _net()
    stored = split_low_rank(variables, rank=2, rest=compress.quantize)

    def loss(apply, stored, x):
        return jnp.sum(jnp.sin(apply(stored, x)) ** 2)

    @jax.jit
    def both(stored, x):
        grad = lambda fn: jax.grad(fn, (0, 1), allow_int=True)(stored, x)  # noqa: E731
        lifted = grad(functools.partial(loss, compress.lift(Net().apply)))
        return lifted, grad(lambda s, x: loss(Net().apply, compress.decompress(s), x))

    lifted, dense = both(stored, x)
    for got, want in zip(jax.tree.leaves(lifted), jax.tree.leaves(dense), strict=True):
        assert got.dtype == want.dtype
        if got.dtype != jax.dtypes.float0:
            _close(got, want, rtol=1e-3, atol=1e-4)


def test_factors_are_drawn_as_documented_and_are_added_to_sums():
    params = {"kernel": jnp.ones((400, 20), jnp.bfloat16)}
    once = add_low_rank(params, 8, jax.random.key(0))
    a = once["kernel"].parts[1].a
    assert a.dtype == once["kernel"].materialise().dtype == jnp.bfloat16
    assert abs(float(a.astype(jnp.float32).std()) * 20 - 1) < 0.05
    twice = add_low_rank(once, {"kernel": 3}, jax.random.key(0))
    assert twice["kernel"].format() == "bfloat16 frozen + bfloat16 rank 8 + bfloat16 rank 3"
    two = add_low_rank({"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}, 2, jax.random.key(0), where="*")
    assert not bool((two["a"].parts[1].a == two["b"].parts[1].a).any())


def test_a_checkpoint_rebuilds_the_leaf():
    leaf = _sum((4, 3), "rc")
    back = manifest.rebuild(*manifest.describe(Sum(leaf.parts[:2])))
    assert jax.tree.structure(back) == jax.tree.structure(Sum(leaf.parts[:2]))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"iterations=0: factors and rest", lambda p: split_low_rank(p, 1, compress.quantize, iterations=0)),
        (ValueError, r"kernel of shape \(4, 3\): rank=4 does not fit", lambda p: split_low_rank(p, 4, compress.quantize)),
        (ValueError, r"rank is given for x, which is no chosen weight", lambda p: split_low_rank(p, {"x": 1}, compress.quantize)),
        (TypeError, r"rest leaves kernel dense; give it a `where`", lambda p: split_low_rank(p, 1, lambda p: p)),
        (ValueError, r"rest has to give what it was given, a dict with the paths kernel", lambda p: split_low_rank(p, 1, len)),
        (ValueError, r"rest stores kernel of shape \(4, 3\) as a weight of shape \(3, 4\)",
         lambda p: split_low_rank(p, 1, lambda p: compress.quantize({"kernel": p["kernel"].T}))),
        (TypeError, r"kernel is compressed already", lambda p: split_low_rank(compress.quantize(p), 1, compress.quantize)),
        (ValueError, r"kernel of shape \(4, 3\): rank=4 does not fit a matrix", lambda p: add_low_rank(p, 4, jax.random.key(0))),
        (ValueError, r"kernel of shape \(4, 3\): axis=5 and", lambda p: add_low_rank(p, 1, jax.random.key(0), axis=5)),
        (TypeError, r"n has dtype int32", lambda p: add_low_rank({"n": jnp.arange(3)}, 1, jax.random.key(0), where="n")),
        (ValueError, r"parts of one shape and dtype: got float32\[2\], float32\[3\]",
         lambda p: Sum((Frozen(jnp.ones(2)), Frozen(jnp.ones(3))))),
        (ValueError, r"parts of one shape and dtype: got none", lambda p: Sum(())),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_name_the_leaf(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call({"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)})
    assert "\n" not in str(caught.value)
