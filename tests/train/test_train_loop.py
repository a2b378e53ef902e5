"""The loop: what it computes whichever way it goes, and what it leaves behind."""

import json
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import train
from jaxopt_lab.train import stepping


class Counted:
    """A step of one's own: a moving average of what comes in, that counts how often it is traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self, state, batch):
        self.traces += 1
        mean = jnp.mean(batch["x"])
        params = 0.9 * state.params + mean + 0 * jax.random.normal(jax.random.fold_in(state.key, state.step))
        return state._replace(params=params, step=state.step + 1), {"loss": mean}


class Stream:
    """Batches that hold their own step, with stacks; of a size that changes at `border`."""

    def __init__(self, border=10**9):
        self.border, self.stacks = border, []

    def __call__(self, step):
        return {"x": np.full(2 if step < self.border else 4, step, np.float32)}

    def stack(self, step, count):
        self.stacks.append((step, count))
        count = min(count, self.border - step) if step < self.border else count
        return {"x": np.stack([self(step + k)["x"] for k in range(count)])}


def start(step=0):
    return train.State(jnp.float32(1), {}, (), jnp.int32(step), jax.random.key(0))


def expected(first, count, value=1.0):
    for step in range(first, first + count):
        value = 0.9 * value + step
    return value


def quiet(*args, **kwargs):
    return train.fit(*args, progress=False, **kwargs)


STEP = Counted()
X = np.ones(2, np.float32)


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("steps", [0, 1, 7, 9, 400])
@pytest.mark.parametrize("batches", [Stream(), Stream().__call__, Stream(border=6)], ids=["stream", "function", "plan"])
def test_every_step_counts_once_whichever_loop(batches, steps, chunk):
    result = quiet(STEP, start(3), batches, steps=steps, chunk=chunk, log_every=3)
    np.testing.assert_allclose(result.state.params, expected(3, steps), rtol=1e-4)
    assert int(result.state.step) == 3 + steps
    assert [record["step"] for record in result.history] == [t for t in range(4, 4 + steps) if t % 3 == 0]
    assert all(record["loss"] == record["step"] - 1 for record in result.history)


@pytest.mark.parametrize("every", [2, 50, 100])
def test_periods_do_not_keep_it_from_measuring_or_add_steps(every):
    at = []
    result = quiet(STEP, start(), Stream(), steps=250, evaluate=lambda s: at.append(int(s.step)) or {"a": 1}, evaluate_every=every)
    assert at == sorted({*range(every, 251, every), 250})
    np.testing.assert_allclose(result.state.params, expected(0, 250), rtol=1e-4)


def clock(monkeypatch, dispatch, step):
    """Has the loop find that a call costs `dispatch` seconds, and each step in it `step` more."""
    calls = []
    dispatched = stepping.Loop._dispatched

    def counting(self, count, out):
        calls.append(count or 1)
        dispatched(self, count, out)

    def timed(self, work):
        calls.clear()
        work()
        return sum(dispatch + step * count for count in calls)

    monkeypatch.setattr(stepping.Loop, "_dispatched", counting)
    monkeypatch.setattr(stepping.Loop, "_timed", timed)


@pytest.mark.parametrize(
    ("dispatch", "step", "chunk", "stacked"),
    [
        (100e-6, 1e-6, 128, True),  # the call is what costs: many steps a call
        (100e-6, 1.0, 1, False),  # the step is what costs: a loop is not even tried
        (0.0, 200e-6, 1, True),  # tried, and no better
    ],
    ids=["cheap", "dear", "no_gain"],
)
def test_the_faster_loop_is_taken(monkeypatch, dispatch, step, chunk, stacked):
    clock(monkeypatch, dispatch, step)
    stream = Stream()
    result = quiet(STEP, start(), stream, steps=600)
    assert result.chunk == chunk
    assert bool(stream.stacks) == stacked
    np.testing.assert_allclose(result.state.params, expected(0, 600), rtol=1e-4)


def test_a_loop_fits_between_evaluations(monkeypatch):
    clock(monkeypatch, 100e-6, 1e-6)
    result = quiet(STEP, start(), Stream(), steps=600, evaluate=lambda s: {"a": 1}, evaluate_every=200)
    # Three loops at least in a period, and of one length: 200 in four.
    assert result.chunk == 50


def test_time_is_taken_with_the_work_done():
    slow = stepping.Loop.__new__(stepping.Loop)
    slow.state = jnp.zeros(())
    assert slow._timed(lambda: time.sleep(0.02)) > 0.015


def test_a_function_is_asked_once_for_each_step():
    asked = []

    def batches(step):
        asked.append(step)
        return {"x": np.full(5 if step % 3 == 0 else 8, step, np.float32)}

    result = quiet(STEP, start(), batches, steps=40, chunk=4)
    assert asked == list(range(40))
    np.testing.assert_allclose(result.state.params, expected(0, 40), rtol=1e-4)


def test_a_second_fit_compiles_nothing():
    step = Counted()
    first = quiet(step, start(), Stream(), steps=20, chunk=4)
    traced = step.traces
    assert traced <= 4
    quiet(step, first.state, Stream(), steps=20, chunk=4)
    quiet(step, start(), Stream(), steps=20, chunk=4)
    assert step.traces == traced


def test_the_callers_state_stays_usable():
    state = start()
    quiet(STEP, state, Stream(), steps=5)
    assert float(state.params) == 1.0
    assert int(quiet(STEP, state, Stream(), steps=5).state.step) == 5


def test_evaluation_and_saving_happen_when_due():
    evaluated, saved = [], []

    def evaluate(state):
        evaluated.append(state)
        return {"accuracy": np.float32(0.5)}

    result = quiet(
        STEP,
        start(2),
        Stream(),
        steps=9,
        evaluate=evaluate,
        evaluate_every=4,
        save=saved.append,
        save_every=5,
        log_every=6,
        chunk=2,
    )
    # Copies, which stay readable: the loop went on to donate its own buffers.
    for states, steps in ((evaluated, (4, 8, 11)), (saved, (5, 10, 11))):
        assert [(int(s.step), round(float(s.params), 3)) for s in states] == [(t, round(expected(2, t - 2), 3)) for t in steps]
    assert result.history == [
        {"step": 4, "accuracy": 0.5},
        {"step": 6, "loss": 5.0},
        {"step": 8, "accuracy": 0.5},
        {"step": 11, "accuracy": 0.5},
    ]


@pytest.mark.parametrize(
    ("scores", "maximise", "min_delta", "best", "last"),
    [
        ([0.1, 0.5, 0.4, 0.3, 0.9], True, 0.0, 2, 4),
        ([0.5, 0.1, 0.2, 0.3, 0.0], False, 0.0, 2, 4),
        ([0.5, 0.55, 0.58, 0.9, 0.9], True, 0.1, 1, 3),
        ([np.nan, 0.1, np.nan, np.nan, 0.2], True, 0.0, 2, 4),
        ([0.1, 0.2, 0.3, 0.4, 0.5], True, 0.0, 5, 5),
    ],
)
def test_early_stopping_returns_the_best_state(scores, maximise, min_delta, best, last):
    stop = train.EarlyStopping("score", patience=2, maximise=maximise, min_delta=min_delta)
    found = iter(scores)
    result = quiet(STEP, start(), Stream(), steps=5, evaluate=lambda s: {"score": next(found)}, evaluate_every=1, stop=stop)
    assert int(result.state.step) == best
    np.testing.assert_allclose(result.state.params, expected(0, best), rtol=1e-6)
    assert result.history[-1]["step"] == last


def test_early_stopping_is_told_which_way_is_better():
    with pytest.raises(TypeError, match="maximise"):
        train.EarlyStopping("loss", 3)
    with pytest.raises(TypeError, match="positional"):
        train.EarlyStopping("loss", 3, False)
    assert not train.EarlyStopping("loss", 3, maximise=True).improves(0.5, 1.0)
    assert train.EarlyStopping("loss", 3, maximise=False).improves(0.5, 1.0)


def test_metrics_are_lines_of_json_and_a_resumed_run_does_not_count_twice(tmp_path):
    run = tmp_path / "new" / "run"

    def evaluate(state):
        return {"score": float("nan")}

    half = quiet(STEP, start(), Stream(), steps=4, run=run, log_every=1, evaluate=evaluate).state
    quiet(STEP, half, Stream(), steps=4, run=run, log_every=1)
    file = run / "metrics.jsonl"
    with file.open("a") as torn:
        torn.write('{"step": 9, "lo')
    quiet(STEP, half, Stream(), steps=3, run=run, log_every=1)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 4, 5, 6, 7]
    assert records[4] == {"step": 4, "score": None}
    assert [p.name for p in run.iterdir()] == ["metrics.jsonl"]


def test_metrics_that_are_lists_may_hold_what_json_cannot(tmp_path):
    def step(state, batch):
        return STEP(state, batch)[0], {"norms": jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]])}

    quiet(step, start(), Stream(), steps=1, run=tmp_path, log_every=1, chunk=1)
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record == {"step": 1, "norms": [[1.0, None], [None, 2.0]]}


def test_interrupted_equals_unbroken_bit_for_bit():
    whole = quiet(STEP, start(), Stream(), steps=40, chunk=1).state
    part = quiet(STEP, start(), Stream(), steps=17, chunk=1).state
    rest = quiet(STEP, part, Stream(), steps=23, chunk=1).state
    assert float(whole.params) == float(rest.params)


@pytest.mark.parametrize("stack", [False, True])
def test_a_failing_stream_names_the_step(stack):
    class Broken(Stream):
        def __call__(self, step):
            if step == 5:
                raise OSError("disk gone")
            return super().__call__(step)

    stream = Broken() if stack else Broken().__call__
    with pytest.raises(OSError, match=r"batches(.stack)?\((5|4, 4)\) failed: OSError: disk gone"):
        quiet(STEP, start(), stream, steps=9, chunk=4)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(ValueError, ValueError), (FileNotFoundError, OSError), (KeyError, RuntimeError), (IndexError, RuntimeError)],
)
def test_a_failing_stream_keeps_an_error_that_a_user_can_mend(raised, kind):
    def broken(step):
        raise raised("no")

    with pytest.raises(kind, match=rf"batches\(0\) failed: {raised.__name__}: "):
        quiet(STEP, start(), broken, steps=1, chunk=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps must be at least 0; got -1"),
        ({"steps": 1, "log_every": 0}, "log_every must be at least 1; got 0"),
        ({"steps": 1, "evaluate_every": 0}, "evaluate_every"),
        ({"steps": 1, "chunk": 0}, "chunk"),
        ({"steps": 1, "stop": train.EarlyStopping("a", 1, maximise=True)}, "'a' needs evaluate"),
        (
            {"steps": 1, "stop": train.EarlyStopping("a", 1, maximise=True), "evaluate": lambda s: {"b": 1}, "evaluate_every": 1},
            "monitors 'a', and evaluate returned b",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        quiet(STEP, start(), Stream(), **arguments)


@pytest.mark.parametrize("batches", [[{"x": X}], iter([{"x": X}]), {"x": X}], ids=["list", "iterator", "arrays"])
def test_batches_that_are_no_function_are_refused(batches):
    with pytest.raises(TypeError, match=rf"batches\(step\) -> batch; got {type(batches).__name__}, .*lambda step:") as error:
        quiet(STEP, start(), batches, steps=1)
    assert "\n" not in str(error.value)


def test_plain_lines_where_there_is_no_terminal(capsys):
    train.fit(STEP, start(), Stream(), steps=4, log_every=2, evaluate=lambda s: {"score": 0.25})
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("  (")[0] for line in lines] == ["step 2  loss 1", "step 4  loss 3", "step 4  score 0.25"]
    assert all(
        re.fullmatch(r"\(\S+ steps/s, \d:\d\d:\d\d left, [\d,]+ MiB\)", line.partition("  ")[2].partition("  ")[2])
        for line in lines
    )


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    train.fit(STEP, start(), Stream(), steps=4, log_every=2)
    assert "4/4" in capsys.readouterr().err


def test_a_step_that_fails_leaves_the_records_closed_and_readable(tmp_path):
    def evaluate(state):
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        quiet(STEP, start(), Stream(), steps=4, log_every=1, run=tmp_path, evaluate=evaluate)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
