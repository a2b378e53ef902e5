"""SHA-256 of every file of a checkpoint, and what is said of one that is no longer what was written."""

import concurrent.futures
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxopt_lab.core import files

__all__ = ["NAME", "Damaged", "check", "read", "seal", "sync"]

NAME = "digests.json"
"""The file in a step's directory that makes it a verified one."""

_FORMAT = 1

# What an error of the system says of the file itself; any other may be gone when it is tried again.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR)


class Damaged(ValueError):  # noqa: N818 (what it is, not what was done)
    """A checkpoint is not what was written; the message names it, the file, and what is wrong with that."""


def seal(directory: Path, metrics: Mapping[str, Any]) -> None:
    """Writes the digests of everything in a directory, once it is on the disk; whoever finds them finds all of it.

    Args:
      directory: one finished step.
      metrics: numbers by which steps are compared; they stand beside the digests so that nothing else need be read for them.

    Raises:
      OSError: something cannot be read or written.
      Damaged: there is a link or a device in it.

    >>> import tempfile
    >>> step = Path(tempfile.mkdtemp())
    >>> _ = (step / "weights").write_bytes(b"123")
    >>> seal(step, {"loss": 0.5})
    >>> check(step, "step 3"), read(step, "step 3")["metrics"]
    (3, {'loss': 0.5})
    >>> _ = (step / "weights").write_bytes(b"124")
    >>> check(step, "step 3")
    Traceback (most recent call last):
      ...
    jaxopt_lab.checkpoint.digests.Damaged: step 3 is damaged: weights is not what its SHA-256 says
    """
    found = {}
    for name, size in sorted(_walk(directory, str(directory))):
        found[name] = [size, _digest(directory / name, to_disk=True)]
    for folder in {Path(), *(parent for name in found for parent in Path(name).parents)}:
        sync(directory / folder)
    body = {"format": _FORMAT, "files": found, "metrics": files.finite(metrics)}
    files.write(directory / NAME, _dump({**body, "sha256": hashlib.sha256(_dump(body)).hexdigest()}))
    sync(directory)


def read(directory: Path, source: str) -> dict[str, Any]:
    """The digests of a step, and its metrics.

    Args:
      directory: the step's.
      source: what to call it in an error.

    Raises:
      Damaged: there are none that can be trusted.
      OSError: they cannot be read now, which says nothing of them: no permission, too many open files, a disk that does not answer.
      ValueError: a later version wrote them.

    >>> read(Path("/nowhere"), "step 3")
    Traceback (most recent call last):
      ...
    jaxopt_lab.checkpoint.digests.Damaged: step 3 is damaged: it has no digests.json that can be read: [Errno 2] No such file or ...
    """
    if directory.is_symlink() or (directory / NAME).is_symlink():
        raise Damaged(f"{source} is damaged: it is a link, or its {NAME} is")
    try:
        found = files.read_json(directory / NAME)
        body = {name: found[name] for name in ("format", "files", "metrics")}
        if set(found) != {*body, "sha256"} or hashlib.sha256(_dump(body)).hexdigest() != found["sha256"]:
            raise ValueError(f"{NAME} is not what its own SHA-256 says")
    except OSError as error:
        if error.errno not in _GONE:
            raise
        raise Damaged(f"{source} is damaged: it has no {NAME} that can be read: {error}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise Damaged(f"{source} is damaged: it has no {NAME} that can be read: {error}") from error
    if body["format"] != _FORMAT:
        raise ValueError(f"{source} cannot be checked: its {NAME} has format {body['format']}; this version reads {_FORMAT}")
    return body


def check(directory: Path, source: str) -> int:
    """Compares everything in a step's directory with its digests: first what is there, then what is in it.

    Args:
      directory: the step's.
      source: what to call it in the error.

    Returns:
      The bytes of its files.

    Raises:
      Damaged: a file is missing, of another size, flipped, not listed, or neither file nor folder.
      OSError: a file cannot be read now, which says nothing of what is in it.
      ValueError: a later version wrote it.

    >>> import tempfile
    >>> step = Path(tempfile.mkdtemp())
    >>> seal(step, {})
    >>> _ = (step / "more").write_bytes(b"123")
    >>> check(step, "step 3")
    Traceback (most recent call last):
      ...
    jaxopt_lab.checkpoint.digests.Damaged: step 3 is damaged: more is not one of its files
    """
    listed = read(directory, source)["files"]
    found = dict(_walk(directory, source))
    found.pop(NAME, None)
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            raise Damaged(f"{source} is damaged: {name} is missing")
        if name not in listed:
            raise Damaged(f"{source} is damaged: {name} is not one of its files")
        if found[name] != listed[name][0]:
            raise Damaged(f"{source} is damaged: {name} has {found[name]} bytes and was written with {listed[name][0]}")
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for name, digest in zip(found, pool.map(lambda name: _digest(directory / name), found), strict=True):
                if digest != listed[name][1]:
                    raise Damaged(f"{source} is damaged: {name} is not what its SHA-256 says")
        except OSError as error:
            if error.errno not in _GONE:
                raise
            raise Damaged(f"{source} is damaged: {error.filename} cannot be read: {error.strerror}") from error
    return sum(found.values())


def sync(folder: Path) -> None:
    """Has the names in a folder written to the disk.

    >>> import tempfile
    >>> sync(Path(tempfile.mkdtemp()))
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _walk(directory: Path, source: str) -> Iterator[tuple[str, int]]:
    """Every file below a directory and its size, no link followed."""
    if not stat.S_ISDIR(os.lstat(directory).st_mode):
        raise Damaged(f"{source} is damaged: it is no directory")
    folders = [directory]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                kind = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(kind.st_mode):
                    folders.append(Path(entry.path))
                    continue
                name = Path(entry.path).relative_to(directory).as_posix()
                if not stat.S_ISREG(kind.st_mode):
                    what = "a link" if stat.S_ISLNK(kind.st_mode) else "neither a file nor a folder"
                    raise Damaged(f"{source} is damaged: {name} is {what}")
                yield name, kind.st_size


def _digest(path: Path, *, to_disk: bool = False) -> str:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(handle, "rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
        if to_disk:
            os.fsync(handle)
    return digest


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
