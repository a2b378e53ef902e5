"""Streams of batches: a pure function of the seed and the step, every example once a pass."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import data
from jaxopt_lab.data.blocks import block
from jaxopt_lab.schedules import piecewise_batch

ARRAYS = {"x": np.arange(20, dtype=np.float32).reshape(10, 2), "y": np.arange(10)}


class Growing:
    """A plan of one's own, without a list of sizes."""

    def __call__(self, step):
        return step + 1

    def offset(self, step):
        return step * (step + 1) // 2

    def run(self, step):
        return 1


def drawn(stream, steps) -> list[int]:
    return [int(y) for step in steps for y in stream(step)["y"]]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7, 10])
def test_every_pass_holds_every_example_once(batch_size):
    stream = data.batches(ARRAYS, batch_size, seed=3)
    order = drawn(stream, range(40))[:40]
    for start in range(0, 40, 10):
        assert sorted(order[start : start + 10]) == list(range(10))
    assert order[:10] != order[10:20]


def test_rows_stay_together_and_are_untouched():
    batch = data.batches(ARRAYS, 4, seed=0)(11)
    np.testing.assert_array_equal(batch["x"], ARRAYS["x"][batch["y"]])


def test_a_stream_is_a_function_of_seed_and_step():
    one, two = (data.batches(ARRAYS, 4, seed=5) for _ in range(2))
    forwards = [one(step)["y"].tolist() for step in range(30)]
    backwards = [two(step)["y"].tolist() for step in reversed(range(30))][::-1]
    assert forwards == backwards
    assert drawn(data.batches(ARRAYS, 4, seed=6), range(5)) != drawn(one, range(5))


def test_the_order_never_changes():
    """Literal: a run that is resumed under another version of numpy must see the same batches."""
    assert drawn(data.batches(ARRAYS, 10, seed=0), range(2)) == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7, 5, 3, 7, 8, 2, 4, 1, 0, 6, 9]


def test_the_order_is_the_rank_of_philox_words():
    words = np.random.Philox(key=[5, 2]).random_raw(10)
    expected = [k for _, k in sorted(zip(words.tolist(), range(10), strict=True))]
    assert drawn(data.batches(ARRAYS, 10, seed=5), [2]) == expected


@pytest.mark.parametrize("batch_size", [3, 10, None, piecewise_batch([2, 5, 10], [4, 9])])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_a_stack_is_its_steps(batch_size, count):
    stream = data.batches(ARRAYS, batch_size, seed=1)
    for step in (0, 3, 7, 12):
        stacked = stream.stack(step, count)
        steps = [stream(step + k) for k in range(len(stacked["y"]))]
        for key, array in ARRAYS.items():
            np.testing.assert_array_equal(stacked[key], np.stack([batch[key] for batch in steps]))
            assert stacked[key].dtype == array.dtype


def test_a_stack_ends_where_the_size_changes():
    stream = data.batches(ARRAYS, piecewise_batch([2, 5], [4]), seed=1)
    assert [stream.stack(step, 3)["y"].shape for step in (0, 2, 3, 4)] == [(3, 2), (2, 2), (1, 2), (3, 5)]


def test_a_growing_batch_still_holds_every_example_once():
    stream = data.batches(ARRAYS, piecewise_batch([2, 4, 7], [3, 5]), seed=2)
    # 2 + 2 + 2 + 4 = one pass; 4 + 7 - 1 = another.
    order = drawn(stream, range(8))
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert [stream.size(step) for step in range(6)] == [2, 2, 2, 4, 4, 7]


def test_full_batch_is_the_data_in_order():
    stream = data.batches(ARRAYS, None, seed=0)
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(stream(17)[key], array)
    assert stream.stack(0, 3)["x"].shape == (3, 10, 2)


@pytest.mark.parametrize(
    ("batch_size", "steps"), [(1, 10), (3, 4), (5, 2), (10, 1), (None, 1), (piecewise_batch([1, 2, 5], [2, 4]), 5)]
)
def test_steps_per_epoch(batch_size, steps):
    stream = data.batches(ARRAYS, batch_size, seed=0)
    assert stream.steps_per_epoch == steps
    assert set(drawn(stream, range(steps))) == set(range(10))


def test_jax_arrays_and_large_seeds():
    stream = data.batches({"y": jnp.arange(4)}, np.int64(2), seed=2**64 - 1)
    assert sorted(drawn(stream, range(2))) == [0, 1, 2, 3]


@pytest.mark.parametrize("batch_size", [4, None])
def test_a_stream_is_no_iterable(batch_size):
    with pytest.raises(TypeError, match=r"has no end; .*range\(batches\.steps_per_epoch\): batch = batches\(step\)") as caught:
        next(iter(data.batches(ARRAYS, batch_size, seed=0)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.batches(ARRAYS, 11, seed=0), "batch_size=11 is larger than the data, which has 10 examples"),
        (lambda: data.batches(ARRAYS, 0, seed=0), "batch_size=0; a batch needs at least 1 example"),
        (lambda: data.batches(ARRAYS, 2, seed=-1), "seed=-1 is out of range"),
        (lambda: data.batches({"x": np.array([1.0, np.nan])}, 1, seed=0), "x holds nan at index 1"),
        (lambda: data.batches({"x": np.ones(3), "y": np.ones(2)}, 1, seed=0), "x has 3, y has 2"),
        (lambda: data.batches(ARRAYS, 2, seed=0)(-1), "step=-1; steps count from 0"),
        (lambda: data.batches(ARRAYS, 2, seed=0).stack(0, 0), "count=0 steps"),
        (
            lambda: data.batches(ARRAYS, piecewise_batch([2, 11, 3], [3, 5]), seed=0),
            "the plan asks for batches of up to 11, and the data has 10 examples",
        ),
        (lambda: data.batches(ARRAYS, Growing(), seed=0)(10), "a batch of 11 at step 10, and the data has 10 examples"),
    ],
)
def test_bad_streams_are_named(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_block_is_the_batches_of_its_steps_each_asked_for_once():
    plan = piecewise_batch([2, 5], [4])
    stream, asked = data.batches(ARRAYS, plan, seed=1), []

    def own(step):
        asked.append(step)
        return stream(step)

    def blocks(batches):
        at, ahead, found = 1, None, []
        while at < 7:
            each = block(batches, at, min(4, 7 - at), ahead)
            assert each.count == len(each.batches["x"])
            found.append(each.batches)
            at, ahead = at + each.count, each.ahead
        return found

    mine, its = blocks(own), blocks(stream)
    assert asked == [1, 2, 3, 4, 5, 6]
    assert [each["x"].shape for each in mine] == [(3, 2, 2), (3, 5, 2)] == [each["x"].shape for each in its]
    for one, other in zip(mine, its, strict=True):
        for key, array in ARRAYS.items():
            np.testing.assert_array_equal(one[key], other[key])
            assert one[key].dtype == array.dtype
    # What was handed on counts for its own step alone, and a batch may hold nothing.
    assert block(own, 2, 1, (1, None)).batches["y"].tolist() == [stream(2)["y"].tolist()]
    assert block(lambda step: {}, 5, 3) == ({}, 3, None)
