"""The next point of a search: processes fitted, candidates scored, the best refined and moved over the grids."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats.qmc

from jaxopt_lab.core.types import Array
from jaxopt_lab.search.gp import outputs
from jaxopt_lab.search.gp.acquisition import boxes
from jaxopt_lab.search.gp.buckets import bucket, pad
from jaxopt_lab.search.gp.kernel import INACTIVE
from jaxopt_lab.search.gp.maximise import Question, fantasies, refined, score
from jaxopt_lab.search.gp.precision import exactly
from jaxopt_lab.search.gp.process import Data, Hyper, Process, condition, data, fit

__all__ = ["Known", "Space", "draw", "names", "suggest"]


class Space(NamedTuple):
    """Dimensions as arrays.

    Attributes:
      categorical: which are categories [d], bool; their coordinates are indices 0, 1, ...
      levels: how many values there are [d]; 0 for a continuous one, whose coordinates are in [0, 1]. A value of a grid lies in
        the middle of its share: (i + 1/2) / levels.
    """

    categorical: np.ndarray
    levels: np.ndarray


class Known(NamedTuple):
    """What is known of a search; larger values are better.

    Attributes:
      x: points [n, d]; `INACTIVE` where a point does not have a dimension.
      y: finite values [n, M].
      constraints: at most 0 where feasible [n, C]; C may be 0.
      pending: points that are being evaluated [p, d].
    """

    x: np.ndarray
    y: np.ndarray
    constraints: np.ndarray
    pending: np.ndarray


_SPREAD, _NEAR, _STARTS, _FANTASIES = 1024, 128, 12, 16


def draw(space: Space, unit: np.ndarray) -> np.ndarray:
    """Points by numbers in [0, 1): each value of a grid or category as likely as another; [n, d].

    >>> draw(Space(np.array([False, False, True]), np.array([0, 2, 2])), np.array([[0.7, 0.7, 0.7]])).tolist()
    [[0.7, 0.75, 1.0]]
    """
    index = np.floor(unit * space.levels)
    grid = np.where(space.categorical, index, (index + 0.5) / np.maximum(space.levels, 1))
    return np.where(space.levels > 0, grid, unit)


def names(points: np.ndarray) -> list[bytes]:
    """A key a point [n, d]; points nearer than a billionth of the range have one.

    >>> first, second = names(np.array([[0.5, 0.0], [0.5 + 1e-12, -0.0]]))
    >>> first == second
    True
    """
    return [row.tobytes() for row in points.round(9) + 0.0]


def suggest(
    space: Space, known: Known, rng: np.random.Generator, *, noise: float | None = None, warp_inputs: bool = False
) -> np.ndarray:
    """The point of the largest expected gain [d].

    Processes are fitted to the values as `outputs` scales them, the gain's logarithm (improvement, or hypervolume for several
    objectives, and the probability of feasibility) is scored at 1024 spread points and 128 near the best, and the 12 best are
    refined together.

    One recipe does not suit all; each has functions on which it never comes away from where it is. So they take turns, by the
    number of points. At odd turns values are taken as exact, else the noise is fitted: Ackley-5 then ends at 2 to 3 and not at 6,
    where its ripples pass for noise, while what is noisy keeps half of the turns. At each third turn length scales are halved, as
    a fit that is too sure of itself sees nothing to gain but where it is. For three turns in ten continuous coordinates keep
    within 0.2 of a leader (a trust region, after Eriksson et al. 2019).

    Pending points are fantasised: 16 joint draws for one objective, the posterior mean for several. For one objective that is the
    greedy choice of a batch by its joint expected improvement (Wilson, Hutter and Deisenroth 2018): what a point adds to the
    pending ones is its improvement on the best of each draw. No point is suggested twice while there is another.

    Args:
      space: the dimensions.
      known: at least one point with its values.
      rng: the only source of chance.
      noise: the variance of the noise of standardised values, where it is known.
      warp_inputs: whether points are warped where that is worth it, see `process.fit`.

    >>> x = np.array([[0.1], [0.4], [0.7], [0.9]])
    >>> known = Known(x, -((x - 0.5) ** 2), np.zeros((4, 0)), np.zeros((0, 1)))
    >>> found = suggest(Space(np.array([False]), np.array([0])), known, np.random.default_rng(0))
    >>> bool(0.3 < found[0] < 0.7)
    True
    """
    # Several objectives keep their trade-off, and a known noise its size.
    scaled = outputs.warp if known.y.shape[1] == 1 and not noise else outputs.standardise
    values = np.column_stack([scaled(y) for y in known.y.T])
    limits = np.column_stack([_standardised_limit(c) for c in known.constraints.T]) if known.constraints.shape[1] else None
    columns = values if limits is None else np.column_stack([values, limits[:-1]])
    fits = [data(known.x, y, space.categorical) for y in columns.T]
    turn = len(known.x) + len(known.pending)
    hypers = [_varied(fit(each, noise=0.0 if noise is None and turn % 2 else noise, warp=warp_inputs), turn) for each in fits]
    with exactly():
        question, lengths = _ask(known, columns, values, limits, fits[0].categorical, hypers, rng)
        return _maximum(space, known, question, lengths, _leaders(known, values), rng)


def _varied(hyper: Hyper, turn: int) -> Hyper:
    """The fit; at every third turn with length scales of half the size."""
    if turn % 3:
        return hyper
    # Dimensions that are padding have a coordinate of 0 everywhere: there it means nothing.
    return hyper._replace(inverse_squares=np.minimum(hyper.inverse_squares + np.log(4.0), 9.2))


def _standardised_limit(constraint: np.ndarray) -> np.ndarray:
    """A constraint standardised, and after it what 0 became [n + 1]."""
    scaled = constraint / max(np.abs(constraint).max(), 1e-300)
    deviation = scaled.std() if scaled.std() > 1e-12 else 1.0
    return np.append((scaled - scaled.mean()) / deviation, -scaled.mean() / deviation)


@jax.jit
def _processes(hypers: Hyper, data: Data, pending: Array, normals: Array) -> tuple[Process, Array, Array]:
    """Processes [T] over known and pending points, values [T, F, N] with fantasies, and weights [F, T, N]."""

    def one(hyper, each):
        process = condition(hyper, each)
        y = fantasies(process, each.y, pending, normals)
        return process, y, y @ process.inverse.T @ process.inverse

    process, y, weights = jax.vmap(one)(hypers, data)
    return process, y, jnp.swapaxes(weights, 0, 1)


def _ask(known, columns, values, limits, categorical, hypers, rng) -> tuple[Question, np.ndarray]:
    n, p, objectives = len(known.x), len(known.pending), values.shape[1]
    x = np.concatenate([known.x, known.pending])
    N, D = bucket(n + p), len(categorical)
    stacked = Data(*(np.stack([a] * columns.shape[1]) for a in data(x, np.zeros(n + p), categorical[: x.shape[1]])))
    stacked = stacked._replace(y=pad(np.concatenate([columns, np.zeros((p, columns.shape[1]))]).T, columns.shape[1], N))
    pending = (np.arange(N) >= n) & (np.arange(N) < n + p)
    draws = _FANTASIES if p and objectives == 1 else 1
    normals = rng.standard_normal((draws, N)) if draws > 1 else np.zeros((1, N))
    hyper = jax.tree.map(lambda *leaves: np.stack(leaves), *hypers)
    processes, y, weights = _processes(hyper, stacked, pending, normals)
    y, w = np.asarray(y), np.asarray(weights)
    # What the process makes of a noisy value is y - noise weights: the best of these is not the luckiest of the draws.
    smooth = np.stack([y[m] - np.exp(hypers[m].noise) * w[:, m] for m in range(objectives)], -1)  # [F, N, M]
    feasible = np.ones(n, bool) if limits is None else (known.constraints <= 0).all(1)
    lower, upper = _boxes(smooth, feasible, n, p if limits is None else 0)
    constrained = {}
    if limits is not None:
        own = jax.tree.map(lambda a: a[objectives:], processes)
        constrained = {"constraints": own._replace(weights=weights[0, objectives:]), "thresholds": limits[-1]}
    question = Question(
        jax.tree.map(lambda a: a[:objectives], processes),
        weights[:, :objectives],
        lower,
        upper,
        np.asarray(float(feasible.any())),
        **constrained,
    )
    # One scale a dimension for all: the shortest.
    return question, np.exp(-0.5 * hyper.inverse_squares[:, :D].max(0))


def _boxes(smooth: np.ndarray, feasible: np.ndarray, n: int, pending: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Corners [F, K, M] of what no feasible value dominates; `upper` None for one objective."""
    counted = np.concatenate([np.flatnonzero(feasible), n + np.arange(pending)])
    if not feasible.any():
        shape = (len(smooth), 1 if smooth.shape[2] == 1 else 32, smooth.shape[2])
        return np.zeros(shape), None if smooth.shape[2] == 1 else np.full(shape, np.inf)
    if smooth.shape[2] == 1:
        return smooth[:, counted].max(1)[:, None, :], None
    lowers, uppers = zip(*(_tiles(values[counted]) for values in smooth), strict=True)
    size = bucket(max(map(len, lowers)), smallest=32)
    objectives = smooth.shape[2]
    pads = (size, objectives)
    return np.stack([pad(a, *pads, value=-np.inf) for a in lowers]), np.stack([pad(a, *pads, value=np.inf) for a in uppers])


# As many points of a front as give some thousand boxes.
_LARGEST_FRONT = {2: 500, 3: 60, 4: 20}


def _tiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes over the reference point: a tenth of the range of all values below the worst of the front."""
    over = (values[:, None] >= values[None]).all(-1) & (values[:, None] > values[None]).any(-1)
    front = np.unique(values[~over.any(0)], axis=0)
    reference = front.min(0) - 0.1 * np.maximum(np.ptp(values, axis=0), 1e-3)
    most = _LARGEST_FRONT.get(values.shape[1], 10)
    if len(front) > most:
        front = front[_apart(front, most)]
    return boxes(front, reference)


def _apart(points: np.ndarray, size: int) -> np.ndarray:
    """`size` of the points [n, d], each the farthest from those before."""
    chosen, distance = [int(points.sum(1).argmax())], np.full(len(points), np.inf)
    while len(chosen) < size:
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    return np.array(chosen)


def _leaders(known: Known, values: np.ndarray) -> np.ndarray:
    """Known points worth a look around: the best of the sum of objectives and of each, or the least infeasible."""
    if known.constraints.shape[1]:
        excess = np.maximum(known.constraints, 0).sum(1)
        values = np.where((excess > 0)[:, None], -1e6 * (1 + excess[:, None]), values)
    order = [values.sum(1).argsort()[::-1][:2], *(column.argsort()[::-1][:1] for column in values.T)]
    return known.x[np.unique(np.concatenate(order))]


def _maximum(space, known, question, lengths, leaders, rng) -> np.ndarray:
    """The unseen point [d] of the largest score."""
    D, grids = len(lengths), (space.levels > 0).any()
    activity = _activity(space, known.x)
    seen = set(names(np.concatenate([known.x, known.pending])))
    low, high = _region(space, leaders, rng)
    points = np.concatenate([_spread(space, rng, low, high), _around(space, leaders, rng)])
    # Coordinates of old ranges may lie outside, and so may what is near them.
    points = activity(np.where(space.levels == 0, np.clip(points, low, high), points))
    fresh = _fresh(points, seen)
    points = points[fresh] if fresh.any() else points
    starts = np.resize(points[_starts(_scores(question, points, D), len(points))], (_STARTS, points.shape[1]))
    drawn, value = starts[0], np.full(_STARTS, -np.inf)
    for _ in range(3 if grids else 1):
        starts, value = _climb(space, question, starts, lengths, low, high)
        if not grids:
            break
        moved, reached = _over_grids(space, question, starts, activity, seen, D, rng)
        better = reached > value + 1e-9
        starts, value = np.where(better[:, None], moved, starts), np.where(better, reached, value)
        if not better.any():
            break
    fresh = _fresh(starts, seen)
    # All may have climbed to where something is already, such as an end of the range: then the best candidate as it was drawn.
    return starts[int(np.where(fresh, value, -np.inf).argmax())] if fresh.any() else drawn


def _fresh(points: np.ndarray, seen: set[bytes]) -> np.ndarray:
    return np.array([name not in seen for name in names(points)])


def _region(space: Space, leaders: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Between what continuous coordinates are searched [d]: all, or within 0.2 of a leader for three turns in ten."""
    centre = leaders[rng.integers(len(leaders))]
    if rng.random() >= 0.3:
        return np.zeros(len(centre)), np.ones(len(centre))
    free = centre <= INACTIVE
    return np.where(free, 0, np.clip(centre - 0.2, 0, 0.8)), np.where(free, 1, np.clip(centre + 0.2, 0.2, 1))


def _spread(space: Space, rng: np.random.Generator, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """All points of a small grid; else a Sobol sequence, shifted by chance, with its continuous coordinates in a region."""
    d = len(space.levels)
    if (space.levels > 0).all() and np.prod(space.levels.astype(float)) <= _SPREAD:
        index = np.stack(np.unravel_index(np.arange(np.prod(space.levels)), tuple(space.levels)), -1)
        return draw(space, (index + 0.5) / space.levels)
    base = scipy.stats.qmc.Sobol(d, scramble=False).random(_SPREAD)
    unit = (base + rng.random(d)) % 1
    return draw(space, np.where(space.levels == 0, low + (high - low) * unit, unit))


def _around(space: Space, leaders: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points near the leaders [128, d], at distances from 1e-4 to 0.3 of the range, in some or all dimensions."""
    d, size = len(space.levels), (_NEAR, len(space.levels))
    centre = leaders[rng.integers(len(leaders), size=_NEAR)]
    anew = draw(space, rng.random(size))
    centre = np.where(centre <= INACTIVE, anew, centre)
    moved = np.clip(centre + rng.normal(size=size) * 10.0 ** rng.uniform(-4, -0.5, size=(_NEAR, 1)), 0, 1)
    steps = np.clip(np.floor(centre * space.levels) + rng.integers(-2, 3, size=size), 0, np.maximum(space.levels - 1, 0))
    moved = np.where(space.levels > 0, (steps + 0.5) / np.maximum(space.levels, 1), moved)
    return np.where(rng.random(size) < max(0.5, 2 / d), np.where(space.categorical, anew, moved), centre)


def _scores(question: Question, points: np.ndarray, D: int) -> np.ndarray:
    """Scores [n], as many as 1152 at a time, of one compiled program."""
    size = _SPREAD + _NEAR
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    found = np.concatenate([np.asarray(score(question, pad(part, size, D)))[: len(part)] for part in parts])
    return np.where(np.isfinite(found), found, -np.inf)


def _starts(scores: np.ndarray, n: int) -> np.ndarray:
    """The best of the spread candidates, and four of those near the leaders, which else crowd out the others."""
    near = np.arange(n) >= max(n - _NEAR, 0)
    order = np.argsort(-scores, kind="stable")
    return np.concatenate([order[~near[order]][: _STARTS - 4], order[near[order]][:4]])


def _climb(space: Space, question: Question, starts: np.ndarray, lengths: np.ndarray, low: np.ndarray, high: np.ndarray):
    """The starts moved in their continuous dimensions, and their scores."""
    d, D = starts.shape[1], len(lengths)
    moving = (space.levels == 0)[None, :] & (starts > INACTIVE)
    if not moving.any():
        return starts, _scores(question, starts, D)
    low, high = (pad(np.where(moving, end[None, :], starts), _STARTS, D) for end in (low, high))
    found, value = jax.device_get(refined(question, pad(starts, _STARTS, D), lengths, low, high))
    return found[:, :d], np.where(np.isfinite(value), value, -np.inf)


def _over_grids(space, question, starts, activity, seen, D, rng) -> tuple[np.ndarray, np.ndarray]:
    """The best of the points that differ from each start in one grid or category [S, d], with its score [S].

    Of a dimension with more than 16 values, those at distances 1, 2, 4, ... are tried: as the search comes again, it halves.
    """
    tries, owners = [], []
    for owner, start in enumerate(starts):
        for dim in np.flatnonzero((space.levels > 0) & (start > INACTIVE)):
            levels = int(space.levels[dim])
            here = int(start[dim] if space.categorical[dim] else start[dim] * levels)
            if levels <= 16 or space.categorical[dim]:
                others = np.delete(np.arange(levels), here)
            else:
                leaps = 2 ** np.arange(int(levels).bit_length())
                others = np.concatenate([here - leaps, here + leaps])
                others = others[(others >= 0) & (others < levels)]
            if len(others) > 64:
                others = rng.choice(others, 64, replace=False)
            changed = np.repeat(start[None], len(others), 0)
            changed[:, dim] = others if space.categorical[dim] else (others + 0.5) / levels
            tries.append(changed)
            owners.append(np.full(len(others), owner))
    if not tries or not sum(map(len, tries)):
        return starts, np.full(len(starts), -np.inf)
    points, owner = np.concatenate(tries), np.concatenate(owners)
    # Another category may bring dimensions that the start lacks: they are drawn.
    points = activity(np.where(points <= INACTIVE, draw(space, rng.random(points.shape)), points))
    if len(points) > 2 * (_SPREAD + _NEAR):
        kept = rng.choice(len(points), 2 * (_SPREAD + _NEAR), replace=False)
        points, owner = points[kept], owner[kept]
    value = np.where(_fresh(points, seen), _scores(question, points, D), -np.inf)
    best, reached = starts.copy(), np.full(len(starts), -np.inf)
    for s in range(len(starts)):
        mine = np.flatnonzero(owner == s)
        if len(mine):
            top = mine[value[mine].argmax()]
            best[s], reached[s] = points[top], value[top]
    return best, reached


def _activity(space: Space, x: np.ndarray):
    """What makes points alike those seen in which dimensions they have.

    In a conditional space the dimensions that a point has follow from some of its grids and categories, those that every point
    has. Which, is learnt: they are taken one by one, each the one that leaves the fewest points whose dimensions differ from those
    of another with the same values, until none is left or none helps. A new point has the dimensions of the last seen point that
    is the nearest in these.
    """
    has = x > INACTIVE
    if has.all():
        return lambda points: points
    roots = _roots(space, x, has)
    weight = 2.0 ** -np.arange(len(roots))
    scale = np.where(space.categorical[roots], 1.0, np.maximum(space.levels[roots], 1))

    def limited(points: np.ndarray) -> np.ndarray:
        away = np.abs(points[:, None, roots] - x[None, ::-1][:, :, roots]) * scale
        away = np.where(space.categorical[roots], away > 0, away)
        nearest = len(x) - 1 - (away * weight).sum(-1).argmin(1)
        return np.where(has[nearest], points, INACTIVE)

    return limited


def _roots(space: Space, x: np.ndarray, has: np.ndarray) -> list[int]:
    """The dimensions that tell which others a point has, the most telling first."""
    candidates = [int(d) for d in np.flatnonzero((space.levels > 0) & has.all(0))]
    names = np.array([row.tobytes() for row in has])

    def unexplained(dims: list[int]) -> int:
        groups: dict[bytes, list[bytes]] = {}
        for row, name in zip(x[:, dims], names, strict=True):
            groups.setdefault(row.round(9).tobytes(), []).append(name)
        return sum(len(group) - max(group.count(name) for name in set(group)) for group in groups.values())

    roots: list[int] = []
    left = unexplained(roots)
    while left and candidates:
        best = min(candidates, key=lambda d: (unexplained([*roots, d]), space.levels[d]))
        now = unexplained([*roots, best])
        if now >= left:
            break
        roots, left = [*roots, best], now
        candidates.remove(best)
    return roots
