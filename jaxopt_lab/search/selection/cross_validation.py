"""Cross-validation: all configurations and all folds by one set of compiled programs; nested, and the one-standard-error rule."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.engines import Engine
from jaxopt_lab.search.grouping import check_configs
from jaxopt_lab.search.record import ranked
from jaxopt_lab.search.selection.folds import Fold, check_folds
from jaxopt_lab.search.selection.held_out import Members, on_folds
from jaxopt_lab.search.trial import Trial

__all__ = ["CrossValidation", "NestedCrossValidation", "cross_validate", "nested_cross_validate", "one_standard_error"]


class CrossValidation(NamedTuple):
    r"""What cross-validation found.

    Attributes:
      scores: `[c, F]`, of each configuration on each fold; NaN or infinite where one diverged.
      mean: `[c]`, over folds; not finite where any of them is not, so that nothing is hidden.
      standard_error: `[c]`, :math:`s / \sqrt F`, with s the deviation over folds.
      corrected_error: `[c]`, :math:`s \sqrt{1/F + m/n}` for m rows held out of n trained on: what the training sets have in common
        makes the scores depend on each other, and repeats do not make that less (Nadeau and Bengio, 2003).
      diverged: `[c, F]` bool, which scores are not finite.
      best: the index of the best finite mean; None if there is none.
      configs: the configurations.
      folds: the folds.
      states: of each configuration those of its folds, `states[c][f]`; empty if they were not kept.
      maximize: whether the best is the largest.
    """

    scores: np.ndarray
    mean: np.ndarray
    standard_error: np.ndarray
    corrected_error: np.ndarray
    diverged: np.ndarray
    best: int | None
    configs: Sequence[Any]
    folds: tuple[Fold, ...]
    states: tuple[tuple[PyTree, ...], ...]
    maximize: bool


def cross_validate(
    trial: Trial,
    data: Mapping[str, Any],
    configs: Sequence[Any] | None = None,
    *,
    folds: Iterable[Any],
    key: Array,
    steps: int,
    batch_size: int | None,
    maximize: bool = False,
    engine: Engine | None = None,
    static: Sequence[str] = (),
    keep: bool = False,
) -> CrossValidation:
    r"""Scores every configuration on every fold; all that share their shapes by the same compiled programs.

    .. math:: CV(c) = \frac 1 F \sum_f L\left(\hat\theta_c(\text{train}_f), \text{test}_f\right)

    The data lies on the device once, and batches are gathered there by their row numbers. Fold f has the keys
    `split(fold_in(key, f))`, whatever the configuration: `init` takes the first, and the second orders the batches, which are those
    of `held_out.fold_batches`. So it equals a plain loop over folds, and configurations are compared on equal terms. What is scored
    is one configuration (`configs` left out: `scores[0]`) or many.

    Args:
      trial: `init(key, config)`, `step(state, batch, config)`, and `evaluate(state, rows) -> scalar`, which may take `config` as
        well. A batch and the rows held out are `data` at some rows, and "weight" `[B]`: 0 for rows that only fill up, times the
        data's own "weight"; a step and an evaluation must heed it. `supervised(model, loss, tx, ...)` makes one of a model.
      data: arrays `[N, ...]`, or trees of them, by name.
      configs: c configurations, as for `population`; `({},)` if None.
      folds: F pairs (train, test) of row numbers: `kfold`, `stratified`, `grouped`, or any splitter's of scikit-learn.
      key: a typed key.
      steps: how many each takes.
      batch_size: rows a step, in shuffled passes over the fold; None for the whole fold at every step. Where a fold has fewer
        rows, it is taken whole, and filled up.
      maximize: whether the best score is the largest.
      engine: how they are run: `scanned()` one at a time, `vmapped(w)` together, `looped()` by a Python loop over steps (for
        convolutions on a CPU). None is `scanned()` on a CPU, where small networks gain by `vmapped()`, and that elsewhere.
      static: paths of numbers of the configurations that are part of the program even where they could be traced.
      keep: whether to return the trained states.

    Raises:
      TypeError: the trial, the evaluation or a fold is of another kind.
      ValueError: no configuration, arrays of different lengths, a bad fold, an evaluation that is no scalar.

    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.search.selection.folds import kfold
    >>> trial = Trial(
    ...     lambda key, config: jnp.float32(0),
    ...     lambda state, batch, config: (state + config["rate"] * (batch["x"].mean() - state), {}),
    ...     lambda state, rows: jnp.sum(rows["weight"] * (rows["x"] - state) ** 2) / jnp.sum(rows["weight"]),
    ... )
    >>> data = {"x": np.arange(6, dtype=np.float32)}
    >>> configs = [{"rate": 0.1}, {"rate": 1.0}]
    >>> found = cross_validate(trial, data, configs, folds=kfold(6, 3), key=jax.random.key(0), steps=1, batch_size=None)
    >>> found.scores.round(2).tolist(), found.best
    ([[0.27, 5.31, 19.17], [9.25, 0.25, 9.25]], 1)

    Source: Stone, "Cross-validatory choice and assessment of statistical predictions", 1974.
    """
    configs = list(({},) if configs is None else configs)
    if not configs:
        raise ValueError("there is no configuration to score; leave configs out to score the trial as it is")
    check_configs(configs, static)
    checked = check_folds(folds, count_of(data))
    pairs = [(config, number) for config in configs for number in range(len(checked))]
    members = on_folds(
        trial, data, pairs, checked, key=key, steps=steps, batch_size=batch_size, engine=engine, static=static, keep=keep
    )
    return _summary(members, configs, checked, maximize)


def one_standard_error(found: CrossValidation, complexity: ArrayLike) -> int | None:
    r"""The simplest configuration that is within one standard error of the best one.

    .. math:: \arg\min_c \{ \text{complexity}_c : CV(c) \le CV(c^*) + SE(c^*) \}

    Args:
      found: of `cross_validate`.
      complexity: `[c]`, what makes a configuration less simple: its parameters, its steps, minus its penalty.

    Returns:
      Its index, of equally simple ones the better; None if every configuration diverged.

    Raises:
      ValueError: there is not one finite complexity for each configuration, or only one fold, which has no error.

    >>> scores = np.array([[0.5, 0.7, 0.6], [0.3, 0.5, 0.4], [0.28, 0.5, 0.36]])
    >>> found = _summary(Members(scores.ravel(), ()), ["a", "b", "c"], (Fold(np.arange(4), np.arange(2)),) * 3, False)
    >>> found.best, one_standard_error(found, [1, 2, 3])
    (2, 1)

    Source: Breiman, Friedman, Olshen and Stone, "Classification and regression trees", 1984; Hastie, Tibshirani and Friedman,
    "The elements of statistical learning", 2009, section 7.10.
    """
    complexity = np.asarray(complexity, float)
    if complexity.shape != found.mean.shape or not np.isfinite(complexity).all():
        raise ValueError(
            f"complexity must hold one finite number for each of {len(found.mean)} configurations; got shape {complexity.shape}"
        )
    if found.scores.shape[1] < 2:
        raise ValueError("the standard error of a single fold is not known; take at least two")
    if found.best is None:
        return None
    sign = -1.0 if found.maximize else 1.0
    limit = sign * found.mean[found.best] + found.standard_error[found.best]
    near = np.flatnonzero(np.isfinite(found.mean) & (sign * found.mean <= limit))
    return int(min(near, key=lambda index: (complexity[index], sign * found.mean[index])))


class NestedCrossValidation(NamedTuple):
    """What nested cross-validation found.

    Attributes:
      scores: `[F]`, on each outer fold, of the configuration that its inner folds chose; NaN where they chose none.
      mean: over the outer folds: what to expect of the whole procedure, choice included.
      standard_error: of the mean.
      chosen: `[F]`, the index that each outer fold chose; None where every configuration diverged.
      inner: what each outer fold's own cross-validation found; its folds are in row numbers of the whole data.
      configs: the configurations.
      folds: the outer folds.
    """

    scores: np.ndarray
    mean: float
    standard_error: float
    chosen: tuple[int | None, ...]
    inner: tuple[CrossValidation, ...]
    configs: Sequence[Any]
    folds: tuple[Fold, ...]


def nested_cross_validate(
    trial: Trial,
    data: Mapping[str, Any],
    configs: Sequence[Any],
    *,
    folds: Iterable[Any],
    inner: Callable[[np.ndarray, Array], Iterable[Any]],
    key: Array,
    steps: int,
    batch_size: int | None,
    choose: Callable[[CrossValidation], int | None] = lambda found: found.best,
    maximize: bool = False,
    engine: Engine | None = None,
    static: Sequence[str] = (),
) -> NestedCrossValidation:
    """Inner folds choose the configuration, outer folds score the choice: no row that scores has had a say.

    The score of the best of many configurations on the folds that chose it is too good; this one is not. The inner folds of all
    outer ones are trained together, and then the choices.

    Args:
      trial, data, configs, key, steps, batch_size, maximize, engine, static: as for `cross_validate`.
      folds: the outer folds.
      inner: `(rows, key) -> folds`, the division of an outer fold's training rows `[n]`, in positions of these:
        `lambda rows, key: stratified(y[rows], 4, key)`.
      choose: which configuration an inner cross-validation stands for; its best, or
        `lambda found: one_standard_error(found, complexity)`.

    Raises:
      TypeError, ValueError: as for `cross_validate`, or `choose` returned no index.

    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.search.selection.folds import kfold
    >>> trial = Trial(
    ...     lambda key, config: jnp.float32(0),
    ...     lambda state, batch, config: (state + config["rate"] * (batch["x"].mean() - state), {}),
    ...     lambda state, rows: jnp.sum(rows["weight"] * (rows["x"] - state) ** 2) / jnp.sum(rows["weight"]),
    ... )
    >>> data = {"x": 1 + np.arange(12, dtype=np.float32) % 3}
    >>> found = nested_cross_validate(
    ...     trial, data, [{"rate": 0.1}, {"rate": 1.0}], folds=kfold(12, 3), inner=lambda rows, key: kfold(len(rows), 2),
    ...     key=jax.random.key(0), steps=1, batch_size=None,
    ... )
    >>> found.chosen, found.scores.round(2).tolist()
    ((1, 1, 1), [0.83, 0.5, 0.83])

    Source: Varma and Simon, "Bias in error estimation when using cross-validation for model selection", 2006; Cawley and Talbot,
    "On over-fitting in model selection and subsequent selection bias in performance evaluation", 2010.
    """
    configs = list(configs)
    if not configs:
        raise ValueError("there is no configuration to choose from")
    total = count_of(data)
    outer = check_folds(folds, total)
    inner_key, outer_key, draw = jax.random.split(key, 3)
    divided = []
    for number, fold in enumerate(outer):
        own = check_folds(inner(fold.train, jax.random.fold_in(draw, number)), len(fold.train))
        divided.append(tuple(Fold(fold.train[each.train], fold.train[each.test]) for each in own))
    options = {"steps": steps, "batch_size": batch_size, "engine": engine, "static": static}
    flat = tuple(fold for own in divided for fold in own)
    whole = cross_validate(trial, data, configs, folds=flat, key=inner_key, maximize=maximize, **options)
    ends = np.cumsum([len(own) for own in divided])
    columns = np.split(whole.scores, ends[:-1], axis=1)
    found = tuple(_summary(Members(part.ravel(), ()), configs, own, maximize) for part, own in zip(columns, divided, strict=True))
    chosen = tuple(_index(choose(each), len(configs)) for each in found)
    pairs = [(configs[index], number) for number, index in enumerate(chosen) if index is not None]
    scores = np.full(len(outer), np.nan)
    if pairs:
        scores[[number for _, number in pairs]] = on_folds(trial, data, pairs, outer, key=outer_key, **options).scores
    error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else float("nan")
    return NestedCrossValidation(scores, float(scores.mean()), error, chosen, found, configs, outer)


def count_of(data: Mapping[str, Any]) -> int:
    """How many rows the data has.

    Raises:
      TypeError: it is no dict.
      ValueError: it has no arrays, or some of another length; the message names one.

    >>> count_of({"x": np.zeros((3, 2)), "y": np.zeros(3)})
    3
    """
    if not isinstance(data, Mapping):
        raise TypeError(f'data must be a dict of arrays, {{"x": [N, ...], ...}}; got {type(data).__name__}')
    leaves = jax.tree_util.tree_flatten_with_path(dict(data))[0]
    lengths = {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)[:1] for path, leaf in leaves}
    if not lengths:
        raise ValueError("data has no arrays")
    for name, length in lengths.items():
        if not length or length != next(iter(lengths.values())):
            raise ValueError(
                f"{name} has {length[0] if length else 'no'} rows; {', '.join(f'{k}: {v}' for k, v in lengths.items())}"
            )
    return next(iter(lengths.values()))[0]


def _index(chosen: Any, count: int) -> int | None:
    if chosen is None:
        return None
    if not 0 <= int(chosen) < count:
        raise ValueError(f"choose returned {chosen}; it must return the index of one of {count} configurations, or None")
    return int(chosen)


def _summary(members: Members, configs: Sequence[Any], folds: tuple[Fold, ...], maximize: bool) -> CrossValidation:
    count = len(folds)
    scores = members.scores.reshape(len(configs), count)
    with np.errstate(invalid="ignore"):
        mean = scores.mean(axis=1)
        deviation = scores.std(axis=1, ddof=1) if count > 1 else np.full(len(configs), np.nan)
    share = np.mean([len(fold.test) / len(fold.train) for fold in folds])
    states = tuple(tuple(members.states[c * count : (c + 1) * count]) for c in range(len(configs))) if members.states else ()
    order = ranked(mean, maximize)
    return CrossValidation(
        scores,
        mean,
        deviation / np.sqrt(count),
        deviation * np.sqrt(1 / count + share),
        ~np.isfinite(scores),
        order[0] if order else None,
        configs,
        folds,
        states,
        maximize,
    )
