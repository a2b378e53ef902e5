"""A sampler for Optuna's studies that models the objective by a Gaussian process, in JAX: no torch, nothing compiled a trial."""

import json
import math
import os
import threading
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import scipy.stats.qmc
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from jaxopt_lab.search.gp import outputs
from jaxopt_lab.search.gp.kernel import INACTIVE
from jaxopt_lab.search.gp.suggest import Known, Space, draw, names, suggest

__all__ = ["GPSampler"]

_SUGGESTED = "jaxopt_lab:gp"
# What a database takes as the value of one attribute.
_LONGEST = 2045
# Threads of a process ask in turn, each with what the one before it was given among the trials that run.
_TURN = threading.Lock()
# How often a process asks anew that finds its point given to another one meanwhile.
_TIMES = 8
_RUNNING = (TrialState.RUNNING, TrialState.WAITING)


def _release() -> None:
    """A child that is forked while a thread has its turn has no such thread to end it."""
    global _TURN  # noqa: PLW0603
    _TURN = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release)


class GPSampler(BaseSampler):
    """Suggests where a Gaussian process expects the largest gain.

    Matern-5/2 with a length scale a dimension over floats and integers, Hamming distances over categories; the logarithm of the
    expected improvement, or of the expected hypervolume for several objectives, times the probability that the constraints hold.

    - The first `n_startup_trials` follow a scrambled Sobol sequence.
    - Trials that run are fantasised: parallel workers, and `ask` before `tell`, get different points. Threads of a process ask in
      turn; a process that finds its point given to another one meanwhile asks again.
    - Conditional spaces: the space is the union of what trials asked for, and which parameters go together is learnt from them.
      A parameter that is asked for though it was not expected, is drawn evenly.
    - A range that changes: the latest counts; older trials keep their values.
    - A pruned trial counts with its last intermediate value, though never as better than the median of the completed ones: it is
      an early one. With several objectives it is left out.
    - A failed trial (NaN among them) counts as the worst value seen, so that it is not asked for again; with
      `penalise_failed=False` as one that still runs, which keeps from its point and says nothing of its surroundings.
    - Infinite values count as the worst or the best finite one.
    - With `warp_inputs` it learns how each range of numbers is bent, where the trials tell: for a rate on a range from 0 to 1, say,
      of which only the logarithm matters. Where ranges are as they should be it brings nothing: of 45 runs of 50 evaluations
      on the problems of `scripts/benchmark_gp.py` 9 became better and 12 worse, so it is off by default.

    What is suggested follows from the seed, the number of the trial and the history alone: a study that is resumed goes on as if it
    had not been interrupted. It is computed in float64 on the CPU, whatever the session's settings.

    Args:
      seed: of all that is drawn; None for a new one.
      n_startup_trials: finished trials before the process is used.
      constraints_func: takes a finished trial to numbers that are at most 0 where it is feasible, as in Optuna.
      noise: the variance of the noise of standardised values, where it is known (0 for an objective that is deterministic); by
        default fitted at every other turn and 0 between, see `jaxopt_lab.search.gp.suggest`.
      penalise_failed: see above.
      warp_inputs: see above.

    Raises:
      ValueError: `n_startup_trials` is negative.

    >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
    >>> study = optuna.create_study(sampler=GPSampler(seed=0, n_startup_trials=4))
    >>> study.optimize(lambda trial: (trial.suggest_float("x", -1, 1) - 0.3) ** 2, n_trials=8)
    >>> study.best_value < 1e-2
    True

    Source: Snoek, Larochelle and Adams 2012; Ament et al. 2023 for the logarithm; Snoek, Swersky, Zemel and Adams 2014 for warped
    inputs; the recipe of the prior from Optuna's GPSampler.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        n_startup_trials: int = 10,
        constraints_func: Callable[[FrozenTrial], Sequence[float]] | None = None,
        noise: float | None = None,
        penalise_failed: bool = True,
        warp_inputs: bool = False,
    ):
        if n_startup_trials < 0:
            raise ValueError(f"n_startup_trials must be 0 or more; got {n_startup_trials}")
        self._seed = int(np.random.SeedSequence().entropy % 2**63) if seed is None else seed
        self._n_startup_trials = n_startup_trials
        self._constraints_func = constraints_func
        self._noise = noise
        self._penalise_failed = penalise_failed
        self._warp_inputs = warp_inputs

    def reseed_rng(self) -> None:
        """Nothing: each trial draws by its own number, so that workers with one seed never draw the same."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The union of what trials asked for, each parameter with its latest range, without those of one value; by name."""
        space: dict[str, BaseDistribution] = {}
        for each in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)):
            space.update(each.distributions)
        return {name: space[name] for name in sorted(space) if not space[name].single()}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Values of the parameters of a space; those of a conditional space that the suggested point does not have are left out."""
        if not search_space:
            return {}
        with _TURN:
            for _ in range(_TIMES):
                known = self._known(study, trial, search_space)
                values = self._suggestion(trial.number, search_space, known)
                _record(study, trial, {name: search_space[name].to_internal_repr(value) for name, value in values.items()})
                if known is None or not _taken(study, trial, search_space, known, values):
                    break
            return values

    def _suggestion(self, number: int, search_space: dict[str, BaseDistribution], known: Known | None) -> dict[str, Any]:
        space = _space(search_space)
        if known is None:
            x = draw(space, self._sobol(len(search_space), number)[None])[0]
        else:
            x = suggest(space, known, self._rng(number), noise=self._noise, warp_inputs=self._warp_inputs)
        values = {name: x[i] for i, name in enumerate(search_space) if x[i] > INACTIVE}
        return {name: _decode(value, search_space[name]) for name, value in values.items()}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """A value drawn evenly, or evenly in the logarithm."""
        space = _space({param_name: param_distribution})
        rng = self._rng(trial.number, zlib.crc32(param_name.encode()))
        return _decode(draw(space, rng.random((1, 1)))[0, 0], param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Keeps the constraints of the trial, as Optuna's samplers do."""
        if self._constraints_func is not None:
            optuna.samplers._base._process_constraints_after_trial(self._constraints_func, study, trial, state)

    def _rng(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self._seed % 2**64, *numbers])

    def _sobol(self, d: int, number: int) -> np.ndarray:
        with warnings.catch_warnings():
            # It warns where a number of points is no power of two.
            warnings.simplefilter("ignore", UserWarning)
            sequence = scipy.stats.qmc.Sobol(d, rng=self._rng(d))
            return sequence.fast_forward(number).random(1)[0] if number else sequence.random(1)[0]

    def _known(self, study: Study, trial: FrozenTrial, space: dict[str, BaseDistribution]) -> Known | None:
        """What the trials of a study tell; None where they are too few."""
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        told = [t for t in trials if t.state is TrialState.COMPLETE and t.params.keys() & space.keys()]
        single = len(study.directions) == 1
        pruned = [t for t in trials if t.state is TrialState.PRUNED and t.params.keys() & space.keys() and _last(t) is not None]
        pruned = pruned if single else []
        if len(told) + len(pruned) < max(1, self._n_startup_trials):
            return None
        sign = np.array([1.0 if d is StudyDirection.MAXIMIZE else -1.0 for d in study.directions])
        y = np.array([t.values for t in told], float).reshape(len(told), len(sign)) * sign
        if pruned:
            early = sign[0] * np.array([[_last(t)] for t in pruned], float)
            y = np.concatenate([y, np.minimum(early, np.median(y)) if told else early])
        y = np.column_stack([outputs.clean(column) for column in y.T])
        failed = [t for t in trials if t.state is TrialState.FAIL and t.params.keys() & space.keys()]
        running = [t for t in trials if t.state in _RUNNING]
        if not self._penalise_failed:
            running, failed = [*running, *failed], []
        told = [*told, *pruned]
        constraints = _constraints(told)
        if failed:
            y = np.concatenate([y, np.tile(y.min(0), (len(failed), 1))])
            told = [*told, *failed]
            if constraints.shape[1]:
                constraints = np.concatenate([constraints, np.tile(np.maximum(constraints.max(0), 0), (len(failed), 1))])
        x = np.array([_encode(t.params, space) for t in told])
        return Known(x, y, constraints, _points(running, space))


def _space(space: dict[str, BaseDistribution]) -> Space:
    return Space(
        np.array([isinstance(d, CategoricalDistribution) for d in space.values()]),
        np.array([_levels(d) for d in space.values()]),
    )


def _levels(distribution: BaseDistribution) -> int:
    """How many values there are; 0 where they are not counted: floats, and more than 10,000 integers on a logarithmic range."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution):
        # On a logarithmic range the shares differ: it is searched as continuous and rounded.
        return 0 if distribution.log else (distribution.high - distribution.low) // distribution.step + 1
    if isinstance(distribution, FloatDistribution):
        return 0 if distribution.step is None else round((distribution.high - distribution.low) / distribution.step) + 1
    raise TypeError(f"a distribution must be one of Optuna's for floats, integers or categories; got {distribution!r}")


def _ends(distribution: Any) -> tuple[float, float]:
    """Of the range as it is scaled: in the logarithm, and with half a value more on either side for integers there."""
    if not distribution.log:
        return distribution.low, distribution.high
    half = 0.5 if isinstance(distribution, IntDistribution) else 0.0
    return math.log(distribution.low - half), math.log(distribution.high + half)


def _encode(params: dict[str, Any], space: dict[str, BaseDistribution]) -> list[float]:
    """The coordinates of a trial, `INACTIVE` where it has no such parameter; outside [0, 1] for a value out of the range."""
    return [_coordinate(params[name], d) if name in params else INACTIVE for name, d in space.items()]


def _points(trials: list[FrozenTrial], space: dict[str, BaseDistribution]) -> np.ndarray:
    """The coordinates [p, d] of those trials that have a point, though it may be one that is not asked for yet."""
    points = [_encode(params, space) for t in trials if (params := _params(t, space))]
    return np.array(points).reshape(-1, len(space))


def _coordinate(value: Any, distribution: Any) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return float(distribution.to_internal_repr(value))
    levels, (low, high) = _levels(distribution), _ends(distribution)
    if levels:
        return (round((value - low) / distribution.step) + 0.5) / levels
    if distribution.log:
        value = math.log(max(value, 1e-300))
    return (value - low) / (high - low) if high > low else 0.5


def _decode(x: float, distribution: Any) -> Any:
    """The value, of Python's own types, at a coordinate."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(x)]
    levels, (low, high) = _levels(distribution), _ends(distribution)
    if levels:
        value = distribution.low + min(int(x * levels), levels - 1) * distribution.step
        return int(value) if isinstance(distribution, IntDistribution) else min(float(value), distribution.high)
    value = low + float(x) * (high - low)
    value = math.exp(value) if distribution.log else value
    value = round(value) if isinstance(distribution, IntDistribution) else value
    return min(max(value, distribution.low), distribution.high)


def _last(trial: FrozenTrial) -> float | None:
    """The last intermediate value of a trial that is a number."""
    values = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    values = [value for value in values if math.isfinite(value)]
    return values[-1] if values else None


def _constraints(trials: list[FrozenTrial]) -> np.ndarray:
    """Of trials [n, C]; a trial without them, from before there were any, is taken as just infeasible.

    Raises:
      ValueError: trials have different numbers of constraints.
    """
    rows = [list(t.constraints.values()) for t in trials]
    sizes = {len(row) for row in rows if row}
    if not sizes:
        return np.zeros((len(trials), 0))
    if len(sizes) > 1:
        raise ValueError(
            f"the trials have different numbers of constraints, {sorted(sizes)}: constraints_func must return as many for each"
        )
    size = sizes.pop()
    values = np.array([row or [math.nan] * size for row in rows], float)
    worst = np.nanmax(np.where(np.isfinite(values), values, np.nan), axis=0)
    return np.where(np.isfinite(values), values, np.where(values == -np.inf, -np.abs(worst), np.maximum(np.abs(worst), 1e-6)))


def _record(study: Study, trial: FrozenTrial, values: dict[str, float]) -> None:
    """Writes what was suggested into the storage, for workers that ask before the objective has."""
    text = json.dumps(values)
    for i in range(0, len(text), _LONGEST):
        study._storage.set_trial_system_attr(trial._trial_id, f"{_SUGGESTED}:{i // _LONGEST}", text[i : i + _LONGEST])


def _taken(study: Study, trial: FrozenTrial, space: dict[str, BaseDistribution], known: Known, values: dict[str, Any]) -> bool:
    """Whether another process has been given the same point since `known` was read: both have written theirs before they look."""
    others = [t for t in study.get_trials(deepcopy=False, states=_RUNNING) if t.number != trial.number]
    mine = names(np.array([_encode(values, space)]))
    return bool(set(mine) & set(names(_points(others, space))) - set(names(known.pending)))


def _params(trial: FrozenTrial, space: dict[str, BaseDistribution]) -> dict[str, Any]:
    """The parameters of a trial that runs, with those suggested and not yet asked for; fixed ones while it waits."""
    parts = []
    while (part := trial.system_attrs.get(f"{_SUGGESTED}:{len(parts)}")) is not None:
        parts.append(part)
    try:
        # What was written over may have had more parts: only the first object counts.
        suggested = json.JSONDecoder().raw_decode("".join(parts))[0] if parts else {}
    except json.JSONDecodeError:
        # It is being written.
        suggested = {}
    # A range may have changed since: what it no longer has cannot be placed.
    known = {name: space[name].to_external_repr(value) for name, value in suggested.items() if name in space}
    fixed = trial.system_attrs.get("fixed_params", {})
    return {name: value for name, value in {**known, **fixed, **trial.params}.items() if name in space}
