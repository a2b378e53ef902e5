"""The training step: a pure function of a state and a batch, the same on one device and on many."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core.random import rows_key
from jaxopt_lab.core.tree import any_compressed, flatten
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.nets import Model
from jaxopt_lab.train.state import State

__all__ = ["Step", "make_step"]

Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Step:
    """A pure `(state, batch) -> (state, metrics)`; built by `make_step`, which says what it computes.

    Attributes:
      model: the model it trains.
      loss: `(outputs, batch) -> [B]`.
      tx: the optimiser.
      penalty: `params -> scalar`, or None.
      axis_name: the mapped axis it synchronises over, or None.
    """

    model: Model
    loss: Callable[[Any, Batch], Array]
    tx: optax.GradientTransformation
    penalty: Callable[[PyTree], Array] | None = None
    axis_name: str | None = None

    def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        inputs, weight, rows = _read(batch)
        key = self._key(state, rows)
        stored = any_compressed(state.params)
        apply, tx = self.model.apply, optax.with_extra_args_support(self.tx)
        if stored:
            from jaxopt_lab import compress

            tx = optax.with_extra_args_support(compress.optimizer(self.tx))

        def forward(variables, *inputs):
            return apply(variables, *inputs, train=True, key=key, axis_name=self.axis_name, weight=weight)

        def total(params):
            run = compress.lift(forward) if stored else forward
            outputs, model_state = run({"params": params, **state.model_state}, *inputs)
            losses = self.loss(outputs, batch)
            if jnp.shape(losses) != (rows,):
                raise ValueError(f"loss must return one value per example, shape ({rows},); it returned {jnp.shape(losses)}")
            losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
            # A weight of 0 also silences the loss of a padded row that is not finite.
            return jnp.sum(losses if weight is None else jnp.where(weight != 0, weight * losses, 0)), model_state

        # The gradient of this device's own sum; summing over devices and dividing come after, outside the differentiated function:
        # the gradient of a psum would be each device's own gradient again, or that times the number of devices. Likewise
        # where shard_map tracks what differs between devices: shared parameters have a gradient that is summed already, so it is
        # taken at parameters marked as the device's own.
        (loss, model_state), grads = jax.value_and_grad(total, has_aux=True, allow_int=stored)(self._own(state.params))
        count = jnp.float32(rows) if weight is None else jnp.sum(weight)
        loss, count, grads = self._over_devices(jax.lax.psum, (loss, count, grads))
        model_state = self._over_devices(jax.lax.pmean, model_state)
        if weight is not None:
            # Of nothing but padding the mean and its gradient are 0, and the model's state stays.
            model_state = _floats(lambda new, old: jnp.where(count > 0, new, old), model_state, state.model_state)
            count = jnp.where(count > 0, count, 1)
        loss = loss / count
        grads = _floats(lambda g: (g / count).astype(g.dtype), grads)
        metrics, value = {"loss": loss}, loss
        if self.penalty is not None:
            penalty, pull = jax.value_and_grad(self.penalty, allow_int=stored)(state.params)
            grads = _floats(jnp.add, grads, pull)
            metrics["penalty"], value = penalty, loss + penalty
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **_taken(self.tx.update, value=value))
        _check_shapes(state.params, updates)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: metric.astype(jnp.float32) for name, metric in metrics.items()}
        return State(params, model_state, opt_state, state.step + 1, state.key), metrics

    def _key(self, state: State, rows: int) -> Array:
        key = jax.random.fold_in(state.key, state.step)
        if self.axis_name is None:
            return key
        device = jax.lax.axis_index(self.axis_name)
        if str(jax.random.key_impl(key)) == "threefry2x32":
            return rows_key(key, device * rows, rows)
        return jax.random.fold_in(key, device)

    def _own(self, params: PyTree) -> PyTree:
        """The same parameters, but depending on the device as far as anyone can see: the compiler drops the choice again."""
        if self.axis_name is None:
            return params
        here = jax.lax.axis_index(self.axis_name) >= 0
        return jax.tree.map(lambda x: jnp.where(here, x, jax.lax.stop_gradient(x)), params)

    def _over_devices(self, collective: Callable, tree: PyTree) -> PyTree:
        if self.axis_name is None:
            return tree
        return _floats(lambda x: collective(x, self.axis_name), tree)


def make_step(
    model: Model,
    loss: Callable[[Any, Batch], Array],
    tx: optax.GradientTransformation,
    *,
    penalty: Callable[[PyTree], Array] | None = None,
    axis_name: str | None = None,
) -> Step:
    r"""A pure training step `(state, batch) -> (state, metrics)`.

    .. math:: g = \nabla_\theta \frac{\sum_d \sum_i w_i \, \ell_i(\theta)}{\sum_d \sum_i w_i} + \nabla_\theta R(\theta)

    over the examples :math:`i` of all devices :math:`d`, synchronised before the optimiser sees it. Batch statistics are those of
    the whole batch, and dropout is keyed by an example's index in it (`fold_in(state.key, state.step)`; `core.random.rows_key`
    says which draws count as one a row), so that one step on many devices is the step on one. On compressed leaves the model
    runs through `compress.lift` and the optimiser through `compress.optimizer`.

    Args:
      model: as of `nets.from_linen` and its like.
      loss: `(outputs, batch) -> [B]`, one value per example. A teacher comes in by the batch or by a closure.
      tx: any Optax transform; it also gets `value=` (the loss with the penalty).
      penalty: `params -> scalar`, added once however many devices there are.
      axis_name: the axis of `jax.pmap`, `jax.shard_map` or `jax.vmap` to synchronise over. State that no BatchNorm keeps is
        averaged over it. A key of another generator than threefry is folded with the device's index: then dropout is sound, but not
        that of one device.

    Returns:
      A step. A batch is a dict with "x" (`[B, ...]`, or a tuple of several inputs), whatever the loss reads, and, where there is
      padding, "weight" (`[B]`, 0 for padding; of nothing else, the loss and its gradient are 0). The metrics are "loss" (without
      the penalty) and "penalty" if there is one, float32.

    Raises:
      ValueError: when traced: a batch without "x", a weight that is not `[B]`, a loss that is not `[B]`, an update of another shape
        than its parameter.

    >>> from jaxopt_lab import nets, train
    >>> model = nets.from_functions(lambda key, x: jnp.zeros(2), lambda w, x: x @ w)
    >>> step = make_step(model, lambda y, batch: (y - batch["y"]) ** 2, optax.sgd(0.25))
    >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.array([1.0, 4.0])}
    >>> state, metrics = step(train.init(model, step.tx, jax.random.key(0), batch), batch)
    >>> state.params, float(metrics["loss"])
    (Array([0.25, 2.  ], dtype=float32), 8.5)
    """
    return Step(model, loss, tx, penalty, axis_name)


def _read(batch: Batch) -> tuple[tuple, Array | None, int]:
    """The inputs, the weights and the number of rows of a batch."""
    if not isinstance(batch, dict) or "x" not in batch:
        has = ", ".join(map(str, batch)) if isinstance(batch, dict) else f"type {type(batch).__name__}"
        raise ValueError(f'a batch must be a dict with the entry "x"; this one has {has}')
    inputs = batch["x"] if isinstance(batch["x"], tuple) else (batch["x"],)
    shape = jnp.shape(jax.tree.leaves(inputs)[0])
    if not shape:
        raise ValueError('the entry "x" of a batch needs a leading batch axis; it is a scalar')
    weight = batch.get("weight")
    if weight is not None:
        if jnp.shape(weight) != shape[:1]:
            raise ValueError(
                f'the entry "weight" of a batch must have shape ({shape[0]},) like its "x"; it has {jnp.shape(weight)}'
            )
        weight = jnp.asarray(weight, jnp.float32)
    return inputs, weight, shape[0]


def _floats(function: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps over the floating leaves; integer codes and their gradients, which are of no numeric type, pass."""

    def one(leaf, *others):
        return function(leaf, *others) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(one, tree, *rest)


def _taken(update: Callable, **extra: Any) -> dict[str, Any]:
    """Those of the extra arguments that an optimiser's update takes; some that take any pass them on to one that does not."""
    parameters = inspect.signature(update).parameters.values()
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {name: value for name, value in extra.items() if anything or name in {p.name for p in parameters}}


def _check_shapes(params: PyTree, updates: PyTree) -> None:
    for path, leaf, update in zip(*flatten(params)[:2], flatten(updates)[1], strict=True):
        for stored, moved in zip(jax.tree.leaves(leaf), jax.tree.leaves(update), strict=True):
            if jnp.shape(stored) != jnp.shape(moved):
                raise ValueError(
                    f"the optimiser's update of {path} has shape {jnp.shape(moved)}, the parameter {jnp.shape(stored)}"
                )
