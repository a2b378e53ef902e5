"""An Optuna study as the record of a search: each candidate a finished trial, and the history read back from these."""

import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jaxopt_lab.core.types import PyTree
from jaxopt_lab.search.architecture.candidates import Candidate, flat
from jaxopt_lab.search.spaces import Dimension, active, dimensions, nest

if TYPE_CHECKING:
    import optuna

__all__ = ["check_study", "read", "write"]

_CANDIDATE = "jaxopt_lab:candidate"


def check_study(study: "optuna.Study", names: Sequence[str], directions: Sequence[str]) -> None:
    """Refuses a study of other objectives, and names those of one that has no names yet.

    Raises:
      ValueError: its directions or names are not those of the search.

    >>> import optuna
    >>> check_study(optuna.create_study(), ["accuracy"], ["maximize"])
    Traceback (most recent call last):
      ...
    ValueError: the study has the directions minimize; the objectives are accuracy (maximize): open it with these
    """
    import optuna

    stored = [direction.name.lower() for direction in study.directions]
    wanted = ", ".join(f"{name} ({direction})" for name, direction in zip(names, directions, strict=True))
    if stored != list(directions):
        raise ValueError(f"the study has the directions {', '.join(stored)}; the objectives are {wanted}: open it with these")
    if study.metric_names is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(names))
    elif list(study.metric_names) != list(names):
        raise ValueError(f"the study is of {', '.join(study.metric_names)}; the objectives are {wanted}: open another")


def read(study: "optuna.Study", space: PyTree, names: Sequence[str]) -> list[Candidate]:
    """The candidates that a study holds, in order; whatever else it has complete trials of counts as well.

    Raises:
      ValueError: a trial is of another space.

    >>> import optuna
    >>> from jaxopt_lab.search.spaces import integer
    >>> study, space = optuna.create_study(), {"width": integer(1, 8)}
    >>> write(study, space, Candidate({"width": 3}, {"loss": 0.5}, round=0), ["loss"])
    >>> read(study, space, ["loss"])
    [Candidate(config={'width': 3}, values={'loss': 0.5}, outcome='complete', reason='', round=0)]
    """
    from optuna.trial import TrialState

    found, candidates = dimensions(space), []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)):
        kept = trial.user_attrs.get(_CANDIDATE)
        if kept is None and trial.state != TrialState.COMPLETE:
            continue
        told = {} if kept else {"values": dict(zip(names, trial.values, strict=True))}
        candidates.append(Candidate(config=_config(found, trial), **(kept or told)))
    return candidates


def write(study: "optuna.Study", space: PyTree, candidate: Candidate, names: Sequence[str], since: datetime | None = None) -> None:
    """Adds a candidate as a finished trial: complete with its values, pruned if a bound rejected it, or failed.

    Args:
      study, space: of the search.
      candidate: what was measured.
      names: of the objectives, in the study's order.
      since: when the measuring began; now if None.

    >>> import optuna
    >>> from jaxopt_lab.search.spaces import integer
    >>> study = optuna.create_study()
    >>> write(study, {"width": integer(1, 8)}, Candidate({"width": 3}, {}, "failed", "loss is nan"), ["loss"])
    >>> study.trials[0].state.name, study.trials[0].params
    ('FAIL', {'width': 3})
    """
    from optuna.trial import TrialState, create_trial

    from jaxopt_lab.search.study import to_distributions

    states = {"complete": TrialState.COMPLETE, "rejected": TrialState.PRUNED, "failed": TrialState.FAIL}
    params, distributions = flat(candidate.config), to_distributions(space)
    kept = candidate._asdict()
    del kept["config"]
    kept["values"] = dict(candidate.values)
    trial = create_trial(
        state=states[candidate.outcome],
        params=params,
        distributions={path: distributions[path] for path in params},
        values=[candidate.values[name] for name in names] if candidate.outcome == "complete" else None,
        user_attrs={_CANDIDATE: kept},
    )
    trial.datetime_start = since or trial.datetime_start
    study.add_trial(trial)


def _config(found: Mapping[str, Dimension], trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    try:
        values = active(found, trial.params)
    except KeyError as error:
        raise ValueError(f"trial {trial.number} of the study lacks {error}, which its configuration has in this space") from None
    if odd := sorted(set(trial.params) - set(values)):
        raise ValueError(f"trial {trial.number} of the study has {odd[0]}, which its configuration does not have in this space")
    return nest(values)
