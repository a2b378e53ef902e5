"""A batch worked through in parts, so that only one part's activations are held at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.rows import count_rows, pad_rows
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.train.update import floats

__all__ = ["deal", "part", "summed"]

Run = Callable[[Array, PyTree], tuple[tuple[Array, PyTree], PyTree]]


def deal(batch: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """The rows of a batch dealt out to `parts` parts like cards: row `i` is row `i // parts` of part `i % parts`.

    So every part takes its share of each device's rows where a batch is sharded over contiguous ones, and none moves. What is
    missing to equal parts is padding, as of `core.rows.pad_rows`.

    Returns:
      A batch whose entries are `[ceil(B / parts), parts, ...]`; it has the entry "weight" if there is padding.

    Raises:
      ValueError: as `core.rows.count_rows`: an entry has not the leading axis of "x".

    >>> import numpy as np
    >>> dealt = deal({"x": np.arange(5)}, 2)
    >>> dealt["x"].tolist(), dealt["weight"].tolist()
    ([[0, 1], [2, 3], [4, 0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    """
    each = -(-count_rows(batch) // parts)
    whole = batch if each * parts == count_rows(batch) else pad_rows(batch, each * parts)
    return jax.tree.map(lambda v: jnp.reshape(v, (each, parts, *jnp.shape(v)[1:])), dict(whole))


def part(dealt: Mapping[str, Any], index: Array | int) -> dict[str, Any]:
    """One of the parts that `deal` dealt, a batch of its own.

    >>> part({"x": jnp.array([[0, 1], [2, 3]])}, 1)
    {'x': Array([1, 3], dtype=int32)}
    """
    return jax.tree.map(lambda v: jax.lax.dynamic_index_in_dim(v, index, axis=1, keepdims=False), dict(dealt))


def summed(run: Run, parts: int, params: PyTree, model_state: PyTree, own: Callable[[Array], Array]):
    """The losses and gradients of all parts, summed in at least float32, and the model's state after the last one.

    Args:
      run: `(index, model_state) -> ((loss, model_state), gradient)` of one part; the gradient has the structure of `params`.
      parts: how many there are.
      params: the parameters, for shapes and types; integer ones, of compressed leaves, have no gradient.
      model_state: the model's state before the first part. Each part takes what the one before it left.
      own: marks an array as the device's own, as `jax.shard_map` wants the floats that a loop carries to be marked.

    Returns:
      `((loss, model_state), gradient)`, as `run` does.

    >>> run = lambda index, state: ((index * 2.0, state + 1), jnp.full(2, index, jnp.float32))
    >>> summed(run, 3, jnp.zeros(2), jnp.int32(0), lambda leaf: leaf)
    ((Array(6., dtype=float32), Array(3, dtype=int32)), Array([3., 3.], dtype=float32))
    """
    leaves, treedef = jax.tree.flatten(params)
    moving = [k for k, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def one(carry: tuple[list[Array], PyTree], index: Array) -> tuple[tuple[list[Array], PyTree], Array]:
        sums, before = carry
        (loss, after), grads = run(index, before)
        grads = jax.tree.leaves(grads)
        sums = [total + grads[k].astype(total.dtype) for total, k in zip(sums, moving, strict=True)]
        return floats(own, (sums, after)), loss

    zeros = [jnp.zeros_like(leaves[k], dtype=jnp.promote_types(leaves[k].dtype, jnp.float32)) for k in moving]
    (sums, model_state), losses = jax.lax.scan(one, floats(own, (zeros, model_state)), jnp.arange(parts))
    # The gradients of integer codes are of a type that no loop can carry.
    grads = [np.zeros(leaf.shape, jax.dtypes.float0) for leaf in leaves]
    for total, k in zip(sums, moving, strict=True):
        grads[k] = total.astype(leaves[k].dtype)
    return (losses.sum(), model_state), jax.tree.unflatten(treedef, grads)
