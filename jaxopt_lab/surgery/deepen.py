"""Deeper networks that compute the same at first: new layers that change nothing yet."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from jaxopt_lab.core import tree
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.tracing import chains
from jaxopt_lab.core.tracing.levels import body_of, carry_of, opened
from jaxopt_lab.core.tracing.products import identity
from jaxopt_lab.core.tracing.programs import Program, Seen, arrays_of, run
from jaxopt_lab.core.tracing.regions import Product, find, product, stacked
from jaxopt_lab.core.tracing.substitution import amounts
from jaxopt_lab.core.tracing.zeros import added
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.surgery.layers import (
    LayerPlan,
    Layers,
    Left,
    Steps,
    Twice,
    applied,
    bound,
    chosen,
    length,
    noted,
    predict_of,
    reads,
    traced,
)

__all__ = ["deepen"]

_TOLERANCE = 1e-5


def deepen(apply: Callable[..., Any], params: PyTree, *example: Any, after: Layers) -> tuple[Any, PyTree, LayerPlan]:
    r"""Puts a new layer behind each of some layers, which changes nothing yet: a deeper model that goes on from where it was.

    .. math:: f_n \circ \cdots \circ f_1 \mapsto \cdots \circ f_{k+1} \circ g \circ f_k \circ \cdots, \qquad g(f_k(x)) = f_k(x)

    A layer is found as by `stack_layers`, and :math:`g` is the same once more, with other parameters:

    - Of a residual layer, :math:`x + b(x)`, those are copies, but for those of the last projection of each branch, which are zero:
      :math:`b = 0`. That is the kernel and bias of a dense layer or a convolution, or the scale and shift of a normalisation. An
      activation behind the sum is done again if doing it twice is doing it once (ReLU); otherwise the new sum stands before it.
    - Of a dense layer or a convolution followed by such an activation, the kernel is the identity and the bias is zero. It has as
      many inputs as outputs, the same window, and no strides. A normalisation by running statistics in between is set to do
      nothing at its statistics: those are taken from the activations on the example, if that and `params` are arrays, and copied
      otherwise; its scale and shift undo them. Where it has no scale, the kernel does; where it has no shift, its mean is zero. In
      training it takes the statistics of the batch, and the function is the same as far as those of the example are like them.

    The gradients of the new layer are not zero, though those of what stands before its last projection are, for one step.

    Args:
      apply, params, example: as in `drop_layers`. Given arrays, the outputs on the example are compared.
      after: the parameters of the layer behind which a new one goes; or a list of selectors, one for each; or by the selector of
        stacked parameters the steps of their scan behind which new ones go.

    Returns:
      `(deep_apply, deep_params, plan)`. The new parameters of `block_1` are `block_1_copy`; with `plan.cut_state`, their moments
      begin at zero. The plan's `cut` gives any tree the same new values.

    Raises:
      ValueError: a layer is neither residual nor a product followed by an activation that doing twice is doing once; or for another
        reason the outputs on the example are not the same.

    >>> params = {"a": {"kernel": jnp.ones((1, 2)), "bias": jnp.ones((1, 2))}, "b": jnp.ones((2, 1))}
    >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]
    >>> deep_apply, deep, plan = deepen(apply, params, jnp.ones((3, 1)), after="a/**")
    >>> print(plan)
    a/**: a new layer behind it, with a_copy
    >>> deep["a_copy"]["kernel"].tolist(), deep_apply(deep, jnp.ones((1, 1))).tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [[4.0]])

    Source: Chen, Goodfellow and Shlens, "Net2Net: accelerating learning via knowledge transfer", 2016; the residual one: Goyal et
    al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017, section 5.1.
    """
    dense, found = chosen(params, after)
    program, inputs = traced(predict_of(apply), dense, *example)
    changes: list[Left | Twice | Steps] = []
    values: dict[str, Any] = {}
    for name, paths, steps in found:
        if steps is None:
            change, own = _layer(program, inputs, name, paths)
        else:
            n = length(dense, name, paths, steps)
            order = tuple(k for step in range(n) for k in [step] * (1 + (step in steps)))
            change = Steps(name, paths, order, tuple(k for k in range(1, len(order)) if order[k] == order[k - 1]))
            own = _of_steps(program, name, paths)
        changes.append(change)
        values |= own
    plan = noted(dense, changes)
    copies = {old: copy for copy, old in plan.copies.paths.items()}
    plan = dataclasses.replace(plan, values={copies.get(path, path): value for path, value in values.items()})
    reads(plan, apply, dense, *example)
    deep = applied(plan, dense)
    _check(predict_of(apply), plan, dense, deep, example)
    return bound(apply, plan), deep, plan


Values = dict[str, Any]
"""What the copies of some parameters begin with, None for zeros."""


def _layer(program: Program, inputs: Sequence[Any], name: str, paths: tuple[str, ...]) -> tuple[Twice, Values]:
    """The new layer behind one that is no scan, and what it begins with where that is no copy."""
    try:
        region = find(program, {name: paths}, twice=True)[name]
        change = Twice(name, paths, bare=not region.clamps, new=True)
        zero = added(program, region.level, region.x, region.bare).zeros
        if zero is None or not zero <= {*paths}:
            raise ValueError(f"{name} does not hand on what enters it when some of its parameters are zero")
        return change, dict.fromkeys(sorted(zero))
    except ValueError as error:
        no_sum = str(error)
    try:
        return Twice(name, paths, product=True, new=True), _behind_product(program, inputs, product(program, name, paths))
    except ValueError as error:
        raise ValueError(
            f"a new layer behind {name} would change what the function computes. It is no residual layer: {no_sum}. It is no "
            f"product and an activation: {error}"
        ) from error


def _of_steps(program: Program, name: str, paths: Sequence[str]) -> Values:
    """The parameters that are zero in a new step of a scan."""
    stack = stacked(program, name, paths)
    eqn, jaxpr = None, program.jaxpr
    for number in (*stack.level[::2], stack.equation):
        eqn = opened(jaxpr)[2][number]
        jaxpr = body_of(eqn)
    _, variables, eqns, results = opened(jaxpr)
    made = {v: (-1, k) for k, v in enumerate(variables)}
    made |= {v: (number, k) for number, own in enumerate(eqns) for k, v in enumerate(own.outvars)}
    level = (*stack.level, stack.equation, 0)
    # A literal is carried on as it is; that it was so before is not known.
    carried = [((-1, k), made.get(v) if isinstance(v, Var) else None) for k, v in zip(carry_of(eqn), results, strict=False)]
    zeros = [None if y is None else added(program, level, x, y).zeros for x, y in carried]
    if any(zero is None or not zero <= {*paths} for zero in zeros):
        raise ValueError(
            f"{name}: a step of its scan does not hand on what enters it when some of its parameters are zero, as a residual layer "
            "does; a new step would change what the function computes"
        )
    return dict.fromkeys(sorted({path for zero in zeros for path in zero or ()}))


# Dense layers and convolutions.


def _behind_product(program: Program, inputs: Sequence[Any], found: Product) -> Values:
    """The identity, and what makes a normalisation behind it do nothing."""
    path, region = found.path, found.region
    kernel = identity(found.equation)
    chain = next((chain for chain in chains.find(program) if chain.site.path == path), None)
    if chain is None and region.bare[0] == found.number:
        return {path: kernel}
    if chain is None or chain.end[: len(region.level) + 1] != (*region.level, region.bare[0]):
        raise ValueError(f"what {path} gives goes through more than additions and multiplications, channel by channel")
    shifts = [own for own in chain.reads if own not in chain.scales]
    if not chain.scales:
        return {path: kernel, **dict.fromkeys(shifts)}
    if any(
        isinstance(value, jax.ShapeDtypeStruct) for own, value in zip(program.paths, inputs, strict=False) if own in chain.reads
    ):
        raise ValueError(f"{path} is followed by {', '.join(chain.formula)}, which is undone by value: give `params` as arrays")
    return _undone(program, inputs, found, chain, kernel)


def _undone(program: Program, inputs: Sequence[Any], found: Product, chain: chains.Affine, kernel: np.ndarray) -> Values:
    """The kernel, and what the parameters of a chain with a scale begin with, so that A is one and B is zero."""
    given = dict(zip(program.paths, inputs, strict=False))
    shifts = [own for own in chain.reads if own not in chain.scales]
    new = {own: jnp.asarray(given[own]) for own in chain.reads} | {own: jnp.zeros_like(given[own]) for own in shifts}

    def amount(**changed: Any) -> tuple[np.ndarray, np.ndarray]:
        own = {**given, **new, **{name: jnp.broadcast_to(value, given[name].shape) for name, value in changed.items()}}
        scale, shift = amounts(program, [*own.values(), *inputs[len(own) :]], [chain])[found.path]
        return np.asarray(scale), np.asarray(shift)

    # What a parameter is for is told by what it does: a name may be anything.
    whole = [own for own in chain.reads if new[own].size == chain.channels]
    base = amount()[0]
    scale = next((own for own in whole if own in chain.scales and not amount(**{own: 0.0})[0].any()), None)
    spread = [own for own in whole if own in chain.scales and own != scale]
    moves = {own: amount(**{own: 1.0})[1] for own in whole if own in shifts}
    shift = next((own for own, by in moves.items() if np.allclose(by, 1)), None)
    mean = next((own for own, by in moves.items() if own != shift and np.allclose(by, -base)), None)
    if None not in (scale, shift, mean) and len(spread) == 1 and not any(isinstance(x, jax.ShapeDtypeStruct) for x in inputs):
        measured = _statistics(program, inputs, found, chain.axis)
        new |= {own: value.reshape(new[own].shape) for own, value in zip((mean, *spread), measured, strict=True)}
    elif shift is not None and mean is not None:
        new[mean] = jnp.asarray(given[mean])
    if scale is not None:
        new[scale] = jnp.ones_like(new[scale])
    factor = amount()[0]
    if not (np.isfinite(factor).all() and factor.all()):
        raise ValueError(f"{', '.join(chain.scales)} multiply a channel of {found.path} by zero or by no number")
    if scale is None:
        kernel = kernel / factor.reshape([-1 if axis == chain.weight_axis else 1 for axis in range(kernel.ndim)])
    else:
        new[scale] = jnp.asarray(1 / factor).reshape(new[scale].shape)
    if shift is not None:
        new[shift] = jnp.asarray(-amount()[1]).reshape(new[shift].shape)
    return {found.path: kernel, **{own: np.asarray(value) for own, value in new.items()}}


def _statistics(program: Program, inputs: Sequence[Any], found: Product, axis: int) -> tuple[Array, Array]:
    """Mean and variance of each channel of what leaves a layer, on the example."""
    name, address = "y", (*found.region.level, found.region.y[0])
    seen = Seen({address: [name]}, lambda name, state, operands, output: output, lambda name, depth: False)
    y = wide(run(program.jaxpr, inputs, {name: None}, seen)[1][name])
    others = tuple(k for k in range(y.ndim) if k != axis)
    return y.mean(others), y.var(others)


def _check(apply: Callable[..., Any], plan: LayerPlan, params: PyTree, deep: PyTree, example: tuple) -> None:
    """Raises unless the deeper function gives on the example what the other one gives; of shapes there is nothing to compare."""
    arrays, rebuilt = arrays_of((params, deep, example))
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
        return

    def both(arrays: Sequence[Any]) -> tuple[PyTree, PyTree]:
        old, new, args = rebuilt(arrays)
        return apply(old, *args), plan.bind(apply)(new, *args)

    # The identity is one only in products that round as little as sums do.
    with jax.default_matmul_precision("highest"):
        before, after = jax.jit(both)(arrays)
    for name, old, new in zip(tree.paths(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(old.dtype, jnp.inexact) and old.size:
            size = max(1.0, float(jnp.max(jnp.abs(old))))
            apart = float(jnp.max(jnp.abs(wide(old) - wide(new)))) / size
            if not apart <= max(_TOLERANCE, 4 * float(jnp.finfo(old.dtype).eps)):
                raise ValueError(
                    f"output {name or '()'} differs by {apart:.1e} of its size {size:.1e} from what the function gave on the "
                    f"example: a new layer does not do nothing behind {', '.join(change.name for change in plan.changes)}"
                )
