"""Observers: scalar reimplementations in numpy, tables of the papers, and what must hold whatever the batches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.compress.arrays import histograms, observers

# By the state that they keep: those of a row share it.
_FAMILIES = {
    "extremes": [observers.min_max()],
    "moving extremes": [observers.moving_average()],
    "histogram": [
        observers.percentile(99.0, bins=256),
        observers.mse(bits=4, bins=256, steps=32),
        observers.mse(bits=4, symmetric=True, bins=256, steps=32),
        observers.entropy(bits=4, bins=256),
    ],
    "moments": [observers.laplace(bits=4), observers.gauss(bits=4)],
}


@functools.cache
def _compiled(observer):
    """The statistic of batches `[batches, ...]`, and its range."""

    def seen(batches):
        state, _ = jax.lax.scan(lambda state, x: (observer.update(state, x), None), observer.init(batches[0]), batches)
        return state, observer.range(state)

    return jax.jit(seen)


def _see(observer, batches) -> tuple[float, float]:
    return tuple(float(end) for end in _compiled(observer)(np.asarray(batches))[1])


def _entry(tree, k):
    return jax.tree.map(lambda leaf: leaf[k], tree)


def _histogram(observer, batches) -> histograms.Histogram:
    return jax.device_get(_compiled(observer)(np.asarray(batches))[0])


@functools.cache
def _heavy() -> np.ndarray:
    """Student's t with three degrees of freedom: most values near 0, a few far out."""
    return np.random.default_rng(0).standard_t(3, size=4096).astype(np.float32)


# The histogram.


def test_a_histogram_by_hand():
    # 8 bins for [0, 7]: width 1. Then -9 comes, and [-9, 7] needs 17: the width grows to 4, bins [-12, -8), ..., [16, 20).
    observer = observers.percentile(100.0, bins=8)
    state = _histogram(observer, [[0.0, 0.5, 3.0, 7.0], [0.0, 0.0, 0.0, 1.0]])
    assert (state.counts.tolist(), int(state.exponent), int(state.first)) == ([5, 1, 0, 1, 0, 0, 0, 1], 0, 0)
    state = _histogram(observer, [[0.0, 0.5, 3.0, 7.0], [-9.0, -9.0, 2.0, 4.0]])
    assert (state.counts.tolist(), int(state.exponent), int(state.first)) == ([2, 0, 0, 4, 2, 0, 0, 0], 2, -3)
    assert (float(state.low), float(state.high)) == (-9, 7)
    np.testing.assert_array_equal(state.edges, np.arange(-12, 21, 4))


def test_a_histogram_is_that_of_all_values_on_its_grid_in_whatever_order_they_came():
    random = np.random.default_rng(1)
    batches = np.stack([random.normal(3 * k, 10.0**k, 60) for k in range(4)])
    batches = (np.array([1e-30, 1.0, 1e30])[:, None, None] * batches).astype(np.float32)
    observer = observers.percentile(bins=64)

    def every_way(batches):
        def scanned(batches):
            return jax.lax.scan(lambda state, x: (observer.update(state, x), None), observer.init(batches[0]), batches)[0]

        ordered = jax.vmap(scanned)(jnp.stack([batches, batches[::-1]]))
        single = jax.vmap(scanned)(batches[:, None])
        pairs = jax.vmap(observer.merge)(_entry(single, jnp.array([2, 3])), _entry(single, jnp.array([0, 1])))
        merged = observer.merge(_entry(pairs, 0), _entry(pairs, 1))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), ordered, merged)

    states = jax.device_get(jax.jit(jax.vmap(every_way))(batches))
    for k, values in enumerate(batches.reshape(3, -1).astype(np.float64)):
        forward, *others = (_entry(states, (k, way)) for way in range(3))
        for other in others:
            jax.tree.map(np.testing.assert_array_equal, forward, other)
        edges = np.asarray(forward.edges).astype(np.float64)
        np.testing.assert_array_equal(forward.counts, np.histogram(values, edges)[0])
        assert forward.counts.sum() == 240
        # No coarser than it must be: on half the width the values would not fit.
        finer = np.floor(values / (edges[1] - edges[0]) * 2)
        assert finer.max() - min(finer.min(), 0) + 1 > 64


def test_a_histogram_of_nothing_and_of_zeros():
    observer = _FAMILIES["histogram"][1]
    assert _see(observer, np.zeros((1, 0), np.float32)) == (np.inf, -np.inf)
    assert _see(observer, np.zeros((2, 5), np.float32)) == (0, 0)
    assert _see(observer, np.float32([[0] * 5, [1] * 5])) == (0, 1)


# Ranges against scalar reimplementations.


@pytest.mark.parametrize("percent", [99.0, 100.0])
def test_percentiles_are_numpys_within_a_bin(percent):
    x = _heavy()
    low, high = _see(observers.percentile(percent, bins=1024), x.reshape(4, -1))
    width = (x.max() - x.min()) / 512
    np.testing.assert_allclose([low, high], np.percentile(x, [100 - percent, percent]), atol=width)


def _rounding_error(x: np.ndarray, low: float, high: float, bits: int) -> float:
    scale = (high - low) / (2**bits - 1)
    lowest = round(low / scale)
    total = 0.0
    for value in x.astype(np.float64):
        level = min(max(round(value / scale), lowest), lowest + 2**bits - 1)
        total += (scale * level - value) ** 2
    return total / len(x)


@pytest.mark.parametrize("bits", [3, 8])
def test_the_error_over_a_histogram_is_that_of_the_values(bits):
    # Eight values spread over each of the bins, so that "evenly" holds.
    edges = np.arange(-24, 40) / 8
    counts = np.random.default_rng(2).integers(0, 3, 64)
    x = np.concatenate([edge + (np.arange(16) + 0.5) / 128 for edge, n in zip(edges, counts, strict=True) for _ in range(n)])
    x = np.concatenate([x, [-3.0, 4.999]]).astype(np.float32)
    state = _histogram(observers.percentile(bins=64), x[None])
    assert float(state.width) == 1 / 8
    ranges = np.float32([(-3.0, 5.0), (-1.0, 2.0), (0.0, 7.0), (-0.3, 0.2)])
    errors = jax.jit(jax.vmap(lambda ends: histograms.squared_error(state, *observers._levels(ends[0], ends[1], bits))))(ranges)
    expected = [_rounding_error(x, float(low), float(high), bits) for low, high in ranges]
    np.testing.assert_allclose(errors / state.counts.sum(), expected, rtol=0.03)


@pytest.mark.parametrize("bits", [2, 8])
def test_the_range_of_least_error_costs_no_more_than_the_extremes(bits):
    x = _heavy()
    chosen = _see(observers.mse(bits=bits), x[None])
    plain = _rounding_error(x, float(x.min()), float(x.max()), bits)
    assert _rounding_error(x, *chosen, bits) < (0.5 if bits < 8 else 0.99) * plain
    # And no more than any of a grid of others, searched by brute force: within what a bin and a step of the search can hide.
    others = [_rounding_error(x, a * float(x.min()), b * float(x.max()), bits) for a in (0.1, 0.2, 0.4) for b in (0.1, 0.2, 0.4)]
    assert _rounding_error(x, *chosen, bits) < 1.05 * min(others)


def test_a_symmetric_range_of_least_error():
    x = _heavy()
    low, high = _see(observers.mse(bits=4, symmetric=True), x[None])
    assert low == -high
    scales = np.linspace(0.02, 1, 50) * np.abs(x).max() / 7
    errors = [np.mean((np.clip(np.round(x / s), -7, 7) * s - x) ** 2) for s in scales]
    got = np.mean((np.clip(np.round(x * 7 / high), -7, 7) * high / 7 - x) ** 2)
    assert got < 1.02 * min(errors)


def _entropy_by_hand(counts: list[float], levels: int) -> list[float]:
    """Migacz's algorithm, list by list: the divergence for each number of bins that is kept."""
    divergences = []
    used = max(j for j, count in enumerate(counts) if count) + 1
    for kept in range(levels, used + 1):
        p = list(counts[:kept])
        p[-1] += sum(counts[kept:])
        merged, q = kept // levels, [0.0] * kept
        for level in range(levels):
            group = range(level * merged, kept if level == levels - 1 else (level + 1) * merged)
            filled = [j for j in group if counts[j]]
            for j in filled:
                q[j] = sum(counts[k] for k in group) / len(filled)
        q = [max(b, 1e-4) if a else 0.0 for a, b in zip(p, q, strict=True)]
        divergences.append(sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True) if a))
    return divergences


@pytest.mark.parametrize("negative", [True, False])
def test_the_range_of_least_information_lost_is_that_of_the_lists(negative):
    x = _heavy() if negative else np.abs(_heavy())
    bits, bins = 3, 64
    observer = observers.entropy(bits=bits, bins=bins)
    state = _histogram(observer, x[None])
    folded = np.zeros(bins)
    for i, count in enumerate(state.counts):
        place = int(state.first) + i
        folded[place if place >= 0 else -1 - place] += count
    levels = 2 ** (bits - negative)
    divergences = _entropy_by_hand(folded.tolist(), levels)
    limit = (int(np.argmin(divergences)) + levels + 0.5) * float(state.width)
    expected = (max(float(x.min()), -limit), min(float(x.max()), limit))
    np.testing.assert_allclose(_see(observer, x[None]), expected, rtol=1e-6)
    assert limit < 0.8 * np.abs(x).max()


def test_clipping_is_that_of_the_papers_table():
    # Banner et al. give 2.83, 3.89 and 5.03 for Laplace, and 1.71, 2.15 and 2.55 for Gauss.
    np.testing.assert_allclose([observers.laplace_clipping(bits) for bits in (2, 3, 4)], [2.83, 3.89, 5.03], atol=0.01)
    np.testing.assert_allclose([observers.gauss_clipping(bits) for bits in (2, 3, 4)], [1.71, 2.15, 2.55], atol=0.01)


@pytest.mark.parametrize("kind", ["laplace", "gauss"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clipping_is_the_least_of_the_error_integrated(kind, bits):
    x = np.linspace(0, 40, 400_001)
    density = 0.5 * np.exp(-x) if kind == "laplace" else np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)

    def error(alpha):
        beyond = np.where(x > alpha, (x - alpha) ** 2, 0)
        return 2 * np.trapezoid(beyond * density, x) + alpha**2 / (3 * 4**bits)

    best = getattr(observers, f"{kind}_clipping")(bits)
    assert error(best) < min(error(best * 0.98), error(best * 1.02))


@pytest.mark.parametrize("kind", ["laplace", "gauss"])
def test_the_analytic_range_follows_the_distribution(kind):
    random = np.random.default_rng(3)
    draw = random.laplace if kind == "laplace" else random.normal
    x = draw(0.0, 2.0, 40_000).astype(np.float32)
    alpha = getattr(observers, f"{kind}_clipping")
    observer = getattr(observers, kind)(bits=4)
    np.testing.assert_allclose(_see(observer, x[None] + 3), (3 - 2 * alpha(4), 3 + 2 * alpha(4)), rtol=0.02, atol=0.1)
    # What a ReLU leaves has all the codes on one side: the range of one bit more.
    np.testing.assert_allclose(_see(observer, np.maximum(x[None], 0)), (0, 2 * alpha(5)), rtol=0.03)
    # Never beyond what was seen.
    assert _see(observer, np.float32([[-1, 1, -1, 1]])) == (-1, 1)


def test_the_moving_average_is_that_of_a_loop():
    batches = [np.random.default_rng(k).normal(size=5).astype(np.float32) for k in range(4)]
    low, high = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        low, high = 0.8 * low + 0.2 * batch.min(), 0.8 * high + 0.2 * batch.max()
    np.testing.assert_allclose(_see(observers.moving_average(0.8), batches), (low, high), rtol=1e-6)
    assert _see(observers.moving_average(0.0), batches) == (batches[-1].min(), batches[-1].max())


# What holds for all of them.


@pytest.mark.slow
@pytest.mark.parametrize("name", _FAMILIES)
def test_observers_run_in_a_scan_under_vmap_and_merge(name):
    observer, ranges_of = _FAMILIES[name][0], [observer.range for observer in _FAMILIES[name]]
    rows = observers.per_channel(observer, axis=0)
    x = np.random.default_rng(4).normal(size=(3, 4, 50)).astype(np.float32) * np.float32([1, 5, 20])[:, None, None]
    bad = np.float32([[1.0, np.nan, 2.0], [1.0, np.inf, -2.0], [-np.inf, 1.0, 2.0]])

    def everything(x, bad):
        def scanned(batches):
            return jax.lax.scan(lambda state, x: (observer.update(state, x), None), observer.init(batches[0]), batches)[0]

        mapped = jax.vmap(scanned)(x)
        one, halves = _entry(mapped, 1), jax.vmap(scanned)(x[1].reshape(2, 2, 50))
        merged, nothing = observer.merge(_entry(halves, 0), _entry(halves, 1)), observer.init(x[0, 0])
        single = jax.tree.map(lambda *leaves: jnp.stack(leaves), merged, observer.merge(nothing, one), nothing)
        spoiled = jax.vmap(lambda x: observer.update(nothing, x))(bad)
        states = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), mapped, single, spoiled)
        channels = jax.lax.scan(lambda state, x: (rows.update(state, x), None), rows.init(x[:, 0]), jnp.swapaxes(x, 0, 1))[0]
        return [jax.vmap(range_of)(states) for range_of in ranges_of], rows.range(channels)

    ranges, channels = jax.device_get(jax.jit(everything)(x, bad))
    np.testing.assert_allclose(channels, np.array(ranges[0])[:, :3], rtol=1e-5)
    for low, high in ranges:
        assert (low[:3] < 0).all()
        assert (high[:3] > 0).all()
        np.testing.assert_allclose([low[4], high[4]], [low[1], high[1]], rtol=1e-6)
        if name != "moving extremes":  # which forget, so that the order counts
            np.testing.assert_allclose([low[3], high[3]], [low[1], high[1]], rtol=1e-4)
        assert (low[5], high[5]) == (np.inf, -np.inf)
        # What is not finite comes out.
        assert not (np.isfinite(low[6:]) & np.isfinite(high[6:])).any()


@pytest.mark.parametrize("name", _FAMILIES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64, jnp.int8])
def test_states_and_ranges_keep_their_types_whatever_is_seen(name, dtype):
    with jax.enable_x64(True):
        for observer in _FAMILIES[name]:
            x = jax.ShapeDtypeStruct((5,), dtype)
            state = jax.eval_shape(lambda: observer.init(x))  # noqa: B023
            types = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
            for new in (jax.eval_shape(observer.update, state, x), jax.eval_shape(observer.merge, state, state)):
                assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new) == types
            assert [end.dtype for end in jax.eval_shape(observer.range, state)] == [jnp.float32] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: observers.moving_average(1.0), r"decay must lie in \[0, 1\); got 1.0"),
        (lambda: observers.percentile(50), r"percent must lie in \(50, 100\]; got 50"),
        (lambda: observers.percentile(99, bins=4), "bins must be at least 8; got 4"),
        (lambda: observers.mse(bits=1), "bits must be a whole number from 2 to 16; got 1"),
        (lambda: observers.mse(steps=1), "steps must be at least 2"),
        (lambda: observers.entropy(bits=8, bins=256), "bins must be at least 512 for 8 bits; got 256"),
        (lambda: observers.laplace(bits=17), "bits must be a whole number from 2 to 16; got 17"),
        (lambda: observers.gauss(bits=2.5), "bits must be a whole number"),
        (lambda: observers.per_channel(observers.min_max(), axis=2).init(jnp.ones((2, 3))), r"axis=2 is no axis .* \(2, 3\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
