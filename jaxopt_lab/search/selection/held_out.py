"""Configurations trained on folds of one data set that stays on the device: the population behind cross-validation.

What differs between folds is data: row numbers and weights. So each of the three functions of a trial is compiled once for all
folds and all configurations of equal shapes, and once more only where a configuration needs it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import data as streams
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.engines import Engine, scanned, vmapped
from jaxopt_lab.search.population import population
from jaxopt_lab.search.selection.folds import Fold
from jaxopt_lab.search.trial import Trial, check_trial, check_typed_key

__all__ = ["Paired", "Rows", "fold_batches", "folded", "on_folds", "rows_of"]


class Rows(NamedTuple):
    """Row numbers of every fold in one shape, those that only fill up weighed at nothing.

    Attributes:
      rows: `[F, n]` int32.
      weight: `[F, n]` float32, 1 or 0.
    """

    rows: np.ndarray
    weight: np.ndarray


class Members(NamedTuple):
    """What was trained.

    Attributes:
      scores: `[n]` float64, NaN where one diverged.
      states: n states, or empty if they were not to be kept.
    """

    scores: np.ndarray
    states: tuple[PyTree, ...]


@jax.tree_util.register_pytree_with_keys_class
class Paired:
    """A configuration and the number of a fold, as a configuration: its leaves keep the paths that they have in the one it is of.

    >>> pair = Paired({"optimizer": {"rate": 0.1}}, 2)
    >>> [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_flatten_with_path(pair)[0]]
    ['optimizer/rate', '(fold)']
    """

    def __init__(self, config: Any, fold: Any):
        self.config, self.fold = config, fold

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Its leaves, each as a child of its own, and the structure of the configuration."""
        # None is a leaf: which it is tells programs apart.
        leaves, treedef = jax.tree_util.tree_flatten_with_path(self.config, is_leaf=lambda node: node is None)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        children = [(jax.tree_util.DictKey(name), leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]
        return [*children, (jax.tree_util.DictKey("(fold)"), self.fold)], treedef

    @classmethod
    def tree_unflatten(cls, treedef: Any, children: Any) -> "Paired":
        *leaves, fold = children
        return cls(jax.tree.unflatten(treedef, leaves), fold)


def rows_of(sides: Sequence[np.ndarray]) -> Rows:
    """Row numbers of unequal length in one array.

    >>> rows = rows_of([np.array([4, 2, 3]), np.array([1])])
    >>> rows.rows.tolist(), rows.weight.tolist()
    ([[4, 2, 3], [1, 1, 1]], [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    """
    most = max(map(len, sides))
    # A row that fills up is one of the fold's own: no look at it can tell anything of the others.
    rows = np.stack([np.append(side, np.repeat(side[:1], most - len(side))) for side in sides])
    weight = np.stack([np.arange(most) < len(side) for side in sides])
    return Rows(rows.astype(np.int32), weight.astype(np.float32))


def fold_batches(train: np.ndarray, batch_size: int | None, key: Array) -> streams.Batches:
    """The stream of one fold's row numbers: `data.batches` over them, with a seed drawn from the key.

    Args:
      train: `[n]`, the rows that are trained on.
      batch_size: rows a step; the whole fold, in order, if it is None or larger than the fold.
      key: of the fold.

    >>> stream = fold_batches(np.array([7, 8, 9]), 2, jax.random.key(0))
    >>> sorted(np.concatenate([stream(step)["row"] for step in range(3)]).tolist())
    [7, 7, 8, 8, 9, 9]
    """
    whole = batch_size is None or batch_size > len(train)
    return streams.batches({"row": train}, None if whole else batch_size, seed=int(jax.random.bits(key, (), "uint32")))


def on_folds(
    trial: Trial,
    data: Mapping[str, Any],
    pairs: Sequence[tuple[Any, int]],
    folds: Sequence[Fold],
    *,
    key: Array,
    steps: int,
    batch_size: int | None,
    engine: Engine | None = None,
    static: Sequence[str] = (),
    keep: bool = False,
) -> Members:
    """Trains each pair of a configuration and a fold, and scores it on what the fold holds out.

    Fold f has the two keys `split(fold_in(key, f))` whatever the configuration: the first is for `init`, the second for the order
    of its rows. So two configurations are compared on equal terms.

    Args:
      trial: `init(key, config)`, `step(state, batch, config)`, and `evaluate(state, rows)` or `evaluate(state, rows, config)`.
      data: arrays `[N, ...]`, or trees of them, by name.
      pairs: n of a configuration and the index of a fold.
      folds: as of `check_folds`.
      key: a typed key.
      steps: how many each takes.
      batch_size: rows a step; None for the whole fold. A fold with fewer is filled up by rows of weight 0.
      engine: as of `population`; one at a time on a CPU and as many as memory allows on an accelerator, if None.
      static: paths of numbers of a configuration that are part of the program even where they could be traced.
      keep: whether the states are returned.

    Raises:
      TypeError, ValueError: what is amiss with the trial, by the part.

    >>> trial = Trial(
    ...     lambda key, config: jnp.float32(0),
    ...     lambda state, batch, config: (state + config["rate"] * (batch["x"].mean() - state), {}),
    ...     lambda state, rows: jnp.sum(rows["weight"] * (rows["x"] - state) ** 2) / jnp.sum(rows["weight"]),
    ... )
    >>> fold = Fold(np.array([0, 1, 2]), np.array([3]))
    >>> data = {"x": np.array([1.0, 1.0, 1.0, 2.0], np.float32)}
    >>> pairs = [({"rate": 0.0}, 0), ({"rate": 1.0}, 0)]
    >>> on_folds(trial, data, pairs, [fold], key=jax.random.key(0), steps=3, batch_size=2).scores.tolist()
    [4.0, 1.0]
    """
    check_trial(trial)
    check_typed_key(key)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, or None for all rows; got {batch_size}")
    orders = [jax.random.split(jax.random.fold_in(key, number))[1] for number in range(len(folds))]
    batches = _Orders([fold_batches(fold.train, batch_size, own) for fold, own in zip(folds, orders, strict=True)])
    arrays = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), dict(data))
    found = population(
        folded(trial),
        [Paired(config, fold) for config, fold in pairs],
        key=key,
        numbers=[fold for _, fold in pairs],
        batches=batches,
        steps=steps,
        engine=engine or (scanned() if jnp.zeros(()).device.platform == "cpu" else vmapped()),
        static=static,
        shared={"data": arrays, "weight": batches.weight, "test": rows_of([fold.test for fold in folds])},
        keep=None if keep else 0,
    )
    return Members(found.scores, tuple(found.states) if keep else ())


@lru_cache(maxsize=64)
def folded(trial: Trial) -> Trial:
    """A trial whose configurations are `Paired`: what differs between folds is data.

    The rows, and which of them a fold has, are what all share; a batch is the row numbers of every fold, `[F, B]`.

    Args:
      trial: as of `on_folds`.

    >>> trial = folded(Trial(lambda key, config: 0.0, lambda s, batch, config: (s + batch["x"].sum(), {}), lambda s, rows: s))
    >>> shared = {"data": {"x": jnp.arange(3.0)}, "weight": jnp.ones((1, 2))}
    >>> trial.step(0.0, {"row": jnp.array([[2, 1]])}, Paired({}, 0), shared)
    (Array(3., dtype=float32), {})
    """

    def init(key: Array, pair: Paired) -> PyTree:
        return trial.init(jax.random.split(key)[0], pair.config)

    def step(state: PyTree, batch: Any, pair: Paired, shared: Any) -> Any:
        rows = _gathered(shared["data"], batch["row"][pair.fold], shared["weight"][pair.fold])
        out = trial.step(state, rows, pair.config)
        # What is no state and metrics is for the population to refuse.
        return (out[0], {}) if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping) else out

    def evaluate(state: PyTree, pair: Paired, shared: Any) -> Any:
        rows, weight = (side[pair.fold] for side in shared["test"])
        given = state, _gathered(shared["data"], rows, weight), pair.config
        return trial.evaluate(*(given if _takes_config(trial.evaluate) else given[:2]))

    return Trial(init, step, evaluate)


class _Orders:
    """The row numbers of every fold's batches, `[F, B]` a step.

    Attributes:
      weight: `[F, B]`.
    """

    def __init__(self, batches: Sequence[streams.Batches]):
        sizes = [stream.size(0) for stream in batches]
        self._batches, self._width = batches, max(sizes)
        self.weight = np.stack([np.arange(self._width) < size for size in sizes]).astype(np.float32)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        return {name: rows[0] for name, rows in self.stack(step, 1).items()}

    def stack(self, step: int, count: int) -> dict[str, np.ndarray]:
        """Row numbers `[k, F, B]`."""
        each = [_widened(stream.stack(step, count)["row"], self._width) for stream in self._batches]
        return {"row": np.stack(each, axis=1).astype(np.int32)}


def _widened(rows: np.ndarray, width: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[:, :1], width - rows.shape[1], axis=1)], axis=1)


def _gathered(data: Mapping[str, Any], rows: Array, weight: Array) -> dict[str, Any]:
    """Some rows of the data, with their weights."""
    batch = jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), dict(data))
    return {**batch, "weight": weight * batch["weight"] if "weight" in batch else weight}


def _takes_config(evaluate: Callable) -> bool:
    try:
        parameters = inspect.signature(evaluate).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if len(positional) < 2 or len(required) > 3:
        names = ", ".join(p.name for p in parameters)
        raise TypeError(f"evaluate must take (state, rows) or (state, rows, config); it takes ({names})")
    return len(required) > 2
