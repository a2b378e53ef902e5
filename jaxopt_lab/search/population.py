"""Many configurations trained side by side: one compiled program for all that share their shapes."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.data.blocks import block
from jaxopt_lab.search import saved
from jaxopt_lab.search.elsewhere import Elsewhere
from jaxopt_lab.search.engines import Engine, Programs, programs, replicated
from jaxopt_lab.search.grouping import group
from jaxopt_lab.search.pace import Start, bytes_of_memory, chosen, portions, split
from jaxopt_lab.search.record import Record, ranked
from jaxopt_lab.search.trial import Result, Trial, check_batches, check_shared, check_trial, check_typed_key

__all__ = ["population"]

_BLOCK, _BLOCK_BYTES = 128, 1 << 26
_IN_FLIGHT = 16


def population(
    trial: Trial,
    configs: Sequence[Any],
    *,
    key: Array,
    batches: Callable[[int], Any],
    steps: int,
    rungs: Sequence[int] = (),
    engine: Engine | Elsewhere | None = None,
    keep: int | None = None,
    maximize: bool = False,
    numbers: Sequence[int] | None = None,
    memory: int | None = None,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    static: Sequence[str] = (),
    shared: PyTree = None,
    prune: Callable[[int, Mapping[int, float]], Collection[int]] | None = None,
    save: str | Path | None = None,
) -> Result:
    """Trains every configuration for `steps` steps, all that share their shapes by one compiled program.

    The numbers of a configuration are traced, so that a hundred learning rates compile once; one that the program needs the value
    of (a width, or an argument that Optax looks at) makes a group of its own for each of its values. Member i starts from
    `fold_in(key, i)`, and all see the same batches, so that what becomes of a configuration does not depend on the others: a NaN
    stays its own.

    Args:
      trial: what is trained.
      configs: n trees of numbers, strings, booleans, None and arrays; `configs(space, sample(space, key, n))` draws some.
      key: a typed key.
      batches: `batches(step) -> batch`, the same for all; its method `stack(step, k)`, if it has one, gives k of them at once.
      steps: how many steps each takes.
      rungs: steps after which all are evaluated besides the last.
      engine: how they are run (`looped`, `scanned`, `vmapped`), or by whom (`ray`); None measures which is fastest for each group
        of shapes, and may choose otherwise, and so round otherwise, from run to run.
      keep: how many of the best states to return; None for all.
      maximize: whether the best score is the largest.
      numbers: n integers to fold into the key instead of 0 ... n - 1.
      memory: how many bytes on each device may be taken at once: by the states that are there, by `shared`, and by what their
        beginning, a step, an evaluation or the gathering of those that go on needs besides, whichever needs most. By default four
        fifths of an accelerator's own, and 2 GiB on a CPU. What does not fit is run in turns, their states in the host's memory
        when their turn is over, or narrower (`vmapped()`).
      devices: over which members are spread; the default device alone if None.
      static: paths of numbers that are part of the program even where they could be traced.
      shared: a tree of arrays that all configurations share, such as a data set or a teacher's parameters. Each function of the
        trial that has a parameter `shared` gets it, as an argument of its program, which lies on each device once; what a function
        closes over becomes a constant of every program instead, to be compiled and kept with it.
      prune: `(step, scores) -> indices`, which is asked after each rung, with the scores by index of those that are trained, which
        to train no further; the others move together, and the best is one of those that took every step. It is asked of those
        that are trained at the same time: of all, unless they are run in turns or elsewhere.
      save: a directory of this call's own in which its newest rung is kept. Killed, and made again, the call goes on from there, to
        the same bits where XLA compiles the same programs again (a CPU does; an accelerator measures which to take), and asks
        `prune` of no rung that is kept. Of a population that is trained elsewhere (`ray`) those who are through are kept, and the
        others begin anew, perhaps in other chunks, and so the same to rounding. The functions, and `shared`, must be the same,
        which is not checked; all else is. One process at a time.

    Returns:
      A `Result`: scores `[n]`, states, curves and the best.

    Raises:
      TypeError: the trial or a configuration is of another kind, the evaluation is no number, a leaf of `shared` is no array, or
        there is `shared` without a function that takes it, or the other way round.
      ValueError: no configuration, a rung that is not before the end, a step that changes its state's shapes, a float that cannot
        be traced with more than 16 values, a directory that another call has begun or whose file is damaged.

    >>> import optax
    >>> from jaxopt_lab.search.engines import scanned
    >>> def init(key, config):
    ...     return jnp.float32(0), optax.sgd(config["rate"]).init(jnp.float32(0))
    >>> def step(state, batch, config):
    ...     params, opt_state = state
    ...     loss, grad = jax.value_and_grad(lambda p: (p - batch["x"]) ** 2)(params)
    ...     updates, opt_state = optax.sgd(config["rate"]).update(grad, opt_state)
    ...     return (optax.apply_updates(params, updates), opt_state), {"loss": loss}
    >>> trial = Trial(init, step, lambda state: (state[0] - 3.0) ** 2)
    >>> configs = [{"rate": 0.01}, {"rate": 0.5}, {"rate": 2.0}]
    >>> result = population(trial, configs, key=jax.random.key(0), batches=lambda step: {"x": 3.0}, steps=4, engine=scanned())
    >>> result.best, result.scores.round(2).tolist()
    (1, [7.66, 0.0, 59049.0])
    """
    marks = check_rungs(rungs, steps)
    options: dict[str, Any] = {"engine": engine, "numbers": numbers, "memory": memory, "devices": devices, "static": static}
    options["shared"] = shared
    if isinstance(engine, Elsewhere):
        run = {"key": key, "batches": batches, "steps": steps, "rungs": rungs, "keep": keep, "maximize": maximize, **options}
        return engine.population(trial, configs, run, prune, save)
    decided = {"function": "population", "rungs": [*map(int, marks[:-1])], "prune": prune is not None}
    crew = Crew(trial, configs, key, batches, steps, save=save, decided=decided, moves=prune is not None, **options)
    record = Record(len(crew.configs))
    turns, order = crew.turns(), []
    for number, turn in enumerate(turns):
        members = Members(crew, record, turn, number)
        for mark in marks:
            members.advance(mark)
            members.evaluate()
            if prune is not None and mark != steps and not members.known:
                scores = record.scores(mark)
                dropped = prune(mark, {index: float(scores[index]) for index in members.alive})
                members.select({index: index for index in members.alive if index not in dropped})
            if not members.alive:
                break
        # What was pruned ended on fewer steps than the others.
        order = ranked(record.scores(None if prune is None else steps), maximize)
        members.hand_over(None if keep is None else set(order[:keep]), away=len(turns) > 1)
    return record.result(crew.configs, crew.names, order[0] if order else None)


def check_rungs(rungs: Sequence[int], steps: int) -> tuple[int, ...]:
    """The steps after which there is an evaluation: the rungs and the last."""
    if steps < 0:
        raise ValueError(f"steps must not be negative; got {steps}")
    if list(rungs) != sorted(set(rungs)) or any(not 0 < rung < steps for rung in rungs):
        raise ValueError(f"rungs must rise and lie between 0 and {steps} steps; got {tuple(rungs)}")
    return (*rungs, steps)


class Crew:
    """Who is to be trained, and how: the groups of a population, the engine of each, and the batches for all.

    Attributes:
      configs: the configurations.
      starts: the groups of equal shapes.
      engines: that of each group; `names` says which, and of how many.
      length: how many batches a block holds.
      memory: bytes on each device.
      shared: what all share, on the devices.
      directory: where the newest rung is kept, if anywhere.
    """

    def __init__(
        self,
        trial: Trial,
        configs: Sequence[Any],
        key: Array,
        batches: Callable[[int], Any],
        steps: int,
        *,
        engine: Engine | None = None,
        numbers: Sequence[int] | None = None,
        memory: int | None = None,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
        static: Sequence[str] = (),
        shared: PyTree = None,
        save: str | Path | None = None,
        decided: Mapping[str, Any] | None = None,
        moves: bool = True,
    ):
        # `decided` is what of the call besides decides what it comes to, by name; `moves` whether any are ever selected.
        check_trial(trial)
        check_typed_key(key)
        check_shared(trial, shared)
        if isinstance(engine, Elsewhere):
            raise TypeError(f"{engine} trains populations and sweeps; what compares its members as they train needs them here")
        if not len(configs):
            raise ValueError("there is no configuration to train")
        check_batches(batches)
        self.configs, self._batches = list(configs), batches
        devices = tuple(devices) if devices else (jnp.zeros(()).device,)
        asked = {**(decided or {}), "steps": int(steps), "engine": engine, "memory": memory, "devices": len(devices)}
        self.memory, self.shared = memory or bytes_of_memory(devices[0]), replicated(shared, devices)
        first = batches(0)
        self._ahead: tuple[int, Any] | None = (0, first)
        self.length = max(min(_BLOCK, _BLOCK_BYTES // max(_nbytes(first), 1), steps), 1)
        stacked, _ = self.stack(0, self.length)
        own = np.arange(len(configs)) if numbers is None else np.asarray(numbers)
        if own.shape != (len(configs),):
            raise ValueError(f"numbers must be one for each of {len(configs)} configurations; their shape is {own.shape}")
        groups = group(trial, configs, key, first, static=static, shared=self.shared)
        self.starts = [Start(each, key, own, stacked, self.length, steps, devices, self.shared, moves=moves) for each in groups]

        def choose() -> tuple[list[Engine], list[int]]:
            engines = [chosen(start, engine, self.memory) for start in self.starts]
            return engines, [start.working_bytes(each) for start, each in zip(self.starts, engines, strict=True)]

        self.directory = None
        if save is None:
            self.engines, self._working = choose()
        else:
            call = saved.fingerprint(asked, self.starts, self.configs, key, own.tolist(), first)
            self.directory = saved.opened(save, call, self.memory, choose)
            self.engines, self.memory, self._working = self.directory[2:]
        self.names = [f"{len(s.group.indices)} {e}" for s, e in zip(self.starts, self.engines, strict=True)]

    def everyone(self) -> list[tuple[int, np.ndarray]]:
        """All that are run together: the number of a group, and positions in it."""
        pairs = enumerate(zip(self.starts, self.engines, strict=True))
        return [(number, rows) for number, (start, engine) in pairs for rows in start.parts(engine)]

    def turns(self) -> list[list[tuple[int, np.ndarray]]]:
        """The same in turns, each of which memory holds all states of, and what the dearest of their calls or moves needs."""
        turns, taken, working, moved = [], 0, 0, {}
        for number, rows in self.everyone():
            start, needed = self.starts[number], self._working[number]
            # Those of all devices may be gathered on each.
            own, moving = start.member_bytes * len(rows) // len(start.devices), start.moved_bytes * len(rows)
            most = max(working, needed, moved.get(number, 0) + moving)
            if not turns or start.shared_bytes + taken + own + most > self.memory:
                turns.append([])
                taken, most, moved = 0, max(needed, moving), {}
            turns[-1].append((number, rows))
            taken, working, moved[number] = taken + own, most, moved.get(number, 0) + moving
        return turns

    def stack(self, at: int, count: int) -> tuple[Any, int]:
        """Batches from a step on, filled up to the length of a block, and how many of them count."""
        stacked, count, self._ahead = block(self._batches, at, count, self._ahead)
        missing = self.length - count
        return jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x, stacked), count


class _Part(NamedTuple):
    """Members that are run by one call: some of a group, filled up to the engine's width by repeating the last."""

    number: int  # of the group
    indices: np.ndarray  # [c], which configurations
    engine: Engine
    run: Programs
    states: PyTree  # [c, ...]
    sums: dict[str, Array]  # [c, ...]
    traced: tuple[Array, ...]  # [c, ...]


class Members:
    """Some of a crew in training, all at the same step.

    Where a rung is kept of them they begin there: up to it nothing is trained, evaluated or selected, since all is known.

    Attributes:
      at: how many steps were taken.
      alive: which configurations they are, ascending.
      known: whether what was decided after these steps is kept.
    """

    def __init__(self, crew: Crew, record: Record, turn: Sequence[tuple[int, np.ndarray]], which: int = 0):
        self.at, self._since, self._until = 0, 0, -1
        self._crew, self._record, self._which, self._unkept = crew, record, which, False
        self._all = sorted({int(index) for group, rows in turn for index in crew.starts[group].group.indices[rows]})
        self._seen = {0: self._all}
        kept = None if crew.directory is None else saved.read(crew.directory, which, self._all, crew.starts)
        self._parts = []
        if kept is not None:
            self._until = self._since = kept.at
            for at, row in kept.rows.items():
                seen = row["seen"]
                indices, metrics = np.array(self._all)[seen], {name: column[seen] for name, column in row["metrics"].items()}
                record.write(at, indices, row["scores"][seen], metrics)
                self._seen[at] = indices.tolist()
            self._parts = [_placed(crew.starts[part.number], part) for part in kept.parts]
            return
        for number, rows in turn:
            start, engine = crew.starts[number], crew.engines[number]
            self._parts.append(_Part(number, start.group.indices[rows], engine, *start.begin(engine, rows)))

    @property
    def known(self) -> bool:
        return self.at <= self._until

    @property
    def alive(self) -> list[int]:
        if self.at < self._until:
            return self._seen[self.at]
        return sorted({int(index) for part in self._parts for index in part.indices})

    def advance(self, until: int) -> None:
        """Trains all up to the step `until`."""
        if until <= self._until:
            self.at = until
            return
        self.keep()
        while self.at < until:
            stacked, count = self._crew.stack(self.at, min(self._crew.length, until - self.at))
            self._parts = [_advanced(part, stacked, count, self._crew.shared) for part in self._parts]
            self.at += count

    def evaluate(self) -> None:
        """Has the scores of all, and the means of their metrics, recorded."""
        if self.known:
            return
        for part in self._parts:
            scores, sums = jax.device_get((part.run.evaluate(part.states, part.traced, self._crew.shared), part.sums))
            means = {name: value / max(self.at - self._since, 1) for name, value in sums.items()}
            self._record.write(self.at, part.indices, scores, means)
        self._parts = [part._replace(sums=jax.tree.map(jnp.zeros_like, part.sums)) for part in self._parts]
        self._since, self._unkept = self.at, True

    def keep(self) -> None:
        """Keeps the newest rung, and who goes on from it: before they do, since then their states are no more."""
        if self._crew.directory is not None and self._unkept:
            parts = [saved.Together(part.number, part.indices, part.engine, part.traced, part.states) for part in self._parts]
            kept = saved.Kept(self.at, self._record.rows(self._all), parts)
            saved.write(self._crew.directory, self._which, self._all, kept)
        self._unkept = False

    def select(self, sources: Mapping[int, int], configs: Mapping[int, Any] | None = None) -> None:
        """Goes on with some members alone, each from its own state or from that of another of its group.

        Args:
          sources: by index, whose state it goes on from.
          configs: by index, those that change; what is part of the program must not.
        """
        if self.known:
            return
        parts, self._parts = self._parts, []
        while parts:
            # What is selected from is given away, or it would be there still when the last of it is.
            mine = [part for part in parts if part.number == parts[0].number]
            parts = [part for part in parts if part.number != parts[0].number]
            self._parts += self._selected(mine, sources, configs or {})

    def _selected(self, mine: list[_Part], sources: Mapping[int, int], configs: Mapping[int, Any]) -> list[_Part]:
        """Those of a group that go on; takes the list of the group's parts, and empties it."""
        start, number, engine = self._crew.starts[mine[0].number], mine[0].number, mine[0].engine
        at: dict[int, int] = {}
        for k, index in enumerate(np.concatenate([part.indices for part in mine]).tolist()):
            at.setdefault(index, k)
        wanted = [index for index in sorted(sources) if index in at]
        if not wanted:
            mine.clear()
            return []
        places = [at[index] for index in wanted]
        columns = [np.concatenate(each)[places] for each in zip(*(map(np.asarray, part.traced) for part in mine), strict=True)]
        for row, index in enumerate(wanted):
            if index in configs:
                for column, value in zip(columns, start.group.member.values(configs[index]), strict=True):
                    column[row] = value
        # Of a width that is a power of two, so that few programs are compiled however many are left.
        devices = len(start.devices)
        width = min(engine.width or 1, 1 << (-(-len(wanted) // devices) - 1).bit_length())
        engine = Engine(width, engine.compiled)
        run, calls = programs(start.group.member, engine, start.devices), split(len(wanted), devices, engine)
        taken = _moved(mine, [np.array([at[sources[wanted[row]]] for row in rows]) for rows in calls], run.place)
        return [
            _Part(
                number,
                np.array(wanted)[rows],
                engine,
                run,
                states,
                start.sums(run, len(rows)),
                jax.device_put(tuple(column[rows] for column in columns), run.place),
            )
            for rows, states in zip(calls, taken, strict=True)
        ]

    def hand_over(self, kept: set[int] | None, *, away: bool) -> None:
        """Gives the states to the record: those of the kept alone, and off the device where others need the room."""
        self.keep()
        states = self._record.states
        for part in self._parts:
            for row, index in reversed(list(enumerate(part.indices.tolist()))):
                states[index] = functools.partial(_row, part.states, row)
        if kept is not None:
            for index in set(states) - kept:
                del states[index]
        if away:
            for index, state in states.items():
                states[index] = functools.partial(lambda state: state, _stowed(state()))
            # Or they would be there still while the next are made.
            self._parts = []


def _placed(start: Start, kept: saved.Together) -> _Part:
    """Members that were kept, on their devices."""
    run = programs(start.group.member, kept.engine, start.devices)
    states, traced = jax.device_put((kept.states, kept.traced), run.place)
    return _Part(kept.number, kept.indices, kept.engine, run, states, start.sums(run, len(kept.indices)), traced)


def _advanced(part: _Part, stacked: Any, count: int, shared: PyTree) -> _Part:
    if part.engine.compiled:
        states, sums = part.run.advance(part.states, part.sums, stacked, np.int32(count), part.traced, shared)
        return part._replace(states=states, sums=sums)
    states, sums, step = part.states, part.sums, None
    for k in range(count):
        batch = jax.tree.map(lambda x: x[k], stacked)  # noqa: B023
        # They are all of one shape, which need not be looked at each time.
        step = step or part.run.step.compiled(states, sums, batch, part.traced, shared)
        states, sums = step(states, sums, batch, part.traced, shared)
        if k % _IN_FLIGHT == _IN_FLIGHT - 1:
            jax.block_until_ready(sums)
    return part._replace(states=states, sums=sums)


def _moved(parts: list[_Part], rows: Sequence[np.ndarray], place: Any) -> list[PyTree]:
    """The states at some rows of several parts, a tree for each of `rows`, on their devices.

    A portion of the arrays at a time, which then goes: the list of parts is emptied.
    """
    trees = [part.states for part in parts]
    parts.clear()
    treedef, old = jax.tree.structure(trees[0]), [jax.tree.leaves(tree) for tree in trees]
    trees.clear()
    new: list[dict[int, Array]] = [{} for _ in rows]
    for some in portions(old[0]):
        arrays = [[leaves[k] for k in some] for leaves in old]
        for leaves in old:
            leaves[some[0] : some[-1] + 1] = [None] * len(some)
        for each, own in zip(new, rows, strict=True):
            each.update(zip(some, jax.device_put(_taken(arrays, own), place), strict=True))
    return [jax.tree.unflatten(treedef, [each[k] for k in range(treedef.num_leaves)]) for each in new]


@jax.jit
def _taken(parts: Sequence[Sequence[Array]], rows: Array) -> list[Array]:
    """The rows of arrays that lie in several parts."""
    return [jnp.concatenate(leaves)[rows] for leaves in zip(*parts, strict=True)]


def _row(states: PyTree, row: int) -> PyTree:
    return jax.tree.map(lambda x: x[row], states)


def _stowed(state: PyTree) -> PyTree:
    """A state in the host's memory."""
    host = jax.local_devices(backend="cpu")[0]
    return jax.device_put(state, host)


def _nbytes(batch: Any) -> int:
    return sum(np.size(x) * np.dtype(jnp.result_type(x)).itemsize for x in jax.tree.leaves(batch))
