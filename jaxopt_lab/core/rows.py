"""What a batch is to every step: its inputs, its rows, and the padding that is weighed at nothing."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["count_rows", "inputs", "pad_rows"]


def inputs(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """The inputs of a batch in the order in which a model takes them: its entry "x", a tuple where there are several.

    Raises:
      ValueError: the batch is no dict, or has no "x".

    >>> inputs({"x": 1, "y": 2}), inputs({"x": (1, 2)})
    ((1,), (1, 2))
    """
    if not isinstance(batch, Mapping) or "x" not in batch:
        has = ", ".join(map(str, batch)) or "nothing" if isinstance(batch, Mapping) else f"type {type(batch).__name__}"
        raise ValueError(f'a batch must be a dict with the entry "x"; this one has {has}')
    return batch["x"] if isinstance(batch["x"], tuple) else (batch["x"],)


def count_rows(batch: Mapping[str, Any]) -> int:
    """How many rows a batch has: the leading axis of "x", which every other entry must share.

    Raises:
      ValueError: there is no "x", or an entry has no such axis; the message names it.

    >>> count_rows({"x": np.ones((3, 2)), "y": np.zeros(3)})
    3
    """
    rows = jnp.shape(jax.tree.leaves(inputs(batch))[0])[:1]
    for name, value in batch.items():
        for leaf in jax.tree.leaves(value):
            if not rows or jnp.shape(leaf)[:1] != rows:
                raise ValueError(
                    f'entry "{name}" of the batch must have the leading axis {rows} of "x"; its shape is {jnp.shape(leaf)}'
                )
    return rows[0]


def pad_rows(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The batch with `rows` rows: copies of the first one are added, and "weight" is 0 for them.

    Args:
      batch: entries are arrays or trees of them, `[B, ...]` each with one B of at least 1; numpy stays numpy.
      rows: at least B. The entry "weight" of the others is what it was, or 1.

    Raises:
      ValueError: as `count_rows`.

    >>> padded = pad_rows({"x": np.array([5, 6])}, 3)
    >>> padded["x"].tolist(), padded["weight"].tolist()
    ([5, 6, 5], [1.0, 1.0, 0.0])
    """
    missing = rows - count_rows(batch)
    weighted = {"weight": np.ones(rows - missing, np.float32), **batch}
    if not missing:
        return weighted

    def extended(value: Any, row: Any) -> Any:
        xp = np if isinstance(value, np.ndarray) else jnp
        return xp.concatenate([value, xp.repeat(row, missing, axis=0)])

    longer = {name: jax.tree.map(lambda v: extended(v, v[:1]), value) for name, value in weighted.items() if name != "weight"}
    return {**longer, "weight": extended(weighted["weight"], 0 * weighted["weight"][:1])}
