"""Actors of a Ray cluster that train chunks of a population: hired while there is room, given work, replaced when they die.

Ray places them, carries functions and arrays to them, and says when one is gone. What is tried again, how often and by whom is
decided in `plan`. Where chunks may be pruned, actors ask at each rung, at a desk that the driver sees to while it waits. An actor
keeps what it compiled for as long as it lives. Nothing is trained twice at a time: an actor that does not answer any more is killed
before its chunk goes to another.
"""

import math
import os
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxopt_lab.search.cluster.desk import Desk
from jaxopt_lab.search.cluster.plan import Chunk, Row, after_death, environment, fitting, likeness, matched
from jaxopt_lab.search.cluster.worker import KEPT, Box, Worker, import_ray
from jaxopt_lab.search.elsewhere import Lost, Prune
from jaxopt_lab.search.engines import SETTINGS
from jaxopt_lab.search.trial import Result, Trial

__all__ = ["Pool", "Terms"]

# Seconds between looks at the cluster.
_LOOK = 1.0
# Every actor may wait at the desk at the same time.
_AT_THE_DESK = 100_000
# How many may fail to start in a row at least: a node may go just then.
_IN_VAIN = 3


class Terms(NamedTuple):
    """On what terms actors are hired; see `ray`."""

    least: int
    most: int | None
    need: Mapping[str, float]
    memory: int
    runtime_env: Mapping[str, Any]
    address: str | None
    init: Mapping[str, Any]
    patience: int
    timeout: float | None
    start: float


@dataclass(eq=False)
class _Actor:
    """An actor as the driver sees it: starting (no node yet), idle (awaited is None), or at work."""

    handle: Any
    awaited: Any
    since: float
    node: str | None = None
    process: int | None = None
    chunk: Chunk | None = None
    known: set[tuple[str, ...]] = field(default_factory=set)


class Pool:
    """The actors, and the chunks that they are to train: the `Hands` of a cluster.

    Attributes:
      deaths: how many actors died so far, for whatever reason.
    """

    def __init__(self, terms: Terms):
        self._terms, self._ray, self._ours = terms, None, False
        self._actors: list[_Actor] = []
        self._queue: deque[Chunk] = deque()
        self._boxes: list[tuple[Any, Box]] = []
        self._shared: Box | None = None
        self._job: tuple[Any, ...] | None = None
        self._prune: Prune | None = None
        # Its handle, and the question that is awaited.
        self._desk: tuple[Any, Any] | None = None
        self._nodes: list[Mapping[str, Any]] = []
        self._looked = self._worked = -math.inf
        self._in_vain, self._desks_in_vain, self._marks, self.deaths = 0, 0, 0, 0

    @property
    def workers(self) -> list[tuple[str, int]]:
        """The node and the process of each actor that has started."""
        return [(a.node, a.process) for a in tuple(self._actors) if a.node is not None and a.process is not None]

    @contextmanager
    def job(self, trial: Trial, batches: Any, run: Mapping[str, Any], prune: Prune | None = None) -> Iterator["Pool"]:
        """Takes chunks of this trial alone while the context is open; whoever is at work when it closes is dismissed.

        `prune` is asked, in `wait`, by label.
        """
        if self._job is not None:
            raise RuntimeError("these actors are at work for another population or sweep; open a second engine for this one")
        run = dict(run)
        self._job, self._prune = (trial, batches, run.pop("shared", None), run), prune
        try:
            yield self
        finally:
            self._job = self._shared = self._prune = None
            self._close_desk()
            self._queue.clear()
            for actor in [actor for actor in self._actors if actor.chunk is not None]:
                self._dismiss(actor)

    def start(self) -> None:
        """Connects to the cluster, or starts a private one."""
        if self._ray is not None:
            return
        ray, terms = import_ray(), self._terms
        connected = ray.is_initialized()
        if connected and terms.address not in (None, here := ray.get_runtime_context().gcs_address):
            raise RuntimeError(
                f"this process is connected to the Ray cluster {here}, and the engine's address is {terms.address!r}; leave the "
                "address out to use the connection, or call ray.shutdown() first"
            )
        if not connected:
            self._ours = True
            with _private(terms.address in (None, "local")) as options:
                ray.init(**{"address": terms.address or "local", **options, **terms.init})
        self._ray = ray
        self._look()

    def close(self) -> None:
        """Dismisses all actors, and stops the cluster if it is private."""
        if self._ray is None:
            return
        for actor in list(self._actors):
            self._dismiss(actor)
        self._boxes.clear()
        if self._ours:
            self._ray.shutdown()
        self._ray, self._ours = None, False

    def size(self) -> int:
        """How many actors there should be: as many as fit, within bounds."""
        fit = fitting([node["Resources"] for node in self._nodes], self._need) if self._nodes else 0
        return max(self._terms.least, fit if self._terms.most is None else min(fit, self._terms.most))

    def room(self) -> int:
        return max(self.size() - len(self._queue) - sum(actor.chunk is not None for actor in self._actors), 0)

    def submit(self, labels: Sequence[int], configs: Sequence[Any], numbers: Sequence[int]) -> None:
        self.start()
        self._queue.append(Chunk(tuple(map(Row, labels, configs, numbers))))
        self._hire()

    def wait(self) -> list[tuple[list[int], Result | Lost]]:
        before = self.room()
        self._worked = time.monotonic()
        while True:
            self._look()
            self._hire()
            self._hand_out()
            told = self._over()
            if told or self.room() > before:
                return told
            self._check_start()

    @property
    def _need(self) -> dict[str, float]:
        return {**self._terms.need, "memory": float(self._terms.memory)}

    def _look(self) -> None:
        """Looks which nodes there are, but not too often."""
        if time.monotonic() > self._looked + _LOOK:
            self._nodes = [node for node in self._ray.nodes() if node["Alive"]]
            self._looked = time.monotonic()

    def _hire(self) -> None:
        """Asks for as many actors as there is work for."""
        work = len(self._queue) + sum(actor.chunk is not None for actor in self._actors)
        for _ in range(min(self.size(), work) - len(self._actors)):
            handle = self._remote().remote()
            self._actors.append(_Actor(handle, handle.where.remote(), time.monotonic()))

    def _remote(self) -> Any:
        need, terms = dict(self._terms.need), self._terms
        cpus, gpus = need.pop("CPU"), need.pop("GPU")
        tpus = any(name.startswith("TPU") for name in need)
        variables = {**environment(cpus, gpus, tpus), **terms.runtime_env.get("env_vars", {})}
        return self._ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            resources=need or None,
            memory=terms.memory or None,
            # What is to be done about a death is for us to say.
            max_restarts=0,
            max_task_retries=0,
            runtime_env={**terms.runtime_env, "env_vars": variables},
        )(Worker)

    def _hand_out(self) -> None:
        """Gives the chunks that wait to those who are idle."""
        idle = {actor: actor.known for actor in self._actors if actor.awaited is None}
        pairs = matched(list(self._queue), idle)
        chunks = [self._queue[place] for place, _ in pairs]
        for _ in pairs:
            self._queue.popleft()
        # An actor takes them over.
        settings = {name: getattr(jax.config, name) for name in SETTINGS}
        if self._prune is not None and self._desk is None:
            self._open_desk()
        for chunk, (_, actor) in zip(chunks, pairs, strict=True):
            trial, batches, shared, run = self._job
            boxes = self._box(trial), self._box(batches)
            if shared is not None and self._shared is None:
                # For this job alone: its arrays may be written to before the next, and would fill the store.
                self._shared = self._put(jax.tree.map(_on_host, shared))
            desk = None if self._desk is None else self._desk[0]
            actor.awaited = actor.handle.train.remote(settings, *boxes, self._shared, run, chunk.rows, desk)
            actor.chunk, actor.since = chunk, time.monotonic()

    def _box(self, thing: Any) -> Box:
        """The thing in the object store, where each node fetches it once; what was put there before is found again."""
        found = next((pair for pair in self._boxes if _same(pair[0], thing)), None)
        if found is None:
            found = thing, self._put(thing)
        # Those that were used last stay.
        self._boxes = [*(pair for pair in self._boxes if pair is not found), found][-KEPT:]
        return found[1]

    def _put(self, thing: Any) -> Box:
        self._marks += 1
        return Box(self._marks, [self._ray.put(thing)])

    def _over(self) -> list[tuple[list[int], Result | Lost]]:
        """What is over by now, or within a second."""
        awaited = {actor.awaited: actor for actor in self._actors if actor.awaited is not None}
        if not awaited:
            time.sleep(_LOOK / 10)
            return []
        refs = [*awaited, *([] if self._desk is None else [self._desk[1]])]
        ready, _ = self._ray.wait(refs, num_returns=1, timeout=_LOOK)
        if ready:
            ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        # First the questions: who waits for an answer trains nothing.
        if self._desk is not None and self._desk[1] in ready:
            self._attend()
        told = [outcome for ref in ready if ref in awaited for outcome in self._heard(awaited[ref])]
        for actor in [actor for actor in self._actors if self._is_late(actor)]:
            told += self._died(actor, f"it took longer than {self._terms.timeout} s")
        return told

    def _open_desk(self) -> None:
        """On this node, so that it lives as long as the driver does."""
        here = self._ray.get_runtime_context().get_node_id()
        beside = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=True)
        options = {"num_cpus": 0, "max_concurrency": _AT_THE_DESK, "scheduling_strategy": beside}
        desk = self._ray.remote(**options, runtime_env=dict(self._terms.runtime_env))(Desk).remote()
        self._desk = desk, desk.next.remote()

    def _close_desk(self) -> None:
        desk, self._desk = self._desk, None
        if desk is not None:
            with suppress(Exception):
                self._ray.kill(desk[0], no_restart=True)

    def _attend(self) -> None:
        """Answers the questions that have come."""
        desk, questions = self._desk
        faults = self._ray.exceptions
        try:
            asked = self._ray.get(questions)
        except (faults.RayError, faults.RayTaskError) as error:
            # Who waits there is told of it, and counts as dead; the next chunks are given another one.
            self._close_desk()
            self._desks_in_vain += 1
            if self._desks_in_vain >= _IN_VAIN:
                why = _brief(f"{type(error).__name__}: {error}")
                raise RuntimeError(
                    f"{_IN_VAIN} desks in a row, where actors ask whom to prune, failed, the last since {why}"
                ) from error
            return
        self._desks_in_vain = 0
        for number, step, scores in asked:
            desk.answer.remote(number, list(self._prune(step, scores)))
            # Its time is counted from here on.
            for actor in self._actors:
                if actor.chunk is not None and any(row.label in scores for row in actor.chunk.rows):
                    actor.since = time.monotonic()
        self._desk = desk, desk.next.remote()

    def _is_late(self, actor: _Actor) -> bool:
        limit = self._terms.timeout
        return limit is not None and actor.chunk is not None and time.monotonic() > actor.since + limit

    def _heard(self, actor: _Actor) -> list[tuple[list[int], Result | Lost]]:
        """What an actor answered: that it is there, a result, or no more."""
        faults = self._ray.exceptions
        try:
            answer = self._ray.get(actor.awaited)
        except faults.RayTaskError as error:
            if isinstance(error.cause, faults.RaySystemError):
                why = _brief(str(error.cause).partition("traceback:")[0])
                raise RuntimeError(
                    f"an actor could not unpack what it was sent ({why}): what is of a module must be importable there; install "
                    'the module, or say runtime_env={"working_dir": "."}'
                ) from error
            # JAX's own errors while it runs are of the device and its memory, and may leave it unusable.
            if not isinstance(error.cause, (jax.errors.JaxRuntimeError, MemoryError, faults.RayError)):
                raise
            return self._died(actor, f"{type(error.cause).__name__}: {error.cause}")
        except faults.RayError as error:
            return self._died(actor, f"{type(error).__name__}: {error}")
        self._in_vain = 0
        chunk, actor.awaited, actor.chunk = actor.chunk, None, None
        if chunk is None:
            actor.node, actor.process = answer
            return []
        actor.known |= {likeness(row.config) for row in chunk.rows}
        return [([row.label for row in chunk.rows], answer)]

    def _died(self, actor: _Actor, cause: str) -> list[tuple[list[int], Result | Lost]]:
        """Sees to the chunk of an actor that is no more; what is to be tried again goes first."""
        chunk, node = actor.chunk, actor.node
        self._dismiss(actor)
        self.deaths += 1
        self._looked = -math.inf
        self._look()
        with_node = node is not None and node not in {each["NodeID"] for each in self._nodes}
        if chunk is not None:
            again = after_death(chunk, patience=self._terms.patience, with_node=with_node)
            self._queue.extendleft(reversed(again))
            labels = [row.label for row in chunk.rows]
            return [] if again else [(labels, Lost(f"actors died over it, the last since {_brief(cause)}"))]
        if not with_node:
            self._in_vain += 1
            if self._in_vain >= max(self._terms.patience, _IN_VAIN):
                raise RuntimeError(f"{self._in_vain} actors in a row did not start, the last since {_brief(cause)}")
        return []

    def _dismiss(self, actor: _Actor) -> None:
        self._actors.remove(actor)
        # It may be gone, and the cluster with it.
        with suppress(Exception):
            self._ray.kill(actor.handle, no_restart=True)

    def _check_start(self) -> None:
        """Refuses to wait for ever for a first actor."""
        if any(actor.node is not None for actor in self._actors):
            self._worked = time.monotonic()
        elif time.monotonic() > self._worked + self._terms.start:
            nodes = "; ".join(str({k: v for k, v in node["Resources"].items() if ":" not in k}) for node in self._nodes)
            need = {name: amount for name, amount in self._need.items() if amount}
            raise RuntimeError(
                f"no actor started within {self._terms.start} s; each needs {need}, and the nodes have {nodes or 'gone'}"
            )


@contextmanager
def _private(private: bool) -> Iterator[dict[str, Any]]:
    """The options of a cluster of one's own, which listens to this machine alone, and shows and reports nothing."""
    if not private:
        yield {}
        return
    from ray._private import ray_constants

    # Ray's switch for systems that ask the user about every open port: without it, it listens on all interfaces.
    name, reports = "ENABLE_RAY_CLUSTER", "RAY_USAGE_STATS_ENABLED"
    before, told = getattr(ray_constants, name, True), os.environ.get(reports)
    setattr(ray_constants, name, False)
    os.environ.setdefault(reports, "0")
    try:
        with warnings.catch_warnings():
            # JAX warns of every fork; these start other programs at once.
            warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
            yield {"include_dashboard": False, "log_to_driver": False}
    finally:
        setattr(ray_constants, name, before)
        if told is None:
            del os.environ[reports]


def _on_host(leaf: Any) -> Any:
    """A leaf as an array of numpy, which lies on a node once for all its actors; other leaves, and keys, as they are."""
    return np.asarray(leaf) if isinstance(leaf, jax.Array) and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf


def _same(one: Any, other: Any) -> bool:
    """Whether two are the same functions, or tuples of the same; a method is of the same object."""
    if isinstance(one, tuple) and type(one) is type(other) and len(one) == len(other):
        return all(map(_same, one, other))
    return one is other or (isinstance(one, MethodType) and one == other)


def _brief(cause: str) -> str:
    """A cause in one line."""
    line = " ".join(cause.split())
    return line if len(line) <= 400 else f"{line[:400]} ..."
