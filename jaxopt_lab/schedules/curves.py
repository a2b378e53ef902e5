r"""Curves of the step counter for rates, strengths and temperatures.

`constant`, `linear`, `exponential`, `cosine` and `join` are the staples: the meaning and the order of arguments of Optax's
`constant_schedule`, `linear_schedule`, `exponential_decay`, `cosine_decay_schedule` and `join_schedules`, exact in float64 on the
host. The others are not in Optax. Write :math:`t` for the count, :math:`T` for `steps`, :math:`b` for `begin`, and
:math:`u = \mathrm{clip}((t - b) / T, 0, 1)`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from jax.typing import ArrayLike

from jaxopt_lab.core.checks import require
from jaxopt_lab.core.types import Schedule
from jaxopt_lab.schedules._host import backend, between, fraction, hosted, safe_power

__all__ = [
    "constant",
    "cosine",
    "exponential",
    "join",
    "linear",
    "linear_cooldown",
    "polynomial_decay_to_zero",
    "sqrt_cooldown",
    "temperature",
    "warmup_stable_decay",
]


def _positive_steps(steps: ArrayLike) -> None:
    require(lambda steps: steps > 0, "be positive", steps=steps)


def constant(value: ArrayLike) -> Schedule:
    """The same value at every count, in the shape of the count.

    .. math:: f(t) = v

    >>> float(constant(0.1)(7))
    0.1
    """
    return hosted(lambda xp, t, value: value + xp.zeros_like(t), value=value)


def linear(initial: ArrayLike, final: ArrayLike, steps: ArrayLike, begin: ArrayLike = 0) -> Schedule:
    r"""A straight line between two values.

    .. math:: f(t) = v_0 + u\,(v_1 - v_0)

    Args:
      initial: the value up to `begin`.
      final: the value from `begin + steps` on.
      steps: how many steps the line takes; positive.
      begin: the count at which it starts.

    Raises:
      ValueError: `steps` is not positive.

    >>> import numpy as np
    >>> linear(0.0, 1.0, steps=4)(np.arange(6))
    array([0.  , 0.25, 0.5 , 0.75, 1.  , 1.  ])

    Source: `optax.linear_schedule`.
    """
    _positive_steps(steps)

    def curve(xp, t, *, initial, final, steps, begin):
        return between(xp, initial, final, 1 - fraction(xp, t - begin, steps))

    return hosted(curve, initial=initial, final=final, steps=steps, begin=begin)


def polynomial_decay_to_zero(initial: ArrayLike, steps: ArrayLike, power: ArrayLike = 1.0) -> Schedule:
    r"""Decays a value to zero as a power of what remains of the run.

    .. math:: f(t) = v_0 \left(1 - \frac{t}{T}\right)^p

    Args:
      initial: the value at count 0.
      steps: the count at which the value is 0, and stays so; positive.
      power: :math:`p`; 1 is a line, more falls early, less falls late; positive.

    Raises:
      ValueError: `steps` or `power` is not positive.

    >>> import numpy as np
    >>> polynomial_decay_to_zero(1.0, steps=4, power=2.0)(np.arange(5))
    array([1.    , 0.5625, 0.25  , 0.0625, 0.    ])

    Source: Chen et al., "DeepLab", 2017 (the "poly" policy).
    """
    _positive_steps(steps)
    require(lambda power: power > 0, "be positive", power=power)

    def curve(xp, t, *, initial, steps, power):
        return initial * safe_power(xp, 1 - fraction(xp, t, steps), power)

    return hosted(curve, initial=initial, steps=steps, power=power)


def exponential(
    initial: ArrayLike, steps: ArrayLike, rate: ArrayLike, begin: ArrayLike = 0, *, staircase: bool = False
) -> Schedule:
    r"""Multiplies a value by `rate` every `steps` counts, smoothly or in stairs.

    .. math:: f(t) = v_0\, r^{\max(t - b, 0) / T}

    Args:
      initial: the value up to `begin`.
      steps: how many counts one factor takes; positive.
      rate: the factor :math:`r`; positive.
      begin: the count at which it starts.
      staircase: round the exponent down, so that the value is piecewise constant.

    Raises:
      ValueError: `steps` or `rate` is not positive.

    >>> import numpy as np
    >>> exponential(1.0, 2, 0.25)(np.arange(4)), exponential(1.0, 2, 0.25, staircase=True)(np.arange(4))
    (array([1.   , 0.5  , 0.25 , 0.125]), array([1.  , 1.  , 0.25, 0.25]))

    Source: `optax.exponential_decay`.
    """
    _positive_steps(steps)
    require(lambda rate: rate > 0, "be positive", rate=rate)

    def curve(xp, t, *, initial, steps, rate, begin):
        exponent = xp.maximum(t - begin, 0.0) / steps
        return initial * rate ** (xp.floor(exponent) if staircase else exponent)

    return hosted(curve, initial=initial, steps=steps, rate=rate, begin=begin)


def cosine(initial: ArrayLike, steps: ArrayLike, alpha: ArrayLike = 0.0) -> Schedule:
    r"""Half a cosine from `initial` down to `alpha * initial`.

    .. math:: f(t) = v_0 \left(\alpha + (1 - \alpha)\, \tfrac12 (1 + \cos \pi u)\right)

    Args:
      initial: the value at count 0.
      steps: the length of the half wave; positive.
      alpha: the fraction of `initial` that remains at its end.

    Raises:
      ValueError: `steps` is not positive.

    >>> import numpy as np
    >>> cosine(2.0, steps=2)(np.arange(3)).round(12)
    array([2., 1., 0.])

    Source: Loshchilov and Hutter, "SGDR", 2017; `optax.cosine_decay_schedule`.
    """
    _positive_steps(steps)

    def curve(xp, t, *, initial, steps, alpha):
        wave = (1 + xp.cos(xp.pi * fraction(xp, t, steps))) / 2
        return initial * (alpha + (1 - alpha) * wave)

    return hosted(curve, initial=initial, steps=steps, alpha=alpha)


def linear_cooldown(progress: Any) -> Any:
    """What a straight cooldown leaves of the peak: `1 - progress`.

    >>> linear_cooldown(0.25)
    0.75
    """
    return 1 - progress


def sqrt_cooldown(progress: Any) -> Any:
    r"""What a cooldown that falls fast at first leaves of the peak: :math:`1 - \sqrt{u}`.

    >>> float(sqrt_cooldown(0.25))
    0.5

    Source: Hägele et al., "Scaling laws and compute-optimal training beyond fixed training durations", 2024.
    """
    return 1 - safe_power(backend(progress), progress, 0.5)


def warmup_stable_decay(
    peak: ArrayLike,
    warmup: ArrayLike,
    stable: ArrayLike,
    decay: ArrayLike,
    *,
    initial: ArrayLike = 0.0,
    final: ArrayLike = 0.0,
    cooldown: Callable[[Any], Any] = linear_cooldown,
) -> Schedule:
    r"""A linear warm-up, a plateau, and a cooldown: any plateau checkpoint can be cooled down into a finished model.

    .. math::
      f(t) = \begin{cases}
        v_0 + (v_p - v_0)\, t / W & t < W \\
        v_p & W \le t < W + S \\
        v_1 + (v_p - v_1)\, c\!\left(\frac{t - W - S}{D}\right) & \text{then, and } v_1 \text{ from } W + S + D \text{ on}
      \end{cases}

    Args:
      peak: the value of the plateau.
      warmup: :math:`W`, steps of the warm-up; 0 starts at the peak.
      stable: :math:`S`, steps of the plateau; may be 0.
      decay: :math:`D`, steps of the cooldown; positive.
      initial: the value at count 0.
      final: the value after the cooldown.
      cooldown: :math:`c`, from progress in [0, 1] to what remains of the way to `final`, with c(0) = 1 and c(1) = 0:
        `linear_cooldown`, `sqrt_cooldown`, or your own (it meets numpy and JAX numbers alike).

    Raises:
      ValueError: `warmup` or `stable` is negative, or `decay` is not positive.

    >>> import numpy as np
    >>> warmup_stable_decay(1.0, warmup=2, stable=3, decay=4)(np.arange(10))
    array([0.  , 0.5 , 1.  , 1.  , 1.  , 1.  , 0.75, 0.5 , 0.25, 0.  ])

    Source: Hu et al., "MiniCPM", 2024; Zhai et al., "Scaling vision transformers", 2022.
    """
    require(lambda warmup, stable: (warmup >= 0) & (stable >= 0), "be at least 0", warmup=warmup, stable=stable)
    require(lambda decay: decay > 0, "be positive", decay=decay)

    def curve(xp, t, *, peak, warmup, stable, decay, initial, final):
        rising = between(xp, initial, peak, 1 - fraction(xp, t, xp.maximum(warmup, 1.0)))
        falling = between(xp, peak, final, cooldown(fraction(xp, t - warmup - stable, decay)))
        return xp.where(t < warmup, rising, falling)

    return hosted(curve, peak=peak, warmup=warmup, stable=stable, decay=decay, initial=initial, final=final)


def temperature(initial: ArrayLike, final: ArrayLike, steps: ArrayLike, begin: ArrayLike = 0) -> Schedule:
    r"""Anneals a temperature geometrically: each step multiplies it by the same factor, and it ends on `final` exactly.

    .. math:: \tau(t) = \tau_0 \left(\frac{\tau_1}{\tau_0}\right)^{u}

    For soft targets, Gumbel-softmax samples, relaxed masks or simulated annealing, where the ratio of temperatures is what matters.

    Args:
      initial: the temperature up to `begin`; positive.
      final: the temperature from `begin + steps` on; positive; colder or hotter than `initial`.
      steps: how many steps the annealing takes; positive.
      begin: the count at which it starts.

    Raises:
      ValueError: a temperature or `steps` is not positive.

    >>> import numpy as np
    >>> temperature(8.0, 1.0, steps=3)(np.arange(5)).round(12)
    array([8., 4., 2., 1., 1.])

    Source: Kirkpatrick, Gelatt and Vecchi, "Optimization by simulated annealing", 1983.
    """
    _positive_steps(steps)
    require(lambda initial, final: (initial > 0) & (final > 0), "be positive", initial=initial, final=final)

    def curve(xp, t, *, initial, final, steps, begin):
        u = fraction(xp, t - begin, steps)
        return xp.where(u == 1, final, initial * (final / initial) ** u)

    return hosted(curve, initial=initial, final=final, steps=steps, begin=begin)


def join(schedules: Sequence[Schedule], boundaries: Sequence[Any]) -> Schedule:
    r"""Plays schedules one after the other; each counts from its own start.

    .. math:: f(t) = f_k(t - b_k), \qquad b_k \le t < b_{k+1}, \quad b_0 = 0

    Args:
      schedules: what to play; Optax's may stand among ours.
      boundaries: the count at which each but the first takes over; rising; one fewer than the schedules.

    Raises:
      ValueError: the numbers do not fit, or the boundaries do not rise.

    >>> import numpy as np
    >>> rate = join([linear(0.0, 1.0, 2), cosine(1.0, 4)], [2])
    >>> rate(np.arange(7)).round(3)
    array([0.   , 0.5  , 1.   , 0.854, 0.5  , 0.146, 0.   ])

    Source: `optax.join_schedules`.
    """
    if len(schedules) != len(boundaries) + 1:
        raise ValueError(
            f"join needs one boundary fewer than schedules; got {len(schedules)} schedules and {len(boundaries)} boundaries"
        )
    for first, second in pairwise(boundaries):
        require(lambda first, second: first < second, "rise", first=first, second=second)

    def schedule(count: Any) -> Any:
        value = schedules[0](count)
        for boundary, later in zip(boundaries, schedules[1:], strict=True):
            next_value = later(count - boundary)
            value = backend(count, boundary, value, next_value).where(count < boundary, value, next_value)[()]
        return value

    return schedule
