"""Several processes, on one machine or many, by a script that is the same for all of them, and for one.

    hosts.initialize()                              # first of all: one process, or as many as the environment tells of
    batches = hosts.local(data.batches(...))        # this process's rows of the same global batches

Who is who stands in the environment; `jaxopt_lab.parallel.detection` says in which variables.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxopt_lab.core.life import alive
from jaxopt_lab.core.rows import count_rows
from jaxopt_lab.data.streams import Batches
from jaxopt_lab.parallel.detection import Plan, detect

__all__ = ["Hosts", "Local", "alive", "initialize", "is_first", "local", "share"]

# After this long past the time allowed, JAX gives up by itself, and the process with it.
_ABORT_S = 120


@dataclass(frozen=True)
class Hosts:
    """Where this process stands among the others.

    Attributes:
      process: its index, from 0.
      processes: how many there are.
      local_devices: how many devices are its own.
      devices: how many there are in all.
      how: what told so: "plain variables", "Slurm", "Open MPI", "Cloud TPU"; "alone"; "before" where JAX was initialised already.

    >>> Hosts(process=1, processes=2, local_devices=4, devices=8, how="Slurm").process
    1
    """

    process: int
    processes: int
    local_devices: int
    devices: int
    how: str


def initialize(*, timeout: int = 300, heartbeat: int = 30, environ: Mapping[str, str] | None = None) -> Hosts:
    """Joins this process to the others, if there are any; the first call of a script, the same in every process.

    Once it has returned, arrays may be spread over the devices of all processes, and every process must run the same compiled
    programs in the same order. When a process dies, the others fail in what they compute together (at once on CPUs), or are ended
    by JAX's own watch after `heartbeat` seconds, with code 134 (SIGABRT): they cannot go on without it. `python -m
    jaxopt_lab.supervise` starts all of them again, and with `--stalled` also where one hangs (see `alive`). SIGTERM no longer ends
    a process of several: JAX's preemption service hears it, for `train.fit` to save. Where arrays are exchanged between CPUs, gloo
    prints "Rank k is connected" once for each set of devices, on the standard output; that is C++, and nothing here can keep it
    from it.

    Args:
      timeout: for how many seconds to wait until all processes are there.
      heartbeat: after how many seconds without a sign of life a process counts as dead.
      environ: the environment to read, see `detect`; None for the process's own.

    Returns:
      Where this process stands. A process alone gets that too, and nothing else happens; a second call changes nothing.

    Raises:
      ValueError: as `detect`; or a time below 1.
      RuntimeError: something has used a device before; or the coordinator refused.
      TimeoutError: not all processes came in time; the message names the coordinator. What was begun cannot be undone: end the
        process.

    >>> initialize(environ={}).processes
    1
    """
    if timeout < 1 or heartbeat < 1:
        raise ValueError(f"timeout and heartbeat are whole seconds, at least 1; got {timeout} and {heartbeat}")
    if jax.distributed.is_initialized():
        return _here("before")
    plan = detect(os.environ if environ is None else environ)
    if plan is None:
        return _here("alone")
    _join(plan, timeout, heartbeat)
    return _here(plan.how)


def _here(how: str) -> Hosts:
    return Hosts(jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(), how)


def _join(plan: Plan, timeout: int, heartbeat: int) -> None:
    """Has JAX find the others, in a thread: where they do not come, it ends the process without a word of where they should be."""
    failed: list[Exception] = []
    # Of a plan that says everything JAX shall not look elsewhere again.
    said = {} if plan.coordinator is None else {"cluster_detection_method": "deactivate"}

    def join() -> None:
        try:
            jax.distributed.initialize(
                plan.coordinator,
                plan.processes,
                plan.process,
                None if plan.local_device_ids is None else list(plan.local_device_ids),
                initialization_timeout=timeout + _ABORT_S,
                heartbeat_timeout_seconds=heartbeat,
                **said,
            )
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=join, name="hosts.initialize", daemon=True)
    thread.start()
    thread.join(timeout)
    where = f"the coordinator at {plan.coordinator}" if plan.coordinator else "the coordinator that JAX found"
    who = f"{plan.how}: process {plan.process} of {plan.processes}" if plan.coordinator else plan.how
    if thread.is_alive():
        raise TimeoutError(
            f"{who}: not all processes were at {where} within {timeout} s; is every one of them started, does that host answer, and"
            " is its port open to them?"
        )
    if not failed:
        return
    error = failed[0]
    if isinstance(error, RuntimeError) and "before any JAX calls" in str(error):
        raise RuntimeError(
            "hosts.initialize must come before anything that uses a device, even jax.devices(): make it the script's first call"
            f" ({who})"
        ) from error
    hint = "" if plan.coordinator else "; set JAX_NUM_PROCESSES=1 for this machine alone"
    raise RuntimeError(f"{who}: {where} could not be joined: {type(error).__name__}: {error}{hint}") from error


def is_first() -> bool:
    """Whether this is process 0, which alone prints, logs and shows progress.

    >>> is_first()
    True
    """
    return jax.process_index() == 0


def share(rows: int, devices: Sequence[int], process: int) -> tuple[int, int]:
    """The first row of a process, and how many it has, of a batch that is padded to a multiple of all devices.

    Args:
      rows: of the whole batch, before padding.
      devices: how many each process has, in the order of the processes.
      process: whose share.

    >>> [share(10, (2, 2), process) for process in range(2)]
    [(0, 6), (6, 6)]
    """
    each = -(-rows // sum(devices))
    return each * sum(devices[:process]), each * devices[process]


@dataclass(frozen=True)
class Local:
    """One process's rows of global batches: `local(step)` is a dict of arrays `[b, ...]`; see the function `local`.

    Attributes:
      batches: the global batches, `step -> dict`.
      devices: how many each process has, in the order of the processes.
      process: whose rows.
    """

    batches: Callable[[int], Mapping[str, Any]]
    devices: tuple[int, ...]
    process: int

    def __call__(self, step: int) -> dict[str, Any]:
        """The batch of one step: arrays `[b, ...]`."""
        if isinstance(self.batches, Batches):
            which, real = self._rows(self.batches.size(step))
            return _weighed(self.batches.rows(step, which), real)
        batch = self.batches(step)
        which, real = self._rows(count_rows(batch))
        return _weighed({name: jax.tree.map(lambda v: v[which], value) for name, value in batch.items()}, real)

    def _rows(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of the whole batch are here, and which of them are so by right: the others are copies of its row 0."""
        first, count = share(rows, self.devices, self.process)
        wanted = np.arange(first, first + count)
        # All processes must agree on whether there are weights, also those whose rows are all real.
        real = wanted < rows if rows % sum(self.devices) else np.empty(0, bool)
        return np.where(wanted < rows, wanted, 0), real


class _Stacking(Local):
    """Of batches that come in stacks: so do these."""

    def stack(self, step: int, count: int) -> dict[str, Any]:
        """The batches of the steps `step, step + 1, ...` as arrays `[k, b, ...]`; `k` may be less than `count`."""
        if not isinstance(self.batches, Batches):
            stacked = self.batches.stack(step, count)  # pyright: ignore[reportFunctionMemberAccess]
            steps, rows = np.shape(jax.tree.leaves(stacked)[0])[:2]
            which, real = self._rows(rows)
            return _weighed({name: jax.tree.map(lambda v: v[:, which], value) for name, value in stacked.items()}, real, (steps,))
        if self.batches.batch_size is None:
            return {name: np.broadcast_to(value, (count, *value.shape)) for name, value in self(step).items()}
        each = [self(step)]
        while len(each) < count and self.batches.size(step + len(each)) == self.batches.size(step):
            each.append(self(step + len(each)))
        return {name: np.stack([batch[name] for batch in each]) for name in each[0]}


def _weighed(batch: dict[str, Any], real: np.ndarray, steps: tuple[int, ...] = ()) -> dict[str, Any]:
    """The batch, or a stack of them, with weight 0 for rows that are not real; nothing is added where nothing was padded."""
    if not real.size:
        return batch
    real, weight = np.broadcast_to(real, (*steps, *real.shape)), batch.get("weight")
    return {**batch, "weight": real.astype(np.float32) if weight is None else weight * real.astype(weight.dtype)}


def local(batches: Callable[[int], Mapping[str, Any]]) -> Callable[[int], Mapping[str, Any]]:
    """This process's rows of batches that are the same everywhere; the batches themselves where there is one process.

    The global batch of a step is a function of the seed and the step, so no process needs to hear of the others: each takes a
    contiguous block, in the order of the processes, an equal part for each device. A batch that is no multiple of all devices is
    padded at its end with copies of row 0 of weight 0, as `split_rows` does. Of a stream of `data.batches` only those rows are
    gathered. What comes out is this process's part of a global array, for `jax.make_array_from_process_local_data`; rows that all
    lie on the devices of one process (a mesh whose axis for rows spans no others) need the whole batch instead.

    Args:
      batches: `step -> dict of arrays [B, ...]`; a method `stack` stays one.

    >>> batches = lambda step: {"x": np.arange(3) + step}
    >>> local(batches) is batches
    True
    >>> [Local(batches, (1, 1), process)(4)["x"].tolist() for process in range(2)]
    [[4, 5], [6, 4]]
    """
    if jax.process_count() == 1:
        return batches
    owned = Counter(device.process_index for device in jax.devices())
    kind = _Stacking if hasattr(batches, "stack") else Local
    return kind(batches, tuple(owned[process] for process in range(jax.process_count())), jax.process_index())
