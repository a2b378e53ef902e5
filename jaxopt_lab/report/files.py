"""Files that are whole or not there."""

import os
import tempfile
from pathlib import Path

__all__ = ["write"]


def write(path: str | Path, body: bytes) -> Path:
    """Writes a file through a temporary one beside it, so that no reader ever sees half of it; missing folders are made.

    >>> folder = Path(tempfile.mkdtemp())
    >>> write(folder / "a" / "b.txt", b"whole").read_bytes()
    b'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
            # mkstemp makes files that only their owner reads; a report is as readable as any file the user writes.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
