"""Rounding that heeds the inputs: one input's weights at a time, the later ones making up for the error of the earlier."""

import math

import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jaxopt_lab.compress.arrays import affine
from jaxopt_lab.core.checks import require
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["gptq", "output_error"]


def output_error(w: Array, rounded: Array, moment: Array) -> Array:
    r"""How far a rounded weight moves each output, squared and summed over the inputs: :math:`e_c = d_c^\top H d_c`.

    .. math:: d = w - \hat w, \qquad H = X^\top X, \qquad \textstyle\sum_c e_c = \mathrm{tr}(d^\top H d) = \lVert X d \rVert_F^2

    Args:
      w: weights `[n, m]`, inputs by outputs.
      rounded: what stands for them, `[n, m]`.
      moment: second moment of the inputs, `[n, n]`; any multiple of it.

    Returns:
      `[m]`.

    >>> x, w = jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[0.5], [0.25]])
    >>> output_error(w, jnp.zeros((2, 1)), x.T @ x), jnp.sum((x @ w) ** 2, axis=0)
    (Array([1.0625], dtype=float32), Array([1.0625], dtype=float32))
    """
    d = wide(w) - wide(rounded)
    return jnp.sum(d * jnp.matmul(wide(moment), d, precision=lax.Precision.HIGHEST), axis=0)


def gptq(
    w: Array,
    moment: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    bits: int = 4,
    damping: float = 0.01,
    activation_order: bool = False,
    block: int = 128,
) -> Array:
    r"""Codes of small output error: inputs are rounded in turn, and what is left to round makes up for what is done.

    .. math:: \min_q \mathrm{tr}(d^\top H d), \qquad d = w - s (q - z), \qquad
              q_i = Q\Big(w_i + \sum_{j < i} \frac{R_{ji}}{R_{ii}} d_j\Big), \qquad H + \delta \bar h I = R R^\top

    with :math:`R` upper triangular, :math:`\bar h` the mean of the diagonal and :math:`Q` rounding to the nearest code. These are
    the codes of the paper, which subtracts :math:`U_{ij} d_i / U_{ii}` from the rows :math:`j > i` after each rounding, with
    :math:`U` the Cholesky factor of the inverse: :math:`U = R^{-1}`, and nothing needs to be inverted. Where :math:`H` is diagonal
    they are those of rounding to nearest.

    Weights that are exactly 0 get the code of 0, as in `affine.to_codes`. Inputs that never were anything but 0 are rounded to
    nearest. If the damped moment has no Cholesky factor in floating point, the damping grows tenfold until it has one.

    Args:
      w: weights `[n, m]`, inputs by outputs.
      moment: second moment of the inputs, :math:`H = X^\top X`, `[n, n]`; any multiple of it gives the same codes.
      scale: positive, `[1, m]`, or `[n / g, m]` for groups of `g` neighbouring inputs; a last side of 1 is one for all outputs.
      zero_point: int8 of the shape of `scale`, or None for symmetric codes.
      bits: of a code, 1 to 8.
      damping: :math:`\delta`, not negative.
      activation_order: round the inputs of the largest moments first. Groups stay those of neighbours.
      block: how many inputs are rounded between two matrix products; it changes the speed, and sums in their last digits.

    Returns:
      The codes in int8, `[n, m]`.

    Raises:
      ValueError: a setting is out of range, or the shapes do not fit.

    >>> w, moment, scale = jnp.array([[0.4], [0.4]]), jnp.array([[1.0, 0.9], [0.9, 1.0]]), jnp.ones((1, 1))
    >>> affine.to_codes(w, scale, bits=4).ravel(), gptq(w, moment, scale, bits=4).ravel()
    (Array([0, 0], dtype=int8), Array([0, 1], dtype=int8))

    Source: Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: accurate post-training quantization for generative pre-trained
    transformers", 2023; the form without an inverse: Chee et al., "QuIP: 2-bit quantization of large language models with
    guarantees", 2023.
    """
    _check(w, moment, scale)
    require(lambda damping: damping >= 0, "not be negative", damping=damping)
    require(lambda block: block >= 1, "be at least 1", block=block)
    n, m = w.shape
    per_scale, size = n // scale.shape[0], min(block, n)
    w, moment = wide(w), wide(moment)
    order = jnp.argsort(jnp.diagonal(moment), descending=True) if activation_order else jnp.arange(n)
    spread = _spread(moment[jnp.ix_(order, order)] if activation_order else moment, damping)
    # Whole blocks: rows that are added are zeros, and nothing is spread to or from them.
    blocks = math.ceil(n / size)
    extra = blocks * size - n
    target = jnp.pad(w[order], ((0, extra), (0, 0))).reshape(blocks, size, m)
    spread = jnp.pad(spread, ((0, extra), (0, extra)))
    groups = jnp.pad(order // per_scale, (0, extra)).reshape(blocks, size)

    def round_block(errors: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        b, rows, group = inputs
        columns = lax.dynamic_slice_in_dim(spread, b * size, size, axis=1)
        within = lax.dynamic_slice_in_dim(columns, b * size, size, axis=0)
        # The errors of rows that are not rounded yet are zeros.
        moved = rows + jnp.matmul(columns.T, errors, precision=lax.Precision.HIGHEST)

        def round_row(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            codes, own = state
            wanted = moved[i] + jnp.matmul(within[:, i], own, precision=lax.Precision.HIGHEST)
            wanted = jnp.where(rows[i] == 0, 0, wanted)[None]
            s = lax.dynamic_slice_in_dim(scale, group[i], 1)
            z = None if zero_point is None else lax.dynamic_slice_in_dim(zero_point, group[i], 1)
            q = affine.to_codes(wanted, s, z, bits)
            error = rows[i] - affine.from_codes(q, s, z, rows.dtype)[0]
            return codes.at[i].set(q[0]), own.at[i].set(error)

        codes, own = lax.fori_loop(0, size, round_row, (jnp.zeros((size, m), jnp.int8), jnp.zeros((size, m), rows.dtype)))
        return lax.dynamic_update_slice_in_dim(errors, own, b * size, axis=0), codes

    _, codes = lax.scan(round_block, jnp.zeros((blocks * size, m), w.dtype), (jnp.arange(blocks), target, groups))
    codes = codes.reshape(blocks * size, m)[:n]
    return jnp.zeros_like(codes).at[order].set(codes) if activation_order else codes


def _check(w: Array, moment: Array, scale: Array) -> None:
    if w.ndim != 2 or moment.shape != (w.shape[0],) * 2:
        raise ValueError(f"weights [n, m] need a moment [n, n]: got {w.shape} and {moment.shape}")
    if scale.ndim != 2 or any(side < 1 or n % side for n, side in zip(w.shape, scale.shape, strict=True)):
        raise ValueError(f"weights {w.shape} need a scale of two sides that divide theirs: got {scale.shape}")


def _spread(moment: Array, damping: float) -> Array:
    """What the error of each row `j` adds to the rows `i > j`: :math:`R_{ji} / R_{ii}`, strictly upper triangular."""
    diagonal = jnp.diagonal(moment)
    mean = jnp.mean(diagonal)
    # An input that is always 0 has nothing to do with the others.
    dead = jnp.where(diagonal > 0, 0, jnp.where(mean > 0, mean, 1))

    def factored(damping: Array) -> Array:
        damped = moment + jnp.diag(dead + damping * mean)
        # Cholesky from the last row up, so that the factor is upper triangular.
        return jnp.flip(jnp.linalg.cholesky(jnp.flip(damped)))

    def failed(state: tuple[Array, Array, Array]) -> Array:
        tries, _, factor = state
        return (tries < 12) & ~jnp.isfinite(factor).all()

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tries, damping, _ = state
        return tries + 1, jnp.maximum(10 * damping, 1e-6), factored(damping)

    start = jnp.zeros((), jnp.int32), jnp.asarray(damping, moment.dtype), jnp.full_like(moment, jnp.nan)
    _, _, factor = lax.while_loop(failed, again, start)
    if not isinstance(factor, Tracer) and not bool(jnp.isfinite(factor).all()):
        raise ValueError(f"the moment {moment.shape} has no Cholesky factor: it is not that of any inputs, or holds NaN")
    return jnp.triu(factor / jnp.diagonal(factor)[None], 1)
