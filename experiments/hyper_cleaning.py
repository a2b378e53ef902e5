"""Digits with half of the training labels wrong: which examples to trust, learnt by hypergradients from a clean validation set.

    python experiments/hyper_cleaning.py                    five seeds
    python experiments/hyper_cleaning.py --seeds 0          one

Of scikit-learn's digits 500 are trained on, of which 250 have a wrong label, 400 are for validation and 897 for the test. Every
training example has a weight, the sigmoid of a hyper-parameter, 500 in all. The inner training is softmax regression on the
weighted examples, from zero; the outer loss is the cross-entropy on the validation examples. After 40 updates of the
hyper-parameters, those with a weight above one half are kept, and trained on together with the validation examples, as in
Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", 2017.

    all                   the 500, wrong labels and all
    validation            the 400 alone
    all and validation    the 900
    reverse               cleaned by the gradient through the whole training, by momentum
    implicit              cleaned by the implicit gradient, by 50 conjugate gradients, at the end of the same training
    adam, truncated       the inner training by Adam, the gradient through its last 100 of 200 steps
    oracle                the 250 with the right labels, and the 400

Measured over five seeds: the accuracy on the test set in %, the points against the validation examples alone, the F1 of what was
kept against what has the right label, and the seconds of the 41 hypergradients, compilation included, on two shared CPU cores.

                          accuracy          points    F1       kept    seconds
    all                   76.63 +- 0.70    -18.02
    validation            94.65 +- 0.70      0.00
    all and validation    92.11 +- 0.80     -2.54
    reverse               94.56 +- 1.31     -0.09     0.955    249     8.8
    implicit              94.56 +- 1.24     -0.09     0.956    249     4.9
    adam, truncated       94.05 +- 1.51     -0.60     0.885    231     7.7
    oracle                95.50 +- 0.56     +0.85

An earlier measurement of the same protocol: all and validation 89.3, validation 94.6, cleaned 94.8, oracle 96.1; by Adam with
eps_root=1e-8 92.9. The wrong labels are found, and cleaning repairs what they cost; but it does no better than to leave the 500
out. 400 clean digits leave the oracle only 0.85 points to gain, and what is kept was chosen to agree with those 400. Decays of
1e-4, 3e-3 and 1e-2, 2 to 80 updates, and cuts other than one half did not change that (seeds 100 to 103).

The settings were chosen on seeds 100 and 101, which are not among those reported. Through the whole of a training by Adam the
gradient is finite, and of no use: at its first steps Adam takes the sign of a gradient, whatever its size, so that the exact
gradient is three hundred times as long as that of the last 100 steps (7.3 against 0.026, seed 100), and says nothing of which
labels are wrong (correlation -0.05 against 0.79). The last 100 steps agree with the implicit gradient.
"""

import functools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxopt_lab import cli


@dataclass(frozen=True)
class Config:
    """Learns which of 500 training examples have a wrong label, for several seeds; prints what that does for the test accuracy."""

    out: Path = Path("runs/hyper_cleaning")
    """Where seed_N.json and summary.json go."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each draws the three sets, and which labels are wrong."""
    steps: int = 200
    """Of each training, on all of its examples at once."""
    learning_rate: float = 0.5
    """Of momentum 0.9."""
    adam_learning_rate: float = 0.03
    decay: float = 1e-3
    """Times the sum of squares, in every loss that is trained on."""
    updates: int = 40
    """Of the hyper-parameters, by Adam."""
    hyper_learning_rate: float = 0.3


TRAIN, VALIDATION, WRONG, CLASSES = 500, 400, 250, 10

STAGES = ("all", "validation", "all and validation", "reverse", "implicit", "adam, truncated", "oracle")


class Split(NamedTuple):
    """The digits of one seed; the first 500 of the 900 are those to clean."""

    x: Any
    given: Any
    """`[900]`, labels, 250 of them wrong."""
    wrong: Any
    """`[900]`, bool."""
    test_x: Any
    test_y: Any


class Lab:
    """Softmax regression, and how it is trained."""

    def __init__(self, config: Config):
        import jax
        import jax.numpy as jnp

        self.config = config
        self.start = {"kernel": jnp.zeros((64, CLASSES)), "bias": jnp.zeros(CLASSES)}
        # Built once, so that all seeds share their programs.
        self.fit = jax.jit(self._fit)
        self.gradients = {name: jax.jit(functools.partial(self._gradient, name)) for name in STAGES[3:6]}

    def split(self, seed: int) -> Split:
        """Three sets of a seed; wrong labels are drawn among the other nine."""
        import numpy as np
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x, draw = (x / 16).astype(np.float32), np.random.default_rng(seed)
        order = draw.permutation(len(x))
        known, test = order[: TRAIN + VALIDATION], order[TRAIN + VALIDATION :]
        wrong = np.isin(np.arange(TRAIN + VALIDATION), draw.permutation(TRAIN)[:WRONG])
        other = (y[known] + draw.integers(1, CLASSES, len(known))) % CLASSES
        return Split(x[known], np.where(wrong, other, y[known]), wrong, x[test], y[test])

    def tx(self, name: str = "") -> Any:
        """The inner optimiser of a stage."""
        import optax

        config = self.config
        return optax.adam(config.adam_learning_rate) if "adam" in name else optax.sgd(config.learning_rate, 0.9)

    def loss(self, params: Any, split: Split, weights: Any, examples: float) -> Any:
        """The weighted sum of cross-entropies over a number of examples, and decay."""
        import jax.numpy as jnp
        import optax

        each = optax.softmax_cross_entropy_with_integer_labels(logits(params, split.x), split.given)
        return jnp.sum(weights * each) / examples + self.config.decay * jnp.sum(params["kernel"] ** 2)

    def step(self, state: Any, split: Split, weights: Any, examples: Any, name: str = "") -> Any:
        """One step of a training."""
        import jax
        import optax

        params, opt = state
        updates, opt = self.tx(name).update(jax.grad(self.loss)(params, split, weights, examples), opt, params)
        return optax.apply_updates(params, updates), opt

    def _fit(self, split: Split, weights: Any) -> Any:
        """Parameters trained on examples of these weights."""
        import jax

        state = (self.start, self.tx().init(self.start))
        step = lambda state, _: (self.step(state, split, weights, weights.sum()), None)  # noqa: E731
        return jax.lax.scan(step, state, None, self.config.steps)[0][0]

    def _gradient(self, name: str, split: Split, hyper: Any) -> Any:
        """Validation loss and its gradient by the 500 hyper-parameters, by the method of a stage."""
        import jax
        import jax.numpy as jnp
        import optax

        from jaxopt_lab.search.hypergradient import conjugate_gradient, hypergradient, implicit, reverse, truncated

        def weights(hyper: Any) -> Any:
            return jnp.concatenate([jax.nn.sigmoid(hyper), jnp.zeros(VALIDATION)])

        def step(state: Any, batch: Any, hyper: Any) -> Any:
            del batch
            return self.step(state, split, weights(hyper), TRAIN, name)

        def outer(state: Any) -> Any:
            found = logits(state[0], split.x[TRAIN:])
            return optax.softmax_cross_entropy_with_integer_labels(found, split.given[TRAIN:]).mean()

        def inner(params: Any, hyper: Any) -> Any:
            return self.loss(params, split, weights(hyper), TRAIN)

        steps = self.config.steps
        method = {
            "reverse": reverse(),
            "implicit": implicit(inner, solver=conjugate_gradient(50), params=lambda state: state[0]),
            "adam, truncated": truncated(max(1, steps // 2)),
        }[name]
        state = (self.start, self.tx(name).init(self.start))
        return hypergradient(step, outer, hyper, state, {"t": jnp.arange(steps)}, steps=steps, method=method)

    def cleaned(self, name: str, split: Split) -> tuple[Any, Any]:
        """Which of the 500 are kept, and the validation losses on the way."""
        import jax.numpy as jnp
        import numpy as np
        import optax

        from jaxopt_lab.search.hypergradient import tune

        gradient = functools.partial(self.gradients[name], split)
        tuned = tune(gradient, jnp.zeros(TRAIN), optax.adam(self.config.hyper_learning_rate), steps=self.config.updates)
        return np.asarray(tuned.hyper > 0), tuned.values


def logits(params: Any, x: Any) -> Any:
    """`[n, 10]`."""
    return x @ params["kernel"] + params["bias"][None, :]


def study(config: Config) -> None:
    """Runs every seed, and prints the summary."""
    from rich.console import Console

    check(config)
    lab, runs = Lab(config), []
    config.out.mkdir(parents=True, exist_ok=True)
    for seed in config.seeds:
        runs.append(one_seed(lab, seed))
        (config.out / f"seed_{seed}.json").write_text(json.dumps(runs[-1], indent=2) + "\n")
    lines = summary(runs)
    Console().print(table(lines))
    for line in lines:
        print(json.dumps(line), flush=True)
    (config.out / "summary.json").write_text(json.dumps(lines, indent=2) + "\n")


def check(config: Config) -> None:
    """Refuses options out of range."""
    for name in ("steps", "updates"):
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    for name in ("learning_rate", "adam_learning_rate", "hyper_learning_rate"):
        if not (value := getattr(config, name)) > 0:
            raise ValueError(f"{name}={value} must be above 0")
    if not config.seeds:
        raise ValueError("give at least one of --seeds")


def one_seed(lab: Lab, seed: int) -> list[dict[str, Any]]:
    """A row a stage: test accuracy, and of the cleaned ones how well the wrong labels were found."""
    import time

    import numpy as np

    split = lab.split(seed)
    ours = np.arange(TRAIN + VALIDATION) < TRAIN
    chosen = {"all": ours, "validation": ~ours, "all and validation": ours | ~ours, "oracle": ~split.wrong}
    rows = []
    for name in STAGES:
        row: dict[str, Any] = {"stage": name, "seed": seed}
        if name not in chosen:
            begin = time.perf_counter()
            kept, losses = lab.cleaned(name, split)
            chosen[name] = np.concatenate([kept, np.ones(VALIDATION, bool)])
            right = kept & ~split.wrong[:TRAIN]
            row |= {
                "kept": int(kept.sum()),
                "f1": float(2 * right.sum() / (kept.sum() + TRAIN - WRONG)),
                "outer_first": float(losses[0]),
                "outer_best": float(losses.min()),
                "seconds": round(time.perf_counter() - begin, 2),
            }
        params = lab.fit(split, chosen[name].astype(np.float32))
        row["accuracy"] = float(100 * np.mean(np.argmax(logits(params, split.test_x), axis=1) == split.test_y))
        print(f"seed {seed}, {name}: {row['accuracy']:.2f} %", file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def summary(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line a stage: mean and spread of the accuracy, points against the validation examples alone, F1 of what is kept."""
    lines = []
    for stages in zip(*runs, strict=True):
        accuracies = [row["accuracy"] for row in stages]
        alone = [run[STAGES.index("validation")]["accuracy"] for run in runs]
        line = {
            "stage": stages[0]["stage"],
            "seeds": len(stages),
            "accuracy_mean": round(statistics.mean(accuracies), 3),
            "accuracy_spread": round(statistics.stdev(accuracies), 3) if len(stages) > 1 else None,
            "points_mean": round(statistics.mean(a - b for a, b in zip(accuracies, alone, strict=True)), 3),
            "points": [round(a - b, 2) for a, b in zip(accuracies, alone, strict=True)],
        }
        if "f1" in stages[0]:
            line |= {key: round(statistics.mean(row[key] for row in stages), 3) for key in ("f1", "kept", "seconds")}
        lines.append(line)
    return lines


def table(lines: list[dict[str, Any]]) -> Any:
    """The summary for the terminal."""
    from rich import box
    from rich.table import Table

    def spread(line: dict[str, Any]) -> str:
        return "" if line["accuracy_spread"] is None else f" ±{line['accuracy_spread']:.2f}"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "stage": lambda line: line["stage"],
        "accuracy, %": lambda line: f"{line['accuracy_mean']:.2f}{spread(line)}",
        "points": lambda line: f"{line['points_mean']:+.2f}",
        "F1": lambda line: f"{line['f1']:.3f}" if "f1" in line else "",
        "kept": lambda line: f"{line['kept']:.0f}" if "f1" in line else "",
        "s": lambda line: f"{line['seconds']:.1f}" if "f1" in line else "",
    }
    made = Table(title="digits, half of 500 labels wrong: 897 held-out images", box=box.SIMPLE_HEAD, title_justify="left")
    for k, heading in enumerate(columns):
        made.add_column(heading, justify="right" if k else "left", no_wrap=True)
    for line in lines:
        made.add_row(*(cell(line) for cell in columns.values()))
    return made


if __name__ == "__main__":
    sys.exit(cli.main(study, Config))
