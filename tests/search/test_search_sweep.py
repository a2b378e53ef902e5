"""Sweeps: what a study is told, and what becomes of it when its processes are killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest

from jaxopt_lab.search.engines import scanned, vmapped
from jaxopt_lab.search.population import population
from jaxopt_lab.search.spaces import choice, log_uniform, uniform
from jaxopt_lab.search.study import open_study, suggest, to_distributions
from jaxopt_lab.search.sweep import _LEASE, sweep
from jaxopt_lab.search.trial import Trial

optuna.logging.set_verbosity(optuna.logging.ERROR)

SPACE = {"rate": log_uniform(1e-3, 1.0), "decay": uniform(0.0, 0.1), "sign": choice("plus", "minus")}


def init(key, config):
    return jax.random.normal(key, (4,)) * (1.0 if config["sign"] == "plus" else -1.0)


def step(state, batch, config):
    return state - config["rate"] * (state - batch["x"]) - config["decay"] * state, {}


TRIAL = Trial(init, step, lambda state: jnp.sum(state**2))
RUN = {"key": jax.random.key(3), "batches": lambda step: {"x": np.float32(0.1 * step)}, "steps": 6, "engine": vmapped()}


def values_by_hand(study):
    """What each trial of a study should have come to."""
    trials = study.get_trials()
    configs = [suggest(optuna.trial.FixedTrial(trial.params), SPACE) for trial in trials]
    return population(TRIAL, configs, **{**RUN, "engine": scanned()}, numbers=[trial.number for trial in trials]).scores


def test_a_study_is_told_what_its_populations_come_to():
    study = open_study(SPACE, sampler=optuna.samplers.TPESampler(seed=0))
    assert sweep(study, SPACE, TRIAL, trials=11, together=4, rungs=(2, 4), **RUN) == 11
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 11
    np.testing.assert_allclose([trial.value for trial in study.trials], values_by_hand(study), rtol=1e-5)
    assert all(sorted(trial.intermediate_values) == [2, 4] for trial in study.trials)
    assert sweep(study, SPACE, TRIAL, trials=11, together=4, **RUN) == 0
    study.enqueue_trial({"rate": 0.5, "decay": 0.0, "sign": "plus"})
    assert sweep(study, SPACE, TRIAL, trials=11, together=4, **RUN) == 1
    assert study.trials[-1].params["rate"] == 0.5


def test_a_trial_that_diverges_fails_alone():
    study = open_study(SPACE, sampler=optuna.samplers.RandomSampler(seed=0))
    broken = TRIAL._replace(step=lambda state, batch, config: (state / (config["decay"] > 0.05), {}))
    sweep(
        study, SPACE, broken._replace(evaluate=lambda s: jnp.where(jnp.isinf(s).any(), jnp.nan, 1.0)), trials=8, together=8, **RUN
    )
    assert [trial.state.name for trial in study.trials] == [
        "COMPLETE" if t.params["decay"] > 0.05 else "FAIL" for t in study.trials
    ]


def test_whose_lease_is_over_is_taken_over_and_no_other():
    study = open_study(SPACE, sampler=optuna.samplers.RandomSampler(seed=0))
    host = os.uname().nodename
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    leases = {
        "over, elsewhere": ["elsewhere:1:aa", time.time() - 1],
        "held elsewhere": ["elsewhere:1:aa", time.time() + 1000],
        "held here": [f"{host}:{os.getppid()}:bb", time.time() + 1000],
        "its process is gone": [f"{host}:{int(gone.stdout)}:cc", time.time() + 1000],
    }
    for lease in leases.values():
        study.ask().set_user_attr(_LEASE, lease)
    study.ask()  # By someone else, just now.
    assert sweep(study, SPACE, TRIAL, trials=6, together=4, **RUN) == 3
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "RUNNING", "RUNNING", "COMPLETE", "RUNNING", "COMPLETE"]
    assert set(study.trials[0].params) == set(SPACE)


def test_a_result_is_not_told_twice():
    study = open_study(SPACE, sampler=optuna.samplers.RandomSampler(seed=0))

    def stolen(state):
        # While it is traced, another process tells trial 0.
        if not study.trials[0].state.is_finished():
            study.tell(0, 77.0)
        return jnp.sum(state**2)

    assert sweep(study, SPACE, TRIAL._replace(evaluate=stolen), trials=2, together=2, rungs=(3,), **RUN) == 2
    assert study.trials[0].value == 77.0
    assert study.trials[1].state.name == "COMPLETE"


@pytest.mark.parametrize("prune", [False, True])
def test_a_trial_that_another_process_took_over_while_it_was_suggested_is_told_of_what_is_stored(prune):
    class HeldUp(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            found = super().sample_independent(study, trial, name, distribution)
            if trial.number == 1 and name == "sign":
                # Another suggests a rate as well, and dies.
                study._storage.set_trial_param(trial._trial_id, "rate", 0.123, to_distributions(SPACE)["rate"])
            return found

    study = open_study(SPACE, sampler=HeldUp(seed=0), pruner=optuna.pruners.NopPruner())
    assert sweep(study, SPACE, TRIAL, trials=4, together=3, rungs=(2,), prune=prune, **RUN) == 4
    assert study.trials[1].params["rate"] == 0.123
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    np.testing.assert_allclose([trial.value for trial in study.trials], values_by_hand(study), rtol=1e-5)
    early = population(TRIAL, [suggest(optuna.trial.FixedTrial(t.params), SPACE) for t in study.trials], **{**RUN, "steps": 2})
    np.testing.assert_allclose([t.intermediate_values[2] for t in study.trials], early.scores, rtol=1e-5)


def test_leases_are_prolonged_while_trials_are_trained():
    study = open_study(SPACE, sampler=optuna.samplers.RandomSampler(seed=0))

    def slowly(step):
        time.sleep(0.2)
        return {"x": np.float32(0)}

    begin = time.time()
    sweep(study, SPACE, TRIAL, trials=1, together=1, lease=0.3, **{**RUN, "batches": slowly})
    assert study.trials[0].user_attrs[_LEASE][1] > begin + 0.3 + 0.5


def test_bad_numbers_are_named():
    study = open_study(SPACE)
    with pytest.raises(ValueError, match="together at least 1"):
        sweep(study, SPACE, TRIAL, trials=1, together=0, **RUN)
    with pytest.raises(ValueError, match="the study 2 objectives"):
        sweep(open_study(SPACE, directions=("minimize", "maximize")), SPACE, TRIAL, trials=1, together=1, **RUN)
    with pytest.raises(ValueError, match="numbers must be one for each of 1"):
        population(TRIAL, [{"rate": 1.0, "decay": 0.0, "sign": "plus"}], numbers=[1, 2], **RUN)


WORKER = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, sys.argv[2])
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
    from test_search_sweep import RUN, SPACE, TRIAL, open_study, sweep

    def slower(step):
        time.sleep(0.02)
        return RUN["batches"](step)

    # Who is killed while it writes leaves the journal locked, for 30 s by default.
    journal = JournalFileBackend(sys.argv[1], JournalFileSymlinkLock(sys.argv[1], grace_period=3))
    storage = optuna.storages.JournalStorage(journal)
    study = open_study(SPACE, "swept", storage=storage, sampler=optuna.samplers.RandomSampler())
    print("ready", flush=True)
    if sys.argv[3:]:
        sys.stdin.readline()
    sweep(study, SPACE, TRIAL, trials=40, together=4, lease=5.0, **{**RUN, "batches": slower})
""")


@pytest.mark.slow
def test_a_sweep_killed_twenty_times_goes_on_and_loses_nothing(tmp_path: Path):
    path, random = str(tmp_path / "journal.log"), np.random.default_rng(20)

    def start():
        command = [sys.executable, "-c", WORKER, path, str(Path(__file__).parent)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    for _ in range(20):
        with start() as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
            time.sleep(random.uniform(0.0, 1.3))
            worker.send_signal(signal.SIGKILL)
    with start() as worker:
        assert worker.wait(240) == 0
    study = open_study(SPACE, "swept", storage=path)
    assert [trial.number for trial in study.trials] == list(range(40))
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    np.testing.assert_allclose([trial.value for trial in study.trials], values_by_hand(study), rtol=1e-5)


def test_what_others_asked_for_meanwhile_is_counted():
    study = open_study(SPACE, sampler=optuna.samplers.RandomSampler(seed=0))

    class Busy(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, name, distribution):
            if trial.number == 2 and name == "rate":
                for _ in range(5):
                    study.add_trial(optuna.create_trial(value=0.0))
            return super().sample_independent(study, trial, name, distribution)

    study.sampler = Busy(seed=0)
    assert sweep(study, SPACE, TRIAL, trials=10, together=8, **RUN) == 5
    assert len(study.trials) == 10


def test_of_three_processes_one_is_killed_and_no_trial_is_lost_or_doubled(tmp_path: Path):
    path = str(tmp_path / "journal.log")
    study = open_study(SPACE, "swept", storage=path)
    command = [sys.executable, "-c", WORKER, path, str(Path(__file__).parent), "together"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(3)]
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 3
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    held = dict.fromkeys((worker.pid for worker in workers), 0)
    # Until each of them was at work: then one of them is.
    while not all(held.values()):
        assert all(worker.poll() is None for worker in workers)
        for trial in study.get_trials(deepcopy=False):
            if _LEASE in trial.user_attrs:
                held[int(trial.user_attrs[_LEASE][0].rsplit(":", 2)[1])] += 1
        time.sleep(0.02)
    workers[1].send_signal(signal.SIGKILL)
    for worker in workers:
        with worker:
            worker.wait(240)
    assert [worker.returncode for worker in workers] == [0, -signal.SIGKILL, 0]
    # It may have died between asking for a trial and saying whose it is: that one is left for as long as a lease.
    while any(trial.state.name == "RUNNING" for trial in study.get_trials(deepcopy=False)):
        time.sleep(5.0)
        sweep(study, SPACE, TRIAL, trials=40, together=4, lease=5.0, **RUN)
    # Each may have asked for one more before it saw those of the others.
    count = len(study.trials)
    assert 40 <= count <= 42
    assert [trial.number for trial in study.trials] == list(range(count))
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    np.testing.assert_allclose([trial.value for trial in study.trials], values_by_hand(study), rtol=1e-5)
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    told = [line["trial_id"] for line in lines if line.get("state") == optuna.trial.TrialState.COMPLETE]
    assert sorted(told) == list(range(count))


def test_pruned_trials_leave_their_population_and_the_others_end_as_they_would():
    """ASHA: of each rung so far a third goes on; what goes on comes to the same as without the pruner."""
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3), pruner=pruner)
    assert sweep(study, SPACE, TRIAL, trials=18, together=6, prune=True, **{**RUN, "rungs": (1, 3)}) == 18
    names = [trial.state.name for trial in study.trials]
    assert set(names) == {"COMPLETE", "PRUNED"}
    assert names.count("PRUNED") >= 9
    values = np.array(values_by_hand(study))
    ended = [trial.number for trial in study.trials if trial.state.name == "COMPLETE"]
    np.testing.assert_allclose([study.trials[number].value for number in ended], values[ended], rtol=1e-5)
    # Each was seen at every rung up to where it ended, and no further.
    for trial in study.trials:
        assert list(trial.intermediate_values) == [1, 3][: len(trial.intermediate_values)]
        assert len(trial.intermediate_values) == 2 or trial.state.name == "PRUNED"


def test_what_diverges_at_a_rung_fails_and_is_not_pruned():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), pruner=optuna.pruners.NopPruner())
    trial = Trial(lambda key, c: jnp.float32(1), lambda x, batch, c: (x / (c["rate"] > 0.5) * 1.0, {}), lambda x: x - x + 1.0)
    sweep(
        study,
        {"rate": uniform(0.0, 1.0)},
        trial,
        trials=8,
        together=8,
        prune=True,
        **{**RUN, "rungs": (1,), "batches": lambda step: {}},
    )
    for each in study.trials:
        assert each.state.name == ("COMPLETE" if each.params["rate"] > 0.5 else "FAIL")


def test_pruning_needs_rungs():
    with pytest.raises(ValueError, match="prune asks at rungs"):
        sweep(optuna.create_study(), SPACE, TRIAL, trials=1, together=1, prune=True, **RUN)
