"""Where a parameter lies on a mesh: rules by its path and shape."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxopt_lab.core import tree

__all__ = ["FSDP", "Rule", "Rules", "Zero", "axes_of", "fsdp", "mesh_of", "normal", "replicated", "spec_of", "zero"]

Rule = Callable[[str, Any], PartitionSpec | None]
"""`(path, leaf) -> PartitionSpec`; None says that the rule does not cover the parameter."""

Rules = Rule | Mapping[str, Any] | Sequence[tuple[str, Any]]
"""A rule, or (glob, PartitionSpec or rule) in order, of which the first whose glob matches the path decides."""


def replicated(path: str, leaf: Any) -> PartitionSpec:
    """The rule by which every device holds every parameter: data parallelism.

    >>> replicated("Dense_0/kernel", jnp.ones((2, 3))) == PartitionSpec()
    True
    """
    return PartitionSpec()


@dataclass(frozen=True)
class FSDP:
    """The rule of `fsdp`, which says what it does.

    Attributes:
      axis: the mesh axis, or several, taken together.
      min_size: parameters of fewer numbers are replicated.
      sizes: of the mesh's axes by name; None until it is `on` a mesh.
    """

    axis: str | tuple[str, ...]
    min_size: int
    sizes: tuple[tuple[str, int], ...] | None = None

    def on(self, mesh: Mesh) -> "FSDP":
        """The same rule on a mesh, which alone says what divides."""
        return FSDP(self.axis, self.min_size, tuple(mesh.shape.items()))

    def __call__(self, path: str, leaf: Any) -> PartitionSpec:
        shape = jnp.shape(leaf)
        if self.sizes is None:
            raise ValueError(f"fsdp must be told the mesh to place {path} of shape {shape}: call fsdp(...).on(mesh)")
        sizes = dict(self.sizes)
        names = axes_of(self.axis)
        _check_axes(names, sizes, f"fsdp({self.axis!r})")
        parts = math.prod(sizes[name] for name in names)
        if math.prod(shape) < self.min_size:
            return PartitionSpec()
        # The last of the longest: the contiguous one where a square matrix leaves the choice.
        dividing = [k for k in reversed(range(len(shape))) if shape[k] and shape[k] % parts == 0]
        if not dividing:
            return PartitionSpec()
        dimension = max(dividing, key=lambda k: shape[k])
        return PartitionSpec(*[None] * dimension, self.axis)


@dataclass(frozen=True)
class Zero:
    """The rule of `zero`, which says what it does.

    Attributes:
      moments: the rule for the optimiser's state.
    """

    moments: FSDP

    def on(self, mesh: Mesh) -> "Zero":
        """The same rule on a mesh."""
        return Zero(self.moments.on(mesh))

    def __call__(self, path: str, leaf: Any) -> PartitionSpec:
        return PartitionSpec()


def fsdp(axis: str | tuple[str, ...] = "data", min_size: int = 1024) -> FSDP:
    """The rule by which each device holds its part of every parameter, and of what the optimiser keeps for it (ZeRO, stage 3).

    A parameter is cut along the longest of its dimensions that the axis divides (the last such one of equal length), and gathered
    where it is used. Where none divides, or it is small, every device holds it whole.

    Args:
      axis: the mesh axis to cut along, as a rule the one over which the rows of a batch are dealt; or several, taken together.
      min_size: parameters of fewer numbers are replicated, since to gather them costs more than they take.

    >>> import jax
    >>> mesh = Mesh(jax.devices()[:1], ("data",))
    >>> tuple(fsdp(min_size=8).on(mesh)("Dense_0/kernel", jnp.ones((4, 8))))
    (None, 'data')

    Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", 2020.
    """
    return FSDP(axis, min_size)


def zero(axis: str | tuple[str, ...] = "data", min_size: int = 1024) -> Zero:
    """The rule by which every device holds every parameter, and its part of what the optimiser keeps for it (ZeRO, stage 1).

    Of each parameter a device updates the part whose moments it holds, and hands it to the others: less memory than `replicated`,
    and no parameter to gather in the passes, as with `fsdp`.

    Args:
      axis: the mesh axis to cut moments along, or several, taken together.
      min_size: moments of fewer numbers are replicated.

    >>> import jax
    >>> rule = zero("data", min_size=8).on(Mesh(jax.devices()[:1], ("data",)))
    >>> kernel = jnp.ones((4, 8))
    >>> tuple(rule("Dense_0/kernel", kernel)), tuple(rule.moments("Dense_0/kernel", kernel))
    ((), (None, 'data'))

    Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", 2020.
    """
    return Zero(FSDP(axis, min_size))


def normal(rules: Rules, mesh: Mesh) -> Rule:
    """One rule of any, which knows the mesh, and whose specs fit it and the parameter; see `spec_of`.

    A rule may have an attribute `moments`, another rule, for the state of the optimiser: so has what comes out then.

    >>> import jax
    >>> mesh = Mesh(jax.devices()[:1], ("model",))
    >>> rule = normal({"**/kernel": PartitionSpec(None, "model"), "**": replicated}, mesh)
    >>> tuple(rule("Dense_0/kernel", jnp.ones((2, 3)))), tuple(rule("Dense_0/bias", jnp.ones(3)))
    ((None, 'model'), ())
    """
    return _Normal(rules, mesh)


class _Normal:
    def __init__(self, rules: Rules, mesh: Mesh):
        self._given, self._mesh = rules, mesh
        self._rules = _rule_list(rules, mesh)
        moments = getattr(rules, "moments", None)
        self.moments: Rule | None = None if moments is None else _Normal(moments, mesh)

    def __call__(self, path: str, leaf: Any) -> PartitionSpec:
        for pattern, rule in self._rules:
            # A parameter that is the whole tree has the empty path, which only `**` matches.
            if pattern is not None and not tree.matches(pattern, path):
                continue
            spec = rule if isinstance(rule, PartitionSpec) else rule(path, leaf)
            if spec is None and pattern is None:
                break
            return spec_of(spec, path, jnp.shape(leaf), self._mesh)
        raise ValueError(
            f"no rule covers {path or 'the parameter'} of shape {jnp.shape(leaf)}; the rules are {_shown(self._given)}: add one "
            "that does, such as ('**', PartitionSpec()) at the end"
        )


def _rule_list(rules: Rules, mesh: Mesh) -> list[tuple[str | None, PartitionSpec | Rule]]:
    if isinstance(rules, PartitionSpec):
        raise TypeError(f"rules must say which parameters {rules} is for: {{'**/kernel': {rules}, '**': PartitionSpec()}}")
    if callable(rules):
        return [(None, _on(rules, mesh))]
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    for pair in pairs:
        fits = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
        if not fits or not (isinstance(pair[1], PartitionSpec) or callable(pair[1])):
            raise TypeError(f"a rule must be (glob, PartitionSpec), or (glob, function of path and leaf); got {pair!r}")
    return [(pattern, rule if isinstance(rule, PartitionSpec) else _on(rule, mesh)) for pattern, rule in pairs]


def _on(rule: Any, mesh: Mesh) -> Rule:
    return rule.on(mesh) if hasattr(rule, "on") else rule


def _shown(rules: Rules) -> str:
    if callable(rules):
        return getattr(rules, "__name__", repr(rules))
    return ", ".join(f"{pattern!r}" for pattern in (rules if isinstance(rules, Mapping) else [pair[0] for pair in rules])) or "none"


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec.

    >>> axes_of(None), axes_of("data"), axes_of(("data", "model"))
    ((), ('data',), ('data', 'model'))
    """
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spec_of(spec: PartitionSpec, path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec, once it fits the mesh and the parameter.

    Raises:
      TypeError: it is no PartitionSpec.
      ValueError: it names an axis that the mesh does not have, or one twice; it is longer than the shape; or an axis does not
        divide its dimension. The message has path, shape and mesh.

    >>> import jax
    >>> mesh = Mesh(jax.devices()[:1], ("data",))
    >>> spec_of(PartitionSpec("model"), "kernel", (4, 4), mesh)
    Traceback (most recent call last):
      ...
    ValueError: the rule ('model',) for kernel of shape (4, 4): the mesh has no axis 'model'; it has data=1
    """
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"the rule for {path} of shape {shape} gives {spec!r}; it must give a jax.sharding.PartitionSpec")
    what = f"the rule {tuple(spec)} for {path or 'the parameter'} of shape {shape}"
    sizes = dict(mesh.shape)
    if len(spec) > len(shape):
        raise ValueError(f"{what} is for {len(spec)} dimensions, and it has {len(shape)}")
    names = [name for entry in spec for name in axes_of(entry)]
    _check_axes(names, sizes, what)
    if len(set(names)) < len(names):
        raise ValueError(f"{what} names an axis twice; an axis cuts one dimension")
    for k, entry in enumerate(spec):
        parts = math.prod(sizes[name] for name in axes_of(entry))
        if shape[k] % parts:
            raise ValueError(
                f"{what}: its dimension {k} of length {shape[k]} does not divide among {parts} devices along {entry!r} (mesh "
                f"{_sizes(sizes)}); replicate it, or choose another dimension"
            )
    return spec


def _check_axes(names: Sequence[str], sizes: Mapping[str, int], what: str) -> None:
    for name in names:
        if name not in sizes:
            raise ValueError(f"{what}: the mesh has no axis {name!r}; it has {_sizes(sizes)}")


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def mesh_of(mesh: Mesh) -> Mesh:
    """The mesh with axes of the type Auto, over which the compiler spreads what it is not told about.

    `jax.make_mesh` makes Explicit ones unless it is told otherwise, on which much of a model (dropout of Flax, `x @ x.T`, a lookup)
    must say how its result is spread, or raises. The devices and their order are the same.

    Raises:
      TypeError: it is no mesh.

    >>> import jax
    >>> mesh_of(jax.make_mesh((1,), ("data",))).axis_types == (AxisType.Auto,)
    True
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, such as jax.make_mesh((8,), ('data',)); got {type(mesh).__name__}")
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
