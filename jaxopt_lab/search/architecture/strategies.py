"""Which candidates come next: strategies, each a pure function of the history and a key."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.architecture.candidates import Candidate, History, flat, token
from jaxopt_lab.search.spaces import Choice, Dimension, Float, bare, configs, dimensions, grid, is_active, nest, sample

__all__ = ["Evolution", "Grid", "Random", "Strategy", "grid_search", "mutated", "random_search", "regularized_evolution"]

_DRAWN = 16
_TRIES, _IN_VAIN = 100, 5
_MOST_LISTED = 100_000


class Strategy(Protocol):
    """What proposes candidates: `(space, history, key, q) -> configs`, q of them or fewer, none once it is through.

    It is pure: the same history and key give the same proposals, and for a larger q they begin with those of a smaller one.

    Attributes:
      repeats: whether a configuration that it proposes again is measured again; otherwise, and for a function that does not say,
        it is passed over.
    """

    @property
    def repeats(self) -> bool: ...

    def __call__(self, space: PyTree, history: History, key: Array, q: int) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Random:
    """Draws from the space; of `random_search`."""

    repeats: bool = False

    def __call__(self, space: PyTree, history: History, key: Array, q: int) -> list[dict[str, Any]]:
        return _taken(_drawn(space, history, key, self.repeats), q)


@dataclass(frozen=True)
class Grid:
    """Goes through a grid; of `grid_search`."""

    points: int | tuple[tuple[str, int], ...]
    repeats: bool = False

    def __call__(self, space: PyTree, history: History, key: Array, q: int) -> list[dict[str, Any]]:
        rows = _rows(dimensions(space), self.points)
        return _taken((nest(dict(row)) for key, row in rows.items() if key not in history.tokens), q)


@dataclass(frozen=True)
class Evolution:
    """Mutates the best of a few of the youngest; of `regularized_evolution`."""

    population: int
    sample: int
    fitness: Callable[[Mapping[str, float]], float] | None = None
    repeats: bool = False

    def __call__(self, space: PyTree, history: History, key: Array, q: int) -> list[dict[str, Any]]:
        first, later = jax.random.split(key)
        fresh = _drawn(space, history, first, self.repeats)
        youngest = history.complete[-self.population :]
        if len(youngest) < self.population:
            return _taken(fresh, min(q, self.population - len(youngest)))
        ranked = [self._loss(history, each) for each in youngest]
        random, found, proposed, seen = generator(later), dimensions(space), [], set()
        for _ in range(q):
            for _ in range(_TRIES):
                parent = youngest[min(random.integers(self.population, size=self.sample).tolist(), key=ranked.__getitem__)]
                child = mutated(found, parent.config, random)
                if child is not None and (self.repeats or not (history.knows(child) or token(child) in seen)):
                    break
            else:
                # Around here all is known, or nothing can be changed.
                child = next((each for each in fresh if token(each) not in seen), None)
            if child is None:
                break
            seen.add(token(child))
            proposed.append(child)
        return proposed

    def _loss(self, history: History, candidate: Candidate) -> float:
        if self.fitness is None:
            return history.loss(candidate)
        fitness = float(self.fitness(candidate.values))
        return math.inf if math.isnan(fitness) else -fitness


def random_search(*, repeats: bool = False) -> Random:
    """Candidates drawn from the space, each once; of a finite space (up to 100,000 configurations) all, if asked for as many.

    Args:
      repeats: whether one that was measured may be drawn, and measured, again.

    >>> from jaxopt_lab.search.spaces import choice
    >>> drawn = random_search()({"depth": choice(1, 2)}, History("score", False), jax.random.key(0), 5)
    >>> sorted(config["depth"] for config in drawn)
    [1, 2]

    Source: Li and Talwalkar, "Random search and reproducibility for neural architecture search", 2019.
    """
    return Random(repeats)


def grid_search(points: int | Mapping[str, int] = 5) -> Grid:
    """Every combination of the options of choices and of a few values of each range, in the order of `spaces.grid`.

    Args:
      points: as of `spaces.grid`: how many values of a range, ends included, or how many by path.

    Raises:
      ValueError: `points` is below 1.

    >>> from jaxopt_lab.search.spaces import choice, integer
    >>> space = {"depth": choice(1, 2), "width": integer(8, 32)}
    >>> grid_search(3)(space, History("score", False), jax.random.key(0), 2)
    [{'depth': 1, 'width': 8}, {'depth': 1, 'width': 20}]
    """
    counts = dict(points) if isinstance(points, Mapping) else {"points": points}
    for path, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{path} must be an integer of at least 1; got {count!r}")
    return Grid(tuple(counts.items()) if isinstance(points, Mapping) else points)


def regularized_evolution(
    population: int = 100,
    sample: int = 25,
    *,
    fitness: Callable[[Mapping[str, float]], float] | None = None,
    repeats: bool = False,
) -> Evolution:
    r"""Ageing evolution: the population is the youngest P, and who is oldest dies, however good it is.

    At first P candidates are drawn at random. Then S of the last P that are complete are drawn with replacement, and the best of
    them is copied with one dimension changed (`mutated`). A child that was measured before is passed over for another, unless
    `repeats`, as it was published: then a good value persists only as long as training anew confirms it. Where every neighbour is
    known, a random candidate takes the child's place.

    Args:
      population: :math:`P`.
      sample: :math:`S`; the larger, the greedier.
      fitness: of the values by objective, the larger the better; by default the first objective.
      repeats: whether a configuration may be measured again.

    Raises:
      ValueError: P or S is below 1.

    >>> from jaxopt_lab.search.spaces import integer
    >>> space, history = {"a": integer(0, 9), "b": integer(0, 9)}, History("score", False)
    >>> history.add(Candidate({"a": 3, "b": 4}, {"score": 1.0}))
    >>> child = regularized_evolution(1, 1)(space, history, jax.random.key(0), 1)[0]
    >>> (child["a"] == 3) + (child["b"] == 4)
    1

    Source: Real, Aggarwal, Huang and Le, "Regularized evolution for image classifier architecture search", 2019.
    """
    for name, value in {"population": population, "sample": sample}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
    if fitness is not None and not callable(fitness):
        raise TypeError(f"fitness must be a function of the values by objective; got a {type(fitness).__name__}")
    return Evolution(population, sample, fitness, repeats)


def mutated(found: Mapping[str, Dimension], config: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any] | None:
    """A configuration with one of its active dimensions changed, each as likely; None if none can be.

    A choice takes another of its options, each as likely, a range another value drawn anew. What becomes active by the change is
    drawn, and what is no longer is left out.

    Args:
      found: the dimensions by path, as `dimensions(space)` gives them.
      config: one of the space.
      random: of numpy.

    >>> from jaxopt_lab.search.spaces import choice, when
    >>> found = dimensions({"kind": choice("dense", "conv"), "size": when("kind", "conv", choice(3))})
    >>> mutated(found, {"kind": "dense"}, np.random.default_rng(0))
    {'kind': 'conv', 'size': 3}
    """
    values = flat(config)
    free = [path for path, dimension in found.items() if path in values and _changes(bare(dimension))]
    if not free:
        return None
    changed, kept = free[random.integers(len(free))], {}
    for path, dimension in found.items():
        if not is_active(dimension, kept):
            continue
        if path == changed:
            kept[path] = _other(bare(dimension), values[path], random)
        else:
            kept[path] = values[path] if path in values else _value(bare(dimension), random)
    return nest(kept)


def generator(key: Array) -> np.random.Generator:
    """A generator of numpy seeded by a key: for draws one at a time, which cost JAX a dispatch each."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())


def _drawn(space: PyTree, history: History, key: Array, repeats: bool) -> Iterator[dict[str, Any]]:
    """Random configurations, each once and none that is known, unless they may repeat; ends where there are no more."""
    found, seen, in_vain = dimensions(space), set(), 0
    levels = [dimension.levels for dimension in found.values()]
    finite = math.prod(math.inf if level is None else level for level in levels) <= _MOST_LISTED
    for attempt in range(_TRIES):
        in_vain += 1
        for config in configs(space, _sampler(tuple(found.items()))(key, attempt)):
            if repeats or not (history.knows(config) or token(config) in seen):
                seen.add(token(config))
                in_vain = 0
                yield config
        if finite and in_vain == _IN_VAIN:
            break
    if finite:
        # Hardly any are left, and these are known.
        rows = _rows(found, max(level or 1 for level in levels))
        rest = [row for key, row in rows.items() if key not in history.tokens and key not in seen]
        yield from (nest(dict(rest[index])) for index in generator(key).permutation(len(rest)))


def _taken(proposals: Iterable[dict[str, Any]], q: int) -> list[dict[str, Any]]:
    return list(itertools.islice(proposals, q))


@functools.lru_cache(maxsize=8)
def _sampler(found: tuple[tuple[str, Dimension], ...]) -> Callable[[Array, int], dict[str, Array]]:
    """Random configurations as arrays, compiled: one draw costs a dispatch, and not one for each dimension."""
    space = nest(dict(found))
    return jax.jit(lambda key, attempt: sample(space, jax.random.fold_in(key, attempt), _DRAWN))


def _rows(found: Mapping[str, Dimension], points: int | tuple[tuple[str, int], ...]) -> dict[Any, Any]:
    """The rows of a grid by their tokens, as pairs of a path and a value."""
    # By how they are written as well: to Python 1, 1.0 and True are one.
    return _listed(tuple(found.items()), repr(found), points)


@functools.lru_cache(maxsize=8)
def _listed(found: tuple[tuple[str, Dimension], ...], _: str, points: int | tuple[tuple[str, int], ...]) -> dict[Any, Any]:
    rows = grid(nest(dict(found)), points if isinstance(points, int) else dict(points))
    return {token(row): tuple(flat(row).items()) for row in rows}


def _changes(dimension: Any) -> bool:
    return dimension.levels != 1 and (not isinstance(dimension, Float) or dimension.low < dimension.high)


def _other(dimension: Any, value: Any, random: np.random.Generator) -> Any:
    if isinstance(dimension, Choice):
        others = [option for option in dimension.options if option != value]
        return others[random.integers(len(others))]
    # A range may be too narrow for float32 to hold another value.
    drawn = (_value(dimension, random) for _ in range(_TRIES))
    return next((each for each in drawn if each != value), value)


def _value(dimension: Any, random: np.random.Generator) -> Any:
    return dimension.value(dimension.quantile(np.float32(random.random())))
