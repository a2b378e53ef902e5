"""Regularisation three ways: as a penalty in the loss, as a subgradient added to the updates, as a step that lands on an operator.

    penalties     penalty(params) -> scalar                    a term of the loss, or a number to report
    transforms    add_l1(strength), proximal(prox, ...)        links of an Optax chain; a strength may be a schedule
    prox          prox.soft_threshold(x, t)                    the operators, on one array

A subgradient only pulls weights towards the constraint. The proximal step ends on it: its zeros are exactly 0.0.
"""

from jaxopt_lab.regularize import prox
from jaxopt_lab.regularize.penalties import elastic_net, group_lasso, l1, l2, matrices, nuclear, orthogonal, spectral
from jaxopt_lab.regularize.transforms import (
    CountState,
    add_elastic_net,
    add_group_lasso,
    add_l1,
    add_l2,
    add_penalty,
    projected,
    proximal,
)

__all__ = [
    "CountState",
    "add_elastic_net",
    "add_group_lasso",
    "add_l1",
    "add_l2",
    "add_penalty",
    "elastic_net",
    "group_lasso",
    "l1",
    "l2",
    "matrices",
    "nuclear",
    "orthogonal",
    "projected",
    "prox",
    "proximal",
    "spectral",
]
