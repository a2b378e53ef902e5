"""What the pictures of a search read of a study of Optuna's, or of the `Result` of a population: scores, dimensions, curves.

Both are taken as they are by what they have, so that neither Optuna nor the floor of the search is imported here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxopt_lab.report import canvas

__all__ = ["Curves", "Dimension", "Extent", "Trials", "curves_of", "extent", "trials_of"]

_STEPS = (1, 2, 2.5, 5, 10)  # Between ticks, times a power of 10.
_DECADES = 3  # Over which scores that are all positive are drawn in the logarithm.
_FAR = 4.0  # Beyond so many times what nine in ten differ from the best by, a bad score is drawn at the edge.


class Dimension(NamedTuple):
    """A dimension as an axis.

    Attributes:
      path: its name.
      options: of a choice, in order; None for numbers.
      low, high: of numbers.
      log: whether the axis is logarithmic.
      integer: whether the numbers are.
    """

    path: str
    options: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    integer: bool = False

    def position(self, value: Any) -> float:
        """Where a value is drawn: itself, or the index of an option; NaN for what the axis does not have.

        >>> Dimension("act", ("relu", "gelu")).position("gelu"), Dimension("rate").position(0.5)
        (1.0, 0.5)
        """
        if self.options is not None:
            return float(self.options.index(value)) if value in self.options else math.nan
        return float(value) if not self.log or value > 0 else math.nan

    def unit(self, position: float) -> float:
        """The same in [0, 1] along the axis: the middle of its share for an option.

        >>> Dimension("rate", low=0.01, high=1.0, log=True).unit(0.1), Dimension("act", ("relu", "gelu")).unit(1.0)
        (0.5, 0.75)
        """
        if self.options is not None:
            return (position + 0.5) / len(self.options)
        low, high, at = (math.log(x) for x in (self.low, self.high, position)) if self.log else (self.low, self.high, position)
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Positions and what stands there.

        >>> Dimension("rate", low=1e-4, high=1.0, log=True).ticks(), Dimension("width", low=1, high=3, integer=True).ticks()
        ([(0.0001, '0.0001'), (0.001, '0.001'), (0.01, '0.01'), (0.1, '0.1'), (1.0, '1')], [(1.0, '1'), (2.0, '2'), (3.0, '3')])
        """
        if self.options is not None:
            every = -(-len(self.options) // max(most * 2, 1))
            return [(float(k), str(option)) for k, option in enumerate(self.options) if k % every == 0]
        places = self._places(most)
        step = 0.0 if self.log or len(places) < 2 else places[1] - places[0]
        return [(place, _tick(place, step)) for place in places]

    def _places(self, most: int) -> list[float]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        if not self.high > self.low:
            return [self.low]
        if self.log:
            wide = self.high / self.low >= 100
            locator = LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=most)
        else:
            locator = MaxNLocator(most - 1, integer=self.integer, steps=_STEPS)
        margin = 1e-9 * (self.high - self.low)
        found = [
            float(place) for place in locator.tick_values(self.low, self.high) if self.low - margin <= place <= self.high + margin
        ]
        return found if len(found) > 1 else [self.low, self.high]


class Trials(NamedTuple):
    """The trials of a search that have a score.

    Attributes:
      numbers: `[n]`, of the trials.
      params: n dicts of values by path, without what a trial did not have.
      scores: `[n, k]`, one a objective, all finite.
      dimensions: by path.
      names: of the k objectives.
      maximize: whether the largest is the best, of each.
      failed: numbers of trials that failed or whose score is not finite.
      note: how many trials there are, and what became of those that are not drawn.
      winner: the index of the best of a population, which is among those that took every step; None of a study.
    """

    numbers: np.ndarray
    params: tuple[dict[str, Any], ...]
    scores: np.ndarray
    dimensions: dict[str, Dimension]
    names: tuple[str, ...]
    maximize: tuple[bool, ...]
    failed: tuple[int, ...]
    note: str
    winner: int | None = None

    def best(self, objective: int = 0) -> int:
        """The index of the best by one objective; of equal ones the first."""
        if self.winner is not None:
            return self.winner
        column = self.scores[:, objective]
        return int(column.argmax() if self.maximize[objective] else column.argmin())

    def told(self, objective: int = 0) -> str:
        """What the foot of a picture says: the note, and which trial was the best."""
        k = self.best(objective)
        return f"{self.note}   (best: trial {self.numbers[k]}, {canvas.number(float(self.scores[k, objective]))})"

    def chosen(self, params: Sequence[str] | None, most: int, why: str) -> list[Dimension]:
        """The dimensions of these paths, or all.

        Raises:
          ValueError: there is none, there are more than `most`, or a path that no trial has.
        """
        if params is None:
            paths = list(self.dimensions)
        else:
            paths = list(params)
            if unknown := [path for path in paths if path not in self.dimensions]:
                raise ValueError(
                    f"params names {', '.join(unknown)}; the trials have {', '.join(self.dimensions) or 'no dimension'}"
                )
        if not paths:
            raise ValueError("the trials have no dimension to draw: their configurations hold no number, string, boolean or None")
        if len(paths) > most:
            raise ValueError(f"{len(paths)} dimensions are too many for {why}, which holds {most}: name some by params=[...]")
        return [self.dimensions[path] for path in paths]

    def objective(self, index: int) -> int:
        """The index of an objective, checked.

        Raises:
          ValueError: there is none of that index.
        """
        if not 0 <= index < len(self.names):
            raise ValueError(f"objective must be one of 0 to {len(self.names) - 1}; got {index}")
        return index


class Curves(NamedTuple):
    """Scores of trials while they were trained.

    Attributes:
      numbers: of the m trials that have any.
      steps: m arrays, ascending.
      values: m arrays, NaN where one diverged.
      ended: what became of each: "COMPLETE", "FAIL", "RUNNING" or "PRUNED", as which those of a population count that were
        dropped or diverged.
      best: the index, among the m, of the best trial; None if none has a finite score.
      name: of the score.
      maximize: whether the largest is the best.
      note: as of `Trials`.
    """

    numbers: tuple[int, ...]
    steps: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]
    ended: tuple[str, ...]
    best: int | None
    name: str
    maximize: bool
    note: str


class Extent(NamedTuple):
    """How far an axis of scores goes.

    Attributes:
      low, high: its ends, with a margin.
      log: whether it is logarithmic.
    """

    low: float
    high: float
    log: bool

    def clipped(self, values: np.ndarray) -> np.ndarray:
        """Values with those outside moved to the edge."""
        return np.clip(values, self.low, self.high)

    def apply(self, axis: Any) -> None:
        """Gives a matplotlib axis this extent, and numbers of the house."""
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

        (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log" if self.log else "linear")
        (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(self.low, self.high)
        wide = self.log and self.high / self.low >= 100
        axis.set_major_locator(
            LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8) if self.log else MaxNLocator(6, steps=_STEPS)
        )
        axis.set_minor_locator(NullLocator())
        step = 0.0 if self.log else float(np.diff(axis.get_majorticklocs()[:2])[0])
        axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, step)))

    def norm(self) -> Any:
        """Of colours."""
        from matplotlib.colors import LogNorm, Normalize

        return (LogNorm if self.log else Normalize)(self.low, self.high, clip=True)


def extent(values: Any, maximize: bool | None = None, *, decades: float = _DECADES, margin: float = 0.05) -> Extent:
    """The extent of an axis of scores: of all, or up to the edge of the bad ones that would press the others together.

    Args:
      values: finite, at least one.
      maximize: which end is the good one; None cuts neither.
      decades: from how many on positive values are drawn in the logarithm.
      margin: part of the range that is left free at each end.

    >>> extent([0.1, 0.2, 0.3], False, margin=0.0), extent([1e-4, 1.0], margin=0.0).log
    (Extent(low=0.1, high=0.3, log=False), True)
    >>> extent([*range(20), 1e9], False).high < 100
    True
    """
    values = np.asarray(values, float)
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low >= 10**decades:
        low, high = (math.exp(end) for end in _without_far(np.log(values), maximize))
        if high / low >= 10**decades:
            factor = (high / low) ** margin
            return Extent(low / factor, high * factor, True)
    else:
        low, high = _without_far(values, maximize)
    room = margin * (high - low) or 0.05 * abs(high) or 0.5
    return Extent(low - room, high + room, False) if margin else Extent(low, high, False)


def _without_far(values: np.ndarray, maximize: bool | None) -> tuple[float, float]:
    """The ends of a range without the bad values that lie far behind nine in ten."""
    low, high = float(values.min()), float(values.max())
    if maximize is None or len(values) < 8:
        return low, high
    behind = np.sort(high - values if maximize else values - low)
    usual = float(behind[math.ceil(0.9 * len(behind)) - 1])
    if usual <= 0 or behind[-1] <= _FAR * usual:
        return low, high
    return (high - 1.3 * usual, high) if maximize else (low, low + 1.3 * usual)


def trials_of(study: Any, space: Any = None) -> Trials:
    """The trials of a study, or the configurations of a `Result`, that have a finite score.

    Args:
      study: of Optuna's, or what `search.population` returns.
      space: of a `Result`, which does not know it: tells ranges, options and which axes are logarithmic. Without it, these are read
        off the values: positive numbers over two decades and more go on a logarithmic axis.

    Raises:
      TypeError: it is neither.
      ValueError: no trial has a finite score.

    >>> from jaxopt_lab.search.trial import Result
    >>> scores, configs = np.array([0.3, np.nan, 0.1]), [{"net": {"width": w}} for w in (8, 16, 32)]
    >>> found = trials_of(Result(scores, (), configs, scores[:, None], (10,), {}, 2, ()))
    >>> found.numbers.tolist(), list(found.dimensions), found.note
    ([0, 2], ['net/width'], '3 trials: 1 failed or diverged')
    """
    rows, names, maximize = _rows(study)
    numbers = [number for number, _, values, _ in rows if _finite(values)]
    if not numbers:
        raise ValueError(f"there is nothing to draw: of {len(rows)} trials none has a finite score")
    params = tuple(each for _, each, values, _ in rows if _finite(values))
    scores = np.array([values for *_, values, _ in rows if _finite(values)], float)
    dimensions = _by_space(space, params) if space is not None else _by_study(study) if _is_study(study) else _by_values(params)
    failed = tuple(number for number, _, values, state in rows if state == "FAIL" or (state == "COMPLETE" and not _finite(values)))
    best = None if _is_study(study) else study.best
    winner = numbers.index(best) if best in numbers else None
    return Trials(np.array(numbers), params, scores, dimensions, names, maximize, failed, _note(rows, len(failed)), winner)


def curves_of(study: Any) -> Curves:
    """The intermediate values of a study's trials, or the curves of a `Result`.

    Raises:
      TypeError: it is neither.
      ValueError: there are none.

    >>> from jaxopt_lab.search.trial import Result
    >>> curves = np.array([[3.0, 1.0], [4.0, np.nan]])
    >>> found = curves_of(Result(curves[:, 0], (), [{}, {}], curves, (10, 30), {}, 0, ()))
    >>> found.steps[1].tolist(), found.best
    ([10], 0)
    """
    rows, names, maximize = _rows(study)
    if len(names) > 1:
        raise ValueError(f"a study of {len(names)} objectives has no intermediate values")
    seen = [(number, *each, state) for (number, *_, state), each in zip(rows, _seen(study), strict=True) if len(each[0])]
    if not any(np.isfinite(values).any() for _, _, values, _ in seen):
        raise ValueError(
            f"there is no curve to draw: none of {len(rows)} trials has an intermediate value; report some, or give rungs"
        )
    known = {number: values[0] for number, _, values, _ in rows if _finite(values)}
    ranked = [k for k, (number, *_) in enumerate(seen) if number in known]
    if not _is_study(study):
        # Those that were dropped have a score too, of fewer steps.
        last = max(study.evaluated)
        seen = [(*each[:3], "COMPLETE" if each[1][-1] == last else "PRUNED") for each in seen]
        ranked = [k for k in ranked if seen[k][3] == "COMPLETE"] or ranked
    best = None
    if ranked:
        best = (max if maximize[0] else min)(ranked, key=lambda k: known[seen[k][0]])
    failed = sum(state == "FAIL" or (state == "COMPLETE" and not _finite(values)) for _, _, values, state in rows)
    columns = tuple(zip(*seen, strict=True))
    return Curves(*columns, best, names[0], maximize[0], _note(rows, failed))


_Row = tuple[int, dict[str, Any], tuple[float, ...], str]


def _is_study(study: Any) -> bool:
    return hasattr(study, "get_trials") and hasattr(study, "directions")


def _rows(study: Any) -> tuple[list[_Row], tuple[str, ...], tuple[bool, ...]]:
    """Number, parameters, scores and state of each trial; names and directions of the objectives."""
    if _is_study(study):
        maximize = tuple(direction.name == "MAXIMIZE" for direction in study.directions)
        named = getattr(study, "metric_names", None)
        if not named:
            named = ["objective"] if len(maximize) == 1 else [f"objective {k}" for k in range(len(maximize))]
        rows = []
        for trial in study.get_trials(deepcopy=False):
            state = trial.state.name
            rows.append((trial.number, dict(trial.params), tuple(trial.values) if state == "COMPLETE" else (), state))
        return rows, tuple(named), maximize
    if all(hasattr(study, name) for name in ("configs", "scores", "curves", "evaluated", "best")):
        scores = np.asarray(study.scores, float)
        rows = [(k, _flat(config), (float(scores[k]),), "COMPLETE") for k, config in enumerate(study.configs)]
        return rows, ("score",), (_maximizes(study),)
    raise TypeError(f"a picture is of a study of Optuna's or the Result of a population; got {type(study).__name__}")


def _maximizes(result: Any) -> bool:
    """Whether the best of a population is better for being larger.

    Among those that took every step it is the extreme; where there is no other, it was better than those that were dropped.
    """
    if result.best is None:
        return False
    curves = np.asarray(result.curves, float)
    columns = list(curves.T) if curves.size else [np.asarray(result.scores, float)]
    there = np.zeros(len(result.scores), bool)
    for column in reversed(columns):
        others = np.isfinite(column) & ~there
        others[result.best] = False
        if others.any():
            return bool(column[result.best] > column[others].mean())
        there |= np.isfinite(column)
    return False


def _finite(values: Sequence[float]) -> bool:
    return bool(values) and all(math.isfinite(value) for value in values)


def _note(rows: Sequence[_Row], failed: int) -> str:
    states = [state for *_, state in rows]
    others = [
        (failed, "failed or diverged"),
        (states.count("PRUNED"), "pruned"),
        (states.count("RUNNING") + states.count("WAITING"), "unfinished"),
    ]
    left = ", ".join(f"{count:,} {what}" for count, what in others if count)
    return f"{len(rows):,} trial{'s' if len(rows) != 1 else ''}{': ' if left else ''}{left}"


def _seen(study: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each trial's curve."""
    if _is_study(study):
        found = [sorted(trial.intermediate_values.items()) for trial in study.get_trials(deepcopy=False)]
        return [(np.array([step for step, _ in each]), np.array([value for _, value in each], float)) for each in found]
    steps, curves = np.asarray(study.evaluated), np.asarray(study.curves, float)
    out = []
    for curve in curves:
        last = np.flatnonzero(np.isfinite(curve))
        # What follows the last finite value is of one that was dropped, or that diverged: of both the curve is over.
        count = last[-1] + 1 if last.size else 0
        out.append((steps[:count], curve[:count]))
    return out


def _flat(config: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """What can be drawn of a configuration, by path: numbers, strings, booleans, None."""
    if isinstance(config, Mapping):
        return {name: value for key, child in config.items() for name, value in _flat(child, (*path, str(key))).items()}
    if config is None or isinstance(config, (bool, str)):
        return {"/".join(path): config}
    if np.ndim(config) == 0 and np.asarray(config).dtype.kind in "biuf":
        return {"/".join(path): np.asarray(config).item()}
    return {}


def _by_study(study: Any) -> dict[str, Dimension]:
    """The union of what trials were asked for."""
    found: dict[str, Dimension] = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name != "COMPLETE":
            continue
        for path, distribution in trial.distributions.items():
            made = _dimension(path, distribution, "choices")
            found[path] = _joined(found[path], made) if path in found else made
    return found


def _dimension(path: str, kind: Any, options: str) -> Dimension:
    """Of a distribution, or of a dimension of a space."""
    if (listed := getattr(kind, options, None)) is not None:
        return Dimension(path, tuple(listed))
    return Dimension(path, None, float(kind.low), float(kind.high), bool(kind.log), isinstance(kind.low, (int, np.integer)))


def _joined(a: Dimension, b: Dimension) -> Dimension:
    if a.options is not None or b.options is not None:
        return Dimension(a.path, tuple(dict.fromkeys([*(a.options or ()), *(b.options or ())])))
    return Dimension(a.path, None, min(a.low, b.low), max(a.high, b.high), a.log and b.log, a.integer and b.integer)


def _by_space(space: Any, params: Sequence[Mapping[str, Any]]) -> dict[str, Dimension]:
    found = {}
    for path, leaf in _leaves(space):
        inner = getattr(leaf, "dimension", leaf)
        if not (hasattr(inner, "options") or hasattr(inner, "low")):
            raise TypeError(f"{path or 'the space'} is a {type(leaf).__name__}; a space is a tree of dicts and of dimensions")
        found[path] = _dimension(path, inner, "options")
    # What no trial has is no axis.
    return {path: dimension for path, dimension in found.items() if any(path in each for each in params)}


def _leaves(node: Any, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return [leaf for key, child in node.items() for leaf in _leaves(child, (*path, str(key)))]
    return [("/".join(path), node)]


def _by_values(params: Sequence[Mapping[str, Any]]) -> dict[str, Dimension]:
    found = {}
    for path in dict.fromkeys(path for each in params for path in each):
        values = [each[path] for each in params if path in each]
        if any(value is None or isinstance(value, (bool, str)) for value in values):
            found[path] = Dimension(path, tuple(sorted(dict.fromkeys(values), key=lambda value: (str(type(value)), str(value)))))
            continue
        values = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(values), max(values)
        found[path] = Dimension(
            path, None, float(low), float(high), low > 0 and high >= 100 * low, all(isinstance(value, int) for value in values)
        )
    return found


def _tick(value: float, step: float) -> str:
    """A number at a tick, told from those a step away."""
    if step and value and abs(value) / step > 500:
        digits = max(0, -math.floor(math.log10(step)))
        # A quarter of a power of ten takes a digit more.
        return f"{value:.{digits + (abs(round(step, digits) - step) > 0.01 * step)}f}"
    return canvas.number(0.0 if step and abs(value) < 1e-9 * step else value)
