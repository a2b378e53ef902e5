"""Trees that lose leaves and gain biases, and back: what surgeries that rewrite a function do to its parameters."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array, PyTree

__all__ = ["GONE", "Beside", "by_path", "edited", "filled", "keys", "place_of_bias"]


@dataclasses.dataclass(frozen=True)
class Beside:
    """A weight, and what is to stand beside it as `bias`; no tree, but a leaf.

    Attributes:
      weight: the leaf itself.
      shift: the other one.
    """

    weight: Any
    shift: Array


GONE = object()
"""A leaf that vanishes."""


def keys(params: PyTree) -> dict[str, tuple[Any, ...]]:
    """The keys that lead to each leaf, by its path.

    >>> keys({"a": [1.0]})
    {'a/0': (DictKey(key='a'), SequenceKey(idx=0))}
    """
    ways = jax.tree_util.tree_flatten_with_path(params, is_leaf=tree.is_compressed)[0]
    return dict(zip(tree.paths(params), (way for way, _ in ways), strict=True))


def place_of_bias(
    path: str, way: tuple[Any, ...], names: Iterable[str], own: Sequence[str], spare: Sequence[str]
) -> tuple[str, bool] | None:
    """The path of what is added behind a weight, and whether it is a new entry; None where there is no place.

    Args:
      path: of the weight.
      way: the keys that lead to it.
      names: all paths of the tree.
      own: those that become free and stood for a bias.
      spare: those that become free, of which the last may hold one where a new entry cannot be made.

    >>> place_of_bias("a/kernel", keys({"a": {"kernel": 0.0}})["a/kernel"], ["a/kernel"], [], [])
    ('a/bias', True)
    """
    bias = f"{path[: path.rfind('/') + 1]}bias"
    if bias in own:
        return bias, False
    # The box of an NNX variable is no part of its path.
    key = way[-1] if path.count("/") + 1 >= len(way) else way[-2]
    if isinstance(key, jax.tree_util.DictKey) and not any(name == bias or name.startswith(f"{bias}/") for name in names):
        return bias, True
    return (spare[-1], False) if spare else None


def edited(node: PyTree) -> PyTree:
    """The tree without what is gone, and with what goes beside weights; where nothing can vanish, None stands.

    >>> edited({"a": {"kernel": Beside(1.0, 2.0), "scale": GONE}, "b": [GONE, 3.0]})
    {'a': {'kernel': 1.0, 'bias': 2.0}, 'b': [None, 3.0]}
    """
    if not isinstance(node, Mapping):
        return jax.tree.map(_edited_leaf, node, is_leaf=lambda leaf: isinstance(leaf, Mapping) or tree.is_compressed(leaf))
    entries, beside = {}, {}
    for key, child in node.items():
        held = jax.tree.leaves(child, is_leaf=tree.is_compressed)
        if not held or any(leaf is not GONE for leaf in held):
            entries[key] = edited(child)
        if len(held) == 1 and isinstance(held[0], Beside) and not isinstance(child, Mapping):
            beside["bias"] = held[0].shift
    return type(node)({**entries, **beside})


def _edited_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Mapping):
        return edited(leaf)
    return None if leaf is GONE else leaf.weight if isinstance(leaf, Beside) else leaf


def by_path(params: PyTree, expected: Iterable[str], kind: str) -> dict[str, Any]:
    """The leaves of an edited tree by their paths.

    Args:
      params: the tree.
      expected: the paths that it must have.
      kind: what it is, for the message.

    Raises:
      ValueError: it has others.

    >>> by_path({"a": 1.0}, ["a"], "folded")
    {'a': 1.0}
    """
    names, leaves, _ = tree.flatten(params)
    if odd := sorted(set(expected) ^ set(names)):
        raise ValueError(f"this is not the {kind} tree; first of {len(odd)} paths that it lacks or has too many: {odd[0]}")
    return dict(zip(names, leaves, strict=True))


def filled(names: Iterable[str], treedef: Any, own: Mapping[str, Any], dead: Mapping[str, Any]) -> PyTree:
    """The old tree again, from the edited one and shapes: of what is replaced in the function, no value matters.

    >>> filled(["a", "b"], jax.tree.structure({"a": 0, "b": 0}), {"a": 1.0}, {"b": jax.ShapeDtypeStruct((1,), "int8")})
    {'a': 1.0, 'b': Array([1], dtype=int8)}
    """
    return jax.tree.unflatten(
        treedef, [jnp.ones(dead[name].shape, dead[name].dtype) if name in dead else own[name] for name in names]
    )
