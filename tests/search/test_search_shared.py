"""Arrays that all configurations share: an argument of every program, on each device once, by whatever runs them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.nets import from_functions
from jaxopt_lab.search.architecture import trained
from jaxopt_lab.search.architecture.objectives import Net
from jaxopt_lab.search.engines import looped, scanned, vmapped
from jaxopt_lab.search.evolution import evolve
from jaxopt_lab.search.halving import hyperband, successive_halving
from jaxopt_lab.search.population import Crew, population
from jaxopt_lab.search.spaces import uniform
from jaxopt_lab.search.study import open_study
from jaxopt_lab.search.sweep import sweep
from jaxopt_lab.search.trial import Trial

KEY = jax.random.key(2)
RNG = np.random.default_rng(1)
DATA = {"x": RNG.normal(size=(40, 3)).astype(np.float32), "y": RNG.normal(size=40).astype(np.float32)}
OTHER = {**DATA, "y": -3 * DATA["y"]}
CONFIGS = [{"rate": 0.02 * (k + 1)} for k in range(5)]
SPACE = {"rate": uniform(0.01, 0.1)}
TRACES = []


def batches(step):
    return {"row": (np.arange(8) + 3 * step) % 40}


def init(key, config, shared):
    return 0.1 * shared["y"][:3] + jax.random.normal(key, (3,))


def step(state, batch, config, shared):
    TRACES.append(1)
    rows = {name: shared[name][batch["row"]] for name in ("x", "y")}
    value, grad = jax.value_and_grad(lambda w: jnp.mean((rows["x"] @ w - rows["y"]) ** 2))(state)
    return optax.apply_updates(state, -config["rate"] * grad), {"loss": value}


def evaluate(state, shared):
    return jnp.mean((shared["x"] @ state - shared["y"]) ** 2)


TRIAL = Trial(init, step, evaluate)
RUN = {"key": KEY, "batches": batches, "steps": 6}


def closed(data):
    """The same trial with the data closed over."""
    return Trial(*(functools.partial(part, shared=jax.tree.map(jnp.asarray, data)) for part in TRIAL))


@functools.cache
def expected(other=False):
    return population(closed(OTHER if other else DATA), CONFIGS, **RUN, rungs=(3,), engine=scanned()).curves


ENGINES = {
    "looped": (looped(), {}),
    "scanned": (scanned(), {}),
    "vmapped": (vmapped(), {}),
    "vmapped, in turns": (vmapped(2), {"memory": 1}),
    "vmapped in a Python loop": (vmapped(compiled=False), {}),
    "measured": (None, {}),
    "on two devices": (vmapped(2), {"devices": jax.devices()[:2]}),
    "looped on two devices": (looped(), {"devices": jax.devices()[:2]}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_it_is_as_if_it_were_closed_over(name):
    engine, options = ENGINES[name]
    found = population(TRIAL, CONFIGS, **RUN, rungs=(3,), engine=engine, shared=DATA, **options)
    np.testing.assert_allclose(found.curves, expected(), rtol=1e-5)
    # An argument: others come to something else.
    again = population(TRIAL, CONFIGS, **RUN, rungs=(3,), engine=engine and scanned(), shared=OTHER, **options)
    np.testing.assert_allclose(again.curves, expected(other=True), rtol=1e-5)


def test_other_arrays_of_the_same_shapes_compile_nothing():
    options = {**RUN, "engine": vmapped(5)}
    population(TRIAL, CONFIGS, **options, shared=DATA)
    TRACES.clear()
    found = population(TRIAL, CONFIGS, **options, shared=OTHER)
    assert TRACES == []
    np.testing.assert_allclose(found.scores, expected(other=True)[:, -1], rtol=1e-5)


@pytest.mark.parametrize("engine", [scanned(), looped()], ids=["scanned", "looped"])
def test_the_same_call_in_64_bits_is_another_program(engine):
    trial = Trial(lambda key, c: jnp.zeros(()), lambda state, batch, c: (state + batch["x"].sum(), {}), lambda state: state)
    options = {"key": KEY, "batches": lambda step: {"x": np.full(2, 1.5)}, "steps": 3, "engine": engine}
    for wide in (False, True, False):
        with jax.enable_x64(wide):
            assert population(trial, [{}], **{**options, "key": jax.random.key(0)}).scores.tolist() == [9.0]


@pytest.mark.parametrize("devices", [1, 2])
def test_memory_counts_it_once_on_each_device(devices):
    big = {**DATA, "more": np.zeros(1 << 16, np.float32)}
    options = {"devices": jax.devices()[:devices]}
    start = Crew(TRIAL, CONFIGS[:4], KEY, batches, 6, engine=vmapped(), shared=big, **options).starts[0]
    assert start.shared_bytes == sum(leaf.nbytes for leaf in big.values())
    assert {len(leaf.sharding.device_set) for leaf in start.shared.values()} == {devices}
    width = 4 // devices
    room = start.shared_bytes + width * start.member_bytes + start.working_bytes(vmapped(width))
    assert start.working_bytes(vmapped(width)) < 1 << 16
    crews = [Crew(TRIAL, CONFIGS[:4], KEY, batches, 6, engine=vmapped(), shared=big, memory=m, **options) for m in (room, room - 1)]
    assert crews[0].engines[0].width == width > crews[1].engines[0].width
    assert len(crews[0].turns()) == 1
    with pytest.raises(ValueError, match=f"{start.shared_bytes:,} of them shared by all"):
        Crew(TRIAL, CONFIGS, KEY, batches, 6, engine=vmapped(), shared=big, memory=start.shared_bytes)


def test_a_saved_population_goes_on_without_having_kept_it(tmp_path):
    class KilledError(BaseException):
        pass

    asked = []

    def killed(step):
        # Once to find the shapes, and then after the rung.
        asked.append(step)
        if asked.count(4) > 1:
            raise KilledError
        return batches(step)

    options = {"key": KEY, "steps": 6, "rungs": (3,), "engine": vmapped(2), "save": tmp_path, "shared": DATA}
    with pytest.raises(KilledError):
        population(TRIAL, CONFIGS, batches=killed, **options)
    assert sum(file.stat().st_size for file in tmp_path.glob("turn*")) < 4000
    found = population(TRIAL, CONFIGS, batches=batches, **options)
    np.testing.assert_allclose(found.curves, expected(), rtol=1e-5)


def test_what_is_made_of_populations_takes_it():
    options = {**RUN, "engine": scanned(), "shared": DATA}
    halved = successive_halving(TRIAL, CONFIGS, **options, rungs=(3,), factor=2)
    np.testing.assert_allclose(halved.curves[:, 0], expected()[:, 0], rtol=1e-5)
    np.testing.assert_allclose(halved.scores[halved.best], expected()[halved.best, -1], rtol=1e-5)
    evolved = evolve(TRIAL, CONFIGS, SPACE, **options, every=3, part=0.2)
    np.testing.assert_allclose(evolved.result.curves[:, 0], expected()[:, 0], rtol=1e-5)
    assert np.isfinite(hyperband(TRIAL, SPACE, **options).score)
    study = open_study(SPACE, "shared")
    assert sweep(study, SPACE, TRIAL, trials=2, together=2, **options) == 2
    assert np.isfinite(study.best_value)


def test_an_objective_that_trains_takes_it():
    def trial(config, model):
        return Trial(
            lambda key, config: model.init(key),
            lambda state, batch, config, shared: (jax.tree.map(lambda x: x + shared["one"].sum() * config["rate"], state), {}),
            lambda state, shared: model.predict(state) * shared["one"].sum(),
        )

    def build(config):
        return from_functions(lambda key: {"w": jnp.zeros(config["width"])}, lambda params: params["w"].sum())

    score = trained(trial, batches=lambda step: {}, steps=2, engine=scanned(), shared={"one": np.ones(2, np.float32)})
    nets = [Net(c, i, build, build(c)) for i, c in enumerate([{"width": 2, "rate": 0.5}, {"width": 3, "rate": 1.0}])]
    assert list(score.measure(nets, KEY)) == [2 * 2 * 2 * 0.5 * 2, 2 * 2 * 3 * 1.0 * 2]


@pytest.mark.parametrize(
    ("trial", "shared", "message"),
    [
        (TRIAL, None, "trial.init takes shared, and there is none; give shared"),
        (closed(DATA)._replace(init=lambda key, c: 0.0, step=lambda s, b, c: (s, {}), evaluate=float), DATA, "none of init, step"),
        (TRIAL, {**DATA, "name": "digits"}, "shared holds arrays, which are passed to the programs; name is a str"),
        (TRIAL, {**DATA, "of": {"names": np.array(["a"])}}, "shared holds arrays of numbers, .*; of/names is of <U1"),
    ],
)
def test_bad_input_is_named(trial, shared, message):
    with pytest.raises(TypeError, match=message):
        population(trial, CONFIGS, **RUN, engine=scanned(), shared=shared)
