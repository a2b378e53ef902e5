"""A sweep: a study asked for many trials at once, trained as populations, and told; killed at any time, it goes on.

Who runs a trial is written to the trial, with a time until which that holds, and prolonged while it is trained. A trial whose time
is over, or whose process is no more on this machine, is taken over by the next process that comes by: with the same number, hence
with the same key and, the parameters being stored, to the same result. A result is told only of the parameters that are stored.

So several machines need nothing but a storage that all of them reach: a journal file on a shared file system (NFS 3 or later;
Optuna locks it), or the URL of a database. Each runs the same script, as many times as it likes; their clocks must agree to a part
of a lease. Under Slurm that is a job array, and an array after it that takes over what the first left:

    #!/bin/bash
    #SBATCH --array=0-15 --gres=gpu:1 --cpus-per-task=8 --time=04:00:00 --requeue
    srun python sweep.py    # open_study(space, "name", storage="/shared/sweep.log"), then sweep(study, space, trial, ...)

    first=$(sbatch --parsable sweep.sbatch) && sbatch --dependency=afterany:$first sweep.sbatch

Each process should be given a sampler with another seed, or none: of one seed, random ones ask for the same. Where a Ray cluster is
at hand, one process does, and hands its trials out: `engine=ray(address="auto")`.
"""

import math
import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.elsewhere import Elsewhere, Lost, Prune, relabelled
from jaxopt_lab.search.population import population
from jaxopt_lab.search.study import Asked, suggest, tell
from jaxopt_lab.search.trial import Result, Trial

if TYPE_CHECKING:
    import optuna

__all__ = ["sweep"]

_LEASE, _CAUSE = "jaxopt_lab:lease", "jaxopt_lab:cause"


def sweep(
    study: "optuna.Study",
    space: PyTree,
    trial: Trial,
    *,
    trials: int,
    together: int,
    key: Array,
    batches: Callable[[int], Any],
    steps: int,
    rungs: Sequence[int] = (),
    lease: float = 60.0,
    prune: bool = False,
    **options: Any,
) -> int:
    """Runs a study up to a number of trials, so many at a time by one compiled program.

    Any number of processes may run the same sweep on one storage, and any of them may be killed: a trial that was left behind is
    taken over once its lease is over, at once where its process ran on this machine. Member i of the population is the trial's
    number, `fold_in(key, number)`, so that a trial comes to the same whoever runs it. Scores at rungs are the trial's intermediate
    values; a configuration that diverged fails its trial alone.

    Args:
      study: of `open_study`; its storage is the record, its sampler chooses.
      space: what is suggested.
      trial, key, batches, steps, rungs: as for `population`.
      trials: how many the study is to have in all, those that failed among them. Processes that ask at the very same moment may
        come to a few more.
      together: how many to ask for at once. A sampler that learns, learns between.
      lease: for how many seconds a trial belongs to the process that asked for it, counted anew while it is trained.
      prune: whether the study's pruner is asked at each rung which trials to give up, of all that the storage knows: with
        `optuna.pruners.SuccessiveHalvingPruner` that is ASHA. What goes on moves together, on the device; on a cluster each actor
        asks this process when its trials come to a rung, and waits for no other actor.
      options: engine, memory, devices, static, shared, as for `population`; `engine=ray(...)` asks for `together` trials an actor.

    Returns:
      How many trials this process ran. Others that run elsewhere still may be unfinished.

    Raises:
      ValueError: a number out of range, a study of several objectives, pruning without rungs, or as for `population`.

    >>> import jax, jax.numpy as jnp, optuna
    >>> from jaxopt_lab.search.spaces import uniform
    >>> study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    >>> trial = Trial(lambda key, c: jnp.float32(1), lambda x, batch, c: (x - c["rate"] * x, {}), lambda x: x**2)
    >>> space, options = {"rate": uniform(0.0, 1.0)}, {"key": jax.random.key(0), "batches": lambda step: {}, "steps": 2}
    >>> sweep(study, space, trial, trials=5, together=3, **options), [t.state.name for t in study.trials]
    (5, ['COMPLETE', 'COMPLETE', 'COMPLETE', 'COMPLETE', 'COMPLETE'])

    Source: Li et al., "A system for massively parallel hyperparameter tuning", 2020 (ASHA).
    """
    if trials < 0 or together < 1 or not lease > 0:
        raise ValueError(f"trials must not be negative, together at least 1, lease positive; got {trials}, {together} and {lease}")
    if "save" in options:
        raise ValueError("a sweep goes on from its study's storage, and its populations have no directories; leave save out")
    if len(study.directions) != 1:
        raise ValueError(f"a population has one score, and the study {len(study.directions)} objectives")
    owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    maximize, engine = study.direction.name == "MAXIMIZE", options.get("engine")
    run = {"key": key, "batches": batches, "steps": steps, "rungs": rungs, "keep": 0, "maximize": maximize, **options}
    if prune and not rungs:
        raise ValueError("prune asks at rungs, and there are none; give rungs")
    flying: dict[int, Asked] = {}
    pruned: set[int] = set()
    asked = partial(_given_up, flying, pruned) if prune else None
    ran = 0
    with (
        engine.hands(trial, run, asked) if isinstance(engine, Elsewhere) else nullcontext(_Here(trial, run, asked)) as hands,
        _held(study, flying, owner, lease),
    ):
        while True:
            while hands.room() and (taken := _taken(study, space, trials, together, owner, lease, flying)):
                hands.submit(list(taken), [each.config for each in taken.values()], list(taken))
            if not flying:
                return ran
            for numbers, found in hands.wait():
                for row, number in enumerate(numbers):
                    each = flying.pop(number)
                    if _as_stored(each):
                        _finish(study, each, found, row, number in pruned)
                        ran += 1
                        continue
                    pruned.discard(number)
                    _give_back(each, owner)


class _Here:
    """One population at a time, trained in this process when it is waited for."""

    def __init__(self, trial: Trial, run: dict[str, Any], prune: Prune | None):
        self._trial, self._run, self._prune = trial, run, prune
        self._given: tuple[Sequence[int], Sequence[Any], Sequence[int]] | None = None

    def room(self) -> int:
        return int(self._given is None)

    def submit(self, labels: Sequence[int], configs: Sequence[Any], numbers: Sequence[int]) -> None:
        self._given = labels, configs, numbers

    def wait(self) -> list[tuple[list[int], Result | Lost]]:
        assert self._given is not None
        labels, configs, numbers = self._given
        self._given = None
        prune = relabelled(self._prune, labels)
        return [(list(labels), population(self._trial, configs, numbers=numbers, prune=prune, **self._run))]


def _given_up(flying: Mapping[int, Asked], pruned: set[int], step: int, scores: Mapping[int, float]) -> list[int]:
    """Which trials go no further: what diverged, what another process has changed or finished, and what its pruner gives up.

    The last come into `pruned`.
    """
    ended = []
    for number, score in scores.items():
        # One that is trained again, where it was trained having died, was asked about before; or it is over.
        if math.isnan(score) or number in pruned or number not in flying or not _as_stored(flying[number]):
            ended.append(number)
            continue
        trial = flying[number].trial
        try:
            _report(trial, score, step)
        except _finished():
            ended.append(number)
            continue
        if trial.should_prune():
            pruned.add(number)
            ended.append(number)
    return ended


def _report(trial: "optuna.Trial", score: float, step: int) -> None:
    with warnings.catch_warnings():
        # A trial that was taken over may have got there before.
        warnings.filterwarnings("ignore", "The reported value is ignored", UserWarning)
        if not math.isnan(score):
            trial.report(score, step)


def _taken(
    study: "optuna.Study", space: PyTree, trials: int, together: int, owner: str, lease: float, flying: dict[int, Asked]
) -> dict[int, Asked]:
    """Trials to run now: those that were left behind, and new ones while the study is to have more; `flying` has them too."""
    import optuna

    known = study.get_trials(deepcopy=False)
    running = [each for each in known if each.state == optuna.trial.TrialState.RUNNING and each.number not in flying]
    left = [each for each in running if _left(each, owner, lease)][:together]
    waiting = sum(each.state == optuna.trial.TrialState.WAITING for each in known)
    new = min(together - len(left), max(trials - len(known), 0) + waiting)
    asked = {}
    for k in range(len(left) + new):
        # Suggestions take their time, and other processes ask too.
        if k >= len(left) + max(waiting, 1) and len(study.get_trials(deepcopy=False)) >= trials:
            break
        # Taken over by its number in the storage; what it had been suggested stays, and the rest is suggested now.
        each = optuna.trial.Trial(study, left[k]._trial_id) if k < len(left) else study.ask()
        each.set_user_attr(_LEASE, [owner, time.time() + lease])
        # Suggesting may take long, and the lease is to be prolonged meanwhile.
        flying[each.number] = Asked(each, {})
        flying[each.number] = asked[each.number] = Asked(each, suggest(each, space))
    return asked


def _as_stored(asked: Asked) -> bool:
    """Whether what was trained is what the storage has.

    It is not where a process is held up for longer than a lease while it suggests, between one parameter and the next: then
    another takes the trial over and suggests the rest as well.
    """
    stored = asked.trial.storage.get_trial(asked.trial._trial_id)
    if stored.params.keys() != asked.trial.params.keys():
        return False
    # As a storage holds them: a database rounds, and a choice that is not a number equals nothing.
    pairs = ((each, stored.params[name], asked.trial.params[name]) for name, each in stored.distributions.items())
    return all(each.to_internal_repr(one) == each.to_internal_repr(other) for each, one, other in pairs)


def _give_back(asked: Asked, owner: str) -> None:
    """To be trained as it is stored, by whoever comes by; unless somebody does already."""
    with suppress(_finished()):
        if asked.trial.storage.get_trial(asked.trial._trial_id).user_attrs[_LEASE][0] == owner:
            asked.trial.set_user_attr(_LEASE, [owner, 0.0])


def _finished() -> type[Exception]:
    """What Optuna raises where another process has finished a trial."""
    from optuna.exceptions import UpdateFinishedTrialError

    return UpdateFinishedTrialError


def _left(trial: "optuna.trial.FrozenTrial", owner: str, lease: float) -> bool:
    """Whether nobody runs a trial any more."""
    held = trial.user_attrs.get(_LEASE)
    if held is None:
        begun = trial.datetime_start
        return begun is not None and time.time() > begun.timestamp() + lease
    holder, until = held
    host, process, _ = holder.rsplit(":", 2)
    if holder != owner and host == owner.rsplit(":", 2)[0] and not _runs(int(process)):
        return True
    return holder == owner or time.time() > until


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _held(study: "optuna.Study", flying: dict[int, Asked], owner: str, lease: float) -> Iterator[None]:
    """Prolongs the leases of the trials that are trained, from a thread of its own; after an error it gives them up."""
    over = threading.Event()

    def until(when: float) -> None:
        for each in tuple(flying.values()):
            # One that another process has taken over may be finished.
            with suppress(_finished()):
                each.trial.set_user_attr(_LEASE, [owner, when])

    def prolong() -> None:
        while not over.wait(lease / 3):
            until(time.time() + lease)

    thread = threading.Thread(target=prolong, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        over.set()
        thread.join()
        # The storage may be what failed.
        with suppress(Exception):
            until(0.0)
        raise
    finally:
        over.set()
        thread.join()


def _finish(study: "optuna.Study", asked: Asked, found: Result | Lost, row: int, pruned: bool) -> None:
    """Tells the study of a trial, unless another process, which had taken it over, was faster."""
    import optuna

    try:
        if isinstance(found, Lost):
            asked.trial.set_user_attr(_CAUSE, found.cause)
            tell(study, asked.trial, math.nan)
            return
        if pruned:
            study.tell(asked.trial, state=optuna.trial.TrialState.PRUNED)
            return
        curve = found.curves[row]
        for step, score in zip(found.evaluated[:-1], curve[:-1], strict=True):
            _report(asked.trial, float(score), step)
        tell(study, asked.trial, curve[-1])
    except (_finished(), ValueError):
        if not study.get_trials(deepcopy=False)[asked.trial.number].state.is_finished():
            raise
