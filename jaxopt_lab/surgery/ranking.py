"""How many units of each group are cut: `(groups, scores of each, ratio) -> counts`."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from jaxopt_lab.core.types import Array
from jaxopt_lab.surgery.coupled import Group

__all__ = ["Ranking", "global_", "isomorphic", "local"]

Ranking = Callable[[Sequence[Group], Sequence[Array], float], Sequence[int]]
"""`(groups, scores of each, ratio) -> how many units of each group are cut`."""


def local() -> Ranking:
    """Of every group the same part is cut.

    >>> local()([], [np.arange(8.0), np.arange(3.0)], 0.5)
    [4, 2]
    """
    return lambda groups, scores, ratio: [round(ratio * len(own)) for own in scores]


def global_(*, normalize: bool = True) -> Ranking:
    """Of all units together a part is cut, those with the lowest scores.

    Args:
      normalize: take scores against the mean of their group. Without that, scores have to be alike from group to group, as `scales`
        are.

    >>> scores = [np.array([1.0, 9.0]), np.array([2.0, 2.0, 1.7])]
    >>> global_()([], scores, 0.4), global_(normalize=False)([], scores, 0.8)
    ([1, 1], [1, 3])
    """

    def cuts(groups: Sequence[Group], scores: Sequence[Array], ratio: float) -> list[int]:
        del groups
        return _lowest([np.asarray(own) / (max(float(np.mean(own)), 1e-30) if normalize else 1.0) for own in scores], ratio)

    return cuts


def isomorphic(*, normalize: bool = True) -> Ranking:
    """Of all units of groups that are built alike a part is cut, and the same part of every such class.

    Groups are alike whose members are: as many, of the same last names and axes, in the same order. Their scores can be compared
    where those of a feed-forward layer and of an attention's heads cannot.

    Args:
      normalize: as in `global_`.

    >>> from jaxopt_lab.surgery.coupled import Member
    >>> a, b, c = (Group((Member(path, axis, np.array([[0], [1]])),)) for path, axis in (("a/w", 1), ("b/w", 1), ("c/w", 0)))
    >>> isomorphic()([a, b, c], [np.array([1.0, 2.0]), np.array([1.5, 1.5]), np.array([0.1, 0.1])], 0.5)
    [1, 1, 1]

    Source: Fang et al., "Isomorphic pruning for vision models", 2024.
    """

    def cuts(groups: Sequence[Group], scores: Sequence[Array], ratio: float) -> list[int]:
        classes: dict[Hashable, list[int]] = {}
        for k, group in enumerate(groups):
            built = tuple((m.path.rsplit("/", 1)[-1], m.axis, m.indices.shape[1]) for m in group.members)
            classes.setdefault(built, []).append(k)
        counts = [0] * len(groups)
        for own in classes.values():
            of_class = global_(normalize=normalize)([groups[k] for k in own], [scores[k] for k in own], ratio)
            for k, n in zip(own, of_class, strict=True):
                counts[k] = n
        return counts

    return cuts


def _lowest(scores: Sequence[np.ndarray], ratio: float) -> list[int]:
    """How many of each are among the lowest of all; ties take the first."""
    every = np.concatenate([np.zeros(0), *scores])
    order = np.argsort(every, kind="stable")[: round(ratio * len(every))]
    owner = np.repeat(np.arange(len(scores)), [len(own) for own in scores])
    return np.bincount(owner[order], minlength=len(scores)).tolist()
