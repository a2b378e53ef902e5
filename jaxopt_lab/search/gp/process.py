r"""A Gaussian process on padded observations: its evidence, its fit, its posterior.

    y = f(x) + e,    f ~ GP(0, k),    e ~ N(0, noise)

where points may be bent first (`kernel.warped`), as far as the values tell. Observations [n, d] are padded to [N, D]. A padded row
is an observation of 0 that is independent of everything with variance 1: it changes neither the evidence nor the posterior. A
padded dimension is 0 everywhere: it adds nothing to a distance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from jaxopt_lab.core.types import Array
from jaxopt_lab.search.gp.buckets import bucket, pad
from jaxopt_lab.search.gp.kernel import covariance, matern, squared_distances, warped
from jaxopt_lab.search.gp.precision import exactly

__all__ = ["Data", "Hyper", "Process", "condition", "data", "fit", "log_evidence", "log_prior", "posterior"]


class Data(NamedTuple):
    """Observations, padded.

    Attributes:
      x: points [N, D].
      y: values [N], 0 where padded.
      real: which rows are observations [N], bool.
      categorical: which dimensions are categories [D], bool.
      dims: which dimensions are there [D], bool.
    """

    x: Array
    y: Array
    real: Array
    categorical: Array
    dims: Array


class Hyper(NamedTuple):
    """What is fitted, in logarithms.

    Attributes:
      inverse_squares: log of one over the squared length scale [D].
      scale: log of the variance of f, a scalar.
      noise: log of the variance of e, a scalar.
      warps: logs of a and b of `kernel.warped` [2, D]; None where points are as they are.
    """

    inverse_squares: Array
    scale: Array
    noise: Array
    warps: Array | None = None


class Process(NamedTuple):
    """A process given its observations.

    Attributes:
      x, real, categorical: as of `Data`; `x` is warped where the hyper-parameters warp.
      hyper: of the covariance.
      inverse: the inverse of the Cholesky factor of the covariance of y [N, N].
      weights: covariance^-1 y [N].
    """

    x: Array
    real: Array
    categorical: Array
    hyper: Hyper
    inverse: Array
    weights: Array


def data(x: np.ndarray, y: np.ndarray, categorical: np.ndarray) -> Data:
    """Observations [n, d], [n] padded to their buckets.

    Raises:
      ValueError: the shapes do not fit, or a number is not finite.

    >>> data(np.zeros((3, 2)), np.ones(3), np.array([False, True])).x.shape
    (16, 4)
    """
    n, d = x.shape
    if y.shape != (n,) or categorical.shape != (d,):
        raise ValueError(f"points {x.shape} need values ({n},) and categorical ({d},); got {y.shape} and {categorical.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("points and values must be finite; drop or penalise what failed before the process sees it")
    N, D = bucket(n), bucket(d, smallest=4)
    return Data(pad(x, N, D), pad(y, N), np.arange(N) < n, pad(categorical, D, value=False), np.arange(D) < d)


def log_prior(hyper: Hyper, dims: Array) -> Array:
    r"""The logarithm of the prior density up to a constant, a scalar.

        \sum_d -0.1 (1 / w_d + w_d),    Gamma(2, 1) on the scale,    Gamma(1.1, 30) on the noise

    Values are standardised, so the scale is near 1; the length scales prefer 1 in a range of 1, weakly; the noise is small. Warps
    are near the identity: the logarithms of a and b are normal about 0, with a variance of 1/2.

    >>> round(float(log_prior(Hyper(jnp.zeros(1), jnp.zeros(()), jnp.log(0.1)), jnp.array([True]))), 3)
    -4.43

    Source: Optuna's GPSampler (optuna._gp.prior); for the warps Snoek, Swersky, Zemel and Adams 2014.
    """
    w, scale, noise = jnp.exp(hyper.inverse_squares), jnp.exp(hyper.scale), jnp.exp(hyper.noise)
    lengths = jnp.where(dims, -0.1 * (1 / w + w), 0).sum()
    warps = 0 if hyper.warps is None else -jnp.where(dims[None, :], hyper.warps**2, 0).sum() / (2 * _WARP_VARIANCE)
    return lengths + hyper.scale - scale + 0.1 * hyper.noise - 30 * noise + warps


@jax.custom_vjp
def _log_density(covariance: Array, y: Array) -> Array:
    """The logarithm of the density of N(0, covariance) at y, without the constant; scalar."""
    return _log_density_forward(covariance, y)[0]


def _log_density_forward(covariance, y):
    factor = jnp.linalg.cholesky(covariance)
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(y), dtype=y.dtype), lower=True)
    whitened = inverse @ y
    return -0.5 * whitened @ whitened - jnp.log(jnp.diagonal(factor)).sum(), (inverse, whitened)


def _log_density_backward(kept, cotangent):
    # Its gradient is half of (weights weights' - covariance^-1): two products, not several solves.
    inverse, whitened = kept
    weights = inverse.T @ whitened
    return 0.5 * cotangent * (weights[:, None] * weights[None, :] - inverse.T @ inverse), -cotangent * weights


_log_density.defvjp(_log_density_forward, _log_density_backward)


def _noisy(hyper: Hyper, distances: Array, real: Array) -> Array:
    """The covariance of y [N, N] by the squared distances in each dimension [N, N, D]; the identity where padded."""
    n, dims = real.shape[0], distances.shape[-1]
    # As a product of a matrix and a vector it and its derivative take a third of the time of a sum over the last axis.
    squared = (distances.reshape(n * n, dims) @ jnp.exp(hyper.inverse_squares)).reshape(n, n)
    k = jnp.where(real[:, None] & real[None, :], jnp.exp(hyper.scale) * matern(squared), 0)
    return k + jnp.diag(jnp.where(real, jnp.exp(hyper.noise), 1))


def log_evidence(hyper: Hyper, data: Data) -> Array:
    r"""The logarithm of the density of the values given the points and the hyper-parameters, a scalar.

        -1/2 y' C^{-1} y - 1/2 log |C| - n/2 log 2 \pi

    Source: Rasmussen and Williams 2006, equation 5.8.

    >>> one = Data(jnp.zeros((2, 1)), jnp.array([1.0, 0.0]), jnp.array([True, False]), jnp.array([False]), jnp.array([True]))
    >>> round(float(log_evidence(Hyper(jnp.zeros(1), jnp.log(0.5), jnp.log(0.5)), one)), 4)  # the density of N(0, 1) at 1
    -1.4189
    """
    return _log_evidence(hyper, data, _apart(_warped(hyper, data.x, data.categorical), data.categorical))


def _warped(hyper: Hyper, x: Array, categorical: Array) -> Array:
    return x if hyper.warps is None else warped(x, categorical, hyper.warps)


def _apart(x: Array, categorical: Array) -> Array:
    return squared_distances(x, x, categorical)


def _log_evidence(hyper: Hyper, data: Data, distances: Array) -> Array:
    constant = 0.5 * jnp.log(2 * jnp.pi) * data.real.sum()
    return _log_density(_noisy(hyper, distances, data.real), data.y) - constant


_distances = jax.jit(_apart)


@jax.jit
def _loss(flat: Array, data: Data, distances: Array | None) -> tuple[Array, Array]:
    """Minus the logarithm of the posterior density of the hyper-parameters, and its gradient.

    Without warps they are [D + 2] and distances do not change; with them they are [3 D + 2], and distances are None.
    """

    def loss(flat):
        hyper = _unflat(flat, data.x.shape[1])
        evidence = log_evidence(hyper, data) if distances is None else _log_evidence(hyper, data, distances)
        return -(evidence + log_prior(hyper, data.dims))

    return jax.value_and_grad(loss)(flat)


@jax.jit
def _loss_and_slope(flat: Array, data: Data, distances: Array | None) -> Array:
    """`_loss` in one array, which comes to the host in one piece: a third of a call at 50 observations is the way there."""
    value, gradient = _loss(flat, data, distances)
    return jnp.concatenate([value[None], gradient])


def _flat(hyper: Hyper) -> np.ndarray:
    warps = [] if hyper.warps is None else np.ravel(hyper.warps)
    return np.concatenate([hyper.inverse_squares, [hyper.scale, hyper.noise], warps])


def _unflat(flat: Array, D: int) -> Hyper:
    return Hyper(flat[:D], flat[D], flat[D + 1], flat[D + 2 :].reshape(2, D) if len(flat) > D + 2 else None)


# In logarithms: length scales of 0.01 to 100, a variance of 0.01 to 100, a and b of a warp of 0.14 to 7.
_BOUNDS = {"inverse_squares": (-9.2, 9.2), "scale": (-4.6, 4.6), "warps": (-2.0, 2.0)}
_WARP_VARIANCE, _WORTH = 0.5, 2.0
_SMALLEST_NOISE, _LARGEST_NOISE = 1e-6, 1.0


def fit(data: Data, *, start: Hyper | None = None, noise: float | None = None, steps: int = 60, warp: bool = False) -> Hyper:
    """The hyper-parameters of the largest posterior density (MAP), by L-BFGS-B on the host over a jitted value and gradient.

    Above 128 observations it starts from the fit to 128 of them, those of the best half and evenly of the others, and takes a few
    steps more on all.

    Warps are fitted from the fit without them, all together, and kept where they raise the logarithm of the density by 2 for each a
    and b: 8 for two dimensions. Without that bar they cost more than they bring where there is nothing to find: of 45 runs of 50
    evaluations on the problems of `scripts/benchmark_gp.py` 25 became worse and 10 better, with it 12 and 9. For a rate from 0 to 1
    of which the logarithm matters, beside another parameter, 12 observations were past the bar.

    Args:
      data: padded; standardise the values before.
      start: where to start; by default the better of two, length scales of 1 and of 0.22, both with variance 1 and a noise of 0.01.
      noise: the variance of the noise where it is known, which is not fitted then.
      steps: the largest number of iterations.
      warp: whether points may be warped. Then there are warps in what is returned, zeros (the identity) where not worth it.

    Returns:
      The hyper-parameters, of numpy arrays.

    >>> x = np.linspace(0, 1, 8)[:, None]
    >>> found = fit(data(x, np.sqrt(2) * np.sin(2 * np.pi * x[:, 0]), np.array([False])))
    >>> bool(0.1 < np.exp(-0.5 * found.inverse_squares[0]) < 1), bool(np.exp(found.noise) < 0.1)
    (True, True)

    Source: L-BFGS-B of Byrd, Lu, Nocedal and Zhu 1995, as scipy has it.
    """
    found = _fit(data, start, noise, steps, warp)
    return found._replace(warps=_no_warps(data)) if warp and found.warps is None else found


def _fit(data: Data, start: Hyper | None, noise: float | None, steps: int, warp: bool) -> Hyper:
    """`fit`, with warps None where they are not worth it."""
    if start is None and int(np.sum(data.real)) > 128:
        start, steps, warp = _fit(_subset(data, 128), None, noise, steps, warp), 8, False
    # The posterior often has two modes, one of them little but a trend; from one start alone the other is missed.
    both = [Hyper(np.full(data.x.shape[1], each), np.zeros(()), np.log(1e-2)) for each in (0.0, 3.0)]
    starts = both if start is None else [start]
    found, loss = min((_descend(data, each, noise, steps) for each in starts), key=lambda found: found[1])
    if not warp or found.warps is not None:
        return found
    bent, lower = _descend(data, found._replace(warps=_no_warps(data)), noise, steps)
    return bent if loss - lower > _WORTH * 2 * np.sum(data.dims & ~data.categorical) else found


def _no_warps(data: Data) -> np.ndarray:
    return np.zeros((2, data.x.shape[1]))


def _descend(data: Data, start: Hyper, noise: float | None, steps: int) -> tuple[Hyper, float]:
    """The fit from one start, with warps where that has them, and minus the logarithm of its density."""
    fixed = None if noise is None else float(np.log(max(noise, _SMALLEST_NOISE)))
    warp = start.warps is not None
    flat = _flat(start._replace(noise=start.noise if fixed is None else fixed))
    noises = (np.log(_SMALLEST_NOISE), np.log(_LARGEST_NOISE)) if fixed is None else (fixed, fixed)
    lengths = [_BOUNDS["inverse_squares"] if there else (0.0, 0.0) for there in data.dims]
    numbers = data.dims & ~data.categorical
    bends = [_BOUNDS["warps"] if number else (0.0, 0.0) for number in (*numbers, *numbers)] if warp else []
    with exactly():
        device = jax.device_put(data)
        distances = None if warp else _distances(device.x, device.categorical)

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            found = np.asarray(_loss_and_slope(flat, device, distances))
            # A factor that does not exist is NaN: the line search must step back from it.
            return (float(found[0]), found[1:]) if np.isfinite(found[0]) else (1e20, np.zeros_like(flat))

        options = {"maxiter": steps, "ftol": 1e-6, "gtol": 1e-2}
        found = scipy.optimize.minimize(
            loss, flat, jac=True, method="L-BFGS-B", bounds=[*lengths, _BOUNDS["scale"], noises, *bends], options=options
        )
    return _unflat(found.x, len(lengths)), float(found.fun)


def _subset(data: Data, size: int) -> Data:
    """`size` of the observations: the best half of them, and evenly of the others by rank."""
    order = np.argsort(-np.asarray(data.y)[np.asarray(data.real)], kind="stable")
    rest = order[size // 2 :]
    rows = np.concatenate([order[: size // 2], rest[np.linspace(0, len(rest) - 1, size - size // 2).astype(int)]])
    y = np.asarray(data.y)[rows]
    return data._replace(x=np.asarray(data.x)[rows], y=(y - y.mean()) / max(y.std(), 1e-12), real=np.ones(size, bool))


def condition(hyper: Hyper, data: Data) -> Process:
    """The process given the observations; jits.

    Args:
      hyper, data: with a leading axis each for a stack, under `jax.vmap`.

    >>> one = Data(jnp.zeros((1, 1)), jnp.ones(1), jnp.array([True]), jnp.array([False]), jnp.array([True]))
    >>> condition(Hyper(jnp.zeros(1), jnp.zeros(()), jnp.log(0.25)), one).weights.round(3).tolist()
    [0.800...]
    """
    x = _warped(hyper, data.x, data.categorical)
    factor = jnp.linalg.cholesky(_noisy(hyper, _apart(x, data.categorical), data.real))
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(data.y), dtype=data.y.dtype), lower=True)
    return Process(x, data.real, data.categorical, hyper, inverse, inverse.T @ (inverse @ data.y))


def posterior(process: Process, x: Array) -> tuple[Array, Array]:
    r"""Mean [m] and variance [m] of f at points [m, D].

        mean = k' C^{-1} y,    variance = k(x, x) - |L^{-1} k|^2

    The variance is never below 1e-12 of the scale, which rounding can bring it to.

    >>> one = Data(jnp.zeros((1, 1)), jnp.ones(1), jnp.array([True]), jnp.array([False]), jnp.array([True]))
    >>> mean, variance = posterior(condition(Hyper(jnp.zeros(1), jnp.zeros(()), jnp.log(0.25)), one), jnp.zeros((1, 1)))
    >>> round(float(mean[0]), 3), round(float(variance[0]), 3)
    (0.8, 0.2)

    Source: Rasmussen and Williams 2006, algorithm 2.1.
    """
    h = process.hyper
    scale = jnp.exp(h.scale)
    x = _warped(h, x, process.categorical)
    cross = covariance(x, process.x, process.categorical, jnp.exp(h.inverse_squares), scale)
    cross = jnp.where(process.real[None, :], cross, 0)
    variance = scale - ((cross @ process.inverse.T) ** 2).sum(-1)
    return cross @ process.weights, jnp.maximum(variance, 1e-12 * scale)
