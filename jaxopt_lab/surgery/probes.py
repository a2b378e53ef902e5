"""Inputs to try a changed function with, and how far its outputs are apart."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import PyTree

__all__ = ["apart", "numbers", "probes"]


def probes(arrays: Sequence[Any], rng: np.random.Generator, times: int = 4) -> list[list[Any]]:
    """The arrays of an example, and others like them: an example may be all zeros, or take one branch of several.

    Args:
      arrays: or shapes, for which numbers are drawn.
      rng: draws normal numbers of the example's size. Integers and keys stay.
      times: how many others.

    >>> first, second = probes([np.ones(2, np.float32), np.array(3)], np.random.default_rng(0), 1)
    >>> first[0].tolist(), second[0].dtype, second[1].tolist()
    ([1.0, 1.0], dtype('float32'), 3)
    """
    first = [numbers(array, rng) for array in arrays]

    def other(array: Any) -> Any:
        if not _inexact(array):
            return array
        held = np.abs(np.asarray(array, np.complex128 if np.iscomplexobj(array) else np.float64))
        size = float(np.sqrt(np.mean(held[np.isfinite(held)] ** 2))) if held.size else 0.0
        return (rng.normal(size=np.shape(array)) * (size or 1.0)).astype(array.dtype)

    return [first, *([other(array) for array in first] for _ in range(times))]


def numbers(array: Any, rng: np.random.Generator) -> Any:
    """An array as it is, and some numbers for a shape: positive ones, as a running variance has to be; integers are 0.

    >>> numbers(jax.ShapeDtypeStruct((2,), "int32"), np.random.default_rng(0)).tolist()
    [0, 0]
    """
    if not isinstance(array, jax.ShapeDtypeStruct):
        return array
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), array.shape)
    drawn = rng.uniform(0.1, 1.0, array.shape) if _inexact(array) else np.zeros(array.shape)
    return np.asarray(drawn, array.dtype)


def apart(before: PyTree, after: PyTree) -> float:
    """How far some outputs are from others, against the largest of each; infinity where integers differ, or what is no number.

    >>> apart([np.array([1.0, 2.0])], [np.array([1.0, 2.5])]), apart([np.array(1)], [np.array(2)]), apart(np.nan, np.nan)
    (0.25, inf, 0.0)
    """
    worst = 0.0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if not _inexact(old):
            worst = max(worst, 0.0 if _same_values(old, new) else np.inf)
            continue
        kind = np.complex128 if np.iscomplexobj(old) else np.float64
        a, b = np.asarray(old).astype(kind), np.asarray(new).astype(kind)
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return np.inf
        size = np.abs(a[finite]).max(initial=0)
        worst = max(worst, float(np.abs(a[finite] - b[finite]).max(initial=0) / (size or 1.0)))
    return worst


def _inexact(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.inexact)


def _same_values(a: Any, b: Any) -> bool:
    if jax.dtypes.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(a, b)
