"""Where a number that is not finite begins, in a training or on the way back through it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import PyTree
from jaxopt_lab.search.hypergradient.unroll import Problem, paths_of

__all__ = ["diagnosis"]


def diagnosis(problem: Problem, hyper: PyTree, value: Any, gradient: PyTree) -> str:
    """What to say of a value or a gradient that is not finite; trains again, step by step, and keeps every state.

    Args:
      problem: the training.
      hyper: the hyper-parameters.
      value: the outer loss.
      gradient: its gradient.

    >>> batches = jnp.zeros(3)
    >>> problem = Problem(lambda w, batch, hyper: w * hyper, lambda w, hyper: w, lambda hyper: jnp.float32(1), batches, 3)
    >>> diagnosis(problem, 1e20, np.inf, 0.0)
    'the training diverges: the whole of the state is not finite after step 2 of 3; lower the rates'
    """
    hyper = jax.tree.map(jnp.asarray, hyper)
    step = jax.jit(problem.step)
    states = [jax.jit(problem.init)(hyper)]
    for t in range(problem.steps):
        states.append(step(states[-1], _batch(problem, t), hyper))
        if odd := _odd(states[-1]):
            return f"the training diverges: {odd} of the state is not finite after step {t + 1} of {problem.steps}; lower the rates"
    if not np.isfinite(value):
        return f"outer_loss is {value}, though every state of the training is finite"
    named = f"the gradient of {_odd(gradient)} is not finite"
    back, of_hyper = jax.jit(jax.grad(problem.outer, (0, 1), allow_int=True))(states[-1], hyper)
    if odd := _odd(back) or _odd(of_hyper):
        return f"{named}: it begins in outer_loss, at its derivative with respect to {odd}"

    @jax.jit
    def through(state, batch, back):
        _, pullback = jax.vjp(lambda state, hyper: problem.step(state, batch, hyper), state, hyper)
        return pullback(back)

    for t in reversed(range(problem.steps)):
        size = max(float(jnp.max(jnp.abs(leaf))) for leaf in _floats(back))
        back, of_hyper = through(states[t], _batch(problem, t), back)
        if odd := _odd(back) or _odd(of_hyper):
            if size > 1e30:
                return (
                    f"{named}: on its way back it grows to {size:.0e} by step {t + 1} of {problem.steps}, and then past the "
                    "largest float; lower the rates, or use truncated(k)"
                )
            return (
                f"{named}: it begins in step {t + 1} of {problem.steps}, at the derivative with respect to {odd}; a root or a "
                "quotient at zero has none (mend=True takes it for 0)"
            )
    return f"{named}, though no single step's is: it overflows where the steps are summed"


def _batch(problem: Problem, t: int) -> PyTree:
    return jax.tree.map(lambda x: x[t], problem.batches)


def _floats(whole: PyTree) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(whole) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _odd(whole: PyTree) -> str | None:
    """The path of the first leaf that is not finite."""
    for path, leaf in zip(paths_of(whole), jax.tree.leaves(whole), strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            return path or "the whole"
    return None
