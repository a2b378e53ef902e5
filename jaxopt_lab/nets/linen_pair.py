"""Flax Linen modules as `init` and `apply`: every module inside is told the mode, and batch statistics are the whole batch's."""

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import flax.linen as nn

from jaxopt_lab.core.types import Array
from jaxopt_lab.nets.batch_statistics import layer_moments, running_average

__all__ = ["MODES", "pair"]

MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "update_stats": True,
    "deterministic": False,
    "use_running_average": False,
}
"""The keywords by which a call is told the mode, and what each is in training."""

_TRAINING = "jaxopt_lab: training"
"""A collection that nobody has. `nn.jit` keeps what it traced by the mutable collections, so that with it each mode has its own."""


def pair(module: nn.Module) -> tuple[Callable, Callable]:
    """The functions `init` and `apply` of an unbound module; see `nets.from_linen`.

    Raises:
      TypeError: `module` is not a Linen module.

    >>> import jax
    >>> init, apply = pair(nn.Sequential([nn.Dense(3), nn.Dropout(0.5)]))
    >>> outputs, state = apply(init(jax.random.key(0), jax.numpy.ones((5, 2))), jax.numpy.ones((5, 2)))
    >>> outputs.shape, state
    ((5, 3), {})
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"from_linen takes a flax.linen module; got {type(module).__name__} (from_nnx and from_functions take others)"
        )

    def init(key, *inputs):
        with nn.intercept_methods(_telling(train=False)):
            return module.init(key, *inputs)

    def apply(variables, *inputs, train=False, key=None, axis_name=None, weight=None):
        # Flax falls back on the "params" stream for any collection it was given no key for: one key serves every name.
        rngs = {} if key is None else {"params": key}
        state = {name: value for name, value in variables.items() if name != "params"}
        with ExitStack() as stack:
            stack.enter_context(nn.intercept_methods(_telling(train=train)))
            if not train:
                return module.apply(variables, *inputs, rngs=rngs, mutable=False), state
            if axis_name is not None or weight is not None:
                stack.enter_context(nn.intercept_methods(_whole_batch(axis_name, weight)))
            outputs, new_state = module.apply(variables, *inputs, rngs=rngs, mutable=[*state, _TRAINING])
        return outputs, {**state, **new_state}

    return init, apply


def _telling(*, train: bool):
    """An interceptor that tells the mode to each module that takes one and was not told by its caller.

    A caller that takes a mode itself and leaves a module to its default has decided so. One that takes none (`nn.Sequential`, say,
    or a block that someone wrote without dropout in mind) could not tell.
    """
    callers: list[nn.Module] = []

    def interceptor(next_function, args, kwargs, context):
        if context.method_name != "__call__":
            return next_function(*args, **kwargs)
        knowing = bool(callers) and bool(_modes(type(callers[-1])))
        told = {name: MODES[name] == train for name in _untold(context.module, args, kwargs, knowing)}
        callers.append(context.module)
        try:
            return next_function(*args, **kwargs, **told)
        finally:
            callers.pop()

    return interceptor


@lru_cache(maxsize=1024)
def _modes(kind: type) -> dict[str, Any]:
    """The keywords of `MODES` that the call of a class names, each with its default."""
    parameters = inspect.signature(kind.__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name in MODES}


def _untold(layer: nn.Module, args: tuple, kwargs: dict, knowing: bool) -> list[str]:
    """The keywords of the mode that a call left out, and that neither a constructor nor a knowing caller has decided."""
    modes = _modes(type(layer))
    if not modes:
        return []
    try:
        given = inspect.signature(type(layer).__call__).bind_partial(layer, *args, **kwargs).arguments
    except TypeError:
        return []  # The call itself says what is wrong with it.
    fields = {field.name for field in dataclasses.fields(layer)}

    def decided(name: str) -> bool:
        if modes[name] not in (None, inspect.Parameter.empty):
            return knowing
        # Flax's own layers have no default here, and fail unless their constructor or their call says it.
        return name in fields and getattr(layer, name) is not None

    return [name for name in modes if name not in given and not decided(name)]


def _whole_batch(axis_name: str | None, weight: Array | None):
    """An interceptor that has `nn.BatchNorm` normalise by the statistics of the whole batch.

    Flax's own synchronisation averages the devices' masked means, which is wrong once devices hold unequal numbers of unmasked
    rows. So the statistics are computed here and handed over in the place of the running ones, which the layer then normalises by.
    """

    def interceptor(next_function, args, kwargs, context):
        layer = context.module
        if not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__" or layer.is_initializing():
            return next_function(*args, **kwargs)
        call = inspect.signature(nn.BatchNorm.__call__).bind(layer, *args, **kwargs).arguments
        given, fixed = call.get("use_running_average"), layer.use_running_average
        if given or fixed:
            return next_function(*args, **kwargs)
        x, names = call["x"], ("mean", "var")
        batch = layer_moments(layer, x, call.get("mask"), weight=weight, axis_name=axis_name)
        running = [layer.get_variable("batch_stats", name) for name in names]
        for name, value in zip(names, batch, strict=True):
            layer.put_variable("batch_stats", name, value)
        # A mode fixed in the constructor may not be given again in the call: it is put aside on the bound instance of this very
        # call.
        object.__setattr__(layer, "use_running_average", None)
        try:
            outputs = next_function(x, use_running_average=True)
        finally:
            object.__setattr__(layer, "use_running_average", fixed)
        for name, old, new in zip(names, running, batch, strict=True):
            layer.put_variable("batch_stats", name, running_average(layer, old, new))
        return outputs

    return interceptor
