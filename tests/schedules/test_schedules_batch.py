"""Batch plans against a plain loop over the steps, and the rates that go with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import schedules
from jaxopt_lab.schedules import BatchPlan

PLANS = {
    "constant": (schedules.constant_batch(7), [7] * 12),
    "full": (schedules.full_batch(100), [100] * 12),
    "iterations": (schedules.batch_from_iterations(10, 4), [3] * 12),
    "piecewise": (schedules.piecewise_batch([8, 2, 4], [3, 4]), [8, 8, 8, 2] + [4] * 8),
    "growing": (schedules.grow_batch(4, 2, [2, 5, 7], maximum=16), [4, 4, 8, 8, 8] + [16] * 7),
    "capped": (schedules.grow_batch(4, 3, [2, 5, 7, 9], maximum=20), [4, 4, 12, 12, 12] + [20] * 7),
    "fractional": (schedules.grow_batch(10, 1.26, [1, 2], maximum=99), [10, 13] + [16] * 10),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_agrees_with_a_plain_loop(name):
    plan, sizes = PLANS[name]
    assert [plan(step) for step in range(12)] == sizes
    assert [plan.offset(step) for step in range(12)] == [sum(sizes[:step]) for step in range(12)]
    for step in range(12):
        run = plan.run(step)
        assert len({plan(step + k) for k in range(run or 20)}) == 1
        assert run is None or (run >= 1 and plan(step + run) != plan(step))
    assert plan(np.int64(3)) == plan(jnp.int32(3)) == sizes[3]


def test_a_plan_holds_few_distinct_sizes():
    plan = schedules.grow_batch(32, 4, [100, 200, 300, 400], maximum=256)
    assert plan == BatchPlan((32, 128, 256), (100, 200))
    assert schedules.grow_batch(32, 2, [5, 6], maximum=32) == schedules.constant_batch(32)
    assert schedules.grow_batch(8, 10, list(range(1, 2000)), maximum=10**6).sizes[-1] == 10**6


@pytest.mark.parametrize("examples", [1, 7, 60_000])
def test_an_epoch_takes_at_most_the_iterations_asked_for(examples):
    for iterations in {1, min(3, examples), examples}:
        size = schedules.batch_from_iterations(examples, iterations)(0)
        assert -(-examples // size) <= iterations
        assert size == 1 or -(-examples // (size - 1)) > iterations


RATES = {
    "linear": schedules.scaled_rate(0.1, PLANS["growing"][0], reference=8),
    "square root": schedules.scaled_rate(0.1, PLANS["growing"][0], reference=8, power=0.5),
    "constant": schedules.scaled_rate(0.1, PLANS["constant"][0], reference=14),
    "capped": schedules.capped_growth_rate(0.1, PLANS["capped"][0], 3, [2, 5, 7, 9]),
}
EXPECTED = {
    "linear": [0.05] * 2 + [0.1] * 3 + [0.2] * 7,
    "square root": [0.1 * 0.5**0.5] * 2 + [0.1] * 3 + [0.1 * 2**0.5] * 7,
    "constant": [0.05] * 12,
    "capped": [0.1] * 5 + [0.1 * 5 / 9] * 2 + [0.1 * 5 / 27] * 2 + [0.1 * 5 / 81] * 3,
}


@pytest.mark.parametrize("name", RATES)
def test_the_rates_beside_a_plan_on_the_host_and_traced(name):
    rate, expected = RATES[name], EXPECTED[name]
    np.testing.assert_allclose([rate(step) for step in range(12)], expected, rtol=1e-14)
    with jax.numpy_dtype_promotion("strict"):
        traced = jax.jit(jax.vmap(rate))(jnp.arange(12))
    np.testing.assert_allclose(traced, expected, rtol=1e-6)


def test_the_noise_scale_falls_alike_whichever_of_the_two_gives_way():
    plan, boundaries = PLANS["capped"][0], [2, 5, 7, 9]
    rate = schedules.capped_growth_rate(0.1, plan, 3, boundaries)
    noise = [rate(step) / plan(step) for step in (0, *boundaries)]
    np.testing.assert_allclose(np.divide(noise[:-1], noise[1:]), 3, rtol=1e-14)


BAD = {
    "size": (lambda: schedules.constant_batch(0), "batch sizes must be at least 1; got (0,)"),
    "few": (
        lambda: schedules.piecewise_batch([4, 8], []),
        "a plan needs one boundary fewer than sizes; got sizes=(4, 8) and boundaries=()",
    ),
    "order": (lambda: schedules.piecewise_batch([4, 8, 9], [5, 5]), "boundaries must rise from above 0; got (5, 5)"),
    "zero": (lambda: schedules.grow_batch(4, 2, [0], 8), "boundaries must rise from above 0; got (0,)"),
    "late": (lambda: schedules.grow_batch(4, 2, [1, 9, 8], 8), "boundaries must rise from above 0; got (1, 9, 8)"),
    "iterations": (
        lambda: schedules.batch_from_iterations(10, 11),
        "iterations must lie between 1 and the number of examples; got iterations=11, examples=10",
    ),
    "factor": (lambda: schedules.grow_batch(4, 1, [3], 8), "factor must be above 1; got 1"),
    "maximum": (
        lambda: schedules.grow_batch(16, 2, [3], 8),
        "initial and maximum must rise or be equal; got initial=16, maximum=8",
    ),
    "initial": (lambda: schedules.grow_batch(0, 2, [3], 8), "batch sizes must be at least 1; got (0, 0)"),
    "step": (lambda: schedules.constant_batch(4)(-1), "a step is at least 0; got -1"),
    "reference": (lambda: schedules.scaled_rate(0.1, PLANS["full"][0], 0), "reference must be positive; got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_plans_are_named_in_one_line(name):
    build, message = BAD[name]
    with pytest.raises(ValueError, match=r".") as error:
        build()
    assert str(error.value) == message
