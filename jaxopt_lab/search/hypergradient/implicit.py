"""The hypergradient of a training that has reached its minimum, from the minimum alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxopt_lab.core.types import PyTree
from jaxopt_lab.search.hypergradient.methods import Found
from jaxopt_lab.search.hypergradient.solvers import Solver, conjugate_gradient
from jaxopt_lab.search.hypergradient.unroll import Problem, paths_of, unroll

__all__ = ["Implicit", "implicit"]


def _params(state: PyTree) -> PyTree:
    """The parameters of a state: its field or entry `params`, or all of it."""
    if isinstance(state, dict) and "params" in state:
        return state["params"]
    return getattr(state, "params", state)


@dataclass(frozen=True)
class Implicit:
    """Of `implicit`."""

    inner_loss: Callable[[PyTree, PyTree], Any] | None
    inner_gradient: Callable[[PyTree, PyTree], PyTree] | None
    solver: Solver
    params: Callable[[PyTree], PyTree]

    def gradient(self, params: PyTree, hyper: PyTree) -> PyTree:
        """What is zero at the end of the training."""
        if self.inner_gradient is not None:
            return self.inner_gradient(params, hyper)
        assert self.inner_loss is not None
        return jax.grad(self.inner_loss)(params, hyper)

    def __call__(self, problem: Problem, hyper: PyTree) -> Found:
        held = jax.lax.stop_gradient(hyper)
        state = jax.lax.stop_gradient(unroll(problem, problem.init(held), held, problem.batches, problem.steps))
        params = self.params(state)
        for path, leaf in zip(paths_of(params), jax.tree.leaves(params), strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"implicit: {path} of the parameters is {leaf.dtype}; give params=, the function that takes them from the state"
                )
        value, (of_state, direct) = jax.value_and_grad(problem.outer, (0, 1), allow_int=True)(state, hyper)
        flat, unravel = ravel_pytree(params)
        b = ravel_pytree(self.params(of_state))[0]
        slope, transposed = jax.vjp(lambda w: ravel_pytree(self.gradient(unravel(w), hyper))[0], flat)
        if slope.shape != flat.shape:
            raise ValueError(f"inner_gradient gives {slope.size} numbers for {flat.size} parameters; give one for each")

        def product(u):
            return transposed(u)[0]

        u = self.solver(product, b)
        _, onto = jax.vjp(lambda hyper: ravel_pytree(self.gradient(params, hyper))[0], hyper)
        gradient = jax.tree.map(jnp.subtract, direct, onto(u)[0])
        missed = jnp.linalg.norm(product(u) + self.solver.damping * u - b)
        size = jnp.linalg.norm(b)
        checks = {"slope": jnp.linalg.norm(slope), "residual": jnp.where(size > 0, missed / jnp.where(size > 0, size, 1), 0)}
        return Found(value, gradient, state, checks)

    def follows(self, problem: Problem) -> Callable[[PyTree], Any]:
        def both(hyper):
            held = jax.lax.stop_gradient(hyper)
            state = jax.lax.stop_gradient(unroll(problem, problem.init(held), held, problem.batches, problem.steps))
            return problem.outer(state, hyper), self.gradient(self.params(state), hyper)

        return both


def implicit(
    inner_loss: Callable[[PyTree, PyTree], Any] | None = None,
    *,
    inner_gradient: Callable[[PyTree, PyTree], PyTree] | None = None,
    solver: Solver | None = None,
    params: Callable[[PyTree], PyTree] = _params,
) -> Implicit:
    r"""From where the training ends, by the implicit function theorem; how it got there does not matter.

    .. math:: \frac{d F}{d \lambda} = \partial_\lambda F
        - \left(\partial_\lambda \nabla_w L\right)^\top \left(\nabla_w^2 L + \delta I\right)^{-1} \partial_w F
        \qquad \text{where} \quad \nabla_w L(w, \lambda) = 0

    Memory and time beyond the training do not grow with the number of steps. It is for what shapes the minimum (weights of losses
    and of data, decays that are part of L, augmentations), and blind to what only shapes the way (learning rates): of those the
    gradient is zero, and a warning says so. Decay that is not part of L, as in AdamW, is not seen either.

    The result's `checks` say how far to trust it: `slope`, the norm of :math:`\nabla_w L`, which the formula takes for zero, and
    `residual`, how much of :math:`\partial_w F` the solver left.

    Args:
      inner_loss: `(params, hyper) -> scalar`, L: what the training minimises, on all of its data.
      inner_gradient: instead of it, `(params, hyper) -> tree like params`, any condition that holds at the end.
      solver: `conjugate_gradient`, `neumann` or `nystrom`; 20 conjugate gradients if None. The first and the last take a symmetric
        Jacobian, as a loss has.
      params: takes the parameters from the state; by default its field or entry `params`, or all of it.

    Raises:
      ValueError: both or neither of `inner_loss` and `inner_gradient`.

    >>> implicit(lambda w, hyper: (w - hyper) ** 2).solver
    ConjugateGradient(iterations=20, damping=0.0, tolerance=1e-06)

    Source: Bengio, "Gradient-based optimization of hyperparameters", 2000; Pedregosa, 2016; Lorraine et al., 2020.
    """
    if (inner_loss is None) == (inner_gradient is None):
        raise ValueError("implicit takes one of inner_loss and inner_gradient")
    return Implicit(inner_loss, inner_gradient, conjugate_gradient() if solver is None else solver, params)
