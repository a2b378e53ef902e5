"""How a sparsity of the whole is spread over the leaves."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from jaxopt_lab.core.types import Schedule

__all__ = ["Distribution", "erdos_renyi_kernel", "global_", "threshold", "uniform"]

Shapes = Sequence[tuple[int, ...]]


class Distribution(NamedTuple):
    """How many units each leaf gives up.

    Attributes:
      allocate: `(shapes, sparsity) -> one sparsity a leaf`, or None where the leaves compete or an absolute threshold decides. It
        must be plain Python: it runs on the host. What it gives is clipped to 0 to 1.
      below: the absolute threshold under which a score is cut, a number or a schedule; None where a count decides.
    """

    allocate: Callable[[Shapes, Any], tuple[Any, ...]] | None
    below: float | Schedule | None = None

    @property
    def joint(self) -> bool:
        """Whether all leaves compete for the same places."""
        return self.allocate is None and self.below is None


def global_() -> Distribution:
    """All leaves compete: the smallest scores of the whole tree are cut, wherever they are.

    >>> global_().joint
    True
    """
    return Distribution(None)


def uniform() -> Distribution:
    """Every leaf has the sparsity of the whole.

    >>> uniform().allocate([(4, 2), (2, 2)], 0.5)
    (0.5, 0.5)
    """
    return Distribution(lambda shapes, sparsity: (sparsity,) * len(shapes))


def erdos_renyi_kernel() -> Distribution:
    r"""Thin leaves stay denser: density in proportion to the sum of the axes over their product.

    .. math:: 1 - s_l = \min\Big(1, \epsilon \, \frac{\sum_j d_{lj}}{\prod_j d_{lj}}\Big), \qquad \sum_l n_l s_l = s \sum_l n_l

    Leaves that would exceed density 1 are dense, and the scale :math:`\epsilon` is solved again over the rest.

    >>> [round(s, 5) for s in erdos_renyi_kernel().allocate([(784, 300), (300, 100), (100, 10)], 0.9)]
    [0.92043, 0.76981, 0.0]

    Source: Evci et al., "Rigging the lottery: making all tickets winners", 2020; Mocanu et al., 2018 for the matrices.
    """
    return Distribution(_erdos_renyi_kernel)


def threshold(tau: float | Schedule) -> Distribution:
    """No target: every score below `tau` is cut, whatever sparsity that gives.

    Args:
      tau: in units of the criterion's score (of the weights themselves for `magnitude`), a number or a schedule.

    Raises:
      TypeError: tau is neither a number nor a schedule.
      ValueError: tau is NaN.

    >>> threshold(1e-2).below
    0.01

    Source: Han et al., "Learning both weights and connections for efficient neural networks", 2015.
    """
    if not callable(tau) and not isinstance(tau, (Real, np.ndarray, jax.Array)):
        raise TypeError(f"threshold: tau must be a number or a schedule; got {tau!r}")
    if not callable(tau) and not isinstance(tau, Tracer) and math.isnan(tau):
        raise ValueError("threshold: tau is NaN, and no score is below it; give a number")
    return Distribution(None, tau)


def _erdos_renyi_kernel(shapes: Shapes, sparsity: float) -> tuple[float, ...]:
    sizes = [math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        room = (1.0 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        scale = room / sum(sum(shapes[i]) for i in rest) if rest else 0.0
        density = [1.0 if i in dense else scale * sum(shapes[i]) / sizes[i] for i in range(len(shapes))]
        over = {i for i in rest if density[i] > 1.0}
        if not over:
            return tuple(1.0 - d for d in density)
        dense |= over
