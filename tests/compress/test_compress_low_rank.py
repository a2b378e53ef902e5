"""Low rank: factors worked by hand, the least errors that theory allows, and what goes through the leaf without becoming dense."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxopt_lab import compress, regularize
from jaxopt_lab.checkpoint import manifest
from jaxopt_lab.compress.arrays import factor
from jaxopt_lab.compress.leaves.low_rank import LowRank, factorised, low_rank
from jaxopt_lab.core import tree

_close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def _leaf(a: tuple[int, ...], b: tuple[int, ...], layout: str = "rc", dtype=jnp.float32) -> LowRank:
    return LowRank(_normal(*a), _normal(*b, seed=1), layout, dtype)


def _shapes(fn, *args) -> set[tuple[int, ...]]:
    """The shapes of all that a function computes on its way, also within its inner functions."""
    found = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            found.update(tuple(out.aval.shape) for out in equation.outvars if hasattr(out.aval, "shape"))
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


def test_factors_are_those_worked_by_hand():
    # Singular values 5, 2, 0 with axes of the coordinates; the factors share them by their roots.
    w = jnp.array([[0.0, 5.0], [2.0, 0.0], [0.0, 0.0]])
    a, b = factor.factorise(w, 1)
    _close(jnp.abs(a), [[5**0.5], [0], [0]])
    _close(jnp.abs(b), [[0, 5**0.5]])
    _close(a @ b, [[0, 5], [0, 0], [0, 0]])
    # Inputs that are ten times larger along the second axis make 20 of its 2: it is kept, and the other is cut.
    a, b = factor.factorise(w, 1, jnp.diag(jnp.array([1.0, 100.0, 1.0])))
    _close(a @ b, [[0, 0], [2, 0], [0, 0]])
    _close(jnp.sum(a**2), jnp.sum(b**2))


@pytest.mark.parametrize(
    ("values", "share", "rank"),
    [
        ([3, 2, 1], 0.64, 1),  # 9, 13 and 14 of 14
        ([3, 2, 1], 0.65, 2),
        ([3, 2, 1], 1.0, 3),
        ([3, 2, 0], 1.0, 2),
        ([0, 0], 0.5, 1),
        ([1, 1e-4], 1 - 1e-6, 1),
        ([1, 1e-4], 1 - 1e-9, 2),
    ],
)
def test_the_rank_of_an_energy_is_the_one_counted_by_hand(values, share, rank):
    assert factor.by_energy(share)(np.array(values, np.float32), (9, 9)) == rank
    total = sum(v * v for v in values)
    by_hand = next(r for r in range(1, len(values) + 1) if sum(v * v for v in values[r:]) <= (1 - share) * total)
    assert by_hand == rank


def test_truncation_loses_the_tail_of_the_singular_values():
    w = _normal(2, 7, 5)
    a, b = jax.jit(factor.factorise, static_argnums=1)(w, 3)
    for each, left, right in zip(w, a, b, strict=True):
        tail = np.linalg.svd(np.asarray(each, np.float64), compute_uv=False)[3:]
        _close(jnp.sum((each - left @ right) ** 2), np.sum(tail**2))
        _close(left.T @ left, right @ right.T)


@pytest.mark.parametrize("examples", [40, 6, 3])
def test_weighted_factors_have_the_least_error_of_outputs(examples):
    # Six inputs of eight are seen in the second case, three in the last: the moment is singular there.
    x = np.asarray(_normal(examples, 8, seed=2) * jnp.geomspace(1, 0.01, 8)[None], np.float64)
    w = _normal(8, 7)
    moment = jnp.asarray(x.T @ x, jnp.float32)
    error = lambda pair: np.linalg.norm(x @ (np.asarray(w, np.float64) - np.asarray(pair[0] @ pair[1], np.float64)))  # noqa: E731
    for rank in (2, 4):
        pair, plain = factor.factorise(w, rank, moment), factor.factorise(w, rank)
        least = np.linalg.norm(np.linalg.svd(x @ np.asarray(w, np.float64), compute_uv=False)[rank:])
        scale = np.linalg.norm(x @ np.asarray(w))
        assert abs(error(pair) - least) < 2e-3 * scale
        assert error(pair) <= error(plain) + 1e-3 * scale
        _close(pair[0].T @ pair[0], pair[1] @ pair[1].T, atol=1e-4)
    if examples == 3:
        # Three directions of outputs are seen; the fourth is the best for what is left of the weight itself.
        seen = np.linalg.svd(x @ np.asarray(w, np.float64))[2][:3]
        left = np.linalg.svd(np.asarray(w) - np.asarray(w) @ seen.T @ seen, compute_uv=False)[1:]
        _close(jnp.linalg.norm(w - pair[0] @ pair[1]), np.linalg.norm(left), rtol=1e-2)


def test_weights_without_inputs_are_factorised_as_they_are():
    w = _normal(5, 4)
    a, b = factor.factorise(w, 2, jnp.zeros((5, 5)))
    c, d = factor.factorise(w, 2)
    _close(a @ b, c @ d, atol=1e-4)


def test_evidence_finds_the_planted_rank():
    rng = np.random.default_rng(0)
    values = lambda w: np.linalg.svd(w, compute_uv=False)  # noqa: E731
    for shape in ((40, 90), (90, 40), (60, 60)):
        noise = rng.normal(size=shape)
        u, v = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in shape)
        largest = sum(n**0.5 for n in shape)  # of the noise alone
        strong, weak = 2.5 * largest * u @ v.T, 0.3 * largest * u @ v.T
        for scale in (1e-3, 1.0, 1e3):
            assert factor.by_evidence(values(scale * (noise + strong)), shape) == 4
        assert factor.by_evidence(values(noise), shape) == 0
        assert factor.by_evidence(values(noise + weak), shape) == 0
    assert factor.by_evidence(np.array([3.0, 2.0, 0.0, 0.0]), (4, 9)) == 2
    assert factor.by_evidence(np.zeros(3), (3, 5)) == 0


def test_the_threshold_of_evidence_is_that_of_the_literature():
    # The root is 2.5129 times the square root of the ratio of sides, which is printed as an approximation for all ratios.
    for ratio in (0.05, 0.3, 1.0):
        root = 2.5129 * ratio**0.5
        assert abs(factor._evidence_threshold(ratio) / ((1 + root) * (1 + ratio / root)) - 1) < 0.02
    root = 2.5128624  # of log(1 + t) = t / 2
    assert abs(np.log1p(root) - root / 2) < 1e-6
    assert abs(factor._evidence_threshold(1.0) - (1 + root) * (1 + 1 / root)) < 1e-5


def test_every_layout_of_a_product_equals_the_dense_one():
    # (leaf, shape of x, dimension_numbers with x on the left)
    cases = [
        (_leaf((6, 2), (2, 5)), (3, 6), (((1,), (0,)), ((), ()))),
        (_leaf((6, 2), (2, 5)), (3, 5), (((1,), (1,)), ((), ()))),
        (_leaf((6, 2), (2, 5)), (5, 3, 6), (((2, 0), (0, 1)), ((), ()))),
        (_leaf((6, 2), (2, 5), "cr"), (3, 6), (((1,), (1,)), ((), ()))),
        (_leaf((2, 4, 2), (2, 5), "rrc"), (3, 2, 4), (((1, 2), (0, 1)), ((), ()))),
        (_leaf((2, 4, 2), (2, 5), "rrc"), (3, 4), (((1,), (1,)), ((), ()))),
        (_leaf((4, 2), (2, 3, 5), "crc"), (7, 4, 3), (((1,), (1,)), ((2,), (0,)))),
        (_leaf((2, 4, 2), (2, 2, 5)), (2, 3, 4), (((2,), (1,)), ((0,), (0,)))),
        (_leaf((2, 4, 2), (2, 2, 5)), (3, 4, 2), (((1, 2), (1, 0)), ((), ()))),
        (_leaf((2, 4, 2), (2, 2, 5)), (3, 2), (((1,), (0,)), ((), ()))),
        (_leaf((4, 3), (3, 4)), (2, 4), (((), ()), ((1,), (0,)))),
        (_leaf((4, 2), (2,), "r"), (4,), (((0,), (0,)), ((), ()))),
    ]

    @jax.jit
    def both(leaves, xs):
        out = []
        for k, (leaf, x, (_, _, numbers)) in enumerate(zip(leaves, xs, cases, strict=True)):
            turned = (numbers[0][::-1], numbers[1][::-1])
            right = functools.partial(lambda w, x, numbers: lax.dot_general(x, w, numbers), numbers=numbers)
            left = functools.partial(lax.dot_general, dimension_numbers=turned)
            fn = left if k % 3 == 2 else right
            out.append((compress.lift(fn)(leaf, x), fn(leaf.materialise(), x)))
        return out

    for got, want in both([leaf for leaf, _, _ in cases], [_normal(*shape, seed=3) for _, shape, _ in cases]):
        _close(got, want)


def test_a_product_is_two_thin_ones_where_that_is_cheaper():
    leaf = _leaf((12, 2), (2, 10))
    for fn, shape in (
        (lambda w, x: x @ w, (3, 12)),
        (lambda w, x: x @ w.T, (3, 10)),
        (lambda w, x: w @ x, (10, 3)),
        (lambda w, x: x @ w.astype(jnp.bfloat16).reshape(3, 4, 10).reshape(12, 10), (3, 12)),
        (lambda w, x: jnp.einsum("bsi,io->bso", x, w), (2, 3, 12)),
    ):
        shapes = _shapes(compress.lift(fn), leaf, _normal(*shape))
        assert not {(12, 10), (10, 12)} & shapes
    assert (3, 2) in _shapes(compress.lift(lambda w, x: x @ w), leaf, _normal(3, 12))
    # Factors that are no thinner than the weight: for many rows it pays to multiply them first, for one row it does not.
    thick = _leaf((4, 8), (8, 4))
    assert (4, 4) in _shapes(compress.lift(lambda w, x: x @ w), thick, _normal(50, 4))
    assert (4, 4) not in _shapes(compress.lift(lambda w, x: x @ w), thick, _normal(1, 4))


def test_types_of_products_are_those_of_the_dense_ones():
    for own in (jnp.bfloat16, jnp.float32):
        leaf = LowRank(_normal(6, 2).astype(own), _normal(2, 4).astype(own), "rc", own)
        for other in (jnp.bfloat16, jnp.float32, jnp.int32):
            x = jnp.ones((3, 6), other)
            for preferred in (None, jnp.float32):
                fn = functools.partial(
                    lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), preferred_element_type=preferred
                )
                assert compress.lift(fn)(x, leaf).dtype == fn(x, leaf.materialise()).dtype
        _close(leaf.materialise(), leaf.a.astype(jnp.float32) @ leaf.b.astype(jnp.float32), rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize(
    ("spec", "layout", "thin"),
    [
        (("NHWC", "HWIO", "NHWC"), "rrrc", True),  # patches, then a mix of channels
        (("NCHW", "OIHW", "NCHW"), "crrr", True),
        (("NCHW", "OIHW", "NHWC"), "crrr", True),
        (("NHWC", "HWIO", "NCHW"), "ccrc", True),  # a mix of channels, then patches
        (("NHWC", "HWIO", "NHWC"), "rcrc", True),  # a column, then a row
        (("NHWC", "HWIO", "NHWC"), "crrc", True),
        (("NHWC", "HWIO", "NHWC"), "rrcc", False),  # both channels in one factor
    ],
)
def test_convolutions_run_as_two_thin_ones(spec, layout, thin):
    sides = dict(zip(spec[1], {"HWIO": (3, 2, 4, 5), "OIHW": (5, 4, 3, 2)}[spec[1]], strict=True))
    shape = tuple(sides.values())
    own = lambda kind: tuple(n for n, label in zip(shape, layout, strict=True) if label == kind)  # noqa: E731
    leaf = _leaf((*own("r"), 2), (2, *own("c")), layout)
    assert leaf.aval().shape == shape
    x = _normal(2, 4, 6, 7) if spec[0] == "NCHW" else _normal(2, 6, 7, 4)
    options = [
        {"window_strides": (1, 2), "padding": "SAME"},
        {"window_strides": (2, 1), "padding": ((1, 0), (2, 3)), "rhs_dilation": (1, 2), "lhs_dilation": (2, 1)},
    ]

    @jax.jit
    def both(w, x):
        fns = [functools.partial(lax.conv_general_dilated, dimension_numbers=spec, **option) for option in options]
        return [(compress.lift(fn)(x, w), fn(x, w.materialise())) for fn in fns]

    for got, want in both(leaf, x):
        _close(got, want)
    fn = functools.partial(lax.conv_general_dilated, dimension_numbers=spec, **options[0])
    assert (shape in _shapes(compress.lift(fn), x, leaf)) != thin


def test_convolutions_in_groups_run_dense():
    leaf = _leaf((3, 3, 2, 2), (2, 4), "rrrc")
    fn = lambda w, x: lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    x = _normal(1, 4, 4, 4)
    _close(compress.lift(fn)(leaf, x), fn(leaf.materialise(), x))


def test_look_ups_read_one_factor():
    outside = jnp.array([[0, 4], [-1, 7]])
    table = _leaf((5, 2), (2, 4))
    for read, thin in (
        (lambda w: jnp.take(w, outside, axis=0), True),
        (lambda w: jnp.take(w, outside, axis=0, mode="clip"), True),
        (lambda w: jnp.take(w, outside, axis=1), True),
        (lambda w: jnp.take(w.T, outside, axis=0), True),
        (lambda w: w[outside], True),
        (lambda w: w[2], False),
        (lambda w: w[outside[0], outside[1]], False),
        (lambda w: jnp.take(w, outside, axis=0, fill_value=2.0), False),
        (lambda w: w[1:3, ::2], False),
    ):
        _close(compress.lift(read)(table), read(table.materialise()))
        assert not thin or not {(5, 4), (4, 5)} & _shapes(compress.lift(read), table)
    wide = _leaf((5, 3, 2), (2, 4), "rcr")
    for read in (
        lambda w: jnp.take(w, outside, axis=0),
        lambda w: jnp.take(w, outside, axis=1),
        lambda w: jnp.take(w, outside, axis=2),
        lambda w: w[outside, :, outside],
    ):
        _close(compress.lift(read)(wide), read(wide.materialise()))


def test_reshaping_keeps_the_leaf_where_rows_and_columns_allow_it():
    kept = []

    def record(w, fn):
        kept.append(isinstance(getattr(out := fn(w), "value", out), LowRank))
        return out

    plain, stack = _leaf((2, 3, 2), (2, 4), "rrc"), _leaf((2, 3, 2), (2, 2, 4), "rc")
    for leaf, fn, stays in [
        (plain, lambda w: w.reshape(6, 4), True),
        (plain, lambda w: w.reshape(6, 2, 2), True),
        (plain, lambda w: w.reshape(2, 12), False),
        (plain, lambda w: w.reshape(1, 2, 3, 1, 4, 1), True),
        (plain, lambda w: w.reshape(-1), False),
        (plain, lambda w: w.transpose(2, 0, 1), True),
        (plain, lambda w: w.transpose(1, 2, 0).reshape(3, 2, 2, 2), True),
        (plain, lambda w: w[None], True),
        (plain, lambda w: jnp.broadcast_to(w, (5, 2, 3, 4)), True),
        (plain, lambda w: jnp.broadcast_to(w[:, None], (2, 7, 3, 4)), True),
        (plain, lambda w: w[None, :, :, None].squeeze((0, 3)), True),
        (plain, lambda w: w.astype(jnp.bfloat16), True),
        (plain, lambda w: w.astype(jnp.int32), False),
        (plain, lambda w: w * 2, False),
        (stack, lambda w: w.swapaxes(1, 2), True),
        (stack, lambda w: w.swapaxes(0, 1), False),
        (stack, lambda w: w.reshape(6, 4), False),
        (stack, lambda w: w.reshape(1, 2, 3, 2, 2), True),
        (stack, lambda w: w.reshape(2, 1, 3, 4), True),
        (stack, lambda w: jnp.broadcast_to(w, (5, 2, 3, 4)), True),
        (stack, lambda w: jnp.broadcast_to(w[None], (5, 2, 3, 4)).reshape(10, 3, 4), True),
    ]:
        out = compress.lift(lambda w, fn=fn: record(w, fn))(leaf)
        want = fn(leaf.materialise())
        assert out.dtype == want.dtype
        _close(out, want, rtol=1e-2 if want.dtype == jnp.bfloat16 else 1e-5)
        assert kept.pop() == stays


class Net(nn.Module):
    """An embedding with a tied read-out, a convolution, attention and a dense layer."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(10, 8)
        h = table(tokens)
        h = nn.relu(nn.Conv(8, (3,))(h))
        h = h + nn.MultiHeadDotProductAttention(2, qkv_features=8)(h)
        return table.attend(nn.Dense(8)(h))


def test_a_lifted_model_equals_the_dense_one_in_value_and_gradients():
    tokens = jnp.arange(12).reshape(2, 6) % 10
    variables = jax.jit(Net().init)(jax.random.key(0), tokens)
    stored = low_rank(variables, rank=2, where=("**/kernel", "**/embedding"))
    kinds = {path: row.format for path, row in compress.summary(stored, variables).items()}
    assert sum(kind == "float32 rank 2" for kind in kinds.values()) == 7
    assert tree.nbytes(stored) < 0.7 * tree.nbytes(variables)

    def loss(apply, variables, tokens):
        return jnp.sum(jnp.sin(apply(variables, tokens)) ** 2)

    @jax.jit
    def everything(stored):
        lifted = jax.value_and_grad(functools.partial(loss, compress.lift(Net().apply)))(stored, tokens)
        dense = jax.value_and_grad(lambda stored: loss(Net().apply, compress.decompress(stored), tokens))(stored)
        one = jax.vmap(compress.lift(lambda v, t: Net().apply(v, t[None])[0]), (None, 0))(stored, tokens)
        return lifted, dense, one, Net().apply(compress.decompress(stored), tokens)

    lifted, dense, one, want = everything(stored)
    jax.tree.map(functools.partial(_close, rtol=1e-3, atol=1e-4), lifted, dense)
    _close(one, want)


def test_a_weight_stored_as_out_by_in():
    w, x = _normal(6, 20), _normal(3, 20, seed=1)
    apply = lambda p, x: jnp.tanh(jax.vmap(lambda v: p["weight"] @ v)(x))  # noqa: E731
    stored = low_rank({"weight": w}, rank=2, axis=0, where="weight")
    leaf = stored["weight"]
    assert (leaf.layout, leaf.a.shape, leaf.b.shape) == ("cr", (20, 2), (2, 6))
    _close(leaf.materialise(), (factorised(w.T, 2).materialise()).T)
    run = jax.jit(jax.value_and_grad(lambda p, x: compress.lift(apply)(p, x).sum(), (0, 1)))
    dense = jax.jit(jax.value_and_grad(lambda p, x: apply({"weight": (p["weight"].a @ p["weight"].b).T}, x).sum(), (0, 1)))
    jax.tree.map(_close, run(stored, x), dense(stored, x))


def test_stacked_layers_share_a_rank_and_stay_factors_in_a_scan():
    w = jnp.stack([_normal(8, 2, seed=k) @ _normal(2, 8, seed=9 + k) for k in range(2)] + [_normal(8, 3) @ _normal(3, 8, seed=4)])
    stored = low_rank({"kernel": w}, energy=1 - 1e-6, stacked=1)
    leaf = stored["kernel"]
    assert (leaf.layout, leaf.a.shape, leaf.b.shape) == ("rc", (3, 8, 3), (3, 3, 8))
    apply = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["kernel"])[0]  # noqa: E731
    x = _normal(5, 8)
    _close(jax.jit(compress.lift(apply))(stored, x), apply({"kernel": w}, x), rtol=1e-3, atol=1e-4)
    assert not {(8, 8), (3, 8, 8)} & _shapes(compress.lift(apply), stored, x)
    moments = {"kernel": jnp.broadcast_to(jnp.eye(8), (3, 8, 8))}
    weighted = low_rank({"kernel": w}, rank=3, stacked=1, moments=moments)
    _close(weighted["kernel"].materialise(), w, rtol=1e-3, atol=1e-4)
    many = jax.tree.map(lambda *fields: jnp.stack(fields), *[low_rank({"kernel": v}, rank=3) for v in w])
    assert many["kernel"].aval().shape == (3, 8, 8)
    _close(
        jax.vmap(compress.lift(lambda p, x: x @ p["kernel"]), (0, None))(many, x),
        jnp.einsum("bi,lio->lbo", x, w),
        rtol=1e-3,
        atol=1e-4,
    )


def test_moments_of_a_model_lower_the_error_of_its_outputs():
    x = _normal(64, 12) @ jnp.diag(jnp.geomspace(3, 0.01, 12)) @ jnp.linalg.qr(_normal(12, 12, seed=5))[0]
    params = {"Dense_0": {"kernel": _normal(12, 9, seed=1)}}
    path, w = "Dense_0/kernel", params["Dense_0"]["kernel"]
    moments = {path: x.T @ x, "elsewhere": jnp.eye(3)}
    error = lambda stored: float(jnp.linalg.norm(x @ (w - stored["Dense_0"]["kernel"].materialise())))  # noqa: E731
    plain, weighted = low_rank(params, rank=3), low_rank(params, rank=3, moments=moments)
    assert error(weighted) < 0.7 * error(plain)
    by_energy = low_rank(params, energy=0.99, moments=moments)
    assert error(by_energy) <= 0.1 * float(jnp.linalg.norm(x @ w)) * 1.001
    assert by_energy["Dense_0"]["kernel"].a.shape[1] <= low_rank(params, rank={path: 5})["Dense_0"]["kernel"].a.shape[1]


def test_weights_that_would_not_shrink_stay_dense():
    params = {"a": {"kernel": _normal(20, 20)}, "b": {"kernel": _normal(20, 4)}, "c": {"kernel": _normal(20, 20)}}
    stored = low_rank(params, rank=4)
    assert [tree.is_compressed(stored[name]["kernel"]) for name in "abc"] == [True, False, True]
    stored = low_rank(params, rank={"a/kernel": 2})
    assert [tree.is_compressed(stored[name]["kernel"]) for name in "abc"] == [True, False, False]
    # 9 (20 + 20) = 360 numbers are fewer than 400; 10 (20 + 20) are not.
    assert tree.is_compressed(low_rank(params, rank=9)["a"]["kernel"])
    with pytest.raises(ValueError, match=r"with rank=10 none of the 3 chosen weights would shrink: a/kernel \(20, 20\), b"):
        low_rank(params, rank=10)
    with pytest.raises(ValueError, match=r"with energy=1.0 none of the 3"):
        low_rank(params, energy=1.0)
    with pytest.raises(ValueError, match=r"b/kernel of shape \(20, 4\): rank=4 stores no fewer numbers .*; up to rank 3 does"):
        low_rank(params, rank={"b/kernel": 4})
    noisy = {"kernel": 5 * _normal(60, 3) @ _normal(3, 30, seed=1) + 0.1 * _normal(60, 30, seed=2)}
    assert low_rank(noisy, rank=factor.by_evidence)["kernel"].a.shape == (60, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"takes a rank or an energy: give one", low_rank),
        (ValueError, r"takes a rank or an energy: give one", lambda p: low_rank(p, rank=1, energy=0.5)),
        (ValueError, r"energy=0 is no share", lambda p: low_rank(p, energy=0)),
        (ValueError, r"energy=1.5 is no share", lambda p: low_rank(p, energy=1.5)),
        (ValueError, r"a/kernel of shape \(9, 8\): rank=0 does not fit a matrix \(9, 8\): give 1", lambda p: low_rank(p, 0)),
        (ValueError, r"rank is given for b/kernel, which is no chosen weight", lambda p: low_rank(p, {"b/kernel": 1})),
        (ValueError, r"moments lack a/kernel", lambda p: low_rank(p, 1, moments={})),
        (ValueError, r"a/kernel .* a second moment of shape \(8, 8\) does not fit weights \(9, 8\)",
         lambda p: low_rank(p, 1, moments={"a/kernel": jnp.eye(8)})),
        (ValueError, r"a/kernel of shape \(9, 8\): axis=2 and stacked=0 leave no matrix", lambda p: low_rank(p, 1, axis=2)),
        (ValueError, r"axis=\(0, -1\) and stacked=0 leave no matrix", lambda p: low_rank(p, 1, axis=(0, -1))),
        (ValueError, r"axis=-1 and stacked=1 leave no matrix", lambda p: low_rank(p, 1, stacked=1)),
        (ValueError, r"a/bias of shape \(8,\): axis=-1", lambda p: low_rank(p, 1, where="a/bias")),
        (ValueError, r"nothing matches where", lambda p: low_rank(p, 1, where="b")),
        (ValueError, r"a/kernel of shape \(9, 8\) holds NaN", lambda p: low_rank(jax.tree.map(lambda x: x / 0, p), 1)),
        (TypeError, r"a/kernel is compressed already, as LowRank", lambda p: low_rank(low_rank(p, 1), 1)),
        (TypeError, r"a/kernel has dtype int32", lambda p: low_rank(jax.tree.map(lambda x: x.astype(int), p), 1)),
        (TypeError, r"a/kernel of shape \(9, 8\): the rank is chosen on the host from singular values, which are traced here",
         jax.jit(lambda p: low_rank(p, energy=0.5))),
        (ValueError, r"factors \(4, 2\) and \(3, 5\) do not fit layout", lambda p: LowRank(jnp.ones((4, 2)), jnp.ones((3, 5)))),
        (ValueError, r"do not fit layout='rx'", lambda p: LowRank(jnp.ones((4, 2)), jnp.ones((2, 5)), "rx")),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_name_the_leaf(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call({"a": {"kernel": jnp.ones((9, 8)), "bias": jnp.ones(8)}})
    assert "\n" not in str(caught.value)


def test_a_rank_that_is_given_works_under_jit_and_vmap():
    w = _normal(2, 9, 8)
    store = lambda v: low_rank({"kernel": v}, rank=2)  # noqa: E731
    many = jax.jit(jax.vmap(store))(w)
    assert many["kernel"].layout == "rc"
    for k in range(2):
        _close(many["kernel"].materialise()[k], store(w[k])["kernel"].materialise())


def test_bfloat16_weights_have_bfloat16_factors():
    w = (_normal(20, 3) @ _normal(3, 16, seed=1)).astype(jnp.bfloat16)
    leaf = low_rank({"kernel": w}, rank=3)["kernel"]
    assert leaf.a.dtype == leaf.b.dtype == leaf.materialise().dtype == jnp.bfloat16
    assert tree.nbytes(leaf) == 2 * 3 * 36
    assert float(jnp.linalg.norm((leaf.materialise() - w).astype(jnp.float32))) < 0.01 * float(
        jnp.linalg.norm(w.astype(jnp.float32))
    )
    x = _normal(4, 20, seed=2).astype(jnp.bfloat16)
    _close(compress.lift(jnp.matmul)(x, leaf).astype(jnp.float32), (x @ w).astype(jnp.float32), rtol=0.05, atol=0.3)


def test_factors_train_and_do_not_decay():
    params = {"kernel": _normal(9, 8), "bias": jnp.ones(8)}
    stored, x = low_rank(params, rank=2), _normal(4, 9)
    tx = compress.optimizer(optax.adamw(0.1, weight_decay=1.0))
    loss = lambda p: jnp.sum(compress.lift(lambda p, x: x @ p["kernel"] + p["bias"][None])(p, x) ** 2)  # noqa: E731
    updates, _ = tx.update(jax.grad(loss)(stored), tx.init(stored), stored)
    moved = optax.apply_updates(stored, updates)
    assert float(loss(moved)) < float(loss(stored))
    assert bool((moved["kernel"].a != stored["kernel"].a).all())
    still, _ = tx.update(jax.tree.map(jnp.zeros_like, stored), tx.init(stored), stored)
    np.testing.assert_array_equal(still["kernel"].b, 0)
    assert bool((still["bias"] < 0).all())


def test_a_checkpoint_rebuilds_the_leaf():
    leaf = low_rank({"kernel": _normal(3, 3, 4, 8)}, rank=2)["kernel"]
    back = manifest.rebuild(*manifest.describe(leaf))
    assert jax.tree.structure(back) == jax.tree.structure(leaf)


def test_nuclear_norm_training_lands_on_a_low_rank():
    truth = 3 * jnp.linalg.qr(_normal(12, 2))[0] @ jnp.linalg.qr(_normal(10, 2, seed=1))[0].T
    x = _normal(200, 12, seed=2)
    y = x @ truth + 0.1 * _normal(200, 10, seed=3)
    tx = optax.chain(
        optax.sgd(0.3), regularize.proximal(regularize.prox.singular_value_threshold, 0.3, learning_rate=0.3, where="kernel")
    )
    params = {"kernel": 0.3 * _normal(12, 10, seed=4)}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(lambda p: jnp.sum((x @ p["kernel"] - y) ** 2) / 400)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (trained, _), _ = jax.jit(lambda params: lax.scan(step, (params, tx.init(params)), length=60))(params)
    assert low_rank(trained, energy=1 - 1e-6)["kernel"].a.shape == (12, 2)
    with pytest.raises(ValueError, match="none of the 1 chosen"):  # at the start it has full rank
        low_rank(params, energy=1 - 1e-6)
    assert math.isclose(float(jnp.linalg.norm(trained["kernel"] - truth)), 0.3 * 2**0.5, rel_tol=0.5)
