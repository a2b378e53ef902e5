"""Trainings that are killed, in short: `scripts/torture.py` does the same a hundred times, and over all kinds and devices."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "torture.py"


@pytest.fixture(scope="module")
def torture():
    spec = importlib.util.spec_from_file_location("torture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("way", ["pmap", "shard"])
@pytest.mark.parametrize("kind", ["dense", "sparsify"])
def test_killed_after_17_steps_and_resumed_it_ends_on_the_same_bits(torture, kind, way):
    found = torture.bits(kind, way, 2)
    assert found["killed"]
    assert found["resumed_at"] == 17
    assert found["same_bits"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pmap", "shard"])
@pytest.mark.parametrize("kind", ["distill", "fake"])
def test_so_do_the_other_kinds(torture, kind, way):
    assert torture.bits(kind, way, 2)["same_bits"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "sparsify", "distill", "fake"])
@pytest.mark.parametrize("way", ["pmap", "shard"])
def test_the_same_on_one_device_and_on_several(torture, kind, way):
    assert torture.across(kind, way, [2, 8])["within"]


def test_killed_at_random_nothing_verified_is_lost(torture, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torture", "kills", "--kills", "2", "--kind", "dense", "--steps", "16", "--flips", "0.7"])
    with pytest.raises(SystemExit) as stop:
        torture.main()
    row = json.loads(capsys.readouterr().out)
    assert row["faults"] == []
    assert not stop.value.code
    assert row["sigkill"] + row["sigterm"] + row["disk_full"] == 2
    assert row["starts"] == 2 + row["runs"]


@pytest.mark.parametrize("leave", [0, 70_000])
def test_a_disk_that_is_full(torture, tmp_path, capsys, leave):
    with torture.small_disk(tmp_path, "auto") as disk:
        if disk is None:
            assert "no small file system could be mounted" in capsys.readouterr().err
            return
        (disk / "there").write_bytes(b"x" * 4096)
        ballast = torture.fill(disk, leave)
        with pytest.raises(OSError, match="No space left on device"):
            (disk / "file").write_bytes(b"x" * (leave + 1))
        (disk / "file").write_bytes(b"x" * (leave - leave % 4096))
        ballast.unlink()
        (disk / "file").write_bytes(b"x" * (leave + 1))
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_file_system_that_may_not_be_mounted_is_told(torture, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torture, "mount", lambda disk: "must be superuser")
    for wanted, said in (("auto", "(must be superuser): no file may grow past a size instead"), ("limit", "")):
        (tmp_path / wanted).mkdir()
        with torture.small_disk(tmp_path / wanted, wanted) as disk:
            assert disk is None
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="must be superuser; be root, or choose --disk limit"):
        torture.small_disk(tmp_path, "tmpfs").__enter__()


def test_the_torture_would_notice(torture, tmp_path):
    """A state that is one bit off, a step that is damaged, and what is left behind are all told."""
    import jax.numpy as jnp

    from jaxopt_lab.checkpoint import Checkpoints

    one, other = jnp.float32([1.0, 2.0]), jnp.float32([1.0, jnp.nextafter(jnp.float32(2), jnp.float32(3))])
    assert torture.digest({"w": one}) != torture.digest({"w": other})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(4, {"w": one})
    assert torture.verified(tmp_path) == [4]
    made = object.__new__(torture.Torture)
    made.faults, made.losses = [], "{}\n"
    torture.flip(tmp_path / "checkpoints" / "4", torture.random.Random(0))
    made.check_steps(tmp_path, set())
    assert len(made.faults) == 1
    assert made.faults[0].startswith("step 4 counts as verified: ")
    (tmp_path / "metrics.jsonl").write_text("{}\n{}\n")
    (tmp_path / "checkpoints" / "8.tmp").mkdir()
    made.check_end(tmp_path)
    assert made.faults[1:] == ["the losses are not those of the unbroken run", "left behind: 8.tmp"]
