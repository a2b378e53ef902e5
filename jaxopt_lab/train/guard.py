"""What keeps a bad step from doing harm: the first leaf that is not finite is found, and the state stays what it was."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab.core.tree import flatten, paths
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.train.state import State

__all__ = ["all_finite", "first_nonfinite", "names", "offender", "select", "turned"]


def all_finite(tree: PyTree) -> Array:
    """Whether every floating or complex number of a tree is finite; bool, shape `[]`. Integers, keys and empty arrays are.

    >>> bool(all_finite({"w": jnp.ones(2), "codes": jnp.zeros(2, jnp.int8)})), bool(all_finite(jnp.array([0, jnp.inf])))
    (True, False)
    """
    finite = jnp.bool_(True)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            finite &= jnp.isfinite(leaf).all()
    return finite


def first_nonfinite(*trees: PyTree) -> Array:
    """The index of the first leaf that is not finite, counted through all the trees in order; -1 if there is none.

    A compressed leaf counts as one. `names` tells what each index stands for.

    Returns:
      int32, shape `[]`.

    >>> grads = {"bias": jnp.ones(2), "kernel": jnp.array([1, jnp.nan])}
    >>> int(first_nonfinite(jnp.float32(1), grads)), int(first_nonfinite(jnp.float32(1)))
    (2, -1)
    """
    finite = jnp.stack([all_finite(leaf) for tree in trees for leaf in flatten(tree)[1]])
    return jnp.where(finite.all(), -1, jnp.argmin(finite)).astype(jnp.int32)


def turned(new: PyTree, old: PyTree) -> PyTree:
    """What has become of an optimiser's state: of each leaf the new numbers, and zero for those that were not finite before.

    Some optimisers hold an infinity on purpose, such as the best value that was not yet seen.

    >>> turned({"best": jnp.array([jnp.inf, jnp.inf])}, {"best": jnp.array([jnp.inf, 1.0])})
    {'best': Array([ 0., inf], dtype=float32)}
    """

    def one(now: Any, before: Any) -> Any:
        if now is before or not jnp.issubdtype(getattr(now, "dtype", int), jnp.inexact):
            return now
        return jnp.where(jnp.isfinite(before), now, 0)

    return jax.tree.map(one, new, old)


def select(keep: Array, new: PyTree, old: PyTree) -> PyTree:
    """Each leaf of `new` where `keep`, else of `old`, bit for bit: a choice element by element, which fuses with what made `new`.

    >>> select(jnp.bool_(False), {"w": jnp.array([jnp.nan])}, {"w": jnp.array([1.0])})
    {'w': Array([1.], dtype=float32)}
    """
    return jax.tree.map(lambda now, before: now if now is before else jnp.where(keep, now, before), new, old)


def names(state: State) -> list[str]:
    """What the metric "nonfinite" of a guarded step counts, in its order: loss, gradients, model state, parameters,
    the optimiser's state.

    Only the structure of the state is read, and that of any state of the run will do.

    >>> names(State({"w": 0.0}, {"batch_stats": {"mean": 0.0}}, (), 0, None))
    ['loss', 'gradient of w', 'model_state batch_stats/mean', 'parameter w']
    """
    parameters = [path or "(the only one)" for path in paths(state.params)]
    return [
        "loss",
        *(f"gradient of {path}" for path in parameters),
        *(f"model_state {path}" for path in paths(state.model_state)),
        *(f"parameter {path}" for path in parameters),
        *(f"opt_state {path}" for path in paths(state.opt_state)),
    ]


def offender(state: State, index: Any) -> str:
    """The name of the first thing that was not finite in a step, as its metric "nonfinite" has it.

    Args:
      state: any state of the run; no array of it is read, so it may have been donated.
      index: the metric, a number; -1, of a step in which all was finite, is "nothing".

    Raises:
      ValueError: the index is none of this state's.

    >>> state = State({"Dense_0": {"bias": 0.0, "kernel": 0.0}}, {}, (), 0, None)
    >>> offender(state, 2), offender(state, 0), offender(state, -1)
    ('gradient of Dense_0/kernel', 'loss', 'nothing')
    """
    index, known = int(index), names(state)
    if not -1 <= index < len(known):
        raise ValueError(f"nonfinite={index} is not of this state, of which {len(known)} things are looked at (and -1 is nothing)")
    return "nothing" if index == -1 else known[index]
