"""What a training tells: a line of JSON a record, a progress bar; and the rule that ends it early."""

import datetime
import json
import math
import os
import sys
import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import jax

from jaxopt_lab.core.files import finite, write

__all__ = ["EarlyStopping", "Metrics", "Progress", "memory_in_use"]


@dataclass(frozen=True)
class EarlyStopping:
    """Ends a run once a metric has not improved for a while; `fit` then returns the best state, not the last.

    Attributes:
      monitor: the name of a metric that `evaluate` returns.
      patience: how many evaluations in a row may pass without an improvement.
      maximise: whether more is better (an accuracy) or less (a loss); by keyword, and never guessed.
      min_delta: by how much a value must beat the best one to count as an improvement.

    >>> EarlyStopping("accuracy", patience=3, maximise=True).improves(0.9, 0.8)
    True
    >>> EarlyStopping("loss", patience=3, maximise=False).improves(0.9, 0.8)
    False
    """

    monitor: str
    patience: int
    _: KW_ONLY
    maximise: bool
    min_delta: float = 0.0

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` beats `best` (None: there is none yet); NaN never does."""
        if math.isnan(value) or best is None:
            return not math.isnan(value)
        return value > best + self.min_delta if self.maximise else value < best - self.min_delta


class Metrics:
    """`metrics.jsonl` in a run's directory: one JSON object a line, each with its "step"; NaN and infinities are null.

    Lines past the step that a run starts from are dropped, so a resumed run does not count twice; so is a torn last line.

    Args:
      directory: made if need be; None keeps no file.
      step: the step that the run starts from.

    Attributes:
      kept: the records up to that step.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory, Metrics(directory, step=0) as metrics:
    ...     metrics.write({"step": 1, "loss": float("nan")})
    ...     print((Path(directory) / "metrics.jsonl").read_text().strip())
    {"step": 1, "loss": null}
    """

    def __init__(self, directory: str | os.PathLike | None, step: int):
        self._file, self._path, self.kept = None, None if directory is None else Path(directory) / "metrics.jsonl", []
        self.back(step)

    def back(self, step: int) -> None:
        """Drops the lines past a step."""
        if self._path is None:
            self.kept = []
            return
        if self._file is not None:
            self._file.close()
        lines = [line for line in self._path.read_text().splitlines() if _step(line) <= step] if self._path.exists() else []
        self.kept = [json.loads(line) for line in lines]
        self._file = write(self._path, "".join(line + "\n" for line in lines).encode()).open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record and flushes it."""
        if self._file is not None:
            self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Returns once what was written is on disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


class Progress:
    """A bar on a terminal, plain lines elsewhere, both on standard error; or nothing.

    Beside the metrics stand the steps a second since the last line, the time that is left at that rate, and the memory in use: of
    the accelerators, where they tell, and else of the process.

    Args:
      first: the step that the run starts from.
      last: the step that it ends at.
      shown: False for nothing at all.
    """

    def __init__(self, first: int, last: int, *, shown: bool = True):
        self._first, self._last, self._shown, self._bar = first, last, shown, None
        self._at, self._since, self._rate = first, time.perf_counter(), 0.0

    def __enter__(self) -> "Progress":
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._last - self._first)
            self._bar.start()
        return self

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step - self._first)

    def show(self, record: dict[str, Any]) -> None:
        """Shows a record: beside the bar, or as a line."""
        if not self._shown:
            return
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
        pace = self._pace(record["step"])
        if self._bar is not None:
            self._bar.update(self._task, description=f"{text}  ({pace})")
        else:
            print(f"{text}  ({pace})", file=sys.stderr, flush=True)

    def _pace(self, step: int) -> str:
        now = time.perf_counter()
        if step > self._at:
            self._rate = (step - self._at) / max(now - self._since, 1e-9)
            self._at, self._since = step, now
        left = f"{datetime.timedelta(seconds=round((self._last - step) / self._rate))} left, " if self._rate else ""
        return f"{self._rate:.3g} steps/s, {left}{memory_in_use() / 2**20:,.0f} MiB"

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()


def memory_in_use() -> int:
    """Bytes in use: on the accelerators of this process, where they tell, and else by the process itself.

    >>> memory_in_use() > 1 << 20
    True
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return sum(each["bytes_in_use"] for each in stats)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        # Where there is no /proc, the most that it ever was.
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
