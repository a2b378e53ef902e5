"""The wrapper: any Optax optimiser, trained sparse."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core import numerics
from jaxopt_lab.core.types import Array, PyTree, Schedule, Where
from jaxopt_lab.prune.chosen import Chosen
from jaxopt_lab.prune.criteria import Criterion, magnitude
from jaxopt_lab.prune.cuts import Cuts
from jaxopt_lab.prune.distributions import Distribution, global_
from jaxopt_lab.prune.growth import Growth
from jaxopt_lab.prune.inner import own_moments, with_moments
from jaxopt_lab.prune.patterns import Pattern, unstructured
from jaxopt_lab.prune.state import PackedMask, SparsifyState, pack, unpack

__all__ = ["sparsify"]


def sparsify(
    inner: optax.GradientTransformation,
    sparsity: float | Schedule | None = None,
    *,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
    criterion: Criterion | None = None,
    distribution: Distribution | None = None,
    pattern: Pattern | None = None,
    growth: Growth | None = None,
    where: Where = "**/kernel",
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains with any optimiser while weights are cut on a schedule; a cut weight is exactly 0.0 after every step.

    .. math:: g' = m \odot g, \qquad u' = \begin{cases} u(g') & m = 1 \\ -w & m = 0 \end{cases}

    The update itself lands on zero, so `optax.apply_updates` in anyone's loop is enough: there is no hook to remember. Masks
    are decided from the incoming parameters at the updates numbered `begin`, `begin + every`, ..., and always at `end`, before
    the inner optimiser runs. It sees masked gradients and masked parameters, and what its state holds for a weight that has just
    been cut goes back to what its `init` gives a zero weight (`moments` lists which arrays; factored ones are left alone). Wrap
    the whole of the optimiser, clipping included: `sparsify(optax.chain(clip, adamw), ...)`. What stands after it in a chain
    changes its updates once more, and they no longer land.

    The number of units cut is :math:`\mathrm{round}(s n)`, half to even, computed on the host in float64 (a sparsity that is
    traced, under `vmap` over configurations say, is clipped to 0 to 1 and rounded in float32, and so is a traced fraction of
    growth). Among equal scores the lowest flat index stays, and a score of NaN ranks highest. A weight that was cut scores below
    every live one, so without `growth` it comes back only if the schedule falls. Under `vmap` and `grad` the mask update stays
    inside a `cond`. Sharded weights are never gathered, as long as the tiles of a `block` pattern divide the shards.

    Args:
      inner: any Optax optimiser; extra arguments of `update` (`value=`, ...) are passed on.
      sparsity: the fraction to cut, from 0 to 1 (1 cuts every weight): a number, or a schedule `count -> fraction`, which needs
        `end`. A fixed pattern and an absolute threshold take none. Traced values are clipped.
      begin, end, every: when masks change, counted in updates; without `end` they change once, at `begin`.
      criterion: how weights are ranked; `magnitude()` unless given.
      distribution: how the leaves share the cut; `global_()` unless given.
      pattern: which weights are cut together; `unstructured()` unless given.
      growth: at each mask update, exchanges a part of the live weights for others (dynamic sparse training), of which those
        cut before start again at zero; none unless given. It needs `end`, and a schedule of its fraction is evaluated as that of
        a sparsity is. To start from a random mask, cut with `one_shot(random(key), ...)` first.
      where: which leaves are pruned; floating arrays of one axis or more.
      packed: keep masks at one bit a weight instead of one byte.

    Returns:
      A transformation whose state is a `SparsifyState`; `masks(opt_state)` reads it.

    Raises:
      ValueError: a sparsity or a fraction of growth outside 0 to 1, inconsistent times or options, a selector that matches
        nothing, a pattern that does not fit a leaf, a gradient that has not its weight's shape.
      TypeError: `inner` is no optimiser; a selected leaf that is not floating, or is compressed without a latent weight, named by
        its path.

    >>> params = {"kernel": jnp.array([0.1, -2.0, 0.3, 4.0]), "bias": jnp.ones(1)}
    >>> tx = sparsify(optax.adamw(1e-3), 0.5, where="kernel")
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"] == 0.0
    Array([ True, False,  True, False], dtype=bool)

    Source: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017.
    """
    if not all(callable(getattr(inner, name, None)) for name in ("init", "update")):
        raise TypeError(f"sparsify: the optimiser comes first and then the sparsity, sparsify(optax.sgd(0.1), 0.9); got {inner!r}")
    criterion = magnitude() if criterion is None else criterion
    distribution = global_() if distribution is None else distribution
    pattern = unstructured() if pattern is None else pattern
    _check_parts(criterion=criterion, distribution=distribution, pattern=pattern, growth=growth)
    cuts = Cuts.of(sparsity, begin, end, every, distribution, pattern, growth)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> SparsifyState:
        chosen = Chosen.of(params, where, pattern)
        stored = [_store(jnp.ones_like(weight, dtype=bool), packed) for weight in chosen.weights]
        return SparsifyState(jnp.zeros((), jnp.int32), chosen.among_masks(stored), inner.init(params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, SparsifyState]:
        if params is None:
            raise ValueError("sparsify: update needs the parameters: tx.update(grads, state, params)")
        chosen = Chosen.of(params, where, pattern)
        gradients = chosen.gradients(updates)
        due = cuts.due(state.count)
        owned = own_moments(state.inner_state, chosen.shapes)

        def refresh(operands: tuple[list[Any], dict[str, Array]]) -> tuple[list[Any], dict[str, Array]]:
            stored, arrays = operands
            old = [unpack(mask) for mask in stored]
            back = None if growth is None else chosen.growth(growth, gradients, state.count)
            new = cuts.masks(chosen.scores(criterion, gradients), old, state.count, back)
            new = [jnp.where(due, after, before) for after, before in zip(new, old, strict=True)]
            kept = dict(zip(chosen.paths, new, strict=True))
            fresh = own_moments(inner.init(chosen.into(params, _masked(chosen.weights, new))), chosen.shapes)
            cleared = {path: jnp.where(due & ~kept[owner], fresh[path][1], arrays[path]) for path, (owner, _) in owned.items()}
            return [_store(mask, packed) for mask in new], cleared

        # All that is expensive stands in the branch that is almost never taken; the other passes its buffers through.
        operands = (chosen.masks_of(state.masks), {path: array for path, (_, array) in owned.items()})
        stored, arrays = jax.lax.cond(numerics.any_over_batch(due), refresh, lambda operands: operands, operands)

        masks = [unpack(mask) for mask in stored]
        updates, inner_state = inner.update(
            chosen.into(updates, _masked(gradients, masks)),
            with_moments(state.inner_state, arrays),
            chosen.into(params, _masked(chosen.weights, masks)),
            **extra,
        )
        updates = chosen.into(updates, _landed(chosen.gradients(updates), chosen.weights, masks))
        return updates, SparsifyState(jnp.asarray(optax.safe_increment(state.count)), chosen.among_masks(stored), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_parts(**parts: Any) -> None:
    kinds = {"criterion": Criterion, "distribution": Distribution, "pattern": Pattern, "growth": Growth | None}
    for name, part in parts.items():
        if not isinstance(part, kinds[name]):
            called = f"; call it: {part.__name__}()" if callable(part) and hasattr(part, "__name__") else ""
            raise TypeError(f"sparsify: {name} must be a prune.{name.capitalize()}; got {part!r}{called}")


def _masked(arrays: Sequence[Array], masks: Sequence[Array]) -> list[Array]:
    return [jnp.where(mask, array, jnp.zeros_like(array)) for array, mask in zip(arrays, masks, strict=True)]


def _landed(updates: Sequence[Array], weights: Sequence[Array], masks: Sequence[Array]) -> list[Array]:
    """Where a weight is cut, the update that ends on exactly 0.0; in a dtype wide enough for the weight to be undone."""
    to_zero = numerics.land(list(weights), [jnp.zeros_like(weight) for weight in weights])
    wide = [jnp.promote_types(update.dtype, weight.dtype) for update, weight in zip(updates, weights, strict=True)]
    rows = zip(updates, to_zero, masks, wide, strict=True)
    return [jnp.where(mask, update.astype(dtype), zero.astype(dtype)) for update, zero, mask, dtype in rows]


def _store(mask: Array, packed: bool) -> Array | PackedMask:
    return pack(mask) if packed else mask
