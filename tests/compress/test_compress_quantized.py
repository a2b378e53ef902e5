"""Integer codes: literal arrays, a scalar rounding, and what goes through the leaf without becoming dense."""

import functools
import inspect
import itertools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import compress
from jaxopt_lab.compress import Quantized
from jaxopt_lab.compress.arrays import affine
from jaxopt_lab.core import tree


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


def test_symmetric_codes_are_those_worked_by_hand():
    # Column 0: absmax 2.54, scale 0.02; 0.05 / 0.02 = 2.5 rounds to even. Column 1 is all zero. Column 2: absmax 127, scale 1.
    w = jnp.array([[2.54, 0.0, 0.5], [-0.02, 0.0, -127.0], [0.0, -0.0, 1.5], [1.0, 0.0, 2.5]])
    leaf = compress.quantize({"kernel": w})["kernel"]
    np.testing.assert_allclose(leaf.scale, [[0.02, 1.0, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(leaf.codes, [[127, 0, 0], [-1, 0, -127], [0, 0, 2], [50, 0, 2]])
    np.testing.assert_allclose(leaf.materialise(), [[2.54, 0, 0], [-0.02, 0, -127], [0, 0, 2], [1, 0, 2]], rtol=1e-6)


def test_asymmetric_codes_are_those_worked_by_hand():
    # Column 0 spans [0, 2.55]: scale 0.01, zero at -128. Column 1 spans [-127, 128]: scale 1, zero at -1. Column 2 lies above 0.
    w = jnp.array([[0.0, -127.0, 25.5], [2.55, 128.0, 20.0], [1.0, 0.0, 0.0], [0.014, 0.4, 10.0]])
    leaf = compress.quantize({"kernel": w}, symmetric=False)["kernel"]
    np.testing.assert_allclose(leaf.scale, [[0.01, 1.0, 0.1]], rtol=1e-6)
    np.testing.assert_array_equal(leaf.zero_point, [[-128, -1, -128]])
    np.testing.assert_array_equal(leaf.codes, [[-128, -128, 127], [127, 127, 72], [-28, -1, -128], [-127, -1, -28]])
    assert leaf.materialise()[2, 1] == 0
    assert leaf.materialise()[0, 0] == 0


@pytest.mark.parametrize("axis", [-1, pytest.param(0, marks=pytest.mark.slow), (0, 2), pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_equal_a_scalar_reimplementation_within_one_code(axis, symmetric):
    w = np.asarray(_normal(3, 4, 5)) + 0.3
    leaf = compress.quantize({"kernel": jnp.asarray(w)}, axis=axis, symmetric=symmetric)["kernel"]
    channels = affine.channel_axes(axis, 3)
    assert leaf.scale.shape == tuple(n if a in channels else 1 for a, n in enumerate(w.shape))
    for index in np.ndindex(*w.shape):
        group = [float(w[j]) for j in np.ndindex(*w.shape) if all(j[a] == index[a] for a in channels)]
        if symmetric:
            scale, zero = max(abs(v) for v in group) / 127, 0
        else:
            scale = (max(*group, 0) - min(*group, 0)) / 255
            zero = round(-128 - min(*group, 0) / scale)
        assert abs(int(leaf.codes[index]) - (round(float(w[index]) / scale) + zero)) <= 1
        assert abs(float(leaf.materialise()[index]) - w[index]) <= scale * 0.5001 + 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zeros_stay_exact_zeros_and_nothing_is_nan(symmetric, dtype):
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    w = jnp.where(_normal(16, 6) > 0, _normal(16, 6, seed=1), 0).astype(dtype).at[:, 0].set(0).at[:, 1].set(smallest)
    w = w.at[0, 2].set(jnp.finfo(dtype).max).at[1, 2].set(jnp.finfo(dtype).min)
    leaf = compress.quantize({"kernel": w}, symmetric=symmetric)["kernel"]
    dense = leaf.materialise()
    assert dense.dtype == dtype
    assert bool((dense[w == 0] == 0).all())
    assert bool(jnp.isfinite(dense[:, jnp.array([0, 1, 3, 4, 5])]).all())
    assert not bool(jnp.isnan(dense).any())


def test_quantising_twice_changes_nothing():
    leaf = compress.quantize({"kernel": _normal(8, 4)})["kernel"]
    again = compress.quantize({"kernel": leaf.materialise()})["kernel"]
    np.testing.assert_array_equal(again.codes, leaf.codes)


def test_quantize_and_decompress_work_under_jit_and_vmap():
    w = _normal(3, 8, 4)
    one = [compress.decompress(compress.quantize({"kernel": v}))["kernel"] for v in w]
    many = jax.jit(jax.vmap(lambda v: compress.decompress(compress.quantize({"kernel": v}))["kernel"]))(w)
    np.testing.assert_allclose(many, jnp.stack(one), rtol=1e-6)


def test_a_mask_on_the_weight_survives():
    w = _normal(8, 4) * (_normal(8, 4, seed=3) > 1)
    for symmetric in (True, False):
        stored = compress.quantize({"kernel": w}, symmetric=symmetric)
        assert bool((compress.decompress(stored)["kernel"][w == 0] == 0).all())


def test_bytes_are_what_is_stored():
    stored = compress.quantize({"kernel": jnp.ones((10, 4)), "bias": jnp.ones(4)}, where="kernel")
    assert tree.nbytes(stored) == 40 + 4 * 4 + 4 * 4
    rows = compress.summary(stored, {"kernel": jnp.ones((10, 4)), "bias": jnp.zeros(4)})
    assert rows["kernel"][:5] == ("int8 per channel 1", (10, 4), 56, 160, 0.0)
    assert rows["bias"][:5] == ("float32", (4,), 16, 16, 1.0)
    with pytest.raises(ValueError, match=r"reference has other paths than params; first of 1: bias"):
        compress.summary(stored, {"kernel": jnp.ones((10, 4))})


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"bits=0: codes have 1 to 8 bits", lambda p: compress.quantize(p, bits=0)),
        (ValueError, r"bits=9: codes have 1 to 8 bits", lambda p: compress.quantize(p, bits=9)),
        (ValueError, r"bits=4.0: codes have 1 to 8 bits", lambda p: compress.quantize(p, bits=4.0)),
        (ValueError, r"a/kernel of shape \(4, 2\): bits has no entry for it", lambda p: compress.quantize(p, bits={"b/kernel": 4})),
        (
            ValueError,
            r"a/kernel of shape \(4, 2\): group=\(3, -2\): groups of 3 do not divide axis -2, which has 4",
            lambda p: compress.quantize(p, group=3),
        ),
        (
            ValueError,
            r"a/kernel of shape \(4, 2\): group=\(2, 1\) names no axis",
            lambda p: compress.quantize(p, group=(2, 1)),
        ),
        (ValueError, r"a/kernel of shape \(4, 2\): group=\(0, 0\): groups of 0 do", lambda p: compress.quantize(p, group=(0, 0))),
        (
            ValueError,
            r"a/kernel of shape \(3,\): swapped=True exchanges two axes; it has fewer",
            lambda p: compress.quantize({"a": {"kernel": jnp.ones(3)}}, swapped=True),
        ),
        (TypeError, r"a/kernel has dtype int32; only floating", lambda p: compress.quantize({"a": {"kernel": jnp.arange(3)}})),
        (TypeError, r"a/kernel has dtype key<fry>;", lambda p: compress.quantize({"a": {"kernel": jax.random.key(0)}})),
        (TypeError, r"a/kernel is compressed already, as Quantized", lambda p: compress.quantize(compress.quantize(p))),
        (
            ValueError,
            r"nothing matches where='\*\*/kernal'; the nearest.*a/kernel",
            lambda p: compress.quantize(p, where="**/kernal"),
        ),
        (ValueError, r"a/kernel of shape \(4, 2\): axis=2 does not", lambda p: compress.quantize(p, axis=2)),
        (ValueError, r"a/kernel of shape \(4, 2\): axis=\(0, -2\) does", lambda p: compress.quantize(p, axis=(0, -2))),
        (ValueError, r"a/kernel of shape \(\): axis=-1 does", lambda p: compress.quantize({"a": {"kernel": 1.0}})),
        (
            ValueError,
            r"a/kernel of shape \(2,\) holds NaN",
            lambda p: compress.quantize({"a": {"kernel": jnp.array([1, jnp.nan])}}),
        ),
        (ValueError, r"codes \(4, 2\) need a scale of", lambda p: Quantized(jnp.ones((4, 2), jnp.int8), jnp.ones((3, 1)))),
    ],
)
def test_errors_are_one_line_and_name_the_leaf(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call({"a": {"kernel": jnp.ones((4, 2))}})
    assert "\n" not in str(caught.value)


# Weights, and what torch gives for them by its documented formulas, with one scale.
ORACLES = [
    # torchao: choose_qparams_affine with SYMMETRIC mapping (scale = absmax / ((qmax - qmin) / 2)), then quantize_affine.
    (8, True, [1.0, -0.5, 0.25, 0.1, -1.0, 0.0], [127, -64, 32, 13, -128, 0]),
    (4, True, [1.0, -0.5, 0.25, 0.1, -1.0, 0.0], [7, -4, 2, 1, -8, 0]),
    (2, True, [1.0, -0.5, 0.25, 0.1, -1.0, 0.0], [1, -1, 0, 0, -2, 0]),
    # torch.ao.quantization.MinMaxObserver(per_tensor_affine), then torch.quantize_per_tensor.
    (8, False, [-1.0, 0.0, 0.55, 1.55, -0.333, 0.777], [-128, -28, 27, 127, -61, 50]),
    (4, False, [-1.0, 0.0, 0.55, 2.0, -0.333, 0.777], [-8, -3, 0, 7, -5, 1]),
]


@pytest.mark.parametrize(("bits", "symmetric", "w", "codes"), ORACLES)
def test_codes_lie_within_one_of_torchs(bits, symmetric, w, codes):
    leaf = compress.quantize({"kernel": jnp.array(w)[:, None]}, bits, None, symmetric)["kernel"]
    assert np.abs(np.asarray(leaf.signed_codes())[:, 0] - np.array(codes)).max() <= 1
    assert leaf.materialise()[w.index(0.0), 0] == 0


@functools.cache
def _every_width(symmetric):
    """A weight with a zero, and for each number of bits its leaf with groups, its codes and its dense self: one program."""
    w = np.asarray(_normal(6, 3)) + 0.2
    w[2, 1] = 0

    @jax.jit
    def run(w):
        leaves = [compress.quantize({"kernel": w}, bits, symmetric=symmetric, group=2)["kernel"] for bits in range(1, 9)]
        return [(leaf, leaf.signed_codes(), leaf.materialise()) for leaf in leaves]

    return w, run(w)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_narrow_codes_with_groups_equal_a_scalar_reimplementation(bits, symmetric):
    w, widths = _every_width(symmetric)
    leaf, codes, dense = widths[bits - 1]
    codes, dense = np.asarray(codes), np.asarray(dense)
    assert leaf.scale.shape == (3, 3)
    assert leaf.format() == f"int{bits} per channel 1, groups of 2 along 0" + ("" if symmetric else ", asymmetric")
    least, largest = affine.code_range(bits, symmetric)
    assert codes.min() >= least
    assert codes.max() <= largest
    for i, j in np.ndindex(6, 3):
        group = [float(w[k, j]) for k in range(6) if k // 2 == i // 2]
        if bits == 1 and symmetric:
            step, code, zero = sum(abs(v) for v in group) / 2, -1 if w[i, j] < 0 else 1, 0
        elif symmetric:
            step, zero = max(abs(v) for v in group) / (2 ** (bits - 1) - 1), 0
            code = round(float(w[i, j]) / step)
        else:
            step = (max(*group, 0) - min(*group, 0)) / (2**bits - 1)
            zero = round(-(2 ** (bits - 1)) - min(*group, 0) / step)
            code = min(max(round(float(w[i, j]) / step) + zero, least), largest)
        assert abs(int(codes[i, j]) - code) <= (0 if bits == 1 and symmetric else 1)
        np.testing.assert_allclose(dense[i, j], step * (int(codes[i, j]) - zero), rtol=1e-5, atol=1e-6)
    assert (symmetric and bits == 1) or dense[2, 1] == 0


def test_one_bit_is_the_sign_times_the_mean_size():
    w = jnp.array([[1.0, 0.0], [-3.0, 0.0], [0.5, -0.0], [-0.5, 0.0]])
    leaf = compress.quantize({"kernel": w}, bits=1)["kernel"]
    np.testing.assert_array_equal(leaf.signed_codes(), [[1, 1], [-1, 1], [1, 1], [-1, 1]])
    np.testing.assert_array_equal(leaf.materialise(), [[1.25, 0], [-1.25, 0], [1.25, 0], [-1.25, 0]])
    assert tree.nbytes(leaf.codes) == 2  # a byte a column: four bits and their padding


@pytest.mark.parametrize(("bits", "nbytes"), [(1, 16), (2, 32), (3, 48), (4, 64), (5, 80), (6, 96), (7, 112), (8, 128)])
def test_narrow_codes_take_as_many_bits_as_they_have(bits, nbytes):
    stored = jax.eval_shape(functools.partial(compress.quantize, bits=bits), {"kernel": jnp.ones((16, 8))})
    assert tree.nbytes(stored["kernel"].codes) == nbytes


@pytest.mark.slow
def test_the_error_falls_with_bits_with_channels_and_with_groups():
    w = _normal(64, 16) * jnp.exp(_normal(1, 16, seed=1)) * jnp.where(_normal(64, 16, seed=2) > 2, 4, 1)

    def error(*args, **kwargs):
        return float(jnp.mean(jnp.square(compress.quantize({"kernel": w}, *args, **kwargs)["kernel"].materialise() - w)))

    for symmetric in (True, False):
        by_bits = [error(bits, symmetric=symmetric) for bits in range(2, 9)]
        assert all(more < fewer for fewer, more in itertools.pairwise(by_bits))
    assert error(4) < error(4, None)
    assert error(4, group=16) < error(4)
    assert error(4, group=8) < error(4, group=32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, (16, 0)])
def test_the_clipped_range_of_least_error_is_no_worse_than_the_whole(symmetric, group):
    w = _normal(64, 8).at[3, 2].set(6.0)
    choose = affine.mse_scale if symmetric else affine.mse_scale_and_zero

    @functools.partial(jax.jit, static_argnums=0)
    def errors(scale, w):
        leaf = compress.quantize({"kernel": w}, 4, symmetric=symmetric, group=group, scale=scale)["kernel"]
        squares = jnp.square(leaf.materialise() - w).reshape(leaf.scale.shape[0], -1, 8)
        return jnp.sum(squares, axis=1), leaf

    (whole, _), (clipped, leaf) = errors(None, w), errors(choose, w)
    assert (clipped <= whole * (1 + 1e-6)).all()
    assert clipped.sum() < 0.95 * whole.sum()
    # A scalar search over the same grid finds nothing better in the column with the outlier.
    if symmetric and group is None:
        column, start = np.asarray(w[:, 2]), float(np.abs(w[:, 2]).max() / 7)
        tried = [start * (1 - 0.8 * i / 79) for i in range(80)]
        found = [np.square(np.clip(np.round(column / s), -7, 7) * s - column).sum() for s in tried]
        np.testing.assert_allclose(clipped[0, 2], min(found), rtol=1e-4)
        np.testing.assert_allclose(leaf.scale[0, 2], tried[int(np.argmin(found))], rtol=1e-5)
        # Tiny weights are clipped as large ones are, though their squares underflow.
        np.testing.assert_allclose(errors(choose, w * 1e-30)[1].scale * 1e30, leaf.scale, rtol=1e-4)


def test_bits_follow_the_range_of_each_weight():
    even, wide = _normal(64, 4), _normal(64, 4).at[0].set(60.0)
    params = {"even": {"kernel": even}, "wide": {"kernel": wide}, "bias": jnp.ones(3)}
    chosen = compress.bits_for_range(params, 0.05)
    assert list(chosen) == ["even/kernel", "wide/kernel"]
    assert chosen["even/kernel"] < chosen["wide/kernel"]
    for path, bits in chosen.items():
        w = tree.selected(params, path)[path]

        def relative(bits, w=w):
            error = compress.quantize({"kernel": w}, bits)["kernel"].materialise() - w
            return float(jnp.linalg.norm(error) / jnp.linalg.norm(w))

        assert relative(bits) <= 0.05 < relative(bits - 1)
    stored = compress.quantize(params, bits=chosen)
    assert {path: leaf.bits for path, leaf in tree.selected(stored, "**/kernel").items()} == chosen
    assert compress.bits_for_range({"kernel": jnp.zeros((2, 2))}, 0.01, "kernel") == {"kernel": 1}
    with pytest.raises(ValueError, match=r"even/kernel of shape \(64, 4\): 8 bits leave a relative error of .*above error=1e-05"):
        compress.bits_for_range(params, 1e-5)
    with pytest.raises(ValueError, match=r"error=0 must be positive"):
        compress.bits_for_range(params, 0)


def test_every_layout_of_a_product_equals_the_dense_one():
    # (x, w, dimension_numbers): kernel right and left, (out, in) layout, several contracted axes, batch axes on both sides.
    cases = [
        (_normal(3, 4), _normal(4, 5), (((1,), (0,)), ((), ()))),
        (_normal(3, 4), _normal(5, 4), (((1,), (1,)), ((), ()))),
        (_normal(3, 2, 4), _normal(2, 4, 5), (((1, 2), (0, 1)), ((), ()))),
        (_normal(2, 3, 4), _normal(2, 4, 5), (((2,), (1,)), ((0,), (0,)))),
        (_normal(3, 2, 4), _normal(4, 6, 2, 5), (((2,), (0,)), ((1,), (2,)))),
        (_normal(4), _normal(4), (((0,), (0,)), ((), ()))),
    ]
    for case, (x, w, numbers) in enumerate(cases):
        flipped = (numbers[0][::-1], numbers[1][::-1])
        variants = [{"axis": None}, {"axis": 0, "symmetric": False}, {"bits": 4}, {"axis": tuple({0, w.ndim - 1}), "bits": 3}]
        if w.ndim > 1:
            even = next(a for a in range(w.ndim) if w.shape[a] % 2 == 0)
            variants += [{"bits": 4, "axis": None, "group": (2, even)}, {"swapped": True, "symmetric": False}]
            variants += [{"axis": 0, "swapped": True, "bits": 2}]
        # Four of them in turn.
        variants = [variants[(case + k) % len(variants)] for k in range(4)]

        def right(w, x, numbers=numbers):
            return lax.dot_general(x, w, numbers)

        def left(w, x, numbers=flipped):
            return lax.dot_general(w, x, numbers)

        @jax.jit
        def pairs(w, x, fns=(right, left), variants=variants):
            stored = [compress.quantize({"kernel": w}, **variant)["kernel"] for variant in variants]
            return [(compress.lift(fn)(leaf, x), fn(leaf.materialise(), x)) for leaf in stored for fn in fns]

        for got, want in pairs(w, x):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_product_runs_on_the_codes_where_it_can():
    def operands(axis):
        stored = compress.quantize({"kernel": _normal(4, 5)}, axis=axis)["kernel"]
        text = str(jax.make_jaxpr(compress.lift(lambda w, x: x @ w))(stored, _normal(3, 4)))
        return text.index(" dot_general") < text.index(" mul ")

    assert operands(-1)
    assert operands(None)
    assert not operands(0), "a scale along the contracted axis has to be multiplied in first"


def test_half_precision_does_not_overflow():
    w = jnp.ones((2048, 2), jnp.float16)
    stored = compress.quantize({"kernel": w})
    x = jnp.ones((1, 2048), jnp.float16)
    np.testing.assert_allclose(compress.lift(lambda p, x: x @ p["kernel"])(stored, x), x @ w, rtol=2e-3)


@pytest.mark.parametrize(
    ("spec", "shape", "axis"),
    [
        (("NHWC", "HWIO", "NHWC"), (3, 3, 2, 5), -1),
        (("NCHW", "OIHW", "NCHW"), (5, 2, 3, 3), 0),
        (("NCHW", "OIHW", "NHWC"), (5, 2, 3, 3), 1),
    ],
)
def test_convolutions_read_their_layout(spec, shape, axis):
    x = _normal(2, 2, 6, 6) if spec[0] == "NCHW" else _normal(2, 6, 6, 2)

    def convolve(w, x):
        return lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=spec)

    @jax.jit
    def both(w, x):
        stored = [compress.quantize({"kernel": w}, axis=axis, symmetric=symmetric)["kernel"] for symmetric in (True, False)]
        return [(compress.lift(convolve)(leaf, x), convolve(leaf.materialise(), x)) for leaf in stored]

    for got, want in both(_normal(*shape), x):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("axis", "symmetric"),
    [(None, False), (0, True), (1, False), ((0, 1), True)]
    + [pytest.param(a, y, marks=pytest.mark.slow) for a, y in [(None, True), (0, False), (1, True), ((0, 1), False)]],
)
def test_look_ups_equal_those_of_the_dense_table(axis, symmetric):
    stored = compress.quantize({"kernel": _normal(5, 4)}, axis=axis, symmetric=symmetric)["kernel"]
    outside = jnp.array([[0, 4], [-1, 7]])
    reads = (
        lambda w: jnp.take(w, outside, axis=0),
        lambda w: jnp.take(w, outside, axis=0, mode="clip"),
        lambda w: jnp.take(w, outside, axis=0, fill_value=2.0),
        lambda w: jnp.take(w, outside, axis=1),
        lambda w: w[outside],
        lambda w: w[outside[0], outside[1]],
        lambda w: w[2],
        lambda w: w[1:3, ::2],
    )
    for got, want in jax.jit(lambda w: [(compress.lift(read)(w), read(w.materialise())) for read in reads])(stored):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_reshaping_keeps_the_leaf_where_the_scales_allow_it():
    kept = []

    def record(w, fn):
        kept.append(isinstance(getattr(out := fn(w), "value", out), Quantized))
        return out

    stored = jax.jit(functools.partial(compress.quantize, symmetric=False))({"kernel": _normal(2, 3, 4)})["kernel"]
    for fn, stays in [
        (lambda w: w.reshape(6, 4), True),
        (lambda w: w.reshape(6, 2, 2), True),
        (lambda w: w.reshape(2, 12), False),
        (lambda w: w.reshape(1, 2, 3, 1, 4), True),
        (lambda w: w.reshape(-1), False),
        (lambda w: w.transpose(2, 0, 1), True),
        (lambda w: w[None], True),
        (lambda w: jnp.broadcast_to(w, (5, 2, 3, 4)), True),
        (lambda w: w.astype(jnp.bfloat16), True),
        (lambda w: w.astype(jnp.int32), False),
        (lambda w: w * 2, False),
    ]:
        out = compress.lift(lambda w, fn=fn: record(w, fn))(stored)
        want = fn(stored.materialise())
        assert out.dtype == want.dtype
        np.testing.assert_array_equal(out, want)
        assert kept.pop() == stays


def test_lift_of_a_plain_tree_is_the_same_program():
    apply = lambda p, x: jnp.tanh(x @ p["kernel"])  # noqa: E731
    params, x = {"kernel": _normal(4, 5)}, _normal(3, 4)
    assert str(jax.make_jaxpr(compress.lift(apply))(params, x)) == str(jax.make_jaxpr(apply)(params, x))


def test_lift_through_scan_remat_cond_and_trace():
    @jax.custom_vjp
    def scaled(w):
        return w * 3

    scaled.defvjp(lambda w: (scaled(w), None), lambda _, g: (g * 7,))

    def apply(p, x):
        h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ p["kernel"]), None), x, length=2)
        h = jax.checkpoint(lambda h, w: jnp.sin(h @ w))(h, p["kernel"])
        h = lax.cond(h.sum() > 0, lambda h: h @ p["kernel"], lambda h: h, h)
        h = lax.fori_loop(0, 2, lambda _, h: h @ p["kernel"], h)
        return h @ scaled(p["kernel"]) + jax.nn.relu(p["kernel"]).sum()

    stored = compress.quantize({"kernel": _normal(4, 4), "bias": jnp.ones(4)}, where="kernel")
    dense, x = compress.decompress(stored), _normal(3, 4)

    def value_and_grads(fn):
        return jax.jit(jax.value_and_grad(lambda x, p: jnp.sum(jnp.sin(fn(p, x))), argnums=(0, 1), allow_int=True))

    np.testing.assert_allclose(jax.jit(compress.lift(apply))(stored, x), apply(dense, x), rtol=1e-4, atol=1e-4)

    def apply_straight(p, x):
        h = jax.checkpoint(lambda h, w: jnp.sin(h @ w))(x, p["kernel"]) @ scaled(p["kernel"])
        h, _ = lax.scan(lambda h, _: (scaled(h) * jax.nn.relu(p["kernel"]).sum(), None), h, length=2)
        return jax.jit(scaled)(h)

    value, grads = value_and_grads(compress.lift(apply_straight))(x, stored)
    want, want_grads = value_and_grads(apply_straight)(x, dense)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    np.testing.assert_allclose(grads[0], want_grads[0], rtol=1e-3, atol=1e-4)
    projected = jnp.sum(want_grads[1]["kernel"] * stored["kernel"].codes, axis=0, keepdims=True)
    np.testing.assert_allclose(grads[1]["kernel"].scale, projected, rtol=1e-3, atol=1e-2)


def test_lift_of_functions_with_derivatives_of_their_own_that_close_over_weights():
    def apply(p, x):
        @jax.custom_jvp
        def product(h):
            return triple(h @ p["kernel"])

        @jax.custom_vjp
        def triple(h):
            return h * 3 + p["kernel"].sum(0, keepdims=True)

        product.defjvp(lambda primals, tangents: (product(*primals), 5 * tangents[0] @ p["kernel"]))
        triple.defvjp(lambda h: (triple(h), None), lambda _, g: (g * 7,))
        return triple(product(triple(x)))

    stored = compress.quantize({"kernel": _normal(4, 4), "bias": jnp.ones(4)}, where="kernel")
    dense, x = compress.decompress(stored), 0.1 * _normal(3, 4)

    def value_and_grad(fn, params):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(fn(params, x))))(x)

    for got, want in zip(value_and_grad(compress.lift(apply), stored), value_and_grad(apply, dense), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("jit", [False, True])
def test_lift_in_loops_and_branches_keeps_the_leaf_where_it_can(jit: bool):
    seen = []

    class Watched(compress.Quantized):
        def dot_general(self, x, **params):
            seen.append(x.shape)
            return super().dot_general(x, **params)

    def apply(p, x):
        w = p["kernel"]
        x = lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=2)[0]
        x = lax.while_loop(lambda h: (h @ w).sum() > 1e9, lambda h: h @ w, x)
        x = lax.cond(x.sum() > 0, lambda h, w: h @ w, lambda h, w: h @ w.T, x, w)
        # Carried along, chosen, and scanned over row by row: dense at those places, and right.
        x, w = lax.fori_loop(0, 2, lambda _, c: (c[0] @ c[1], c[1] * 0.5), (x, w))
        w = lax.cond(x.sum() > 0, lambda w: w, lambda w: w * 2, p["kernel"]) + w
        _, rows = lax.scan(lambda c, row: (c, row * 2), 0, p["kernel"])
        return jax.jit(lambda x, w: x @ w)(x, w) + rows.sum()

    stored = compress.quantize({"kernel": _normal(4, 4)})
    watched = {"kernel": Watched(**vars(stored["kernel"]))}
    x = _normal(3, 4)
    lifted = jax.jit(compress.lift(apply)) if jit else compress.lift(apply)
    np.testing.assert_allclose(lifted(watched, x), apply(compress.decompress(stored), x), rtol=1e-4, atol=1e-5)
    assert len(set(seen)) == 1
    assert len(seen) >= 5  # in the scan, in condition and body of the loop, in both branches


def test_quax_itself_is_left_as_it_is():
    """Other users of quax in the process see it unchanged: nothing in its modules and classes comes from this package."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "quax"]
    owners = [*modules, *(thing for module in modules for thing in vars(module).values() if inspect.isclass(thing))]
    things = [thing for owner in owners for thing in vars(owner).values()]
    assert len(things) > 100
    assert not [thing for thing in things if str(getattr(thing, "__module__", "")).startswith("jaxopt_lab")]


def test_layers_stacked_for_a_scan_keep_a_scale_each():
    stored = compress.quantize({"kernel": _normal(3, 4, 4)}, axis=(0, -1))
    apply = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["kernel"])[0]  # noqa: E731
    x = _normal(2, 4)
    np.testing.assert_allclose(compress.lift(apply)(stored, x), apply(compress.decompress(stored), x), rtol=1e-5, atol=1e-6)


def test_batch_statistics_and_dropout_train_through_a_lifted_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(x))

    x, rngs = _normal(8, 3), {"dropout": jax.random.key(1)}
    variables = Net().init({"params": jax.random.key(0), **rngs}, x)
    stored = compress.quantize(variables)
    apply = lambda v, x: Net().apply(v, x, rngs=rngs, mutable=["batch_stats"])  # noqa: E731
    got, want = jax.jit(compress.lift(apply))(stored, x), apply(compress.decompress(stored), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    assert jax.tree.structure(got) == jax.tree.structure(want)


def test_whole_trees_come_out_dense():
    stored = compress.quantize({"kernel": _normal(4, 2)})
    out = compress.lift(lambda p: p)(stored)
    np.testing.assert_array_equal(out["kernel"], stored["kernel"].materialise())


def test_pmap_and_shards_along_the_channels():
    stored = compress.quantize({"kernel": _normal(4, 16)})
    x = _normal(8, 3, 4)
    want = x @ stored["kernel"].materialise()[None]
    got = jax.pmap(compress.lift(lambda p, x: x @ p["kernel"]), in_axes=(None, 0))(stored, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    by_channel = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), PartitionSpec(None, "d"))
    placed = jax.device_put(stored, by_channel)
    run = jax.jit(compress.lift(lambda p, x: x @ p["kernel"])).lower(placed, x[0]).compile()
    np.testing.assert_allclose(run(placed, x[0]), want[0], rtol=1e-5, atol=1e-5)
    assert "all-gather" not in run.as_text()


def test_an_nnx_state_keeps_its_kind():
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    stored = compress.quantize(state)
    assert isinstance(stored, nnx.State)
    assert tree.paths(stored) == ["bias", "kernel"]
    assert tree.is_compressed(tree.selected(stored, "kernel")["kernel"])
