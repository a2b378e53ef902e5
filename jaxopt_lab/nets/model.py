"""The pair of pure functions that a model is, and how Flax's two worlds and bare functions become one."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from jaxopt_lab.core.tree import flatten, is_compressed
from jaxopt_lab.core.types import PyTree
from jaxopt_lab.nets import linen_pair

__all__ = ["Model", "check_model", "from_functions", "from_linen", "from_nnx", "predictor"]


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

    The mode goes into whichever of `train`, `training`, `is_training`, `deterministic`, `use_running_average` and `update_stats`
    the module's `__call__` names. A module that names none (`nn.Sequential`, or a block of one's own) is no obstacle: the modules
    that it calls without a mode are told it in its stead. One that shall never train says so, in its constructor
    (`nn.Dropout(0.5, deterministic=True)`) or where it is called (`self.backbone(x, train=False)`).

    Every collection of random numbers (`dropout` or any other name) draws from the one `key`; Flax folds the layer's path and a
    count into it. In training every `nn.BatchNorm` inside computes the statistics of the whole batch: all devices of `axis_name`
    (unless the module names its own axis, which it keeps) and no padding.

    Args:
      module: an unbound module; its `__call__` takes the inputs.

    Raises:
      TypeError: `module` is not a Linen module.

    >>> import jax
    >>> model = from_linen(nn.Sequential([nn.Dense(3), nn.BatchNorm(), nn.relu, nn.Dropout(0.5)]))
    >>> variables = model.init(jax.random.key(0), jax.numpy.ones((1, 2)))
    >>> model.predict(variables, jax.numpy.ones((5, 2))).shape
    (5, 3)
    """
    return _model(*linen_pair.pair(module))


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
      apply: `apply(params, *inputs, ...) -> outputs`; of the keywords `train`, `key`, `axis_name` and `weight`, and the other
        names that `from_linen` knows for the mode, it gets those that its signature names.
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
        known |= {name: value == train for name, value in linen_pair.MODES.items() if name in names}
        if not stateful:
            return apply(variables["params"], *inputs, **known), _state(variables)
        outputs, new_state = apply(variables, *inputs, **known)
        return outputs, new_state if train else _state(variables)

    return _model(whole_init, whole_apply)


def check_model(model: Any) -> None:
    """Raises a TypeError in one line, with the way out, unless `model` is a `Model`.

    >>> check_model(nn.Dense(3))
    Traceback (most recent call last):
      ...
    TypeError: model must be a Model; this Dense becomes one by nets.from_linen(model)
    """
    if not isinstance(model, Model):
        raise TypeError(f"model must be a Model; this {type(model).__name__} becomes one by {_way(model)}")


def predictor(model: Any) -> Callable[..., Any]:
    """`predict(variables, *inputs) -> outputs`: that of a `Model`, or a function as it is.

    Raises:
      TypeError: `model` is a module of Flax, whose call takes no variables, or no function at all.

    >>> predictor(lambda variables, x: x * variables)(2.0, 3.0)
    6.0
    """
    if isinstance(model, Model):
        return model.predict
    if not callable(model) or _is_module(model):
        raise TypeError(
            f"model must be a Model or predict(variables, *inputs); this {type(model).__name__} becomes one by {_way(model)}"
        )
    return model


def _is_module(model: Any) -> bool:
    # Without importing NNX: whoever has a module of it has imported it.
    return isinstance(model, nn.Module) or any(kind.__module__.startswith("flax.nnx") for kind in type(model).__mro__)


def _way(model: Any) -> str:
    if isinstance(model, nn.Module):
        return "nets.from_linen(model)"
    return "nets.from_nnx(model)" if _is_module(model) else "nets.from_functions(init, apply)"
