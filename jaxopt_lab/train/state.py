"""The state of a training run: one pytree, and nothing besides."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core.rows import inputs as inputs_of
from jaxopt_lab.core.tree import any_compressed
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.nets.model import Model, check_model

__all__ = ["State", "init", "on_leaves", "variables"]


class State(NamedTuple):
    """Everything a step changes.

    Attributes:
      params: the parameters, any tree.
      model_state: the model's other collections, such as running statistics; empty if it has none.
      opt_state: the optimiser's state.
      step: how many steps were taken; int32, shape `[]`.
      key: a typed key that never changes; step `t` draws from `fold_in(key, t)`.
    """

    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    step: Array
    key: Array


def init(model: Model, tx: optax.GradientTransformation, key: Array, example: Any, variables: PyTree | None = None) -> State:
    """The state before the first step.

    Args:
      model: as of `nets.from_linen` and its like.
      tx: any Optax transform; on compressed leaves it acts through `compress.optimizer`.
      key: a typed key, `jax.random.key(seed)`; one half draws the parameters, the other drives the steps.
      example: an input `[B, ...]`, a tuple of several, or a batch with the entry "x"; only shapes and types matter to most models.
      variables: start from these instead of drawing any (pretrained, pruned or compressed ones).

    Raises:
      TypeError: `model` is not a `Model`, or `key` is not a typed key.
      ValueError: `variables` has no "params", or a batch has no "x".

    >>> from jaxopt_lab import nets
    >>> state = init(nets.from_linen(nets.MLP(features=())), optax.sgd(0.1), jax.random.key(0), jnp.ones((1, 4)))
    >>> int(state.step), jax.tree.map(jnp.shape, state.params)
    (0, {'Dense_0': {'bias': (10,), 'kernel': (4, 10)}})
    """
    check_model(model)
    if not jnp.issubdtype(getattr(key, "dtype", float), jax.dtypes.prng_key):
        raise TypeError(f"key must be a typed key, as jax.random.key(seed) gives; got {getattr(key, 'dtype', type(key).__name__)}")
    inputs = inputs_of(example if isinstance(example, dict) else {"x": example})
    init_key, key = jax.random.split(key)
    whole: dict[str, PyTree] = jax.jit(model.init)(init_key, *inputs) if variables is None else variables
    if "params" not in whole:
        raise ValueError(f'variables must have the entry "params"; they have {", ".join(map(str, whole))}')
    params = whole["params"]
    model_state = {name: value for name, value in whole.items() if name != "params"}
    return State(params, model_state, on_leaves(tx, params).init(params), jnp.int32(0), key)


def variables(state: State) -> PyTree:
    """The variables a `Model` takes: `{"params": ..., **model_state}`.

    >>> variables(State({"w": 1.0}, {"batch_stats": 2.0}, (), jnp.int32(0), jax.random.key(0)))
    {'params': {'w': 1.0}, 'batch_stats': 2.0}
    """
    return {"params": state.params, **state.model_state}


def on_leaves(tx: optax.GradientTransformation, params: PyTree) -> optax.GradientTransformationExtraArgs:
    """The optimiser as it acts on these parameters: through `compress.optimizer` where some of them are compressed leaves.

    Extra arguments of `update` reach it as they are, also where its class does not say that it takes any (`optax.MultiSteps`).

    >>> tx = on_leaves(optax.sgd(0.5), {"w": 1.0})
    >>> tx.update({"w": 1.0}, tx.init({"w": 1.0}))[0]
    {'w': -0.5}
    """
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)
    if not any_compressed(params):
        return tx
    from jaxopt_lab import compress

    return compress.optimizer(tx)
