"""Landing a constraint inside an update, straight-through estimators, and a predicate that vmap leaves alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxopt_lab.core.types import Array, PyTree

__all__ = ["any_over_batch", "clipped_straight_through", "land", "landing", "straight_through", "wide"]


def wide(x: ArrayLike) -> Array:
    """`x` in float32, or in its own type where that is wider: sums and differences of 16-bit numbers lose digits.

    >>> wide(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def land(params: PyTree, target: PyTree) -> PyTree:
    r"""The update that takes `params` to `target`: :math:`u = y - x`.

    `optax.apply_updates(params, land(params, target))` is exactly 0.0 wherever `target` is 0 (:math:`x + (0 - x) = 0` in floating
    point). Elsewhere it is `target` to one rounding of the larger of the two numbers (subnormal ones apart),

    .. math:: |x + u - y| \le \epsilon \max(|x|, |y|),

    with :math:`\epsilon` of the type of `params`, 2**-23 in float32: a weight that shrinks a thousandfold may miss its target by a
    thousand of the target's own roundings. The difference is taken in at least float32, so 16-bit parameters land exactly on a
    target of their own type unless it is tiny beside what they were: as long as :math:`|y| > 2^{-14} |x|` in bfloat16, and
    :math:`2^{-11} |x|` in float16.

    >>> x, y = jnp.array([0.1, -3.0]), jnp.array([0.0, -2.9])
    >>> x + land(x, y)
    Array([ 0. , -2.9], dtype=float32)
    """
    return jax.tree.map(lambda x, y: wide(y) - wide(x), params, target)


def landing(project: Callable[[PyTree], PyTree], params: PyTree, updates: PyTree) -> PyTree:
    r"""Rewrites `updates` so that the parameters land on a constraint: :math:`u' = P(x + u) - x`.

    Whatever applies the updates afterwards (`optax.apply_updates`, in anyone's loop) ends on the projection: exactly for zeros,
    otherwise to one rounding of the larger of old and new weight, as `land` says. A weight may so end outside a box, say, by one
    rounding of its old magnitude. Proximal steps and projections go through here; `prune.sparsify`, whose live weights keep the
    optimiser's own update, lands its zeros by `land`.

    Args:
      project: a function of the whole tree; called on the parameters as they would be after `updates`.
      params: the parameters before the update.
      updates: their updates, a tree of the same structure.

    >>> updates = landing(lambda x: jnp.maximum(x, 0.0), jnp.array([1.0, 1.0]), jnp.array([0.5, -3.0]))
    >>> jnp.array([1.0, 1.0]) + updates
    Array([1.5, 0. ], dtype=float32)
    """
    moved = jax.tree.map(lambda x, u: (x + u).astype(x.dtype), params, updates)
    return land(params, project(moved))


@jax.custom_jvp
def straight_through(x: Array, y: Array) -> Array:
    r"""The value of `y` with the gradient of `x`: :math:`f = y`, :math:`\partial f / \partial x = 1`.

    Args:
      x: what is differentiated; shape `[...]`.
      y: what is returned, a rounding of `x` as a rule; the shape of `x`.

    >>> jax.grad(lambda x: straight_through(x, jnp.round(x)) ** 2)(1.2)
    Array(2., dtype=float32, weak_type=True)

    Source: Bengio, Leonard and Courville, "Estimating or propagating gradients through stochastic neurons", 2013.
    """
    del x
    return y


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    x, y = primals
    return straight_through(x, y), jnp.asarray(tangents[0]).astype(jnp.result_type(y))


def clipped_straight_through(x: Array, y: Array, low: float, high: float) -> Array:
    r"""The value of `y` with the gradient of `x` inside `[low, high]` and none outside.

    .. math:: f = y, \qquad \partial f / \partial x = \mathbf{1}[l \le x \le h]

    >>> jax.grad(lambda x: clipped_straight_through(x, jnp.sign(x), -1.0, 1.0))(3.0)
    Array(0., dtype=float32, weak_type=True)

    Source: Hubara et al., "Binarized neural networks", 2016.
    """
    inside = jax.lax.stop_gradient((x >= low) & (x <= high))
    return straight_through(jnp.where(inside, x, jax.lax.stop_gradient(x)), y)


@jax.custom_batching.custom_vmap
def any_over_batch(predicate: Array) -> Array:
    """`predicate` itself; under `vmap`, whether it holds anywhere in the batch, as one unbatched bool.

    A `cond` on it stays a `cond` under vmap: rare work is done when some element is due and not at every step. The branch must then
    choose, element by element, whose result it takes.

    >>> jax.vmap(any_over_batch, out_axes=None)(jnp.array([False, True]))
    Array(True, dtype=bool)
    """
    return predicate


@any_over_batch.def_vmap
def _any_over_batch_vmap(axis_size, in_batched, predicate):
    del axis_size
    return (any_over_batch(jnp.any(predicate, axis=0)) if in_batched[0] else any_over_batch(predicate)), False
