"""One step on many devices, by `jax.pmap`; on those of several processes by what it is made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab.core.types import PyTree
from jaxopt_lab.parallel.placement import put
from jaxopt_lab.parallel.rows import feed, join_rows, pad_to, split_rows

__all__ = ["Pmapped", "pmap"]


class Pmapped:
    """A step on many devices: `(state, batch) -> (state, metrics)`, pure, as the step it was made of; see `pmap`.

    Attributes:
      step: the step that each device takes.
      axis_name: the axis that it synchronises over.
      devices: the devices, in the order in which they get rows.
    """

    def __init__(self, step: Callable, devices: tuple[jax.Device, ...]):  # pyright: ignore[reportInvalidTypeForm]
        self.step, self.axis_name, self.devices = step, step.axis_name, devices
        # The very sharding that pmap returns: a state that comes back in is passed through without a copy.
        self._replicated = NamedSharding(Mesh(np.array(devices), (self.axis_name,)), PartitionSpec())
        # No axis for the state, in or out: it is replicated, which `jax.pmap` expresses as an ordinary array with a sharding.
        if jax.process_count() == 1:
            self._mapped = jax.pmap(step, self.axis_name, in_axes=(None, 0), out_axes=(None, None), devices=devices)
        else:
            # Inside of jit, and so in `train.fit`, `jax.pmap` would map over this process's devices alone.
            specs = (PartitionSpec(), PartitionSpec(self.axis_name)), (PartitionSpec(), PartitionSpec())
            mapped = jax.shard_map(step, mesh=self._replicated.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
            self._mapped = jax.jit(mapped)

    def place(self, state: PyTree) -> PyTree:
        """The state, replicated over the devices; as it is, if it is so already."""
        return jax.tree.map(lambda x: x if getattr(x, "sharding", None) == self._replicated else put(x, self._replicated), state)

    def feed(self, batches: Callable[[int], Mapping[str, Any]]) -> Callable[[int], Mapping[str, Any]]:
        """Batches of this process's rows as the global ones that a jitted step takes; a method `stack` stays one.

        The batches themselves where the devices are this process's.
        """
        return batches if self._replicated.is_fully_addressable else feed(batches, self._joined)

    def _joined(self, batch: Mapping[str, Any], leading: int) -> dict[str, Any]:
        return join_rows(batch, self._replicated.mesh, (self.axis_name,), leading)

    def __call__(self, state: PyTree, batch: Mapping[str, Any]) -> tuple[PyTree, dict[str, jax.Array]]:
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, batch)))
        state = state if traced else self.place(state)
        if jax.process_count() == 1:
            return self._mapped(state, split_rows(batch, len(self.devices)))
        here = traced or self._replicated.is_fully_addressable
        return self._mapped(state, pad_to(batch, len(self.devices)) if here else self._joined(batch, 0))


def pmap(step: Callable, devices: Sequence[jax.Device] | None = None) -> Pmapped:  # pyright: ignore[reportInvalidTypeForm]
    """The step on many devices, which equals the step on one.

    Each device takes its share of the rows; gradients and batch statistics are synchronised inside the step, and dropout is keyed
    by an example's place in the whole batch. A batch whose size is no multiple of the number of devices is padded with rows of
    weight 0.

    The state is an ordinary one, without an axis for devices: the one that `train.init` makes goes in, and what comes out is the
    same tree, replicated over the devices; given back it is not copied. It can be saved, evaluated, or handed to a step on one
    device (after `jax.device_put`) at any time. The result can be jitted, scanned, and given to `train.fit`.

    On several processes each calls this alike, with the same state. The batch is then the process's own rows, as
    `parallel.local(batches)` gives them, to `train.fit` too. There the step is mapped by `jax.shard_map`, since `jax.pmap` inside
    of `jax.jit` sees the devices of its own process only.

    Args:
      step: of `train.make_step(..., axis_name="...")`, or any pure step with an attribute `axis_name`.
      devices: all by default, those of other processes too.

    Raises:
      ValueError: the step names no axis, so its devices would each go their own way.

    >>> from jaxopt_lab import nets, train
    >>> import jax.numpy as jnp, optax
    >>> model = nets.from_functions(lambda key, x: jnp.zeros(1), lambda w, x: x @ w)
    >>> step = train.make_step(model, lambda y, batch: (y - batch["y"]) ** 2, optax.sgd(0.5), axis_name="devices")
    >>> batch = {"x": jnp.ones((3, 1)), "y": jnp.array([0.0, 1.0, 2.0])}
    >>> state = train.init(model, step.tx, jax.random.key(0), batch)
    >>> state, metrics = pmap(step)(state, batch)
    >>> state.params.tolist()
    [1.0]
    """
    if getattr(step, "axis_name", None) is None:
        raise ValueError('pmap needs a step that synchronises its devices: build it with make_step(..., axis_name="devices")')
    return Pmapped(step, tuple(jax.devices() if devices is None else devices))
