"""Which parts of a configuration are data of one program, and which make a program of their own.

A number is data: a traced leaf, so that all its values share one program, unless the program cannot do without its value (a width,
a number of layers, an argument that Optax looks at). Booleans, strings and None are always part of the program. What can be traced
is found by tracing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.trial import Trial, scalar_score, sharing, takes_config

__all__ = ["Group", "Member", "check_configs", "group", "shapes", "strong"]


@dataclass(frozen=True)
class Member:
    """The three functions of a trial with everything of a configuration filled in but its traced leaves.

    Equal members share their compiled programs.

    Attributes:
      trial: whose functions they are.
      treedef: the structure of the configuration.
      static: its leaves and their types; `(None, None)` at the traced ones.
      positions: where the traced leaves stand.
    """

    trial: Trial
    treedef: Any
    static: tuple[tuple[Any, Any], ...]
    positions: tuple[int, ...]

    def config(self, traced: Sequence[Array]) -> Any:
        """The configuration of these traced leaves, each as weakly typed as a Python number."""
        leaves = [leaf for leaf, _ in self.static]
        for position, leaf in zip(self.positions, traced, strict=True):
            leaves[position] = _weak(leaf)
        return jax.tree.unflatten(self.treedef, leaves)

    def paths(self, config: Any) -> list[str]:
        """The paths of the traced leaves."""
        return [_flat(config, 0, ()).paths[i] for i in self.positions]

    def values(self, config: Any) -> list[Any]:
        """The traced leaves of a configuration of this program.

        Raises:
          ValueError: it is of another one.
        """
        flat = _flat(config, 0, ())
        if (flat.treedef, flat.program(self.positions)) != (self.treedef, self.static):
            raise ValueError(f"the configuration {config} needs another program than the one that it is to go on with")
        return [flat.leaves[i] for i in self.positions]

    def init(self, key: Array, traced: Sequence[Array], shared: PyTree = None) -> PyTree:
        """The first state; every leaf an array of a strong type."""
        return jax.tree.map(strong, sharing(self.trial.init, shared)(key, self.config(traced)))

    def step(self, state: PyTree, batch: Any, traced: Sequence[Array], shared: PyTree = None) -> tuple[PyTree, dict[str, Array]]:
        """One step; the state keeps its structure, shapes and types, and metrics are float32."""
        out = sharing(self.trial.step, shared)(state, batch, self.config(traced))
        if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping)):
            raise TypeError(f"step must return (state, metrics), metrics a dict; it returned a {type(out).__name__}")
        state = _as_before(state, out[0])
        return state, {name: jnp.asarray(value).astype(jnp.float32) for name, value in out[1].items()}

    def evaluate(self, state: PyTree, traced: Sequence[Array], shared: PyTree = None) -> Array:
        """The score, a float scalar."""
        evaluate = sharing(self.trial.evaluate, shared)
        return scalar_score(evaluate(state, self.config(traced)) if takes_config(evaluate) else evaluate(state))


class Group(NamedTuple):
    """The configurations that share a program.

    Attributes:
      member: the program.
      indices: `[m]`, which of the configurations they are.
      traced: the traced leaves, arrays `[m, ...]` on the host.
    """

    member: Member
    indices: np.ndarray
    traced: tuple[np.ndarray, ...]


class _Flat(NamedTuple):
    """A configuration taken apart."""

    treedef: Any
    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    data: tuple[bool, ...]  # Which of the leaves are numbers or arrays.

    def program(self, traced: Sequence[int]) -> tuple[Any, ...]:
        """What of it is part of the program, with these leaves traced; the types tell True from 1."""
        return tuple((None, None) if i in traced else (leaf, type(leaf)) for i, leaf in enumerate(self.leaves))


def group(
    trial: Trial,
    configs: Sequence[Any],
    key: Array,
    batch: Any,
    *,
    static: Sequence[str] = (),
    most: int | None = 16,
    shared: PyTree = None,
) -> list[Group]:
    """Sorts configurations into groups of one program each.

    Args:
      trial: what is trained.
      configs: trees of numbers, strings, booleans, None and arrays.
      key: any key; only its type matters.
      batch: any batch of the run; only its shapes and types matter.
      static: paths of numbers that are part of the program even where they could be traced.
      most: how many values of a float that cannot be traced may each make a program of their own; None for any number.
      shared: the arrays that all configurations share; only their shapes and types matter.

    Raises:
      TypeError: a leaf is of another kind, or the trial does not fit its contract.
      ValueError: a float that cannot be traced has more than `most` values; the message names it, and why.

    >>> def init(key, config):
    ...     return jnp.zeros(config["width"]) + config["rate"]
    >>> trial = Trial(init, lambda state, batch, config: (state, {}), jnp.sum)
    >>> configs = [{"rate": 0.1, "width": 2}, {"rate": 0.2, "width": 3}, {"rate": 0.3, "width": 2}]
    >>> [(g.indices.tolist(), g.traced[0].tolist()) for g in group(trial, configs, jax.random.key(0), {})]
    [([0, 2], [0.1..., 0.3...]), ([1], [0.2...])]
    """
    flat = check_configs(configs, static)
    kinds: dict[Any, list[int]] = {}
    for index, each in enumerate(flat):
        traced = [i for i, data in enumerate(each.data) if data]
        kinds.setdefault((each.treedef, each.program(traced)), []).append(index)
    groups = []
    for indices in kinds.values():
        first = flat[indices[0]]
        needed = _needed(trial, first, key, batch, shared)
        for i, reason in needed.items():
            values = {flat[index].leaves[i] for index in indices}
            if most is not None and len(values) > most and any(isinstance(value, float) for value in values):
                raise ValueError(
                    f"{first.paths[i]} has {len(values)} values and cannot be traced ({_brief(reason)}), so each would compile "
                    "a program of its own; use lab.schedules, which take traced arguments, or give it few values"
                )
        traced = tuple(i for i, data in enumerate(first.data) if data and i not in needed)
        programs: dict[Any, list[int]] = {}
        for index in indices:
            programs.setdefault(flat[index].program(traced), []).append(index)
        for program, members in programs.items():
            columns = tuple(_column([flat[index].leaves[i] for index in members], first.paths[i]) for i in traced)
            groups.append(Group(Member(trial, first.treedef, program, traced), np.array(members), columns))
    return groups


def check_configs(configs: Sequence[Any], static: Sequence[str] = ()) -> list[_Flat]:
    """The configurations taken apart.

    Raises:
      TypeError: a leaf is no number, string, boolean, None or array; the message names the configuration and the path.
      ValueError: `static` names a path that none has.

    >>> [each.paths for each in check_configs([{"rate": 0.1, "kind": "a"}])]
    [('kind', 'rate')]
    """
    flat = [_flat(config, index, static) for index, config in enumerate(configs)]
    if unknown := sorted(set(static) - {path for each in flat for path in each.paths}):
        raise ValueError(f"static names {', '.join(unknown)}; the configurations have {', '.join(flat[0].paths)}")
    return flat


def shapes(member: Member, key: Array, batch: Any, traced: Sequence[Array], shared: PyTree = None) -> tuple[PyTree, PyTree]:
    """The state and the metrics of a member as shapes and types, from a trace of all its functions; equal members are traced once.

    >>> trial = Trial(lambda key, config: jnp.zeros(3), lambda state, batch, config: (state, {"one": 1}), jnp.sum)
    >>> member = group(trial, [{}], jax.random.key(0), {})[0].member
    >>> shapes(member, jax.random.key(0), {}, ())
    (ShapeDtypeStruct(shape=(3,), dtype=float32), {'one': ShapeDtypeStruct(shape=(), dtype=float32)})
    """
    leaves, treedef = jax.tree.flatten((key, batch, tuple(traced), shared))
    return _shapes(member, treedef, tuple(map(jax.typeof, leaves)), jax.config.jax_enable_x64)


@lru_cache(maxsize=256)
def _shapes(member: Member, treedef: Any, types: tuple[Any, ...], x64: bool) -> tuple[PyTree, PyTree]:
    def whole(key, batch, traced, shared):
        first = member.init(key, traced, shared)
        state, metrics = member.step(first, batch, traced, shared)
        return first, metrics, member.evaluate(state, traced, shared)

    args = [jax.ShapeDtypeStruct(each.shape, each.dtype, weak_type=each.weak_type) for each in types]
    return jax.eval_shape(whole, *jax.tree.unflatten(treedef, args))[:2]


def _flat(config: Any, index: int, static: Sequence[str]) -> _Flat:
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(config, is_leaf=lambda node: node is None)
    paths = tuple(_name(path) for path, _ in with_paths)
    leaves = tuple(leaf.item() if isinstance(leaf, np.generic) else leaf for _, leaf in with_paths)
    data = []
    for path, leaf in zip(paths, leaves, strict=True):
        number = isinstance(leaf, (int, float, np.ndarray, jax.Array)) and not isinstance(leaf, bool)
        data.append(number and path not in static)
        if not number and type(leaf).__hash__ is None:
            raise TypeError(f"configs[{index}]: {path} is a {type(leaf).__name__}; give numbers, strings, booleans, None or arrays")
    return _Flat(treedef, paths, leaves, tuple(data))


def _column(values: Sequence[Any], path: str) -> np.ndarray:
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1:
        raise ValueError(f"{path} has the shapes {' and '.join(map(str, sorted(shapes)))}; configurations run together need one")
    # The types of the values, not each value: JAX takes its time over a type.
    dtype = jnp.result_type(*{getattr(value, "dtype", type(value)) for value in values})
    return np.stack([np.asarray(value, dtype) for value in values])


def _needed(trial: Trial, flat: _Flat, key: Array, batch: Any, shared: PyTree) -> dict[int, Exception]:
    """The numbers whose values the program needs when it is traced, by position, and what it raised."""

    def raised(traced: Sequence[int]) -> Exception | None:
        member = Member(trial, flat.treedef, flat.program(traced), tuple(traced))
        try:
            shapes(member, key, batch, tuple(_column([flat.leaves[i]], flat.paths[i])[0] for i in traced), shared)
        except Exception as error:
            return error
        return None

    numbers = [i for i, data in enumerate(flat.data) if data]
    together = raised(numbers)
    if together is None:
        return {}
    if (own := raised(())) is not None:
        # At fault is the trial, not what of it is traced.
        raise own
    needed = {i: error for i in numbers if (error := raised([i])) is not None}
    rest = [i for i in numbers if i not in needed]
    return dict.fromkeys(numbers, together) if raised(rest) is not None else needed


def strong(x: Any) -> Array:
    """An array of a type that a number of Python does not change, so that a loop finds its state as it left it.

    >>> strong(1.0).weak_type
    False
    """
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else jax.lax.convert_element_type(x, x.dtype)


def _weak(x: Array) -> Array:
    """A number as one of Python's is to JAX, so that it takes on the type of what it meets; other arrays as they are."""
    kind = float if jnp.issubdtype(x.dtype, jnp.floating) else int
    if x.shape or x.dtype != jnp.result_type(kind):
        return x
    return jnp.full((), kind(0)).at[...].set(x)


def _as_before(old: PyTree, new: PyTree) -> PyTree:
    """The new state in the types of the old, or an error that names what changed."""
    before, treedef = jax.tree_util.tree_flatten_with_path(old)
    after = jax.tree_util.tree_flatten_with_path(new)[0]
    if jax.tree.structure(new) != treedef:
        odd = sorted({_name(path) for path, _ in before} ^ {_name(path) for path, _ in after})
        where = f" at {odd[0]}" if odd else ""
        raise ValueError(f"step changes the structure of the state{where}; it must return what it was given")
    for (path, was), (_, now) in zip(before, after, strict=True):
        then, here = (f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in (was, now))
        if then != here:
            raise ValueError(f"step makes {_name(path)} of the state {here}; init made it {then}")
    return jax.tree.map(strong, new)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
