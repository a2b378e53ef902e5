"""Dense layers and convolutions that change nothing: as many outputs as inputs, and a kernel that hands each of them on."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax

from jaxopt_lab.core.types import Array

__all__ = ["identity", "square"]


def square(eqn: Any) -> Callable[[Array, Array], Array]:
    """The product of an equation, as one that keeps the shape of what it takes.

    A convolution has the same window as before, no strides, and as much padding with zeros as it takes; its groups stay.

    Raises:
      ValueError: it is no product over the last axis of a value, nor a convolution; the message says what it is.

    >>> import jax
    >>> eqn = jax.make_jaxpr(lambda x, w: x @ w)(np.ones((4, 3)), np.ones((3, 2))).eqns[0]
    >>> square(eqn)(np.ones((4, 2)), identity(eqn)).shape
    (4, 2)
    """
    _check(eqn)
    options = {"precision": eqn.params["precision"], "preferred_element_type": eqn.params["preferred_element_type"]}
    if eqn.primitive.name == "dot_general":
        return lambda x, kernel: lax.dot_general(x, kernel, eqn.params["dimension_numbers"], **options)
    numbers, dilation = eqn.params["dimension_numbers"], eqn.params["rhs_dilation"]
    sides = [eqn.invars[1].aval.shape[axis] for axis in numbers.rhs_spec[2:]]
    before = [step * ((side - 1) // 2) for side, step in zip(sides, dilation, strict=True)]
    padding = [(lo, step * (side - 1) - lo) for lo, side, step in zip(before, sides, dilation, strict=True)]
    return lambda x, kernel: lax.conv_general_dilated(
        x,
        kernel,
        [1] * len(sides),
        padding,
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=eqn.params["feature_group_count"],
        **options,
    )


def identity(eqn: Any) -> np.ndarray:
    """The kernel with which `square(eqn)` gives what it takes.

    >>> import jax
    >>> conv = lambda x, w: lax.conv_general_dilated(x, w, (2,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"))
    >>> eqn = jax.make_jaxpr(conv)(np.ones((1, 9, 3)), np.ones((3, 3, 2))).eqns[0]
    >>> identity(eqn)[:, :, 0].tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    """
    _check(eqn)
    kernel = eqn.invars[1].aval
    if eqn.primitive.name == "dot_general":
        return np.eye(eqn.outvars[0].aval.shape[-1], dtype=np.float32)
    outputs, inputs, *sides = eqn.params["dimension_numbers"].rhs_spec
    channels = kernel.shape[outputs]
    of_group = channels // eqn.params["feature_group_count"]
    shape = list(kernel.shape)
    shape[inputs] = of_group
    delta, place = np.zeros(shape, np.float32), [0] * len(shape)
    for axis in sides:
        place[axis] = (shape[axis] - 1) // 2
    for channel in range(channels):
        place[outputs], place[inputs] = channel, channel % of_group
        delta[tuple(place)] = 1
    return delta


def _check(eqn: Any) -> None:
    if eqn.primitive.name == "dot_general":
        (left, right), batched = eqn.params["dimension_numbers"]
        x, kernel = (v.aval for v in eqn.invars)
        if tuple(left) != (x.ndim - 1,) or len(right) != 1 or kernel.ndim != 2 or any(batched):
            raise ValueError(f"a product of {x.shape} and {kernel.shape} is no dense layer over the last axis")
    elif eqn.primitive.name != "conv_general_dilated" or eqn.params["batch_group_count"] != 1:
        raise ValueError(f"{eqn.primitive.name} is no dense layer, and no convolution of each example")
