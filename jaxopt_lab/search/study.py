"""A study in Optuna's storage is the record of a search: spaces as distributions, asking for configurations, telling values.

The storage is in memory by default, a journal file by its path (which many processes may share), or a database by its URL, so that
dashboards and other samplers read what is written here.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxopt_lab.core.types import PyTree
from jaxopt_lab.search.spaces import Choice, Dimension, Float, Integer, When, bare, dimensions, is_active, nest

if TYPE_CHECKING:
    import optuna

__all__ = ["Asked", "ask", "from_distributions", "open_study", "suggest", "tell", "to_distributions"]

_SPACE = "jaxopt_lab:space"


class Asked(NamedTuple):
    """A trial that waits to be run.

    Attributes:
      trial: of the study; `tell` it.
      config: what to run: dicts shaped as the space, without what is not active.
    """

    trial: "optuna.Trial"
    config: dict[str, Any]


def to_distributions(space: PyTree) -> "dict[str, optuna.distributions.BaseDistribution]":
    """The dimensions of a space as Optuna's distributions, by their paths; the conditions are left out.

    >>> from jaxopt_lab.search.spaces import log_uniform
    >>> to_distributions({"net": {"rate": log_uniform(1e-3, 1.0)}})
    {'net/rate': FloatDistribution(high=1.0, log=True, low=0.001, step=None)}
    """
    return {path: _distribution(dimension) for path, dimension in dimensions(space).items()}


def from_distributions(distributions: "Mapping[str, optuna.distributions.BaseDistribution]") -> dict[str, Any]:
    """The space, of nested dicts, of Optuna's distributions, such as those of a trial of any study.

    Raises:
      TypeError: a distribution is of a class that is not Optuna's.

    >>> from optuna.distributions import IntDistribution
    >>> from_distributions({"net/width": IntDistribution(1, 8)})
    {'net': {'width': Integer(low=1, high=8, log=False, step=1)}}
    """
    from optuna import distributions as kinds

    found: dict[str, Dimension] = {}
    for path, d in distributions.items():
        match d:
            case kinds.FloatDistribution():
                found[path] = Float(d.low, d.high, d.log, d.step)
            case kinds.IntDistribution():
                found[path] = Integer(d.low, d.high, d.log, d.step)
            case kinds.CategoricalDistribution():
                found[path] = Choice(tuple(d.choices))
            case _:
                raise TypeError(f"{path} has the distribution {type(d).__name__}, which is none of Optuna's own")
    return nest(found)


def suggest(trial: "optuna.trial.BaseTrial", space: PyTree) -> dict[str, Any]:
    """The configuration that a trial suggests: its `suggest_*` is asked for every dimension that is active.

    The body of an objective for `study.optimize`; `ask` calls it as well.

    >>> import optuna
    >>> from jaxopt_lab.search.spaces import choice, uniform, when
    >>> space = {"optimizer": choice("sgd", "adam"), "momentum": when("optimizer", "sgd", uniform(0.0, 0.9))}
    >>> suggest(optuna.trial.FixedTrial({"optimizer": "adam"}), space)
    {'optimizer': 'adam'}
    """
    values: dict[str, Any] = {}
    for path, dimension in dimensions(space).items():
        if is_active(dimension, values):
            values[path] = _suggested(trial, path, bare(dimension))
    return nest(values)


def open_study(
    space: PyTree,
    name: str | None = None,
    *,
    storage: "str | os.PathLike | optuna.storages.BaseStorage | None" = None,
    directions: Sequence[str] = ("minimize",),
    sampler: "optuna.samplers.BaseSampler | None" = None,
    pruner: "optuna.pruners.BasePruner | None" = None,
) -> "optuna.Study":
    """A new study, or the one of this name, which must be of the same space and directions.

    Args:
      space: what is searched.
      name: of the study in its storage; needed to come back to it.
      storage: None keeps it in memory; a path is a journal file, made if need be; a URL (with "://") is a database; or a storage.
        A process that is killed while it writes leaves a journal locked, and the others wait for Optuna's 30 s.
      directions: "minimize" or "maximize" for each objective.
      sampler: any of Optuna's, or `GPSampler`; Optuna's choice by default.
      pruner: any of Optuna's.

    Raises:
      ValueError: the study of this name is of another space or of other directions; the message says where they differ.

    >>> from jaxopt_lab.search.spaces import uniform
    >>> study = open_study({"rate": uniform(0.0, 1.0)}, "rates")
    >>> [asked.config for asked in ask(study, {"rate": uniform(0.0, 1.0)}, 0)]
    []
    """
    import optuna

    outline = _outline(space)
    study = optuna.create_study(
        study_name=name,
        storage=_storage(storage),
        sampler=sampler,
        pruner=pruner,
        directions=list(directions),
        load_if_exists=name is not None,
    )
    wanted = [direction.upper() for direction in directions]
    if (stored := [direction.name for direction in study.directions]) != wanted:
        raise ValueError(
            f"the study {name!r} has the directions {', '.join(stored)}, not {', '.join(wanted)}; give it another name"
        )
    known = study.user_attrs.get(_SPACE)
    if known is None:
        study.set_user_attr(_SPACE, outline)
    elif known != outline:
        raise ValueError(f"the study {name!r} is of another space ({_difference(known, outline)}); name this one anew")
    return study


def ask(study: "optuna.Study", space: PyTree, q: int = 1) -> list[Asked]:
    """Asks the study's sampler for `q` configurations to run side by side.

    Args:
      study: any of Optuna's.
      space: what to suggest.
      q: how many; a sampler that knows of running trials (`GPSampler`) spreads them.

    >>> import optuna
    >>> from jaxopt_lab.search.spaces import uniform
    >>> study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    >>> [asked.config for asked in ask(study, {"rate": uniform(0.0, 1.0)}, 2)]
    [{'rate': 0.5488...}, {'rate': 0.7151...}]
    """
    if q < 0:
        raise ValueError(f"q must not be negative; got {q}")
    return [Asked(trial, suggest(trial, space)) for trial in (study.ask() for _ in range(q))]


def tell(study: "optuna.Study", trial: "optuna.Trial | int", values: Any) -> "optuna.trial.FrozenTrial":
    """Tells the study what a trial came to; one that is not finite in the sense of a number (NaN) fails that trial alone.

    Args:
      study: whose trial it is.
      trial: of `ask`, or its number.
      values: a number, or one for each objective; arrays of one element count as numbers.

    Returns:
      The finished trial.

    Raises:
      TypeError: the values are no numbers.
      ValueError: they are not as many as the objectives, or the trial is finished already.

    >>> import optuna
    >>> from jaxopt_lab.search.spaces import uniform
    >>> study = optuna.create_study()
    >>> asked = ask(study, {"rate": uniform(0.0, 1.0)})[0]
    >>> tell(study, asked.trial, float("nan")).state.name
    'FAIL'
    """
    import optuna

    number = trial if isinstance(trial, int) else trial.number
    numbers = _numbers(values, f"trial {number}")
    wanted = len(study.directions)
    if len(numbers) != wanted:
        raise ValueError(f"trial {number} came to {len(numbers)} values, {values!r}; the study has {wanted} objective(s)")
    if any(map(math.isnan, numbers)):
        return study.tell(trial, state=optuna.trial.TrialState.FAIL)
    try:
        return study.tell(trial, numbers)
    except ValueError as error:
        raise ValueError(f"trial {number} was told already, or is none of this study: {error}") from error


def _numbers(values: Any, of: str) -> list[float]:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{of} came to {values!r}; an objective is a number, or one for each direction") from error
    if array.dtype.kind not in "biuf" and "float" not in str(array.dtype):
        raise TypeError(f"{of} came to {values!r}; an objective is a number, or one for each direction")
    if array.ndim > 1 and array.size > 1:
        raise ValueError(f"{of} came to an array of shape {array.shape}; an objective is a number, or one for each direction")
    return [float(x) for x in array.reshape(-1)]


def _distribution(dimension: Dimension) -> "optuna.distributions.BaseDistribution":
    from optuna import distributions as kinds

    match bare(dimension):
        case Float(low, high, log, step):
            return kinds.FloatDistribution(low, high, log=log, step=step)
        case Integer(low, high, log, step):
            return kinds.IntDistribution(low, high, log=log, step=step)
        case Choice(options):
            return kinds.CategoricalDistribution(options)


def _suggested(trial: "optuna.trial.BaseTrial", path: str, dimension: Float | Integer | Choice) -> Any:
    match dimension:
        case Float(low, high, log, step):
            return trial.suggest_float(path, low, high, log=log, step=step)
        case Integer(low, high, log, step):
            return trial.suggest_int(path, low, high, log=log, step=step)
        case Choice(options):
            return trial.suggest_categorical(path, options)


def _storage(storage: Any) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if not isinstance(storage, (str, os.PathLike)) or "://" in str(storage):
        return storage
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _outline(space: PyTree) -> dict[str, Any]:
    """A space as plain JSON, to compare with that of a stored study."""
    from optuna.distributions import distribution_to_json

    outline = {}
    for path, dimension in dimensions(space).items():
        outline[path] = json.loads(distribution_to_json(_distribution(dimension)))
        if isinstance(dimension, When):
            outline[path]["when"] = [dimension.path, list(dimension.values)]
    return outline


def _difference(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    parts = [
        *(f"it lacks {path}" for path in wanted if path not in known),
        *(f"it has {path}" for path in known if path not in wanted),
        *(f"{path} is {known[path]}, not {wanted[path]}" for path in wanted if path in known and known[path] != wanted[path]),
    ]
    return "; ".join(parts)
