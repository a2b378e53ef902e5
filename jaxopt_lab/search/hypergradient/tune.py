"""Descent on hyper-parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array, PyTree, Where
from jaxopt_lab.search.hypergradient.unroll import paths_of

__all__ = ["Range", "Tuned", "between", "positive", "tune", "unit"]


class Range(NamedTuple):
    """A range of a hyper-parameter, as a function from all reals onto it.

    Attributes:
      onto: reals -> the range.
      back: the inverse.
      name: what it is called in a message.
    """

    onto: Callable[[Array], Array]
    back: Callable[[Array], Array]
    name: str


def positive() -> Range:
    r"""Above 0, by :math:`\lambda = e^u`: steps are relative, as suits rates and decays.

    >>> positive().onto(jnp.float32(0.0))
    Array(1., dtype=float32)
    """
    return _POSITIVE


def between(low: float, high: float) -> Range:
    r"""Between two numbers, by :math:`\lambda = l + (h - l)\, \sigma(u)`.

    >>> between(-1.0, 3.0).back(jnp.float32(1.0))
    Array(0., dtype=float32)
    """
    if not low < high:
        raise ValueError(f"between needs low < high; got {low} and {high}")
    return Range(
        lambda u: low + (high - low) * jax.nn.sigmoid(u),
        lambda x: jax.scipy.special.logit((x - low) / (high - low)),
        f"between {low} and {high}",
    )


def unit() -> Range:
    """Between 0 and 1: momenta, weights, probabilities.

    >>> unit().onto(jnp.float32(0.0))
    Array(0.5, dtype=float32)
    """
    return _UNIT


_POSITIVE = Range(jnp.exp, jnp.log, "positive")
_UNIT = between(0.0, 1.0)._replace(name="between 0 and 1")


class Tuned(NamedTuple):
    """What `tune` returns.

    Attributes:
      hyper: the hyper-parameters with the lowest value of all that were tried.
      value: that value.
      values: `[steps + 1]`, of each that was tried, the first included.
      path: the hyper-parameters that were tried, in order.
    """

    hyper: PyTree
    value: float
    values: np.ndarray
    path: list[PyTree]


def tune(
    gradient: Callable[[PyTree], Any],
    hyper: PyTree,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    ranges: Mapping[str, Range] | None = None,
) -> Tuned:
    """Descends on hyper-parameters by any Optax optimiser, within their ranges.

    Each step is one call of `gradient`, that is one training and its derivative; `steps + 1` calls in all, since the last
    hyper-parameters are valued as well.

    Args:
      gradient: `hyper -> Hypergradient`, or `-> (value, gradient)`. It is called as it is: jit it, or let each call hand the same
        functions to `hypergradient`, since new ones compile anew.
      hyper: where to start, inside of the ranges.
      tx: the optimiser; it moves the reals that `ranges` takes to the hyper-parameters.
      steps: how many updates.
      ranges: of those whose path matches a glob, in which range they stay; of two that match, the last.

    Returns:
      A `Tuned`: the best hyper-parameters, their value, all values, the path.

    Raises:
      ValueError: a start outside of its range; the message names the path.
      FloatingPointError: a value or a gradient is not finite.

    >>> loss = lambda hyper: (jnp.log(hyper["rate"]) + 2.0) ** 2
    >>> tuned = tune(jax.value_and_grad(loss), {"rate": 1.0}, optax.adam(0.3), steps=40, ranges={"rate": positive()})
    >>> tuned.value < 1e-2, float(tuned.hyper["rate"].round(1))
    (True, 0.1...)
    """
    hyper = jax.tree.map(jnp.asarray, hyper)
    of_leaf = _ranges(hyper, ranges or {})
    leaves, structure = jax.tree.flatten(hyper)

    @jax.jit
    def onto(reals: list[Array]) -> PyTree:
        return jax.tree.unflatten(structure, [u if r is None else r.onto(u) for r, u in zip(of_leaf, reals, strict=True)])

    @jax.jit
    def advance(reals, opt_state, slope):
        (of_reals,) = jax.vjp(onto, reals)[1](slope)
        updates, opt_state = tx.update(of_reals, opt_state, reals)
        return optax.apply_updates(reals, updates), opt_state

    reals = [leaf if r is None else r.back(leaf) for r, leaf in zip(of_leaf, leaves, strict=True)]
    for path, r, u, leaf in zip(paths_of(hyper), of_leaf, reals, leaves, strict=True):
        if r is not None and not bool(jnp.isfinite(u).all()):
            raise ValueError(f"hyper-parameter {path or 'hyper'} must be {r.name}; got {leaf}")
    opt_state, values, path = tx.init(reals), [], []
    for k in range(steps + 1):
        path.append(onto(reals))
        value, slope = gradient(path[-1])[:2]
        values.append(float(value))
        if not all(np.isfinite(np.asarray(leaf)).all() for leaf in [value, *jax.tree.leaves(slope)]):
            raise FloatingPointError(f"update {k} of the hyper-parameters: the value ({value}) or its gradient is not finite")
        if k < steps:
            reals, opt_state = advance(reals, opt_state, slope)
    best = int(np.argmin(values))
    return Tuned(path[best], values[best], np.array(values), path)


def _ranges(hyper: PyTree, ranges: Mapping[Where, Range]) -> list[Range | None]:
    found: list[Range | None] = [None] * len(jax.tree.leaves(hyper))
    for where, r in ranges.items():
        chosen = jax.tree.leaves(tree.select(hyper, where))
        found = [r if yes else was for yes, was in zip(chosen, found, strict=True)]
    return found
