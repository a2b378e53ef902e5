"""Integer products: literal sums, a scalar reimplementation, the product of what was rounded, and gradients that pass by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxopt_lab import compress
from jaxopt_lab.compress import DynamicQuantized, Quantized, StaticQuantized, dynamic, quantize, static
from jaxopt_lab.core import tree


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


def _times(p, x):
    return x @ p["kernel"]


def _rounded_by_row(x, rows):
    """What int8 makes of activations, each index of the axes `rows` by itself."""
    scale = np.abs(x).max(axis=tuple(a for a in range(x.ndim) if a not in rows), keepdims=True) / 127
    return np.round(x / scale) * scale


def _rounded_in_range(x, low, high):
    scale = (max(high, 0) - min(low, 0)) / 255
    zero = np.round(-128 - min(low, 0) / scale)
    return (np.clip(np.round(x / scale) + zero, -128, 127) - zero) * scale


LEAVES = {
    "dynamic": dynamic,
    "static": lambda p: static(p, dict.fromkeys(tree.paths(p), (-1.5, 2.0))),
    "static, symmetric": lambda p: static(p, dict.fromkeys(tree.paths(p), (-2.0, 1.5)), symmetric=True),
}
_LEAVES = ["dynamic", "static", pytest.param("static, symmetric", marks=pytest.mark.slow)]
ROUNDED = {
    "dynamic": _rounded_by_row,
    "static": lambda x, rows: _rounded_in_range(x, -1.5, 2.0),
    "static, symmetric": lambda x, rows: np.clip(np.round(x / (2 / 127)), -127, 127) * (2 / 127),
}


@pytest.mark.slow
def test_sums_are_those_worked_by_hand():
    # Codes of the weight 127, -64 (-63.5 to even) at scale 2 / 127; rows: scale 1 / 127, codes 127, 64 and scale 0.5, codes 0, 127.
    p = {"kernel": jnp.array([[2.0], [-1.0]])}
    x = jnp.array([[1.0, 0.5], [0.1, 63.5]])
    got = compress.lift(_times)(dynamic(p), x)
    np.testing.assert_allclose(got, [[(127 * 127 - 64 * 64) * 2 / 127 / 127], [(0 * 127 - 127 * 64) * 0.5 * 2 / 127]], rtol=1e-6)
    # The range [-1, 1.55] has scale 0.01 and the zero point -28; 9.0 is cut off at 1.55.
    stored = static(p, {"kernel": (-1.0, 1.55)})
    np.testing.assert_array_equal(stored["kernel"].input_zero, [[-28]])
    got = compress.lift(_times)(stored, jnp.array([[0.5, -0.25], [9.0, 0.0]]))
    np.testing.assert_allclose(got, [[(50 * 127 + 25 * 64) * 0.02 / 127], [155 * 127 * 0.02 / 127]], rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_product_equals_a_scalar_reimplementation(rows):
    w, x = np.asarray(_normal(5, 4)), np.asarray(_normal(rows, 5, seed=1))
    stored = dynamic({"kernel": jnp.asarray(w)})
    codes, scale = np.asarray(stored["kernel"].signed_codes()), np.abs(w).max(0) / 127
    got = jax.jit(compress.lift(_times))(stored, x)
    for i, j in np.ndindex(rows, 4):
        size = max(abs(float(v)) for v in x[i]) / 127
        total = sum(round(float(x[i, k]) / size) * int(codes[k, j]) for k in range(5))
        np.testing.assert_allclose(got[i, j], total * size * scale[j], rtol=1e-5)


# (x, w, dimension_numbers): kernel right, (out, in) layout, several summed axes, batch axes on both sides, no rows at all.
PRODUCTS = [
    ((3, 4), (4, 5), (((1,), (0,)), ((), ()))),
    ((3, 4), (5, 4), (((1,), (1,)), ((), ()))),
    ((2, 3, 4), (4, 6, 5), (((2,), (0,)), ((), ()))),
    ((3, 2, 4), (2, 4, 5), (((1, 2), (0, 1)), ((), ()))),
    ((3, 4, 2), (2, 4, 5), (((1, 2), (1, 0)), ((), ()))),
    ((2, 3, 4), (2, 4, 5), (((2,), (1,)), ((0,), (0,)))),
    ((4, 3, 2), (2, 5, 4), (((0,), (2,)), ((2,), (0,)))),
    ((4,), (4, 5), (((0,), (0,)), ((), ()))),
]


@pytest.mark.parametrize("name", _LEAVES)
def test_every_layout_of_a_product_is_that_of_what_was_rounded(name):
    for x_shape, w_shape, numbers in PRODUCTS:
        (summed, contract), (shared, batch) = numbers
        x, w = _normal(*x_shape, seed=3), _normal(*w_shape)
        own = next(a for a in reversed(range(w.ndim)) if a not in (*contract, *batch))

        @jax.jit
        def run(w, x, numbers=numbers, axis=(*batch, own)):
            stored = LEAVES[name](quantize({"kernel": w}, axis=axis))["kernel"]
            right = compress.lift(lambda w, x: lax.dot_general(x, w, numbers))
            left = compress.lift(lambda w, x: lax.dot_general(w, x, (numbers[0][::-1], numbers[1][::-1])))
            return right(stored, x), left(stored, x), stored.materialise()

        got, turned, dense = run(w, x)
        rounded = ROUNDED[name](np.asarray(x), [a for a in range(x.ndim) if a not in summed])
        np.testing.assert_allclose(got, lax.dot_general(jnp.asarray(rounded), dense, numbers), rtol=1e-5, atol=1e-5)
        # From the left the two groups of free axes have changed places.
        rows, batches = x.ndim - len(summed) - len(shared), len(batch)
        order = (*range(batches), *range(turned.ndim - rows, turned.ndim), *range(batches, turned.ndim - rows))
        np.testing.assert_allclose(turned.transpose(order), got, rtol=1e-6)


@pytest.mark.parametrize("name", _LEAVES)
@pytest.mark.parametrize("spec", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NHWC")])
def test_a_convolution_is_that_of_what_was_rounded(name, spec):
    channels_first = spec[0] == "NCHW"
    x = _normal(2, 4, 6, 6, seed=1) if channels_first else _normal(2, 6, 6, 4, seed=1)
    w = _normal(6, 2, 3, 3) if channels_first else _normal(3, 3, 2, 6)
    stored = jax.jit(lambda p: LEAVES[name](quantize(p, axis=0 if channels_first else -1)))({"kernel": w})["kernel"]

    def convolve(w, x):
        return lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=spec, feature_group_count=2)

    got, dense = jax.jit(lambda w, x: (compress.lift(convolve)(w, x), w.materialise()))(stored, x)
    rounded = jnp.asarray(ROUNDED[name](np.asarray(x), [0]), jnp.float32)
    # At the edges, too, where a zero point must not count what is padded.
    np.testing.assert_allclose(got, convolve(dense, rounded), rtol=1e-4, atol=1e-4)


def test_the_product_itself_runs_on_integers():
    stored = jax.jit(functools.partial(dynamic, where="*"))({"kernel": _normal(8, 4), "filters": _normal(3, 3, 2, 4)})
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def apply(p, x):
        return x.reshape(-1, 8) @ p["kernel"], lax.conv_general_dilated(x, p["filters"], (1, 1), "SAME", **numbers)

    text = str(jax.make_jaxpr(compress.lift(apply))(stored, _normal(2, 4, 4, 2)))
    assert text.count("preferred_element_type=int32") == 2
    assert "i8[4,8]" in text, "the summed axis is stored last"


@pytest.mark.parametrize("name", _LEAVES)
def test_the_gradient_is_that_of_the_dense_product(name):
    x, cotangent = _normal(3, 6, seed=1), _normal(3, 4, seed=2)
    stored = jax.jit(LEAVES[name])({"kernel": _normal(6, 4)})
    loss = lambda apply: lambda p, x: jnp.sum(apply(p, x) * cotangent)  # noqa: E731
    grads = jax.jit(jax.grad(loss(compress.lift(_times)), argnums=(0, 1), allow_int=True))(stored, x)
    dense = compress.decompress(stored)
    by_weight, by_input = jax.grad(loss(_times), argnums=(0, 1))(dense, x)
    inside = {"dynamic": jnp.full(x.shape, True), "static": (x > -1.5) & (x < 2.0), "static, symmetric": abs(x) < 2.0}[name]
    np.testing.assert_allclose(grads[1], by_input * inside, rtol=1e-5, atol=1e-6)
    if name == "dynamic":
        by_scale = jnp.sum(by_weight["kernel"] * stored["kernel"].signed_codes(), axis=0)
        np.testing.assert_allclose(grads[0]["kernel"].scale[:, 0], by_scale, rtol=1e-4, atol=1e-4)
    tangent = jax.jvp(lambda x: compress.lift(_times)(stored, x), (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_allclose(tangent, inside.astype(x.dtype) @ dense["kernel"], rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_convolution_is_that_of_the_dense_one():
    x, stored = _normal(2, 5, 5, 2, seed=1), jax.jit(dynamic)({"kernel": _normal(3, 3, 2, 4)})
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def loss(apply):
        cotangent = _normal(2, 5, 5, 4, seed=2)
        return lambda p, x: jnp.sum(apply(p, x) * cotangent)

    apply = lambda p, x: lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", **numbers)  # noqa: E731
    got = jax.jit(jax.grad(loss(compress.lift(apply)), argnums=1))(stored, x)
    want = jax.grad(loss(apply), argnums=1)(compress.decompress(stored), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_earlier_layers_train_through_it():
    params = {"first": _normal(4, 8), "kernel": _normal(8, 3, seed=1)}
    stored = dynamic(params, "kernel")
    x, y = _normal(16, 4, seed=2), _normal(16, 3, seed=3)

    def loss(p):
        return jnp.mean((compress.lift(lambda p, x: jnp.tanh(x @ p["first"]) @ p["kernel"])(p, x) - y) ** 2)

    step = jax.jit(lambda p: (loss(p), {**p, "first": p["first"] - 0.3 * jax.grad(lambda f: loss({**p, "first": f}))(p["first"])}))
    losses = []
    for _ in range(40):
        value, stored = step(stored)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", _LEAVES)
def test_the_error_is_small_and_rows_do_not_meet(name):
    x = jnp.clip(_normal(5, 64, seed=1), -1.5, 1.5)
    params = {"kernel": _normal(64, 16)}
    stored, lifted = jax.jit(LEAVES[name])(params), jax.jit(compress.lift(_times))
    got, want = lifted(stored, x), _times(params, x)
    assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.02
    # Alone, a row has another path to the same sums; so it has among others that are a thousand times larger.
    np.testing.assert_array_equal(lifted(stored, x[2:3]), got[2:3])
    np.testing.assert_array_equal(lifted(stored, x.at[0].mul(1000))[1:], got[1:])
    np.testing.assert_array_equal(jax.vmap(compress.lift(_times), (None, 0))(stored, x), got)


def test_rows_of_zeros_and_of_nothing_finite():
    lifted, stored = compress.lift(_times), dynamic({"kernel": _normal(4, 3)})
    x = jnp.array([[0.0, 0, 0, 0], [1, jnp.nan, 0, 0], [1, 2, 3, 4]])
    out = lifted(stored, x)
    assert bool((out[0] == 0).all())
    assert bool(jnp.isnan(out[1]).all())
    assert bool(jnp.isfinite(out[2]).all())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_in_and_out(dtype):
    w, x = _normal(2048, 4).astype(dtype), _normal(3, 2048, seed=1).astype(dtype)
    got = jax.jit(lambda w, x: compress.lift(_times)(dynamic({"kernel": w}), x))(w, x)
    want = x.astype(jnp.float32) @ w.astype(jnp.float32)
    assert got.dtype == dtype
    assert float(jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)) < 0.02


@pytest.mark.parametrize("name", _LEAVES)
def test_stacked_layers(name):
    make = jax.jit(LEAVES[name])
    layers = [make({"kernel": _normal(6, 6, seed=i)}) for i in range(3)]
    many, x = jax.tree.map(lambda *a: jnp.stack(a), *layers), _normal(2, 6, seed=9)
    lifted = compress.lift(_times)

    @jax.jit
    def everything(many, x):
        # Mapped outside and inside of `lift`, where it becomes a product with a batch axis, and scanned over.
        within = compress.lift(lambda p, x: jax.vmap(lambda w: x @ w)(p["kernel"]))
        return (
            jax.vmap(lifted, in_axes=(0, None))(many, x),
            within(many, x),
            lax.scan(lambda h, p: (jnp.tanh(lifted(p, h)), None), x, many)[0],
        )

    outside, within, scanned = everything(many, x)
    alone = jax.jit(lifted)
    want = jnp.stack([alone(layer, x) for layer in layers])
    np.testing.assert_allclose(outside, want, rtol=1e-6)
    np.testing.assert_allclose(within, want, rtol=1e-6)
    for layer in layers:
        x = jnp.tanh(alone(layer, x))
    np.testing.assert_allclose(scanned, x, rtol=1e-5, atol=1e-6)


def test_what_a_weight_was_before():
    w = _normal(8, 4)
    for bits in (4, 8):
        stored = quantize({"kernel": w}, bits)
        leaf = dynamic(stored)["kernel"]
        assert isinstance(leaf, DynamicQuantized)
        assert leaf.format() == f"int{bits} per channel 1, swapped, inputs int8 by row"
        np.testing.assert_array_equal(leaf.signed_codes(), stored["kernel"].signed_codes())
        np.testing.assert_array_equal(leaf.materialise(), stored["kernel"].materialise())
        fixed = static({"kernel": leaf}, {"kernel": (-1.0, 1.0), "elsewhere": (0.0, 1.0)})["kernel"]
        assert isinstance(fixed, StaticQuantized)
        np.testing.assert_array_equal(fixed.materialise(), leaf.materialise())
    # Weights of (out, in) are in the right order already.
    assert dynamic({"kernel": w}, axis=0)["kernel"].swapped is False
    traced = jax.jit(lambda w: dynamic({"kernel": w}))(w)["kernel"]
    np.testing.assert_array_equal(traced.signed_codes(), dynamic({"kernel": w})["kernel"].signed_codes())


def test_what_is_no_product_of_rows_runs_as_of_a_stored_weight():
    leaf = dynamic({"kernel": _normal(8, 4)})["kernel"]
    x, dense = _normal(3, 4), leaf.materialise()
    # Over the axis that carries the scales.
    np.testing.assert_allclose(compress.lift(lambda w, x: x @ w.T)(leaf, x), x @ dense.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(compress.lift(lambda w: jnp.take(w, jnp.array([3, 1]), axis=0))(leaf), dense[np.array([3, 1])])
    assert isinstance(leaf, Quantized)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"a/kernel of shape \(4, 2\): it has a zero point", lambda p: dynamic(quantize(p, symmetric=False))),
        (ValueError, r"a/kernel of shape \(4, 2\): it has groups", lambda p: dynamic(quantize(p, group=2))),
        (TypeError, r"a/kernel is compressed already, as Float8", lambda p: dynamic(compress.quantize_float(p))),
        (TypeError, r"a/kernel has dtype int32; only floating", lambda p: dynamic({"a": {"kernel": jnp.arange(3)}})),
        (ValueError, r"a/kernel of shape \(4, 2\): axis=2 does not", lambda p: dynamic(p, axis=2)),
        (ValueError, r"nothing matches where='b'", lambda p: dynamic(p, "b")),
        (ValueError, r"a/kernel of shape \(4, 2\): ranges has no entry", lambda p: static(p, {"b/kernel": (0, 1)})),
        (ValueError, r"a/kernel of shape \(4, 2\): ranges gives \(1, 0\); a range", lambda p: static(p, {"a/kernel": (1, 0)})),
        (ValueError, r"ranges gives \(0.0, inf\); a range is two", lambda p: static(p, {"a/kernel": (0.0, np.inf)})),
        (
            ValueError,
            r"DynamicQuantized needs symmetric codes",
            lambda p: DynamicQuantized(jnp.ones((2, 2), jnp.int8), jnp.ones((1, 1)), jnp.zeros((1, 1), jnp.int8)),
        ),
    ],
)
def test_errors_are_one_line_and_name_the_leaf(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call({"a": {"kernel": jnp.ones((4, 2))}})
    assert "\n" not in str(caught.value)
