"""Files that are whole or not there, and numbers that JSON can write."""

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["finite", "write"]


def write(path: str | os.PathLike, body: bytes) -> Path:
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
            # mkstemp makes files that only their owner reads; this one is as readable as any file the user writes.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    return path


def finite(value: Any) -> Any:
    """`value` with every number that JSON cannot write replaced by None, however deep in dicts, lists and tuples.

    >>> finite({"loss": [1.0, float("nan")], "norms": (float("inf"), 2)})
    {'loss': [1.0, None], 'norms': [None, 2]}
    """
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
