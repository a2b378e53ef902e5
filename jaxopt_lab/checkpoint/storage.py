"""One tree in one directory, as Orbax stores it: its arrays under numbers, its structure in a manifest beside them."""

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxopt_lab.checkpoint import digests, manifest
from jaxopt_lab.checkpoint.digests import Damaged
from jaxopt_lab.core import files
from jaxopt_lab.core.types import PyTree

__all__ = [
    "TURN",
    "check",
    "check_stored",
    "detached",
    "handler",
    "load_tree",
    "pack",
    "read_arrays",
    "read_manifest",
    "restore_args",
    "save_tree",
    "sharding_of",
    "unpack",
]

TURN = threading.Lock()
"""Held by whoever saves. Orbax numbers its saves by one counter for the whole process, and of two that begin at the same time one
may wait for the directories of the other, or not wait for its own."""

_NOTHING = "nothing"  # Orbax refuses a tree without arrays; this one stands for it.
_MANIFEST = "metadata"  # The file in the folder "manifest".


def handler() -> ocp.CompositeCheckpointHandler:
    """Orbax's handler of what `pack` gives.

    >>> type(handler()).__name__
    'CompositeCheckpointHandler'
    """
    return ocp.CompositeCheckpointHandler(
        tree=ocp.PyTreeCheckpointHandler(), manifest=ocp.JsonCheckpointHandler(filename=_MANIFEST)
    )


def pack(
    tree: PyTree, classes: Sequence[type] = (), metadata: dict[str, Any] | None = None, **beside: dict[str, Any]
) -> ocp.args.Composite:
    """The Orbax arguments that store a tree, its metadata, and what else is JSON.

    Names stay in the manifest, since Orbax stores `{"a": {"b": x}}` and `{"a.b": x}` in one place. Arrays without elements,
    which it does not store, live there alone.

    >>> pack({"a": {"b": np.ones(2, np.float32)}}).tree.item
    {'000000': array([1., 1.], dtype=float32)}
    """
    structure, arrays = manifest.describe(tree, classes)
    if jax.process_count() > 1:
        # What each process has for itself is the same in all of them, and Orbax takes it from the first as numpy alone.
        arrays = [np.asarray(x) if isinstance(x, jax.Array) and x.is_fully_addressable else x for x in arrays]
    return ocp.args.Composite(
        tree=ocp.args.PyTreeSave(
            {_key(i): array for i, array in enumerate(arrays) if array.size} or {_NOTHING: np.zeros(1, np.int8)}
        ),
        manifest=ocp.args.JsonSave({**structure, "metadata": metadata or {}, **beside}),
    )


def detached(arguments: ocp.args.Composite) -> ocp.args.Composite | None:
    """The same arguments with copies of their arrays on the host, which nobody else writes to; None where they had to be gathered.

    Orbax takes longer to start a save than a small state takes to copy. Given copies it may do so in a thread, while the training
    goes on and donates what it has saved. Arrays in parts on several devices, or processes, stay there, and Orbax copies each part.

    >>> copies = detached(pack({"a": jax.numpy.arange(2), "b": np.zeros(2, np.int8)}))
    >>> copies.tree.item
    {'000000': array([0, 1], dtype=int32), '000001': array([0, 0], dtype=int8)}
    """
    arrays = arguments.tree.item
    spread = any(isinstance(x, jax.Array) and not x.is_fully_replicated for x in arrays.values())
    if spread or jax.process_count() > 1:
        return None
    for x in arrays.values():
        if _on_device(x):
            x.copy_to_host_async()
    copies = {name: np.asarray(x) if _on_device(x) else np.array(x) for name, x in arrays.items()}
    return ocp.args.Composite(tree=ocp.args.PyTreeSave(copies), manifest=arguments.manifest)


def _on_device(x: Any) -> bool:
    """Whether what numpy sees of an array is a copy anyway."""
    if not isinstance(x, jax.Array):
        return False
    return x.sharding.memory_kind in (None, "device") and all(device.platform != "cpu" for device in x.devices())


def restore_args(structure: dict[str, Any], shardings: Sequence[jax.sharding.Sharding | None] = ()) -> ocp.args.PyTreeRestore:
    """The Orbax arguments that read the arrays of a manifest: where a sharding is given each device its shards, others as numpy.

    >>> restore_args(manifest.describe({"a": np.ones(2, np.int8)})[0]).item
    {'000000': 0}
    """
    wanted = dict(zip(_keys(structure), shardings or [None] * len(structure["arrays"]), strict=True))
    names = [name for name, record in zip(wanted, structure["arrays"], strict=True) if 0 not in record["shape"]]
    whole = ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.args.PyTreeRestore(
        item=dict.fromkeys(names or [_NOTHING], 0),
        restore_args={
            name: whole if (sharding := wanted.get(name)) is None else ocp.ArrayRestoreArgs(sharding=sharding)
            for name in names or [_NOTHING]
        },
        partial_restore=True,
    )


def sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
    """On which devices an array of a target lies, if it was put there: None for one on the default device, and for numpy's.

    A typed key's is that of its key data.

    >>> sharding_of(jax.numpy.ones(3)), sharding_of(np.ones(3))
    (None, None)
    """
    if isinstance(leaf, jax.Array):
        if not leaf.committed:
            return None
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return (jax.random.key_data(leaf) if is_key else leaf).sharding
    return getattr(leaf, "sharding", None)


def read_manifest(directory: Path, source: str) -> dict[str, Any]:
    """The manifest of a checkpoint; a ValueError of one line if there is none that can be read.

    >>> read_manifest(Path("/nowhere"), "step 3")
    Traceback (most recent call last):
      ...
    ValueError: step 3 has no readable manifest: [Errno 2] No such file or directory: '/nowhere/manifest/metadata'
    """
    try:
        structure = files.read_json(directory / "manifest" / _MANIFEST)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} has no readable manifest: {_first_line(error)}") from error
    if not isinstance(structure, dict) or not isinstance(structure.get("arrays"), list):
        raise ValueError(f"{source} has no readable manifest: it lists no arrays")
    return structure


def check_stored(directory: Path, structure: dict[str, Any], source: str) -> None:
    """Raises `Damaged` if an array in the files says that it is another than the manifest does; none is read.

    Args:
      directory: the checkpoint's.
      structure: its manifest, or a part of it.
      source: what to call it in an error.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_tree(directory + "/a", {"kernel": np.ones(2, np.float32)})
    ...     check_stored(Path(directory) / "a", manifest.describe({"kernel": np.ones(3, np.float32)})[0], "step 3")
    Traceback (most recent call last):
      ...
    jaxopt_lab.checkpoint.digests.Damaged: step 3 does not fit its manifest: kernel: expected float32(3,), found float32(2,)
    """
    try:
        stored = ocp.PyTreeCheckpointHandler().metadata(directory / "tree").tree
        found = [
            (tuple(entry.shape), str(entry.dtype)) if entry is not None else None for entry in map(stored.get, _keys(structure))
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} has unreadable arrays: {_first_line(error)}") from error
    empty = [0 in record["shape"] for record in structure["arrays"]]  # These are not stored.
    expected = [(tuple(record["shape"]), record["dtype"]) for record in structure["arrays"]]
    wrong = manifest.differences(structure, [want if none else got for none, want, got in zip(empty, expected, found, strict=True)])
    if wrong:
        raise Damaged(manifest.unfit(wrong, source))


def read_arrays(
    directory: Path, structure: dict[str, Any], source: str, shardings: Sequence[jax.sharding.Sharding | None] = ()
) -> dict[str, Any]:
    """The arrays of a manifest as they were read; a ValueError of one line if any cannot be, or is another before it is read.

    Args:
      directory: the checkpoint's.
      structure: its manifest, or a part of it.
      source: what to call it in an error.
      shardings: where each array shall go; None, or none at all, is numpy.

    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_tree(directory + "/a", {"kernel": np.ones(2, np.float32)})
    ...     read_arrays(Path(directory) / "a", read_manifest(Path(directory) / "a", "a"), "a")
    {'000000': array([1., 1.], dtype=float32)}
    """
    check_stored(directory, structure, source)
    # One sharded over the devices is read by each of them; others go to theirs once they are here.
    spread = [None if s is None or s.num_devices == 1 else s for s in shardings]
    try:
        with ocp.Checkpointer(handler(), multiprocessing_options=_for_itself()) as checkpointer:
            return checkpointer.restore(directory, ocp.args.Composite(tree=restore_args(structure, spread)))["tree"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source} has unreadable arrays: {_first_line(error)}") from error


def _for_itself() -> ocp.options.MultiprocessingOptions:
    """Has Orbax read in this process as if there were no others: after it has read it would wait for them without an end."""
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"of{here}")


def check(structure: dict[str, Any], stored: dict[str, Any], source: str) -> list[Any]:
    """The arrays of a manifest in order, out of those that were read; a ValueError names those that do not fit.

    >>> structure, _ = manifest.describe({"a": np.ones(2, np.int8)})
    >>> check(structure, {}, "step 3")
    Traceback (most recent call last):
      ...
    ValueError: step 3 does not fit its manifest: a: missing
    """
    arrays = [
        np.zeros(record["shape"], record["dtype"]) if 0 in record["shape"] else stored.get(name)
        for name, record in zip(_keys(structure), structure["arrays"], strict=True)
    ]
    manifest.check_arrays(structure, arrays, source)
    return arrays


def unpack(
    structure: dict[str, Any],
    stored: dict[str, Any],
    source: str,
    classes: Sequence[type] = (),
    shardings: Sequence[jax.sharding.Sharding | None] = (),
) -> PyTree:
    """The tree of a manifest and the arrays that were read for it; those with a sharding go there.

    >>> structure, arrays = manifest.describe({"a": np.ones(2, np.int8)})
    >>> unpack(structure, {"000000": arrays[0]}, "step 3")
    {'a': Array([1, 1], dtype=int8)}
    """
    arrays = check(structure, stored, source)
    placed = [
        x if s is None or isinstance(x, jax.Array) else jax.make_array_from_callback(x.shape, s, x.__getitem__)
        for x, s in zip(arrays, shardings or [None] * len(arrays), strict=True)
    ]
    return manifest.rebuild(structure, placed, classes)


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
        with TURN, ocp.Checkpointer(handler()) as checkpointer:
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
    """Reads the tree of a directory that `save_tree` wrote (or of one step of `Checkpoints`, which is verified), without a target.

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
    if os.path.lexists(directory / digests.NAME):
        digests.check(directory, str(directory))
    structure = read_manifest(directory, str(directory))
    return unpack(structure, read_arrays(directory, structure, str(directory)), str(directory), classes)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _key(index: int) -> str:
    return f"{index:06d}"


def _keys(structure: dict[str, Any]) -> list[str]:
    """What each array is called in the files."""
    return [_key(i) for i in structure.get("numbers", range(len(structure["arrays"])))]
