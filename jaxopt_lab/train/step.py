"""The training step: a pure function of a state and a batch, the same on one device and on many."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core.random import rows_key
from jaxopt_lab.core.rows import inputs as inputs_of
from jaxopt_lab.core.tree import any_compressed
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.nets.model import Model, check_model
from jaxopt_lab.train.guard import first_nonfinite, select, turned
from jaxopt_lab.train.microbatches import deal, part, summed
from jaxopt_lab.train.precision import as_before, cast, compute_dtype, keep_optimiser, loss_scale, overflowed, widened
from jaxopt_lab.train.state import State, on_leaves
from jaxopt_lab.train.update import check_shapes, check_state, floats, taken, value_function

__all__ = ["Step", "make_step"]

Batch = dict[str, Any]
Differentiate = Callable[[PyTree], tuple[tuple[Array, tuple[dict[str, Array], PyTree]], PyTree]]


@dataclass(frozen=True, eq=False)
class Step:
    """A pure `(state, batch) -> (state, metrics)`; built by `make_step`, which says what it computes.

    Attributes:
      model: the model it trains.
      loss: `(outputs, batch) -> [B]`.
      tx: the optimiser.
      penalty: `params -> scalar`, or None.
      axis_name: the mapped axis it synchronises over, or None.
      microbatches: in how many parts it works through a batch.
      precision: the type that the model computes in; None for that of the parameters.
      remat: whether the backward pass computes the forward pass again.
      guard: whether a step that is not finite leaves the state as it was.
    """

    model: Model
    loss: Callable[[Any, Batch], Array]
    tx: optax.GradientTransformation
    penalty: Callable[[PyTree], Array] | None = None
    axis_name: str | None = None
    microbatches: int = 1
    precision: Any = None
    remat: bool | Callable[..., bool] = False
    guard: bool = False

    def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        tx = on_leaves(self.tx, state.params)
        check_state(tx, state)
        scale = loss_scale(state.opt_state)
        differentiate = self._objective(state, batch, scale)
        (value, (metrics, model_state)), grads = differentiate(state.params)
        extra = {"value": value, "grad": grads, "value_fn": value_function(differentiate, state.params)}
        scaled = grads if scale is None else floats(lambda g: (g * scale).astype(g.dtype), grads)
        updates, opt_state = tx.update(scaled, state.opt_state, state.params, **taken(self.tx.update, extra))
        check_shapes(state.params, updates)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: metric.astype(jnp.float32) for name, metric in metrics.items()}
        if self.guard:
            nonfinite = first_nonfinite(value, grads, model_state, params, turned(opt_state, state.opt_state))
            keep = nonfinite < 0
            params, model_state = select(keep, (params, model_state), (state.params, state.model_state))
            opt_state = keep_optimiser(keep, opt_state, state.opt_state)
            skipped = ~keep
            if (overflow := overflowed(opt_state, state.opt_state)) is not None:
                # Of a loss that is not finite the scale is not the cause, though it falls.
                overflow &= nonfinite != 0
                skipped &= ~overflow
                metrics["overflowed"] = overflow.astype(jnp.float32)
            metrics |= {"skipped": skipped.astype(jnp.float32), "nonfinite": nonfinite}
        return State(params, model_state, opt_state, state.step + 1, state.key), metrics

    def _objective(self, state: State, batch: Batch, scale: Array | None) -> Differentiate:
        """`params -> ((value, (metrics, model_state)), gradient)` on a batch: the mean over all devices, and the penalty."""
        _, weight, rows = _read(batch)
        stored = any_compressed(state.params)
        # What a loss is multiplied by before it is differentiated, and its gradient divided by: where 16 bits could overflow, that
        # of a mean over all rows, however many parts and devices there are, and not of a sum.
        narrow = scale is not None or self.precision is not None
        unit = (1.0 if scale is None else scale) / (rows * self._devices()) if narrow else None
        sums = self._sums(state, batch, rows, stored, unit)

        def differentiate(params):
            (loss, model_state), grads = sums(params)
            count = jnp.float32(rows) if weight is None else jnp.sum(weight)
            loss, count, grads = self._over_devices(jax.lax.psum, (loss, count, grads))
            model_state = self._over_devices(jax.lax.pmean, model_state)
            if weight is not None:
                # Of nothing but padding the mean and its gradient are 0, and the model's state stays.
                model_state = floats(lambda new, old: jnp.where(count > 0, new, old), model_state, state.model_state)
                count = jnp.where(count > 0, count, 1)
            loss = loss / count
            units = count if unit is None else count * unit
            grads = floats(lambda g: (g / units).astype(g.dtype), grads)
            if self.penalty is None:
                return (loss, ({"loss": loss}, model_state)), grads
            penalty, pull = jax.value_and_grad(self.penalty, allow_int=stored)(params)
            return (loss + penalty, ({"loss": loss, "penalty": penalty}, model_state)), floats(jnp.add, grads, pull)

        return differentiate

    def _sums(self, state: State, batch: Batch, rows: int, stored: bool, unit: Array | float | None) -> Callable:
        """`params -> ((loss, model_state), gradient)`: this device's own sums over a batch, the gradient in units of `unit`."""

        def total(params, model_state, batch, key):
            outputs, new_state = self._forward(params, model_state, batch, key, stored)
            loss = _total(self.loss(outputs, batch), batch)
            return loss if unit is None else unit * loss, (loss, new_state)

        def one(params, model_state, batch, key):
            # The gradient of this device's own sum; summing over devices and dividing come after, outside the differentiated
            # function: the gradient of a psum would be each device's own gradient again, or that times the number of devices.
            # Likewise where shard_map tracks what differs between devices: shared parameters have a gradient that is summed
            # already, so it is taken at parameters marked as the device's own.
            gradient = jax.value_and_grad(total, has_aux=True, allow_int=stored)
            (_, out), grads = gradient(jax.tree.map(self._own, params), model_state, batch, key)
            return out, grads

        if self.microbatches == 1:
            return lambda params: one(params, state.model_state, batch, self._key(state, rows, 0))
        dealt = deal(batch, self.microbatches)

        def run(params, index, model_state):
            rest = part(dealt, index)
            (loss, new_state), grads = one(params, model_state, rest, self._key(state, rows, index))
            return (loss, self._unless_padding(rest, new_state, model_state)), grads

        return lambda params: summed(partial(run, params), self.microbatches, params, state.model_state, self._own)

    def _forward(self, params: PyTree, model_state: PyTree, batch: Batch, key: Array, stored: bool) -> tuple[Any, PyTree]:
        """The outputs of the model in training, and its new state."""
        inputs, weight, _ = _read(batch)

        def forward(variables, *inputs):
            return self.model.apply(variables, *inputs, train=True, key=key, axis_name=self.axis_name, weight=weight)

        if stored:
            from jaxopt_lab import compress

            forward = compress.lift(forward)
        if self.remat:
            forward = jax.checkpoint(forward, policy=self.remat if callable(self.remat) else None)
        outputs, new_state = forward({"params": cast(params, self.precision), **model_state}, *cast(inputs, self.precision))
        if self.precision is None:
            return outputs, new_state
        return widened(outputs), as_before(new_state, model_state)

    def _key(self, state: State, rows: int, index: Array | int) -> Array:
        """The key of a part of this device's rows: of a whole batch on a single device it is the step's own."""
        key, parts = jax.random.fold_in(state.key, state.step), self.microbatches
        if self.axis_name is None and parts == 1:
            return key
        device = 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name)
        if str(jax.random.key_impl(key)) == "threefry2x32":
            return rows_key(key, device * rows + index, -(-rows // parts), parts)
        return jax.random.fold_in(key, device * parts + index)

    def _unless_padding(self, batch: Batch, new: PyTree, old: PyTree) -> PyTree:
        """The model's state after a part, in the types of the one before it, which it is if the part is nothing but padding."""
        new = as_before(new, old)
        weight = _read(batch)[1]
        if weight is None:
            return new
        count = self._over_devices(jax.lax.psum, jnp.sum(weight))
        return floats(lambda now, before: jnp.where(count > 0, now, before), new, old)

    def _devices(self) -> int:
        return 1 if self.axis_name is None else jax.lax.psum(1, self.axis_name)

    def _own(self, leaf: Array) -> Array:
        """The same array, but depending on the device as far as anyone can see: the compiler drops the choice again."""
        if self.axis_name is None:
            return leaf
        return jnp.where(jax.lax.axis_index(self.axis_name) >= 0, leaf, jax.lax.stop_gradient(leaf))

    def _over_devices(self, collective: Callable, tree: PyTree) -> PyTree:
        if self.axis_name is None:
            return tree
        return floats(lambda x: collective(x, self.axis_name), tree)


def make_step(
    model: Model,
    loss: Callable[[Any, Batch], Array],
    tx: optax.GradientTransformation,
    *,
    penalty: Callable[[PyTree], Array] | None = None,
    axis_name: str | None = None,
    microbatches: int = 1,
    precision: Any = None,
    remat: bool | Callable[..., bool] = False,
    guard: bool = False,
) -> Step:
    r"""A pure training step `(state, batch) -> (state, metrics)`.

    .. math:: g = \nabla_\theta \frac{\sum_d \sum_i w_i \, \ell_i(\theta)}{\sum_d \sum_i w_i} + \nabla_\theta R(\theta)

    over the examples :math:`i` of all devices :math:`d`, synchronised before the optimiser sees it. Batch statistics are those of
    the whole batch, and dropout is keyed by an example's index in it (`fold_in(state.key, state.step)`; `core.random.rows_key`
    says which draws count as one a row), so that one step on many devices is the step on one. On compressed leaves the model
    runs through `compress.lift` and the optimiser through `compress.optimizer`.

    Four keywords buy memory, speed or safety, and combine with each other and with all else:

    - `microbatches=k` sums the gradients of `k` parts of the batch, one after another, and makes one update: that of the whole
      batch to rounding, with weights, dropout and a ragged end, for the activations of a part. Row `i` goes to part `i % k`, so
      of a batch that is sharded over contiguous rows each part has some on every device; where `k` divides a device's rows none
      moves, and the parts are the same however many devices there are. Batch statistics are those of each part, and the running
      ones advance part by part, as wherever gradients are accumulated.
    - `precision=jnp.bfloat16` (or float16) computes in that type: parameters and floating inputs are cast inside the differentiated
      function, outputs come back to float32 before the loss. Parameters in the state (the masters), gradients as the optimiser gets
      them, the model's state and the penalty stay in float32. Compressed leaves stay as they are, and what they multiply is
      promoted by them. The small gradients of float16 are lost unless the optimiser is a `train.loss_scaled(...)`.
    - `remat=True` has the backward pass compute the forward pass again: the same numbers. It does so in one piece, so what is held
      between the two is saved, and not what the second one holds. A policy of `jax.checkpoint_policies` instead says what is kept
      (`dots_saveable`: products, and the rest is computed again); layers that are `nn.remat` inside the model save the most.
    - `guard=True` passes over a step whose loss, gradients (after the sum over devices), new model state or new parameters are not
      all finite, or that makes a number of the optimiser's state infinite which was not: parameters, model state and the
      optimiser's state stay bit for bit what they were, and only `step` advances.

    Args:
      model: as of `nets.from_linen` and its like.
      loss: `(outputs, batch) -> [B]`, one value per example. A teacher comes in by the batch or by a closure.
      tx: any Optax transform that needs no other extra arguments than these: `value` (the loss with the penalty), its gradient
        `grad`, and `value_fn`, which is `params -> value` on this very batch, with the dropout and over the devices of this very
        step, and which a line search asks for (that of `optax.lbfgs`, say).
      penalty: `params -> scalar`, added once however many devices there are.
      axis_name: the axis of `jax.pmap`, `jax.shard_map` or `jax.vmap` to synchronise over. State that no BatchNorm keeps is
        averaged over it. A key of another generator than threefry is folded with the device's index, and the part's: then dropout
        is sound, but not that of one device and one part.
      microbatches: in how many parts a batch is worked through, at least 1. With more than one, each entry of a batch has the
        leading axis of "x".
      precision: `jnp.bfloat16`, `jnp.float16` or `jnp.float32`; None computes in the types that the parameters and inputs have.
      remat: True, False, or a policy.
      guard: whether to pass over steps that are not finite. The scale of `loss_scaled` falls all the same.

    Returns:
      A step. A batch is a dict with "x" (`[B, ...]`, or a tuple of several inputs), whatever the loss reads, and, where there is
      padding, "weight" (`[B]`, 0 for padding; of nothing else, the loss and its gradient are 0). The metrics are "loss" (without
      the penalty) and "penalty" if there is one, float32; with `guard` also "skipped", float32 0 or 1, and "nonfinite", the int32
      index of the first leaf that was not finite, or -1 (`train.guard.offender(state, index)` is its name). The loss of a step
      that was passed over is what it was, perhaps NaN. With a `loss_scaled` optimiser, "overflowed" is 1 instead of "skipped" where
      the loss was finite and the scaled gradients were not, and the scale fell: that is how it finds its scale, and no fault.

    Raises:
      TypeError: `model` is not a `Model`, or `microbatches` no integer.
      ValueError: `precision` is no such type, or `microbatches` less than 1; and when traced: a batch without "x", a weight that is
        not `[B]`, a loss that is not `[B]`, an update of another shape than its parameter, a state that another optimiser made,
        `loss_scaled` inside of another transform.

    >>> from jaxopt_lab import nets, train
    >>> model = nets.from_functions(lambda key, x: jnp.zeros(2), lambda w, x: x @ w)
    >>> step = make_step(model, lambda y, batch: (y - batch["y"]) ** 2, optax.sgd(0.25))
    >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.array([1.0, 4.0])}
    >>> state, metrics = step(train.init(model, step.tx, jax.random.key(0), batch), batch)
    >>> state.params, float(metrics["loss"])
    (Array([0.25, 2.  ], dtype=float32), 8.5)

    Sources: Micikevicius et al., "Mixed precision training", 2018; Chen et al., "Training deep nets with sublinear memory cost",
    2016 (computing the forward pass again).
    """
    check_model(model)
    if operator.index(microbatches) < 1:
        raise ValueError(f"microbatches must be at least 1; got {microbatches}")
    return Step(model, loss, tx, penalty, axis_name, microbatches, compute_dtype(precision), remat, guard)


def _read(batch: Batch) -> tuple[tuple, Array | None, int]:
    """The inputs, the weights and the number of rows of a batch."""
    inputs = inputs_of(batch)
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


def _total(losses: Array, batch: Batch) -> Array:
    """The weighted sum of the losses of a batch, in at least float32."""
    _, weight, rows = _read(batch)
    if jnp.shape(losses) != (rows,):
        raise ValueError(f"loss must return one value per example, shape ({rows},); it returned {jnp.shape(losses)}")
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    # A weight of 0 also silences the loss of a padded row that is not finite.
    return jnp.sum(losses if weight is None else jnp.where(weight != 0, weight * losses, 0))
