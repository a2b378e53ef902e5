"""Candidates, and the history of a search: which were looked at, in order, and what they came to."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxopt_lab.search.spaces import Choice, Dimension, Float, bare, is_active

__all__ = ["Candidate", "History", "check_config", "flat", "token"]


class Candidate(NamedTuple):
    """A configuration that was looked at.

    Attributes:
      config: dicts shaped as the space, without what is not active.
      values: by objective, as far as they were measured and are finite.
      outcome: "complete"; "rejected", by a bound on one of its values; or "failed", where the network cannot be built or a value
        is not finite.
      reason: why it was rejected, or failed.
      round: how many candidates there were before the round in which it was proposed; None if another than a strategy did.
    """

    config: dict[str, Any]
    values: Mapping[str, float]
    outcome: str = "complete"
    reason: str = ""
    round: int | None = None


class History(Sequence[Candidate]):
    """The candidates of a search in their order, for a strategy to read.

    Args:
      first: the objective that the best is the best by.
      maximize: whether that is the largest.
      candidates: what there is already.

    Attributes:
      complete: those with all their values, oldest first.
      measured: how many were not rejected.
      tokens: their configurations, as `token` has them.
    """

    def __init__(self, first: str, maximize: bool, candidates: Iterable[Candidate] = ()):
        self._first, self._maximize = first, maximize
        self._all: list[Candidate] = []
        self.tokens: set[Any] = set()
        self.complete: list[Candidate] = []
        self.measured = 0
        for candidate in candidates:
            self.add(candidate)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: Any) -> Any:
        return self._all[index]

    def knows(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration was looked at."""
        return token(config) in self.tokens

    def add(self, candidate: Candidate) -> None:
        """Puts a candidate at the end."""
        self._all.append(candidate)
        self.tokens.add(token(candidate.config))
        self.measured += candidate.outcome != "rejected"
        if candidate.outcome == "complete":
            self.complete.append(candidate)

    def until(self, count: int) -> "History":
        """The history as it was when it had so many candidates."""
        return History(self._first, self._maximize, self._all[:count])

    def loss(self, candidate: Candidate) -> float:
        """The first objective of a complete candidate, the lower the better."""
        value = candidate.values[self._first]
        return -value if self._maximize else value


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration by their "/"-joined paths: what `spaces.nest` makes dicts of.

    >>> flat({"net": {"width": 8}, "rate": 0.1})
    {'net/width': 8, 'rate': 0.1}
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{path}": leaf for path, leaf in flat(value).items()}
        else:
            found[name] = value
    return found


def token(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A configuration as the key of a dict; the order of its entries does not matter.

    >>> token({"net": {"width": 8}, "depth": 2})
    (('depth', 2), ('net/width', 8))
    """
    return tuple(sorted(flat(config).items(), key=lambda item: item[0]))


def check_config(config: Any, found: Mapping[str, Dimension]) -> None:
    """Refuses a configuration that is none of the space of these dimensions.

    Raises:
      TypeError: it is no dict.
      ValueError: it lacks an active dimension, has one that is not there, or a value out of range.

    >>> from jaxopt_lab.search.spaces import integer
    >>> check_config({"width": 9}, {"width": integer(1, 8)})
    Traceback (most recent call last):
      ...
    ValueError: a strategy proposed width=9, which is not in Integer(low=1, high=8, log=False, step=1)
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"a strategy must propose dicts shaped as the space; got a {type(config).__name__}")
    values = flat(config)
    wanted: dict[str, Any] = {}
    for path, dimension in found.items():
        if is_active(dimension, wanted):
            if path not in values:
                raise ValueError(f"a strategy proposed {dict(config)}, which lacks {path}")
            if not _holds(bare(dimension), values[path]):
                raise ValueError(f"a strategy proposed {path}={values[path]!r}, which is not in {bare(dimension)}")
            wanted[path] = values[path]
    if odd := sorted(set(values) - set(wanted)):
        raise ValueError(f"a strategy proposed {dict(config)}, in which {odd[0]} is not active, or not of the space")


def _holds(dimension: Any, value: Any) -> bool:
    if isinstance(dimension, Choice):
        return value in dimension.options
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not dimension.low <= value <= dimension.high:
        return False
    return isinstance(dimension, Float) or (isinstance(value, int) and (value - dimension.low) % dimension.step == 0)
