"""Population based training: configurations change while they train, and the worse take over from the better."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.grouping import Member
from jaxopt_lab.search.population import Crew, Members
from jaxopt_lab.search.record import Record, ranked
from jaxopt_lab.search.spaces import Dimension, Float, Integer, bare, dimensions
from jaxopt_lab.search.trial import Result, Trial

__all__ = ["Evolved", "Perturb", "evolve", "perturb"]


class Perturb(NamedTuple):
    """How a configuration that was taken over is changed, of `perturb`.

    Attributes:
      factors: a number is multiplied by one of these, as likely each.
      resample: the probability with which it is drawn anew from its dimension instead.
    """

    factors: tuple[float, ...]
    resample: float

    def __call__(self, random: np.random.Generator, dimension: Dimension, value: Any) -> Any:
        """The value after the change, in the range of the dimension; a choice is only drawn anew."""
        inner = bare(dimension)
        anew = random.random() < self.resample
        u, factor = random.random(), self.factors[random.integers(len(self.factors))]
        if anew:
            return inner.value(inner.quantile(np.float32(u)))
        match inner:
            case Float(low, high):
                return inner.value(np.clip(value * factor, low, high))
            case Integer(low, high, _, step):
                moved = low + step * round((np.clip(value * factor, low, high) - low) / step)
                return int(min(moved, high))
        return value


def perturb(*factors: float, resample: float = 0.25) -> Perturb:
    """Multiplies each number by one of the factors (0.8 and 1.2 by default), or draws it anew.

    Raises:
      ValueError: a factor is not positive, or the probability lies outside [0, 1].

    >>> perturb()
    Perturb(factors=(0.8, 1.2), resample=0.25)
    """
    factors = factors or (0.8, 1.2)
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise ValueError(f"factors must be positive; got {factors}")
    if not 0 <= resample <= 1:
        raise ValueError(f"resample must lie in [0, 1]; got {resample}")
    return Perturb(tuple(map(float, factors)), float(resample))


class Evolved(NamedTuple):
    """What `evolve` found.

    Attributes:
      result: of the members at the end, with their last configurations.
      lineage: `[rungs, n]`, whose state each member went on from after each rung.
      history: for each stretch between rungs, the configuration of each member in it.
    """

    result: Result
    lineage: np.ndarray
    history: tuple[tuple[Any, ...], ...]

    def schedule(self, index: int) -> list[Any]:
        """The configurations, one a stretch, along the line of ancestors that ends in a member: a schedule that was found.

        >>> from jaxopt_lab.search.trial import Result
        >>> Evolved(None, np.array([[1, 1]]), (("a", "b"), ("c", "b"))).schedule(0)
        ['b', 'c']
        """
        found = [self.history[-1][index]]
        for stretch in range(len(self.lineage) - 1, -1, -1):
            index = int(self.lineage[stretch, index])
            found.append(self.history[stretch][index])
        return found[::-1]


def evolve(
    trial: Trial,
    configs: Sequence[Any],
    space: PyTree,
    *,
    key: Array,
    batches: Callable[[int], Any],
    steps: int,
    every: int,
    part: float = 0.2,
    explore: Callable[[np.random.Generator, Dimension, Any], Any] | None = None,
    keep: int | None = 1,
    maximize: bool = False,
    **options: Any,
) -> Evolved:
    r"""Trains a population in which, every so many steps, the worst take over state and configuration of the best, and change it.

    After each rung, of a group of n members whose programs are the same, each of the worst :math:`\lfloor \rho n \rfloor` (and
    each that diverged) copies the state of a random one of the best :math:`\lfloor \rho n \rfloor`, and a changed form of its
    configuration. The copies are made on the device. What is part of the program (a width, a choice) stays as it was.

    Args:
      trial, configs, key, batches, steps, maximize, keep: as for `population`.
      space: the dimensions of the configurations, in whose ranges they change; those that are not in it stay.
      every: how many steps lie between rungs.
      part: :math:`\rho`, at most one half.
      explore: `(random, dimension, value) -> value`; `perturb()` by default.
      options: engine, memory, devices, static, shared, save, as for `population`; `explore` must be pure but for its generator.

    Returns:
      An `Evolved`: the result, and whose state each member went on from.

    Raises:
      ValueError: `every` or `part` is out of range, or as for `population`.

    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.search.spaces import uniform
    >>> trial = Trial(lambda key, c: jnp.float32(1), lambda x, batch, c: (x - c["rate"] * x, {}), lambda x: x**2)
    >>> configs = [{"rate": 0.01 * k} for k in range(5)]
    >>> space = {"rate": uniform(0.0, 1.0)}
    >>> found = evolve(trial, configs, space, key=jax.random.key(0), batches=lambda step: {}, steps=8, every=2)
    >>> found.lineage.shape, float(found.result.scores.max()) < 0.9
    ((3, 5), True)

    Source: Jaderberg et al., "Population based training of neural networks", 2017.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1 step; got {every}")
    if not 0 < part <= 0.5:
        raise ValueError(f"part must lie in (0, 0.5]; got {part}")
    found, explore = dimensions(space), explore or perturb()
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    decided = {
        "function": "evolve",
        "every": int(every),
        "part": float(part),
        "maximize": maximize,
        "space": found,
        "explore": explore,
    }
    crew = Crew(trial, configs, key, batches, steps, decided=decided, **options)
    record = Record(len(crew.configs))
    members = Members(crew, record, crew.everyone())
    now, lineage, history = list(crew.configs), [], []
    for mark in [*range(every, steps, every), steps]:
        members.advance(mark)
        members.evaluate()
        history.append(tuple(now))
        if mark == steps:
            break
        sources = list(range(len(now)))
        for start in crew.starts:
            for index, source in _taken_over(start.group.indices.tolist(), record.scores(mark), part, maximize, random):
                sources[index] = source
                now[index] = _explored(history[-1][source], start.group.member, found, explore, random)
        members.select(dict(enumerate(sources)), {i: now[i] for i, source in enumerate(sources) if i != source})
        lineage.append(sources)
    order = ranked(record.scores(), maximize)
    members.hand_over(None if keep is None else set(order[:keep]), away=False)
    result = record.result(now, crew.names, order[0] if order else None)
    return Evolved(result, np.array(lineage, int).reshape(len(lineage), len(now)), tuple(history))


def _taken_over(
    group: list[int], scores: np.ndarray, part: float, maximize: bool, random: np.random.Generator
) -> list[tuple[int, int]]:
    """Which members of a group take over from which others."""
    order = [group[k] for k in ranked(scores[group], maximize)]
    count = math.floor(part * len(group))
    best, diverged = order[: max(count, 1)], [index for index in group if index not in order]
    worst = [index for index in order[len(order) - count :] if index not in best]
    return [(index, best[random.integers(len(best))]) for index in [*worst, *diverged] if best]


def _explored(config: Any, member: Member, found: Mapping[str, Dimension], explore: Callable, random: np.random.Generator) -> Any:
    """A configuration with everything changed that is of the space, and no part of the program."""
    values = zip(member.paths(config), member.values(config), strict=True)
    return tree.replaced(config, {path: explore(random, found[path], value) for path, value in values if path in found})
