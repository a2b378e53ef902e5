"""Mixed precision: 16-bit numbers in the model, float32 masters in the state, and a loss scale where 16 bits have few exponents."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.tree import is_compressed
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.train.guard import all_finite, select
from jaxopt_lab.train.update import floats, taken

__all__ = [
    "LossScaleState",
    "as_before",
    "cast",
    "compute_dtype",
    "keep_optimiser",
    "loss_scale",
    "loss_scaled",
    "overflowed",
    "widened",
]

_DTYPES = ("bfloat16", "float16", "float32")


def compute_dtype(precision: Any) -> np.dtype | None:
    """The type that a model computes in, from what a user gave for it; None stays None.

    Raises:
      ValueError: it is not bfloat16, float16 or float32.

    >>> compute_dtype(jnp.bfloat16), compute_dtype("int8")
    Traceback (most recent call last):
      ...
    ValueError: precision must be jnp.bfloat16, jnp.float16, jnp.float32 or None (what the parameters are); got 'int8'
    """
    if precision is None:
        return None
    try:
        dtype = jnp.dtype(precision)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in _DTYPES:
        choices = ", ".join(f"jnp.{name}" for name in _DTYPES)
        given = precision if isinstance(precision, type) or dtype is None else dtype.name
        raise ValueError(f"precision must be {choices} or None (what the parameters are); got {given!r}")
    return dtype


def cast(tree: PyTree, dtype: np.dtype | None) -> PyTree:
    """The floating leaves in another type, if one is given; integers, complex numbers, keys and compressed leaves stay as they are.

    >>> jax.tree.map(lambda x: str(x.dtype), cast({"ids": np.arange(2), "w": jnp.ones(2)}, jnp.dtype("bfloat16")))
    {'ids': 'int64', 'w': 'bfloat16'}
    """

    def one(leaf):
        if is_compressed(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(leaf, dtype)

    return tree if dtype is None else jax.tree.map(one, tree, is_leaf=is_compressed)


def widened(tree: PyTree) -> PyTree:
    """The floating leaves in at least float32, as a loss wants the outputs of a model.

    >>> widened({"logits": jnp.ones(1, jnp.float16)})
    {'logits': Array([1.], dtype=float32)}
    """
    return floats(wide, jax.tree.map(jnp.asarray, tree))


def as_before(new: PyTree, old: PyTree) -> PyTree:
    """The floating leaves of `new` in the types of those of `old`: statistics stay in float32 whatever the model computes in.

    >>> as_before({"mean": jnp.ones(1, jnp.bfloat16)}, {"mean": jnp.zeros(1)})
    {'mean': Array([1.], dtype=float32)}
    """
    return floats(lambda now, before: now.astype(before.dtype), new, old)


class LossScaleState(NamedTuple):
    """The state of `loss_scaled`.

    Attributes:
      scale: what the loss is multiplied by; float32, shape `[]`.
      good: how many updates in a row were finite since the scale last changed; int32, shape `[]`.
      overflows: how many updates were passed over in all; int32, shape `[]`.
      inner_state: the state of the wrapped optimiser.
    """

    scale: Array
    good: Array
    overflows: Array
    inner_state: PyTree


def loss_scaled(
    tx: optax.GradientTransformation, initial: float = 2.0**15, factor: float = 2.0, every: int = 2000, minimum: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Dynamic loss scaling: an optimiser that takes the gradient of :math:`S \ell` and moves by that of :math:`\ell`.

    Numbers of float16 below about 6e-8 are zero, and many gradients are; those of a loss that is multiplied by a large :math:`S`
    are not. The scale is as large as the gradients allow: with :math:`g` the scaled gradient,

    .. math::
        u, s \leftarrow \begin{cases} \mathrm{tx}(g / S, s) & g \text{ finite} \\ 0, s & \text{otherwise} \end{cases}
        \qquad
        S \leftarrow \begin{cases} S \cdot \mathrm{factor} & \mathrm{every} \text{ finite ones in a row} \\
            \max(S / \mathrm{factor}, \mathrm{minimum}) & g \text{ not finite} \\ S & \text{otherwise} \end{cases}

    It is the outermost transform: `loss_scaled(chain(clip_by_global_norm(1.0), adamw(1e-3)))` clips true gradients, and
    `loss_scaled(MultiSteps(...))` accumulates finite ones. `make_step` then scales the loss by `loss_scale(opt_state)`, and what it
    hands to `tx` beside the gradient (`value`, `grad`, `value_fn`) and reports is not scaled. In a loop of one's own, scale the
    loss and give `update` the gradient of that, summed over devices. A step whose gradients overflow still writes the model's
    statistics, unless it has `guard=True`.

    Args:
      tx: any Optax transform.
      initial: the first scale. Powers of two change no digit of a gradient.
      factor: by what the scale is multiplied or divided.
      every: after how many finite updates in a row it grows.
      minimum: what it never falls below.

    Raises:
      ValueError: `initial` or `minimum` is not positive and finite, `factor` not above 1, or `every` not at least 1.

    >>> tx = loss_scaled(optax.sgd(0.5), initial=8.0)
    >>> state = tx.init(jnp.ones(()))
    >>> tx.update(jnp.float32(8.0), state)[0]  # the gradient is 1
    Array(-0.5, dtype=float32)
    >>> update, state = tx.update(jnp.float32(jnp.inf), state)
    >>> float(update), float(loss_scale(state)), int(state.overflows)
    (0.0, 4.0, 1)

    Source: Micikevicius et al., "Mixed precision training", 2018.
    """
    for name, value, least in (("initial", initial, 0.0), ("minimum", minimum, 0.0), ("factor", factor, 1.0)):
        if not least < value < float("inf"):
            raise ValueError(f"{name} of loss_scaled must be finite and above {least:g}; got {value}")
    if every < 1:
        raise ValueError(f"every of loss_scaled must be at least 1; got {every}")

    def init(params: PyTree) -> LossScaleState:
        return LossScaleState(jnp.float32(initial), jnp.int32(0), jnp.int32(0), tx.init(params))

    def update(updates: PyTree, state: LossScaleState, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, LossScaleState]:
        finite = all_finite(updates)
        grads = floats(lambda g: (g / state.scale).astype(g.dtype), updates)
        moved, inner_state = tx.update(grads, state.inner_state, params, **taken(tx.update, extra))
        moved = floats(lambda u: jnp.where(finite, u, 0), moved)
        scale, good = _next_scale(finite, state, factor, every, minimum)
        overflows = state.overflows + jnp.where(finite, 0, 1)
        return moved, LossScaleState(scale, good, overflows, select(finite, inner_state, state.inner_state))

    # Of the class of what it wraps: `compress.optimizer` marks by it what already respects compressed leaves.
    kind = type(tx) if isinstance(tx, optax.GradientTransformationExtraArgs) else optax.GradientTransformationExtraArgs
    return kind(init, update)


def _next_scale(finite: Array, state: LossScaleState, factor: float, every: int, minimum: float) -> tuple[Array, Array]:
    """The scale after an update, and the number of finite ones since it changed."""
    good = jnp.where(finite, state.good + 1, 0)
    full = good >= every
    grown = state.scale * factor
    raised = jnp.where(full & jnp.isfinite(grown), grown, state.scale)
    lowered = jnp.maximum(state.scale / factor, minimum)
    return jnp.where(finite, raised, lowered), jnp.where(full, 0, good)


def loss_scale(opt_state: PyTree) -> Array | None:
    """The scale that a loss is to be multiplied by for this state of an optimiser; None if it is not of `loss_scaled`.

    Raises:
      ValueError: `loss_scaled` is inside of another transform, which would see scaled gradients, and those that overflow.

    >>> float(loss_scale(loss_scaled(optax.adam(1e-3), initial=4.0).init({"w": jnp.ones(2)})))
    4.0
    """
    if isinstance(opt_state, LossScaleState):
        return opt_state.scale
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LossScaleState))
    if any(isinstance(node, LossScaleState) for node in nodes):
        raise ValueError(
            f"loss_scaled must be the outermost transform, loss_scaled(chain(...)); its state is inside of a "
            f"{type(opt_state).__name__}, whose other transforms would be given scaled gradients"
        )
    return None


def overflowed(new: PyTree, old: PyTree) -> Array | None:
    """Whether an update was passed over and the loss scale fell for it; bool, shape `[]`, or None if there is no scale.

    One that overflows at the least scale has no such excuse.

    Args:
      new: the state of the optimiser after the update.
      old: that before.

    >>> tx = loss_scaled(optax.sgd(0.1), initial=2.0, minimum=1.0)
    >>> states = [tx.init(jnp.ones(()))]
    >>> for gradient in (1.0, jnp.inf, jnp.inf):
    ...     states.append(tx.update(jnp.float32(gradient), states[-1])[1])
    >>> [bool(overflowed(new, old)) for old, new in zip(states, states[1:])]
    [False, True, False]
    """
    return new.scale < old.scale if isinstance(new, LossScaleState) else None


def keep_optimiser(keep: Array, new: PyTree, old: PyTree) -> PyTree:
    """The new state of an optimiser where `keep`, else the old one, but for the loss scale, which learns from every step.

    >>> tx = loss_scaled(optax.trace(0.9), initial=4.0)
    >>> old = tx.init(jnp.ones(()))
    >>> new = tx.update(jnp.float32(jnp.inf), old)[1]
    >>> float(keep_optimiser(jnp.bool_(False), new, old).scale)
    2.0
    """
    if isinstance(new, LossScaleState):
        return new._replace(inner_state=select(keep, new.inner_state, old.inner_state))
    return select(keep, new, old)
