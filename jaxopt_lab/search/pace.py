"""Which engine runs a group of members fastest, and how many at once fit into memory: measured."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core import tracing
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.engines import Engine, Programs, looped, programs, scanned, vmapped
from jaxopt_lab.search.grouping import Group, shapes
from jaxopt_lab.train.stepping import worth_compiling

__all__ = ["Start", "bytes_of_memory", "chosen", "portions", "split"]

# More members at once only leave a CPU's cache; accelerators are filled.
_WIDTH_ON_CPU, _WIDTH = 64, 4096
_MEMORY_ON_CPU = 2 << 30
_PROBES, _TIMED_STEPS, _LONG_S = 3, 16, 0.1
# What a multiplication takes on a CPU, about.
_S_PER_MAC = 1e-10


class Start:
    """The members of a group at their beginning, so many at once as an engine takes.

    Attributes:
      group: which members.
      key: of the whole population.
      numbers: `[n]`, what each of its members folds into the key.
      block: batches `[length, ...]`.
      steps: how many are ahead of each member.
      devices: where they run.
      shared: arrays that all members share, on the devices.
      state: the shapes and types of one member's state.
      member_bytes: what one member takes while others are run.
      shared_bytes: what `shared` takes on each device.
      moved_bytes: what one member takes besides while those that go on are gathered: some of its arrays before, and after; 0 where
        all go on as they are.
    """

    def __init__(
        self,
        group: Group,
        key: Array,
        numbers: np.ndarray,
        block: Any,
        length: int,
        steps: int,
        devices: tuple[Any, ...],
        shared: PyTree = None,
        *,
        moves: bool = False,
    ):
        self.group, self.key, self.numbers, self.devices, self.shared = group, key, numbers, devices, shared
        self.block, self.length, self.steps = block, length, steps
        self._batch = jax.tree.map(lambda x: x[0], block)
        self._traced = tuple(column[0] for column in group.traced)
        self.state, self.metrics = shapes(group.member, key, self._batch, self._traced, shared)
        self.member_bytes = _nbytes((self.state, self.metrics, self._traced))
        self.shared_bytes = _nbytes(shared)
        leaves = jax.tree.leaves(self.state) if moves else []
        self.moved_bytes = 2 * max((_nbytes([leaves[k] for k in some]) for some in portions(leaves)), default=0)

    @property
    def leaves(self) -> int:
        """How many arrays a step takes and gives."""
        return len(jax.tree.leaves((self.state, self.metrics, self._batch)))

    @property
    def macs(self) -> int | None:
        """The multiplications of a step; None where they cannot be counted, as with compressed leaves."""
        try:
            return tracing.count(self.group.member.step, self.state, self._batch, self._traced, self.shared).macs
        except (TypeError, ValueError, NotImplementedError):
            return None

    def parts(self, engine: Engine) -> list[np.ndarray]:
        """Positions in the group, of those that one call runs: as many each, the last filled up by repeating its last."""
        return split(len(self.group.indices), len(self.devices), engine)

    def begin(self, engine: Engine, rows: np.ndarray) -> tuple[Programs, Any, dict[str, Array], tuple[Array, ...]]:
        """The programs, the states, the sums of the metrics and the traced leaves of some members at their beginning."""
        run = programs(self.group.member, engine, self.devices)
        traced = jax.device_put(tuple(column[rows] for column in self.group.traced), run.place)
        numbers = jax.device_put(self.numbers[self.group.indices[rows]].astype(np.uint32), run.place)
        return run, run.init(self.key, numbers, traced, self.shared), self.sums(run, len(rows)), traced

    def sums(self, run: Programs, count: int) -> dict[str, Array]:
        """Sums of metrics before the first step."""
        zeros = {name: np.zeros((count, *leaf.shape), np.float32) for name, leaf in self.metrics.items()}
        return jax.device_put(zeros, run.place)

    def working_bytes(self, engine: Engine, *, whole: bool = True) -> int:
        """What a call takes on each device besides the members and what they share: that of a step, or where they are run as a
        whole also that of their beginning and of an evaluation.

        A compiled program says so before it runs; these are the ones that run.
        """
        run, count = programs(self.group.member, engine, self.devices), len(self.parts(engine)[0])

        def together(x):
            return jax.ShapeDtypeStruct((count, *jnp.shape(x)), jnp.result_type(x), sharding=run.place)

        states, sums, traced = jax.tree.map(together, (self.state, self.metrics, self._traced))
        taken = [0]
        if whole:
            made = run.init.working_bytes(self.key, together(np.uint32(0)), traced, self.shared)
            # What it makes are the members.
            taken.append(made - _nbytes(states) // len(self.devices))
            taken.append(run.evaluate.working_bytes(states, traced, self.shared))
        if self.steps and engine.compiled:
            needed = run.advance.working_bytes(states, sums, self.block, np.int32(0), traced, self.shared)
            taken.append(_nbytes(self.block) + needed)
        elif self.steps:
            taken.append(_nbytes(self._batch) + run.step.working_bytes(states, sums, self._batch, traced, self.shared))
        return max(taken)


def split(count: int, devices: int, engine: Engine) -> list[np.ndarray]:
    """`0 ... count - 1` in rows of equal length, a multiple of the devices; the last filled up by repeating its last.

    >>> [rows.tolist() for rows in split(5, 1, vmapped(3))]
    [[0, 1, 2], [3, 4, 4]]
    """
    turns = -(-count // (devices * (engine.width or 1)))
    size = devices * -(-count // (devices * turns))
    return [np.minimum(np.arange(begin, begin + size), count - 1) for begin in range(0, count, size)]


def portions(leaves: Sequence[Any]) -> list[list[int]]:
    """Positions of arrays in turn, some at a time: of a quarter of all their bytes at most, or one alone.

    >>> portions([np.ones(8), np.ones(1), np.ones(1), np.ones(2)])
    [[0], [1, 2], [3]]
    """
    most, taken, found = _nbytes(leaves) / 4, 0, []
    for place, leaf in enumerate(leaves):
        own = _nbytes(leaf)
        if not found or taken + own > most:
            found.append([])
            taken = 0
        found[-1].append(place)
        taken += own
    return found


def bytes_of_memory(device: Any) -> int:
    """How much of a device's memory a population takes by default: four fifths of an accelerator's, 2 GiB on a CPU.

    >>> bytes_of_memory(jax.devices("cpu")[0]) == 2 << 30
    True
    """
    limit = None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
    return _MEMORY_ON_CPU if limit is None else limit * 4 // 5


def chosen(start: Start, engine: Engine | None, memory: int) -> Engine:
    """The engine that runs a group fastest, as measured; of one that is given, the width that fits.

    Args:
      start: the group.
      engine: None to measure.
      memory: bytes on each device.

    Raises:
      ValueError: not even a single member fits.

    >>> print(chosen(None, vmapped(8), memory=1 << 30))
    vmapped(8)
    """
    if engine is not None:
        return engine if engine.width is not None else _fitting(start, engine, memory)
    work = start.steps * -(-len(start.group.indices) // len(start.devices))
    most = worth_compiling(start.leaves)
    # An accelerator is to be filled whatever a step takes.
    macs = start.macs if start.devices[0].platform == "cpu" else 0
    products = None if macs is None else macs * _S_PER_MAC
    if products is not None and products > most:
        # A compiled loop would save next to nothing, and slows convolutions down.
        return looped()

    def wide():
        return _fitting(start, vmapped(), memory, whole=False)

    # Where the products of a step take less than its dispatch, a tenth of the most, a Python loop is not worth a look.
    small = products is not None and products < most / 10
    best, built, engine = math.inf, 0.0, scanned()
    for make in [wide, scanned] if small else [looped, scanned, wide]:
        # Nor is another program that takes longer to compile than it could save.
        if work * best < 2 * built:
            break
        begin = time.perf_counter()
        other = make()
        pace, ready = _timed(start, other)
        built = ready - begin
        if pace < best:
            best, engine = pace, other
    # Of the engine that is taken alone the other programs are compiled for their bytes.
    return engine if engine.width == 1 else _fitting(start, engine, memory)


def _fitting(start: Start, engine: Engine, memory: int, *, whole: bool = True) -> Engine:
    """The engine as wide as memory, and what is worth it, allow; no wider than it is."""
    most = engine.width or (_WIDTH_ON_CPU if start.devices[0].platform == "cpu" else _WIDTH)
    width = min(most, -(-len(start.group.indices) // len(start.devices)), max(memory // max(2 * start.member_bytes, 1), 1))
    while True:
        # Spread evenly over as many turns as it takes.
        width = len(start.parts(vmapped(width))[0]) // len(start.devices)
        tried = vmapped(width, compiled=engine.compiled)
        # Those of all devices may be gathered on each.
        besides = max(start.working_bytes(tried, whole=whole), width * len(start.devices) * start.moved_bytes)
        taken = start.shared_bytes + width * start.member_bytes + besides
        if taken <= memory:
            return tried
        if width == 1:
            raise ValueError(
                f"a single member takes {taken:,} bytes, {start.shared_bytes:,} of them shared by all, and memory is {memory:,}: "
                "give it more, or a smaller batch, or an init and an evaluation that take less at a time"
            )
        width = max(min(width - 1, int(width * memory / taken)), 1)


def _nbytes(tree: PyTree) -> int:
    return sum(math.prod(jnp.shape(x)) * jnp.result_type(x).itemsize for x in jax.tree.leaves(tree))


def _timed(start: Start, engine: Engine) -> tuple[float, float]:
    """Seconds that a step of one member takes on a device, and when its program was ready."""
    rows = start.parts(engine)[0]
    run, states, sums, traced = start.begin(engine, rows)
    jax.block_until_ready((states, sums, traced))
    steps = min(_TIMED_STEPS, start.length)

    def go(states, sums, steps):
        if engine.compiled:
            states, sums = run.advance(states, sums, start.block, np.int32(steps), traced, start.shared)
        else:
            batch = jax.tree.map(lambda x: x[0], start.block)
            step = run.step.compiled(states, sums, batch, traced, start.shared)
            for _ in range(steps):
                states, sums = step(states, sums, batch, traced, start.shared)
        return jax.block_until_ready((states, sums))

    states, sums = go(states, sums, 1)
    ready = time.perf_counter()
    # The least of a few: a hiccup must not pass for a long step.
    paces = []
    for _ in range(_PROBES):
        begin = time.perf_counter()
        states, sums = go(states, sums, steps)
        paces.append((time.perf_counter() - begin) / steps)
        if paces[-1] * steps > _LONG_S:
            break
    return min(paces) * len(start.devices) / len(rows), ready
