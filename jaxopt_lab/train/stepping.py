"""Steps one after another: dispatched ahead, many in one compiled loop where that is faster, and what they report fetched late."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.life import alive
from jaxopt_lab.core.types import PyTree
from jaxopt_lab.data.blocks import block
from jaxopt_lab.train.guard import offender
from jaxopt_lab.train.record import Metrics, Progress

__all__ = ["Loop", "NonFiniteError", "Skips", "copied", "owned", "worth_compiling"]

_CHUNK = 128
_CHUNK_BYTES = 1 << 26
_PROBES = 6
_TIMED_STEPS = 32
_DISPATCH_S, _DISPATCH_S_PER_ARRAY = 20e-6, 10e-6
_IN_FLIGHT = 16
# What a guarded step says of itself.
_GUARDS = ("skipped", "overflowed", "nonfinite")


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


class NonFiniteError(ArithmeticError):
    """Too many steps in a row were passed over because something in them was not finite; the message names what.

    >>> raise NonFiniteError("10 steps in a row were skipped")
    Traceback (most recent call last):
      ...
    jaxopt_lab.train.stepping.NonFiniteError: 10 steps in a row were skipped
    """


class Skips(NamedTuple):
    """How many steps the guard has passed over.

    Attributes:
      in_row: up to now without a break; those that overflowed neither count nor break it.
      total: in all, without those that overflowed.
      overflowed: those for which a loss scale was too large, and fell.
    """

    in_row: int = 0
    total: int = 0
    overflowed: int = 0

    def after(self, skipped: bool, overflowed: bool) -> "Skips":
        """The counts after one more step.

        >>> Skips(2, 5).after(False, True), Skips(2, 5).after(True, False).in_row, Skips(2, 5).after(False, False).in_row
        (Skips(in_row=2, total=5, overflowed=1), 3, 0)
        """
        if overflowed:
            return self._replace(overflowed=self.overflowed + 1)
        return self._replace(in_row=self.in_row + 1, total=self.total + 1) if skipped else self._replace(in_row=0)


def copied(state: PyTree) -> PyTree:
    """A copy of a tree of arrays, of which whoever holds the other may donate it.

    >>> copied({"step": 3})
    {'step': Array(3, dtype=int32, weak_type=True)}
    """
    # Of the same, strong type: a weakly typed scalar would have the second step compile again.
    return jax.tree.map(lambda x: jnp.array(x, dtype=getattr(x, "dtype", None), copy=True), state)


def owned(step: Callable, state: PyTree) -> PyTree:
    """A copy that may be donated, where the step wants it.

    >>> owned(lambda state, batch: (state, {}), jnp.zeros(2)).tolist()
    [0.0, 0.0]
    """
    place = getattr(step, "place", None)
    return copied(state if place is None else place(state))


@lru_cache(maxsize=16)
def _compiled(step: Callable) -> tuple[Callable, Callable]:
    """One step, and many at once over stacked batches; both take their state's buffers over."""

    def many(state, stacked):
        return jax.lax.scan(step, state, stacked)

    return jax.jit(step, donate_argnums=0), jax.jit(many, donate_argnums=0)


class _Named:
    """Batches whose errors name the call that met them: what a user can mend stays a ValueError or an OSError.

    Attributes:
      failed: whether there was one.
      stack: as that of the batches, if they have one.
    """

    def __init__(self, batches: Callable[[int], dict]):
        self.failed, self._batches = False, batches
        if (stack := getattr(batches, "stack", None)) is not None:
            self.stack = lambda step, count: self._asked("batches.stack", stack, step, count)

    def __call__(self, step: int) -> dict:
        return self._asked("batches", self._batches, step)

    def _asked(self, name: str, function: Callable[..., dict], *args: int) -> dict:
        try:
            return function(*args)
        except Exception as error:
            self.failed = True
            kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
            raise kind(f"{name}({', '.join(map(str, args))}) failed: {type(error).__name__}: {error}") from error


class Loop:
    """Where a training is: its state, what is in flight, what was recorded.

    Args:
      step: the pure step.
      state: the state, which the loop takes over.
      batches: `step -> batch`, with or without `stack`.
      log_every: a record of the metrics each time the step is a multiple of this.
      metrics: where records go.
      shown: where they are shown.
      ended: `step -> bool`, asked before each dispatch: whether to go no further.
      limit: how many skipped steps in a row are one too many.
      skips: those up to now.
      history: the records up to now.

    Attributes:
      state: the state after the step `at`, perhaps still being computed.
      at: the step.
      history: the records.
      skips: the steps that the guard passed over, up to the last flush.
      data_failed: whether `batches` has raised an error.
    """

    def __init__(
        self,
        step: Callable,
        state: Any,
        *,
        batches: Callable[[int], dict],
        log_every: int,
        metrics: Metrics,
        shown: Progress,
        ended: Callable[[int], bool],
        limit: int,
        skips: Skips,
        history: Sequence[dict] = (),
    ):
        self.state, self.at, self.history = state, int(state.step), list(history)
        self.skips = skips
        self._one, self._many = _compiled(step)
        self._batches, self._log_every, self._metrics, self._shown = _Named(batches), log_every, metrics, shown
        self._ended, self._limit = ended, limit
        self._ahead: tuple[int, dict] | None = None
        self._in_flight: deque[tuple[int, int | None, dict]] = deque()
        self._refreshed = time.perf_counter()

    @property
    def data_failed(self) -> bool:
        return self._batches.failed

    def first(self) -> dict:
        """The batch of the step that comes next, which is not asked for again."""
        batch = self._batch(self.at)
        self._ahead = (self.at, batch)
        return batch

    def advance(self, until: int, chunk: int) -> None:
        """Goes to the step `until`, by whole chunks and single steps; not as far if the run is to end."""
        while self.at < until and not self._ended(self.at):
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
        if timed < 1 or self._ended(self.at):
            return None
        single = self._timed(lambda: self.advance(self.at + timed, 1)) / timed
        self.advance(self.at + chunk, chunk)
        jax.block_until_ready(self.state)
        looped = self._timed(lambda: self.advance(self.at + chunk, chunk)) / chunk
        # A run that is to end has taken fewer steps than were timed.
        return None if self._ended(self.at) else chunk if looped < single else 1

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
        self._refresh()

    def _refresh(self) -> None:
        """Shows how far it is, to people and to a supervisor; ten times a second is enough."""
        if (now := time.perf_counter()) - self._refreshed > 0.1:
            self._refreshed = now
            self._shown.advance(self.at)
            alive()

    def flush(self) -> None:
        """Waits for everything in flight."""
        while self._in_flight:
            self._settle(*self._in_flight.popleft())
            # Of long steps sixteen take a while.
            self._refresh()
        jax.block_until_ready(self.state)
        self._shown.advance(self.at)
        alive()

    def _settle(self, begin: int, count: int | None, out: dict) -> None:
        logged = range(_next(begin, self._log_every), begin + (count or 1) + 1, self._log_every)
        if not logged and "skipped" not in out:
            jax.block_until_ready(out)
            return
        values = jax.device_get(out if logged else {name: out[name] for name in _GUARDS if name in out})
        for k in range(count or 1):
            step = begin + k + 1
            if "skipped" in out or step in logged:
                self._report(step, values if count is None else jax.tree.map(lambda v: v[k], values), step in logged)  # noqa: B023

    def _report(self, step: int, row: dict, logged: bool) -> None:
        if "skipped" in row:
            index = int(row["nonfinite"])
            self.skips = self.skips.after(bool(row["skipped"]), bool(row.get("overflowed", 0)))
            totals = {"skipped": self.skips.total, "overflowed": self.skips.overflowed}
            row = {name: totals.get(name, value) for name, value in row.items() if name != "nonfinite"}
        if logged:
            self.keep({"step": step, **{name: np.asarray(value).tolist() for name, value in row.items()}})
        if self.skips.in_row >= self._limit:
            raise NonFiniteError(
                f"{self.skips.in_row} steps in a row were skipped, the last of them step {step}: {offender(self.state, index)} is "
                "not finite; look at the data of these steps, or lower the rate (train.Rewind does so by itself)"
            )

    def keep(self, record: dict) -> None:
        """Appends a record to the history, the file and the screen."""
        self.history.append(record)
        self._metrics.write(record)
        self._shown.show(record)

    def _batch(self, step: int) -> dict:
        if self._ahead is not None and self._ahead[0] == step:
            (_, batch), self._ahead = self._ahead, None
            return batch
        return self._batches(step)

    def _stack(self, count: int) -> tuple[dict, int]:
        stacked, count, self._ahead = block(self._batches, self.at, count, self._ahead)
        return stacked, count


def _next(at: int, period: int) -> int:
    return at - at % period + period
