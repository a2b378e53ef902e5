"""Affine quantisation of bare arrays: choosing scales, rounding to codes, and back. It knows nothing of leaves or models.

A scale has the rank of its weights. Along an axis it has one side for all, one for each index, or one for each group of neighbours:
its length divides the axis, and the groups follow one another.

Choosing scales and rounding are compiled as a whole for each shape: operation by operation, a network of twenty shapes would have
hundreds of programs compiled.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxopt_lab.core.shapes import equal_blocks
from jaxopt_lab.core.types import Array

__all__ = [
    "channel_axes",
    "choose_scale",
    "choose_scale_and_zero",
    "code_range",
    "divided",
    "from_codes",
    "levels",
    "mse_scale",
    "mse_scale_and_zero",
    "reshaped_sides",
    "scale_sides",
    "scaled",
    "to_codes",
]

Axes = int | tuple[int, ...] | None
Group = tuple[int, int] | None


def channel_axes(axis: Axes, ndim: int) -> tuple[int, ...]:
    """The axes that keep a scale of their own, counted from the front and sorted; None is no axis (one scale for the tensor).

    Raises:
      ValueError: an axis lies outside the array, or is named twice.

    >>> channel_axes(-1, 4), channel_axes((0, -1), 3), channel_axes(None, 2)
    ((3,), (0, 2), ())
    """
    given = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if any(not -ndim <= a < ndim for a in given) or len({a % ndim for a in given}) < len(given):
        raise ValueError(f"axis={axis} does not name distinct axes of an array with {ndim} dimensions; use None for one scale")
    return tuple(sorted(a % ndim for a in given))


def scale_sides(shape: Sequence[int], axis: Axes = -1, group: Group = None) -> tuple[int, ...]:
    """The shape of the scales of weights of shape `shape`.

    Args:
      shape: of the weights.
      axis: the axis (or axes) along which every index has its own scale; None for none.
      group: `(size, axis)`: along this axis, every `size` neighbours have their own scale.

    Raises:
      ValueError: an axis lies outside the shape or is named twice, or the size of a group does not divide its axis.

    >>> scale_sides((64, 3), -1), scale_sides((64, 3), -1, (16, 0)), scale_sides((64, 3), None)
    ((1, 3), (4, 3), (1, 1))
    """
    channels = channel_axes(axis, len(shape))
    sides = [n if a in channels else 1 for a, n in enumerate(shape)]
    if group is not None:
        size, along = group
        if not -len(shape) <= along < len(shape) or along % len(shape) in channels:
            raise ValueError(f"group={group} names no axis of {len(shape)} dimensions beside axis={axis}; give (size, axis)")
        if size < 1 or shape[along] % size:
            raise ValueError(f"group={group}: groups of {size} do not divide axis {along}, which has {shape[along]} entries")
        sides[along] = shape[along] // size
    return tuple(sides)


def reshaped_sides(shape: Sequence[int], sides: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of the scales once weights of shape `shape`, with scales of shape `sides`, have the shape `new`.

    None where no such shape stands for it: an axis with scales merges with one without, or a group would be cut.

    >>> reshaped_sides((2, 3, 4), (1, 1, 4), (6, 2, 2)), reshaped_sides((8, 3), (4, 3), (2, 4, 3))
    ((1, 2, 2), (2, 2, 3))
    >>> reshaped_sides((2, 12), (2, 1), (24,)), reshaped_sides((2, 12), (1, 12), (24,))
    ((2,), None)
    """
    blocks = equal_blocks(shape, new)
    if blocks is None:
        return None
    found: list[int] = []
    for before, after in blocks:
        run, block = _run(shape[before], sides[before]), []
        for n in reversed(new[after]):
            if run is None or (run % n and n % run):
                return None
            block.append(1 if run % n == 0 else n // run)
            run = max(run // n, 1)
        found += reversed(block)
    return tuple(found)


def code_range(bits: int, symmetric: bool = True) -> tuple[int, int]:
    r"""The least and the largest code: :math:`\pm(2^{b-1} - 1)` if symmetric, else all :math:`2^b`; one symmetric bit is a sign.

    >>> code_range(8), code_range(4), code_range(4, symmetric=False), code_range(1)
    ((-127, 127), (-7, 7), (-8, 7), (-1, 1))

    Raises:
      ValueError: `bits` is not 1 to 8.
    """
    if not isinstance(bits, (int, np.integer)) or isinstance(bits, bool) or bits not in range(1, 9):
        raise ValueError(f"bits={bits}: codes have 1 to 8 bits")
    half = 2 ** (bits - 1)
    return (-max(half - 1, 1), max(half - 1, 1)) if symmetric else (-half, half - 1)


def choose_scale(w: Array, axis: Axes = -1, *, bits: int = 8, group: Group = None, largest: ArrayLike | None = None) -> Array:
    r"""The symmetric scale of each channel: :math:`s = \max |w| / (2^{b-1} - 1)`; at one bit :math:`s = \mathrm{mean} |w|`.

    A channel of zeros (or one so small that its scale would underflow) gets the scale 1, so that its codes are exact zeros; at one
    bit, where no code is zero, it gets the scale 0.

    Args:
      w: floating-point weights, shape `[...]`.
      axis: the axis (or axes) along which every index has its own scale; None for one scale in all.
      bits: of a code, 1 to 8.
      group: `(size, axis)`: along this axis, every `size` neighbours have their own scale (see `scale_sides`).
      largest: the largest code, where it is not that of `bits`.

    Returns:
      Scales in at least float32, of the shape that `scale_sides` gives.

    >>> choose_scale(jnp.array([[1.27, 0.0], [-2.54, 0.0]]))
    Array([[0.02, 1.  ]], dtype=float32)
    >>> choose_scale(jnp.array([[1.27, 0.0], [-2.54, 0.0]]), group=(1, 0))
    Array([[0.01, 1.  ],
           [0.02, 1.  ]], dtype=float32)

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018;
    one bit: Rastegari et al., "XNOR-Net", 2016.
    """
    if bits == 1 and largest is None:
        return _reduced(jnp.mean, jnp.abs(_wide(w)), axis, group)
    return _symmetric(w, code_range(bits)[1] if largest is None else largest, axis, group and tuple(group))


def choose_scale_and_zero(w: Array, axis: Axes = -1, *, bits: int = 8, group: Group = None) -> tuple[Array, Array]:
    r"""The asymmetric scale and zero point of each channel, whose range always includes 0.

    .. math:: s = (\max(w, 0) - \min(w, 0)) / (2^b - 1), \qquad z = \mathrm{round}(-2^{b-1} - \min(w, 0) / s)

    Args:
      w: floating-point weights, shape `[...]`.
      axis: as in `choose_scale`.
      bits: of a code, 1 to 8.
      group: as in `choose_scale`.

    Returns:
      `(scale, zero_point)`: floats in at least float32 and int8, both of the shape that `scale_sides` gives.

    >>> choose_scale_and_zero(jnp.array([0.0, 1.275, 2.55]), axis=None)
    (Array([0.01], dtype=float32), Array([-128], dtype=int8))

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """
    return _scale_and_zero(*_ends(w, axis, group and tuple(group)), bits)


def mse_scale(w: Array, axis: Axes = -1, *, bits: int = 8, group: Group = None, steps: int = 80, least: float = 0.2) -> Array:
    r"""The symmetric scale of least squared error on a grid of ranges that clip the largest weights.

    .. math:: s = \arg\min_{s \in S} \sum (\hat w(s) - w)^2, \qquad S = \{ r s_0 : r = 1, \ldots, r_{min} \}

    with :math:`s_0` the scale of `choose_scale`, which is in the grid: the error is never larger than that of the full range.

    Args:
      w: floating-point weights, shape `[...]`.
      axis: as in `choose_scale`.
      bits: of a code, 1 to 8. At one bit the mean is the best scale already.
      group: as in `choose_scale`.
      steps: how many factors are tried, evenly spaced; one pass over the weights each.
      least: the smallest factor, above 0 and at most 1.

    >>> w = jnp.append(jnp.ones(15), 1.6)
    >>> [round(float(choose(w, None, bits=2)[0]), 2) for choose in (choose_scale, mse_scale)]
    [1.6, 1.03]

    Source: Banner, Nahshan and Soudry, "Post training 4-bit quantization of convolutional networks for rapid-deployment", 2019.
    """
    start = choose_scale(w, axis, bits=bits, group=group)
    if bits == 1:
        return start
    return _least_error(w, lambda factor: (start * factor,), bits, steps, least)[0]


def mse_scale_and_zero(
    w: Array, axis: Axes = -1, *, bits: int = 8, group: Group = None, steps: int = 80, least: float = 0.2
) -> tuple[Array, Array]:
    """The asymmetric scale and zero point of least squared error: `mse_scale`, both ends of the range shrinking alike.

    Args:
      w: floating-point weights, shape `[...]`.
      axis: as in `choose_scale`.
      bits: of a code, 1 to 8.
      group: as in `choose_scale`.
      steps: how many factors are tried, evenly spaced.
      least: the smallest factor, above 0 and at most 1.

    >>> scale, zero_point = mse_scale_and_zero(jnp.array([0.0, 1.0, 2.0, 3.2]), None, bits=2)
    >>> to_codes(jnp.array([0.0, 1.0, 2.0, 3.2]), scale, zero_point, bits=2)
    Array([-2, -1,  0,  1], dtype=int8)
    """
    low, high = _ends(w, axis, group and tuple(group))
    return _least_error(w, lambda factor: _scale_and_zero(low * factor, high * factor, bits), bits, steps, least)


@partial(jax.jit, static_argnames="bits")
def to_codes(w: Array, scale: Array, zero_point: Array | None = None, bits: int = 8) -> Array:
    r"""Rounds weights to codes: :math:`q = \mathrm{clip}(\mathrm{round}(w / s) + z)`, half to even.

    The codes lie in `code_range`. A weight that is exactly 0 gets the code of 0, always, but for one symmetric bit: that is the
    sign, and +1 for 0.

    Args:
      w: floating-point weights, shape `[...]`.
      scale: of the rank of `w`, each side dividing that of `w`.
      zero_point: int8 of the shape of `scale`, or None for symmetric codes.
      bits: of a code, 1 to 8.

    Returns:
      The codes, in int8 whatever their width.

    >>> to_codes(jnp.array([0.5, 1.5, -2.5, 0.0, 900.0]), jnp.array([1.0]))
    Array([   0,    2,   -2,    0,  127], dtype=int8)
    """
    low, high = code_range(bits, symmetric=zero_point is None)
    if bits == 1 and zero_point is None:
        return jnp.where(w < 0, -1, 1).astype(jnp.int8)
    # Clipped as integers would be: the sum of a large quotient and the zero point must saturate, not wrap.
    steps = jnp.round(divided(w.astype(scale.dtype), scale))
    if zero_point is not None:
        steps = _by_runs(jnp.add, steps, zero_point.astype(scale.dtype))
    return jnp.clip(steps, low, high).astype(jnp.int8)


@partial(jax.jit, static_argnames="dtype")
def levels(codes: Array, zero_point: Array | None, dtype: Any) -> Array:
    """The integers :math:`q - z` in a floating-point dtype; they lie in [-255, 255], which even bfloat16 holds exactly.

    >>> levels(jnp.array([-128, 127], jnp.int8), jnp.array([-128], jnp.int8), jnp.bfloat16)
    Array([0, 255], dtype=bfloat16)
    """
    return codes.astype(dtype) if zero_point is None else _by_runs(jnp.subtract, codes.astype(dtype), zero_point.astype(dtype))


def scaled(values: Array, scale: Array) -> Array:
    """`values * scale`, where a side of the scale may be that of a group.

    >>> scaled(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.0, 10.0]))
    Array([ 1.,  2., 30., 40.], dtype=float32)
    """
    return _by_runs(jnp.multiply, values, scale)


def divided(values: Array, scale: Array) -> Array:
    """`values / scale`, where a side of the scale may be that of a group.

    >>> divided(jnp.array([1.0, 2.0, 30.0, 40.0]), jnp.array([1.0, 10.0]))
    Array([1., 2., 3., 4.], dtype=float32)
    """
    return _by_runs(jnp.divide, values, scale)


def from_codes(codes: Array, scale: Array, zero_point: Array | None, dtype: Any) -> Array:
    r"""The weights that the codes stand for: :math:`\hat w = s (q - z)`, rounded once to `dtype`.

    >>> from_codes(jnp.array([[1, -2]], jnp.int8), jnp.array([[0.5, 2.0]]), None, jnp.float32)
    Array([[ 0.5, -4. ]], dtype=float32)
    """
    return scaled(levels(codes, zero_point, scale.dtype), scale).astype(dtype)


def _wide(w: Array) -> Array:
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


def _usable(scale: Array) -> Array:
    # So asked, a NaN stays one, and shows.
    return jnp.where(scale < jnp.finfo(scale.dtype).tiny, 1, scale)


def _run(shape: Sequence[int], sides: Sequence[int]) -> int | None:
    """How many neighbours share a scale in an array of this shape laid out flat; None where they are no neighbours."""
    run, closed = 1, False
    for n, side in zip(reversed(shape), reversed(sides), strict=True):
        if closed and side != n:
            return None
        run, closed = run * (n // side), closed or side > 1
    return run


def _runs(shape: Sequence[int], sides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Both shapes with an axis of groups cut in two, (groups, neighbours) and (groups, 1): then the one broadcasts to the other."""
    cut, ones = [], []
    for n, side in zip(shape, sides, strict=True):
        grouped = 1 < side < n
        cut += [side, n // side] if grouped else [n]
        ones += [side, 1] if grouped else [side]
    return cut, ones


def _by_runs(operate: Callable[[Array, Array], Array], values: Array, scale: Array) -> Array:
    cut, ones = _runs(values.shape, scale.shape)
    if len(cut) == values.ndim:
        return operate(values, scale)
    return operate(values.reshape(cut), scale.reshape(ones)).reshape(values.shape)


def _reduced(reduce: Callable[..., Array], values: Array, axis: Axes, group: Group = None) -> Array:
    """One number for each scale, in the shape of the scales."""
    sides = scale_sides(values.shape, axis, group)
    cut, ones = _runs(values.shape, sides)
    shared = tuple(a for a, (n, side) in enumerate(zip(cut, ones, strict=True)) if side == 1 or n != side)
    found = reduce(values if len(cut) == values.ndim else values.reshape(cut), axis=shared, keepdims=True)
    return found if len(cut) == values.ndim else found.reshape(sides)


# What they divide by is an argument: of a constant XLA would multiply by the inverse, which rounds otherwise.
@partial(jax.jit, static_argnames=("axis", "group"))
def _symmetric(w: Array, largest: ArrayLike, axis: Axes, group: Group) -> Array:
    return _usable(_reduced(jnp.max, jnp.abs(_wide(w)), axis, group) / largest)


@partial(jax.jit, static_argnames=("axis", "group"))
def _ends(w: Array, axis: Axes, group: Group) -> tuple[Array, Array]:
    wide = _wide(w)
    return jnp.minimum(_reduced(jnp.min, wide, axis, group), 0), jnp.maximum(_reduced(jnp.max, wide, axis, group), 0)


def _scale_and_zero(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    return _asymmetric(low, high, *code_range(bits, symmetric=False))


@jax.jit
def _asymmetric(low: Array, high: Array, least: int, largest: int) -> tuple[Array, Array]:
    # Divided before they are subtracted: the span of two large floats may overflow.
    scale = _usable(high / (largest - least) - low / (largest - least))
    return scale, jnp.clip(jnp.round(least - low / scale), least, largest).astype(jnp.int8)


def _least_error(w: Array, choose: Callable[[Any], tuple[Array, ...]], bits: int, steps: int, least: float) -> Any:
    """What `choose` gives for the best factor in `[least, 1]`, for each scale by itself; 1 comes first and wins ties."""
    if steps < 1 or not 0 < least <= 1:
        raise ValueError(f"steps={steps} and least={least}: at least one factor, from 1 down to a positive one")
    wide = _wide(w)

    def error(chosen: tuple[Array, ...]) -> Array:
        scale, *zeros = chosen
        zero_point = zeros[0] if zeros else None
        got = from_codes(to_codes(wide, scale, zero_point, bits), scale, zero_point, scale.dtype)
        cut, ones = _runs(wide.shape, scale.shape)
        shared = tuple(a for a, side in enumerate(ones) if side == 1)
        # In units of the full range's scale, since the square of a tiny weight underflows.
        off = divided(got - wide, unit)
        return jnp.sum(jnp.square(off).reshape(cut), axis=shared, keepdims=True).reshape(scale.shape)

    first = choose(1.0)
    unit, *_ = first

    def body(i: Array, state: tuple) -> tuple:
        best, least_error = state
        chosen = choose(1 - i.astype(unit.dtype) * (1 - least) / max(steps - 1, 1))
        found = error(chosen)
        better = found < least_error
        return tuple(jnp.where(better, new, old) for new, old in zip(chosen, best, strict=True)), jnp.where(
            better, found, least_error
        )

    return lax.fori_loop(1, steps, body, (first, error(first)))[0]
