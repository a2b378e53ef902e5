"""Sparsity over the steps of a run: the fraction of weights that are zero."""

from jax.typing import ArrayLike

from jaxopt_lab.core.checks import require
from jaxopt_lab.core.types import Schedule
from jaxopt_lab.schedules._host import between, fraction, hosted

__all__ = ["cubic"]


def cubic(initial: ArrayLike, final: ArrayLike, begin: ArrayLike, end: ArrayLike) -> Schedule:
    r"""Sparsity that rises fast while weights are plentiful and slowly towards its end.

    .. math:: s(t) = s_1 + (s_0 - s_1) \left(1 - \frac{t - b}{e - b}\right)^3, \qquad b \le t \le e

    Args:
      initial: the sparsity up to `begin`, in [0, 1].
      final: the sparsity from `end` on, in [0, 1]; met exactly.
      begin: the first count of the rise.
      end: the last count of the rise; after `begin`.

    Returns:
      A schedule. Host counts give float64, so `cubic(0.0, 0.9, 500, 4000)(4000) == 0.9`.

    Raises:
      ValueError: a sparsity lies outside [0, 1], or `end` does not lie after `begin`.

    >>> import numpy as np
    >>> cubic(0.0, 0.8, begin=100, end=300)(np.array([0, 100, 200, 300, 400]))
    array([0. , 0. , 0.7, 0.8, 0.8])

    Source: Zhu and Gupta, "To prune, or not to prune", 2017.
    """
    require(
        lambda initial, final: (initial >= 0) & (initial <= 1) & (final >= 0) & (final <= 1),
        "lie in [0, 1]",
        initial=initial,
        final=final,
    )
    require(lambda begin, end: begin < end, "rise", begin=begin, end=end)

    def curve(xp, t, *, initial, final, begin, end):
        return between(xp, initial, final, (1 - fraction(xp, t - begin, end - begin)) ** 3)

    return hosted(curve, initial=initial, final=final, begin=begin, end=end)
