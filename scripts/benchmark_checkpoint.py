"""What checkpoints cost a training: all in all, while the loop stands still, and for their digests.

    ./scripts/run scripts/benchmark_checkpoint.py [--cases every_50 blocking digests] [--repeats 5] [--saves 40] [--directory DIR]

`every_50`: a training step of about 150 ms (AdamW on an MLP of 1.9 M parameters, whose batch is chosen so on this machine; a state
of 23 MB) with a checkpoint every 50 steps against none; runs of 50 steps alternate, and the ratio is the median of the pairs' (aim:
at most 1.05). The end of a run waits for its checkpoint, which a longer one would not. `blocking`: the milliseconds for which
`save` holds the loop, for that state and for LeNet's, against Orbax's own `AsyncCheckpointer` on the same tree; saves alternate,
and each is waited for before the next. `digests`: seconds per GiB to write digests, each file brought to the disk, and to check
them. One JSON line a case. Figures depend on the disk: `--directory` says which.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from jaxopt_lab import nets, train
from jaxopt_lab.checkpoint import Checkpoints, digests

STEP_S = 0.15
EVERY = 50


def hardware() -> dict[str, Any]:
    return {
        "platform": jax.devices()[0].platform,
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "orbax": ocp.__version__,
    }


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def training(net, shape: tuple[int, ...]):
    """A step, and a state to begin with."""
    model, tx = nets.from_linen(net), optax.adamw(1e-3)
    state = train.init(model, tx, jax.random.key(0), np.zeros((1, *shape), np.float32))
    return jax.jit(train.make_step(model, cross_entropy, tx), donate_argnums=0), state


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


def batch_of(rows: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((rows, *shape), dtype=np.float32), "y": rng.integers(0, 10, rows, dtype=np.int32)}


def copied(state):
    return jax.tree.map(jnp.copy, state)


def seconds_of(step, state, batch, steps: int) -> float:
    begin = time.perf_counter()
    for _ in range(steps):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - begin) / steps


def fitting_batch(step, state, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The batch with which a step takes about `STEP_S`."""
    rows = 256
    for _ in range(3):
        batch = batch_of(rows, shape)
        seconds_of(step, copied(state), batch, 2)
        rows = max(1, round(rows * STEP_S / seconds_of(step, copied(state), batch, 5)))
    return batch_of(rows, shape)


def every_50(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    step, start = training(nets.MLP(features=(1024, 1024)), (784,))
    batch = fitting_batch(step, start, (784,))
    seconds_of(step, copied(start), batch, 3)

    def run(checkpoints: Checkpoints | None, number: int) -> float:
        state = copied(start)
        begin = time.perf_counter()
        for at in range(EVERY):
            if checkpoints is not None and at == 0:
                checkpoints.save(number, state)
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        if checkpoints is not None:
            checkpoints.wait()
        return time.perf_counter() - begin

    with fresh(options) as directory, Checkpoints(directory, keep=2) as checkpoints:
        run(checkpoints, 0)
        pairs = []
        for number in range(1, options.repeats + 1):
            # First the one, then the other, by turns: whatever comes second would have the warmer or the hotter machine.
            order = (None, checkpoints) if number % 2 else (checkpoints, None)
            times = {which is not None: run(which, number) for which in order}
            pairs.append((times[False], times[True]))
    ratios = [with_ / without for without, with_ in pairs]
    yield {
        "name": "checkpoint_every_50_steps",
        "rows": len(batch["y"]),
        "state_mb": round(nbytes(start) / 1e6, 1),
        "step_ms": round(1000 * statistics.median(without for without, _ in pairs) / EVERY, 1),
        "with_over_without": round(statistics.median(ratios), 3),
        "spread": [round(f(ratios), 3) for f in (min, max)],
        "repeats": options.repeats,
    }


def blocking(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, net, shape in (
        ("lenet", nets.LeNet(), (28, 28, 1)),
        ("mlp_1024_1024", nets.MLP(features=(1024, 1024)), (784,)),
    ):
        _, state = training(net, shape)
        leaves = [leaf for leaf in jax.tree.leaves(state) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
        plain = {f"{i}": leaf for i, leaf in enumerate(leaves)}
        ours, orbax, whole = [], [], []
        with (
            fresh(options) as directory,
            Checkpoints(Path(directory) / "ours", keep=2) as checkpoints,
            ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) as alone,
        ):
            for number in range(options.saves + 3):
                begin = time.perf_counter()
                checkpoints.save(number, state)
                ours.append(time.perf_counter() - begin)
                checkpoints.wait()
                whole.append(time.perf_counter() - begin)
                begin = time.perf_counter()
                alone.save(Path(directory) / f"orbax_{number}", ocp.args.PyTreeSave(plain))
                orbax.append(time.perf_counter() - begin)
                alone.wait_until_finished()
                shutil.rmtree(Path(directory) / f"orbax_{number}")
        # The first ones import and compile.
        yield {
            "name": f"blocking_{name}",
            "state_mb": round(nbytes(state) / 1e6, 2),
            "leaves": len(jax.tree.leaves(state)),
            **{
                f"{who}_{which}_ms": round(1000 * float(np.quantile(times[3:], quantile)), 1)
                for who, times in (("save", ours), ("orbax_save", orbax), ("verified_after", whole))
                for which, quantile in (("p50", 0.5), ("p95", 0.95))
            },
            "saves": options.saves,
        }


def digesting(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    written, checked = [], []
    with fresh(options) as directory:
        step = Path(directory) / "1"
        step.mkdir()
        rng = np.random.default_rng(0)
        for number in range(4):
            (step / f"{number}").write_bytes(rng.bytes(2**26))
        for _ in range(options.repeats + 1):
            begin = time.perf_counter()
            digests.seal(step, {})
            middle = time.perf_counter()
            held = digests.check(step, "step 1")
            written.append((middle - begin) * 2**30 / held)
            checked.append((time.perf_counter() - middle) * 2**30 / held)
            (step / digests.NAME).unlink()
    # The first brings the files themselves to the disk.
    yield {
        "name": "digests",
        "mib": held // 2**20,
        "first_seal_s_per_gib": round(written[0], 2),
        "seal_s_per_gib": round(statistics.median(written[1:]), 2),
        "check_s_per_gib": round(statistics.median(checked[1:]), 2),
        "repeats": options.repeats,
    }


def fresh(options: argparse.Namespace) -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(dir=options.directory)


CASES = {"every_50": every_50, "blocking": blocking, "digests": digesting}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES), help="which to run (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs, and digests (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=40, help="of the case blocking (default: %(default)s)")
    parser.add_argument("--directory", default=None, help="where to write (default: the system's temporary one)")
    options = parser.parse_args()
    for name in ("repeats", "saves"):
        if (count := getattr(options, name)) < 1:
            parser.error(f"--{name} {count}: at least 1")
    for name in options.cases:
        for line in CASES[name](options):
            print(json.dumps({**line, **hardware()}), flush=True)


if __name__ == "__main__":
    main()
