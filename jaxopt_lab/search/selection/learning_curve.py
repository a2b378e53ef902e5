"""Scores against the number of training examples, all sizes and folds by the same compiled programs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxopt_lab.core.types import Array
from jaxopt_lab.search.engines import Engine
from jaxopt_lab.search.grouping import check_configs
from jaxopt_lab.search.selection.cross_validation import count_of
from jaxopt_lab.search.selection.folds import Fold, check_folds
from jaxopt_lab.search.selection.held_out import on_folds
from jaxopt_lab.search.trial import Trial

__all__ = ["LearningCurve", "learning_curve"]


class LearningCurve(NamedTuple):
    """What was learnt of how many examples.

    Attributes:
      sizes: `[s]`, rising.
      scores: `[c, s, F]`, of each configuration at each size on each fold; not finite where one diverged.
      mean: `[c, s]`, over folds; `extrapolate_curve(sizes, mean[0], at)` goes on with it.
      standard_error: `[c, s]`.
      configs: the configurations.
    """

    sizes: np.ndarray
    scores: np.ndarray
    mean: np.ndarray
    standard_error: np.ndarray
    configs: Sequence[Any]


def learning_curve(
    trial: Trial,
    data: Mapping[str, Any],
    sizes: Sequence[int],
    configs: Sequence[Any] | None = None,
    *,
    folds: Iterable[Any],
    key: Array,
    steps: int,
    batch_size: int | None,
    engine: Engine | None = None,
    static: Sequence[str] = (),
) -> LearningCurve:
    """Trains on ever more of each fold's rows, and scores on the rows that the fold holds out.

    The sizes of a fold are nested: its training rows are shuffled once, and the first n of them are taken, so that the curve is
    smoother than its points are certain. All take the same number of steps; a batch larger than n is filled up with rows of
    weight 0, so that no size has a program of its own.

    Args:
      trial, data, configs, key, steps, batch_size, engine, static: as for `cross_validate`; the data's own keys are drawn from
        `key`.
      sizes: s numbers of examples, rising; at most what the smallest fold trains on.
      folds: as for `cross_validate`; one fold, or more for the error of the curve.

    Raises:
      TypeError, ValueError: as for `cross_validate`, sizes that do not rise from at least 1, or more than a fold has.

    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.search.selection.folds import kfold
    >>> trial = Trial(
    ...     lambda key, config: jnp.float32(0),
    ...     lambda state, batch, config: (jnp.sum(batch["weight"] * batch["x"]) / jnp.sum(batch["weight"]), {}),
    ...     lambda state, rows: jnp.sum(rows["weight"] * (rows["x"] - state) ** 2) / jnp.sum(rows["weight"]),
    ... )
    >>> data = {"x": np.random.default_rng(0).normal(size=500).astype(np.float32)}
    >>> found = learning_curve(
    ...     trial, data, [2, 20, 200], folds=kfold(500, 5), key=jax.random.key(0), steps=1, batch_size=None
    ... )
    >>> found.scores.shape, bool(found.mean[0, 0] > found.mean[0, 1] > found.mean[0, 2])
    ((1, 3, 5), True)

    Source: Cortes, Jackel, Solla, Vapnik and Denker, "Learning curves: asymptotic values and rate of convergence", 1994.
    """
    configs = list(({},) if configs is None else configs)
    check_configs(configs, static)
    sizes = [int(size) for size in sizes]
    if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError(f"sizes must rise from at least 1; got {sizes}")
    checked = check_folds(folds, count_of(data))
    for number, fold in enumerate(checked):
        if len(fold.train) < sizes[-1]:
            raise ValueError(f"fold {number} trains on {len(fold.train)} rows, and the largest size is {sizes[-1]}")
    draw, key = jax.random.split(key)
    shuffled = [
        Fold(np.asarray(jax.random.permutation(jax.random.fold_in(draw, number), fold.train)), fold.test)
        for number, fold in enumerate(checked)
    ]
    parts = [Fold(fold.train[:size], fold.test) for size in sizes for fold in shuffled]
    pairs = [(config, number) for config in configs for number in range(len(parts))]
    members = on_folds(trial, data, pairs, parts, key=key, steps=steps, batch_size=batch_size, engine=engine, static=static)
    scores = members.scores.reshape(len(configs), len(sizes), len(checked))
    with np.errstate(invalid="ignore"):
        mean = scores.mean(axis=2)
        several = len(checked) > 1
        error = scores.std(axis=2, ddof=1) / np.sqrt(len(checked)) if several else np.full(mean.shape, np.nan)
    return LearningCurve(np.array(sizes), scores, mean, error, configs)
