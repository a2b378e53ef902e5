"""The loop around a step: a Python loop or a compiled one, whichever is faster here, and what a run needs beside it."""

import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import PyTree
from jaxopt_lab.train.record import EarlyStopping, Metrics, Progress

__all__ = ["Result", "fit", "worth_compiling"]

_CHUNK = 128
_CHUNK_BYTES = 1 << 26
_PROBES = 6
_TIMED_STEPS = 32
_DISPATCH_S, _DISPATCH_S_PER_ARRAY = 20e-6, 10e-6
_IN_FLIGHT = 16


def worth_compiling(arrays: int) -> float:
    """Up to how many seconds a step may take for a compiled loop of it to be worth a second compilation.

    A Python loop pays for its dispatch, some 20 us a call and 10 us an array, as measured on a CPU. A compiled loop saves that and
    no more, so where a step takes ten times as long, it is not worth it.

    Args:
      arrays: how many the state and a batch consist of.

    >>> round(worth_compiling(18), 6)
    0.002
    """
    return 10 * (_DISPATCH_S + _DISPATCH_S_PER_ARRAY * arrays)


class Result(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: the state after the last step; with early stopping, the best one.
      history: the records, as in `metrics.jsonl`.
      chunk: how many steps a compiled loop took at once; 1 for the Python loop, be it the faster, the only one tried or asked for.
    """

    state: Any
    history: list[dict[str, Any]]
    chunk: int


def fit(
    step: Callable[[Any, dict], tuple[Any, dict]],
    state: Any,
    batches: Callable[[int], dict],
    *,
    steps: int,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    stop: EarlyStopping | None = None,
    save: Callable[[Any], Any] | None = None,
    save_every: int | None = None,
    run: str | PathLike | None = None,
    log_every: int = 100,
    chunk: int | None = None,
    progress: bool = True,
) -> Result:
    """Takes `steps` training steps.

    The first steps time a Python loop of single steps against a `lax.scan` over `chunk` of them, and the faster takes the rest; the
    steps it timed count. (The scan is not tried where a step takes so long that a loop's dispatch is lost in it.) Both give the
    same numbers to rounding; for the same bits from run to run, fix `chunk`. Batches and metrics never make the loop wait: it
    dispatches ahead, and a metric is fetched once it has long been computed.

    Args:
      step: a pure `(state, batch) -> (state, metrics)`, of `make_step` or `parallel.pmap` or of one's own; the state has a field
        `step`. It is compiled once for as long as it is the same object.
      state: where to start; it is copied and stays usable.
      batches: `batches(step) -> batch`, asked once for each of the steps `state.step ... state.step + steps - 1`. Its method
        `stack(step, k)`, if it has one, gives the batches of up to `k` steps as arrays `[k, B, ...]`.
      steps: how many steps to take now.
      evaluate: `state -> {name: float}`; called with a copy of the state every `evaluate_every` steps, if given, and after the last
        one.
      evaluate_every: counted in `state.step`, like all the periods here.
      stop: ends the run early, and returns the best state; needs `evaluate` and `evaluate_every`.
      save: called with a copy of the state every `save_every` steps, if given, and after the last one.
      save_every: see `save`.
      run: a directory for `metrics.jsonl`: one record a line, lines past `state.step` dropped first.
      log_every: a record of the step's metrics each time the step is a multiple of this.
      chunk: how many steps to compile into one loop; 1 for a Python loop; None to measure.
      progress: a bar on a terminal, plain lines elsewhere (on standard error).

    Returns:
      A `Result`: `state`, `history`, `chunk`.

    Raises:
      TypeError: `batches` is no function of the step.
      ValueError, OSError, RuntimeError: `batches` failed; the message names the step. Any other error of it is a RuntimeError.
      ValueError: a period below 1, or `stop` without what it needs.

    >>> from jaxopt_lab import train
    >>> def step(state, batch):
    ...     return state._replace(params=state.params + batch["x"], step=state.step + 1), {"sum": state.params}
    >>> state = train.State(jnp.float32(0), {}, (), jnp.int32(0), jax.random.key(0))
    >>> result = fit(step, state, lambda t: {"x": np.float32(t)}, steps=5, log_every=2, progress=False)
    >>> float(result.state.params), result.history
    (10.0, [{'step': 2, 'sum': 0.0}, {'step': 4, 'sum': 3.0}])
    """
    _check_batches(batches)
    _check_periods(steps=steps, evaluate_every=evaluate_every, save_every=save_every, log_every=log_every, chunk=chunk)
    if stop is not None and (evaluate is None or evaluate_every is None):
        raise ValueError(f"stopping early on {stop.monitor!r} needs evaluate= and evaluate_every=")
    state = _owned(step, state)
    first = int(state.step)
    last = first + steps
    best, best_state, waited = None, state, 0
    with Metrics(run, first) as metrics, Progress(first, last, shown=progress) as shown:
        loop = _Loop(step, state, batches, log_every, metrics, shown)
        pace = chunk
        while loop.at < last:
            until = min([last, *(_next(loop.at, period) for period in (evaluate_every, save_every) if period)])
            if pace is None:
                pace = loop.measure(until, min((p for p in (evaluate_every, save_every) if p), default=None))
            loop.advance(until, pace or 1)
            if evaluate is not None and _due(loop.at, evaluate_every, last):
                loop.flush()
                # A copy, as for `save`: whoever keeps the state finds it whole when the loop has donated its own.
                found = {name: float(value) for name, value in evaluate(_copied(loop.state)).items()}
                loop.keep({"step": loop.at, **found})
                if stop is not None:
                    if stop.monitor not in found:
                        raise ValueError(f"stop monitors {stop.monitor!r}, and evaluate returned {', '.join(found)}")
                    if stop.improves(found[stop.monitor], best):
                        best, best_state, waited = found[stop.monitor], _copied(loop.state), 0
                    else:
                        waited += 1
            over = stop is not None and waited >= stop.patience
            if save is not None and (over or _due(loop.at, save_every, last)):
                save(_copied(loop.state))
            if over:
                break
        loop.flush()
    return Result(loop.state if best is None else best_state, loop.history, pace or 1)


def _check_batches(batches: Any) -> None:
    if not callable(batches):
        raise TypeError(
            f"batches must be a function batches(step) -> batch; got {type(batches).__name__}, and of a list that is "
            "lambda step: batches[step % len(batches)]"
        )


def _check_periods(**periods: int | None) -> None:
    for name, period in periods.items():
        least = int(name != "steps")
        if period is not None and period < least:
            raise ValueError(f"{name} must be at least {least}; got {period}")


def _next(at: int, period: int) -> int:
    return at - at % period + period


def _due(at: int, period: int | None, last: int) -> bool:
    return at == last or (period is not None and at % period == 0)


def _copied(state: PyTree) -> PyTree:
    # Of the same, strong type: a weakly typed scalar would have the second step compile again.
    return jax.tree.map(lambda x: jnp.array(x, dtype=getattr(x, "dtype", None), copy=True), state)


def _owned(step: Callable, state: PyTree) -> PyTree:
    """A copy that may be donated, where the step wants it."""
    place = getattr(step, "place", None)
    return _copied(state if place is None else place(state))


@lru_cache(maxsize=16)
def _compiled(step: Callable) -> tuple[Callable, Callable]:
    """One step, and many at once over stacked batches; both take their state's buffers over."""

    def many(state, stacked):
        return jax.lax.scan(step, state, stacked)

    return jax.jit(step, donate_argnums=0), jax.jit(many, donate_argnums=0)


def _failed(call: str, error: Exception) -> Exception:
    """An error of the data, with the call that met it: what a user can mend stays a ValueError or an OSError."""
    kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
    return kind(f"{call} failed: {type(error).__name__}: {error}")


class _Loop:
    """The state of the loop: where it is, what is in flight, what was recorded."""

    def __init__(self, step, state, batches, log_every: int, metrics: Metrics, shown: Progress):
        self.state, self.at, self.history = state, int(state.step), []
        self._one, self._many = _compiled(step)
        self._batches, self._log_every, self._metrics, self._shown = batches, log_every, metrics, shown
        self._ahead: tuple[int, dict] | None = None
        self._in_flight: deque[tuple[int, int | None, dict]] = deque()
        self._refreshed = time.perf_counter()

    def advance(self, until: int, chunk: int) -> None:
        """Goes to the step `until`, by whole chunks and single steps."""
        while self.at < until:
            if chunk == 1 or until - self.at < chunk:
                self._take(self._batch(self.at))
                continue
            stacked, count = self._stack(chunk)
            if count == chunk:
                self.state, out = self._many(self.state, stacked)
                self._dispatched(count, out)
            else:
                # The batch size is about to change: no loop of an odd length is compiled for the few steps before.
                for k in range(count):
                    self._take(jax.tree.map(lambda v: v[k], stacked))  # noqa: B023

    def measure(self, until: int, period: int | None) -> int | None:
        """Takes timed steps, all before `until`, and says how many to take at once; None if there was no room to find out."""
        if until - self.at <= _PROBES:
            return None
        batch = self._batch(self.at)
        size = sum(np.size(v) * np.dtype(getattr(v, "dtype", float)).itemsize for v in jax.tree.leaves(batch))
        self._take(batch)
        jax.block_until_ready(self.state)
        # The least of a few: a hiccup must not pass for a long step.
        single = min(self._timed(lambda: self.advance(self.at + 1, 1)) for _ in range(_PROBES - 1))
        if single > worth_compiling(len(jax.tree.leaves((self.state, batch)))):
            return 1
        chunk = min(_CHUNK, _CHUNK_BYTES // max(size, 1))
        if period is not None and chunk:
            # Of equal length within a period, so that few single steps are left over; and three at least, two of them for the
            # timing.
            chunk = -(-period // -(-period // max(min(chunk, period // 3), 1)))
        if chunk < 2:
            return 1
        timed = min(_TIMED_STEPS, until - self.at - 2 * chunk)
        if timed < 1:
            return None
        single = self._timed(lambda: self.advance(self.at + timed, 1)) / timed
        self.advance(self.at + chunk, chunk)
        jax.block_until_ready(self.state)
        return chunk if self._timed(lambda: self.advance(self.at + chunk, chunk)) / chunk < single else 1

    def _timed(self, work: Callable[[], None]) -> float:
        begin = time.perf_counter()
        work()
        jax.block_until_ready(self.state)
        return time.perf_counter() - begin

    def _take(self, batch: dict) -> None:
        self.state, out = self._one(self.state, batch)
        self._dispatched(None, out)

    def _dispatched(self, count: int | None, out: dict) -> None:
        self._in_flight.append((self.at, count, out))
        self.at += count or 1
        # Old metrics are long computed; waiting for them also bounds how far ahead the loop may run.
        while len(self._in_flight) > _IN_FLIGHT:
            self._settle(*self._in_flight.popleft())
        if (now := time.perf_counter()) - self._refreshed > 0.1:
            self._refreshed = now
            self._shown.advance(self.at)

    def flush(self) -> None:
        """Waits for everything in flight."""
        while self._in_flight:
            self._settle(*self._in_flight.popleft())
        jax.block_until_ready(self.state)
        self._shown.advance(self.at)

    def _settle(self, begin: int, count: int | None, out: dict) -> None:
        logged = range(_next(begin, self._log_every), begin + (count or 1) + 1, self._log_every)
        if not logged:
            jax.block_until_ready(out)
            return
        values = jax.device_get(out)
        for step in logged:
            rows = values if count is None else jax.tree.map(lambda v: v[step - begin - 1], values)  # noqa: B023
            self.keep({"step": step, **{name: np.asarray(value).tolist() for name, value in rows.items()}})

    def keep(self, record: dict) -> None:
        """Appends a record to the history, the file and the screen."""
        self.history.append(record)
        self._metrics.write(record)
        self._shown.show(record)

    def _batch(self, step: int) -> dict:
        if self._ahead is not None and self._ahead[0] == step:
            (_, batch), self._ahead = self._ahead, None
            return batch
        try:
            return self._batches(step)
        except Exception as error:
            raise _failed(f"batches({step})", error) from error

    def _stack(self, count: int) -> tuple[dict, int]:
        stack = getattr(self._batches, "stack", None)
        if stack is not None:
            try:
                stacked = stack(self.at, count)
            except Exception as error:
                raise _failed(f"batches.stack({self.at}, {count})", error) from error
            return stacked, len(jax.tree.leaves(stacked)[0])
        each = [self._batch(self.at)]
        shapes = jax.tree.map(np.shape, each[0])
        while len(each) < count:
            batch = self._batch(self.at + len(each))
            if jax.tree.map(np.shape, batch) != shapes:
                # Of another size: it is the first of the next stack, and a function of one's own is not asked for it twice.
                self._ahead = (self.at + len(each), batch)
                break
            each.append(batch)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *each), len(each)
