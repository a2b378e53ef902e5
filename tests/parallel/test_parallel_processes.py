"""Two processes with two devices each: steps that are cut or mapped over all four end where one device's does.

This file is also the program of both: `python test_parallel_processes.py FILE`.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxopt_lab import data, nets, parallel, train

RNG = np.random.default_rng(0)
WEIGHTS = {"hidden": RNG.standard_normal((5, 8), dtype=np.float32), "out": RNG.standard_normal((8, 3), dtype=np.float32)}
ARRAYS = {"x": RNG.standard_normal((31, 5), dtype=np.float32), "y": RNG.integers(0, 3, 31).astype(np.int32)}


def perceptron(params, x, *, train, key):
    hidden = jax.nn.relu(x @ params["hidden"])
    return (hidden * jax.random.bernoulli(key, 0.8, hidden.shape) if train else hidden) @ params["out"]


MODEL, TX, STEPS = nets.from_functions(lambda key, x: WEIGHTS, perceptron), optax.sgd(0.1, momentum=0.9), 4


def loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def batches():
    """Six rows on four devices: two are padding, both of the last process."""
    return data.batches(ARRAYS, 6, seed=3)


def started():
    return train.init(MODEL, TX, jax.random.key(7), {"x": ARRAYS["x"][:2]})


def eagerly(step, own):
    state = started()
    for k in range(STEPS):
        state, _ = step(state, own(k))
    return state


def program(file: Path) -> None:
    assert parallel.initialize(timeout=60, heartbeat=20).processes == 2
    mesh, own = jax.make_mesh((4,), ("data",)), parallel.local(batches())
    cut = parallel.shard(train.make_step(MODEL, loss, TX), mesh, parallel.fsdp(min_size=8))
    mapped = parallel.pmap(train.make_step(MODEL, loss, TX, axis_name="d"))
    with pytest.raises(ValueError, match=r'"x" of the batch has 3 rows on process \d.*among its 2 parts'):
        cut(started(), {"x": ARRAYS["x"][:3]})
    ends = {
        "shard": eagerly(cut, own),
        "pmap": eagerly(mapped, own),
        # Batches of all processes have no values here to look at first.
        "shard_fit": train.fit(cut, started(), cut.feed(own), steps=STEPS, chunk=2, check=False, progress=False).state,
        "pmap_fit": train.fit(mapped, started(), mapped.feed(own), steps=STEPS, chunk=1, check=False, progress=False).state,
    }
    part = ends["shard"].opt_state[0].trace["hidden"]
    assert [shard.data.shape for shard in part.addressable_shards] == [(5, 2)] * 2
    whole = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))
    found = {f"{name}/{leaf}": np.asarray(whole(value)) for name, state in ends.items() for leaf, value in state.params.items()}
    if parallel.is_first():
        np.savez(file, **found)


def test_two_processes_end_where_one_device_does(tmp_path):
    file = tmp_path / "ends.npz"
    command = [sys.executable, "-m", "jaxopt_lab.supervise", "--processes", "2", "--restarts", "0", "--grace", "1", "--"]
    environ = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(
        [*command, sys.executable, __file__, str(file)], env=environ, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one = eagerly(jax.jit(train.make_step(MODEL, loss, TX)), batches()).params
    found = np.load(file)
    for name in ("shard", "pmap", "shard_fit", "pmap_fit"):
        for leaf, value in one.items():
            np.testing.assert_allclose(found[f"{name}/{leaf}"], value, rtol=1e-5, atol=1e-6, err_msg=name)
            assert float(abs(value - WEIGHTS[leaf]).max()) > 0.02


if __name__ == "__main__":
    program(Path(sys.argv[1]))
