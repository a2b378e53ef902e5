"""One writer to a directory: a lock that ends with the process that holds it."""

import datetime
import errno
import fcntl
import json
import os
import socket
import weakref
from pathlib import Path
from typing import Any

__all__ = ["Lock", "Locked"]


class Locked(RuntimeError):  # noqa: N818 (what it is, not what was done)
    """Another writer has the directory; the message names it.

    Attributes:
      owner: what it said of itself: `host`, `pid` and `since`; empty if it said nothing.
    """

    def __init__(self, message: str, owner: dict[str, Any] | None = None):
        super().__init__(message)
        self.owner = owner or {}


class Lock:
    """Holds a file locked while a `with` lasts, and says in it who does.

    The lock is the kernel's (`flock`): it ends with the process, however that ends, so nothing stale is ever in the way; what the
    file says of its owner is for people. A second lock in the same process is a second writer. Children do not hold it, neither
    those that a new program replaces nor those that are forked. The file stays, empty, where it is.

    Args:
      path: the file to lock; it is made, with its folder, if need be.

    Raises:
      Locked: on entering, if another has it.
      OSError: on entering, if the file cannot be opened, or its file system knows no locks.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/lock"
    >>> with Lock(path) as lock:
    ...     try:
    ...         Lock(path).acquire()
    ...     except Locked as error:
    ...         print(error.owner["pid"] == os.getpid(), lock.held)
    True True
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        self._file: int | None = None

    @property
    def held(self) -> bool:
        """Whether this process holds the lock, and its file is still the one at the path."""
        if self._file is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path, follow_symlinks=False))
        except OSError:
            return False

    def acquire(self) -> None:
        """Takes the lock, or raises at once; what entering does."""
        if self._file is not None:
            raise RuntimeError(f"{self.path} is locked by this very lock already")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _flock(file, self.path)
            mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(mine).encode(), 0)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        _LOCKS.add(self)

    def release(self) -> None:
        """Lets go of the lock, if it is held; what leaving does."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            os.ftruncate(file, 0)
        finally:
            os.close(file)

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _flock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise OSError(
                error.errno, f"cannot lock {path}: {error.strerror}; choose a directory on a file system that knows locks"
            ) from None
        owner = _owner(file)
        who = (
            f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
            if owner
            else "a process that does not say who it is"
        )
        raise Locked(f"{path.parent} has a writer already: {who}; end it, or choose another directory", owner) from None


def _owner(file: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(file, 4096, 0))
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), "since": str(owner["since"])}
    except (ValueError, LookupError, TypeError):
        return {}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# A forked child has the same open file: were it left open there, the lock would outlive the parent.
_LOCKS: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _let_go_in_child() -> None:
    for lock in list(_LOCKS):
        if lock._file is not None:
            os.close(lock._file)
            lock._file = None


os.register_at_fork(after_in_child=_let_go_in_child)
