"""Which indices of a model's parameters can only be cut together."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.coupling.walk import Walked, walk
from jaxopt_lab.core.tracing.programs import Program, trace
from jaxopt_lab.core.types import PyTree

__all__ = ["Coupling", "Group", "Member", "Protected", "coupled_channels", "walked"]


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


def coupled_channels(apply: Callable[..., Any], params: PyTree, *example: Any) -> Coupling:
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

    Raises:
      NotImplementedError, TypeError: what tracing the function raises.

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
    return _coupling(walked(apply, params, *example)[0])


def walked(apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> tuple[Walked, list[Any]]:
    """The labels of `apply(params, *args, **kwargs)`, and the arrays that its program takes, those of `params` first.

    >>> found, inputs = walked(lambda p, x: x @ p["w"], {"w": np.ones((3, 2))}, np.ones((1, 3)))
    >>> list(found.params), len(inputs)
    (['w'], 2)
    """
    program, inputs = trace(apply, decompress(params), *args, **kwargs)
    return walk(program, _tied(program)), inputs


def _tied(program: Program) -> dict[int, int]:
    """Outputs that are the next value of a parameter: those whose path ends as its does, and whose shape is the same."""
    places = {path: k for k, path in enumerate(program.paths)}
    tied = {}
    for k, (name, out) in enumerate(zip(*tree.flatten(program.outputs)[:2], strict=True)):
        parts = name.split("/")
        # A single name may be the same by accident.
        for start in range(len(parts) - 1):
            own = places.get("/".join(parts[start:]))
            if own is not None and program.jaxpr.in_avals[own].shape == out.shape:
                tied[k] = own
                break
    return tied


def _coupling(found: Walked) -> Coupling:
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
