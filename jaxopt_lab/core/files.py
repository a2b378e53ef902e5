"""Files that are whole or not there, JSON that says one thing, and names that are no way out of a directory."""

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["finite", "inside", "read_json", "safe_name", "write"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


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


def read_json(path: str | os.PathLike, *, max_bytes: int = 2**28) -> Any:
    """What a JSON file holds, read strictly: whatever has two readings, or none that JSON knows, is refused.

    Args:
      path: the file.
      max_bytes: a longer file is refused before it is read.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is too long, not UTF-8 or not JSON, holds NaN, an infinity or a number beyond float64, or an object with one
        key twice; the message names the file, and the place by line and column (of bytes that are not UTF-8, by their position).

    >>> folder = Path(tempfile.mkdtemp())
    >>> read_json(write(folder / "good.json", b'{"rate": 0.5}'))
    {'rate': 0.5}
    >>> try:
    ...     read_json(write(folder / "twice.json", b'{"rate": 0.5,\\n "rate": 1}'))
    ... except ValueError as error:
    ...     print(str(error).removeprefix(str(folder)))
    /twice.json, line 2, column 2: the key 'rate' is there twice
    """
    with open(path, "rb") as file:
        body = file.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise ValueError(f"{path} is longer than the {max_bytes} bytes that are read of it")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: 0x{body[error.start]:02x} is not UTF-8") from None

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _Ambiguous
        return found

    def number(said: str) -> float:
        if not math.isfinite(value := float(said)):
            raise _Ambiguous
        return value

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=number, parse_float=number)
    except _Ambiguous:
        at, what = _first_ambiguity(text)
    except json.JSONDecodeError as error:
        at, what = error.pos, error.msg
    except RecursionError:
        raise ValueError(f"{path} is nested too deep to be read") from None
    except ValueError as error:
        # An integer of more digits than Python converts.
        raise ValueError(f"{path} holds a number that cannot be read: {str(error).partition(';')[0]}") from None
    line = text.count("\n", 0, at) + 1
    raise ValueError(f"{path}, line {line}, column {at - text.rfind(chr(10), 0, at)}: {what}")


def safe_name(name: str) -> str:
    """`name` itself, if it can be the name of a file or folder of ours on any system, and is no way to another place.

    Letters, digits, `.`, `_` and `-`, at most 100 of them, the first a letter or digit, the last no dot, and no two dots in a row.

    Raises:
      ValueError: it cannot; the message names it.

    >>> safe_name("adamw-1e-3.seed_0")
    'adamw-1e-3.seed_0'
    >>> safe_name("../../evil")
    Traceback (most recent call last):
      ...
    ValueError: '../../evil' cannot be the name of a file: use up to 100 letters, digits, '.', '_' and '-', first a letter or ...
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise ValueError(
            f"{str(name)[:120]!r} cannot be the name of a file: use up to 100 letters, digits, '.', '_' and '-', first a letter or "
            "digit, last no dot, and no '..'"
        )
    return name


def inside(root: str | os.PathLike, name: str) -> Path:
    """The path `root / name`, if the name is safe and no link leads from there out of `root`.

    Raises:
      ValueError: the name is not safe, or what is there is a link to another place.

    >>> inside("/runs", "a").as_posix()
    '/runs/a'
    """
    path = Path(root) / safe_name(name)
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise ValueError(f"{path} leads out of {root}, to {path.resolve()}")
    return path


class _Ambiguous(Exception):  # noqa: N818 (caught here)
    """JSON that Python would read, and others read otherwise or not at all."""


def _first_ambiguity(text: str) -> tuple[int, str]:
    """Where text, which Python reads as JSON, first has a key twice in one object, or a number that is not finite."""
    keys: list[set[str] | None] = []
    expects_key = False
    for token in _TOKEN.finditer(text):
        word = token.group()
        if word in "{[":
            keys.append(set() if word == "{" else None)
        elif word in "}]":
            keys.pop()
        elif word[0] == '"' and expects_key and keys and (seen := keys[-1]) is not None:
            if (key := json.loads(word, strict=False)) in seen:
                return token.start(), f"the key {key!r} is there twice"
            seen.add(key)
        elif word.lstrip("-")[0] in "NI0123456789" and not math.isfinite(float(word)):
            return token.start(), f"{word[:40]} is no finite number"
        expects_key = word == "{" or (word == "," and bool(keys) and keys[-1] is not None)
    raise AssertionError("nothing in this text has two readings")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
