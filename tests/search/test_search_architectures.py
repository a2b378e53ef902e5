"""Architecture search: the front, the strategies' laws, what is measured when, and what becomes of a killed search."""

import subprocess
import sys
import textwrap
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest
from flax import nnx

from jaxopt_lab import nets, tracing, tree
from jaxopt_lab.search.architecture import (
    CALLS,
    SHAPES,
    Candidate,
    History,
    Net,
    Objective,
    activation_bytes,
    architectures,
    depth_by_cross_validation,
    front,
    grid_search,
    macs,
    milliseconds,
    mutated,
    parameter_bytes,
    random_search,
    record,
    regularized_evolution,
    scored,
    trained,
    width_by_grid,
    width_by_random,
)
from jaxopt_lab.search.architecture.candidates import check_config, token
from jaxopt_lab.search.engines import programs, scanned
from jaxopt_lab.search.selection.cross_validation import cross_validate
from jaxopt_lab.search.selection.folds import kfold
from jaxopt_lab.search.spaces import choice, configs, dimensions, grid, integer, log_uniform, sample, uniform, when
from jaxopt_lab.search.study import open_study
from jaxopt_lab.search.trial import Trial

optuna.logging.set_verbosity(optuna.logging.ERROR)

KEY = jax.random.key(0)
X = jax.ShapeDtypeStruct((1, 6), "float32")
SMALL = {"a": integer(0, 3), "b": choice("x", "y"), "c": when("b", "x", integer(0, 2))}
SIZE = 4 * (3 + 1)
CONDITIONAL = {
    "net": {
        "kind": choice("dense", "conv"),
        "kernel": when("net/kind", "conv", choice(3, 5)),
        "groups": when("net/kernel", 5, integer(1, 4)),
        "width": integer(4, 64, log=True),
    },
    "rate": log_uniform(1e-4, 1.0),
    "dropout": uniform(0.0, 0.5, step=0.1),
}


def loss_of(config):
    """A table of SMALL without ties."""
    return config["a"] + 10 * (config["b"] == "y") + 0.1 * config.get("c", 0)


def evaluations(strategy, space=SMALL, function=loss_of, **options):
    """The configurations that a function was asked for, and the result."""
    asked = []
    counted = scored(lambda config: asked.append(token(config)) or function(config))
    return asked, architectures(space, None, counted, strategy=strategy, **{"key": KEY, "candidates": SIZE, **options})


def history_of(values, first="score", maximize=False):
    """A history of complete candidates of `{"a": ..., "b": ...}`."""
    return History(first, maximize, [Candidate({"a": a, "b": b}, {"score": score}) for a, b, score in values])


# The front.


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_the_front_is_that_of_brute_force(columns):
    random = np.random.default_rng(columns)
    for _ in range(30):
        values = random.integers(0, 5, (random.integers(0, 25), columns)).astype(float)
        values[random.random(values.shape) < 0.1] = np.nan
        values[random.random(values.shape) < 0.05] = np.inf
        directions = [str(word) for word in random.choice(["minimize", "maximize"], columns)]
        signed = values * [1 if word == "minimize" else -1 for word in directions]

        def beaten(row, signed=signed):
            # A comparison with NaN is false, so that a row with one beats nothing.
            return any((other <= row).all() and (other < row).any() for other in signed)

        expected = [i for i, row in enumerate(signed) if not np.isnan(row).any() and not beaten(row)]
        assert front(values, directions).tolist() == expected


def test_the_front_is_that_of_optuna():
    study, random = optuna.create_study(directions=["minimize", "maximize"]), np.random.default_rng(0)
    values = random.integers(0, 9, (40, 2)).astype(float)
    for row in values:
        study.add_trial(optuna.trial.create_trial(values=row.tolist()))
    assert front(values, ["minimize", "maximize"]).tolist() == sorted(trial.number for trial in study.best_trials)


@pytest.mark.parametrize(
    ("values", "directions", "message"),
    [
        ([[1.0, 2.0]], ["minimize"], r"values must be \[n, 1\].*their shape is \(1, 2\)"),
        ([1.0, 2.0], ["minimize"], r"their shape is \(2,\)"),
        ([[1.0]], ["up"], "a direction is .*; got 'up'"),
        (np.zeros((2, 0)), [], r"their shape is \(2, 0\)"),
    ],
)
def test_what_has_no_front_is_named(values, directions, message):
    with pytest.raises(ValueError, match=message):
        front(values, directions)


# Strategies.

STRATEGIES = {
    "random": random_search(),
    "grid": grid_search(4),
    "evolution": regularized_evolution(4, 2),
    "greedy": regularized_evolution(1, 1),
}


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_finite_space_is_searched_whole_and_nothing_twice(name, together):
    asked, found = evaluations(STRATEGIES[name], together=together, candidates=100)
    assert sorted(asked) == sorted(map(token, grid(SMALL, 4)))
    assert found.candidates[found.best].config == {"a": 0, "b": "x", "c": 0}


def test_equal_options_of_other_types_are_not_mixed_up():
    for options in [(0, 1), (False, True), (0.0, 1.0)]:
        for strategy in (grid_search(), random_search()):
            _, found = evaluations(strategy, {"a": choice(*options)}, lambda config: 0.0)
            assert {type(each.config["a"]) for each in found.candidates} == {type(options[0])}


def test_a_grid_goes_in_order_of_its_rows():
    _, found = evaluations(grid_search(2), candidates=7, together=3)
    assert [each.config for each in found.candidates] == grid(SMALL, 2)[:7]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_a_function_of_history_and_key(name):
    history = history_of([(k % 4, k % 5, float(k)) for k in range(9)])
    space = {"a": integer(0, 30), "b": integer(0, 30)}
    proposed = [STRATEGIES[name](space, history, jax.random.key(seed), q) for seed, q in [(1, 5), (1, 5), (1, 2), (2, 5)]]
    assert proposed[0] == proposed[1]
    assert proposed[2] == proposed[0][:2]
    assert name == "grid" or proposed[3] != proposed[0]
    assert not any(history.knows(config) for config in proposed[0])


def test_the_oldest_dies_however_good_it_is():
    space, rows = {"a": integer(0, 99), "b": integer(0, 99)}, [(1, 1, -100.0), (20, 21, 5.0), (40, 41, 3.0), (60, 61, 4.0)]
    evolution = regularized_evolution(3, 60)
    children = evolution(space, history_of(rows), KEY, 20)
    # Of sixty draws the best of three is one all but surely, and the champion is not among them.
    assert {(child["a"] == 40) + (child["b"] == 41) for child in children} == {1}
    assert {child["a"] == 40 for child in children} == {True, False}
    children = evolution(space, history_of(rows[:3]), KEY, 20)
    assert {(child["a"] == 1) + (child["b"] == 1) for child in children} == {1}
    best = History("score", True, history_of(rows)[:])
    assert {(child["a"] == 20) + (child["b"] == 21) for child in evolution(space, best, KEY, 20)} == {1}
    by_fitness = regularized_evolution(3, 60, fitness=lambda values: values["score"])
    assert {(child["a"] == 20) + (child["b"] == 21) for child in by_fitness(space, history_of(rows), KEY, 20)} == {1}


def test_a_small_sample_chooses_among_parents():
    space = {"a": integer(0, 999), "b": integer(0, 999)}
    children = regularized_evolution(3, 1)(space, history_of([(1, 2, 0.0), (3, 4, 1.0), (5, 6, 2.0)]), KEY, 200)
    parents = [
        next(k for k, (a, b) in enumerate([(1, 2), (3, 4), (5, 6)]) if child["a"] == a or child["b"] == b) for child in children
    ]
    assert (np.bincount(parents, minlength=3) > 40).all()


def test_a_population_is_filled_at_random_by_complete_candidates_alone():
    history = history_of([(1, 1, 0.0), (2, 2, 1.0)])
    history.add(Candidate({"a": 3, "b": 3}, {}, "rejected"))
    space = {"a": integer(0, 999), "b": integer(0, 999)}
    proposed = regularized_evolution(5, 2)(space, history, KEY, 8)
    assert len(proposed) == 3
    assert not any(child["a"] in (1, 2) or child["b"] in (1, 2) for child in proposed)


def test_a_mutation_changes_one_dimension_and_stays_in_the_space():
    found, random = dimensions(CONDITIONAL), np.random.default_rng(0)
    changed = []
    for config in configs(CONDITIONAL, sample(CONDITIONAL, KEY, 40)):
        child = mutated(found, config, random)
        check_config(child, found)
        before, after = dict(token(config)), dict(token(child))
        changed.append({path for path in before if path in after and before[path] != after[path]})
        assert len(changed[-1]) == 1
        # What came or went depends on what changed.
        for path in set(before) ^ set(after):
            assert changed[-1] <= {"net/kind", "net/kernel"}
            assert path in {"net/kernel", "net/groups"}
    assert set.union(*changed) == set(found)


def test_what_cannot_change_does_not():
    random = np.random.default_rng(0)
    assert mutated(dimensions({"a": choice(1), "b": integer(2, 2)}), {"a": 1, "b": 2}, random) is None
    pinned = dimensions({"a": uniform(1.0, 1.0), "b": choice(1, 2)})
    assert {mutated(pinned, {"a": 1.0, "b": 1}, random)["b"] for _ in range(9)} == {2}
    assert len(evaluations(regularized_evolution(2, 2), {"a": choice(1)}, lambda config: 0.0)[0]) == 1


def test_what_is_asked_to_repeat_is_measured_again():
    numbers = []

    def measure(nets, key):
        numbers.extend(net.number for net in nets)
        return [loss_of(net.config) for net in nets]

    again = Objective("loss", measure, builds=False)
    found = architectures(SMALL, None, again, candidates=50, key=KEY, strategy=regularized_evolution(4, 2, repeats=True))
    assert numbers == list(range(50))
    assert len({token(each.config) for each in found.candidates}) < 50
    found = architectures(SMALL, None, again, candidates=60, key=KEY, strategy=random_search(repeats=True), together=7)
    assert len(found.candidates) == 60


def test_evolution_finds_what_chance_does_not():
    """The sum of eight digits: neighbours of a good candidate are good."""
    space = {f"d{k}": integer(0, 9) for k in range(8)}

    def best(strategy, seed):
        objective = scored(lambda config: sum(config.values()))
        return architectures(space, None, objective, candidates=80, key=jax.random.key(seed), strategy=strategy).values.min()

    assert (
        np.mean([best(regularized_evolution(20, 8), s) for s in range(3)])
        < np.mean([best(random_search(), s) for s in range(3)]) - 5
    )


# What is measured, and when.


def linen(width):
    return nets.from_linen(nn.Sequential([nn.Dense(width), nn.BatchNorm(use_running_average=True), nn.relu, nn.Dense(2)]))


def bare(width):
    def init(key, x):
        first, second = jax.random.split(key)
        return {"a": jax.random.normal(first, (x.shape[-1], width)), "b": jax.random.normal(second, (width, 2))}

    return nets.from_functions(init, lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"])


def of_nnx(width):
    return nets.from_nnx(lambda rngs: nnx.Sequential(nnx.Linear(6, width, rngs=rngs), nnx.relu, nnx.Linear(width, 2, rngs=rngs)))


@pytest.mark.parametrize("build", [linen, bare, of_nnx])
def test_costs_are_those_of_tracing(build):
    model, example = build(5), jnp.ones((3, 6))
    net = Net({"width": 5}, 0, lambda config: build(config["width"]), model)
    variables = jax.eval_shape(model.init, KEY, example)
    counts = tracing.count(model.predict, variables, example)
    given = {"macs": counts.macs, "parameter_bytes": tree.nbytes(variables["params"]), "activation_bytes": counts.activation_bytes}
    for objective in (macs(example), parameter_bytes(example), activation_bytes(example)):
        assert objective.measure([net], KEY) == [given[objective.name]]
        assert objective.cost == SHAPES
    assert counts.macs == 3 * (6 * 5 + 5 * 2)


def test_every_kind_of_builder_is_searched():
    builders = {"linen": linen, "module": lambda width: nets.MLP(features=(width,), classes=2), "bare": bare, "nnx": of_nnx}
    space = {"kind": choice(*builders), "width": integer(3, 4)}

    def build(config):
        return builders[config["kind"]](config["width"])

    found = architectures(space, build, macs(X), candidates=8, key=KEY, strategy=grid_search(), together=3)
    assert found.values[:, 0].tolist() == [8 * 3, 8 * 4] * 4


def test_cheap_objectives_come_first_and_their_bounds_reject():
    asked = []
    dear = scored(lambda config: asked.append(config["width"]) or 1 / config["width"])
    timed = milliseconds(jnp.ones((1, 6)), repeats=1)
    seen = timed._replace(measure=lambda nets, key: [asked.append(-net.config["width"]) or 1.0 for net in nets])
    found = architectures(
        {"width": integer(1, 6)},
        lambda config: bare(config["width"]),
        [dear, seen, macs(X, at_most=32, at_least=16)],
        candidates=6,
        key=KEY,
        strategy=grid_search(6),
        together=6,
    )
    assert asked == [-2, -3, -4, 2, 3, 4]
    assert [each.outcome for each in found.candidates] == ["rejected", *["complete"] * 3, *["rejected"] * 2]
    assert [found.candidates[i].reason for i in (0, 5)] == ["macs is 8, below 16", "macs is 48, above 32"]
    np.testing.assert_array_equal(found.values[:, 0], [np.nan, 1 / 2, 1 / 3, 1 / 4, np.nan, np.nan])
    assert found.values[:, 2].tolist() == [8, 16, 24, 32, 40, 48]
    assert found.front.tolist() == [1, 2, 3]
    assert found.best == 3


def test_the_rejected_do_not_count_but_patience_ends():
    limit = scored(lambda config: config["a"], at_most=9)
    space = {"a": integer(0, 999)}
    found = architectures(space, None, limit, candidates=3, key=KEY, strategy=random_search(), together=2)
    assert sum(each.outcome == "complete" for each in found.candidates) == 3
    never = architectures(space, None, limit._replace(at_most=-1), candidates=3, key=KEY, strategy=random_search(), patience=20)
    assert [each.outcome for each in never.candidates] == ["rejected"] * 20
    assert never.best is None
    assert never.front.size == 0


def test_milliseconds_are_measured():
    found = architectures(
        {"width": choice(4)}, lambda c: bare(c["width"]), milliseconds(jnp.ones((2, 6)), repeats=2), candidates=1, key=KEY
    )
    assert 0 < found.values[0, 0] < 1e4
    assert milliseconds(jnp.ones((2, 6))).cost == CALLS


def test_what_is_no_number_fails_alone():
    values = {0: 1.0, 1: float("nan"), 2: np.float32(np.inf), 3: jnp.array(0.5)}
    _, found = evaluations(grid_search(4), {"a": integer(0, 3)}, lambda config: values[config["a"]], together=4)
    assert [each.outcome for each in found.candidates] == ["complete", "failed", "failed", "complete"]
    assert [each.reason for each in found.candidates[1:3]] == ["score is nan", "score is inf"]
    np.testing.assert_array_equal(found.values[:, 0], [1.0, np.nan, np.nan, 0.5])
    assert (found.best, found.front.tolist()) == (3, [3])


class NoNetError(Exception):
    """Of a configuration that is no network."""


def picky(config):
    if config["width"] == 2:
        raise NoNetError("two is no width\nat all")
    return bare(config["width"])


def test_a_build_of_a_named_kind_of_error_fails_alone():
    options = {"candidates": 3, "key": KEY, "strategy": grid_search(), "together": 3}
    found = architectures({"width": integer(1, 3)}, picky, macs(X), illegal=NoNetError, **options)
    assert [each.outcome for each in found.candidates] == ["complete", "failed", "complete"]
    assert found.candidates[1].reason == "NoNetError: two is no width"
    for illegal in [(), (KeyError, ZeroDivisionError)]:
        with pytest.raises(NoNetError, match="two is no width"):
            architectures({"width": integer(1, 3)}, picky, macs(X), illegal=illegal, **options)


# The trained score.


def trial_of(config, model):
    """A linear state that decays, from the network's own weights."""

    def step(state, batch, own):
        return jax.tree.map(lambda w: w - own["rate"] * (w - batch["x"]), state), {}

    return Trial(lambda key, own: model.init(key, jnp.ones((1, 6))), step, lambda state: optax.tree.norm(state) + config["width"])


RUN = {"batches": lambda step: {"x": np.float32(0.1 * step)}, "steps": 4, "engine": scanned()}
TRAINED = {"width": choice(2, 3), "rate": uniform(0.0, 1.0)}


def by_hand(config, number):
    model = bare(config["width"])
    state = model.init(jax.random.fold_in(KEY, number), jnp.ones((1, 6)))
    for t in range(4):
        state = jax.tree.map(lambda w: w - config["rate"] * (w - np.float32(0.1 * t)), state)  # noqa: B023
    return float(optax.tree.norm(state)) + config["width"]


@pytest.mark.parametrize("trainings", [1, 2])
def test_the_trained_score_is_that_of_a_population(trainings):
    score = trained(trial_of, trainings=trainings, **RUN)
    found = architectures(TRAINED, lambda c: bare(c["width"]), score, candidates=5, key=KEY, strategy=random_search(), together=3)
    numbers = [range(trainings * i, trainings * (i + 1)) for i in range(5)]
    expected = [
        np.mean([by_hand(each.config, number) for number in own]) for each, own in zip(found.candidates, numbers, strict=True)
    ]
    np.testing.assert_allclose(found.values[:, 0], expected, rtol=1e-5)


def test_equal_shapes_share_a_program_in_one_round_and_the_next():
    traced = []

    def counted(config, model):
        traced.append((config["width"], isinstance(config["rate"], jax.core.Tracer)))
        return trial_of(config, model)

    score = trained(counted, **RUN)
    build = lambda config: bare(config["width"])  # noqa: E731
    drawn = [{"width": width, "rate": rate} for width, rate in [(2, 0.1), (3, 0.2), (2, 0.3), (2, 0.4)]]
    members = [Net(config, number, build, build(config)) for number, config in enumerate(drawn)]
    score.measure(members[:2], KEY)
    assert set(traced) == {(2, True), (3, True)}
    built = programs.cache_info().misses
    score.measure(members[2:], KEY)
    assert programs.cache_info().misses == built


def test_one_that_cannot_be_trained_does_not_stop_the_others():
    def trial(config, model):
        if config["width"] == 3:
            raise NoNetError("three")
        return trial_of(config, model)

    space = {"width": choice(2, 3, 4), "rate": choice(0.5)}
    options = {"candidates": 3, "key": KEY, "strategy": grid_search(), "together": 3}
    found = architectures(space, lambda c: bare(c["width"]), trained(trial, **RUN), illegal=NoNetError, **options)
    assert [each.outcome for each in found.candidates] == ["complete", "failed", "complete"]
    np.testing.assert_allclose(found.values[2, 0], by_hand({"width": 4, "rate": 0.5}, 2), rtol=1e-5)
    assert found.candidates[1].reason == "score: NoNetError: three"


def test_one_that_diverges_fails_alone():
    space = {"width": choice(2), "rate": choice(0.5, 1e30)}
    found = architectures(
        space, lambda c: bare(c["width"]), trained(trial_of, **RUN), candidates=2, key=KEY, strategy=grid_search(), together=2
    )
    assert [each.outcome for each in found.candidates] == ["complete", "failed"]


# The record.


def searched(study, candidates=12, together=3, function=loss_of, strategy=None, **options):
    objectives = [scored(function), scored(lambda config: float(config["a"]), name="size", maximize=True, cost=SHAPES, **options)]
    strategy = strategy or regularized_evolution(3, 2)
    return architectures(SMALL, None, objectives, candidates=candidates, key=KEY, together=together, study=study, strategy=strategy)


def opened(path=None):
    return open_study(SMALL, "nets", storage=path, directions=["minimize", "maximize"])


def killed_after(calls):
    """The table, until so many calls."""
    left = iter(range(calls))

    def function(config):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return loss_of(config)

    return function


def test_a_study_is_told_of_every_candidate():
    study = opened()

    def value(config):
        return float("inf") if config["a"] == 2 else loss_of(config)

    found = searched(study, 16, function=value, strategy=grid_search(), at_most=2)
    states = {"complete": "COMPLETE", "failed": "FAIL", "rejected": "PRUNED"}
    assert [trial.state.name for trial in study.trials] == [states[each.outcome] for each in found.candidates]
    assert {each.outcome for each in found.candidates} == set(states)
    assert [trial.params for trial in study.trials] == [each.config for each in found.candidates]
    for trial, row in zip(study.trials, found.values, strict=True):
        assert trial.values is None or trial.values == row.tolist()
        assert trial.datetime_start < trial.datetime_complete
    assert study.metric_names == ["score", "size"]
    assert sorted(trial.number for trial in study.best_trials) == found.front.tolist()
    np.testing.assert_array_equal(searched(study, 16, function=value, strategy=grid_search(), at_most=2).values, found.values)
    assert len(study.trials) == 16


@pytest.mark.parametrize("strategy", [random_search(), grid_search(4), regularized_evolution(3, 2)])
@pytest.mark.parametrize("calls", [0, 5, 9])
def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path: Path, strategy, calls):
    whole = searched(None, strategy=strategy)
    path = tmp_path / "study.log"
    with pytest.raises(KeyboardInterrupt):
        searched(opened(path), function=killed_after(calls), strategy=strategy)
    kept = opened(path).trials
    assert len(kept) == calls // 3 * 3
    assert_same(searched(opened(path), strategy=strategy), whole)


def test_a_search_that_is_killed_between_two_of_a_round_goes_on_within_it(monkeypatch):
    whole, study, write = searched(None), opened(), record.write
    left = iter(range(8))
    monkeypatch.setattr(record, "write", lambda *args: write(*args) if next(left, None) is not None else killed_after(0)(None))
    with pytest.raises(KeyboardInterrupt):
        searched(study)
    assert len(study.trials) == 8
    monkeypatch.undo()
    assert_same(searched(study), whole)


def test_a_finished_search_can_be_prolonged():
    study = opened()
    assert len(searched(study, 7).candidates) == 7
    assert_same(searched(study, 12), searched(None, 12))
    assert len(searched(study, 5).candidates) == 12


def assert_same(found, other):
    assert [each.config for each in found.candidates] == [each.config for each in other.candidates]
    np.testing.assert_array_equal(found.values, other.values)
    assert (found.best, found.front.tolist()) == (other.best, other.front.tolist())


WORKER = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    from test_search_architectures import loss_of, opened, searched

    calls = iter(range(7))

    def function(config):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_of(config)

    searched(opened(sys.argv[1]), function=function)
""")


def test_a_process_that_is_killed_loses_its_round_alone(tmp_path: Path):
    path = tmp_path / "study.log"
    worker = subprocess.run([sys.executable, "-c", WORKER, str(path), str(Path(__file__).parent)], check=False)
    assert worker.returncode == -9
    assert len(opened(path).trials) == 6
    assert_same(searched(opened(path)), searched(None))


def test_what_others_put_into_a_study_counts():
    study = opened()
    study.enqueue_trial({"a": 1, "b": "y"})
    waiting = study.ask()
    params, kinds = {"a": 3, "b": "x", "c": 1}, study_kinds()
    study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, values=[-5.0, 3.0]))
    study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, state=optuna.trial.TrialState.FAIL))
    found = searched(study, 4)
    assert found.candidates[0] == Candidate(params, {"score": -5.0, "size": 3.0})
    assert (found.best, len(found.candidates)) == (0, 4)
    assert waiting.number == 0


def study_kinds():
    from jaxopt_lab.search.study import to_distributions

    return to_distributions(SMALL)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (["minimize"], r"has the directions minimize; the objectives are score \(minimize\), size \(maximize\)"),
        (["minimize", "minimize"], "open it with these"),
    ],
)
def test_a_study_of_other_objectives_is_refused(directions, message):
    with pytest.raises(ValueError, match=message):
        searched(optuna.create_study(directions=directions))


def test_a_study_of_another_space_is_refused():
    study, kinds = opened(), study_kinds()
    study.add_trial(optuna.trial.create_trial(params={"b": "x"}, distributions={"b": kinds["b"]}, values=[0.0, 0.0]))
    with pytest.raises(ValueError, match="trial 0 of the study lacks 'a'"):
        searched(study)
    study = opened()
    study.add_trial(optuna.trial.create_trial(params={"a": 1, "b": "y", "c": 1}, distributions=kinds, values=[0.0, 0.0]))
    with pytest.raises(ValueError, match="trial 0 of the study has c, which its configuration does not have"):
        searched(study)
    study = opened()
    searched(study, 1)
    with pytest.raises(ValueError, match="the study is of score, size; the objectives are loss"):
        architectures(
            SMALL, None, [scored(loss_of, name="loss"), scored(loss_of, maximize=True)], candidates=1, key=KEY, study=study
        )


# Depth and width.

ROWS = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
DATA = {"x": ROWS, "y": np.random.default_rng(1).normal(size=24).astype(np.float32)}  # Noise: the depths are near each other.


FOLDED = {"folds": kfold(24, 3, KEY), "key": jax.random.key(1), "steps": 20, "batch_size": 8}


def deep(depth):
    def init(key, x):
        return [jax.random.normal(jax.random.fold_in(key, k), (6, 6)) for k in range(depth)] + [jnp.zeros((6, 1))]

    def apply(params, x):
        for w in params[:-1]:
            x = jnp.tanh(x @ w)
        return (x @ params[-1])[:, 0]

    return nets.from_functions(init, apply)


def of_depth(depth, model):
    def error(variables, rows):
        return jnp.sum(rows["weight"] * (model.predict(variables, rows["x"]) - rows["y"]) ** 2) / jnp.sum(rows["weight"])

    def step(state, batch, config):
        return jax.tree.map(lambda w, g: w - 0.1 * g, state, jax.grad(error)(state, batch)), {}

    return Trial(lambda key, config: model.init(key, ROWS[:1]), step, error)


def test_the_depth_is_that_of_cross_validation():
    found = depth_by_cross_validation(deep, [1, 0], of_depth, DATA, **FOLDED)
    each = [cross_validate(of_depth(depth, deep(depth)), DATA, **FOLDED) for depth in (1, 0)]
    np.testing.assert_allclose(found.scores, [own.mean[0] for own in each], rtol=1e-4)
    np.testing.assert_allclose(found.standard_errors, [own.standard_error[0] for own in each], rtol=1e-4)
    assert found.best == [1, 0][int(np.argmin(found.scores))]
    limit = found.scores.min() + found.standard_errors[np.argmin(found.scores)]
    near = [depth for depth, score in zip([1, 0], found.scores, strict=True) if score <= limit]
    assert sorted(near) == [0, 1]
    assert found.chosen == min(near)
    deepest = depth_by_cross_validation(deep, [1, 0], of_depth, DATA, complexity=[-1, 0], **FOLDED)
    assert deepest.chosen == max(near)


def test_widths_make_a_curve():
    score = trained(trial_of_width, **RUN)
    found = width_by_grid(bare, [4, 2, 3], score, macs(X), key=KEY, together=3)
    expected = {width: by_hand({"width": width, "rate": 0.1}, number) for number, width in enumerate([4, 2, 3])}
    assert found.widths.tolist() == [2, 3, 4]
    np.testing.assert_allclose(found.scores, [expected[width] for width in (2, 3, 4)], rtol=1e-5)
    assert found.best == min(expected, key=expected.get)
    assert found.found.values[:, 1].tolist() == [32, 16, 24]
    drawn = width_by_random(bare, integer(2, 9), scored(lambda config: -config["width"]), candidates=4, key=KEY)
    assert len(set(drawn.widths.tolist())) == 4
    assert drawn.best == drawn.widths[-1] == -drawn.scores[-1]


def trial_of_width(config, model):
    return trial_of({**config, "rate": 0.1}, model)._replace(
        step=lambda state, batch, own: trial_of(config, model).step(state, batch, {"rate": 0.1})
    )


# What is amiss is named.


def search(**changes):
    given = {"space": SMALL, "build": None, "objectives": scored(loss_of), "candidates": 2, "key": KEY, **changes}
    return architectures(given.pop("space"), given.pop("build"), given.pop("objectives"), **given)


WIDTH = {"space": {"width": integer(1, 2)}, "objectives": macs(X)}
BAD = {
    "empty space": ({"space": {}}, ValueError, "the space has no dimension"),
    "no space": ({"space": {"a": 3}}, TypeError, "a is a int; a space is made of dicts"),
    "no model": (
        {**WIDTH, "build": lambda config: "resnet"},
        TypeError,
        r"build\(\{'width': \d\}\): model must be a Model; this str becomes one by nets.from_functions",
    ),
    "no model, in training": (
        {**WIDTH, "build": lambda config: None, "objectives": trained(trial_of, **RUN), "illegal": TypeError},
        TypeError,
        "this NoneType becomes one by",
    ),
    "no builder": ({**WIDTH, "build": bare(2)}, TypeError, "build must be a function config -> Model; got a Model"),
    "no networks": (WIDTH, TypeError, "macs needs networks, and build is None"),
    "a string": ({"objectives": scored(lambda c: "good")}, TypeError, r"score of \{.*\} is 'good'; an objective must return one"),
    "a vector": ({"objectives": scored(lambda c: np.ones(3))}, ValueError, r"score of \{.*\} is an array of shape \(3,\)"),
    "a vector is no illegal net": (
        {"objectives": scored(lambda c: [1.0, 2.0]), "illegal": ValueError},
        ValueError,
        r"an array of shape \(2,\)",
    ),
    "too few values": (
        {"objectives": Objective("short", lambda nets, key: [], builds=False)},
        ValueError,
        r"short must return a value for each of 1 networks; it returned \[\]",
    ),
    "no sequence": (
        {"objectives": Objective("short", lambda nets, key: 3.5, builds=False), "illegal": TypeError},
        ValueError,
        "short must return a value for each of 1 networks; it returned 3.5",
    ),
    "a function": ({"objectives": [loss_of]}, TypeError, r"objectives\[0\] must be an Objective, .* got a function"),
    "a bare function": ({"objectives": loss_of}, TypeError, "got a function"),
    "no objective": ({"objectives": []}, ValueError, "there is no objective to search by"),
    "one name": ({"objectives": [scored(loss_of)] * 2}, ValueError, "two objectives have the name 'score'"),
    "no candidate": ({"candidates": 0}, ValueError, "candidates must be an integer of at least 1; got 0"),
    "none together": ({"together": 1.5}, ValueError, "together must be an integer of at least 1; got 1.5"),
    "no key": ({"key": 3}, TypeError, "key must be a typed key"),
    "lacks": ({"strategy": lambda *_: [{"a": 1, "b": "x"}]}, ValueError, "proposed .*, which lacks c"),
    "inactive": ({"strategy": lambda *_: [{"a": 1, "b": "y", "c": 1}]}, ValueError, "c is not active, or not of the space"),
    "out of range": ({"strategy": lambda *_: [{"a": 4, "b": "y"}]}, ValueError, "proposed a=4, which is not in Integer"),
    "no configuration": ({"strategy": lambda *_: [3]}, TypeError, "must propose dicts shaped as the space; got a int"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_amiss_is_named(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        search(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: regularized_evolution(0), ValueError, "population must be an integer of at least 1; got 0"),
        (lambda: regularized_evolution(5, 0), ValueError, "sample must be"),
        (lambda: regularized_evolution(fitness=3), TypeError, "fitness must be a function"),
        (lambda: grid_search({"a": 0}), ValueError, "a must be an integer of at least 1; got 0"),
        (macs, ValueError, "macs needs an example"),
        (lambda: macs(X, at_most="1e6"), TypeError, "macs: at_most must be a number; got '1e6'"),
        (lambda: scored(3), TypeError, "scored needs a function"),
        (lambda: milliseconds(X, repeats=0), ValueError, "repeats=0 must be at least 1"),
        (lambda: trained(3, **RUN), TypeError, "trial must be a function"),
        (lambda: trained(trial_of, trainings=0, **RUN), ValueError, "trainings must be at least 1"),
        (lambda: width_by_grid(bare, [2, 2], macs(X), key=KEY), ValueError, "widths must hold at least one integer, each once"),
        (lambda: width_by_grid(bare, [2.5], macs(X), key=KEY), TypeError, "widths must be integers; got 2.5"),
        (lambda: depth_by_cross_validation(deep, [], of_depth, DATA, **FOLDED), ValueError, "depths must hold at least one"),
        (
            lambda: depth_by_cross_validation(lambda depth: depth, [1], of_depth, DATA, **FOLDED),
            TypeError,
            r"build\(\{'depth': 1\}\): model must be a Model; this int becomes one by",
        ),
        (
            lambda: depth_by_cross_validation(deep, [1], of_depth, DATA, **{**FOLDED, "folds": [(range(12), range(12, 24))]}),
            ValueError,
            "the standard error of a single fold is not known",
        ),
        (lambda: width_by_random(bare, [2, 3], macs(X), candidates=1, key=KEY), TypeError, "widths must be a range"),
    ],
)
def test_bad_parts_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_strategy_that_knows_nothing_new_ends_by_patience():
    asked = []

    def stubborn(space, history, key, q):
        asked.append(key)
        return [{"a": 0, "b": "y"}]

    found = search(strategy=stubborn, patience=5, candidates=3)
    assert len(found.candidates) == 1
    assert len(asked) == 1 + 5
    assert len({tuple(jax.random.key_data(key).tolist()) for key in asked}) == 6
