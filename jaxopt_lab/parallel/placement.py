"""Where every array of a state lies: parameters by rules, and whatever belongs to one beside it.

An array belongs to a parameter if the parameter's path stands at the end of its own, or is followed there by the names of fields:
the moments of any optimiser, its accumulators, masks (packed or not), the fields of a compressed leaf. It is cut like the parameter
along each dimension that it shares with it; a factored moment, which has lost some, along those that it has kept. What belongs to
none is replicated.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import PyTree
from jaxopt_lab.parallel.rules import Rule, Rules, axes_of, mesh_of, normal, replicated

__all__ = ["follow", "place", "put", "shardings"]


def shardings(state: PyTree, mesh: Mesh, rules: Rules = replicated) -> PyTree:
    """Where each array of a state lies: a tree of `NamedSharding` with the state's structure.

    Args:
      state: a training state, whose parameters are its attribute or entry "params"; or a tree of nothing but parameters, such as
        those of a teacher. Shapes alone will do (`jax.eval_shape`).
      mesh: the devices.
      rules: for parameters. The optimiser's state and all else follows them, or the rule's own attribute `moments`.

    Raises:
      ValueError: as `rules.normal`: no rule covers a parameter, or a spec does not fit it or the mesh.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> found = shardings({"params": {"w": jnp.ones((2, 4))}, "mu": {"w": jnp.ones((2, 4))}}, mesh, {"w": PartitionSpec("data")})
    >>> tuple(found["mu"]["w"].spec)
    ('data',)
    """
    mesh = mesh_of(mesh)
    found = _specs(state, mesh, normal(rules, mesh))
    return jax.tree.unflatten(jax.tree.structure(state), [NamedSharding(mesh, spec) for spec in found])


def _specs(state: PyTree, mesh: Mesh, rule: Rule) -> list[PartitionSpec]:
    """One spec for each array, in the order of `jax.tree.leaves`."""
    params = parameters(state)
    prefix = "" if params is state else "params"
    names, leaves, _ = tree.flatten(params)
    shapes = {name: jnp.shape(leaf) for name, leaf in zip(names, leaves, strict=True)}
    own = {name: rule(name, leaf) for name, leaf in zip(names, leaves, strict=True)}
    moments = getattr(rule, "moments", None)
    beside = own if moments is None else {name: moments(name, leaf) for name, leaf in zip(names, leaves, strict=True)}
    sizes, found = dict(mesh.shape), []
    for path, leaf in zip(*tree.flatten(state)[:2], strict=True):
        is_parameter = path == prefix or not prefix or path.startswith("params/")
        owner = path[len(prefix) :].removeprefix("/") if is_parameter else _owner(path, shapes)
        for array in jax.tree.leaves(leaf):
            spec = PartitionSpec()
            if owner is not None:
                spec = follow((own if is_parameter else beside)[owner], shapes[owner], jnp.shape(array), sizes)
            found.append(spec)
    return found


def parameters(state: PyTree) -> PyTree:
    """The parameters of a state: its attribute or entry "params", or all of it."""
    if isinstance(state, Mapping):
        return state.get("params", state)
    return getattr(state, "params", state)


def _owner(path: str, shapes: Mapping[str, Any]) -> str | None:
    """The parameter whose path stands last in this one, the longest of those that end there; None if there is none."""
    parts = path.split("/") if path else []
    for stop in range(len(parts), -1, -1):
        for start in range(stop + 1):
            name = "/".join(parts[start:stop])
            if name in shapes and (name or stop == len(parts)):
                return name
    return None


def follow(spec: PartitionSpec, whole: tuple[int, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How an array is cut that belongs to a parameter of shape `whole`, which `spec` cuts.

    Of the same number of dimensions, it is cut along each in which it has the parameter's length, or another that the devices
    divide (codes that are packed, scales of groups). Of fewer, and if only one choice of the parameter's dimensions gives its
    shape, it is cut along those; of more, if the last of them are the parameter's (a history of moments), along these. Else it is
    replicated.

    >>> sizes = {"data": 2}
    >>> [tuple(follow(PartitionSpec("data"), (4, 6), shape, sizes)) for shape in ((4, 6), (2, 6), (1, 6), (4,), (6,), (3, 4, 6))]
    [('data',), ('data',), (), ('data',), (), (None, 'data')]
    """
    entries = [*spec, *[None] * (len(whole) - len(spec))]
    if len(shape) < len(whole):
        chosen = list(_subsequences(whole, shape))
        if len(chosen) != 1:
            return PartitionSpec()
        entries = [entries[k] for k in chosen[0]]
    elif len(shape) > len(whole):
        more = len(shape) - len(whole)
        if shape[more:] != whole:
            return PartitionSpec()
        entries = [*[None] * more, *entries]

    def fits(entry: Any, length: int) -> bool:
        parts = math.prod(sizes[name] for name in axes_of(entry))
        return length > 0 and length % parts == 0

    kept = [entry if fits(entry, length) else None for entry, length in zip(entries, shape, strict=True)]
    # To jit P("data") and P("data", None) are two things: one way of writing it spares a compilation.
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def _subsequences(whole: Sequence[int], part: Sequence[int], begin: int = 0) -> Iterator[tuple[int, ...]]:
    """Every choice of places of `whole`, in order, that reads `part`."""
    if not part:
        yield ()
        return
    for k in range(begin, len(whole)):
        if whole[k] == part[0]:
            for rest in _subsequences(whole, part[1:], k + 1):
                yield (k, *rest)


def place(state: PyTree, mesh: Mesh, rules: Rules = replicated) -> PyTree:
    """The state, or a bare tree of parameters, with each array where `shardings` says; as it is, if it lies there already.

    On several processes the values are the same in each (the same seed makes them so); each keeps its devices' parts.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> place({"w": np.ones(2)}, mesh)["w"].sharding.is_fully_replicated
    True
    """
    return jax.tree.map(put, state, shardings(state, mesh, rules))


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array where a sharding says; as it is, if it lies there. On several processes each has the same one.

    >>> put(np.ones(2), NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec())).sharding.is_fully_replicated
    True
    """
    if isinstance(x, jax.Array) and (x.sharding == sharding or (x.committed and x.sharding.is_equivalent_to(sharding, x.ndim))):
        return x
    if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    if jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    # Every process has the whole array: each hands over what its devices hold, and none need ask the others.
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
