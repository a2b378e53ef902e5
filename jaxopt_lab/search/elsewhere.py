"""Populations that are trained elsewhere: what an engine that has workers of its own must offer.

`population` and `sweep` hand their configurations to such an engine in chunks, and are told of each when it is over, in any order.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from jaxopt_lab.search.trial import Result, Trial

__all__ = ["Elsewhere", "Hands", "Lost"]


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

    def hands(self, trial: Trial, run: dict[str, Any]) -> AbstractContextManager[Hands]:
        """Those who train a trial as `population(trial, configs, **run)` does, for as long as the context is open."""
        raise NotImplementedError

    def population(self, trial: Trial, configs: Sequence[Any], run: dict[str, Any]) -> Result:
        """As `population(trial, configs, **run)`."""
        raise NotImplementedError
