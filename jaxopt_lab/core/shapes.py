"""Shapes, and what becomes of their axes."""

from collections.abc import Sequence

__all__ = ["equal_blocks"]


def equal_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[slice, slice]] | None:
    """The axes of two shapes in the smallest neighbouring blocks of equal size; None where they have none.

    >>> [(shape[0], shape[1]) for shape in equal_blocks((2, 3, 4), (6, 2, 2))]
    [(slice(0, 2, None), slice(0, 1, None)), (slice(2, 3, None), slice(1, 3, None))]
    """
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first_old, first_new = i, j
        left, right = (old[i] if i < len(old) else 1), (new[j] if j < len(new) else 1)
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif left > right and j < len(new):
                right, j = right * new[j], j + 1
            else:
                return None
        blocks.append((slice(first_old, i), slice(first_new, j)))
    return blocks
