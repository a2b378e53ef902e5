"""Trials per second of `search.population` against an Optuna study that trains one after another: one JSON line a case.

    ./scripts/run scripts/benchmark_population.py [--cases mlp lenet halving] [--trials 256] [--steps 400]

`mlp` is an MLP of one hidden layer of 32 on scikit-learn's digits at batch 64, with a random rate and weight decay; `lenet` is
LeNet at batch 64, on images of MNIST's shape drawn at random, since only their shape costs time (a quarter of the trials, and a
fortieth of the steps). Three ways, compilation and study included, each in its turn in one process:

    rebuilt      an objective that builds and compiles its optimiser anew (of fewer trials, and scaled)
    shared       an objective that shares one compiled step, its hyper-parameters arguments, its batches on the device already
    population   all of a study's trials asked at once, and told

`halving` counts in how many of 20 sweeps of 64 configurations successive halving, at no more than a quarter of the steps, ends on
the configuration that training all to the end finds, or on one whose validation loss is within 1 % of it; same keys and batches.
The rungs are at an eightieth, a twentieth, a quarter and a half of the steps, and a half, 5, 4 and 3 sixteenths go on: one
evaluation is noisier (9 %) than the best eight lie apart (5 % each), so that only what is hopeless is dropped, and that at once.
The schedule was chosen on the seeds from 1000 to 1039.
"""

import argparse
import functools
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna

from jaxopt_lab import data, nets, search, train

SPACE = {"rate": search.log_uniform(1e-4, 0.1), "decay": search.log_uniform(1e-6, 0.1)}


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def random_images() -> dict[str, np.ndarray]:
    """2048 images of MNIST's shape and their labels."""
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((2048, 28, 28, 1), dtype=np.float32), "y": rng.integers(0, 10, 2048, dtype=np.int32)}


class Problem:
    """A network, its data, and one trial on it."""

    def __init__(self, net: Any, arrays: dict[str, np.ndarray], held_out: dict[str, np.ndarray], seed: int = 0):
        self.model, self.arrays = nets.from_linen(net), arrays
        self.batches = data.batches(arrays, 64, seed=seed)
        self.held_out = jax.device_put(held_out)

    def tx(self, config: dict[str, Any]) -> optax.GradientTransformation:
        return optax.adamw(config["rate"], weight_decay=config["decay"])

    def init(self, key, config):
        return train.init(self.model, self.tx(config), key, self.arrays["x"][:1])

    def step(self, state, batch, config):
        return train.make_step(self.model, cross_entropy, self.tx(config))(state, batch)

    def evaluate(self, state):
        return jnp.mean(cross_entropy(self.model.predict(train.variables(state), self.held_out["x"]), self.held_out))

    @property
    def trial(self) -> search.Trial:
        """Of functions of its own, so that nothing is compiled yet."""
        return search.Trial(*map(functools.partial, (self.init, self.step, self.evaluate)))


def study() -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def rebuilt(problem: Problem, trials: int, steps: int) -> float:
    """An objective as it is written first: the optimiser is a closure of the trial, and so is the compiled step."""

    def objective(trial):
        config = search.suggest(trial, SPACE)
        tx = problem.tx(config)
        step = jax.jit(train.make_step(problem.model, cross_entropy, tx), donate_argnums=0)
        state = train.init(problem.model, tx, jax.random.key(trial.number), problem.arrays["x"][:1])
        for t in range(steps):
            state, _ = step(state, problem.batches(t))
        return float(problem.evaluate(state))

    found = study()
    found.optimize(objective, n_trials=trials)
    return found.best_value


def shared(problem: Problem, trials: int, steps: int) -> float:
    """An objective as good as it gets: one compiled step for all trials."""
    init, step, evaluate = jax.jit(problem.init), jax.jit(problem.step, donate_argnums=0), jax.jit(problem.evaluate)
    batches = [jax.device_put(problem.batches(t)) for t in range(steps)]

    def objective(trial):
        config = search.suggest(trial, SPACE)
        state = init(jax.random.fold_in(jax.random.key(0), trial.number), config)
        for batch in batches:
            state, _ = step(state, batch, config)
        return float(evaluate(state))

    found = study()
    found.optimize(objective, n_trials=trials)
    return found.best_value


def together(problem: Problem, trials: int, steps: int) -> tuple[float, str]:
    """All trials in one population."""
    found = study()
    asked = search.ask(found, SPACE, trials)
    configs = [each.config for each in asked]
    result = search.population(problem.trial, configs, key=jax.random.key(0), batches=problem.batches, steps=steps, keep=1)
    for each, score in zip(asked, result.scores, strict=True):
        search.tell(found, each.trial, score)
    return found.best_value, ", ".join(result.engines)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    out = work()
    return time.perf_counter() - begin, out


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "jax": jax.__version__,
    }


def compared(name: str, problem: Problem, trials: int, steps: int, few: int) -> dict[str, Any]:
    """Trials per second of the three ways."""
    few = min(few, trials)
    (ours, (best, engine)), (sharing, other) = (
        seconds(lambda: together(problem, trials, steps)),
        seconds(lambda: shared(problem, trials, steps)),
    )
    line = {
        "case": name,
        "trials": trials,
        "steps": steps,
        "engine": engine,
        "population_s": round(ours, 2),
        "shared_s": round(sharing, 2),
        "times_shared": round(sharing / ours, 2),
        "best": best,
        "best_shared": other,
    }
    if few:
        building, _ = seconds(lambda: rebuilt(problem, few, steps))
        line |= {"rebuilt_s_a_trial": round(building / few, 3), "times_rebuilt": round(building / few * trials / ours, 1)}
    return line


def schedule(configs: int, steps: int) -> dict[str, list[int]]:
    """Rungs and survivors that drop most of what is hopeless at once, and little of the rest before half of the steps.

    Of 64 configurations and 400 steps: 32, 20, 16 and 12 go on after 5, 20, 100 and 200, which takes a quarter of all steps.
    """
    parts = {max(steps // part, 1): max(configs * share // 16, 1) for part, share in ((80, 8), (20, 5), (4, 4), (2, 3))}
    rungs = [rung for rung in parts if rung < steps]
    return {"rungs": rungs, "survivors": [parts[rung] for rung in rungs]}


def halved(problem: Problem, seeds: range, configs: int, steps: int) -> dict[str, Any]:
    """How often halving ends where training all to the end does, and on what part of the steps."""
    trial, won, near, cost = problem.trial, 0, 0, 0.0
    for seed in seeds:
        draw, key = jax.random.split(jax.random.key(seed))
        drawn = search.configs(SPACE, search.sample(SPACE, draw, configs))
        batches = data.batches(problem.arrays, 64, seed=seed)
        whole = search.population(trial, drawn, key=key, batches=batches, steps=steps, engine=search.vmapped())
        few = search.successive_halving(
            trial, drawn, key=key, batches=batches, steps=steps, **schedule(configs, steps), engine=search.vmapped()
        )
        alive = (~np.isnan(few.curves)).sum(axis=0)
        taken = float(np.dot(alive, np.diff([0, *few.evaluated])))
        cost = max(cost, taken / (configs * steps))
        won += few.best == whole.best
        near += bool(whole.scores[few.best] <= 1.01 * whole.scores[whole.best])
    return {
        "case": "halving",
        "sweeps": len(seeds),
        "configs": configs,
        "steps": steps,
        "same": won,
        "within_1_percent": near,
        "cost": round(cost, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=["mlp", "lenet", "halving"], default=["mlp", "lenet", "halving"])
    parser.add_argument("--trials", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rebuilt", type=int, default=8, help="how many trials to rebuild the optimiser for")
    parser.add_argument("--sweeps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first sweep")
    options = parser.parse_args()
    optuna.logging.set_verbosity(logging.ERROR)
    digits = data.digits()
    for name in options.cases:
        if name == "mlp":
            line = compared(
                name, Problem(nets.MLP(features=(32,)), digits.train, digits.test), options.trials, options.steps, options.rebuilt
            )
        elif name == "lenet":
            images = random_images()
            problem = Problem(nets.LeNet(), images, jax.tree.map(lambda x: x[:64], images))
            line = compared(name, problem, max(options.trials // 4, 1), max(options.steps // 40, 1), 0)
        else:
            problem = Problem(nets.MLP(features=(32,)), digits.train, digits.test)
            line = halved(problem, range(options.seed, options.seed + options.sweeps), max(options.trials // 4, 1), options.steps)
        print(json.dumps({**line, **machine()}), flush=True)


if __name__ == "__main__":
    main()
