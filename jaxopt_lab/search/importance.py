r"""Which hyper-parameters mattered: the share of each in the variance of the scores, with the interval that the trials leave.

By default from a Gaussian process: first-order and total Sobol indices of the function that it learnt, over the whole space. Any of
Optuna's evaluators serves too (fANOVA, mean decrease of impurity, PED-ANOVA), used as they are, over seeds and trials drawn anew.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxopt_lab.core.types import PyTree
from jaxopt_lab.search.spaces import Choice, Dimension, Float, Integer, When, bare, dimensions, is_active
from jaxopt_lab.search.trial import Result

if TYPE_CHECKING:
    import optuna

__all__ = ["Importance", "SobolIndices", "importance", "sobol_indices"]

_SPACE = "jaxopt_lab:space"
_LEAST = 4  # Scores, below which there is nothing to tell apart.


class Importance(NamedTuple):
    """How much a hyper-parameter mattered.

    Attributes:
      value: its share, in [0, 1]. From `sobol_indices`, the total index, of which interactions belong to each that takes part; from
        an evaluator of Optuna's, what that says, shares that add up to 1.
      low, high: the interval.
      alone: the first-order index with its interval, what the dimension explains alone; None from an evaluator of Optuna's.
    """

    value: float
    low: float
    high: float
    alone: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class SobolIndices:
    """How the Gaussian process is asked, of `sobol_indices`."""

    draws: int
    fits: int
    points: int
    most: int


Evaluator = SobolIndices | Callable[[int], "optuna.importance.BaseImportanceEvaluator"]


def sobol_indices(*, draws: int = 64, fits: int = 8, points: int = 512, most: int = 512) -> SobolIndices:
    r"""Total and first-order Sobol indices from a Gaussian process, each with the interval of its posterior.

    .. math:: T_j = \frac{E[Var(f \mid x_{-j})]}{Var(f)}, \qquad S_j = \frac{Var(E[f \mid x_j])}{Var(f)}

    f is a draw of the process given the trials, and x uniform over the space, as `sample` draws it, wherever the trials lie. What
    is active only now and then counts as often as that. Noise of the scores counts for no dimension.

    Measured on Ishigami's function over 30 seeds of 40, 80 and 160 random trials: first-order indices (0.314, 0.442, 0) err by
    0.10, 0.05 and 0.02 in the mean, and the interval of 90 % holds them in 62, 80 and 83 %. Optuna's fANOVA errs by 0.20, 0.17 and
    0.11 (10 seeds). Totals (0.558, 0.442, 0.244) err by 0.17, 0.09 and 0.04: they come out high while trials are few, the second
    most, since what is not known yet may be interaction. After 100 trials of TPE on a sum of five squares, which crowd where it is
    low, shares of 0.926 to 0.001 err by 0.006; fANOVA's by 0.096 (6 seeds). 500 such trials of ten dimensions take 7 to 11 s.

    Args:
      draws: functions drawn.
      fits: hyper-parameters of the process that they share.
      points: of each part of the design on which a function is looked at; a power of 2.
      most: trials that the process is given, drawn evenly where there are more; the time goes with its cube.

    Raises:
      ValueError: a number out of range.

    >>> sobol_indices(draws=32).draws
    32

    Source: Sobol', "Global sensitivity indices for nonlinear mathematical models", 2001; Le Gratiet, Cannamela and Iooss, "A
    Bayesian approach for global sensitivity analysis of (multifidelity) computer codes", 2014, for the distribution over draws.
    """
    if draws < 2 or not 1 <= fits <= draws or points < 2 or points & (points - 1) or most < _LEAST:
        raise ValueError(
            f"draws must be at least 2, fits in [1, draws], points a power of 2, most at least {_LEAST}; "
            f"got {draws}, {fits}, {points} and {most}"
        )
    return SobolIndices(draws, fits, points, most)


def importance(
    study: "optuna.Study | Result",
    evaluator: Evaluator | None = None,
    *,
    space: PyTree | None = None,
    objective: int = 0,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    maximize: bool = False,
    repeats: int = 8,
    seed: int = 0,
    level: float = 0.9,
) -> dict[str, Importance]:
    """The hyper-parameters by their importance, the largest first.

    Counted are trials that are complete with a finite score: those that failed, were pruned or diverged are left out.

    Args:
      study: any of Optuna's, or the `Result` of a population.
      evaluator: `sobol_indices()` if None; or a function from a seed to one of Optuna's evaluators, such as
        `lambda seed: optuna.importance.FanovaImportanceEvaluator(seed=seed)`. fANOVA and the mean decrease know parameters alone
        that every trial has.
      space: what was searched. Needed for a `Result`; a study of `open_study` knows its own, and of any other it is read off the
        trials: the latest range of each parameter, and which choice tells whether it is there.
      objective: which of several.
      transform: of the scores `[n]` to others: `np.log` for losses over decades, or `scipy.stats.rankdata`. A variance else
        belongs to the few that are far off.
      maximize: whether a `Result` is of a population whose best score was the largest; a study knows. PED-ANOVA asks.
      repeats: how often an evaluator of Optuna's is asked anew, with another seed and trials drawn with replacement; the interval
        is Student's about the value that all trials give. Not used by `sobol_indices`.
      seed: of all that is drawn.
      level: of the interval.

    Returns:
      An `Importance` for each path. A dimension of one value has 0.

    Raises:
      TypeError: it is neither a study nor a `Result`.
      ValueError: too few trials with a finite score, scores that are all alike, an option out of range, a `Result` without a
        space, a trial that does not fit the space, or a parameter of which nothing tells when it is there.

    >>> import optuna
    >>> from jaxopt_lab.search.spaces import configs, uniform
    >>> space, x = {"rate": uniform(0.0, 1.0), "decay": uniform(0.0, 1.0)}, np.random.default_rng(0).random((2, 24))
    >>> drawn = configs(space, {"rate": x[0], "decay": x[1]})
    >>> result = Result((x[0] - 0.3) ** 2, (), drawn, np.zeros((24, 0)), (), {}, None, ())
    >>> found = importance(result, sobol_indices(draws=8, fits=2, points=128), space=space)
    >>> list(found), found["rate"].low > 0.8, found["decay"].high < 0.2
    (['rate', 'decay'], True, True)

    Source: Hutter, Hoos and Leyton-Brown, "An efficient approach for assessing hyperparameter importance", 2014 (fANOVA); Watanabe,
    Bansal and Hutter, "PED-ANOVA: efficiently quantifying hyperparameter importance in arbitrary subspaces", 2023.
    """
    evaluator = sobol_indices() if evaluator is None else evaluator
    if not 0 < level < 1 or repeats < 2:
        raise ValueError(f"level must lie between 0 and 1 and repeats be at least 2; got {level} and {repeats}")
    rows, scores = _scored(study, objective)
    scores = _checked(scores if transform is None else _transformed(transform, scores), len(rows))
    if isinstance(evaluator, SobolIndices):
        found = _by_process(rows, scores, _space(study, rows, space), evaluator, seed, level)
    else:
        found = _by_evaluator(study, rows, scores, evaluator, space, objective, maximize, repeats, seed, level)
    return dict(sorted(found.items(), key=lambda each: (-each[1].value, each[0])))


class _Row(NamedTuple):
    """A trial that counts: its parameters by path, and itself if it is Optuna's."""

    params: dict[str, Any]
    trial: "optuna.trial.FrozenTrial | None"


def _scored(study: Any, objective: int) -> tuple[list[_Row], np.ndarray]:
    """The trials that count, and their scores."""
    if isinstance(study, Result):
        objectives, total = 1, len(study.configs)
        pairs = [(_Row(_flat(c), None), float(score)) for c, score in zip(study.configs, study.scores, strict=True)]
    elif hasattr(study, "get_trials") and hasattr(study, "directions"):
        trials = study.get_trials(deepcopy=False)
        objectives, total = len(study.directions), len(trials)
        complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
        _check_objective(objective, objectives)
        pairs = [(_Row(dict(trial.params), trial), float(trial.values[objective])) for trial in complete]
    else:
        raise TypeError(f"importance is of a study of Optuna's or the Result of a population; got {type(study).__name__}")
    _check_objective(objective, objectives)
    kept = [(row, score) for row, score in pairs if math.isfinite(score)]
    if len(kept) < _LEAST:
        raise ValueError(
            f"importance needs at least {_LEAST} trials with a finite score; {len(kept)} of {total} have one (the others failed, "
            "were pruned, diverged, or still run)"
        )
    return [row for row, _ in kept], np.array([score for _, score in kept])


def _check_objective(objective: int, count: int) -> None:
    if not 0 <= objective < count:
        raise ValueError(f"objective must be one of 0 to {count - 1}; got {objective}")


def _transformed(transform: Callable[[np.ndarray], np.ndarray], scores: np.ndarray) -> np.ndarray:
    # What it may warn of, a logarithm of 0, is an error below.
    with np.errstate(all="ignore"):
        return np.asarray(transform(scores), float)


def _checked(scores: np.ndarray, count: int) -> np.ndarray:
    if scores.shape != (count,):
        raise ValueError(f"transform must return an array of shape {(count,)}, one number a trial; got {scores.shape}")
    if (odd := np.flatnonzero(~np.isfinite(scores))).size:
        raise ValueError(
            f"transform returned {scores[odd[0]]} for the score at index {odd[0]} of {count}, and for {odd.size} in all"
        )
    if np.ptp(scores) <= 1e-12 * np.abs(scores).max():
        raise ValueError(f"all {count} scores are {scores[0]:g}: nothing to explain")
    return scores


def _flat(config: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {"/".join(path): config}
    return {name: value for key, child in config.items() for name, value in _flat(child, (*path, str(key))).items()}


def _space(study: Any, rows: Sequence[_Row], space: PyTree | None) -> dict[str, Dimension]:
    """The dimensions by path, one that others depend on before these."""
    if space is not None:
        return dimensions(space)
    if isinstance(study, Result):
        raise ValueError("the Result of a population does not know what was searched; give its space")
    from jaxopt_lab.search.study import from_distributions

    # The latest range of each counts, as for the sampler.
    latest = {name: d for row in rows if row.trial for name, d in row.trial.distributions.items()}
    # One at a time, under a name of no parts: those of other people's studies need not be paths.
    found = {name: from_distributions({"one": d})["one"] for name, d in latest.items()}
    known = study.user_attrs.get(_SPACE, {})
    whens: dict[str, Dimension] = {}
    for name, dimension in found.items():
        if stored := known.get(name, {}).get("when"):
            whens[name] = When(stored[0], tuple(stored[1]), dimension)
        elif all(name in row.params for row in rows):
            whens[name] = dimension
        else:
            whens[name] = _when(name, dimension, found, rows)
    ordered: dict[str, Dimension] = {}
    while len(ordered) < len(whens):
        ready = {n: d for n, d in whens.items() if n not in ordered and not (isinstance(d, When) and d.path not in ordered)}
        if not ready:
            raise ValueError(f"{' and '.join(n for n in whens if n not in ordered)} depend on what no trial has; give the space")
        ordered |= ready
    return ordered


def _when(name: str, dimension: Any, found: Mapping[str, Any], rows: Sequence[_Row]) -> When:
    """The condition under which a parameter was there: that of a choice whose value tells, of fewest values."""
    there = [name in row.params for row in rows]
    best: When | None = None
    for path, parent in found.items():
        if (
            path == name
            or isinstance(parent, Float)
            or any(here and path not in row.params for here, row in zip(there, rows, strict=True))
        ):
            continue
        taken = {row.params[path] for here, row in zip(there, rows, strict=True) if here}
        if any(not here and row.params.get(path, name) in taken for here, row in zip(there, rows, strict=True)):
            continue
        if best is None or len(taken) < len(best.values):
            best = When(path, tuple(sorted(taken, key=str)), dimension)
    if best is None:
        raise ValueError(
            f"{name} is in {sum(there)} of {len(rows)} trials, and no choice tells in which; give the space, with when(...), or an "
            "evaluator that takes trials as they are: lambda seed: optuna.importance.PedAnovaImportanceEvaluator()"
        )
    return best


def _by_process(
    rows: Sequence[_Row], scores: np.ndarray, found: Mapping[str, Dimension], how: SobolIndices, seed: int, level: float
) -> dict[str, Importance]:
    from jaxopt_lab.search.gp.sobol import drawn_indices

    rng = np.random.default_rng(seed)
    if len(rows) > how.most:
        kept = np.sort(rng.choice(len(rows), how.most, replace=False))
        rows, scores = [rows[k] for k in kept], scores[kept]
    varied = {path: dimension for path, dimension in found.items() if bare(dimension).levels != 1 and not _single(bare(dimension))}
    nothing = {path: Importance(0.0, 0.0, 0.0, (0.0, 0.0, 0.0)) for path in found if path not in varied}
    if not varied:
        return nothing
    x = np.array([[_of_row(path, dimension, row, found) for path, dimension in varied.items()] for row in rows])
    # One category more, for where a choice is not there.
    counts = np.array([d.levels + isinstance(each, When) if isinstance(d := bare(each), Choice) else 0 for each in varied.values()])
    first, total = drawn_indices(
        x, scores, counts, rng, place=_placing(varied, found), draws=how.draws, fits=how.fits, points=how.points
    )
    tails = [(1 - level) / 2, (1 + level) / 2]
    spread = {}
    for j, path in enumerate(varied):
        (low, high), (low1, high1) = (np.quantile(each[j], tails).tolist() for each in (total, first))
        spread[path] = Importance(float(total[j].mean()), low, high, (float(first[j].mean()), low1, high1))
    return {**spread, **nothing}


def _single(dimension: Float | Integer | Choice) -> bool:
    return not isinstance(dimension, Choice) and dimension.low == dimension.high


def _of_row(path: str, dimension: Dimension, row: _Row, found: Mapping[str, Dimension]) -> float:
    inner = bare(dimension)
    if path not in row.params:
        if is_active(dimension, row.params):
            raise ValueError(f"a trial lacks {path}, which the space says it has; it has {', '.join(row.params)}")
        return _absent(inner)
    try:
        return _coordinate(inner, row.params[path])
    except (TypeError, ValueError):
        raise ValueError(f"{path} is {row.params[path]!r} in a trial, which is not of {inner}") from None


def _absent(dimension: Float | Integer | Choice) -> float:
    """The coordinate of a dimension that is not there: the middle, or a category of its own."""
    return float(dimension.levels) if isinstance(dimension, Choice) else 0.5


def _ends(dimension: Float | Integer) -> tuple[float, float]:
    """Of a logarithmic range, in the logarithm; every integer stands for the half on either side of it."""
    half = 0.5 if isinstance(dimension, Integer) else 0.0
    return math.log(dimension.low - half), math.log(dimension.high + half)


def _coordinate(dimension: Float | Integer | Choice, value: Any) -> float:
    """Where a value lies in [0, 1], or the index of an option."""
    if isinstance(dimension, Choice):
        return float(dimension.options.index(value))
    if dimension.log:
        low, high = _ends(dimension)
        return (math.log(value) - low) / (high - low)
    if dimension.levels is not None and dimension.step is not None:
        return (round((value - dimension.low) / dimension.step) + 0.5) / dimension.levels
    return (value - dimension.low) / (dimension.high - dimension.low)


def _snapped(dimension: Float | Integer | Choice, unit: np.ndarray) -> np.ndarray:
    """The coordinates [m] of the values whose quantiles are `unit` [m]."""
    if isinstance(dimension, Choice):
        return np.minimum(np.floor(unit * dimension.levels), dimension.levels - 1)
    if isinstance(dimension, Integer) and dimension.log:
        low, high = _ends(dimension)
        return (np.log(np.clip(np.round(np.exp(low + unit * (high - low))), dimension.low, dimension.high)) - low) / (high - low)
    if dimension.levels is not None:
        return (np.minimum(np.floor(unit * dimension.levels), dimension.levels - 1) + 0.5) / dimension.levels
    return unit


def _placing(varied: Mapping[str, Dimension], found: Mapping[str, Dimension]) -> Callable[[np.ndarray], np.ndarray]:
    """What takes points of the unit cube to coordinates, a dimension that is not there to those of `_absent`."""

    def place(unit: np.ndarray) -> np.ndarray:
        there: dict[str, np.ndarray] = {}
        columns: dict[str, np.ndarray] = {}
        for path, dimension in found.items():
            inner = bare(dimension)
            # A dimension of one value, on which another may depend, is no column of the points.
            column = unit[:, list(varied).index(path)] if path in varied else np.full(len(unit), 0.5)
            there[path] = np.ones(len(unit), bool)
            if isinstance(dimension, When):
                parent = bare(found[dimension.path])
                wanted = [_coordinate(parent, value) for value in dimension.values]
                near = np.abs(columns[dimension.path][:, None] - np.array(wanted)[None, :]) < 1e-9
                there[path] = there[dimension.path] & near.any(axis=1)
            columns[path] = np.where(there[path], _snapped(inner, column) if path in varied else _only(inner), _absent(inner))
        return np.stack([columns[path] for path in varied], axis=1)

    return place


def _only(dimension: Float | Integer | Choice) -> float:
    """The coordinate of the one value of a dimension."""
    return 0.0 if isinstance(dimension, Choice) else 0.5


def _by_evaluator(
    study: Any,
    rows: Sequence[_Row],
    scores: np.ndarray,
    evaluator: Any,
    space: PyTree | None,
    objective: int,
    maximize: bool,
    repeats: int,
    seed: int,
    level: float,
) -> dict[str, Importance]:
    import optuna
    from scipy.stats import t as student

    made = evaluator(seed) if callable(evaluator) and not isinstance(evaluator, type) else evaluator
    if made is evaluator or not isinstance(made, optuna.importance.BaseImportanceEvaluator):
        raise TypeError(
            "evaluator must be sobol_indices(...) or a function from a seed to an evaluator of Optuna's, such as lambda seed: "
            f"optuna.importance.FanovaImportanceEvaluator(seed=seed); got {evaluator!r}"
        )
    if isinstance(study, Result):
        study = _study(rows, scores, _space(study, rows, space))
        trials = study.get_trials(deepcopy=False)
    else:
        trials, maximize = [row.trial for row in rows if row.trial], study.directions[objective].name == "MAXIMIZE"
    rng, count = np.random.default_rng(seed), len(trials)
    # PED-ANOVA asks what made scores low.
    low = {trial.number: -score if maximize else score for trial, score in zip(trials, scores.tolist(), strict=True)}
    whole = _shares(study, trials, low, made)
    drawn = [
        _shares(study, [trials[k] for k in rng.integers(count, size=count)], low, evaluator(seed + 1 + r)) for r in range(repeats)
    ]
    reach = student.ppf((1 + level) / 2, repeats - 1)
    found = {}
    for name, value in whole.items():
        half = reach * float(np.std([each.get(name, 0.0) for each in drawn], ddof=1))
        found[name] = Importance(value, max(value - half, 0.0), min(value + half, 1.0))
    return found


def _shares(study: Any, trials: list[Any], low: Mapping[int, float], evaluator: Any) -> dict[str, float]:
    """What Optuna says of some trials."""
    import warnings

    import optuna

    view = copy.copy(study)
    view.get_trials = lambda deepcopy=False, states=None: list(trials)
    with warnings.catch_warnings():
        # That low is taken for good, which it is here; and of regimes with one trial, of which a redrawn sample has some.
        warnings.simplefilter("ignore", UserWarning)
        try:
            found = optuna.importance.get_param_importances(view, evaluator=evaluator, target=lambda trial: low[trial.number])
        except RuntimeError:
            # Redrawn trials of one score, which a forest refuses.
            return {}
    return {name: float(value) for name, value in found.items()}


def _study(rows: Sequence[_Row], scores: np.ndarray, found: Mapping[str, Dimension]) -> "optuna.Study":
    """The trials of a population as a study in memory."""
    import optuna

    from jaxopt_lab.search.study import to_distributions

    kinds = {path: to_distributions({"one": bare(dimension)})["one"] for path, dimension in found.items()}
    study = optuna.create_study()
    for row, score in zip(rows, scores.tolist(), strict=True):
        params = {path: value for path, value in row.params.items() if path in kinds}
        study.add_trial(optuna.trial.create_trial(params=params, distributions={path: kinds[path] for path in params}, value=score))
    return study
