"""The sampler in Optuna's studies: Optuna's own tests of a sampler, and what these leave out."""

import concurrent.futures
import contextlib
import json
import math
import threading
import warnings

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.testing import pytest_samplers
from optuna.trial import TrialState, create_trial

from jaxopt_lab.search import gp_sampler
from jaxopt_lab.search.gp.suggest import suggest
from jaxopt_lab.search.gp_sampler import GPSampler

optuna.logging.set_verbosity(optuna.logging.ERROR)
X = {"x": FloatDistribution(0, 1)}
MIXED = {"x": FloatDistribution(0, 1), "k": IntDistribution(0, 3), "c": CategoricalDistribution(["a", "b"])}


def study_of(*told, space=None, directions=("minimize",), **options):
    """A study with points of the x axis, or of a space, and their values."""
    study = optuna.create_study(directions=list(directions), sampler=GPSampler(**{"seed": 0, "n_startup_trials": 0, **options}))
    for point, value in told:
        params = point if isinstance(point, dict) else {"x": point}
        values = value if isinstance(value, (tuple, list)) else (value,)
        study.add_trial(create_trial(params=params, distributions={k: (space or X)[k] for k in params}, values=values))
    return study


class _Sampler:
    @pytest.fixture
    def sampler(self):
        return lambda: GPSampler(seed=0, n_startup_trials=0)


class TestBasic(_Sampler, pytest_samplers.BasicSamplerTestCase):
    """Optuna's."""


@pytest.mark.slow
class TestRelative(_Sampler, pytest_samplers.RelativeSamplerTestCase):
    """Optuna's."""


class TestMultiObjective(_Sampler, pytest_samplers.MultiObjectiveSamplerTestCase):
    """Optuna's."""


def bowl(trial):
    return (trial.suggest_float("x", -1, 1) - 0.3) ** 2 + (trial.suggest_float("y", -1, 1) + 0.5) ** 2


def test_it_finds_a_minimum_and_a_maximum():
    for direction, sign in (("minimize", 1), ("maximize", -1)):
        study = optuna.create_study(direction=direction, sampler=GPSampler(seed=1, n_startup_trials=5))
        study.optimize(lambda trial, sign=sign: sign * bowl(trial), n_trials=15)
        assert sign * study.best_value < 1e-3


def test_warped_inputs_find_what_lies_at_the_end_of_a_range():
    """A rate whose logarithm counts, on a range that is none; beside it a category, which is not warped."""

    def objective(trial):
        rate, kind = trial.suggest_float("rate", 0, 1), trial.suggest_categorical("kind", ["a", "b"])
        return (math.log10(rate + 1e-4) + 3) ** 2 + (kind == "b")

    best = []
    for warp_inputs in (False, True):
        study = optuna.create_study(sampler=GPSampler(seed=0, n_startup_trials=6, warp_inputs=warp_inputs))
        study.optimize(objective, n_trials=16)
        best.append(study.best_value)
    assert best[1] < best[0] / 4


def test_a_study_that_is_resumed_goes_on_as_one_that_was_not():
    whole = optuna.create_study(sampler=GPSampler(seed=3, n_startup_trials=4))
    whole.optimize(bowl, n_trials=9)
    parts = optuna.create_study(sampler=GPSampler(seed=3, n_startup_trials=4))
    for n in (2, 4, 3):
        parts.sampler = GPSampler(seed=3, n_startup_trials=4)
        parts.optimize(bowl, n_trials=n)
    assert [t.params for t in whole.trials] == [t.params for t in parts.trials]
    other = optuna.create_study(sampler=GPSampler(seed=4, n_startup_trials=4))
    other.optimize(bowl, n_trials=9)
    assert whole.trials[-1].params != other.trials[-1].params


def test_trials_that_run_are_not_suggested_again():
    study = study_of((0.1, 1.0), (0.5, 0.2), (0.9, 1.0))
    asked = [study.ask(X).params["x"] for _ in range(4)]
    assert min(abs(a - b) for i, a in enumerate(asked) for b in asked[:i]) > 1e-3
    # Not those either that have only been asked for and have named no parameter yet.
    study = study_of((0.1, 1.0), (0.5, 0.2), (0.9, 1.0))
    waiting = [study.ask() for _ in range(4)]
    values = [trial.suggest_float("x", 0, 1) for trial in waiting]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-3


def test_a_grid_is_exhausted_before_a_point_comes_twice():
    space = {"k": IntDistribution(0, 3), "c": CategoricalDistribution(["a", "b"])}
    study = optuna.create_study(sampler=GPSampler(seed=0, n_startup_trials=1))
    for _ in range(8):
        trial = study.ask(space)
        study.tell(trial, trial.params["k"] + (trial.params["c"] == "a"))
    assert len({tuple(t.params.values()) for t in study.trials}) == 8
    assert study.ask(space).params.keys() == space.keys()


def test_constraints_keep_it_feasible():
    def constraint(trial):
        return (0.5 - trial.params["x"],)

    study = optuna.create_study(sampler=GPSampler(seed=0, n_startup_trials=4, constraints_func=constraint))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=12)
    late = [t.params["x"] for t in study.trials[6:]]
    assert min(abs(x - 0.5) for x in late if x >= 0.5) < 0.01
    assert all(x > 0.4 for x in late)


def test_where_nothing_is_feasible_it_looks_for_what_is():
    study = optuna.create_study(sampler=GPSampler(seed=0, n_startup_trials=3, constraints_func=lambda t: (t.params["x"] - 0.05,)))
    for x in (0.9, 0.7, 0.5):
        study.enqueue_trial({"x": x})
    study.optimize(lambda trial: -trial.suggest_float("x", 0, 1), n_trials=6)
    assert min(t.params["x"] for t in study.trials) <= 0.05


def test_two_objectives_cover_the_front():
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=GPSampler(seed=0, n_startup_trials=4))
    study.optimize(lambda trial: (x := trial.suggest_float("x", -1, 2)) ** 2 and (x**2, -((x - 1) ** 2)), n_trials=14)
    on = sorted(t.params["x"] for t in study.best_trials)
    assert len(on) >= 9
    assert max(np.diff([0, *on, 1])) < 0.3


def test_a_conditional_space():
    def objective(trial):
        if trial.suggest_categorical("net", ["mlp", "cnn"]) == "mlp":
            return 1 + trial.suggest_float("width", 0, 1)
        return (trial.suggest_float("kernel", 0, 1) - 0.3) ** 2

    study = optuna.create_study(sampler=GPSampler(seed=0, n_startup_trials=6))
    study.optimize(objective, n_trials=16)
    assert study.best_value < 1e-3
    for trial in study.trials[6:]:
        suggested = [value for name, value in trial.system_attrs.items() if name.startswith("jaxopt_lab:gp")]
        assert set(json.loads("".join(suggested))) == set(trial.params)


def test_what_failed_is_not_asked_for_again():
    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        return math.nan if x > 0.6 else -x

    for penalise in (True, False):
        study = optuna.create_study(sampler=GPSampler(seed=0, n_startup_trials=3, penalise_failed=penalise))
        study.optimize(objective, n_trials=16)
        points = [t.params["x"] for t in study.trials]
        assert len(set(points)) == len(points)
        assert any(t.state is TrialState.FAIL for t in study.trials)
        assert study.best_value < -0.55


def test_pruned_trials_count_though_never_as_better():
    told = [(0.1, 1.0), (0.5, 0.5), (0.9, 1.0)]
    without, study = study_of(*told), study_of(*told)
    study.add_trial(
        create_trial(
            state=TrialState.PRUNED, params={"x": 0.52}, distributions=X, intermediate_values={0: 9.0, 1: -7.0, 2: math.nan}
        )
    )
    known = study.sampler._known(study, study.ask()._cached_frozen_trial, X)
    np.testing.assert_allclose(known.y[:, 0], [-1, -0.5, -1, -1])  # no better than the median
    assert len(without.sampler._known(without, without.ask()._cached_frozen_trial, X).y) == 3


def test_infinite_values_and_a_range_that_changes():
    study = study_of((0.1, math.inf), (0.5, 0.2), (0.9, -math.inf), (0.7, 0.3))
    assert 0 <= study.ask(X).params["x"] <= 1
    wider = {"x": FloatDistribution(-3, 3)}
    study.tell(study.ask(wider), 0.1)
    assert study.sampler.infer_relative_search_space(study, study.ask()._cached_frozen_trial) == wider
    assert -3 <= study.ask(wider).params["x"] <= 3
    narrow = {"x": FloatDistribution(0.4, 0.5)}
    study.tell(study.ask(narrow), 0.1)
    assert 0.4 <= study.ask(narrow).params["x"] <= 0.5


def test_threads_share_a_study():
    study = optuna.create_study(sampler=GPSampler(seed=0, n_startup_trials=3))
    study.optimize(bowl, n_trials=12, n_jobs=3)
    points = [tuple(t.params.values()) for t in study.trials]
    assert len(set(points)) == 12


def test_processes_that_read_the_same_history_get_different_points(monkeypatch):
    """Neither has written its point when the other reads: at the end of a range both would choose the same."""
    study = study_of((0.1, 0.9), (0.5, 0.5), (0.9, 0.1), (0.95, 0.05))
    both, calls = threading.Barrier(2), []

    def together(*args, **options):
        calls.append(args[1].pending.tolist())
        if len(calls) <= 2:
            both.wait(60)
        return suggest(*args, **options)

    monkeypatch.setattr(gp_sampler, "suggest", together)
    # A lock is of one process: here the threads stand for two.
    monkeypatch.setattr(gp_sampler, "_TURN", contextlib.nullcontext())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = [each.result(120).params["x"] for each in [pool.submit(study.ask, X) for _ in range(2)]]
    assert calls[:2] == [[], []]
    # At least one saw the other's, and asked again.
    assert len(calls) >= 3
    assert len(set(found)) == 2


def test_types_are_pythons():
    study = study_of(
        ({"x": 0.1, "k": 1, "c": "a"}, 0.0), ({"x": 0.2, "k": 2, "c": "b"}, 1.0), ({"x": 0.7, "k": 0, "c": "b"}, 2.0), space=MIXED
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = study.ask(MIXED).params
    assert [type(value) for value in params.values()] == [float, int, str]


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="n_startup_trials"):
        GPSampler(seed=0, n_startup_trials=-1)
    study = study_of((0.5, 0.2), (0.1, 0.1), constraints_func=lambda t: [0.0] * (1 + t.number % 2))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    with pytest.raises(ValueError, match="different numbers of constraints"):
        study.ask(X)


@pytest.mark.slow
def test_no_run_is_stuck_on_the_plateau_of_ackley():
    """Its optimum off the centre; 17 to 20 is the plateau."""
    centre = np.array([0.61, 0.37, 0.72, 0.28, 0.55])

    def ackley(trial):
        z = (np.array([trial.suggest_float(f"x{i}", 0, 1) for i in range(5)]) - centre) * 65.536
        return float(-20 * np.exp(-0.2 * np.sqrt(np.mean(z * z))) - np.exp(np.mean(np.cos(2 * np.pi * z))) + 20 + np.e)

    for seed in range(5):
        study = optuna.create_study(sampler=GPSampler(seed=seed))
        study.optimize(ackley, n_trials=50)
        assert study.best_value < 10
