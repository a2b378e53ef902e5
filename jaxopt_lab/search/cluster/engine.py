"""Populations and sweeps on a Ray cluster: `engine=ray(...)`."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.search import saved
from jaxopt_lab.search.cluster.plan import Chunk, Row, dealt, fitting, gathered
from jaxopt_lab.search.cluster.pool import Pool, Terms
from jaxopt_lab.search.cluster.worker import import_ray
from jaxopt_lab.search.elsewhere import Elsewhere, Lost, Prune
from jaxopt_lab.search.engines import Engine, arrays
from jaxopt_lab.search.grouping import group
from jaxopt_lab.search.pace import Start
from jaxopt_lab.search.population import check_rungs
from jaxopt_lab.search.trial import Result, Trial, check_batches, check_shared, check_trial, check_typed_key

__all__ = ["Ray", "ray"]


class Ray(Elsewhere):
    """Actors of a Ray cluster that train populations, of `ray`.

    They are hired when they are first needed, and dismissed at the end of the call; as a context (`with ray(...) as engine:`) they
    stay for all calls in it, with what they compiled.

    Attributes:
      terms: on which they are hired.
    """

    def __init__(self, terms: Terms, inner: Engine | None, chunk: int | None):
        self.terms, self._inner, self._chunk = terms, inner, chunk
        self._pool: Pool | None = None

    def __str__(self) -> str:
        most = "as many as fit" if self.terms.most is None else self.terms.most
        return f"ray({self.terms.least} to {most} actors, {'measured' if self._inner is None else self._inner})"

    def __enter__(self) -> "Ray":
        if self._pool is not None:
            raise RuntimeError("this engine is open already; one `with` is enough")
        self._pool = Pool(self.terms)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    @property
    def workers(self) -> list[tuple[str, int]]:
        """The node and the process of each actor that has started, while the engine is open."""
        return [] if self._pool is None else self._pool.workers

    @property
    def deaths(self) -> int:
        """How many actors died since the engine was opened."""
        return 0 if self._pool is None else self._pool.deaths

    @contextmanager
    def hands(self, trial: Trial, run: dict[str, Any], prune: Prune | None = None) -> Iterator[Pool]:
        """Those who train a trial as `population(trial, configs, **run)` does, and ask here at each rung whom to give up."""
        check_trial(trial)
        check_typed_key(run["key"])
        run = {name: value for name, value in run.items() if name not in ("engine", "numbers")}
        if run.pop("devices", None) is not None:
            raise ValueError("devices are of this process, and ray(...) trains in others: leave them out, and say num_gpus to it")
        batches = run.pop("batches")
        pool = self._pool or Pool(self.terms)
        try:
            with pool.job(trial, batches, {**run, "engine": self._inner}, prune):
                yield pool
        finally:
            if pool is not self._pool:
                pool.close()

    def population(
        self, trial: Trial, configs: Sequence[Any], run: dict[str, Any], prune: Prune | None = None, save: str | Path | None = None
    ) -> Result:
        """As `population(trial, configs, prune=prune, save=save, **run)`.

        Configurations that actors die of come to NaN, and a warning says why; of these nothing is kept.
        """
        marks, own = check_rungs(run["rungs"], run["steps"]), run["numbers"]
        if not len(configs):
            raise ValueError("there is no configuration to train")
        numbers = list(range(len(configs)) if own is None else map(int, own))
        if len(numbers) != len(configs):
            raise ValueError(f"numbers must be one for each of {len(configs)} configurations; there are {len(numbers)}")
        parts: list[tuple[list[int], Result | Lost]] = []
        with self.hands(trial, run, prune) as pool:
            directory = None
            if save is not None:
                decided = {"rungs": [*map(int, marks[:-1])], "prune": prune is not None}
                directory, kept = self._kept(trial, configs, run, numbers, decided, save)
                parts += kept
            through = {label for labels, _ in parts for label in labels}
            rows = [Row(k, config, numbers[k]) for k, config in enumerate(configs) if k not in through]
            for chunk in self._dealt(rows, pool):
                pool.submit(*zip(*chunk.rows, strict=True))
            left = len(rows)
            while left:
                for labels, found in pool.wait():
                    if directory is not None and isinstance(found, Result):
                        saved.write_part(directory, labels, found)
                    parts.append((labels, found))
                    left -= len(labels)
        if given_up := [(labels, found.cause) for labels, found in parts if isinstance(found, Lost)]:
            labels = sorted(label for each, _ in given_up for label in each)
            warnings.warn(f"configurations {labels} were given up: {given_up[-1][1]}", RuntimeWarning, stacklevel=3)
        whole = None if prune is None else run["steps"]
        return gathered(configs, marks, parts, keep=run["keep"], maximize=run["maximize"], whole=whole)

    def _dealt(self, rows: list[Row], pool: Pool) -> list[Chunk]:
        if not rows:
            return []
        pool.start()
        return dealt(rows, pool.size() if self._chunk is None else -(-len(rows) // self._chunk))

    def _kept(
        self,
        trial: Trial,
        configs: Sequence[Any],
        run: dict[str, Any],
        numbers: list[int],
        decided: dict[str, Any],
        save: str | Path,
    ) -> tuple[saved.Directory, list[tuple[list[int], Result]]]:
        """The directory of a call, and what became of those who are through."""
        check_shared(trial, run["shared"])
        check_batches(run["batches"])
        key, first, shared, device = run["key"], run["batches"](0), arrays(run["shared"]), jnp.zeros(()).device
        # For the structure of their states alone: nothing is compiled here, so there may be as many programs as there are.
        block = jax.tree.map(lambda x: np.asarray(x)[None], first)
        groups = group(trial, configs, key, first, static=run["static"], most=None, shared=shared)
        starts = [Start(each, key, np.array(numbers), block, 1, run["steps"], (device,), shared) for each in groups]
        asked = {"function": f"population on {type(self).__name__}", **decided, "steps": int(run["steps"]), "engine": self._inner}
        asked |= {name: run[name] for name in ("memory", "keep", "maximize")}
        call = saved.fingerprint(asked, starts, configs, key, numbers, first)
        directory = saved.opened(save, call, 0, lambda: ([], []))
        return directory, saved.read_parts(directory, starts)


def ray(
    *,
    engine: Engine | None = None,
    chunk: int | None = None,
    least: int = 1,
    most: int | None = None,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    memory: int = 0,
    resources: Mapping[str, float] | None = None,
    environment: Mapping[str, str] | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    address: str | None = None,
    init: Mapping[str, Any] | None = None,
    patience: int = 3,
    timeout: float | None = None,
    start: float = 600.0,
) -> Ray:
    """An engine that trains on a Ray cluster: `sweep(..., engine=ray(...))`, or `population(...)`.

    Each actor takes a chunk of configurations at a time and trains it as `population` would here, with the same keys, to the same
    scores; it keeps what it compiled. A sweep asks for `together` trials for each actor, and tells of a chunk as soon as it is
    over. There are `least` actors, asked for whether there is room or not, so that a cluster that scales itself grows; beyond them
    as many as fit, up to `most`: nodes may join and leave at any time.

    An actor that dies is replaced, and its chunk tried again, as a whole and then in halves, until the configurations that kill
    their actors are alone and given up: such a trial of a sweep fails, its attribute "jaxopt_lab:cause" says why, and the rest goes
    on. What the trial's own functions raise is raised here, as it would be without Ray. If this process dies, its sweep goes on
    where it was, from the study's storage, by whoever calls `sweep` next; a population, in the same call made again, without those
    who are through where it has a directory to `save` them in.

    The trial's functions, and batches, travel to each node once, with the arrays that they close over, and `shared` once in each
    call (numpy arrays, and those of `shared`, lie there once for all its actors). Functions of a module are found by its name,
    which must be importable there: install it, or say `runtime_env={"working_dir": "."}`. This package must be installed there as
    well. Where actors take the GPUs of this very machine, start this process with JAX_PLATFORMS=cpu, or it takes most of the
    memory of one for itself.

    Args:
      engine: how each actor trains its chunk; None measures.
      chunk: how many configurations `population` gives to an actor at a time; None deals all out at once. A sweep goes by its
        `together`.
      least, most: how many actors; `most=None` for as many as fit.
      num_cpus, num_gpus: what an actor takes of its node; a fraction of a GPU is a fraction of its memory too. One that takes no
        accelerator stays on the CPU.
      memory: bytes of the host's memory that Ray is to set aside for an actor. (The memory of `population` is the device's.)
      resources: others that it takes, such as `{"TPU": 4}`.
      environment: variables of its environment, above those set by default (`NPROC`, `JAX_PLATFORMS`, `XLA_CLIENT_MEM_FRACTION`).
      runtime_env: more of its environment, as Ray has it.
      address: None for the connection that this process has, or else a private cluster on this machine, as "local" is, which
        listens to this machine alone; "auto" or "host:port" attach to one that runs. `RAY_ADDRESS` is not heeded.
      init: options of `ray.init`, such as `{"num_cpus": 8, "object_store_memory": 10**9}` of a private cluster.
      patience: how many actors a chunk may cost before it is tried in halves and, one alone, given up; and how many may fail to
        start in a row.
      timeout: for how many seconds an actor may be at a chunk, compilation included, before it is taken for dead; where it asks at
        rungs whom to prune, from one answer to the next.
      start: for how many seconds to wait for a first actor.

    Raises:
      ModuleNotFoundError: Ray is not installed.
      ValueError: a number out of range.

    >>> try:
    ...     print(ray(most=4, num_gpus=0.25))
    ... except ModuleNotFoundError:
    ...     print("ray(1 to 4 actors, measured)")
    ray(1 to 4 actors, measured)

    Source: Moritz et al., "Ray: a distributed framework for emerging AI applications", 2018.
    """
    if least < 1 or (most is not None and most < least):
        raise ValueError(f"least must be at least 1, and most no less; got {least} and {most}")
    if (chunk is not None and chunk < 1) or patience < 1:
        raise ValueError(f"chunk and patience must be at least 1; got {chunk} and {patience}")
    if (
        min(num_cpus, num_gpus, memory, *(resources or {}).values()) < 0
        or not start > 0
        or (timeout is not None and not timeout > 0)
    ):
        raise ValueError(
            "what an actor takes must not be negative, and start and timeout must be positive; got "
            f"num_cpus={num_cpus}, num_gpus={num_gpus}, memory={memory}, resources={resources}, start={start}, timeout={timeout}"
        )
    if num_gpus > 1 and num_gpus != int(num_gpus):
        raise ValueError(f"num_gpus must be a part of one GPU or a whole number of them; got {num_gpus}")
    if isinstance(engine, Elsewhere) or not isinstance(engine, Engine | None):
        raise TypeError(f"engine must be looped(), scanned(), vmapped() or None: how an actor trains; got {engine!r}")
    need = {"CPU": float(num_cpus), "GPU": float(num_gpus), **(resources or {})}
    fitting([], {**need, "memory": memory})
    import_ray()
    given = dict(runtime_env or {})
    given["env_vars"] = {**given.get("env_vars", {}), **(environment or {})}
    return Ray(Terms(least, most, need, memory, given, address, dict(init or {}), patience, timeout, start), engine, chunk)
