"""A run in a directory: whatever ends it, the same call goes on where it was; and what it refuses to go on with."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxopt_lab import losses, nets, train
from jaxopt_lab.checkpoint import Best, Checkpoints, Locked
from jaxopt_lab.train import signals

LOSS = losses.per_example(losses.cross_entropy)
MODEL = nets.from_linen(nets.MLP(features=(4,), classes=3))
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((40, 5), dtype=np.float32), RNG.integers(0, 3, 40, dtype=np.int32)
BAD = range(12, 15)


def batches(step, bad=()):
    rows = slice(4 * (step % 10), 4 * (step % 10) + 4)
    x = X[rows].copy()
    if step in bad:
        x[1, 2] = np.nan
    return {"x": x, "y": Y[rows]}


def optimiser(kind=optax.adam, rate=0.05):
    return optax.chain(kind(rate), train.rate_scale())


STEP = train.make_step(MODEL, LOSS, optimiser())
GUARDED = train.make_step(MODEL, LOSS, optimiser(), guard=True)


def start(tx=STEP.tx):
    return train.init(MODEL, tx, jax.random.key(0), batches(0))


def fit(run, steps=20, step=STEP, batches=batches, **options):
    return train.fit(step, start(step.tx), batches, steps=steps, run=run, progress=False, chunk=1, log_every=1, **options)


def run_in(path, **options):
    return train.Run(path, **{"save_every": 5, "resume": True, **options})


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    one, other = (state._replace(key=jax.random.key_data(state.key)) for state in (one, other))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def whole():
    return fit(None)


class Killed(BaseException):
    """What no code is expected to handle."""


def dies_at(when):
    def ends(step):
        if step == when:
            raise Killed
        return batches(step)

    return ends


def test_a_run_goes_on_where_it_was_whatever_ended_it(tmp_path, whole):
    for when in (3, 9, 17):
        with pytest.raises(Killed):
            fit(run_in(tmp_path), batches=dies_at(when))
    again = fit(run_in(tmp_path))
    same(again.state, whole.state)
    assert again.history == whole.history
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.history
    # And once more, where nothing is left to do.
    asked = []
    done = fit(run_in(tmp_path), batches=asked.append)
    same(done.state, whole.state)
    assert not asked
    assert done.history == whole.history


def test_what_a_run_leaves_behind(tmp_path):
    config = {"rate": 0.05, "out": tmp_path, "widths": (4,)}
    fit(run_in(tmp_path / "run", config=config, keep=3), evaluate=lambda s: {"score": float(s.step)}, evaluate_every=10)
    run = tmp_path / "run"
    names = {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "status.json", "report.md", "lock"}
    assert {path.name for path in run.iterdir()} == names
    assert json.loads((run / "config.json").read_text()) == {"rate": 0.05, "out": str(tmp_path), "widths": [4]}
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    assert len(environment["devices"]) == 8
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["pid"]) == ("finished", 20, os.getpid())
    report = (run / "report.md").read_text()
    assert "| score | 20 | 20 | 10 | 10 | 20 | 20 |" in report
    assert "| rate | `0.05` |" in report
    with Checkpoints(run / "checkpoints") as kept:
        assert kept.steps() == (10, 15, 20)
        assert kept.restore(15, part="params")["Dense_0"]["kernel"].shape == (5, 4)


def test_a_directory_is_not_written_over(tmp_path):
    fit(run_in(tmp_path), steps=5)
    with pytest.raises(FileExistsError, match=r"holds a run, saved at step 5: resume=True goes on"):
        fit(run_in(tmp_path, resume=False))
    other = tmp_path / "other"
    fit(run_in(other, resume=False), steps=5)
    assert (other / "report.md").exists()


def test_two_writers_in_one_directory(tmp_path):
    def second(step):
        if step == 2:
            with pytest.raises(Locked, match=rf"{os.getpid()}"):
                fit(run_in(tmp_path))
        return batches(step)

    fit(run_in(tmp_path), steps=5, batches=second)


def test_a_directory_that_cannot_be_written_is_told_before_anything_is_compiled(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot keep a run in .*file/run: "):
        fit(run_in(tmp_path / "file" / "run"), batches=lambda step: pytest.fail("asked for data"))


def test_names_that_leave_the_directory_are_refused(tmp_path):
    assert run_in(tmp_path, name="rate-0.1_seed.2").path == tmp_path / "rate-0.1_seed.2"
    for name in ("../evil", "a/b", "", ".hidden", "..", "a\0b", "x" * 200):
        with pytest.raises(ValueError, match="name"):
            fit(run_in(tmp_path, name=name))


def test_other_settings_are_named_field_by_field(tmp_path):
    fit(run_in(tmp_path, config={"rate": 0.05, "seed": 0, "resume": False}), steps=5)
    changed = {"rate": 0.1, "seed": 0, "resume": True}
    with pytest.raises(ValueError, match=r"other settings: config.rate was 0.05 and is 0.1; accept_changes"):
        fit(run_in(tmp_path, config=changed))
    fit(run_in(tmp_path, config=changed, accept_changes=True), steps=5)
    assert json.loads((tmp_path / "config.json").read_text())["rate"] == 0.1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"rate": NaN}', "NaN"),
        (b'{"rate": 1, "rate": 2}', "rate"),
        (b'{"rate": "\xff"}', "UTF-8"),
        (b'{"rate": 1', "line 1"),
    ],
)
def test_a_config_that_is_no_json_is_named(tmp_path, body, message):
    (tmp_path / "config.json").write_bytes(body)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        fit(run_in(tmp_path, config={}))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [({"rate": float("nan")}, ValueError, r"config.rate is nan"), ({"a": [{1}]}, TypeError, r"config.a\[0\] is a set")],
)
def test_settings_that_no_file_holds_are_named(tmp_path, config, error, message):
    with pytest.raises(error, match=message):
        fit(run_in(tmp_path, config=config))


def test_another_optimiser_or_loss_is_refused_though_its_state_would_fit(tmp_path):
    fit(run_in(tmp_path), steps=5)
    for changed, message in (
        (train.make_step(MODEL, LOSS, optimiser(optax.nadam)), "the optimiser is another program"),
        (train.make_step(MODEL, LOSS, optimiser(rate=0.1)), "the optimiser is another program"),
        (train.make_step(MODEL, lambda y, batch: 2 * LOSS(y, batch), optimiser()), r"the step \(model, loss or penalty\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(run_in(tmp_path), step=changed)
    sound = fit(run_in(tmp_path, accept_changes=True), step=changed, steps=10)
    assert int(sound.state.step) == 10


def test_a_batch_with_weights_is_no_other_program(tmp_path):
    fit(run_in(tmp_path), steps=5)
    ragged = fit(run_in(tmp_path), batches=lambda t: {**batches(t), "weight": np.array([1, 1, 1, t % 2], np.float32)})
    assert int(ragged.state.step) == 20


def test_another_model_is_told_as_a_difference_by_path(tmp_path):
    fit(run_in(tmp_path), steps=5)
    wider = train.make_step(nets.from_linen(nets.MLP(features=(6,), classes=3)), LOSS, optimiser())
    state = train.init(wider.model, wider.tx, jax.random.key(0), batches(0))
    with pytest.raises(ValueError, match=r"params/Dense_0/kernel.*\(5, 4\)"):
        train.fit(wider, state, batches, steps=10, run=run_in(tmp_path), progress=False)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 5)


def test_data_that_fails_saves_what_was_trained_and_names_the_step(tmp_path, whole):
    def broken(step):
        if step == 13:
            raise OSError("disk gone")
        return batches(step)

    with pytest.raises(OSError, match=r"batches\(13\) failed: OSError: disk gone"):
        fit(run_in(tmp_path), batches=broken)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 13)
    assert "disk gone" in status["error"]
    asked = []
    again = fit(run_in(tmp_path), batches=lambda step: asked.append(step) or batches(step))
    assert asked[0] == 13
    same(again.state, whole.state)


def test_early_stopping_goes_on_as_if_nothing_had_been(tmp_path):
    scores = {2: 0.1, 4: 0.5, 6: 0.4, 8: 0.45, 10: 0.3, 12: 0.9}
    options = {
        "evaluate": lambda state: {"score": scores[int(state.step)]},
        "evaluate_every": 2,
        "stop": train.EarlyStopping("score", patience=3, maximise=True),
    }
    unbroken = fit(None, **options)
    assert int(unbroken.state.step) == 4
    for when in (5, 7, 9):
        with pytest.raises(Killed):
            fit(run_in(tmp_path, save_every=2, keep=1), batches=dies_at(when), **options)
    resumed = fit(run_in(tmp_path, save_every=2, keep=1), **options)
    same(resumed.state, unbroken.state)
    assert resumed.history == unbroken.history
    # It is over, and stays so.
    same(fit(run_in(tmp_path, save_every=2, keep=1), **options).state, unbroken.state)


def test_a_damaged_best_step_leaves_the_run_to_go_on(tmp_path):
    scores = {2: 0.5, 4: 0.9, 6: 0.4, 8: 0.3, 10: 0.2}
    options = {
        "evaluate": lambda state: {"score": scores[int(state.step)]},
        "evaluate_every": 2,
        "stop": train.EarlyStopping("score", patience=9, maximise=True),
    }
    fit(run_in(tmp_path, keep=1), steps=4, **options)
    digests = tmp_path / "checkpoints" / "4" / "digests.json"
    digests.write_bytes(digests.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="4"):
        resumed = fit(run_in(tmp_path, keep=1), steps=10, **options)
    # From step 2, the best before it, which is still there; and step 4 is found again.
    assert int(resumed.state.step) == 4
    assert [record["step"] for record in resumed.history if "loss" in record] == list(range(1, 11))


def test_what_the_system_refuses_for_now_is_no_damage(tmp_path, monkeypatch):
    from jaxopt_lab.checkpoint import digests

    fit(run_in(tmp_path), steps=10)
    kept = (tmp_path / "metrics.jsonl").read_bytes()

    def refused(path, **_):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(digests, "_digest", refused)
    with pytest.raises(OSError, match="Too many open files"):
        fit(run_in(tmp_path))
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == (5, 10)


def test_nothing_sound_is_left_and_the_run_begins_anew(tmp_path, whole):
    fit(run_in(tmp_path, keep=1), steps=5)
    (tmp_path / "checkpoints" / "5" / "digests.json").write_text("{}")
    with pytest.warns(UserWarning, match="no sound checkpoint left.*begins anew"):
        again = fit(run_in(tmp_path))
    same(again.state, whole.state)
    assert again.history == whole.history


def test_the_best_is_kept_beside_the_newest(tmp_path):
    scores = iter([0.1, 0.9, float("nan"), 0.3])
    run = run_in(tmp_path, keep=1, best=Best("score", maximise=True))
    fit(run, evaluate=lambda state: {"score": next(scores)}, evaluate_every=5)
    with Checkpoints(tmp_path / "checkpoints") as kept:
        assert kept.steps() == (10, 20)


def test_a_damaged_newest_step_is_set_aside_and_the_one_before_it_taken(tmp_path, whole):
    fit(run_in(tmp_path), steps=15)
    for path in (tmp_path / "checkpoints" / "15").rglob("*"):
        if path.is_file() and path.name != "digests.json":
            path.write_bytes(path.read_bytes()[:-1])
    asked = []
    with pytest.warns(UserWarning, match="15"):
        again = fit(run_in(tmp_path), batches=lambda step: asked.append(step) or batches(step))
    assert asked[0] == 10
    same(again.state, whole.state)
    assert again.history == whole.history


def test_steps_that_are_not_finite_are_passed_over_and_counted():
    result = fit(None, step=GUARDED, batches=lambda t: batches(t, BAD))
    assert [row["skipped"] for row in result.history] == [0] * 12 + [1, 2, 3] + [3] * 5
    assert all("nonfinite" not in row for row in result.history)
    assert np.isfinite(jax.tree.leaves(result.state.params)[0]).all()
    for chunk in (4, 20):
        looped = train.fit(
            GUARDED, start(), lambda t: batches(t, BAD), steps=20, chunk=chunk, progress=False, log_every=5
        )  # fmt: skip
        assert looped.history[-1]["skipped"] == 3


@pytest.mark.parametrize("chunk", [1, 5])
def test_too_many_in_a_row_are_an_error_that_names_the_leaf(chunk):
    with pytest.raises(train.NonFiniteError, match=r"3 steps in a row were skipped, the last of them step 15: loss is not finite"):
        train.fit(GUARDED, start(), lambda t: batches(t, BAD), steps=20, skips=3, chunk=chunk, progress=False)


def test_back_to_the_last_sound_step_with_a_smaller_rate(tmp_path):
    """Data that is bad only at the full rate: what it is multiplied by is in the state."""
    seen = []

    def spoiled(step):
        seen.append(step)
        return batches(step, BAD if seen.count(12) < 3 else ())

    result = fit(run_in(tmp_path), step=GUARDED, batches=spoiled, skips=3, rewind=train.Rewind(factor=0.5))
    # Twice from step 10 on, each time slower.
    assert seen.count(10) == 3
    assert float(result.state.opt_state[1].factor) == 0.25
    assert [row["step"] for row in result.history] == list(range(1, 21))
    with pytest.raises(train.NonFiniteError):
        fit(
            run_in(tmp_path / "b"), step=GUARDED, batches=lambda t: batches(t, range(12, 30)), skips=3, rewind=train.Rewind(times=2)
        )  # fmt: skip
    # Before the first checkpoint there is nowhere to go back to, and the error is the one that counts.
    with pytest.raises(train.NonFiniteError, match="loss is not finite"):
        fit(run_in(tmp_path / "c"), step=GUARDED, batches=lambda t: batches(t, range(2, 9)), skips=2, rewind=train.Rewind())
    assert json.loads((tmp_path / "c" / "status.json").read_text())["state"] == "failed"
    # What a rewind needs is missed before anything is trained.
    plain = train.make_step(MODEL, LOSS, optax.adam(0.05), guard=True)
    for step, message in ((plain, r"train\.rate_scale"), (STEP, "guard=True")):
        with pytest.raises(ValueError, match=message):
            fit(run_in(tmp_path / "d"), step=step, batches=lambda t: pytest.fail("asked for data"), rewind=train.Rewind())
    with pytest.raises(ValueError, match=r"train\.Run"):
        fit(None, step=GUARDED, rewind=train.Rewind())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b["x"].__setitem__((2, 1), np.inf), r"the first batch: x holds inf at index \(2, 1\)"),
        (lambda b: b["y"].__setitem__(3, 7), r"the first batch: y holds the label 7 at index 3, .*\[0, 3\)"),
        (lambda b: b["y"].__setitem__(0, -1), r"the first batch: y holds the label -1 at index 0"),
        (lambda b: b.update(x=b["x"][:0], y=b["y"][:0]), r"the first batch: x has no rows"),
    ],
)
def test_the_first_batch_is_looked_at(spoil, message):
    bad = {name: array.copy() for name, array in batches(0).items()}
    spoil(bad)
    step = train.make_step(MODEL, lambda y, batch: pytest.fail("traced"), optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        train.fit(step, start(step.tx), lambda t: bad, steps=2, progress=False)
    weighted = {**bad, "weight": np.zeros(len(bad["x"]), np.float32)}
    if len(bad["x"]):
        train.fit(train.make_step(MODEL, LOSS, optax.sgd(0.1)), start(step.tx), lambda t: weighted, steps=1, progress=False)


def test_an_interrupt_of_one_of_several_processes_is_told_to_all(monkeypatch):
    """As SIGTERM, which JAX's preemption service hears; a second one, later, ends the process."""
    sent, raised, now, before = [], [], [100.0], signal.getsignal(signal.SIGINT)
    asked = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "kill", lambda *given: sent.append(given))
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with signals.Stopping(listens=True):
        assert signal.getsignal(signal.SIGTERM) is asked
        signal.raise_signal(signal.SIGINT)
        assert sent == [(os.getpid(), signal.SIGTERM)]
        # As mpirun and a terminal may both send one.
        now[0] += 0.5
        signal.raise_signal(signal.SIGINT)
        now[0] += 1
        with monkeypatch.context() as patched:
            patched.setattr(signal, "raise_signal", raised.append)
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)
        assert (raised, signal.getsignal(signal.SIGINT), len(sent)) == ([signal.SIGINT], signal.SIG_DFL, 1)
    assert signal.getsignal(signal.SIGINT) is before
    with signals.Stopping(listens=False):
        assert signal.getsignal(signal.SIGINT) is before


PROGRAM = """
import sys, time
import jax, numpy as np
from jaxopt_lab import train

def step(state, batch):
    return state._replace(params=state.params + batch["x"], step=state.step + 1), {"sum": state.params}

def batches(t):
    time.sleep(0.02)
    return {"x": np.full(1, t, np.float32)}

state = train.State(jax.numpy.zeros(1), {}, (), jax.numpy.int32(0), jax.random.key(0))
run = train.Run(sys.argv[1], save_every=1000, resume=True)
print("ready", flush=True)
train.fit(step, state, batches, steps=100_000, run=run, chunk=1, log_every=10)
"""


def test_signals_save_and_end_with_the_documented_code(tmp_path):
    """Two starts: one is asked to end by SIGTERM, the other by SIGINT and then, while it would be saving, once more."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}

    def started():
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        assert process.stdout.readline() == "ready\n"
        for line in process.stderr:
            if line.startswith("step"):
                return process
        raise AssertionError("it ended before its first step")

    def status():
        return json.loads((tmp_path / "status.json").read_text())

    process = started()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "SIGTERM: saving at the next step" in said
    saved = status()
    assert saved["state"] == "stopped"
    with Checkpoints(tmp_path / "checkpoints") as kept:
        assert kept.latest() == saved["step"] > 0
        params = kept.restore(saved["step"], part="params")
    np.testing.assert_array_equal(params, [sum(range(saved["step"]))])

    process = started()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert status()["step"] > saved["step"]
