"""The Pareto front: what no other beats."""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

__all__ = ["front"]

_SIGNS = {"minimize": 1.0, "maximize": -1.0}


def front(values: ArrayLike, directions: Sequence[str]) -> np.ndarray:
    r"""The rows that no other row dominates, being as good in every column and better in one.

    .. math:: \{ i : \nexists j : s v_j \le s v_i \text{ in every column}, v_j \ne v_i \}

    with s the signs of the directions. Of equal rows all are there or none. A row with a NaN is not, and dominates nothing.

    Args:
      values: `[n, m]`, a row a candidate and a column an objective; infinities are values like others.
      directions: m, each "minimize" or "maximize".

    Returns:
      The indices of the rows, ascending.

    Raises:
      ValueError: the values are no matrix of so many columns, or a direction is another word.

    >>> front([[1.0, 5.0], [2.0, 4.0], [2.0, 5.0], [0.0, np.nan], [2.0, 4.0]], ["minimize", "minimize"]).tolist()
    [0, 1, 4]
    >>> front([[1.0, 5.0], [2.0, 4.0], [2.0, 5.0]], ["minimize", "maximize"]).tolist()
    [0]
    """
    if odd := [direction for direction in directions if direction not in _SIGNS]:
        raise ValueError(f'a direction is "minimize" or "maximize"; got {odd[0]!r}')
    values = np.asarray(values, float)
    if values.ndim != 2 or values.shape[1] != len(directions) or not len(directions):
        raise ValueError(f"values must be [n, {len(directions)}], a column for each direction; their shape is {values.shape}")
    costs = values * [_SIGNS[direction] for direction in directions]
    rows = np.flatnonzero(~np.isnan(costs).any(axis=1))
    # What dominates a row stands before it in this order, and, domination being transitive, on the front that is known by then.
    rows = rows[np.lexsort(costs[rows].T[::-1])]
    best, count, chosen = np.empty((len(rows), costs.shape[1])), 0, []
    for row in rows:
        near = best[:count][(best[:count] <= costs[row]).all(axis=1)]
        if not (near < costs[row]).any():
            best[count], count = costs[row], count + 1
            chosen.append(int(row))
    return np.array(sorted(chosen), int)
