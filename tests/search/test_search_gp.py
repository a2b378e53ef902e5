"""The array core of the process: against scikit-learn, differences, high precision and brute force; padding; compilation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

from jaxopt_lab.search.gp import acquisition, buckets, kernel, maximise, outputs, process, suggest
from jaxopt_lab.search.gp.precision import exactly

RNG = np.random.default_rng(0)
N, D = 13, 3
X = RNG.random((N, D))
Y = outputs.standardise(np.sin(5 * X[:, 0]) + X[:, 1] ** 2 + 0.1 * RNG.normal(size=N))
NEW = RNG.random((7, D))
LENGTHS, SCALE, NOISE = np.array([0.3, 0.7, 2.0]), 1.7, 0.02
NUMBERS = np.zeros(D, bool)


WARPS = np.array([[-1.2, 0.0, 0.7], [0.4, -0.9, 0.0]])


def hyper(dims, warps=None):
    warps = None if warps is None else buckets.pad(warps, 2, dims)
    return process.Hyper(buckets.pad(-2 * np.log(LENGTHS), dims), np.log(SCALE), np.log(NOISE), warps)


def unpadded(x=X, y=Y, categorical=NUMBERS):
    return process.Data(x, y, np.ones(len(x), bool), categorical, np.ones(x.shape[1], bool))


@pytest.fixture(scope="module")
def reference():
    k = kernels.ConstantKernel(SCALE) * kernels.Matern(LENGTHS, nu=2.5) + kernels.WhiteKernel(NOISE)
    return GaussianProcessRegressor(k, optimizer=None, alpha=0).fit(X, Y)


@pytest.fixture(scope="module")
def given():
    with exactly():
        return jax.jit(process.condition)(hyper(4), process.data(X, Y, NUMBERS))


@pytest.fixture(scope="module")
def new():
    return buckets.pad(NEW, 7, 4)


def test_evidence_and_posterior_are_those_of_scikit_learn(reference, given, new):
    with exactly():
        mean, variance = jax.jit(process.posterior)(given, new)
        evidence = jax.jit(process.log_evidence)(hyper(4), process.data(X, Y, NUMBERS))
    expected, deviation = reference.predict(NEW, return_std=True)
    np.testing.assert_allclose(mean, expected, atol=1e-10)
    # Theirs is of a noisy value.
    np.testing.assert_allclose(variance, deviation**2 - NOISE, atol=1e-10)
    np.testing.assert_allclose(evidence, reference.log_marginal_likelihood_value_, atol=1e-9)


def test_float32_is_close(reference, new):
    small = jax.tree.map(
        lambda a: jnp.asarray(a, None if np.asarray(a).dtype == bool else jnp.float32), process.data(X, Y, NUMBERS)
    )
    small_hyper = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), hyper(4))
    mean, variance = jax.jit(lambda h, d, x: process.posterior(process.condition(h, d), x))(small_hyper, small, jnp.float32(new))
    assert mean.dtype == jnp.float32
    expected, deviation = reference.predict(NEW, return_std=True)
    np.testing.assert_allclose(mean, expected, atol=1e-4)
    np.testing.assert_allclose(variance, deviation**2 - NOISE, atol=1e-4)


def test_padding_changes_nothing(given, new):
    with exactly():
        bare = jax.jit(process.condition)(hyper(D), unpadded())
        of = jax.jit(process.posterior)
        for ours, theirs in zip(of(given, new), of(bare, NEW), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)
        of = jax.jit(process.log_evidence)
        both = of(hyper(4), process.data(X, Y, NUMBERS)), of(hyper(D), unpadded())
        np.testing.assert_allclose(*both, rtol=1e-12)


@pytest.mark.parametrize("warps", [None, WARPS], ids=["as they are", "warped"])
def test_gradient_of_the_density_is_that_of_differences(warps):
    data = process.data(X, Y, NUMBERS)
    flat = process._flat(hyper(4, warps))
    padded = [3] if warps is None else [3, 9, 13]
    with exactly():
        distances = kernel.squared_distances(data.x, data.x, data.categorical) if warps is None else None
        _, gradient = process._loss(flat, data, distances)
        for i in np.delete(np.arange(len(flat)), padded):
            # Five points, far enough apart that rounding in the logarithms of a warp does not tell.
            at = {k: float(process._loss(flat + 1e-3 * k * np.eye(len(flat))[i], data, distances)[0]) for k in (-2, -1, 1, 2)}
            slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / 12e-3
            np.testing.assert_allclose(gradient[i], slope, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(gradient[np.array(padded)], 0)


def warp(x, warps):
    """By the formula, in numpy; the corner is left out."""
    a, b = np.exp(warps)
    return 1 - (1 - x ** a[None]) ** b[None]


def test_a_warp_keeps_ends_order_and_what_is_no_number():
    x = np.linspace(0, 1, 101)[:, None] * np.ones((1, 3))
    with exactly():
        of = jax.jit(kernel.warped)
        np.testing.assert_allclose(of(x, NUMBERS, np.zeros((2, 3))), x, atol=1e-12)
        bent = np.asarray(of(x, NUMBERS, WARPS))
        np.testing.assert_array_equal(bent[[0, -1]], [[0, 0, 0], [1, 1, 1]])
        assert (np.diff(bent, axis=0) > 0).all()
        low, high = warp(np.full((1, 3), 1e-4), WARPS), warp(np.full((1, 3), 1 - 1e-4), WARPS)
        np.testing.assert_allclose(bent, (warp(1e-4 + (1 - 2e-4) * x, WARPS) - low) / (high - low), atol=1e-12)
        odd = np.array([[2.0, kernel.INACTIVE, -0.3], [1.0, 1.7, kernel.INACTIVE]])
        np.testing.assert_array_equal(of(odd, np.array([True, False, False]), WARPS), odd)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_warp_has_finite_derivatives_at_the_corners(dtype):
    corners = np.array([[0.0, 1.0, kernel.INACTIVE], [1.0, 0.0, 0.0]])
    with exactly():
        of = jax.jit(jax.vmap(jax.grad(lambda x, w: kernel.warped(x, NUMBERS, w).sum(), argnums=(0, 1)), (None, 0)))
        extremes = np.array([[[a] * 3, [b] * 3] for a in (-2, 0, 2) for b in (-2, 0, 2)])
        for slopes in of(jnp.asarray(corners, dtype), jnp.asarray(extremes, dtype)):
            assert slopes.dtype == dtype
            assert np.isfinite(slopes).all()


def test_a_warped_process_is_one_of_warped_points(new):
    with exactly():
        points, asked = (np.asarray(kernel.warped(x, NUMBERS, WARPS)) for x in (X, NEW))
        both = jax.jit(lambda h, d, x: (process.log_evidence(h, d), *process.posterior(process.condition(h, d), x)))
        plain = both(hyper(D), unpadded(points), asked)
        for of in (both(hyper(D, WARPS), unpadded(), NEW), both(hyper(4, WARPS), process.data(X, Y, NUMBERS), new)):
            for ours, theirs in zip(of, plain, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [pytest.param(60, marks=pytest.mark.slow), 150])
def test_a_warp_is_found_where_there_is_one(n):
    x = np.random.default_rng(1).random((n, 2))
    bent = warp(x, np.array([[-1.2, 0.0], [0.0, 0.0]]))
    data = process.data(x, outputs.standardise(np.sin(9 * bent[:, 0]) + bent[:, 1]), np.zeros(2, bool))
    without, found = process.fit(data), process.fit(data, warp=True)
    assert without.warps is None
    np.testing.assert_allclose(found.warps[:, 2:], 0)  # of what is padding
    with exactly():
        evidence = jax.jit(lambda h: process.log_evidence(h, data))
        assert evidence(found) > evidence(without) + 20
        density = jax.jit(lambda h: process.log_evidence(h, data) + process.log_prior(h, data.dims))
        assert density(found) > density(without) + 15
        at = np.linspace(0, 1, 51)[:, None] * np.ones((1, 4))
        curve = np.asarray(kernel.warped(at, np.zeros(4, bool), found.warps))[:, 0]
    assert np.abs(curve - warp(at, np.array([[-1.2] * 4, [0.0] * 4]))[:, 0]).max() < 0.1
    assert np.abs(curve - at[:, 0]).max() > 0.3


def test_a_warp_that_is_not_worth_it_is_none():
    x = np.random.default_rng(3).random((40, 2))
    data = process.data(x, outputs.standardise(np.sin(7 * x[:, 0] + 4 * x[:, 1])), np.zeros(2, bool))
    without, found = process.fit(data), process.fit(data, warp=True)
    assert without.warps is None
    np.testing.assert_array_equal(found.warps, np.zeros((2, 4)))
    for ours, theirs in zip(found[:3], without[:3], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_fit_finds_the_length_scales():
    x = np.random.default_rng(1).random((60, 2))
    found = process.fit(process.data(x, outputs.standardise(np.sin(9 * x[:, 0])), np.zeros(2, bool)))
    lengths = np.exp(-0.5 * found.inverse_squares)
    assert lengths[0] < 0.5
    assert lengths[1] > 2
    assert found.noise < np.log(1e-3)
    noisy = process.fit(process.data(x, outputs.standardise(np.random.default_rng(2).normal(size=60)), np.zeros(2, bool)))
    assert noisy.noise > np.log(0.05)
    known = process.fit(process.data(x, outputs.standardise(np.sin(9 * x[:, 0])), np.zeros(2, bool)), noise=0.3)
    np.testing.assert_allclose(np.exp(known.noise), 0.3)


def test_a_fit_to_many_starts_from_some():
    x = np.random.default_rng(1).random((150, 2))
    data = process.data(x, outputs.standardise(np.sin(9 * x[:, 0]) + x[:, 1]), np.zeros(2, bool))
    found, direct = process.fit(data), process.fit(data, start=process.Hyper(np.zeros(4), np.zeros(()), np.log(1e-2)))
    with exactly():
        loss = [
            float(process._loss(process._flat(h), data, kernel.squared_distances(data.x, data.x, data.categorical))[0])
            for h in (found, direct)
        ]
    assert loss[0] < loss[1] + 1.0  # of some hundreds


def test_points_that_coincide_have_a_finite_posterior():
    x = np.concatenate([X, X[:3] + 1e-9, X[:2]])
    data = process.data(x, np.concatenate([Y, Y[:3], Y[:2]]), NUMBERS)
    found = process.fit(data, noise=0.0)
    with exactly():
        moments = jax.jit(process.posterior)(process.condition(found, data), data.x)
    assert all(np.isfinite(each).all() for each in moments)


def test_categories_and_what_is_not_there():
    points = np.array([[0.0, 0.2], [2.0, 0.2], [2.0, kernel.INACTIVE]])
    squares = kernel.squared_distances(points, points, np.array([True, False]))
    np.testing.assert_allclose(squares[0, 1], [1, 0])
    np.testing.assert_allclose(squares[1, 2], [0, 1])
    np.testing.assert_allclose(squares[2, 2], [0, 0])


def test_log_h_in_the_far_tail():
    """Against the integral of the tail of the normal distribution, h(z) = E max(0, z + e), scaled by its density."""

    def exact(z):
        # \int_0^\infty t \phi(t - z) dt = \phi(z) \int_0^\infty t exp(t z - t^2 / 2) dt
        scale = max(1.0, abs(z))
        integral = scipy.integrate.quad(
            lambda s: s * math.exp(s * z / scale - (s / scale) ** 2 / 2), 0, 60, epsabs=0, epsrel=1e-13
        )[0]
        return -(z**2) / 2 - 0.5 * math.log(2 * math.pi) + math.log(integral) - 2 * math.log(scale)

    z = np.array([-1e4, -300, -40, -12.1, -11.9, -5, -1.01, -0.99, 0, 2.0])
    with exactly():
        np.testing.assert_allclose(jax.jit(acquisition.log_h)(z), [exact(each) for each in z], rtol=1e-11)
        slope = jax.jit(jax.vmap(jax.grad(acquisition.log_h)))
        slopes = slope(z)
        np.testing.assert_allclose(slopes, [(exact(each + 1e-5) - exact(each - 1e-5)) / 2e-5 for each in z], rtol=1e-4)
        assert np.isfinite(slope(np.full(10, -1e100))).all()
    narrow = jax.jit(acquisition.log_h)(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(narrow, [exact(each) for each in z], rtol=1e-4, atol=1e-4)


def brute(front, reference, y):
    """Hypervolume that points [s, M] add to a front, by inclusion and exclusion over the boxes of its points."""

    def volume(points):
        total = np.zeros(len(y))
        for mask in range(1, 2 ** len(points)):
            chosen = [points[i] for i in range(len(points)) if mask >> i & 1]
            corner = np.min(np.broadcast_arrays(*chosen), axis=0)
            total = total + (-1) ** (len(chosen) + 1) * np.prod(np.maximum(corner - reference, 0), axis=-1)
        return total

    known = [np.broadcast_to(point, y.shape) for point in front]
    return volume([*known, y]) - volume(known)


@pytest.mark.parametrize("objectives", [1, 2, 4])
def test_expected_hypervolume_is_that_of_draws(objectives):
    rng = np.random.default_rng(objectives)
    front, reference = rng.random((4, objectives)), np.full(objectives, -0.1)
    mean, variance = np.full(objectives, 0.6), rng.uniform(0.05, 0.2, objectives)
    lower, upper = acquisition.boxes(front, reference)
    draws = mean + np.sqrt(variance) * rng.normal(size=(200_000, objectives))
    with exactly():
        gain = np.exp(jax.jit(acquisition.log_gain)(mean, variance, lower, upper))
    gains = brute(front, reference, draws)
    np.testing.assert_allclose(gain, gains.mean(), atol=4 * gains.std() / math.sqrt(len(draws)))
    # The boxes do not overlap, and tile what is added: for a certain value the gain is the volume.
    for y in draws[:20]:
        pieces = np.prod(np.clip(np.minimum(y, upper) - lower, 0, None), axis=1).sum()
        np.testing.assert_allclose(pieces, brute(front, reference, y[None])[0], atol=1e-12)


@pytest.fixture(scope="module")
def asked():
    """A question with two objectives and a constraint, on a mixed space."""
    rng = np.random.default_rng(4)
    x = np.column_stack([rng.random(12), rng.random(12), rng.integers(0, 3, 12)])
    known = suggest.Known(x, np.column_stack([-x[:, 0], x[:, 0] - x[:, 1]]), x[:, :1] - 0.6, x[:2] + 0.01)
    columns = np.column_stack([outputs.standardise(c) for c in [*known.y.T, *known.constraints.T]])
    limits = suggest._standardised_limit(known.constraints[:, 0])[:, None]
    categorical = np.array([False, False, True, False])
    hypers = [process.Hyper(np.zeros(4), np.zeros(()), np.log(1e-3))] * 3
    with exactly():
        return suggest._ask(known, columns, columns[:, :2], limits, categorical, hypers, rng)


def test_gradient_of_a_score_is_that_of_differences(asked):
    question, _ = asked
    x = np.array([[0.31, 0.62, 1.0, 0.0], [0.8, 0.1, 0.0, 0.0]])
    with exactly():
        gradient = jax.jit(jax.grad(lambda x: maximise.score(question, x).sum()))(x)
        for d in (0, 1):
            e = 1e-6 * np.eye(4)[d]
            slope = (maximise.score(question, x + e) - maximise.score(question, x - e)) / 2e-6
            np.testing.assert_allclose(gradient[:, d], slope, rtol=1e-4)


def test_refinement_climbs_and_stays_where_it_must(asked):
    question, lengths = asked
    starts = np.column_stack([np.random.default_rng(0).random((12, 2)), np.arange(12) % 3, np.zeros(12)])
    low, high = starts.copy(), starts.copy()
    low[:, :2], high[:, :2] = 0, 1
    with exactly():
        before = maximise.score(question, starts)
        x, value = maximise.refined(question, starts, lengths, low, high)
        np.testing.assert_allclose(value, maximise.score(question, x), rtol=1e-8)
        assert (value >= before).all()
        np.testing.assert_array_equal(x[:, 2:], starts[:, 2:])
        assert ((x >= low) & (x <= high)).all()
        around = np.random.default_rng(1).random((400, 2))
        for category in range(3):
            grid = np.column_stack([around, np.full(400, category), np.zeros(400)])
            assert maximise.score(question, grid).max() <= value[category::3].max() + 1e-6


def test_fantasies_keep_what_is_known_and_have_the_posterior_moments(given, new):
    data = process.data(np.concatenate([X, NEW[:2]]), np.concatenate([Y, [0, 0]]), NUMBERS)
    pending = (np.arange(16) >= N) & (np.arange(16) < N + 2)
    with exactly():
        both = process.condition(hyper(4), data)
        drawn = jax.jit(maximise.fantasies)(both, data.y, pending, np.random.default_rng(0).normal(size=(20_000, 16)))
        mean, variance = (np.asarray(each) for each in jax.jit(process.posterior)(given, new[:2]))
    drawn = np.asarray(drawn)
    np.testing.assert_allclose(drawn[:, :N], np.broadcast_to(Y, (20_000, N)))
    np.testing.assert_allclose(drawn[:, N : N + 2].mean(0), mean, atol=0.03)
    np.testing.assert_allclose(drawn[:, N : N + 2].var(0), variance + NOISE, rtol=0.05)


@pytest.mark.parametrize("warped", [False, True])
def test_nothing_is_compiled_within_a_bucket(warped):
    space = suggest.Space(np.array([False, False, True]), np.array([0, 4, 3]))
    rng = np.random.default_rng(0)
    jitted = [process._loss, process._distances, suggest._processes, maximise.score, maximise.refined]

    def ask(n):
        x = suggest.draw(space, rng.random((n, 3)))
        known = suggest.Known(x, -((x[:, :1] - 0.3) ** 2), np.zeros((n, 0)), np.zeros((0, 3)))
        return suggest.suggest(space, known, rng, warp_inputs=warped)

    ask(5)
    before = [each._cache_size() for each in jitted]
    points = [ask(n) for n in (6, 11, 16)]
    assert [each._cache_size() for each in jitted] == before
    assert all(np.isin(point[1], [0.125, 0.375, 0.625, 0.875]) and point[2] in (0, 1, 2) for point in points)


def test_the_session_keeps_its_precision():
    with exactly():
        assert jnp.ones(()).dtype == jnp.float64
    assert jnp.ones(()).dtype == jnp.float32


def test_what_a_point_has_is_learnt():
    space = suggest.Space(np.array([True, False, True, False]), np.array([2, 0, 3, 0]))
    rng = np.random.default_rng(0)
    x = suggest.draw(space, rng.random((20, 4)))
    x[x[:, 0] == 0, 3] = kernel.INACTIVE
    assert suggest._roots(space, x, x > kernel.INACTIVE) == [0]
    limited = suggest._activity(space, x)(suggest.draw(space, rng.random((50, 4))))
    np.testing.assert_array_equal(limited[:, 3] > kernel.INACTIVE, limited[:, 0] == 1)


@pytest.mark.parametrize(
    ("x", "y", "named"),
    [(np.zeros((3, 2)), np.zeros(4), r"values \(3,\)"), (np.full((3, 2), np.nan), np.zeros(3), "finite")],
)
def test_bad_data_are_named(x, y, named):
    with pytest.raises(ValueError, match=named):
        process.data(x, y, np.zeros(2, bool))


@pytest.mark.parametrize("n", [10, 11, 200])
def test_the_power_is_that_of_scipy(n):
    draw = np.random.default_rng(n)
    for values in (draw.normal(size=n), -np.exp(3 * draw.normal(size=n)), np.append(draw.normal(size=n), -1e9)):
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        expected, exponent = scipy.stats.yeojohnson((values - middle) / (high - low))
        assert outputs.power((values - middle) / (high - low)) == pytest.approx(exponent, abs=1e-6)
        np.testing.assert_allclose(outputs.warp(values), outputs.standardise(expected), atol=1e-6)


def test_outputs_survive_extremes():
    values = np.array([1e308, -1e308, 0.0, 1.0])
    assert np.isfinite(outputs.standardise(values)).all()
    np.testing.assert_allclose(outputs.standardise(1e-200 * np.array([1.0, 3.0])), [-1, 1])
    np.testing.assert_array_equal(outputs.clean(np.array([np.nan, np.nan])), [0, 0])
    for odd in (np.zeros(12), np.append(np.zeros(11), 5.0), np.append(np.arange(10.0), [1e308, -1e308]), values, np.ones(1)):
        np.testing.assert_array_equal(np.isfinite(outputs.warp(odd)), True)


@pytest.mark.parametrize("worst", [-1e3, -1e9, -1e300])
def test_warped_outputs_keep_their_order_and_tell_the_good_apart(worst):
    good = np.random.default_rng(0).random(40)
    warped = outputs.warp(np.append(good, worst))
    assert warped.argsort().tolist() == np.append(good, worst).argsort().tolist()
    np.testing.assert_allclose([warped.mean(), warped.std()], [0, 1], atol=1e-9)
    # Standardised alone, all but one are 0.16.
    assert np.ptp(outputs.standardise(np.append(good, worst))[:-1]) < 0.01
    assert np.ptp(warped[:-1]) > 1.5


def test_what_is_normal_is_not_bent():
    values = np.random.default_rng(1).standard_normal(400)
    np.testing.assert_allclose(outputs.warp(3 + 2 * values), outputs.standardise(values), atol=0.1)
