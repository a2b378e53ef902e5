"""How the rows of a batch are dealt out to devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab.core.rows import count_rows, pad_rows

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

    >>> import numpy as np
    >>> split = split_rows({"x": np.array([5, 6, 7])}, 2)
    >>> split["x"].tolist(), split["weight"].tolist()
    ([[5, 6], [7, 5]], [[1.0, 1.0], [1.0, 0.0]])
    """
    rows = count_rows(batch)
    whole = pad_rows(batch, rows + -rows % parts) if rows % parts else dict(batch)
    return jax.tree.map(lambda v: v.reshape(parts, -1, *jnp.shape(v)[1:]), whole)
