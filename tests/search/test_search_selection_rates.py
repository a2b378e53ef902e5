"""The rate range test, the noise of gradients, and what ends a run early."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest

from jaxopt_lab import data, losses, nets, schedules, train
from jaxopt_lab.search.selection import rate_range
from jaxopt_lab.search.selection.noise_scale import (
    Noise,
    average_noise,
    batch_for_noise,
    gradient_noise,
    gradient_noise_scale,
    noise_of_axis,
    two_batch_noise,
)
from jaxopt_lab.search.selection.pruning import CurvePruner, reporting
from jaxopt_lab.search.selection.rate_range import rate_range_test
from jaxopt_lab.search.selection.supervised import supervised
from jaxopt_lab.search.trial import Trial

optuna.logging.set_verbosity(optuna.logging.ERROR)
KEY = jax.random.key(0)
CURVATURE = jnp.array([1.0, 0.5, 0.1])


def quadratic(chain, batch_noise=0.0):
    """0.5 p' diag(CURVATURE) p: plain gradient descent is stable below the rate 2."""

    def init(key, config):
        params = jnp.ones(3)
        return params, chain(config["rate"]).init(params)

    def step(state, batch, config):
        params, opt_state = state
        loss, grad = jax.value_and_grad(lambda p: 0.5 * jnp.sum(CURVATURE * p**2) + batch_noise * jnp.sum(batch["x"] * p))(params)
        updates, opt_state = chain(config["rate"]).update(grad, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    return Trial(init, step, lambda state: 0.0)


def nothing(step):
    return {}


def noisy(step):
    return {"x": np.random.default_rng(step).normal(size=3).astype(np.float32)}


@pytest.mark.parametrize(
    "chain",
    [optax.sgd, lambda rate: optax.adamw(rate, weight_decay=0.1), optax.lion, lambda rate: optax.sgd(rate, momentum=0.9)],
    ids=["sgd", "adamw", "lion", "momentum"],
)
def test_a_sweep_is_a_plain_loop_with_a_new_optimiser_at_each_step(chain):
    found = rate_range_test(quadratic(chain, 0.1), key=KEY, batches=noisy, low=1e-3, high=0.5, steps=12)
    params, expected = jnp.ones(3), []
    opt_state = chain(1e-3).init(params)
    for t, rate in enumerate(np.geomspace(1e-3, 0.5, 12)):
        loss, grad = jax.value_and_grad(lambda p: 0.5 * jnp.sum(CURVATURE * p**2) + 0.1 * jnp.sum(noisy(t)["x"] * p))(params)  # noqa: B023
        updates, opt_state = chain(float(rate)).update(grad, opt_state, params)
        params = optax.apply_updates(params, updates)
        expected.append(float(loss))
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)
    assert found.diverged is None


def test_the_rate_at_which_gradient_descent_diverges_is_found():
    chosen = {"key": KEY, "batches": noisy, "low": 1e-4, "high": 100.0, "steps": 300}
    found = rate_range_test(quadratic(optax.sgd, 0.05), smoothing=0.9, **chosen)
    # The largest curvature is 1, so that rates above 2 blow up what is left; it takes a few steps from there.
    assert 2 < found.rates[found.diverged] < 5
    assert 0.01 < found.steepest < found.minimum < 2.5
    assert found.tenth == pytest.approx(found.minimum / 10)
    assert np.isnan(found.smoothed[found.diverged :]).all()
    assert np.isfinite(found.smoothed[: found.diverged]).all()


def test_a_long_sweep_is_fed_in_blocks(monkeypatch):
    chosen = {"key": KEY, "batches": noisy, "low": 1e-3, "high": 0.5, "steps": 11}
    whole = rate_range_test(quadratic(optax.adam, 0.1), **chosen)
    monkeypatch.setattr(rate_range, "_BLOCK_BYTES", 4 * 12)  # Four batches of three floats.
    np.testing.assert_allclose(rate_range_test(quadratic(optax.adam, 0.1), **chosen).losses, whole.losses, rtol=1e-6)


def test_smoothing_is_a_corrected_average():
    found = rate_range_test(quadratic(optax.sgd, 0.3), key=KEY, batches=noisy, low=1e-3, high=0.3, steps=20, smoothing=0.8)
    weights = 0.8 ** np.arange(20)
    expected = [weights[: t + 1][::-1] @ found.losses[: t + 1] / weights[: t + 1].sum() for t in range(20)]
    np.testing.assert_allclose(found.smoothed, expected, rtol=1e-6)


def test_a_loss_that_never_falls_suggests_nothing():
    def step(state, batch, config):
        return state + config["rate"], {"loss": state}

    rising = Trial(lambda key, config: jnp.zeros(()), step, lambda state: 0.0)
    found = rate_range_test(rising, key=KEY, batches=nothing, steps=30)
    assert (found.steepest, found.minimum, found.tenth) == (None, None, None)
    broken = Trial(
        lambda key, config: jnp.zeros(()), lambda s, b, c: (s + 1, {"loss": jnp.where(s < 12, -s, jnp.nan)}), lambda s: 0.0
    )
    assert rate_range_test(broken, key=KEY, batches=nothing, steps=30).diverged == 12


def test_a_model_trains_at_the_suggested_rate():
    digits = data.digits().train
    rows = {"x": digits["x"].reshape(-1, 64), "y": digits["y"]}
    model, loss = nets.from_linen(nets.MLP(features=(16,))), losses.per_example(losses.cross_entropy)
    trial = supervised(model, loss, lambda config: optax.adam(config["rate"]), rows["x"][:1])
    stream = data.batches(rows, 64, seed=0)
    found = rate_range_test(trial, key=KEY, batches=stream, low=1e-5, high=30.0, steps=120, smoothing=0.9)
    assert found.diverged is not None
    assert 1e-3 < found.tenth < found.minimum < 1
    assert 1e-4 < found.steepest < 0.3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"low": 1.0, "high": 0.1}, ValueError, "rates must rise from above 0; got low=1.0, high=0.1"),
        ({"low": 0.0}, ValueError, "rates must rise"),
        ({"steps": 5}, ValueError, "steps must be at least 10"),
        ({"smoothing": 1.0}, ValueError, "smoothing must lie"),
        ({"metric": "error"}, ValueError, "no metric 'error'; it has loss"),
        ({"key": jnp.zeros(2, jnp.uint32)}, TypeError, "typed key"),
        ({"trial": lambda state: state}, TypeError, "must be a search.Trial"),
    ],
)
def test_bad_sweeps_are_refused_by_name(changes, error, message):
    given = {"trial": quadratic(optax.sgd), "key": KEY, "batches": noisy, "steps": 10, **changes}
    with pytest.raises(error, match=message):
        rate_range_test(given.pop("trial"), **given)


# Per-example gradients CURVATURE p + e with e of a known covariance.
PARAMS = jnp.array([1.0, -1.0, 2.0])
DEVIATIONS = jnp.array([2.0, 1.0, 3.0])
SQUARE = float(jnp.sum((CURVATURE * PARAMS) ** 2))
TRACE = float(jnp.sum(DEVIATIONS**2))


def example_gradient(params, batch):
    return CURVATURE * params + jnp.mean(batch["x"], axis=0)


def noise_of(key, rows, pieces):
    batch = {"x": DEVIATIONS[None] * jax.random.normal(key, (rows, 3))}
    mean, noise = gradient_noise(example_gradient, PARAMS, batch, pieces=pieces)
    return mean - example_gradient(PARAMS, batch), noise


@pytest.mark.parametrize("pieces", [None, 4, 2])
def test_both_estimates_are_unbiased(pieces):
    off, noise = jax.jit(jax.vmap(lambda key: noise_of(key, 8, pieces)))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(off, 0, atol=1e-5)
    for estimates, truth in ((noise.square, SQUARE), (noise.trace, TRACE)):
        error = float(jnp.std(estimates)) / math.sqrt(4000)
        assert abs(float(jnp.mean(estimates)) - truth) < 4 * error
        assert error < 0.05 * truth + 0.05


def test_two_sizes_axes_and_parts_give_the_same():
    batch = {"x": DEVIATIONS[None] * jax.random.normal(KEY, (8, 3))}
    parts = jnp.stack([example_gradient(PARAMS, {"x": part}) for part in batch["x"].reshape(4, 2, 3)])
    mean, expected = gradient_noise(example_gradient, PARAMS, batch, pieces=4)
    two = two_batch_noise(jnp.mean(jnp.sum(parts**2, axis=1)), jnp.sum(mean**2), 2, 8)
    np.testing.assert_allclose(two, expected, rtol=1e-4)
    over = jax.vmap(lambda g: noise_of_axis(g, jax.lax.pmean(g, "d"), 2, "d"), axis_name="d")(parts)
    np.testing.assert_allclose(np.array(over)[:, 0], expected, rtol=1e-4)
    devices = jax.pmap(lambda g: noise_of_axis({"w": g}, jax.lax.pmean({"w": g}, "d"), 2, "d"), axis_name="d")(parts)
    np.testing.assert_allclose(np.array(devices)[:, 2], expected, rtol=1e-4)


def test_a_small_noise_on_a_large_gradient_is_not_lost_to_rounding():
    batch = {"x": 1e-3 * jax.random.normal(KEY, (64, 3))}
    _, noise = gradient_noise(lambda p, b: 100 + jnp.mean(b["x"], axis=0), PARAMS, batch)
    assert float(noise.trace) == pytest.approx(float(jnp.var(batch["x"], axis=0, ddof=1).sum()), rel=0.05)


def test_an_average_within_a_compiled_loop_finds_the_scale():
    def body(state, key):
        return average_noise(state, noise_of(key, 16, 4)[1], 0.999), None

    first = average_noise(None, noise_of(KEY, 16, 4)[1], 0.999)
    state, _ = jax.jit(lambda state, keys: jax.lax.scan(body, state, keys))(first, jax.random.split(jax.random.key(5), 4000))
    assert int(state.count) == 4001
    assert float(gradient_noise_scale(state)) == pytest.approx(TRACE / SQUARE, rel=0.1)


def test_scales_and_the_batches_that_they_ask_for():
    assert float(gradient_noise_scale(Noise(jnp.float32(-1), jnp.float32(3)))) == math.inf
    assert float(gradient_noise_scale(Noise(jnp.float32(2), jnp.float32(-3)))) == 0
    assert batch_for_noise(100, most=4096) == 128
    assert batch_for_noise(100, efficiency=0.2, most=4096) == 32  # 25
    assert batch_for_noise(100, efficiency=0.8, most=4096) == 512  # 400
    assert batch_for_noise(math.inf, most=1000) == 1000
    assert batch_for_noise(0.0, least=8, most=1000) == 8
    plan = schedules.piecewise_batch([batch_for_noise(scale, most=512) for scale in (30, 300)], [100])
    assert (plan(99), plan(100)) == (32, 256)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: two_batch_noise(1.0, 1.0, 8, 8), "small and large must rise"),
        (lambda: noise_of(KEY, 8, 3), "divide the batch of 8; got 3"),
        (lambda: noise_of(KEY, 8, 1), "at least 2"),
        (lambda: batch_for_noise(-1.0, most=8), "scale must not be negative"),
        (lambda: batch_for_noise(math.nan, most=8), "scale must not be negative"),
        (lambda: batch_for_noise(1.0, efficiency=1, most=8), "efficiency must lie"),
        (lambda: batch_for_noise(1.0, least=9, most=8), "least and most must rise"),
    ],
)
def test_bad_noise_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


RATES = (0.5, 0.4, 0.3, 1e-4, 0.45, 2e-4, 0.35)


def step_at(state, batch):
    rate = state.model_state["rate"]
    return state._replace(params=state.params * (1 - rate), step=state.step + 1), {"loss": state.params}


def objective(trial):
    state = train.State(jnp.float32(1), {"rate": jnp.float32(RATES[trial.number])}, (), jnp.int32(0), KEY)
    told = reporting(trial, lambda state: {"loss": float(state.params)}, "loss")
    result = train.fit(
        step_at, state, lambda t: {"x": np.zeros(1)}, steps=16, evaluate=told, evaluate_every=2, chunk=1, progress=False
    )
    return float(result.state.params)


@pytest.mark.parametrize(
    "pruner",
    [optuna.pruners.MedianPruner(n_startup_trials=3), optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=2)],
    ids=["median", "halving"],
)
def test_optunas_pruners_end_the_runs_that_lag_behind(pruner):
    study = optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=len(RATES))
    states = [trial.state.name for trial in study.trials]
    assert (states[3], states[5]) == ("PRUNED", "PRUNED")
    assert states[0] == "COMPLETE"
    assert max(study.trials[3].intermediate_values) < 16
    assert study.best_trial.number == 0
    assert study.trials[0].intermediate_values[16] == pytest.approx(2.0**-16)


def test_hyperband_runs_to_its_end_within_a_fit():
    pruner = optuna.pruners.HyperbandPruner(min_resource=2, max_resource=16, reduction_factor=2)
    study = optuna.create_study(study_name="bands", pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=len(RATES))
    states = [trial.state.name for trial in study.trials]
    assert set(states) <= {"PRUNED", "COMPLETE"}
    assert "COMPLETE" in states
    assert study.best_trial.number == 0


def test_a_reported_nan_is_the_worst_there_is():
    for direction, worst in (("minimize", math.inf), ("maximize", -math.inf)):
        study = optuna.create_study(direction=direction, pruner=optuna.pruners.NopPruner())
        trial = study.ask()
        told = reporting(trial, lambda state: {"score": math.nan}, "score", at=lambda state: 4)
        assert math.isnan(told(None)["score"])
        assert study.trials[0].intermediate_values == {4: worst}
    with pytest.raises(ValueError, match="monitor is 'loss', and evaluate returned score"):
        reporting(trial, lambda state: {"score": 1.0}, "loss", at=lambda state: 5)(None)


def reported(pruner, curve, best, direction="minimize"):
    study = optuna.create_study(direction=direction, pruner=pruner)
    if best is not None:
        study.add_trial(optuna.create_trial(value=best))
    trial = study.ask()
    for k, value in enumerate(curve):
        trial.report(value, 5 * k)
        if trial.should_prune():
            return k
    return None


def test_a_curve_that_cannot_catch_up_is_ended_and_others_are_not():
    rng = np.random.default_rng(0)
    steps = np.arange(20) * 5 + 1
    curve = 0.5 + steps**-0.7 + 0.002 * rng.normal(size=20)
    assert 6 <= reported(CurvePruner(100), curve, 0.1) <= 8
    assert 6 <= reported(CurvePruner(100, bounds=(-1, 0)), -curve, -0.1, "maximize") <= 8
    assert reported(CurvePruner(100), curve, 0.9) is None  # It leads.
    assert reported(CurvePruner(100), curve, None) is None  # There is none to beat.
    assert reported(CurvePruner(100), 0.05 + 2 * steps**-0.7, 0.15) is None  # Behind for most of its way, ahead at its end.
    assert reported(CurvePruner(100), np.append(curve[:3], math.inf), 0.9) == 3
    # A run that turned is left to more patient rules.
    turned = 0.3 + steps**-0.7 + 0.02 * np.maximum(steps - 30, 0)
    assert reported(CurvePruner(100, least=12), turned, 0.1) is None
    assert reported(CurvePruner(100, least=12), 0.3 + steps**-0.7, 0.1) == 12
    for settings, message in (({"steps": 0}, "steps"), ({"steps": 9, "chance": 0}, "chance"), ({"steps": 9, "least": 3}, "least")):
        with pytest.raises(ValueError, match=message):
            CurvePruner(**settings)
