"""The exact threshold of a selection, found by counting.

A sort of ten million scores costs as much as tens of training steps, and gathers a sharded tensor onto every device. Counting does
not. Floats are read as integers of the same order; how many scores reach a candidate is a scalar, and tells on which side of it the
threshold lies. Candidates come by regula falsi: the counts at both ends of the bracket say where in it to look.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core import tree
from jaxopt_lab.core.numerics import any_over_batch
from jaxopt_lab.core.types import Array, PyTree

__all__ = ["keep_largest", "kth_largest"]

_INDEX_LIMIT = 2**32
# About twelve candidates are enough as a rule; a distribution that defies interpolation is bisected from here on.
_INTERPOLATED = 24


def kth_largest(scores: PyTree, k: Array | int) -> Array:
    r"""The k-th largest of all scores of a tree, exactly.

    .. math:: \tau = \max \{ t : |\{ i : s_i \ge t \}| \ge k \}

    About fifteen passes over the scores, each a comparison, a sum and an addition across leaves (at most 24 plus one per bit of the
    dtype). Sharded leaves stay where they are; only scalars cross devices.

    Args:
      scores: a tree of floating arrays of any shapes; NaN counts as the largest value.
      k: from 1 to the number of scores; may be traced.

    Returns:
      The score, a scalar of the widest dtype among the leaves.

    Raises:
      TypeError: a leaf is not floating; named by its path.
      ValueError: `k` is static and out of range, the tree is empty, or it holds 2**32 scores or more.

    >>> int(kth_largest({"a": jnp.array([3.0, 9.0]), "b": jnp.array([[5.0], [1.0]])}, 2))
    5

    Source: Dowell and Jarratt, "A modified regula falsi method for computing the root of an equation", 1971 (the Illinois rule).
    """
    paths, leaves, _ = tree.flatten(scores)
    for path, leaf in zip(paths, leaves, strict=True):
        _check_floating(f"kth_largest: {path or 'the array'}", leaf)
    leaves = [jnp.asarray(leaf) for leaf in leaves if jnp.size(leaf)]
    total = _total(leaves)
    if isinstance(k, (int, np.integer)) and not 1 <= k <= total:
        raise ValueError(f"kth_largest: k must be from 1 to the number of scores, {total}; got {k}")
    dtype = jnp.result_type(*leaves)
    members = [_ordered(leaf.astype(dtype)) for leaf in leaves]
    found = _search(members, jnp.asarray(k, jnp.uint32))
    # The search may stop short of the score itself, anywhere between it and the next smaller one.
    above = [jnp.min(jnp.where(member >= found.low, member, _largest(member.dtype))) for member in members]
    return _unordered(jnp.min(jnp.stack(above)), dtype)


def keep_largest(scores: Sequence[Array], keep: Array, *, joint: bool) -> list[Array]:
    """Masks that keep exactly so many scores: the largest, and among equals those of the lowest flat index.

    Args:
      scores: floating arrays of any shapes.
      keep: how many stay: `[1]` over all arrays together when `joint`, else `[len(scores)]`, one for each.
      joint: whether the arrays compete with each other. Flat indices then run on from one array to the next.

    Returns:
      A bool array for each array of scores.

    Raises:
      TypeError: an array is not floating.
      ValueError: there are no scores, or 2**32 or more.

    >>> keep_largest([jnp.array([1.0, 2.0, 2.0, 2.0])], jnp.array([2]), joint=False)
    [Array([False,  True,  True, False], dtype=bool)]
    """
    for i, score in enumerate(scores):
        _check_floating(f"keep_largest: array {i}", score)
    _total(scores)
    keep = keep.astype(jnp.uint32)
    if joint:
        dtype = jnp.result_type(*scores)
        return _keep([_ordered(score.astype(dtype)) for score in scores], keep[0])
    return [_keep([_ordered(score)], wanted)[0] for score, wanted in zip(scores, keep, strict=True)]


class _Bracket(NamedTuple):
    """`reach(low) >= k > reach(high)`, where `reach(t)` is how many members are at least t."""

    low: Array
    high: Array
    low_reach: Array
    high_reach: Array
    low_weight: Array
    high_weight: Array
    moved: Array
    step: Array


def _search(members: Sequence[Array], k: Array) -> _Bracket:
    """Narrows a bracket until its low end is reached by exactly `k` members, or is one below its high end."""
    dtype = members[0].dtype
    one = jnp.ones((), dtype)

    def unfinished(b: _Bracket) -> Array:
        return (b.high - b.low > 1) & (b.low_reach != k) & (k > 0)

    def narrow(b: _Bracket) -> _Bracket:
        # Half a member off each end keeps the weights positive, and the candidate inside.
        below = ((b.low_reach - k).astype(jnp.float32) + 0.5) * b.low_weight
        above = ((k - b.high_reach).astype(jnp.float32) - 0.5) * b.high_weight
        fraction = jnp.where(b.step < _INTERPOLATED, below / (below + above), jnp.float32(0.5))
        width = b.high - b.low
        inside = jnp.clip((fraction * width.astype(jnp.float32)).astype(dtype), one, width - one)
        candidate = b.low + jnp.where(b.step < _INTERPOLATED, inside, width >> one)
        reach = _count([member >= candidate for member in members])
        up = reach >= k
        # The Illinois rule: an end that stays put twice counts half, so that both ends close in.
        side = jnp.where(up, jnp.int32(1), jnp.int32(-1))
        again = jnp.where(b.moved == side, jnp.float32(0.5), jnp.float32(1))
        return _Bracket(
            low=jnp.where(up, candidate, b.low),
            high=jnp.where(up, b.high, candidate),
            low_reach=jnp.where(up, reach, b.low_reach),
            high_reach=jnp.where(up, b.high_reach, reach),
            low_weight=jnp.where(up, jnp.float32(1), b.low_weight * again),
            high_weight=jnp.where(up, b.high_weight * again, jnp.float32(1)),
            moved=side,
            step=b.step + 1,
        )

    # Scores of minus infinity (weights cut before) would hold the low end far below all others; they matter only if k needs them.
    floor = jnp.min(jnp.stack([jnp.min(member) for member in members]))
    finite = jnp.min(jnp.stack([jnp.min(jnp.where(member > floor, member, _largest(dtype) - one)) for member in members]))
    reach = _count([member >= finite for member in members])
    enough = reach >= k
    start = _Bracket(
        low=jnp.where(enough, finite, floor),
        high=jnp.where(enough, jnp.max(jnp.stack([jnp.max(member) for member in members])), floor) + one,
        low_reach=jnp.where(enough, reach, jnp.uint32(_total(members))),
        high_reach=jnp.where(enough, jnp.uint32(0), reach),
        low_weight=jnp.float32(1),
        high_weight=jnp.float32(1),
        moved=jnp.int32(0),
        step=jnp.int32(0),
    )
    return jax.lax.while_loop(unfinished, narrow, start)


def _keep(members: Sequence[Array], k: Array) -> list[Array]:
    found = _search(members, k)

    everything = jnp.uint32(_INDEX_LIMIT - 1)
    tied = found.low_reach != k

    def first_ties() -> Array:
        ties = [member == found.low for member in members]
        return jnp.where(tied, _tie_cutoff(ties, _flat_indices(members), k - found.high_reach), everything)

    # As a rule every tie of the threshold stays, there being just one: then the second search is skipped, under vmap too.
    bound = jax.lax.cond(any_over_batch(tied), first_ties, lambda: everything)
    return [
        (member >= found.high) | ((member >= found.low) & (index < bound) & (k > 0))
        for member, index in zip(members, _flat_indices(members), strict=True)
    ]


def _check_floating(name: str, scores: Array) -> None:
    if not jnp.issubdtype(jnp.result_type(scores), jnp.floating):
        raise TypeError(f"{name} is {jnp.result_type(scores)}; scores must be floating: convert it")


def _total(leaves: Sequence[Array]) -> int:
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    if not 0 < total < _INDEX_LIMIT:
        raise ValueError(f"a selection takes from 1 to 2**32 - 1 scores; got {total}: choose other leaves, or split them in two")
    return total


def _ordered(x: Array) -> Array:
    """Unsigned integers in the order of the floats: negative ones flipped, positive ones above them; both zeros alike."""
    # One zero, and one NaN: what an invalid operation gives on some machines has its sign bit set.
    x = jnp.where(jnp.isnan(x), jnp.asarray(jnp.nan, x.dtype), jnp.where(x == 0, jnp.zeros_like(x), x))
    bits = jax.lax.bitcast_convert_type(x, f"uint{x.dtype.itemsize * 8}")
    top = _top(bits.dtype)
    # The very last integer, one of the NaNs, is given up: the bracket's high end stands above every member.
    return jnp.minimum(jnp.where(bits >= top, ~bits, bits | top), _largest(bits.dtype) - 1)


def _unordered(bits: Array, dtype: jnp.dtype) -> Array:
    top = _top(bits.dtype)
    return jax.lax.bitcast_convert_type(jnp.where(bits >= top, bits & ~top, ~bits), dtype)


def _top(dtype: jnp.dtype) -> Array:
    return jnp.asarray(1 << (dtype.itemsize * 8 - 1), dtype)


def _largest(dtype: jnp.dtype) -> Array:
    return jnp.asarray(jnp.iinfo(dtype).max, dtype)


def _count(flags: Sequence[Array]) -> Array:
    return sum((jnp.sum(flag, dtype=jnp.uint32) for flag in flags), jnp.uint32(0))


def _flat_indices(members: Sequence[Array]) -> list[Array]:
    """The flat index of each element, running on over the members; one iota an axis, so that it follows any sharding."""
    indices, offset = [], 0
    for member in members:
        index = jnp.full(member.shape, offset, jnp.uint32)
        stride = 1
        for axis in reversed(range(member.ndim)):
            index = index + jax.lax.broadcasted_iota(jnp.uint32, member.shape, axis) * jnp.uint32(stride)
            stride *= member.shape[axis]
        indices.append(index)
        offset += stride
    return indices


def _tie_cutoff(ties: Sequence[Array], indices: Sequence[Array], wanted: Array) -> Array:
    """The largest index bound below which no more than `wanted` ties lie, bit by bit."""
    bits = _total(ties).bit_length()

    def decide(step: Array, bound: Array) -> Array:
        candidate = bound | (jnp.uint32(1 << (bits - 1)) >> step.astype(jnp.uint32))
        below = _count([tie & (index < candidate) for tie, index in zip(ties, indices, strict=True)])
        return jnp.where(below <= wanted, candidate, bound)

    return jax.lax.fori_loop(0, bits, decide, jnp.uint32(0))
