"""Which engine runs a group of members fastest, and how many at once fit into memory: measured."""

import math
import time
from typing import Any

import jax
import numpy as np

from jaxopt_lab.core import tracing
from jaxopt_lab.core.types import Array
from jaxopt_lab.search.engines import Engine, Programs, looped, programs, scanned, vmapped
from jaxopt_lab.search.grouping import Group, Member
from jaxopt_lab.train.stepping import worth_compiling

__all__ = ["Start", "bytes_of_memory", "chosen", "split"]

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
      devices: where they run.
      state: the shapes and types of one member's state.
    """

    def __init__(self, group: Group, key: Array, numbers: np.ndarray, block: Any, length: int, devices: tuple[Any, ...]):
        self.group, self.key, self.numbers, self.devices = group, key, numbers, devices
        self.block, self.length = block, length
        example = jax.tree.map(lambda x: x[0], block)
        traced = [column[0] for column in group.traced]
        self.state = state = jax.eval_shape(group.member.init, key, traced)
        self.metrics = jax.eval_shape(group.member.step, state, example, traced)[1]
        self.macs = _macs(group.member, state, example, traced)
        self.state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        self.leaves = len(jax.tree.leaves((state, self.metrics, example)))

    def parts(self, engine: Engine) -> list[np.ndarray]:
        """Positions in the group, of those that one call runs: as many each, the last filled up by repeating its last."""
        return split(len(self.group.indices), len(self.devices), engine)

    def begin(self, engine: Engine, rows: np.ndarray) -> tuple[Programs, Any, dict[str, Array], tuple[Array, ...]]:
        """The programs, the states, the sums of the metrics and the traced leaves of some members at their beginning."""
        run = programs(self.group.member, engine, self.devices)
        traced = jax.device_put(tuple(column[rows] for column in self.group.traced), run.place)
        states = run.init(self.key, jax.device_put(self.numbers[self.group.indices[rows]].astype(np.uint32), run.place), traced)
        return run, states, self.sums(run, len(rows)), traced

    def sums(self, run: Programs, count: int) -> dict[str, Array]:
        """Sums of metrics before the first step."""
        zeros = {name: np.zeros((count, *leaf.shape), np.float32) for name, leaf in self.metrics.items()}
        return jax.device_put(zeros, run.place)


def split(count: int, devices: int, engine: Engine) -> list[np.ndarray]:
    """`0 ... count - 1` in rows of equal length, a multiple of the devices; the last filled up by repeating its last.

    >>> [rows.tolist() for rows in split(5, 1, vmapped(3))]
    [[0, 1, 2], [3, 4, 4]]
    """
    turns = -(-count // (devices * (engine.width or 1)))
    size = devices * -(-count // (devices * turns))
    return [np.minimum(np.arange(begin, begin + size), count - 1) for begin in range(0, count, size)]


def bytes_of_memory(device: Any) -> int:
    """How much of a device's memory a population takes by default: four fifths of an accelerator's, 2 GiB on a CPU.

    >>> bytes_of_memory(jax.devices("cpu")[0]) == 2 << 30
    True
    """
    limit = None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
    return _MEMORY_ON_CPU if limit is None else limit * 4 // 5


def chosen(start: Start, engine: Engine | None, steps: int, memory: int) -> Engine:
    """The engine that runs a group fastest, as measured; of one that is given, the width that fits.

    Args:
      start: the group.
      engine: None to measure.
      steps: how many steps are ahead of each member.
      memory: bytes on each device.

    Raises:
      ValueError: not even a single member fits.

    >>> print(chosen(None, vmapped(8), steps=100, memory=1 << 30))
    vmapped(8)
    """
    if engine is not None:
        return engine if engine.width is not None else _fitting(start, engine, memory)
    work = steps * -(-len(start.group.indices) // len(start.devices))
    most = worth_compiling(start.leaves)
    # An accelerator is to be filled whatever a step takes.
    products = 0.0 if start.devices[0].platform != "cpu" else None if start.macs is None else start.macs * _S_PER_MAC
    if products is not None and products > most:
        # A compiled loop would save next to nothing, and slows convolutions down.
        return looped()

    def wide():
        return _fitting(start, vmapped(), memory)

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
    return engine


def _fitting(start: Start, engine: Engine, memory: int) -> Engine:
    """The engine as wide as memory, and what is worth it, allow."""
    most = _WIDTH_ON_CPU if start.devices[0].platform == "cpu" else _WIDTH
    width = min(most, -(-len(start.group.indices) // len(start.devices)), max(memory // max(2 * start.state_bytes, 1), 1))
    while True:
        # Spread evenly over as many turns as it takes.
        width = len(start.parts(vmapped(width))[0]) // len(start.devices)
        tried = vmapped(width, compiled=engine.compiled)
        run, states, sums, traced = start.begin(tried, start.parts(tried)[0])
        taken = run.advance.nbytes(states, sums, start.block, np.int32(0), traced)
        if taken <= memory:
            return tried
        if width == 1:
            raise ValueError(f"a single member takes {taken:,} bytes, and memory is {memory:,}: give it more, or a smaller batch")
        width = max(min(width - 1, int(width * memory / taken)), 1)


def _macs(member: Member, state: Any, batch: Any, traced: Any) -> int | None:
    """The multiplications of a step; None where they cannot be counted, as with compressed leaves."""
    try:
        return tracing.count(member.step, state, batch, traced).macs
    except (TypeError, ValueError, NotImplementedError):
        return None


def _timed(start: Start, engine: Engine) -> tuple[float, float]:
    """Seconds that a step of one member takes on a device, and when its program was ready."""
    rows = start.parts(engine)[0]
    run, states, sums, traced = start.begin(engine, rows)
    jax.block_until_ready((states, sums, traced))
    steps = min(_TIMED_STEPS, start.length)

    def go(states, sums, steps):
        if engine.compiled:
            states, sums = run.advance(states, sums, start.block, np.int32(steps), traced)
        else:
            batch = jax.tree.map(lambda x: x[0], start.block)
            for _ in range(steps):
                states, sums = run.step(states, sums, batch, traced)
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
