r"""Ways to solve :math:`(H + \delta I) u = b` by products with H alone, for the implicit gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxopt_lab.core.types import Array

__all__ = ["ConjugateGradient", "Neumann", "Nystrom", "Solver", "conjugate_gradient", "neumann", "nystrom"]

Product = Callable[[Array], Array]


class Solver(Protocol):
    """Solves a linear system.

    Attributes:
      damping: what is added to the diagonal.
    """

    @property
    def damping(self) -> float:
        """What is added to the diagonal."""
        ...

    def __call__(self, product: Product, b: Array) -> Array:
        """u `[n]` with product(u) + damping u = b."""
        ...


@dataclass(frozen=True)
class ConjugateGradient:
    """Of `conjugate_gradient`."""

    iterations: int
    damping: float
    tolerance: float

    def __call__(self, product: Product, b: Array) -> Array:
        damped = lambda u: product(u) + self.damping * u  # noqa: E731
        return jax.scipy.sparse.linalg.cg(damped, b, tol=self.tolerance, maxiter=self.iterations)[0]


def conjugate_gradient(iterations: int = 20, damping: float = 0.0, tolerance: float = 1e-6) -> ConjugateGradient:
    """Conjugate gradients: in exact arithmetic as many iterations as there are distinct eigenvalues; H must be positive.

    Args:
      iterations: at most so many products.
      damping: added to the diagonal; where H has eigenvalues at or below zero, as that of a network has, more than those.
      tolerance: where to stop, as a part of the norm of b.

    >>> H = jnp.array([[3.0, 1.0], [1.0, 2.0]])
    >>> conjugate_gradient()(lambda u: H @ u, jnp.array([5.0, 5.0])).round(4)
    Array([1., 2.], dtype=float32)

    Source: Hestenes and Stiefel, 1952; Pedregosa, "Hyperparameter optimization with approximate gradient", 2016.
    """
    _check(iterations >= 1 and damping >= 0, f"iterations={iterations} and damping={damping}")
    return ConjugateGradient(iterations, damping, tolerance)


@dataclass(frozen=True)
class Neumann:
    """Of `neumann`."""

    terms: int
    step: float
    damping: float = 0.0

    def __call__(self, product: Product, b: Array) -> Array:
        def add(carry, _):
            term, total = carry
            term = term - self.step * (product(term) + self.damping * term)
            return (term, total + term), None

        (_, total), _ = jax.lax.scan(add, (b, b), None, self.terms - 1)
        return self.step * total


def neumann(terms: int, step: float, damping: float = 0.0) -> Neumann:
    r"""The series :math:`u = \alpha \sum_{j < J} (I - \alpha H)^j b`.

    With the rate of gradient descent as its step it is what `truncated(terms)` finds at a minimum. It diverges unless
    :math:`\alpha < 2 / \lambda_{\max}(H)`, and leaves out directions whose curvature is below :math:`1 / (\alpha J)`. H need not be
    symmetric.

    Args:
      terms: J.
      step: :math:`\alpha`.
      damping: added to the diagonal.

    >>> H = jnp.array([[3.0, 1.0], [1.0, 2.0]])
    >>> neumann(100, 0.4)(lambda u: H @ u, jnp.array([5.0, 5.0])).round(4)
    Array([1., 2.], dtype=float32)

    Source: Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", 2020.
    """
    _check(terms >= 1 and step > 0 and damping >= 0, f"terms={terms}, step={step} and damping={damping}")
    return Neumann(terms, step, damping)


@dataclass(frozen=True, eq=False)
class Nystrom:
    """Of `nystrom`."""

    rank: int
    damping: float
    key: Array

    def __call__(self, product: Product, b: Array) -> Array:
        size = b.size
        if self.rank > size:
            raise ValueError(f"nystrom(rank={self.rank}) has more columns than there are parameters, {size}")
        chosen = jax.random.choice(self.key, size, (self.rank,), replace=False)
        rows = jnp.zeros((self.rank, size), b.dtype).at[jnp.arange(self.rank), chosen].set(1)
        columns = jax.vmap(product)(rows).T
        within = columns[chosen]
        values, vectors = jnp.linalg.eigh((within + within.T) / 2)
        # The root of the low-rank matrix, H ~ B B', without directions that are nothing but rounding, or negative.
        kept = values > self.rank * jnp.finfo(b.dtype).eps * jnp.max(jnp.abs(values))
        roots = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)
        left, singular, _ = jnp.linalg.svd(columns @ (vectors * roots[None, :]), full_matrices=False)
        inside = left.T @ b
        # What the columns do not span has no curvature but the damping; taken away twice, or rounding is divided by it.
        rest = b - left @ inside
        rest -= left @ (left.T @ rest)
        return left @ (inside / (singular**2 + self.damping)) + rest / self.damping


def nystrom(rank: int, damping: float, key: Array) -> Nystrom:
    r"""H replaced by :math:`H_{:K} H_{KK}^{-1} H_{:K}^\top` of some columns K, and then solved exactly.

    One batch of `rank` products, no iterations and no step to choose; with all columns it is exact. Outside of what the columns
    span there is no curvature but the damping, so it should not be tiny beside the eigenvalues that are left out.

    Args:
      rank: how many columns, drawn without replacement.
      damping: above 0.
      key: for the columns. A solver with another key is another one, and compiles again.

    >>> H = jnp.array([[3.0, 1.0], [1.0, 2.0]])
    >>> nystrom(2, 1e-4, jax.random.key(0))(lambda u: H @ u, jnp.array([5.0, 5.0])).round(2)
    Array([1., 2.], dtype=float32)

    Source: Hataya and Yamada, "Nystrom method for accurate and scalable implicit differentiation", 2023.
    """
    _check(rank >= 1 and damping > 0, f"rank={rank} and damping={damping}")
    return Nystrom(rank, damping, key)


def _check(fine: bool, given: str) -> None:
    if not fine:
        raise ValueError(f"a solver needs positive settings; got {given}")
