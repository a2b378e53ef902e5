"""One-line errors about settings that are numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.core import Tracer

__all__ = ["require"]


def require(holds: Callable[..., Any], must: str, **values: Any) -> None:
    """Raises a one-line ValueError unless `holds(*values)`; traced values are taken on trust.

    Args:
      holds: a function of the values as numpy arrays, in their order; each element of what it gives must be true.
      must: how the message goes on after the names of the values.
      values: the settings by name, numbers or arrays.

    Raises:
      ValueError: it does not hold.

    >>> require(lambda steps: steps > 0, "be positive", steps=-1)
    Traceback (most recent call last):
      ...
    ValueError: steps must be positive; got -1
    >>> require(lambda begin, end: begin < end, "rise", begin=5, end=4)
    Traceback (most recent call last):
      ...
    ValueError: begin and end must rise; got begin=5, end=4
    """
    if any(isinstance(value, Tracer) for value in values.values()):
        return
    if not np.all(holds(*map(np.asarray, values.values()))):
        shown = [str(value) if len(values) == 1 else f"{name}={value}" for name, value in values.items()]
        raise ValueError(f"{' and '.join(values)} must {must}; got {', '.join(shown)}")
