r"""The noise of a gradient against its size, which says how large a batch is worth its cost.

With G the gradient of the whole loss and :math:`\Sigma` the covariance of one example's, the gradient of B examples has
:math:`E|G_B|^2 = |G|^2 + \mathrm{tr}\,\Sigma / B`. Its norms at two sizes tell both apart. Below :math:`B_{simple} =
\mathrm{tr}\,\Sigma / |G|^2` twice the batch saves nearly half of the steps; above, nearly none.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxopt_lab.core.checks import require
from jaxopt_lab.core.rows import count_rows
from jaxopt_lab.core.types import Array, PyTree

__all__ = [
    "Noise",
    "NoiseAverage",
    "average_noise",
    "batch_for_noise",
    "gradient_noise",
    "gradient_noise_scale",
    "noise_of_axis",
    "two_batch_noise",
]


class Noise(NamedTuple):
    r"""Unbiased estimates of one step; either may come out negative. Average them before they are divided.

    Attributes:
      square: of :math:`|G|^2`, shape [].
      trace: of :math:`\mathrm{tr}\,\Sigma`, the variance of one example's gradient, shape [].
    """

    square: Array
    trace: Array


def two_batch_noise(small_square: ArrayLike, large_square: ArrayLike, small: ArrayLike, large: ArrayLike) -> Noise:
    r"""From the squared norms of the gradient at two batch sizes.

    .. math:: |\mathcal G|^2 = \frac{B |G_B|^2 - b |G_b|^2}{B - b}, \qquad
        \mathcal S = \frac{|G_b|^2 - |G_B|^2}{1 / b - 1 / B}

    Args:
      small_square: :math:`|G_b|^2`, best the mean over the parts of the large batch.
      large_square: :math:`|G_B|^2`.
      small, large: b and B, b below B.

    Raises:
      ValueError: b is not below B.

    >>> noise = two_batch_noise(1 + 8 / 2, 1 + 8 / 16, 2, 16)
    >>> float(noise.square), float(noise.trace)
    (1.0, 8.0)

    Source: McCandlish, Kaplan, Amodei and the OpenAI Dota team, "An empirical model of large-batch training", 2018, appendix A.1.
    """
    require(lambda small, large: (small > 0) & (small < large), "rise from above 0", small=small, large=large)
    small, large = (jnp.asarray(size, float) for size in (small, large))
    square = (large * large_square - small * small_square) / (large - small)
    return Noise(square, (small_square - large_square) / (1 / small - 1 / large))


def gradient_noise(
    grad: Callable[[PyTree, dict[str, Any]], PyTree], params: PyTree, batch: Mapping[str, Any], *, pieces: int | None = None
) -> tuple[PyTree, Noise]:
    r"""The gradient of a batch, and its noise, from the parts of the batch: a step pays for it once.

    .. math:: \mathcal S = \frac{b}{P - 1} \sum_p |G_p - \bar G|^2, \qquad |\mathcal G|^2 = |\bar G|^2 - \mathcal S / B

    The parts are taken one after the other, so one gradient more than usual is held. With as many parts as examples the estimate is
    the best there is; with 8 it costs next to nothing, and `average_noise` makes up for it.

    Args:
      grad: `(params, batch) -> gradient` of the mean loss over the batch.
      params: any tree of floats.
      batch: arrays `[B, ...]` with the entry "x"; without padding, since a part must weigh what the next does.
      pieces: P, at least 2, which must divide B; one for each example if None.

    Returns:
      The mean gradient, a tree like `params`, and the `Noise`.

    Raises:
      ValueError: P is below 2 or does not divide B.

    >>> grad = jax.grad(lambda params, batch: jnp.mean(batch["x"] * params))
    >>> mean, noise = gradient_noise(grad, jnp.float32(1), {"x": jnp.array([1.0, 2.0, 3.0, 2.0])})
    >>> float(mean), round(float(noise.trace), 4), round(float(noise.square), 4)
    (2.0, 0.6667, 3.8333)

    Source: McCandlish et al., 2018, as above.
    """
    rows = count_rows(batch)
    pieces = rows if pieces is None else pieces
    if pieces < 2 or rows % pieces:
        raise ValueError(f"pieces must be at least 2 and divide the batch of {rows}; got {pieces}")
    cut = jax.tree.map(lambda x: jnp.reshape(x, (pieces, rows // pieces, *jnp.shape(x)[1:])), dict(batch))
    start = jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.result_type(float)), jnp.asarray(0)

    def body(carry, part):
        # Welford's way: a variance that is small against the mean survives the subtraction.
        mean, sum_of_squares, count = carry
        found = grad(params, part)
        count = count + 1
        off = jax.tree.map(jnp.subtract, found, mean)
        mean = jax.tree.map(lambda m, d: m + d / count.astype(m.dtype), mean, off)
        return (mean, sum_of_squares + _square(off) * (count - 1) / count, count), None

    (mean, sum_of_squares, _), _ = jax.lax.scan(body, start, cut)
    trace = sum_of_squares * (rows // pieces) / (pieces - 1)
    return mean, Noise(_square(mean) - trace / rows, trace)


def noise_of_axis(local: PyTree, mean: PyTree, batch_size: int, axis_name: str) -> Noise:
    """From what data-parallel training computes anyway: each device's gradient, and their mean.

    Args:
      local: the gradient of this device's rows, before the mean.
      mean: `jax.lax.pmean(local, axis_name)`.
      batch_size: b, rows on each device.
      axis_name: the mapped axis, of at least two devices.

    >>> local = jnp.array([1.0, 2.0, 3.0, 2.0])
    >>> each = jax.vmap(lambda g: noise_of_axis(g, jax.lax.pmean(g, "rows"), 1, "rows"), axis_name="rows")(local)
    >>> round(float(each.trace[0]), 4), round(float(each.square[0]), 4)
    (0.6667, 3.8333)
    """
    devices = jax.lax.axis_size(axis_name)
    off = jax.lax.psum(_square(jax.tree.map(jnp.subtract, local, mean)), axis_name)
    trace = off * batch_size / (devices - 1)
    return Noise(_square(mean) - trace / (batch_size * devices), trace)


class NoiseAverage(NamedTuple):
    """Averages over steps, one part of a training state.

    Attributes:
      square, trace: exponential averages, shape []; of a start at 0, for which `gradient_noise_scale` corrects by itself, since
        both have it in common.
      count: steps, int32, shape [].
    """

    square: Array
    trace: Array
    count: Array


def average_noise(state: NoiseAverage | None, noise: Noise, decay: float = 0.99) -> NoiseAverage:
    r"""One step of the averages :math:`m \leftarrow \beta m + (1 - \beta) \mathcal G`, for use within a training step.

    The ratio of averages is what converges to the noise scale; the average of ratios does not.

    Args:
      state: of the step before; None at the first.
      noise: of this step.
      decay: :math:`\beta`, in [0, 1).

    >>> state = average_noise(None, Noise(jnp.float32(1), jnp.float32(8)))
    >>> round(float(gradient_noise_scale(average_noise(state, Noise(jnp.float32(3), jnp.float32(8))))), 2)
    3.99

    Source: McCandlish et al., 2018, as above.
    """
    if state is None:
        state = NoiseAverage(jnp.zeros_like(noise.square), jnp.zeros_like(noise.trace), jnp.int32(0))
    square, trace = (decay * old + (1 - decay) * new for old, new in zip(state[:2], noise, strict=True))
    return NoiseAverage(square, trace, state.count + 1)


def gradient_noise_scale(noise: Noise | NoiseAverage) -> Array:
    r"""The simple noise scale, in examples; infinite where :math:`|G|^2` is not told from 0.

    .. math:: B_{simple} = \mathrm{tr}\,\Sigma / |G|^2

    It is about the critical batch size: training in the fewest steps S and that in the fewest examples E are balanced there,
    :math:`(S / S_{min} - 1)(E / E_{min} - 1) = 1`.

    >>> float(gradient_noise_scale(Noise(jnp.float32(2), jnp.float32(64))))
    32.0

    Source: McCandlish et al., 2018, as above.
    """
    known = noise.square > 0
    return jnp.where(known, jnp.maximum(noise.trace, 0) / jnp.where(known, noise.square, 1), jnp.inf)


def batch_for_noise(scale: float, *, efficiency: float = 0.5, least: int = 1, most: int) -> int:
    r"""The power of two that is nearest to the batch whose steps are worth a given share of those of an infinite one.

    .. math:: \epsilon(B) = \frac{1}{1 + B_{noise} / B} \;\Rightarrow\; B = B_{noise} \frac{\epsilon}{1 - \epsilon}

    Args:
      scale: :math:`B_{noise}`, of `gradient_noise_scale`; may be infinite.
      efficiency: :math:`\epsilon` in (0, 1). At 0.5, the critical batch size, a run takes twice the least steps and twice the least
        examples.
      least, most: bounds, kept as they are.

    Raises:
      ValueError: the scale is negative or NaN, the efficiency outside (0, 1), or the bounds do not rise from at least 1.

    Measured as training goes on, it is what a batch plan is made of:

    >>> from jaxopt_lab.schedules import piecewise_batch
    >>> measured = {0: 40.0, 500: 130.0, 2000: 700.0}
    >>> piecewise_batch([batch_for_noise(s, most=512) for s in measured.values()], [500, 2000])
    BatchPlan(sizes=(32, 128, 512), boundaries=(500, 2000))

    Source: McCandlish et al., 2018, equation 2.7.
    """
    if not scale >= 0:
        raise ValueError(f"scale must not be negative; got {scale}")
    if not 0 < efficiency < 1:
        raise ValueError(f"efficiency must lie between 0 and 1; got {efficiency}")
    if not 1 <= least <= most:
        raise ValueError(f"least and most must rise from at least 1; got least={least}, most={most}")
    wanted = float(scale) * efficiency / (1 - efficiency)
    if wanted >= most:
        return most
    return min(max(1 << max(round(math.log2(max(wanted, 1))), 0), least), most)


def _square(tree: PyTree) -> Array:
    return sum((jnp.sum(jnp.square(x.astype(jnp.result_type(float)))) for x in jax.tree.leaves(tree)), jnp.zeros(()))
