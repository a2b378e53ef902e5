"""What the actors of a cluster are given, and what becomes of it when they die: plain functions, without Ray."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxopt_lab.search.elsewhere import Lost
from jaxopt_lab.search.record import Record, ranked
from jaxopt_lab.search.trial import Result

__all__ = ["Chunk", "Row", "after_death", "dealt", "environment", "fitting", "gathered", "likeness", "matched"]

# A node that leaves is no fault of the chunk that it ran, unless it happens over and over.
_LOSSES = 16
# As much of its share of a GPU as XLA leaves to others by default, roughly: contexts and libraries take memory besides.
_SHARE = 0.9

A = TypeVar("A", bound=Hashable)


class Row(NamedTuple):
    """One configuration to train.

    Attributes:
      label: what the caller knows it by.
      config: the configuration.
      number: what it folds into the key.
    """

    label: int
    config: Any
    number: int


class Chunk(NamedTuple):
    """Configurations that one actor trains together.

    Attributes:
      rows: which.
      deaths: how many actors died over it.
      losses: how many went with their node.
    """

    rows: tuple[Row, ...]
    deaths: int = 0
    losses: int = 0


def likeness(config: Any) -> tuple[str, ...]:
    """What of a configuration is part of its program at least: configurations that differ in it compile apart.

    Whole numbers are counted in (a width is one), though many of them are traced.

    >>> likeness({"rate": 0.1, "depth": 2, "optimizer": "adam"})
    ('2', "'adam'", '-')
    """
    leaves = jax.tree.leaves(config, is_leaf=lambda node: node is None)
    fixed = [leaf for leaf in leaves if leaf is None or isinstance(leaf, (bool, int, str, np.integer))]
    # A dash for each of the others, so that trees of other leaves differ.
    return (*(repr(leaf) for leaf in fixed), "-" * (len(leaves) - len(fixed)))


def dealt(rows: Sequence[Row], chunks: int) -> list[Chunk]:
    """Rows in so many chunks of nearly one size, those that share a program together, so that few are compiled more than once.

    >>> rows = [Row(k, {"activation": name}, k) for k, name in enumerate(["relu", "tanh", "relu", "tanh", "relu"])]
    >>> [[row.label for row in chunk.rows] for chunk in dealt(rows, 2)]
    [[0, 2], [4, 1, 3]]
    """
    chunks = min(max(chunks, 1), len(rows))
    alike = sorted(rows, key=lambda row: likeness(row.config))
    edges = [len(rows) * k // chunks for k in range(chunks + 1)]
    return [Chunk(tuple(alike[begin:end])) for begin, end in pairwise(edges)]


def after_death(chunk: Chunk, *, patience: int, with_node: bool = False) -> list[Chunk]:
    """What is still tried of a chunk whose actor died; nothing once it is to be given up.

    It is tried again as a whole until it has cost `patience` actors, for most often it is not at fault. Then its halves are tried,
    each once, and their halves: half the members take half the memory, and one that kills whoever touches it is soon alone. With n
    members of which one kills, `patience + log2(n)` actors die, and the others are trained.

    Args:
      chunk: as it was given to the actor.
      patience: how many actors it may cost.
      with_node: whether the node is gone too; that is counted apart, up to 16 times.

    >>> chunk = Chunk(tuple(Row(k, {}, k) for k in range(3)), deaths=1)
    >>> [(len(each.rows), each.deaths) for each in after_death(chunk, patience=3)]
    [(3, 2)]
    >>> [(len(each.rows), each.deaths) for each in after_death(chunk, patience=2)]
    [(1, 1), (2, 1)]
    >>> after_death(Chunk(chunk.rows[:1], deaths=1), patience=2)
    []
    """
    if with_node and chunk.losses + 1 < _LOSSES:
        return [chunk._replace(losses=chunk.losses + 1)]
    deaths = chunk.deaths + 1
    if deaths < patience:
        return [chunk._replace(deaths=deaths)]
    middle = len(chunk.rows) // 2
    if not middle:
        return []
    return [Chunk(rows, patience - 1, chunk.losses) for rows in (chunk.rows[:middle], chunk.rows[middle:])]


def matched(queue: Sequence[Chunk], idle: Mapping[A, Iterable[tuple[str, ...]]]) -> list[tuple[int, A]]:
    """Which chunk goes to which idle actor: the first in the queue choose first, the actor that has most of their programs.

    Args:
      queue: the chunks that wait.
      idle: of each idle actor, the likenesses of what it has trained.

    Returns:
      Pairs of a position in the queue and an actor.

    >>> queue = [Chunk((Row(0, {"activation": name}, 0),)) for name in ("relu", "tanh", "relu")]
    >>> matched(queue, {"a": [("'tanh'", "")], "b": [("'relu'", "")]})
    [(0, 'b'), (1, 'a')]
    """
    left = {actor: set(known) for actor, known in idle.items()}
    pairs = []
    for place, chunk in enumerate(queue[: len(left)]):
        needed = {likeness(row.config) for row in chunk.rows}
        actor = max(left, key=lambda actor: len(needed & left[actor]))
        del left[actor]
        pairs.append((place, actor))
    return pairs


def fitting(nodes: Iterable[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """How many actors find room on some nodes, each actor on one.

    Args:
      nodes: what each node has of each resource in all.
      need: what an actor takes; what it takes nothing of does not count.

    >>> fitting([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 2.0}], {"CPU": 1.0, "GPU": 0.25})
    4
    """
    asked = {name: amount for name, amount in need.items() if amount > 0}
    if not asked:
        raise ValueError("an actor that takes nothing fits any number of times; give it num_cpus, num_gpus, memory or resources")
    return sum(min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in asked.items()) for node in nodes)


def environment(num_cpus: float, num_gpus: float, tpus: bool = False) -> dict[str, str]:
    """The environment of an actor, which JAX reads when it is imported.

    Its pools have a thread for each of its CPUs, not of the machine's. Without an accelerator it stays on the CPU, whatever the
    machine has; with a part of a GPU it takes that part of the memory.

    Args:
      num_cpus, num_gpus: what it takes of them.
      tpus: whether it takes TPUs.

    >>> environment(2, 0.25)
    {'NPROC': '2', 'JAX_PLATFORMS': '', 'XLA_CLIENT_MEM_FRACTION': '0.225', 'XLA_PYTHON_CLIENT_MEM_FRACTION': ''}
    >>> environment(1, 0)
    {'NPROC': '1', 'JAX_PLATFORMS': 'cpu'}
    """
    # Empty is as good as unset, and hides what the node's own environment says.
    variables = {"NPROC": str(max(math.ceil(num_cpus), 1)), "JAX_PLATFORMS": "" if num_gpus or tpus else "cpu"}
    if 0 < num_gpus < 1:
        # Both names of it: XLA refuses to find two set.
        variables |= {"XLA_CLIENT_MEM_FRACTION": f"{_SHARE * num_gpus:.3f}", "XLA_PYTHON_CLIENT_MEM_FRACTION": ""}
    return variables


def gathered(
    configs: Sequence[Any],
    marks: Sequence[int],
    parts: Iterable[tuple[Sequence[int], Result | Lost]],
    *,
    keep: int | None,
    maximize: bool,
    whole: int | None = None,
) -> Result:
    """The result of a population of which several trained some each; NaN for those that were given up.

    Args:
      configs: all configurations.
      marks: the steps after which they were evaluated.
      parts: for each part, the positions of its members, and what became of them.
      keep, maximize: as for `population`.
      whole: after how many steps those were evaluated that may be best; None for each member's last.

    >>> part = Result(np.array([4.0]), [np.float32(2)], (), np.array([[4.0]]), (5,), {}, 0, ("1 scanned",))
    >>> found = gathered([{}, {}], (5,), [([1], part), ([0], Lost("it is gone"))], keep=1, maximize=False)
    >>> found.scores.tolist(), found.best, float(found.states[1]), found.engines
    ([nan, 4.0], 1, 2.0, ('1 scanned',))
    """
    record, engines = Record(len(configs)), []
    for mark in marks:
        record.write(mark, np.arange(0), np.zeros(0), {})
    for labels, found in parts:
        if isinstance(found, Lost):
            continue
        indices = np.array(labels)
        for k, mark in enumerate(found.evaluated):
            # Who was pruned before has a score all the same, and none here; who diverged has none.
            there = ~np.isnan(found.curves[:, k]) | np.isnan(found.scores)
            metrics = {name: value[there, k] for name, value in found.metrics.items()}
            record.write(mark, indices[there], found.curves[there, k], metrics)
        states = zip(labels, found.states, strict=True)
        record.states |= {label: partial(jax.device_put, state) for label, state in states if state is not None}
        engines += found.engines
    order = ranked(record.scores(whole), maximize)
    if keep is not None:
        for label in set(record.states) - set(order[:keep]):
            del record.states[label]
    return record.result(configs, engines, order[0] if order else None)
