"""Sparse weights: N of every M, and a mask of bits; exact to the bit, and sparse whatever trains them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import compress, prune
from jaxopt_lab.compress.arrays import packing, sparse
from jaxopt_lab.compress.leaves import strips
from jaxopt_lab.compress.leaves.masked import Masked, store_sparse
from jaxopt_lab.compress.leaves.n_of_m import NM, store_n_of_m
from jaxopt_lab.core import tree

_dense = jax.jit(lambda leaf: leaf.materialise())
_pack, _to_groups = jax.jit(packing.pack, static_argnums=(1, 2)), jax.jit(sparse.to_groups, static_argnums=(1, 2, 3))


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def _sparse(*shape: int, kept: float = 0.2, dtype=jnp.float32) -> jax.Array:
    mask = np.random.default_rng(5).random(shape) < kept
    return jax.device_put(np.where(mask, _normal(*shape), 0).astype(dtype))


def _n_of_m(w: jax.Array, n: int, m: int, axis: int) -> np.ndarray:
    """`w` with all but the n largest of each group set to 0, group by group."""
    out = np.moveaxis(np.array(w), axis, -1)
    for index in np.ndindex(*out.shape[:-1]):
        for first in range(0, out.shape[-1], m):
            group = out[index][first : first + m]
            group[np.argsort(-np.abs(group), kind="stable")[n:]] = 0
    return np.moveaxis(out, -1, axis)


def _bits(x) -> bytes:
    return np.asarray(x).tobytes()


def test_groups_are_those_worked_by_hand():
    w = jnp.array([[0.0, -3.0, 0.0, 2.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    leaf = store_n_of_m({"kernel": w}, 2, 4, axis=-1)["kernel"]
    np.testing.assert_array_equal(leaf.values, [[-3, 2], [5, 0], [0, 0]])
    np.testing.assert_array_equal(packing.unpack(leaf.positions), [[1, 3], [0, 1], [0, 1]])
    np.testing.assert_array_equal(_dense(leaf), w)
    assert leaf.format() == "float32 2:4 along axis -1"
    np.testing.assert_array_equal(sparse.group_counts(w, 2, 1), [[1, 1], [1, 0], [0, 0]])


@pytest.mark.parametrize(
    ("shape", "n", "m", "axis", "dtype"),
    [
        ((16, 6), 2, 4, -2, jnp.float32),
        ((6, 16), 2, 4, -1, jnp.bfloat16),
        ((2, 3, 24, 8), 1, 3, 2, jnp.float32),
        ((40,), 4, 5, 0, jnp.float16),
        ((512, 2), 3, 256, 0, jnp.float32),
        ((4, 0), 1, 2, -2, jnp.float32),
    ],
)
def test_n_of_m_weights_come_back_to_the_bit(shape, n, m, axis, dtype):
    w = _n_of_m(_normal(*shape), n, m, axis).astype(dtype)
    leaf = store_n_of_m({"kernel": jnp.asarray(w)}, n, m, axis)["kernel"]
    assert (leaf.shape, leaf.dtype) == (shape, dtype)
    assert _bits(_dense(leaf)) == _bits(w)
    bits = (m - 1).bit_length()
    assert tree.nbytes(leaf) <= w.size * n / m * (w.itemsize + bits / 8) + 8
    # The very mask of `prune`.
    mask = prune.n_of_m(n, m, axis=axis).fixed(jnp.abs(jnp.asarray(w, jnp.float32)))
    assert bool((_dense(leaf)[~mask] == 0).all())


def test_a_pruned_tree_is_stored_as_it_is():
    params = {"a": {"kernel": _normal(8, 6), "bias": jnp.ones(6)}, "b": {"kernel": _normal(2, 12, 3)}}
    pruned, _ = prune.one_shot(prune.magnitude(), params, pattern=prune.n_of_m(2, 4))
    stored = store_n_of_m(pruned)
    assert stored["a"]["bias"] is pruned["a"]["bias"]
    for name in ("a", "b"):
        assert _bits(_dense(stored[name]["kernel"])) == _bits(pruned[name]["kernel"])
    with pytest.raises(
        ValueError, match=r"a/kernel of shape \(8, 6\) has 4 weights that are not 0 in a group of 4 along axis -2; p"
    ):
        store_n_of_m(params)
    # What is traced cannot be counted: the largest stay.
    traced = jax.jit(lambda p: compress.decompress(store_n_of_m(p)))(params)
    assert _bits(traced["a"]["kernel"]) == _bits(_n_of_m(params["a"]["kernel"], 2, 4, -2))


def test_every_layout_of_an_n_of_m_product_equals_the_dense_one():
    def leaf(*shape, axis=-2):
        return store_n_of_m({"kernel": jnp.asarray(_n_of_m(_normal(*shape), 1, 2, axis))}, 1, 2, axis)["kernel"]

    cases = [
        (_normal(3, 8), leaf(8, 5), (((1,), (0,)), ((), ()))),
        (_normal(3, 8), leaf(6, 8, axis=-1), (((1,), (1,)), ((), ()))),
        (_normal(2, 3, 4), leaf(2, 4, 6), (((2,), (1,)), ((0,), (0,)))),
    ]

    def pairs(operands):
        for (x, w), (_, _, numbers) in zip(operands, cases, strict=True):
            right = lambda w, x, n=numbers: lax.dot_general(x, w, n)  # noqa: E731
            left = lambda w, x, n=(numbers[0][::-1], numbers[1][::-1]): lax.dot_general(w, x, n)  # noqa: E731
            yield from ((compress.lift(fn)(w, x), fn(w.materialise(), x)) for fn in (right, left))

    for got, want in jax.jit(lambda operands: list(pairs(operands)))([case[:2] for case in cases]):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "m", "axis", "packed"), [(2, 4, -2, -2), (2, 4, -1, -2), (1, 4, -2, -1), (3, 4, -1, -1), (3, 8, -2, None)]
)
def test_n_of_m_products_in_strips_equal_the_dense_ones(n, m, axis, packed, monkeypatch):
    monkeypatch.setattr(strips, "cut", functools.partial(strips.cut, strip=512))
    w = jnp.asarray(_n_of_m(_normal(64, 48), n, m, axis))
    values, positions = _to_groups(w, n, m, axis)
    own = positions if packed is None else _pack(positions, (m - 1).bit_length(), packed)
    leaf, y = NM(values, own, n, m, axis), _normal(48, 3)
    assert str(jax.make_jaxpr(compress.lift(lambda w: w @ y))(leaf)).count(" scan[") == 1

    def outputs(product, w):
        """Both sides of the weight, and both derivatives."""
        loss = lambda w, y: jnp.sum(jnp.sin(product(lambda w, y: w @ y, w, y)))  # noqa: E731
        return (
            product(lambda w, y: w @ y, w, y),
            product(lambda w, y: w.T @ (w @ y), w, y),
            jax.grad(loss, (0, 1), allow_int=True)(w, y),
        )

    *got, (of_leaf, of_y) = jax.jit(lambda leaf: outputs(lambda fn, w, x: compress.lift(fn)(w, x), leaf))(leaf)
    *want, (of_weight, dense_of_y) = jax.jit(lambda w: outputs(lambda fn, w, x: fn(w, x), w))(w)
    for a, b in zip((*got, of_y), (*want, dense_of_y), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    kept = _dense(NM(of_leaf.values, own, n, m, axis))
    np.testing.assert_allclose(kept, np.where(w != 0, of_weight, 0), rtol=1e-3, atol=1e-4)


def test_strips_of_a_sharded_n_of_m_weight_stay_on_their_devices(monkeypatch):
    monkeypatch.setattr(strips, "cut", functools.partial(strips.cut, strip=2048))
    w, x, mesh = jnp.asarray(_n_of_m(_normal(512, 16), 2, 4, -2)), _normal(3, 512), Mesh(np.array(jax.devices()), ("d",))
    leaf = store_n_of_m({"kernel": w})["kernel"]
    for spec in (PartitionSpec("d"), PartitionSpec(None, "d")):
        placed = jax.device_put(leaf, NamedSharding(mesh, spec))
        compiled = jax.jit(compress.lift(lambda w, x: x @ w)).lower(placed, x).compile()
        np.testing.assert_allclose(compiled(placed, x), x @ w, rtol=1e-4, atol=1e-4)
        assert " while(" in compiled.as_text()
        assert "all-gather" not in compiled.as_text()


def test_masked_weights_are_those_worked_by_hand():
    w = jnp.array([[0.0, 3.0, 0.0], [4.0, 0.0, 5.0]])
    leaf = store_sparse({"kernel": w})["kernel"]
    # The axis of length 3 is packed, which takes two bytes; along the one of length 2 it would be three.
    assert leaf.mask.axis == -1
    np.testing.assert_array_equal(leaf.values, [[[3, 4, 5]]])
    np.testing.assert_array_equal(leaf.mask.planes[0], [[0b010], [0b101]])
    np.testing.assert_array_equal(_dense(leaf), w)
    assert leaf.format() == "float32 under a mask, 50.0% stored"
    assert tree.nbytes(leaf) == 3 * 4 + 2


@pytest.mark.parametrize(
    "w",
    [
        _sparse(33, 17),
        _sparse(5, 3, 16, 24),
        _sparse(9, 9, dtype=jnp.bfloat16),
        jnp.zeros((4, 5)),
        jnp.ones(8),
        jnp.zeros((0, 3)),
        _sparse(1, 1, kept=1.0),
    ],
    ids=lambda w: f"{w.dtype}{w.shape}",
)
def test_masked_weights_come_back_to_the_bit(w):
    leaf = store_sparse({"kernel": w})["kernel"]
    assert (leaf.shape, leaf.dtype) == (w.shape, w.dtype)
    assert _bits(_dense(leaf)) == _bits(w)
    assert leaf.values.size == int(np.count_nonzero(w))
    # A padded axis costs up to seven bits for each of its lines.
    assert tree.nbytes(leaf) <= leaf.values.size * w.dtype.itemsize + w.size / 8 + w.size / max(*w.shape, 1)


@pytest.mark.parametrize("store", [lambda p: store_n_of_m(p, 1, 4), store_sparse], ids=["1:4", "masked"])
def test_sparse_weights_train_and_stay_sparse(store):
    w, x, y = jnp.asarray(_n_of_m(_normal(8, 6), 1, 4, -2)), _normal(64, 8, seed=2), _normal(64, 6, seed=3)
    start = store({"kernel": w}) | {"bias": jnp.zeros(6)}
    tx = compress.optimizer(optax.adamw(0.05, weight_decay=0.1))

    def loss(params):
        return jnp.mean(jnp.square(x @ params["kernel"] + params["bias"][None] - y))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(compress.lift(loss), allow_int=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads

    params, state, values = start, tx.init(start), []
    for _ in range(60):
        params, state, value, grads = step(params, state)
        values.append(float(value))
        if len(values) == 1:
            dense = jax.grad(loss)({"kernel": w, "bias": start["bias"]})["kernel"]
            read = grads["kernel"].values
            # Put where the values stand, their gradients are those of the dense weight.
            moved = jax.tree.unflatten(jax.tree.structure(start["kernel"]), [read, *jax.tree.leaves(start["kernel"])[1:]])
            np.testing.assert_allclose(_dense(moved), jnp.where(w != 0, dense, 0), rtol=1e-4, atol=1e-6)
    assert values[-1] < 0.9 * values[0]
    assert bool((_dense(params["kernel"])[w == 0] == 0).all())
    assert bool((_dense(params["kernel"])[w != 0] != w[w != 0]).all())


def test_layers_stacked_for_a_scan_and_for_vmap():
    x, kernel = _normal(2, 8), jnp.asarray(_n_of_m(_normal(4, 8, 8), 2, 4, -2))
    uneven = kernel.at[0].set(0.0).at[1, :2].set(0.0)
    apply = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["kernel"])[0]  # noqa: E731
    # The last has no values for each layer, and must not be cut as if it had.
    for stored in (store_n_of_m({"kernel": kernel}), store_sparse({"kernel": uneven}, axis=0), store_sparse({"kernel": uneven})):
        got, want = jax.jit(lambda p, x: (compress.lift(apply)(p, x), apply(compress.decompress(p), x)))(stored, x)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    masked = store_sparse({"kernel": uneven}, axis=0)["kernel"]
    assert masked.values.shape == (4, 1, 1, 32)
    assert _bits(_dense(masked)) == _bits(uneven)
    with pytest.raises(ValueError, match=r"kernel of shape \(4, 8, 8\): axis=1 must be the first axis 0"):
        store_sparse({"kernel": uneven}, axis=1)
    # Leaves that were stored one by one, stacked.
    for one in (store_sparse({"kernel": kernel[2]}), store_n_of_m({"kernel": kernel[2]})):
        many = jax.tree.map(lambda a: np.stack([a, a]), one)
        assert _bits(_dense(many["kernel"])) == _bits(np.stack([kernel[2]] * 2))
        y = jax.jit(jax.vmap(compress.lift(lambda p, x: x @ p["kernel"]), in_axes=(0, None)))(many, x)
        np.testing.assert_allclose(y[1], x @ kernel[2], rtol=1e-5, atol=1e-6)


def test_types_and_axes_change_where_the_leaf_can_follow():
    w = jnp.asarray(_n_of_m(_normal(8, 6), 2, 4, -2))
    nm, masked = (store({"kernel": w})["kernel"] for store in (store_n_of_m, store_sparse))
    kept = []

    def record(leaf, fn):
        kept.append(isinstance(getattr(out := fn(leaf), "value", out), (NM, Masked)))
        return out

    for leaf, fn, stays in [
        (nm, lambda w: w.T, True),
        (nm, lambda w: w.astype(jnp.bfloat16), True),
        (nm, lambda w: w.reshape(-1), False),
        (masked, lambda w: w.astype(jnp.bfloat16), True),
        (masked, lambda w: w.astype(jnp.int32), False),
        (masked, lambda w: w.T, False),
    ]:
        got, want = jax.jit(lambda leaf, fn=fn: (compress.lift(lambda w: record(w, fn))(leaf), fn(leaf.materialise())))(leaf)
        assert got.dtype == want.dtype
        assert _bits(got) == _bits(want)
        assert kept.pop() == stays


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"store_n_of_m: n weights of m are stored, .* got n=4, m=4", lambda p: store_n_of_m(p, 4, 4)),
        (ValueError, r"store_n_of_m: .* got n=0, m=4", lambda p: store_n_of_m(p, 0, 4)),
        (ValueError, r"a/kernel of shape \(4, 2\) has no axis -2 that 3 divides", lambda p: store_n_of_m(p, 1, 3)),
        (ValueError, r"a/kernel of shape \(4, 2\) has no axis 2 that 2 divides", lambda p: store_n_of_m(p, 1, 2, axis=2)),
        (TypeError, r"a/kernel is compressed already, as NM", lambda p: store_n_of_m(store_n_of_m(p, 1, 2), 1, 2)),
        (TypeError, r"a/kernel has dtype int32; only floating", lambda p: store_sparse({"a": {"kernel": jnp.arange(3)}})),
        (TypeError, r"a/kernel is compressed already, as Masked", lambda p: store_sparse(store_sparse(p))),
        (ValueError, r"nothing matches where='\*\*/kernal'; the nearest.*a/kernel", lambda p: store_sparse(p, where="**/kernal")),
        (ValueError, r"a/kernel of shape \(2,\) holds NaN", lambda p: store_sparse({"a": {"kernel": jnp.array([1, jnp.nan])}})),
        (ValueError, r"a/kernel of shape \(4, 2\) is traced, and its zeros are counted", jax.jit(store_sparse)),
        (ValueError, r"a/kernel of shape \(\): axis=None must be", lambda p: store_sparse({"a": {"kernel": 1.0}})),
        (ValueError, r"a/kernel of shape \(4, 2\): axis=\(0, 1\) must be", lambda p: store_sparse(p, axis=(0, 1))),
        (
            ValueError,
            r"values \(2,\) need positions of their shape.*got \(3,\) and axis=-1",
            lambda p: NM(jnp.ones(2), jnp.zeros(3, jnp.uint8), 1, 2, -1),
        ),
        (
            ValueError,
            r"values \(2,\) need a mask of 1 bit and one axis less.*got \(3,\) of 1 bits",
            lambda p: Masked(jnp.ones(2), packing.pack(jnp.ones(3, jnp.uint8), 1)),
        ),
    ],
)
def test_errors_are_one_line_and_name_the_leaf(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call({"a": {"kernel": jnp.zeros((4, 2)).at[0].set(1.0)}})
    assert "\n" not in str(caught.value)
