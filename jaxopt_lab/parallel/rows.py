"""How the rows of a batch are dealt out to devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["split_rows"]


def split_rows(batch: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """A batch `[B, ...]` as `[parts, ceil(B / parts), ...]`, in order.

    Where `parts` does not divide `B`, the end is filled up with copies of row 0, and the entry "weight" says so: 0 for a copy, and
    what it was, or 1, for the others. Without padding no weight is added.

    Args:
      batch: every entry with the same leading axis; numpy stays numpy.
      parts: how many devices.

    Raises:
      ValueError: an entry has no batch axis or another length than "x"; the message names it.

    >>> split = split_rows({"x": np.array([5, 6, 7])}, 2)
    >>> split["x"].tolist(), split["weight"].tolist()
    ([[5, 6], [7, 5]], [[1.0, 1.0], [1.0, 0.0]])
    """
    if "x" not in batch:
        raise ValueError(f'a batch must have the entry "x"; this one has {", ".join(map(str, batch))}')
    rows = jnp.shape(jax.tree.leaves(batch["x"])[0])[:1]
    for name, value in batch.items():
        for leaf in jax.tree.leaves(value):
            if not rows or jnp.shape(leaf)[:1] != rows:
                raise ValueError(
                    f'entry "{name}" of the batch must have the leading axis {rows} of "x"; its shape is {jnp.shape(leaf)}'
                )
    missing = -rows[0] % parts
    batch = dict(batch)
    if missing:
        weight = batch.get("weight", np.ones(rows, np.float32))
        batch = {
            name: jax.tree.map(lambda v: _extended(v, v[:1], missing), value) for name, value in batch.items() if name != "weight"
        }
        batch["weight"] = _extended(weight, 0 * weight[:1], missing)
    return jax.tree.map(lambda v: v.reshape(parts, -1, *jnp.shape(v)[1:]), batch)


def _extended(rows: Any, row: Any, count: int) -> Any:
    xp = np if isinstance(rows, np.ndarray) else jnp
    return xp.concatenate([rows, xp.repeat(row, count, axis=0)])
