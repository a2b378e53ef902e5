"""Every curve is one row: against a scalar reimplementation, and against Optax where Optax has it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import schedules


class Row(NamedTuple):
    ours: object
    expected: object  # a scalar function of a Python count


def _clip(x):
    return min(max(x, 0.0), 1.0)


def _wsd(t):
    if t < 4:
        return 0.1 + (0.9 - 0.1) * t / 4
    return 0.9 if t < 10 else 0.2 + (0.9 - 0.2) * (1 - math.sqrt(_clip((t - 10) / 8)))


ROWS = {
    "constant": Row(schedules.constant(0.3), lambda t: 0.3),
    "linear": Row(schedules.linear(0.1, 0.9, 10, begin=3), lambda t: 0.1 + 0.8 * _clip((t - 3) / 10)),
    "polynomial": Row(schedules.polynomial_decay_to_zero(0.5, 12, power=1.7), lambda t: 0.5 * (1 - _clip(t / 12)) ** 1.7),
    "root": Row(schedules.polynomial_decay_to_zero(0.5, 12, power=0.5), lambda t: 0.5 * (1 - _clip(t / 12)) ** 0.5),
    "exponential": Row(schedules.exponential(2.0, 5, 0.7, begin=2), lambda t: 2.0 * 0.7 ** (max(t - 2, 0) / 5)),
    "stairs": Row(schedules.exponential(2.0, 5, 0.7, staircase=True), lambda t: 2.0 * 0.7 ** (t // 5)),
    "cosine": Row(schedules.cosine(0.8, 15, alpha=0.1), lambda t: 0.8 * (0.1 + 0.9 * (1 + math.cos(math.pi * _clip(t / 15))) / 2)),
    "wsd": Row(
        schedules.warmup_stable_decay(0.9, 4, 6, 8, initial=0.1, final=0.2, cooldown=schedules.sqrt_cooldown),
        _wsd,
    ),
    "temperature": Row(schedules.temperature(8.0, 0.5, 10, begin=5), lambda t: 8.0 * (0.5 / 8.0) ** _clip((t - 5) / 10)),
    "hotter": Row(schedules.temperature(1.0, 4.0, 10), lambda t: 4.0 ** _clip(t / 10)),
    "cubic": Row(schedules.cubic(0.1, 0.9, 5, 17), lambda t: 0.9 + (0.1 - 0.9) * (1 - _clip((t - 5) / 12)) ** 3),
    "join": Row(
        schedules.join([schedules.linear(0.0, 1.0, 4), schedules.cosine(1.0, 10)], [4]),
        lambda t: t / 4 if t < 4 else (1 + math.cos(math.pi * _clip((t - 4) / 10))) / 2,
    ),
}
COUNTS = np.arange(25)


@pytest.mark.parametrize("name", ROWS)
def test_a_host_count_gives_the_scalar_formula_in_float64(name):
    ours, expected = ROWS[name]
    values = [ours(int(t)) for t in COUNTS]
    assert all(type(value) is np.float64 for value in values)
    np.testing.assert_allclose(values, [expected(int(t)) for t in COUNTS], rtol=1e-14, atol=1e-15)
    # numpy's vectorised power and its scalar one may differ in the last place.
    np.testing.assert_allclose(ours(COUNTS), values, rtol=1e-15)
    assert type(ours(np.int32(3))) is np.float64


@pytest.mark.parametrize("name", ROWS)
def test_a_jax_count_gives_the_same_curve_traced_and_batched(name):
    ours, _ = ROWS[name]
    with jax.numpy_dtype_promotion("strict"):
        batched = jax.jit(jax.vmap(ours))(jnp.asarray(COUNTS, jnp.int32))
        single = ours(jnp.int32(7))
    assert batched.dtype == single.dtype == jnp.float32
    np.testing.assert_allclose(batched, ours(COUNTS), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(single, ours(7), rtol=2e-6, atol=1e-6)


OPTAX = {
    "constant": (schedules.constant(0.3), optax.constant_schedule(0.3)),
    "linear": (schedules.linear(0.1, 0.9, 10, 3), optax.linear_schedule(0.1, 0.9, 10, 3)),
    "polynomial": (schedules.polynomial_decay_to_zero(0.5, 12, 1.7), optax.polynomial_schedule(0.5, 0.0, 1.7, 12)),
    "exponential": (schedules.exponential(2.0, 5, 0.7, 2), optax.exponential_decay(2.0, 5, 0.7, 2)),
    "stairs": (schedules.exponential(2.0, 5, 0.7, 2, staircase=True), optax.exponential_decay(2.0, 5, 0.7, 2, staircase=True)),
    "cosine": (schedules.cosine(0.8, 15, 0.1), optax.cosine_decay_schedule(0.8, 15, 0.1)),
    "join": (
        schedules.join([schedules.linear(0.0, 1.0, 4), schedules.cosine(1.0, 10), schedules.constant(0.5)], [4, 9]),
        optax.join_schedules(
            [optax.linear_schedule(0.0, 1.0, 4), optax.cosine_decay_schedule(1.0, 10), optax.constant_schedule(0.5)], [4, 9]
        ),
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_the_staples_mean_what_they_mean_in_optax(name):
    ours, theirs = OPTAX[name]
    np.testing.assert_allclose(ours(COUNTS), [float(theirs(t)) for t in COUNTS], rtol=1e-5, atol=1e-6)


def test_end_points_are_exact():
    sparsity = schedules.cubic(0.1, 0.9, 500, 4000)
    assert (sparsity(0), sparsity(500), sparsity(4000), sparsity(10**9)) == (0.1, 0.1, 0.9, 0.9)
    assert schedules.cubic(0.0, 0.9, 500, 4000)(4000) == 0.9
    tau = schedules.temperature(7.3, 1.1, 37)
    assert (tau(0), tau(37)) == (7.3, 1.1)
    rate = schedules.warmup_stable_decay(0.3, 10, 0, 7, initial=0.1, final=0.01)
    assert (rate(0), rate(10), rate(17), rate(10**9)) == (0.1, 0.3, 0.01, 0.01)
    assert schedules.warmup_stable_decay(0.3, 0, 5, 7)(0) == 0.3
    assert jax.jit(sparsity)(4000) == jnp.float32(0.9)


def test_sparsity_never_falls():
    assert (np.diff(schedules.cubic(0.1, 0.95, 13, 777)(np.arange(900))) >= 0).all()


@pytest.mark.parametrize("cooldown", [schedules.linear_cooldown, schedules.sqrt_cooldown])
def test_a_cooldown_runs_from_one_to_zero(cooldown):
    assert (cooldown(0.0), cooldown(1.0)) == (1.0, 0.0)
    assert cooldown(jnp.float32(1.0)) == 0.0


HYPER = {
    "constant": (lambda v: schedules.constant(v[0]), 1),
    "linear": (lambda v: schedules.linear(v[0], v[1], v[2], v[3]), 4),
    "polynomial": (lambda v: schedules.polynomial_decay_to_zero(v[0], v[2], power=v[1]), 3),
    "exponential": (lambda v: schedules.exponential(v[0], v[2], v[1], v[3]), 4),
    "cosine": (lambda v: schedules.cosine(v[0], v[2], v[1]), 3),
    "temperature": (lambda v: schedules.temperature(v[0], v[1], v[2], v[3]), 4),
    "cubic": (lambda v: schedules.cubic(v[0], v[1], v[3], v[2]), 4),
    "wsd": (lambda v: schedules.warmup_stable_decay(v[0], v[3], v[3], v[2], final=v[1], cooldown=schedules.sqrt_cooldown), 4),
    "join": (lambda v: schedules.join([schedules.constant(v[0]), schedules.linear(v[0], v[1], v[2])], [5]), 3),
}
POINT = np.array([0.3, 0.8, 10.0, 3.0])


@pytest.mark.parametrize("name", HYPER)
def test_hyper_parameters_may_be_traced_and_have_the_right_gradient(name):
    make, used = HYPER[name]

    def total(values, counts):  # counts off the kinks, where a gradient exists
        return sum(make(values)(t) for t in counts)

    counts = (1, 4, 8)
    with jax.numpy_dtype_promotion("strict"):
        gradient = jax.jit(jax.grad(lambda values: total(values, counts)))(jnp.asarray(POINT, jnp.float32))
    step = 1e-6
    for k in range(used):
        shift = step * np.eye(4)[k]
        difference = (total(POINT + shift, counts) - total(POINT - shift, counts)) / (2 * step)
        np.testing.assert_allclose(gradient[k], difference, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", HYPER)
def test_gradients_are_finite_on_the_kinks_and_beyond(name):
    make, _ = HYPER[name]
    gradients = jax.jit(jax.jacrev(lambda values: make(values)(jnp.array([0, 3, 5, 13, 16, 40]))))(jnp.asarray(POINT, jnp.float32))
    assert gradients.shape == (6, 4)
    assert jnp.isfinite(gradients).all()


def test_hyper_parameters_may_be_traced_integers():
    with jax.numpy_dtype_promotion("strict"):
        value = jax.jit(lambda end, t: schedules.cubic(0.0, 0.8, 100, end)(t))(jnp.int32(300), jnp.int32(200))
    np.testing.assert_allclose(value, 0.7, rtol=1e-6)


def test_schedules_drive_an_optax_optimiser():
    tx = optax.sgd(schedules.linear(1.0, 0.0, 2))
    params, state = jnp.float32(0.0), tx.init(jnp.float32(0.0))
    for _ in range(3):
        updates, state = jax.jit(tx.update)(jnp.float32(1.0), state)
        params = optax.apply_updates(params, updates)
    assert params == -1.5


BAD = {
    "steps": (lambda: schedules.linear(0.0, 1.0, 0), "steps must be positive; got 0"),
    "cosine steps": (lambda: schedules.cosine(1.0, -3), "steps must be positive; got -3"),
    "power": (lambda: schedules.polynomial_decay_to_zero(1.0, 5, power=0.0), "power must be positive; got 0.0"),
    "rate": (lambda: schedules.exponential(1.0, 5, -0.5), "rate must be positive; got -0.5"),
    "warmup": (
        lambda: schedules.warmup_stable_decay(1.0, -1, 2, 3),
        "warmup and stable must be at least 0; got warmup=-1, stable=2",
    ),
    "decay": (lambda: schedules.warmup_stable_decay(1.0, 1, 2, 0), "decay must be positive; got 0"),
    "temperature": (lambda: schedules.temperature(0.0, 1.0, 5), "initial and final must be positive; got initial=0.0, final=1.0"),
    "sparsity": (lambda: schedules.cubic(0.0, 1.2, 0, 5), "initial and final must lie in [0, 1]; got initial=0.0, final=1.2"),
    "nan": (lambda: schedules.cubic(0.0, math.nan, 0, 5), "initial and final must lie in [0, 1]; got initial=0.0, final=nan"),
    "order": (lambda: schedules.cubic(0.0, 0.9, 5, 5), "begin and end must rise; got begin=5, end=5"),
    "join": (
        lambda: schedules.join([schedules.constant(1.0)], [3]),
        "join needs one boundary fewer than schedules; got 1 schedules and 1 boundaries",
    ),
    "boundaries": (
        lambda: schedules.join([schedules.constant(1.0)] * 3, [3, 3]),
        "first and second must rise; got first=3, second=3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_hyper_parameters_are_named_in_one_line(name):
    build, message = BAD[name]
    with pytest.raises(ValueError, match=r".") as error:
        build()
    assert str(error.value) == message
