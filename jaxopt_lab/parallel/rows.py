"""How the rows of a batch are dealt out to devices."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab.core.rows import count_rows, pad_rows
from jaxopt_lab.parallel.placement import put

__all__ = ["deal_rows", "feed", "join_rows", "pad_to", "split_rows"]

Batches = Callable[[int], Mapping[str, Any]]


def split_rows(batch: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """A batch `[B, ...]` as `[parts, ceil(B / parts), ...]`, in order.

    Where `parts` does not divide `B`, the end is filled up with copies of row 0, and the entry "weight" says so: 0 for a copy, and
    what it was, or 1, for the others. Without padding no weight is added.

    Args:
      batch: every entry with the same leading axis; numpy stays numpy.
      parts: how many devices.

    Raises:
      ValueError: an entry has no batch axis or another length than "x"; the message names it.

    >>> import numpy as np
    >>> split = split_rows({"x": np.array([5, 6, 7])}, 2)
    >>> split["x"].tolist(), split["weight"].tolist()
    ([[5, 6], [7, 5]], [[1.0, 1.0], [1.0, 0.0]])
    """
    return jax.tree.map(lambda v: v.reshape(parts, -1, *jnp.shape(v)[1:]), pad_to(batch, parts))


def pad_to(batch: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """A batch whose rows divide among `parts`, padded as `split_rows` says where they do not.

    >>> pad_to({"x": jnp.arange(3)}, 2)["weight"].tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    rows = count_rows(batch)
    return pad_rows(batch, rows + -rows % parts) if rows % parts else dict(batch)


def deal_rows(batch: Mapping[str, Any], mesh: Mesh, axes: tuple[str, ...]) -> dict[str, Any]:
    """A batch whose rows lie over some axes of a mesh, in order; they divide among its devices.

    >>> dealt = deal_rows({"x": np.arange(3)}, Mesh(jax.devices()[:1], ("data",)), ("data",))
    >>> dealt["x"].tolist()
    [0, 1, 2]
    """
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    return jax.tree.map(lambda v: put(v, sharding), dict(batch))


def join_rows(batch: Mapping[str, Any], mesh: Mesh, axes: tuple[str, ...], leading: int = 0) -> dict[str, Any]:
    """The rows of every process's batch as one that lies over all their devices, in the order of the mesh.

    Args:
      batch: this process's rows, `[..., b, ...]`; what lies over several processes already is theirs together.
      mesh, axes: over which axes of which mesh rows are dealt. Where these span no other process, its rows are all there are.
      leading: how many axes come before the rows.

    Raises:
      ValueError: the rows do not divide among the parts of this process. What others have it cannot know, so nothing is padded.

    >>> joined = join_rows({"x": np.arange(3)}, Mesh(jax.devices()[:1], ("data",)), ("data",))
    >>> joined["x"].tolist()
    [0, 1, 2]
    """
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * leading, axes))
    parts = math.prod(mesh.shape[axis] for axis in axes)
    held = NamedSharding(mesh, PartitionSpec(axes)).addressable_devices_indices_map((parts,)).values()
    here = len({index[0].start for index in held if index is not None})

    def one(name: str, value: Any) -> jax.Array:
        if not getattr(value, "is_fully_addressable", True):
            return put(value, sharding)
        rows = jnp.shape(value)[leading]
        if rows % here:
            raise ValueError(
                f'entry "{name}" of the batch has {rows} rows on process {jax.process_index()} (shape {jnp.shape(value)}), which '
                f"do not divide among its {here} parts; let parallel.local(batches) pad those of all processes"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(value))

    return {name: jax.tree.map(lambda v, name=name: one(name, v), value) for name, value in batch.items()}


def feed(batches: Batches, join: Callable[[Mapping[str, Any], int], dict[str, Any]]) -> Batches:
    """Batches of this process's rows as those of all; a method `stack` stays one.

    Args:
      batches: `step -> batch`.
      join: `(batch, leading) -> batch`, as `join_rows`.

    >>> feed(lambda step: {"x": step}, lambda batch, leading: {"x": -batch["x"]})(3)
    {'x': -3}
    """
    return (_StackingFeed if hasattr(batches, "stack") else _Feed)(batches, join)


class _Feed:
    def __init__(self, batches: Batches, join: Callable[[Mapping[str, Any], int], dict[str, Any]]):
        self._batches, self._join = batches, join

    def __call__(self, step: int) -> dict[str, Any]:
        return self._join(self._batches(step), 0)


class _StackingFeed(_Feed):
    def stack(self, step: int, count: int) -> dict[str, Any]:
        """The batches of the steps `step, step + 1, ...` as arrays `[k, B, ...]`; `k` may be less than `count`."""
        return self._join(self._batches.stack(step, count), 1)  # pyright: ignore[reportFunctionMemberAccess]
