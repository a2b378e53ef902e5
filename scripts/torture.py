"""Trainings that are killed, and what is left of them: every bit, or the count of what was lost.

    ./scripts/run scripts/torture.py kills [--kills 100] [--seed 0] [--disk tmpfs]
    ./scripts/run scripts/torture.py gold [--devices 1 2 4 8] [--kinds dense sparsify distill fake] [--ways pmap shard]

`kills` runs a training with asynchronous checkpoints in a process that is ended again and again, at random moments: by SIGKILL, by
SIGTERM, by a disk that is full, and, while it is down, by a bit that is flipped in its newest checkpoint. The disk is a small file
system of its own (a tmpfs), which is filled before a start or in its course, until less is free than a checkpoint takes; where none
may be mounted, as root may, no file may grow past a size instead, and that is said. Each start must restore the newest verified
step, or after a flipped bit the one before it, with the very values that an unbroken run has at that step; at the end the losses
must be those of the unbroken run, the state its bits, and the directory must hold nothing but steps and what was put into
quarantine. One JSON line says what was done and what went wrong; any loss is exit code 1.

`gold` asks of each way and each kind whether 40 steps are 17 steps, a SIGKILL, and 23 more, bit for bit; then whether one step of
plain gradient descent, and 40 steps, are those of one device (to 1e-6 and 1e-4; of fake-quantised weights the loss alone). One JSON
line a case. The devices are those that a CPU is made to pass for.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

STEPS, DIES_AT, LIMIT_S = 40, 17, 300.0
DISK_BYTES = 16 << 20
KINDS, WAYS = ("dense", "sparsify", "distill", "fake"), ("pmap", "shard")


# One training: what a child process runs.


@functools.lru_cache(maxsize=4)
def training(kind: str, way: str, devices: int, *, plain: bool = False) -> tuple[Any, Any, Any]:
    """A step, its first state and its batches; the optimiser is plain gradient descent, or AdamW."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxopt_lab import compress, data, losses, nets, parallel, prune, schedules, train

    some = jax.devices()[:devices]
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((96, 8), dtype=np.float32), "y": rng.integers(0, 3, 96, dtype=np.int32)}
    model = nets.from_linen(nets.MLP(features=(16, 16), classes=3, dropout=0.0 if plain else 0.2))
    tx = optax.sgd(0.1) if plain else optax.adamw(1e-2)
    loss = losses.per_example(losses.cross_entropy)
    variables = None
    if kind == "sparsify":
        tx = prune.sparsify(tx, schedules.cubic(0.0, 0.8, 5, 30), begin=5, end=30, every=5)
    if kind == "distill":
        teacher = model.init(jax.random.key(1), arrays["x"][:1])
        arrays["teacher"] = np.asarray(model.predict(teacher, jnp.asarray(arrays["x"])))
        loss = losses.combine((0.5, loss), (0.5, losses.per_example(losses.distill.soft_targets, "teacher", temperature=2.0)))
    if kind == "fake":
        variables = model.init(jax.random.key(0), arrays["x"][:1])
        variables = {**variables, "params": compress.fake_quantize(variables["params"], bits=8)}
    batches = data.batches(arrays, 24, seed=0)
    state = train.init(model, tx, jax.random.key(0), batches(0), variables)
    if way == "pmap":
        return parallel.pmap(train.make_step(model, loss, tx, axis_name="d"), some), state, batches
    mesh = jax.sharding.Mesh(np.array(some), ("data",))
    rules = parallel.fsdp("data", min_size=1) if devices > 1 else parallel.replicated
    return parallel.shard(train.make_step(model, loss, tx), mesh, rules), state, batches


def digest(state: Any) -> str:
    """SHA-256 of every bit of a state, wherever it lies."""
    import jax

    total = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        total.update(np.ascontiguousarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return total.hexdigest()


def trained(out: Path, kind: str, way: str, devices: int, steps: int, save_every: int, evaluate: Any = None) -> tuple[int, Any]:
    """Trains in a directory, or goes on there; the step that it started from (None: nothing was left to do), and its last state."""
    from jaxopt_lab import train

    step, state, batches = training(kind, way, devices)
    asked: list[int] = []

    def noted(index: int) -> dict:
        asked.append(index)
        return batches(index)

    run = train.Run(out, save_every=save_every, resume=True, keep=3, config={"kind": kind})
    options = {} if evaluate is None else {"evaluate": evaluate, "evaluate_every": 1}
    result = train.fit(step, state, noted, steps=steps, run=run, log_every=1, chunk=1, progress=False, **options)
    return next(iter(asked), None), result.state


def child(options: argparse.Namespace) -> None:
    """Trains in a directory, and tells as lines of JSON each state that it comes to, and how it ended."""
    import jax

    jax.config.update("jax_num_cpu_devices", options.devices)
    if options.file_size:
        # A write past it is the error EFBIG, as one to a full disk is ENOSPC; the signal that goes with it would end the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.file_size, resource.RLIM_INFINITY))

    def tell(**record: Any) -> None:
        os.write(1, (json.dumps(record) + "\n").encode())

    def evaluate(state: Any) -> dict[str, float]:
        tell(step=int(state.step), digest=digest(state))
        if options.dies_at and options.dies_at in verified(options.out):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(options.pause)
        return {}

    cell = (options.kind, options.way, options.devices, options.steps, options.save_every)
    started, state = trained(options.out, *cell, evaluate)
    tell(ended=int(state.step), started=started, digest=digest(state))


def start(directory: Path, *, kind: str = "dense", way: str = "pmap", devices: int = 2, steps: int = STEPS, **options: Any) -> Any:
    """A child process that trains in a directory."""
    words = {"out": directory, "kind": kind, "way": way, "devices": devices, "steps": steps, **options}
    command = [sys.executable, __file__, "child"]
    command += [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    # One that hangs must not hang this program, wherever it waits for it.
    process.watch = threading.Timer(LIMIT_S, process.kill)
    process.watch.start()
    return process


def said(process: Any) -> list[dict[str, Any]]:
    """What a child told until it ended; a torn last line is none. What it said of errors stays at the process, as `errors`."""
    out, process.errors = process.communicate()
    process.watch.cancel()
    lines = []
    for line in out.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


# Bit for bit, over ways, kinds and devices.


def gold(options: argparse.Namespace) -> int:
    wrong = 0
    for devices in options.devices:
        for kind in options.kinds:
            for way in options.ways:
                row = bits(kind, way, devices)
                wrong += not row["same_bits"]
                print(json.dumps(row), flush=True)
    for kind in options.kinds if options.across else ():
        for way in options.ways:
            row = across(kind, way, options.devices)
            wrong += not row["within"]
            print(json.dumps(row), flush=True)
    return int(wrong > 0)


def bits(kind: str, way: str, devices: int) -> dict[str, Any]:
    """Whether a training that was killed after step 17 was saved, and resumed, ends on the bits of one that was not."""
    cell = {"kind": kind, "way": way, "devices": devices, "steps": STEPS, "save_every": DIES_AT}
    with tempfile.TemporaryDirectory() as folder:
        broken = start(Path(folder) / "broken", **cell, dies_at=DIES_AT, pause=0.05)
        _, whole = trained(Path(folder) / "whole", **cell)
        before = said(broken)
        killed = broken.returncode == -signal.SIGKILL and all("ended" not in line for line in before)
        resumed_at, resumed = trained(Path(folder) / "broken", **cell)
    same = killed and resumed_at == DIES_AT and digest(whole) == digest(resumed)
    return {"name": "gold", **cell, "killed": killed, "resumed_at": resumed_at, "same_bits": same}


def across(kind: str, way: str, counts: list[int]) -> dict[str, Any]:
    """How far one step of gradient descent, and 40 of it, are from those on one device."""
    import jax

    def after(devices: int, steps: int) -> tuple[list[np.ndarray], float]:
        step, state, batches = training(kind, way, devices, plain=True)
        metrics = {}
        for t in range(steps):
            state, metrics = step(state, batches(t))
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.params)], float(metrics["loss"])

    found = {"one": 0.0, "forty": 0.0, "loss": 0.0}
    (first, _), (last, loss) = after(1, 1), after(1, STEPS)
    for devices in counts:
        (one, _), (forty, its_loss) = after(devices, 1), after(devices, STEPS)
        found["one"] = max(found["one"], *(float(np.abs(a - b).max()) for a, b in zip(first, one, strict=True)))
        found["forty"] = max(found["forty"], *(float(np.abs(a - b).max()) for a, b in zip(last, forty, strict=True)))
        found["loss"] = max(found["loss"], abs(loss - its_loss))
    weights = kind != "fake"
    within = found["loss"] <= 1e-3 if not weights else found["one"] <= 1e-6 and found["forty"] <= 1e-4
    return {"name": "across_devices", "kind": kind, "way": way, "devices": counts, **found, "within": bool(within)}


# Killed at random.


def mount(disk: Path) -> str:
    """Mounts a small file system; what was said if it may not be, else nothing."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return (done.stderr.strip() or f"mount ended with {done.returncode}") if done.returncode else ""


@contextlib.contextmanager
def small_disk(folder: Path, wanted: str) -> Iterator[Path | None]:
    """A small file system of its own as long as the context lasts; None where it is not wanted, or may not be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    refused = "" if wanted == "limit" else mount(disk)
    if refused and wanted == "tmpfs":
        sys.exit(f"no small file system could be mounted: {refused}; be root, or choose --disk limit")
    if refused:
        print(f"no small file system could be mounted ({refused}): no file may grow past a size instead", file=sys.stderr)
    if refused or wanted == "limit":
        yield None
        return
    try:
        yield disk
    finally:
        # Lazily: what still writes there must not keep it.
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that takes up a disk but for so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        for _ in range(100):
            room = (free := os.statvfs(disk)).f_bavail * free.f_frsize - leave
            if room <= 0:
                break
            # Should something else have been written in the meantime, there is less room than that.
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), room)
    return ballast


def kills(options: argparse.Namespace) -> int:
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder), options.disk) as disk:
        torture = Torture(Path(folder), options, disk)
        while torture.ended < options.kills and len(torture.faults) < 10:
            torture.one_run()
    how = {"disk": "file size limit" if disk is None else "tmpfs", "faults": torture.faults}
    row = {"name": "kills", **torture.count, **how, "seconds": round(time.perf_counter() - begin, 1)}
    print(json.dumps(row), flush=True)
    return int(bool(torture.faults))


class Torture:
    """What was done to trainings, and what they lost by it."""

    def __init__(self, folder: Path, options: argparse.Namespace, disk: Path | None):
        self.folder, self.options, self.chance = disk or folder, options, random.Random(options.seed)
        self.disk = disk
        self.cell = {"kind": options.kind, "way": "shard", "devices": 2, "steps": options.steps, "save_every": 4}
        self.count = {"sigkill": 0, "sigterm": 0, "disk_full": 0, "bit_flips": 0, "starts": 0, "runs": 0}
        self.faults: list[str] = []
        self.truth: dict[int, str] = {}

        def noted(state: Any) -> dict[str, float]:
            self.truth[int(state.step)] = digest(state)
            return {}

        trained(folder / "whole", **self.cell, evaluate=noted)
        self.losses = (folder / "whole" / "metrics.jsonl").read_text()
        newest = folder / "whole" / "checkpoints" / str(max(verified(folder / "whole")))
        self.bytes = sum(path.stat().st_blocks * 512 for path in newest.rglob("*") if path.is_file())

    @property
    def ended(self) -> int:
        """How many starts were ended from without."""
        return self.count["sigkill"] + self.count["sigterm"] + self.count["disk_full"]

    def one_run(self) -> None:
        """A training from its beginning to its end, ended on the way as often as chance will have it."""
        out, flipped = self.folder / f"run{self.count['runs']}", set[int]()
        self.count["runs"] += 1
        while len(self.faults) < 10:
            sound = max((step for step in verified(out) if step not in flipped), default=0)
            how = self.chance.choices(("sigkill", "sigterm", "disk_full"), (0.7, 0.2, 0.1))[0]
            how = how if self.ended < self.options.kills else "none"
            lines, code, error = self.one_start(out, how)
            told = [line for line in lines if "step" in line]
            if told and told[0]["step"] <= sound:
                self.faults.append(f"step {sound} was verified, and the next start began at {told[0]['step'] - 1}")
            if wrong := [line["step"] for line in told if self.truth.get(line["step"]) != line["digest"]]:
                self.faults.append(f"the steps {wrong} have other values than in the unbroken run")
            if told:
                # What was damaged has been set aside by now.
                flipped.clear()
            if code == 0:
                self.check_end(out)
                shutil.rmtree(out)
                return
            if how == "none":
                self.faults.append(f"a start that nothing ended came to nothing, with code {code}: {error}")
                return
            self.count[how] += 1
            if code not in {"sigkill": (-signal.SIGKILL,), "sigterm": (75, -signal.SIGTERM), "disk_full": (1,)}[how]:
                self.faults.append(f"{how} ended with code {code}: {error}")
            self.check_steps(out, flipped)
            newest = max(verified(out), default=0)
            if newest and self.chance.random() < self.options.flips:
                flip(out / "checkpoints" / str(newest), self.chance)
                self.count["bit_flips"] += 1
                flipped.add(newest)

    def one_start(self, out: Path, how: str) -> tuple[list[dict[str, Any]], int, str]:
        """What one start told, its exit code, and the last line that it wrote of an error."""
        self.count["starts"] += 1
        limited = how == "disk_full" and self.disk is None
        fills, leave = how == "disk_full" and self.disk is not None, self.chance.randrange(self.bytes)
        before = fills and self.chance.random() < 0.5
        ballast = fill(self.disk, leave) if before else None
        process = start(out, **self.cell, pause=self.options.pause, file_size=2000 if limited else 0)
        first = ""
        if how in ("sigkill", "sigterm") or (fills and not before):
            first = process.stdout.readline()
            time.sleep(self.chance.uniform(0, self.options.steps * self.options.pause))
            if fills:
                ballast = fill(self.disk, leave)
            else:
                process.send_signal(signal.SIGKILL if how == "sigkill" else signal.SIGTERM)
        lines = said(process)
        if ballast is not None:
            ballast.unlink()
        last = (process.errors.strip().splitlines() or [""])[-1]
        return ([json.loads(first)] if first.strip() else []) + lines, process.returncode, last

    def check_steps(self, out: Path, flipped: set[int]) -> None:
        """What counts as verified must be so."""
        from jaxopt_lab.checkpoint import Checkpoints

        with Checkpoints(out / "checkpoints") as checkpoints:
            for step in set(checkpoints.steps()) - flipped:
                try:
                    checkpoints.verify(step)
                except ValueError as error:
                    self.faults.append(f"step {step} counts as verified: {error}")

    def check_end(self, out: Path) -> None:
        """The losses of the unbroken run, and nothing left behind."""
        if (out / "metrics.jsonl").read_text() != self.losses:
            self.faults.append("the losses are not those of the unbroken run")
        known = {"config.json", "environment.json", "metrics.jsonl", "status.json", "report.md", "checkpoints", "lock"}
        odd = [path.name for path in out.iterdir() if path.name not in known]
        odd += [p.name for p in (out / "checkpoints").iterdir() if not p.name.isdigit() and p.name not in ("quarantine", "lock")]
        self.faults += [f"left behind: {name}" for name in odd]


def verified(out: Path) -> list[int]:
    """The steps that a run has verified."""
    return sorted(int(path.parent.name) for path in (out / "checkpoints").glob("*/digests.json") if path.parent.name.isdigit())


def flip(step: Path, chance: random.Random) -> None:
    """Flips one bit of one file of a checkpoint."""
    path = chance.choice(sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size))
    body = bytearray(path.read_bytes())
    body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    path.write_bytes(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    killing = modes.add_parser("kills", help="one training, killed at random")
    killing.add_argument("--kills", type=int, default=100)
    killing.add_argument("--kind", choices=KINDS, default="sparsify")
    killing.add_argument("--steps", type=int, default=60)
    killing.add_argument("--pause", type=float, default=0.02, help="seconds of sleep a step")
    killing.add_argument("--flips", type=float, default=0.2, help="how often a bit is flipped after an end")
    killing.add_argument("--seed", type=int, default=0)
    killing.add_argument(
        "--disk", choices=("auto", "tmpfs", "limit"), default="auto", help="what is full: a small tmpfs, or files past a size"
    )
    golden = modes.add_parser("gold", help="bit for bit, over ways, kinds and devices")
    golden.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    golden.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    golden.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    golden.add_argument("--across", action=argparse.BooleanOptionalAction, default=True, help="compare with one device as well")
    one = modes.add_parser("child", help="one training, as the others start it")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--kind", choices=KINDS, default="dense")
    one.add_argument("--way", choices=WAYS, default="pmap")
    for name, default in (("devices", 2), ("steps", STEPS), ("save-every", 8), ("dies-at", 0), ("file-size", 0)):
        one.add_argument(f"--{name}", type=int, default=default)
    one.add_argument("--pause", type=float, default=0.0)
    options = parser.parse_args()
    if options.mode == "child":
        child(options)
        return
    if "jax" not in sys.modules:
        import jax

        jax.config.update("jax_num_cpu_devices", max(getattr(options, "devices", [2])))
    sys.exit({"kills": kills, "gold": gold}[options.mode](options))


if __name__ == "__main__":
    main()
