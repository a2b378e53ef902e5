"""Formats of a weight on three trained networks: what each costs in accuracy, and what it saves in bytes and time.

    python experiments/quantize.py --data-dir DIRECTORY                     three networks, three seeds
    python experiments/quantize.py --data-dir DIRECTORY --networks lenet    one of them
    python experiments/quantize.py --data-dir DIRECTORY --validation        the same, measured on 10,000 of the training images
    python experiments/quantize.py --dataset digits                         the same on scikit-learn's digits, in some minutes

LeNet-5 (61,706 parameters), a ResNet-8 of 8, 16 and 32 channels (19,074) and a vision transformer of two blocks on patches of 7 x 7
(72,074) are trained in float32 by Adam. Then every `**/kernel` is stored in each format, with one scale for each output: those of
convolutions, of dense layers, of the attention. Biases, normalisations, positions and the class token stay in float32. BatchNorm
uses its running statistics wherever a format is measured, and a format is measured as its file gives it back.

    bfloat16          weights and computation; running statistics stay in float32
    int8, dynamic     products in int8; their inputs are rounded as they come
    int8, static      the same, in ranges from 512 training images
    int3, GPTQ        rounded one input after another, by the same 512 images
    mixed             2 to 8 bits a kernel, in no more bytes than int3, by the loss on the same 512 images
    int4, trained     from the float32 weights two more passes in which the weights are rounded, the steps learned
    int2, ends int8   2 bits; the first and the last layer keep 8, as is common practice

`float32, trained on` has the two more passes as well, unrounded: what is trained in few bits is to be held against it, too.

The rounded training was chosen with --validation on seed 0. The accuracy there against float32, in points, after two passes (the
transformer had been trained for five then):

                                         LeNet-5            ResNet-8         transformer
                                     4 bits  2 bits      4 bits  2 bits    4 bits  2 bits
    StraightThrough, rate 5e-4       -0.11   -0.47
    StraightThrough, rate 1e-3                           -0.10   -1.14
    StraightThrough, rate 2e-3       -0.10   -0.61
    LearnedStep, rate 5e-4           -0.03   -0.30
    LearnedStep, rate 1e-3                               -0.03   -0.26
    LearnedStep, rate 2e-3           -0.06   -0.07       +0.05   -0.17     +0.09   -0.13     (this one)

Measured over three seeds on the test set, in 32 minutes on two busy cores, a process a network (--networks): accuracy in %, and
below it the points against float32.

                                  LeNet-5         ResNet-8      transformer
    float32                        99.12            99.05          98.15
    float32, trained on            +0.01            +0.12          +0.15
    bfloat16                        0.00            -0.01          -0.01
    int8 (aim: -0.1)               +0.01             0.00           0.00
    int8, dynamic (aim: -0.1)      -0.01            -0.02          +0.01
    int8, static (aim: -0.1)        0.00            +0.02           0.00
    int4                           -0.07            -4.52          -0.10
    int4, trained (aim: -0.3)      +0.01            +0.04          +0.05
    int3                           -0.35           -41.05          -1.14
    int3, GPTQ                     -0.08            -0.82          -0.40
    mixed, bytes of int3           -0.26           -24.64          -1.13
    int2, ends int8               -19.63           -84.71         -31.97
    int2, ends int8, trained       -0.10            -0.02          -0.18

Every aim is met. Held against float32 trained as long, 4 trained bits cost at most 0.10 points, and 2 cost 0.11 to 0.33.

Nothing gets faster at this size: on two idle cores stored weights take 0.8 to 1.4 times float32's time at batch 1 and 0.98 to 1.1
at batch 64 (`float32, trained on`, which is the same program, reads 0.9 and 1.0), products in int8 1.3 to 2.1 and 0.95 to 1.6, and
3.1 for the convolutions of the ResNet at batch 64.
"""

import functools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxopt_lab import cli


@dataclass(frozen=True)
class Config:
    """Trains three networks for several seeds, stores each in every format, and prints what that costs and saves."""

    dataset: Literal["mnist", "digits"] = "mnist"
    data_dir: Path | None = None
    """Where the four files of MNIST lie; JAXOPT_LAB_DATA if not given."""
    out: Path = Path("runs/quantize")
    """Where the files of each network and seed, their stages.json and summary.json go."""
    networks: tuple[Literal["lenet", "resnet", "transformer"], ...] = ("lenet", "resnet", "transformer")
    formats: tuple[str, ...] = ()
    """Only these beside float32, by the names that the table gives them; all if none is named."""
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int | None = None
    """Passes over the data, in float32; by default each network's own."""
    fine_epochs: int = 2
    """Further passes, in which the weights are rounded (and, for comparison, in which they are not)."""
    batch_size: int = 64
    fine_learning_rate: float = 2e-3
    """Of the further passes: the peak of their schedule."""
    leaf: Literal["LearnedStep", "StraightThrough"] = "LearnedStep"
    """How the weights are rounded while they train."""
    calibration: int = 512
    """Training images by which ranges, roundings and bits are chosen."""
    repeats: int = 30
    """Calls timed of each format and batch size."""
    validation: bool = False
    """Hold out the last sixth of the training images, and leave the test set alone: settings are chosen by this."""


class Network(NamedTuple):
    """A network, and how it is trained in float32."""

    module: Any
    ends: tuple[str, str]
    """The kernels of the first and the last layer."""
    epochs: int
    learning_rate: float


def networks(side: int) -> dict[str, Network]:
    """The three networks, for images of so many pixels a side."""
    from jaxopt_lab import nets

    resnet = nets.ResNet(depth=8, widths=(8, 16, 32))
    transformer = nets.VisionTransformer(patch=side // 4, width=64, depth=2, heads=4, mlp_width=128)
    return {
        "lenet": Network(nets.LeNet(dropout=0.2), ("Conv_0", "Dense_2"), 6, 2e-3),
        "resnet": Network(resnet, ("Conv_0", "Dense_0"), 3, 4e-3),
        "transformer": Network(transformer, ("patches", "head"), 6, 2e-3),
    }


SIZES = (1, 64)
"""The batches that are timed."""


class Way(NamedTuple):
    """A way to store a network."""

    make: Callable[[Any], Any]
    """What it makes of the trained variables."""
    aim: float | None = None
    """At most so many points below float32, in the mean over seeds."""
    dtype: str = "float32"
    """What is computed in."""


def ways(lab: "Lab", seed: int) -> dict[str, Way]:
    """Every format by its name; float32 comes first, and the others are measured against it."""
    from jaxopt_lab import compress, tree

    quantize, predict, sample = compress.quantize, lab.predict["float32"], lab.sample
    return {
        "float32": Way(lambda v: v),
        "float32, trained on": Way(lambda v: lab.train(lab.fine, seed, v)),
        "bfloat16": Way(in_bfloat16, dtype="bfloat16"),
        "int8": Way(quantize, aim=0.1),
        "int8, dynamic": Way(compress.dynamic, aim=0.1),
        "int8, static": Way(lambda v: compress.static(v, compress.calibrate(predict, v, sample)), aim=0.1),
        "int4": Way(lambda v: quantize(v, 4)),
        "int4, trained": Way(lambda v: lab.fine_tuned(v, lab.bits(v, 4, ends=4), seed), aim=0.3),
        "int3": Way(lambda v: quantize(v, 3)),
        "int3, GPTQ": Way(lambda v: compress.gptq(predict, v, sample, bits=3)),
        "mixed, bytes of int3": Way(lambda v: quantize(v, lab.allocated(v, tree.nbytes(quantize(v, 3))))),
        "int2, ends int8": Way(lambda v: quantize(v, lab.bits(v, 2, ends=8))),
        "int2, ends int8, trained": Way(lambda v: lab.fine_tuned(v, lab.bits(v, 2, ends=8), seed)),
    }


def chosen(formats: tuple[str, ...], every: dict[str, Way]) -> dict[str, Way]:
    """Those formats of all that are asked for, and float32."""
    if unknown := [name for name in formats if name not in every]:
        raise ValueError(f"formats={unknown[0]!r} is none of: {'; '.join(every)}")
    return {name: way for name, way in every.items() if name in formats or name == "float32" or not formats}


def in_bfloat16(variables: Any) -> Any:
    """The weights in bfloat16; running statistics stay in float32."""
    import jax

    return {**variables, "params": jax.tree.map(lambda leaf: leaf.astype("bfloat16"), variables["params"])}


class Lab:
    """A network, its data and its programs, which all seeds share: each is compiled once."""

    def __init__(self, config: Config, network: Network, loaded: Any):
        import jax
        import optax

        from jaxopt_lab import compress, data, losses, nets, train

        self.config, self.network, self.data = config, network, loaded
        self.model = nets.from_linen(network.module)
        half = nets.from_linen(network.module.clone(dtype="bfloat16"))
        self.predict = {"float32": self.model.predict, "bfloat16": half.predict}
        self.compiled = {name: jax.jit(compress.lift(predict)) for name, predict in self.predict.items()}
        self.loss = losses.per_example(losses.cross_entropy)
        self.batches = functools.partial(data.batches, loaded.train, config.batch_size)
        self.sample = [{"x": loaded.train["x"][: config.calibration]}]
        epoch = self.batches(seed=0).steps_per_epoch

        def step(rate: float, epochs: int) -> tuple[Any, int]:
            tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, epoch // 4, epochs * epoch))
            return train.make_step(self.model, self.loss, tx), epochs * epoch

        self.dense = step(network.learning_rate, config.epochs or network.epochs)
        self.fine = step(config.fine_learning_rate, config.fine_epochs)

    def train(self, how: tuple[Any, int], seed: int, variables: Any = None) -> Any:
        """The variables that a training ends on."""
        import jax

        from jaxopt_lab import train

        (step, steps), batches = how, self.batches(seed=seed)
        state = train.init(self.model, step.tx, jax.random.key(seed), batches(0), variables)
        return train.variables(train.fit(step, state, batches, steps=steps, log_every=batches.steps_per_epoch).state)

    def bits(self, variables: Any, bits: int, *, ends: int) -> dict[str, int]:
        """So many bits for every kernel, and `ends` for that of the first and of the last layer."""
        from jaxopt_lab import tree

        outer = tuple(f"params/{layer}/kernel" for layer in self.network.ends)
        return {path: ends if path in outer else bits for path in tree.selected(variables, "**/kernel")}

    def fine_tuned(self, variables: Any, bits: dict[str, int], seed: int) -> Any:
        """Trained on while rounded, and stored."""
        from jaxopt_lab import compress

        leaf = getattr(compress, self.config.leaf)
        for width in set(bits.values()):
            variables = compress.fake_quantize(
                variables, width, where=lambda path, _, width=width: bits.get(path) == width, leaf=leaf
            )
        return compress.freeze(self.train(self.fine, seed, variables))

    def allocated(self, variables: Any, nbytes: int) -> dict[str, int]:
        """The bits of each kernel that raise the loss on some training images least, within a budget of bytes."""
        from jaxopt_lab import compress

        some = {key: array[: self.config.calibration] for key, array in self.data.train.items()}
        predict = self.predict["float32"]
        return compress.allocate_bits(
            lambda v: self.loss(predict(v, some["x"]), some).mean(), variables, nbytes, bits=(2, 3, 4, 5, 6, 8)
        )


def study(config: Config) -> None:
    """Runs every network and seed, and prints the summary."""
    from rich.console import Console

    from jaxopt_lab import data, report

    check(config)
    loaded = data.load(config.dataset, cli.data_directory(config.data_dir))
    if config.validation:
        loaded = data.held_out_of_training(loaded)
    every, lines = networks(loaded.train["x"].shape[1]), []
    for name in config.networks:
        lab, runs = Lab(config, every[name], loaded), []
        for seed in config.seeds:
            out = config.out / name / f"seed_{seed}"
            runs.append(one_seed(lab, seed, out))
            report.to_json(runs[-1], out / "stages.json")
        lines += (new := summary(name, runs))
        first = runs[0][0]
        title = f"{config.dataset}, {name}: {first.parameters:,} parameters, {first.examples:,} held-out images"
        Console().print(table(new, title))
        for line in new:
            print(json.dumps(line), flush=True)
    (config.out / "summary.json").write_text(json.dumps(lines, indent=2) + "\n")


def check(config: Config) -> None:
    """Refuses options out of range, before anything is loaded."""
    for name in ("epochs", "fine_epochs", "batch_size", "calibration", "repeats"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not config.seeds or not config.networks:
        raise ValueError("give at least one of --seeds and one of --networks")


def one_seed(lab: Lab, seed: int, out: Path) -> list[Any]:
    """A network trained once and stored in every format: a stage each."""
    from jaxopt_lab import checkpoint, report

    picked = chosen(lab.config.formats, ways(lab, seed))
    trained, rows, calls = lab.train(lab.dense, seed), [], {}
    for name, way in picked.items():
        file = out / name.replace(",", "").replace(" ", "_") / "model.packed"
        checkpoint.save_packed(file, way.make(trained), overwrite=True)
        # What is measured is what the file gives back.
        variables, predict = checkpoint.load_packed(file), lab.predict[way.dtype]
        extra = {} if way.aim is None else {"aim": way.aim}
        row = report.measure(name, predict, variables, lab.data.test, directory=file.parent, batch_sizes=(), extra=extra)
        rows.append(row)
        calls[name] = functools.partial(lab.compiled[way.dtype], variables)
        points = 100 * (row.accuracy - rows[0].accuracy)
        print(f"seed {seed}, {name}: {100 * row.accuracy:.2f} % ({points:+.2f})", file=sys.stderr, flush=True)
    times = {size: report.in_turns(calls, lab.data.test["x"], size, lab.config.repeats) for size in SIZES}
    return [timed(row, rows[0], times) for row in rows]


def timed(row: Any, base: Any, times: dict[int, dict[str, list[float]]]) -> Any:
    """A stage with the median of its times, and that of their ratios to float32 in the same turn."""

    def ratio(of: dict[str, list[float]]) -> float:
        return statistics.median(own / other for own, other in zip(of[row.name], of[base.name], strict=True))

    return row._replace(
        latency_ms={size: statistics.median(of[row.name]) for size, of in times.items()},
        extra={
            **row.extra,
            "points": 100 * (row.accuracy - base.accuracy),
            "file to float32": row.directory_bytes / base.directory_bytes,
            "arrays to float32": row.array_bytes / base.array_bytes,
            **{f"time to float32 at {size}": ratio(of) for size, of in times.items()},
        },
    )


def summary(network: str, runs: list[list[Any]]) -> list[dict[str, Any]]:
    """A line a format: mean and spread over seeds of the accuracy in per cent and of the points, bytes, times, and the aim."""
    lines = []
    for stages in zip(*runs, strict=True):
        accuracies, points = [100 * row.accuracy for row in stages], [row.extra["points"] for row in stages]
        several, aim = len(stages) > 1, stages[0].extra.get("aim")
        lines.append(
            {
                "network": network,
                "format": stages[0].name,
                "seeds": len(stages),
                "accuracy_mean": round(statistics.mean(accuracies), 3),
                "accuracy_spread": round(statistics.stdev(accuracies), 3) if several else None,
                "points_mean": round(statistics.mean(points), 3),
                "points_spread": round(statistics.stdev(points), 3) if several else None,
                "points": [round(value, 2) for value in points],
                "aim": aim,
                # To the thousandth of a point: the mean of hundredths is not exact in binary.
                "missed_by": None if aim is None else round(max(0.0, -aim - statistics.mean(points)), 3),
                "file_bytes": round(statistics.mean(row.directory_bytes for row in stages)),
                "array_bytes": round(statistics.mean(row.array_bytes for row in stages)),
                **{f"ms_at_{size}": round(statistics.mean(row.latency_ms[size] for row in stages), 3) for size in SIZES},
                **{
                    key.replace(" ", "_"): round(statistics.mean(row.extra[key] for row in stages), 4)
                    for key in stages[0].extra
                    if " to " in key
                },
            }
        )
    return lines


def table(lines: list[dict[str, Any]], title: str) -> Any:
    """The summary of a network for the terminal."""
    from rich import box
    from rich.table import Table

    def around(line: dict[str, Any], key: str, sign: str = "") -> str:
        spread = line[f"{key}_spread"]
        # Adding 0 makes a rounded -0.00 a 0.00.
        return f"{round(line[f'{key}_mean'], 2) + 0.0:{sign}.2f}" + ("" if spread is None else f" ±{spread:.2f}")

    def verdict(line: dict[str, Any]) -> str:
        if line["aim"] is None:
            return ""
        return f"missed by {line['missed_by']:.2f}" if line["missed_by"] else f"met ({line['aim']})"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "format": lambda line: line["format"],
        "accuracy, %": lambda line: around(line, "accuracy"),
        "points": lambda line: around(line, "points", "+"),
        "aim": verdict,
        "file,\nkB": lambda line: f"{line['file_bytes'] / 1e3:.1f}",
        "arrays,\nkB": lambda line: f"{line['array_bytes'] / 1e3:.1f}",
        **{f"time\nat {size}": lambda line, size=size: f"{line[f'time_to_float32_at_{size}']:.2f}" for size in SIZES},
    }
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for k, heading in enumerate(columns):
        made.add_column(heading, justify="right" if k else "left", vertical="bottom", no_wrap=k > 0)
    for line in lines:
        made.add_row(*(cell(line) for cell in columns.values()))
    return made


if __name__ == "__main__":
    sys.exit(cli.main(study, Config))
