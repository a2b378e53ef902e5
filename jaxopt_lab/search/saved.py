"""What a population keeps in a directory, so that a call that was killed, and is made again, goes on where it was.

    call.packed      what was asked for, and the engines and the memory that were chosen: another call is refused
    turn-K.packed    the members that memory held at once, after their newest rung: what is known of them, and their states
    part-K.packed    members that others trained to the end (of a cluster), K the first of them: what became of them

Each file is of `checkpoint.save_packed`: whole or not at all, with a digest that is verified. Of each turn the newest rung alone is
kept: since a file is replaced in one move, a kill never costs the one before, and what a disk has damaged is named rather than
trained again in silence. What was decided at earlier rungs is not kept but decided again, from the scores.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.engines import Engine
from jaxopt_lab.search.pace import Start
from jaxopt_lab.search.trial import Result

__all__ = ["Directory", "Kept", "Together", "fingerprint", "opened", "read", "read_parts", "write", "write_part"]

_FORMAT = 2
_SHOWN = 160


class Directory(NamedTuple):
    """A directory that was opened for one call.

    Attributes:
      path: where it is.
      call: the digest of what was asked for and chosen, which each of its files carries.
      engines: that of each group.
      memory: bytes on each device, by which members take turns.
      working: bytes that a call of each group needs of them besides its members.
    """

    path: Path
    call: str
    engines: list[Engine]
    memory: int
    working: list[int]


class Together(NamedTuple):
    """Members that one call runs, at a rung.

    Attributes:
      number: of the group.
      indices: `[c]`, which configurations.
      engine: how they are run.
      traced: their traced leaves `[c, ...]`.
      states: their states `[c, ...]`.
    """

    number: int
    indices: np.ndarray
    engine: Engine
    traced: tuple[Array, ...]
    states: PyTree


class Kept(NamedTuple):
    """A turn at its newest rung.

    Attributes:
      at: after how many steps.
      rows: what is known of each of its members, at each rung so far: by step, which were `seen` `[m]`, their `scores` `[m]` and
        their `metrics` `[m, ...]` by name.
      parts: those that go on.
    """

    at: int
    rows: dict[int, dict[str, Any]]
    parts: list[Together]


def fingerprint(
    asked: Mapping[str, Any], starts: Sequence[Start], configs: Sequence[Any], key: Array, numbers: Sequence[int], batch: Any
) -> dict[str, list[str]]:
    """All that decides what a call comes to, in words; but for the functions, which cannot be compared.

    Args:
      asked: options by name.
      starts: the groups of equal shapes.
      configs: the configurations.
      key: of the population.
      numbers: what each member folds into it.
      batch: the first batch.

    >>> fingerprint({"steps": 3}, [], [{"rate": 0.1}], jax.random.key(0), [0], {})["configs"]
    ["['rate'] 0.1"]
    """
    return {
        "format": [str(_FORMAT)],
        **{name: [_words(value)] for name, value in asked.items()},
        "key": [f"{key.dtype} {jax.random.key_data(key).tolist()}"],
        "configs": [_text(config) for config in configs],
        "numbers": [str(number) for number in numbers],
        "groups": [f"{start.group.indices.tolist()} share all but {_traced(start, configs)}" for start in starts],
        "states": [_text(start.state) for start in starts],
        "batches(0)": [_text(batch)],
    }


def opened(
    path: str | Path, call: Mapping[str, list[str]], memory: int, choose: Callable[[], tuple[list[Engine], list[int]]]
) -> Directory:
    """The directory of a call: what was chosen when it was begun holds, and else is chosen now and kept.

    Args:
      path: where it is, or is to be.
      call: the `fingerprint` of the call.
      memory: bytes on each device.
      choose: gives an engine for each group, and how many bytes a call of it needs besides its members.

    Raises:
      NotADirectoryError: the path is something else.
      ValueError: it was begun by another call (the message says what differs), or its file is damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     first = opened(directory, {"steps": ["3"]}, 64, lambda: ([Engine(2)], [8]))
    ...     print(first.engines[0], opened(directory, {"steps": ["3"]}, 32, lambda: ([Engine(4)], [16])) == first)
    ...     opened(directory, {"steps": ["4"]}, 64, lambda: ([Engine(2)], [8]))
    Traceback (most recent call last):
      ...
    ValueError: /... was begun by another call: steps was 3 and is 4; make that call again, or give this one a directory of its own
    """
    from jaxopt_lab.checkpoint.packed import save_packed

    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"save must be a directory of this call's own; {path} is a file")
    for half in path.glob(".*.packed.*"):
        # What a call was writing when it was killed.
        half.unlink(missing_ok=True)
    file = path / "call.packed"
    if file.exists():
        tree = _loaded(file, f"delete {path} to begin anew, or put back a copy of it")
        if not isinstance(tree, dict) or not isinstance(tree.get("call"), dict):
            raise ValueError(f"{file} is no file of a population; give save a directory of its own")
        # Of another format before anything else, for that has other entries.
        if differing := _differing(tree["call"], call):
            raise ValueError(
                f"{path} was begun by another call: {differing}; make that call again, or give this one a directory of its own"
            )
        if set(tree) != {"call", "engines", "memory", "working"}:
            raise ValueError(f"{file} is no file of a population; give save a directory of its own")
        engines, memory, working = [Engine(*each) for each in tree["engines"]], tree["memory"], tree["working"]
    else:
        engines, working = choose()
        save_packed(file, {"call": dict(call), "engines": _pairs(engines), "memory": memory, "working": working})
    digest = hashlib.sha256(json.dumps([call, _pairs(engines), memory, working], sort_keys=True).encode()).hexdigest()
    return Directory(path, digest, engines, memory, working)


def write(directory: Directory, turn: int, members: Sequence[int], kept: Kept) -> None:
    """Replaces what is kept of a turn.

    Args:
      directory: the call's.
      turn: its number.
      members: `[m]`, which configurations were in it at the beginning.
      kept: what is known of them, in this order, and those that go on.

    Raises:
      TypeError: a state has a leaf that no checkpoint holds; the message names its path.
      OSError: it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     directory = opened(path, {"steps": ["3"]}, 64, lambda: ([], []))
    ...     write(directory, 0, [0, 1], Kept(2, {}, []))
    ...     sorted(file.name for file in directory.path.iterdir())
    ['call.packed', 'turn-0.packed']
    """
    from jaxopt_lab.checkpoint.packed import save_packed

    rows = {
        at: {"seen": row["seen"], "scores": _bits(row["scores"]), "metrics": {n: _bits(x) for n, x in row["metrics"].items()}}
        for at, row in kept.rows.items()
    }
    parts = [
        {
            "number": part.number,
            "indices": part.indices.astype(np.int32),
            "engine": [part.engine.width, part.engine.compiled],
            "traced": list(part.traced),
            "states": dict(zip(_paths(part.states), jax.tree.leaves(part.states), strict=True)),
        }
        for part in kept.parts
    ]
    tree = {"call": directory.call, "members": _numbers(members), "at": kept.at, "rows": rows, "parts": parts}
    save_packed(_file(directory, turn), tree, overwrite=True)


def read(directory: Directory, turn: int, members: Sequence[int], starts: Sequence[Start]) -> Kept | None:
    """What `write` kept of a turn, its arrays in the host's memory; None if it is not yet at a rung.

    Raises:
      ValueError: the file is damaged, or of another call.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     directory = opened(path, {"steps": ["3"]}, 64, lambda: ([], []))
    ...     write(directory, 0, [0], Kept(2, {2: {"seen": np.array([True]), "scores": np.array([0.1]), "metrics": {}}}, []))
    ...     read(directory, 1, [0], []), read(directory, 0, [0], []).rows[2]["scores"]
    (None, array([0.1]))
    """
    file = _file(directory, turn)
    if not file.exists():
        return None
    anew = f"delete {file}, and its members begin anew"
    tree = _loaded(file, f"{anew}, or put back a copy of it")
    own = isinstance(tree, dict) and (tree.get("call"), tree.get("members")) == (directory.call, _numbers(members))
    if not own:
        raise ValueError(f"{file} was not written by this call, though {directory.path} was begun by it; {anew}")
    rows = {
        at: {
            "seen": np.asarray(row["seen"]),
            "scores": _floats(row["scores"]),
            "metrics": {name: _floats(x) for name, x in row["metrics"].items()},
        }
        for at, row in tree["rows"].items()
    }
    parts = []
    for part in tree["parts"]:
        like = starts[part["number"]].state
        states = jax.tree.unflatten(jax.tree.structure(like), [part["states"][path] for path in _paths(like)])
        parts.append(Together(part["number"], np.asarray(part["indices"]), Engine(*part["engine"]), tuple(part["traced"]), states))
    return Kept(tree["at"], rows, parts)


def write_part(directory: Directory, members: Sequence[int], found: Result) -> None:
    """Keeps what became of members that were trained to the end.

    Args:
      directory: the call's.
      members: `[m]`, which configurations they are.
      found: their result, in this order.

    Raises:
      TypeError: a state has a leaf that no checkpoint holds; the message names its path.
      OSError: it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     directory = opened(path, {"steps": ["3"]}, 64, lambda: ([], []))
    ...     write_part(directory, [4], Result(np.array([0.1]), [None], (), np.array([[0.1]]), (3,), {}, 0, ("1 scanned",)))
    ...     read_parts(directory, [])[0][1].scores
    array([0.1])
    """
    from jaxopt_lab.checkpoint.packed import save_packed

    states = {k: dict(zip(_paths(s), jax.tree.leaves(s), strict=True)) for k, s in enumerate(found.states) if s is not None}
    tree = {
        "call": directory.call,
        "members": _numbers(members),
        "scores": _bits(found.scores),
        "curves": _bits(found.curves),
        "evaluated": _numbers(found.evaluated),
        "metrics": {name: _bits(x) for name, x in found.metrics.items()},
        "best": found.best,
        "engines": list(found.engines),
        "states": states,
    }
    save_packed(directory.path / f"part-{min(members)}.packed", tree, overwrite=True)


def read_parts(directory: Directory, starts: Sequence[Start]) -> list[tuple[list[int], Result]]:
    """What `write_part` kept.

    Args:
      directory: the call's.
      starts: its groups, of which the structure of each member's state is taken.

    Returns:
      Of each part its members, and what became of them, without their configurations, its arrays in the host's memory.

    Raises:
      ValueError: a file is damaged, or of another call.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     read_parts(opened(path, {"steps": ["3"]}, 64, lambda: ([], [])), [])
    []
    """
    states = {int(index): start.state for start in starts for index in start.group.indices}
    parts = []
    for file in sorted(directory.path.glob("part-*.packed")):
        anew = f"delete {file}, and its members are trained anew"
        tree = _loaded(file, f"{anew}, or put back a copy of it")
        if not isinstance(tree, dict) or tree.get("call") != directory.call:
            raise ValueError(f"{file} was not written by this call, though {directory.path} was begun by it; {anew}")
        members, kept = tree["members"], [None] * len(tree["members"])
        for k, leaves in tree["states"].items():
            like = states[members[k]]
            kept[k] = jax.tree.unflatten(jax.tree.structure(like), [_on_host(leaves[path]) for path in _paths(like)])
        metrics = {name: _floats(x) for name, x in tree["metrics"].items()}
        scores, curves, evaluated = _floats(tree["scores"]), _floats(tree["curves"]), tuple(tree["evaluated"])
        parts.append((members, Result(scores, kept, (), curves, evaluated, metrics, tree["best"], tuple(tree["engines"]))))
    return parts


def _file(directory: Directory, turn: int) -> Path:
    return directory.path / f"turn-{turn}.packed"


def _loaded(file: Path, remedy: str) -> Any:
    from jaxopt_lab.checkpoint.packed import load_packed

    try:
        host = jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        # Of several devices the first alone would have to hold everything; but JAX was told of no other.
        host = nullcontext()
    try:
        with host:
            return load_packed(file)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{error}; {remedy}") from error


def _differing(then: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> str:
    """The first of what differs, in words; nothing where all is the same."""
    for name in dict.fromkeys([*then, *now]):
        old, new = then.get(name, []), now.get(name, [])
        if len(old) != len(new):
            return f"{name} had {len(old)} entries and has {len(new)}"
        for k, (was, now_is) in enumerate(zip(old, new, strict=True)):
            if was != now_is:
                return f"{name}{f'[{k}]' if len(new) > 1 else ''} was {was[:_SHOWN]} and is {now_is[:_SHOWN]}"
    return ""


def _pairs(engines: Iterable[Engine]) -> list[list[Any]]:
    return [[engine.width, engine.compiled] for engine in engines]


def _numbers(members: Sequence[int]) -> list[int]:
    return [int(index) for index in members]


def _traced(start: Start, configs: Sequence[Any]) -> str:
    return ", ".join(start.group.member.paths(configs[start.group.indices[0]])) or "nothing"


def _paths(tree: PyTree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _text(tree: PyTree) -> str:
    """A tree in words: every number to the last bit, of arrays a digest."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is None)[0]
    return ", ".join(f"{jax.tree_util.keystr(path)} {_words(leaf)}".strip() for path, leaf in leaves)


def _words(value: Any) -> str:
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"{value.dtype} {_words(jax.random.key_data(value))}"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (jax.Array, np.ndarray)):
        array = np.ascontiguousarray(value)
        return f"{array.dtype}{list(array.shape)} of SHA-256 {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    # A function is known by its name alone: where it lies changes from process to process.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _on_host(leaf: Array) -> Any:
    """An array of NumPy, which goes to whatever device it is used on; a key, which that has none of, as it is."""
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else np.asarray(leaf)


def _bits(numbers: np.ndarray) -> np.ndarray:
    """Float64, which JAX holds only where it was told to, as what it does hold."""
    return np.ascontiguousarray(numbers, np.float64).view(np.uint32)


def _floats(bits: Array) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.float64)
