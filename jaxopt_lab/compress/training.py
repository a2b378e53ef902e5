"""Any Optax transform on a tree with compressed leaves: only what a leaf declares as trained is moved."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import PyTree

__all__ = ["merge", "optimizer", "trainable"]


def trainable(params: PyTree) -> PyTree:
    """The part of a tree that trains: each compressed leaf is replaced by a dict of its trained fields, which may be empty.

    Works alike for parameters, gradients and updates. A tree without compressed leaves comes back as it is.

    >>> from jaxopt_lab.compress.quantized import quantize
    >>> trainable(quantize({"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, where="kernel"))
    {'bias': Array([0., 0.], dtype=float32), 'kernel': {}}
    """
    return jax.tree.map(_fields, params, is_leaf=tree.is_compressed)


def merge(params: PyTree, trained: PyTree) -> PyTree:
    """`params` with its trained part replaced: the inverse of `trainable`.

    >>> from jaxopt_lab.compress.quantized import quantize
    >>> params = quantize({"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, where="kernel")
    >>> merge(params, {"bias": jnp.ones(2), "kernel": {}})["bias"]
    Array([1., 1.], dtype=float32)
    """
    return jax.tree.map(lambda leaf, new: _rebuild(leaf, new, lambda x: x), params, trained, is_leaf=tree.is_compressed)


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Makes any transform respect compressed leaves: frozen fields stay as they are, and decay acts on latent weights only.

    `tx` sees what `trainable` shows: plain leaves, and the trained fields of compressed ones (`**/kernel/**` is their glob).
    The updates that come out have the structure of the whole tree, with zeros in each field's own dtype where nothing moves, so
    `optax.apply_updates` leaves integer codes bit for bit. Without compressed leaves it is exactly `tx`, state included.

    A trained field that is not a latent weight (a scale, a factor) is shown to `tx` with the value 0, so a decay has nothing to
    pull on. A transform that builds its iterates from the parameters themselves, such as `schedule_free`, needs the true value:
    it suits plain leaves and latent weights only.

    Args:
      tx: any Optax transform. Extra arguments pass through; `grad` and other trees of gradients are reduced like the gradients,
        and a `value_fn` is called on the whole tree.

    Raises:
      ValueError: at an update of a tree with compressed leaves, when `params` is not given.

    >>> from jaxopt_lab.compress.lift import lift
    >>> from jaxopt_lab.compress.quantized import quantize
    >>> params = quantize({"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, where="kernel")
    >>> grads = jax.grad(lift(lambda p: (p["kernel"] @ p["bias"]).sum() + p["bias"].sum()), allow_int=True)(params)
    >>> tx = optimizer(optax.sgd(0.5))
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> params["bias"], params["kernel"].codes.dtype
    (Array([-1.5, -1.5], dtype=float32), dtype('int8'))
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> Any:
        return tx.init(_shown(params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        if not tree.any_compressed(updates):
            return tx.update(updates, state, params, **extra)
        if params is None:
            raise ValueError("compress.optimizer needs the parameters to update compressed leaves: update(grads, state, params)")
        structure = jax.tree.structure(updates)
        reduced = {name: _reduce_extra(name, value, params, structure) for name, value in extra.items()}
        moved, state = tx.update(trainable(updates), state, _shown(params), **reduced)
        whole = jax.tree.map(lambda leaf, new: _rebuild(leaf, new, jnp.zeros_like), params, moved, is_leaf=tree.is_compressed)
        return whole, state

    return optax.GradientTransformationExtraArgs(init, update)


def _trains(leaf: Any) -> tuple[str, ...]:
    return getattr(type(leaf), "trains", ())


def _fields(leaf: Any) -> Any:
    return {name: getattr(leaf, name) for name in _trains(leaf)} if tree.is_compressed(leaf) else leaf


def _shown(params: PyTree) -> PyTree:
    """The trained part with zeros for what must not decay."""

    def show(leaf: Any) -> Any:
        if not tree.is_compressed(leaf):
            return leaf
        latent = getattr(type(leaf), "latent", None)
        return {name: value if name == latent else jnp.zeros_like(value) for name, value in _fields(leaf).items()}

    return jax.tree.map(show, params, is_leaf=tree.is_compressed)


def _rebuild(leaf: Any, new: Any, otherwise: Callable[[Any], Any]) -> Any:
    """`leaf` with its trained fields taken from the dict `new`, and `otherwise` of every other array."""
    if not tree.is_compressed(leaf):
        return new
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(leaf)
    fields = [new.get(path[0].name, None) if len(path) == 1 else None for path, _ in with_paths]
    return jax.tree.unflatten(
        treedef, [otherwise(old) if field is None else field for (_, old), field in zip(with_paths, fields, strict=True)]
    )


def _reduce_extra(name: str, value: Any, params: PyTree, structure: Any) -> Any:
    if name == "value_fn" and callable(value):
        return lambda trained, *args, **kwargs: value(merge(params, trained), *args, **kwargs)
    return trainable(value) if not inspect.isroutine(value) and jax.tree.structure(value) == structure else value
