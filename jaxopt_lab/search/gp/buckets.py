"""Sizes that arrays are padded to, so that a program is compiled once a bucket and not once a trial."""

import bisect

import numpy as np

from jaxopt_lab.core.types import Array

__all__ = ["bucket", "pad"]

_SIZES = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)


def bucket(n: int, smallest: int = 16) -> int:
    """The size that `n` is padded to: 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, then multiples of 512.

    Above 128 a step is a half rather than twice as much: the cubic cost of what is padded would outweigh a program less. With
    another `smallest` (for dimensions and boxes: 4) the sizes are its powers of two.

    >>> [bucket(n) for n in (1, 16, 17, 130, 1025)], bucket(5, smallest=4)
    ([16, 16, 32, 192, 1536], 8)
    """
    if smallest != _SIZES[0]:
        return smallest * 2 ** max(0, (max(n, 1) - 1) // smallest).bit_length()
    place = bisect.bisect_left(_SIZES, n)
    return _SIZES[place] if place < len(_SIZES) else -(-n // 512) * 512


def pad(array: Array, *sizes: int, value: float = 0.0) -> np.ndarray:
    """The array in the corner of one of these sizes, the rest filled with a value.

    >>> pad(np.ones((1, 2)), 2, 3)
    array([[1., 1., 0.],
           [0., 0., 0.]])
    """
    array = np.asarray(array)
    return np.pad(array, [(0, size - n) for size, n in zip(sizes, array.shape, strict=True)], constant_values=value)
