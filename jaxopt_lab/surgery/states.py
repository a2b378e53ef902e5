"""The state of an optimiser, taken along when its parameters become others."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.core import tree
from jaxopt_lab.core.coupling.primitives import taken
from jaxopt_lab.core.types import PyTree
from jaxopt_lab.prune.state import PackedMask, pack, unpack

__all__ = ["Source", "beginning", "of_parameters", "of_state", "state_of"]


class Source(NamedTuple):
    """Where a parameter comes from.

    Attributes:
      path: in the old tree.
      axes: which indices are taken, for each axis.
      fresh: which indices of the first axis are new all the same.
    """

    path: str
    axes: Sequence[np.ndarray]
    fresh: tuple[int, ...] = ()


def beginning(names: Sequence[str], known: Collection[str]) -> str:
    """What the paths of a tree lack of those that are known: nothing, or all the same beginning, where it is a subtree.

    Raises:
      ValueError: a path is not known, or could be of several subtrees.

    >>> beginning(["a/kernel"], ["params/a/kernel", "params/b/kernel"])
    'params/'
    """
    begins = {path[: len(path) - len(names[0])] for path in known if path.endswith(f"/{names[0]}")} if names else set()
    fitting = [begin for begin in ("", *sorted(begins)) if all(begin + name in known for name in names)]
    if not fitting:
        odd = next((name for name in names if name not in known), "")
        raise ValueError(f"{odd} is no parameter of the plan")
    if len(fitting) > 1 and fitting[0]:
        raise ValueError(f"{names[0]} may be {' or '.join(begin + names[0] for begin in fitting)}: pass the whole tree")
    return fitting[0]


def of_parameters(names: Sequence[str], known: Collection[str]) -> list[tuple[str, str, str] | None]:
    """For every path of a state what stands in it before the path of a parameter, that path, and what stands behind it.

    A path of a state ends as that of its parameter does, numbers after it aside; None where none does. Where several would do, as
    where one parameter is `w` and another `mu/w`, what stands before has to stand before the most other parameters too; the longest
    path counts among equals.

    >>> of_parameters(["0/count", "0/mu/a/kernel/1"], ["a/kernel", "kernel"])
    [None, ('0/mu/', 'a/kernel', '/1')]
    >>> of_parameters(["0/mu/w", "0/mu/mu/w"], ["w", "mu/w"])
    [('0/mu/', 'w', ''), ('0/mu/', 'mu/w', '')]
    """
    stems = {stem for name in names for stem in _stems(name)}

    def company(front: str) -> int:
        return sum(front + path in stems for path in known)

    found = []
    for name in names:
        ways = []
        for end in _stems(name):
            parts = end.split("/")
            for start in range(len(parts)):
                if (path := "/".join(parts[start:])) in known:
                    ways.append((end[: len(end) - len(path)], path, name[len(end) :]))
        found.append(ways[0] if len(ways) == 1 else max(ways, key=lambda way: (company(way[0]), len(way[1])), default=None))
    return found


def _stems(name: str) -> list[str]:
    """A path, and what is left of it without the numbers at its end."""
    stems = [name]
    while "/" in stems[-1] and (cut := stems[-1].rsplit("/", 1))[1].isdigit():
        stems.append(cut[0])
    return stems


def of_state(
    shape: tuple[int, ...], axes: Sequence[np.ndarray], before: tuple[int, ...], after: tuple[int, ...]
) -> list[np.ndarray] | None:
    """Which indices of an array in a state are taken, for each of its axes; None where that cannot be told.

    Args:
      shape: of its parameter.
      axes: which indices of that are taken.
      before, after: the shapes of the array: the parameter's own (moments), behind further axes if need be (the memory of L-BFGS);
        its own with some axes of length 1 (the accumulators of sm3), or without one axis (the factors of adafactor); or any, if it
        does not change.

    >>> [own.tolist() for own in of_state((3, 2), [np.array([0, 0]), np.arange(2)], (3,), (2,))]
    [[0, 0]]
    """
    further = len(before) - len(shape)
    if further >= 0 and all(n in (1, m) for n, m in zip(before[further:], shape, strict=True)):
        own = [left if n == m else np.arange(1) for n, m, left in zip(before[further:], shape, axes, strict=True)]
        own = [*(np.arange(n) for n in before[:further]), *own]
    else:
        without = [k for k in range(len(shape)) if shape[:k] + shape[k + 1 :] == before]
        fitting = [[*axes[:k], *axes[k + 1 :]] for k in without]
        fitting = [own for own in fitting if tuple(map(len, own)) == after]
        if not fitting or any(not all(map(np.array_equal, fitting[0], other)) for other in fitting[1:]):
            return [np.arange(n) for n in before] if before == after and not without else None
        own = fitting[0]
    return own if tuple(map(len, own)) == after else None


def state_of(
    tx: optax.GradientTransformation,
    state: PyTree,
    params: PyTree,
    new: PyTree,
    sources: Mapping[str, Source | None],
) -> tuple[PyTree, tuple[str, ...]]:
    """The state of an optimiser for a new tree of parameters, from that for the old one.

    Args:
      tx: the optimiser; its `init` on the new tree says what the state looks like.
      state: of it, for the old tree.
      params, new: the old and the new tree, as the optimiser sees them.
      sources: by path in the new tree, where a parameter comes from; None for one that is new. Those that it lacks stay.

    Returns:
      The state, and the paths of what begins anew in it, as `tx.init` has it.

    Raises:
      ValueError: the state is not one of this optimiser on the old tree.

    >>> old, new = {"a": jnp.ones(2), "b": jnp.ones(2)}, {"b": jnp.ones(2), "b_copy": jnp.ones(2)}
    >>> tx = optax.trace(0.9)
    >>> state = optax.TraceState({"a": jnp.zeros(2), "b": jnp.ones(2)})
    >>> state_of(tx, state, old, new, {"b_copy": Source("b", [np.arange(2)])})[0].trace["b_copy"].tolist()
    [1.0, 1.0]
    """
    if jax.tree.structure(tx.init(params)) != jax.tree.structure(state):
        raise ValueError("the state is not one of this optimiser on these parameters: their structures differ")
    began = tx.init(new)
    old = dict(zip(*tree.flatten(_loose(state))[:2], strict=True))
    names, leaves, treedef = tree.flatten(_loose(began))
    shapes, known = dict(zip(*tree.flatten(params)[:2], strict=True)), set(tree.paths(new))
    packed = [_is_packed(leaf) for leaf in jax.tree.leaves(began, is_leaf=_is_packed)]
    out, begun = [], []
    for name, leaf, whole, own in zip(names, leaves, packed, of_parameters(names, known), strict=True):
        value, anew = _from(name, own, old, sources, shapes, leaf)
        begun += [name] if anew else []
        out.append(pack(value) if whole else value)
    return jax.tree.unflatten(treedef, out), tuple(begun)


def _from(
    name: str,
    own: tuple[str, str, str] | None,
    old: Mapping[str, Any],
    sources: Mapping[str, Source | None],
    shapes: Mapping[str, Any],
    leaf: Any,
) -> tuple[Any, bool]:
    """An array of the new state, of that name, and whether it begins as it is: there is nothing in the old one for it."""
    after = jnp.shape(leaf)
    if own is None or own[1] not in sources:
        value = old.get(name)
        return (leaf, True) if value is None or jnp.shape(value) != after else (value, False)
    before, path, behind = own
    source = sources[path]
    value = None if source is None else old.get(f"{before}{source.path}{behind}")
    if source is None or value is None:
        return leaf, True
    axes = of_state(tuple(jnp.shape(shapes[source.path])), source.axes, jnp.shape(value), after)
    if axes is None:
        return leaf, True
    value = taken(value, axes)
    if source.fresh and axes and np.array_equal(axes[0], source.axes[0]):
        value = value.at[np.array(source.fresh)].set(leaf[np.array(source.fresh)])
    return value, False


def _loose(state: PyTree) -> PyTree:
    return jax.tree.map(unpack, state, is_leaf=_is_packed)


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedMask)
