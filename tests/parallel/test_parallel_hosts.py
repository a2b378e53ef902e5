"""Several processes: what the environment says, whose rows are whose, and a run of two that loses one and ends the same.

This file is also the program of that run: `python test_parallel_hosts.py DIRECTORY dies`.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import data, nets, supervise, train
from jaxopt_lab.parallel import hosts
from jaxopt_lab.parallel.detection import Plan, detect
from jaxopt_lab.parallel.rows import split_rows
from jaxopt_lab.schedules import piecewise_batch

STEPS, DIES_AT = 20, 9
RNG = np.random.default_rng(0)
WEIGHTS = {"hidden": RNG.standard_normal((5, 8), dtype=np.float32), "out": RNG.standard_normal((8, 3), dtype=np.float32)}
ARRAYS = {"x": RNG.standard_normal((31, 5), dtype=np.float32), "y": RNG.integers(0, 3, 31).astype(np.int32)}
PLAIN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def perceptron(params, x, *, train, key):
    hidden = jax.nn.relu(x @ params["hidden"])
    return (hidden * jax.random.bernoulli(key, 0.8, hidden.shape) if train else hidden) @ params["out"]


MODEL, TX = nets.from_functions(lambda key, x: WEIGHTS, perceptron), optax.sgd(0.1)


def batches():
    """Six rows on four devices: two are padding, both of the last process."""
    return data.batches(ARRAYS, 6, seed=3)


def trained(devices, own_batches, state, *, until=STEPS, after=lambda state: None):
    """Steps on a mesh of all devices; each process hands in its own rows."""
    mesh = Mesh(np.array(devices), ("data",))
    everywhere, by_row = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    loss = lambda logits, batch: optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])  # noqa: E731
    step = jax.jit(train.make_step(MODEL, loss, TX), in_shardings=(everywhere, by_row), out_shardings=everywhere)
    for k in range(int(state.step), until):
        state, _ = step(state, jax.tree.map(lambda v: jax.make_array_from_process_local_data(by_row, v), own_batches(k)))
        after(state)
    return state


def started():
    return train.init(MODEL, TX, jax.random.key(7), {"x": ARRAYS["x"][:2]})


def program(directory: Path, how: str) -> None:
    here = hosts.initialize(timeout=60, heartbeat=20)
    state, file, died = started(), directory / "newest.npz", directory / "died"
    if file.exists():
        kept = np.load(file)
        state = state._replace(params={name: kept[name] for name in WEIGHTS}, step=jax.numpy.int32(kept["step"]))

    (directory / f"start-{here.process}-{int(state.step)}-{os.getpid()}").write_text(repr(here))

    def after(state):
        hosts.alive()
        if hosts.is_first():
            # Not by lab.checkpoint, whose import takes each of the four processes a second.
            np.savez(directory / "next.npz", step=state.step, **state.params)
            os.replace(directory / "next.npz", file)
        elif int(state.step) == DIES_AT and not died.exists():
            died.touch()
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            # Not so that JAX would notice: its own watch goes on in threads.
            time.sleep(600)

    trained(jax.devices(), hosts.local(batches()), state, after=after)


@pytest.mark.parametrize(
    ("environ", "plan"),
    [
        ({}, None),
        (PLAIN, Plan("plain variables", "10.0.0.1:1234", 2, 1)),
        ({**PLAIN, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({"JAX_NUM_PROCESSES": "1", "TPU_ML_PLATFORM": "JAX", "SLURM_PROCID": "3"}, None),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "[fe80::1]:99"}, Plan("plain variables", "[fe80::1]:99", 2, 1)),
        (supervise.environment(1, 3, 1234), Plan("plain variables", "127.0.0.1:1234", 3, 1)),
        ({"TPU_ML_PLATFORM": "JAX"}, Plan("Cloud TPU", None, None, None)),
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_what_an_environment_says(environ, plan):
    assert detect(environ) == plan


SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1,2(x2),1",
}


@pytest.mark.parametrize(
    ("more", "coordinator", "devices"),
    [
        # 61440 + 70001 % 4096, as jax._src.clusters has it.
        ({}, "gpu007:61809", (1,)),
        ({"SLURM_STEP_NODELIST": "one,two[1-2]"}, "one:61809", (1,)),
        ({"SLURM_STEP_NODELIST": "a-b3"}, "a-b3:61809", (1,)),
        ({"JAX_COORDINATOR_PORT": "77"}, "gpu007:77", (1,)),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:88"}, "10.0.0.1:88", (1,)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "gpu007:61809", (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "3"}, "gpu007:61809", None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, "gpu007:61809", None),
        ({"JAX_LOCAL_DEVICE_IDS": "0"}, "gpu007:61809", None),
        # Alone on its machine a process has all that is there.
        ({"SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_PROCID": "0"}, "gpu007:61809", None),
    ],
)
def test_slurm(more, coordinator, devices):
    plan = detect({**SLURM, **more})
    assert (plan.how, plan.coordinator, plan.processes, plan.local_device_ids) == ("Slurm", coordinator, 6, devices)
    assert plan.process == int({**SLURM, **more}["SLURM_PROCID"])


def test_a_shell_within_an_allocation_of_slurm_is_alone():
    assert detect({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert detect({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}) is None


OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}


@pytest.mark.parametrize(
    ("more", "coordinator", "devices"),
    [
        # 1531576320 = 373920 * 4096, and 373920 % 4096 = 1184.
        ({"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}, "10.96.0.1:62624", None),
        ({"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:c0,2620:10d::2]:43370"}, "[fe80::b9b:c0]:62880", None),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "node1:88",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            "node1:88",
            (1,),
        ),
    ],
)
def test_open_mpi(more, coordinator, devices):
    assert detect({**OPEN_MPI, **more}) == Plan("Open MPI", coordinator, 4, 3, devices)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID=1 is set, and JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES is not"),
        ({**PLAIN, "JAX_NUM_PROCESSES": ""}, "and JAX_NUM_PROCESSES is not; set all three"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1"}, "nothing says how many processes"),
        ({**PLAIN, "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 must be at least 0 and below JAX_NUM_PROCESSES=2"),
        ({**PLAIN, "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1 must be at least 0"),
        ({**PLAIN, "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a whole number; it is 'two'"),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS is '10.0.0.1'"),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "fe80::1"}, '"host:port"'),
        (OPEN_MPI, "mpirun -x JAX_COORDINATOR_ADDRESS=host:port"),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2"}, "2 processes on this machine cannot share its 3 visible GPUs"),
    ],
)
def test_half_an_environment_is_an_error(environ, message):
    with pytest.raises(ValueError, match=message):
        detect(environ)


def test_too_late_and_out_of_range():
    assert hosts.initialize(environ={}) == hosts.Hosts(0, 1, jax.device_count(), jax.device_count(), "alone")
    with pytest.raises(RuntimeError, match=r"script's first call \(plain variables: process 1 of 2"):
        hosts.initialize(environ=PLAIN, timeout=5)
    with pytest.raises(ValueError, match="at least 1; got 0 and 30"):
        hosts.initialize(environ=PLAIN, timeout=0)


@pytest.mark.parametrize("rows", [1, 5, 8, 13, 16])
@pytest.mark.parametrize("devices", [(2, 2), (1, 3), (4,), (1, 1, 1)])
def test_all_shares_are_the_padded_batch(rows, devices):
    """Each process's rows after the other's: what `split_rows` makes of the whole for all devices at once."""
    arrays = {**ARRAYS, "weight": np.linspace(0.5, 1, 31, dtype=np.float32)} if rows == 5 else ARRAYS
    stream = data.batches(arrays, rows, seed=1)
    whole = {name: value.reshape(-1, *value.shape[2:]) for name, value in split_rows(stream(4), sum(devices)).items()}
    # Of a stream only these rows are gathered; of any other function they are cut out of the whole.
    for given in (stream, stream.__call__):
        shares = [hosts.Local(given, devices, process)(4) for process in range(len(devices))]
        assert [len(each["x"]) for each in shares] == [len(whole["x"]) // sum(devices) * count for count in devices]
        for name, value in whole.items():
            np.testing.assert_array_equal(np.concatenate([each[name] for each in shares]), value)
        assert all(set(each) == set(whole) for each in shares)


class Stacked:
    """Batches of one's own that come in stacks."""

    def __init__(self, stream):
        self.stream = stream

    def __call__(self, step):
        return self.stream(step)

    def stack(self, step, count):
        return self.stream.stack(step, count)


@pytest.mark.parametrize("size", [6, None, piecewise_batch([5, 9], [3])], ids=["fixed", "whole", "plan"])
@pytest.mark.parametrize("wrap", [Stacked, lambda stream: stream], ids=["own", "stream"])
def test_stacks_are_those_of_the_steps(size, wrap):
    for process in range(2):
        own = hosts._Stacking(wrap(data.batches(ARRAYS, size, seed=1)), (2, 2), process)
        stacked = own.stack(1, 4)
        # The plan has two steps of five left; a stack ends where the size changes.
        assert len(stacked["x"]) == (2 if callable(size) else 4)
        for k in range(len(stacked["x"])):
            for name, value in own(1 + k).items():
                np.testing.assert_array_equal(stacked[name][k], value)


def test_a_batch_of_no_rows_here():
    own = hosts.Local(data.batches(ARRAYS, 3, seed=1), (2, 2), 1)(0)
    assert own["weight"].tolist() == [1.0, 0.0]
    assert hosts.Local(data.batches(ARRAYS, 1, seed=1), (2, 2), 1)(0)["weight"].tolist() == [0.0, 0.0]


def test_rows_of_a_stream():
    stream = data.batches(ARRAYS, 7, seed=2)
    np.testing.assert_array_equal(stream.rows(9, [6, 0, 0])["x"], stream(9)["x"][[6, 0, 0]])
    with pytest.raises(ValueError, match="rows -1 to 7 were asked for, and the batch of step 2 has 7"):
        stream.rows(2, [-1, 7])


def test_who_does_not_come_is_named(tmp_path):
    """The coordinator never started: an error within the time allowed, that says where it was looked for."""
    environ = {**os.environ, **PLAIN, "JAX_COORDINATOR_ADDRESS": "127.0.0.1:9"}
    code = "from jaxopt_lab.parallel import hosts; hosts.initialize(timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "TimeoutError: plain variables: process 1 of 2: not all processes were at the coordinator at 127.0.0.1:9 within 1 s" in (
        done.stderr
    )


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(done, seconds=20.0):
    """Waits for something that must come to pass."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"still not after {seconds} s"
        time.sleep(0.02)


# Whoever waits for the one that hangs falls silent at nearly the same time: both are told.
SILENT = r"process (0|1) gave no sign of life for \d+ s(, | \()process (?!\1)[01] "


@pytest.mark.parametrize(
    ("how", "options", "told"),
    [
        pytest.param("dies", (), "process 1 was killed by SIGKILL", id="dies"),
        pytest.param("hangs", ("--stalled", "10"), SILENT, id="hangs", marks=pytest.mark.slow),
    ],
)
def test_a_run_of_two_processes_that_loses_one_ends_as_that_of_one(tmp_path, how, options, told):
    """Twenty steps on four devices; process 1 is killed, or hangs, after nine, and both go on from what process 0 has kept."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jaxopt_lab.supervise", "--processes", "2", "--restarts", "1", "--delay", "0", "--grace", "1"),
            *(*options, "--", sys.executable, __file__, str(tmp_path), how),
        ],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(told, done.stderr), done.stderr
    assert "restart 1 of 1" in done.stderr
    starts = sorted(tmp_path.glob("start-*"))
    begun = [tuple(map(int, start.name.split("-")[1:3])) for start in starts]
    # Process 0 may have been ended before it had kept the last step.
    assert begun in [[(0, 0), (0, step), (1, 0), (1, step)] for step in (DIES_AT - 1, DIES_AT)]
    assert {start.read_text() for start in starts} == {
        f"Hosts(process={process}, processes=2, local_devices=2, devices=4, how='plain variables')" for process in range(2)
    }
    assert not any(runs(int(start.name.split("-")[3])) for start in starts)
    kept = np.load(tmp_path / "newest.npz")
    one = trained(jax.devices()[:4], hosts.Local(batches(), (4,), 0), started())
    assert kept["step"] == STEPS == int(one.step)
    for name, weights in WEIGHTS.items():
        np.testing.assert_allclose(kept[name], one.params[name], atol=1e-5)
        assert abs(one.params[name] - weights).max() > 1e-2


def command(script: str, *options: str, processes: int = 2) -> list[str]:
    """The supervisor of a shell script, whose processes must end within its time whatever it does."""
    start = [sys.executable, "-m", "jaxopt_lab.supervise", "--processes", str(processes), "--delay", "0.05", *options]
    return [*start, "--", "/bin/sh", "-c", script]


def supervised(directory: Path, script: str, *options: str, processes: int = 2) -> tuple[int, str, list[str]]:
    """The code, what was said, and the lines of the file `log`."""
    done = subprocess.run(
        command(script, *options, processes=processes), cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )
    log = directory / "log"
    return done.returncode, done.stderr, log.read_text().split("\n")[:-1] if log.exists() else []


@pytest.fixture(autouse=True)
def _found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(supervise.__file__).parents[1]))


NOTE = "echo $JAX_PROCESS_ID $JAX_COORDINATOR_ADDRESS >> log; "
FIRST = '[ "$JAX_PROCESS_ID" = 0 ]'
ONCE = "mkdir once 2>/dev/null"


def test_wrong_arguments_are_not_tried_again(tmp_path):
    """Process 1 would sleep for long: it is ended."""
    begin = time.monotonic()
    code, said, log = supervised(tmp_path, f"{NOTE} {FIRST} && exit 2; exec sleep 50")
    assert code == 2
    assert "process 0 ended with code 2: wrong arguments" in said
    assert len(log) <= 2
    assert time.monotonic() - begin < 20


def test_after_so_many_restarts_it_gives_up(tmp_path):
    code, said, log = supervised(tmp_path, f"{NOTE} {FIRST} && sleep 9; exit 3", "--restarts", "2", "--grace", "0")
    assert code == 3
    assert "given up after 2 restarts" in said
    # Process 1 was started three times, each time at a port of its own; the pause doubles.
    ports = [line.split(":")[1] for line in log if line.startswith("1 ")]
    assert len(ports) == len(set(ports)) == 3
    assert "in 0.05 s, restart 1 of 2" in said
    assert "in 0.1 s, restart 2 of 2" in said


@pytest.mark.parametrize(("ends", "expected"), [("kill -9 $$", 137), ("kill -6 $$", 134), ("exit 7", 7)])
def test_the_code_is_that_of_what_failed(tmp_path, ends, expected):
    assert supervised(tmp_path, ends, "--restarts", "0", processes=1)[0] == expected


def test_who_has_saved_is_started_again_without_counting(tmp_path):
    code, said, log = supervised(tmp_path, f"{NOTE} {ONCE} && exit 75; exit 0", "--restarts", "0", processes=1)
    assert code == 0
    assert "process 0 has saved and ended (code 75)" in said
    assert len(log) == 2


@pytest.mark.parametrize(("ends", "code", "saves"), [("exit 75", 0, True), ("exit 3", 3, False)])
def test_who_is_left_may_save_where_the_other_has(tmp_path, monkeypatch, ends, code, saves):
    """After a crash there is no time for it, none at all here: nothing can be saved without the one that is gone."""
    monkeypatch.setattr(supervise, "_BEREFT_S", 0.0)
    monkeypatch.chdir(tmp_path)
    slow = "trap 'sleep 0.2; touch saved; exit 75' TERM; touch ready; while :; do sleep 0.02; done"
    first = f"{FIRST} && {{ {slow}; }}; until [ -e ready ]; do sleep 0.02; done; touch over; {ends}"
    script = f"[ -e over ] && exit 0; {first}"
    assert supervise.supervise(["/bin/sh", "-c", script], processes=2, restarts=0, grace=20, delay=0) == code
    assert Path("saved").exists() == saves


@pytest.mark.parametrize(("window", "expected"), [("0.1", 0), ("30", 4)])
def test_progress_counts_restarts_anew(tmp_path, window, expected):
    """It fails three times after 0.2 s each, one restart allowed."""
    script = f"{NOTE} sleep 0.2; [ $(wc -l < log) -gt 3 ] && exit 0; exit 4"
    assert supervised(tmp_path, script, "--restarts", "1", "--window", window, processes=1)[0] == expected


def test_who_still_runs_long_after_another_has_ended_well_hangs(tmp_path):
    """Process 0 ends, process 1 waits for ever for it, at the first start; both end at the second."""
    ends = "until [ -e waits ]; do sleep 0.02; done; touch over; exit 0"
    script = f"{NOTE} [ -e over ] && exit 0; {FIRST} && {{ {ends}; }}; touch waits; exec sleep 50"
    code, said, log = supervised(tmp_path, script, "--restarts", "1", "--straggle", "0.3")
    assert code == 0
    told = r"supervise: process 1 still ran \d s after process 0 had ended with 0 after \d s; all start again in 0.05 s"
    assert re.search(told, said), said
    assert len(log) == 4
    # Time enough is left to who needs it, and to hang again and again is no progress, however long it takes.
    assert supervised(tmp_path, f"{FIRST} || sleep 0.3", "--restarts", "0", "--straggle", "20")[0] == 0
    hangs = f"{FIRST} || exec sleep 50"
    code, said, _ = supervised(tmp_path, hangs, "--restarts", "1", "--straggle", "0.5", "--window", "0.4")
    assert code == 124
    assert "given up after 1 restarts" in said


SIGN = 'touch "$JAXOPT_LAB_ALIVE"'


def test_who_gives_no_sign_of_life_any_more_hangs(tmp_path, monkeypatch, capfd):
    """Process 1 falls silent at the first start, and process 0 gives signs until it is ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    signs = f"while :; do {SIGN}; touch ready; sleep 0.05; done"
    # What comes before the first sign and after the last may take its time, and so may what gives signs as it goes.
    calm = f'sleep 1.7; for k in 1 2 3 4 5 6 7 8 9; do {SIGN}; sleep 0.2; done; rm "$JAXOPT_LAB_ALIVE"; sleep 1.7; exit 0'
    silent = f"until [ -e ready ]; do sleep 0.02; done; {SIGN}; touch over; exec sleep 50"
    script = f"{NOTE} [ -e over ] && {{ {calm}; }}; {FIRST} && {{ {signs}; }}; {silent}"
    begin = time.monotonic()
    assert supervise.supervise(["/bin/sh", "-c", script], processes=2, restarts=1, stalled=1.5, delay=0) == 0
    assert time.monotonic() - begin < 40
    said = capfd.readouterr().err
    assert re.search(r"process 1 gave no sign of life for \d s \(process 0 for \d s\) after \d s; all start again", said), said
    assert Path("log").read_text().count("\n") == 4
    assert {path.name for path in tmp_path.iterdir()} == {"log", "over", "ready"}, "the directory of signs is gone"


def test_signs_of_life(tmp_path, monkeypatch):
    file = tmp_path / "sign"
    monkeypatch.delenv("JAXOPT_LAB_ALIVE", raising=False)
    hosts.alive()
    monkeypatch.setenv("JAXOPT_LAB_ALIVE", str(file))
    for _ in range(2):
        hosts.alive()
        os.utime(file, (1, 1))
        hosts.alive()
        assert abs(file.stat().st_mtime - time.time()) < 60
        hosts.alive(last=True)
        assert not file.exists()
        hosts.alive(last=True)
    monkeypatch.setenv("JAXOPT_LAB_ALIVE", str(tmp_path / "gone" / "sign"))
    hosts.alive()


def test_fit_gives_signs_of_life_until_it_returns(tmp_path, monkeypatch):
    file, seen = tmp_path / "sign", []
    monkeypatch.setenv("JAXOPT_LAB_ALIVE", str(file))

    def given(step):
        seen.append(file.exists())
        file.unlink(missing_ok=True)
        time.sleep(0.15)
        return {"x": np.float32(step)}

    def step(state, batch):
        return state._replace(params=state.params + batch["x"], step=state.step + 1), {}

    def evaluate(state):
        seen.append(file.exists())
        return {}

    state = train.State(np.float32(0), {}, (), np.int32(0), jax.random.key(0))
    train.fit(step, state, given, steps=4, chunk=1, progress=False, evaluate=evaluate)
    assert seen == [False, True, True, True, True]
    assert not file.exists()


def test_what_a_process_started_is_ended_with_it(tmp_path):
    """Process 1 leaves a child behind when it is killed, and process 0 one when it is told to end."""
    script = f"sleep 50 & echo $! >> log; {FIRST} || {{ until [ $(wc -l < log) = 2 ]; do sleep 0.02; done; kill -9 $$; }}; wait"
    code, _, log = supervised(tmp_path, script, "--restarts", "0", "--grace", "1")
    assert code == 137
    assert len(log) == 2
    assert not any(runs(int(pid)) for pid in log)


def test_what_cannot_be_run():
    for program, expected in (("no-such-program", 127), (__file__, 126)):
        done = [sys.executable, "-m", "jaxopt_lab.supervise", "--processes", "1", "--", program]
        assert subprocess.run(done, capture_output=True, timeout=60, check=False).returncode == expected
    for wrong in (["--processes", "0", "--", "true"], ["--processes", "2"], ["--", "true"]):
        with pytest.raises(SystemExit) as stop:
            supervise.main(wrong)
        assert stop.value.code == 2


def test_gpus_are_shared_out_in_order():
    assert [supervise.environment(k, 2, 1, devices_each=2)["JAX_LOCAL_DEVICE_IDS"] for k in range(2)] == ["0,1", "2,3"]


SAVES = "trap 'exit 75' TERM; echo $$ >> log; while :; do sleep 0.05; done"
STUBBORN = "trap '' TERM; echo $$ >> log; while :; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("script", "signals", "grace", "expected"),
    [
        (SAVES, [signal.SIGTERM], "20", 75),
        (SAVES, [signal.SIGINT], "20", 75),
        (f"{FIRST} && {{ {SAVES}; }}; {STUBBORN}", [signal.SIGTERM], "0.3", 143),
        (STUBBORN, [signal.SIGTERM, signal.SIGTERM], "50", 143),
        (STUBBORN, [signal.SIGKILL], "50", -9),
    ],
    ids=["saved", "interrupted", "too_slow", "twice", "killed"],
)
def test_a_signal_to_the_supervisor(tmp_path, script, signals, grace, expected):
    """Passed on, waited for; nothing is left, not even where the supervisor is killed."""
    log, pids = tmp_path / "log", []
    with subprocess.Popen(command(script, "--grace", grace), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as started:
        try:
            until(lambda: log.exists() and log.read_text().count("\n") == 2)
            pids += map(int, log.read_text().split())
            started.send_signal(signals[0])
            for number in signals[1:]:
                # Two at once would be one.
                assert "a second signal kills it" in started.stderr.readline()
                started.send_signal(number)
            assert started.wait(20) == expected
            until(lambda: not any(runs(pid) for pid in pids), 5)
        finally:
            for pid in [started.pid, *pids]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    program(Path(sys.argv[1]), sys.argv[2])
