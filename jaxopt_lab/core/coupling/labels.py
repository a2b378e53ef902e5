"""Labels that stand for the indices of axes, and which of them are one: a union-find on arrays."""

from collections.abc import Sequence

import numpy as np

__all__ = ["Labels"]


_FIXED, _COUNTED, _FORCED, _OWNED, _BLOCKED = range(5)
"""Never cut; never cut unless forced; forced; an index of a parameter; copied together with its neighbours that are one with it."""


class Labels:
    """Labels are whole numbers; those that were united are kept or cut together, and those that are fixed are never cut.

    Some are owned: they stand for an index of a parameter. The others are copies, such as a broadcast makes. Some are forced: what
    would be another number without them (a maximum, a sum to which zeros add, a count) is then of those that are left.

    It grows while a program is walked; nothing of it outlives that.

    >>> labels = Labels()
    >>> a, b = labels.fresh(3), labels.fresh(3)
    >>> labels.unite(a, b[::-1])
    >>> labels.fix(a[:1], "it is an input")
    >>> labels.root(b).tolist(), labels.is_fixed(b).tolist(), labels.reason(b[2])
    ([2, 1, 0], [False, False, True], 'it is an input')
    """

    def __init__(self):
        self._parent = np.arange(1024)
        # By root, the rows named above.
        self._flags = np.zeros((5, 1024), bool)
        self._used = np.zeros(1024, bool)
        self._count = 0
        self._reasons: list[tuple[np.ndarray, str]] = []

    def fresh(self, *shape: int) -> np.ndarray:
        """New labels, of a shape."""
        n = int(np.prod(shape, dtype=np.int64))
        while self._count + n > len(self._parent):
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * len(self._parent))])
            self._flags = np.concatenate([self._flags, np.zeros_like(self._flags)], axis=1)
            self._used = np.concatenate([self._used, np.zeros_like(self._used)])
        first, self._count = self._count, self._count + n
        return np.arange(first, self._count).reshape(shape)

    def root(self, labels: np.ndarray) -> np.ndarray:
        """One label for all that are one, the least of them."""
        found = self._parent[labels]
        while (further := self._parent[found]) is not None and not np.array_equal(further, found):
            found = further
        self._parent[labels] = found
        return found

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Each label of `a` is one with that of `b` at the same place; they are broadcast against each other."""
        a, b = (x.reshape(-1) for x in np.broadcast_arrays(a, b))
        met = np.concatenate([self.root(a), self.root(b)])
        while True:
            a, b = self.root(a), self.root(b)
            differ = a != b
            if not differ.any():
                break
            a, b = a[differ], b[differ]
            low, high = np.minimum(a, b), np.maximum(a, b)
            # Where several lows meet one high, the least wins, and the others come round again.
            np.minimum.at(self._parent, high, low)
        for flags in self._flags:
            np.logical_or.at(flags, self.root(met), flags[met])

    def fix(self, labels: np.ndarray, reason: str, *, counted: bool = False) -> None:
        """Labels are never cut, or where each of them counts for something, not unless they are forced.

        A reason that was given before stands.
        """
        if not np.size(labels):
            return
        roots = np.unique(self.root(labels))
        self._flags[_COUNTED if counted else _FIXED, roots] = True
        self._reasons.append((roots, reason))

    def force(self, labels: np.ndarray) -> None:
        """Labels are cut though each of them counts for something."""
        self._flags[_FORCED, self.root(labels)] = True

    def block(self, labels: np.ndarray) -> None:
        """Labels that are one and lie side by side, such as those of a head, are copied together, not each by itself."""
        self._flags[_BLOCKED, self.root(labels)] = True

    def is_block(self, labels: np.ndarray) -> np.ndarray:
        """Which labels are copied together with those at their side that are one with them."""
        return self._flags[_BLOCKED, self.root(labels)]

    def own(self, labels: np.ndarray) -> None:
        """Labels stand for indices of a parameter."""
        self._flags[_OWNED, self.root(labels)] = True

    def is_owned(self, labels: np.ndarray) -> np.ndarray:
        """Which labels stand for indices of a parameter."""
        return self._flags[_OWNED, self.root(labels)]

    def use(self, labels: np.ndarray) -> None:
        """Labels, each by itself, stand for something that an operation reads."""
        self._used[labels] = True

    def is_used(self, labels: np.ndarray) -> np.ndarray:
        """Which labels stand, by themselves, for something that an operation reads."""
        return self._used[labels]

    def is_fixed(self, labels: np.ndarray) -> np.ndarray:
        """Which labels are never cut."""
        roots = self.root(labels)
        return self._flags[_FIXED, roots] | (self._flags[_COUNTED, roots] & ~self._flags[_FORCED, roots])

    def reason(self, label: int) -> str:
        """Why a label is fixed: the first reason that was given for any of those that are one with it."""
        root = self.root(np.asarray([label]))[0]
        return next((reason for labels, reason in self._reasons if (self.root(labels) == root).any()), "")

    def reasons(self) -> dict[int, str]:
        """For every root that is fixed, why."""
        found: dict[int, str] = {}
        for labels, reason in self._reasons:
            for root in np.unique(self.root(labels)).tolist():
                found.setdefault(root, reason)
        return found

    def all_one(self, labels: np.ndarray, axes: Sequence[int]) -> None:
        """Labels that differ along some axes of their array alone become one."""
        first = labels[tuple(slice(0, 1) if a in axes else slice(None) for a in range(labels.ndim))]
        self.unite(labels, first)

    def __len__(self) -> int:
        return self._count
