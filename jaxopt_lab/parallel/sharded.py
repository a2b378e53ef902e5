"""One step on a mesh of devices, the state cut by rules: the compiler spreads the program."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxopt_lab.core.types import PyTree
from jaxopt_lab.parallel.placement import put, shardings
from jaxopt_lab.parallel.rows import deal_rows, feed, join_rows, pad_to
from jaxopt_lab.parallel.rules import Rules, axes_of, mesh_of, normal, replicated

__all__ = ["Sharded", "shard"]

_ROWS = ("data", "replica", "fsdp")


class Sharded:
    """A step on a mesh: `(state, batch) -> (state, metrics)`, pure, as the step it was made of; see `shard`.

    Attributes:
      step: the step of the whole batch.
      mesh: the devices, with axes of the type Auto.
      rules: where parameters lie.
      rows: the mesh axes over which the rows of a batch are dealt.
      beside: the entries of a batch that have no rows.
    """

    def __init__(self, step: Callable, mesh: Mesh, rules: Rules, rows: str | tuple[str, ...] | None, beside: tuple[str, ...]):  # pyright: ignore[reportInvalidTypeForm]
        self.step, self.mesh, self.rules = step, mesh_of(mesh), rules
        self.rows, self.beside = _rows_of(self.mesh, rows), beside
        self._rule = normal(rules, self.mesh)
        self._parts = math.prod(self.mesh.shape[axis] for axis in self.rows)
        self._dealt = NamedSharding(self.mesh, PartitionSpec(self.rows))
        self._whole = NamedSharding(self.mesh, PartitionSpec())
        self._known: dict[Any, list[NamedSharding]] = {}
        self._jitted = jax.jit(self._traced)

    def place(self, tree: PyTree) -> PyTree:
        """The state, or a bare tree of parameters such as a teacher's, where the rules say; as it is, if it lies there already."""
        return self._mapped(put, tree)

    def place_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch, its rows dealt over the devices, padded with rows of weight 0 where they do not divide.

        On several processes it is this process's rows, and they must divide; see `shard`.
        """
        if not self._whole.is_fully_addressable:
            return self._joined(batch, 0)
        dealt, beside = self._parted(batch)
        return {**deal_rows(pad_to(dealt, self._parts), self.mesh, self.rows), **self._beside(put, beside)}

    def feed(self, batches: Callable[[int], Mapping[str, Any]]) -> Callable[[int], Mapping[str, Any]]:
        """Batches of this process's rows as the global ones that a jitted step takes; a method `stack` stays one.

        The batches themselves where there is one process.
        """
        return batches if self._whole.is_fully_addressable else feed(batches, self._joined)

    def _joined(self, batch: Mapping[str, Any], leading: int) -> dict[str, Any]:
        dealt, beside = self._parted(batch)
        return {**join_rows(dealt, self.mesh, self.rows, leading), **self._beside(put, beside)}

    def __call__(self, state: PyTree, batch: Mapping[str, Any]) -> tuple[PyTree, dict[str, jax.Array]]:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, batch))):
            return self._traced(state, batch)
        return self._jitted(self.place(state), self.place_batch(batch))

    def _traced(self, state: PyTree, batch: Mapping[str, Any]) -> tuple[PyTree, dict[str, jax.Array]]:
        """The program of the whole batch, and where its arrays lie."""
        _check_around()
        constrain = jax.lax.with_sharding_constraint
        dealt, beside = self._parted(batch)
        batch = {**constrain(pad_to(dealt, self._parts), self._dealt), **self._beside(constrain, beside)}
        state, metrics = self.step(self._mapped(constrain, state), batch)
        return self._mapped(constrain, state), constrain(metrics, self._whole)

    def _parted(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The entries of a batch that have rows, and those that have none."""
        beside = {name: batch[name] for name in self.beside if name in batch}
        return {name: value for name, value in batch.items() if name not in beside}, beside

    def _mapped(self, function: Callable, tree: PyTree) -> PyTree:
        """`function(array, sharding)` of each array and where it shall lie."""
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, map(function, leaves, self._shardings(tree)))

    def _beside(self, function: Callable, beside: Mapping[str, Any]) -> dict[str, Any]:
        """The same of what a batch has beside its rows: each entry is a tree of parameters of its own."""
        return {name: self._mapped(function, value) for name, value in beside.items()}

    def _shardings(self, state: PyTree) -> list[NamedSharding]:
        """One for each array; walking the paths takes longer than a short step, so what was found is kept."""
        leaves, structure = jax.tree.flatten(state)
        key = structure, tuple((np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves)
        if key not in self._known:
            self._known[key] = jax.tree.leaves(shardings(state, self.mesh, self._rule))
        return self._known[key]


def _check_around() -> None:
    around = jax.sharding.get_abstract_mesh()
    odd = {name: kind.name for name, kind in zip(around.axis_names, around.axis_types, strict=True) if kind != AxisType.Auto}
    if odd:
        axes = ", ".join(f"{name} is {kind}" for name, kind in odd.items())
        raise ValueError(
            f"parallel.shard is called inside of a mesh whose axes are not of the type Auto ({axes}): leave jax.set_mesh and "
            "jax.shard_map, or make that mesh with axis_types=(jax.sharding.AxisType.Auto,) for each axis"
        )


def _rows_of(mesh: Mesh, rows: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if rows is None:
        return tuple(axis for axis in mesh.axis_names if axis in _ROWS) or mesh.axis_names[:1]
    for axis in axes_of(rows):
        if axis not in mesh.shape:
            raise ValueError(f"rows={rows!r}: the mesh has no axis {axis!r}; it has {', '.join(map(str, mesh.axis_names))}")
    return axes_of(rows)


def shard(
    step: Callable,  # pyright: ignore[reportInvalidTypeForm]
    mesh: Mesh,
    rules: Rules = replicated,
    *,
    rows: str | tuple[str, ...] | None = None,
    beside: Sequence[str] = (),
) -> Sharded:
    """The step on a mesh of devices, which equals the step on one; the state is cut as the rules say.

    The step is the one of a single device. The compiler spreads its program over the mesh and adds the exchange that it takes, so
    the mean over the batch, BatchNorm, dropout and `sparsify` are those of one device by construction, whatever is cut and how.

    - `rules=replicated` (the default): each device holds the whole state and its rows of the batch; gradients are summed.
    - `fsdp("data")`: each device holds its part of every parameter and moment as well (ZeRO, stage 3); `zero("data")` cuts the
      moments alone (stage 1).
    - A mapping, or pairs, of globs and specs: `{"**/kernel": PartitionSpec(None, "model"), "**": PartitionSpec()}`; the first that
      matches decides, and a parameter that none covers is an error. A function `(path, leaf) -> PartitionSpec` stands for either.

    What belongs to a parameter (moments, masks, accumulators, the fields of a compressed leaf) is cut as it is, and what belongs to
    none is replicated; `parallel.placement` says how. What comes out lies as it went in; given back, it is not copied.

    A batch whose rows do not divide among the devices is padded with rows of weight 0. So all ragged ends share one program; a
    batch that divides and has no weights takes another. The state can be saved, evaluated and restored at any time; the result
    can be jitted, scanned, and given to `train.fit`.

    On several processes each calls this alike, with the same state. The batch is then the process's own rows, as
    `parallel.local(batches)` gives them, in the order of the mesh, to `train.fit` too.

    The parameters of a teacher that is too large for one device are an entry of the batch, named in `beside` and placed once by
    `sharded.place(params)`: those that a loss closes over are constants of the program, whole on every device. Who wants to spell
    the exchange out has `jax.shard_map`: the step of `make_step(..., axis_name="data")` runs in it as it is.

    Args:
      step: of `train.make_step` without `axis_name`, or any pure step of the whole batch.
      mesh: as of `jax.make_mesh((4, 2), ("data", "model"))`; axes of the type Explicit are taken as Auto.
      rules: where parameters lie.
      rows: the mesh axes over which the rows of a batch are dealt; by default those called "data", "replica" or "fsdp", or, if
        there are none, the first.
      beside: the entries of a batch that have no rows, each a tree of parameters, which the rules place. In `train.fit` such
        batches want `chunk=1`, since a compiled loop stacks what it is given.

    Raises:
      TypeError: `mesh` is no mesh, or a rule is none.
      ValueError: the step names an axis to synchronise over; the mesh has no such axis; and when a state comes: no rule covers a
        parameter, or a spec does not fit it; or the call stands inside of a mesh with axes of another type than Auto.

    >>> from jaxopt_lab import nets, train
    >>> import jax.numpy as jnp, optax
    >>> model = nets.from_functions(lambda key, x: jnp.zeros(1), lambda w, x: x @ w)
    >>> step = train.make_step(model, lambda y, batch: (y - batch["y"]) ** 2, optax.sgd(0.5))
    >>> batch = {"x": jnp.ones((3, 1)), "y": jnp.array([0.0, 1.0, 2.0])}
    >>> state = train.init(model, step.tx, jax.random.key(0), batch)
    >>> state, metrics = shard(step, jax.make_mesh((jax.device_count(),), ("data",)))(state, batch)
    >>> state.params.tolist()
    [1.0]

    Source: Xu et al., "GSPMD: general and scalable parallelization for ML computation graphs", 2021.
    """
    axis_name = getattr(step, "axis_name", None)
    if axis_name is not None:
        raise ValueError(
            f"shard needs a step of the whole batch, and this one synchronises over {axis_name!r}: build it without axis_name= "
            "(the compiler adds the exchange), or give it to parallel.pmap"
        )
    return Sharded(step, mesh, rules, rows, tuple(beside))
