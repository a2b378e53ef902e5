"""Which indices of a model's parameters can only be cut together."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.coupling.walk import Walked, walk
from jaxopt_lab.core.tracing.fingerprint import primitives
from jaxopt_lab.core.tracing.levels import next_values
from jaxopt_lab.core.tracing.programs import Program, arrays_of, like, trace
from jaxopt_lab.core.types import PyTree, Where

__all__ = ["Coupling", "Group", "Member", "Protected", "counts_of", "coupled_channels", "coupling_of", "walked"]


class Member(NamedTuple):
    """One axis of a parameter, of which each unit of a group has some indices.

    Attributes:
      path: of the parameter.
      axis: of it.
      indices: `[units, indices of one]`.
    """

    path: str
    axis: int
    indices: np.ndarray


class Group(NamedTuple):
    """Units that lie in the same axes of the same parameters: each can be cut, with all that belongs to it, or kept.

    Attributes:
      members: in tree order.
    """

    members: tuple[Member, ...]

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.members[0].indices)

    @property
    def name(self) -> str:
        """The first of its members that gives it a new axis of outputs, as a rule: the last axis of the first weight."""
        first = max(self.members, key=lambda member: (member.axis > 0, -self.members.index(member)))
        return f"{first.path}[{first.axis}]"


class Protected(NamedTuple):
    """Indices that are never cut.

    Attributes:
      path: of the parameter.
      axis: of it.
      count: how many.
      reason: why.
    """

    path: str
    axis: int
    count: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Coupling:
    """What can be cut in a model, and what cannot and why; it prints as a list.

    Attributes:
      groups: in tree order of their first members.
      protected: in tree order.
    """

    groups: tuple[Group, ...]
    protected: tuple[Protected, ...]

    def __str__(self) -> str:
        lines = []
        for group in self.groups:
            lines.append(f"{group.units} units")
            for member in group.members:
                each = member.indices.shape[1]
                lines.append(f"    {member.path}[{member.axis}]" + (f", {each} indices each" if each > 1 else ""))
        lines.append("protected")
        lines += [f"    {p.path}[{p.axis}], {p.count} indices: {p.reason}" for p in self.protected]
        return "\n".join(lines)


def coupled_channels(apply: Callable[..., Any], params: PyTree, *example: Any, force: Where | None = None) -> Coupling:
    """The groups of parameter axes whose indices must be cut together, for any model.

    The traced program is the graph: nothing is known of layers. Every index of every axis gets a label; where an operation makes
    indices meet (a sum, the two sides of a product), their labels become one, through transposes, reshapes, concatenations, slices,
    convolutions in groups, attention, recurrent state under `scan`, `cond`, rematerialisation and functions with derivatives of
    their own. What belongs to inputs or outputs, and what an operation touches that is not understood, is protected, with the
    reason; so are units that would add to a sum even as zeros, and parameters that the function does not read.

    Where a reshape parts an axis in two, one can cut along one part: whole slices of the outer one where a product meets the parts
    apart (the heads of an attention), the same inner ones of every slice where they are summed apart (the channels in the groups of
    GroupNorm).

    Args:
      apply: `apply(params, *inputs) -> outputs`: `model.predict`, a Linen `module.apply`, a bare function.
      params: any tree, running statistics and compressed leaves included; shapes will do.
      example: inputs, arrays or shapes. An output whose path ends as that of a parameter of the same shape does, in two names
        or more (the new running statistics of `model.apply`), is taken for its next value, and is not protected.
      force: parameters (see `tree.select`) whose units may go though each of them counts for something, such as the experts that a
        softmax or a `top_k` chooses among: the choice is then among those that are left.

    Raises:
      ValueError: nothing matches `force`.
      Exception: what the function raises when it is traced, with a note of the shapes that it was given: inputs of another rank, or
        shapes that depend on numbers.

    >>> params = {"a": {"kernel": np.ones((3, 8)), "bias": np.ones((1, 8))}, "b": {"kernel": np.ones((8, 2))}}
    >>> apply = lambda p, x: (x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"]
    >>> print(coupled_channels(apply, params, np.ones((1, 3))))
    8 units
        a/bias[1]
        a/kernel[1]
        b/kernel[0]
    protected
        a/kernel[0], 3 indices: it is input 0
        b/kernel[1], 2 indices: it is output 0

    Source: Fang et al., "DepGraph: towards any structural pruning", 2023 (for modules; here for any traced program).
    """
    forced = () if force is None else tuple(tree.selected(decompress(params), force))
    return coupling_of(walked(apply, params, example, forced=forced)[0])


def walked(
    apply: Callable[..., Any],
    params: PyTree,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    forced: Container[str] = (),
) -> tuple[Walked, list[Any]]:
    """The labels of `apply(params, *args, **kwargs)`, and the arrays that its program takes, those of `params` first.

    Where sizes are symbols (`jax.export.symbolic_shape`), which no label can stand for, the labels are those of a call at numbers
    instead, and the program is that at symbols: nothing along such an axis is ever cut.

    Raises:
      ValueError: at symbols the function is another program than at numbers.

    >>> found, inputs = walked(lambda p, x: x @ p["w"], {"w": np.ones((3, 2))}, [np.ones((1, 3))])
    >>> list(found.params), len(inputs)
    (['w'], 2)
    """
    dense, kwargs = decompress(params), kwargs or {}
    program, inputs = _traced(apply, dense, args, kwargs)
    arrays, rebuilt = arrays_of((args, kwargs))
    symbols = {size for array in arrays for size in array.shape if not isinstance(size, int)}
    if not symbols:
        return walk(program, next_values(program), forced), inputs
    # Small, since a length may have a limit, and unlike each other and 1, which would be broadcast.
    numbers = dict(zip(sorted(symbols, key=str), (2, 3, 5, 7, 11, 13, 17, 19), strict=False))
    sized = [like(array, [numbers.get(size, size) for size in array.shape]) for array in arrays]
    other, _ = _traced(apply, dense, *rebuilt(sized))
    if primitives(other.jaxpr) != primitives(program.jaxpr):
        raise ValueError(
            f"at sizes {', '.join(map(str, numbers))} the function is another program than at "
            f"{', '.join(map(str, numbers.values()))}: call or export it at fixed sizes"
        )
    return walk(other, next_values(other), forced)._replace(program=program), inputs


def _traced(apply: Callable[..., Any], params: PyTree, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Program, list[Any]]:
    try:
        return trace(apply, params, *args, **kwargs)
    except Exception as error:
        shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves((args, kwargs)) if hasattr(leaf, "shape"))
        advice = "it takes other inputs, or does not read these parameters"
        if isinstance(error, (jax.errors.JAXTypeError, jax.errors.JAXIndexError)):
            advice = "what it does, or a shape, depends on numbers: use jnp.where, lax.cond or a mask of a fixed size instead"
        error.add_note(f"while tracing the function on inputs of shapes {shapes or 'none'}: {advice}")
        raise


def coupling_of(found: Walked) -> Coupling:
    """The groups of a program that was walked.

    >>> found, _ = walked(lambda p, x: x @ p["a"] @ p["b"], {"a": np.ones((3, 4)), "b": np.ones((4, 2))}, [np.ones((1, 3))])
    >>> [group.name for group in coupling_of(found).groups]
    ['a[1]']
    """
    labels, rows = found.labels, []
    reasons = labels.reasons()
    protected: list[Protected] = []
    for number, (path, value) in enumerate(found.params.items()):
        for field in value.fields:
            (axis,), roots = field.axes, labels.root(field.labels)
            held = labels.is_fixed(field.labels)
            rows += [(root, number, axis, index) for index, root in enumerate(roots.tolist()) if not held[index]]
            # An axis of one index is nothing that anyone would look for.
            if len(roots) == 1:
                continue
            for reason, count in Counter(reasons.get(root, "") for root in roots[held].tolist()).items():
                protected.append(Protected(path, axis, count, reason))
    units: dict[int, dict[tuple[int, int], list[int]]] = {}
    for root, number, axis, index in rows:
        units.setdefault(root, {}).setdefault((number, axis), []).append(index)
    alike: dict[tuple, list[Mapping[tuple[int, int], list[int]]]] = {}
    for unit in units.values():
        alike.setdefault(tuple((place, len(indices)) for place, indices in unit.items()), []).append(unit)
    paths = list(found.params)
    groups = [
        Group(
            tuple(
                Member(paths[number], axis, np.array([unit[number, axis] for unit in members])) for (number, axis), _ in signature
            )
        )
        for signature, members in alike.items()
    ]
    return Coupling(tuple(groups), tuple(protected))


def counts_of(groups: Sequence[Group], named: Mapping[str, int], option: str) -> list[int]:
    """How many units each group is to have: as many as it has, but for those that are named.

    >>> counts_of([Group((Member(path, 0, np.zeros((4, 1))),)) for path in "ab"], {"b[0]": 3}, "keep")
    [4, 3]
    """
    wanted = [group.units for group in groups]
    for name, n in named.items():
        found = [k for k, group in enumerate(groups) if name in {f"{member.path}[{member.axis}]" for member in group.members}]
        if not found:
            known = ", ".join(group.name for group in groups[:8])
            raise ValueError(f"{option} names {name}, which is in no group that can be cut; there are {known}")
        for k in found:
            wanted[k] = n
    return wanted
