"""What the step hands to an optimiser, and what it refuses to take from one."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core.tree import flatten, paths
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.train.state import State

__all__ = ["check_shapes", "check_state", "floats", "taken", "value_function"]


def floats(function: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps over the floating leaves; integer codes and their gradients, which are of no numeric type, pass.

    >>> floats(lambda x: x + 1, {"scale": jnp.ones(1), "codes": jnp.ones(1, jnp.int8)})
    {'codes': Array([1], dtype=int8), 'scale': Array([2.], dtype=float32)}
    """

    def one(leaf, *others):
        return function(leaf, *others) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(one, tree, *rest)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def value_function(differentiate: Callable[[PyTree], tuple[tuple[Array, Any], PyTree]], own: PyTree) -> Callable[[PyTree], Array]:
    """The objective as a function of the parameters alone, for an optimiser that looks for it elsewhere, as a line search does.

    Its derivative is given by rule, since JAX's own of a sum over devices is one device's part. It is of the same numbers on every
    device, so that all of them search alike. Parameters that are masked out (`optax.masked`) are those of the state.

    Args:
      differentiate: `params -> ((value, anything), gradient)`.
      own: the parameters of the state.

    >>> value_fn = value_function(lambda w: ((w**2, None), 2 * w), jnp.float32(3.0))
    >>> float(value_fn(jnp.float32(2.0))), float(jax.grad(value_fn)(jnp.float32(2.0))), float(value_fn(optax.MaskedNode()))
    (4.0, 4.0, 9.0)
    """

    @jax.custom_jvp
    def value(params):
        return differentiate(params)[0][0]

    @value.defjvp
    def _(primals, tangents):
        (value, _), grads = differentiate(*primals)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(tangents), strict=True)
        slopes = [jnp.sum((g * t).real, dtype=value.dtype) for g, t in pairs if jnp.issubdtype(g.dtype, jnp.inexact)]
        return value, sum(slopes, jnp.zeros_like(value))

    def value_fn(params):
        return value(jax.tree.map(lambda given, whole: whole if _is_masked(given) else given, params, own, is_leaf=_is_masked))

    return value_fn


def taken(update: Callable, extra: dict[str, Any]) -> dict[str, Any]:
    """Those of the extra arguments that an optimiser's update takes; some that take any pass them on to one that does not.

    >>> taken(lambda updates, state, params=None, *, value: (updates, state), {"value": 1.0, "grad": 2.0})
    {'value': 1.0}
    """
    parameters = inspect.signature(update).parameters.values()
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {name: value for name, value in extra.items() if anything or name in {p.name for p in parameters}}


def _outline(state: Any) -> str:
    """The classes of an optimiser's state, without its arrays: `(ScaleByAdamState, EmptyState)`."""
    if isinstance(state, dict):
        parts = [f"{name}: {part}" for name, value in state.items() if (part := _outline(value))]
        return f"{{{', '.join(parts)}}}" if parts else ""
    if not isinstance(state, (tuple, list)) or _is_masked(state):
        return ""
    named = hasattr(state, "_fields")
    body = ", ".join(part for value in state if (part := _outline(value)))
    return (type(state).__name__ if named else "") + (f"({body})" if body or not named else "")


def check_state(tx: optax.GradientTransformation, state: State) -> None:
    """Refuses a state that another optimiser made: some take it without a word, and go on from the wrong numbers.

    Raises:
      ValueError: the optimiser's own state has another structure; the message has the classes of both, or the odd path.

    >>> state = State(jnp.ones(2), {}, optax.sgd(0.1).init(jnp.ones(2)), jnp.int32(0), jax.random.key(0))
    >>> check_state(optax.sgd(0.5), state)
    >>> check_state(optax.adam(0.5), state)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: the state's opt_state is (EmptyState, EmptyState), the optimiser's is (ScaleByAdamState, EmptyState); start from ...
    """
    try:
        own = jax.eval_shape(tx.init, state.params)
    except jax.errors.JAXTypeError:
        return  # Its start depends on values, which nobody knows while the step is traced.
    if jax.tree.structure(own) == jax.tree.structure(state.opt_state):
        return
    given, wanted = _outline(state.opt_state), _outline(own)
    if given == wanted:
        odd = sorted(set(paths(own)) ^ set(paths(state.opt_state)))
        given, wanted = f"of other parameters ({odd[0]})" if odd else "of other containers", "not"
    raise ValueError(
        f"the state's opt_state is {given[:200]}, the optimiser's is {wanted[:200]}; start from train.init with the step's own tx"
    )


def check_shapes(params: PyTree, updates: PyTree) -> None:
    """Refuses an update of another shape than its parameter, which would be broadcast onto it without a word.

    Raises:
      ValueError: there is one; the message has its path and both shapes.

    >>> check_shapes({"w": jnp.ones(4)}, {"w": jnp.ones((4, 1))})
    Traceback (most recent call last):
      ...
    ValueError: the optimiser's update of w has shape (4, 1), the parameter (4,)
    """
    for path, leaf, update in zip(*flatten(params)[:2], flatten(updates)[1], strict=True):
        for stored, moved in zip(jax.tree.leaves(leaf), jax.tree.leaves(update), strict=True):
            if jnp.shape(stored) != jnp.shape(moved):
                raise ValueError(
                    f"the optimiser's update of {path} has shape {jnp.shape(moved)}, the parameter {jnp.shape(stored)}"
                )
