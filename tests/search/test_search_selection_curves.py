"""Extrapolated learning curves: the posterior against formulas, coverage, what is flagged, what changes nothing, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import data
from jaxopt_lab.search.selection import extrapolation
from jaxopt_lab.search.selection.extrapolation import extrapolate_curve
from jaxopt_lab.search.selection.families import Family, constant, mmf4, pow3, pow4, wbl4
from jaxopt_lab.search.selection.folds import stratified
from jaxopt_lab.search.selection.learning_curve import learning_curve
from jaxopt_lab.search.trial import Trial

X = np.unique(np.round(np.geomspace(16, 4096, 12))).astype(float)


def drawn(rng):
    """A curve of a random family, with parameters that lie on no grid."""
    c, a = rng.uniform(0, 0.4), rng.uniform(0.3, 1)
    power, shift, place = rng.uniform(0.3, 1.6), rng.uniform(5, 800), rng.uniform(80, 1600)
    shapes = [
        lambda n: (n / 16) ** -power,
        lambda n: ((n + shift) / (16 + shift)) ** -power,
        lambda n: 1 / (1 + (n / place) ** (1.4 * power)),
        lambda n: np.exp(-((n / place) ** (0.8 * power))),
    ]
    return c + a * shapes[rng.integers(4)](X)


def test_the_posterior_is_that_of_a_gaussian_regression():
    """One family without a parameter of its own: for each deviation of the noise there is a formula, and the sum over them."""
    family = Family("ROOT", lambda z: z**-0.5, ())
    x, at = np.array([1.0, 2.0, 4.0, 9.0]), np.array([20.0, 90.0])
    y = np.array([1.0, 0.74, 0.52, 0.31])
    found = extrapolate_curve(x, y, at, families=[family])
    u, z = (y - y[-1]) / np.ptp(y), x / 9
    phi, phi_at = ((np.sqrt(1 / v) - 1) / (np.sqrt(1 / z[0]) - 1) for v in (z, at / 9))
    # Of 1 at the first point and 0 at the last, the basis comes to -0.46 far away: less than four moves are still to come.
    prior = np.diag([extrapolation._LEVEL**2, extrapolation._DROP**2])
    design, new = np.stack([np.ones(4), phi], 1), np.stack([np.ones(2), phi_at], 1)
    logs, means, variances = [], [], []
    for sigma in extrapolation._NOISE:
        covariance = sigma**2 * np.eye(4) + design @ prior @ design.T
        logs.append(-0.5 * np.linalg.slogdet(covariance)[1] - 0.5 * u @ np.linalg.solve(covariance, u))
        gain = new @ prior @ design.T @ np.linalg.inv(covariance)
        coefficients = prior @ design.T @ np.linalg.solve(covariance, u)
        means.append(gain @ u)
        left = np.diag(new @ prior @ new.T - gain @ design @ prior @ new.T)
        variances.append(left + sigma**2 + (extrapolation._DRIFT * coefficients[1] * phi_at) ** 2)
    weights = np.exp(np.array(logs) - max(logs))
    weights /= weights.sum()
    mean = weights @ np.array(means)
    variance = weights @ (np.array(variances) + (np.array(means) - mean) ** 2)
    np.testing.assert_allclose(found.mean, y[-1] + np.ptp(y) * mean, rtol=1e-3)
    np.testing.assert_allclose(found.deviation, np.ptp(y) * np.sqrt(variance), rtol=5e-3)


@pytest.mark.parametrize("family", [pow3(), pow4(), mmf4(), wbl4()], ids=lambda family: family.name)
def test_each_family_finds_a_curve_of_its_own_without_noise(family):
    theta = [axis[len(axis) // 2] * 1.03 for axis in family.axes]
    curve = 0.2 + 0.6 * family.basis(np.append(X, 2 * X[-1]) / X[-1], *theta) / family.basis(X[:1] / X[-1], *theta)[0]
    found = extrapolate_curve(X, curve[:-1], 2 * X[-1], families=[family, constant()])
    assert found.weights[family.name] > 0.999
    assert not found.ill_behaved
    assert found.lower[0] < curve[-1] < found.upper[0]
    assert abs(found.mean[0] - curve[-1]) < 0.05 * np.ptp(curve)


@pytest.mark.parametrize("noise", [0.003, 0.02])
def test_intervals_hold_what_they_should_and_the_mean_beats_the_last_point(noise):
    rng = np.random.default_rng(1)
    inside, errors, baseline, flagged = [], [], [], []
    for _ in range(40):
        y = drawn(rng) + noise * rng.normal(size=len(X))
        found = extrapolate_curve(X[:8], y[:8], X[8:], level=0.8)
        inside.append((found.lower < y[8:]) & (y[8:] < found.upper))
        errors.append(abs(found.mean - y[8:]))
        baseline.append(abs(y[7] - y[8:]))
        flagged.append(found.ill_behaved)
    assert 0.65 < np.mean(inside) < 0.97
    assert np.mean(errors) < 0.75 * np.mean(baseline)
    assert np.mean(flagged) <= 0.05


def softmax_regression():
    def init(key, config):
        params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
        return {"params": params, "opt": optax.adam(0.01).init(params)}

    def logits(params, rows):
        return rows["x"] @ params["w"] + params["b"][None]

    def step(state, batch, config):
        def loss(params):
            values = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["y"])
            return jnp.sum(batch["weight"] * values) / jnp.sum(batch["weight"])

        updates, opt = optax.adam(0.01).update(jax.grad(loss)(state["params"]), state["opt"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, {}

    def evaluate(state, rows):
        wrong = logits(state["params"], rows).argmax(axis=1) != rows["y"]
        return jnp.sum(rows["weight"] * wrong) / jnp.sum(rows["weight"])

    return Trial(init, step, evaluate)


def test_a_real_curve_ends_where_it_was_said_to():
    digits = data.digits().train
    rows = {"x": digits["x"].reshape(-1, 64), "y": digits["y"]}
    sizes = [20, 30, 45, 70, 100, 150, 230, 350, 530, 800]
    curve = learning_curve(
        softmax_regression(), rows, sizes, folds=stratified(rows["y"], 3, jax.random.key(0)), key=jax.random.key(1), steps=150,
        batch_size=64,
    )  # fmt: skip
    mean, error = curve.mean[0], curve.standard_error[0]
    assert mean[-1] < 0.1 < mean[0] / 3
    found = extrapolate_curve(sizes[:7], mean[:7], sizes[7:], error=np.maximum(error[:7], 2e-3), bounds=(0, 1), level=0.95)
    assert not found.ill_behaved
    assert ((found.lower < mean[7:]) & (mean[7:] < found.upper)).all()
    assert (abs(found.mean - mean[7:]) < 0.03).all()
    assert (found.upper - found.lower < 0.15).all()


CURVE = 0.1 + 0.8 * (X / 16) ** -0.6 + 0.01 * np.random.default_rng(2).normal(size=len(X))


def test_units_order_and_direction_change_nothing():
    found = extrapolate_curve(X, CURVE, [8192, 1e5])
    order = np.random.default_rng(0).permutation(len(X))
    other = extrapolate_curve(7 * X[order], 5 - 3 * CURVE[order], 7 * found.at)
    np.testing.assert_allclose(other.mean, 5 - 3 * found.mean, rtol=1e-6)
    np.testing.assert_allclose(other.deviation, 3 * found.deviation, rtol=1e-6)
    np.testing.assert_allclose([other.lower, other.upper], 5 - 3 * np.array([found.upper, found.lower]), rtol=1e-6)
    np.testing.assert_allclose(other.below(5 - 3 * 0.11), 1 - found.below(0.11), atol=1e-6)
    assert sum(found.weights.values()) == pytest.approx(1)
    assert 0.004 < found.noise < 0.03
    again = extrapolate_curve(X, CURVE, [8192, 1e5])
    assert (again.mean == found.mean).all()


def test_probabilities_quantiles_and_bounds_agree():
    found = extrapolate_curve(X, CURVE, [8192, 1e5])
    for probability in (0.01, 0.3, 0.5, 0.99):
        np.testing.assert_allclose(found.below(found.quantile(probability)), probability, atol=1e-6)
    np.testing.assert_allclose([found.lower, found.upper], [found.quantile(0.05), found.quantile(0.95)])
    assert (found.deviation[1] >= found.deviation[0]).all()
    cut = extrapolate_curve(X, CURVE, [8192, 1e5], bounds=(0.1, 0.12))
    assert (cut.lower >= 0.1).all()
    assert (cut.upper <= 0.12).all()
    assert cut.below(0.1).tolist() == [0, 0]
    assert cut.below(0.121).tolist() == [1, 1]


def test_a_level_curve_stays_level_and_an_exact_one_is_no_trouble():
    rng = np.random.default_rng(5)
    found = extrapolate_curve(X, 0.3 + 0.01 * rng.normal(size=len(X)), 1e5)
    assert found.weights["LAST1"] > 0.3
    assert abs(found.mean[0] - 0.3) < 0.02
    same = extrapolate_curve(X, np.full(len(X), 0.3), 1e5)
    np.testing.assert_allclose(same.mean, 0.3, atol=1e-3)
    assert not same.ill_behaved


MANY = np.geomspace(16, 4096, 30)
PEAK = 0.1 + 0.8 * (MANY / 16) ** -0.7 + 0.25 * np.exp(-((np.log(MANY / 300)) ** 2) / 0.5)
DIP = 0.2 + 0.5 * (MANY / 16) ** -1.0 + 0.12 * np.maximum(np.log(MANY / 300), 0)


@pytest.mark.parametrize(
    ("curve", "reason", "each", "error"),
    [
        (PEAK, "it turns: up by 0.1", 1, None),
        (1 - PEAK, "it turns: down by 0.1", 1, None),
        (DIP, "it turns: up by 0.29", 1, None),
        (PEAK, "it turns: up by 0.1", 3, np.full(10, 0.005)),  # So few points need their errors.
    ],
)
def test_a_curve_that_turns_is_said_to_be_ill_behaved(curve, reason, each, error):
    x, y = MANY[::each], curve[::each]
    found = extrapolate_curve(x, y + 0.005 * np.random.default_rng(3).normal(size=len(x)), 1e4, error=error)
    assert found.ill_behaved
    assert found.reasons[0].startswith(reason)


def test_residuals_that_hang_together_widen_the_interval():
    """A run's own steps: a smooth wave about the curve is no noise, and its many points tell less than they seem to."""
    steps = np.arange(1.0, 61.0)
    rng = np.random.default_rng(6)
    wave = np.zeros(60)
    for t in range(1, 60):
        wave[t] = 0.9 * wave[t - 1] + 0.01 * rng.normal()
    independent = rng.permutation(wave)
    curve = 0.2 + 0.8 * steps**-0.5
    widths = [np.ptp([f.lower[0], f.upper[0]]) for f in (extrapolate_curve(steps, curve + w, 600) for w in (independent, wave))]
    assert widths[1] > 1.3 * widths[0]
    jump = extrapolate_curve(steps, curve - 0.4 * (steps > 30), 600)
    assert "hangs together" in jump.reasons[-1]


@pytest.mark.parametrize(
    ("x", "y", "changes", "message"),
    [
        ([1, 2, 3], [3, 2, 1], {}, "POW4 has 4 parameters and the curve 3 different points"),
        ([1, 1, 2, 3], [3, 3, 2, 1], {}, "3 different points"),
        ([0, 1, 2, 3], [4, 3, 2, 1], {}, "x must be positive and finite; got 0.0"),
        ([1, 2, 3, 4], [4, np.nan, 2, 1], {}, "y holds nan at index 1; a run that diverged"),
        ([1, 2, 3, 4], [4, 3, 2], {}, r"\[n\] each; got \(4,\), \(3,\)"),
        ([1, 2, 3, 4], [4, 3, 2, 1], {"error": [1, 1, 1, 0]}, "error must be positive"),
        ([1, 2, 3, 4], [4, 3, 2, 1], {"at": [-1]}, "at must be positive"),
        ([1, 2, 3, 4], [4, 3, 2, 1], {"level": 1}, "level must lie"),
        ([1, 2, 3, 4], [4, 3, 2, 1], {"bounds": (1, 0)}, "bounds must rise"),
        ([1, 2, 3, 4], [4, 3, 2, 1], {"families": []}, "no families"),
    ],
)
def test_bad_curves_are_refused_by_name(x, y, changes, message):
    with pytest.raises(ValueError, match=message):
        extrapolate_curve(x, y, **{"at": 10, **changes})


def test_fewer_points_do_for_a_smaller_family():
    found = extrapolate_curve([1, 2, 4], [1.0, 0.7, 0.5], 8, families=[pow3()])
    assert found.lower[0] < 0.36 < found.upper[0]
    with pytest.raises(ValueError, match="between 0 and 1"):
        found.quantile(1.0)
