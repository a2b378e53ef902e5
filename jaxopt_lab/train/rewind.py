"""Back to the last sound step with a smaller rate, when a training has gone wrong."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab.core.checks import require
from jaxopt_lab.core.types import Array, PyTree

__all__ = ["RateScale", "Rewind", "rate_scale", "scaled"]


class RateScale(NamedTuple):
    """The state of `rate_scale`.

    Attributes:
      factor: what updates are multiplied by; float32, shape `[]`.
    """

    factor: Array


@dataclass(frozen=True)
class Rewind:
    """Has `fit` go back to the newest sound checkpoint when too many steps in a row were not finite, with a smaller rate.

    The optimiser must hold a `rate_scale`, as in `optax.chain(optax.adam(1e-3), train.rate_scale())`.

    Attributes:
      factor: what the rate is multiplied by each time.
      times: how often; after that the run ends with the error.

    >>> Rewind(factor=0.5).times
    3
    """

    factor: float = 0.5
    times: int = 3

    def __post_init__(self) -> None:
        require(lambda factor: (factor > 0) & (factor < 1), "lie in (0, 1)", factor=self.factor)
        require(lambda times: times >= 1, "be at least 1", times=self.times)


def rate_scale(factor: float = 1.0) -> optax.GradientTransformation:
    r"""Multiplies updates by a number of its state, which whoever holds the state can lower: :math:`u' = f u`.

    Args:
      factor: at the beginning.

    >>> tx = optax.chain(optax.sgd(1.0), rate_scale())
    >>> tx.update({"w": jnp.ones(1)}, scaled(tx.init({"w": jnp.ones(1)}), 0.5))[0]
    {'w': Array([-0.5], dtype=float32)}
    """

    def init(params: PyTree) -> RateScale:
        del params
        return RateScale(jnp.float32(factor))

    def update(updates: PyTree, state: RateScale, params: PyTree | None = None) -> tuple[PyTree, RateScale]:
        del params
        return jax.tree.map(lambda u: u * state.factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def scaled(opt_state: PyTree, factor: float) -> PyTree:
    """The state of an optimiser with every `rate_scale` in it multiplied by `factor`.

    Raises:
      ValueError: there is none.

    >>> scaled((RateScale(jnp.float32(1.0)), ()), 0.5)[0].factor.item()
    0.5
    """
    found = 0

    def one(node: Any) -> Any:
        nonlocal found
        if not isinstance(node, RateScale):
            return node
        found += 1
        return RateScale(node.factor * jnp.asarray(factor, node.factor.dtype))

    new = jax.tree.map(one, opt_state, is_leaf=lambda node: isinstance(node, RateScale))
    if not found:
        raise ValueError(
            "to go back with a smaller rate, the optimiser needs a train.rate_scale(): optax.chain(optimiser, train.rate_scale())"
        )
    return new
