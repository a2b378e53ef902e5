"""Whether a run that is resumed is the run that was begun: its programs by their digests, its settings field by field."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.tracing.fingerprint import Fingerprint, fingerprint
from jaxopt_lab.core.types import PyTree
from jaxopt_lab.train.state import on_leaves

__all__ = ["changed_programs", "changed_settings", "plain", "programs"]

_AXIS_SIZE = 1


def programs(step: Callable, state: PyTree, batch: PyTree) -> dict[str, dict[str, Any]]:
    """Digests of the programs of a run, as JSON: of the "optimiser", where the step names its own, and of the whole "step".

    They are those of the step on one device, so that a run may move to others.

    Args:
      step: a pure `(state, batch) -> (state, metrics)`, or what `parallel` made of one.
      state, batch: of one call of it.

    >>> sorted(programs(lambda state, batch: (state + batch, {}), jnp.zeros(2), jnp.ones(2)))
    ['step']
    """
    return {name: dataclasses.asdict(fingerprint(call, *args)) for name, (call, args) in _calls(step, state, batch).items()}


def changed_programs(seen: Mapping[str, Mapping[str, Any]], step: Callable, state: PyTree, batch: PyTree) -> list[str]:
    """Which of the programs that `programs` saw are others now; what another version of JAX saw is not compared.

    >>> seen = programs(lambda state, batch: (state + batch, {}), jnp.zeros(2), jnp.ones(2))
    >>> changed_programs(seen, lambda state, batch: (state - batch, {}), jnp.zeros(2), jnp.ones(2))
    ['step']
    """
    calls, changed = _calls(step, state, batch), []
    for name, fields in seen.items():
        then = Fingerprint(**{**fields, "shapes": tuple(map(tuple, fields["shapes"]))})
        if then.jax != jax.__version__ or name not in calls:
            continue
        call, args = calls[name]
        if not then.meets(*args) or then.differs(call, *args):
            changed.append(name)
    return changed


def _calls(step: Callable, state: PyTree, batch: PyTree) -> dict[str, tuple[Callable, tuple]]:
    """The programs, each as a function of a list of arrays first, since a compressed leaf is several of them."""
    inner = getattr(step, "step", step)
    leaves, structure = jax.tree.flatten(jax.tree.map(_outline, state))
    batch = jax.tree.map(_outline, batch)
    if isinstance(batch, Mapping) and "x" in batch:
        # Ragged ends alone have weights, and so it is with devices that do not divide a batch: the program is told with them.
        batch = {**batch, "weight": jax.ShapeDtypeStruct(jax.tree.leaves(batch["x"])[0].shape[:1], jnp.float32)}

    def whole(leaves: Sequence[Any], batch: PyTree) -> PyTree:
        given = jax.tree.unflatten(structure, leaves)
        if getattr(inner, "axis_name", None) is None:
            return inner(given, batch)
        rows = jax.tree.map(lambda x: x[None], batch)
        return jax.vmap(inner, in_axes=(None, 0), axis_name=inner.axis_name, axis_size=_AXIS_SIZE)(given, rows)

    found = {"step": (whole, (leaves, batch))}
    if (tx := getattr(inner, "tx", None)) is not None:
        tx = on_leaves(tx, state.params)
        started = jax.tree.map(_outline, (state.params, state.opt_state))
        leaves, tree = jax.tree.flatten(started)

        def update(leaves: Sequence[Any]) -> PyTree:
            params, opt_state = jax.tree.unflatten(tree, leaves)
            grads = jax.tree.map(_gradient, params)
            value = jnp.float32(0)
            return tx.update(grads, opt_state, params, value=value, grad=grads, value_fn=lambda params: value)

        found["optimiser"] = (update, (leaves,))
    return found


def _gradient(leaf: Any) -> Any:
    """What stands for a leaf's gradient: itself, or of integer codes what JAX has for them."""
    return leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else np.zeros(leaf.shape, jax.dtypes.float0)


def _outline(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def plain(settings: Any, name: str = "config") -> Any:
    """Settings as JSON: a dataclass or a dict of numbers, strings, paths, None, and lists, tuples, dicts and dataclasses of them.

    Raises:
      TypeError: one is of another kind; the message names it.
      ValueError: one is NaN or infinite, which JSON cannot hold.

    >>> plain({"rate": 0.1, "widths": (64, 32)})
    {'rate': 0.1, 'widths': [64, 32]}
    >>> plain({"rate": float("nan")})
    Traceback (most recent call last):
      ...
    ValueError: config.rate is nan, which no file of settings can hold
    """
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if isinstance(settings, Mapping):
        return {str(key): plain(value, f"{name}.{key}") for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [plain(value, f"{name}[{k}]") for k, value in enumerate(settings)]
    if isinstance(settings, os.PathLike):
        return os.fspath(settings)
    if settings is None or isinstance(settings, (bool, int, str)):
        return settings
    if isinstance(settings, float):
        if settings - settings != 0:
            raise ValueError(f"{name} is {settings}, which no file of settings can hold")
        return settings
    raise TypeError(
        f"{name} is a {type(settings).__name__}; settings are numbers, strings, paths, None, and lists and dicts of them"
    )


def changed_settings(then: Any, now: Any, name: str = "config") -> list[str]:
    """What differs between two settings as `plain` gives them, in words.

    >>> changed_settings({"rate": 0.1, "seed": 0}, {"rate": 0.2, "seed": 0})
    ['config.rate was 0.1 and is 0.2']
    """
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return [
            line for key in dict.fromkeys([*then, *now]) for line in changed_settings(then.get(key), now.get(key), f"{name}.{key}")
        ]
    return [] if then == now else [f"{name} was {then!r} and is {now!r}"]
