"""Rounding by second moments, and forms that round better: scalar reimplementations, exhaustive search, and what must hold."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.compress.arrays import affine, hadamard, scaling
from jaxopt_lab.compress.arrays.adaround import adaround
from jaxopt_lab.compress.arrays.gptq import gptq


def _case(n: int = 24, m: int = 8):
    """Weights, correlated inputs with means, and their second moment."""
    rng = np.random.default_rng(n)
    mixing = rng.normal(size=(n, n)) * np.exp(-np.arange(n) / (0.2 * n))[:, None]
    x = (rng.normal(size=(8 * n, n)) @ mixing + 0.5).astype(np.float32)
    return rng.normal(size=(n, m)).astype(np.float32), x, x.T @ x


def _error(w, moment, codes, scale, zero_point=0):
    """The error of each output, in numpy."""
    codes, scale, zero_point = (np.asarray(a, np.float64) for a in (codes, scale, zero_point))
    scale, zero_point = (np.repeat(a, len(w) // len(a), axis=0) if a.ndim else a for a in (scale, zero_point))
    d = w - scale * (codes - zero_point)
    return np.sum(d * (moment @ d), axis=0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _nearest(w, bits, group=None, symmetric=True):
    """The codes of rounding to nearest, and the scales."""
    along = None if group is None else (group, 0)
    if symmetric:
        scales = (affine.choose_scale(w, bits=bits, group=along),)
    else:
        scales = affine.choose_scale_and_zero(w, bits=bits, group=along)
    return affine.to_codes(w, *scales, bits=bits), scales


def _obq(w, moment, scale, bits, damping, order):
    """The codes of optimal brain quantisation in a fixed order: the inverse is formed, and an input eliminated at a time."""
    n, m = w.shape
    w = np.array(w, np.float64)[order]
    h = np.array(moment, np.float64)[np.ix_(order, order)]
    inverse = np.linalg.inv(h + damping * np.mean(np.diag(h)) * np.eye(n))
    high, codes = 2 ** (bits - 1) - 1, np.zeros((n, m), int)
    for i in range(n):
        for c in range(m):
            codes[order[i], c] = min(max(round(w[i, c] / scale[0, c]), -high), high)
            error = (w[i, c] - codes[order[i], c] * scale[0, c]) / inverse[i, i]
            for j in range(i + 1, n):
                w[j, c] -= error * inverse[i, j]
        for j in range(i + 1, n):
            for k in range(i + 1, n):
                inverse[j, k] -= inverse[j, i] * inverse[i, k] / inverse[i, i]
    return codes


@pytest.mark.parametrize(("block", "by_activation"), [(4, False), (128, True)])
def test_gptq_is_optimal_brain_quantisation_in_order(block, by_activation):
    w, _, moment = _case(6, 4)
    nearest, (scale,) = _nearest(w, 4)
    order = np.argsort(-np.diag(moment)) if by_activation else np.arange(6)
    codes = jax.jit(functools.partial(gptq, damping=0.02, block=block, activation_order=by_activation))(w, moment, scale)
    np.testing.assert_array_equal(codes, _obq(w, moment, np.asarray(scale, np.float64), 4, 0.02, order))
    assert not np.array_equal(codes, nearest)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "options"),
    [(4, None, True, {}), (3, 8, True, {"activation_order": True, "block": 10}), (3, None, False, {}), (1, 6, True, {})],
)
def test_gptq_is_below_rounding_to_nearest(bits, group, symmetric, options):
    w, _, moment = _case()
    nearest, scales = _nearest(w, bits, group, symmetric)
    codes = jax.jit(functools.partial(gptq, bits=bits, **options))(w, moment, *scales)
    low, high = affine.code_range(bits, symmetric)
    assert codes.dtype == jnp.int8
    assert low <= int(codes.min()) <= int(codes.max()) <= high
    # One bit cannot make up for much.
    share = 0.6 if bits > 1 else 0.9
    assert _error(w, moment, codes, *scales).sum() < share * _error(w, moment, nearest, *scales).sum()


def test_gptq_without_correlations_rounds_to_nearest():
    w, _, _ = _case()
    w[2, 3] = 0
    nearest, (scale,) = _nearest(w, 3)
    moments = np.stack([np.diag(np.arange(24.0, dtype=np.float32) ** 3), np.zeros((24, 24), np.float32)])
    for codes in jax.jit(jax.vmap(functools.partial(gptq, bits=3), (None, 0, None)))(w, moments, scale):
        np.testing.assert_array_equal(codes, nearest)


def test_dead_inputs_zeros_and_singular_moments():
    w, x, _ = _case()
    x[:, 3], w[5] = 0, 0
    nearest, (scale,) = _nearest(w, 4)
    alive, run = np.delete(np.arange(24), 3), jax.jit(functools.partial(gptq, block=8))
    codes = np.asarray(run(w, x.T @ x, scale))
    np.testing.assert_array_equal(codes[3], nearest[3])
    np.testing.assert_array_equal(codes[5], 0)
    np.testing.assert_array_equal(run(w, 1e3 * (x.T @ x), scale), codes)
    # Its share of the mean of the diagonal is all that a dead input changes.
    moment = x[:, alive].T @ x[:, alive]
    without = jax.jit(functools.partial(gptq, damping=0.01 * 23 / 24))(w[alive], moment, scale)
    np.testing.assert_array_equal(codes[alive], without)
    # Inputs that are all the same have no Cholesky factor without damping; the last one makes up for all errors but half a step.
    same = np.ones((24, 24), np.float32)
    rounded = jax.jit(functools.partial(gptq, damping=0.0))(w, same, scale)
    assert (_error(w, same, rounded, scale) <= 1.01 * (np.asarray(scale[0]) / 2) ** 2).all()
    assert _error(w, same, rounded, scale).sum() < 0.3 * _error(w, same, nearest, scale).sum()


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"damping": -1.0}, "damping"),
        ({"block": 0}, "block"),
        ({"scale": np.ones((3, 2), np.float32)}, r"need a scale of two sides that divide theirs: got \(3, 2\)"),
        ({"moment": np.eye(3)}, r"\[n, n\]: got \(4, 2\) and \(3, 3\)"),
        ({"moment": np.full((4, 4), np.nan, np.float32)}, "no Cholesky factor"),
    ],
)
def test_gptq_refuses_what_it_cannot_do(kwargs, error):
    given = {"w": np.ones((4, 2), np.float32), "moment": np.eye(4, dtype=np.float32), "scale": np.ones((1, 2), np.float32)} | kwargs
    with pytest.raises(ValueError, match=error):
        gptq(**{name: jnp.asarray(value) if name in ("w", "moment", "scale") else value for name, value in given.items()})


def test_adaround_comes_near_a_search_over_all_roundings():
    w, _, moment = _case(6, 16)
    nearest, (scale,) = _nearest(w, 3)
    floor = np.floor(w / np.asarray(scale))
    best = np.full(16, np.inf)
    for up in itertools.product([0, 1], repeat=6):
        best = np.minimum(best, _error(w, moment, np.clip(floor + np.array(up)[:, None], -3, 3), scale))
    found = _error(w, moment, jax.jit(functools.partial(adaround, bits=3))(w, moment, scale), scale)
    before = _error(w, moment, nearest, scale)
    assert (found >= best * (1 - 1e-6)).all()
    assert (found <= before).all()
    assert found.sum() < best.sum() + 0.5 * (before.sum() - best.sum())


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, None, True), (3, 12, True), (3, None, False)])
def test_adaround_is_below_rounding_to_nearest_and_never_worse(bits, group, symmetric):
    w, _, moment = _case()
    w[4] = 0
    nearest, scales = _nearest(w, bits, group, symmetric)
    codes = jax.jit(functools.partial(adaround, bits=bits, steps=300, learning_rate=0.03))(w, moment, *scales)
    found, before = _error(w, moment, codes, *scales), _error(w, moment, nearest, *scales)
    assert (found <= before * (1 + 1e-6)).all()
    assert found.sum() < 0.5 * before.sum()
    np.testing.assert_array_equal(codes[4], nearest[4])
    assert np.abs(np.asarray(codes, int) - nearest).max() == 1


def test_adaround_keeps_rounding_to_nearest_where_it_learns_nothing():
    w, _, moment = _case()
    nearest, (scale,) = _nearest(w, 4)
    codes = jax.jit(functools.partial(adaround, steps=3, learning_rate=1e-6))(w, moment, scale)
    np.testing.assert_array_equal(codes, nearest)
    for kwargs in ({"bits": 1}, {"steps": 0}, {"warmup": 1.0}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            adaround(w, moment, scale, **kwargs)


def test_awq_searches_the_grid():
    w, x, _ = _case(10, 6)
    x *= np.array([30.0] + [1.0] * 8 + [0.0], np.float32)
    moment, size = x.T @ x, np.abs(x).mean(0)

    def round_trip(w):
        scale = affine.choose_scale(w, bits=3)
        return affine.to_codes(w, scale, bits=3) * scale

    scale, power = jax.jit(lambda w, h, s: scaling.awq_scale(w, h, s, round_trip, steps=5))(w, moment, size)
    errors, grid = [], np.linspace(0, 1, 5)
    filled = np.where(size > 0, size, size[:-1].min()).astype(np.float64)
    for alpha in grid:
        s = filled**alpha / np.sqrt(filled.max() ** alpha * filled.min() ** alpha)
        scaled = s[:, None] * w
        steps = np.abs(scaled).max(0) / 3
        rounded = np.round(scaled / steps) * steps / s[:, None]
        errors.append(sum(np.sum((row @ (rounded - w)) ** 2) for row in x))
        if alpha == power:
            np.testing.assert_allclose(scale, s, rtol=1e-5)
    assert float(power) == grid[int(np.argmin(errors))] > 0
    assert min(errors) < 0.5 * errors[0]
    with pytest.raises(ValueError, match="steps"):
        scaling.awq_scale(w, moment, size, round_trip, steps=1)


def test_smoothing_and_equalising_share_the_range_and_corrections_are_shifts():
    w, x, _ = _case(7, 5)
    x[:, 2] *= 50
    s = np.asarray(scaling.smooth_scale(jnp.abs(x).max(0), w))
    np.testing.assert_allclose(np.abs(x / s).max(0), np.abs(s[:, None] * w).max(1), rtol=1e-5)
    with pytest.raises(ValueError, match="strength"):
        scaling.smooth_scale(x[0], w, 1.5)
    second = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32) * np.array([[100.0], [1.0], [0.1], [0.0], [3.0]])
    r = np.asarray(scaling.equalization_scale(w, second))
    ranges = np.abs(w / r).max(0), np.abs(r[:, None] * second).max(1)
    np.testing.assert_allclose(np.delete(ranges[0], 3), np.delete(ranges[1], 3), rtol=1e-5)
    assert r[3] == 1
    shift = scaling.output_shift(w, np.round(w), x.mean(0))
    np.testing.assert_allclose(shift, (x @ np.round(w) - x @ w).mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [1, 7, 12, 256])
def test_the_transform_is_its_definition(n):
    power = (n & -n).bit_length() - 1
    walsh, odd = 2**power, n >> power
    dense = np.zeros((n, n))
    for i, j in np.ndindex(n, n):
        angle = 2 * np.pi * (i % odd) * (j % odd) / odd
        sign = (-1) ** bin((i // odd) & (j // odd)).count("1")
        dense[i, j] = sign * (np.cos(angle) + np.sin(angle)) / np.sqrt(walsh * odd)
    np.testing.assert_allclose(dense @ dense, np.eye(n), atol=1e-12)
    assert np.abs(dense).max() <= np.sqrt(2 / n) + 1e-12
    x = np.random.default_rng(n).normal(size=(3, n, 2)).astype(np.float32)
    y = jax.jit(hadamard.transform, static_argnums=1)(x, 1)
    np.testing.assert_allclose(y, np.einsum("ij,bjc->bic", dense, x), atol=1e-5)
    half = jax.jit(hadamard.transform, static_argnums=1)(x.astype(jnp.bfloat16), -2)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.05)


def test_rotations_spread_outliers_and_keep_products():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(16, 96)).astype(np.float32), rng.normal(size=(96, 4)).astype(np.float32)
    x[:, 5] = 100
    signs = hadamard.random_signs(jax.random.key(2), 96)

    @jax.jit
    def turned_and_back(x, w):
        turned = hadamard.rotate(x, signs)
        return turned, hadamard.rotate(w, signs, 0), hadamard.rotate_back(turned, signs)

    turned, of_w, back = map(np.asarray, turned_and_back(x, w))
    peaks = [np.mean(np.abs(a).max(1) / np.sqrt(np.square(a).mean(1))) for a in (x, turned)]
    assert peaks[1] < 0.4 * peaks[0]
    np.testing.assert_allclose(turned @ of_w, x @ w, rtol=1e-4, atol=2e-3)
    np.testing.assert_allclose(back, x, atol=1e-4)
