"""Paths, selectors and sizes of parameter trees.

A path is the "/"-joined way to a leaf: `params/Dense_0/kernel`. It stops at a compressed leaf (any `quax.ArrayValue`), so a stored
weight keeps the name that its dense self had, and NNX's trailing `value` is dropped, so both of Flax's worlds read alike.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = [
    "any_compressed",
    "by_path",
    "flatten",
    "has_latent",
    "is_compressed",
    "latent",
    "map_selected",
    "matches",
    "nbytes",
    "paths",
    "replace_latent",
    "replace_latents",
    "replaced",
    "select",
    "selected",
    "size",
]


_VALUE = jax.tree_util.GetAttrKey("value")


def is_compressed(leaf: Any) -> bool:
    """Whether `leaf` is a compressed leaf: an array-ish value that knows how to materialise itself.

    By the protocol of `quax.ArrayValue`, so that a program with none of them never imports quax.

    >>> is_compressed(jnp.ones(3))
    False
    """
    return callable(getattr(type(leaf), "materialise", None))


def any_compressed(tree: PyTree) -> bool:
    """Whether a tree holds a compressed leaf.

    >>> any_compressed({"kernel": jnp.ones(3)})
    False
    """
    return any(map(is_compressed, jax.tree.leaves(tree, is_leaf=is_compressed)))


def flatten(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    """Splits a tree into paths, leaves and its structure; compressed leaves stay whole.

    >>> names, leaves, treedef = flatten({"a": (1.0, 2.0)})
    >>> names
    ['a/0', 'a/1']
    >>> jax.tree.unflatten(treedef, leaves)
    {'a': (1.0, 2.0)}
    """
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_compressed)
    siblings = Counter(path[:-1] for path, _ in with_paths)
    names = []
    for path, _ in with_paths:
        # An NNX variable's only child is its value; a tuple of (query, key, value) has three, and keeps its names.
        boxed = path and path[-1] == _VALUE and siblings[path[:-1]] == 1
        names.append("/".join(map(_part, path[:-1] if boxed else path)))
    return names, [leaf for _, leaf in with_paths], treedef


def _part(key: Any) -> str:
    """One part of a path, as it is written in it."""
    return jax.tree_util.keystr((key,), simple=True)


def paths(tree: PyTree) -> list[str]:
    """The path of every leaf, in the order of `jax.tree.leaves`.

    >>> paths({"Dense_0": {"bias": 0.0, "kernel": 1.0}})
    ['Dense_0/bias', 'Dense_0/kernel']
    """
    return flatten(tree)[0]


def matches(pattern: str, path: str) -> bool:
    """Whether a glob, as `select` takes it, matches one path.

    >>> matches("**/kernel", "Dense_0/kernel"), matches("*", "Dense_0/kernel")
    (True, False)
    """
    return _glob(pattern).match(path) is not None


@lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern:
    """`**` matches zero or more parts; `*` and `?` stay in one; `[a-z]` is a set, `[!a-z]` its complement; the rest is literal."""
    expression = ""
    for k, part in enumerate(parts := pattern.split("/")):
        last = k == len(parts) - 1
        if part == "**":
            expression += r".*" if last else r"(?:[^/]+/)*"
            continue
        body = "".join(
            "[^/]*" if piece == "*" else "[^/]" if piece == "?" else _set(piece, pattern) if len(piece) > 1 else re.escape(piece)
            # As in fnmatch, a `]` that stands first in a set is a member, and a `[` that nothing closes is literal.
            for piece in re.findall(r"\[!?+\]?+[^\]]*+\]|.", part)
        )
        expression += body + ("" if last else "/")
    # "a/**" also matches "a" itself: `**` may stand for no part at all.
    if expression.endswith("/.*"):
        expression = expression[:-3] + "(?:/.*)?"
    return re.compile(expression + r"\Z")


def _set(piece: str, pattern: str) -> str:
    """The regular expression of a set `[...]` or `[!...]`, which never matches a "/"."""
    complement = piece[1] == "!"
    members = ""
    for first, last in re.findall(r"(.)(?:-(.))?", piece[1 + complement : -1]):
        if last and first > last:
            raise ValueError(f"where={pattern!r} has the set {piece}, in which the range {first}-{last} runs backwards")
        members += re.escape(first) + (f"-{re.escape(last)}" if last else "")
    return f"(?!/)[{'^' if complement else ''}{members}]"


def select(tree: PyTree, where: Where = "**") -> PyTree:
    """Chooses leaves by path: a static tree of bool with one entry for each leaf of `tree`.

    Args:
      tree: any tree; a compressed leaf counts as one leaf, chosen by the path it had as a dense array.
      where: a glob on the "/"-joined path (`**` matches zero or more parts, `*`, `?`, `[a-z]` and `[!a-z]` stay inside one),
        several globs of which any may match a leaf and each must match one, a predicate `(path, leaf) -> bool`, or a tree of bool
        (returned as it is, once its structure fits).

    Returns:
      A tree of Python bools. It is static: choose once, outside `jit`, or inside it at trace time.

    Raises:
      ValueError: nothing matches, or not every one of several globs does (the message lists the nearest paths); a set in a glob
        has a range that runs backwards, a tree of bool has another structure, or two leaves have the same path.

    >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    >>> select(params, "**/kernel")
    {'Dense_0': {'bias': False, 'kernel': True}}
    >>> select(params, lambda path, leaf: leaf.ndim == 1)
    {'Dense_0': {'bias': True, 'kernel': False}}
    >>> select(params, "**/kernal")
    Traceback (most recent call last):
      ...
    ValueError: nothing matches where='**/kernal'; the nearest of 2 paths: Dense_0/kernel, Dense_0/bias
    """
    names, leaves, treedef = flatten(tree)
    if isinstance(where, str):
        chosen = [_glob(where).match(name) is not None for name in names]
    elif callable(where):
        chosen = [bool(where(name, leaf)) for name, leaf in zip(names, leaves, strict=True)]
    elif isinstance(where, (list, tuple)) and where and all(isinstance(pattern, str) for pattern in where):
        matches = {pattern: [_glob(pattern).match(name) is not None for name in names] for pattern in where}
        # One that matches nothing is a misspelling, whatever the others match.
        for pattern, matched in matches.items():
            if not any(matched):
                raise ValueError(_nothing_matches(pattern, names))
        chosen = [any(column) for column in zip(*matches.values(), strict=True)]
    else:
        flags, structure = jax.tree.flatten(where)
        if structure != treedef or not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
            raise ValueError(
                f"where must be a glob, globs, a predicate (path, leaf) -> bool, or a tree of bool like the {len(names)} leaves "
                f"{_some(names)}; got {str(where)[:200]}"
            )
        chosen = [bool(flag) for flag in flags]
    if len(set(names)) < len(names):
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise ValueError(f"two leaves have the path {twice}; rename a key that holds a '/'")
    if not any(chosen):
        raise ValueError(_nothing_matches(where, names))
    return jax.tree.unflatten(treedef, chosen)


def _nothing_matches(where: Where, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(where, names, n=5, cutoff=0.0) if isinstance(where, str) else names
    return f"nothing matches where={_shown(where)}; the nearest of {len(names)} paths: {_some(near)}"


def _shown(where: Where) -> str:
    return getattr(where, "__name__", repr(where)) if callable(where) else repr(where)[:200]


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") if names else "(the tree has no leaves)"


def selected(tree: PyTree, where: Where = "**") -> dict[str, Any]:
    """The chosen leaves by path, in tree order.

    >>> list(selected({"a": {"kernel": 1.0}, "b": {"kernel": 2.0, "bias": 3.0}}, "**/kernel"))
    ['a/kernel', 'b/kernel']
    """
    names, leaves, _ = flatten(tree)
    flags = jax.tree.leaves(select(tree, where))
    return {name: leaf for name, leaf, flag in zip(names, leaves, flags, strict=True) if flag}


def map_selected(fn: Callable[..., Any], tree: PyTree, *rest: PyTree, where: Where = "**") -> PyTree:
    """Maps `fn` over the chosen leaves of `tree` (and the same leaves of `rest`); the others pass through.

    >>> map_selected(lambda x: -x, {"kernel": 1.0, "bias": 2.0}, where="kernel")
    {'bias': 2.0, 'kernel': -1.0}
    """
    flags = select(tree, where)
    return jax.tree.map(lambda leaf, flag, *others: fn(leaf, *others) if flag else leaf, tree, flags, *rest, is_leaf=is_compressed)


def replaced(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """A tree with some of its leaves replaced, by path.

    >>> replaced({"kernel": 1.0, "bias": 2.0}, {"kernel": 3.0})
    {'bias': 2.0, 'kernel': 3.0}
    """
    names, old, treedef = flatten(tree)
    return jax.tree.unflatten(treedef, [leaves.get(name, leaf) for name, leaf in zip(names, old, strict=True)])


def by_path(name: str, given: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """A setting for each chosen leaf: the same for all, or its own from a mapping, which may leave some out.

    Args:
      name: of the setting, for the message.
      given: a mapping by path, or anything else.
      chosen: the chosen leaves by path.

    Raises:
      ValueError: the mapping has a path that is not chosen.

    >>> by_path("rank", 4, {"a": 1.0, "b": 2.0}), by_path("rank", {"a": 3}, {"a": 1.0, "b": 2.0})
    ({'a': 4, 'b': 4}, {'a': 3})
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(chosen, given)
    if odd := sorted(set(given) - set(chosen)):
        raise ValueError(f"{name} is given for {odd[0]}, which is no chosen weight; the chosen ones: {', '.join(list(chosen)[:5])}")
    return dict(given)


def latent(leaf: Any, path: str = "") -> Array:
    """The weight that training moves: the array itself, or the latent weight that a compressed leaf declares.

    A compressed leaf says which of its fields train (`trains`, a tuple of names) and which one, if any, is a weight of the
    leaf's own shape (`latent`, a name or None). Penalties, decay and masks act on that one; where it is a leaf itself, on its own.

    Raises:
      TypeError: the leaf stores no latent weight (integer codes, say); the message names the path.

    >>> latent(jnp.array([1.0, 2.0]))
    Array([1., 2.], dtype=float32)
    """
    if not is_compressed(leaf):
        return leaf
    if not has_latent(leaf):
        raise TypeError(
            f"{path or 'a leaf'} is stored as {getattr(leaf, 'kind', type(leaf).__name__)}, which has no latent weight to act on; "
            "leave it out of `where`, or decompress it first"
        )
    return latent(getattr(leaf, leaf.latent), path)


def has_latent(leaf: Any) -> bool:
    """Whether `latent(leaf)` is an array: of a plain leaf always, of a compressed one if it declares a latent weight.

    A leaf in the state of an optimiser that left the weight out (`optax.masked`) declares one, and holds none.

    >>> has_latent(jnp.ones(3))
    True
    """
    if not is_compressed(leaf):
        return True
    if getattr(leaf, "latent", None) is None:
        return False
    held = getattr(leaf, leaf.latent)
    return has_latent(held) if is_compressed(held) else jax.tree_util.all_leaves([held])


def replace_latent(leaf: Any, value: Array) -> Any:
    """`leaf` with its latent weight replaced: the inverse of `latent`.

    >>> replace_latent(jnp.array([1.0, 2.0]), jnp.zeros(2))
    Array([0., 0.], dtype=float32)
    """
    if not is_compressed(leaf):
        return value
    children, treedef = jax.tree_util.tree_flatten_with_path(leaf, is_leaf=lambda node: node is not leaf and is_compressed(node))
    return jax.tree.unflatten(
        treedef, [replace_latent(child, value) if _part(path[-1]) == leaf.latent else child for path, child in children]
    )


def replace_latents(tree: PyTree, values: Mapping[str, Array]) -> PyTree:
    """A tree with the (latent) weights at the given paths replaced.

    >>> replace_latents({"bias": 1.0, "kernel": 2.0}, {"kernel": 3.0})
    {'bias': 1.0, 'kernel': 3.0}
    """
    names, leaves, treedef = flatten(tree)
    changed = [replace_latent(leaf, values[name]) if name in values else leaf for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(treedef, changed)


def size(tree: PyTree) -> int:
    """How many numbers the tree stores; a compressed leaf counts what it stores, scales and codebooks included.

    >>> size({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
    9
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """Bytes of the tree's arrays as stored, unpadded and uncompressed; shapes alone (`jax.eval_shape`) will do.

    >>> nbytes({"kernel": jnp.ones((2, 3), jnp.bfloat16), "bias": jnp.ones(3)})
    24
    """
    return sum(math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize for leaf in jax.tree.leaves(tree))
