"""Configurations trained on folds of one data set that stays on the device: the programs behind cross-validation.

What differs between the members of a group is data: traced numbers, row numbers, weights. So each of the three functions of a
trial is compiled once for all folds and all configurations of equal shapes, and once more only where a configuration needs it.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import data as streams
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.engines import Engine, scanned, single, vmapped
from jaxopt_lab.search.grouping import Group, Member, group
from jaxopt_lab.search.pace import bytes_of_memory, split
from jaxopt_lab.search.selection.folds import Fold
from jaxopt_lab.search.trial import Trial, check_trial, check_typed_key, scalar_score

__all__ = ["Rows", "fold_batches", "on_folds", "rows_of"]

_BLOCK_BYTES = 1 << 26
_IN_FLIGHT = 16


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
    if steps < 0:
        raise ValueError(f"steps must not be negative; got {steps}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, or None for all rows; got {batch_size}")
    engine = engine or _default()
    arrays = jax.tree.map(jnp.asarray, dict(data))
    held_out = rows_of([fold.test for fold in folds])
    keys = [jax.random.split(jax.random.fold_in(key, number)) for number in range(len(folds))]
    orders = _Orders([fold_batches(fold.train, batch_size, own[1]) for fold, own in zip(folds, keys, strict=True)], steps)
    starts = jnp.stack([own[0] for own in keys])
    example = {"train": _example(arrays, orders.width), "test": _example(arrays, held_out.rows.shape[1])}
    whole = Trial(trial.init, _Whole(trial), _nothing)
    scores, states = np.full(len(pairs), np.nan), [None] * len(pairs)
    for found in group(whole, [config for config, _ in pairs], key, example, static=static):
        run = _programs(dataclasses.replace(found.member, trial=trial), engine)
        for part in split(len(found.indices), 1, _narrowed(engine, found, example["train"], key)):
            indices = found.indices[part]
            at = np.array([pairs[index][1] for index in indices], np.int32)
            traced = tuple(column[part] for column in found.traced)
            state = _advanced(run, engine, run.init(starts[at], traced), arrays, orders, at, traced)
            scores[indices] = run.evaluate(state, arrays, held_out.rows[at], held_out.weight[at], traced)
            for row, index in enumerate(indices if keep else ()):
                states[index] = jax.tree.map(lambda x: x[row], state)  # noqa: B023
    return Members(scores, tuple(states) if keep else ())


class _Orders:
    """The row numbers of every fold's batches, made in blocks of steps.

    Attributes:
      width: rows a step.
      weight: `[F, width]`.
      length: steps a block.
    """

    def __init__(self, batches: Sequence[streams.Batches], steps: int):
        self._batches, self.steps = batches, steps
        sizes = [stream.size(0) for stream in batches]
        self.width = max(sizes)
        self.weight = np.stack([np.arange(self.width) < size for size in sizes]).astype(np.float32)
        self.length = max(min(steps, _BLOCK_BYTES // (4 * self.width * len(batches))), 1)
        # As a rule there is one block, and members that are run in turns find it made, and on the device.
        self.rows = lru_cache(maxsize=1)(self._rows)

    def count(self, at: int) -> int:
        """How many steps of the block from a step on are taken."""
        return min(self.length, self.steps - at)

    def _rows(self, at: int) -> Array:
        """Row numbers `[F, length, width]` from a step on."""
        each = [stream.stack(at, self.length)["row"] for stream in self._batches]
        return jnp.asarray(np.stack([_widened(rows, self.width) for rows in each]).astype(np.int32))


def _widened(rows: np.ndarray, width: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[:, :1], width - rows.shape[1], axis=1)], axis=1)


class _Programs(NamedTuple):
    init: Callable[..., PyTree]  # (keys [c], traced) -> states
    step: Callable[..., PyTree]  # (states, data, rows [c, b], weight [c, b], traced) -> states
    advance: Callable[..., PyTree]  # (states, data, rows [F, k, b], weight [F, b], folds [c], count, traced) -> states
    evaluate: Callable[..., Array]  # (states, data, rows [c, m], weight [c, m], traced) -> [c]


@lru_cache(maxsize=64)
def _programs(member: Member, engine: Engine) -> _Programs:
    """The compiled functions over an axis `[c]` of members; the data is an argument of theirs, and no constant."""

    def step(state, data, rows, weight, traced):
        return member.step(state, _gathered(data, rows, weight), traced)[0]

    def advance(state, data, rows, weight, fold, count, traced):
        return jax.lax.fori_loop(0, count, lambda t, s: step(s, data, rows[fold, t], weight[fold], traced), state)

    def evaluate(state, data, rows, weight, traced):
        return _score(member.trial.evaluate, state, _gathered(data, rows, weight), member.config(traced))

    over = single if engine.width == 1 else jax.vmap
    # What draws random numbers takes a CPU long to compile, and twice as long over an axis, but runs only once.
    if jnp.zeros(()).device.platform == "cpu":

        def init(keys, traced):
            return jax.lax.map(lambda given: member.init(*given), (keys, traced))
    else:
        init = jax.vmap(member.init)
    return _Programs(
        jax.jit(init),
        jax.jit(over(step, (0, None, 0, 0, 0)), donate_argnums=0),
        jax.jit(over(advance, (0, None, None, None, 0, None, 0)), donate_argnums=0),
        jax.jit(over(evaluate, (0, None, 0, 0, 0))),
    )


def _advanced(
    run: _Programs, engine: Engine, state: PyTree, data: PyTree, orders: _Orders, at: np.ndarray, traced: tuple
) -> PyTree:
    for begin in range(0, orders.steps, orders.length):
        rows, count = orders.rows(begin), orders.count(begin)
        if engine.compiled:
            state = run.advance(state, data, rows, orders.weight, at, np.int32(count), traced)
            continue
        rows = np.asarray(rows)
        for t in range(count):
            state = run.step(state, data, rows[at, t], orders.weight[at], traced)
            if t % _IN_FLIGHT == _IN_FLIGHT - 1:
                jax.block_until_ready(state)
    return state


def _gathered(data: Mapping[str, Any], rows: Array, weight: Array) -> dict[str, Any]:
    """Some rows of the data, with their weights."""
    batch = jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), dict(data))
    return {**batch, "weight": weight * batch["weight"] if "weight" in batch else weight}


def _example(data: Mapping[str, Any], rows: int) -> PyTree:
    return jax.eval_shape(_gathered, data, jnp.zeros(rows, jnp.int32), jnp.ones(rows, jnp.float32))


def _score(evaluate: Callable, state: PyTree, rows: dict[str, Any], config: Any) -> Array:
    return scalar_score(evaluate(state, rows, config) if _takes_config(evaluate) else evaluate(state, rows))


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


class _Whole(NamedTuple):
    """A step and an evaluation in one, by which it is found out which numbers a trial needs the values of."""

    trial: Trial

    def __call__(self, state: PyTree, batch: PyTree, config: Any) -> Any:
        out = self.trial.step(state, batch["train"], config)
        if isinstance(out, tuple) and len(out) == 2:
            _score(self.trial.evaluate, out[0], batch["test"], config)
        return out


def _nothing(state: PyTree) -> float:
    return 0.0


def _default() -> Engine:
    return scanned() if jnp.zeros(()).device.platform == "cpu" else vmapped()


def _narrowed(engine: Engine, found: Group, batch: PyTree, key: Array) -> Engine:
    """An engine without a width with the widest that memory allows: a step holds a state and its gradients some four times."""
    if engine.width is not None:
        return engine
    state = jax.eval_shape(found.member.init, key, [column[0] for column in found.traced])
    taken = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, batch)))
    return Engine(max(bytes_of_memory(jnp.zeros(()).device) // (4 * max(taken, 1)), 1), engine.compiled)
