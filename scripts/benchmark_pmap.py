"""Training steps on all devices: how long one takes, of how much of the hardware's peak, and what is lost between the devices.

    ./scripts/run scripts/benchmark_pmap.py [--models resnet50 vit_s] [--batch 32 128] [--devices 1 4 8] [--ways pmap shard fsdp]
        [--precision float32 bfloat16] [--scaling weak strong] [--steps 50] [--out DIRECTORY]

A case is a model, a batch, a number of devices, a way and a precision. The ways: `parallel.pmap`, `parallel.shard` with the state
on every device, and `fsdp`, the same with parameters and moments dealt out. Weak scaling keeps the batch of each device, strong
scaling the batch of all together (that of `--batch`). The step is AdamW's on random images; bfloat16 computes in it and keeps
float32 weights.

Of each case one JSON line: seconds to compile; milliseconds of a step, each waited for (p50, p95); items a second of steps that
are not, in all and of each device; the FLOP/s of the products, which are 6 for each multiplication of the forward pass, and their
share of the peak where the device's is known (NVIDIA's and Google's data sheets, without sparsity); the efficiency against the
same case on the fewest devices; and the bytes of collectives in the compiled program, by kind. With `--out` the lines, a table and
a picture are kept.

Devices that a CPU is made to pass for (JAX_NUM_CPU_DEVICES) share its cores: such cases say so, and have no efficiency. On a TPU
pod, start it in every process of the pod; the first one prints.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import losses, nets, parallel, train
from jaxopt_lab.core import tracing

WARM_UP = 5

MODELS = {
    "mlp": (nets.MLP(features=(2048, 2048)), (784,), 10),
    "lenet": (nets.LeNet(), (28, 28, 1), 10),
    "resnet20": (nets.ResNet(depth=20), (32, 32, 3), 10),
    "resnet50": (nets.ImageNetResNet(depth=50), (224, 224, 3), 1000),
    "vit_s": (nets.VisionTransformer(width=384, heads=6, mlp_width=1536, classes=1000), (224, 224, 3), 1000),
    "vit_b": (nets.VisionTransformer(classes=1000), (224, 224, 3), 1000),
}

# FLOP/s of dense products: in float32 as JAX multiplies by default (TF32 on GPUs, three bfloat16 passes or fewer on TPUs: unknown).
PEAKS = {
    "NVIDIA H200": {"float32": 495e12, "bfloat16": 989e12},
    "NVIDIA H100 80GB HBM3": {"float32": 495e12, "bfloat16": 989e12},
    "NVIDIA H100 PCIe": {"float32": 378e12, "bfloat16": 756e12},
    "NVIDIA A100": {"float32": 156e12, "bfloat16": 312e12},
    "TPU v6 lite": {"bfloat16": 918e12},
    "TPU v5p": {"bfloat16": 459e12},
    "TPU v5": {"bfloat16": 459e12},
    "TPU v5 lite": {"bfloat16": 197e12},
    "TPU v4": {"bfloat16": 275e12},
    "TPU v3": {"bfloat16": 61.5e12},
}


def peak(kind: str, precision: str) -> float | None:
    """The peak of one device in FLOP/s; None where it is not known. The longest name that fits counts."""
    fitting = [name for name in PEAKS if kind.startswith(name)]
    return PEAKS[max(fitting, key=len)].get(precision) if fitting else None


def spread(way: str, step: Any, devices: list[jax.Device]) -> tuple[Any, NamedSharding]:
    """The step on the devices, and where the rows of its batches go."""
    mesh = Mesh(np.array(devices), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    if way == "pmap":
        return parallel.pmap(step, devices), rows
    return parallel.shard(step, mesh, parallel.fsdp("data") if way == "fsdp" else parallel.replicated), rows


def case(name: str, batch: int, devices: list[jax.Device], way: str, precision: str, steps: int) -> dict[str, Any]:
    """One line; `batch` is of all devices together."""
    net, shape, classes = MODELS[name]
    model, tx = nets.from_linen(net), optax.adamw(1e-3)
    step = train.make_step(
        model,
        losses.per_example(losses.cross_entropy),
        tx,
        axis_name="data" if way == "pmap" else None,
        precision=None if precision == "float32" else jnp.dtype(precision),
    )
    together, rows = spread(way, step, devices)
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((batch, *shape), dtype=np.float32), "y": rng.integers(0, classes, batch, dtype=np.int32)}
    # Every process holds the same arrays and hands over the rows that are its devices'.
    data = {key: jax.make_array_from_callback(value.shape, rows, value.__getitem__) for key, value in arrays.items()}
    state = together.place(train.init(model, tx, jax.random.key(0), arrays["x"][:1]))
    macs = tracing.count(
        model.predict, jax.eval_shape(lambda: train.variables(state)), jax.ShapeDtypeStruct(arrays["x"].shape, "float32")
    ).macs

    begin = time.perf_counter()
    compiled = jax.jit(together, donate_argnums=0).lower(state, data).compile()
    compile_s = time.perf_counter() - begin

    def run(state: Any, count: int) -> tuple[Any, float]:
        begin = time.perf_counter()
        for _ in range(count):
            state, _ = compiled(state, data)
        jax.block_until_ready(state)
        return state, time.perf_counter() - begin

    state, _ = run(state, WARM_UP)
    each = []
    for _ in range(steps):
        state, seconds = run(state, 1)
        each.append(1e3 * seconds)
    state, seconds = run(state, steps)
    flops = 6 * macs * steps / seconds
    known = peak(devices[0].device_kind, precision)
    moved: dict[str, int] = {}
    for found in parallel.collectives(compiled):
        moved[found.kind] = moved.get(found.kind, 0) + found.bytes * found.count
    return {
        "name": "pmap",
        "model": name,
        "way": way,
        "precision": precision,
        "devices": len(devices),
        "global_batch": batch,
        "steps": steps,
        "compile_s": round(compile_s, 2),
        "step_ms_p50": round(statistics.median(each), 3),
        "step_ms_p95": round(float(np.percentile(each, 95)), 3),
        "items_per_s": round(batch * steps / seconds, 1),
        "items_per_s_per_device": round(batch * steps / seconds / len(devices), 1),
        "flop_per_s": float(f"{flops:.4g}"),
        "fraction_of_peak": None if known is None else round(flops / known / len(devices), 3),
        "collective_bytes": moved,
    }


def hardware() -> dict[str, Any]:
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "device": first.device_kind,
        "simulated": simulated(),
        "processes": jax.process_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
    }


def simulated() -> bool:
    """Whether several devices are one CPU."""
    return jax.devices()[0].platform == "cpu" and jax.device_count() > 1


def efficiency(row: dict[str, Any], rows: Iterable[dict[str, Any]]) -> float | None:
    """Items a second and device against the like case on the fewest devices; None for that one, and where it means nothing."""
    alike = ("model", "way", "precision", "scaling", "batch")
    others = [other for other in rows if all(other[key] == row[key] for key in alike) and other["devices"] < row["devices"]]
    if not others or simulated():
        return None
    first = min(others, key=lambda other: other["devices"])
    return round(row["items_per_s_per_device"] / first["items_per_s_per_device"], 3)


def table(rows: list[dict[str, Any]]) -> str:
    """The lines as a table of Markdown."""
    columns = {
        "model": "model", "way": "way", "precision": "precision", "devices": "devices", "global_batch": "batch",
        "step_ms_p50": "ms, p50", "step_ms_p95": "ms, p95", "items_per_s_per_device": "items/s a device",
        "fraction_of_peak": "of peak", "scaling_efficiency": "efficiency",
    }  # fmt: skip
    lines = [" | ".join(["", *columns.values(), ""]).strip(), "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join("" if row[key] is None else str(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Items a second over devices, a line for each model, way, precision and batch."""
    from jaxopt_lab.report import canvas

    figure = canvas.figure(8, 5, 160)
    axes = figure.add_subplot()
    canvas.dress(axes)
    keys = sorted({(row["model"], row["way"], row["precision"], row["scaling"], row["batch"]) for row in rows})
    for number, key in enumerate(keys):
        line = [row for row in rows if (row["model"], row["way"], row["precision"], row["scaling"], row["batch"]) == key]
        points = sorted((row["devices"], row["items_per_s"]) for row in line)
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            color=canvas.COLOURS[number % len(canvas.COLOURS)],
            label=" ".join(map(str, key)),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("devices")
    axes.set_ylabel("items a second")
    counts = sorted({row["devices"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter("{x:,g}")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    kind = f"{jax.devices()[0].device_kind}{', simulated devices: no scaling result' if simulated() else ''}"
    axes.set_title(f"Training steps on {kind}", loc="left", color=canvas.INK)
    canvas.png(figure, path)


def tell(row: dict[str, Any], out: Path | None) -> None:
    """Prints a line, and keeps it at once: a later case may not fit the memory."""
    print(json.dumps(row), flush=True)
    if out is not None:
        with (out / "pmap.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=["mlp", "resnet20"])
    parser.add_argument("--batch", type=int, nargs="+", default=[64], help="of a device (weak scaling) or of all (strong)")
    parser.add_argument("--devices", type=int, nargs="+", default=None, help="how many (default: 1, 2, 4, ... up to all)")
    parser.add_argument("--ways", choices=("pmap", "shard", "fsdp"), nargs="+", default=["pmap", "shard"])
    parser.add_argument("--precision", choices=("float32", "bfloat16"), nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--scaling", choices=("weak", "strong"), nargs="+", default=["weak"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=None, help="a directory for the lines, a table and a picture")
    options = parser.parse_args()
    parallel.initialize()
    every = jax.devices()
    counts = options.devices or [2**k for k in range(len(every).bit_length()) if 2**k <= len(every)]
    for name, values in (("batch", options.batch), ("devices", counts), ("steps", [options.steps])):
        if min(values) < 1:
            parser.error(f"--{name} {min(values)}: at least 1")
    if max(counts) > len(every):
        parser.error(f"--devices {max(counts)}: there are {len(every)}")

    if options.out is not None and jax.process_index() == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "pmap.jsonl").write_text("")
    rows: list[dict[str, Any]] = []
    for model in options.models:
        for scaling in options.scaling:
            for batch in options.batch:
                for precision in options.precision:
                    for way in options.ways:
                        for count in sorted(counts):
                            whole = batch * count if scaling == "weak" else batch
                            row = case(model, whole, every[:count], way, precision, options.steps)
                            row |= {"scaling": scaling, "batch": batch}
                            rows.append(row | {"scaling_efficiency": efficiency(row, rows), **hardware()})
                            if jax.process_index() == 0:
                                tell(rows[-1], options.out)
    if options.out is not None and jax.process_index() == 0:
        (options.out / "pmap.md").write_text(table(rows))
        picture(rows, options.out / "pmap.png")


if __name__ == "__main__":
    main()
