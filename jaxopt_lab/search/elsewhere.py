"""Populations that are trained elsewhere: what an engine that has workers of its own must offer.

`population` and `sweep` hand their configurations to such an engine in chunks, and are told of each when it is over, in any order.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxopt_lab.search.trial import Result, Trial

__all__ = ["Elsewhere", "Hands", "Lost", "Prune", "relabelled"]

# Asked after a rung with the scores of some that are trained together, which of them to train no further.
Prune = Callable[[int, Mapping[int, float]], Collection[int]]


class Lost(NamedTuple):
    """What became of configurations that were given up.

    Attributes:
      cause: why, in words.
    """

    cause: str


class Hands(Protocol):
    """Those who train chunks of configurations, many chunks at a time."""

    def room(self) -> int:
        """How many chunks more they would take now."""
        ...

    def submit(self, labels: Sequence[int], configs: Sequence[Any], numbers: Sequence[int]) -> None:
        """Gives them a chunk.

        Args:
          labels: what the caller knows each configuration by.
          configs: the configurations.
          numbers: what each folds into the key.
        """
        ...

    def wait(self) -> list[tuple[list[int], Result | Lost]]:
        """Waits until something is over, and tells the labels of what is, in parts as small as need be.

        It may tell nothing, and have more room instead.
        """
        ...


class Elsewhere:
    """An engine that trains whole populations elsewhere, instead of an `Engine` of this process."""

    def hands(self, trial: Trial, run: dict[str, Any], prune: Prune | None) -> AbstractContextManager[Hands]:
        """Those who train a trial as `population(trial, configs, **run)` does, for as long as the context is open.

        `prune` is asked in this process, while it waits, of the labels of a chunk.
        """
        raise NotImplementedError

    def population(
        self, trial: Trial, configs: Sequence[Any], run: dict[str, Any], prune: Prune | None = None, save: str | Path | None = None
    ) -> Result:
        """As `population(trial, configs, prune=prune, save=save, **run)`."""
        raise NotImplementedError


def relabelled(prune: Prune | None, labels: Sequence[int]) -> Prune | None:
    """The question as a population puts it, by position, where it is answered by labels.

    >>> asked = relabelled(lambda step, scores: [label for label, score in scores.items() if score > step], [7, 9])
    >>> asked(5, {0: 3.0, 1: 8.0})
    [1]
    """
    if prune is None:
        return None

    def asked(step: int, scores: Mapping[int, float]) -> list[int]:
        dropped = set(prune(step, {labels[index]: score for index, score in scores.items()}))
        return [index for index in scores if labels[index] in dropped]

    return asked
