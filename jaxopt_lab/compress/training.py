"""Any Optax transform on a tree with compressed leaves: only what a leaf declares as trained is moved."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.extend.core import ClosedJaxpr, Literal

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array, PyTree, Schedule

__all__ = ["AnnealState", "Trained", "anneal", "merge", "optimizer", "trainable"]


@struct.dataclass
class Trained:
    """What an optimiser sees of a compressed leaf: its trained fields, at the leaf's own path.

    It counts as a compressed leaf itself, so a selector names it by the weight's path, and whatever acts on weights (penalties,
    masks, `sparsify`) finds the latent one, or refuses it by name.

    Attributes:
      fields: each trained field by its name; a field that holds leaves shows the trained part of those.
      latent: the name of the field that is a weight of the leaf's own shape, or None (static).
      kind: the class of the leaf (static).
    """

    fields: dict[str, PyTree]
    latent: str | None = struct.field(pytree_node=False)
    kind: str = struct.field(pytree_node=False)

    def __getattr__(self, name: str) -> Any:
        # `vars`, since the fields themselves may not be there yet while an instance is copied.
        fields = vars(self).get("fields", {})
        if name not in fields:
            raise AttributeError(
                f"{vars(self).get('kind', 'Trained')} trains no field {name!r}; it trains {', '.join(fields) or 'none'}"
            )
        return fields[name]

    def materialise(self) -> Array:
        """The latent weight."""
        return tree.latent(self)


def trainable(params: PyTree) -> PyTree:
    """The part of a tree that trains: each compressed leaf is replaced by its trained fields, of which there may be none.

    Works alike for parameters, gradients and updates. A tree without compressed leaves comes back as it is.

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> trainable(quantize({"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, where="kernel"))
    {'bias': Array([0., 0.], dtype=float32), 'kernel': Trained(fields={}, latent=None, kind='Quantized')}
    """
    return jax.tree.map(_trained, params, is_leaf=tree.is_compressed)


def merge(params: PyTree, trained: PyTree) -> PyTree:
    """`params` with its trained part replaced: the inverse of `trainable`.

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> params = quantize({"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, where="kernel")
    >>> merge(params, {**trainable(params), "bias": jnp.ones(2)})["bias"]
    Array([1., 1.], dtype=float32)
    """
    return _rebuilt(params, trained, lambda x: x)


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Makes any transform respect compressed leaves: frozen fields stay as they are, and decay acts on latent weights only.

    `tx` sees what `trainable` shows: plain leaves, and a `Trained` at the path of each compressed one. The updates that come out
    have the structure of the whole tree, with zeros in each field's own dtype where nothing moves, so `optax.apply_updates` leaves
    integer codes bit for bit. Without compressed leaves it is exactly `tx`, state included.

    A trained field that is not a latent weight (a scale, a factor, a codebook) must not decay. At each update the origin is moved
    to where it stands, so `tx` sees the value 0 there, on which no decay can pull; arrays of the state that hold earlier or
    averaged values of it (those of `schedule_free`, say) are moved along and back:

    .. math:: u(g, s, \theta) \to u(g, s - \theta, 0)

    Such arrays are found by structure: `tx.init` or `tx.update` hands the parameter itself to that place of the state. What depends
    on a parameter's own size (the parameter scale of `adafactor`, the trust ratio of `lamb`) sees the size 0 there.

    Args:
      tx: any Optax transform. Extra arguments pass through; `grad` and other trees of gradients are reduced like the gradients,
        and a `value_fn` is called on the whole tree.

    Raises:
      ValueError: at an update of a tree with compressed leaves, when `params` is not given.

    >>> from jaxopt_lab.compress.lift import lift
    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> params = quantize({"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, where="kernel")
    >>> grads = jax.grad(lift(lambda p: (p["kernel"] @ p["bias"]).sum() + p["bias"].sum()), allow_int=True)(params)
    >>> tx = optimizer(optax.sgd(0.5))
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> params["bias"], params["kernel"].codes.dtype
    (Array([-1.5, -1.5], dtype=float32), dtype('int8'))
    """
    if isinstance(tx, _OnLeaves):
        return tx
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> Any:
        return tx.init(trainable(params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        if not tree.any_compressed(updates):
            return tx.update(updates, state, params, **extra)
        if params is None:
            raise ValueError("compress.optimizer needs the parameters to update compressed leaves: update(grads, state, params)")
        gradients, here = trainable(updates), trainable(params)
        origin = _origin(here)
        structure = jax.tree.structure(updates)
        reduced = {name: _reduce_extra(name, value, (params, origin), structure) for name, value in extra.items()}
        if not any(at is not None for at in origin):
            moved, state = tx.update(gradients, state, here, **reduced)
        else:
            of = _copies(tx, gradients, state, here, reduced)
            state = _shifted(state, of, origin, jnp.subtract)
            moved, state = tx.update(gradients, state, _about(here, origin, jnp.subtract), **reduced)
            state = _shifted(state, of, origin, jnp.add)
        return _rebuilt(params, moved, jnp.zeros_like), state

    return _OnLeaves(init, update)


class AnnealState(NamedTuple):
    """The state of `anneal`.

    Attributes:
      count: how many updates were made, int32 `[]`.
      inner_state: the state of the wrapped optimiser.
    """

    count: Array
    inner_state: PyTree


def anneal(
    tx: optax.GradientTransformation, *, amount: Schedule | None = None, bits: Schedule | None = None
) -> optax.GradientTransformationExtraArgs:
    """`optimizer(tx)` that also moves the bits and the amount of fake-quantised leaves, and draws anew what rounds at random.

    The updates land on the values that the schedules have for the next step, so `optax.apply_updates` in anyone's loop is enough,
    and nothing compiles again. Where a schedule starts, `fake_quantize` says: its `amount` and `bits` hold for the first step.

    Args:
      tx: any Optax transform.
      amount: `count -> amount` from 0 (the latent weights as they are) to 1 (rounded); it is left alone if not given.
      bits: `count -> bits`, rounded to whole numbers of at least 1.

    >>> from jaxopt_lab.compress.leaves.fake_quantized import fake_quantize
    >>> params = fake_quantize({"kernel": jnp.ones((2, 2))}, where="kernel", amount=0.0)
    >>> tx = anneal(optax.sgd(0.1), amount=lambda count: count / 4)
    >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].amount
    Array(0.25, dtype=float32)

    Source: Zhou et al., "Incremental network quantization", 2017 (by parts); Jacob et al., 2018 (a delayed start).
    """
    tx = optimizer(tx)

    def init(params: PyTree) -> AnnealState:
        return AnnealState(jnp.zeros((), jnp.int32), tx.init(params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, AnnealState]:
        updates, inner_state = tx.update(updates, state.inner_state, params, **extra)
        count = jnp.asarray(optax.safe_increment(state.count))

        def land(leaf: Any, change: Any) -> Any:
            if not tree.is_compressed(leaf):
                return change
            annealed = getattr(leaf, "annealed", lambda *_: {})
            moved = annealed(None if amount is None else amount(count), None if bits is None else bits(count), count)
            names, fields, treedef = _one_level(leaf)
            landed = [
                moved[name] - field if name in moved else jax.tree.map(land, field, move, is_leaf=tree.is_compressed)
                for name, field, move in zip(names, fields, treedef.flatten_up_to(change), strict=True)
            ]
            return jax.tree.unflatten(treedef, landed)

        return jax.tree.map(land, params, updates, is_leaf=tree.is_compressed), AnnealState(count, inner_state)

    return _OnLeaves(init, update)


class _OnLeaves(optax.GradientTransformationExtraArgs):
    """A transform that takes compressed leaves as they are."""


def _trained(leaf: Any) -> Any:
    if not tree.is_compressed(leaf):
        return leaf
    fields = {name: trainable(getattr(leaf, name)) for name in getattr(leaf, "trains", ())}
    return Trained(fields, getattr(leaf, "latent", None), type(leaf).__name__)


def _rebuilt(params: PyTree, trained: PyTree, otherwise: Callable[[Any], Any]) -> PyTree:
    """`params` with the trained fields of its leaves taken from `trained`, and `otherwise` of every other array in a leaf."""

    def rebuild(leaf: Any, new: Any) -> Any:
        if not tree.is_compressed(leaf):
            return new
        names, fields, treedef = _one_level(leaf)
        rebuilt = [
            _rebuilt(field, new.fields[name], otherwise) if name in new.fields else jax.tree.map(otherwise, field)
            for name, field in zip(names, fields, strict=True)
        ]
        return jax.tree.unflatten(treedef, rebuilt)

    return jax.tree.map(rebuild, params, trained, is_leaf=tree.is_compressed)


def _one_level(leaf: Any) -> tuple[list[str], list[Any], Any]:
    """Names and values of the fields of a leaf, and its structure above them."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(leaf, is_leaf=lambda node: node is not leaf)
    return [jax.tree_util.keystr(path, simple=True) for path, _ in with_paths], [field for _, field in with_paths], treedef


Origin = list[Array | None]
"""For every array of the trained part, in tree order: its value where it is no weight, which must not decay; None where it is."""


def _origin(trained: PyTree) -> Origin:
    def of(node: Any, weight: bool) -> Origin:
        if not isinstance(node, Trained):
            return [None if weight else node]
        leaves: Origin = []
        for name in sorted(node.fields):  # the order in which a dict is flattened
            for child in jax.tree.leaves(node.fields[name], is_leaf=tree.is_compressed):
                leaves += of(child, weight and name == node.latent)
        return leaves

    return [at for node in jax.tree.leaves(trained, is_leaf=tree.is_compressed) for at in of(node, weight=True)]


def _about(trained: PyTree, origin: Origin, move: Callable) -> PyTree:
    """The trained part with the origin moved there (`jnp.subtract`) or back (`jnp.add`)."""
    leaves, treedef = jax.tree.flatten(trained)
    return jax.tree.unflatten(treedef, [x if at is None else move(x, at) for x, at in zip(leaves, origin, strict=True)])


def _shifted(state: Any, of: dict[int, int], origin: Origin, move: Callable) -> Any:
    """The arrays of a state that hold values of a parameter, moved with its origin."""
    leaves, treedef = jax.tree.flatten(state)
    for place, parameter in of.items():
        if (at := origin[parameter]) is not None:
            leaves[place] = move(leaves[place], at).astype(leaves[place].dtype)
    return jax.tree.unflatten(treedef, leaves)


def _copies(tx: Any, gradients: PyTree, state: Any, params: PyTree, extra: dict[str, Any]) -> dict[int, int]:
    """Which arrays of the state hold values of a parameter: place in the state -> place among the parameters."""
    first = jax.make_jaxpr(tx.init)(params)
    later = jax.make_jaxpr(lambda params, gradients, state: tx.update(gradients, state, params, **extra)[1])(
        params, gradients, state
    )
    count = len(jax.tree.leaves(params))
    return _passed_on(first, count) | _passed_on(later, count)


_SAME = ("convert_element_type", "copy", "copy_p")


def _passed_on(program: ClosedJaxpr, count: int) -> dict[int, int]:
    """Which outputs of a program are one of its first `count` inputs: output -> input."""
    jaxpr = program.jaxpr
    made = {out: equation for equation in jaxpr.eqns for out in equation.outvars}
    inputs = {var: place for place, var in enumerate(jaxpr.invars[:count])}

    def source(var: Any) -> int | None:
        if isinstance(var, Literal) or (equation := made.get(var)) is None:
            return None if isinstance(var, Literal) else inputs.get(var)
        return source(equation.invars[0]) if equation.primitive.name in _SAME else None

    sources = {place: source(var) for place, var in enumerate(jaxpr.outvars)}
    return {place: found for place, found in sources.items() if found is not None}


def _reduce_extra(name: str, value: Any, at: tuple[PyTree, Origin], structure: Any) -> Any:
    if name == "value_fn" and callable(value):
        params, origin = at
        return lambda trained, *args, **kwargs: value(merge(params, _about(trained, origin, jnp.add)), *args, **kwargs)
    return trainable(value) if not inspect.isroutine(value) and jax.tree.structure(value) == structure else value
