"""The main job: a real model made smaller in five stages, and one honest table of what each cost.

    python experiments/compress.py                                          digits, about a minute
    python experiments/compress.py --dataset mnist --data-dir DIRECTORY     the real MNIST, some twenty minutes

A teacher is trained; a small student alone; the same student distilled from the teacher; that one pruned to 90 % on a cubic
schedule while it is distilled; and its weights stored as int8. Every stage is saved, and the last one is loaded again in a fresh
process, where it must give the same accuracy. The table, a picture and the stages stand in the output directory.

Measured on digits, with seeds 0 and 1, in 53 s of CPU time each (the held-out accuracy in %, and the bytes of the arrays):

    teacher         98.6    98.6    668,712
    student         96.4    96.1     26,280
    distilled       97.2    97.2     26,280
    pruned          94.7    95.8     26,280
    pruned, int8    94.7    95.8      7,312

The student has a twenty-fifth of the teacher's parameters, and the last stage about a ninetieth of its bytes. No ranking is
claimed: on 360 images the 95 % interval of an accuracy is three to five points wide, and the widths and the rate were settled on
these same images.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxopt_lab import cli

if TYPE_CHECKING:
    from jaxopt_lab.data import Dataset
    from jaxopt_lab.nets import Model
    from jaxopt_lab.report import Stage


@dataclass(frozen=True)
class Config:
    """Compresses a classifier: teacher, student, distilled, distilled and pruned, int8; prints one table."""

    dataset: Literal["digits", "mnist1d", "mnist"] = "digits"
    """The data set; mnist is read from files."""
    data_dir: Path | None = None
    """Where the four files of MNIST lie; JAXOPT_LAB_DATA if not given."""
    out: Path = Path("runs/compress")
    """Where the stages, the table and the picture go; replaced from run to run."""
    epochs: int | None = None
    """Passes over the data for each training stage; by default 40 (digits and mnist1d) or 8 (mnist)."""
    batch_size: int = 64
    learning_rate: float | None = None
    """The peak of a cosine schedule of Adam; by default 0.005 (digits) or 0.002."""
    sparsity: float = 0.9
    """The fraction of the student's kernels that is cut."""
    temperature: float = 4.0
    """Of the teacher's soft targets."""
    teacher_weight: float = 0.7
    """The share of the soft targets in the loss; the labels have the rest."""
    seed: int = 0
    evaluate: Path | None = None
    """Only load one saved stage, evaluate it on the held-out data, and print a JSON line."""


def networks(dataset: str) -> tuple["Model", "Model"]:
    """The teacher and the student."""
    from jaxopt_lab import nets

    if dataset == "mnist":
        return nets.from_linen(nets.LeNet(dropout=0.1)), nets.from_linen(nets.LeNet(channels=(4, 8), features=(64, 32)))
    wide, narrow = ((512, 256), (64, 32)) if dataset == "digits" else ((256, 256), (96, 48))
    dropout = 0.5 if dataset == "digits" else 0.2
    return nets.from_linen(nets.MLP(features=wide, dropout=dropout)), nets.from_linen(nets.MLP(features=narrow))


def check(config: Config) -> None:
    """Refuses options out of range, before anything is loaded."""
    for name, holds, range_ in (
        ("learning_rate", config.learning_rate is None or 0 < config.learning_rate < math.inf, "be above 0"),
        ("sparsity", 0 <= config.sparsity <= 1, "lie in [0, 1]"),
        ("temperature", 0 < config.temperature < math.inf, "be above 0"),
        ("teacher_weight", 0 <= config.teacher_weight <= 1, "lie in [0, 1]"),
        ("epochs", config.epochs is None or config.epochs >= 1, "be at least 1"),
    ):
        if not holds:
            raise ValueError(f"{name}={getattr(config, name)} must {range_}")


class Lab:
    """What every stage shares: the data, the length of a training, where results go."""

    def __init__(self, config: Config):
        from jaxopt_lab import data

        self.config = config
        self.data: Dataset = data.load(config.dataset, cli.data_directory(config.data_dir))
        epochs = config.epochs or (8 if config.dataset == "mnist" else 40)
        self.steps = epochs * data.batches(self.data.train, config.batch_size, seed=config.seed).steps_per_epoch
        self.rows: list[Stage] = []
        # Whether results can be kept is found out now, not after the first training.
        config.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.out):
            pass

    def train(
        self, model: "Model", *, arrays: dict[str, Any], loss: Any, wrap: Any = None, variables: Any = None
    ) -> tuple[Any, float]:
        """One training stage: the variables it ends on, and its seconds."""
        import jax
        import optax

        from jaxopt_lab import data, train

        config = self.config
        rate = config.learning_rate or (5e-3 if config.dataset == "digits" else 2e-3)
        tx = optax.adam(optax.cosine_decay_schedule(rate, self.steps))
        tx = tx if wrap is None else wrap(tx)
        batches = data.batches(arrays, config.batch_size, seed=config.seed)
        begin = time.perf_counter()
        state = train.init(model, tx, jax.random.key(config.seed), batches(0), variables)
        result = train.fit(train.make_step(model, loss, tx), state, batches, steps=self.steps, log_every=max(1, self.steps // 4))
        return train.variables(result.state), time.perf_counter() - begin

    def keep(self, name: str, model: "Model", variables: Any, seconds: float | None) -> Path:
        """Saves and measures a stage; returns its directory."""
        from jaxopt_lab import checkpoint, report

        directory = self.config.out / name.replace(" ", "_").replace(",", "")
        checkpoint.save_tree(directory, variables, overwrite=True)
        row = report.measure(name, model.predict, variables, self.data.test, directory=directory, seconds=seconds)
        self.rows.append(row)
        print(f"{name}: accuracy {100 * row.accuracy:.2f} %, {row.array_bytes:,} bytes", file=sys.stderr, flush=True)
        return directory


def study(config: Config) -> None:
    """Runs all stages, or evaluates a saved one."""
    check(config)
    if config.evaluate is not None:
        print(json.dumps(reloaded(config)))
        return

    from rich.console import Console

    from jaxopt_lab import report

    lab = Lab(config)
    last = stages(lab)
    check_in_a_fresh_process(config, last, lab.rows[-1])
    Console().print(report.table(lab.rows, title=f"{config.dataset}: held-out accuracy of {lab.rows[0].examples:,} examples"))
    report.to_json(lab.rows, config.out / "stages.json")
    report.picture(lab.rows, config.out / "accuracy_against_bytes.png", title=f"{config.dataset}: accuracy against size")
    print(f"\nthe stages, stages.json and accuracy_against_bytes.png are in {config.out}")


def stages(lab: Lab) -> Path:
    """Trains, distils, prunes and quantises; returns the directory of the last stage."""
    import jax

    from jaxopt_lab import compress, losses, prune, schedules

    config, arrays = lab.config, dict(lab.data.train)
    begin, end = lab.steps // 10, lab.steps * 7 // 10
    ramp = schedules.cubic(0.0, config.sparsity, begin, end)
    teacher, student = networks(config.dataset)
    labels = losses.per_example(losses.cross_entropy)

    taught, seconds = lab.train(teacher, arrays=arrays, loss=labels)
    lab.keep("teacher", teacher, taught, seconds)

    alone, seconds = lab.train(student, arrays=arrays, loss=labels)
    lab.keep("student", student, alone, seconds)

    # The teacher comes in by the batch: its logits are computed once, and shuffled with the examples.
    predict = jax.jit(teacher.predict)
    arrays["teacher"] = in_parts(lambda x: predict(taught, x), arrays["x"], 1024)
    soft = losses.per_example(losses.distill.soft_targets, "teacher", temperature=config.temperature)
    loss = losses.combine((1 - config.teacher_weight, labels), (config.teacher_weight, soft))
    distilled, seconds = lab.train(student, arrays=arrays, loss=loss)
    lab.keep("distilled", student, distilled, seconds)

    pruned, seconds = lab.train(
        student,
        arrays=arrays,
        loss=loss,
        wrap=lambda tx: prune.sparsify(tx, ramp, begin=begin, end=end, every=max(1, lab.steps // 100)),
        variables=distilled,
    )
    lab.keep("pruned", student, pruned, seconds)

    stored = {**pruned, "params": compress.quantize(pruned["params"])}
    return lab.keep("pruned, int8", student, stored, None)


def in_parts(function: Any, x: Any, size: int) -> Any:
    """`function` over the rows of `x`, so many at a time."""
    import numpy as np

    return np.concatenate([np.asarray(function(x[i : i + size])) for i in range(0, len(x), size)])


def reloaded(config: Config) -> dict[str, Any]:
    """Evaluates a saved stage: all that is known of it is its directory and the functions of the two networks."""
    import jax
    import numpy as np

    from jaxopt_lab import checkpoint, compress, data, train

    variables = checkpoint.load_tree(config.evaluate)
    held_out = data.load(config.dataset, cli.data_directory(config.data_dir)).test

    stored = jax.tree.map(np.shape, compress.decompress(variables))
    for model in networks(config.dataset):
        made = jax.eval_shape(model.init, jax.random.key(0), held_out["x"][:1])
        if jax.tree.map(np.shape, made) == stored:
            return train.evaluate(model, variables, held_out)
    raise ValueError(f"{config.evaluate} holds neither the teacher nor the student of {config.dataset}: name its --dataset")


def check_in_a_fresh_process(config: Config, directory: Path, row: "Stage") -> None:
    """Loads the last stage in another process, which must find the same accuracy."""
    command = [sys.executable, __file__, "--evaluate", str(directory), "--dataset", config.dataset]
    if config.data_dir is not None:
        command += ["--data-dir", str(config.data_dir)]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    if answer.returncode:
        said = answer.stderr.strip().splitlines() or [f"it ended with code {answer.returncode}"]
        raise ValueError(f"a fresh process cannot evaluate {directory}: {said[-1].removeprefix('error: ')}")
    accuracy = json.loads(answer.stdout.splitlines()[-1])["accuracy"]
    if round(accuracy * row.examples) != round(row.accuracy * row.examples):
        raise ValueError(f"a fresh process reads {directory} at an accuracy of {accuracy}, this one at {row.accuracy}")
    print(f"{directory}, loaded in a fresh process: accuracy {100 * accuracy:.2f} %, the same", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.main(study, Config))
