"""What a compressed leaf is: an array-ish parameter that stores fewer bytes than its dense self and knows how to be multiplied."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax.core import Tracer

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array

__all__ = ["Leaf", "checked", "fills_with_nan"]


class Leaf(quax.ArrayValue):
    """The base of every compressed leaf: a frozen pytree of arrays that stands where a dense parameter stood.

    A subclass declares what trains, says what it looks like (`aval`) and how to become dense (`materialise`), and overrides the
    methods below for whatever it can do without becoming dense. Each of those may return `NotImplemented`, as the ones here do: the
    leaf is then materialised and the ordinary operation runs. The leaf is always the right operand; `rules` turns the others round.

    Attributes:
      trains: names of the fields that an optimiser moves; the others are frozen.
      latent: the trained field that is a weight of the leaf's own shape (or a leaf that has one), on which decay, penalties and
        masks act; or None.
    """

    trains: ClassVar[tuple[str, ...]] = ()
    latent: ClassVar[str | None] = None

    def format(self) -> str:
        """How the leaf is stored, in a few words for a table."""
        return type(self).__name__

    def stepwise(self, length: int) -> "Leaf":
        """The leaf with every field cut into `length` parts along its first axis, one for each step of a scan over the weight's."""
        return NotImplemented

    def freeze(self) -> "Leaf":
        """What is stored once training is over: the leaf itself, unless it trains as if it were stored in few bits."""
        return self

    def dot_general(self, x: Array, *, dimension_numbers: tuple, **params: Any) -> Array:
        """`lax.dot_general(x, self)`."""
        return NotImplemented

    def conv_general_dilated(self, x: Array, *, dimension_numbers: Any, **params: Any) -> Array:
        """`lax.conv_general_dilated(x, self)`."""
        return NotImplemented

    def gather(self, indices: Array, *, dimension_numbers: Any, slice_sizes: Sequence[int], **params: Any) -> Array:
        """`lax.gather(self, indices)`: the lookup of an embedding."""
        return NotImplemented

    def convert_element_type(self, *, new_dtype: Any, **params: Any) -> "Leaf | Array":
        """`lax.convert_element_type(self)`."""
        return NotImplemented

    def transpose(self, *, permutation: Sequence[int]) -> "Leaf | Array":
        """`lax.transpose(self)`."""
        return NotImplemented

    def reshape(self, *, new_sizes: Sequence[int], dimensions: Sequence[int] | None, **params: Any) -> "Leaf | Array":
        """`lax.reshape(self)`."""
        return NotImplemented

    def squeeze(self, *, dimensions: Sequence[int]) -> "Leaf | Array":
        """`lax.squeeze(self)`."""
        return NotImplemented

    def broadcast_in_dim(self, *, shape: Sequence[int], broadcast_dimensions: Sequence[int], **params: Any) -> "Leaf | Array":
        """`lax.broadcast_in_dim(self)`."""
        return NotImplemented


def fills_with_nan(fill_value: Any) -> bool:
    """Whether a lookup gives NaN for what is out of bounds, as one of floats does unless it is told otherwise.

    >>> fills_with_nan(None), fills_with_nan(float("nan")), fills_with_nan(0.0)
    (True, True, False)
    """
    return fill_value is None or bool(np.isnan(fill_value))


def checked(weight: Any, path: str) -> Array:
    """A weight that can be compressed: a floating-point array, finite where its values are known.

    Args:
      weight: a leaf of a tree.
      path: what errors call it.

    Raises:
      TypeError: it is compressed already, or not floating.
      ValueError: it holds NaN or infinite values.

    >>> checked(jnp.arange(3), "Dense_0/kernel")
    Traceback (most recent call last):
      ...
    TypeError: Dense_0/kernel has dtype int32; only floating-point weights are compressed: leave it out of `where`
    """
    if tree.is_compressed(weight):
        kind = type(weight).__name__
        raise TypeError(f"{path} is compressed already, as {kind}; leave it out of `where`, or decompress it first")
    dtype = jnp.result_type(weight)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{path} has dtype {dtype}; only floating-point weights are compressed: leave it out of `where`")
    weight = jnp.asarray(weight)
    finite = _finite(weight)
    # Under jit even what is computed of a constant may be traced.
    if not isinstance(finite, Tracer) and not bool(finite):
        raise ValueError(f"{path} of shape {weight.shape} holds NaN or infinite weights, which cannot be compressed")
    return weight


@jax.jit
def _finite(weight: Array) -> Array:
    return jnp.isfinite(weight).all()
