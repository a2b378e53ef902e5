r"""Where a learning curve leads: families of curves averaged by their evidence, with the uncertainty that is left.

For a curve :math:`y_i = c + a\, \phi(x_i; \theta) + \sigma \epsilon_i`, c and a have a closed form given :math:`\theta` and
:math:`\sigma`, and these few lie on a grid. So the posterior is a sum and no search: there is no start to be unlucky with, no
sampler to wait for, and the same curve gives the same answer. Curves are short; this is arithmetic on the host, in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from scipy.special import logsumexp, ndtr
from scipy.stats import t as student

from jaxopt_lab.search.selection.families import Family, constant, inverse_logarithm, mmf4, pow3, pow4, wbl4

__all__ = ["Extrapolation", "extrapolate_curve"]

_NOISE = np.geomspace(1e-4, 1.0, 28)  # Of the observed range; each as likely as the next.
_LEVEL, _DROP = 1.0, 1.5  # Deviations of the level at the last point, and of the move up to there, in observed ranges.
_AHEAD = 4.0  # How many such moves may be to come.
_DRIFT = 0.25  # Of the extrapolated move: what no family knows.
_NEGLIGIBLE = 1e-4
_SIGNIFICANCE = 0.01
_LEAST_EFFECTIVE = 6
_MATERIAL = 0.01  # What is left over, of the observed range, before it matters that it hangs together.
_FAR = 1e3  # As good as infinity, in units of the last abscissa.


@dataclass(frozen=True)
class Extrapolation:
    """The curve at places where it has not been: a mixture of normal distributions at each.

    Attributes:
      at: `[m]`, the places.
      mean: `[m]`.
      deviation: `[m]`.
      lower, upper: `[m]`, the central interval of the level that was asked for.
      weights: how likely each family is, by name.
      noise: the deviation of an observation from the curve.
      reasons: why the curve is ill-behaved, so that none of this is to be relied on; empty where nothing speaks against it.
    """

    at: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    weights: dict[str, float]
    noise: float
    reasons: tuple[str, ...]
    _mixture: "_Mixture" = field(repr=False)

    @property
    def ill_behaved(self) -> bool:
        """Whether there is a reason not to rely on it."""
        return bool(self.reasons)

    def below(self, value: ArrayLike) -> np.ndarray:
        """`[m]`, the probability that what will be observed lies below a value.

        >>> found = extrapolate_curve([1, 2, 4, 8], [1.0, 0.7, 0.55, 0.47], [1000])
        >>> bool(found.below(0.5) > 0.99)
        True
        """
        return self._mixture.below(np.asarray(value, float))

    def quantile(self, probability: float) -> np.ndarray:
        """`[m]`, the value that lies above what will be observed with this probability.

        Raises:
          ValueError: the probability is not between 0 and 1.

        >>> found = extrapolate_curve([1, 2, 4, 8], [1.0, 0.7, 0.55, 0.47], [16])
        >>> bool(found.quantile(0.1)[0] < found.mean[0] < found.quantile(0.9)[0])
        True
        """
        if not 0 < probability < 1:
            raise ValueError(f"probability must lie between 0 and 1; got {probability}")
        return self._mixture.quantile(probability)


def extrapolate_curve(
    x: ArrayLike,
    y: ArrayLike,
    at: ArrayLike,
    *,
    families: Sequence[Family] | None = None,
    error: ArrayLike | None = None,
    level: float = 0.9,
    bounds: tuple[float, float] | None = None,
) -> Extrapolation:
    r"""A learning curve beyond its end, by all families at once.

    .. math:: p(y^* \mid D) = \sum_{k, \theta, \sigma} p(k, \theta, \sigma \mid D) \; \mathcal N\left(y^* \mid \mu, v + \sigma^2
        + (\kappa (\mu - \mu_{last}))^2\right)

    :math:`\mu` and v are those of the linear regression on :math:`\phi`; the prior of its two coefficients is as wide as the range
    that was observed (and narrower for a family that has hardly begun to move), and those of the rest are flat over their grids.
    The last term stands for what no family knows. Residuals that hang together count as fewer.

    Of 72 real curves (twelve classifiers on digits, breast cancer and four made sets; 6, 9 and 12 of 16 sizes seen) the interval of
    90 % held 82, 91 and 93 % of the later points, and the mean erred by 0.65, 0.72 and 0.75 times what the last point does. Without
    `error`, a peak that is as narrow as a few points passes for noise.

    Args:
      x: `[n]`, positive: numbers of examples, steps or epochs.
      y: `[n]`, what was scored there; falling or rising. Points may repeat an x.
      at: `[m]` or a number, where to look.
      families: POW3, POW4, MMF4, WBL4, ILOG3 and LAST1 if None.
      error: `[n]`, the standard errors of y, positive; up to one factor for all, which is found. All equal if None. Those of a few
        folds are uncertain themselves: better their mean, or a smooth course of them.
      level: of the interval.
      bounds: the least and the largest value there can be, (0, 1) for an accuracy; the interval is cut there.

    Raises:
      ValueError: fewer points than a family has parameters, an x that is not positive, a y that is not finite (a run that diverged
        has no curve), shapes that differ.

    >>> x = np.array([10, 20, 40, 80, 160])
    >>> found = extrapolate_curve(x, 0.1 + 2 * x**-0.5, 640)
    >>> bool(found.lower[0] < 0.1 + 2 * 640**-0.5 < found.upper[0]), found.ill_behaved
    (True, False)

    Source: Domhan, Springenberg and Hutter, "Speeding up automatic hyperparameter optimization of deep neural networks by
    extrapolation of learning curves", 2015 (the average over families, by sampling); Viering and Loog, "The shape of learning
    curves: a review", 2023; Yan, Mohr and Viering, "LCDB 1.1", 2025 (which families fit, and how many curves misbehave).
    """
    families = (pow3(), pow4(), mmf4(), wbl4(), inverse_logarithm(), constant()) if families is None else tuple(families)
    x, y, relative = _checked(x, y, error, families)
    at = np.atleast_1d(np.asarray(at, float))
    if at.ndim != 1 or not (np.isfinite(at) & (at > 0)).all():
        raise ValueError(f"at must be positive numbers, [m]; got {at}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level}")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must rise; got {bounds}")
    scale = float(np.ptp(y)) or abs(float(y[-1])) or 1.0
    z, u = x / x[-1], (y - y[-1]) / scale
    fits = [_fit(family, z, u, relative, at / x[-1], 1.0) for family in families]
    left = np.sum([fit.residuals for fit in _weighted(fits)], axis=0)
    correlation = _correlation(left)
    if correlation > 0:
        # n points that hang together tell as much as n (1 - r) / (1 + r) that do not; a few can always be told apart.
        tempered = max((1 - correlation) / (1 + correlation), min(_LEAST_EFFECTIVE / len(x), 1.0))
        fits = [_fit(family, z, u, relative, at / x[-1], tempered) for family in families]
    evidence = np.array([fit.evidence for fit in fits])
    share = np.exp(evidence - logsumexp(evidence))
    mixture = _joined(fits, float(y[-1]), scale, bounds)
    mean, deviation = mixture.moments()
    known = None if error is None else float(np.median(np.asarray(error))) / scale
    noise = float(sum(weight * fit.noise for weight, fit in zip(share, fits, strict=True))) * scale
    return Extrapolation(
        at=at,
        mean=mean,
        deviation=deviation,
        lower=mixture.quantile((1 - level) / 2),
        upper=mixture.quantile((1 + level) / 2),
        weights={family.name: float(weight) for family, weight in zip(families, share, strict=True)},
        noise=noise,
        reasons=(*_turns(z, u, relative, known, scale), *_left_over(left, correlation)),
        _mixture=mixture,
    )


class _Mixture(NamedTuple):
    weights: np.ndarray  # [k]
    means: np.ndarray  # [k, m]
    deviations: np.ndarray  # [k, m]
    bounds: tuple[float, float]

    def below(self, value: np.ndarray) -> np.ndarray:
        inside = self.weights @ ndtr((value - self.means) / self.deviations)
        return np.where(value <= self.bounds[0], 0.0, np.where(value > self.bounds[1], 1.0, inside))

    def quantile(self, probability: float) -> np.ndarray:
        low, high = (self.means - 12 * self.deviations).min(axis=0), (self.means + 12 * self.deviations).max(axis=0)
        for _ in range(44):
            middle = (low + high) / 2
            less = self.weights @ ndtr((middle - self.means) / self.deviations) < probability
            low, high = np.where(less, middle, low), np.where(less, high, middle)
        return np.clip((low + high) / 2, *self.bounds)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        mean = self.weights @ self.means
        variance = self.weights @ (self.deviations**2 + (self.means - mean) ** 2)
        return np.clip(mean, *self.bounds), np.sqrt(variance)


class _Fit(NamedTuple):
    evidence: float
    noise: float
    residuals: np.ndarray  # [n], times the weight of the family once `_weighted`
    weights: np.ndarray  # [k] log, of the grid's points
    means: np.ndarray  # [k, m]
    deviations: np.ndarray  # [k, m]


def _fit(family: Family, z: np.ndarray, u: np.ndarray, relative: np.ndarray, at: np.ndarray, tempered: float) -> _Fit:
    """The posterior of one family over its grid; n points count as `tempered` n."""
    theta = [axis.ravel() for axis in np.meshgrid(*family.axes, indexing="ij")] if family.axes else []
    count = theta[0].size if theta else 1
    columns = [np.broadcast_to(axis[:, None], (count, 1)) for axis in theta]

    def basis(places):
        return np.broadcast_to(family.basis(places[None, :], *columns), (count, len(places)))

    # The basis is 0 at the last point and 1 at the first: c is the level at the end, and a the move up to there.
    end, begin = basis(np.array([1.0])), basis(z[:1])
    spread = begin - end
    flat = np.abs(spread) < 1e-12
    spread = np.where(flat, 1.0, spread)
    phi, phi_at, phi_far = (np.where(flat, 0.0, (basis(p) - end) / spread) for p in (z, at, np.array([_FAR])))
    weight = tempered / relative**2
    s0, s1, s2 = weight.sum(), phi @ weight, phi**2 @ weight  # [], [g], [g]
    b0, b1, total = weight @ u, phi @ (weight * u), weight @ u**2
    inverse = 1 / _NOISE[None, :] ** 2  # [1, s]
    # What is still to come is of the size of what was seen, or a curve that is flat so far could end anywhere.
    prior0, prior1 = 1 / _LEVEL**2, np.maximum(np.abs(phi_far) / _AHEAD, 1.0) ** 2 / _DROP**2  # [], [g, 1]
    a00, a01, a11 = s0 * inverse + prior0, s1[:, None] * inverse, s2[:, None] * inverse + prior1
    determinant = a00 * a11 - a01**2
    c00, c01, c11 = a11 / determinant, -a01 / determinant, a00 / determinant
    r0, r1 = b0 * inverse, b1[:, None] * inverse
    level, drop = c00 * r0 + c01 * r1, c01 * r0 + c11 * r1
    effective = tempered * len(z)
    evidence = (
        -effective * np.log(_NOISE)
        - 0.5 * total * inverse
        + 0.5 * (level * r0 + drop * r1)
        + 0.5 * (np.log(prior0 * prior1) - np.log(determinant))
        - np.log(count * len(_NOISE))
    )  # [g, s]
    logs = evidence.ravel()
    whole = float(logsumexp(logs))
    kept = np.flatnonzero(logs > logs.max() + np.log(_NEGLIGIBLE))
    g, s = np.unravel_index(kept, evidence.shape)
    p = phi_at[g]  # [k, m]
    level, drop = level[g, s], drop[g, s]
    moved = drop[:, None] * p
    variance = c00[g, s][:, None] + 2 * c01[g, s][:, None] * p + c11[g, s][:, None] * p**2
    variance = variance + _NOISE[s][:, None] ** 2 * np.median(relative) ** 2 + (_DRIFT * moved) ** 2
    shares = np.exp(logs[kept] - whole)
    shares = shares / shares.sum()
    fitted = shares @ (level[:, None] + drop[:, None] * phi[g])
    noise = float(shares @ _NOISE[s])
    return _Fit(whole, noise, (u - fitted) / relative, logs[kept], level[:, None] + moved, np.sqrt(variance))


def _weighted(fits: Sequence[_Fit]) -> list[_Fit]:
    evidence = np.array([fit.evidence for fit in fits])
    share = np.exp(evidence - logsumexp(evidence))
    return [fit._replace(residuals=weight * fit.residuals) for weight, fit in zip(share, fits, strict=True)]


def _joined(fits: Sequence[_Fit], last: float, scale: float, bounds: tuple[float, float] | None) -> _Mixture:
    logs = np.concatenate([fit.weights for fit in fits])
    kept = logs > logs.max() + np.log(_NEGLIGIBLE)
    weights = np.exp(logs[kept] - logsumexp(logs[kept]))
    means = last + scale * np.concatenate([fit.means for fit in fits])[kept]
    deviations = scale * np.concatenate([fit.deviations for fit in fits])[kept]
    return _Mixture(weights, means, deviations, bounds or (-np.inf, np.inf))


def _correlation(residuals: np.ndarray) -> float:
    """Of each residual with the next, as far as it is told from chance."""
    n = len(residuals)
    square = float(residuals @ residuals)
    if n < 8 or square == 0:
        return 0.0
    found = float(residuals[1:] @ residuals[:-1]) / square
    return min(found, 0.95) if found > 2 / np.sqrt(n) else 0.0


def _turns(z: np.ndarray, u: np.ndarray, relative: np.ndarray, error: float | None, scale: float) -> tuple[str, ...]:
    """Whether the curve goes against its own direction, further than noise alone would have it over all pairs of points."""
    sigma, freedom = (error, 30.0) if error is not None else _local_noise(z, u, relative)
    n = len(u)
    third = max(n // 3, 1)
    direction = np.sign(u[:third].mean() - u[-third:].mean()) or 1.0
    fallen = direction * u
    rise = fallen - np.minimum.accumulate(fallen)
    limit = np.sqrt(2) * sigma * student.ppf(1 - _SIGNIFICANCE / (n * (n - 1) / 2), freedom)
    if rise.max() <= limit + 1e-9:
        return ()
    way, turn = "up" if direction > 0 else "down", int(rise.argmax()) + 1
    return (f"it turns: {way} by {scale * rise.max():.3g} at {turn} of {n} points, where noise explains {scale * limit:.3g}",)


def _left_over(residuals: np.ndarray, correlation: float) -> tuple[str, ...]:
    """Whether what no family follows is more than a trifle."""
    if correlation <= 0.5 or np.sqrt(np.mean(residuals**2)) < _MATERIAL:
        return ()
    return (f"no family follows it: what is left over hangs together (correlation {correlation:.2f})",)


def _local_noise(z: np.ndarray, u: np.ndarray, relative: np.ndarray) -> tuple[float, float]:
    """The deviation of points from the line between their neighbours, and its degrees of freedom; robust to a few jumps."""
    place = np.log(z)
    inner = place[2:] - place[:-2]
    right = np.where(inner > 0, (place[1:-1] - place[:-2]) / np.where(inner > 0, inner, 1.0), 0.5)
    off = u[1:-1] - ((1 - right) * u[:-2] + right * u[2:])
    size = np.sqrt(1 + right**2 + (1 - right) ** 2)
    return float(1.4826 * np.median(np.abs(off / size / relative[1:-1]))), max((len(u) - 2) / 2, 1.0)


def _checked(x: ArrayLike, y: ArrayLike, error: ArrayLike | None, families: Sequence[Family]) -> tuple[np.ndarray, ...]:
    """x, y and the relative errors, by rising x."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    relative = np.ones_like(y) if error is None else np.asarray(error, float)
    if x.ndim != 1 or x.shape != y.shape or relative.shape != x.shape:
        raise ValueError(f"x, y and error must be [n] each; got {x.shape}, {y.shape} and {relative.shape}")
    if not families:
        raise ValueError("there are no families; leave families out for all that there are")
    largest = max(families, key=lambda family: family.parameters)
    if len(np.unique(x)) < largest.parameters:
        raise ValueError(
            f"{largest.name} has {largest.parameters} parameters and the curve {len(np.unique(x))} different points; give more "
            "points, or families with fewer parameters"
        )
    for name, values in (("x", x), ("error", relative)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name} must be positive and finite; got {values[~(np.isfinite(values) & (values > 0))][0]}")
    if not np.isfinite(y).all():
        index = int(np.argmin(np.isfinite(y)))
        raise ValueError(f"y holds {y[index]} at index {index}; a run that diverged has no curve")
    order = np.argsort(x, kind="stable")
    return x[order], y[order], (relative / np.median(relative))[order]
