"""Importance: Sobol indices against closed forms, Optuna's evaluators as they are, and what has no importance named."""

import math

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator, MeanDecreaseImpurityImportanceEvaluator, PedAnovaImportanceEvaluator
from optuna.trial import TrialState, create_trial

from jaxopt_lab.search import Result, choice, configs, integer, log_uniform, open_study, uniform, when
from jaxopt_lab.search.gp.sobol import design, drawn_indices, indices
from jaxopt_lab.search.importance import importance, sobol_indices
from jaxopt_lab.search.study import suggest

optuna.logging.set_verbosity(optuna.logging.ERROR)
SMALL = sobol_indices(draws=12, fits=3, points=256)


def ishigami(unit):
    """On the unit cube; a = 7, b = 0.1."""
    x = -np.pi + 2 * np.pi * unit
    return np.sin(x[..., 0]) + 7 * np.sin(x[..., 1]) ** 2 + 0.1 * x[..., 2] ** 4 * np.sin(x[..., 0])


def ishigami_indices():
    """Its closed form (Ishigami and Homma, 1990)."""
    a, b, pi = 7.0, 0.1, math.pi
    one, two, both = 0.5 * (1 + b * pi**4 / 5) ** 2, a**2 / 8, 8 * b**2 * pi**8 / 225
    whole = one + two + both
    return np.array([one, two, 0]) / whole, np.array([one + both, two, both]) / whole


def result_of(space, drawn, scores):
    scores = np.asarray(scores, float)
    return Result(scores, (), configs(space, drawn), scores[:, None], (1,), {}, int(np.nanargmin(scores)), ())


# The array core.


def test_the_estimator_has_the_closed_form_of_ishigamis_function():
    first, total = indices(ishigami(design(3, 4096, np.random.default_rng(0))))
    exact_first, exact_total = ishigami_indices()
    np.testing.assert_allclose(exact_first, [0.3139, 0.4424, 0], atol=5e-5)
    np.testing.assert_allclose(exact_total, [0.5576, 0.4424, 0.2437], atol=5e-5)
    np.testing.assert_allclose(first, exact_first, atol=0.004)
    np.testing.assert_allclose(total, exact_total, atol=0.004)


def test_a_sum_has_no_interactions_and_functions_keep_apart():
    points = design(2, 1024, np.random.default_rng(1))
    both = np.stack([points[..., 0] + 2 * points[..., 1], np.where(points[..., 0] > 0.5, 1.0, -1.0) * (points[..., 1] - 0.5)], -1)
    first, total = indices(both)
    np.testing.assert_allclose(first, [[0.2, 0], [0.8, 0]], atol=0.01)
    np.testing.assert_allclose(total, [[0.2, 1], [0.8, 1]], atol=0.01)


@pytest.fixture(scope="module")
def ishigami_draws():
    """Of 128 points."""
    x = np.random.default_rng(0).random((128, 3))
    return drawn_indices(x, ishigami(x), np.zeros(3, int), np.random.default_rng(1), draws=24, fits=4, points=256)


def test_the_process_finds_the_indices_of_ishigamis_function(ishigami_draws):
    first, total = ishigami_draws
    exact_first, exact_total = ishigami_indices()
    assert first.shape == total.shape == (3, 24)
    np.testing.assert_allclose(first.mean(1), exact_first, atol=0.06)
    np.testing.assert_allclose(total.mean(1), exact_total, atol=0.12)
    # Each draw is a function: its totals cover its first-order indices, and first-order ones add up to 1 at most.
    assert (total > first - 0.02).all()
    assert (first.sum(0) < 1.02).all()


def test_the_interval_shrinks_with_trials(ishigami_draws):
    x = np.random.default_rng(0).random((40, 3))
    first, _ = drawn_indices(x, ishigami(x), np.zeros(3, int), np.random.default_rng(1), draws=24, fits=4, points=256)
    assert (first.std(1)[:2] > 1.5 * ishigami_draws[0].std(1)[:2]).all()


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="a power of 2 of points; got 2 and 12"):
        design(2, 12, np.random.default_rng(0))
    with pytest.raises(ValueError, match="1 to 4 fits; got 4 and 5"):
        drawn_indices(np.zeros((4, 1)), np.zeros(4), np.zeros(1, int), np.random.default_rng(0), draws=4, fits=5)
    for options in ({"draws": 1}, {"fits": 0}, {"points": 100}, {"most": 2}):
        with pytest.raises(ValueError, match="draws must be at least 2"):
            sobol_indices(**options)


# Studies and populations.


def test_ranks_over_logarithms_integers_categories_and_what_does_nothing():
    rng = np.random.default_rng(0)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial):
        rate = trial.suggest_float("rate", 1e-4, 1.0, log=True)
        width = trial.suggest_int("width", 4, 256, log=True)
        act = trial.suggest_categorical("act", ["relu", "gelu", None])
        depth = trial.suggest_int("depth", 1, 4)
        trial.suggest_float("idle", 0, 1)
        trial.suggest_float("fixed", 0.5, 0.5)
        if trial.number % 9 == 4:
            return math.nan
        # Variances 1.33, 0.33, 0.14, 0.05.
        noise = 0.02 * rng.standard_normal()
        return math.log10(rate) + 0.33 * math.log2(width / 32) + 0.8 * (act == "gelu") + 0.2 * depth + noise

    study.optimize(objective, n_trials=72)
    study.add_trial(
        create_trial(state=TrialState.PRUNED, params={"idle": 0.5}, distributions={"idle": FloatDistribution(0, 1)},
                     intermediate_values={1: 1e9})
    )  # fmt: skip
    found = importance(study, SMALL)
    assert list(found)[:4] == ["rate", "width", "act", "depth"]
    assert found["fixed"] == (0, 0, 0, (0, 0, 0))
    assert found["idle"].high < 0.03
    variances = np.array([16 / 12, (0.33 * 6) ** 2 / 12, 0.64 * 2 / 9, 0.04 * 15 / 12])
    exact = variances / variances.sum()
    np.testing.assert_allclose([found[k].value for k in ("rate", "width", "act", "depth")], exact, atol=0.05)
    for each in found.values():
        assert 0 <= each.low <= each.value <= each.high <= 1
        assert each.alone[0] <= each.value + 0.02
    # The seed is all the chance that there is.
    assert importance(study, SMALL) == found
    assert importance(study, SMALL, seed=1) != found


def by_halves(net, width, kernel):
    """Two nets, each with a dimension of its own that moves it from 0 to 1."""
    return width if net == "mlp" else kernel


CONDITIONAL = {
    "net": choice("mlp", "cnn", "none"),
    "width": when("net", "mlp", uniform(0.0, 1.0)),
    "kernel": when("net", "cnn", uniform(0.0, 1.0)),
    "idle": when("net", ("mlp", "cnn"), uniform(0.0, 1.0)),
}


def conditional(trial, space=CONDITIONAL):
    config = suggest(trial, space)
    return by_halves(config["net"], config.get("width", 0.0), config.get("kernel", 0.0)) * (config["net"] != "none")


# The variance of the mean over the three nets, 0.5, 0.5 and 0, is 1/18; within each of the first two it is 1/12, a third of the
# time.
NETS, WITHIN = (1 / 18) / (1 / 18 + 2 / 36), (1 / 36) / (1 / 18 + 2 / 36)


@pytest.mark.parametrize("known", ["study", "trials"])
def test_what_is_there_now_and_then_counts_as_often(known):
    """Its condition is the study's own, or is read off the trials."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = open_study(CONDITIONAL, sampler=sampler) if known == "study" else optuna.create_study(sampler=sampler)
    study.optimize(conditional, n_trials=64)
    found = importance(study, SMALL)
    assert next(iter(found)) == "net"
    assert found["net"].alone[0] == pytest.approx(NETS, abs=0.06)
    assert found["width"].alone[0] < found["width"].value
    for name in ("width", "kernel"):
        assert found[name].value == pytest.approx(WITHIN, abs=0.06)
    assert found["idle"].high < 0.05


def test_a_population_needs_its_space_and_leaves_out_what_diverged():
    space = {"net": {"rate": log_uniform(1e-3, 1.0)}, "width": integer(1, 8)}
    rng = np.random.default_rng(2)
    drawn = {"net/rate": 10 ** rng.uniform(-3, 0, 40), "width": rng.integers(1, 9, 40)}
    scores = np.log10(drawn["net/rate"]) + 0.05 * drawn["width"]
    scores[[3, 8]] = np.nan, np.inf
    result = result_of(space, drawn, scores)
    found = importance(result, SMALL, space=space)
    assert list(found) == ["net/rate", "width"]
    assert found["net/rate"].low > 0.9
    with pytest.raises(ValueError, match="does not know what was searched; give its space"):
        importance(result)
    with pytest.raises(ValueError, match="a trial lacks depth, which the space says it has; it has net/rate, width"):
        importance(result, space={**space, "depth": integer(1, 2)})
    with pytest.raises(ValueError, match=r"width is \d in a trial, which is not of Choice"):
        importance(result, space={"width": choice("a", "b")})


def quadratic(n=40, seed=0, direction="minimize"):
    sign = 1 if direction == "minimize" else -1
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=seed))
    study.optimize(lambda t: sign * ((t.suggest_float("x", -1, 1) - 0.2) ** 2 + 0.1 * t.suggest_float("y", -1, 1) ** 2), n_trials=n)
    return study


@pytest.mark.parametrize(
    "evaluator",
    [
        lambda seed: FanovaImportanceEvaluator(n_trees=8, seed=seed),
        lambda seed: MeanDecreaseImpurityImportanceEvaluator(n_trees=8, seed=seed),
        lambda seed: PedAnovaImportanceEvaluator(target_quantile=0.3),
    ],
)
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_optunas_evaluators_say_what_they_say_with_a_spread(evaluator, direction):
    study = quadratic(direction=direction)
    found = importance(study, evaluator, repeats=4, seed=5)
    own = optuna.importance.get_param_importances(study, evaluator=evaluator(5))
    assert {name: each.value for name, each in found.items()} == pytest.approx(own)
    assert list(found) == ["x", "y"]
    for each in found.values():
        assert 0 <= each.low < each.value < each.high <= 1
        assert each.alone is None


def test_optunas_evaluators_of_a_population_and_of_one_objective_of_two():
    space = {"x": uniform(0.0, 1.0), "y": uniform(0.0, 1.0)}
    x, y = np.random.default_rng(0).random((2, 40))
    result = result_of(space, {"x": x, "y": y}, (x - 0.9) ** 2)

    def evaluator(seed):
        return PedAnovaImportanceEvaluator(target_quantile=0.3)

    assert next(iter(importance(result, evaluator, space=space, repeats=2))) == "x"
    study = optuna.create_study(directions=["minimize", "maximize"])
    kinds = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    study.add_trials(
        [
            create_trial(params={"x": a, "y": b}, distributions=kinds, values=[a, -((b - 0.5) ** 2)])
            for a, b in zip(x.tolist(), y.tolist(), strict=True)
        ]
    )
    assert next(iter(importance(study, evaluator, objective=1, repeats=2))) == "y"
    assert next(iter(importance(study, SMALL, objective=0))) == "x"
    with pytest.raises(ValueError, match="objective must be one of 0 to 1; got 2"):
        importance(study, objective=2)


def test_a_transform_takes_the_variance_from_the_few_that_are_far_off():
    space = {"x": uniform(0.0, 1.0), "y": uniform(0.0, 1.0)}
    x, y = np.random.default_rng(3).random((2, 40))
    scores = np.exp(3 * x) * np.where(y == y.max(), 1e6, 1.0)
    result = result_of(space, {"x": x, "y": y}, scores)
    far = importance(result, SMALL, space=space)
    assert far["x"].alone[0] < 0.3
    ranks = importance(result, SMALL, space=space, transform=lambda s: np.argsort(np.argsort(s)).astype(float))
    assert next(iter(ranks)) == "x"
    assert ranks["x"].alone[0] > 3 * far["x"].alone[0]
    with pytest.raises(ValueError, match=r"transform returned nan for the score at index \d+ of 40"):
        importance(result, space=space, transform=lambda s: np.log(s - np.median(s)))
    with pytest.raises(ValueError, match=r"transform must return an array of shape \(40,\)"):
        importance(result, space=space, transform=np.mean)


def test_what_has_no_importance_is_named():
    with pytest.raises(ValueError, match="at least 4 trials with a finite score; 3 of 3 have one"):
        importance(quadratic(3))
    with pytest.raises(TypeError, match="a study of Optuna's or the Result of a population; got dict"):
        importance({})
    for evaluator in (None, lambda seed: FanovaImportanceEvaluator(seed=seed)):
        flat = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        flat.optimize(lambda trial: 0.5 + 0 * trial.suggest_float("x", 0, 1), n_trials=6)
        with pytest.raises(ValueError, match=r"all 6 scores are 0\.5: nothing to explain"):
            importance(flat, evaluator)
    for wrong in (PedAnovaImportanceEvaluator(), PedAnovaImportanceEvaluator, lambda seed: seed):
        with pytest.raises(TypeError, match="a function from a seed to an evaluator of Optuna's"):
            importance(quadratic(6), wrong)
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        importance(quadratic(6), level=1.0)
    by_chance = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    by_chance.optimize(lambda t: t.suggest_float("x", 0, 1) + (t.suggest_int("k", 0, 1) if t.number % 2 else 0.0), n_trials=12)
    with pytest.raises(ValueError, match="k is in 6 of 12 trials, and no choice tells in which; give the space, with when"):
        importance(by_chance)
    assert set(importance(by_chance, lambda seed: PedAnovaImportanceEvaluator(target_quantile=0.5), repeats=2)) == {"x", "k"}


def test_other_peoples_names_and_ranges_that_change():
    """A name may be the beginning of another, and a value may lie outside of the latest range."""
    rng = np.random.default_rng(0)
    study = optuna.create_study()
    for k in range(24):
        kinds = {
            "lr": FloatDistribution(0, 1 if k < 12 else 2),
            "lr/decay": IntDistribution(0, 8, step=2),
            "opt": CategoricalDistribution(("a", "b")),
        }
        params = {"lr": float(rng.random() * kinds["lr"].high), "lr/decay": int(2 * rng.integers(5)), "opt": "ab"[k % 2]}
        study.add_trial(create_trial(params=params, distributions=kinds, value=params["lr"] + 0.01 * params["lr/decay"]))
    found = importance(study, SMALL)
    assert next(iter(found)) == "lr"
    assert found["lr"].value > 0.9


def test_more_trials_than_the_process_is_given():
    found = importance(quadratic(80), sobol_indices(draws=8, fits=2, points=128, most=30))
    assert list(found) == ["x", "y"]
