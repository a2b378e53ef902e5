"""The training that a hypergradient goes through: batches in a stack, a step of one type, and the loop with its checkpoints."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.data.blocks import block
from jaxopt_lab.search.grouping import strong
from jaxopt_lab.search.trial import takes_config

__all__ = ["Problem", "outer_of", "paths_of", "square_root", "stacked", "step_of", "unroll"]


class Problem(NamedTuple):
    """A training, and what it is judged by.

    Attributes:
      step: `(state, batch, hyper) -> state` of the same types.
      outer: `(state, hyper) -> scalar`.
      init: `hyper -> state`.
      batches: a tree of arrays `[steps, ...]`.
      steps: how many.
    """

    step: Callable[[PyTree, Any, PyTree], PyTree]
    outer: Callable[[PyTree, PyTree], Array]
    init: Callable[[PyTree], PyTree]
    batches: PyTree
    steps: int

    def part(self, begin: int, end: int) -> PyTree:
        """The batches of the steps `begin, ..., end - 1`."""
        return jax.tree.map(lambda x: x[begin:end], self.batches)


def unroll(problem: Problem, state: PyTree, hyper: PyTree, batches: PyTree, steps: int, segments: tuple[int, ...] = ()) -> PyTree:
    """The state after `steps` steps.

    Args:
      problem: whose step is taken.
      state: where to start.
      hyper: the hyper-parameters.
      batches: `[steps, ...]`.
      steps: how many.
      segments: into how many parts the steps are cut, these again, and so on. What a part computes is computed again on the way
        back, instead of kept; only the states between parts are. A rest that is shorter is a part of its own.

    >>> problem = Problem(lambda w, batch, hyper: w + hyper * batch, lambda w, hyper: w, lambda hyper: 0.0, jnp.arange(5.0), 5)
    >>> unroll(problem, jnp.float32(0), jnp.float32(2), problem.batches, 5, segments=(2,))
    Array(20., dtype=float32)
    """

    def advance(state, batches, steps, segments):
        if not segments or steps <= 1:
            return jax.lax.scan(lambda state, batch: (problem.step(state, batch, hyper), None), state, batches, steps)[0]
        count = min(segments[0], steps)
        length = steps // count
        whole = count * length

        def part(state, batches):
            return advance(state, batches, length, segments[1:]), None

        blocks = jax.tree.map(lambda x: x[:whole].reshape(count, length, *x.shape[1:]), batches)
        # Within a loop the computation cannot be merged with its repetition anyway.
        state, _ = jax.lax.scan(jax.checkpoint(part, prevent_cse=False), state, blocks, count)
        if whole == steps:
            return state
        rest = jax.tree.map(lambda x: x[whole:], batches)
        return jax.checkpoint(lambda state, batches: advance(state, batches, steps - whole, segments[1:]))(state, rest)

    return advance(state, batches, steps, segments)


def step_of(inner_step: Callable[..., Any], state: PyTree) -> Callable[[PyTree, Any, PyTree], PyTree]:
    """A step that returns a state of the types that it was given, without metrics.

    Raises, when called:
      ValueError: the state changes its structure, or a leaf its shape or type; the message names its path.

    >>> step = step_of(lambda w, batch, hyper: (w - hyper * batch, {"loss": w}), jnp.float32(1))
    >>> step(jnp.float32(1), 2.0, 0.25)
    Array(0.5, dtype=float32)
    """
    names, before = paths_of(state), jax.tree.leaves(state)
    treedef = jax.tree.structure(state)

    def step(state, batch, hyper):
        out = inner_step(state, batch, hyper)
        if jax.tree.structure(out) != treedef and isinstance(out, tuple) and len(out) == 2:
            out = out[0]
        if jax.tree.structure(out) != treedef:
            odd = sorted(set(paths_of(out)) ^ set(names))
            raise ValueError(
                f"inner_step changes the structure of the state{f' at {odd[0]}' if odd else ''}; "
                "it must return a state like the one that it was given, or (state, metrics)"
            )
        leaves = []
        for name, was, now in zip(names, before, jax.tree.leaves(out), strict=True):
            then, here = (f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in (was, now))
            if then != here:
                raise ValueError(f"inner_step makes {name or 'the state'} {here}; it was given {then}")
            leaves.append(strong(now))
        return jax.tree.unflatten(treedef, leaves)

    return step


def outer_of(outer_loss: Callable[..., Any]) -> Callable[[PyTree, PyTree], Array]:
    """The outer loss as a function of state and hyper-parameters, checked to be a scalar.

    Raises, when called:
      ValueError: it is no real scalar.

    >>> outer_of(lambda state: state**2)(jnp.float32(3), {"rate": 0.1})
    Array(9., dtype=float32)
    """
    both = takes_config(outer_loss)

    def outer(state, hyper):
        value = jnp.asarray(outer_loss(state, hyper) if both else outer_loss(state))
        if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"outer_loss must return one float; got {value.dtype}{list(value.shape)}; take a mean over examples")
        return value

    return outer


def stacked(batches: Any, steps: int) -> PyTree:
    """Batches as arrays `[steps, ...]`.

    Args:
      batches: `batches(step) -> batch`, whose method `stack(step, k)`, if it has one, gives k of them at once; or the arrays.
      steps: how many.

    Raises:
      ValueError: batches of different sizes, or arrays with another number of steps.

    >>> stacked(lambda step: {"x": np.full(2, step)}, 3)["x"].tolist()
    [[0, 0], [1, 1], [2, 2]]
    >>> stacked({"x": np.zeros((4, 2))}, 3)
    Traceback (most recent call last):
      ...
    ValueError: batches: x has the shape (4, 2), and there are 3 steps; give one batch a step
    """
    if not callable(batches):
        for name, leaf in zip(paths_of(batches), jax.tree.leaves(batches), strict=True):
            if jnp.shape(leaf)[:1] != (steps,):
                where = f"batches: {name}" if name else "batches"
                raise ValueError(f"{where} has the shape {jnp.shape(leaf)}, and there are {steps} steps; give one batch a step")
        return batches
    blocks, at, ahead = [], 0, None
    while at < steps:
        found = block(batches, at, steps - at, ahead)
        blocks.append(found.batches)
        at, ahead = at + found.count, found.ahead
    shapes = [jax.tree.map(lambda x: np.shape(x)[1:], each) for each in blocks]
    if odd := next((k for k, shape in enumerate(shapes) if shape != shapes[0]), 0):
        raise ValueError(f"batches must all have one size; the first has {shapes[0]}, another {shapes[odd]}")
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *blocks)


def paths_of(whole: PyTree) -> list[str]:
    """The "/"-joined paths of the leaves of any tree.

    >>> paths_of({"a": (1.0, 2.0)})
    ['a/0', 'a/1']
    """
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(whole)]


def square_root(steps: int) -> int:
    """How many segments of about as many steps; where it can be, a number that leaves no rest, which would compile once more.

    >>> square_root(400), square_root(500), square_root(401)
    (20, 20, 20)
    """
    root = max(1, round(math.sqrt(steps)))
    divisors = [k for k in range(max(2, root // 2), 2 * root) if steps % k == 0]
    return min(divisors, key=lambda k: abs(k - root), default=root)
