"""A run: one directory that holds all there is to know of a training, and all it takes to go on with it.

config.json        the settings of its newest start
environment.json   the versions, devices and command of its newest start
metrics.jsonl      a record a line; none past the step that was restored
checkpoints/       verified steps
status.json        running, finished, stopped (by a signal, saved) or failed, and at which step
report.md          at its end: the figures, best and last
lock               held while a process writes here
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxopt_lab.core import files
from jaxopt_lab.train.record import EarlyStopping, Metrics
from jaxopt_lab.train.sameness import changed_programs, changed_settings, plain, programs
from jaxopt_lab.train.signals import Stopped

if TYPE_CHECKING:
    from jaxopt_lab.checkpoint import Best

__all__ = ["Kept", "Run", "opened"]

_FILES = ("config.json", "environment.json", "metrics.jsonl", "status.json", "report.md")
_OPENS_S = 300.0
_VERSIONS = ("jaxopt_lab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy")


@dataclass(frozen=True)
class Run:
    """Has `fit` keep a run in a directory: killed at any moment, the same call with `resume=True` goes on where it was.

    SIGTERM and SIGINT save at the next step and end the program with exit code 75; a second signal, after a second or more, ends it
    at once. On several processes a signal to any of them does so (but no second SIGTERM), and the directory must be one that all of
    them share; the first process alone writes the files beside the checkpoints.

    Attributes:
      directory: of this run alone; made if need be.
      save_every: a checkpoint each time the step is a multiple of this; also at the end, after a signal, where the data fails, and
        at each best step of `EarlyStopping`.
      name: a folder in `directory` instead, of a name that need not be trusted.
      config: the settings: a dataclass or a dict of what JSON holds.
      resume: goes on from the newest sound checkpoint, if there is one. Without it a directory that holds a run is refused.
      keep: how many of the newest checkpoints to keep.
      best: which others to keep, by a metric of `evaluate`; the one that `EarlyStopping` monitors, if it is given.
      accept_changes: resumes though the settings or the program (model, loss, optimiser, penalty) are others than they were.
      not_compared: names of settings that may change between starts.
      classes: the caller's own NamedTuples and dataclasses in the state.

    >>> Run("runs/a", save_every=500, config={"seed": 0}).keep
    2
    """

    directory: str | os.PathLike
    _: KW_ONLY
    save_every: int
    name: str | None = None
    config: Any = None
    resume: bool = False
    keep: int = 2
    best: "Best | None" = None
    accept_changes: bool = False
    not_compared: Sequence[str] = ("resume",)
    classes: Sequence[type] = ()

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise ValueError(f"save_every must be at least 1; got {self.save_every}")

    @property
    def path(self) -> Path:
        """The directory, with the name."""
        root = Path(self.directory).absolute()
        return root if self.name is None else files.inside(root, self.name)


class Kept:
    """What `fit` keeps while it runs, and where: a run's directory, its metrics alone, or nothing.

    Attributes:
      metrics: where records go; open once `begin` has returned.
      saves: whether there are checkpoints.
      save_every: their period; None without.
    """

    def __init__(self, run: "Run | str | os.PathLike | None", stop: EarlyStopping | None):
        self.saves = isinstance(run, Run)
        self._run: Any = run
        self._stop = stop
        self.save_every = run.save_every if isinstance(run, Run) else None
        self._first = jax.process_index() == 0
        self._open = ExitStack()
        self._at: int | None = None
        self._programs: dict[str, Any] = {}

    def __enter__(self) -> "Kept":
        with ExitStack() as opening:
            if self.saves:
                self._enter(opening)
            self._open = opening.pop_all()
        return self

    def _enter(self, opening: ExitStack) -> None:
        # Orbax takes its time to import, and most trainings keep nothing.
        from jaxopt_lab.checkpoint import Best, Checkpoints, Lock, together

        run, path, best = self._run, self._run.path, self._run.best
        if self._stop is not None:
            if best is not None:
                raise ValueError(
                    f"the run keeps the best {best.metric!r}, and stop the best {self._stop.monitor!r}: give one of them"
                )
            # Two: should the newest, which may well be the best, be damaged, the best before it is still there.
            best = Best(self._stop.monitor, maximise=self._stop.maximise, keep=2)
        config = plain(run.config)

        def first() -> None:
            _check_directory(path)
            opening.enter_context(Lock(path / "lock"))
            for half in (file for name in _FILES for file in path.glob(f".{name}.*")):
                # What a start was writing when it was killed.
                half.unlink(missing_ok=True)
            self._check_config(config)

        def newest() -> int | None:
            latest = self._checkpoints.latest()
            if latest is not None and not run.resume:
                raise FileExistsError(
                    f"{path} holds a run, saved at step {latest}: resume=True goes on with it, and in another directory one begins "
                    "anew"
                )
            files.write(path / "config.json", _json(config))
            files.write(path / "environment.json", _json(_environment()))
            return latest

        # What the first process refuses, all of them refuse, and for the same reason.
        together.agree("open the run", first, _OPENS_S)
        self._checkpoints = opening.enter_context(Checkpoints(path / "checkpoints", keep=run.keep, best=best, classes=run.classes))
        self._at = together.agree("find the newest step", newest, _OPENS_S)

    def _check_config(self, config: Any) -> None:
        file = self._run.path / "config.json"
        if not self._run.resume or not file.exists():
            return
        then, now = (_without(settings, self._run.not_compared) for settings in (files.read_json(file), config))
        changed = changed_settings(then, now)
        if changed and not self._run.accept_changes:
            raise ValueError(
                f"{self._run.path} was begun with other settings: {'; '.join(changed)}; accept_changes=True goes on with these"
            )

    def begin(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """The state to start from, and what was remembered with it: those of the newest sound checkpoint, where there is one.

        Args:
          state: the state before the first step, placed on the devices that shall hold it; a checkpoint must have its structure.
        """
        memory: dict[str, Any] = {}
        if self._at is not None:
            try:
                state, memory = self._restored(state)
            except FileNotFoundError as error:
                # Step 0 is always sound: it is what was passed in.
                self._at = None
                warnings.warn(f"{error}; the run begins anew", UserWarning, stacklevel=3)
        directory = self._run.path if self.saves else self._run
        step = int(state.step)
        self.metrics = self._open.enter_context(Metrics(directory if self._first else None, step))
        self._status("running", step)
        return state, memory

    def check(self, step: Callable, state: Any, batch: Any) -> None:
        """Refuses to go on with another program than the run was begun with, and remembers this one.

        Raises:
          ValueError: the step, or its optimiser, is another program.
        """
        if not self.saves:
            return
        changed = changed_programs(self._programs, step, state, batch)
        if changed and not self._run.accept_changes:
            what = "the optimiser" if "optimiser" in changed else "the step (model, loss or penalty)"
            raise ValueError(
                f"{what} is another program than that of the run in {self._run.path}; accept_changes=True goes on with it, and "
                "another directory begins anew"
            )
        if changed or not self._programs:
            self._programs = programs(step, state, batch)

    def save(self, state: Any, at: int, memory: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Saves a step in the background, unless it is saved already; what was recorded up to it is on disk before."""
        if not self.saves or self._at == at:
            return
        self.metrics.sync()
        self._checkpoints.save(
            at, state, metadata={"run": {**files.finite(dict(memory)), "programs": self._programs}}, metrics=metrics
        )
        self._at = at
        self._status("running", at)

    def back(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """The newest sound state and what was remembered with it, for a second attempt; records past it are dropped.

        Args:
          state: one of its structure.

        Raises:
          FileNotFoundError: there is none.
        """
        self._checkpoints.wait()
        state, memory = self._restored(state)
        self.metrics.back(self._at)
        return state, memory

    def _restored(self, state: Any) -> tuple[Any, dict[str, Any]]:
        self._at, state = self._checkpoints.restore_latest(like=state)
        memory = dict(self._checkpoints.metadata(self._at)["run"])
        self._programs = memory.pop("programs")
        return state, memory

    def best(self, state: Any, step: int) -> Any:
        """The state of the best step, of the structure of another."""
        return self._checkpoints.restore(step, like=state)

    def end(self, how: str, step: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Waits for the last checkpoint, and writes how the run ended, and its report."""
        if not self.saves:
            return
        self._checkpoints.wait()
        self._status(how, step)
        if how == "finished" and self._first:
            files.write(self._run.path / "report.md", _report(self._run, step, history).encode())

    def stopped(self, step: int, history: Sequence[Mapping[str, Any]]) -> Stopped:
        """The exception that ends the program after a signal, once everything is on disk."""
        self.end("stopped", step, history)
        return Stopped(step, self._run.path)

    def _status(self, how: str, step: int, error: BaseException | None = None) -> None:
        if not self.saves or not self._first:
            return
        status = {"state": how, "step": step, "updated": _now(), "host": socket.gethostname(), "pid": os.getpid()}
        told = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
        files.write(self._run.path / "status.json", _json({**status, **told}))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is not None and not isinstance(error, Stopped):
                self._status("failed", self._at or 0, error)
        finally:
            # With the error, by which they know that this process may be alone in it.
            self._open.__exit__(kind, error, trace)


def opened(run: Run | str | os.PathLike | None, stop: EarlyStopping | None = None) -> Kept:
    """What `fit` keeps, as a context: a directory of metrics alone where `run` is a path, nothing where it is None.

    Args:
      run: see `fit`.
      stop: the rule that ends it early, whose best checkpoint is kept.

    Raises:
      FileExistsError: the directory holds a run that is not to be resumed.
      Locked: another process writes there.
      OSError: the directory cannot be written.
      ValueError: the run was begun with other settings.

    >>> with opened(None) as kept:
    ...     kept.saves
    False
    """
    return Kept(run, stop)


def _check_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise type(error)(f"cannot keep a run in {path}: {error.strerror}; choose a directory that can be written") from None


def _without(settings: Any, names: Sequence[str]) -> Any:
    return {key: value for key, value in settings.items() if key not in names} if isinstance(settings, Mapping) else settings


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _environment() -> dict[str, Any]:
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "started": _now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "processes": jax.process_count(),
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("JAX_", "XLA_"))},
    }


def _report(run: Run, step: int, history: Sequence[Mapping[str, Any]]) -> str:
    """The figures of a finished run as a page of Markdown."""
    lines = [f"# {run.path.name}", "", f"Finished at step {step:,} on {_now()}.", ""]
    lines += ["| metric | last | at step | least | at step | most | at step |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name in dict.fromkeys(name for record in history for name in record if name != "step"):
        found = [(record[name], record["step"]) for record in history if isinstance(record.get(name), (int, float))]
        rows = [(value, at) for value, at in found if not math.isnan(value)]
        if rows:
            cells = (rows[-1], min(rows), max(rows, key=lambda row: (row[0], -row[1])))
            lines.append(f"| {name} | " + " | ".join(f"{value:.6g} | {at:,}" for value, at in cells) + " |")
    if config := plain(run.config):
        lines += ["", "| setting | value |", "| --- | --- |"]
        lines += [f"| {name} | `{json.dumps(value)}` |" for name, value in config.items()]
    return "\n".join(lines) + "\n"
