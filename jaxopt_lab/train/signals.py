"""What a run does when it is asked to end: it saves at the next step and says so by its exit code."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax

__all__ = ["SAVED", "Stopped", "Stopping"]

SAVED = 75
"""The exit code of a run that saved because it was asked to end: EX_TEMPFAIL of sysexits, "try again". It can be resumed."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_S = 1.0
"""Within so many seconds two signals are one: a scheduler may tell a process of its end by more than one way."""


class Stopped(SystemExit):
    """Ends the program with the code 75 (`SAVED`) after a signal, once the run is saved.

    Attributes:
      step: the step that was saved.

    >>> Stopped(17, "runs/a").code
    75
    """

    def __init__(self, step: int, directory: str | os.PathLike):
        super().__init__(f"saved step {step} in {directory}")
        self.code, self.step = SAVED, step


class Stopping:
    """Whether this run was asked to end, by SIGTERM or SIGINT, while the context lasts; a second signal ends it at once.

    Signals within a second count as one. Of several processes all must end at the same step, which JAX's own preemption service
    agrees on: it hears SIGTERM, to any of them, and no second one. SIGINT to any of them is passed on to it as SIGTERM, and a
    second SIGINT ends that process, and with it the run. Outside of the main thread signals cannot be heard, and nothing is (but
    for SIGTERM by that service).

    Args:
      listens: False for a run that keeps nothing: signals are left to whoever handles them.

    >>> with Stopping(listens=False) as stopping:
    ...     stopping(10)
    False
    """

    def __init__(self, *, listens: bool):
        self._many = listens and jax.process_count() > 1
        self._listens = listens and threading.current_thread() is threading.main_thread()
        self._heard, self._since, self._before = False, None, {}
        self._asked, self._questions = -1, 0

    def __call__(self, step: int) -> bool:
        """Whether the run is to end after `step`; on several processes every one must ask at every step."""
        if self._many and not self._heard and step != self._asked:
            from jax.experimental import multihost_utils

            # JAX agrees on a number that must be asked for; a loop of many steps at once passes over steps, and no question.
            self._asked, self._questions = step, self._questions + 1
            self._heard = bool(multihost_utils.reached_preemption_sync_point(self._questions))
        return self._heard

    def __enter__(self) -> "Stopping":
        if self._listens:
            # What the program was told to ignore (by nohup, or in the background of a shell) it goes on ignoring.
            numbers = (signal.SIGINT,) if self._many else _SIGNALS
            heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._since is not None:
            if now - self._since > _ONE_S:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self._since, self._heard = now, not self._many
        where = "all processes save at one of the next steps" if self._many else "saving at the next step"
        second = "SIGINT" if self._many else "signal"
        # Not by `print`: a handler may run in the middle of one.
        os.write(2, f"{signal.Signals(number).name}: {where}; a second {second} ends the run at once\n".encode())
        if self._many:
            # JAX's preemption service hears no other, and tells the other processes.
            os.kill(os.getpid(), signal.SIGTERM)
