"""Flax NNX modules as `init` and `apply`; apart from the rest, since importing NNX takes longer than importing JAX."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
from flax import nnx

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.nets.batch_statistics import layer_moments, running_average

__all__ = ["pair"]


def pair(module: Any) -> tuple[Callable, Callable]:
    """The functions `init` and `apply` of a constructor `(nnx.Rngs) -> module`, or of an instance; see `nets.from_nnx`.

    Raises:
      TypeError: `module` is neither.

    >>> init, apply = pair(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
    >>> apply(init(jax.random.key(0)), jax.numpy.ones((5, 2)))[0].shape
    (5, 3)
    """
    if not isinstance(module, nnx.Module) and not callable(module):
        raise TypeError(f"from_nnx takes an nnx.Module or a constructor (nnx.Rngs) -> nnx.Module; got {type(module).__name__}")
    own: Any = None
    shape: Any
    if isinstance(module, nnx.Module):
        own = nnx.clone(module)
        shape = nnx.clone(module)
    else:
        shape = nnx.eval_shape(lambda: module(nnx.Rngs(0)))
    shape.eval()
    eval_graph, *_ = nnx.split(shape)
    shape.train()
    train_graph, _, streams, _ = nnx.split(shape, nnx.Param, nnx.RngState, ...)
    streams = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), streams)
    drawing = any(jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(streams))

    def init(key, *inputs):
        del inputs
        made = module(nnx.Rngs(key)) if own is None else own
        _, params, _, state = nnx.split(made, nnx.Param, nnx.RngState, ...)
        return _variables(params, state)

    def apply(variables, *inputs, train=False, key=None, axis_name=None, weight=None):
        if train and key is None and drawing:
            raise ValueError("the module holds random streams: give apply(..., train=True, key=...) a key")
        # Without a key the streams stay abstract, so that a module that draws nevertheless fails instead of repeating itself.
        drawn = streams if key is None else _restarted(streams, key)
        parts = [nnx.State(variables["params"]), drawn, nnx.State(variables.get("state", {}))]
        live: Any = nnx.merge(train_graph if train else eval_graph, *parts)
        if train and not (axis_name is None and weight is None):
            for _, layer in nnx.iter_modules(live):
                if isinstance(layer, nnx.BatchNorm):
                    _share(layer, axis_name, weight)
        outputs = live(*inputs)
        if not train:
            return outputs, {name: value for name, value in variables.items() if name != "params"}
        new = _variables(*nnx.state(live, nnx.Param, nnx.Not(nnx.Any(nnx.Param, nnx.RngState))))
        return outputs, {name: value for name, value in new.items() if name != "params"}

    return init, apply


def _variables(params: nnx.State, state: nnx.State) -> PyTree:
    variables = {"params": nnx.to_pure_dict(params), "state": nnx.to_pure_dict(state)}
    return variables if jax.tree.leaves(variables["state"]) else {"params": variables["params"]}


def _restarted(streams: nnx.State, key: Array) -> nnx.State:
    """The random streams at their beginning, each with a key of its own."""

    def restart(index, leaf):
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.numpy.zeros(leaf.shape, leaf.dtype)
        own = jax.random.fold_in(key, index)
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    leaves, structure = jax.tree.flatten(streams)
    return jax.tree.unflatten(structure, [restart(index, leaf) for index, leaf in enumerate(leaves)])


class _WholeBatch(nnx.BatchNorm):
    """A BatchNorm that normalises by the statistics of the whole batch: all devices, no padding."""

    _weight: Callable[[], Array | None]

    def __call__(self, x, use_running_average=None, *, mask=None):
        running = self.use_running_average if use_running_average is None else use_running_average
        if running:
            return super().__call__(x, use_running_average=True)
        batch = layer_moments(self, x, mask, weight=self._weight())
        kept = self.mean[...], self.var[...]
        self.mean[...], self.var[...] = batch
        outputs = super().__call__(x, use_running_average=True)
        for variable, old, new in zip((self.mean, self.var), kept, batch, strict=True):
            variable[...] = running_average(self, old, new)
        return outputs


def _share(layer: nnx.BatchNorm, axis_name: str | None, weight: Array | None) -> None:
    """Turns a layer of a freshly merged module, which lives for one call, into one that sees the whole batch."""
    layer.axis_name = layer.axis_name or axis_name
    object.__setattr__(layer, "__class__", _whole_batch_kind(type(layer)))
    # A closure, since an array among the attributes would count as state of the module.
    object.__setattr__(layer, "_weight", lambda: weight)


@lru_cache(maxsize=32)
def _whole_batch_kind(kind: type) -> type:
    """`kind` with the calls of `_WholeBatch`; kept, since NNX registers each class it sees."""
    return _WholeBatch if kind is nnx.BatchNorm else type(kind.__name__, (_WholeBatch, kind), {})
