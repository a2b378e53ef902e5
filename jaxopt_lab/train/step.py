"""The training step: a pure function of a state and a batch, the same on one device and on many."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core.random import rows_key
from jaxopt_lab.core.rows import inputs as inputs_of
from jaxopt_lab.core.tree import any_compressed, flatten, paths
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.nets.model import Model, check_model
from jaxopt_lab.train.state import State, on_leaves

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
        tx = on_leaves(self.tx, state.params)
        _check_state(tx, state)
        differentiate = self._objective(state, batch)
        (value, (metrics, model_state)), grads = differentiate(state.params)
        extra = {"value": value, "grad": grads, "value_fn": _value_fn(differentiate, state.params)}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **_taken(self.tx.update, extra))
        _check_shapes(state.params, updates)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: metric.astype(jnp.float32) for name, metric in metrics.items()}
        return State(params, model_state, opt_state, state.step + 1, state.key), metrics

    def _objective(self, state: State, batch: Batch) -> Callable[[PyTree], tuple[tuple[Array, tuple[dict, PyTree]], PyTree]]:
        """`params -> ((value, (metrics, model_state)), gradient)` on a batch: the mean over all devices, and the penalty."""
        inputs, weight, rows = _read(batch)
        key = self._key(state, rows)
        stored = any_compressed(state.params)
        if stored:
            from jaxopt_lab import compress

        def forward(variables, *inputs):
            return self.model.apply(variables, *inputs, train=True, key=key, axis_name=self.axis_name, weight=weight)

        def total(params):
            run = compress.lift(forward) if stored else forward
            outputs, model_state = run({"params": params, **state.model_state}, *inputs)
            losses = self.loss(outputs, batch)
            if jnp.shape(losses) != (rows,):
                raise ValueError(f"loss must return one value per example, shape ({rows},); it returned {jnp.shape(losses)}")
            losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
            # A weight of 0 also silences the loss of a padded row that is not finite.
            return jnp.sum(losses if weight is None else jnp.where(weight != 0, weight * losses, 0)), model_state

        def differentiate(params):
            # The gradient of this device's own sum; summing over devices and dividing come after, outside the differentiated
            # function: the gradient of a psum would be each device's own gradient again, or that times the number of devices.
            # Likewise where shard_map tracks what differs between devices: shared parameters have a gradient that is summed
            # already, so it is taken at parameters marked as the device's own.
            (loss, model_state), grads = jax.value_and_grad(total, has_aux=True, allow_int=stored)(self._own(params))
            count = jnp.float32(rows) if weight is None else jnp.sum(weight)
            loss, count, grads = self._over_devices(jax.lax.psum, (loss, count, grads))
            model_state = self._over_devices(jax.lax.pmean, model_state)
            if weight is not None:
                # Of nothing but padding the mean and its gradient are 0, and the model's state stays.
                model_state = _floats(lambda new, old: jnp.where(count > 0, new, old), model_state, state.model_state)
                count = jnp.where(count > 0, count, 1)
            loss = loss / count
            grads = _floats(lambda g: (g / count).astype(g.dtype), grads)
            if self.penalty is None:
                return (loss, ({"loss": loss}, model_state)), grads
            penalty, pull = jax.value_and_grad(self.penalty, allow_int=stored)(params)
            return (loss + penalty, ({"loss": loss, "penalty": penalty}, model_state)), _floats(jnp.add, grads, pull)

        return differentiate

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
      tx: any Optax transform that needs no other extra arguments than these: `value` (the loss with the penalty), its gradient
        `grad`, and `value_fn`, which is `params -> value` on this very batch, with the dropout and over the devices of this very
        step, and which a line search asks for (that of `optax.lbfgs`, say).
      penalty: `params -> scalar`, added once however many devices there are.
      axis_name: the axis of `jax.pmap`, `jax.shard_map` or `jax.vmap` to synchronise over. State that no BatchNorm keeps is
        averaged over it. A key of another generator than threefry is folded with the device's index: then dropout is sound, but not
        that of one device.

    Returns:
      A step. A batch is a dict with "x" (`[B, ...]`, or a tuple of several inputs), whatever the loss reads, and, where there is
      padding, "weight" (`[B]`, 0 for padding; of nothing else, the loss and its gradient are 0). The metrics are "loss" (without
      the penalty) and "penalty" if there is one, float32.

    Raises:
      TypeError: `model` is not a `Model`.
      ValueError: when traced: a batch without "x", a weight that is not `[B]`, a loss that is not `[B]`, an update of another shape
        than its parameter, a state that another optimiser made.

    >>> from jaxopt_lab import nets, train
    >>> model = nets.from_functions(lambda key, x: jnp.zeros(2), lambda w, x: x @ w)
    >>> step = make_step(model, lambda y, batch: (y - batch["y"]) ** 2, optax.sgd(0.25))
    >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.array([1.0, 4.0])}
    >>> state, metrics = step(train.init(model, step.tx, jax.random.key(0), batch), batch)
    >>> state.params, float(metrics["loss"])
    (Array([0.25, 2.  ], dtype=float32), 8.5)
    """
    check_model(model)
    return Step(model, loss, tx, penalty, axis_name)


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


def _floats(function: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps over the floating leaves; integer codes and their gradients, which are of no numeric type, pass."""

    def one(leaf, *others):
        return function(leaf, *others) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(one, tree, *rest)


def _value_fn(differentiate: Callable[[PyTree], tuple[tuple[Array, Any], PyTree]], own: PyTree) -> Callable[[PyTree], Array]:
    """The objective as a function of the parameters alone, for an optimiser that looks for it elsewhere, as a line search does.

    Its derivative is given by rule, since JAX's own of a sum over devices is one device's part. It is of the same numbers on every
    device, so that all of them search alike. Parameters that are masked out (`optax.masked`) are those of the state.
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


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _taken(update: Callable, extra: dict[str, Any]) -> dict[str, Any]:
    """Those of the extra arguments that an optimiser's update takes; some that take any pass them on to one that does not."""
    parameters = inspect.signature(update).parameters.values()
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {name: value for name, value in extra.items() if anything or name in {p.name for p in parameters}}


def _check_state(tx: optax.GradientTransformation, state: State) -> None:
    """Refuses a state that another optimiser made: some take it without a word, and go on from the wrong numbers."""
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


def _check_shapes(params: PyTree, updates: PyTree) -> None:
    for path, leaf, update in zip(*flatten(params)[:2], flatten(updates)[1], strict=True):
        for stored, moved in zip(jax.tree.leaves(leaf), jax.tree.leaves(update), strict=True):
            if jnp.shape(stored) != jnp.shape(moved):
                raise ValueError(
                    f"the optimiser's update of {path} has shape {jnp.shape(moved)}, the parameter {jnp.shape(stored)}"
                )
