"""Models made smaller: of every group of coupled units those are cut that matter least."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import require
from jaxopt_lab.core.tracing.fingerprint import fingerprint, of_program
from jaxopt_lab.core.types import PyTree, Where
from jaxopt_lab.surgery.budgets import Budget
from jaxopt_lab.surgery.coupled import Group, counts_of, coupling_of, walked
from jaxopt_lab.surgery.criteria import Criterion, magnitude
from jaxopt_lab.surgery.plan import Plan, bound
from jaxopt_lab.surgery.ranking import Ranking, local

__all__ = ["slim"]


def slim(
    apply: Callable[..., Any],
    params: PyTree,
    *example: Any,
    ratio: float | None = None,
    keep: Mapping[str, int] | None = None,
    budget: Budget | Sequence[Budget] | None = None,
    criterion: Criterion | None = None,
    ranking: Ranking | None = None,
    round_to: int = 1,
    exclude: Where | None = None,
    force: Where | None = None,
) -> tuple[Any, PyTree, Plan]:
    r"""Cuts the units that matter least: a smaller tree, and the same function on it.

    No model is edited. Coupled channels are found in the traced program (`coupled_channels`), of each group the units with the
    lowest scores are cut from all of its members, and the function runs at the smaller shapes: `small_apply(small_params, x)` is
    `apply(mask(params, plan), x)` where no mean is taken over units, as LayerNorm does: that is of the units that are left. Units
    that would add to a sum though they are zeros (the sum of an exponential), or are chosen among, are protected unless forced.

    Args:
      apply: `apply(params, *inputs) -> outputs`; or a `nets.Model`, whose `predict` is walked, and which comes back as a model.
      params: any tree, with running statistics; compressed leaves become dense.
      example: inputs, arrays or shapes. Batch and length stay free.
      ratio: the part of the units that is cut, in [0, 1); of each group at least one unit stays.
      keep: instead, by the name of a group (as `path[axis]` of any of its members), how many of its units stay; the other groups
        stay whole.
      budget: instead, one or several of `parameters`, `macs` and `milliseconds`, all of which the result keeps to: at the smallest
        ratio of 64 steps that does, if more is never cheaper.
      criterion: how much a unit matters; `magnitude()` by default. Leaves under `batch_stats` are no weights.
      ranking: how many units of each group are cut at a ratio: `local()` by default, `global_()` or `isomorphic()`.
      round_to: the number of units that stay is rounded up to a multiple, where the group has as many.
      exclude: parameters (see `tree.select`) whose groups stay whole.
      force: parameters whose units may go though each counts for something, as in `coupled_channels`: experts, for one.

    Returns:
      `(small_apply, small_params, plan)`: a pure function that jits, differentiates, maps and trains on; the smaller tree; and the
      plan, which cuts the optimiser's state and other trees likewise.

    Raises:
      ValueError: not exactly one way to choose how much is given, one is out of range, a group is unknown, the budget cannot be
        met, nothing can be cut, or the function is another program each time it is traced.
      Exception: what tracing the function raises, as in `coupled_channels`.

    >>> params = {"a": jnp.array([[1.0, 0.1, 2.0]]), "b": jnp.ones((3, 1))}
    >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> small_apply, small, plan = slim(apply, params, jnp.ones((1, 1)), ratio=1 / 3)
    >>> print(plan)
    a: (1, 3) -> (1, 2)
    b: (3, 1) -> (2, 1)
    >>> small_apply(small, jnp.ones((4, 1))).tolist()
    [[3.0], [3.0], [3.0], [3.0]]

    Source: Li et al., "Pruning filters for efficient ConvNets", 2017; Fang et al., "DepGraph: towards any structural pruning",
    2023.
    """
    ways = {"ratio": ratio, "keep": keep, "budget": budget}
    if sum(way is not None for way in ways.values()) != 1:
        raise ValueError(f"give exactly one of {', '.join(ways)}")
    require(lambda n: n >= 1 and n == int(n), "be a whole number of at least 1", round_to=round_to)
    if keep is not None and round_to != 1:
        raise ValueError(f"round_to={round_to} goes with a ratio or a budget; keep says how many units stay as they are to be")
    predict, dense = getattr(apply, "predict", apply), decompress(params)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(dense)):
        raise ValueError("slim looks at weights to choose among them: give arrays; coupled_channels and tracing.count take shapes")
    forced = () if force is None else tuple(tree.selected(dense, force))
    found, _ = walked(predict, dense, example, forced=forced)
    made_of, coupling = fingerprint(predict, dense, *example), coupling_of(found)
    if of_program(found.program, dense, *example) != made_of:
        raise ValueError(
            "the function is another program each time it is traced: it reads or changes something outside of itself, such as a "
            "counter, a list or a random number; let it depend on its arguments alone"
        )
    kept_whole = set() if exclude is None else set(tree.selected(dense, exclude))
    groups = [g for g in coupling.groups if g.units > 1 and not kept_whole & {member.path for member in g.members}]
    if not groups:
        raise ValueError(f"nothing can be cut: {len(coupling.groups)} groups, all of one unit or excluded; see coupled_channels")
    names, leaves, _ = tree.flatten(dense)
    rows = [(name, leaf) for name, leaf in zip(names, leaves, strict=True) if hasattr(leaf, "shape")]
    weights = {name: jnp.asarray(leaf) for name, leaf in rows if "batch_stats" not in name.split("/")}
    score = criterion or magnitude()
    scores = [np.asarray(own) for own in jax.jit(lambda weights: [score(group, weights) for group in groups])(weights)]
    whole = Plan(
        {name: tuple(leaf.shape) for name, leaf in rows},
        {},
        forced=forced,
        made_of=made_of,
    )

    def at(ratio: float) -> Plan:
        cuts = (ranking or local())(groups, scores, ratio)
        return _plan(whole, groups, scores, [own.size - cut for own, cut in zip(scores, cuts, strict=True)], round_to)

    if keep is not None:
        wanted = counts_of(groups, keep, "keep")
        for group, n in zip(groups, wanted, strict=True):
            if not 1 <= n <= group.units or n != int(n):
                raise ValueError(f"keep={n} of {group.name}: give 1 to {group.units} units")
        plan = _plan(whole, groups, scores, wanted, 1)
    elif ratio is not None:
        require(lambda ratio: 0 <= ratio < 1, "lie in [0, 1): at 1 no group would have a unit left", ratio=ratio)
        plan = at(ratio)
    else:
        budgets = [budget] if isinstance(budget, Budget) else list(budget or ())
        plan = _within(at, predict, dense, example, budgets)
    return bound(apply, plan), plan.cut(dense), plan


def _plan(
    whole: Plan,
    groups: Sequence[Group],
    scores: Sequence[np.ndarray],
    wanted: Sequence[int],
    round_to: int,
) -> Plan:
    """The plan in which of each group so many units stay, those with the highest scores; ties keep the first."""
    gone = {path: [np.zeros(n, bool) for n in shape] for path, shape in whole.shapes.items()}
    for group, own, n in zip(groups, scores, wanted, strict=True):
        stay = min(group.units, -(-max(n, 1) // round_to) * round_to)
        for unit in np.argsort(-own, kind="stable")[stay:]:
            for member in group.members:
                gone[member.path][member.axis][member.indices[unit]] = True
    kept = {path: tuple(np.flatnonzero(~own) for own in axes) for path, axes in gone.items() if any(own.any() for own in axes)}
    return dataclasses.replace(whole, kept=kept)


def _within(
    at: Callable[[float], Plan], apply: Callable[..., Any], params: PyTree, example: Sequence[Any], budgets: Sequence[Budget]
) -> Plan:
    """The plan at the smallest ratio that is within the budgets."""
    if not budgets:
        raise ValueError("budget holds none: give one or more of surgery.parameters, macs and milliseconds")
    limits = [budget.limit(apply, params, example) for budget in budgets]

    def over(plan: Plan) -> list[str]:
        small, small_apply = plan.shapes_of(params), plan.bind(apply, same=False)
        said = []
        for budget, limit in zip(budgets, limits, strict=True):
            cost = budget.cost(small_apply, plan.cut(params) if budget.measures else small, example)
            if cost > limit:
                said.append(f"{cost:.6g} {budget.unit}, and {limit:.6g} are the most")
        return said

    low, high = 0, 64
    if too_many := over(at(63.5 / 64)):
        raise ValueError(f"the smallest slimming still takes {'; '.join(too_many)}: give a larger budget, or exclude less")
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if over(at(min(middle, 63.5) / 64)) else (low, middle)
    return at(min(low, 63.5) / 64)
