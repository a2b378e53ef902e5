"""Which rows are trained on and which are held out: scikit-learn's splitters, with keys, and with errors before they start.

Folds are pairs (train, test) of row numbers, so any splitter of scikit-learn serves as well: `TimeSeriesSplit(5).split(x)`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxopt_lab.core.types import Array

__all__ = ["Fold", "check_folds", "grouped", "kfold", "stratified"]


class Fold(NamedTuple):
    """One division of the rows.

    Attributes:
      train: `[n]`, the row numbers that are trained on.
      test: `[m]`, those that are held out.
    """

    train: np.ndarray
    test: np.ndarray


def kfold(rows: int, folds: int, key: Array | None = None, *, repeats: int = 1) -> tuple[Fold, ...]:
    """Every row is held out once, in folds of sizes that differ by at most one.

    Args:
      rows: how many rows there are.
      folds: k, at least 2 and at most the rows (which leaves one out at a time).
      key: of the shuffling; None keeps the rows in order.
      repeats: how many times over, each time shuffled anew.

    Returns:
      repeats x k folds.

    Raises:
      ValueError: fewer than 2 folds, more folds than rows, or repeats without a key.

    >>> [fold.test.tolist() for fold in kfold(5, 2)]
    [[0, 1, 2], [3, 4]]
    """
    from sklearn.model_selection import KFold

    _check_count(folds, rows, "rows")
    return _repeated(KFold, folds, key, repeats, np.zeros(rows))


def stratified(labels: ArrayLike, folds: int, key: Array | None = None, *, repeats: int = 1) -> tuple[Fold, ...]:
    """As `kfold`, with the share of every class kept in each fold.

    Args:
      labels: `[N]`, the class of each row.
      folds, key, repeats: as for `kfold`.

    Raises:
      ValueError: as for `kfold`, or a class has fewer members than there are folds; the message names it.

    >>> [fold.test.tolist() for fold in stratified([0, 0, 0, 0, 1, 1], 2)]
    [[0, 1, 4], [2, 3, 5]]
    """
    from sklearn.model_selection import StratifiedKFold

    labels = _column(labels, "labels")
    _check_count(folds, len(labels), "rows")
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < folds:
        least = int(counts.argmin())
        raise ValueError(
            f"class {classes[least]} has {counts[least]} members and there are {folds} folds; a stratified fold needs one of "
            f"every class: take at most {counts[least]} folds, or kfold"
        )
    return _repeated(StratifiedKFold, folds, key, repeats, np.zeros(len(labels)), labels)


def grouped(
    groups: ArrayLike, folds: int, key: Array | None = None, *, labels: ArrayLike | None = None, repeats: int = 1
) -> tuple[Fold, ...]:
    """As `kfold`, with all rows of a group (a patient, a day) on the same side, so that none is known from training.

    Args:
      groups: `[N]`, the group of each row.
      folds: at most the number of groups.
      key, repeats: as for `kfold`.
      labels: `[N]`, classes whose shares to keep as far as whole groups allow; None to balance sizes alone.

    Raises:
      ValueError: as for `kfold`, fewer groups than folds, or labels of another length.

    >>> [fold.test.tolist() for fold in grouped(["a", "b", "a", "c"], 3)]
    [[0, 2], [3], [1]]
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    groups = _column(groups, "groups")
    _check_count(folds, len(np.unique(groups)), "groups")
    if labels is None:
        return _repeated(GroupKFold, folds, key, repeats, np.zeros(len(groups)), None, groups)
    labels = _column(labels, "labels")
    if len(labels) != len(groups):
        raise ValueError(f"there are {len(labels)} labels and {len(groups)} groups; give one of each a row")
    if np.unique(labels, return_counts=True)[1].min() < folds:
        raise ValueError(f"a class has fewer than {folds} members, so not every fold can hold one; leave labels out")
    return _repeated(StratifiedGroupKFold, folds, key, repeats, np.zeros(len(groups)), labels, groups)


def check_folds(folds: Iterable[Any], rows: int) -> tuple[Fold, ...]:
    """Pairs of row numbers as folds.

    Raises:
      TypeError: row numbers that are no integers.
      ValueError: no fold, or a fold with an empty side, a row that does not exist, or one on both sides.

    >>> check_folds([([0, 1], [1])], 3)
    Traceback (most recent call last):
      ...
    ValueError: fold 0: row 1 is both trained on and held out
    """
    checked = []
    for number, fold in enumerate(folds):
        train, test = (np.asarray(side) for side in fold)
        for name, side in (("train", train), ("test", test)):
            if not side.size:
                raise ValueError(f"fold {number}: {name} is empty")
            if side.ndim != 1 or not np.issubdtype(side.dtype, np.integer):
                raise TypeError(f"fold {number}: {name} must be row numbers, integers [n]; got {side.dtype}{list(side.shape)}")
            wrong = side[(side < 0) | (side >= rows)]
            if wrong.size:
                raise ValueError(f"fold {number}: {name} holds row {wrong[0]}, and the data has {rows} rows")
        both = np.intersect1d(train, test)
        if both.size:
            raise ValueError(f"fold {number}: row {both[0]} is both trained on and held out")
        checked.append(Fold(train, test))
    if not checked:
        raise ValueError("there are no folds; kfold(rows, 5, key) makes some")
    return tuple(checked)


def _repeated(splitter: Any, folds: int, key: Array | None, repeats: int, *arrays: Any) -> tuple[Fold, ...]:
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1; got {repeats}")
    if key is None:
        if repeats > 1:
            raise ValueError(f"{repeats} repeats without a key would all be the same; give a key")
        return tuple(Fold(*pair) for pair in splitter(folds).split(*arrays))
    seeds = np.asarray(jax.random.bits(key, (repeats,), "uint32"))
    return tuple(Fold(*pair) for seed in seeds for pair in splitter(folds, shuffle=True, random_state=int(seed)).split(*arrays))


def _check_count(folds: int, most: int, of: str) -> None:
    if not 2 <= folds <= most:
        raise ValueError(f"folds must lie between 2 and the number of {of}; got {folds} folds and {most} {of}")


def _column(values: Any, name: str) -> np.ndarray:
    column = np.asarray(values)
    if column.ndim != 1:
        raise ValueError(f"{name} must be one a row, [N]; got shape {column.shape}")
    return column
