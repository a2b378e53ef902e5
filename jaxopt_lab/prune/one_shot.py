"""Pruning once, without training: the whole cut from the parameters as they are."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core.rows import inputs
from jaxopt_lab.core.types import Array, PyTree, Where
from jaxopt_lab.prune.criteria import Criterion
from jaxopt_lab.prune.distributions import Distribution
from jaxopt_lab.prune.patterns import Pattern
from jaxopt_lab.prune.sparsify import sparsify
from jaxopt_lab.prune.state import apply_masks
from jaxopt_lab.prune.state import masks as masks_of

__all__ = ["one_shot"]


def one_shot(
    criterion: Criterion,
    params: PyTree,
    sparsity: float | None = None,
    *,
    apply: Callable[..., Any] | None = None,
    loss: Callable[[Any, Any], Array] | None = None,
    batches: Iterable[Any] | None = None,
    distribution: Distribution | None = None,
    pattern: Pattern | None = None,
    where: Where = "**/kernel",
) -> tuple[PyTree, PyTree]:
    r"""Cuts a tree to a sparsity at once.

    The same selection as `sparsify` makes at an update. A criterion that looks at the gradient gets its mean,

    .. math:: g = \nabla_w \sum_i v_i \ell_i / \sum_i v_i

    over the examples :math:`i` of all batches, each of weight :math:`v_i`.

    Args:
      criterion: how weights are ranked.
      params: the tree to prune.
      sparsity: the fraction to cut, from 0 to 1; none where pattern or distribution decide.
      apply: `apply(params, x) -> outputs`; needed, with `loss` and `batches`, by criteria that use the gradient.
      loss: `loss(outputs, batch) -> [N]`, one value per example.
      batches: batches, each a dict with "x" (an array, or a tuple of several inputs) and, where there is padding, "weight".
      distribution, pattern, where: as in `sparsify`.

    Returns:
      `(params, masks)`: the pruned tree and its masks, as `prune.masks` returns them.

    Raises:
      ValueError: a criterion that uses the gradient without what it needs; and all that `sparsify` raises.

    >>> from jaxopt_lab.prune import magnitude
    >>> params, masks = one_shot(magnitude(), {"kernel": jnp.array([3.0, -1.0, 2.0, 0.5])}, 0.5)
    >>> params["kernel"]
    Array([3., 0., 2., 0.], dtype=float32)
    """
    if not criterion.uses_gradient:
        gradient = jax.tree.map(jnp.zeros_like, params)
    elif apply is None or loss is None or batches is None:
        raise ValueError("one_shot: this criterion looks at the gradient; pass apply=, loss= and batches=")
    else:
        gradient = _mean_gradient(apply, loss, params, batches)
    # One update of an optimiser that does nothing: its masks are exactly those of training.
    tx = sparsify(optax.set_to_zero(), sparsity, criterion=criterion, distribution=distribution, pattern=pattern, where=where)
    masks = masks_of(tx.update(gradient, tx.init(params), params)[1])
    return apply_masks(params, masks), masks


def _mean_gradient(apply: Callable[..., Any], loss: Callable[[Any, Any], Array], params: PyTree, batches: Iterable[Any]) -> PyTree:
    def total(params: PyTree, batch: Any) -> tuple[Array, Array]:
        losses = loss(apply(params, *inputs(batch)), batch)
        weight = jnp.asarray(batch.get("weight", jnp.ones(losses.shape)), losses.dtype)
        return jnp.sum(jnp.where(weight != 0, weight * losses, 0)), jnp.sum(weight)

    @jax.jit
    def with_batch(summed: tuple[PyTree, Array] | None, params: PyTree, batch: Any) -> tuple[PyTree, Array]:
        # Integer leaves are allowed, and have no gradient (JAX's float0).
        new = jax.grad(total, has_aux=True, allow_int=True)(params, batch)
        return new if summed is None else jax.tree.map(lambda a, b: a if a.dtype == jax.dtypes.float0 else a + b, summed, new)

    summed = None
    for batch in batches:
        summed = with_batch(summed, params, batch)
    if summed is None:
        raise ValueError("one_shot: `batches` is empty")
    return jax.tree.map(lambda g: g if g.dtype == jax.dtypes.float0 else g / summed[1], summed[0])
