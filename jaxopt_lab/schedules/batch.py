"""Batch-size plans: how many examples each step takes, where in the data it stands, and the learning rate that goes with it.

A plan lives on the host, since a size is a shape. It holds few distinct sizes, and a step function compiles once for each.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from operator import index
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jaxopt_lab.core.checks import require
from jaxopt_lab.core.types import Schedule
from jaxopt_lab.schedules._host import backend, hosted

__all__ = [
    "BatchPlan",
    "batch_from_iterations",
    "capped_growth_rate",
    "constant_batch",
    "full_batch",
    "grow_batch",
    "piecewise_batch",
    "scaled_rate",
]


class BatchPlan(NamedTuple):
    """The batch size at each step, piecewise constant; built by the functions of this module, which check it.

    >>> plan = BatchPlan(sizes=(32, 64), boundaries=(100,))
    >>> plan(99), plan(100), plan.offset(101), plan.run(99), plan.run(100)
    (32, 64, 3264, 1, None)
    """

    sizes: tuple[int, ...]
    """The sizes in their order."""
    boundaries: tuple[int, ...] = ()
    """The step at which `sizes[k + 1]` takes over; one fewer than the sizes."""

    def __call__(self, step: int) -> int:
        """The batch size at `step`, a host integer of at least 0."""
        return self.sizes[bisect_right(self.boundaries, _step(step))]

    def offset(self, step: int) -> int:
        """How many examples were consumed before `step`, in exact integers."""
        edges = (0, *(min(boundary, _step(step)) for boundary in self.boundaries), _step(step))
        return sum(size * (after - before) for size, (before, after) in zip(self.sizes, pairwise(edges), strict=True))

    def run(self, step: int) -> int | None:
        """For how many steps, this one included, the size stays what it is at `step`; None is for ever."""
        k = bisect_right(self.boundaries, _step(step))
        return self.boundaries[k] - index(step) if k < len(self.boundaries) else None


def _step(step: Any) -> int:
    if (step := index(step)) < 0:
        raise ValueError(f"a step is at least 0; got {step}")
    return step


def piecewise_batch(sizes: Sequence[int], boundaries: Sequence[int]) -> BatchPlan:
    """Any sizes with any boundaries.

    Args:
      sizes: examples a step, each at least 1.
      boundaries: the step at which each size but the first takes over; positive, rising, one fewer than the sizes.

    Raises:
      ValueError: a size is below 1, the numbers do not fit, or the boundaries do not rise from above 0.

    >>> piecewise_batch([16, 128], [1000])
    BatchPlan(sizes=(16, 128), boundaries=(1000,))
    """
    sizes, boundaries = tuple(map(index, sizes)), tuple(map(index, boundaries))
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch sizes must be at least 1; got {sizes}")
    if len(sizes) != len(boundaries) + 1:
        raise ValueError(f"a plan needs one boundary fewer than sizes; got sizes={sizes} and boundaries={boundaries}")
    if any(before >= after for before, after in pairwise((0, *boundaries))):
        raise ValueError(f"boundaries must rise from above 0; got {boundaries}")
    return BatchPlan(sizes, boundaries)


def constant_batch(size: int) -> BatchPlan:
    """The same size at every step.

    Raises:
      ValueError: `size` is below 1.

    >>> constant_batch(64)(1000)
    64
    """
    return piecewise_batch([size], [])


def full_batch(examples: int) -> BatchPlan:
    """All examples at every step: plain gradient descent, without the noise of sampling.

    Args:
      examples: how many examples the data set holds.

    Raises:
      ValueError: `examples` is below 1.

    >>> full_batch(1437)(0)
    1437
    """
    return constant_batch(examples)


def batch_from_iterations(examples: int, iterations: int) -> BatchPlan:
    r"""The smallest constant batch with which an epoch takes at most `iterations` steps.

    .. math:: B = \lceil n / I \rceil

    Args:
      examples: :math:`n`, how many examples the data set holds.
      iterations: :math:`I`, steps an epoch; between 1 and `examples`.

    Raises:
      ValueError: there are no examples, or `iterations` does not lie between 1 and `examples`.

    >>> batch_from_iterations(1000, 16)(0)
    63
    """
    if not 1 <= index(iterations) <= index(examples):
        raise ValueError(
            f"iterations must lie between 1 and the number of examples; got iterations={iterations}, examples={examples}"
        )
    return constant_batch(-(-index(examples) // index(iterations)))


def grow_batch(initial: int, factor: float, boundaries: Sequence[int], maximum: int) -> BatchPlan:
    r"""Grows the batch where one would have decayed the learning rate: the same fall of the noise scale in fewer, larger steps.

    .. math:: B_k = \min\left(\mathrm{round}(B_0 f^k),\ B_{\max}\right)

    Boundaries after the maximum is reached change nothing and are left out of the plan; `capped_growth_rate` decays the rate there.

    Args:
      initial: :math:`B_0`, the first size.
      factor: :math:`f`, how many times larger each size is than the one before; above 1.
      boundaries: the steps at which the batch grows; positive and rising.
      maximum: :math:`B_{\max}`, the largest size that memory or the data allow; at least `initial`.

    Raises:
      ValueError: one of these does not hold.

    >>> grow_batch(32, 4, boundaries=[100, 200, 300], maximum=256)
    BatchPlan(sizes=(32, 128, 256), boundaries=(100, 200))

    Source: Smith, Kindermans, Ying and Le, "Don't decay the learning rate, increase the batch size", 2018.
    """
    require(lambda factor: (factor > 1) & np.isfinite(factor), "be above 1", factor=factor)
    require(lambda initial, maximum: initial <= maximum, "rise or be equal", initial=initial, maximum=maximum)
    # The cap comes before the power: a long list of boundaries must not overflow.
    most = math.ceil(math.log(maximum / initial) / math.log(factor)) if initial > 0 else 0
    sizes = [min(round(initial * factor ** min(k, most)), maximum) for k in range(len(boundaries) + 1)]
    grown = [k for k in range(1, len(sizes)) if sizes[k] != sizes[k - 1]]
    piecewise_batch(sizes, boundaries)
    return piecewise_batch([sizes[0], *(sizes[k] for k in grown)], [boundaries[k - 1] for k in grown])


def scaled_rate(rate: ArrayLike, plan: BatchPlan, reference: ArrayLike, power: ArrayLike = 1.0) -> Schedule:
    r"""The learning rate for a plan, scaled from the batch size at which it was tuned.

    .. math:: \eta(t) = \eta_0 \left(\frac{B(t)}{B_0}\right)^p

    Args:
      rate: :math:`\eta_0`, tuned at the reference size.
      plan: :math:`B(t)`.
      reference: :math:`B_0`, the batch size at which `rate` was tuned; positive.
      power: 1 is linear scaling, for SGD; 0.5 the square root, for adaptive methods.

    Returns:
      A schedule of the step; unlike the plan it may be traced.

    Raises:
      ValueError: `reference` is not positive.

    >>> rate = scaled_rate(0.1, piecewise_batch([256, 1024], [50]), reference=256)
    >>> float(rate(49)), float(rate(50))
    (0.1, 0.4)

    Source: Goyal et al., "Accurate, large minibatch SGD", 2017 (linear); Krizhevsky, "One weird trick", 2014 (square root).
    """
    require(lambda reference: reference > 0, "be positive", reference=reference)

    def curve(xp, t, *, rate, reference, power):
        return rate * (_sizes_at(t, plan) / reference) ** power

    return hosted(curve, rate=rate, reference=reference, power=power)


def capped_growth_rate(rate: ArrayLike, plan: BatchPlan, factor: ArrayLike, boundaries: Sequence[int]) -> Schedule:
    r"""The learning rate beside `grow_batch`: constant while the batch grows, decayed at the boundaries where it no longer can.

    .. math:: \eta(t) = \eta_0\, \frac{B(t)}{B(0)}\, f^{-k(t)}

    where :math:`k(t)` counts the boundaries passed, so that the noise scale :math:`\eta / B` falls by :math:`f` at each of them,
    whichever of the two gives way.

    Args:
      rate: :math:`\eta_0`, the rate at step 0.
      plan: what `grow_batch` returned for the same factor and boundaries.
      factor: :math:`f`; above 1.
      boundaries: all the steps at which the noise scale is to fall.

    Raises:
      ValueError: `factor` is not above 1.

    >>> plan = grow_batch(32, 4, boundaries=[100, 200, 300], maximum=256)
    >>> rate = capped_growth_rate(0.1, plan, 4, boundaries=[100, 200, 300])
    >>> [float(rate(step)) for step in (0, 100, 200, 300)]
    [0.1, 0.1, 0.05, 0.0125]

    Source: Smith, Kindermans, Ying and Le, "Don't decay the learning rate, increase the batch size", 2018.
    """
    require(lambda factor: factor > 1, "be above 1", factor=factor)

    def curve(xp, t, *, rate, factor):
        passed = sum((xp.where(t >= boundary, 1.0, 0.0) for boundary in boundaries), xp.zeros_like(t))
        return rate * (_sizes_at(t, plan) / plan.sizes[0]) * factor ** (-passed)

    return hosted(curve, rate=rate, factor=factor)


def _sizes_at(t: Any, plan: BatchPlan) -> Any:
    """The size at each count of `t`, in the float type of `t`, whichever library it comes from."""
    xp = backend(t)
    sizes = xp.asarray(plan.sizes, t.dtype)
    return sizes[xp.searchsorted(xp.asarray(plan.boundaries, t.dtype), t, side="right")]
