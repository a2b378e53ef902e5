"""What is known of a population: the scores and metrics of its evaluations, the states that were handed over, and who is best."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxopt_lab.core.types import PyTree
from jaxopt_lab.search.trial import Result

__all__ = ["Record", "States", "ranked"]


class Record:
    """What is known of a population so far: scores and metrics at the steps of its evaluations, and the states handed over.

    Attributes:
      states: functions that give a state, by index.

    >>> record = Record(3)
    >>> record.write(5, np.array([0, 1, 2]), np.array([3.0, 2.0, 1.0]), {})
    >>> record.write(9, np.array([0, 1]), np.array([0.5, 0.25]), {})
    >>> record.scores().tolist(), record.scores(9).tolist()
    ([0.5, 0.25, 1.0], [0.5, 0.25, nan])
    """

    def __init__(self, count: int):
        self._count = count
        self._seen: dict[int, np.ndarray] = {}
        self._scores: dict[int, np.ndarray] = {}
        self._metrics: dict[int, dict[str, np.ndarray]] = {}
        self.states: dict[int, Callable[[], PyTree]] = {}

    def write(self, at: int, indices: np.ndarray, scores: np.ndarray, metrics: dict[str, np.ndarray]) -> None:
        """Keeps the scores of some members after a step, and the means of their metrics since the evaluation before."""
        self._seen.setdefault(at, np.zeros(self._count, bool))[indices] = True
        self._scores.setdefault(at, np.full(self._count, np.nan))[indices] = scores
        columns = self._metrics.setdefault(at, {})
        for name, value in metrics.items():
            columns.setdefault(name, np.full((self._count, *value.shape[1:]), np.nan))[indices] = value

    def rows(self, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
        """What is known of some members, by step; `write` takes it."""
        chosen = np.asarray(indices)
        return {
            at: {
                "seen": seen[chosen],
                "scores": self._scores[at][chosen],
                "metrics": {name: column[chosen] for name, column in self._metrics[at].items()},
            }
            for at, seen in self._seen.items()
            if seen[chosen].any()
        }

    def scores(self, at: int | None = None) -> np.ndarray:
        """`[n]`, the scores after a step, NaN of those that it did not see; of each member its last, if none is named."""
        if at is not None:
            return self._scores.get(at, np.full(self._count, np.nan))
        last = np.full(self._count, np.nan)
        for step in sorted(self._seen):
            last = np.where(self._seen[step], self._scores[step], last)
        return last

    def result(self, configs: Sequence[Any], engines: Sequence[str], best: int | None) -> Result:
        """All of it."""
        steps = sorted(self._scores)
        names = list(dict.fromkeys(name for columns in self._metrics.values() for name in columns))
        metrics = {name: np.stack([self._metrics[at][name] for at in steps], axis=1) for name in names}
        curves = np.stack([self._scores[at] for at in steps], axis=1)
        return Result(self.scores(), States(self._count, self.states), configs, curves, tuple(steps), metrics, best, tuple(engines))


class States(Sequence):
    """The states of a population, sliced out of it when they are read; None for those that were not kept."""

    def __init__(self, count: int, states: dict[int, Callable[[], PyTree]]):
        self._count, self._states = count, states

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        state = self._states.get(range(self._count)[index])
        return None if state is None else state()


def ranked(scores: np.ndarray, maximize: bool) -> list[int]:
    """The indices of the finite scores, best first; of equal ones the first.

    >>> ranked(np.array([2.0, np.nan, 1.0]), maximize=False)
    [2, 0]
    """
    finite = np.flatnonzero(np.isfinite(scores))
    return finite[np.argsort(-scores[finite] if maximize else scores[finite], kind="stable")].tolist()
