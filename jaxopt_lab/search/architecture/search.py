"""The search itself: a strategy proposes, objectives measure, cheap ones first, and what was measured is the history."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.architecture import record
from jaxopt_lab.search.architecture.candidates import Candidate, History, check_config, token
from jaxopt_lab.search.architecture.front import front
from jaxopt_lab.search.architecture.objectives import Net, Objective, as_model
from jaxopt_lab.search.architecture.strategies import Strategy, regularized_evolution
from jaxopt_lab.search.spaces import dimensions
from jaxopt_lab.search.trial import check_typed_key

if TYPE_CHECKING:
    import optuna

__all__ = ["Architectures", "architectures"]

Illegal = type[Exception] | tuple[type[Exception], ...]

# Strategies draw from the key that a candidate of this number would have; there is none.
_NOBODY = np.uint32(2**32 - 1)


class Architectures(NamedTuple):
    """What a search found.

    Attributes:
      candidates: n, in the order in which they were proposed.
      names: of the m objectives.
      values: `[n, m]`, NaN where one was not measured.
      front: the indices of the complete candidates that no other dominates (`front`), ascending.
      best: the index of the best complete candidate by the first objective, of equal ones the first; None if there is none.
    """

    candidates: tuple[Candidate, ...]
    names: tuple[str, ...]
    values: np.ndarray
    front: np.ndarray
    best: int | None


def architectures(
    space: PyTree,
    build: Callable[[Any], Any] | None,
    objectives: Objective | Sequence[Objective],
    *,
    candidates: int,
    key: Array,
    strategy: Strategy | None = None,
    together: int = 1,
    illegal: Illegal = (),
    study: "optuna.Study | None" = None,
    patience: int = 1000,
) -> Architectures:
    """Searches networks: any space of configurations, any builder of models, several objectives.

    In each round the strategy proposes candidates, and the objectives measure those, the cheap ones first. One that exceeds a
    bound is rejected before anything dearer is computed; one that cannot be built, or that comes to a value that is not finite,
    fails alone. What is known already is passed over, unless the strategy repeats.

    With a study each candidate becomes a trial of it once it is measured: complete with its values, pruned if it was rejected, or
    failed. A search that was killed and is called again goes on from there, to the same result as if it had not been; one process
    at a time. Complete trials that something else put there count as well.

    Args:
      space: a tree of dimensions.
      build: `config -> Model`, or a Linen module; of `nets.from_linen`, `from_nnx` or `from_functions`. None where no objective
        needs a network.
      objectives: one, or several; the best is that by the first.
      candidates: how many to measure in all. Those that fail count, those that a bound rejects do not.
      key: a typed key, which is handed to the objectives; strategies draw from another that is folded from it.
      strategy: `random_search()`, `grid_search()`, or `regularized_evolution()`, which is the default.
      together: how many are proposed in a round; `trained` trains these as one population.
      illegal: kinds of exceptions that mean "this is no network": raised by `build` or while an objective is measured, they fail
        the candidate. By default none, so that a mistake is seen.
      study: of `open_study(space, name, directions=...)`, a direction for each objective.
      patience: the search ends when so many proposals in a row were rejected or known.

    Returns:
      An `Architectures`: every candidate with its values, the Pareto front, and the best.

    Raises:
      TypeError: an objective is none, or its value no number; `build` returned no model; a key is not typed.
      ValueError: the space is empty, a number out of range, two objectives have one name, a value is no scalar, the study is of
        other objectives, or a strategy proposed what is not in the space.

    >>> from jaxopt_lab.nets import MLP
    >>> from jaxopt_lab.search.architecture import grid_search, macs, scored
    >>> from jaxopt_lab.search.spaces import choice
    >>> space = {"width": choice(2, 4, 8)}
    >>> def build(config):
    ...     return MLP(features=(config["width"],), classes=2)
    >>> error = scored(lambda config: {2: 0.3, 4: 0.1}[config["width"]], name="error")
    >>> cost = macs(jax.ShapeDtypeStruct((1, 3), "float32"), at_most=30)
    >>> found = architectures(space, build, [error, cost], candidates=3, strategy=grid_search(), key=jax.random.key(0))
    >>> [each.outcome for each in found.candidates], found.values.tolist()
    (['complete', 'complete', 'rejected'], [[0.3, 10.0], [0.1, 20.0], [nan, 40.0]])
    >>> found.front.tolist(), found.best, found.candidates[2].reason
    ([0, 1], 1, 'macs is 40, above 30')
    """
    found, objectives = dimensions(space), _checked(objectives, build)
    check_typed_key(key)
    for name, number in {"candidates": candidates, "together": together, "patience": patience}.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {number!r}")
    names = tuple(objective.name for objective in objectives)
    directions = ["maximize" if objective.maximize else "minimize" for objective in objectives]
    history = History(names[0], objectives[0].maximize)
    if study is not None:
        record.check_study(study, names, directions)
        history = History(names[0], objectives[0].maximize, record.read(study, space, names))
    propose = _Proposals(strategy or regularized_evolution(), space, found, jax.random.fold_in(key, _NOBODY), patience)
    work = _Work(build, objectives, key, illegal)
    begun, configs = propose.rest(history, together)
    while (wanted := candidates - history.measured) > 0:
        if not configs:
            begun, configs = len(history), propose(history, min(together, wanted))
        if not configs:
            break
        since = datetime.now()
        for candidate in work.measured(configs[:wanted], len(history), begun):
            history.add(candidate)
            if study is not None:
                record.write(study, space, candidate, names, since)
        configs = []
    return _result(history, names, directions)


class _Proposals(NamedTuple):
    """A strategy, asked for configurations that are new."""

    strategy: Strategy
    space: PyTree
    found: Mapping[str, Any]
    key: Array
    patience: int

    def __call__(self, history: History, q: int) -> list[dict[str, Any]]:
        """Up to q configurations to measure; none when the strategy is through, or patience is over."""
        in_vain = next((k for k, each in enumerate(reversed(history)) if each.outcome != "rejected"), len(history))
        attempt = 0
        while in_vain < self.patience:
            # As this depends on the history alone, a search that was killed takes the same way again.
            key = jax.random.fold_in(jax.random.fold_in(self.key, len(history)), attempt)
            proposed = self.strategy(self.space, history, key, q)
            if not proposed:
                return []
            for config in proposed:
                check_config(config, self.found)
            new = list({token(config): config for config in proposed}.values())
            new = proposed if getattr(self.strategy, "repeats", False) else [config for config in new if not history.knows(config)]
            if new:
                return new[:q]
            in_vain, attempt = in_vain + len(proposed), attempt + 1
        return []

    def rest(self, history: History, q: int) -> tuple[int, list[dict[str, Any]]]:
        """Where the last round began, and what of it has not been measured: a search may have been killed within it."""
        begun = history[-1].round if len(history) else None
        if begun is None:
            return len(history), []
        told = [token(candidate.config) for candidate in history[begun:]]
        configs = self(history.until(begun), q)
        same = [token(config) for config in configs[: len(told)]] == told
        return begun, configs[len(told) :] if same else []


class _Work(NamedTuple):
    """How candidates are measured."""

    build: Callable[[Any], Any] | None
    objectives: Sequence[Objective]
    key: Array
    illegal: Illegal

    def measured(self, configs: Sequence[dict[str, Any]], first: int, begun: int) -> list[Candidate]:
        """What becomes of configurations, the first of which is the candidate of this number, of a round that began there."""
        done = {k: Candidate(config, {}, round=begun) for k, config in enumerate(configs)}
        nets = {}
        for k, config in enumerate(configs):
            net = self._net(config, first + k)
            if isinstance(net, Exception):
                done[k] = done[k]._replace(outcome="failed", reason=_brief(net))
            else:
                nets[k] = net
        for objective in sorted(self.objectives, key=lambda objective: objective.cost):
            values = self._values(objective, list(nets.values())) if nets else []
            for k, value in zip(list(nets), values, strict=True):
                done[k] = _judged(done[k], objective, value)
                if done[k].outcome != "complete":
                    del nets[k]
        return list(done.values())

    def _net(self, config: dict[str, Any], number: int) -> Net | Exception:
        if self.build is None:
            return Net(config, number, None, None)
        try:
            made = self.build(config)
        except self.illegal as error:
            return error
        return Net(config, number, self.build, as_model(made, config))

    def _values(self, objective: Objective, nets: list[Net]) -> list[float | Exception]:
        """A value for each, or why there is none."""
        try:
            values = objective.measure(nets, self.key)
        except self.illegal as error:
            # One by one it shows whose fault it was.
            return [error] if len(nets) == 1 else [value for net in nets for value in self._values(objective, [net])]
        if not hasattr(values, "__len__") or len(values) != len(nets):
            raise ValueError(
                f"{objective.name} must return a value for each of {len(nets)} networks; it returned {str(values)[:80]}"
            )
        return [_number(value, objective.name, net.config) for value, net in zip(values, nets, strict=True)]


def _judged(candidate: Candidate, objective: Objective, value: float | Exception) -> Candidate:
    """The candidate with one more value, which may be its end."""
    name, most, least = objective.name, objective.at_most, objective.at_least
    if isinstance(value, Exception):
        return candidate._replace(outcome="failed", reason=f"{name}: {_brief(value)}")
    if not math.isfinite(value):
        return candidate._replace(outcome="failed", reason=f"{name} is {value}")
    candidate = candidate._replace(values={**candidate.values, name: value})
    if most is not None and value > most:
        return candidate._replace(outcome="rejected", reason=f"{name} is {value:g}, above {most:g}")
    if least is not None and value < least:
        return candidate._replace(outcome="rejected", reason=f"{name} is {value:g}, below {least:g}")
    return candidate


def _number(value: Any, name: str, config: Any) -> float:
    array = np.asarray(value)
    if array.ndim:
        raise ValueError(f"{name} of {config} is an array of shape {array.shape}; an objective must return one number for each")
    if array.dtype.kind not in "biuf" and "float" not in str(array.dtype):
        raise TypeError(f"{name} of {config} is {value!r}; an objective must return one number for each")
    return float(array)


def _checked(objectives: Objective | Sequence[Objective], build: Any) -> tuple[Objective, ...]:
    objectives = (objectives,) if isinstance(objectives, Objective) or callable(objectives) else tuple(objectives)
    if not objectives:
        raise ValueError("there is no objective to search by")
    if build is not None and not callable(build):
        raise TypeError(f"build must be a function config -> Model; got a {type(build).__name__}")
    for index, objective in enumerate(objectives):
        if not isinstance(objective, Objective):
            raise TypeError(
                f"objectives[{index}] must be an Objective, as trained, macs, milliseconds or scored(function) give; "
                f"got a {type(objective).__name__}"
            )
        if objective.builds and build is None:
            raise TypeError(f"{objective.name} needs networks, and build is None: give a function config -> Model")
    names = [objective.name for objective in objectives]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two objectives have the name {twice[0]!r}; objective._replace(name=...) gives one another")
    return objectives


def _result(history: History, names: Sequence[str], directions: Sequence[str]) -> Architectures:
    values = np.array([[each.values.get(name, math.nan) for name in names] for each in history]).reshape(-1, len(names))
    complete = np.flatnonzero([each.outcome == "complete" for each in history])
    best = min(complete.tolist(), key=lambda index: history.loss(history[index]), default=None)
    return Architectures(tuple(history), tuple(names), values, complete[front(values[complete], directions)], best)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
