"""Hands JAX's primitives to the methods of the leaves.

One rule a primitive, for every leaf there is or will be: a new format is a new class, and two formats that meet in one product are
never ambiguous (the left one is materialised). What a leaf declines, and every primitive not named here, runs on its dense self.
"""

from typing import Any

import jax.numpy as jnp
import quax
from jax import lax
from jax.typing import ArrayLike

from jaxopt_lab.compress.leaf import Leaf

__all__ = []


def _dense(x: Any) -> Any:
    return x.materialise() if isinstance(x, Leaf) else x


@quax.register(lax.dot_general_p)
def _(lhs: ArrayLike, rhs: Leaf, **params: Any):
    out = rhs.dot_general(jnp.asarray(lhs), **params)
    return lax.dot_general_p.bind(lhs, _dense(rhs), **params) if out is NotImplemented else out


@quax.register(lax.dot_general_p)
def _(lhs: Leaf, rhs: Leaf, **params: Any):
    out = rhs.dot_general(_dense(lhs), **params)
    return lax.dot_general_p.bind(_dense(lhs), _dense(rhs), **params) if out is NotImplemented else out


@quax.register(lax.dot_general_p)
def _(lhs: Leaf, rhs: ArrayLike, *, dimension_numbers: tuple, **params: Any):
    (contract, batch), x = dimension_numbers, lhs.aval()
    out = NotImplemented
    # A sharding asked of the output names its axes in their final order, which the turned product does not have.
    if params.get("out_sharding") is None:
        out = lhs.dot_general(jnp.asarray(rhs), dimension_numbers=(contract[::-1], batch[::-1]), **params)
    if out is NotImplemented:
        return lax.dot_general_p.bind(_dense(lhs), rhs, dimension_numbers=dimension_numbers, **params)
    # Batch axes, then the free axes of the other operand, then the leaf's own: the last two change places.
    batches, own = len(batch[0]), x.ndim - len(contract[0]) - len(batch[0])
    others = out.ndim - batches - own
    order = (*range(batches), *range(batches + others, out.ndim), *range(batches, batches + others))
    return lax.transpose(out, order)


@quax.register(lax.conv_general_dilated_p)
def _(lhs: ArrayLike, rhs: Leaf, **params: Any):
    out = rhs.conv_general_dilated(jnp.asarray(lhs), **params)
    return lax.conv_general_dilated_p.bind(lhs, _dense(rhs), **params) if out is NotImplemented else out


@quax.register(lax.gather_p)
def _(operand: Leaf, indices: ArrayLike, **params: Any):
    out = operand.gather(jnp.asarray(indices), **params)
    return lax.gather_p.bind(_dense(operand), indices, **params) if out is NotImplemented else out


def _register_unary(primitive: Any, method: str) -> None:
    @quax.register(primitive)
    def _(operand: Leaf, **params: Any):
        out = getattr(operand, method)(**params)
        return primitive.bind(_dense(operand), **params) if out is NotImplemented else out


_register_unary(lax.convert_element_type_p, "convert_element_type")
_register_unary(lax.transpose_p, "transpose")
_register_unary(lax.reshape_p, "reshape")
_register_unary(lax.squeeze_p, "squeeze")
_register_unary(lax.broadcast_in_dim_p, "broadcast_in_dim")
