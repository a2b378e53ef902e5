"""A threshold with a gradient."""

import jax
from jax.typing import ArrayLike

from jaxopt_lab.core.numerics import straight_through
from jaxopt_lab.core.types import Array

__all__ = ["gate"]


def gate(scores: Array, threshold: ArrayLike, temperature: ArrayLike = 0.1, *, hard: bool = True) -> Array:
    r"""1 where a score is above a threshold and 0 elsewhere, with the gradient of a sigmoid.

    .. math:: g = \mathbf{1}[s > \tau], \qquad
        \frac{\partial g}{\partial \cdot} := \frac{\partial}{\partial \cdot} \sigma\!\left(\frac{s - \tau}{T}\right)

    The step itself has derivative zero wherever it has one, and so no threshold could be learnt. `hard` keeps its value and takes
    the sigmoid's derivative (straight-through: what is trained is what is used, and the gradient is biased); soft is the sigmoid
    itself, whose gradient is exact, and which leaves nothing exactly zero.

    Args:
      scores: `[...]`, of a pruning mask the magnitudes.
      threshold: a scalar, or of the scores' shape.
      temperature: how far around the threshold a score has a say, in units of the scores.
      hard: whether the value is 0 or 1.

    >>> import jax.numpy as jnp
    >>> gate(jnp.array([0.1, 0.5]), 0.3)
    Array([0., 1.], dtype=float32)
    >>> jax.grad(lambda t: gate(jnp.array([0.1, 0.5]), t).sum())(0.3).round(1)
    Array(-2.1..., dtype=float32, weak_type=True)

    Source: Bengio, Leonard and Courville, 2013; for pruning: Kusupati et al., "Soft threshold weight reparameterization", 2020.
    """
    soft = jax.nn.sigmoid((scores - threshold) / temperature)
    return straight_through(soft, (scores > threshold).astype(soft.dtype)) if hard else soft
