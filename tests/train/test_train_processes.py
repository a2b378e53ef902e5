"""The study `experiments/train.py` by two processes of two devices each: one is killed, or all are asked to end, and it goes on."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxopt_lab import cli

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "train.py"
SHORT = ["--epochs", "3", "--save-every", "10", "--fsdp"]


def started(out, *options):
    options = options or ("--restarts", "1")
    command = [sys.executable, "-m", "jaxopt_lab.supervise", "--processes", "2", "--delay", "0.1", *options, "--"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command += [sys.executable, str(STUDY), "--out", str(out), "--resume", *SHORT]
    return subprocess.Popen(command, env=environment, **pipes)


def verified(out):
    return max((int(path.parent.name) for path in out.glob("checkpoints/*/digests.json") if path.parent.name.isdigit()), default=0)


def wait_for(process, holds, seconds=120):
    until = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.02)


def children(process):
    """The process ids of the two, in order."""
    return sorted(int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The records of the same study by one process, on eight devices."""
    out = tmp_path_factory.mktemp("alone")
    spec = importlib.util.spec_from_file_location("train_study", STUDY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_study"] = module
    spec.loader.exec_module(module)
    assert cli.main(module.study, module.Config, ["--out", str(out), *SHORT]) == 0
    return records(out)


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(found, wanted):
    assert [record["step"] for record in found] == [record["step"] for record in wanted]
    # An image or two of 360, and nothing of a run that began anew or counted twice.
    found, wanted = ([record["accuracy"] for record in rows if "accuracy" in record] for rows in (found, wanted))
    np.testing.assert_allclose(found, wanted, atol=0.006)


@pytest.mark.slow
def test_one_of_two_is_killed_and_both_go_on_from_the_last_checkpoint(tmp_path, alone):
    process = started(tmp_path)
    wait_for(process, lambda: verified(tmp_path) >= 20)
    os.kill(children(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    same(records(tmp_path), alone)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"60", "69", "lock"}


@pytest.mark.slow
def test_an_interrupt_of_one_has_both_save_and_both_go_on(tmp_path, alone):
    """As Ctrl-C where nobody passes it on as SIGTERM; the supervisor takes it for a preemption, and starts both again."""
    process = started(tmp_path, "--restarts", "0")
    wait_for(process, lambda: verified(tmp_path) >= 10)
    os.kill(children(process)[1], signal.SIGINT)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "SIGINT: all processes save at one of the next steps" in said
    assert "has saved and ended (code 75)" in said
    same(records(tmp_path), alone)


@pytest.mark.slow
def test_asked_to_end_both_save_at_one_step(tmp_path, alone):
    process = started(tmp_path)
    wait_for(process, lambda: verified(tmp_path) >= 10)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 75, said
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "stopped"
    assert verified(tmp_path) == status["step"] < 69
    again = started(tmp_path)
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    same(records(tmp_path), alone)
