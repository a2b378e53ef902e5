"""The loop around a step: a Python loop or a compiled one, whichever is faster here, and what a run needs beside it."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import jax

from jaxopt_lab.core.life import alive
from jaxopt_lab.train.first import check_batch
from jaxopt_lab.train.record import EarlyStopping, Progress
from jaxopt_lab.train.rewind import Rewind, scaled
from jaxopt_lab.train.run import Kept, Run, opened
from jaxopt_lab.train.signals import Stopping
from jaxopt_lab.train.stepping import Loop, NonFiniteError, Skips, copied, owned

__all__ = ["Result", "fit"]


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
    run: Run | str | PathLike | None = None,
    skips: int = 10,
    rewind: Rewind | None = None,
    check: bool = True,
    log_every: int = 100,
    chunk: int | None = None,
    progress: bool = True,
) -> Result:
    """Takes `steps` training steps.

    The first steps time a Python loop of single steps against a `lax.scan` over `chunk` of them, and the faster takes the rest; the
    steps it timed count. (The scan is not tried where a step takes so long that a loop's dispatch is lost in it, nor on several
    processes, which must all do the same.) Both give the same numbers to rounding; for the same bits from run to run, fix `chunk`.
    Batches and metrics never make the loop wait: it dispatches ahead, and a metric is fetched once it has long been computed.

    With a `Run` the training lives in a directory. The same call goes on where the run was, whatever ended it: `steps` count from
    the state that is passed in, and a run that was interrupted ends on the bits of one that was not, on the same devices and with
    the same `chunk` (of which the one that was measured is remembered). As it goes it gives signs of life (`parallel.alive`) to a
    supervisor that looks for them.

    Args:
      step: a pure `(state, batch) -> (state, metrics)`, of `make_step` or `parallel.pmap` or of one's own; the state has a field
        `step`. It is compiled once for as long as it is the same object.
      state: where to start; it is copied and stays usable.
      batches: `batches(step) -> batch`, asked once for each of the steps `state.step ... state.step + steps - 1`. Its method
        `stack(step, k)`, if it has one, gives the batches of up to `k` steps as arrays `[k, B, ...]`.
      steps: how many steps to take; with a `Run`, in all its starts together.
      evaluate: `state -> {name: float}`; called with a copy of the state every `evaluate_every` steps, if given, and after the last
        one.
      evaluate_every: counted in `state.step`, like all the periods here.
      stop: ends the run early, and returns the best state; needs `evaluate` and `evaluate_every`.
      save: called with a copy of the state every `save_every` steps, if given, and after the last one.
      save_every: see `save`.
      run: a `Run`; or a directory for `metrics.jsonl` alone: one record a line, lines past `state.step` dropped first.
      skips: of a step with `guard=True`, how many may be skipped in a row before that is an error. One that overflowed for a loss
        scale, which fell for it, is not skipped: it neither counts nor breaks the row.
      rewind: goes back to the newest checkpoint of the `Run` instead, with a smaller rate.
      check: looks at the first batch before anything is compiled: numbers that are not finite, lengths that differ, labels that the
        model has no output for. Rows of weight 0 are passed over.
      log_every: a record of the step's metrics each time the step is a multiple of this; "skipped" and "overflowed" count all up to
        it.
      chunk: how many steps to compile into one loop; 1 for a Python loop; None to measure.
      progress: a bar on a terminal, plain lines elsewhere (on standard error); of several processes the first one's.

    Returns:
      A `Result`: `state`, `history`, `chunk`.

    Raises:
      TypeError: `batches` is no function of the step.
      ValueError, OSError, RuntimeError: `batches` failed; the message names the step. Any other error of it is a RuntimeError. A
        `Run` of one process is saved before.
      ValueError: a period below 1, or `stop` without what it needs; the first batch cannot be trained on; the run is another one.
      NonFiniteError: `skips` steps in a row were skipped; the message names what was not finite.
      Stopped: SIGTERM or SIGINT came, and the `Run` is saved: it ends the program with code 75.

    >>> from jaxopt_lab import train
    >>> def step(state, batch):
    ...     return state._replace(params=state.params + batch["x"], step=state.step + 1), {"sum": state.params}
    >>> state = train.State(jax.numpy.float32(0), {}, (), jax.numpy.int32(0), jax.random.key(0))
    >>> result = fit(step, state, lambda t: {"x": jax.numpy.float32(t)}, steps=5, log_every=2, progress=False)
    >>> float(result.state.params), result.history
    (10.0, [{'step': 2, 'sum': 0.0}, {'step': 4, 'sum': 3.0}])
    """
    _check_batches(batches)
    _check_periods(steps=steps, evaluate_every=evaluate_every, save_every=save_every, skips=skips, log_every=log_every, chunk=chunk)
    if stop is not None and (evaluate is None or evaluate_every is None):
        raise ValueError(f"stopping early on {stop.monitor!r} needs evaluate= and evaluate_every=")
    if rewind is not None:
        _check_rewind(step, state, run, rewind)
    if jax.process_count() > 1 and (feed := getattr(step, "feed", None)) is not None:
        # Each process has its own rows; only the step knows which devices they go to.
        batches = feed(batches)
    state = owned(step, state)
    last = int(state.step) + steps
    with ExitStack() as closing:
        # What follows this loop is no business of who watches it.
        closing.callback(partial(alive, last=True))
        kept = closing.enter_context(opened(run, stop))
        ended = closing.enter_context(Stopping(listens=kept.saves))
        state, memory = kept.begin(state)
        shown = closing.enter_context(Progress(int(state.step), last, shown=progress and jax.process_index() == 0))
        make = partial(
            Loop, step, batches=batches, log_every=log_every, metrics=kept.metrics, shown=shown, ended=ended, limit=skips
        )
        plan = _Plan(last, evaluate, evaluate_every, stop, save, save_every, rewind, chunk)
        training = _Training(plan, kept, make, state, memory)
        if training.loop.at < last:
            first = training.loop.first()
            if check:
                check_batch(step, state, first)
            kept.check(step, state, first)
        while not training.over:
            try:
                training.period()
            except NonFiniteError as error:
                training.back(error)
            if not training.over and ended(training.loop.at):
                training.keep()
                raise kept.stopped(training.loop.at, training.loop.history)
        kept.end("finished", training.loop.at, training.loop.history)
    return Result(training.best_state, training.loop.history, training.pace or 1)


class _Plan(NamedTuple):
    """What `fit` was asked for, as its arguments say."""

    last: int
    evaluate: Callable[[Any], dict[str, float]] | None
    evaluate_every: int | None
    stop: EarlyStopping | None
    save: Callable[[Any], Any] | None
    save_every: int | None
    rewind: Rewind | None
    chunk: int | None


class _Training:
    """A training as it goes from period to period; all that it remembers besides the state is kept with the state."""

    def __init__(self, plan: _Plan, kept: Kept, make: Callable[..., Loop], state: Any, memory: dict[str, Any]):
        self._plan, self._kept, self._make = plan, kept, make
        self.pace = plan.chunk
        if self.pace is None:
            # Of several processes each would measure something else, and all must take the same steps.
            self.pace = memory.get("pace") if jax.process_count() == 1 else 1
        self._rewinds, self._rewound, self._attempts = memory.get("rewinds", 0), None, 0
        self._begin(state, memory)

    def _begin(self, state: Any, memory: dict[str, Any]) -> None:
        self.loop = self._make(state, skips=Skips(*memory.get("skips", ())), history=self._kept.metrics.kept)
        self._best, self._best_step, self._waited = memory.get("best"), memory.get("best_step"), memory.get("waited", 0)
        self._best_state = None
        if self._best_step is not None:
            try:
                self._best_state = self._kept.best(state, self._best_step)
            except (FileNotFoundError, ValueError) as error:
                warnings.warn(f"{error}; what was the best step is forgotten", UserWarning, stacklevel=2)
                self._best, self._best_step = None, None
        self.over = self.loop.at >= self._plan.last or self._out_of_patience()

    @property
    def best_state(self) -> Any:
        return self.loop.state if self._best_state is None else self._best_state

    def period(self) -> None:
        """Goes to the next step at which something is due, and does it."""
        plan, loop = self._plan, self.loop
        periods = [period for period in (plan.evaluate_every, plan.save_every, self._kept.save_every) if period]
        until = min([plan.last, *(_next(loop.at, period) for period in periods)])
        try:
            if self.pace is None:
                self.pace = loop.measure(until, min(periods, default=None))
            loop.advance(until, self.pace or 1)
        except Exception:
            # Where there are other processes, they wait in the next step, and no save would be one of all.
            if loop.data_failed and jax.process_count() == 1:
                self.keep()
            raise
        found, improved = None, False
        if plan.evaluate is not None and _due(loop.at, plan.evaluate_every, plan.last):
            loop.flush()
            # A copy, as for `save`: whoever keeps the state finds it whole when the loop has donated its own.
            found = {name: float(value) for name, value in plan.evaluate(copied(loop.state)).items()}
            # Each of what may take long is a pause of its own.
            alive()
            loop.keep({"step": loop.at, **found})
            improved = self._judge(found)
        if loop.at == plan.last:
            loop.flush()
        self.over = loop.at == plan.last or self._out_of_patience()
        if plan.save is not None and (self.over or _due(loop.at, plan.save_every, plan.last)):
            plan.save(copied(loop.state))
            alive()
        if self.over or improved or _due(loop.at, self._kept.save_every, plan.last):
            self.keep(found if improved or plan.stop is None else None)

    def _judge(self, found: dict[str, float]) -> bool:
        """Whether this evaluation is the best so far, for early stopping."""
        stop = self._plan.stop
        if stop is None:
            return False
        if stop.monitor not in found:
            raise ValueError(f"stop monitors {stop.monitor!r}, and evaluate returned {', '.join(found)}")
        if stop.improves(found[stop.monitor], self._best):
            self._best, self._best_step, self._waited = found[stop.monitor], self.loop.at, 0
            self._best_state = copied(self.loop.state)
            return True
        self._waited += 1
        return False

    def _out_of_patience(self) -> bool:
        return self._plan.stop is not None and self._waited >= self._plan.stop.patience

    def keep(self, metrics: dict[str, float] | None = None) -> None:
        """Saves where the training is, if there is a run."""
        if not self._kept.saves:
            return
        self.loop.flush()
        memory = {
            "skips": list(self.loop.skips),
            "pace": self.pace,
            "best": self._best,
            "best_step": self._best_step,
            "waited": self._waited,
            "rewinds": self._rewinds,
        }
        self._kept.save(self.loop.state, self.loop.at, memory, metrics)

    def back(self, error: NonFiniteError) -> None:
        """After too many steps that were not finite: to the newest checkpoint with a smaller rate, or the error goes on."""
        rewind = self._plan.rewind
        if rewind is None or self._rewinds == rewind.times:
            raise error
        try:
            state, memory = self._kept.back(self.loop.state)
        except FileNotFoundError:
            # Nothing is saved yet: what went wrong is what there is to say.
            raise error from None
        # From one checkpoint each attempt is slower than the last; a newer one was saved with the rate of its time.
        self._attempts = self._attempts + 1 if int(state.step) == self._rewound else 1
        self._rewinds, self._rewound = self._rewinds + 1, int(state.step)
        state = state._replace(opt_state=scaled(state.opt_state, rewind.factor**self._attempts))
        self._begin(state, {**memory, "skips": list(self.loop.skips._replace(in_row=0))})


def _check_batches(batches: Any) -> None:
    if not callable(batches):
        raise TypeError(
            f"batches must be a function batches(step) -> batch; got {type(batches).__name__}, and of a list that is "
            "lambda step: batches[step % len(batches)]"
        )


def _check_rewind(step: Callable, state: Any, run: Any, rewind: Rewind) -> None:
    if not isinstance(run, Run):
        raise ValueError("going back to a checkpoint needs run=train.Run(...), which keeps them")
    if not getattr(getattr(step, "step", step), "guard", True):
        raise ValueError("a rewind comes of steps that the guard has skipped: build the step with make_step(..., guard=True)")
    scaled(state.opt_state, rewind.factor)


def _check_periods(**periods: int | None) -> None:
    for name, period in periods.items():
        least = int(name != "steps")
        if period is not None and period < least:
            raise ValueError(f"{name} must be at least {least}; got {period}")


def _next(at: int, period: int) -> int:
    return at - at % period + period


def _due(at: int, period: int | None, last: int) -> bool:
    return at == last or (period is not None and at % period == 0)
