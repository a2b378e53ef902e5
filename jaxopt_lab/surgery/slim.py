"""Models made smaller: of every group of coupled units those are cut that matter least."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import require
from jaxopt_lab.core.tracing import count
from jaxopt_lab.core.types import Array, PyTree, Where
from jaxopt_lab.surgery.coupled import Group, Member, coupled_channels
from jaxopt_lab.surgery.plan import Plan

__all__ = ["Criterion", "Ranking", "geometric_median", "global_", "local", "magnitude", "random", "slim", "taylor"]

Criterion = Callable[[Group, Mapping[str, Array]], Array]
"""`(group, weights by path) -> [units]`: how much each unit matters."""

Ranking = Callable[[Sequence[Array], float], Sequence[int]]
"""`(scores of each group, ratio) -> how many units of each group are cut`."""


def magnitude(p: float = 2.0) -> Criterion:
    r"""A unit matters by the size of its weights, in each member against the mean of the group.

    .. math:: s_u = \frac{1}{|M|} \sum_{m \in M} \frac{s_{m,u}}{\mathrm{mean}_v \, s_{m,v}}, \qquad s_{m,u} = \sum_{i \in u} |w_i|^p

    over the members :math:`M` of the group, so that none outweighs the others by its number of weights.

    Args:
      p: the power.

    Raises:
      ValueError: `p` is not positive.

    >>> group = Group((Member("w", 1, np.array([[0], [1]])),))
    >>> magnitude()(group, {"w": jnp.array([[1.0, 3.0], [1.0, 1.0]])}).tolist()  # doctest: +ELLIPSIS
    [0.33..., 1.66...]

    Source: Li et al., "Pruning filters for efficient ConvNets", 2017; Fang et al., "DepGraph: towards any structural pruning",
    2023.
    """
    require(lambda p: p > 0, "be positive", p=p)
    return _by_entries(lambda path, w: jnp.abs(w) ** p)


def taylor(gradients: PyTree, *, squared: bool = False) -> Criterion:
    r"""A unit matters by what the loss would change without it, to first order: :math:`s_u = |\sum_{i \in u} w_i g_i|`.

    Args:
      gradients: of the loss, a tree with the paths of the parameters; weights that it lacks do not count.
      squared: sum :math:`(w_i g_i)^2` instead, as an estimate of the Fisher information.

    >>> group = Group((Member("w", 0, np.array([[0], [1]])),))
    >>> taylor({"w": jnp.array([3.0, -1.0])})(group, {"w": jnp.array([1.0, 1.0])}).tolist()
    [1.5, 0.5]

    Source: Molchanov et al., "Importance estimation for neural network pruning", 2019.
    """
    names, leaves, _ = tree.flatten(gradients)
    given = dict(zip(names, leaves, strict=True))

    def entries(path: str, w: Array) -> Array:
        products = jnp.zeros_like(w) if path not in given else w * jnp.asarray(given[path])
        return products**2 if squared else products

    return _by_entries(entries)


def geometric_median() -> Criterion:
    r"""A unit matters by how far it lies from all others of its group: what others can stand for goes first.

    .. math:: s_u = \sum_v \lVert w_u - w_v \rVert_2

    >>> group = Group((Member("w", 0, np.array([[0], [1], [2]])),))
    >>> geometric_median()(group, {"w": jnp.array([0.0, 1.0, 5.0])}).tolist()
    [6.0, 5.0, 9.0]

    Source: He et al., "Filter pruning via geometric median for deep convolutional neural networks acceleration", 2019.
    """

    def score(group: Group, weights: Mapping[str, Array]) -> Array:
        members = [member for member in group.members if member.path in weights]
        rows = jnp.concatenate([_slices(member, weights[member.path]) for member in members], axis=1)
        return jnp.sum(jnp.sqrt(jnp.sum((rows[:, None] - rows[None]) ** 2, axis=2)), axis=1)

    return score


def random(key: Array) -> Criterion:
    """Units matter at random: what every criterion has to beat.

    Args:
      key: a typed PRNG key; each group draws its own numbers.

    >>> random(jax.random.key(0))(Group((Member("w", 0, np.array([[0], [1]])),)), {}).shape
    (2,)
    """

    def score(group: Group, weights: Mapping[str, Array]) -> Array:
        del weights
        return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(group.name.encode())), (group.units,))

    return score


def local() -> Ranking:
    """Of every group the same part is cut.

    >>> local()([jnp.arange(8.0), jnp.arange(3.0)], 0.5)
    [4, 2]
    """
    return lambda scores, ratio: [round(ratio * len(own)) for own in scores]


def global_() -> Ranking:
    """Of all units together a part is cut, those with the lowest scores against the mean of their group.

    >>> global_()([jnp.array([1.0, 9.0]), jnp.array([2.0, 2.0, 1.7])], 0.4)
    [1, 1]
    """

    def cuts(scores: Sequence[Array], ratio: float) -> list[int]:
        against = [np.asarray(own) / max(float(np.mean(own)), 1e-30) for own in scores]
        every = np.concatenate([np.zeros(0), *against])
        order = np.argsort(every, kind="stable")[: round(ratio * len(every))]
        owner = np.repeat(np.arange(len(scores)), [len(own) for own in scores])
        return np.bincount(owner[order], minlength=len(scores)).tolist()

    return cuts


def slim(
    apply: Callable[..., Any],
    params: PyTree,
    *example: Any,
    ratio: float | None = None,
    keep: Mapping[str, int] | None = None,
    max_parameters: int | None = None,
    max_macs: int | None = None,
    criterion: Criterion | None = None,
    ranking: Ranking | None = None,
    round_to: int = 1,
    exclude: Where | None = None,
) -> tuple[Any, PyTree, Plan]:
    r"""Cuts the units that matter least: a smaller tree, and the same function on it.

    No model is edited. Coupled channels are found in the traced program (`coupled_channels`), of each group the units with the
    lowest scores are cut from all of its members, and the function runs at the smaller shapes: `small_apply(small_params, x)` is
    `apply(mask(params, plan), x)` where no mean is taken over units, as LayerNorm does: that is of the units that are left. Units
    that would add to a sum though they are zeros (the sum of an exponential) are protected.

    Args:
      apply: `apply(params, *inputs) -> outputs`; or a `nets.Model`, whose `predict` is walked, and which comes back as a model.
      params: any tree, with running statistics; compressed leaves become dense.
      example: inputs, arrays or shapes. Batch and length stay free.
      ratio: the part of the units that is cut, in [0, 1); of each group at least one unit stays.
      keep: instead, by the name of a group (as `path[axis]` of any of its members), how many of its units stay; the other groups
        stay whole.
      max_parameters: instead, the smallest ratio of 64 steps at which no more numbers are left in the tree.
      max_macs: instead, or together with that, the same of multiplications in a call on the example, as `tracing.count` counts.
      criterion: how much a unit matters; `magnitude()` by default. Leaves under `batch_stats` are no weights.
      ranking: how many units of each group are cut at a ratio: `local()` by default, or `global_()`.
      round_to: the number of units that stay is rounded up to a multiple, where the group has as many.
      exclude: parameters (see `tree.select`) whose groups stay whole.

    Returns:
      `(small_apply, small_params, plan)`: a pure function that jits, differentiates, maps and trains on; the smaller tree; and the
      plan, which cuts the optimiser's state and other trees likewise.

    Raises:
      ValueError: not exactly one way to choose how much is given, one is out of range, a group is unknown, the budget cannot be
        met, or nothing can be cut.

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
    ways = {"ratio": ratio, "keep": keep, "max_parameters or max_macs": max_macs if max_parameters is None else max_parameters}
    if sum(way is not None for way in ways.values()) != 1:
        raise ValueError(f"give exactly one of {', '.join(ways)}")
    require(lambda n: n >= 1, "be at least 1", round_to=round_to)
    predict, dense = getattr(apply, "predict", apply), decompress(params)
    coupling = coupled_channels(predict, dense, *example)
    kept_whole = set() if exclude is None else set(tree.selected(dense, exclude))
    groups = [g for g in coupling.groups if g.units > 1 and not kept_whole & {member.path for member in g.members}]
    if not groups:
        raise ValueError(f"nothing can be cut: {len(coupling.groups)} groups, all of one unit or excluded; see coupled_channels")
    names, leaves, _ = tree.flatten(dense)
    rows = list(zip(names, leaves, strict=True))
    weights = {name: jnp.asarray(leaf) for name, leaf in rows if "batch_stats" not in name.split("/")}
    score = criterion or magnitude()
    scores = [np.asarray(own) for own in jax.jit(lambda weights: [score(group, weights) for group in groups])(weights)]
    shapes = {name: tuple(jnp.shape(leaf)) for name, leaf in rows}

    def at(ratio: float) -> Plan:
        cuts = (ranking or local())(scores, ratio)
        return _plan(shapes, groups, scores, [own.size - cut for own, cut in zip(scores, cuts, strict=True)], round_to)

    if keep is not None:
        plan = _plan(shapes, groups, scores, _wanted(groups, keep), 1)
    elif ratio is not None:
        require(lambda ratio: 0 <= ratio < 1, "lie in [0, 1): at 1 no group would have a unit left", ratio=ratio)
        plan = at(ratio)
    else:
        plan = _within(at, predict, dense, example, max_parameters, max_macs)
    return _bound(apply, plan), plan.cut(dense), plan


def _bound(apply: Any, plan: Plan) -> Any:
    """The function, or the model, of the smaller tree."""
    if not hasattr(apply, "predict"):
        return plan.bind(apply)
    init = lambda *args, **kwargs: plan.cut(apply.init(*args, **kwargs))  # noqa: E731
    return apply._replace(init=init, apply=plan.bind(apply.apply), predict=plan.bind(apply.predict))


def _wanted(groups: Sequence[Group], keep: Mapping[str, int]) -> list[int]:
    """How many units of each group stay."""
    wanted = [group.units for group in groups]
    for name, n in keep.items():
        found = [k for k, group in enumerate(groups) if name in {f"{member.path}[{member.axis}]" for member in group.members}]
        if not found:
            known = ", ".join(group.name for group in groups[:8])
            raise ValueError(f"keep names {name}, which is in no group that can be cut; there are {known}")
        for k in found:
            if not 1 <= n <= groups[k].units:
                raise ValueError(f"keep={n} of {name}: give 1 to {groups[k].units} units")
            wanted[k] = n
    return wanted


def _plan(
    shapes: Mapping[str, tuple[int, ...]],
    groups: Sequence[Group],
    scores: Sequence[np.ndarray],
    wanted: Sequence[int],
    round_to: int,
) -> Plan:
    """The plan in which of each group so many units stay, those with the highest scores; ties keep the first."""
    gone = {path: [np.zeros(n, bool) for n in shape] for path, shape in shapes.items()}
    for group, own, n in zip(groups, scores, wanted, strict=True):
        stay = min(group.units, -(-max(n, 1) // round_to) * round_to)
        for unit in np.argsort(-own, kind="stable")[stay:]:
            for member in group.members:
                gone[member.path][member.axis][member.indices[unit]] = True
    kept = {path: tuple(np.flatnonzero(~own) for own in axes) for path, axes in gone.items() if any(own.any() for own in axes)}
    return Plan(dict(shapes), kept)


def _within(
    at: Callable[[float], Plan], apply: Any, params: PyTree, example: Any, max_parameters: int | None, max_macs: int | None
) -> Plan:
    """The plan at the smallest ratio that is within the budgets."""

    def costs(plan: Plan) -> tuple[int, int]:
        small = jax.eval_shape(plan.cut, params)
        return tree.size(small), 0 if max_macs is None else count(plan.bind(apply), small, *example).macs

    def fits(plan: Plan) -> bool:
        parameters, macs = costs(plan)
        return (max_parameters is None or parameters <= max_parameters) and (max_macs is None or macs <= max_macs)

    low, high = 0, 64
    if not fits(at(63.5 / 64)):
        parameters, macs = costs(at(63.5 / 64))
        least = f"{parameters} parameters" + ("" if max_macs is None else f" and {macs} multiplications")
        raise ValueError(f"the smallest slimming leaves {least}: give a larger budget, or exclude less")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(at(min(middle, 63.5) / 64)) else (middle + 1, high)
    return at(min(low, 63.5) / 64)


def _slices(member: Member, w: Array) -> Array:
    """The entries of each unit in a member, `[units, entries]`."""
    return jnp.moveaxis(w, member.axis, 0)[member.indices].reshape(len(member.indices), -1)


def _by_entries(entries: Callable[[str, Array], Array]) -> Criterion:
    """A criterion that sums over entries, each member against its mean."""

    def score(group: Group, weights: Mapping[str, Array]) -> Array:
        total = jnp.zeros(group.units)
        members = [member for member in group.members if member.path in weights]
        for member in members:
            own = jnp.abs(jnp.sum(_slices(member, entries(member.path, weights[member.path]).astype(jnp.float32)), axis=1))
            mean = jnp.mean(own)
            total += own / jnp.where(mean > 0, mean, 1) / len(members)
        return total

    return score
