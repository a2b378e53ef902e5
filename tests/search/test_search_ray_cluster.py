"""Populations and sweeps on real Ray clusters, whose workers, nodes and drivers are killed. Each takes about 10 s to start."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optuna
import pytest
from test_search_ray import BY_THIRDS, RUN, SPACE, TRIAL, Thirds, agree, drawn, pruned, swept

from jaxopt_lab.search.cluster.engine import ray
from jaxopt_lab.search.engines import vmapped
from jaxopt_lab.search.population import population
from jaxopt_lab.search.spaces import choice
from jaxopt_lab.search.study import open_study
from jaxopt_lab.search.sweep import _CAUSE

pytest.importorskip("ray")

HERE = Path(__file__).parent
PRIVATE = {
    "engine": vmapped(),
    "init": {"num_cpus": 2, "object_store_memory": 100_000_000},
    # Where the actors find the functions of these tests.
    "environment": {"PYTHONPATH": str(HERE)},
}


def test_a_private_cluster_comes_to_what_this_process_does():
    with ray(**PRIVATE, most=1) as engine:
        study = swept(engine, trials=7)
        assert agree(study) == ["COMPLETE"] * 7
        assert [process == os.getpid() for _, process in engine.workers] == [False]
        with pytest.raises(TypeError, match="must return one number"):
            population(TRIAL._replace(evaluate=lambda state: "ten"), drawn()[:2], engine=engine, **RUN)
        whole, there = (population(TRIAL, drawn(), rungs=(2,), keep=2, engine=each, **RUN) for each in (vmapped(), engine))
        pruner = Thirds()
        assert pruned(engine, pruner) == BY_THIRDS
        assert len(pruner.asked) == 20
        assert "PRUNED" in pruned(engine, optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3))
    np.testing.assert_allclose(there.curves, whole.curves, rtol=1e-6)
    np.testing.assert_allclose(there.metrics["first"], whole.metrics["first"], rtol=1e-6)
    np.testing.assert_allclose(there.states[there.best], whole.states[whole.best], rtol=1e-6)
    assert engine.workers == []


@pytest.mark.slow
def test_a_trial_that_kills_its_actors_is_given_up_and_so_is_one_that_hangs():
    space = {**SPACE, "sign": choice("plus", "minus", "kills")}
    with ray(**PRIVATE, patience=2, timeout=60.0) as engine:
        study = swept(engine, trials=16, together=8, space=space)
        kill = [trial.params["sign"] == "kills" for trial in study.trials]
        assert 0 < sum(kill) < 16
        assert agree(study, space) == ["FAIL" if each else "COMPLETE" for each in kill]
        causes = {trial.user_attrs.get(_CAUSE, "")[:56] for trial in study.trials}
        assert causes == {"", "actors died over it, the last since ActorDiedError: The "}
    rows = [drawn()[0], {**drawn()[1], "sign": "hangs"}]
    with (
        ray(**PRIVATE, patience=1, timeout=25.0, chunk=1) as engine,
        pytest.warns(RuntimeWarning, match=r"configurations \[1\] were given up.*longer than 25.0 s"),
    ):
        assert np.isnan(population(TRIAL, rows, engine=engine, **RUN).scores).tolist() == [False, True]


def share(state):
    return jnp.float32(os.environ["XLA_CLIENT_MEM_FRACTION"]) + int(os.environ["CUDA_VISIBLE_DEVICES"])


@pytest.mark.slow
def test_two_actors_share_a_gpu():
    """One that is only said to be there: what is looked at is who gets which part of it."""
    options = {**PRIVATE, "init": {**PRIVATE["init"], "num_gpus": 1}}
    with ray(**options, least=2, num_cpus=0.5, num_gpus=0.5) as engine:
        found = population(TRIAL._replace(evaluate=share), drawn()[:4], engine=engine, **RUN)
        assert len(engine.workers) == 2
    np.testing.assert_allclose(found.scores, 0.45, rtol=1e-6)


@pytest.mark.slow
def test_a_worker_and_a_node_are_killed_and_a_node_joins():
    script = HERE.parents[1] / "scripts" / "ray_cluster_demo.py"
    # At full optimisation, as a user would start it.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-3000:]
    phases = ["two nodes are up", "a worker was killed", "a node was killed", "a node joined"]
    assert [line["phase"] for line in lines[:4]] == phases
    over, compared, ended = lines[4:]
    assert over["trials"] == {"COMPLETE": 96}
    assert over["deaths"] >= 1
    assert compared["times_told"] == [1]
    assert ended["good"]


DRIVER = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, sys.argv[3])
    import optuna
    from test_search_ray import RUN, SPACE, TRIAL, drawn
    from test_search_ray_cluster import PRIVATE
    from jaxopt_lab.search.cluster.engine import ray
    from jaxopt_lab.search.population import population
    from jaxopt_lab.search.study import open_study
    from jaxopt_lab.search.sweep import sweep

    def slower(step):
        time.sleep(0.2)
        return RUN["batches"](step)

    run = {**RUN, "batches": slower}
    with ray(**PRIVATE, chunk=2) as engine:
        if sys.argv[1] == "sweep":
            study = open_study(SPACE, "swept", storage=sys.argv[2], sampler=optuna.samplers.RandomSampler())
            sweep(study, SPACE, TRIAL, trials=24, together=2, engine=engine, **run)
        else:
            print(population(TRIAL, drawn(), engine=engine, save=sys.argv[2], **run).scores.tolist())
""")


def actors_of(process):
    """The actors below a driver: they hold its devices."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in listed.splitlines()]
    below = {process}
    while more := {int(pid) for pid, parent, *_ in rows if int(parent) in below} - below:
        below |= more
    return {int(pid) for pid, _, _, args in rows if int(pid) in below and args.startswith("ray::Worker")}


def runs(process):
    """Whether a process is there, and no mere entry that nobody asked after."""
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False).stdout
    return bool(listed.strip()) and not listed.startswith("Z")


def start(what, path):
    return subprocess.Popen([sys.executable, "-c", DRIVER, what, str(path), str(HERE)], stdout=subprocess.PIPE, text=True)


def kill_after(driver, some):
    """Kills a driver once it has told of some, and waits until its actors, which go with it, are gone."""
    end = time.monotonic() + 120
    while not some():
        assert driver.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    actors = actors_of(driver.pid)
    driver.send_signal(signal.SIGKILL)
    assert actors
    end = time.monotonic() + 60
    while any(map(runs, actors)):
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_a_driver_is_killed_and_the_next_goes_on(tmp_path):
    path = tmp_path / "journal.log"
    study = open_study(SPACE, "swept", storage=str(path))

    def complete():
        return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))

    with start("sweep", path) as driver:
        kill_after(driver, complete)
    assert complete() < 24
    with start("sweep", path) as driver:
        assert driver.wait(240) == 0
    assert agree(study) == ["COMPLETE"] * 24


@pytest.mark.slow
def test_a_driver_of_a_population_is_killed_and_the_next_goes_on(tmp_path):
    def through():
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*.packed")}

    with start("population", tmp_path) as driver:
        kill_after(driver, through)
    before = through()
    assert 0 < len(before) < 6
    with start("population", tmp_path) as driver:
        told, _ = driver.communicate(timeout=240)
    after = through()
    assert len(after) == 6
    assert {path: after[path] for path in before} == before
    np.testing.assert_allclose(json.loads(told), population(TRIAL, drawn(), engine=vmapped(), **RUN).scores, rtol=1e-6)
