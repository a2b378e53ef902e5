"""A directory of steps: saving in the background, restoring in a fresh process, and what is said when something is wrong."""

import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import compress
from jaxopt_lab.checkpoint import Checkpoints, Damaged, load_tree, save_tree, together

_ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}


def _command(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]


def _run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(_command(code, *arguments), capture_output=True, text=True, check=False, timeout=120, env=_ENVIRONMENT)


def test_steps_are_saved_restored_and_listed(tmp_path):
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.steps() == ()
        assert checkpoints.latest() is None
        with pytest.raises(FileNotFoundError, match=r"run has no checkpoint yet"):
            checkpoints.restore_latest()
        for step in (2, 30, np.int64(100)):
            checkpoints.save(step, {"a": jnp.full(3, step), "step": int(step)}, metadata={"step": int(step)})
        step, tree = checkpoints.restore_latest()
        assert (step, tree["step"], checkpoints.metadata(30)["step"]) == (100, 100, 30)
        np.testing.assert_array_equal(tree["a"], [100] * 3)
        assert checkpoints.steps() == (30, 100)
        checkpoints.verify(30)
        with pytest.raises(FileNotFoundError, match=r"no checkpoint 2 in .*run; there are: 30, 100"):
            checkpoints.restore(2)
        with pytest.raises(ValueError, match=r"checkpoint 30 is in .*run already"):
            checkpoints.save(30, {"a": 1})
        for bad in (-1, True, 1.0, "../evil"):
            with pytest.raises(ValueError, match=r"a checkpoint's step is a whole number from 0 up, not"):
                checkpoints.save(bad, {"a": 1})
        with pytest.raises(ValueError, match=r"metadata of checkpoint 101 is not JSON"):
            checkpoints.save(101, {"a": 1}, metadata={"loss": float("nan")})
        with pytest.raises(ValueError, match=r"metadata of checkpoint 101 is not JSON: a dict has two keys that JSON writes alike"):
            checkpoints.save(101, {"a": 1}, metadata={"loss": {1: 0.5, "1": 0.25}})
        with pytest.raises(TypeError, match=r"a is a builtins:set"):
            checkpoints.save(101, {"a": {1}})
    leftover = tmp_path / "run" / "40.orbax-checkpoint-tmp"
    leftover.mkdir()
    with Checkpoints(tmp_path / "run") as again:
        assert again.steps() == (30, 100)
        (tmp_path / "run" / "notes").mkdir()
        again.save(7, {"a": 1})
        again.wait()
        assert again.steps() == (7, 30, 100)
        assert not leftover.exists(), "what a killed run left half written is cleared"
    assert load_tree(tmp_path / "run" / "100")["step"] == 100


def test_arrays_may_be_donated_right_after_save(tmp_path):
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(100_000)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(3):
            checkpoints.save(step, {"x": x})
            for _ in range(5):
                x = advance(x)
        for step in range(3):
            np.testing.assert_array_equal(checkpoints.restore(step)["x"], np.full(100_000, 5.0 * step))


def test_sharded_arrays_come_back_whole(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    x = jax.device_put(jnp.arange(32.0).reshape(8, 4), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
    save_tree(tmp_path / "t", {"x": x})
    got = load_tree(tmp_path / "t")["x"]
    np.testing.assert_array_equal(got, x)
    assert len(got.sharding.device_set) == 1


def test_what_is_broken_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(4):
            checkpoints.save(step, {"a": {"kernel": jnp.arange(2000.0)}, "n": 1})
        checkpoints.wait()
        # The arrays of another model; a file that is gone; a manifest that is no JSON; and one that is whole.
        save_tree(tmp_path / "other", {"a": jnp.ones(4)})
        shutil.rmtree(tmp_path / "0" / "tree")
        shutil.move(tmp_path / "other" / "tree", tmp_path / "0" / "tree")
        for file in (tmp_path / "1" / "tree").rglob("d/*"):
            file.unlink()
        next((tmp_path / "2" / "manifest").iterdir()).write_text("{")
        for step in (0, 1, 2):
            for call in (checkpoints.verify, checkpoints.restore):
                with pytest.raises(Damaged, match=rf"checkpoint {step} in .* is damaged: (tree|manifest)/") as caught:
                    call(step)
                assert "\n" not in str(caught.value)
        checkpoints.verify(3)


def test_a_damaged_tree_is_named_in_one_line(tmp_path):
    def saved(name):
        save_tree(tmp_path / name, {"a": {"kernel": jnp.arange(2000.0)}, "n": 1})
        return tmp_path / name

    next((saved("torn") / "manifest").iterdir()).write_text("{")
    next((saved("foreign") / "manifest").iterdir()).write_text("[1]")
    next((saved("empty") / "manifest").iterdir()).unlink()
    shutil.rmtree(saved("bare") / "tree")
    for file in (saved("gone") / "tree").rglob("d/*"):
        file.unlink()
    for file in (saved("short") / "tree").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-100])
    for name, message in (
        ("torn", "has no readable manifest"),
        ("foreign", "has no readable manifest: it lists no arrays"),
        ("empty", "has no readable manifest"),
        ("bare", "has unreadable arrays"),
        ("gone", "has unreadable arrays"),
        ("short", "has unreadable arrays"),
    ):
        with pytest.raises(ValueError, match=f"{name} {message}") as caught:
            load_tree(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_a_directory_that_cannot_be_used_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot keep checkpoints in .*file/run: Not a directory"):
        Checkpoints(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match=r"keep=0: keep at least one"):
        Checkpoints(tmp_path, keep=0)


def test_an_error_in_the_background_surfaces_at_wait(tmp_path):
    code = """
        import resource, signal, sys
        import jax.numpy as jnp, numpy as np
        from jaxopt_lab.checkpoint import Checkpoints

        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, {"a": jnp.ones(3)})
        checkpoints.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        checkpoints.save(2, {"a": np.random.default_rng(0).random(100_000).astype(np.float32)})
        try:
            checkpoints.wait()
        except Exception as error:
            print("caught", type(error).__name__, checkpoints.steps(), checkpoints.latest())
        checkpoints.save(2, {"a": jnp.zeros(3)})
        checkpoints.close()
        print(checkpoints.steps())
    """
    done = _run(code, tmp_path)
    assert "caught SaveFailed" in done.stdout, done.stdout + done.stderr
    assert "(1,) 1\n(1, 2)\n" in done.stdout, done.stdout + done.stderr


STARTS_NO_THREAD_AT_EXIT = (3, 12) <= sys.version_info < (3, 12, 3)


def _left(checkpoints):
    checkpoints.__exit__(*sys.exc_info())


@pytest.mark.parametrize("leave", [Checkpoints.close, _left], ids=["close", "with"])
def test_who_leaves_by_an_error_asks_nobody(tmp_path, monkeypatch, leave):
    """It may be alone in it: to wait for the others would hold the error back."""
    asked = []
    monkeypatch.setattr(together, "failure", lambda name, own, timeout: asked.append(name))
    checkpoints = Checkpoints(tmp_path / "steps")
    checkpoints.save(1, {"w": jnp.ones(2)})

    def lost():
        try:
            raise KeyError("a batch")
        finally:
            leave(checkpoints)

    with pytest.raises(KeyError, match="a batch"):
        lost()
    assert asked == []
    with Checkpoints(tmp_path / "steps") as checkpoints:
        assert checkpoints.steps() == (1,)
        checkpoints.save(2, {"w": jnp.ones(2)})
    assert len(asked) == 1


def test_a_program_that_ends_without_waiting_loses_nothing_in_silence(tmp_path):
    """What is begun is saved all the same, and what cannot be written is told; where Python starts no thread so late, both are."""
    code = """
        import resource, signal, sys
        import jax.numpy as jnp, numpy as np
        from jaxopt_lab.checkpoint import Checkpoints

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        sound, too_large = Checkpoints(sys.argv[1]), Checkpoints(sys.argv[1] + "/other")
        sound.save(3, {"a": jnp.zeros(3)})
        too_large.save(4, {"a": np.random.default_rng(0).random(100_000).astype(np.float32)})
    """
    lost = f"checkpoint 4 could not be saved in {tmp_path}/other, and is none: "
    if STARTS_NO_THREAD_AT_EXIT:
        # Orbax's threads then wait for each other for up to twenty minutes: the program is ended once it has said all.
        also = f"checkpoint 3 could not be saved in {tmp_path}, and is none: RuntimeError: can't create new thread"
        with (
            (tmp_path / "said").open("w+") as said,
            subprocess.Popen(_command(code, tmp_path), stderr=said, env=_ENVIRONMENT) as run,
        ):
            until = time.monotonic() + 60
            while not (lost in (text := (tmp_path / "said").read_text()) and also in text):
                assert time.monotonic() < until, text
                time.sleep(0.05)
            run.kill()
        return
    done = _run(code, tmp_path)
    assert lost in done.stderr, done.stderr
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest()[0] == 3


def test_a_fresh_process_restores_leaves_and_states_and_runs_the_model(tmp_path):
    params = compress.quantize({"d": {"kernel": jax.random.normal(jax.random.key(0), (4, 3)), "bias": jnp.ones(3)}})
    tx = compress.optimizer(optax.adamw(0.1))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    y = jax.jit(compress.lift(lambda p, x: x @ p["d"]["kernel"] + p["d"]["bias"][None]))(params, x)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": params, "opt_state": tx.init(params), "x": x, "y": y, "key": jax.random.key(5)})
    code = """
        import sys
        import jaxopt_lab as lab
        import jax

        with lab.checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
            step, state = checkpoints.restore_latest()
        apply = jax.jit(lab.compress.lift(lambda p, x: x @ p["d"]["kernel"] + p["d"]["bias"][None]))
        kernel = state["params"]["d"]["kernel"]
        print(step, type(kernel).__name__, kernel.codes.dtype, type(state["opt_state"][0]).__name__, state["key"].dtype)
        print((apply(state["params"], state["x"]) == state["y"]).all())
    """
    done = _run(code, tmp_path)
    assert done.stdout.splitlines() == ["1 Quantized int8 ScaleByAdamState key<fry>", "True"], done.stdout + done.stderr
    assert done.stderr == "", "nothing is printed on the terminal of whoever saves and restores"


def test_a_small_compressed_model_is_small_on_disk(tmp_path):
    shapes = [(5, 5, 1, 6), (5, 5, 6, 16), (400, 120), (120, 84), (84, 10)]
    random = np.random.default_rng(0)
    params = {
        f"layer_{i}": {"kernel": random.standard_normal(shape, np.float32), "bias": np.zeros(shape[-1], np.float32)}
        for i, shape in enumerate(shapes)
    }
    save_tree(tmp_path / "dense", params)
    save_tree(tmp_path / "int8", compress.quantize(params))
    dense, int8 = (sum(f.stat().st_size for f in (tmp_path / d).rglob("*") if f.is_file()) for d in ("dense", "int8"))
    assert int8 / dense <= 0.35
