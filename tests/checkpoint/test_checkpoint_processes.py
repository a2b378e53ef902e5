"""Two processes with two devices each save one state together, and restore it together and alone."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab.checkpoint import Checkpoints

CHILD = """
    import sys, time
    import jax

    number, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number, initialization_timeout=60)
    import jax.numpy as jnp, numpy as np, warnings
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from jaxopt_lab.checkpoint import Best, Checkpoints, Damaged, SaveFailed, digests, folder, storage

    mesh = Mesh(np.array(jax.devices()), ("d",))
    assert len(jax.local_devices()) == 2 and mesh.size == 4

    def spread(x, *axes):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*axes)), x.__getitem__)

    def state(step):
        rows = np.arange(32.0, dtype=np.float32).reshape(8, 4) + step
        keys = jax.jit(lambda: jax.random.split(jax.random.key(5), 4), out_shardings=NamedSharding(mesh, P("d")))()
        return {
            "rows": spread(rows, "d"), "columns": spread(rows, None, "d"), "all": spread(rows), "keys": keys,
            "own": jnp.float32(step), "key": jax.random.key(step), "numpy": np.arange(3, dtype=np.int32), "step": step,
        }

    def local(x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return [np.asarray(shard.data) for shard in x.addressable_shards]

    def same(got, want):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            if isinstance(b, jax.Array):
                assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim), (a, b)
                assert all((x == y).all() for x, y in zip(local(a), local(b), strict=True))
            else:
                assert (np.asarray(a) == np.asarray(b)).all()

    class patched:
        # Something else in the place of a function, in one process.
        def __init__(self, where, module, name, function):
            self.given = (module, name, function) if number == where else ()

        def __enter__(self):
            if self.given:
                module, name, function = self.given
                self.given = (module, name, getattr(module, name))
                setattr(module, name, function)

        def __exit__(self, *_):
            if self.given:
                setattr(*self.given)

    def refuses(*given):
        raise PermissionError(13, "Permission denied")

    def unreadable(*given):
        raise ValueError("an odd disk")

    def raised(call, kind):
        try:
            call()
        except kind as error:
            print(type(error).__name__, error)
        else:
            raise AssertionError("nothing was raised")

    with Checkpoints(directory, keep=2, best=Best("loss", maximise=False), timeout=20) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), metrics={"loss": abs(step - 1.5)})
        checkpoints.wait()
        # That an old step could not be deleted, which the first process alone knows, all of them say, and go on.
        with patched(0, folder, "discard", refuses):
            checkpoints.save(4, state(4), metrics={"loss": 2.5})
            raised(checkpoints.wait, SaveFailed)
        checkpoints.wait()
        assert checkpoints.steps() == (1, 2, 3, 4), checkpoints.steps()
        # So it is where one cannot read its part; and nobody waits for ever for one that reads for ever.
        with patched(1, storage, "read_arrays", unreadable):
            raised(lambda: checkpoints.restore(4, like=state(0)), ValueError)
        read = storage.read_arrays
        late = lambda *given: time.sleep(4) or read(*given)
        with patched(1, storage, "read_arrays", late), Checkpoints(directory, timeout=1.5) as reader:
            begin = time.monotonic()
            raised(lambda: reader.restore(4, like=state(0)), TimeoutError)
            assert number == 1 or time.monotonic() - begin < 3.5
        same(checkpoints.restore(1, like=state(0)), state(1))
        step, got = checkpoints.restore_latest(like=state(0))
        assert step == 4
        same(got, state(4))
        part = checkpoints.restore(3, part="rows", like=state(0)["rows"])
        assert [x.shape for x in local(part)] == [(2, 4)] * 2
        whole = checkpoints.restore(3)
        assert whole["rows"].is_fully_addressable and (whole["rows"][0] == np.arange(4) + 3).all()

        # Errors of the first process are everybody's.
        for call, kind in (
            (lambda: checkpoints.save(4, state(4)), ValueError),
            (lambda: checkpoints.restore(7), FileNotFoundError),
            (lambda: checkpoints.restore(4, like={"rows": state(0)["rows"]}), ValueError),
        ):
            raised(call, kind)

        # A step that the first process cannot finish is none anywhere.
        with patched(0, digests, "seal", refuses):
            checkpoints.save(5, state(5))
            raised(checkpoints.wait, SaveFailed)
        assert checkpoints.latest() == 4

        # The newest is damaged: the first process says which is taken instead.
        checkpoints.save(5, state(5))
        checkpoints.wait()
        if number == 0:
            file = sorted((checkpoints.directory / "5" / "tree" / "d").iterdir())[0]
            file.write_bytes(file.read_bytes()[:-1])
        try:
            checkpoints.verify(5)
        except Damaged as error:
            print("Damaged", error)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            step, got = checkpoints.restore_latest(like=state(0))
        assert step == 4 and len(warned) == (number == 0)
        same(got, state(4))
        assert [entry.step for entry in checkpoints.quarantined()] == [5]
    print("done", number)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), str(number), str(port), str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    try:
        said = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for number, (child, text) in enumerate(zip(children, said, strict=True)):
        assert child.returncode == 0, text
        assert f"done {number}" in text
        for message in (
            r"ValueError checkpoint 4 is in ",
            r"FileNotFoundError no checkpoint 7 in ",
            r"SaveFailed checkpoint 4 is saved in ",
            r"but an older one could not be deleted: PermissionError: [Errno 13] Permission denied",
            r"ValueError an odd disk",
            r"for the others at 'read 4/",
            r"is of another tree than the one wanted: columns: extra in the checkpoint",
            r"SaveFailed checkpoint 5 could not be saved in ",
            r"Damaged checkpoint 5 in ",
        ):
            assert message in text, text
    return path


def test_one_process_goes_on_with_what_two_have_saved(directory):
    rows = np.arange(32.0, dtype=np.float32).reshape(8, 4) + 4
    mesh = Mesh(np.array(jax.devices()), ("d",))
    eight = NamedSharding(mesh, PartitionSpec("d"))
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.steps() == (1, 4)
        for step in checkpoints.steps():
            checkpoints.verify(step)
        tree = checkpoints.restore(4)
        for name in ("rows", "columns", "all"):
            np.testing.assert_array_equal(tree[name], rows)
        assert (tree["step"], float(tree["own"])) == (4, 4.0)
        keys = jax.random.split(jax.random.key(5), 4)
        np.testing.assert_array_equal(jax.random.key_data(tree["keys"]), jax.random.key_data(keys))
        got = checkpoints.restore(4, part="rows", like=jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=eight))
        np.testing.assert_array_equal(got, rows)
        assert got.sharding == eight
        assert [entry.step for entry in checkpoints.quarantined()] == [5]
    assert {path.name for path in directory.iterdir()} == {"1", "4", "lock", "quarantine"}
