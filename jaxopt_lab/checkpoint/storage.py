"""One tree in one directory, as Orbax stores it: its arrays under numbers, its structure in a manifest beside them."""

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from jaxopt_lab.checkpoint import manifest
from jaxopt_lab.core.types import PyTree

__all__ = ["check", "load_tree", "pack", "read_arrays", "read_manifest", "restore_args", "save_tree", "unpack"]

_NOTHING = "nothing"  # Orbax refuses a tree without arrays; this one stands for it.


def pack(tree: PyTree, classes: Sequence[type] = (), metadata: dict[str, Any] | None = None) -> ocp.args.Composite:
    """The Orbax arguments that store a tree.

    Names stay in the manifest, since Orbax stores `{"a": {"b": x}}` and `{"a.b": x}` in one place. Arrays without elements,
    which it does not store, live there alone.

    >>> pack({"a": {"b": np.ones(2, np.float32)}}).tree.item
    {'000000': array([1., 1.], dtype=float32)}
    """
    structure, arrays = manifest.describe(tree, classes)
    return ocp.args.Composite(
        tree=ocp.args.PyTreeSave(
            {_key(i): array for i, array in enumerate(arrays) if array.size} or {_NOTHING: np.zeros(1, np.int8)}
        ),
        manifest=ocp.args.JsonSave({**structure, "metadata": metadata or {}}),
    )


def restore_args(structure: dict[str, Any]) -> ocp.args.PyTreeRestore:
    """The Orbax arguments that read the arrays of a manifest as numpy, wherever they were when they were saved.

    >>> restore_args(manifest.describe({"a": np.ones(2, np.int8)})[0]).item
    {'000000': 0}
    """
    names = [_key(i) for i, record in enumerate(structure["arrays"]) if 0 not in record["shape"]] or [_NOTHING]
    return ocp.args.PyTreeRestore(
        item=dict.fromkeys(names, 0), restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    )


def read_manifest(restore: Callable[[ocp.args.Composite], Any], source: str) -> dict[str, Any]:
    """The manifest of a checkpoint, through Orbax's `restore` of it; a ValueError of one line if there is none that can be read.

    >>> read_manifest(lambda args: {"manifest": [1]}, "step 3")
    Traceback (most recent call last):
      ...
    ValueError: step 3 has no readable manifest: it lists no arrays
    """
    try:
        structure = restore(ocp.args.Composite(manifest=ocp.args.JsonRestore()))["manifest"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source} has no readable manifest: {_first_line(error)}") from error
    if not isinstance(structure, dict) or not isinstance(structure.get("arrays"), list):
        raise ValueError(f"{source} has no readable manifest: it lists no arrays")
    return structure


def read_arrays(restore: Callable[[ocp.args.Composite], Any], structure: dict[str, Any], source: str) -> dict[str, Any]:
    """The arrays of a manifest as they were read, through Orbax's `restore`; a ValueError of one line if any cannot be.

    >>> def restore(args):
    ...     raise ValueError("truncated, and then\\nmany lines")
    >>> read_arrays(restore, {"arrays": []}, "step 3")
    Traceback (most recent call last):
      ...
    ValueError: step 3 has unreadable arrays: truncated, and then
    """
    try:
        return restore(ocp.args.Composite(tree=restore_args(structure)))["tree"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source} has unreadable arrays: {_first_line(error)}") from error


def check(structure: dict[str, Any], stored: dict[str, Any], source: str) -> list[Any]:
    """The arrays of a manifest in order, out of those that were read; a ValueError names those that do not fit.

    >>> structure, _ = manifest.describe({"a": np.ones(2, np.int8)})
    >>> check(structure, {}, "step 3")
    Traceback (most recent call last):
      ...
    ValueError: step 3 does not fit its manifest: a: missing
    """
    arrays = [
        np.zeros(record["shape"], record["dtype"]) if 0 in record["shape"] else stored.get(_key(i))
        for i, record in enumerate(structure["arrays"])
    ]
    manifest.check_arrays(structure, arrays, source)
    return arrays


def unpack(structure: dict[str, Any], stored: dict[str, Any], source: str, classes: Sequence[type] = ()) -> PyTree:
    """The tree of a manifest and the arrays that were read for it.

    >>> structure, arrays = manifest.describe({"a": np.ones(2, np.int8)})
    >>> unpack(structure, {"000000": arrays[0]}, "step 3")
    {'a': Array([1, 1], dtype=int8)}
    """
    return manifest.rebuild(structure, check(structure, stored, source), classes)


def save_tree(path: str | os.PathLike, tree: PyTree, *, overwrite: bool = False, classes: Sequence[type] = ()) -> None:
    """Writes one tree into one directory, whole or not at all.

    Args:
      path: the directory; its parent is made if need be.
      tree: what `manifest.describe` takes: parameters with compressed leaves, optimiser states, keys, Python scalars.
      overwrite: whether a directory that is there already is replaced.
      classes: the caller's own NamedTuples and dataclasses in the tree.

    Raises:
      FileExistsError: `path` exists and `overwrite` is False.
      TypeError: something in the tree cannot be stored; the message names its path.
      OSError: the parent directory cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_tree(directory + "/model", {"kernel": np.ones(2, np.float32), "steps": 3})
    ...     load_tree(directory + "/model")
    {'kernel': Array([1., 1.], dtype=float32), 'steps': 3}
    """
    final = Path(path).absolute()
    if final.exists() and not overwrite:
        raise FileExistsError(f"{final} exists; pass overwrite=True to replace it")
    arguments = pack(tree, classes)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent, ignore_cleanup_errors=True) as beside:
        written = Path(beside) / "new"
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler("tree", "manifest")) as checkpointer:
            checkpointer.save(written, arguments)
        if final.exists():
            os.replace(final, Path(beside) / "old")
        try:
            os.replace(written, final)
        except BaseException:
            if (Path(beside) / "old").exists():
                os.replace(Path(beside) / "old", final)
            raise


def load_tree(path: str | os.PathLike, *, classes: Sequence[type] = ()) -> PyTree:
    """Reads the tree of a directory that `save_tree` wrote (or of one step of `Checkpoints`), without a target.

    Args:
      path: the directory.
      classes: the caller's own NamedTuples and dataclasses in the tree; others outside `manifest.ALLOWED_PACKAGES` are refused.

    Returns:
      The tree as it was, its arrays (numpy ones too) as JAX arrays on the default device.

    Raises:
      FileNotFoundError: there is no such tree.
      TypeError: the tree holds a class that is not allowed.
      ValueError: the manifest or an array is missing or damaged, or the arrays do not fit their manifest.

    >>> load_tree("/nowhere")
    Traceback (most recent call last):
      ...
    FileNotFoundError: /nowhere holds no tree that save_tree wrote
    """
    directory = Path(path).absolute()
    if not (directory / "manifest").is_dir():
        raise FileNotFoundError(f"{directory} holds no tree that save_tree wrote")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler("tree", "manifest")) as checkpointer:
        restore = functools.partial(checkpointer.restore, directory)
        structure = read_manifest(restore, str(directory))
        stored = read_arrays(restore, structure, str(directory))
    return unpack(structure, stored, str(directory), classes)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _key(index: int) -> str:
    return f"{index:06d}"
