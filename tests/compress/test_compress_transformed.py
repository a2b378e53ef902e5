"""Weights stored in another basis of their inputs: products that never see the dense weight, and all else that they must keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxopt_lab import compress
from jaxopt_lab.compress.arrays import hadamard
from jaxopt_lab.compress.leaves.dynamic import DynamicQuantized, dynamic
from jaxopt_lab.compress.leaves.low_rank import LowRank
from jaxopt_lab.compress.leaves.quantized import Quantized, quantize
from jaxopt_lab.compress.leaves.transformed import InputScaled, Rotated


def _normal(*shape: int, seed: int = 0, dtype=np.float32) -> jax.Array:
    return jax.device_put(np.asarray(np.random.default_rng(seed).normal(size=shape), dtype))


def _made(kind: type, w: jax.Array, inputs: tuple[int, ...], stack: tuple[int, ...] = (), store=None):
    """The leaf of a weight by its input axes, each with numbers of its own; a rotation is along the last of them."""
    store = store or (lambda v: quantize({"w": v}, axis=tuple(a for a in range(w.ndim) if a not in inputs), where="w")["w"])
    along = inputs if kind is InputScaled else inputs[-1:]
    sides = [n if a in (*along, *stack) else 1 for a, n in enumerate(w.shape)]
    if kind is InputScaled:
        scale = jnp.exp(_normal(*sides, seed=7))
        return InputScaled(store((w * scale).astype(w.dtype)), scale)
    signs = jax.device_put(np.asarray(np.where(_normal(*sides, seed=8) > 0, 1, -1), np.int8))
    rotated = hadamard.transform(w.astype(jnp.float32) * signs, along[0]).astype(w.dtype)
    return Rotated(store(rotated), signs, along[0] - w.ndim)


def _convolve(w, x):
    return lax.conv_general_dilated(x, w, (2, 1), "SAME", rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC"))


PRODUCTS = {
    "dense": ((12, 5), (0,), (), (3, 12), lambda w, x: x @ w),
    "out by in": ((5, 12), (1,), (), (3, 12), lambda w, x: x @ w.T),
    "on the left": ((5, 12), (1,), (), (12, 3), lambda w, x: w @ x),
    "heads": ((3, 4, 5), (0, 1), (), (2, 6, 3, 4), lambda w, x: jnp.einsum("bthd,hdm->btm", x, w)),
    "batched": ((2, 12, 5), (1,), (0,), (2, 3, 12), lambda w, x: jnp.einsum("lbi,lio->lbo", x, w)),
    "scanned": ((2, 4, 4), (1,), (0,), (3, 4), lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]),
    "reshaped": ((12, 6), (0,), (), (3, 12), lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(12, 2, 3))),
    "convolved": ((3, 3, 4, 5), (2,), (), (2, 6, 5, 4), _convolve),
}


# What becomes of the layout is the same for both kinds.
_AGAIN = [(InputScaled, name) for name in ("heads", "batched", "reshaped", "on the left")]
_CASES = [
    pytest.param(kind, name, marks=pytest.mark.slow if (kind, name) in _AGAIN else ())
    for kind in (InputScaled, Rotated)
    for name in PRODUCTS
]


@pytest.mark.parametrize(("kind", "name"), _CASES)
def test_products_are_those_with_the_dense_weight_and_never_make_it(monkeypatch, kind, name):
    shape, inputs, stack, x_shape, multiply = PRODUCTS[name]
    w, x = _normal(*shape), _normal(*x_shape, seed=1)
    leaf = _made(kind, w, inputs, stack)
    dense = np.asarray(leaf.materialise())
    np.testing.assert_allclose(dense, w, atol=0.1 * float(jnp.abs(w).max()))
    assert leaf.shape == w.shape

    if kind is InputScaled or name not in ("reshaped", "convolved"):

        def refuse(self):
            raise AssertionError("the dense weight was made")

        monkeypatch.setattr(kind, "materialise", refuse)
    out, slope = jax.jit(lambda w, x: jax.value_and_grad(lambda x: jnp.sum(jnp.sin(compress.lift(multiply)(w, x))))(x))(leaf, x)
    want, want_slope = jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(multiply(w, x)))))(x, dense)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(slope, want_slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [InputScaled, Rotated])
def test_what_trains_inside_trains_and_keeps_its_derivatives(kind):
    a, b, x = _normal(8, 2), _normal(2, 3, seed=1), _normal(4, 8, seed=2)
    leaf = _made(kind, a @ b, (0,), store=lambda v: LowRank(a, b))

    def dense(a, b):
        full = a @ b
        return full / leaf.scale if kind is InputScaled else hadamard.transform(full, 0) * leaf.signs

    wanted = jax.jit(jax.grad(lambda ab: jnp.sum(jnp.cos(x @ dense(*ab)))))((a, b))
    slopes = jax.jit(jax.grad(compress.lift(lambda w: jnp.sum(jnp.cos(x @ w))), allow_int=True))(leaf)
    assert leaf.trains == ("inner",)
    assert leaf.latent is None
    np.testing.assert_allclose(slopes.inner.a, wanted[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(slopes.inner.b, wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [InputScaled, Rotated])
def test_the_inner_rule_sees_the_inputs_in_its_own_basis(kind):
    w, x = _normal(16, 4), _normal(5, 16, seed=1)
    leaf = _made(kind, w, (0,), store=lambda v: dynamic({"w": v}, "w")["w"])
    assert isinstance(leaf.inner, DynamicQuantized)
    moved = x / leaf.scale[:, 0][None] if kind is InputScaled else hadamard.rotate(x, leaf.signs[:, 0])
    lifted = jax.jit(compress.lift(lambda w, x: x @ w))
    np.testing.assert_allclose(lifted(leaf, x), lifted(leaf.inner, moved), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [InputScaled, Rotated])
def test_dtypes_stacking_and_words(kind):
    w = _normal(8, 3, dtype=jnp.bfloat16)
    leaf = _made(kind, w, (0,))
    assert leaf.materialise().dtype == leaf.dtype == jnp.bfloat16
    out = jax.jit(compress.lift(lambda w, x: x @ w.astype(jnp.float32)))(leaf, jnp.ones((2, 8)))
    np.testing.assert_allclose(out, np.ones((2, 8)) @ np.asarray(leaf.materialise(), np.float32), rtol=0.02, atol=0.05)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), leaf, leaf)
    np.testing.assert_array_equal(both.materialise(), np.stack([leaf.materialise()] * 2))
    assert leaf.format() == f"{leaf.inner.format()}, " + ("inputs scaled" if kind is InputScaled else "rotated along 0")


@pytest.mark.slow
def test_what_has_no_rule_is_dense():
    w, x = _normal(4, 4), _normal(3, 4, seed=1)
    scaled, turned = _made(InputScaled, w, (0,)), _made(Rotated, w, (0,))
    for leaf in (scaled, turned):
        dense = np.asarray(leaf.materialise())
        for use in (lambda w, x: x @ w.T, lambda w, x: jnp.take(w, jnp.array([2, 0]), axis=0), lambda w, x: jnp.sum(w * 2)):
            np.testing.assert_allclose(compress.lift(use)(leaf, x), use(jnp.asarray(dense), x), rtol=1e-5, atol=1e-5)
    # A depthwise kernel has one input channel, and the input many: its scale is one of groups.
    kernel = InputScaled(Quantized(jnp.ones((3, 3, 1, 4), jnp.int8), jnp.ones((1, 1, 1, 4))), jnp.full((1, 1, 1, 1), 2.0))
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 4}
    out = compress.lift(lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "VALID", **numbers))(kernel, jnp.ones((1, 3, 3, 4)))
    np.testing.assert_allclose(out, np.full((1, 1, 1, 4), 4.5))


def test_fields_that_do_not_fit_are_refused():
    inner = Quantized(jnp.ones((4, 2), jnp.int8), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"shape \(4, 2\) needs scale of its rank, each side 1 or equal; got \(4,\)"):
        InputScaled(inner, jnp.ones(4))
    with pytest.raises(ValueError, match=r"needs signs of its rank, each side 1 or equal; got \(2, 1\)"):
        Rotated(inner, jnp.ones((2, 1), jnp.int8))
    with pytest.raises(ValueError, match="axis=0 must be negative"):
        Rotated(inner, jnp.ones((4, 1), jnp.int8), 0)
