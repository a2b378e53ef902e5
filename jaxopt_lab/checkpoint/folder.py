"""What lies in a directory of checkpoints, and how it gets there and leaves: always by one renaming.

directory/
  120/                    a verified step: what Orbax wrote, and digests.json
  lock                    of the writer
  quarantine/90/          a damaged step (step/), and why (reason.txt)
  130.saving-4...         half written: cleared by the next writer
  60.deleting-0           half deleted: likewise
"""

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from jaxopt_lab.checkpoint import digests
from jaxopt_lab.core import files

__all__ = ["Quarantined", "clear", "discard", "publish", "quarantine", "quarantined", "remove", "steps"]

_STEP = re.compile(r"0|[1-9][0-9]*")
_LEFTOVER = re.compile(r"[0-9]+\.((saving|deleting)-[0-9]+.*|orbax-checkpoint-tmp.*)")


class Quarantined(NamedTuple):
    """A step that was set aside.

    Attributes:
      step: its number.
      path: the folder it lies in now, under `step`, with a `reason.txt`.
      reason: what was wrong.
    """

    step: int
    path: Path
    reason: str


def steps(directory: Path) -> tuple[int, ...]:
    """The verified steps, in order: those with digests, which are the last to be written.

    >>> steps(Path("/nowhere"))
    ()
    """
    return tuple(step for step in _numbered(directory) if (directory / str(step) / digests.NAME).is_file())


def publish(saved: Path, step: int) -> None:
    """Makes a sealed folder the step of its directory.

    Raises:
      OSError: there is such a step, or the directory cannot be written.

    >>> import tempfile
    >>> saved = Path(tempfile.mkdtemp()) / "7.saving-1"
    >>> saved.mkdir()
    >>> digests.seal(saved, {})
    >>> publish(saved, 7)
    >>> steps(saved.parent)
    (7,)
    """
    os.rename(saved, saved.parent / str(step))
    digests.sync(saved.parent)


def discard(directory: Path, step: int) -> None:
    """Deletes a step: it is no step any more before the first of its files is gone.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> (directory / "7").mkdir()
    >>> discard(directory, 7)
    >>> list(directory.iterdir())
    []
    """
    gone = _unused(directory, f"{step}.deleting-")
    os.rename(directory / str(step), gone)
    shutil.rmtree(gone)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder as far as it can be removed.

    >>> remove(Path("/nowhere"))
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def clear(directory: Path) -> None:
    """Removes what killed writers left half done; a step without digests, which none of ours leaves, is set aside.

    Only for who holds the lock.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> for name in ("7", "8.saving-1", "9.orbax-checkpoint-tmp", "notes"):
    ...     (directory / name).mkdir()
    >>> clear(directory)
    >>> sorted(path.name for path in directory.iterdir()), quarantined(directory)[0].reason
    (['notes', 'quarantine'], 'it has no digests.json: it was not saved to its end, or not by this version')
    """
    for path in sorted(directory.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            remove(path)
    for step in set(_numbered(directory)).difference(steps(directory)):
        quarantine(directory, step, f"it has no {digests.NAME}: it was not saved to its end, or not by this version")


def quarantine(directory: Path, step: int, reason: str) -> Quarantined:
    """Sets a step aside, with the reason.

    Raises:
      OSError: the directory cannot be written.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> (directory / "7").mkdir()
    >>> quarantine(directory, 7, "tree/d is missing").path.relative_to(directory).as_posix()
    'quarantine/7'
    """
    # Without a number first, which is the usual case, and only then with one.
    apart = directory / "quarantine"
    path = apart / str(step) if not (apart / str(step)).exists() else _unused(apart, f"{step}.")
    files.write(path / "reason.txt", (reason + "\n").encode())
    os.rename(directory / str(step), path / "step")
    digests.sync(directory)
    return Quarantined(step, path, reason)


def quarantined(directory: Path) -> tuple[Quarantined, ...]:
    """All that was set aside, by step.

    >>> quarantined(Path("/nowhere"))
    ()
    """
    found = []
    for path in sorted((directory / "quarantine").glob("*/reason.txt")):
        number = path.parent.name.partition(".")[0]
        if _STEP.fullmatch(number) and os.path.lexists(path.parent / "step"):
            found.append(Quarantined(int(number), path.parent, path.read_text().strip()))
    return tuple(sorted(found))


def _numbered(directory: Path) -> list[int]:
    """The numbers of all folders that are named as steps are; a link to one is not one."""
    try:
        with os.scandir(directory) as entries:
            return sorted(int(e.name) for e in entries if _STEP.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def _unused(folder: Path, beginning: str) -> Path:
    number = 0
    while os.path.lexists(folder / f"{beginning}{number}"):
        number += 1
    return folder / f"{beginning}{number}"
