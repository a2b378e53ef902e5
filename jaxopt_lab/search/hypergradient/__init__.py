"""Gradients of hyper-parameters through the training of any Optax chain.

hypergradient                           value and gradient of a validation loss, of any tree of floats
reverse, forward, truncated, implicit   the way that the gradient takes
conjugate_gradient, neumann, nystrom    solvers for the implicit one
mended                                  a function without the infinite derivatives of roots and quotients
gate                                    a threshold that has a gradient
tune, positive, unit, between           descent on hyper-parameters, within ranges
"""

from jaxopt_lab.search.hypergradient.gates import gate
from jaxopt_lab.search.hypergradient.gradient import Hypergradient, hypergradient
from jaxopt_lab.search.hypergradient.implicit import implicit
from jaxopt_lab.search.hypergradient.mended import mended
from jaxopt_lab.search.hypergradient.methods import Method, forward, reverse, truncated
from jaxopt_lab.search.hypergradient.solvers import Solver, conjugate_gradient, neumann, nystrom
from jaxopt_lab.search.hypergradient.tune import Range, Tuned, between, positive, tune, unit

__all__ = [
    "Hypergradient",
    "Method",
    "Range",
    "Solver",
    "Tuned",
    "between",
    "conjugate_gradient",
    "forward",
    "gate",
    "hypergradient",
    "implicit",
    "mended",
    "neumann",
    "nystrom",
    "positive",
    "reverse",
    "truncated",
    "tune",
    "unit",
]
