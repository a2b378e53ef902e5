"""Which arrays of somebody else's optimiser state belong to a weight.

By structure and never by class: an array at the end of whose path stands a parameter's own path, and that has the parameter's
own shape, is a moment of it, weight by weight. Anything else at that path (a factored or stacked moment) mixes weights, and is
left alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.prune.state import masked_paths, sparsify_states

__all__ = ["Moments", "moments"]

Shapes = Mapping[str, tuple[int, ...] | None]


class Moments(NamedTuple):
    """What `sparsify` does with the wrapped optimiser's state when a weight is cut.

    Attributes:
      cleared: paths of state arrays in which a cut weight goes back to what `init` gives a weight of zero.
      left_alone: paths of state arrays that stay as they are: factored, stacked or scalar moments of a pruned weight, and arrays
        that belong to no parameter.
    """

    cleared: tuple[str, ...]
    left_alone: tuple[str, ...]


def moments(opt_state: PyTree, params: PyTree) -> Moments:
    """Lists what happens to the state of the optimiser inside `sparsify` when a weight is cut.

    Args:
      opt_state: any optimiser state that holds one `sparsify` state or more.
      params: the parameters it was made for.

    >>> import optax
    >>> from jaxopt_lab.prune import sparsify
    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> moments(sparsify(optax.adam(1e-3), 0.5, where="kernel").init(params), params).cleared
    ('0/mu/kernel', '0/nu/kernel')
    """
    cleared: list[str] = []
    left_alone: list[str] = []
    names, leaves, _ = tree.flatten(params)
    shapes = {name: _latent_shape(leaf) for name, leaf in zip(names, leaves, strict=True)}
    for node in sparsify_states(opt_state):
        pruned = {name for name in names if name in set(masked_paths(node))}
        for path, leaf in zip(*tree.flatten(node.inner_state)[:2], strict=True):
            owner = _owner(path, shapes)
            if owner in pruned:
                (cleared if _is_moment(leaf, shapes[owner]) else left_alone).append(path)
            elif owner is None and jnp.ndim(leaf) > 0:
                left_alone.append(path)
    return Moments(tuple(cleared), tuple(left_alone))


def own_moments(inner_state: PyTree, shapes: Shapes) -> dict[str, tuple[str, Array]]:
    """The arrays of a state that are moments of the pruned parameters, weight by weight: state path -> (parameter path, array).

    `shapes` has the paths of all parameters, so that none is taken for another whose path it ends with; None marks the unpruned.
    """
    paths, leaves, _ = tree.flatten(inner_state)
    owned = {path: (_owner(path, shapes), leaf) for path, leaf in zip(paths, leaves, strict=True)}
    return {
        path: (owner, tree.latent(leaf))
        for path, (owner, leaf) in owned.items()
        if owner is not None and shapes[owner] is not None and _is_moment(leaf, shapes[owner])
    }


def with_moments(inner_state: PyTree, arrays: Mapping[str, Array]) -> PyTree:
    """The state with the arrays at the given paths replaced."""
    return tree.replace_latents(inner_state, arrays)


def _owner(path: str, shapes: Shapes) -> str | None:
    """The longest parameter path with which `path` ends."""
    while path not in shapes:
        if not path:
            return None
        path = path.partition("/")[2]
    return path


def _is_moment(leaf: Any, shape: tuple[int, ...] | None) -> bool:
    """Whether a state array has one number for each weight; masks and counts are none."""
    return _latent_shape(leaf) == shape and jnp.issubdtype(jnp.result_type(tree.latent(leaf)), jnp.floating)


def _latent_shape(leaf: Any) -> tuple[int, ...] | None:
    return jnp.shape(tree.latent(leaf)) if tree.has_latent(leaf) else None
