"""Which checkpoints stay: the newest, and the best by a metric, by rules of their own."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["Best", "ranked", "retained"]


@dataclasses.dataclass(frozen=True)
class Best:
    """Has the best checkpoints kept beside the newest.

    Attributes:
      metric: its name in the `metrics` given to `save`; a step without it, or where it is NaN, is never best.
      maximise: whether more is better.
      keep: how many of the best.

    Raises:
      ValueError: `keep` is below 1, or `metric` is empty.

    >>> Best("accuracy", maximise=True).keep
    1
    """

    metric: str
    _: dataclasses.KW_ONLY
    maximise: bool
    keep: int = 1

    def __post_init__(self) -> None:
        if not self.metric:
            raise ValueError("Best needs the name of a metric; got ''")
        if self.keep < 1:
            raise ValueError(f"Best(keep={self.keep}): keep at least one of the best")


def ranked(metrics: Mapping[int, Mapping[str, Any]], best: Best) -> list[int]:
    """The steps that have the metric, from the best to the worst; of equals the earlier is better.

    Args:
      metrics: of each step.
      best: the rule.

    >>> ranked({1: {"loss": 2.0}, 2: {"loss": float("nan")}, 3: {"loss": 1.0}, 4: {}}, Best("loss", maximise=False))
    [3, 1]
    """
    values = {step: found.get(best.metric) for step, found in metrics.items()}
    sign = -1 if best.maximise else 1
    known = [(sign * value, step) for step, value in values.items() if isinstance(value, (int, float)) and not math.isnan(value)]
    return [step for _, step in sorted(known)]


def retained(metrics: Mapping[int, Mapping[str, Any]], keep: int | None, best: Best | None) -> set[int]:
    """Which of the verified steps stay: all of them where `keep` is None, and always the newest.

    Args:
      metrics: of each verified step.
      keep: how many of the newest.
      best: which others.

    >>> retained({1: {"loss": 1.0}, 2: {"loss": 3.0}, 3: {"loss": 2.0}}, 1, Best("loss", maximise=False))
    {1, 3}
    """
    if keep is None:
        return set(metrics)
    stay = set(sorted(metrics)[-keep:])
    return stay if best is None else stay | set(ranked(metrics, best)[: best.keep])
