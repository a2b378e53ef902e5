"""What a checkpoint and the tree it shall become have in common, and what not: by path, before anything is read."""

from collections.abc import Iterator
from typing import Any

from jaxopt_lab.checkpoint import manifest

__all__ = ["differences", "matched", "refuse"]


def differences(found: dict[str, Any], wanted: dict[str, Any], path: str = "") -> list[str]:
    """In what the structure of a checkpoint differs from the one wanted; nothing where the arrays of one fit the other.

    Containers and classes must be the same, and static fields equal; the values of Python scalars may differ, not their types. The
    order of keys counts only where the container remembers it as part of the tree (`OrderedDict`).

    Args:
      found: of the checkpoint, by `manifest.describe`.
      wanted: of the target.
      path: where in the tree both stand.

    >>> import numpy as np
    >>> found, _ = manifest.describe({"a": np.ones(3, np.float32), "b": np.ones(2, np.int8), "c": 1})
    >>> wanted, _ = manifest.describe({"a": np.ones((3, 1), np.float32), "b": np.ones(2, np.int32), "d": 1})
    >>> for line in differences(found, wanted):
    ...     print(line)
    a: shape (3,) in the checkpoint, (3, 1) wanted
    b: dtype int8 in the checkpoint, int32 wanted
    c: extra in the checkpoint
    d: missing in the checkpoint
    """
    return [line for line in _walk(found["tree"], wanted["tree"], found, wanted, path) if isinstance(line, str)]


def matched(found: dict[str, Any], wanted: dict[str, Any]) -> list[int]:
    """For each array of `found` the number of its like in `wanted`; only where there are no differences.

    >>> import numpy as np
    >>> a, b = np.ones(3, np.int8), np.ones(2, np.int8)
    >>> matched(*(manifest.describe(tree, abstract=True)[0] for tree in ({"a": a, "b": b}, {"b": b, "a": a})))
    [1, 0]
    """
    pairs = dict(pair for pair in _walk(found["tree"], wanted["tree"], found, wanted, "") if not isinstance(pair, str))
    return [pairs[i] for i in range(len(found["arrays"]))]


def refuse(found: dict[str, Any], wanted: dict[str, Any], source: str, path: str = "") -> None:
    """Raises a ValueError of one line that lists the differences, if there are any.

    >>> import numpy as np
    >>> refuse(*(manifest.describe({name: np.ones(1, np.int8)})[0] for name in "ab"), "step 3")
    Traceback (most recent call last):
      ...
    ValueError: step 3 is of another tree than the one wanted: a: extra in the checkpoint; b: missing in the checkpoint
    """
    lines = differences(found, wanted, path)
    if lines:
        more = f"; and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ValueError(f"{source} is of another tree than the one wanted: {'; '.join(lines[:20])}{more}")


def _walk(a: Any, b: Any, found: dict[str, Any], wanted: dict[str, Any], path: str) -> Iterator[str | tuple[int, int]]:
    """Differences as lines, and pairs of arrays that are the same."""
    where = path or "the tree"
    if (kind := _kind(a)) != (want := _kind(b)):
        yield f"{where}: {kind} in the checkpoint, {want} wanted"
        return
    if "array" in a:
        old, new = found["arrays"][a["array"]], wanted["arrays"][b["array"]]
        lines = [
            f"{where}: {name} {_told(old, name)} in the checkpoint, {_told(new, name)} wanted"
            for name in ("shape", "dtype", "key")
            if old.get(name) != new.get(name)
        ]
        yield from lines or [(a["array"], b["array"])]
        return
    if a.get("static") != b.get("static"):
        for name in sorted(a["static"].keys() | b["static"].keys()):
            if (old := a["static"].get(name)) != (new := b["static"].get(name)):
                yield f"{where}: {name} is {old} in the checkpoint, {new} wanted"
    left, right = dict(manifest.children(a)), dict(manifest.children(b))
    if "mapping" in a and a["mapping"] == "collections:OrderedDict" and set(left) == set(right) and list(left) != list(right):
        yield f"{where}: the keys are in the order {list(left)} in the checkpoint, {list(right)} wanted"
    for key in [*left, *(key for key in right if key not in left)]:
        below = path if key == "" and "variable" in a else f"{path}/{key}" if path else str(key)
        if key not in right:
            yield from (f"{place}: extra in the checkpoint" for place in _leaves(left[key], below))
        elif key not in left:
            yield from (f"{place}: missing in the checkpoint" for place in _leaves(right[key], below))
        else:
            yield from _walk(left[key], right[key], found, wanted, below)


def _kind(node: dict[str, Any]) -> str:
    match node:
        case {"value": value}:
            return f"a Python {'float' if isinstance(value, dict) else type(value).__name__}"
        case {"array": _}:
            return "an array"
        case {"mapping": name} | {"variable": name} | {"namedtuple": name} | {"dataclass": name}:
            return name
        case _:
            return next(iter(node))


def _told(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if name == "shape":
        return str(tuple(record["shape"]))
    return "no key" if value is None else str(value)


def _leaves(node: dict[str, Any], path: str) -> Iterator[str]:
    """The paths of the leaves of a branch; its own where it has none."""
    below = manifest.children(node)
    if not below:
        yield path
    for key, child in below:
        yield from _leaves(child, path if key == "" and "variable" in node else f"{path}/{key}")
