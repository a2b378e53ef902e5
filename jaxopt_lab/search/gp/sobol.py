r"""Sobol indices of the function that a Gaussian process has learnt, as a distribution: each draw of the function has its own.

    first_j = Var(E[f | x_j]) / Var(f),    total_j = E[Var(f | all but x_j)] / Var(f)

The first is what the dimension explains alone, the total what it has a hand in: with its interactions, so that totals add up to 1
or more. Draws of the function are a draw of the prior in random features, moved by what the observations say of it; that of the
hyper-parameters is normal about their fit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.stats.qmc

from jaxopt_lab.core.types import Array
from jaxopt_lab.search.gp.kernel import matern
from jaxopt_lab.search.gp.outputs import standardise
from jaxopt_lab.search.gp.precision import exactly
from jaxopt_lab.search.gp.process import Data, Hyper, data, fit, log_evidence, log_prior

__all__ = ["design", "drawn_indices", "indices"]

_FEATURES = 512
_SHIFT = 1e-4  # Of the logarithm of a hyper-parameter, in a difference of gradients.
_WIDEST = 2.0  # The largest deviation of such a logarithm: where the data say nothing, the fit is bounded besides.
_FREEDOM = 5  # Twice the 5/2 of the Matern covariance.


def design(d: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Points of the unit cube [d + 2, n, d]: two samples, and for each dimension the first with that column of the second.

    Args:
      d: dimensions.
      n: a power of 2; the samples are of one scrambled Sobol sequence.
      rng: the only source of chance.

    Raises:
      ValueError: `n` is no power of 2, or `d` is out of range.

    >>> points = design(2, 4, np.random.default_rng(0))
    >>> bool((points[2][:, 0] == points[1][:, 0]).all()), bool((points[2][:, 1] == points[0][:, 1]).all())
    (True, True)

    Source: Saltelli et al., "Variance based sensitivity analysis of model output", 2010.
    """
    if d < 1 or n < 2 or n & (n - 1):
        raise ValueError(f"a design needs at least 1 dimension and a power of 2 of points; got {d} and {n}")
    unit = scipy.stats.qmc.Sobol(2 * d, rng=rng).random(n)
    a, b = unit[:, :d], unit[:, d:]
    return np.stack([a, b, *(np.where(np.arange(d)[None, :] == j, b, a) for j in range(d))])


def indices(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""First-order and total indices of a function of which the values on a design are known.

    .. math:: S_j = \frac{\overline{f(B) (f(A_B^j) - f(A))}}{V}, \qquad T_j = \frac{\overline{(f(A) - f(A_B^j))^2}}{2 V}

    Args:
      values: `[d + 2, n, ...]`, on the points of `design`; further axes are further functions.

    Returns:
      Two arrays `[d, ...]`, in [0, 1] up to the error of the estimate, and cut there.

    >>> points = design(2, 1024, np.random.default_rng(0))
    >>> first, total = indices(points[..., 0] + 2 * points[..., 1])
    >>> first.round(2).tolist(), total.round(2).tolist()
    ([0.2, 0.8], [0.2, 0.8])

    Source: Saltelli et al. 2010, for the first; Jansen, "Analysis of variance designs for model output", 1999, for the total.
    """
    f = values - values[:2].mean(axis=(0, 1))
    variance = np.maximum((f[:2] ** 2).mean(axis=(0, 1)), 1e-300)
    first = (f[None, 1] * (f[2:] - f[None, 0])).mean(axis=1) / variance
    total = ((f[None, 0] - f[2:]) ** 2).mean(axis=1) / (2 * variance)
    return np.clip(first, 0, 1), np.clip(total, 0, 1)


def drawn_indices(
    x: np.ndarray,
    y: np.ndarray,
    categories: np.ndarray,
    rng: np.random.Generator,
    *,
    place: Callable[[np.ndarray], np.ndarray] = lambda unit: unit,
    draws: int = 64,
    fits: int = 8,
    points: int = 512,
) -> tuple[np.ndarray, np.ndarray]:
    r"""First-order and total indices of draws from the posterior of the function.

    .. math:: f = \phi^T w + k(\cdot, X) (K + \sigma^2 I)^{-1} (y - \phi(X)^T w - \epsilon)

    with :math:`\phi` random features of the covariance, w and :math:`\epsilon` normal.

    Args:
      x: `[n, d]`, coordinates: numbers in [0, 1], indices of categories.
      y: `[n]`, finite; standardised here.
      categories: `[d]`, how many categories there are; 0 for a number.
      rng: the only source of chance.
      place: takes points `[m, d]` of the unit cube to coordinates: where the values of a category or a grid, and what is there only
        now and then, are told.
      draws: how many functions.
      fits: how many hyper-parameters they share, evenly; at most `draws`.
      points: of each of the d + 2 parts of the design; a power of 2.

    Returns:
      Two arrays `[d, draws]`.

    Raises:
      ValueError: a number that is not positive, or as for `design` and `process.data`.

    >>> x = np.random.default_rng(0).random((24, 2))
    >>> first, total = drawn_indices(x, x[:, 0], np.zeros(2, int), np.random.default_rng(1), draws=4, fits=2, points=128)
    >>> bool((first[0] > 0.9).all()), bool((total[1] < 0.1).all())
    (True, True)

    Source: Wilson et al., "Efficiently sampling functions from Gaussian process posteriors", 2020; Rahimi and Recht, "Random
    features for large-scale kernel machines", 2007.
    """
    if draws < 1 or not 1 <= fits <= draws:
        raise ValueError(f"there must be at least 1 draw and 1 to {draws} fits; got {draws} and {fits}")
    values, d = standardise(y), x.shape[1]
    observed = data(x, values, categories > 0)
    at = place(design(d, points, rng).reshape(-1, d))
    parts = []
    for k, hyper in enumerate(_hypers(observed, fits, rng)):
        count = draws // fits + (k < draws % fits)
        known, asked = (_embedded(each, categories, hyper) for each in (x, at))
        parts.append(indices(_functions(known, values, asked, hyper, count, rng).reshape(d + 2, points, count)))
    first, total = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    return first, total


def _hypers(observed: Data, count: int, rng: np.random.Generator) -> list[Hyper]:
    """Draws from the normal distribution about the fit that has the curvature of the density there (Laplace)."""
    best = fit(observed)
    flat = np.concatenate([best.inverse_squares, [best.scale, best.noise]])
    free = np.flatnonzero(np.concatenate([observed.dims, [True, True]]))
    shifts = _SHIFT * np.eye(len(flat))[free]
    with exactly():
        gradients = np.asarray(_gradients(np.concatenate([flat[None] + shifts, flat[None] - shifts]), observed))
    up, down = gradients[: len(free), free], gradients[len(free) :, free]
    curvature = (up - down) / (2 * _SHIFT)
    values, vectors = np.linalg.eigh((curvature + curvature.T) / 2)
    steps = rng.standard_normal((count, len(free))) / np.sqrt(np.maximum(values, _WIDEST**-2))[None, :]
    drawn = np.tile(flat, (count, 1))
    drawn[:, free] += steps @ vectors.T
    # Within what the fit itself is bounded to.
    lengths, scale, noise = np.clip(drawn[:, :-2], -9.2, 9.2), np.clip(drawn[:, -2], -4.6, 4.6), np.clip(drawn[:, -1], -13.8, 0)
    return [Hyper(*each) for each in zip(lengths, scale, noise, strict=True)]


@jax.jit
def _gradients(flats: Array, observed: Data) -> Array:
    """Of minus the logarithm of the density, at hyper-parameters [m, D + 2]."""

    def loss(flat):
        hyper = Hyper(flat[:-2], flat[-2], flat[-1])
        return -(log_evidence(hyper, observed) + log_prior(hyper, observed.dims))

    return jax.lax.map(jax.grad(loss), flats)


def _embedded(x: np.ndarray, categories: np.ndarray, hyper: Hyper) -> np.ndarray:
    """Points [m, e] whose squared distances are those of the covariance: a category is a corner of a simplex."""
    columns = []
    for j, count in enumerate(categories):
        weight = np.exp(hyper.inverse_squares[j])
        if count:
            columns.append(np.sqrt(weight / 2) * (x[:, j, None] == np.arange(count)[None, :]))
        else:
            columns.append(np.sqrt(weight) * x[:, j, None])
    return np.concatenate(columns, axis=1)


def _functions(
    known: np.ndarray, y: np.ndarray, asked: np.ndarray, hyper: Hyper, count: int, rng: np.random.Generator
) -> np.ndarray:
    """`count` draws of the function at points: [m, count]."""
    scale, noise = np.exp(hyper.scale), np.exp(hyper.noise)
    # The spectrum of the Matern covariance is Student's.
    spread = np.sqrt(_FREEDOM / rng.chisquare(_FREEDOM, _FEATURES))
    frequencies = rng.standard_normal((known.shape[1], _FEATURES)) * spread[None, :]

    def features(points: np.ndarray) -> np.ndarray:
        angles = points @ frequencies
        return np.sqrt(scale / _FEATURES) * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)

    weights = rng.standard_normal((2 * _FEATURES, count))
    errors = np.sqrt(noise) * rng.standard_normal((len(y), count))
    covariance = scale * _correlation(known, known) + noise * np.eye(len(y))
    missing = y[:, None] - features(known) @ weights - errors
    return features(asked) @ weights + scale * _correlation(asked, known) @ scipy.linalg.solve(covariance, missing, assume_a="pos")


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T
    with exactly():
        return np.asarray(_matern(np.maximum(squared, 0)))


_matern = jax.jit(lambda squared: matern(jnp.asarray(squared)))
