"""Populations that are killed and made again: to the same bits, from the newest rung, and refused where the call is another."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.checkpoint.packed import load_packed, save_packed
from jaxopt_lab.search import saved
from jaxopt_lab.search.engines import looped, scanned, vmapped
from jaxopt_lab.search.evolution import evolve, perturb
from jaxopt_lab.search.halving import hyperband, successive_halving
from jaxopt_lab.search.population import Crew, population
from jaxopt_lab.search.spaces import choice, log_uniform, uniform
from jaxopt_lab.search.sweep import sweep
from jaxopt_lab.search.trial import Result, Trial

KEY = jax.random.key(5)
STEPS = 9
X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


class KilledError(BaseException):
    """What stands for SIGKILL where a process of its own would take long: nothing but the files is left of a call either way."""


class Batches:
    """Batches, of which so many blocks are given before the call is killed; the first goes to find the shapes."""

    def __init__(self, blocks=10**9, kill=None, scale=1.0):
        self.left, self.asked, self.kill, self.scale = blocks, [], kill, scale

    def __call__(self, step):
        return {"x": np.float32(self.scale) * np.roll(X, step, axis=0)}

    def stack(self, at, count):
        if self.left == 0:
            if self.kill is not None:
                self.kill()
            raise KilledError
        self.left -= 1
        self.asked.append((at, count))
        return {"x": np.stack([self(at + k)["x"] for k in range(count)])}


def chain(config):
    return optax.chain(optax.add_decayed_weights(config["decay"]), optax.sgd(config["rate"], momentum=0.9))


def drawn(key, shape):
    """Numbers that depend on a key; threefry takes long to compile."""
    seed = (jax.random.key_data(key) % 97).sum().astype(jnp.float32)
    return jnp.sin(seed + jnp.arange(float(np.prod(shape)))).reshape(shape)


def init(key, config):
    """A state of many kinds: bfloat16 and float32, a typed key for dropout, counts, Optax's NamedTuples, and a flag."""
    params = {"in": drawn(key, (3, config["width"])), "out": jnp.ones(config["width"], jnp.bfloat16)}
    return {"params": params, "opt": chain(config).init(params), "drop": key, "even": jnp.asarray(True), "count": jnp.asarray(0)}


def step(state, batch, config):
    drop = jax.random.wrap_key_data(5 * jax.random.key_data(state["drop"]) + 1)
    kept = drawn(drop, (16, config["width"])) > -0.8

    def loss(params):
        hidden = jnp.tanh(batch["x"] @ params["in"]) * kept
        return jnp.mean((hidden @ params["out"].astype(jnp.float32) - batch["x"].sum(axis=1)) ** 2)

    value, grads = jax.value_and_grad(loss)(state["params"])
    updates, opt = chain(config).update(grads, state["opt"], state["params"])
    moved = {"params": optax.apply_updates(state["params"], updates), "opt": opt}
    # A metric with an axis of its own.
    metrics = {"loss": value, "kept": kept.mean(axis=0)[:2]}
    return {**moved, "drop": drop, "even": ~state["even"], "count": state["count"] + 1}, metrics


def evaluate(state):
    return jnp.mean((jnp.tanh(X @ state["params"]["in"]) @ state["params"]["out"].astype(jnp.float32) - X.sum(axis=1)) ** 2)


TRIAL = Trial(init, step, evaluate)
# Two groups of shapes, whose members are mixed; one diverges.
CONFIGS = [{"rate": rate, "decay": 1e-2, "width": 2 + k % 2} for k, rate in enumerate((1e-3, 0.3, 1e-2, 0.1, 0.03, 3e-3))]
CONFIGS.append({**CONFIGS[0], "rate": float("nan")})
# Those of one group.
FEW = CONFIGS[::2]
SPACE = {"rate": log_uniform(1e-4, 0.5), "decay": uniform(0.0, 0.1)}
# That a width is part of the program need not be found out each time.
RUN = {"key": KEY, "steps": STEPS, "static": ("width",)}


def worst(step, scores):
    """Prunes the two worst, and what diverged."""
    order = sorted(scores, key=lambda index: (np.isnan(scores[index]), scores[index]))
    return {index for index in scores if np.isnan(scores[index])} | set(order[-2:])


def trained(save, batches, configs=CONFIGS, **options):
    return population(TRIAL, configs, **{**RUN, "batches": batches, "rungs": (3, 6), "engine": vmapped(2), "save": save, **options})


@functools.cache
def room_for_two():
    """Two states of either group, with what a call needs."""
    crew = Crew(TRIAL, CONFIGS, batches=Batches(), engine=scanned(), **RUN)
    return max(2 * start.member_bytes + start.working_bytes(scanned()) for start in crew.starts)


def in_turns(save, batches):
    options = {"engine": scanned(), "memory": room_for_two()}
    found = trained(save, batches, keep=2, **options)
    turns = len(Crew(TRIAL, CONFIGS, batches=Batches(), **options, **RUN).turns())
    assert turns > 2
    assert save is None or len([*Path(save).glob("turn-*.packed")]) == turns
    return found


def halved(save, batches):
    return successive_halving(
        TRIAL, CONFIGS, **RUN, batches=batches, rungs=(3, 6), factor=2, engine=vmapped(2), keep=None, save=save
    )


def evolved(save, batches):
    return evolve(TRIAL, CONFIGS, SPACE, **RUN, batches=batches, every=3, part=0.4, engine=vmapped(2), keep=None, save=save)


def bracketed(save, batches):
    space = {**SPACE, "width": choice(2)}
    return hyperband(TRIAL, space, **RUN, batches=batches, engine=scanned(), save=save)


def pruned(save, batches):
    return trained(save, batches, engine=scanned(), prune=worst)


def over_devices(save, batches):
    options = {**RUN, "batches": batches, "engine": scanned(), "devices": jax.devices(), "save": save}
    return successive_halving(TRIAL, FEW * 4, **options, rungs=(3, 6), factor=3, keep=None)


# Each with how many blocks are given before it is killed: the first finds the shapes, and then there is one to each rung.
JOBS = {
    "several parts": (trained, 2),
    "in turns": (in_turns, 5),
    "halving": (halved, 2),
    "evolution": (evolved, 2),
    "hyperband": (bracketed, 4),
    "pruned": (pruned, 2),
    "over eight devices": (over_devices, 2),
}
KILLED = ("several parts", "halving", "evolution")


@functools.cache
def never_killed(name):
    return JOBS[name][0](None, Batches())


def whole(found):
    """All of a result, read out of its devices."""
    if hasattr(found, "_fields") and "states" in found._fields:
        found = found._replace(states=list(found.states))
    if hasattr(found, "brackets"):
        found = found._replace(brackets=tuple(map(whole, found.brackets)))
    return found._replace(result=whole(found.result)) if hasattr(found, "result") else found


def assert_same_bits(found, wanted):
    def same(a, b):
        assert type(a) is type(b)
        if not isinstance(a, (jax.Array, np.ndarray)):
            assert repr(a) == repr(b)
            return
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if isinstance(a, jax.Array):
            a, b = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    jax.tree.map(same, whole(found), whole(wanted))


def test_parts_keep_every_kind_of_leaf_of_groups_of_other_shapes(tmp_path):
    result, crew = trained(None, Batches()), Crew(TRIAL, CONFIGS, batches=Batches(), engine=vmapped(2), **RUN)
    directory = saved.opened(tmp_path, {"steps": ["9"]}, 0, lambda: ([], []))
    parts = {}
    for members in ((0, 3, 6), (1, 2), (5, 4)):
        kept, rows = [None if index == 2 else result.states[index] for index in members], list(members)
        metrics = {name: column[rows] for name, column in result.metrics.items()}
        part = Result(result.scores[rows], kept, (), result.curves[rows], result.evaluated, metrics, None, ("2 vmapped(2)",))
        saved.write_part(directory, members, part)
        parts[members] = part
    read = saved.read_parts(directory, crew.starts)
    assert {tuple(members) for members, _ in read} == set(parts)
    for members, found in read:
        wanted = parts[tuple(members)]
        on_device = found._replace(states=jax.tree.map(jnp.asarray, found.states))
        assert_same_bits(on_device, wanted._replace(states=[*wanted.states]))
        # They go to whatever device they are used on.
        arrays = [leaf for leaf in jax.tree.leaves(found.states) if isinstance(leaf, jax.Array)]
        assert all(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in arrays)


def run_until_killed(directory):
    """Several calls side by side, until each is on its way to its last rung; then SIGKILL ends them all."""
    there = threading.Barrier(len(KILLED), lambda: os.kill(os.getpid(), signal.SIGKILL))
    for name in KILLED:
        threading.Thread(target=JOBS[name][0], args=(f"{directory}/{name}", Batches(3, there.wait))).start()


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    """A process of its own, which runs while other tests do, and the directory that it leaves."""
    code = (
        "import sys, jax; jax.config.update('jax_num_cpu_devices', 8); sys.path.insert(0, sys.argv[1])\n"
        "from test_search_saved import run_until_killed; run_until_killed(sys.argv[2])\n"
    )
    directory = tmp_path_factory.mktemp("killed")
    started = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(directory)])
    yield started, directory
    started.kill()
    started.wait()


@pytest.mark.parametrize("name", JOBS)
def test_killed_on_the_way_to_every_rung_it_comes_to_the_same_bits(name, tmp_path):
    job, blocks = JOBS[name]
    kills = 0
    while True:
        batches = Batches(blocks)
        try:
            found = job(tmp_path, batches)
            break
        except KilledError:
            kills += 1
            assert kills < 20
    assert kills >= 2
    assert_same_bits(found, never_killed(name))


def test_killed_before_the_first_rung_it_begins_anew(tmp_path):
    with pytest.raises(KilledError):
        trained(tmp_path, Batches(1), FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["call.packed"]
    batches = Batches()
    assert_same_bits(trained(tmp_path, batches, FEW), trained(None, Batches(), FEW))
    assert batches.asked == [(0, STEPS), (0, 3), (3, 3), (6, 3)]


def test_a_finished_call_trains_and_evaluates_nothing(tmp_path):
    ran = []

    def noted(what):
        jax.debug.callback(lambda: ran.append(what))

    def go(state, batch, config):
        noted("step")
        return state - config["rate"] * state, {}

    def score(state):
        noted("evaluate")
        return state

    trial = Trial(lambda key, config: (noted("init"), jnp.float32(1))[1], go, score)
    options = {"key": KEY, "steps": 4, "rungs": (2,), "engine": scanned(), "save": tmp_path}
    configs = [{"rate": 0.1}, {"rate": 0.2}]
    first = population(trial, configs, batches=Batches(), **options)
    jax.effects_barrier()
    assert [ran.count(what) for what in ("init", "step", "evaluate")] == [2, 8, 4]
    ran.clear()
    batches = Batches()
    assert_same_bits(population(trial, configs, batches=batches, **options), first)
    jax.effects_barrier()
    assert (ran, batches.asked) == ([], [(0, 4)])
    # How many states are wanted is no part of what is kept.
    assert [state is None for state in population(trial, configs, batches=Batches(), keep=1, **options).states] == [True, False]


def test_no_pruner_is_asked_twice(tmp_path):
    asked = []

    def prune(step, scores):
        asked.append((step, sorted(scores)))
        return worst(step, scores)

    for blocks in (3, 10):
        try:
            trained(tmp_path, Batches(blocks), FEW, engine=scanned(), prune=prune)
        except KilledError:
            continue
    assert [step for step, _ in asked] == [3, 6]
    assert len(asked[1][1]) < len(asked[0][1]) == len(FEW)

    def everyone(step, scores):
        asked.append(step)
        return list(scores)

    asked.clear()
    for _ in range(2):
        found = trained(tmp_path / "all", Batches(), FEW, engine=scanned(), prune=everyone)
        assert (found.evaluated, found.best) == ((3,), None)
    assert asked == [3]


def test_halving_ends_again_where_everything_diverged(tmp_path):
    configs, kept = [{**CONFIGS[0], "rate": float("nan")}] * 3, []
    for _ in range(2):
        batches = Batches()
        result = successive_halving(TRIAL, configs, **RUN, batches=batches, rungs=(3,), engine=scanned(), save=tmp_path)
        assert (result.best, result.evaluated) == (None, (3,))
        kept.append(batches.asked)
    assert kept == [[(0, STEPS), (0, 3)], [(0, STEPS)]]


def test_an_engine_that_was_chosen_is_taken_again(tmp_path, monkeypatch):
    engines = {2: scanned(), 3: vmapped(2)}
    monkeypatch.setattr(sys.modules[Crew.__module__], "chosen", lambda start, *_: engines[start.state["params"]["out"].shape[0]])
    wanted = trained(None, Batches(), engine=None)
    assert sorted(wanted.engines) == ["3 vmapped(2)", "4 scanned"]
    with pytest.raises(KilledError):
        trained(tmp_path, Batches(2), engine=None)
    monkeypatch.setattr(sys.modules[Crew.__module__], "chosen", lambda *_: pytest.fail("measured again"))
    assert_same_bits(trained(tmp_path, Batches(), engine=None), wanted)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A directory of `trained` that was killed after two rungs, with a file half written."""
    path = tmp_path_factory.mktemp("begun")
    with pytest.raises(KilledError):
        trained(path, Batches(3), FEW)
    assert load_packed(path / "turn-0.packed")["at"] == 6
    (path / ".turn-0.packed.0123456789abcdef").write_bytes(b"half")
    return path


@pytest.fixture
def own(begun, tmp_path):
    """A copy of it."""
    return shutil.copytree(begun, tmp_path / "own")


def _changed(index, **parts):
    return [{**config, **parts} if k == index else config for k, config in enumerate(FEW)]


def _with(**options):
    def call(save):
        given = {**RUN, "batches": Batches(), "rungs": (3, 6), "engine": vmapped(2), "save": save, **options}
        return population(given.pop("trial", TRIAL), given.pop("configs", FEW), **given)

    return call


def wider(key, config):
    return {**init(key, config), "more": jnp.zeros(4)}


OTHERS = {
    "a number": (_with(configs=_changed(1, rate=0.02)), r"configs\[1\] was .*\['rate'\] 0.01, .* and is .*\['rate'\] 0.02"),
    "one fewer": (_with(configs=FEW[:-1]), "configs had 4 entries and has 3"),
    "key": (_with(key=jax.random.key(6)), r"key was key<fry> \[0, 5\] and is key<fry> \[0, 6\]"),
    "steps": (_with(steps=12), "steps was 9 and is 12"),
    "rungs": (_with(rungs=(6,)), r"rungs was \[3, 6\] and is \[6\]"),
    "numbers": (_with(numbers=range(1, 5)), r"numbers\[0\] was 0 and is 1"),
    "engine": (_with(engine=looped()), r"engine was Engine\(width=2, compiled=True\) and is Engine\(width=1, compiled=False\)"),
    "memory": (_with(memory=1 << 20), "memory was None and is 1048576"),
    "devices": (_with(devices=jax.devices()[:2]), "devices was 1 and is 2"),
    "what is traced": (_with(static=("width", "decay")), r"groups was .* all but decay, rate and is .* all but rate"),
    "states": (
        _with(trial=TRIAL._replace(init=wider, step=lambda s, b, c: ({**step(s, b, c)[0], "more": s["more"]}, {}))),
        r"states was .* and is .*\['more'\] float32\[4\]",
    ),
    "data": (_with(batches=Batches(scale=2.0)), r"batches\(0\) was \['x'\] float32\[16, 3\] of SHA-256 \w+ and is"),
    "pruning": (_with(prune=worst), "prune was False and is True"),
    "the function": (lambda save: halved(save, Batches()), "function was 'population' and is 'successive_halving'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_call_is_refused_by_what_differs(name, own):
    before = (own / "turn-0.packed").read_bytes()
    call, message = OTHERS[name]
    with pytest.raises(ValueError, match=rf"own was begun by another call: {message}.*a directory of its own"):
        call(own)
    assert (own / "turn-0.packed").read_bytes() == before


def test_what_decides_in_halving_and_evolution_is_compared(tmp_path):
    options = {**RUN, "batches": Batches(), "engine": scanned(), "save": tmp_path / "halving"}
    successive_halving(TRIAL, CONFIGS[:1], rungs=(3,), **options)
    for other, message in (
        ({"factor": 2.0}, "factor was 3.0 and is 2.0"),
        ({"maximize": True}, "maximize was False and is True"),
    ):
        with pytest.raises(ValueError, match=message):
            successive_halving(TRIAL, CONFIGS[:1], rungs=(3,), **options, **other)
    options = {**options, "every": 3, "save": tmp_path / "evolution"}
    evolve(TRIAL, CONFIGS[:1], SPACE, explore=perturb(), **options)
    # The default is the same again.
    evolve(TRIAL, CONFIGS[:1], SPACE, **options)
    with pytest.raises(ValueError, match=r"explore was Perturb\(factors=\(0.8, 1.2\).* and is Perturb\(factors=\(0.5, 2.0\)"):
        evolve(TRIAL, CONFIGS[:1], SPACE, explore=perturb(0.5, 2.0), **options)
    with pytest.raises(ValueError, match=r"space was .*'decay'.* and is \{'rate'"):
        evolve(TRIAL, CONFIGS[:1], {"rate": SPACE["rate"]}, **options)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _without_working(path):
    tree = load_packed(path)
    save_packed(path, {name: tree[name] for name in tree if name != "working"}, overwrite=True)


def _of_the_first_format(path):
    _without_working(path)
    tree = load_packed(path)
    save_packed(path, {**tree, "call": {**tree["call"], "format": ["1"]}}, overwrite=True)


DAMAGES = {
    "a bit": ("turn-0.packed", _flip, "turn-0.packed is damaged.*SHA-256.*delete .*turn-0.packed, and its members begin anew"),
    "an end": (
        "turn-0.packed",
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        "is truncated or damaged; delete .*turn-0.packed",
    ),
    "another kind": ("turn-0.packed", lambda path: path.write_text("notes"), "no file that save_packed wrote; delete"),
    "another tree": (
        "turn-0.packed",
        lambda path: save_packed(path, {"kernel": X}, overwrite=True),
        "turn-0.packed was not written by this call, though .* was begun by it; delete",
    ),
    "the call": ("call.packed", _flip, "call.packed is damaged.*delete .*own to begin anew"),
    "another call's": (
        "call.packed",
        lambda path: save_packed(path, {"kernel": X}, overwrite=True),
        "call.packed is no file of a population; give save a directory of its own",
    ),
    "an entry less": ("call.packed", _without_working, "call.packed is no file of a population; give save a directory of its own"),
    "an older format": ("call.packed", _of_the_first_format, "was begun by another call: format was 1 and is 2"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_what_to_do(name, own):
    file, damage, message = DAMAGES[name]
    damage(own / file)
    with pytest.raises(ValueError, match=message):
        trained(own, Batches(), FEW)


def test_the_remedy_helps_and_what_was_half_written_is_cleared_away(own):
    (own / "turn-0.packed").unlink()
    assert_same_bits(trained(own, Batches(), FEW), trained(None, Batches(), FEW))
    assert sorted(path.name for path in own.iterdir()) == ["call.packed", "turn-0.packed"]


def test_a_file_is_no_directory_and_a_sweep_keeps_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="save must be a directory"):
        trained(tmp_path / "file", Batches())
    optuna = pytest.importorskip("optuna")
    with pytest.raises(ValueError, match=r"goes on from its study's storage.*leave save out"):
        sweep(optuna.create_study(), SPACE, TRIAL, trials=1, together=1, batches=Batches(), save=tmp_path, **RUN)


@pytest.mark.parametrize("name", KILLED)
def test_a_process_that_was_killed_is_gone_on_with_to_the_same_bits(name, process):
    started, directory = process
    assert started.wait(timeout=120) == -signal.SIGKILL
    assert load_packed(directory / name / "turn-0.packed")["at"] == 6
    batches = Batches()
    assert_same_bits(JOBS[name][0](os.fspath(directory / name), batches), never_killed(name))
    assert batches.asked == [(0, STEPS), (6, 3)]
