"""Blocks of batches: those of some steps as arrays with the steps in front, for a compiled loop over them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

__all__ = ["Block", "block"]


class Block(NamedTuple):
    """The batches of some steps.

    Attributes:
      batches: a tree of arrays `[k, ...]`.
      count: k.
      ahead: a later step and its batch, where one was drawn already that does not fit; for the next call of `block`.
    """

    batches: Any
    count: int
    ahead: tuple[int, Any] | None


def block(batches: Callable[[int], Any], step: int, count: int, ahead: tuple[int, Any] | None = None) -> Block:
    """The batches of the steps `step, step + 1, ...` in one, as far as their shapes agree.

    A block ends where a batch has another shape than the first. That one begins the next block, and is handed on to it, so that a
    function of one's own is asked for each batch once.

    Args:
      batches: `batches(step) -> batch`; its method `stack(step, k)`, if it has one, gives up to k of them at once.
      step: the first step.
      count: the most steps, at least 1.
      ahead: what an earlier block handed on, or any step with its batch.

    >>> sizes = [2, 2, 3]
    >>> first = block(lambda step: {"x": np.full(sizes[step], step)}, 0, 3)
    >>> first.batches["x"].tolist(), first.count, first.ahead
    ([[0, 0], [1, 1]], 2, (2, {'x': array([2, 2, 2])}))
    >>> block(None, 2, 1, first.ahead).batches["x"].tolist()
    [[2, 2, 2]]
    """
    if (stack := getattr(batches, "stack", None)) is not None:
        stacked = stack(step, count)
        leaves = jax.tree.leaves(stacked)
        return Block(stacked, len(leaves[0]) if leaves else count, None)
    each, shapes = [], None
    for at in range(step, step + count):
        batch = ahead[1] if ahead is not None and ahead[0] == at else batches(at)
        shape = jax.tree.map(np.shape, batch)
        if each and shape != shapes:
            return Block(_stacked(each), len(each), (at, batch))
        each.append(batch)
        shapes = shape
    return Block(_stacked(each), len(each), None)


def _stacked(each: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *each)
