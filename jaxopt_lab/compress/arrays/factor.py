"""Factors of bare arrays: truncated singular values, also weighted by what comes in, Tucker-2, and rules that choose a rank."""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["Rank", "by_energy", "by_evidence", "contract", "factorise", "tucker2"]

Rank = int | Callable[[np.ndarray, tuple[int, int]], int]
"""A rank, or a rule `(singular values, shape of the matrix) -> rank` that chooses it on the host."""


def contract(
    x: Array, x_names: Sequence[Any], y: Array, y_names: Sequence[Any], names: Sequence[Any], *, dtype: Any, precision: Any = None
) -> Array:
    r"""The product of two arrays with named axes, summed over the names that the result lacks: one `lax.dot_general`.

    .. math:: z_{B,I,J} = \sum_C x_{B,I,C} \; y_{B,J,C}

    Args:
      x: an array; a name that the result lacks must be in both operands.
      x_names: of its axes.
      y: an array.
      y_names: of its axes.
      names: of the axes of the result, in order.
      dtype: in which products are summed, and of the result.
      precision: as `lax.dot_general` takes it.

    >>> contract(jnp.ones((2, 3)), "ir", jnp.ones((3, 4)), "rj", "ji", dtype=jnp.float32).shape
    (4, 2)
    """
    batch = [name for name in x_names if name in y_names and name in names]
    summed = [name for name in x_names if name in y_names and name not in names]

    def places(shared: list) -> tuple[list[int], list[int]]:
        return [x_names.index(name) for name in shared], [y_names.index(name) for name in shared]

    out = lax.dot_general(x, y, (places(summed), places(batch)), precision=precision, preferred_element_type=dtype)
    free = [name for own in (x_names, y_names) for name in own if name not in batch and name not in summed]
    return lax.transpose(out, [[*batch, *free].index(name) for name in names])


def by_energy(share: float) -> Callable[[np.ndarray, tuple[int, int]], int]:
    r"""The rule of the smallest rank whose squared singular values hold the given share of all of them.

    .. math:: \min \{ r \ge 1 : \textstyle\sum_{i > r} \sigma_i^2 \le (1 - e) \sum_i \sigma_i^2 \}

    So the relative error of the truncated matrix is at most :math:`\sqrt{1 - e}` in the Frobenius norm.

    Args:
      share: the energy :math:`e`, in (0, 1].

    Returns:
      `(singular values in descending order [k], shape of the matrix) -> rank`.

    Raises:
      ValueError: the share is out of range.

    >>> values = np.array([3.0, 2.0, 1.0])
    >>> by_energy(0.9)(values, (3, 3)), by_energy(0.95)(values, (3, 3))
    (2, 3)
    """
    if not 0 < share <= 1:
        raise ValueError(f"energy={share} is no share: give a number in (0, 1]")

    def rule(singular_values: np.ndarray, shape: tuple[int, int]) -> int:
        del shape
        squares = np.square(np.asarray(singular_values, np.float64))
        # What is cut is summed from its small end: 1 - share keeps its digits where share is close to 1.
        cut = np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0)
        return int(np.argmax(cut <= (1 - share) * squares.sum())) + 1

    return rule


def by_evidence(singular_values: np.ndarray, shape: tuple[int, int]) -> int:
    r"""The rank that empirical variational Bayes finds in a matrix of low rank under Gaussian noise of unknown variance.

    For a matrix :math:`L \times M`, :math:`L \le M`, :math:`\alpha = L / M`, the noise minimises the free energy

    .. math:: \sum_h \Big( \log \sigma^2 + x_h + \max\nolimits_{x_h > \underline{x}} \big[ \log(\tau_h + 1)
       + \alpha \log(\tau_h / \alpha + 1) - \tau_h \big] \Big), \qquad x_h = \frac{\gamma_h^2}{M \sigma^2}

    where :math:`x = (1 + \tau)(1 + \alpha / \tau)` and :math:`\underline{x}` belongs to the positive root of the bracket. What
    counts are the singular values :math:`\gamma_h > \sigma \sqrt{M \underline{x}}`. A matrix without noise has the number of
    singular values that are not 0. Nothing of it can be traced.

    Args:
      singular_values: all of them, shape `[min(shape)]`.
      shape: of the matrix.

    Returns:
      The rank, 0 for pure noise.

    >>> rng = np.random.default_rng(0)
    >>> w = 2 * rng.normal(size=(40, 3)) @ rng.normal(size=(3, 90)) + rng.normal(size=(40, 90))
    >>> by_evidence(np.linalg.svd(w, compute_uv=False), w.shape)
    3

    Source: Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix
    factorization", 2013; Nakajima, Tomioka, Sugiyama and Babacan, "Perfect dimensionality recovery by variational Bayesian PCA",
    2012.
    """
    short, long = min(shape), max(shape)
    ratio = short / long
    squares = np.sort(np.square(np.asarray(singular_values, np.float64)))[::-1] / long
    threshold = _evidence_threshold(ratio)
    # Components beyond this many are never signal, so their mean bounds the noise from below.
    tail = squares[int(np.ceil(short / (1 + ratio))) - 1 :]
    low, high = max(tail[0] / threshold, tail.mean()), squares.mean()
    if low == 0:
        return int(np.count_nonzero(squares))

    def free_energy(log_noise: np.ndarray) -> np.ndarray:
        x = squares / np.exp(log_noise)[:, None]
        signal = x > threshold
        shifted = np.where(signal, x, threshold) - (1 + ratio)
        tau = (shifted + np.sqrt(np.square(shifted) - 4 * ratio)) / 2
        return np.sum(log_noise[:, None] + x + np.where(signal, _evidence_gain(tau, ratio), 0.0), axis=1)

    # The free energy is smooth but for a kink at each component, so the least of a fine grid is looked at ever closer.
    grid = np.linspace(np.log(low), np.log(high), 1024)
    for _ in range(6):
        best = int(np.argmin(free_energy(grid)))
        grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 64)
    return int(np.count_nonzero(squares > threshold * np.exp(grid[int(np.argmin(free_energy(grid)))])))


def _evidence_gain(tau: Any, ratio: float) -> Any:
    return np.log1p(tau) + ratio * np.log1p(tau / ratio) - tau


def _evidence_threshold(ratio: float) -> float:
    """The observation :math:`x` from which a component beats none: the gain rises up to the root of the ratio, then falls."""
    low = high = ratio**0.5
    while _evidence_gain(high, ratio) > 0:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _evidence_gain(middle, ratio) > 0 else (low, middle)
    return (1 + low) * (1 + ratio / low)


def factorise(w: Array, rank: Rank, moment: Array | None = None) -> tuple[Array, Array]:
    r"""The best factors of a given rank, balanced.

    .. math:: W \approx A B, \qquad A = U_r \sqrt{\Sigma_r}, \; B = \sqrt{\Sigma_r} V_r^\top

    Without a moment they minimise :math:`\lVert W - AB \rVert_F`. With the second moment :math:`H = X^\top X` of the inputs they
    minimise :math:`\lVert X (W - AB) \rVert_F`, whose least value is made of the singular values of :math:`H^{1/2} W` that are cut:
    with its right singular vectors, :math:`AB = W V_r V_r^\top`. That needs no inverse, so `H` may be singular; a multiple of the
    identity at the size of rounding errors is added to it, by which directions that no input has are fitted like those of a plain
    matrix.

    Args:
      w: matrices `[..., m, n]` that act as `x @ w`.
      rank: at least 1 and at most `min(m, n)`, or a rule of the singular values (of :math:`H^{1/2} W`, where there is a moment).
        Leading axes share the largest rank that the rule gives to one of them.
      moment: `[..., m, m]`, symmetric and positive semidefinite, of any scale; or None.

    Returns:
      `(a, b)` of shapes `[..., m, r]` and `[..., r, n]`, in at least float32.

    Raises:
      TypeError: the rank is a rule, and `w` or the moment is traced: the shapes of factors are no matter of data there.
      ValueError: the rank does not fit, or the moment is no square of `m`.

    >>> w = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> a, b = factorise(w, 1)
    >>> jnp.abs(a @ b).round(4)
    Array([[3., 0.],
           [0., 0.]], dtype=float32)
    >>> a, b = factorise(w, 1, moment=jnp.diag(jnp.array([1.0, 100.0])))
    >>> jnp.abs(a @ b).round(4)
    Array([[0., 0.],
           [0., 1.]], dtype=float32)

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936; Izenman, "Reduced-rank regression
    for the multivariate linear model", 1975; Wang et al., "SVD-LLM: truncation-aware singular value decomposition for large
    language model compression", 2024.
    """
    w = wide(w)
    if moment is None:
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        return _balanced(u, s, vt, _chosen(rank, s, w.shape))
    if moment.shape != (*w.shape[:-1], w.shape[-2]):
        raise ValueError(f"a second moment of shape {moment.shape} does not fit weights {w.shape}: it is [..., inputs, inputs]")
    _, s, vt = jnp.linalg.svd(_matmul(_root(moment.astype(w.dtype)), w), full_matrices=False)
    vt = vt[..., : _chosen(rank, s, w.shape), :]
    # Rows of vt are orthonormal, so a decomposition of the thin factor is one of the product.
    u, s, turn = jnp.linalg.svd(_matmul(w, jnp.swapaxes(vt, -1, -2)), full_matrices=False)
    return _balanced(u, s, _matmul(turn, vt), vt.shape[-2])


def tucker2(w: Array, ranks: tuple[Rank, Rank], iterations: int = 5) -> tuple[Array, Array, Array]:
    r"""Tucker-2 factors of convolution kernels: thin channels in, a small kernel between thin channels, channels out.

    .. math:: W_{s,i,o} \approx \sum_{p,q} U_{i,p} \; C_{s,p,q} \; V_{q,o}

    `U` and the transpose of `V` have orthonormal columns. They start as the leading singular vectors of the two unfoldings (HOSVD),
    and are then fitted in turns, each exactly given the other (HOOI): the error never rises, and the square of it is
    :math:`\lVert W \rVert^2 - \lVert C \rVert^2`.

    Args:
      w: kernels `[..., s, m, n]`: places, input channels, output channels.
      ranks: of inputs and of outputs, each a number or a rule of the singular values of its unfolding, `[m, s n]` or `[n, s m]`.
        A number is cut to what a kernel can have.
      iterations: turns after the start.

    Returns:
      `(first, core, last)` of shapes `[..., m, p]`, `[..., s, p, q]` and `[..., q, n]`, in at least float32.

    Raises:
      TypeError: a rank is a rule, and `w` is traced.
      ValueError: a rank is less than 1.

    >>> w = jnp.arange(3.0)[:, None, None] * jnp.ones((3, 4, 5))
    >>> first, core, last = tucker2(w, (1, 1))
    >>> jnp.abs(first @ core @ last - w).max() < 1e-5
    Array(True, dtype=bool)

    Source: Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications", 2016; De
    Lathauwer, De Moor and Vandewalle, "On the best rank-1 and rank-(R1, R2, ..., RN) approximation of higher-order tensors", 2000.
    """
    w = wide(w)
    *lead, places, _, _ = w.shape

    def unfolded(x: Array, axis: int) -> Array:
        return jnp.moveaxis(x, axis, -3).reshape(*lead, x.shape[axis], -1)

    def leading(x: Array, axis: int, rank: Rank) -> Array:
        matrix = unfolded(x, axis)
        u, s, _ = jnp.linalg.svd(matrix, full_matrices=False)
        return u[..., : _chosen(rank if callable(rank) else min(rank, s.shape[-1]), s, matrix.shape)]

    def onto(x: Array, u: Array, axis: int) -> Array:
        """`x` in the coordinates of `u` along an axis; `u` is the same at all places."""
        u = jnp.expand_dims(u, -3)
        return _matmul(x, u) if axis == -1 else _matmul(jnp.swapaxes(u, -1, -2), x)

    first, last = leading(w, -2, ranks[0]), leading(w, -1, ranks[1])
    # Given few outputs, few inputs are all that a kernel has, and the other way round.
    first = first[..., : places * last.shape[-1]]
    last = last[..., : places * first.shape[-1]]
    ins, outs = first.shape[-1], last.shape[-1]

    def turn(_: int, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        first = leading(onto(w, pair[1], -1), -2, ins)
        return first, leading(onto(w, first, -2), -1, outs)

    first, last = lax.fori_loop(0, iterations, turn, (first, last))
    return first, onto(onto(w, first, -2), last, -1), jnp.swapaxes(last, -1, -2)


def _chosen(rank: Rank, s: Array, shape: Sequence[int]) -> int:
    """The rank that is given, or that a rule gives to the most demanding matrix of a stack."""
    if callable(rank):
        if isinstance(s, Tracer):
            raise TypeError("the rank is chosen on the host from singular values, which are traced here; give it as a number")
        rank = max(1, *(rank(each, (shape[-2], shape[-1])) for each in np.asarray(s).reshape(-1, s.shape[-1])))
    if not 1 <= rank <= s.shape[-1]:
        raise ValueError(f"rank={rank} does not fit a matrix {tuple(shape[-2:])}: give 1 to {s.shape[-1]}")
    return operator.index(rank)


@partial(jax.jit, static_argnames="rank")
def _balanced(u: Array, s: Array, vt: Array, rank: int) -> tuple[Array, Array]:
    root = jnp.sqrt(s[..., None, :rank])
    return u[..., :rank] * root, jnp.swapaxes(root, -1, -2) * vt[..., :rank, :]


@jax.jit
def _root(moment: Array) -> Array:
    r"""A root of a second moment, :math:`R^\top R = H + \epsilon`, whose floor is at the size of rounding errors."""
    values, vectors = jnp.linalg.eigh(moment)
    floor = jnp.finfo(moment.dtype).eps * jnp.mean(jnp.maximum(values, 0), axis=-1, keepdims=True)
    values = jnp.maximum(values, 0) + jnp.where(floor > 0, floor, 1)
    return jnp.sqrt(values)[..., None] * jnp.swapaxes(vectors, -1, -2)


def _matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
