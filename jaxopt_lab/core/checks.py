"""One-line errors that name what is wrong."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from jax.core import Tracer

__all__ = ["naming", "require"]


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


@contextmanager
def naming(path: str, shape: Sequence[int] | None = None) -> Iterator[None]:
    """Puts the path of a parameter, and perhaps its shape, before the message of a ValueError or TypeError.

    >>> with naming("Dense_0/bias", (3,)):
    ...     require(lambda rank: rank == 2, "be 2", rank=1)
    Traceback (most recent call last):
      ...
    ValueError: Dense_0/bias of shape (3,): rank must be 2; got 1
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        of = "" if shape is None else f" of shape {tuple(shape)}"
        raise kind(f"{path or 'the array'}{of}: {error}") from error
