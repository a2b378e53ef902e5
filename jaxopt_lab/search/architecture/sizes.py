"""Depth by cross-validation, and width by a grid or at random: a score for each size, to draw a curve of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jaxopt_lab.core.types import Array
from jaxopt_lab.search.architecture.objectives import Objective
from jaxopt_lab.search.architecture.search import Architectures, architectures
from jaxopt_lab.search.architecture.strategies import Strategy, grid_search, random_search
from jaxopt_lab.search.architecture.training import joint
from jaxopt_lab.search.engines import Engine
from jaxopt_lab.search.selection.cross_validation import CrossValidation, cross_validate, one_standard_error
from jaxopt_lab.search.spaces import Integer, choice
from jaxopt_lab.search.trial import Trial

__all__ = ["Depths", "Widths", "depth_by_cross_validation", "width_by_grid", "width_by_random"]


class Depths(NamedTuple):
    """What depths came to in cross-validation.

    Attributes:
      depths: `[d]`, as they were given.
      scores: `[d]`, means over folds; not finite where a fold's is not.
      standard_errors: `[d]`, of the means.
      best: the depth of the best mean; None if none is finite.
      chosen: the simplest depth within one standard error of the best; None likewise.
      found: the cross-validation, with the scores of each fold.
    """

    depths: tuple[int, ...]
    scores: np.ndarray
    standard_errors: np.ndarray
    best: int | None
    chosen: int | None
    found: CrossValidation


class Widths(NamedTuple):
    """What widths came to.

    Attributes:
      widths: `[w]`, ascending.
      scores: `[w]`, NaN where one failed.
      best: the width of the best score; None if all failed.
      found: the search, with what else was measured.
    """

    widths: np.ndarray
    scores: np.ndarray
    best: int | None
    found: Architectures


def depth_by_cross_validation(
    build: Callable[[int], Any],
    depths: Sequence[int],
    trial: Callable[[int, Any], Trial],
    data: Mapping[str, Any],
    *,
    folds: Iterable[Any],
    key: Array,
    steps: int,
    batch_size: int | None,
    maximize: bool = False,
    complexity: ArrayLike | None = None,
    engine: Engine | None = None,
) -> Depths:
    r"""The depth of a network by cross-validation: the least that is within one standard error of the best.

    .. math:: \min \{ d : CV(d) \le CV(d^*) + SE(d^*) \}

    All depths see the same folds, in the same order, from keys that depend on the fold alone; all folds of a depth share its
    compiled programs.

    Args:
      build: `depth -> Model`, or a Linen module.
      depths: d integers, each once.
      trial: `(depth, model) -> Trial`, evaluated on rows as `cross_validate` has it: `lambda depth, model: supervised(model, loss,
        tx, x[:1])`.
      data, folds, key, steps, batch_size, maximize, engine: as of `cross_validate`; at least two folds.
      complexity: `[d]`, what makes a depth less simple; the depth itself by default.

    Raises:
      TypeError: a depth is no integer, `build` returned no model, `trial` no `Trial`.
      ValueError: no depth, one twice, a single fold, or as for `cross_validate`.

    >>> import jax, optax
    >>> from jaxopt_lab.nets import MLP
    >>> from jaxopt_lab.search.selection.folds import kfold
    >>> from jaxopt_lab.search.selection.supervised import supervised
    >>> x = np.linspace(-1, 1, 20, dtype=np.float32)[:, None]
    >>> loss = lambda outputs, batch: (outputs[:, 0] - batch["y"]) ** 2
    >>> found = depth_by_cross_validation(
    ...     lambda depth: MLP(features=(4,) * depth, classes=1), [0, 1],
    ...     lambda depth, model: supervised(model, loss, optax.adam(0.1), x[:1]), {"x": x, "y": 2 * x[:, 0]},
    ...     folds=kfold(20, 4), key=jax.random.key(0), steps=60, batch_size=None,
    ... )
    >>> found.chosen, found.scores.shape
    (0, (2,))

    Source: Breiman, Friedman, Olshen and Stone, "Classification and regression trees", 1984.
    """
    depths = _integers("depths", depths)

    of_depth = joint(lambda config, model: trial(config["depth"], model), lambda config: build(config["depth"]), rows=True)
    configs, options = [{"depth": depth} for depth in depths], {"engine": engine, "static": ("depth",), "maximize": maximize}
    found = cross_validate(of_depth, data, configs, folds=folds, key=key, steps=steps, batch_size=batch_size, **options)
    index = one_standard_error(found, depths if complexity is None else complexity)
    best, chosen = (None if which is None else depths[which] for which in (found.best, index))
    return Depths(depths, found.mean, found.standard_error, best, chosen, found)


def width_by_grid(
    build: Callable[[int], Any], widths: Sequence[int], score: Objective, *others: Objective, key: Array, **options: Any
) -> Widths:
    """The score of each of some widths.

    Args:
      build: `width -> Model`, or a Linen module.
      widths: integers, each once.
      score: such as `trained(trial, ...)`; its configuration is `{"width": width}`.
      others: further objectives, such as `macs(example)`.
      key: a typed key.
      options: as of `architectures`: together, illegal, study.

    Raises:
      TypeError, ValueError: a width is no integer, one stands twice, or as for `architectures`.

    >>> import jax
    >>> from jaxopt_lab.nets import MLP
    >>> from jaxopt_lab.search.architecture import scored
    >>> error = scored(lambda config: abs(config["width"] - 20))
    >>> found = width_by_grid(lambda width: MLP(features=(width,)), [32, 8, 16], error, key=jax.random.key(0))
    >>> found.widths.tolist(), found.scores.tolist(), found.best
    ([8, 16, 32], [12.0, 4.0, 12.0], 16)
    """
    widths = _integers("widths", widths)
    return _widths(build, choice(*widths), (score, *others), grid_search(), candidates=len(widths), key=key, **options)


def width_by_random(
    build: Callable[[int], Any],
    widths: Integer,
    score: Objective,
    *others: Objective,
    candidates: int,
    key: Array,
    **options: Any,
) -> Widths:
    """The score of widths drawn at random, each once.

    Args:
      build, score, others, key, options: as in `width_by_grid`.
      widths: a range to draw from: `integer(8, 512, log=True)`.
      candidates: how many.

    Raises:
      TypeError, ValueError: `widths` is no range of integers, or as for `architectures`.

    >>> import jax
    >>> from jaxopt_lab.nets import MLP
    >>> from jaxopt_lab.search.architecture import scored
    >>> from jaxopt_lab.search.spaces import integer
    >>> error = scored(lambda config: abs(config["width"] - 20))
    >>> found = width_by_random(
    ...     lambda width: MLP(features=(width,)), integer(8, 64), error, candidates=5, key=jax.random.key(0)
    ... )
    >>> len(found.widths), bool(found.scores[found.widths == found.best] == found.scores.min())
    (5, True)
    """
    if not isinstance(widths, Integer):
        raise TypeError(f"widths must be a range such as integer(8, 512, log=True); got a {type(widths).__name__}")
    return _widths(build, widths, (score, *others), random_search(), candidates=candidates, key=key, **options)


def _widths(
    build: Callable[[int], Any], dimension: Any, objectives: Sequence[Objective], strategy: Strategy, **options: Any
) -> Widths:
    if not callable(build):
        raise TypeError(f"build must be a function width -> Model; got a {type(build).__name__}")
    found = architectures({"width": dimension}, lambda config: build(config["width"]), objectives, strategy=strategy, **options)
    widths = np.array([candidate.config["width"] for candidate in found.candidates], int)
    order = np.argsort(widths)
    best = None if found.best is None else int(widths[found.best])
    return Widths(widths[order], found.values[order, 0], best, found)


def _integers(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(sizes)
    if not sizes or len(set(sizes)) < len(sizes):
        raise ValueError(f"{name} must hold at least one integer, each once; got {sizes}")
    if odd := [size for size in sizes if isinstance(size, bool) or not isinstance(size, (int, np.integer))]:
        raise TypeError(f"{name} must be integers; got {odd[0]!r}")
    return tuple(map(int, sizes))
