r"""Families of learning curves, each :math:`y = c + a\, \phi(x; \theta)` with at most two parameters within :math:`\phi`.

Written so, what is not linear is small enough for a grid, and the rest has a closed form (variable projection: Golub and Pereyra,
1973). The abscissa is measured in units of the largest observed one, z = x / max x.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = ["Family", "constant", "inverse_logarithm", "mmf4", "pow3", "pow4", "wbl4"]


class Family(NamedTuple):
    r"""A family of curves.

    Attributes:
      name: as in the literature.
      basis: `(z [n], *theta) -> phi [n]`, theta arrays that broadcast against z.
      axes: the grid of each parameter of the basis, equally likely at first.
      linear: how many of c and a it has; 1 for a constant.

    A family is all there is to it, so one of your own serves as well.

    >>> Family("root", lambda z: z**-0.5, ()).parameters
    2
    """

    name: str
    basis: Callable[..., np.ndarray]
    axes: tuple[np.ndarray, ...]
    linear: int = 2

    @property
    def parameters(self) -> int:
        """How many parameters it has in all."""
        return self.linear + len(self.axes)


def pow3() -> Family:
    r"""A power law with an asymptote: :math:`y = c + a z^{-\alpha}`.

    >>> pow3().basis(np.array([1.0, 4.0]), 0.5).tolist()
    [1.0, 0.5]
    """
    return Family("POW3", lambda z, alpha: z**-alpha, (np.geomspace(0.05, 4.0, 40),))


def pow4() -> Family:
    r"""A power law that begins elsewhere: :math:`y = c + a (z + d)^{-\alpha}`.

    >>> pow4().basis(np.array([1.0]), 0.5, 3.0).tolist()
    [0.5]
    """
    return Family("POW4", lambda z, alpha, d: (z + d) ** -alpha, (np.geomspace(0.05, 6.0, 24), np.geomspace(1e-3, 3.0, 16)))


def mmf4() -> Family:
    r"""Morgan, Mercer and Flodin's sigmoid: :math:`y = (a b + c z^d) / (b + z^d)`, that is :math:`c + (a - c) / (1 + z^d / b)`.

    Its basis is written with the place of the middle :math:`h = b^{1/d}`.

    >>> mmf4().basis(np.array([2.0]), 3.0, 2.0).tolist()
    [0.5]
    """
    return Family("MMF4", lambda z, d, h: 1 / (1 + (z / h) ** d), (np.geomspace(0.2, 8.0, 24), np.geomspace(1e-3, 3.0, 20)))


def wbl4() -> Family:
    r"""Weibull's, a stretched exponential: :math:`y = c + a \exp(-(z / h)^d)`.

    >>> wbl4().basis(np.array([2.0]), 3.0, 2.0).round(4).tolist()
    [0.3679]
    """
    return Family("WBL4", lambda z, d, h: np.exp(-((z / h) ** d)), (np.geomspace(0.2, 3.0, 20), np.geomspace(1e-3, 3.0, 20)))


def inverse_logarithm() -> Family:
    r"""The slowest of all: :math:`y = c + a / \log(1 + z / h)`.

    >>> inverse_logarithm().basis(np.array([np.e - 1]), 1.0).round(6).tolist()
    [1.0]
    """
    return Family("ILOG3", lambda z, h: 1 / np.log1p(z / h), (np.geomspace(1e-3, 1.0, 16),))


def constant() -> Family:
    """No curve at all, but noise about a level: what is left once a curve is flat.

    >>> constant().parameters
    1
    """
    return Family("LAST1", np.zeros_like, (), 1)
