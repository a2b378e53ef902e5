"""Ranges of the inputs that each weight meets, for any model, from some batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.compress.arrays.observers import Observer, Range, min_max
from jaxopt_lab.core import tracing, tree
from jaxopt_lab.core.tracing import Live, Reducer, Site
from jaxopt_lab.core.types import PyTree, Where

__all__ = ["calibrate"]


def calibrate(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    observer: Observer | None = None,
    where: Where = "**/kernel",
    *,
    max_bytes: int | None = None,
) -> dict[str, Range]:
    """The range of the inputs of every chosen weight, over a set of batches.

    No model is edited: the inputs are looked at inside the compiled program, where the weights meet them. A weight that is met
    several times gets the union of what its observers propose; look-ups, whose inputs are indices, are left aside.

    Args:
      apply: `apply(params, *inputs) -> outputs`, such as `model.predict`.
      params: dense arrays; compress them afterwards.
      batches: each a dict with "x" (an array, or a tuple of several inputs), or the input itself. All alike but for their leading
        axes.
      observer: what to keep of an input, and which range to propose (see `arrays.observers`); the smallest and the largest value by
        default.
      where: which weights (see `tree.select`).
      max_bytes: of the observers' states at once; where they would exceed it, the batches are gone over several times.

    Returns:
      `{path: Range(low, high)}`, in tree order, as `static` takes it. The ends are float32 scalars; they have a leading axis for
      each scan that takes a layer at a time of a stacked weight, and one for channels if the observer keeps those.

    Raises:
      ValueError: there are no batches, one is not like the first, an input holds NaN or infinite values, a chosen weight meets no
        input or one that cannot be told, or nothing matches `where`.
      TypeError: `params` holds a compressed leaf.

    >>> params = {"kernel": jnp.ones((2, 1))}
    >>> batches = [{"x": jnp.array([[1.0, -2.0]])}, {"x": jnp.array([[4.0, 0.0]])}]
    >>> calibrate(lambda params, x: x @ params["kernel"], params, batches)
    {'kernel': Range(low=Array(-2., dtype=float32), high=Array(4., dtype=float32))}

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """
    observer = min_max() if observer is None else observer
    met: dict[str, Site] = {}

    def init(site: Site, live: Live) -> PyTree:
        met[site.name] = site
        return None if site.primitive == "gather" else observer.init(live.input)

    def update(site: Site, state: PyTree, live: Live) -> PyTree:
        return observer.update(state, live.input)

    states = tracing.collect(apply, params, batches, Reducer(init, update), where, max_bytes=max_bytes)
    found: dict[str, Range] = {}
    for name, state in states.items():
        site, range_of = met[name], observer.range
        for _ in range(sum(scan.sliced for scan in site.scans)):
            range_of = jax.vmap(range_of)
        low, high = range_of(state)
        _check(site.path, low, high)
        seen = found.get(site.path, Range(low, high))
        found[site.path] = Range(jnp.minimum(seen.low, low), jnp.maximum(seen.high, high))
    chosen = tree.selected(params, where)
    if unmet := [path for path in chosen if path not in found]:
        raise ValueError(f"{unmet[0]} is only looked up in, by indices, which have no range; leave it out of `where`")
    return {path: found[path] for path in chosen}


def _check(path: str, low: Any, high: Any) -> None:
    low, high = np.asarray(low), np.asarray(high)
    if (low > high).any():
        raise ValueError(
            f"{path} met no input in all the batches: it lies in a branch that was never taken; leave it out of `where`"
        )
    if not (np.isfinite(low) & np.isfinite(high)).all():
        raise ValueError(f"{path} met inputs that hold NaN or infinite values, which have no range")
