"""The pair of pure functions that a model is, and how Flax's two worlds and bare functions become one."""

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import flax.linen as nn

from jaxopt_lab.core.tree import flatten, is_compressed
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.nets.batch_statistics import moments, row_mask

__all__ = ["Model", "from_functions", "from_linen", "from_nnx"]


class Model(NamedTuple):
    """A model as pure functions of its variables `{"params": ..., <state collections>}`.

    Attributes:
      init: `init(key, *inputs) -> variables`.
      apply: `apply(variables, *inputs, train=False, key=None, axis_name=None, weight=None) -> (outputs, new_state)`. `new_state`
        holds the collections other than `params`, empty if there are none; in evaluation it comes back as it was. In training `key`
        feeds dropout, batch statistics are those of all devices along `axis_name`, and rows whose `weight` (`[B]`) is 0 do not
        count in them.
      predict: `predict(variables, *inputs) -> outputs`, in evaluation.

    Both take dense arrays: on a tree with compressed leaves they raise a TypeError, and `compress.lift(model.predict)` is the same
    function of it.
    """

    init: Callable[..., PyTree]
    apply: Callable[..., tuple[Any, PyTree]]
    predict: Callable[..., Any]


def _model(init, apply) -> Model:
    @functools.wraps(apply)
    def dense(variables, *inputs, **keywords):
        # Inside a lift the leaves are tracers that pass for dense arrays.
        for path, leaf in zip(*flatten(variables)[:2], strict=True):
            if is_compressed(leaf):
                raise TypeError(f"{path} is stored as {type(leaf).__name__}; call compress.lift(model.predict), or .apply, on it")
        return apply(variables, *inputs, **keywords)

    def predict(variables, *inputs):
        return dense(variables, *inputs)[0]

    return Model(init, dense, predict)


def _state(variables: PyTree) -> dict:
    return {name: value for name, value in variables.items() if name != "params"}


def _keywords(function: Callable) -> tuple[set[str], bool]:
    """The names of the parameters of `function`, and whether it takes any keyword."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def from_linen(module: nn.Module) -> Model:
    """A Flax Linen module as a pair of pure functions.

    The mode goes into whichever of `train`, `deterministic` and `use_running_average` the module's `__call__` names. Every
    collection of random numbers (`dropout` or any other name) draws from the one `key`; Flax folds the layer's path and a count
    into it. In training every `nn.BatchNorm` inside computes the statistics of the whole batch: all devices of `axis_name` (unless
    the module names its own axis, which it keeps) and no padding.

    Args:
      module: an unbound module; its `__call__` takes the inputs and, by keyword, the mode.

    Raises:
      TypeError: `module` is not a Linen module.

    >>> import jax
    >>> model = from_linen(nn.Sequential([nn.Dense(3), nn.relu]))
    >>> variables = model.init(jax.random.key(0), jax.numpy.ones((1, 2)))
    >>> model.predict(variables, jax.numpy.ones((5, 2))).shape
    (5, 3)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"from_linen takes a flax.linen module; got {type(module).__name__} (from_nnx and from_functions take others)"
        )
    names, _ = _keywords(type(module).__call__)

    def mode(train: bool) -> dict[str, Any]:
        values = {"train": train, "deterministic": not train, "use_running_average": not train}
        return {name: value for name, value in values.items() if name in names}

    def init(key, *inputs):
        return module.init(key, *inputs, **mode(False))

    def apply(variables, *inputs, train=False, key=None, axis_name=None, weight=None):
        # Flax falls back on the "params" stream for any collection it was given no key for: one key serves every name.
        rngs = {} if key is None else {"params": key}
        state = _state(variables)
        if not train:
            return module.apply(variables, *inputs, rngs=rngs, mutable=False, **mode(False)), state
        whole_batch = (
            nullcontext() if axis_name is None and weight is None else nn.intercept_methods(_whole_batch(axis_name, weight))
        )
        with whole_batch:
            outputs, new_state = module.apply(variables, *inputs, rngs=rngs, mutable=list(state), **mode(True))
        return outputs, {**state, **new_state}

    return _model(init, apply)


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
        x, mask = call["x"], call.get("mask")
        if weight is not None:
            rows = row_mask(weight, x)
            mask = rows if mask is None else rows & mask.astype(bool)
        features = {axis % x.ndim for axis in (layer.axis if isinstance(layer.axis, (tuple, list)) else (layer.axis,))}
        batch = moments(
            x,
            [axis for axis in range(x.ndim) if axis not in features],
            mask=mask,
            axis_name=layer.axis_name or axis_name,
            axis_index_groups=layer.axis_index_groups,
            fast=layer.use_fast_variance,
        )
        running = [layer.get_variable("batch_stats", name) for name in ("mean", "var")]
        for name, value in zip(("mean", "var"), batch, strict=True):
            layer.put_variable("batch_stats", name, value)
        # A mode fixed in the constructor may not be given again in the call: it is put aside on the bound instance of this very
        # call.
        object.__setattr__(layer, "use_running_average", None)
        try:
            outputs = next_function(x, use_running_average=True)
        finally:
            object.__setattr__(layer, "use_running_average", fixed)
        for name, old, new in zip(("mean", "var"), running, batch, strict=True):
            layer.put_variable("batch_stats", name, layer.momentum * old + (1 - layer.momentum) * new)
        return outputs

    return interceptor


def from_nnx(module: Any) -> Model:
    """A Flax NNX module as a pair of pure functions; NNX is imported here and not before.

    Variables are `{"params": <pure dict of nnx.Param>, "state": <pure dict of the rest>}`, the latter left out when there is none.
    The mode is set by the module's own `train()` and `eval()`. Random streams hold no state: in each call every one of them
    restarts from its own `fold_in` of `key`.

    Args:
      module: a constructor `(nnx.Rngs) -> module`, whose `init(key, ...)` draws weights from the key; or an instance, which is not
        changed and whose own present weights `init` returns, whatever the key.

    >>> import jax
    >>> from flax import nnx
    >>> model = from_nnx(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
    >>> jax.tree.map(jax.numpy.shape, model.init(jax.random.key(0)))
    {'params': {'bias': (3,), 'kernel': (2, 3)}}
    """
    from jaxopt_lab.nets import nnx_pair

    return _model(*nnx_pair.pair(module))


def from_functions(init: Callable[..., PyTree], apply: Callable[..., Any], *, stateful: bool = False) -> Model:
    """Bare pure functions as a model.

    Args:
      init: `init(key, *inputs) -> params`.
      apply: `apply(params, *inputs, ...) -> outputs`; of the keywords `train`, `key`, `axis_name` and `weight` it gets those that
        its signature names.
      stateful: `init` gives whole variables `{"params": ..., <state collections>}`, and `apply` takes them and returns
        `(outputs, new_state)`.

    >>> import jax
    >>> def init(key, x):
    ...     return {"w": jax.random.normal(key, (x.shape[-1],))}
    >>> model = from_functions(init, lambda params, x: x @ params["w"])
    >>> variables = model.init(jax.random.key(0), jax.numpy.ones((1, 2)))
    >>> model.predict(variables, jax.numpy.ones((5, 2))).shape
    (5,)
    """
    names, any_keyword = _keywords(apply)

    def whole_init(key, *inputs):
        made = init(key, *inputs)
        if stateful and "params" not in made:
            raise ValueError(f'a stateful init must return {{"params": ..., <state>}}; it returned {sorted(made)}')
        return made if stateful else {"params": made}

    def whole_apply(variables, *inputs, train=False, key=None, axis_name=None, weight=None):
        given = {"train": train, "key": key, "axis_name": axis_name, "weight": weight}
        known = {name: value for name, value in given.items() if any_keyword or name in names}
        if not stateful:
            return apply(variables["params"], *inputs, **known), _state(variables)
        outputs, new_state = apply(variables, *inputs, **known)
        return outputs, new_state if train else _state(variables)

    return _model(whole_init, whole_apply)
