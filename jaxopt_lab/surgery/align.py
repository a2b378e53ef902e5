"""One network's units renumbered so that its weights lie as close as they can to another's."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.tracing.programs import arrays_of
from jaxopt_lab.core.types import Array, PyTree, Where
from jaxopt_lab.surgery.coupled import Group, Member, coupled_channels
from jaxopt_lab.surgery.probes import apart, probes

__all__ = ["Alignment", "align"]


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How the units of a network are numbered anew; it prints as a list.

    Attributes:
      shapes: by path, of every parameter.
      groups: of the units, in tree order.
      order: for each group, which old unit stands in each place, `[units]`.
      left: groups that were left alone, by name, with the reason.
      similarity: the inner product of the weights with those of the reference, before and after.
    """

    shapes: Mapping[str, tuple[int, ...]]
    groups: tuple[Group, ...]
    order: tuple[np.ndarray, ...]
    left: Mapping[str, str]
    similarity: tuple[float, float]

    def __str__(self) -> str:
        before, after = self.similarity
        rows = [f"inner product with the reference {before:.6g} -> {after:.6g}"]
        for group, order in zip(self.groups, self.order, strict=True):
            rows.append(f"{group.name}: {int(np.sum(order != np.arange(group.units)))} of {group.units} units moved")
        return "\n".join([*rows, *(f"{name} left alone: {reason}" for name, reason in self.left.items())])

    def renumber(self, params: PyTree) -> PyTree:
        """Another tree of the same parameters, its units in the same new order: an average of weights, a moment.

        Args:
          params: of the paths and shapes that the alignment was made for.

        Raises:
          ValueError: a path is unknown or missing, or has another shape.

        >>> group = Group((Member("w", 0, np.array([[0], [1], [2]])),))
        >>> moved = Alignment({"w": (3,)}, (group,), (np.array([2, 0, 1]),), {}, (0.0, 0.0))
        >>> moved.renumber({"w": jnp.array([5.0, 6.0, 7.0])})["w"].tolist()
        [7.0, 5.0, 6.0]
        """
        names, leaves, treedef = tree.flatten(params)
        if odd := sorted(set(names) ^ self.shapes.keys()):
            raise ValueError(f"the alignment is for other parameters; first of {len(odd)} paths: {odd[0]}")
        for name, leaf in zip(names, leaves, strict=True):
            if jnp.shape(leaf) != self.shapes[name]:
                raise ValueError(f"{name} has shape {jnp.shape(leaf)}, and the alignment is for {self.shapes[name]}")
        indices = _indices(self.shapes, self.groups, self.order)
        return jax.tree.unflatten(treedef, _gathered(leaves, [indices.get(name, {}) for name in names]))


def align(
    apply: Callable[..., Any],
    reference: PyTree,
    params: PyTree,
    *example: Any,
    key: Array,
    where: Where | None = None,
    rounds: int = 100,
) -> tuple[PyTree, Alignment]:
    r"""The same network as `params`, its hidden units renumbered to match those of `reference`.

    .. math:: \max_{\pi} \sum_{g} \sum_{m \in g} \sum_u \langle w^{\mathrm{ref}}_{m, u}, \, w_{m, \pi_g(u)} \rangle

    Two networks that were trained apart may differ by little but the order of their units. What can be renumbered is found in the
    traced program: the groups of `coupled_channels`, each unit with all of its indices in all members, so that heads, channels and
    recurrent states of any model move as wholes. One group at a time, in random order, gets the best order given the others, by a
    linear assignment, until none gains; it is a local optimum.

    A unit that the program treats unlike its neighbours (a constant or an activation of its own) must not move: each group is tried
    first, on the example and on drawn inputs like it, and left alone if the outputs change by more than rounding.

    Args:
      apply: `apply(params, *inputs) -> outputs`: `model.predict`, a Linen `module.apply`, a bare function.
      reference: a tree like `params`.
      params: any tree, running statistics included; compressed leaves become dense.
      example: inputs. For shapes, numbers are drawn (integers are 0); better are rows that the network knows.
      key: a typed PRNG key: the order of the groups, and what groups are tried with.
      where: which parameters count in the inner products (see `tree.select`); all move. By default those that are not under
        `batch_stats`.
      rounds: at most so many times every group is looked at.

    Returns:
      `(aligned, alignment)`: the renumbered tree, which is the same function as `params` up to the order of sums; and how, to
      `renumber` other trees likewise.

    Raises:
      ValueError: the trees have other paths or shapes, or there is no group of several units.

    >>> params = {"a": jnp.array([[1.0, 2.0, 3.0]]), "b": jnp.array([[4.0], [5.0], [6.0]])}
    >>> apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    >>> other = {"a": params["a"][:, ::-1], "b": params["b"][::-1]}
    >>> aligned, alignment = align(apply, params, other, jnp.ones((2, 1)), key=jax.random.key(0))
    >>> aligned["a"].tolist(), alignment.order[0].tolist()
    ([[1.0, 2.0, 3.0]], [2, 1, 0])

    Source: Ainsworth et al., "Git Re-Basin: merging models modulo permutation symmetries", 2023, section 3.2.
    """
    dense, like = decompress(params), decompress(reference)
    names, leaves, _ = tree.flatten(dense)
    shapes = {name: tuple(jnp.shape(leaf)) for name, leaf in zip(names, leaves, strict=True)}
    _check_like(shapes, like)
    counting = tree.selected(dense, where or (lambda path, leaf: "batch_stats" not in path.split("/")))
    groups = [group for group in coupled_channels(apply, dense, *example).groups if group.units > 1]
    if not groups:
        raise ValueError("no units can be renumbered: there is no group of several; see coupled_channels")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    movable = _movable(apply, dense, example, groups, rng)
    left = {g.name: "the outputs change with the order of its units" for g, yes in zip(groups, movable, strict=True) if not yes}
    groups = [group for group, yes in zip(groups, movable, strict=True) if yes]
    old, target = _weights(dense, counting), _weights(like, counting)
    order = _matched(groups, target, old, rng, rounds)
    indices = _indices(shapes, groups, order)
    new = {name: _moved(leaf, indices.get(name, {})) for name, leaf in old.items()}
    similarity = (_inner(target, old, old), _inner(target, new, old))
    alignment = Alignment(shapes, tuple(groups), tuple(order), left, similarity)
    return alignment.renumber(dense), alignment


def _weights(params: PyTree, counting: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The floating leaves that count, by path."""
    rows = [(name, np.asarray(leaf)) for name, leaf in zip(*tree.flatten(params)[:2], strict=True) if name in counting]
    rows = [(name, leaf) for name, leaf in rows if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return {name: leaf if leaf.dtype == np.float64 else leaf.astype(np.float32) for name, leaf in rows}


def _check_like(shapes: Mapping[str, tuple[int, ...]], reference: PyTree) -> None:
    others = {name: tuple(jnp.shape(leaf)) for name, leaf in zip(*tree.flatten(reference)[:2], strict=True)}
    for name in [*shapes, *others]:
        if shapes.get(name) != others.get(name):
            raise ValueError(f"{name}: reference has {others.get(name, 'nothing')}, params {shapes.get(name, 'nothing')} there")


def _matched(
    groups: Sequence[Group], target: Mapping[str, np.ndarray], old: Mapping[str, np.ndarray], rng: np.random.Generator, rounds: int
) -> list[np.ndarray]:
    """The order of the units of each group, one group after the other as good as it can be."""
    from scipy.optimize import linear_sum_assignment

    now, order = dict(old), [np.arange(group.units) for group in groups]
    for _ in range(rounds):
        gained = False
        for k in rng.permutation(len(groups)):
            members = [member for member in groups[k].members if member.path in old]
            gains = sum((_products(member, target[member.path], now[member.path]) for member in members), np.zeros((1, 1)))
            best = linear_sum_assignment(gains, maximize=True)[1] if members else np.arange(groups[k].units)
            moved = _indices({path: now[path].shape for path in now}, [groups[k]], [best])
            paths = {member.path for member in members}
            after = {path: _moved(now[path], moved[path]) for path in paths}
            before = _inner(target, now, paths)
            # Where both axes of one weight are the group's, the assignment is linear in one at a time, and may overshoot.
            if _inner(target, after, paths) > before + 1e-6 * _scale(target, now, paths):
                now, order[k], gained = {**now, **after}, order[k][best], True
        if not gained:
            break
    return order


def _products(member: Member, target: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The inner product of each unit of the reference with each one of the network, `[units, units]`."""
    units = len(member.indices)
    ours, theirs = (np.moveaxis(w, member.axis, 0)[member.indices].reshape(units, -1) for w in (now, target))
    return theirs @ ours.T


def _inner(target: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray], paths: Any) -> float:
    return sum(float(np.vdot(target[path], now[path])) for path in sorted(paths))


def _scale(target: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray], paths: Any) -> float:
    """What an inner product can be at most: gains below its rounding are none."""
    return sum(float(np.linalg.norm(target[path]) * np.linalg.norm(now[path])) for path in sorted(paths))


def _indices(
    shapes: Mapping[str, tuple[int, ...]], groups: Sequence[Group], order: Sequence[np.ndarray]
) -> dict[str, dict[int, np.ndarray]]:
    """By path and axis, which old index stands in each place."""
    out: dict[str, dict[int, np.ndarray]] = {}
    for group, own in zip(groups, order, strict=True):
        for member in group.members:
            if member.path in shapes:
                axes = out.setdefault(member.path, {})
                row = axes.setdefault(member.axis, np.arange(shapes[member.path][member.axis]))
                row[member.indices] = member.indices[own]
    return out


def _moved(leaf: Any, axes: Mapping[int, Any]) -> Any:
    for axis, indices in axes.items():
        leaf = leaf.take(indices, axis=axis)
    return leaf


@jax.jit
def _gathered(leaves: list[Any], indices: list[dict[int, Any]]) -> list[Any]:
    return [_moved(jnp.asarray(leaf), axes) if axes else leaf for leaf, axes in zip(leaves, indices, strict=True)]


# Whether units are alike.


def _movable(
    apply: Callable[..., Any], params: PyTree, example: tuple[Any, ...], groups: Sequence[Group], rng: np.random.Generator
) -> list[bool]:
    """For each group whether its units can change places: tried in a circle, and at random, on the example and others like it."""
    arrays, rebuilt_params = arrays_of(params)
    names = [name for name, leaf in zip(*tree.flatten(params)[:2], strict=True) if hasattr(leaf, "shape")]
    # Apart, so that nothing is alike by accident, as biases are at their start.
    leaves = [_apart(np.asarray(leaf), rng) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf for leaf in arrays]
    shapes = {name: jnp.shape(leaf) for name, leaf in zip(names, leaves, strict=True)}
    inputs, rebuilt = arrays_of(example)
    tried = probes(inputs, rng)
    places = {(member.path, member.axis) for group in groups for member in group.members}
    rest = {path: {axis: np.arange(shapes[path][axis]) for own, axis in sorted(places) if own == path} for path, _ in places}

    def outputs(leaves: list[Any], inputs: list[Any], indices: list[dict[int, Any]]) -> list[Array]:
        moved = [_moved(jnp.asarray(leaf), axes) if axes else leaf for leaf, axes in zip(leaves, indices, strict=True)]
        return jax.tree.leaves(apply(rebuilt_params(moved), *rebuilt(inputs)))

    def run(indices: Mapping[str, dict[int, Any]]) -> list[list[Array]]:
        return [compiled(leaves, inputs, [indices.get(name, {}) for name in names]) for inputs in tried]

    def changed(group: Group, order: np.ndarray) -> bool:
        moved = _indices(shapes, [group], [order])
        # The first half of the digits that they have.
        return apart(before, run({path: {**axes, **moved.get(path, {})} for path, axes in rest.items()})) > precision**0.5

    compiled = jax.jit(outputs)
    before = run(rest)
    precision = _precision(jax.make_jaxpr(outputs)(leaves, tried[0], [{} for _ in names]).jaxpr)
    trials = [(np.roll(np.arange(group.units), 1), rng.permutation(group.units)) for group in groups]
    return [not any(changed(group, order) for order in own) for group, own in zip(groups, trials, strict=True)]


def _apart(leaf: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    once, again = 0.1 * rng.normal(size=(2, *leaf.shape))
    return np.where(leaf == 0, again, leaf * (1 + once)).astype(leaf.dtype)


def _precision(jaxpr: Any) -> float:
    """The largest rounding of any result in a program."""
    inner = [_precision(getattr(own, "jaxpr", own)) for eqn in jaxpr.eqns for own in jaxprs_in_params(eqn.params)]
    floats = [v.aval.dtype for eqn in jaxpr.eqns for v in eqn.outvars if jnp.issubdtype(getattr(v.aval, "dtype", int), jnp.inexact)]
    return max([*(float(jnp.finfo(dtype).eps) for dtype in set(floats)), *inner], default=0.0)
