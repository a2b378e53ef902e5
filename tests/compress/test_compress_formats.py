"""Packed codes, eight-bit floats, normal floats, and what every format of levels times scales does without becoming dense."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import compress
from jaxopt_lab.checkpoint.manifest import describe, rebuild
from jaxopt_lab.compress import NormalFloat, Quantized, quantize, quantize_float, quantize_normal
from jaxopt_lab.compress.arrays import affine, float8, normal_float, packing
from jaxopt_lab.compress.leaves import product
from jaxopt_lab.core import tree

FORMATS = {
    "int8": quantize,
    "int4": functools.partial(quantize, bits=4),
    "int4 in groups": functools.partial(quantize, bits=4, group=4),
    "int3 in groups, asymmetric": functools.partial(quantize, bits=3, symmetric=False, group=4),
    "int1": functools.partial(quantize, bits=1),
    "int4 swapped": functools.partial(quantize, bits=4, swapped=True, group=4),
    "int4 for (out, in)": functools.partial(quantize, bits=4, axis=0, group=4),
    "e4m3": quantize_float,
    "e5m2 per tensor": functools.partial(quantize_float, dtype=jnp.float8_e5m2, axis=None),
    "NF4": functools.partial(quantize_normal, block=8),
}


# Three formats that differ in all that matters always; the others with `scripts/test -m slow`.
_ALWAYS = ("int3 in groups, asymmetric", "int4 swapped", "e4m3")
_FORMATS = [pytest.param(name, marks=() if name in _ALWAYS else pytest.mark.slow) for name in FORMATS]


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


def _stored(name: str, *shape: int):
    return jax.jit(FORMATS[name])({"kernel": _normal(*shape)})["kernel"]


# Packing.


def test_bytes_are_those_worked_by_hand():
    # Four bits, two to a byte, the first below: 1 + 16 * 15, 2 + 16 * 0. One bit: 0b0101. Three bits are two planes.
    assert packing.pack(jnp.array([1, 15, 2]), 4).planes[0].tolist() == [241, 2]
    assert packing.pack(jnp.array([1, 0, 1]), 1).planes[0].tolist() == [5]
    two, one = packing.pack(jnp.array([5, 3, 6]), 3).planes
    assert (two.tolist(), one.tolist()) == ([0b101101], [0b101])


@pytest.mark.parametrize("bits", range(1, 8))
def test_packing_round_trips_along_every_axis(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (16, 5, 3)).astype(np.uint8)

    @jax.jit
    def back(codes):
        packed = [packing.pack(codes, bits, axis) for axis in (0, 1, 2)]
        halves = [packing.strip(packed[0], i, 2, 8) for i in range(2)]
        turned = packing.moved(packed[1], lambda plane: plane.transpose(2, 0, 1), (1, 2, 0))
        taken = packing.take(packed[0], jnp.array([9, 0, 9]), lambda plane, i: plane[i], lambda x: x[:, None, None])
        return [packing.unpack(p) for p in packed], [packing.unpack(half) for half in halves], packing.unpack(turned), taken

    whole, halves, turned, taken = back(codes)
    for got in whole:
        np.testing.assert_array_equal(got, codes)
    np.testing.assert_array_equal(np.concatenate(halves), codes)
    np.testing.assert_array_equal(turned, codes.transpose(2, 0, 1))
    np.testing.assert_array_equal(taken, codes[[9, 0, 9]])


# Floats of eight bits.


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_every_byte_stands_for_its_float(dtype):
    every = np.arange(256, dtype=np.uint8)
    got = jax.jit(lambda bits: float8.values(bits, dtype, jnp.float32))(every)
    np.testing.assert_array_equal(got, every.view(jnp.dtype(dtype)).astype(np.float32))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_floats_are_rounded_as_by_another_library(dtype):
    w = np.array(_normal(64, 3) * jnp.exp(3 * _normal(64, 3, seed=1)))
    w[0] = 0
    leaf = quantize_float({"kernel": jnp.asarray(w)}, dtype)["kernel"]
    scale = np.abs(w).max(0, keepdims=True) / float(ml_dtypes.finfo(jnp.dtype(dtype)).max)
    np.testing.assert_allclose(leaf.scale, scale, rtol=1e-6)
    want = (w / np.asarray(leaf.scale)).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(leaf.codes).view(np.uint8), want.view(np.uint8))
    assert bool((leaf.materialise()[0] == 0).all())
    # Half a step of three bits of mantissa, or two; below the smallest normal number, half a step there.
    step = {"float8_e4m3fn": (2.0**-4, 2.0**-10), "float8_e5m2": (2.0**-3, 2.0**-17)}[jnp.dtype(dtype).name]
    assert (np.abs(leaf.materialise() - w) <= np.maximum(np.abs(w) * step[0], scale * step[1]) * 1.0001).all()


def test_floats_are_those_worked_by_hand():
    # e4m3 of 448 / 1.0 = 448, -0.3 * 448 = -134.4 -> -128 (steps of 16 there), 0.001 * 448 = 0.448 -> 0.4375.
    leaf = quantize_float({"kernel": jnp.array([[1.0], [-0.3], [0.001], [0.0]])})["kernel"]
    assert leaf.codes.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(leaf.codes.astype(jnp.float32), [[448], [-128], [0.4375], [0]])
    assert leaf.format() == "float8_e4m3fn per tensor"
    assert tree.nbytes(leaf) == 4 + 4
    big = jnp.array([jnp.finfo(jnp.float32).max, 1e30, 0.0])[:, None]
    assert bool(jnp.isfinite(quantize_float({"kernel": big})["kernel"].materialise()).all())


# Normal floats.


def test_the_levels_are_the_published_ones():
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(normal_float.table(), published, atol=2e-7)
    np.testing.assert_array_equal(
        jax.jit(lambda c: normal_float.values(c, jnp.float32))(np.arange(16, dtype=np.uint8)),
        np.asarray(normal_float.table(), np.float32),
    )
    for bits in (2, 3, 4):
        levels = normal_float.table(bits)
        assert len(levels) == 2**bits
        assert sorted(levels) == list(levels)
        assert (levels[0], levels[2 ** (bits - 1) - 1], levels[-1]) == (-1, 0, 1)


def test_normal_floats_equal_a_scalar_reimplementation():
    w = np.array(_normal(16, 3))
    w[5, 1] = 0
    leaf = quantize_normal({"kernel": jnp.asarray(w)}, block=8)["kernel"]
    codes, dense = packing.unpack(leaf.codes), leaf.materialise()
    levels = normal_float.table()
    assert leaf.scale.shape == (2, 3)
    for i, j in np.ndindex(16, 3):
        size = max(abs(float(v)) for v in w[i // 8 * 8 : i // 8 * 8 + 8, j])
        off = [abs(float(w[i, j]) / size - level) for level in levels]
        assert off[int(codes[i, j])] <= min(off) + 1e-6
        np.testing.assert_allclose(dense[i, j], size * levels[int(codes[i, j])], rtol=1e-6)
    assert dense[5, 1] == 0
    assert leaf.format() == "normal float 4 per channel 1, groups of 8 along 0"
    assert tree.nbytes(leaf) == 16 * 3 // 2 + 2 * 3 * 4


def test_normal_weights_are_nearer_in_normal_floats_than_in_integers_of_as_many_bits():
    params = {"kernel": _normal(256, 8)}

    @jax.jit
    def errors(params):
        stored = quantize_normal(params), quantize(params, 4, group=64)
        return [jnp.mean(jnp.square(leaf["kernel"].materialise() - params["kernel"])) for leaf in stored]

    normal, integer = errors(params)
    assert normal < 0.9 * integer


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"dtype=float16: floats of eight bits are float8_e4m3fn and", lambda p: quantize_float(p, jnp.float16)),
        (TypeError, r"kernel is compressed already, as Quantized", lambda p: quantize_float(quantize(p))),
        (TypeError, r"kernel is compressed already, as Float8", lambda p: quantize_normal(quantize_float(p))),
        (ValueError, r"kernel of shape \(4, 2\): group=\(64, -2\): groups of 64 do not divide axis -2", quantize_normal),
        (ValueError, r"kernel of shape \(4, 2\): group=\(3, 0\): groups of 3 do", lambda p: quantize_float(p, group=(3, 0))),
        (ValueError, r"bits=5: normal floats have 2 to 4 bits", lambda p: quantize_normal(p, 2, bits=5)),
        (ValueError, r"kernel of shape \(4, 2\) holds NaN", lambda p: quantize_float({"kernel": p["kernel"] * jnp.nan})),
        (ValueError, r"kernel of shape \(4, 2\): axis=3 does not", lambda p: quantize_float(p, axis=3)),
        (
            ValueError,
            r"codes \(4, 2\) need a scale of",
            lambda p: NormalFloat(packing.pack(jnp.ones((4, 2), int), 4), jnp.ones((3, 1))),
        ),
    ],
)
def test_errors_are_one_line_and_name_the_leaf(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call({"kernel": jnp.ones((4, 2))})
    assert "\n" not in str(caught.value)


# What every format can do.


def _moved(leaf, fns):
    """What each function gives for the lifted leaf, and for its dense self; and whether a leaf came out of it: in one program."""
    kept = []

    def record(w, fn):
        out = fn(w)
        kept.append(type(getattr(out, "value", out)) is type(leaf))
        return out

    def both(leaf):
        return [(compress.lift(functools.partial(record, fn=fn))(leaf), fn(leaf.materialise())) for fn in fns]

    return jax.jit(both)(leaf), kept


MOVES = {
    "turned": lambda w: w.swapaxes(1, 2),
    "rolled": lambda w: w.transpose(2, 0, 1),
    "turned and rolled": lambda w: w.swapaxes(1, 2).transpose(1, 2, 0),
    "new first": lambda w: w[None],
    "new middle": lambda w: w[:, None],
    "new last": lambda w: w[..., None],
    "new and gone": lambda w: w[None, :, None].squeeze(2).squeeze(0),
    "turned, new and gone": lambda w: w.swapaxes(1, 2)[:, None].squeeze(1),
    "copied": lambda w: jnp.broadcast_to(w, (3, 2, 8, 4)),
    "reshaped": lambda w: w.reshape(1, 2, 8, 4),
    "narrower": lambda w: w.astype(jnp.bfloat16),
}


@pytest.mark.parametrize("name", _FORMATS)
def test_a_weight_is_moved_as_it_is(name):
    pairs, kept = _moved(_stored(name, 2, 8, 4), [*MOVES.values(), lambda w: w + 1])
    for got, want in pairs:
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-6)
    assert kept == [True] * len(MOVES) + [False]


def test_reshapes_keep_packed_axes_and_groups_where_they_can():
    def reshapes(bits, *shapes):
        leaf = jax.jit(functools.partial(quantize, bits=bits, group=4))({"kernel": _normal(6, 8, 4)})["kernel"]
        pairs, kept = _moved(leaf, [lambda w, shape=shape: w.reshape(shape) for shape in shapes])
        for got, want in pairs:
            np.testing.assert_allclose(got, want, rtol=1e-6)
        return kept

    # Groups lie along axis 1, which is packed if it has to be.
    assert reshapes(4, (2, 3, 8, 4), (6, 8, 2, 2), (6, 2, 4, 4), (48, 4), (6, 32)) == [True, True, False, False, False]
    assert reshapes(8, (6, 2, 4, 4), (48, 4), (6, 32)) == [True, False, False]
    # Shapes of scales, against scales spread over the weights, reshaped, and read off again.
    cases = [
        ((4, 6), (4, 3), (2, 2, 6)),
        ((8, 3), (2, 3), (2, 4, 3)),
        ((12, 2), (6, 1), (6, 4)),
        ((4, 4), (4, 2), (16,)),
    ]
    for old, sides, new in cases:
        found = affine.reshaped_sides(old, sides, new)
        scale = jnp.arange(1.0, 1 + np.prod(sides)).reshape(sides)
        spread = affine.scaled(jnp.ones(old), scale).reshape(new)
        np.testing.assert_array_equal(affine.scaled(jnp.ones(new), scale.reshape(found)), spread)
    assert affine.reshaped_sides((4, 6), (1, 3), (24,)) is None
    assert affine.reshaped_sides((6,), (2,), (2, 3)) == (2, 1)
    assert affine.reshaped_sides((6,), (2,), (3, 2)) is None


OUTSIDE = np.array([[0, 4], [-1, 7]])


@pytest.mark.parametrize("name", _FORMATS)
def test_look_ups_equal_those_of_the_dense_table(name):
    # Eight rows, which are packed in most formats, and four columns.
    leaf = _stored(name, 8, 4)

    @jax.jit
    def both(leaf):
        reads = (
            lambda w: jnp.take(w, OUTSIDE + 1, axis=0),
            lambda w: jnp.take(w, OUTSIDE + 1, axis=0, mode="clip"),
            lambda w: jnp.take(w, OUTSIDE, axis=0, fill_value=2.0),
            lambda w: jnp.take(w, OUTSIDE, axis=1),
            lambda w: w[OUTSIDE],
            lambda w: w[OUTSIDE[0], OUTSIDE[1] % 4],
            lambda w: w[2],
            lambda w: w[1:3, ::2],
            lambda w: jax.vmap(lambda i: w[i])(OUTSIDE[0]),
        )
        return [(compress.lift(read)(leaf), read(leaf.materialise())) for read in reads]

    for got, want in both(leaf):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_look_ups_of_packed_rows_and_columns_with_groups_unpack_no_table():
    read = lambda w: jnp.take(w, jnp.array([3, 60]), axis=0)  # noqa: E731
    for bits, options in [(3, {"axis": 0, "group": (4, 1)}), (4, {"group": (4, 0)}), (4, {"axis": None})]:
        leaf = jax.jit(functools.partial(quantize, bits=bits, **options))({"kernel": _normal(64, 32)})["kernel"]
        assert "64,32]" not in str(jax.make_jaxpr(compress.lift(read))(leaf)), "a whole table is made"
        got, want = jax.jit(lambda leaf: (compress.lift(read)(leaf), read(leaf.materialise())))(leaf)
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("name", _FORMATS)
def test_convolutions_with_and_without_groups_of_channels(name):
    stored = jax.jit(functools.partial(FORMATS[name], where="*"))({"one": _normal(3, 3, 8, 4), "two": _normal(3, 3, 8, 4, seed=2)})
    x = _normal(2, 6, 6, 8), _normal(2, 6, 6, 16)

    def apply(p, x):
        convolve = functools.partial(lax.conv_general_dilated, window_strides=(1, 2), padding="SAME")
        numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return convolve(x[0], p["one"], **numbers), convolve(x[1], p["two"], feature_group_count=2, **numbers)

    got, want = jax.jit(lambda p, x: (compress.lift(apply)(p, x), apply(compress.decompress(p), x)))(stored, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("name", _FORMATS)
def test_a_large_product_runs_strip_by_strip_and_is_the_same(name, monkeypatch):
    leaf, x = _stored(name, 32, 8), _normal(3, 32)

    def run(leaf, x, back):
        right = lambda w, x: x @ w  # noqa: E731
        left = lambda w, x: w.T @ x.T  # noqa: E731
        long = lambda w, x: back @ w.T  # noqa: E731
        batched = lambda w, x: jax.vmap(lambda row: row @ w)(x)  # noqa: E731
        alone = lambda w, x: x[0] @ w  # noqa: E731
        out = [compress.lift(fn)(leaf, x) for fn in (right, left, long, batched, alone)]
        loss = lambda leaf, x: jnp.sum(jnp.sin(compress.lift(right)(leaf, x)))  # noqa: E731
        value, grads = jax.value_and_grad(loss, argnums=(0, 1), allow_int=True)(leaf, x)
        outside = jax.vmap(compress.lift(right), in_axes=(None, 0))(leaf, x)
        tangent = jax.jvp(lambda x: compress.lift(right)(leaf, x), (x,), (jnp.ones_like(x),))[1]
        return out, value, (grads[0].scale, grads[1]), outside, tangent

    back = _normal(2, 8)
    want = jax.jit(lambda leaf, x: run(leaf, x, back))(leaf, x)
    assert "scan" not in str(jax.make_jaxpr(lambda leaf, x: run(leaf, x, back))(leaf, x))
    monkeypatch.setattr(product, "_STRIP", 32)
    assert "scan" in str(jax.make_jaxpr(lambda leaf, x: run(leaf, x, back))(leaf, x))
    got = jax.jit(lambda leaf, x: run(leaf, x, back))(leaf, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), got, want)
    np.testing.assert_allclose(got[0][0], x @ leaf.materialise(), rtol=1e-4, atol=1e-4)


def test_strips_of_several_summed_axes_and_of_none_that_come_out_even(monkeypatch):
    monkeypatch.setattr(product, "_STRIP", 16)
    cases = [
        ((8, 4, 6), _normal(3, 8, 4), (((1, 2), (0, 1)), ((), ()))),
        ((8, 4, 6), _normal(3, 4), (((1,), (1,)), ((), ()))),
        ((8, 4, 6), _normal(3, 8, 6), (((2,), (2,)), ((1,), (0,)))),
        ((31, 8), _normal(3, 31), (((1,), (0,)), ((), ()))),
    ]
    for shape, x, numbers in cases:
        for bits, symmetric, swapped in ((8, False, False), (4, True, True)):

            @jax.jit
            def both(w, x, bits=bits, symmetric=symmetric, swapped=swapped, numbers=numbers):
                leaf = quantize({"kernel": w}, bits, -1, symmetric, swapped=swapped)["kernel"]
                multiply = functools.partial(lax.dot_general, dimension_numbers=numbers)
                return compress.lift(lambda w, x: multiply(x, w))(leaf, x), multiply(x, leaf.materialise())

            np.testing.assert_allclose(*both(_normal(*shape), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group": 2}])
def test_strips_of_a_sharded_weight_stay_where_they_are(options, monkeypatch):
    monkeypatch.setattr(product, "_STRIP", 2048)
    mesh, x = Mesh(np.array(jax.devices()), ("d",)), _normal(3, 512)
    apply = compress.lift(lambda w, x: x @ w)
    leaf = quantize({"kernel": _normal(512, 16)}, **options)["kernel"]
    want = apply(leaf, x)
    for axis, spec in enumerate((PartitionSpec("d", None), PartitionSpec(None, "d"))):

        def place(field, axis=axis, spec=spec):
            return jax.device_put(field, NamedSharding(mesh, spec if field.shape[axis] > 1 else PartitionSpec()))

        placed = jax.tree.map(place, leaf)
        run = jax.jit(apply).lower(placed, x).compile()
        np.testing.assert_allclose(run(placed, x), want, rtol=1e-4, atol=1e-4)
        assert "while" in run.as_text()
        assert not [line for line in run.as_text().splitlines() if " all-gather" in line and ("s8[" in line or "u8[" in line)]
    got = jax.pmap(apply, in_axes=(None, 0))(leaf, jnp.stack([x] * 8))
    np.testing.assert_allclose(got, jnp.stack([want] * 8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", _FORMATS)
def test_layers_stacked_for_a_scan_or_for_vmap(name):
    options = {} if name in ("e5m2 per tensor", "int4 for (out, in)") else {"axis": (0, -1)}
    whole = jax.jit(functools.partial(FORMATS[name], **options))({"kernel": _normal(3, 8, 8)})
    apply = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["kernel"])[0]  # noqa: E731
    make = jax.jit(FORMATS[name])
    layers = [make({"kernel": _normal(8, 8, seed=i)}) for i in range(2)]
    many = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    x = _normal(2, 8)

    @jax.jit
    def everything(whole, many, x):
        multiply = compress.lift(lambda p, x: x @ p["kernel"])
        scanned = lax.scan(lambda h, p: (jnp.tanh(multiply(p, h)), None), x, many)[0]
        return compress.lift(apply)(whole, x), jax.vmap(multiply, in_axes=(0, None))(many, x), scanned

    got = everything(whole, many, x)
    dense = [compress.decompress(layer)["kernel"] for layer in layers]
    want = apply(compress.decompress(whole), x), jnp.stack([x @ w for w in dense]), jnp.tanh(jnp.tanh(x @ dense[0]) @ dense[1])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", _FORMATS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(name, dtype):
    w, x = _normal(16, 4).astype(dtype), _normal(3, 16).astype(dtype)

    @jax.jit
    def run(w, x):
        stored = FORMATS[name]({"kernel": w})
        return compress.lift(lambda p, x: x @ p["kernel"])(stored, x), compress.decompress(stored)

    got, dense = run(w, x)
    assert (got.dtype, dense["kernel"].dtype) == (dtype, dtype)
    np.testing.assert_allclose(
        got.astype(jnp.float32), x.astype(jnp.float32) @ dense["kernel"].astype(jnp.float32), rtol=0.02, atol=0.05
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_leaf_is_stored_and_built_again(name):
    stored = {"kernel": _stored(name, 8, 8)}
    structure, arrays = describe(stored)
    again = rebuild(json.loads(json.dumps(structure)), [np.asarray(a) for a in arrays])
    assert jax.tree.structure(again) == jax.tree.structure(stored)
    np.testing.assert_array_equal(again["kernel"].materialise(), stored["kernel"].materialise())


def test_the_size_of_a_group_alone_means_the_summed_axis():
    shapes = {
        (64, 3): ({}, (2, 3)),
        (3, 64): ({"axis": 0}, (3, 2)),
        (5, 64, 3): ({"axis": (0, -1)}, (5, 2, 3)),
        (3, 3, 64, 4): ({}, (1, 1, 2, 4)),
        (64, 4): ({"axis": None}, (2, 1)),
        (64, 6): ({"group": (3, 1), "axis": 0}, (64, 2)),
    }
    for shape, (options, sides) in shapes.items():
        made = jax.eval_shape(functools.partial(quantize, **{"group": 32, **options}), {"kernel": jnp.ones(shape)})
        assert made["kernel"].scale.shape == sides


def test_a_matrix_is_turned_without_moving_it():
    leaf = quantize({"kernel": _normal(8, 4)}, bits=4)["kernel"]
    turned = leaf.transpose(permutation=(1, 0))
    assert isinstance(turned, Quantized)
    assert turned.codes is leaf.codes
    assert turned.shape == (4, 8)
    assert turned.format() == "int4 per channel 0, swapped"
    assert turned.transpose(permutation=(1, 0)).swapped is False
    np.testing.assert_array_equal(turned.plain().materialise(), leaf.materialise().T)
    np.testing.assert_array_equal(turned.signed_codes(), leaf.signed_codes().T)
