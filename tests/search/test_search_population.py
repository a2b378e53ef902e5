"""Populations: every engine against a plain loop, groups of shapes, memory, halving, population based training, bad input."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import schedules
from jaxopt_lab.search import pace
from jaxopt_lab.search.engines import looped, scanned, vmapped
from jaxopt_lab.search.evolution import evolve, perturb
from jaxopt_lab.search.grouping import group
from jaxopt_lab.search.halving import halving_rungs, hyperband, successive_halving
from jaxopt_lab.search.population import Crew, Members, population
from jaxopt_lab.search.record import Record
from jaxopt_lab.search.spaces import choice, integer, log_uniform, uniform
from jaxopt_lab.search.trial import Trial

# The package has a function of that name.
POPULATION = importlib.import_module("jaxopt_lab.search.population")

KEY = jax.random.key(7)
STEPS = 12
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 3)).astype(np.float32)
Y = np.sin(X.sum(axis=1)).astype(np.float32)
TRACES = []


def batches(step):
    rows = (np.arange(8) + 5 * step) % 64
    return {"x": X[rows], "y": Y[rows]}


def net(params, x):
    return (jnp.tanh(x @ params["in"]) @ params["out"])[:, 0]


def chain(config):
    return optax.chain(optax.clip_by_global_norm(config["clip"]), optax.adamw(config["rate"], weight_decay=config["decay"]))


def init(key, config):
    width = config["width"]
    first, second, drop = jax.random.split(key, 3)
    params = {"in": 0.5 * jax.random.normal(first, (3, width)), "out": 0.5 * jax.random.normal(second, (width, 1))}
    # A typed key, and a count that is weakly typed at first.
    return {"params": params, "opt": chain(config).init(params), "key": drop, "count": jnp.asarray(0)}


def step(state, batch, config):
    TRACES.append(1)
    noise = 1e-3 * jax.random.normal(jax.random.fold_in(state["key"], state["count"]), batch["y"].shape)

    def loss(params):
        return jnp.mean((net(params, batch["x"]) - batch["y"] - noise) ** 2)

    value, grads = jax.value_and_grad(loss)(state["params"])
    updates, opt = chain(config).update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt": opt, "key": state["key"], "count": state["count"] + 1}, {"loss": value}


def evaluate(state):
    return jnp.mean((net(state["params"], X) - Y) ** 2)


TRIAL = Trial(init, step, evaluate)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
CONFIGS = [{"rate": rate, "decay": 1e-2 * k, "clip": 1.0, "width": 4} for k, rate in enumerate(RATES)]


@functools.cache
def plain(index, steps=STEPS, rungs=(5,), trial=TRIAL):
    """A configuration by a plain loop: its state, and its scores at the rungs and the end."""
    config = CONFIGS[index]
    state = init(jax.random.fold_in(KEY, index), config)
    take, scores = jax.jit(functools.partial(step, config=config)), []
    for t in range(steps):
        state, _ = take(state, batches(t))
        if t + 1 in (*rungs, steps):
            scores.append(float(evaluate(state)))
    return state, scores


ENGINES = {
    "looped": (looped(), 1),
    "scanned": (scanned(), 1),
    "vmapped, all": (vmapped(), 1),
    "vmapped, in turns": (vmapped(2), 1),
    "vmapped in a Python loop": (vmapped(3, compiled=False), 1),
    "measured": (None, 1),
    "scanned on two devices": (scanned(), 2),
    "vmapped on two devices": (vmapped(2), 2),
}


# Those of several devices differ from those of one alike.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "scanned on two devices" else []) for name in ENGINES]
)
def test_every_engine_trains_as_a_plain_loop(name):
    engine, devices = ENGINES[name]
    result = population(
        TRIAL, CONFIGS, key=KEY, batches=batches, steps=STEPS, rungs=(5,), engine=engine, devices=jax.devices()[:devices]
    )
    assert result.evaluated == (5, STEPS)
    for index in range(len(CONFIGS)):
        state, scores = plain(index)
        np.testing.assert_allclose(result.curves[index], scores, rtol=1e-4)
        given = result.states[index]
        assert jax.tree.structure(given) == jax.tree.structure(state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), given["params"], state["params"])
        assert jax.random.key_data(given["key"]).tolist() == jax.random.key_data(state["key"]).tolist()
    assert result.best == int(np.argmin(result.scores))
    assert result.metrics["loss"].shape == (5, 2)


def test_a_hundred_rates_are_traced_as_often_as_one():
    def traces(count):
        TRACES.clear()
        trial = Trial(init, functools.partial(step), evaluate)  # of its own, so that nothing is compiled yet
        configs = [{**CONFIGS[0], "rate": 1e-3 * (k + 1)} for k in range(count)]
        population(trial, configs, key=KEY, batches=batches, steps=3, engine=vmapped(count))
        return len(TRACES)

    assert traces(100) == traces(1)


def test_the_same_trial_compiles_once():
    options = {"key": KEY, "batches": batches, "steps": 3, "engine": scanned(), "static": ("width",)}
    population(TRIAL, CONFIGS[:2], **options)
    TRACES.clear()
    population(TRIAL, CONFIGS[2:], **options)
    assert TRACES == []


def test_what_needs_its_value_makes_a_group_and_the_rest_is_data():
    def build(key, config):
        x = jnp.zeros(config["width"]) + config["rate"] * config["times"]
        return x * 2 if config["double"] and config["kind"] == "a" and config["none"] is None else x

    trial = Trial(build, lambda state, batch, config: (state, {}), jnp.sum)
    base = {"rate": 0.5, "width": 2, "times": 3, "double": True, "kind": "a", "none": None}
    configs = [base, {**base, "times": 4}, {**base, "width": 3}, {**base, "double": False}, {**base, "kind": "b", "rate": 1}]
    found = group(trial, configs, KEY, {})
    assert [each.indices.tolist() for each in found] == [[0, 1], [2], [3], [4]]
    assert [column.tolist() for column in found[0].traced] == [[0.5, 0.5], [3, 4]]
    result = population(trial, configs, key=KEY, batches=lambda step: {}, steps=0, engine=scanned())
    np.testing.assert_allclose(result.scores, [6.0, 8.0, 9.0, 3.0, 6.0])
    assert len(group(trial, configs[:2], KEY, {}, static=("times",))) == 2


def test_conditional_configurations_of_different_structure_run_side_by_side():
    def tx(config):
        return optax.sgd(config["rate"], config["momentum"]) if "momentum" in config else optax.adam(config["rate"])

    def begin(key, config):
        return jnp.float32(1), tx(config).init(jnp.float32(1))

    def go(state, batch, config):
        updates, opt = tx(config).update(state[0], state[1])
        return (state[0] + updates, opt), {}

    configs = [{"rate": 0.1}, {"rate": 0.1, "momentum": 0.0}, {"rate": 0.2}, {"rate": 0.1, "momentum": 0.9}]
    result = population(Trial(begin, go, lambda s: s[0]), configs, key=KEY, batches=lambda t: {}, steps=2, engine=vmapped())
    for config, score in zip(configs, result.scores, strict=True):
        state = begin(KEY, config)
        for _ in range(2):
            state, _ = go(state, {}, config)
        np.testing.assert_allclose(score, float(state[0]), rtol=1e-5)
    assert sorted(result.engines) == ["2 vmapped(2)", "2 vmapped(2)"]


def test_a_python_number_stays_weakly_typed():
    def go(state, batch, config):
        return state * config["rate"], {}

    trial = Trial(lambda key, config: jnp.ones(2, jnp.bfloat16), go, lambda state: state.sum())
    for engine in (looped(), vmapped()):
        result = population(trial, [{"rate": 0.5}, {"rate": 2.0}], key=KEY, batches=lambda t: {}, steps=2, engine=engine)
        assert result.states[0].dtype == jnp.bfloat16
        np.testing.assert_allclose(result.scores, [0.5, 8.0])


@pytest.mark.parametrize("engine", [looped(), scanned(), vmapped()], ids=str)
def test_a_diverging_configuration_stays_its_own(engine):
    configs = [CONFIGS[1], {**CONFIGS[0], "rate": float("nan")}, CONFIGS[3]]
    result = population(TRIAL, configs, key=KEY, batches=batches, steps=4, engine=engine)
    alone = population(TRIAL, configs[:1], key=KEY, batches=batches, steps=4, engine=engine)
    assert np.isnan(result.scores).tolist() == [False, True, False]
    assert result.best in (0, 2)
    np.testing.assert_allclose(result.scores[0], alone.scores[0], rtol=1e-5)


def test_nothing_finite_has_no_best():
    configs = [{**CONFIGS[0], "rate": float("nan")}]
    assert population(TRIAL, configs, key=KEY, batches=batches, steps=2, engine=scanned()).best is None


def test_batches_may_change_their_size():
    def sizes(step):
        return jax.tree.map(lambda x: x[: 8 if step < 3 else 4], batches(step))

    each = [population(TRIAL, CONFIGS[:2], key=KEY, batches=sizes, steps=7, engine=e).scores for e in (looped(), vmapped())]
    np.testing.assert_allclose(*each, rtol=1e-4)


def test_a_program_is_of_the_settings_that_it_was_compiled_under():
    trial = Trial(lambda key, config: jax.random.normal(key, (8,)), lambda state, batch, config: (state, {}), jnp.sum)
    found = []
    for partitionable in (True, False, True):
        with jax.threefry_partitionable(partitionable):
            state = population(trial, [{}], key=KEY, batches=batches, steps=1, engine=scanned()).states[0]
            np.testing.assert_array_equal(state, jax.jit(trial.init)(jax.random.fold_in(KEY, 0), {}))
            found.append(np.asarray(state))
    np.testing.assert_array_equal(found[0], found[2])
    assert not np.array_equal(found[0], found[1])


def room_of(engine, members, whole=True, trial=TRIAL):
    """What so many members take on the device, with what the dearest of the engine's calls needs besides."""
    start = Crew(trial, CONFIGS[:4], KEY, batches, STEPS, engine=engine).starts[0]
    return members * start.member_bytes + start.working_bytes(engine, whole=whole)


def test_memory_bounds_what_is_there_at_once():
    whole = population(TRIAL, CONFIGS, key=KEY, batches=batches, steps=STEPS, engine=scanned(), keep=2)
    room = room_of(scanned(), 2)
    crews = [Crew(TRIAL, CONFIGS, KEY, batches, STEPS, engine=scanned(), memory=memory) for memory in (room, room - 1)]
    assert [[len(turn) for turn in crew.turns()] for crew in crews] == [[2, 2, 1], [1] * 5]
    some = population(TRIAL, CONFIGS, key=KEY, batches=batches, steps=STEPS, engine=scanned(), keep=2, memory=room)
    np.testing.assert_array_equal(some.scores, whole.scores)
    kept = [index for index, state in enumerate(some.states) if state is not None]
    assert kept == sorted(np.argsort(whole.scores)[:2].tolist())
    jax.tree.map(np.testing.assert_array_equal, some.states[some.best]["params"], whole.states[whole.best]["params"])


def test_the_width_is_what_fits():
    for width in (1, 2, 4):
        crew = Crew(TRIAL, CONFIGS[:4], KEY, batches, STEPS, engine=vmapped(), memory=room_of(vmapped(width), width))
        assert crew.engines[0].width == width
        assert len(crew.turns()) == 4 // width
    with pytest.raises(ValueError, match="a single member takes"):
        Crew(TRIAL, CONFIGS, KEY, batches, STEPS, engine=vmapped(), memory=room_of(vmapped(1), 1) - 1)


@pytest.mark.parametrize("engine", [vmapped(), vmapped(compiled=False), None], ids=["vmapped", "in a Python loop", "measured"])
def test_an_evaluation_that_needs_more_than_a_step_narrows_the_width(engine, monkeypatch):
    monkeypatch.setattr(pace, "worth_compiling", lambda arrays: float("inf"))
    monkeypatch.setattr(pace, "_timed", lambda start, engine: (1.0 / engine.width, 0.0))  # Of those measured, the widest.
    size = 256

    def costly(state):
        square = jnp.outer(jnp.arange(size), jnp.arange(size)) * state["params"]["out"].sum()
        return jnp.sort(square @ square, axis=0).sum()

    trial, compiled = TRIAL._replace(evaluate=costly), engine is None or engine.compiled
    memory = room_of(vmapped(4, compiled=compiled), 4) + 3 * 4 * size**2
    widths = [
        Crew(each, CONFIGS[:4], KEY, batches, STEPS, engine=engine, memory=memory).engines[0].width for each in (TRIAL, trial)
    ]
    # The product alone, of each of four, is more than there is room for.
    assert widths[0] == 4 > widths[1]
    start = Crew(trial, CONFIGS[:4], KEY, batches, STEPS, engine=vmapped(4)).starts[0]
    assert start.working_bytes(vmapped(4), whole=False) <= memory - 4 * start.member_bytes < start.working_bytes(vmapped(4))


def test_what_a_beginning_or_an_evaluation_needs_makes_turns_shorter():
    def sorted_sum(scale):
        return jnp.sort(jnp.arange(1 << 18) * scale).sum()

    def costly(key, config):
        state = TRIAL.init(key, config)
        params = {**state["params"], "out": state["params"]["out"] + 1e-12 * sorted_sum(config["rate"])}
        return {**state, "params": params}

    trials = [TRIAL, TRIAL._replace(init=costly), TRIAL._replace(evaluate=lambda state: sorted_sum(state["params"]["out"].sum()))]
    memory = room_of(scanned(), 4) + (1 << 19)
    crews = [Crew(each, CONFIGS[:4], KEY, batches, STEPS, engine=scanned(), memory=memory) for each in trials]
    assert [len(crew.turns()) for crew in crews] == [1, 4, 4]


def test_the_states_of_a_turn_are_gone_before_those_of_the_next_are_there():
    seen = []

    def watching(step):
        seen.append(sum(each.shape == (1, 1789) for each in jax.live_arrays()))
        return {}

    trial = Trial(lambda key, c: jnp.full(1789, c["rate"]), lambda state, batch, c: (state + 1, {}), jnp.sum)
    configs = [{"rate": 0.1 * k} for k in range(6)]
    start = Crew(trial, configs, KEY, lambda step: {}, 2, engine=scanned()).starts[0]
    room = 2 * start.member_bytes + start.working_bytes(scanned())
    options = {"key": KEY, "batches": watching, "steps": 2, "engine": scanned(), "keep": 0}
    found = population(trial, configs, **options, memory=room)
    np.testing.assert_allclose(found.scores, [1789 * (0.1 * k + 2) for k in range(6)], rtol=1e-5)
    # Once to find the shapes, and then two steps of each turn.
    assert max(seen) == 2
    assert len(seen) >= 7


def test_what_is_gathered_where_some_go_on_narrows_the_width_and_makes_turns_shorter():
    trial = Trial(lambda key, c: jnp.full(1789, c["rate"]), lambda state, batch, c: (state + 1, {}), jnp.sum)
    configs = [{"rate": 0.1 * k} for k in range(4)]
    stays = Crew(trial, configs, KEY, lambda step: {}, 2, engine=vmapped(4), moves=False).starts[0]
    # For eight of them, where nobody is selected.
    room = 8 * stays.member_bytes + max(stays.working_bytes(each) for each in (vmapped(4), scanned()))
    for moves, width, turns in ((False, 4, 1), (True, 2, 2)):
        wide, single = (
            Crew(trial, configs, KEY, lambda step: {}, 2, engine=each, memory=room, moves=moves) for each in (vmapped(), scanned())
        )
        assert wide.starts[0].moved_bytes == (2 * 4 * 1789 if moves else 0)
        assert wide.engines[0].width == width
        assert [len(crew.turns()) for crew in (wide, single)] == [turns, turns]


def test_who_goes_on_is_gathered_in_portions_and_what_it_was_gathered_from_goes(monkeypatch):
    size, members = 1 << 12, 8
    trial = Trial(
        lambda key, c: {f"{k}": jnp.full(size, c["rate"] + k) for k in range(8)},
        lambda state, batch, c: (jax.tree.map(lambda x: x + 1, state), {}),
        lambda state: state["0"][0],
    )
    configs = [{"rate": 0.5 * k} for k in range(members)]
    crew = Crew(trial, configs, KEY, lambda step: {}, 2, engine=vmapped(4))
    assert crew.starts[0].moved_bytes == 2 * 2 * 4 * size
    own = Members(crew, Record(members), crew.everyone())
    own.advance(1)
    before, live, taken = sum(each.nbytes for each in jax.live_arrays()), [], POPULATION._taken

    def watched(parts, rows):
        found = jax.block_until_ready(taken(parts, rows))
        live.append(sum(each.nbytes for each in jax.live_arrays()) - before)
        return found

    monkeypatch.setattr(POPULATION, "_taken", watched)
    # All move on, from another's state each: never more than a portion is there twice.
    own.select({index: (index + 3) % members for index in range(members)})
    assert len(live) == 4 * 2
    assert max(live) <= members * crew.starts[0].moved_bytes // 2 + 4096
    own.hand_over(None, away=False)
    states = own._record.states
    for index in range(members):
        for k in range(8):
            np.testing.assert_array_equal(states[index]()[f"{k}"], 0.5 * ((index + 3) % members) + k + 1)


def test_a_float_that_cannot_be_traced_is_named():
    def tx(config):
        return optax.sgd(optax.warmup_cosine_decay_schedule(0.0, config["peak"], 2, 10))

    def begin(key, config):
        return jnp.float32(1), tx(config).init(jnp.float32(1))

    def go(state, batch, config):
        updates, opt = tx(config).update(state[0], state[1])
        return (state[0] + updates, opt), {}

    trial = Trial(begin, go, lambda s: s[0])
    few = [{"peak": 0.1}, {"peak": 0.2}, {"peak": 0.1}]
    result = population(trial, few, key=KEY, batches=lambda t: {}, steps=3, engine=scanned())
    assert len(result.engines) == 2
    assert result.scores[0] == result.scores[2]
    with pytest.raises(ValueError, match=r"peak has 17 values and cannot be traced \(TracerBoolConversionError.*lab.schedules"):
        population(trial, [{"peak": 0.01 * k + 0.01} for k in range(17)], key=KEY, batches=lambda t: {}, steps=3)


def test_our_schedules_take_traced_arguments():
    def tx(c):
        warm = schedules.linear(0.0, c["peak"], steps=c["warm"])
        return optax.sgd(schedules.join([warm, schedules.cosine(c["peak"], steps=8)], [c["warm"]]))

    def begin(key, config):
        return jnp.float32(1), tx(config).init(jnp.float32(1))

    def go(state, batch, config):
        updates, opt = tx(config).update(state[0], state[1])
        return (state[0] + updates, opt), {}

    configs = [{"peak": 0.1, "warm": 2}, {"peak": 0.2, "warm": 3}]
    result = population(Trial(begin, go, lambda s: s[0]), configs, key=KEY, batches=lambda t: {}, steps=6, engine=vmapped())
    assert len(result.engines) == 1
    for config, score in zip(configs, result.scores, strict=True):
        rate = optax.warmup_cosine_decay_schedule(0.0, config["peak"], config["warm"], 8 + config["warm"])
        np.testing.assert_allclose(score, np.prod([1 - float(rate(t)) for t in range(6)]), rtol=1e-5)


def _changed(**parts):
    return TRIAL._replace(**parts)


BAD = {
    "no trial": (lambda: (init, CONFIGS), TypeError, "trial must be a search.Trial"),
    "a part that is no function": (lambda: (_changed(step=3), CONFIGS), TypeError, "trial.step must be a function; got int"),
    "no configuration": (lambda: (TRIAL, []), ValueError, "no configuration"),
    "an odd leaf": (lambda: (TRIAL, [{**CONFIGS[0], "rate": {1}}]), TypeError, r"configs\[0\]: rate is a set"),
    "a score of a string": (lambda: (_changed(evaluate=lambda s: "good"), CONFIGS), TypeError, "evaluate returned 'good'"),
    "a score of two": (lambda: (_changed(evaluate=lambda s: jnp.ones(2)), CONFIGS), ValueError, r"shape \(2,\)"),
    "a bare state": (lambda: (_changed(step=lambda s, b, c: s), CONFIGS), TypeError, r"\(state, metrics\)"),
    "another shape": (
        lambda: (_changed(step=lambda s, b, c: ({**s, "count": jnp.zeros(2)}, {})), CONFIGS),
        ValueError,
        r"step makes count of the state float32\[2\]; init made it int32\[\]",
    ),
    "another structure": (
        lambda: (_changed(step=lambda s, b, c: ({**s, "more": 1.0}, {})), CONFIGS),
        ValueError,
        "structure of the state at more",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    make, error, message = BAD[name]
    trial, configs = make()
    with pytest.raises(error, match=message):
        population(trial, configs, key=KEY, batches=batches, steps=2)


def test_other_bad_input_is_named():
    run = functools.partial(population, TRIAL, CONFIGS, batches=batches, steps=4)
    with pytest.raises(TypeError, match="typed key"):
        run(key=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="rungs must rise and lie between 0 and 4"):
        run(key=KEY, rungs=(4,))
    with pytest.raises(ValueError, match="static names depth; the configurations have clip, decay, rate, width"):
        run(key=KEY, static=("depth",))
    with pytest.raises(TypeError, match="batches must be a function"):
        population(TRIAL, CONFIGS, key=KEY, batches=[batches(0)], steps=2)
    with pytest.raises(ValueError, match="width must be at least 1"):
        vmapped(0)


def test_halving_goes_on_with_the_best_from_where_they_are():
    configs = [*CONFIGS, {**CONFIGS[2], "width": 5}, {**CONFIGS[4], "rate": float("nan")}]
    options = {"key": KEY, "batches": batches, "steps": STEPS}
    whole = population(TRIAL, configs, **options, rungs=(3, 6), engine=vmapped())
    for engine in (vmapped(), scanned()):
        halved = successive_halving(TRIAL, configs, **options, rungs=(3, 6), factor=2, engine=engine, keep=None)
        alive = np.arange(7)
        for column, mark in enumerate((3, 6, STEPS)):
            assert np.flatnonzero(~np.isnan(halved.curves[:, column])).tolist() == [i for i in sorted(alive) if i != 6]
            np.testing.assert_allclose(halved.curves[alive, column], whole.curves[alive, column], rtol=1e-4)
            order = [i for i in np.argsort(whole.curves[:, column], kind="stable") if i in alive and i != 6]
            alive = np.array(order[: -(-len(alive) // 2)]) if mark != STEPS else alive
        assert halved.best == order[0]
        assert halved.states[halved.best] is not None
        np.testing.assert_allclose(halved.scores[halved.best], whole.scores[halved.best], rtol=1e-4)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
            halved.states[halved.best]["params"],
            whole.states[halved.best]["params"],
        )


def test_halving_ends_where_everything_diverged():
    configs = [{**CONFIGS[0], "rate": float("nan")}] * 3
    result = successive_halving(TRIAL, configs, key=KEY, batches=batches, steps=9, engine=scanned())
    assert result.best is None
    assert result.evaluated == (3,)


def test_as_many_survive_as_are_said(tmp_path):
    options = {"key": KEY, "batches": batches, "steps": STEPS, "engine": scanned()}
    whole = population(TRIAL, CONFIGS, **options, rungs=(2, 4, 6))
    counts = (len(CONFIGS) - 1, 3, 3)
    halved = successive_halving(TRIAL, CONFIGS, **options, rungs=(2, 4, 6), survivors=counts, save=tmp_path)
    alive = np.arange(len(CONFIGS))
    for column, count in enumerate((*counts, 1)):
        assert np.flatnonzero(~np.isnan(halved.curves[:, column])).tolist() == sorted(alive)
        alive = sorted(alive, key=lambda i: whole.curves[i, column])[:count]
    assert [halved.best] == alive
    with pytest.raises(ValueError, match=r"begun by another call: survivors was \[.*, 3, 3\] and is \[.*, 3, 2\]"):
        successive_halving(TRIAL, CONFIGS, **options, rungs=(2, 4, 6), survivors=(*counts[:2], 2), save=tmp_path)
    for survivors in ((3, 2), (3, 4, 2), (3, 2, 0), (3, 2.5, 2)):
        with pytest.raises(ValueError, match=r"survivors must be one whole number for each of the rungs \(2, 4, 6\)"):
            successive_halving(TRIAL, CONFIGS, **options, rungs=(2, 4, 6), survivors=survivors)


def test_rungs_of_halving():
    assert halving_rungs(81, 81) == (1, 3, 9, 27)
    assert halving_rungs(16, 100, factor=4, least=25) == (25,)
    assert halving_rungs(1, 10) == ()
    with pytest.raises(ValueError, match="factor must be above 1"):
        halving_rungs(8, 10, factor=1.0)
    with pytest.raises(ValueError, match="least must lie between 1 and 10"):
        halving_rungs(8, 10, least=11)


def test_hyperband_finds_a_good_rate():
    space = {"rate": log_uniform(1e-4, 0.3), "decay": uniform(0.0, 0.1), "clip": choice(1.0), "width": integer(4, 4)}
    found = hyperband(TRIAL, space, key=KEY, batches=batches, steps=9, engine=vmapped())
    assert [result.evaluated for result in found.brackets] == [(1, 3, 9), (3, 9), (9,)]
    assert found.score == min(result.scores[result.best] for result in found.brackets)
    np.testing.assert_allclose(float(evaluate(found.state)), found.score, rtol=1e-4)


@pytest.mark.parametrize("engine", [vmapped(), scanned()], ids=str)
def test_evolution_is_training_along_the_line_of_ancestors(engine):
    space = {"rate": log_uniform(1e-4, 0.3), "decay": uniform(0.0, 0.1)}
    configs = [*CONFIGS, {**CONFIGS[0], "rate": float("nan")}]
    found = evolve(TRIAL, configs, space, key=KEY, batches=batches, steps=STEPS, every=4, part=0.4, engine=engine, keep=None)
    assert found.lineage.shape == (2, 6)
    assert (found.lineage[0] != np.arange(6)).sum() == 3
    assert 5 not in found.lineage[0]
    assert np.isfinite(found.result.scores).all()
    for index in (found.result.best, 5):
        line = [index]
        for stretch in reversed(found.lineage):
            line.append(int(stretch[line[-1]]))
        schedule = found.schedule(index)
        assert schedule[-1] == found.result.configs[index]
        state = init(jax.random.fold_in(KEY, line[-1]), schedule[0])
        for t in range(STEPS):
            state, _ = jax.jit(step)(state, batches(t), {**schedule[t // 4], "width": 4})
        np.testing.assert_allclose(found.result.scores[index], float(evaluate(state)), rtol=1e-3)


def test_changes_stay_in_their_ranges():
    random = np.random.default_rng(0)
    change = perturb(0.5, 2.0, resample=0.3)
    for dimension, value in [
        (uniform(0.0, 1.0), 0.9),
        (log_uniform(0.1, 1.0), 0.15),
        (integer(1, 9, step=2), 7),
        (choice(1, 2), 2),
    ]:
        seen = [change(random, dimension, value) for _ in range(200)]
        assert len(set(seen)) > 1
        assert all(type(x) is type(value) for x in seen)
        if isinstance(value, int):
            assert set(seen) <= set(getattr(dimension, "options", range(1, 10, 2)))
        else:
            assert dimension.low <= min(seen)
            assert max(seen) <= dimension.high
    with pytest.raises(ValueError, match="factors must be positive"):
        perturb(-1.0)
    with pytest.raises(ValueError, match="part must lie in"):
        evolve(TRIAL, CONFIGS, {"rate": uniform(0.0, 1.0)}, key=KEY, batches=batches, steps=4, every=2, part=0.6)
