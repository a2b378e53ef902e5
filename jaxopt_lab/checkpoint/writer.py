"""The writing of steps, in the background: one writer to a directory, and nothing that fails in silence."""

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxopt_lab.checkpoint import digests, folder, retention, storage, together
from jaxopt_lab.checkpoint.lock import Lock

__all__ = ["SaveFailed", "Writer"]


class SaveFailed(RuntimeError):  # noqa: N818 (as Locked and Damaged)
    """A checkpoint could not be written, and is none; the message names it and why, and its cause is the error itself."""


class Writer:
    """Saves steps into a directory: the arrays are copied, and a thread does the rest.

    The thread has Orbax write them (or where Orbax has to copy them, because they lie in parts, only waits for it); then it digests
    all that is on the disk, names it a step, and deletes the steps that need not stay. In a run of several processes each has such
    a thread, and that of the first does all but wait.

    Args:
      directory: where the steps go.
      keep: how many of the newest stay; None for all.
      best: which others.
      timeout: seconds that anything may take.
    """

    def __init__(self, directory: Path, keep: int | None, best: retention.Best | None, timeout: float):
        self.lock = Lock(directory / "lock")
        self._directory = directory
        self._keep, self._best, self._timeout = keep, best, timeout
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._failed: SaveFailed | None = None
        self._locks = False

    def begin(self, step: int) -> None:
        """Takes the lock, if this is the first save, and sees that there is no such step.

        Raises:
          Locked: another writer has the directory.
          FileNotFoundError: it was removed since.
          ValueError: there is such a step.
        """
        if not self._locks:
            if not self.lock.held:
                self.lock.acquire()
            folder.clear(self._directory)
            self._locks = True
        elif not self.lock.held:
            raise FileNotFoundError(
                f"{self._directory} is no longer the directory that was locked: it was removed or replaced; open it again"
            )
        if os.path.lexists(self._directory / str(step)):
            raise ValueError(f"checkpoint {step} is in {self._directory} already; steps are saved once")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock for a moment, if it is not held anyway.

        Raises:
          Locked: another writer has it.
        """
        if self.lock.held:
            yield
            return
        with self.lock:
            yield

    def save(self, step: int, arguments: ocp.args.Composite, metrics: Mapping[str, Any]) -> None:
        """Starts to write a step; returns once its arrays are copied.

        Raises:
          SaveFailed: it could not be begun.
        """
        saved = self._directory / f"{step}.saving-{together.number()}"
        copies = storage.detached(arguments)
        try:
            if self._orbax is None:
                self._orbax = ocp.AsyncCheckpointer(
                    storage.handler(), async_options=ocp.options.AsyncOptions(timeout_secs=max(60, round(self._timeout)))
                )
            if copies is None:
                self._orbax_saves(saved, arguments)
        except Exception as error:
            self._remove(saved)
            raise self._failure(step, error) from error
        _WRITERS.add(self)
        self._thread = threading.Thread(target=self._finish, args=(step, saved, copies, metrics), name=f"checkpoint {step}")
        self._thread.start()

    def wait(self, *, agreeing: bool = True) -> None:
        """Returns once what was begun is a verified step.

        Args:
          agreeing: whether a failure in any process is one of this process; then all of them must call this.

        Raises:
          SaveFailed: it is none, or an older one could not be deleted; said once.
          TimeoutError: it takes longer than it may.
        """
        if self._thread is not None:
            self._thread.join(self._timeout)
            if self._thread.is_alive():
                raise TimeoutError(
                    f"{self._thread.name} in {self._directory} is still being written after {self._timeout:g} s; is the disk "
                    "there? timeout= sets for how long to wait"
                )
            self._thread = None
            if agreeing:
                # The thread has met the others, but what it did after that, and what the first one did for all, can fail in one.
                found = together.failure(f"saved in {self._directory.name}", self._failed, self._timeout)
                self._failed = found if found is None or isinstance(found, SaveFailed) else SaveFailed(str(found))
        if (failed := self._failed) is not None:
            self._failed = None
            raise failed

    def close(self, *, agreeing: bool = True) -> None:
        """Waits, and lets go of the lock."""
        try:
            self.wait(agreeing=agreeing)
        finally:
            # A thread that still writes keeps the lock, which ends with the process.
            if self._thread is None:
                if self._orbax is not None:
                    self._orbax.close()
                    self._orbax = None
                self.lock.release()
                self._locks = False

    def _finish(self, step: int, saved: Path, copies: ocp.args.Composite | None, metrics: Mapping[str, Any]) -> None:
        """In the thread: what was begun becomes a step, or is removed."""
        begun = time.monotonic()
        try:
            assert self._orbax is not None
            if copies is not None:
                self._orbax_saves(saved, copies)
            try:
                self._orbax.wait_until_finished()
            finally:
                storage.TURN.release()
            if together.is_first():
                if not self.lock.held:
                    raise FileNotFoundError(f"{self._directory} was removed or replaced")
                digests.seal(saved, metrics)
                folder.publish(saved, step)
                self._retain(step)
        except BaseException as error:
            self._fail(self._failure(step, error), error)
            self._remove(saved)
        try:
            together.meet(f"saved/{saved.name}", self._timeout - min(self._timeout - 1, time.monotonic() - begun))
            if self._failed is None and not (self._directory / str(step) / digests.NAME).exists():
                raise FileNotFoundError("the first process did not finish it; see what it says")
        except BaseException as error:
            self._fail(self._failure(step, error), error)

    def _orbax_saves(self, saved: Path, arguments: ocp.args.Composite) -> None:
        """Has Orbax begin; it has its turn until it is done."""
        assert self._orbax is not None
        if not storage.TURN.acquire(timeout=self._timeout):
            raise TimeoutError(f"another save of this process did not end within {self._timeout:g} s")
        try:
            self._orbax.save(saved, arguments)
        except BaseException:
            storage.TURN.release()
            raise

    def _retain(self, newest: int) -> None:
        """Deletes what need not stay, now that there is a newer step."""
        if self._keep is None:
            return
        try:
            metrics = {step: self._metrics(step) for step in folder.steps(self._directory)}
            for step in sorted(metrics.keys() - retention.retained(metrics, self._keep, self._best) - {newest}):
                folder.discard(self._directory, step)
        except Exception as error:
            message = f"checkpoint {newest} is saved in {self._directory}, but an older one could not be deleted: {_told(error)}"
            self._fail(SaveFailed(message), error)

    def _metrics(self, step: int) -> dict[str, Any]:
        """A step's metrics; a damaged one has none, and goes when it is old."""
        try:
            return digests.read(self._directory / str(step), f"checkpoint {step}")["metrics"]
        except ValueError:
            return {}

    def _failure(self, step: int, error: BaseException) -> SaveFailed:
        return SaveFailed(f"checkpoint {step} could not be saved in {self._directory}, and is none: {_told(error)}")

    def _fail(self, failed: SaveFailed, error: BaseException) -> None:
        if self._failed is None:
            failed.__cause__ = error
            self._failed = failed

    def _remove(self, saved: Path) -> None:
        """Removes a step that came to nothing; what cannot be removed now goes when the next writer comes."""
        if not together.is_first():
            return
        for path in self._directory.glob(f"{saved.name}*"):
            folder.remove(path)


def _told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


_WRITERS: "weakref.WeakSet[Writer]" = weakref.WeakSet()


def _wait_at_exit() -> None:
    """What a program that ends without `close` has begun to save is written all the same; what fails then can only be printed."""
    for writer in list(_WRITERS):
        try:
            writer.wait(agreeing=False)
        except Exception as error:
            print(error, file=sys.stderr)


# Before concurrent.futures, which Orbax uses, takes no more work: atexit and threads that are waited for come after that. Where
# Python has no such hook, a step that is begun and not waited for is lost; so it is where Python starts no thread so late (3.12.1,
# and no longer 3.12.3). Then it is told, and the program may take up to the timeout to end, as Orbax's threads wait for each other:
# a `with`, `close` or `wait` is the remedy.
if hasattr(threading, "_register_atexit"):
    threading._register_atexit(_wait_at_exit)  # pyright: ignore[reportAttributeAccessIssue]
