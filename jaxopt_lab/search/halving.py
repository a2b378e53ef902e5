"""Successive halving and Hyperband: the worse part of a population is dropped at each rung, and what is left goes on."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.population import Crew, Members, check_rungs
from jaxopt_lab.search.record import Record, ranked
from jaxopt_lab.search.spaces import configs as drawn_configs
from jaxopt_lab.search.spaces import sample
from jaxopt_lab.search.trial import Result, Trial

__all__ = ["Hyperband", "halving_rungs", "hyperband", "successive_halving"]


def halving_rungs(n: int, steps: int, factor: float = 3.0, least: int = 1) -> tuple[int, ...]:
    r"""The rungs of successive halving: every survivor of a rung takes `factor` times as many steps to the next.

    .. math:: r_k = \lfloor T \eta^{k - K} \rfloor, \quad K = \lfloor \min(\log_\eta n, \log_\eta (T / r_{min})) \rfloor

    Args:
      n: how many start.
      steps: T, which the last ones take.
      factor: :math:`\eta`, above 1.
      least: :math:`r_{min}`, the fewest steps before anything is dropped.

    Returns:
      The K steps before T after which some are dropped.

    Raises:
      ValueError: the factor is not above 1, or `least` is not in `[1, steps]`.

    >>> halving_rungs(27, 900)
    (33, 100, 300)
    """
    if not factor > 1:
        raise ValueError(f"factor must be above 1; got {factor}")
    if not 1 <= least <= max(steps, 1):
        raise ValueError(f"least must lie between 1 and {steps} steps; got {least}")
    # The logarithm of a power is a whole number only to rounding.
    count = math.floor(min(math.log(max(n, 1), factor), math.log(max(steps, 1) / least, factor)) + 1e-9)
    rungs = [math.floor(steps * factor ** (k - count) + 1e-9) for k in range(count)]
    return tuple(sorted({rung for rung in rungs if 0 < rung < steps}))


def successive_halving(
    trial: Trial,
    configs: Sequence[Any],
    *,
    key: Array,
    batches: Callable[[int], Any],
    steps: int,
    factor: float = 3.0,
    least: int = 1,
    rungs: Sequence[int] | None = None,
    survivors: Sequence[int] | None = None,
    keep: int | None = 1,
    maximize: bool = False,
    **options: Any,
) -> Result:
    r"""Trains many configurations for a few steps, and ever fewer for ever longer.

    At each rung the best :math:`\lceil n_k / \eta \rceil` of the :math:`n_k` that are left go on, from where they are; those that
    diverged never do. The survivors move together into a narrower program, on the device.

    Where one evaluation is noisier than the best lie apart, a drop late often takes the winner, and one early does not: what is
    hopeless shows soon. There `rungs` and `survivors` that drop most in the first few steps, and few later, find it more often for
    the same work. Of 80 sweeps of 64 perceptrons, at a quarter of the work, `rungs=(25, 50, 200)` of 400 with factor 2 ended within
    1 % of the best loss in 60, and `rungs=(5, 20, 100, 200), survivors=(32, 20, 16, 12)` in 68: in 36 of the 40 on which it was
    chosen, and in 32 of the others (30 each by the former).

    Args:
      trial, configs, key, batches, steps, maximize: as for `population`; `steps` is what the last ones take.
      factor: :math:`\eta`: one in so many goes on.
      least: the fewest steps before anything is dropped.
      rungs: the steps after which some are dropped; None for those of `halving_rungs`.
      survivors: how many go on at most from each rung, instead of one in `factor`.
      keep: how many of the best states to return; None for all that took every step.
      options: engine, memory, devices, static, shared, save, as for `population`. All states that are alive must fit into memory.

    Returns:
      A `Result`; `curves` is NaN where a configuration had been dropped, and `best` is among those that took every step.

    Raises:
      ValueError: as for `population` and `halving_rungs`; survivors that are not one positive number for each rung, or that rise.

    >>> import jax.numpy as jnp
    >>> trial = Trial(lambda key, c: jnp.float32(1), lambda x, batch, c: (x - c["rate"] * x, {}), lambda x: x**2)
    >>> configs = [{"rate": 0.2 * k} for k in range(9)]
    >>> result = successive_halving(trial, configs, key=jax.random.key(0), batches=lambda step: {}, steps=9)
    >>> result.best, result.evaluated, (~jnp.isnan(result.curves)).sum(axis=0).tolist()
    (5, (1, 3, 9), [9, 3, 1])
    >>> options = {"key": jax.random.key(0), "batches": lambda step: {}, "steps": 9, "rungs": (1, 4), "survivors": (3, 2)}
    >>> (~jnp.isnan(successive_halving(trial, configs, **options).curves)).sum(axis=0).tolist()
    [9, 3, 2]

    Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", 2016.
    """
    marks = check_rungs(halving_rungs(len(configs), steps, factor, least) if rungs is None else rungs, steps)
    if not factor > 1:
        raise ValueError(f"factor must be above 1; got {factor}")
    counts = None if survivors is None else _check_survivors(survivors, marks[:-1])
    decided = {"function": "successive_halving", "rungs": [*map(int, marks[:-1])], "factor": float(factor), "maximize": maximize}
    # Only where there are any, so that what was begun without goes on.
    decided |= {} if counts is None else {"survivors": counts}
    crew = Crew(trial, configs, key, batches, steps, decided=decided, **options)
    record = Record(len(crew.configs))
    members = Members(crew, record, crew.everyone())
    for place, mark in enumerate(marks):
        members.advance(mark)
        members.evaluate()
        order = ranked(record.scores(mark), maximize)
        if mark != steps:
            if not order:
                break
            most = math.ceil(len(members.alive) / factor) if counts is None else counts[place]
            members.select({i: i for i in order[:most]})
    members.hand_over(None if keep is None else set(order[:keep]), away=False)
    return record.result(crew.configs, crew.names, order[0] if order else None)


def _check_survivors(survivors: Sequence[int], rungs: Sequence[int]) -> list[int]:
    """How many go on from each rung, as whole numbers."""
    counts = [*map(int, survivors)]
    if len(counts) != len(rungs) or counts != list(survivors) or min(counts, default=1) < 1 or counts != sorted(counts)[::-1]:
        raise ValueError(
            f"survivors must be one whole number for each of the rungs {tuple(rungs)}, at least 1, and none above the one before; "
            f"got {tuple(survivors)}"
        )
    return counts


class Hyperband(NamedTuple):
    """What `hyperband` found.

    Attributes:
      brackets: the result of each bracket, the most daring first.
      config: the best configuration.
      score: its score.
      state: its state.
    """

    brackets: tuple[Result, ...]
    config: Any
    score: float
    state: PyTree


def hyperband(
    trial: Trial,
    space: PyTree,
    *,
    key: Array,
    batches: Callable[[int], Any],
    steps: int,
    factor: float = 3.0,
    least: int = 1,
    maximize: bool = False,
    save: str | Path | None = None,
    **options: Any,
) -> Hyperband:
    r"""Successive halving at every trade-off between many configurations and many steps, each for about the same work.

    With :math:`s_{max} = \lfloor \log_\eta (R / r_{min}) \rfloor`, the bracket :math:`s = s_{max}, ..., 0` starts
    :math:`\lceil (s_{max} + 1) \, \eta^s / (s + 1) \rceil` configurations at :math:`R \eta^{-s}` steps.

    Args:
      trial, key, batches, maximize, options: as for `successive_halving`.
      space: what configurations are drawn from.
      steps: R, the most that any configuration takes.
      factor: :math:`\eta`.
      least: :math:`r_{min}`.
      save: as for `population`; each bracket has a directory of its own in it, `bracket-S`.

    Raises:
      ValueError: as for `successive_halving`, or every configuration diverged.

    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.search.spaces import uniform
    >>> trial = Trial(lambda key, c: jnp.float32(1), lambda x, batch, c: (x - c["rate"] * x, {}), lambda x: x**2)
    >>> found = hyperband(trial, {"rate": uniform(0.0, 2.0)}, key=jax.random.key(0), batches=lambda step: {}, steps=9)
    >>> [len(bracket.scores) for bracket in found.brackets], found.score < 1e-3
    ([9, 5, 3], True)

    Source: Li et al., "Hyperband: a novel bandit-based approach to hyperparameter optimization", 2018.
    """
    halving_rungs(1, steps, factor, least)
    most = math.floor(math.log(steps / least, factor) + 1e-9)
    brackets = []
    for s in range(most, -1, -1):
        draw, train = jax.random.split(jax.random.fold_in(key, s))
        count = math.ceil((most + 1) * factor**s / (s + 1) - 1e-9)
        drawn = drawn_configs(space, sample(space, draw, count))
        rungs = halving_rungs(round(factor**s), steps, factor, least)
        own = {**options, "save": None if save is None else Path(save) / f"bracket-{s}"}
        brackets.append(
            successive_halving(
                trial,
                drawn,
                key=train,
                batches=batches,
                steps=steps,
                factor=factor,
                rungs=rungs,
                survivors=None,
                maximize=maximize,
                **own,
            )
        )
    scores = np.array([np.nan if result.best is None else result.scores[result.best] for result in brackets])
    order = ranked(scores, maximize)
    if not order:
        raise ValueError("every configuration of every bracket diverged; narrow the space")
    best = brackets[order[0]]
    assert best.best is not None
    return Hyperband(tuple(brackets), best.configs[best.best], float(scores[order[0]]), best.states[best.best])
