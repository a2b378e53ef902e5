"""What data must be before anything is trained on it: as many rows everywhere, finite numbers, labels in range."""

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["validate"]

_CHUNK = 1 << 22
"""Numbers looked at in one go, so that a check of large arrays needs little memory of its own."""


def validate(arrays: Mapping[str, Any], classes: int | None = None) -> dict[str, np.ndarray]:
    """Checks arrays whose first axis counts examples, and returns them as numpy arrays.

    Args:
      arrays: numpy or JAX arrays by key, each of shape `[N, ...]`.
      classes: how many classes there are, if `arrays["y"]` holds labels: integers in `[0, classes)`.

    Returns:
      The same arrays by key; what is a numpy array already is not copied.

    Raises:
      ValueError: there are no arrays or no examples, lengths differ, a value is NaN or infinite, or a label is out of range; the
        message names the key, the index and the value.
      TypeError: an array holds no numbers, or the labels are no integers.

    >>> validate({"x": np.ones((2, 3)), "y": np.array([0, 7])}, classes=3)
    Traceback (most recent call last):
      ...
    ValueError: y holds the label 7 at index 1, and labels must lie in [0, 3); 1 of 2 do not
    """
    found = {key: np.asarray(value) for key, value in arrays.items()}
    check_lengths(found)
    for key, array in found.items():
        check_finite(key, array)
    if classes is not None:
        check_labels(found, classes)
    return found


def check_lengths(arrays: Mapping[str, np.ndarray]) -> int:
    """The number of examples, once every array has as many; errors as in `validate`."""
    if not arrays:
        raise ValueError('the data has no arrays; give a dict such as {"x": x, "y": y}')
    for key, array in arrays.items():
        if array.ndim == 0:
            raise ValueError(f"{key} is a scalar ({array}); its first axis must count examples")
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"arrays disagree on the number of examples: {', '.join(f'{key} has {n}' for key, n in lengths.items())}")
    examples = next(iter(lengths.values()))
    if examples == 0:
        raise ValueError(f"the data has no examples: {', '.join(f'{key} has shape {a.shape}' for key, a in arrays.items())}")
    return examples


def check_finite(key: str, array: np.ndarray) -> None:
    """Raises a ValueError that names the first number that is not finite; errors as in `validate`."""
    if array.dtype.kind in "biu":
        return
    rows = max(1, _CHUNK // max(1, array.size // len(array)))
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        try:
            finite = np.isfinite(part)
        except TypeError:
            raise TypeError(f"{key} holds {array.dtype}, not numbers; convert it first") from None
        if not finite.all():
            place = np.unravel_index(int(np.argmin(finite)), part.shape)
            index = (start + int(place[0]), *(int(k) for k in place[1:]))
            shown = index[0] if len(index) == 1 else index
            raise ValueError(f"{key} holds {part[place]} at index {shown}; repair that example or leave it out")


def check_labels(arrays: Mapping[str, np.ndarray], classes: int) -> None:
    """Raises an error that names the first label out of range; errors as in `validate`."""
    if "y" not in arrays:
        raise ValueError(f'{classes} classes, but no labels: the arrays are {", ".join(arrays)}; name the labels "y"')
    labels = arrays["y"]
    if labels.dtype.kind not in "iu":
        raise TypeError(f"y holds {labels.dtype}, and labels of {classes} classes must be integers; cast them, or give no classes")
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        place = tuple(int(k) for k in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
        shown = place[0] if len(place) == 1 else place
        raise ValueError(
            f"y holds the label {labels[place]} at index {shown}, and labels must lie in [0, {classes}); {int(wrong.sum())} of "
            f"{wrong.size} do not"
        )
