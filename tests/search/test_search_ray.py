"""Populations and sweeps on a cluster: what is decided without Ray, and what becomes of it with a Ray that is made up."""

import asyncio
import functools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest

from jaxopt_lab.data import batches as stream
from jaxopt_lab.search.cluster import pool, worker
from jaxopt_lab.search.cluster.engine import Ray, ray
from jaxopt_lab.search.cluster.plan import Chunk, Row, after_death, dealt, environment, fitting, gathered, likeness, matched
from jaxopt_lab.search.cluster.pool import Terms
from jaxopt_lab.search.elsewhere import Elsewhere, Lost
from jaxopt_lab.search.engines import scanned, vmapped
from jaxopt_lab.search.evolution import evolve
from jaxopt_lab.search.population import population
from jaxopt_lab.search.spaces import choice, configs, log_uniform, sample, uniform
from jaxopt_lab.search.study import open_study, suggest
from jaxopt_lab.search.sweep import _CAUSE, _LEASE, sweep
from jaxopt_lab.search.trial import Trial

optuna.logging.set_verbosity(optuna.logging.ERROR)

HERE = Path(__file__).parent
SPACE = {"rate": log_uniform(1e-3, 1.0), "decay": uniform(0.0, 0.1), "sign": choice("plus", "minus")}


def init(key, config):
    if config["sign"] == "kills":
        os.kill(os.getpid(), signal.SIGKILL)
    if config["sign"] == "hangs":
        time.sleep(1000)
    return jax.random.normal(key, (4,)) * (-1.0 if config["sign"] == "minus" else 1.0)


def step(state, batch, config):
    return state - config["rate"] * (state - batch["x"]) - config["decay"] * state, {"first": state[0]}


def evaluate(state):
    return jnp.sum(state**2)


def numbers_of(step):
    return {"x": np.float32(0.1 * step)}


TRIAL = Trial(init, step, evaluate)
RUN = {"key": jax.random.key(3), "batches": numbers_of, "steps": 6}


@functools.cache
def drawn():
    return configs(SPACE, sample(SPACE, jax.random.key(1), 11))


def agree(study, space=SPACE):
    """Each complete trial came to what one population here does; the others failed."""
    trials = [trial for trial in study.get_trials() if trial.state.name == "COMPLETE"]
    drawn = [suggest(optuna.trial.FixedTrial(trial.params), space) for trial in trials]
    found = population(TRIAL, drawn, numbers=[trial.number for trial in trials], engine=scanned(), keep=0, **RUN)
    np.testing.assert_allclose([trial.value for trial in trials], found.scores, rtol=1e-5)
    return [trial.state.name for trial in study.get_trials()]


# What is decided without Ray.


@pytest.mark.parametrize(("count", "chunks"), [(11, 3), (11, 1), (11, 11), (3, 8), (12, 4)])
def test_all_rows_are_dealt_out_evenly_and_alike_together(count, chunks):
    rows = [Row(k, {"sign": "ab"[k % 2], "rate": 0.1 * k}, k) for k in range(count)]
    dealt_out = dealt(rows, chunks)
    assert sorted(row.label for chunk in dealt_out for row in chunk.rows) == list(range(count))
    sizes = [len(chunk.rows) for chunk in dealt_out]
    assert len(sizes) == min(count, chunks)
    assert max(sizes) - min(sizes) <= 1
    signs = [row.config["sign"] for chunk in dealt_out for row in chunk.rows]
    assert signs == sorted(signs)


def test_likeness_is_of_what_cannot_be_traced():
    one = {"rate": 0.1, "sign": "plus", "none": None, "on": True, "width": 8}
    assert likeness(one) == likeness({**one, "rate": 0.7})
    assert all(likeness({**one, **other}) != likeness(one) for other in ({"sign": "-"}, {"on": False}, {"width": 9}, {"none": 0.1}))
    assert likeness({"a": "plus"}) != likeness({"a": "plus", "b": 0.1})


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize(("count", "killers"), [(1, {0}), (7, {3}), (8, {0, 5}), (16, {15}), (4, {0, 1, 2, 3})])
def test_who_kills_is_found_and_the_others_are_trained(count, killers, patience):
    queue, trained, lost, deaths = [Chunk(tuple(Row(k, {}, k) for k in range(count)))], [], [], 0
    while queue:
        chunk = queue.pop(0)
        labels = [row.label for row in chunk.rows]
        if not killers & set(labels):
            trained += labels
            continue
        deaths += 1
        again = after_death(chunk, patience=patience)
        queue = again + queue
        lost += [] if again else labels
    assert set(lost) == killers
    assert sorted(trained + lost) == list(range(count))
    assert deaths <= patience + len(killers) * math.ceil(math.log2(count) if count > 1 else 0)


def test_a_node_that_leaves_is_counted_apart():
    chunk, times = Chunk((Row(0, {}, 0),)), 0
    while again := after_death(chunk, patience=2, with_node=True):
        (chunk,), times = again, times + 1
    assert (times, chunk.losses, chunk.deaths) == (16, 15, 1)


def test_chunks_go_to_those_who_compiled_them():
    queue = [Chunk((Row(0, {"sign": s}, 0), Row(1, {"sign": t}, 1))) for s, t in ("ab", "cc", "bb")]
    known = {name: {likeness({"sign": s}) for s in signs} for name, signs in {"x": "b", "y": "ab", "z": ""}.items()}
    assert matched(queue, known) == [(0, "y"), (1, "x"), (2, "z")]
    assert matched(queue[:1], {"x": known["x"], "z": known["z"]}) == [(0, "x")]
    assert matched([], known) == matched(queue, {}) == []


@pytest.mark.parametrize(
    ("nodes", "need", "fits"),
    [
        ([{"CPU": 4.0}, {"CPU": 3.0}], {"CPU": 2.0}, 3),
        ([{"CPU": 64.0, "GPU": 4.0}, {"CPU": 64.0}], {"CPU": 1.0, "GPU": 0.2}, 20),
        ([{"CPU": 64.0, "memory": 10.0}], {"CPU": 1.0, "GPU": 0.0, "memory": 4.0}, 2),
        ([{"CPU": 1.0}], {"CPU": 0.0, "TPU": 4.0}, 0),
        ([], {"CPU": 1.0}, 0),
    ],
)
def test_how_many_fit(nodes, need, fits):
    assert fitting(nodes, need) == fits


def test_an_actor_takes_its_share_of_the_machine():
    assert environment(0.5, 0) == {"NPROC": "1", "JAX_PLATFORMS": "cpu"}
    assert environment(3, 1) == {"NPROC": "3", "JAX_PLATFORMS": ""}
    assert environment(1, 0, tpus=True)["JAX_PLATFORMS"] == ""
    assert float(environment(1, 0.5)["XLA_CLIENT_MEM_FRACTION"]) * 2 < 1


@pytest.mark.parametrize("keep", [None, 0, 3])
def test_parts_come_to_the_whole(keep):
    options = {"engine": vmapped(), "rungs": (2,), "maximize": True, "keep": keep, **RUN}
    whole = population(TRIAL, drawn(), **options)
    split = [[3, 0, 9, 1], [10, 2], [4, 5, 6, 7, 8]]
    parts = [(each, population(TRIAL, [drawn()[k] for k in each], numbers=each, **options)) for each in split]
    found = gathered(drawn(), (2, 6), parts, keep=keep, maximize=True)
    for name in ("scores", "curves"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-6)
    np.testing.assert_allclose(found.metrics["first"], whole.metrics["first"], rtol=1e-6)
    assert (found.best, found.evaluated) == (whole.best, whole.evaluated)
    assert [state is None for state in found.states] == [state is None for state in whole.states]
    for one, other in zip(found.states, whole.states, strict=True):
        assert one is other is None or np.allclose(one, other, rtol=1e-6)


def test_what_was_given_up_is_not_a_number():
    parts = [([1, 2], population(TRIAL, drawn()[1:3], numbers=[1, 2], **RUN)), ([0], Lost("it is gone"))]
    found = gathered(drawn()[:3], (6,), parts, keep=None, maximize=False)
    assert np.isnan(found.scores).tolist() == [True, False, False]
    assert found.states[0] is None
    assert gathered(drawn()[:2], (6,), [([0, 1], Lost("gone"))], keep=1, maximize=False).best is None


class Backwards(Elsewhere):
    """Takes three chunks at a time, and is over with the last first, a part at a time; gives up what `lost` says."""

    def __init__(self, lost=()):
        self.lost, self.most, self._held = set(lost), 0, []

    @contextmanager
    def hands(self, trial, run, prune):
        self.train = lambda configs, numbers: population(trial, configs, numbers=numbers, **{**run, "engine": scanned()})
        yield self

    def room(self):
        return 3 - len(self._held)

    def submit(self, labels, configs, numbers):
        self._held.append(list(zip(labels, configs, numbers, strict=True)))
        self.most = max(self.most, len(self._held))

    def wait(self):
        chunk = self._held[-1]
        part, chunk[:] = chunk[-2:], chunk[:-2]
        if not chunk:
            self._held.pop()
        gone = [row for row in part if row[0] in self.lost]
        there = [row for row in part if row[0] not in self.lost]
        told = [([label for label, *_ in gone], Lost("it was in the way"))] if gone else []
        if there:
            labels, drawn, numbers = zip(*there, strict=True)
            told.append((list(labels), self.train(list(drawn), list(numbers))))
        return told


def test_a_sweep_has_several_chunks_under_way_and_is_told_in_any_order():
    study, engine = open_study(SPACE, sampler=optuna.samplers.RandomSampler(seed=0)), Backwards(lost={2, 9})
    assert sweep(study, SPACE, TRIAL, trials=13, together=3, rungs=(2,), engine=engine, **RUN) == 13
    assert agree(study) == ["FAIL" if k in {2, 9} else "COMPLETE" for k in range(13)]
    assert engine.most == 3
    assert study.trials[9].user_attrs[_CAUSE] == "it was in the way"
    assert all(sorted(trial.intermediate_values) == [2] for trial in study.trials if trial.state.name == "COMPLETE")


def test_an_error_gives_up_the_leases():
    study = open_study(SPACE, sampler=optuna.samplers.RandomSampler(seed=0))
    engine = Backwards()

    def wait():
        raise KeyboardInterrupt

    engine.wait = wait
    with pytest.raises(KeyboardInterrupt):
        sweep(study, SPACE, TRIAL, trials=5, together=2, engine=engine, **RUN)
    assert [trial.user_attrs[_LEASE][1] for trial in study.trials] == [0.0] * 5
    assert sweep(study, SPACE, TRIAL, trials=5, together=4, engine=scanned(), **RUN) == 5
    assert agree(study) == ["COMPLETE"] * 5


def test_what_needs_its_members_here_refuses_to_go_elsewhere():
    with pytest.raises(TypeError, match="needs them here"):
        evolve(TRIAL, drawn()[:2], SPACE, every=2, engine=Backwards(), **RUN)


def test_a_stream_of_batches_travels():
    """By the pickle of the standard library, as a Ray without functions of `__main__` would."""
    program = """
        import pickle, sys, numpy as np
        from jaxopt_lab.data import batches
        there = pickle.loads(sys.stdin.buffer.read())
        print([there(step)["x"].tolist() for step in range(5)])
    """
    here = stream({"x": np.arange(7)}, 3, seed=4)
    here(2)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], input=pickle.dumps(here), capture_output=True, check=True
    )
    assert json.loads(done.stdout) == [here(step)["x"].tolist() for step in range(5)]


# With a Ray that is made up: all its actors are here, and what happens to them is written down in advance.


class ActorDiedError(Exception):
    pass


class RaySystemError(ActorDiedError):
    pass


class Ref:
    """What is not known yet."""

    def __init__(self, call):
        self.call = call


class RayTaskError(Exception):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class MadeUp:
    """As much of Ray as a pool uses; `fate(handle, rows)` may raise, or return False for a chunk that is never over.

    Actors with a desk train in threads, which wait there; `fate` is asked of them again and again. What is asked at a desk after
    `desk_dies` is set is an error, once.
    """

    exceptions = SimpleNamespace(RayError=ActorDiedError, RayTaskError=RayTaskError, RaySystemError=RaySystemError)
    util = SimpleNamespace(scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft)))

    def __init__(self, cpus, fate=lambda handle, rows: True, start=lambda handle: True):
        self.cpus, self.fate, self.start = list(cpus), fate, start
        self.made, self.killed, self.stored, self.options, self.desks = [], [], [], [], []
        self.desk_dies, self.threads = False, ThreadPoolExecutor(16)

    def is_initialized(self):
        return True

    def get_runtime_context(self):
        return SimpleNamespace(gcs_address="10.0.0.1:6379", get_node_id=lambda: "n0")

    def nodes(self):
        return [{"Alive": c > 0, "NodeID": f"n{k}", "Resources": {"CPU": float(c), "memory": 1e9}} for k, c in enumerate(self.cpus)]

    def remote(self, **options):
        self.options.append(options)

        def make(kind):
            return SimpleNamespace(remote=lambda: self.open(kind()) if kind is pool.Desk else self.hire(kind()))

        return make

    def open(self, desk):
        loop, waiting, closed = asyncio.new_event_loop(), [], []

        def live():
            loop.run_forever()
            if tasks := asyncio.all_tasks(loop):
                for each in tasks:
                    each.cancel()
                loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.close()

        thread = threading.Thread(target=live, daemon=True)
        thread.start()

        def method(bound):
            def remote(*arguments):
                if closed or (self.desk_dies and bound == desk.ask):
                    self.desk_dies = False
                    return Ref(lambda: self.fail("the desk is gone"))
                waiting.append(asyncio.run_coroutine_threadsafe(bound(*arguments), loop))
                return Ref(functools.partial(self.heard, waiting[-1]))

            return SimpleNamespace(remote=remote)

        def close():
            closed.append(True)
            for each in waiting:
                each.cancel()
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)

        methods = {name: method(getattr(desk, name)) for name in ("ask", "next", "answer")}
        self.desks.append(SimpleNamespace(**methods, close=close))
        return self.desks[-1]

    def heard(self, future):
        return self.fail("the desk is gone") if future.cancelled() else future.done() and future.result()

    def fail(self, why):
        raise ActorDiedError(why)

    def hire(self, worker):
        handle = SimpleNamespace(number=len(self.made), worker=worker, trained=[])
        # On the first node that has room.
        taken = Counter(each.node for each in self.made if each not in self.killed)
        handle.node = next((f"n{k}" for k, cpus in enumerate(self.cpus) if taken[f"n{k}"] < cpus), None)
        self.made.append(handle)
        handle.where = SimpleNamespace(remote=lambda: Ref(lambda: self.at(handle)))

        def train(settings, trial, batches, shared, run, rows, desk):
            # As it travels.
            assert not {"shared", "prune"} & set(run)
            handle.trained.append([row.label for row in rows])
            thread = None if desk is None else self.threads.submit(worker.train, settings, trial, batches, shared, run, rows, desk)

            def call():
                alive = self.fate(handle, rows)
                if thread is None:
                    return alive and worker.train(settings, trial, batches, shared, run, rows)
                return alive and thread.done() and thread.result()

            return Ref(call)

        handle.train = SimpleNamespace(remote=train)
        return handle

    def at(self, handle):
        return handle.node is not None and self.start(handle) and (handle.node, 1000 + handle.number)

    def wait(self, refs, num_returns, timeout):
        over = [ref for ref in refs if self.over(ref)]
        if not over:
            time.sleep(0.005)
        return over[:num_returns], []

    def over(self, ref):
        if not hasattr(ref, "found"):
            try:
                ref.found = ref.call()
            except (ActorDiedError, RayTaskError) as error:
                ref.found = error
            except Exception as error:
                ref.found = RayTaskError(error)
            if ref.found is False:
                del ref.found
                return False
        return True

    def get(self, ref):
        if isinstance(ref, int):
            return self.stored[ref]
        while not self.over(ref):
            time.sleep(0.005)
        if isinstance(ref.found, Exception):
            raise ref.found
        return ref.found

    def put(self, thing):
        self.stored.append(thing)
        return len(self.stored) - 1

    def kill(self, handle, no_restart):
        self.killed.append(handle)
        if handle in self.desks:
            handle.close()


@pytest.fixture
def engine_on(monkeypatch):
    """An engine on a Ray that is made up."""

    def make(made_up, **terms):
        for module in (pool, worker):
            monkeypatch.setattr(module, "import_ray", lambda: made_up)
        monkeypatch.setattr(pool, "_LOOK", 0.01)
        given = {"least": 1, "most": None, "need": {"CPU": 1.0, "GPU": 0.0}, "memory": 0, "runtime_env": {}, "address": None}
        return Ray(Terms(**{**given, "init": {}, "patience": 2, "timeout": None, "start": 5.0, **terms}), vmapped(), None)

    return make


def swept(engine, trials=11, together=3, space=SPACE, **options):
    study = open_study(space, sampler=optuna.samplers.RandomSampler(seed=0))
    sweep(study, space, TRIAL, trials=trials, together=together, engine=engine, **RUN, **options)
    return study


def test_as_many_are_hired_as_fit_and_have_work(engine_on):
    there = MadeUp([2, 0, 1])
    assert agree(swept(engine_on(there))) == ["COMPLETE"] * 11
    assert len(there.made) == len(there.killed) == 3
    assert there.options[0]["max_restarts"] == there.options[0]["max_task_retries"] == 0
    assert there.options[0]["runtime_env"]["env_vars"]["JAX_PLATFORMS"] == "cpu"
    there = MadeUp([8])
    swept(engine_on(there, most=2))
    assert len(there.made) == 2
    there = MadeUp([8])
    swept(engine_on(there), trials=4)
    assert len(there.made) == 2


def test_who_is_hired_stays_while_the_engine_is_open_and_what_travels_travels_once(engine_on):
    there = MadeUp([2])
    with engine_on(there) as engine:
        first = swept(engine)
        assert engine.workers == [("n0", 1000), ("n0", 1001)]
        found = population(TRIAL, drawn(), engine=engine, keep=2, **RUN)
        second = swept(engine)
        assert not there.killed
    assert len(there.made) == len(there.killed) == 2
    assert there.stored == [TRIAL, numbers_of]
    assert agree(first) == agree(second) == ["COMPLETE"] * 11
    whole = population(TRIAL, drawn(), engine=scanned(), keep=2, **RUN)
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-5)
    assert [state is None for state in found.states] == [state is None for state in whole.states]
    assert sum(int(each.split()[0]) for each in found.engines) == 11


def with_shared(state, batch, config, shared):
    return step(state, {"x": batch["x"] + shared["table"][0] + jax.random.uniform(shared["key"])}, config)


def test_what_all_share_travels_once_in_each_call_and_is_let_go_of(engine_on):
    shared = {"table": jnp.arange(3.0), "key": jax.random.key(5), "rows": np.ones(2)}
    run, trial, there = {**RUN, "shared": shared}, TRIAL._replace(step=with_shared), MadeUp([2])
    with engine_on(there) as engine:
        first = population(trial, drawn(), engine=engine, **run)
        np.testing.assert_allclose(first.scores, population(trial, drawn(), engine=scanned(), **run).scores, rtol=1e-5)
        study = open_study(SPACE, sampler=optuna.samplers.RandomSampler(seed=0))
        # In four chunks.
        sweep(study, SPACE, trial, trials=11, together=3, engine=engine, **run)
        assert there.stored[:2] == [trial, numbers_of]
        assert len(there.stored) == 4
        assert type(there.stored[2]["table"]) is np.ndarray
        assert there.stored[2]["key"] is shared["key"]
        # What was written to since is what is trained on, and an actor holds the newest alone.
        shared["table"] = shared["table"] + 1
        second = population(trial, drawn(), engine=engine, **run)
        np.testing.assert_allclose(second.scores, population(trial, drawn(), engine=scanned(), **run).scores, rtol=1e-5)
        assert not np.allclose(first.scores, second.scores)
        workers = [handle.worker for handle in there.made]
        assert all(worker._shared[1] is there.stored[4] for worker in workers)
        assert all(len(worker._kept) == 2 for worker in workers)
        population(TRIAL, drawn(), engine=engine, **RUN)
        assert [worker._shared for worker in workers] == [None, None]


def test_only_what_was_used_last_is_kept(engine_on):
    there = MadeUp([1])
    with engine_on(there) as engine:
        streams = [functools.partial(numbers_of) for _ in range(4)]
        for batches in [*streams, streams[0]]:
            population(TRIAL, drawn()[:2], engine=engine, **{**RUN, "batches": batches})
        # The trial stayed, being used each time; the first batches had gone.
        assert [thing is TRIAL for thing in there.stored].count(True) == 1
        assert len(there.stored) == 6
        assert len(there.made[0].worker._kept) == 4


def test_who_dies_is_replaced(engine_on):
    def fate(handle, rows):
        if handle.number in (0, 2):
            raise ActorDiedError("the process was killed")
        return True

    there = MadeUp([2], fate)
    with engine_on(there) as engine:
        study = swept(engine, trials=30)
        assert engine.deaths == 2
    assert agree(study) == ["COMPLETE"] * 30
    assert len(there.made) == 4


def test_a_trial_that_kills_is_given_up_alone(engine_on):
    def fate(handle, rows):
        if any(row.number == 4 for row in rows):
            raise ActorDiedError("the process was killed")
        return True

    there = MadeUp([2], fate)
    study = swept(engine_on(there), trials=16, together=8)
    assert agree(study) == ["FAIL" if k == 4 else "COMPLETE" for k in range(16)]
    assert study.trials[4].user_attrs[_CAUSE] == "actors died over it, the last since ActorDiedError: the process was killed"
    # Twice as a whole, and then halves of 4, 2 and 1.
    assert len(there.made) == 2 + 2 + 3
    with pytest.warns(RuntimeWarning, match=r"configurations \[4\] were given up: actors died over it"):
        found = population(TRIAL, drawn(), engine=engine_on(there), **RUN)
    assert np.flatnonzero(np.isnan(found.scores)).tolist() == [4]


def test_a_node_that_leaves_is_no_fault_and_one_that_joins_is_used(engine_on):
    there = MadeUp([1, 1])
    lost = []

    def fate(handle, rows):
        if handle.node == "n1" and len(lost) < 3:
            # With the chunk's every try another node goes.
            lost.append(handle.node)
            there.cpus[1] = 0
            there.cpus.append(1)
            raise ActorDiedError("the node is gone")
        return True

    there.fate = fate
    with engine_on(there, patience=1) as engine:
        assert agree(swept(engine)) == ["COMPLETE"] * 11
        assert {node for node, _ in engine.workers} == {"n0", "n2"}
    assert lost == ["n1"]


def test_more_are_hired_when_nodes_join(engine_on):
    there = MadeUp([1])

    def fate(handle, rows):
        there.cpus[0] = 3
        return True

    there.fate = fate
    swept(engine_on(there), trials=30)
    assert len(there.made) == 3


def test_who_takes_too_long_is_taken_for_dead(engine_on):
    there = MadeUp([2], lambda handle, rows: all(row.number != 1 for row in rows))
    study = swept(engine_on(there, timeout=0.4), trials=6, together=2)
    assert agree(study) == ["FAIL" if k == 1 else "COMPLETE" for k in range(6)]
    assert study.trials[1].user_attrs[_CAUSE].endswith("it took longer than 0.4 s")


def test_errors_of_the_device_are_faults_and_those_of_the_trial_are_raised(engine_on):
    def fate(handle, rows):
        if handle.number == 0:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return True

    there = MadeUp([1], fate)
    assert agree(swept(engine_on(there))) == ["COMPLETE"] * 11
    assert len(there.made) == 2

    def unknown(handle, rows):
        raise RayTaskError(RaySystemError("System error: No module named 'mine'"))

    with pytest.raises(RuntimeError, match=r"No module named 'mine'\): what is of a module must be importable there"):
        swept(engine_on(MadeUp([1], unknown)))

    there = MadeUp([2])
    broken = TRIAL._replace(evaluate=lambda state: state)
    with engine_on(there) as engine:
        study = open_study(SPACE, sampler=optuna.samplers.RandomSampler(seed=0))
        with pytest.raises(RayTaskError, match="it must return one number"):
            sweep(study, SPACE, broken, trials=4, together=2, engine=engine, **RUN)
        # The engine is good for another.
        assert agree(swept(engine)) == ["COMPLETE"] * 11


class Thirds(optuna.pruners.BasePruner):
    """Gives up every third trial at the first rung; keeps whom it was asked about."""

    def __init__(self):
        self.asked = []

    def prune(self, study, trial):
        self.asked.append((trial.number, trial.last_step))
        return trial.number % 3 == 0 and trial.last_step == 1


def pruned(engine, pruner, trials=12, together=4):
    study = open_study(SPACE, sampler=optuna.samplers.RandomSampler(seed=0), pruner=pruner)
    sweep(study, SPACE, TRIAL, trials=trials, together=together, rungs=(1, 3), prune=True, engine=engine, **RUN)
    names = agree(study)
    for trial in study.trials:
        assert list(trial.intermediate_values) == [1, 3][: len(trial.intermediate_values)]
        assert len(trial.intermediate_values) == 2 or trial.state.name == "PRUNED"
    return names


BY_THIRDS = ["PRUNED", "COMPLETE", "COMPLETE"] * 4


def test_actors_ask_at_each_rung_whom_to_give_up(engine_on):
    there, pruner = MadeUp([2]), Thirds()
    with engine_on(there) as engine:
        assert pruned(engine, pruner) == BY_THIRDS
        # Of those given up nobody asks again.
        assert sorted(pruner.asked) == sorted((k, at) for k in range(12) for at in (1, 3) if k % 3 or at == 1)
        assert "PRUNED" in pruned(engine, optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3))
        # Each call has its desk, which lies beside the driver and takes no CPU; without pruning there is none.
        assert agree(swept(engine)) == ["COMPLETE"] * 11
    assert len(there.desks) == 2
    assert all(desk in there.killed for desk in there.desks)
    options = next(each for each in there.options if "scheduling_strategy" in each)
    assert (options["num_cpus"], options["scheduling_strategy"]) == (0, ("n0", True))


def test_a_population_on_a_cluster_is_pruned_as_one_here(engine_on):
    def worst(step, scores):
        return [index for index, score in scores.items() if score > 1.0]

    run = {**RUN, "rungs": (2,), "keep": 2, "prune": worst}
    whole = population(TRIAL, drawn(), engine=vmapped(), **run)
    found = population(TRIAL, drawn(), engine=engine_on(MadeUp([2])), **run)
    assert 0 < np.isnan(whole.curves[:, -1]).sum() < 11
    np.testing.assert_allclose(found.curves, whole.curves, rtol=1e-6)
    # Who was pruned has the score that it was pruned for.
    assert np.isfinite(whole.scores).all()
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-6)
    assert found.best == whole.best
    # What was given up is none of the best, though it may have scored better when it was.
    late = population(TRIAL, drawn(), engine=engine_on(MadeUp([2])), **{**run, "prune": lambda step, scores: [whole.best]})
    assert late.best != whole.best
    assert np.isnan(late.curves[whole.best]).tolist() == [False, True]


class KilledError(BaseException):
    """What stands for SIGKILL of this process."""


def trained_by(there):
    """What its actors were given to train."""
    return sorted(label for each in there.made for rows in each.trained for label in rows)


@pytest.mark.parametrize("keep", [None, 2])
def test_a_population_that_was_killed_goes_on_without_those_who_are_through(engine_on, tmp_path, keep):
    def fate(handle, rows):
        if handle.number == 2 and list(tmp_path.glob("part-*")):
            raise KilledError
        return handle.number < 2

    run = {**RUN, "rungs": (2,), "keep": keep, "save": tmp_path}
    first, next_one, last = MadeUp([3], fate), MadeUp([2]), MadeUp([2])
    with pytest.raises(KilledError):
        population(TRIAL, drawn(), engine=engine_on(first), **run)
    whole = population(TRIAL, drawn(), engine=vmapped(), **{**run, "save": None})
    for there in (next_one, last):
        found = population(TRIAL, drawn(), engine=engine_on(there), **run)
        np.testing.assert_allclose(found.curves, whole.curves, rtol=1e-6)
        np.testing.assert_allclose(found.metrics["first"], whole.metrics["first"], rtol=1e-6)
        assert [state is None for state in found.states] == [state is None for state in whole.states]
        np.testing.assert_allclose(found.states[found.best], whole.states[whole.best], rtol=1e-6)
    assert trained_by(first) == list(range(11))
    assert trained_by(next_one) == sorted(first.made[2].trained[0])
    assert not last.made


def test_what_is_kept_of_another_call_or_damaged_is_refused(engine_on, tmp_path):
    run, none = {**RUN, "save": tmp_path, "rungs": (np.int64(2),)}, MadeUp([2])
    population(TRIAL, drawn(), engine=engine_on(MadeUp([2])), **run)
    # The same in other words.
    population(TRIAL, drawn(), engine=engine_on(none), **{**run, "rungs": [2]})
    assert not none.made
    for changed, message in (({"keep": 3}, "keep was None and is 3"), ({"memory": 1 << 20}, "memory was None and is 1048576")):
        with pytest.raises(ValueError, match=f"was begun by another call: {message}"):
            population(TRIAL, drawn(), engine=engine_on(MadeUp([2])), **run, **changed)
    with pytest.raises(ValueError, match=r"was begun by another call: function was 'population on Ray' and is"):
        population(TRIAL, drawn(), engine=vmapped(), **run)
    part = min(tmp_path.glob("part-*.packed"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{part.name}.*; delete .*{part.name}, and its members are trained anew"):
        population(TRIAL, drawn(), engine=engine_on(MadeUp([2])), **run)
    part.unlink()
    there = MadeUp([2])
    population(TRIAL, drawn(), engine=engine_on(there), **run)
    assert 0 < len(trained_by(there)) < 11


def test_what_saves_trains_what_a_cluster_trains_and_refuses_what_it_refuses(engine_on, tmp_path):
    """A float that each program is made of, with more values than one machine would compile for."""

    def by_value(state, batch, config):
        return state * float(config["rate"]), {}

    trial, many = Trial(lambda key, config: jnp.float32(1), by_value, lambda state: state), [{"rate": 0.1 * k} for k in range(20)]
    engine = engine_on(MadeUp([2]))
    engine._chunk = 10
    for save in (None, tmp_path / "many"):
        found = population(trial, many, engine=engine, save=save, **{**RUN, "steps": 1})
        np.testing.assert_allclose(found.scores, [0.1 * k for k in range(20)], rtol=1e-6)
    for changed, message in (({"batches": 3}, "batches must be a function"), ({"shared": 1.0}, "shared is given, and none of")):
        with pytest.raises(TypeError, match=message):
            population(trial, many, engine=engine_on(MadeUp([2])), save=tmp_path / "refused", **{**RUN, **changed})
    with pytest.raises(TypeError, match=r"shared holds arrays.*; name is a str"):
        population(
            TRIAL._replace(step=with_shared), drawn(), engine=engine_on(MadeUp([2])), save=tmp_path, shared={"name": "x"}, **RUN
        )


def test_an_actor_that_dies_after_it_asked_is_replaced_and_what_was_given_up_stays_so(engine_on):
    pruner = Thirds()

    def fate(handle, rows):
        if handle.number == 0 and pruner.asked:
            raise ActorDiedError("the process was killed")
        return True

    there = MadeUp([1], fate)
    with engine_on(there) as engine:
        assert pruned(engine, pruner) == BY_THIRDS
        assert engine.deaths == 1


def test_a_desk_that_dies_is_replaced(engine_on):
    there = MadeUp([1])
    there.desk_dies = True
    with engine_on(there) as engine:
        assert pruned(engine, Thirds()) == BY_THIRDS
        assert engine.deaths == 1
    there = MadeUp([1])
    opened = there.open

    def gone(desk):
        handle = opened(desk)
        handle.next = SimpleNamespace(remote=lambda: Ref(lambda: there.fail("the desk is gone")))
        # Who has asked there is told so.
        handle.ask = SimpleNamespace(remote=lambda step, scores: Ref(lambda: there.fail("the desk is gone")))
        there.open = opened
        return handle

    there.open = gone
    with engine_on(there) as engine:
        assert pruned(engine, Thirds()) == BY_THIRDS
    assert len(there.desks) == 2
    there = MadeUp([2])
    opened_last = there.open

    def never(desk):
        handle = opened_last(desk)
        handle.next = SimpleNamespace(remote=lambda: Ref(lambda: there.fail("no module named jaxopt_lab")))
        return handle

    there.open = never
    with pytest.raises(
        RuntimeError, match="3 desks in a row, where actors ask whom to prune, failed, the last since ActorDiedError: no"
    ):
        pruned(engine_on(there), Thirds())


def test_who_waits_for_an_answer_is_not_late(engine_on):
    class Slow(Thirds):
        def prune(self, study, trial):
            time.sleep(0.2)
            return super().prune(study, trial)

    # Compiled beforehand, which takes its time.
    assert pruned(engine_on(MadeUp([2])), Thirds(), trials=8) == BY_THIRDS[:8]
    # Two chunks of four, at two rungs, a third of them at one alone: 2.6 s, of which nobody waits for an answer longer than 1.6.
    with engine_on(MadeUp([2]), timeout=2.1) as engine:
        assert pruned(engine, Slow(), trials=8) == BY_THIRDS[:8]
        assert engine.deaths == 0


def test_an_error_of_the_pruner_is_raised_here(engine_on):
    def broken(step, scores):
        raise RuntimeError("the storage is gone")

    with engine_on(MadeUp([2])) as engine:
        with pytest.raises(RuntimeError, match="the storage is gone"):
            population(TRIAL, drawn(), engine=engine, prune=broken, **{**RUN, "rungs": (2,)})
        assert agree(swept(engine)) == ["COMPLETE"] * 11


def test_those_who_never_start_are_not_waited_for_in_vain(engine_on):
    def start(handle):
        raise ActorDiedError("no module named jaxopt_lab")

    with pytest.raises(RuntimeError, match="3 actors in a row did not start, the last since ActorDiedError: no module"):
        swept(engine_on(MadeUp([4], start=start)))
    with pytest.raises(
        RuntimeError, match=r"no actor started within 0.1 s; each needs {'CPU': 1.0}, and the nodes have {'CPU': 0.5"
    ):
        swept(engine_on(MadeUp([0.5], start=lambda handle: False), start=0.1))


def test_an_engine_does_one_thing_at_a_time(engine_on):
    with engine_on(MadeUp([1])) as engine, engine.hands(TRIAL, {**RUN}):
        with pytest.raises(RuntimeError, match="at work for another"):
            population(TRIAL, drawn(), engine=engine, **RUN)
        with pytest.raises(RuntimeError, match="open already"):
            engine.__enter__()


def test_what_an_engine_on_a_cluster_refuses(engine_on):
    there = MadeUp([1])
    with pytest.raises(RuntimeError, match=r"connected to the Ray cluster 10.0.0.1:6379, and the engine's address is 'local'"):
        swept(engine_on(there, address="local"))
    with pytest.raises(ValueError, match="devices are of this process"):
        population(TRIAL, drawn(), engine=engine_on(there), devices=jax.devices(), **RUN)
    with pytest.raises(ValueError, match="no configuration"):
        population(TRIAL, [], engine=engine_on(there), **RUN)
    with pytest.raises(ValueError, match="numbers must be one for each of 11"):
        population(TRIAL, drawn(), engine=engine_on(there), numbers=[1], **RUN)
    with pytest.raises(TypeError, match="typed key"):
        population(TRIAL, drawn(), engine=engine_on(there), **{**RUN, "key": 3})
    assert not there.made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least": 0}, "least must be at least 1"),
        ({"least": 3, "most": 2}, "most no less"),
        ({"chunk": 0}, "chunk and patience"),
        ({"patience": 0}, "chunk and patience"),
        ({"num_cpus": -1}, "must not be negative"),
        ({"timeout": 0.0}, "must be positive"),
        ({"num_gpus": 1.5}, "whole number"),
        ({"num_cpus": 0}, "takes nothing"),
    ],
)
def test_terms_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ray(**options)
    with pytest.raises(TypeError, match="how an actor trains"):
        ray(engine=Backwards())


def test_without_ray_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "jaxopt_lab\[ray\]"'):
        ray()


def test_ray_is_not_imported_before_it_is_asked_for():
    program = "import sys, jaxopt_lab.search.cluster.engine; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
