"""One curve, two arithmetics: numpy in float64 for counts of the host, JAX for everything traced."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Schedule

__all__ = ["backend", "between", "fraction", "hosted", "safe_power"]


def backend(*values: Any) -> ModuleType:
    """`jax.numpy` if any of the values is a JAX array (tracers are), else `numpy`.

    >>> backend(3, 0.5).__name__, backend(jnp.int32(3), 0.5).__name__
    ('numpy', 'jax.numpy')
    """
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def hosted(curve: Callable[..., Any], **hyper: Any) -> Schedule:
    """The schedule `count -> curve(xp, count, **hyper)`, where `xp` is numpy or `jax.numpy` and all numbers are its floats.

    >>> float(hosted(lambda xp, t, slope: slope * t, slope=0.5)(3))
    1.5
    """

    def schedule(count: Any) -> Any:
        xp = backend(count, *hyper.values())
        number = (lambda value: jnp.asarray(value, float)) if xp is jnp else np.float64
        # `np.where` makes 0-d arrays; a host caller should get a plain number.
        return curve(xp, number(count), **{name: number(value) for name, value in hyper.items()})[()]

    return schedule


def fraction(xp: ModuleType, elapsed: Any, steps: Any) -> Any:
    """Which part of `steps` has passed: 0 before the first, 1 from the last on.

    >>> [float(fraction(np, t, 10)) for t in (-5, 5, 20)]
    [0.0, 0.5, 1.0]
    """
    return xp.clip(elapsed / steps, 0.0, 1.0)


def between(xp: ModuleType, initial: Any, final: Any, remaining: Any) -> Any:
    """`initial` where `remaining` is 1, `final` where it is 0, to the last bit; on the line between them elsewhere.

    >>> [float(between(np, 0.1, 0.9, r)) for r in (1.0, 0.5, 0.0)]
    [0.1, 0.5, 0.9]
    """
    return xp.where(remaining == 1, initial, final + (initial - final) * remaining)


def safe_power(xp: ModuleType, base: Any, exponent: Any) -> Any:
    """`base ** exponent` for a base of at least 0 and a positive exponent; the gradient at 0 is 0, where roots would give NaN.

    >>> float(jax.grad(lambda base: safe_power(jnp, base, 0.5))(0.0))
    0.0
    """
    positive = base > 0
    return xp.where(positive, xp.where(positive, base, 1.0) ** exponent, 0.0)
