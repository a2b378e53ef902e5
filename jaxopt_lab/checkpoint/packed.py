"""One tree in one file, its arrays entropy-coded: the smallest form, for handing on.

    magic [16]   bytes of the payload [8]   bytes of the manifest [8]   SHA-256 of both [32]   payload   manifest

The manifest is JSON, deflated by zlib: the structure of the tree, and for each array its sections `[coded, bytes]`; the payload is
those sections in order. Where the planes of packed codes are coded together, the sections of the first hold the codes and the
others have none. Numbers are little-endian. Nothing is unpickled, and for what a file claims to hold nothing larger than eight
times the file is allocated, or 256 times its manifest.
"""

import hashlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_lab.checkpoint import manifest
from jaxopt_lab.compress import storage
from jaxopt_lab.compress.arrays import packing
from jaxopt_lab.core.types import PyTree

__all__ = ["load_packed", "save_packed"]

_MAGIC = b"jaxopt_lab\x00tree\x02"
_HEAD = struct.Struct("<16sQQ32s")
_UNFIT = (ValueError, LookupError, AttributeError, OverflowError, RecursionError, zlib.error)
_PACKED = f"{packing.Packed.__module__}:{packing.Packed.__qualname__}"


def save_packed(path: str | os.PathLike, tree: PyTree, *, overwrite: bool = False, classes: Sequence[type] = ()) -> None:
    """Writes one tree into one file, entropy-coded where that is shorter, whole or not at all.

    Args:
      path: the file; its parent is made if need be.
      tree: what `manifest.describe` takes: parameters with compressed leaves, optimiser states, keys, Python scalars.
      overwrite: whether a file that is there already is replaced.
      classes: the caller's own NamedTuples and dataclasses in the tree.

    Raises:
      FileExistsError: `path` exists and `overwrite` is False.
      TypeError: something in the tree cannot be stored; the message names its path.
      OSError: the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_packed(directory + "/model.packed", {"kernel": np.ones(2, np.float32), "steps": 3})
    ...     load_packed(directory + "/model.packed")
    {'kernel': Array([1., 1.], dtype=float32), 'steps': 3}
    """
    final = Path(path).absolute()
    if final.is_dir() or (final.exists() and not overwrite):
        hint = "is a directory" if final.is_dir() else "exists; pass overwrite=True to replace it"
        raise FileExistsError(f"{final} {hint}")
    structure, arrays = manifest.describe(tree, classes)
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.parent / f".{final.name}.{secrets.token_hex(8)}"
    try:
        with open(beside, "xb") as file:
            file.write(bytes(_HEAD.size))
            digest, nbytes, sections = hashlib.sha256(), 0, []
            # An array at a time, so that the whole payload is never in memory.
            for array in _together(structure, arrays):
                own = [] if array is None else storage.to_sections(array)
                sections.append([[section.coded, len(section.data)] for section in own])
                for section in own:
                    digest.update(section.data)
                    nbytes += file.write(section.data)
            text = json.dumps({**structure, "sections": sections}, allow_nan=False, separators=(",", ":")).encode()
            text = zlib.compress(text, 9)
            digest.update(text)
            file.write(text)
            file.seek(0)
            file.write(_HEAD.pack(_MAGIC, nbytes, len(text), digest.digest()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, final)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_packed(path: str | os.PathLike, *, classes: Sequence[type] = ()) -> PyTree:
    """Reads the tree of a file that `save_packed` wrote, without a target, and verifies its digest first.

    Args:
      path: the file.
      classes: the caller's own NamedTuples and dataclasses in the tree; others outside `manifest.ALLOWED_PACKAGES` are refused.

    Returns:
      The tree as it was, its arrays (numpy ones too) as JAX arrays on the default device.

    Raises:
      FileNotFoundError: there is no such file.
      TypeError: the tree holds a class that is not allowed.
      ValueError: the file is of another kind, truncated or damaged, or its parts do not fit each other.

    >>> load_packed("/nowhere")
    Traceback (most recent call last):
      ...
    FileNotFoundError: /nowhere is no file that save_packed wrote
    """
    final = Path(path).absolute()
    if not final.is_file():
        raise FileNotFoundError(f"{final} is no file that save_packed wrote")
    data = memoryview(final.read_bytes())
    if len(data) < _HEAD.size or bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise ValueError(f"{final} is no file that save_packed wrote")
    _, nbytes, header, digest = _HEAD.unpack_from(data)
    if len(data) != (whole := _HEAD.size + nbytes + header):
        raise ValueError(f"{final} has {len(data)} bytes and was written with {whole}: it is truncated or damaged")
    if hashlib.sha256(data[_HEAD.size :]).digest() != digest:
        raise ValueError(f"{final} is damaged: it is not what its SHA-256 says")
    unfit = f"{final} has no manifest that fits its arrays"
    try:
        structure = json.loads(_inflated(data[_HEAD.size + nbytes :]))
        arrays = _arrays(structure, data[_HEAD.size : _HEAD.size + nbytes])
    except (*_UNFIT, TypeError) as error:
        raise ValueError(f"{unfit}: {_first_line(error)}") from error
    try:
        return manifest.rebuild(structure, arrays, classes)
    except _UNFIT as error:
        raise ValueError(f"{unfit}: {_first_line(error)}") from error


def _inflated(data: memoryview) -> bytes:
    inflate = zlib.decompressobj()
    text = inflate.decompress(data, 256 * len(data))
    if not inflate.eof:
        raise ValueError(f"{len(data)} bytes do not end within {256 * len(data)} inflated ones")
    return text


def _packed(node: Any) -> Iterator[tuple[list[int], dict[str, int]]]:
    """The packed codes of a manifest: the numbers of their planes, and their bits, axis and width."""
    match node:
        case {"dataclass": name, "fields": {"planes": {"tuple": planes}}, "static": static} if name == _PACKED:
            yield [plane["array"] for plane in planes], static
        case dict() | list():
            for child in node.values() if isinstance(node, dict) else node:
                yield from _packed(child)


def _together(structure: dict[str, Any], arrays: Sequence[Any]) -> list[Any]:
    """The arrays, with the codes in place of the first of their planes and None for the others where they are coded together."""
    out = list(arrays)
    for planes, static in _packed(structure["tree"]):
        codes = storage.codes_together(packing.Packed(tuple(arrays[i] for i in planes), **static))
        if codes is not None:
            for i in planes:
                out[i] = codes if i == planes[0] else None
    return out


def _arrays(structure: Any, payload: memoryview) -> list[Any]:
    """The arrays that a manifest lists, out of the payload."""
    if not isinstance(structure, dict) or not all(isinstance(structure.get(name), list) for name in ("arrays", "sections")):
        raise ValueError("it lists no arrays")
    records, stored, begin = structure["arrays"], [], 0
    for record, sections in zip(records, structure["sections"], strict=True):
        sizes = [nbytes for _, nbytes in sections]
        if not all(type(n) is int and n >= 0 for n in [*record["shape"], *sizes]):
            raise ValueError(f"{record['path']} has the shape {record['shape']} and sections of {sizes} bytes")
        ends = begin + np.cumsum([0, *sizes])
        stored.append([storage.Section(bool(s[0]), bytes(payload[a:b])) for s, a, b in zip(sections, ends, ends[1:], strict=False)])
        begin = int(ends[-1])
    if begin != len(payload):
        raise ValueError(f"its sections are of {begin} bytes, and there are {len(payload)}")
    shapes, dtypes = [list(record["shape"]) for record in records], [_dtype(record["dtype"]) for record in records]
    together = [(planes, static) for planes, static in _packed(structure["tree"]) if not all(stored[i] for i in planes)]
    for planes, static in together:
        shapes[planes[0]][static["axis"]] = static["width"]
        for i in planes[1:]:
            shapes[i], stored[i] = [0], [storage.Section(False, b"")]
    arrays: list[Any] = storage.from_sections(stored, [tuple(shape) for shape in shapes], dtypes)
    for planes, static in together:
        packed = packing.pack(arrays[planes[0]], static["bits"], static["axis"])
        for i, plane in zip(planes, packed.planes, strict=True):
            arrays[i] = plane
    return arrays


def _dtype(name: Any) -> np.dtype:
    """A dtype of numbers by its name alone: never one of objects, or of fields."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = np.dtype(object)
    if str(dtype) != name or not dtype.isnative or not (dtype.kind == "b" or jnp.issubdtype(dtype, np.number)):
        raise ValueError(f"{str(name)[:40]!r} is no dtype of an array")
    return dtype


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
