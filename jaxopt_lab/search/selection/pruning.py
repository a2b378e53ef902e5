"""Ends the trials of a study that lead nowhere: Optuna's pruners within a training run, and one that extrapolates the curve.

Where all configurations fit into one program, `successive_halving` does the same on the device.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna

from jaxopt_lab.search.selection.extrapolation import extrapolate_curve

__all__ = ["CurvePruner", "reporting"]


def reporting(
    trial: optuna.Trial, evaluate: Callable[[Any], dict[str, float]], monitor: str, *, at: Callable[[Any], int] | None = None
) -> Callable[[Any], dict[str, float]]:
    """An evaluation for `train.fit` that tells the study its result, and ends the run where the study's pruner says so.

    `optuna.TrialPruned` leaves `fit` from within the evaluation; `study.optimize` takes it as the end of the trial, and one who
    asks and tells catches it: `study.tell(trial, state=optuna.trial.TrialState.PRUNED)`.

    Args:
      trial: of the study, with a single objective.
      evaluate: `state -> {name: float}`.
      monitor: the name of what the study optimises. NaN is reported as the worst there is: Optuna would otherwise refuse it, or
        compare it as it comes.
      at: the step of a state; its `step` if None.

    Returns:
      `state -> {name: float}`, the same values.

    Raises:
      ValueError: when called: `evaluate` returns nothing of that name.
      optuna.TrialPruned: when called: the pruner says so.

    >>> study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=1.0))
    >>> evaluate = reporting(study.ask(), lambda state: {"loss": 2.0}, "loss", at=lambda state: 3)
    >>> evaluate(None)
    Traceback (most recent call last):
      ...
    optuna.exceptions.TrialPruned: pruned at step 3: loss=2
    """

    def told(state: Any) -> dict[str, float]:
        found = evaluate(state)
        if monitor not in found:
            raise ValueError(f"monitor is {monitor!r}, and evaluate returned {', '.join(found) or 'nothing'}")
        step = int(state.step if at is None else at(state))
        value = float(found[monitor])
        worst = math.inf if trial.study.direction == optuna.study.StudyDirection.MINIMIZE else -math.inf
        trial.report(worst if math.isnan(value) else value, step)
        if trial.should_prune():
            raise optuna.TrialPruned(f"pruned at step {step}: {monitor}={value:g}")
        return found

    return told


class CurvePruner(optuna.pruners.BasePruner):
    r"""Ends a trial whose curve, extrapolated to its last step, is unlikely to beat the best of the study.

    .. math:: P\left(y(T) \text{ beats } y^* \mid y(t_1), \dots, y(t_n)\right) < \delta

    A curve that is ill-behaved, or too short to extrapolate, is left alone; one that is no longer finite is ended.

    At half of 600 steps of a small network on the digits, reporting every 15 (24 rates each of Adam and SGD, by error and by loss),
    it ended 46, 33, 29 and 38 % of the runs, and in the last of the four the best one too; of the final values 87 % lay within
    their intervals of 90 %.

    Args:
      steps: T, where the trials end, in the steps that they report.
      chance: :math:`\delta`, below which a trial ends.
      least: how many reports before anything is ended, at least 4.
      bounds: the least and the largest value there can be, as for `extrapolate_curve`.

    Raises:
      ValueError: a setting is out of its range.

    >>> study = optuna.create_study(pruner=CurvePruner(100))
    >>> study.add_trial(optuna.create_trial(value=0.1))
    >>> trial = study.ask()
    >>> for step in (5, 10, 15, 20, 25, 30):
    ...     trial.report(0.5 + step**-1.0, step)
    >>> trial.should_prune()
    True

    Source: Domhan, Springenberg and Hutter, "Speeding up automatic hyperparameter optimization of deep neural networks by
    extrapolation of learning curves", 2015.
    """

    def __init__(self, steps: int, *, chance: float = 0.05, least: int = 6, bounds: tuple[float, float] | None = None):
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        if not 0 < chance < 1:
            raise ValueError(f"chance must lie between 0 and 1; got {chance}")
        if least < 4:
            raise ValueError(f"least must be at least 4, the parameters of a curve; got {least}")
        self._steps, self._chance, self._least, self._bounds = steps, chance, least, bounds

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the trial is to end now."""
        reported = trial.intermediate_values
        # Step 0 has no logarithm, and what was there before training says little of its curve.
        x = np.array(sorted(step for step in reported if step > 0), float)
        y = np.array([reported[int(step)] for step in x])
        if len(y) and not math.isfinite(y[-1]):
            return True
        x, y = x[np.isfinite(y)], y[np.isfinite(y)]
        best = self._best(study)
        if best is None or len(y) < self._least or x[-1] >= self._steps:
            return False
        found = extrapolate_curve(x, y, self._steps, bounds=self._bounds)
        if found.ill_behaved:
            return False
        below = float(found.below(best)[0])
        return (below if study.direction == optuna.study.StudyDirection.MINIMIZE else 1 - below) < self._chance

    def _best(self, study: optuna.Study) -> float | None:
        done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        values = [trial.value for trial in done if trial.value is not None and math.isfinite(trial.value)]
        if not values:
            return None
        return min(values) if study.direction == optuna.study.StudyDirection.MINIMIZE else max(values)
