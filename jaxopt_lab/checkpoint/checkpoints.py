"""A directory of numbered checkpoints, written in the background and verified before they count."""

import math
import operator
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxopt_lab.checkpoint import about, compare, digests, folder, manifest, retention, storage, together
from jaxopt_lab.checkpoint.digests import Damaged
from jaxopt_lab.checkpoint.folder import Quarantined
from jaxopt_lab.checkpoint.lock import Locked
from jaxopt_lab.checkpoint.retention import Best
from jaxopt_lab.checkpoint.writer import Writer
from jaxopt_lab.core.types import PyTree

__all__ = ["Checkpoints"]

# zstd writes a block of up to 128 KiB in no less than four bytes.
_SHRINKS = 2**15


class Checkpoints:
    """The checkpoints of one run: saved in the background, restored with a target or without.

    A step counts once it is *verified*: all of it is on the disk with the SHA-256 of every file, and then its directory gets its
    name. So a reader sees all of a step or nothing, and whatever is lost, cut, flipped or put in later is found before anything is
    read. What a killed run left half written is cleared when the next one begins to save. One process writes: the first `save`
    takes a lock, and keeps it until `close`. An error in the background surfaces at `wait`, `close`, or the next call that saves or
    reads.

    In a run of several processes each of them calls everything, in the same order, on a directory that all share; arrays may be
    spread over all their devices. The first process locks, digests, deletes and decides which step is restored; what fails in one,
    all raise. Where a save cannot even begin in one of them, that one alone raises `SaveFailed`, and must end: they wait for it.

    Args:
      directory: where they live; made if need be.
      keep: how many of the newest to keep; None keeps all. The newest is never deleted before a newer one is verified.
      best: which others to keep, by the metrics given to `save`.
      classes: the caller's own NamedTuples and dataclasses in the trees; others outside `manifest.ALLOWED_PACKAGES` are refused.
      max_bytes: how much a checkpoint may claim to hold; None for this machine's memory where it is restored without a target,
        which otherwise says how much. Nothing may claim more than 2**15 times the bytes of its files, the most that zstd can shrink
        them.
      timeout: how many seconds to wait for a step to be written, and for other processes.

    Raises:
      OSError: the directory cannot be made or written.
      ValueError: `keep`, `max_bytes` or `timeout` is not a positive number.

    >>> import jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as directory, Checkpoints(directory) as checkpoints:
    ...     checkpoints.save(10, {"kernel": jnp.ones(2), "best": 0.5}, metadata={"data": "digits"})
    ...     checkpoints.wait()
    ...     checkpoints.steps(), checkpoints.restore(10), checkpoints.metadata(10)["data"]
    ((10,), {'kernel': Array([1., 1.], dtype=float32), 'best': 0.5}, 'digits')
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int | None = None,
        best: Best | None = None,
        classes: Sequence[type] = (),
        max_bytes: int | None = None,
        timeout: float = 1200.0,
    ):
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: keep at least one checkpoint, or None for all")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes}: at least 1, or None for this machine's memory")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: a positive number of seconds")
        self.directory = Path(directory).absolute()
        self._best, self._classes, self._max_bytes, self._timeout = best, tuple(classes), max_bytes, float(timeout)
        if together.is_first():
            _check_writable(self.directory)
        self._writer = Writer(self.directory, keep, best, self._timeout)

    def save(
        self,
        step: int,
        tree: PyTree,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        """Starts to save `tree` as checkpoint `step`; returns once its arrays are copied, before they are on disk.

        Waits for the save before, if that still runs. A step that could not be saved may be saved again.

        Args:
          step: the step's number, not negative and not saved before.
          tree: what `manifest.describe` takes.
          metadata: JSON values to keep beside it, under any names but "versions".
          metrics: numbers that `best` goes by.
          fingerprint: what must be the same where it is restored: texts, such as digests, by name.

        Raises:
          FileNotFoundError: the directory was removed since the first save.
          Locked: another writer has the directory; the message names it.
          SaveFailed: this save could not be begun, or the one before was not written.
          TimeoutError: the one before is not written in time.
          TypeError: something in the tree cannot be stored; the message names its path.
          ValueError: the step is there already or not a number from 0 up, or what stands beside the tree is of the wrong kind.
        """
        number = _step(step)
        self.wait()
        beside = about.described(metadata, metrics, fingerprint, number)
        arguments = storage.pack(tree, self._classes, **beside)
        together.agree(f"save {number}", lambda: self._writer.begin(number), self._timeout)
        self._writer.save(number, arguments, beside["metrics"])

    def restore(
        self, step: int, like: PyTree | None = None, *, part: str = "", fingerprint: Mapping[str, str] | None = None
    ) -> PyTree:
        """The tree of one checkpoint, as it was saved, or the part of it at a path; every file is verified first.

        Without a target its arrays (numpy ones too) come as JAX arrays on the default device. With one they land where its leaves
        are, on any number of devices: each device reads only its own shards of an array that is spread over several.

        Args:
          step: the step's number.
          like: a tree of arrays, or of `jax.ShapeDtypeStruct`s, with shardings or without. Structure, classes, shapes, dtypes and
            kinds of keys must be those of the checkpoint; nothing is cast or broadcast. Python scalars come from the checkpoint.
          part: the path of a branch, such as "params"; nothing else is read, and `like` is of that branch.
          fingerprint: what the one given to `save` must be.

        Raises:
          Damaged: a file is missing, cut, flipped, foreign or a link, or claims to hold too much; the message names it.
          FileNotFoundError: there is no such checkpoint; the message lists those there are.
          TypeError: the tree holds a class that is not allowed.
          ValueError: the tree, or the fingerprint, is another than the one wanted; the message lists what differs, by path. Or it
            is larger than `max_bytes`, or of a later version.
        """
        number = _step(step)
        self.wait()
        together.agree(f"restore {number}", lambda: self._check(number), self._timeout)
        return self._read(number, like, part, fingerprint)

    def restore_latest(
        self, like: PyTree | None = None, *, part: str = "", fingerprint: Mapping[str, str] | None = None
    ) -> tuple[int, PyTree]:
        """The newest sound checkpoint, as `(step, tree)`.

        A damaged one is set aside (see `quarantined`), a warning says so, and the one before it is taken. Where another process
        writes here, damaged ones are passed over and left in their place.

        Args:
          like: as in `restore`, and so are `part` and `fingerprint`.

        Raises:
          FileNotFoundError: there is no sound one; the message says what was set aside.
          TypeError, ValueError: as `restore`; a checkpoint of another tree or run, or one too large, is not passed over.
        """
        self.wait()
        while True:
            found = together.agree("restore the latest", self._newest_sound, self._timeout)
            step, damaged = found["step"], "; ".join(found["damaged"])
            if step is None:
                what = f"no sound checkpoint left: {damaged}" if damaged else "no checkpoint yet"
                raise FileNotFoundError(f"{self.directory} has {what}")
            try:
                tree = self._read(step, like, part, fingerprint)
            except (OSError, ValueError):
                # Of one process that reads what another writes: it was deleted, because there are newer ones.
                if together.alone() and step not in self.steps():
                    continue
                raise
            if damaged and together.is_first():
                warnings.warn(f"{damaged}; restored checkpoint {step} instead", UserWarning, stacklevel=2)
            return step, tree

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved as `metadata` with a checkpoint, and under "versions" those of jax, flax, optax, Orbax and ours."""
        structure = self._manifest(step)
        return {**structure["metadata"], "versions": structure.get("versions", {})}

    def metrics(self, step: int) -> dict[str, float | None]:
        """What was saved as `metrics` with a checkpoint; None for what was not finite."""
        return self._manifest(step).get("metrics", {})

    def steps(self) -> tuple[int, ...]:
        """The verified checkpoints, in order."""
        return folder.steps(self.directory)

    def latest(self) -> int | None:
        """The newest verified checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The best verified checkpoint, by the rule given as `best`; None if none has that metric.

        Raises:
          ValueError: no rule was given.
        """
        if self._best is None:
            raise ValueError("there is no best checkpoint without a rule: Checkpoints(..., best=Best(metric, maximise=...))")
        found = {}
        for step in self.steps():
            try:
                found[step] = digests.read(self.directory / str(step), self._source(step))["metrics"]
            except Damaged:
                continue
        return next(iter(retention.ranked(found, self._best)), None)

    def quarantined(self) -> tuple[Quarantined, ...]:
        """The damaged checkpoints that were set aside, each with its step, its place and the reason."""
        return folder.quarantined(self.directory)

    def verify(self, step: int) -> None:
        """Compares every file of a checkpoint with its SHA-256, and what its arrays say of themselves with the manifest.

        Raises:
          Damaged: something is not as it was written; the message names it.
          FileNotFoundError: there is no such checkpoint.
        """
        number = _step(step)
        self.wait()
        together.agree(f"verify {number}", lambda: self._check(number), self._timeout)

    def wait(self) -> None:
        """Returns once everything is on disk and verified; raises what went wrong in the background.

        Raises:
          SaveFailed: the last save was not written, or an older step could not be deleted; said once.
          TimeoutError: it is not written in time.
        """
        self._writer.wait()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self._close(sys.exception())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        # Who leaves by an error may be alone in it: the others are not asked what they have met.
        self._writer.close(agreeing=error is None)

    def _source(self, step: int) -> str:
        return f"checkpoint {step} in {self.directory}"

    def _there(self, step: int) -> Path:
        if step not in (steps := self.steps()):
            there = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"no checkpoint {step} in {self.directory}; there are: {there}")
        return self.directory / str(step)

    def _manifest(self, step: int) -> dict[str, Any]:
        number = _step(step)
        self.wait()
        return storage.read_manifest(self._there(number), self._source(number))

    def _check(self, step: int) -> None:
        """Whether a step is what was written, and may be read."""
        path, source = self._there(step), self._source(step)
        held = digests.check(path, source)
        structure = storage.read_manifest(path, source)
        try:
            claims = manifest.claimed(structure)
        except ValueError as error:
            raise Damaged(f"{source} is damaged: {error}") from error
        if claims > _SHRINKS * held:
            raise Damaged(f"{source} is damaged: it claims {claims} bytes of arrays in {held} of files")
        storage.check_stored(path, structure, source)

    def _newest_sound(self) -> dict[str, Any]:
        """The newest step that is sound, or None, and what is to be said of the newer ones."""
        damaged = []
        for step in reversed(self.steps()):
            try:
                self._check(step)
            except (Damaged, FileNotFoundError) as error:
                # One that is no step any more was deleted by its writer in the meantime.
                if step in self.steps():
                    damaged.append(self._set_aside(step, str(error)))
            else:
                return {"step": step, "damaged": damaged}
        return {"step": None, "damaged": damaged}

    def _set_aside(self, step: int, reason: str) -> str:
        try:
            with self._writer.locked():
                return f"{reason}; set aside in {folder.quarantine(self.directory, step, reason).path}"
        except (Locked, OSError) as error:
            return f"{reason}; left where it is: {error}"

    def _read(self, step: int, like: PyTree | None, part: str, fingerprint: Mapping[str, str] | None) -> PyTree:
        """What a checked step holds; where one process cannot read its own of it, all of them say so."""
        tree, error = None, None
        try:
            tree = self._read_here(step, like, part, fingerprint)
        except Exception as own:
            error = own
        if (error := together.failure(f"read {step}", error, self._timeout)) is not None:
            raise error
        return tree

    def _read_here(self, step: int, like: PyTree | None, part: str, fingerprint: Mapping[str, str] | None) -> PyTree:
        path, source = self.directory / str(step), self._source(step)
        structure = storage.read_manifest(path, source)
        about.compare_fingerprints(structure.get("fingerprint", {}), fingerprint, source)
        if part:
            structure = manifest.part(structure, part)
        limit = self._max_bytes if self._max_bytes is not None else _memory() if like is None else math.inf
        if (claims := manifest.claimed(structure)) > limit:
            raise ValueError(
                f"{source} claims {claims} bytes of arrays, and no more than {limit} are read: give max_bytes=, or like="
            )
        shardings: list[Any] = []
        if like is not None:
            wanted, leaves = manifest.describe(like, self._classes, abstract=True)
            compare.refuse(structure, wanted, source, part)
            shardings = [storage.sharding_of(leaves[i]) for i in compare.matched(structure, wanted)]
        arrays = storage.read_arrays(path, structure, source, shardings)
        return storage.unpack(structure, arrays, source, self._classes, shardings)


def _memory() -> int:
    """The bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
