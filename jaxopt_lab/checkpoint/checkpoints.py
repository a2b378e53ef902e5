"""A directory of numbered checkpoints, written in the background."""

import json
import operator
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxopt_lab.checkpoint import storage
from jaxopt_lab.core.types import PyTree

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of one run: saved in the background, restored without a target.

    A step is finished by renaming its directory, so a reader sees all of it or nothing, and what a killed run left half written is
    cleared before the next save. An error in the background surfaces at `wait`, `close`, or the next call that reads.

    Args:
      directory: where they live; made if need be.
      keep: how many of the newest to keep; None keeps all.
      classes: the caller's own NamedTuples and dataclasses in the trees; others outside `manifest.ALLOWED_PACKAGES` are refused.

    Raises:
      OSError: the directory cannot be made or written.
      ValueError: `keep` is not a positive number.

    >>> import jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as directory, Checkpoints(directory) as checkpoints:
    ...     checkpoints.save(10, {"kernel": jnp.ones(2), "best": 0.5}, metadata={"data": "digits"})
    ...     checkpoints.wait()
    ...     checkpoints.steps(), checkpoints.restore(10), checkpoints.metadata(10)
    ((10,), {'kernel': Array([1., 1.], dtype=float32), 'best': 0.5}, {'data': 'digits'})
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int | None = None, classes: Sequence[type] = ()):
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: keep at least one checkpoint, or None for all")
        self.directory = Path(directory).absolute()
        self._classes = tuple(classes)
        _check_writable(self.directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            item_handlers={"tree": ocp.PyTreeCheckpointHandler(), "manifest": ocp.JsonCheckpointHandler()},
        )

    def save(self, step: int, tree: PyTree, metadata: dict[str, Any] | None = None) -> None:
        """Starts to save `tree` as checkpoint `step`; returns once its arrays are copied, before they are on disk.

        Args:
          step: the step's number, not negative and not saved before.
          tree: what `manifest.describe` takes.
          metadata: JSON values to keep beside it.

        Raises:
          ValueError: the step is there already or not a number from 0 up, or `metadata` is not JSON.
          Exception: whatever went wrong in the background since the last call.
          TypeError: something in the tree cannot be stored; the message names its path.
        """
        number = _step(step)
        self.wait()
        if number in self.steps():
            raise ValueError(f"checkpoint {number} is in {self.directory} already; steps are saved once")
        try:
            json.dumps(metadata or {}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata of checkpoint {number} is not JSON: {error}") from None
        self._manager.save(number, args=storage.pack(tree, self._classes, metadata), force=True)

    def restore(self, step: int) -> PyTree:
        """The tree of one checkpoint, as it was saved; its arrays (numpy ones too) as JAX arrays on the default device.

        Raises:
          FileNotFoundError: there is no such checkpoint; the message lists those there are.
          TypeError: the tree holds a class that is not allowed.
          ValueError: the manifest or an array is missing or damaged, or the arrays do not fit their manifest.
        """
        structure = self._manifest(step)
        return storage.unpack(structure, self._arrays(step, structure), self._source(step), self._classes)

    def restore_latest(self) -> tuple[int, PyTree]:
        """The newest checkpoint, as `(step, tree)`.

        Raises:
          FileNotFoundError: there is none.
        """
        self.wait()
        step = self.latest()
        if step is None:
            raise FileNotFoundError(f"{self.directory} has no checkpoint yet")
        return step, self.restore(step)

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved as `metadata` with a checkpoint."""
        return self._manifest(step)["metadata"]

    def steps(self) -> tuple[int, ...]:
        """The finished checkpoints, in order."""
        # From the disk and not from the manager, which counts a save as done when it begins.
        return tuple(sorted(ocp.utils.checkpoint_steps(self.directory)))

    def latest(self) -> int | None:
        """The newest finished checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def verify(self, step: int) -> None:
        """Reads every array of a checkpoint and compares it with the manifest.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: an array is missing or unreadable, or has another shape or dtype; the message names its path.
        """
        structure = self._manifest(step)
        storage.check(structure, self._arrays(step, structure), self._source(step))

    def wait(self) -> None:
        """Returns once everything is on disk; raises what went wrong in the background."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except BaseException:
            self._manager.reload()
            raise

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _source(self, step: int) -> str:
        return f"checkpoint {step} in {self.directory}"

    def _manifest(self, step: int) -> dict[str, Any]:
        number = _step(step)
        self.wait()
        if number not in (steps := self.steps()):
            there = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"no checkpoint {number} in {self.directory}; there are: {there}")
        return storage.read_manifest(self._reader(number), self._source(step))

    def _arrays(self, step: int, structure: dict[str, Any]) -> dict[str, Any]:
        return storage.read_arrays(self._reader(step), structure, self._source(step))

    def _reader(self, step: int) -> Callable[[ocp.args.Composite], Any]:
        return lambda args: self._manager.restore(_step(step), args=args)


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        os.listdir(directory)
    except OSError as error:
        raise type(error)(f"cannot keep checkpoints in {directory}: {error.strerror}") from None


def _step(step: Any) -> int:
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"a checkpoint's step is a whole number from 0 up, not {step!r}")
    return number
