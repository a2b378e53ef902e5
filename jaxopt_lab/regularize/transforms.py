"""Regularisation as links of an Optax chain.

`add_penalty` and its short forms add the (sub)gradient of a penalty: put them before the optimiser to let it scale the pull as
part of the gradient, or after it, before the learning rate, for decoupled decay. `proximal` and `projected` stand last, after the
learning rate: they rewrite the update so that whatever applies it lands on the operator's value: exactly for zeros, otherwise to
one rounding of the larger of the old and the new weight (see `core.numerics.land`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxopt_lab.core import numerics, tree
from jaxopt_lab.core.checks import naming, require
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array, PyTree, Schedule, Where
from jaxopt_lab.regularize import penalties

__all__ = [
    "CountState",
    "add_elastic_net",
    "add_group_lasso",
    "add_l1",
    "add_l2",
    "add_penalty",
    "projected",
    "proximal",
]


class CountState(NamedTuple):
    """The state of a transform with a schedule: how many updates it has seen. Without a schedule there is no state."""

    count: Array
    """int32, shape `[]`."""


def add_penalty(penalty: Callable[[PyTree], Array], strength: ArrayLike | Schedule) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of any penalty to the updates.

    .. math:: u' = u + \lambda(t)\, \nabla R(w)

    Args:
      penalty: `params -> scalar`; which leaves it touches is its own affair: `functools.partial(orthogonal, where="**/kernel")`.
      strength: :math:`\lambda`, a number of at least 0 (it may be traced) or a schedule of the count of updates.

    Returns:
      A transform whose `update` needs `params`. Integer leaves and compressed leaves without a latent weight are constants to it.

    Raises:
      ValueError: a negative `strength`; in `update`: `params` is missing, or an update has another shape than its parameter.

    >>> tx = optax.chain(add_penalty(penalties.orthogonal, 0.1), optax.sgd(1.0))
    >>> params = {"kernel": 2 * jnp.eye(2), "bias": jnp.ones(2)}
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].round(3)
    Array([[-0.4,  0. ],
           [ 0. , -0.4]], dtype=float32)
    """
    _check_strength("strength", strength)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        del extra
        rate, state = _values(state, strength)

        def penalised(weights: dict[str, Array]) -> Array:
            return penalty(tree.replace_latents(params, weights))

        weights, moves = _pairs(params, updates, _differentiable, "add_penalty")
        gradient = jax.grad(penalised)(weights)
        pulled = {path: (wide(u) + rate * wide(gradient[path])).astype(u.dtype) for path, u in moves.items()}
        return tree.replace_latents(updates, pulled), state

    return optax.GradientTransformationExtraArgs(_init(strength), update)


def add_l1(strength: ArrayLike | Schedule, where: Where = "**") -> optax.GradientTransformationExtraArgs:
    r"""Adds the subgradient of `l1`: a pull of constant size towards zero, which weights cross and do not stay on.

    .. math:: u' = u + \lambda(t)\, \mathrm{sign}(w)

    For zeros that stay, see `proximal`.

    Args:
      strength: :math:`\lambda`, a number of at least 0 or a schedule.
      where: the leaves that are penalised.

    Raises:
      ValueError: as `add_penalty` and `l1` do.

    >>> params = jnp.array([2.0, 0.0, -1.0])
    >>> tx = add_l1(0.5)
    >>> tx.update(jnp.zeros(3), tx.init(params), params)[0]
    Array([ 0.5,  0. , -0.5], dtype=float32)
    """
    return add_penalty(partial(penalties.l1, where=where), strength)


def add_l2(strength: ArrayLike | Schedule, where: Where = "**") -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of `l2`, as `optax.add_decayed_weights` does; compressed leaves decay through their latent weights.

    .. math:: u' = u + \lambda(t)\, w

    Args:
      strength: :math:`\lambda`, a number of at least 0 or a schedule.
      where: the leaves that are penalised.

    Raises:
      ValueError: as `add_penalty` and `l2` do.

    >>> params = jnp.array([2.0, 0.0, -1.0])
    >>> tx = add_l2(0.5)
    >>> tx.update(jnp.zeros(3), tx.init(params), params)[0]
    Array([ 1. ,  0. , -0.5], dtype=float32)
    """
    return add_penalty(partial(penalties.l2, where=where), strength)


def add_elastic_net(
    l1: ArrayLike | Schedule, l2: ArrayLike | Schedule, where: Where = "**"
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the subgradient of `elastic_net`; either strength may follow its own schedule.

    .. math:: u' = u + \lambda_1(t)\, \mathrm{sign}(w) + \lambda_2(t)\, w

    Args:
      l1: :math:`\lambda_1`, a number of at least 0 or a schedule.
      l2: :math:`\lambda_2`, a number of at least 0 or a schedule.
      where: the leaves that are penalised.

    Raises:
      ValueError: as `add_penalty` and `elastic_net` do.

    >>> params = jnp.array([2.0, 0.0, -1.0])
    >>> tx = add_elastic_net(0.5, 0.5)
    >>> tx.update(jnp.zeros(3), tx.init(params), params)[0]
    Array([ 1.5,  0. , -1. ], dtype=float32)
    """
    return optax.chain(add_l1(l1, where), add_l2(l2, where))


def add_group_lasso(
    strength: ArrayLike | Schedule, where: Where = penalties.matrices, *, axis: int = -1
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the subgradient of `group_lasso`, which pulls whole output units towards zero; a unit at zero is left there.

    .. math:: u'_g = u_g + \lambda(t) \sqrt{n_g}\, w_g / \lVert w_g \rVert_2

    Args:
      strength: :math:`\lambda`, a number of at least 0 or a schedule.
      where: the leaves that are penalised; all of two or more axes by default.
      axis: the axis that numbers the groups.

    Raises:
      ValueError: as `add_penalty` and `group_lasso` do.

    >>> params = jnp.array([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    >>> tx = add_group_lasso(0.5)
    >>> tx.update(jnp.zeros((4, 2)), tx.init(params), params)[0][:2]
    Array([[0.6, 0. ],
           [0.8, 0. ]], dtype=float32)
    """
    return add_penalty(partial(penalties.group_lasso, axis=axis, where=where), strength)


def proximal(
    prox: Callable[[Array, Array], Array],
    strength: ArrayLike | Schedule,
    learning_rate: ArrayLike | Schedule,
    where: Where = "**",
) -> optax.GradientTransformationExtraArgs:
    r"""The last link of a chain: the parameters land on a proximal operator of where the update would have taken them.

    .. math:: w + u' = \mathrm{prox}_{\eta(t) \lambda(t) R}(w + u)

    Behind plain SGD this is proximal gradient descent (ISTA). Behind an adaptive method the operator keeps the plain geometry, as
    is common: the step is that of the learning rate, the same for every weight. What the operator cuts is exactly 0.0 after
    `optax.apply_updates`, and the rest misses its value by one rounding of the larger of the old and the new weight at most; other
    leaves' updates pass through untouched.

    Args:
      prox: `(x, t) -> x` on one array: `prox.soft_threshold`, `functools.partial(prox.group_lasso, axis=0)`, or your own.
      strength: :math:`\lambda`, a number of at least 0 (it may be traced) or a schedule of the count of updates.
      learning_rate: :math:`\eta`, the one the chain uses: a number or the same schedule.
      where: the leaves the operator acts on; a compressed leaf lands in its latent weight.

    Returns:
      A transform whose `update` needs `params`.

    Raises:
      ValueError: a negative `strength` or `learning_rate`; in `update`: `params` is missing, nothing matches `where`, or an update
        has another shape than its parameter.
      TypeError: in `update`: a chosen leaf is not floating, or is stored without a latent weight.

    L1 by a proximal step gives exact zeros, where its subgradient circles around them:

    >>> from jaxopt_lab.regularize import prox
    >>> def lasso(tx, w=jnp.array([1.0, 1.0])):
    ...     state = tx.init(w)
    ...     for _ in range(50):
    ...         gradient = w - jnp.array([2.0, 0.03])  # of 1/2 |w - (2, 0.03)|^2
    ...         updates, state = tx.update(gradient, state, w)
    ...         w = optax.apply_updates(w, updates)
    ...     return w
    >>> subgradient = lasso(optax.chain(add_l1(0.1), optax.sgd(0.3)))
    >>> landed = lasso(optax.chain(optax.sgd(0.3), proximal(prox.soft_threshold, 0.1, learning_rate=0.3)))
    >>> bool(subgradient[1] == 0.0), bool(landed[1] == 0.0)
    (False, True)
    >>> landed.round(4)
    Array([1.9, 0. ], dtype=float32)

    Source: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm", 2009; Yun, Lozano and Yang, "ProxGen", 2021.
    """
    _check_strength("strength", strength)
    _check_strength("learning_rate", learning_rate)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        del extra
        *values, state = _values(state, strength, learning_rate)
        step = values[0] * values[1]
        return _landed(lambda x: prox(x, step), updates, params, where, "proximal"), state

    return optax.GradientTransformationExtraArgs(_init(strength, learning_rate), update)


def projected(project: Callable[[Array], Array], where: Where = "**") -> optax.GradientTransformationExtraArgs:
    r"""The last link of a chain: the parameters land on a projection of where the update would have taken them.

    .. math:: w + u' = P(w + u)

    Exactly for zeros; elsewhere a weight may end outside the set (a box, a ball) by one rounding of its old magnitude, which a
    weight that shrinks a thousandfold will see.

    Args:
      project: `x -> x` on one array: `prox.nonnegative`, `functools.partial(prox.max_norm, limit=3.0)`, or your own.
      where: the leaves it acts on; a compressed leaf lands in its latent weight.

    Returns:
      A transform without state, whose `update` needs `params`.

    Raises:
      ValueError: in `update`: `params` is missing, nothing matches `where`, or an update has another shape than its parameter.
      TypeError: in `update`: a chosen leaf is not floating, or is stored without a latent weight.

    >>> from jaxopt_lab.regularize import prox
    >>> tx = optax.chain(optax.sgd(1.0), projected(prox.nonnegative))
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, _ = tx.update(jnp.array([3.0, 0.5]), tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    Array([0. , 1.5], dtype=float32)
    """

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        del extra
        return _landed(project, updates, params, where, "projected"), state

    return optax.GradientTransformationExtraArgs(_init(), update)


def _landed(project: Callable[[Array], Array], updates: PyTree, params: PyTree, where: Where, name: str) -> PyTree:
    """`updates` with those of the chosen leaves rewritten to land on `project`."""
    chosen = tree.selected(params, where) if params is not None else {}
    weights, moves = _pairs(params, updates, lambda path, _: path in chosen, name)

    def project_each(moved: dict[str, Array]) -> dict[str, Array]:
        landed = {}
        for path, w in moved.items():
            with naming(path):
                landed[path] = project(w)
            if jnp.shape(landed[path]) != jnp.shape(w):
                raise ValueError(f"{path} has shape {jnp.shape(w)} and {name} was given {jnp.shape(landed[path])} to land on")
        return landed

    return tree.replace_latents(updates, numerics.landing(project_each, weights, moves))


def _differentiable(path: str, leaf: Any) -> bool:
    """Whether the leaf has a floating weight that a gradient can move."""
    del path
    return tree.has_latent(leaf) and jnp.issubdtype(jnp.result_type(tree.latent(leaf)), jnp.floating)


def _pairs(
    params: PyTree, updates: PyTree, keep: Callable[[str, Any], bool], name: str
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Weights and their updates by path, latent ones for compressed leaves, of the leaves that `keep(path, leaf)` says."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call tx.update(updates, state, params)")
    paths, leaves, _ = tree.flatten(params)
    _, moves, _ = tree.flatten(updates)
    if len(leaves) != len(moves):
        raise ValueError(f"{name} got {len(moves)} updates for {len(leaves)} parameters; their trees must have the same structure")
    kept = [(path, leaf, move) for path, leaf, move in zip(paths, leaves, moves, strict=True) if keep(path, leaf)]
    weights = {path: tree.latent(leaf, path) for path, leaf, _ in kept}
    changes = {path: tree.latent(move, path) for path, _, move in kept}
    for path, w in weights.items():
        if not jnp.issubdtype(jnp.result_type(w), jnp.floating):
            raise TypeError(f"{path} is {jnp.result_type(w)}, and {name} needs floating weights; leave it out of `where`")
        if jnp.shape(w) != jnp.shape(changes[path]):
            raise ValueError(f"{path} has shape {jnp.shape(w)} and its update {jnp.shape(changes[path])}; they must be equal")
    return weights, changes


def _init(*numbers: ArrayLike | Schedule) -> optax.TransformInitFn:
    def init(params: PyTree) -> CountState | optax.EmptyState:
        del params
        return CountState(jnp.zeros((), jnp.int32)) if any(map(callable, numbers)) else optax.EmptyState()

    return init


def _values(state: Any, *numbers: ArrayLike | Schedule) -> tuple[Any, ...]:
    """The numbers at this count as float arrays, and the state of the next."""
    values = [jnp.asarray(number(state.count) if callable(number) else number, float) for number in numbers]
    following = CountState(jnp.asarray(optax.safe_increment(state.count))) if isinstance(state, CountState) else state
    return (*values, following)


def _check_strength(name: str, strength: ArrayLike | Schedule) -> None:
    if not callable(strength):
        require(lambda strength: strength >= 0, "be at least 0", **{name: strength})
