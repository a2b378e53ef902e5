"""Post-training rounding of a model: codes and scales by what the weights meet, and other forms of it that round better.

`gptq` and `adaround` choose codes, `awq` and `smooth` scales of inputs, `bias_correct` biases: by a few batches of inputs, on the
walker of `core.tracing`. `equalize` and `rotate` need the weights alone.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxopt_lab.compress.arrays import adaround as learned
from jaxopt_lab.compress.arrays import affine, hadamard, scaling
from jaxopt_lab.compress.arrays import gptq as in_turn
from jaxopt_lab.compress.leaf import Leaf, checked
from jaxopt_lab.compress.leaves.dynamic import dynamic
from jaxopt_lab.compress.leaves.quantized import Quantized
from jaxopt_lab.compress.leaves.transformed import InputScaled, Rotated
from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.compress.post import matrices
from jaxopt_lab.compress.post.matrices import Layout, Matrices
from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import require
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["adaround", "awq", "bias_correct", "equalize", "gptq", "rotate", "smooth"]

Bits = int | Mapping[str, int]
Store = Callable[[PyTree], PyTree]


def gptq(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    bits: Bits = 4,
    *,
    group: int | None = None,
    symmetric: bool = True,
    scale: Callable[..., Any] | None = None,
    damping: float = 0.01,
    activation_order: bool = False,
    block: int = 128,
    sequential: bool = False,
    where: Where = "**/kernel",
    max_bytes: int | None = None,
) -> PyTree:
    r"""Stores the chosen weights in codes that change the outputs of their products little: GPTQ.

    .. math:: \min_{\hat W} \lVert X W - X \hat W \rVert_F^2

    input by input, each making up for the errors before it (see `arrays.gptq`), with :math:`X` what the weight meets in the
    batches. Every output has its own scale, or one for each group of inputs. Weights of convolutions meet windows of their input;
    stacked ones are rounded apart, each by its own inputs; one that is used in several places is rounded by all of them. Weights
    that are exactly 0 stay exactly 0.

    Args:
      apply: `apply(params, *inputs) -> outputs`.
      params: any tree: parameters, the whole variables of a model, an NNX state.
      batches: each a dict with "x" (an array, or a tuple of several inputs), or the input itself. A few hundred examples do.
      bits: 1 to 8, for all weights or by path.
      group: every `group` neighbouring inputs (of the last axis that is summed over) have scales of their own; None is one scale
        for each output.
      symmetric: codes in :math:`\pm(2^{b-1} - 1)` without a zero point; otherwise all :math:`2^b` codes over the range.
      scale: how each range is chosen, as in `quantize`, of weights `[n, m]`; `affine.mse_scale` pays at few bits.
      damping: what is added to the diagonal of the second moments, as a share of its mean.
      activation_order: round the inputs of the largest moments first.
      block: how many inputs are rounded between two matrix products.
      sequential: gather the inputs of each weight from the model in which all earlier ones are rounded: closer, at one pass over
        the batches and one compilation for each weight.
      where: which leaves (see `tree.select`).
      max_bytes: of second moments at once, `[n, n]` for each weight; more passes are made where they would not fit.

    Returns:
      `params` with `Quantized` leaves.

    Raises:
      ValueError: bits, the group or a setting out of range, a weight or its inputs are not finite, a chosen weight meets no
        product, there are no batches or they are not alike, or nothing matches `where`; the message names the path.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already.
      NotImplementedError: a chosen weight meets its inputs otherwise than as matrices (a grouped convolution, say).

    >>> params = {"kernel": jnp.array([[0.4, 1.0], [0.4, -7.0]])}
    >>> batches = [{"x": jnp.array([[1.0, 0.9], [0.5, 0.5]])}]
    >>> gptq(lambda p, x: x @ p["kernel"], params, batches, where="kernel")["kernel"].format()
    'int4 per channel 1'

    Source: Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: accurate post-training quantization for generative pre-trained
    transformers", 2023.
    """
    how = _How(in_turn.gptq, (("damping", damping), ("activation_order", activation_order), ("block", block)))
    return _rounded(apply, params, batches, how, bits, _Grid(group, symmetric, scale), sequential, where, max_bytes)


def adaround(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    bits: Bits = 4,
    *,
    group: int | None = None,
    symmetric: bool = True,
    scale: Callable[..., Any] | None = None,
    steps: int = 1000,
    learning_rate: float = 1e-2,
    strength: float = 1.0,
    sequential: bool = False,
    where: Where = "**/kernel",
    max_bytes: int | None = None,
) -> PyTree:
    r"""Stores the chosen weights in codes that change the outputs of their products little, up or down as it is learned: AdaRound.

    The error is that of `gptq`, and never above that of rounding to nearest with the same scales; see `arrays.adaround`.

    Args:
      apply, params, batches, bits, group, symmetric, scale, sequential, where, max_bytes: as in `gptq`; `bits` are at least 2.
      steps: of Adam for each weight.
      learning_rate: of Adam.
      strength: of the penalty that drives each weight up or down.

    Returns:
      `params` with `Quantized` leaves.

    Raises:
      ValueError, TypeError, NotImplementedError: as `gptq`.

    >>> params = {"kernel": jnp.array([[0.4, 1.0], [0.4, -7.0]])}
    >>> batches = [{"x": jnp.array([[1.0, 0.9], [0.5, 0.5]])}]
    >>> adaround(lambda p, x: x @ p["kernel"], params, batches, steps=10, where="kernel")["kernel"].format()
    'int4 per channel 1'

    Source: Nagel et al., "Up or down? Adaptive rounding for post-training quantization", 2020.
    """
    how = _How(learned.adaround, (("steps", steps), ("learning_rate", learning_rate), ("strength", strength)))
    return _rounded(apply, params, batches, how, bits, _Grid(group, symmetric, scale), sequential, where, max_bytes)


def awq(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    bits: Bits = 4,
    *,
    group: int | None = None,
    symmetric: bool = True,
    scale: Callable[..., Any] | None = None,
    steps: int = 20,
    where: Where = "**/kernel",
    max_bytes: int | None = None,
) -> PyTree:
    r"""Stores the chosen weights rounded to nearest, after their inputs were scaled such that the important ones round finer: AWQ.

    .. math:: x W = (x / s) (s W) \approx (x / s) \, Q(s W), \qquad s_i \propto \mathrm{mean} |x_i|^\alpha

    with the :math:`\alpha` in [0, 1] of least output error for each weight (see `arrays.scaling`), which is never above that of
    rounding to nearest. Convolutions have one scale for each input channel.

    Args:
      apply, params, batches, bits, group, symmetric, scale, where, max_bytes: as in `gptq`.
      steps: how many powers are tried.

    Returns:
      `params` with `InputScaled` leaves of `Quantized` ones.

    Raises:
      ValueError, TypeError, NotImplementedError: as `gptq`.

    >>> params = {"kernel": jnp.array([[0.4, 1.0], [0.4, -7.0]])}
    >>> batches = [{"x": jnp.array([[9.0, 0.9], [5.0, 0.5]])}]
    >>> awq(lambda p, x: x @ p["kernel"], params, batches, where="kernel")["kernel"].format()
    'int4 per channel 1, inputs scaled'

    Source: Lin et al., "AWQ: activation-aware weight quantization for on-device LLM compression and acceleration", 2024.
    """
    grid = _Grid(group, symmetric, scale)
    weights, dense, chosen, batches = _chosen(apply, params, batches, where, bits, grid)
    wanted = (matrices.SECOND, matrices.SIZE, matrices.COUNT)
    gathered = matrices.statistics(apply, dense, batches, chosen, wanted, max_bytes=max_bytes)
    stored = {
        path: _searched(weights[path], gathered.pop(path), layout=layout, bits=_of(bits, path), grid=grid, steps=steps)
        for path, layout in chosen.layouts.items()
    }
    return tree.replaced(params, stored)


def smooth(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    strength: float = 0.5,
    *,
    store: Store | None = None,
    where: Where = "**/kernel",
) -> PyTree:
    r"""Shares the outliers of the inputs out between inputs and weights, so that both can be rounded: SmoothQuant.

    .. math:: x W = (x / s) (s W), \qquad s_i = \max |x_i|^\alpha / \max_c |w_{ic}|^{1 - \alpha}

    Args:
      apply, params, batches, where: as in `gptq`.
      strength: :math:`\alpha`, in [0, 1]: how much of the difficulty goes to the weights.
      store: stores the scaled weights, such as `lambda p: dynamic(p, "**")`. It is called with a dict of them by path, and stores
        each in a leaf. The default is `dynamic`, int8 codes and int8 inputs, with one scale for each output.

    Returns:
      `params` with `InputScaled` leaves of what `store` gave.

    Raises:
      ValueError, TypeError, NotImplementedError: as `gptq`; or `store` leaves a weight dense, or changes paths or shapes.

    >>> params = {"kernel": jnp.array([[0.4, 1.0], [0.4, -7.0]])}
    >>> smoothed = smooth(lambda p, x: x @ p["kernel"], params, [jnp.array([[100.0, 28.0], [5.0, -1.0]])], where="kernel")
    >>> smoothed["kernel"].scale.round(3).tolist()
    [[10.0], [2.0]]

    Source: Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language models", 2023.
    """
    require(lambda strength: (strength >= 0) & (strength <= 1), "lie in [0, 1]", strength=strength)
    weights, dense, chosen, batches = _chosen(apply, params, batches, where)
    gathered = matrices.statistics(apply, dense, batches, chosen, (matrices.LARGEST,))

    shared = {
        path: _shared(weights[path], gathered[path][0], layout=layout, strength=strength) for path, layout in chosen.layouts.items()
    }

    def by_output(scaled: dict[str, Array]) -> dict[str, Leaf]:
        axes = {path: (*layout.stack, *layout.outputs) for path, layout in chosen.layouts.items()}
        return {path: dynamic({path: w}, "**", axis=axes[path])[path] for path, w in scaled.items()}

    inner = _stored(store or by_output, {path: scaled for path, (_, scaled) in shared.items()})
    return tree.replaced(params, {path: InputScaled(inner[path], scale) for path, (scale, _) in shared.items()})


def bias_correct(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    compressed: PyTree,
    *,
    where: Where = "**/kernel",
) -> PyTree:
    r"""Takes back from the biases what compression adds to each output on average.

    .. math:: \hat b = b - E[x] \, (\hat W - W)

    The bias of `.../kernel` is the leaf `.../bias` beside it. Means are those of the inputs in the dense model, so that each layer
    by itself is right on average.

    Args:
      apply, batches: as in `gptq`.
      params: the dense tree.
      compressed: the same tree, compressed: where a chosen weight is stored with an error, its bias is corrected.
      where: which weights (see `tree.select`).

    Returns:
      `compressed` with other biases.

    Raises:
      ValueError: a chosen weight has no bias of its outputs beside it, the trees have other paths, and as `gptq`.
      TypeError, NotImplementedError: as `gptq`.

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> params = {"kernel": jnp.array([[0.4], [7.0]]), "bias": jnp.zeros(1)}
    >>> apply, batches = lambda p, x: x @ p["kernel"] + p["bias"][None], [jnp.array([[1.0, 0.0], [3.0, 0.0]])]
    >>> bias_correct(apply, params, batches, quantize(params, 4, where="kernel"), where="kernel")["bias"].round(3)
    Array([0.8], dtype=float32)

    Source: Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019.
    """
    names, leaves, _ = tree.flatten(compressed)
    stored = dict(zip(names, leaves, strict=True))
    if odd := sorted(set(names) ^ set(tree.paths(params))):
        raise ValueError(f"compressed has other paths than params; first of {len(odd)}: {', '.join(odd[:3])}")
    weights, dense, chosen, batches = _chosen(apply, params, batches, where)
    biases = {path: _beside(path) for path in weights}
    for path, layout in chosen.layouts.items():
        wanted, bias = layout.sizes((*layout.stack, *layout.outputs)), stored.get(biases[path])
        if bias is None or jnp.shape(bias) != wanted:
            has = "there is none" if bias is None else f"its shape is {jnp.shape(bias)}"
            raise ValueError(f"{path} needs a bias of shape {wanted} at {biases[path]}, but {has}; leave it out of `where`")
    gathered = matrices.statistics(apply, dense, batches, chosen, (matrices.TOTAL, matrices.COUNT))

    corrected = {}
    for path, layout in chosen.layouts.items():
        bias, rounded = stored[biases[path]], decompress({path: stored[path]})[path]
        corrected[biases[path]] = _corrected(jnp.asarray(bias), weights[path], rounded, gathered[path], layout=layout)
    return tree.replaced(compressed, corrected)


def equalize(params: PyTree, pairs: Sequence[tuple[str, str]], *, axes: tuple[int, int] = (-1, -2), sweeps: int = 10) -> PyTree:
    r"""Gives the channels between two layers the same range in both, by scales that leave the function as it is.

    .. math:: f(x W_1 + b_1) W_2 = f\Big(\frac{x W_1 + b_1}{s}\Big) \, s W_2, \qquad
              s_c = \sqrt{\max_i |w^{(1)}_{ic}| \,/\, \max_k |w^{(2)}_{ck}|}

    for an activation with :math:`f(s x) = s f(x)`, as a rectifier. A tensor with one scale then rounds about as well as with one a
    channel. Nothing else may lie between the layers: fold normalisations into the first one before.

    Args:
      params: any tree of dense weights.
      pairs: paths of the weights of the first and of the second layer. The bias of `.../kernel` is `.../bias`, if there is one.
      axes: the output axis of the first weights and the input axis of the second.
      sweeps: how often all pairs are gone over; a chain of layers needs several.

    Returns:
      `params` with other weights and biases.

    Raises:
      ValueError: a path is unknown, an axis is out of range, the channels do not fit, a weight is not finite, or no sweep is asked
        for.
      TypeError: a weight is not a floating-point array, or is compressed already.

    >>> params = {"a": {"kernel": jnp.array([[8.0, 1.0]]), "bias": jnp.ones(2)}, "b": {"kernel": jnp.array([[2.0], [4.0]])}}
    >>> equal = equalize(params, [("a/kernel", "b/kernel")])
    >>> [array.round(3).tolist() for array in (equal["a"]["kernel"], equal["a"]["bias"], equal["b"]["kernel"])]
    [[[4.0, 2.0]], [0.5, 2.0], [[4.0], [2.0]]]

    Source: Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019.
    """
    require(lambda sweeps: sweeps >= 1, "be at least 1", sweeps=sweeps)
    names, leaves, _ = tree.flatten(params)
    stored = dict(zip(names, leaves, strict=True))
    changed: dict[str, Array] = {}
    for first, second in pairs:
        for path, axis in zip((first, second), axes, strict=True):
            if path not in stored:
                tree.select(params, path)
            w = changed.setdefault(path, checked(stored[path], path))
            if not -w.ndim <= axis < w.ndim:
                raise ValueError(f"{path} of shape {w.shape} has no axis {axis}; give others as `axes`")
        c, d = changed[first].shape[axes[0]], changed[second].shape[axes[1]]
        if c != d:
            raise ValueError(f"{first} has {c} outputs along axis {axes[0]}, but {second} {d} inputs along axis {axes[1]}")
        bias = _beside(first)
        if bias in stored and bias not in (first, second):
            b = changed.setdefault(bias, checked(stored[bias], bias))
            if b.shape != (c,):
                raise ValueError(f"{bias} has shape {b.shape}, and no entry for each of the {c} outputs of {first}")
    biases = [bias if (bias := _beside(first)) in changed else None for first, _ in pairs]

    def sweep(_: Any, changed: dict[str, Array]) -> dict[str, Array]:
        for (first, second), bias in zip(pairs, biases, strict=True):
            one, two = jnp.moveaxis(changed[first], axes[0], -1), jnp.moveaxis(changed[second], axes[1], 0)
            s = scaling.equalization_scale(one.reshape(-1, one.shape[-1]), two.reshape(two.shape[0], -1))
            changed = changed | {first: _scaled(changed[first], 1 / s, axes[0])}
            changed = changed | {second: _scaled(changed[second], s, axes[1])}
            if bias is not None:
                changed = changed | {bias: _scaled(changed[bias], 1 / s, 0)}
        return changed

    return tree.replaced(params, jax.jit(functools.partial(lax.fori_loop, 0, sweeps, sweep))(changed))


def rotate(params: PyTree, store: Store, key: Array, *, axis: int = -2, stacked: int = 0, where: Where = "**/kernel") -> PyTree:
    r"""Stores the chosen weights rotated at random along their inputs, where outliers are spread and the range is smaller.

    .. math:: x W = (R x) (R W) \approx (R x) \, Q(R W), \qquad R = H \, \mathrm{diag}(\sigma)

    with a fast transform :math:`H` (see `arrays.hadamard`) and random signs. The rotated inputs have fewer outliers too, for a
    `store` that rounds them as well.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      store: stores the rotated weights, such as `lambda p: quantize(p, bits=4)`. It is called with a dict of them by path, and
        stores each in a leaf.
      key: a typed PRNG key; each weight draws its own signs by its path.
      axis: the input axis of the weights: -2 of Flax's dense kernels, -1 of weights stored as (out, in).
      stacked: how many leading axes number separate weights, as of layers under a scan; each draws its own signs.
      where: which leaves (see `tree.select`).

    Returns:
      `params` with `Rotated` leaves of what `store` gave.

    Raises:
      ValueError: an axis is out of range, a weight is not finite, `store` leaves one dense or changes paths or shapes, or nothing
        matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already.

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> params = {"kernel": jnp.array([[8.0], [0.0], [0.0], [0.0]])}
    >>> rotated = rotate(params, lambda p: quantize(p, bits=2, where="**"), jax.random.key(0), where="kernel")
    >>> rotated["kernel"].format(), (rotated["kernel"].materialise() + 0).tolist()
    ('int2 per tensor, rotated along 0', [[8.0], [0.0], [0.0], [0.0]])

    Source: Tseng et al., "QuIP#: even better LLM quantization with Hadamard incoherence and lattice codebooks", 2024; Ashkboos et
    al., "QuaRot: outlier-free 4-bit inference in rotated LLMs", 2024.
    """
    weights = {path: checked(leaf, path) for path, leaf in tree.selected(params, where).items()}
    signs, turned = {}, {}
    for path, w in weights.items():
        along = axis + w.ndim if axis < 0 else axis
        if not stacked <= along < w.ndim:
            raise ValueError(
                f"{path} of shape {w.shape} has no input axis {axis} beside {stacked} stacked ones; give another `axis`"
            )
        sides = [n if a < stacked or a == along else 1 for a, n in enumerate(w.shape)]
        own = hadamard.random_signs(jax.random.fold_in(key, zlib.crc32(path.encode())), math.prod(sides))
        signs[path] = own.reshape(sides)
        turned[path] = hadamard.transform(wide(w) * signs[path], along).astype(w.dtype)
    inner = _stored(store, turned)
    return tree.replaced(
        params, {path: Rotated(inner[path], own, axis if axis < 0 else axis - own.ndim) for path, own in signs.items()}
    )


class _Grid(NamedTuple):
    """The values that codes can stand for, of weights `[n, m]`. It hashes: programs are compiled once for each."""

    group: int | None
    symmetric: bool
    scale: Callable[..., Any] | None

    def scales(self, w: Array, bits: int) -> tuple[Array, Array | None]:
        choose = self.scale or (affine.choose_scale if self.symmetric else affine.choose_scale_and_zero)
        # A group that is the whole side is no group, and its scale need not be multiplied in before a sum.
        group = None if self.group in (None, w.shape[0]) else (self.group, 0)
        chosen = choose(w, -1, bits=bits, group=group)
        return (chosen, None) if self.symmetric else chosen

    def round_trip(self, w: Array, bits: int) -> Array:
        scale, zero_point = self.scales(w, bits)
        return affine.from_codes(affine.to_codes(w, scale, zero_point, bits), scale, zero_point, scale.dtype)


class _How(NamedTuple):
    """`(w, moment, scale, zero_point, bits=..., **options) -> codes`, and its options."""

    round: Callable[..., Array]
    options: tuple[tuple[str, Any], ...]


def _of(bits: Bits, path: str) -> int:
    return bits[path] if isinstance(bits, Mapping) else bits


def _chosen(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    where: Where,
    bits: Bits = 8,
    grid: _Grid | None = None,
) -> tuple[dict[str, Array], PyTree, Matrices, Iterable[Any]]:
    """The chosen weights, the dense tree, what its products make of them, and the batches, whose first has been looked at."""
    weights = {path: checked(leaf, path) for path, leaf in tree.selected(params, where).items()}
    for path in weights:
        if isinstance(bits, Mapping) and path not in bits:
            raise ValueError(f"{path} has no entry in bits; give one, or leave it out of `where`")
        affine.code_range(_of(bits, path))
    dense = decompress(params)
    inputs, batches = matrices.first_of(batches)
    chosen = matrices.as_matrices(apply, dense, inputs, weights)
    group = None if grid is None else grid.group
    for path, layout in chosen.layouts.items() if group is not None else ():
        along = layout.inputs[-1] if layout.inputs else None
        if along is None or group < 1 or layout.shape[along] % group:
            raise ValueError(f"{path} of shape {layout.shape}: group={group} does not divide its axis {along}, of inputs")
    return weights, dense, chosen, batches


def _rounded(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    how: _How,
    bits: Bits,
    grid: _Grid,
    sequential: bool,
    where: Where,
    max_bytes: int | None,
) -> PyTree:
    """The tree with the codes that `how` chooses for each weight."""
    weights, dense, chosen, batches = _chosen(apply, params, batches, where, bits, grid)
    if sequential and iter(batches) is batches:
        raise ValueError("sequential=True goes over the batches once for each weight, but `batches` is an iterator: pass a list")
    stored: dict[str, Leaf] = {}
    for paths in [[path] for path in chosen.layouts] if sequential else [list(chosen.layouts)]:
        current = decompress(tree.replaced(dense, stored))
        gathered = matrices.statistics(apply, current, batches, chosen, (matrices.SECOND,), paths=paths, max_bytes=max_bytes)
        for path in paths:
            (moment,), layout = gathered.pop(path), chosen.layouts[path]
            stored[path] = _coded(weights[path], moment, layout=layout, bits=_of(bits, path), grid=grid, how=how)
    return tree.replaced(params, stored)


@functools.partial(jax.jit, static_argnames=("layout", "bits", "grid", "how"))
def _coded(w: Array, moment: Array, *, layout: Layout, bits: int, grid: _Grid, how: _How) -> Quantized:
    def one(parts: tuple[Array, Array]) -> tuple:
        scales = grid.scales(parts[0], bits)
        return how.round(*parts, *scales, bits=bits, **dict(how.options)), *scales

    return _leaf(layout, *lax.map(one, (layout.matrices(w), moment)), bits=bits, dtype=w.dtype)


@functools.partial(jax.jit, static_argnames=("layout", "bits", "grid", "steps"))
def _searched(w: Array, gathered: tuple[Array, ...], *, layout: Layout, bits: int, grid: _Grid, steps: int) -> InputScaled:
    moment, total, count = gathered

    def one(parts: tuple[Array, Array, Array]) -> tuple:
        w, moment, size = parts
        by_input, _ = scaling.awq_scale(w, moment, size, lambda w: grid.round_trip(w, bits), steps=steps)
        scaled = by_input[:, None] * wide(w)
        scales = grid.scales(scaled, bits)
        return by_input, affine.to_codes(scaled, *scales, bits=bits), *scales

    size = layout.by_channel(total / jnp.maximum(count, 1), jnp.mean)
    by_input, *codes = lax.map(one, (layout.matrices(w), moment, size))
    return InputScaled(_leaf(layout, *codes, bits=bits, dtype=w.dtype), layout.channel_scale(by_input))


@functools.partial(jax.jit, static_argnames=("layout", "strength"))
def _shared(w: Array, largest: Array, *, layout: Layout, strength: float) -> tuple[Array, Array]:
    """The scale of `smooth`, and the weight multiplied by it."""
    of_w = jnp.max(jnp.abs(wide(layout.matrices(w))), axis=2)
    x, of_w = (layout.by_channel(values, jnp.max) for values in (largest, of_w))
    scale = layout.channel_scale(jax.vmap(lambda x, w: scaling.smooth_scale(x, w[:, None], strength))(x, of_w))
    return scale, (wide(w) * scale).astype(w.dtype)


@functools.partial(jax.jit, static_argnames="layout")
def _corrected(bias: Array, w: Array, rounded: Array, gathered: tuple[Array, Array], *, layout: Layout) -> Array:
    total, count = gathered
    mean = total / jnp.maximum(count, 1)
    shift = jax.vmap(scaling.output_shift)(layout.matrices(w), layout.matrices(rounded), mean)
    return (wide(bias) - shift.reshape(bias.shape)).astype(bias.dtype)


def _leaf(layout: Layout, codes: Array, scale: Array, zero_point: Array | None, *, bits: int, dtype: Any) -> Quantized:
    """The leaf of codes `[k, n, m]` and scales `[k, n / g, m]`, in the layout of the weight."""
    zero = None if zero_point is None else layout.restored(zero_point)
    return Quantized.of(layout.restored(codes), layout.restored(scale), zero, bits=bits, dense_dtype=dtype)


def _stored(store: Store, weights: dict[str, Array]) -> dict[str, Leaf]:
    """What `store` makes of some weights by path, once it is seen to be leaves of their shapes."""
    stored = store(dict(weights))
    if not isinstance(stored, dict) or set(stored) != set(weights):
        raise ValueError(f"store has to give what it was given, a dict with the paths {', '.join(list(weights)[:5])}")
    for path, w in weights.items():
        if not tree.is_compressed(stored[path]):
            raise ValueError(f"store leaves {path} dense; give it a `where` that chooses every weight")
        if stored[path].aval().shape != w.shape:
            raise ValueError(f"store makes a weight of shape {stored[path].aval().shape} of {path}, whose shape is {w.shape}")
    return stored


def _beside(path: str) -> str:
    """The path of the bias that belongs to a weight."""
    return path[: path.rfind("/") + 1] + "bias"


def _scaled(w: Array, by: Array, axis: int) -> Array:
    sides = [1] * w.ndim
    sides[axis] = -1
    return (wide(w) * by.reshape(sides)).astype(w.dtype)
