"""What is kept beside the arrays of a checkpoint: metadata, metrics, a fingerprint, and the versions that wrote it."""

import functools
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from typing import Any

from jaxopt_lab.core import files

__all__ = ["compare_fingerprints", "described", "numbers", "versions"]

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


def described(
    metadata: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None, fingerprint: Mapping[str, str] | None, step: int
) -> dict[str, dict[str, Any]]:
    """The entries of a manifest that say what a checkpoint is, checked.

    Args:
      metadata: JSON values under any names but `versions`.
      metrics: numbers, or arrays of one.
      fingerprint: what must be equal where the checkpoint is used.
      step: for errors.

    Raises:
      ValueError: something is no JSON, no number, or no text.

    >>> described({"data": "digits"}, {"loss": float("nan")}, None, 3)["metrics"]
    {'loss': None}
    """
    metadata, fingerprint = dict(metadata or {}), dict(fingerprint or {})
    if "versions" in metadata:
        raise ValueError(f"metadata of checkpoint {step} has an entry 'versions', which holds those of the packages: rename it")
    for name, value in fingerprint.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(f"the fingerprint of checkpoint {step} has {name!r}: {value!r}, which is not text")
    try:
        # Of the keys 1 and "1" JSON makes one, which nobody could read again.
        json.loads(json.dumps(metadata, allow_nan=False), object_pairs_hook=_once)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata of checkpoint {step} is not JSON: {error}") from None
    return {
        "metadata": metadata,
        "metrics": files.finite(numbers(metrics, step)),
        "fingerprint": fingerprint,
        "versions": versions(),
    }


def _once(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise ValueError(f"a dict has two keys that JSON writes alike, among {[key for key, _ in pairs]}")


def numbers(metrics: Mapping[str, Any] | None, step: int) -> dict[str, float]:
    """Metrics as Python's floats.

    Raises:
      ValueError: one is no number.

    >>> numbers({"loss": "low"}, 3)
    Traceback (most recent call last):
      ...
    ValueError: the metric 'loss' of checkpoint 3 is 'low', which is no number
    """
    found = {}
    for name, value in (metrics or {}).items():
        try:
            found[str(name)] = float("text" if isinstance(value, str) else value)
        except (TypeError, ValueError):
            raise ValueError(f"the metric {name!r} of checkpoint {step} is {value!r}, which is no number") from None
    return found


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    # Not from its metadata, which a checkout on PYTHONPATH has not; and the package is loaded, or this would not be.
    ours = sys.modules[__name__.partition(".")[0]].__version__
    return (*((name, importlib.metadata.version(name)) for name in _PACKAGES), ("jaxopt_lab", ours))


def versions() -> dict[str, str]:
    """The versions of this package and those below it.

    >>> sorted(versions())
    ['flax', 'jax', 'jaxopt_lab', 'optax', 'orbax-checkpoint']
    """
    return dict(_versions())


def compare_fingerprints(then: Mapping[str, str], now: Mapping[str, str] | None, source: str) -> None:
    """Raises a ValueError that names what differs between the fingerprint of a checkpoint and the one wanted; None wants nothing.

    >>> compare_fingerprints({"optimiser": "a1", "code": "c"}, {"optimiser": "b2", "code": "c"}, "checkpoint 3")
    Traceback (most recent call last):
      ...
    ValueError: checkpoint 3 is of another run: optimiser was 'a1' and is 'b2'
    """
    if now is None:
        return
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if names:
        what = "; ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in names)
        raise ValueError(f"{source} is of another run: {what}")
