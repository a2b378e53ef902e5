"""Weights that are stored as they are, for the places where a leaf holds another."""

from typing import ClassVar

import jax
from jax import lax

from jaxopt_lab.compress.leaf import Leaf
from jaxopt_lab.core.types import Array

__all__ = ["Dense", "Frozen"]


class Dense(Leaf):
    """A dense weight, which trains.

    Attributes:
      weight: any shape.

    >>> Dense(jax.numpy.ones(2)).materialise()
    Array([1., 1.], dtype=float32)
    """

    weight: Array

    trains: ClassVar[tuple[str, ...]] = ("weight",)
    latent: ClassVar[str | None] = "weight"

    def aval(self):
        return jax.typeof(self.weight)

    def materialise(self) -> Array:
        return self.weight

    def format(self) -> str:
        return str(self.weight.dtype)

    def stepwise(self, length):
        return self

    def convert_element_type(self, **params):
        return type(self)(lax.convert_element_type_p.bind(self.weight, **params))


class Frozen(Dense):
    """A dense weight that does not train.

    >>> Frozen(jax.numpy.ones(2)).trains
    ()
    """

    trains: ClassVar[tuple[str, ...]] = ()
    latent: ClassVar[str | None] = None

    def format(self) -> str:
        return f"{self.weight.dtype} frozen"
