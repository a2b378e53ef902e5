"""Whatever befalls a checkpoint, or the process that writes it, is found and named, and the newest sound step is restored."""

import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.checkpoint import Best, Checkpoints, Damaged, Lock, Locked, SaveFailed, digests, folder, load_tree, save_tree
from jaxopt_lab.core import files

# Every kind of file that a step has.
KINDS = (
    "digests.json",
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "manifest/metadata",
    "manifest/commit_success.txt",
    "tree/_METADATA",
    "tree/_sharding",
    "tree/commit_success.txt",
    "tree/manifest.ocdbt",
    "tree/array_metadatas/process_0",
    "tree/d/*",
    "tree/ocdbt.process_0/manifest.ocdbt",
    "tree/ocdbt.process_0/d/*",
)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    chance = random.Random(path.name)
    body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    path.write_bytes(body)


def link(path: Path) -> None:
    """The same content by way of a link, which could as well lead to a secret."""
    outside = Path(tempfile.mkdtemp()) / path.name
    shutil.move(path, outside)
    path.symlink_to(outside)


FAULTS = {"truncated": truncate, "deleted": Path.unlink, "a bit flipped": flip, "a link": link}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two steps, with an array in eight parts."""
    directory = tmp_path_factory.mktemp("run")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    parts = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            tree = {
                "a": {"kernel": jnp.arange(2000.0) * step, "many": [jnp.full(5, i) for i in range(3)]},
                "n": step,
                "parts": parts,
            }
            checkpoints.save(step, tree, metrics={"loss": 1.0 / step})
    return directory


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_every_kind_of_file_is_in_the_table(saved):
    found = {path for path in (saved / "2").rglob("*") if path.is_file()}
    assert {path for kind in KINDS for path in (saved / "2").glob(kind)} == found


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_found_and_the_step_before_restored(run, kind, fault):
    victim = sorted((run / "2").glob(kind))[-1]
    FAULTS[fault](victim)
    with Checkpoints(run) as checkpoints:
        if (kind, fault) == ("digests.json", "deleted"):
            # Without digests it never was a step; the next writer sets it aside.
            with pytest.raises(FileNotFoundError, match=r"no checkpoint 2 in .*; there are: 1$"):
                checkpoints.restore(2)
            assert checkpoints.restore_latest()[0] == 1
            checkpoints.save(2, {"n": 2})
            checkpoints.wait()
            assert checkpoints.steps() == (1, 2)
            assert [(q.step, q.reason.split(":")[0]) for q in checkpoints.quarantined()] == [(2, "it has no digests.json")]
            return
        for call in (checkpoints.verify, checkpoints.restore):
            with pytest.raises(Damaged, match=r"checkpoint 2 in .* is damaged: ") as caught:
                call(2)
            assert victim.relative_to(run / "2").as_posix() in str(caught.value)
            assert "\n" not in str(caught.value)
        checkpoints.verify(1)
        with pytest.warns(UserWarning, match=r"checkpoint 2 in .* is damaged: .*; set aside in .*; restored checkpoint 1 instead"):
            step, tree = checkpoints.restore_latest()
        assert (step, tree["n"]) == (1, 1)
        np.testing.assert_array_equal(tree["a"]["kernel"], np.arange(2000.0))
        assert checkpoints.steps() == (1,)
        ((number, path, reason),) = checkpoints.quarantined()
        assert (number, path) == (2, run / "quarantine" / "2")
        assert (path / "reason.txt").read_text() == f"{reason}\n"
        assert (path / "step").is_dir()
    assert not any(name.name.startswith("2") for name in run.iterdir())


def test_what_does_not_belong_there_is_refused(run):
    def pipe(path):
        os.mkfifo(path)

    def foreign(path):
        path.write_bytes(b"x")

    for make, message in ((pipe, "tree/odd is neither a file nor a folder"), (foreign, "tree/odd is not one of its files")):
        make(run / "2" / "tree" / "odd")
        with Checkpoints(run) as checkpoints, pytest.raises(Damaged, match=message):
            checkpoints.restore(2)
        (run / "2" / "tree" / "odd").unlink()
    # A step that is a link to another directory is no step at all.
    shutil.move(run / "2", run.parent / "elsewhere")
    (run / "2").symlink_to(run.parent / "elsewhere")
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps() == (1,)
        with pytest.raises(ValueError, match=r"checkpoint 2 is in .*run already"):
            checkpoints.save(2, {"a": 1})


def test_none_is_sound(run):
    for step in "12":
        flip(run / step / "tree" / "_METADATA")
    with Checkpoints(run) as checkpoints:
        with pytest.raises(
            FileNotFoundError, match=r"has no sound checkpoint left: checkpoint 2 .* set aside in .*; checkpoint 1 "
        ):
            checkpoints.restore_latest()
        with pytest.raises(FileNotFoundError, match=r"has no checkpoint yet"):
            checkpoints.restore_latest()
        assert [entry.step for entry in checkpoints.quarantined()] == [1, 2]
        # The numbers are free again, and a second one that is damaged lies beside the first.
        checkpoints.save(2, {"a": 1})
        checkpoints.wait()
        flip(run / "2" / "manifest" / "metadata")
        with pytest.raises(FileNotFoundError, match=r"quarantine/2\.0$"):
            checkpoints.restore_latest()
        assert [entry.path.name for entry in checkpoints.quarantined()] == ["1", "2", "2.0"]


def test_a_reader_leaves_what_another_writes_in_its_place(run):
    flip(run / "2" / "tree" / "_METADATA")
    with Lock(run / "lock"), Checkpoints(run) as reader:
        with pytest.warns(UserWarning, match=rf"left where it is: .* has a writer already: process {os.getpid()} on "):
            assert reader.restore_latest()[0] == 1
        assert reader.steps() == (1, 2)


def reforged(step: Path, change) -> None:
    """A manifest that says something else, with digests to match."""
    file = step / "manifest" / "metadata"
    structure = json.loads(file.read_text())
    changed = change(structure)
    file.write_bytes(changed if isinstance(changed, bytes) else json.dumps(structure).encode())
    (step / digests.NAME).unlink()
    digests.seal(step, {})


@pytest.mark.parametrize(
    ("kind", "message", "change"),
    [
        (Damaged, r"is damaged: it claims \d{13} bytes of arrays in", lambda s: s["arrays"][0].update(shape=[2**40])),
        (Damaged, r"is damaged: it claims 4\d{60,} bytes", lambda s: s["arrays"][0].update(shape=[10**30, 10**30])),
        (Damaged, r"kernel: expected float32\(4000,\), found float32\(2000,\)", lambda s: s["arrays"][0].update(shape=[4000])),
        (Damaged, r"kernel: expected int32\(2000,\), found float32", lambda s: s["arrays"][0].update(dtype="int32")),
        (Damaged, r"a/kernel has the shape \[-5\]", lambda s: s["arrays"][0].update(shape=[-5])),
        (Damaged, r"a/kernel has the dtype 'object'", lambda s: s["arrays"][0].update(dtype="object")),
        (
            TypeError,
            r"names subprocess:Popen, a class that is not",
            lambda s: s.update(tree={"namedtuple": "subprocess:Popen", "fields": {}}),
        ),
        (
            ValueError,
            r"manifest: .*, line 1, column 9: the key 'a' is there twice",
            lambda s: b'{"a":1, "a": 2}',
        ),
        (ValueError, r"has no readable manifest: .*, line 1, column 7: NaN is no finite number", lambda s: b'{"a": NaN}'),
        (ValueError, r"has no readable manifest: .*, byte 2: 0xff is not UTF-8", lambda s: b'{"\xff": 1}'),
    ],
)
def test_a_forged_manifest_is_refused(run, kind, message, change):
    reforged(run / "2", change)
    with Checkpoints(run) as checkpoints, pytest.raises(kind, match=message) as caught:
        checkpoints.restore(2)
    assert "\n" not in str(caught.value)


def test_what_unpacks_to_more_than_it_may_is_not_unpacked(tmp_path):
    zeros = jnp.zeros(2**22)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": zeros})
        checkpoints.save(2, {"a": jnp.zeros(2)})
    size = sum(path.stat().st_size for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert size < zeros.nbytes / 1000
    with Checkpoints(tmp_path, max_bytes=2**20) as small:
        message = (
            r"checkpoint 1 in .* claims 16777216 bytes of arrays, and no more than 1048576 are read: give max_bytes=, or like="
        )
        for call in (lambda: small.restore(1), lambda: small.restore(1, like={"a": zeros})):
            with pytest.raises(ValueError, match=message):
                call()
    # The same arrays under a manifest that claims next to nothing.
    shutil.rmtree(tmp_path / "2" / "tree")
    shutil.copytree(tmp_path / "1" / "tree", tmp_path / "2" / "tree")
    reforged(tmp_path / "2", lambda s: None)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(Damaged, match=r"a: expected float32\(2,\), found float32\(4194304,\)"):
            checkpoints.restore(2)
        with warnings.catch_warnings(action="ignore"):
            assert checkpoints.restore_latest()[0] == 1
    for keep in (0, -1):
        with pytest.raises(ValueError, match=r"max_bytes=.*: at least 1"):
            Checkpoints(tmp_path, max_bytes=keep)


def test_two_writers_are_one_too_many(tmp_path):
    with Checkpoints(tmp_path) as first, Checkpoints(tmp_path) as second:
        first.save(1, {"a": 1})
        owner = rf"{tmp_path} has a writer already: process {os.getpid()} on {socket.gethostname()}, since 20"
        with pytest.raises(Locked, match=owner) as caught:
            second.save(2, {"a": 1})
        assert caught.value.owner["pid"] == os.getpid()
        first.wait()
        assert second.restore(1) == {"a": 1}, "reading needs no lock"
        first.close()
        second.save(2, {"a": 2})
    assert folder.steps(tmp_path) == (1, 2)
    # A child that runs on holds nothing.
    lock = Lock(tmp_path / "lock")
    with lock, subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        with pytest.raises(RuntimeError, match=r"lock is locked by this very lock already"):
            lock.acquire()
        lock.release()
        with Lock(tmp_path / "lock") as again:
            assert again.held
            os.replace(tmp_path / "lock", tmp_path / "moved")
            assert not again.held
        child.kill()
    (tmp_path / "moved").write_text("{}")
    with Lock(tmp_path / "moved"):
        (tmp_path / "moved").write_text("no JSON")
        with pytest.raises(Locked, match=r"has a writer already: a process that does not say who it is"):
            Lock(tmp_path / "moved").acquire()


def test_two_directories_are_written_at_the_same_time(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    parts = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
    with Checkpoints(tmp_path / "a") as a, Checkpoints(tmp_path / "b") as b, Checkpoints(tmp_path / "c") as c:
        for step in range(4):
            a.save(step, {"n": jnp.full(3, step)})
            b.save(step, {"n": jnp.full(3, -step), "parts": parts})
            c.save(step, {"n": step, "parts": parts})
            save_tree(tmp_path / "tree", {"n": step}, overwrite=True)
        assert [int(kept.restore_latest()[1]["n"].sum()) for kept in (a, b)] == [9, -9]
        assert c.restore_latest()[1]["n"] == load_tree(tmp_path / "tree")["n"] == 3


def test_a_step_that_cannot_be_written_is_loud_and_is_none(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = r"checkpoint 2 could not be saved in .*, and is none: OSError: .*No space left on device$"
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"a": jnp.ones(3)})
    checkpoints.wait()
    with monkeypatch.context() as patched:
        patched.setattr(digests, "seal", full)
        for notice in (checkpoints.wait, lambda: checkpoints.save(3, {"a": 1}), lambda: checkpoints.restore(1)):
            checkpoints.save(2, {"a": jnp.zeros(3)})
            with pytest.raises(SaveFailed, match=message) as caught:
                notice()
            assert isinstance(caught.value.__cause__, OSError)
            checkpoints.wait()
            assert checkpoints.steps() == (1,), "the last good step stays, and it is the last"
        checkpoints.save(2, {"a": jnp.zeros(3)})
        with pytest.raises(SaveFailed, match=message):
            checkpoints.close()
    with Checkpoints(tmp_path) as again:
        again.save(2, {"a": jnp.zeros(3)})
        again.wait()
        assert again.steps() == (1, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "lock"}


def test_a_directory_that_is_gone_is_noticed(tmp_path, monkeypatch):
    begun, gone, seal = threading.Event(), threading.Event(), digests.seal

    def later(*given):
        begun.set()
        gone.wait(60)
        seal(*given)

    monkeypatch.setattr(digests, "seal", later)
    checkpoints = Checkpoints(tmp_path / "run", timeout=0.2)
    checkpoints.save(1, {"a": 1})
    assert begun.wait(60)
    with pytest.raises(TimeoutError, match=r"checkpoint 1 in .*run is still being written after 0.2 s; is the disk there\?"):
        checkpoints.wait()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    gone.set()
    checkpoints._writer._thread.join(60)
    with pytest.raises(SaveFailed, match=r"checkpoint 1 could not be saved in .*: (FileNotFoundError|Damaged|OSError): "):
        checkpoints.wait()
    with pytest.raises(FileNotFoundError, match=r"run is no longer the directory that was locked: it was removed or replaced"):
        checkpoints.save(2, {"a": 1})
    checkpoints.close()
    assert not (tmp_path / "run" / "1").exists()
    assert folder.steps(tmp_path / "moved") == ()
    # A file where the directory should be.
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot keep checkpoints in .*file: File exists"):
        Checkpoints(tmp_path / "file")


def test_the_best_stay_beside_the_newest(tmp_path, monkeypatch):
    best = Best("loss", maximise=False, keep=2)
    with Checkpoints(tmp_path, keep=1, best=best) as checkpoints:
        assert checkpoints.best() is None
        stay = []
        for step, loss in enumerate([3.0, float("nan"), jnp.float32(1.0), None, 2.0, float("inf"), 5.0], start=1):
            checkpoints.save(step, {"a": step}, metrics=None if loss is None else {"loss": loss})
            checkpoints.wait()
            stay.append(checkpoints.steps())
        assert stay == [(1,), (1, 2), (1, 3), (1, 3, 4), (3, 5), (3, 5, 6), (3, 5, 7)]
        assert checkpoints.best() == 3
        # What cannot be deleted is said, and is no step any more; the new one is.
        with monkeypatch.context() as patched:
            patched.setattr(
                shutil, "rmtree", lambda *given, **more: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
            )
            checkpoints.save(8, {"a": 8})
            with pytest.raises(
                SaveFailed, match=r"checkpoint 8 is saved in .*, but an older one could not be deleted: PermissionError"
            ):
                checkpoints.wait()
        assert checkpoints.steps() == (3, 5, 8)
    assert (tmp_path / "7.deleting-0").is_dir()
    with Checkpoints(tmp_path, best=Best("loss", maximise=True)) as checkpoints:
        assert checkpoints.best() == 5
        checkpoints.save(9, {"a": 9}, metrics={"loss": 2.0})
        checkpoints.wait()
        assert checkpoints.best() == 5, "of equals the earlier"
        assert not (tmp_path / "7.deleting-0").exists()
        flip(tmp_path / "5" / digests.NAME)
        assert checkpoints.best() == 9
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=r"no best checkpoint without a rule"):
        checkpoints.best()
    for given, message in (({"metric": ""}, r"needs the name of a metric"), ({"metric": "a", "keep": 0}, r"Best\(keep=0\)")):
        with pytest.raises(ValueError, match=message):
            Best(**given, maximise=True)


KILLED = """
    import os, pathlib, random, sys, time
    import numpy as np
    import orbax.checkpoint
    from jaxopt_lab.checkpoint import Checkpoints

    def work(directory):
        checkpoints, forked = Checkpoints(directory, keep=3), False
        step = checkpoints.latest() or 0
        if step:
            found, tree = checkpoints.restore_latest()
            assert found == step and tree["n"] == step and (np.asarray(tree["a"]) == step).all(), (found, step)
        os.write(1, f"from {step}\\n".encode())
        for step in range(step + 1, step + 1000):
            checkpoints.save(step, {"a": np.full(1000, step, np.float32), "n": step})
            if not forked and os.fork() == 0:
                os.closerange(0, 3)
                time.sleep(5)  # It outlives its parent, and must not keep the lock.
                os._exit(0)
            forked = True

    chance = random.Random(0)
    for _ in range(int(sys.argv[2])):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(read)
                os.dup2(write, 1)
                os.close(write)
                work(sys.argv[1])
            except BaseException as error:
                os.write(1, f"failed {error!r}".replace("\\n", " ").encode())
            os._exit(1)
        os.close(write)
        with os.fdopen(read) as said:
            print(said.readline(), end="")
            until = time.monotonic() + 60
            while not any(pathlib.Path(sys.argv[1]).glob("*/digests.json")) and time.monotonic() < until:
                time.sleep(0.01)  # On a machine that is busy the first step takes longer than any of the moments below.
            time.sleep(chance.uniform(0.05, 0.5))
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            print(said.read(), end="")
"""


def test_kills_at_random_times_lose_nothing_that_was_verified(tmp_path):
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), str(tmp_path), "6"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root, "JAX_NUM_CPU_DEVICES": "1"},
    )
    started = [int(line.removeprefix("from ")) for line in done.stdout.splitlines() if line.startswith("from ")]
    assert len(started) == len(done.stdout.splitlines()) == 6, done.stdout + done.stderr
    assert started == sorted(started), "no start is behind the one before it"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() >= started[-1] > 0
        for step in checkpoints.steps():
            checkpoints.verify(step)
            assert load_tree(tmp_path / str(step))["n"] == step
        checkpoints.save(10_000, {"n": 10_000})
    odd = {path.name for path in tmp_path.iterdir() if not path.name.isdigit()}
    assert odd == {"lock"}, "and what the last one left is cleared"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"a": [1, {"b": 1, "c": 2, "b": 3}]}', r", line 1, column 28: the key 'b' is there twice"),
        (b'{"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}],\n  "\\u0061": 2}', r", line 2, column 3: the key 'a' is there twice"),
        (b'{"a": "NaN",\n "b": [-Infinity]}', r", line 2, column 8: -Infinity is no finite number"),
        (b'{"a": 1e999}', r", line 1, column 7: 1e999 is no finite number"),
        (b'{"a": 1,}', r", line 1, column \d: "),
        (b'{"a": 1} x', r", line 1, column 10: Extra data"),
        (b"", r", line 1, column 1: Expecting value"),
        (b'{"\x80": 1}', r", byte 2: 0x80 is not UTF-8"),
        (b"\xef\xbb\xbf{}", r", line 1, column 1: Unexpected UTF-8 BOM"),
        (b"[" * 200_000, r"is nested too deep"),
        (b"1" + b"0" * 5000, r"holds a number that cannot be read"),
        (b'"' + b"x" * 2**21 + b'"', r"is longer than the 1048576 bytes that are read of it"),
    ],
)
def test_json_that_has_two_readings_is_refused_where_it_stands(tmp_path, body, message):
    path = tmp_path / "config.json"
    path.write_bytes(body)
    with pytest.raises(ValueError, match=message) as caught:
        files.read_json(path, max_bytes=2**20)
    assert str(caught.value).startswith(str(path))
    path.write_bytes(b'{"a": [{"b": 1e-400}, {"b": -2.5e3}], "c": {"b": "NaN \\" ,"}, "d": {}}')
    assert files.read_json(path) == {"a": [{"b": 0.0}, {"b": -2500.0}], "c": {"b": 'NaN " ,'}, "d": {}}


def test_names_lead_nowhere_else(tmp_path):
    for name in ("../evil", "..", ".", "", "/etc", "a/b", "a\\b", "a..b", "a.", "-a", ".a", "a\n", "a\0", "é", "x" * 101, None, 3):
        with pytest.raises(ValueError, match=r"cannot be the name of a file"):
            files.inside(tmp_path, name)
    for name in ("a", "A-1_b.c", "0", "x" * 100):
        assert files.inside(tmp_path, name) == tmp_path / name
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(ValueError, match=r"link leads out of .*, to /etc"):
        files.inside(tmp_path, "link")
