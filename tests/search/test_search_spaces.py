"""Spaces, and their studies: what is drawn, what Optuna makes of it, what a study refuses."""

import json
import multiprocessing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from jaxopt_lab.search.spaces import choice, configs, dimensions, from_unit, grid, integer, log_uniform, sample, uniform, when
from jaxopt_lab.search.study import ask, from_distributions, open_study, suggest, tell, to_distributions

optuna.logging.set_verbosity(optuna.logging.ERROR)

SPACE = {
    "optimizer": {
        "name": choice("sgd", "adam"),
        "momentum": when("optimizer/name", "sgd", uniform(0.0, 0.99)),
        "rate": log_uniform(1e-4, 1.0),
    },
    "width": integer(8, 64, step=8),
    "depth": integer(1, 100, log=True),
    "dropout": uniform(0.0, 0.5, step=0.1),
}


def test_draws_have_the_distributions_that_they_say():
    drawn = jax.jit(lambda key: sample(SPACE, key, 4000))(jax.random.key(0))
    rate, width, depth = (np.asarray(drawn[path]) for path in ("optimizer/rate", "width", "depth"))
    assert drawn["optimizer/rate"].dtype == jnp.float32
    assert drawn["width"].dtype == drawn["optimizer/name"].dtype == jnp.int32
    # Evenly spread: over the logarithm, over the steps, and over the logarithm of 0.5 ... 100.5.
    np.testing.assert_allclose(np.quantile(np.log10(rate), [0.25, 0.5, 0.75]), [-3, -2, -1], atol=0.15)
    values, counts = np.unique(width, return_counts=True)
    assert values.tolist() == list(range(8, 65, 8))
    np.testing.assert_allclose(counts / 4000, 1 / 8, atol=0.03)
    assert depth.min() == 1
    assert depth.max() == 100
    np.testing.assert_allclose(np.mean(depth == 1), np.log(1.5 / 0.5) / np.log(100.5 / 0.5), atol=0.03)


def test_what_is_drawn_lies_in_the_distributions_of_a_study():
    distributions = to_distributions(SPACE)
    for config in configs(SPACE, sample(SPACE, jax.random.key(1), 200)):
        flat = {**{f"optimizer/{name}": value for name, value in config["optimizer"].items()}, **config}
        del flat["optimizer"]
        assert ("optimizer/momentum" in flat) == (flat["optimizer/name"] == "sgd")
        for path, value in flat.items():
            assert distributions[path]._contains(distributions[path].to_internal_repr(value)), (path, value)


def test_the_ends_of_the_unit_interval_are_the_ends_of_the_range():
    for u, expected in [(0.0, (1e-4, 8, 1, 0.0)), (1.0, (1.0, 64, 100, 0.5))]:
        drawn = from_unit(SPACE, jnp.full((1, len(dimensions(SPACE))), u))
        config = configs(SPACE, drawn)[0]
        assert (config["optimizer"]["rate"], config["width"], config["depth"], config["dropout"]) == expected
    with pytest.raises(ValueError, match=r"last axis of 6, one a dimension; got shape \(2, 5\)"):
        from_unit(SPACE, jnp.zeros((2, 5)))


def test_a_grid_has_every_combination_once():
    found = grid({k: SPACE[k] for k in ("optimizer", "dropout")}, {"optimizer/momentum": 2, "optimizer/rate": 3, "dropout": 6})
    assert len(found) == (2 + 1) * 3 * 6
    assert len({json.dumps(config, sort_keys=True) for config in found}) == len(found)
    assert sorted({config["dropout"] for config in found}) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_there_and_back_to_distributions():
    plain = {"a": {"x": uniform(0.0, 1.0), "n": integer(1, 8, log=True)}, "c": choice("p", None, True), "r": log_uniform(0.1, 1.0)}
    distributions = to_distributions(plain)
    assert distributions == {
        "a/x": FloatDistribution(0.0, 1.0),
        "a/n": IntDistribution(1, 8, log=True),
        "c": CategoricalDistribution(("p", None, True)),
        "r": FloatDistribution(0.1, 1.0, log=True),
    }
    assert from_distributions(distributions) == plain


BAD = {
    "an empty choice": (choice, ValueError, "at least one option"),
    "an option twice": (lambda: choice(1, True), ValueError, "an option twice"),
    "an option of another kind": (lambda: choice(len), TypeError, "got a builtin_function_or_method"),
    "a logarithm through zero": (lambda: log_uniform(0.0, 1.0), ValueError, r"must lie above 0; got \[0.0, 1.0\]"),
    "a logarithm of integers through zero": (lambda: integer(0, 8, log=True), ValueError, r"must lie above 0; got \[0, 8\]"),
    "a range that falls": (lambda: uniform(1.0, 0.0), ValueError, r"finite and rise; got \[1.0, 0.0\]"),
    "a range without end": (lambda: uniform(0.0, float("inf")), ValueError, "finite and rise"),
    "an integer range of floats": (lambda: integer(0.5, 2), TypeError, "needs an integer low; got 0.5"),
    "a step of nothing": (lambda: uniform(0.0, 1.0, step=0.0), ValueError, "step must be positive"),
    "no dimension": (lambda: dimensions({}), ValueError, "the space has no dimension"),
    "a list": (lambda: dimensions({"a": [1, 2]}), TypeError, "a is a list; a space is made of dicts"),
    "a parent that is not there": (
        lambda: dimensions({"a": when("b", 1, uniform(0, 1))}),
        ValueError,
        "a depends on b, which is not in the space; it has a",
    ),
    "a parent that is a float": (
        lambda: dimensions({"a": when("b", 1.0, uniform(0, 1)), "b": uniform(0, 1)}),
        ValueError,
        "a depends on b, a float",
    ),
    "a value that is never taken": (
        lambda: dimensions({"a": when("b", "z", uniform(0, 1)), "b": choice("x", "y")}),
        ValueError,
        "a depends on b being 'z', which it never is",
    ),
    "a circle": (
        lambda: dimensions({"a": when("b", 1, integer(1, 2)), "b": when("a", 1, integer(1, 2))}),
        ValueError,
        "a and b depend on each other in a circle",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_space_is_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "sampler", [optuna.samplers.TPESampler(seed=0), optuna.samplers.RandomSampler(seed=0)], ids=["tpe", "random"]
)
def test_a_study_suggests_what_is_active(sampler):
    study = open_study(SPACE, sampler=sampler)
    for _ in range(15):
        for asked in ask(study, SPACE, 2):
            name = asked.config["optimizer"]["name"]
            assert ("momentum" in asked.config["optimizer"]) == (name == "sgd")
            tell(study, asked.trial, asked.config["optimizer"]["rate"])
    assert len(study.trials) == 30
    assert study.best_value < 0.01


def test_an_objective_of_a_study_suggests_likewise():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: suggest(trial, SPACE)["optimizer"]["rate"], n_trials=3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3


def test_nan_fails_its_trial_alone_and_other_values_are_refused():
    study = open_study({"x": uniform(0.0, 1.0)}, sampler=optuna.samplers.RandomSampler(seed=0))
    first, second, third = ask(study, {"x": uniform(0.0, 1.0)}, 3)
    assert tell(study, first.trial, float("nan")).state.name == "FAIL"
    assert tell(study, second.trial, jnp.ones((1,), jnp.bfloat16)).value == 1.0
    with pytest.raises(TypeError, match="trial 2 came to 'low'; an objective is a number"):
        tell(study, third.trial, "low")
    with pytest.raises(ValueError, match=r"trial 2 came to 2 values, .*; the study has 1 objective"):
        tell(study, third.trial, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"array of shape \(2, 2\)"):
        tell(study, third.trial, np.ones((2, 2)))
    assert tell(study, third.trial.number, 3).value == 3.0
    with pytest.raises(ValueError, match="trial 2 was told already"):
        tell(study, third.trial, 4.0)


def test_two_spaces_do_not_share_a_name(tmp_path: Path):
    storage = tmp_path / "deep" / "journal.log"
    study = open_study(SPACE, "digits", storage=storage)
    tell(study, ask(study, SPACE)[0].trial, 1.0)
    assert len(open_study(SPACE, "digits", storage=storage).trials) == 1
    other = {**SPACE, "width": integer(8, 128, step=8), "more": choice(1, 2)}
    with pytest.raises(ValueError, match=r"'digits' is of another space \(it lacks more; width is .*name this one anew"):
        open_study(other, "digits", storage=storage)
    with pytest.raises(ValueError, match="has the directions MINIMIZE, not MINIMIZE, MAXIMIZE"):
        open_study(SPACE, "digits", storage=storage, directions=("minimize", "maximize"))
    assert open_study(other, "others", storage=f"sqlite:///{tmp_path}/studies.db").study_name == "others"


def _work(path: str, count: int) -> None:
    study = open_study(SPACE, "shared", storage=path, sampler=optuna.samplers.RandomSampler())
    for _ in range(count):
        tell(study, ask(study, SPACE)[0].trial, 1.0)


def test_processes_share_a_journal(tmp_path: Path):
    path = str(tmp_path / "journal.log")
    open_study(SPACE, "shared", storage=path)
    workers = [multiprocessing.get_context("spawn").Process(target=_work, args=(path, 5)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    trials = open_study(SPACE, "shared", storage=path).trials
    assert sorted(trial.number for trial in trials) == list(range(10))
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
