"""Weights that are stored in another basis of their inputs, which products bring their inputs into: the leaves.

`x W = (x / s) (s W)`, and with an orthonormal matrix `x W = (R x) (R W)`: what is stored is `s W` or `R W`, as another leaf.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax

from jaxopt_lab.compress.arrays import affine, hadamard
from jaxopt_lab.compress.leaf import Leaf
from jaxopt_lab.compress.leaves.dense import Dense
from jaxopt_lab.core import tree
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array

__all__ = ["ByChannel", "InputScaled", "Rotated", "Transformed"]


class Transformed(Leaf):
    """The base of leaves that do something to their inputs, and then multiply by another leaf.

    Attributes:
      inner: the leaf that is multiplied by; what trains in it does.
      vectors: the fields that say what is done along the input axes: of the rank of the weight, with sides of its length or 1.
    """

    inner: eqx.AbstractVar[Leaf]

    trains: ClassVar[tuple[str, ...]] = ("inner",)
    vectors: ClassVar[tuple[str, ...]]

    @abstractmethod
    def bring(self, x: Array, axes: dict[int, int], summed: tuple[int, ...], **vectors: Array) -> Array:
        """What the inner leaf multiplies.

        Args:
          x: an input.
          axes: of it, for those of the weight that are summed over or shared with it.
          summed: the axes of `x` that are summed over.
          vectors: laid along the axes of `x`.
        """

    def inputs(self) -> set[int]:
        """The axes of the weight that have to be summed over."""
        return set()

    def __check_init__(self):
        shape = tuple(self.inner.aval().shape)
        for name, vector in self._vectors().items():
            if vector.ndim != len(shape) or any(m not in (1, n) for m, n in zip(vector.shape, shape, strict=True)):
                raise ValueError(f"a weight of shape {shape} needs {name} of its rank, each side 1 or equal; got {vector.shape}")

    def aval(self):
        return self.inner.aval()

    def stepwise(self, length):
        inner = self.inner.stepwise(length)
        inner = Dense(self.inner.materialise()) if inner is NotImplemented else inner
        return self._mapped(inner, lambda vector: jnp.broadcast_to(vector, (length, *vector.shape[1:])))

    def freeze(self):
        return dataclasses.replace(self, inner=self.inner.freeze())

    def dot_general(self, x, *, dimension_numbers, **params):
        (x_summed, summed), (x_batch, batch) = dimension_numbers
        x = self._brought(x, dict(zip((*summed, *batch), (*x_summed, *x_batch), strict=True)), summed)
        if x is NotImplemented:
            return NotImplemented
        out = self.inner.dot_general(x, dimension_numbers=dimension_numbers, **params)
        if out is NotImplemented:
            out = lax.dot_general_p.bind(x, self.inner.materialise(), dimension_numbers=dimension_numbers, **params)
        return out

    def convert_element_type(self, **params):
        return self._mapped(self.inner.convert_element_type(**params), lambda vector: vector)

    def _vectors(self) -> dict[str, Array]:
        return {name: getattr(self, name) for name in self.vectors}

    def _brought(self, x: Array, axes: dict[int, int], summed: Sequence[int]) -> Array:
        """What the inner leaf multiplies; NotImplemented where the product does not sum over the axes that are transformed."""
        carried = {a for vector in self._vectors().values() for a, m in enumerate(vector.shape) if m > 1}
        if not self.inputs() <= set(summed) or not carried <= set(axes) or not jnp.issubdtype(x.dtype, jnp.floating):
            return NotImplemented

        def laid(vector: Array) -> Array:
            order = sorted(axes, key=axes.__getitem__)
            rest = [a for a in range(vector.ndim) if a not in axes]
            sides = [1] * x.ndim
            for a, place in axes.items():
                sides[place] = vector.shape[a]
            return lax.transpose(vector, (*order, *rest)).reshape(sides)

        return self.bring(x, axes, tuple(axes[a] for a in summed), **{name: laid(v) for name, v in self._vectors().items()})

    def _mapped(self, inner: Any, move: Callable[[Array], Array], **fields: Any) -> Any:
        """The leaf around another inner one, its vectors moved alike; NotImplemented where that one could not be moved."""
        if not tree.is_compressed(inner):
            return NotImplemented
        return dataclasses.replace(self, inner=inner, **{name: move(v) for name, v in self._vectors().items()}, **fields)


class ByChannel(Transformed):
    """The base of those that do the same to all that a vector's side of 1 stands for: they go through every change of the axes."""

    def conv_general_dilated(self, x, *, dimension_numbers, feature_group_count, batch_group_count, **params):
        params |= {"feature_group_count": feature_group_count, "batch_group_count": batch_group_count}
        x = self._convolved(x, dimension_numbers, max(feature_group_count, batch_group_count) > 1)
        if x is NotImplemented:
            return NotImplemented
        out = self.inner.conv_general_dilated(x, dimension_numbers=dimension_numbers, **params)
        if out is NotImplemented:
            out = lax.conv_general_dilated_p.bind(x, self.inner.materialise(), dimension_numbers=dimension_numbers, **params)
        return out

    def convert_element_type(self, *, new_dtype, **params):
        if not jnp.issubdtype(new_dtype, jnp.floating):
            return NotImplemented
        params |= {"new_dtype": new_dtype}
        return self._mapped(self._changed("convert_element_type", lax.convert_element_type_p, params), lambda vector: vector)

    def transpose(self, *, permutation):
        inner = self._changed("transpose", lax.transpose_p, {"permutation": permutation})
        return self._mapped(inner, lambda vector: lax.transpose(vector, permutation))

    def squeeze(self, *, dimensions):
        inner = self._changed("squeeze", lax.squeeze_p, {"dimensions": dimensions})
        return self._mapped(inner, lambda vector: lax.squeeze(vector, dimensions))

    def broadcast_in_dim(self, *, shape, broadcast_dimensions, **params):
        params |= {"shape": shape, "broadcast_dimensions": broadcast_dimensions}
        inner = self._changed("broadcast_in_dim", lax.broadcast_in_dim_p, params)
        return self._mapped(inner, lambda vector: _spread(vector, len(shape), broadcast_dimensions))

    def reshape(self, *, new_sizes, dimensions, **params):
        sides = {name: affine.reshaped_sides(self.shape, v.shape, new_sizes) for name, v in self._vectors().items()}
        wrong = [s for s in sides.values() if s is None or any(m not in (1, n) for m, n in zip(s, new_sizes, strict=True))]
        if wrong or dimensions is not None:
            return NotImplemented
        inner = self._changed("reshape", lax.reshape_p, {"new_sizes": new_sizes, "dimensions": dimensions, **params})
        return dataclasses.replace(self, inner=inner, **{name: v.reshape(sides[name]) for name, v in self._vectors().items()})

    def _convolved(self, x: Array, dimension_numbers: Any, grouped: bool) -> Array:
        """What the inner leaf convolves; NotImplemented where a group of channels meets a part of the input only."""
        channel = dimension_numbers.rhs_spec[1]
        return NotImplemented if grouped else self._brought(x, {channel: dimension_numbers.lhs_spec[1]}, (channel,))

    def _changed(self, method: str, primitive: Any, params: dict[str, Any]) -> Leaf:
        """The inner leaf so changed: as it is where it can be, else a dense weight, whose inputs are transformed all the same."""
        inner = getattr(self.inner, method)(**params)
        inner = primitive.bind(self.inner.materialise(), **params) if inner is NotImplemented else inner
        return inner if tree.is_compressed(inner) else Dense(inner)


class InputScaled(ByChannel):
    r"""A weight whose inputs are divided by a scale each, and which is stored multiplied by it.

    .. math:: W_{ic} = \frac{1}{s_i} V_{ic}, \qquad x W = (x / s) \, V

    A product that sums over the scaled axes divides its input and goes on with the inner leaf's own rule; so does a convolution
    with one scale for each input channel. Everything else runs on the dense weight. The scale is frozen; what trains in the inner
    leaf does.

    Attributes:
      inner: the leaf that stores :math:`V`.
      scale: positive, float32 or wider, of the rank of the weight, with its length along the input axes (and along those that
        number separate weights) and 1 along the others.

    >>> from jaxopt_lab.compress.leaves.quantized import Quantized
    >>> inner = Quantized(jnp.array([[2, -4], [6, 0]], jnp.int8), jnp.array([[0.5, 0.25]]))
    >>> InputScaled(inner, jnp.array([[2.0], [0.5]])).materialise()
    Array([[ 0.5, -0.5],
           [ 6. ,  0. ]], dtype=float32)

    Source: Lin et al., "AWQ: activation-aware weight quantization for on-device LLM compression and acceleration", 2024; Xiao et
    al., "SmoothQuant: accurate and efficient post-training quantization for large language models", 2023.
    """

    inner: Leaf
    scale: Array

    vectors: ClassVar[tuple[str, ...]] = ("scale",)

    def materialise(self) -> Array:
        return (_wide(self.inner) / self.scale).astype(self.aval().dtype)

    def format(self) -> str:
        return f"{self.inner.format()}, inputs scaled"

    def bring(self, x, axes, summed, *, scale):
        return (x.astype(jnp.promote_types(x.dtype, scale.dtype)) / scale).astype(x.dtype)


class Rotated(Transformed):
    r"""A weight that is stored rotated along its input axis, so that its outliers are spread over all inputs.

    .. math:: W = \sigma \odot (H V), \qquad x W = \big(H (\sigma \odot x)\big) V

    with :math:`H` the fast transform of `arrays.hadamard`, orthonormal and its own inverse, and random signs :math:`\sigma`. A
    product that sums over the axis rotates its input, and goes on with the inner leaf's own rule. Everything else runs on the dense
    weight. What trains in the inner leaf does.

    Attributes:
      inner: the leaf that stores :math:`V = H (\sigma \odot W)`.
      signs: int8, -1 or 1, of the rank of the weight, with its length along the input axis (and along those that number separate
        weights) and 1 along the others.
      axis: the input axis, counted from the end (static).

    >>> from jaxopt_lab.compress.leaves.quantized import Quantized
    >>> inner = Quantized(jnp.array([[2], [2], [-2], [-2]], jnp.int8), jnp.array([[0.5]]))
    >>> Rotated(inner, jnp.array([[1], [1], [-1], [1]], jnp.int8)).materialise().tolist()
    [[0.0], [0.0], [-2.0], [0.0]]

    Source: Tseng et al., "QuIP#: even better LLM quantization with Hadamard incoherence and lattice codebooks", 2024; Ashkboos et
    al., "QuaRot: outlier-free 4-bit inference in rotated LLMs", 2024.
    """

    inner: Leaf
    signs: Array
    axis: int = eqx.field(static=True, default=-2)

    vectors: ClassVar[tuple[str, ...]] = ("signs",)

    def __check_init__(self):
        if not -self.signs.ndim <= self.axis < 0:
            raise ValueError(f"axis={self.axis} must be negative, and an axis of a weight of rank {self.signs.ndim}")

    def materialise(self) -> Array:
        return (hadamard.transform(_wide(self.inner), self.axis) * self.signs).astype(self.aval().dtype)

    def format(self) -> str:
        return f"{self.inner.format()}, rotated along {self.signs.ndim + self.axis}"

    def bring(self, x, axes, summed, *, signs):
        return hadamard.transform(x * signs.astype(x.dtype), axes[self.signs.ndim + self.axis])

    def inputs(self):
        return {self.signs.ndim + self.axis}

    def transpose(self, *, permutation):
        inner = self.inner.transpose(permutation=permutation)
        axis = tuple(permutation).index(self.signs.ndim + self.axis) - self.signs.ndim
        return self._mapped(inner, lambda signs: lax.transpose(signs, permutation), axis=axis)

    def squeeze(self, *, dimensions):
        kept = [a for a in range(self.signs.ndim) if a not in dimensions]
        if self.signs.ndim + self.axis not in kept:
            return NotImplemented
        axis = kept.index(self.signs.ndim + self.axis) - len(kept)
        return self._mapped(self.inner.squeeze(dimensions=dimensions), lambda signs: lax.squeeze(signs, dimensions), axis=axis)

    def broadcast_in_dim(self, *, shape, broadcast_dimensions, **params):
        inner = self.inner.broadcast_in_dim(shape=shape, broadcast_dimensions=broadcast_dimensions, **params)
        axis = broadcast_dimensions[self.signs.ndim + self.axis] - len(shape)
        if shape[axis] != self.shape[self.axis]:
            return NotImplemented
        return self._mapped(inner, lambda signs: _spread(signs, len(shape), broadcast_dimensions), axis=axis)


def _wide(leaf: Leaf) -> Array:
    """The dense weight in at least float32, not rounded to its own dtype first where the leaf knows how not to be."""
    dtype = jnp.promote_types(leaf.aval().dtype, jnp.float32)
    out = leaf.convert_element_type(new_dtype=dtype, weak_type=False, sharding=None)
    return out.materialise() if tree.is_compressed(out) else wide(leaf.materialise())


def _spread(vector: Array, ndim: int, into: Sequence[int]) -> Array:
    sides = dict(zip(into, vector.shape, strict=True))
    return lax.broadcast_in_dim(vector, tuple(sides.get(a, 1) for a in range(ndim)), into)
