r"""A Gaussian process on padded observations: its evidence, its fit, its posterior.

    y = f(x) + e,    f ~ GP(0, k),    e ~ N(0, noise)

Observations [n, d] are padded to [N, D]. A padded row is an observation of 0 that is independent of everything with variance 1:
it changes neither the evidence nor the posterior. A padded dimension is 0 everywhere: it adds nothing to a distance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from jaxopt_lab.core.types import Array
from jaxopt_lab.search.gp.buckets import bucket, pad
from jaxopt_lab.search.gp.kernel import covariance, matern, squared_distances
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
    """

    inverse_squares: Array
    scale: Array
    noise: Array


class Process(NamedTuple):
    """A process given its observations.

    Attributes:
      x, real, categorical: as of `Data`.
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

    Values are standardised, so the scale is near 1; the length scales prefer 1 in a range of 1, weakly; the noise is small.

    >>> round(float(log_prior(Hyper(jnp.zeros(1), jnp.zeros(()), jnp.log(0.1)), jnp.array([True]))), 3)
    -4.43

    Source: Optuna's GPSampler (optuna._gp.prior).
    """
    w, scale, noise = jnp.exp(hyper.inverse_squares), jnp.exp(hyper.scale), jnp.exp(hyper.noise)
    lengths = jnp.where(dims, -0.1 * (1 / w + w), 0).sum()
    return lengths + hyper.scale - scale + 0.1 * hyper.noise - 30 * noise


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
    return _log_evidence(hyper, data, squared_distances(data.x, data.x, data.categorical))


def _log_evidence(hyper: Hyper, data: Data, distances: Array) -> Array:
    constant = 0.5 * jnp.log(2 * jnp.pi) * data.real.sum()
    return _log_density(_noisy(hyper, distances, data.real), data.y) - constant


_distances = jax.jit(squared_distances)


@jax.jit
def _loss(flat: Array, data: Data, distances: Array) -> tuple[Array, Array]:
    """Minus the logarithm of the posterior density of the hyper-parameters [D + 2], and its gradient."""

    def loss(flat):
        hyper = _unflat(flat)
        return -(_log_evidence(hyper, data, distances) + log_prior(hyper, data.dims))

    return jax.value_and_grad(loss)(flat)


def _unflat(flat: Array) -> Hyper:
    return Hyper(flat[:-2], flat[-2], flat[-1])


# In logarithms: length scales of 0.01 to 100, a variance of 0.01 to 100.
_BOUNDS = {"inverse_squares": (-9.2, 9.2), "scale": (-4.6, 4.6)}
_SMALLEST_NOISE, _LARGEST_NOISE = 1e-6, 1.0


def fit(data: Data, *, start: Hyper | None = None, noise: float | None = None, steps: int = 60) -> Hyper:
    """The hyper-parameters of the largest posterior density (MAP), by L-BFGS-B on the host over a jitted value and gradient.

    Above 128 observations it starts from the fit to 128 of them, those of the best half and evenly of the others, and takes a few
    steps more on all.

    Args:
      data: padded; standardise the values before.
      start: where to start; by default the better of two, length scales of 1 and of 0.22, both with variance 1 and a noise of 0.01.
      noise: the variance of the noise where it is known, which is not fitted then.
      steps: the largest number of iterations.

    Returns:
      The hyper-parameters, of numpy arrays.

    >>> x = np.linspace(0, 1, 8)[:, None]
    >>> found = fit(data(x, np.sqrt(2) * np.sin(2 * np.pi * x[:, 0]), np.array([False])))
    >>> bool(0.1 < np.exp(-0.5 * found.inverse_squares[0]) < 1), bool(np.exp(found.noise) < 0.1)
    (True, True)

    Source: L-BFGS-B of Byrd, Lu, Nocedal and Zhu 1995, as scipy has it.
    """
    D = data.x.shape[1]
    if start is None and int(np.sum(data.real)) > 128:
        start, steps = fit(_subset(data, 128), noise=noise, steps=steps), 8
    if start is None:
        # The posterior often has two modes, one of them little but a trend; from one start alone the other is missed.
        starts = [Hyper(np.full(D, each), np.zeros(()), np.log(1e-2)) for each in (0.0, 3.0)]
        return min((_descend(data, each, noise, steps) for each in starts), key=lambda found: found[1])[0]
    return _descend(data, start, noise, steps)[0]


def _descend(data: Data, start: Hyper, noise: float | None, steps: int) -> tuple[Hyper, float]:
    """The fit from one start, and minus the logarithm of its density."""
    fixed = None if noise is None else float(np.log(max(noise, _SMALLEST_NOISE)))
    flat = np.concatenate([start.inverse_squares, [start.scale, start.noise if fixed is None else fixed]])
    noises = (np.log(_SMALLEST_NOISE), np.log(_LARGEST_NOISE)) if fixed is None else (fixed, fixed)
    lengths = [_BOUNDS["inverse_squares"] if there else (0.0, 0.0) for there in data.dims]
    with exactly():
        device = jax.device_put(data)
        distances = _distances(device.x, device.x, device.categorical)

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = jax.device_get(_loss(flat, device, distances))
            # A factor that does not exist is NaN: the line search must step back from it.
            return (float(value), gradient) if np.isfinite(value) else (1e20, np.zeros_like(flat))

        options = {"maxiter": steps, "ftol": 1e-6, "gtol": 1e-2}
        found = scipy.optimize.minimize(
            loss, flat, jac=True, method="L-BFGS-B", bounds=[*lengths, _BOUNDS["scale"], noises], options=options
        )
    return Hyper(found.x[:-2], found.x[-2], found.x[-1]), float(found.fun)


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
    factor = jnp.linalg.cholesky(_noisy(hyper, squared_distances(data.x, data.x, data.categorical), data.real))
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(data.y), dtype=data.y.dtype), lower=True)
    return Process(data.x, data.real, data.categorical, hyper, inverse, inverse.T @ (inverse @ data.y))


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
    cross = covariance(x, process.x, process.categorical, jnp.exp(h.inverse_squares), scale)
    cross = jnp.where(process.real[None, :], cross, 0)
    variance = scale - ((cross @ process.inverse.T) ** 2).sum(-1)
    return cross @ process.weights, jnp.maximum(variance, 1e-12 * scale)
