"""A hundred hyper-parameters, with a gradient and without: one JSON line a method and seed, then one a method.

    ./scripts/run scripts/benchmark_hypergradient.py [--budget 300] [--seeds 0 1 2] [--methods tpe reverse] [--tiny]

500 digits have been labelled by a hundred people, five each, of whom fifty chose at random. Each person has a weight between 0 and
1, a hundred hyper-parameters; softmax regression is trained on the weighted examples for 200 steps of momentum, and judged by its
cross-entropy on 400 other digits, which is what every method lowers. The first trial of all of them has every weight at 0.5.

The budget counts trainings. A hypergradient counts as the median of its time over that of a training, both compiled and measured
in turns, so that a method with gradients gets fewer of them; what a sampler takes to suggest is not counted, and reported as
`suggest_s`. `gp` is `search.GPSampler` (or Optuna's, where there is none), `tpe` Optuna's.

Measured on two shared CPU cores, the mean of seeds 0 and 1; `gp` was Optuna's. The weights that the gradients find are below 0.01
for the careless and 0.97 for the careful, those of `gp` 0.15 and 0.84, those of `tpe` 0.35 and 0.61.

                budget    calls    validation loss    test accuracy, %    suggest_s
    random      300       300      0.925              84.5                10
    tpe         300       300      0.807              86.5                100
    gp          100       100      0.536              90.3                139
    reverse     100       29       0.351              93.3                2
    implicit    100       92       0.346              93.4                1
    reverse     300       103      0.345              93.4                2
    implicit    300       281      0.344              93.5                1
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from jaxopt_lab.search.hypergradient import conjugate_gradient, hypergradient, implicit, reverse, tune, unit

PEOPLE, EACH, VALIDATION, CLASSES = 100, 5, 400, 10
METHODS = ("random", "tpe", "gp", "reverse", "implicit")


class Problem:
    """A draw of the examples and of the labels, compiled."""

    def __init__(self, seed: int, steps: int):
        x, y = load_digits(return_X_y=True)
        x, draw = jnp.asarray(x / 16, jnp.float32), np.random.default_rng(seed)
        order = draw.permutation(len(x))
        train, held, test = np.split(order, [PEOPLE * EACH, PEOPLE * EACH + VALIDATION])
        careless = draw.permutation(PEOPLE) < PEOPLE // 2
        given = jnp.asarray(np.where(np.repeat(careless, EACH), draw.integers(0, CLASSES, len(train)), y[train]))
        start = {"kernel": jnp.zeros((64, CLASSES)), "bias": jnp.zeros(CLASSES)}
        tx = optax.sgd(0.5, 0.9)

        def logits(params: Any, x: Any) -> Any:
            return x @ params["kernel"] + params["bias"][None, :]

        def inner(params: Any, weights: Any) -> Any:
            each = optax.softmax_cross_entropy_with_integer_labels(logits(params, x[train]), given)
            return jnp.mean(jnp.repeat(weights, EACH) * each) + 1e-3 * jnp.sum(params["kernel"] ** 2)

        def step(state: Any, batch: Any, weights: Any) -> Any:
            del batch
            updates, opt = tx.update(jax.grad(inner)(state["params"], weights), state["opt"])
            return {"params": optax.apply_updates(state["params"], updates), "opt": opt}

        def outer(state: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(logits(state["params"], x[held]), y[held]).mean()

        def gradient(method: Any) -> Callable[[Any], Any]:
            state = {"params": start, "opt": tx.init(start)}
            numbers = {"t": jnp.arange(steps)}
            return jax.jit(lambda weights: hypergradient(step, outer, weights, state, numbers, steps=steps, method=method)[:2])

        def trained(weights: Any) -> Any:
            state = {"params": start, "opt": tx.init(start)}
            return jax.lax.scan(lambda state, _: (step(state, {}, weights), None), state, None, steps)[0]

        self.value = jax.jit(lambda weights: outer(trained(weights)))
        self.accuracy = jax.jit(lambda weights: jnp.mean(jnp.argmax(logits(trained(weights)["params"], x[test]), 1) == y[test]))
        solver = conjugate_gradient(30)
        self.gradients = {"reverse": gradient(reverse()), "implicit": gradient(implicit(inner, solver=solver))}
        self.careless = careless

    def trainings(self, repeats: int) -> dict[str, float]:
        """What a hypergradient of each method costs, in trainings."""
        at = jnp.full(PEOPLE, 0.5)
        calls = {"training": self.value, **self.gradients}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(-1, repeats):
            for name, call in calls.items():
                begin = time.perf_counter()
                jax.block_until_ready(call(at))
                if turn >= 0:
                    times[name].append(time.perf_counter() - begin)
        ratios = {name: [a / b for a, b in zip(times[name], times["training"], strict=True)] for name in self.gradients}
        return {name: max(1.0, statistics.median(each)) for name, each in ratios.items()}


def descended(problem: Problem, name: str, budget: int, cost: float) -> tuple[np.ndarray, int, float]:
    """The best weights within the budget by Adam on the reals behind (0, 1), how many gradients, and seconds beside them."""
    updates = max(1, int(budget / cost) - 1)
    spent = 0.0

    def timed(weights: Any) -> Any:
        nonlocal spent
        begin = time.perf_counter()
        found = jax.block_until_ready(problem.gradients[name](weights))
        spent += time.perf_counter() - begin
        return found

    begin = time.perf_counter()
    tuned = tune(timed, jnp.full(PEOPLE, 0.5), optax.adam(0.3), steps=updates, ranges={"**": unit()})
    return np.asarray(tuned.hyper), updates + 1, time.perf_counter() - begin - spent


def sampled(problem: Problem, sampler: Any, budget: int) -> tuple[np.ndarray, int, float]:
    """The best weights among as many trials as the budget has trainings, and what suggesting them took."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler)
    names = [f"weight_{k:02d}" for k in range(PEOPLE)]
    study.enqueue_trial(dict.fromkeys(names, 0.5))
    spent, begin = 0.0, time.perf_counter()
    for _ in range(budget):
        trial = study.ask()
        weights = np.array([trial.suggest_float(name, 0.0, 1.0) for name in names], np.float32)
        before = time.perf_counter()
        value = float(problem.value(weights))
        spent += time.perf_counter() - before
        study.tell(trial, value)
    suggest = time.perf_counter() - begin - spent
    return np.array([study.best_params[name] for name in names], np.float32), budget, suggest


def sampler(name: str, seed: int) -> Any:
    """A sampler by its name."""
    import optuna

    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    try:
        from jaxopt_lab.search import GPSampler  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return optuna.samplers.GPSampler(seed=seed, deterministic_objective=True)
    return GPSampler(seed=seed)


def main() -> None:
    """Runs all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=300, help="trainings a method may take")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--repeats", type=int, default=7, help="calls timed of each gradient")
    parser.add_argument("--tiny", action="store_true", help="trainings of 5 steps, to see that it runs")
    options = parser.parse_args()
    if options.budget < 1 or options.repeats < 1:
        parser.error("--budget and --repeats must be at least 1")

    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    for seed in options.seeds:
        problem = Problem(seed, 5 if options.tiny else 200)
        costs = problem.trainings(options.repeats)
        for name in options.methods:
            if name in costs:
                weights, calls, beside = descended(problem, name, options.budget, costs[name])
            else:
                weights, calls, beside = sampled(problem, sampler(name, seed), options.budget)
            trust = [float(weights[problem.careless].mean()), float(weights[~problem.careless].mean())]
            line = {
                "method": name,
                "seed": seed,
                "budget": options.budget,
                "calls": calls,
                "trainings_a_call": round(costs.get(name, 1.0), 2),
                "validation_loss": round(float(problem.value(weights)), 4),
                "test_accuracy": round(100 * float(problem.accuracy(weights)), 2),
                "weight_of_careless": round(trust[0], 3),
                "weight_of_careful": round(trust[1], 3),
                "suggest_s": round(beside, 2),
            }
            lines[name].append(line)
            print(json.dumps(line), flush=True)
    for name, each in lines.items():
        means = {
            key: round(statistics.mean(line[key] for line in each), 4)
            for key in ("validation_loss", "test_accuracy", "calls", "suggest_s")
        }
        print(json.dumps({"method": name, "seeds": len(each), "budget": options.budget, **means}), flush=True)


if __name__ == "__main__":
    main()
