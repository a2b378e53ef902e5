"""A trial is three pure functions of a configuration; what a population of them comes to."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Array, PyTree

__all__ = ["Result", "Trial", "scalar_score"]


class Trial(NamedTuple):
    """How one configuration is trained: three pure functions.

    Attributes:
      init: `(key, config) -> state`, any tree of arrays.
      step: `(state, batch, config) -> (state, metrics)`; metrics is a dict of arrays, and may be empty. A step of
        `train.make_step` becomes one by building the chain from the configuration inside of it.
      evaluate: `state -> scalar`, or `(state, config) -> scalar`, which a population is ranked by.

    Each may have a last parameter `shared` besides: `step(state, batch, config, shared)`. It is what `population(..., shared=)` was
    given: a data set, the parameters of a teacher. What a function closes over is written into every program instead.
    """

    init: Callable[[Array, Any], PyTree]
    step: Callable[[PyTree, Any, Any], tuple[PyTree, dict[str, Array]]]
    evaluate: Callable[..., Any]


class Result(NamedTuple):
    """What became of a population.

    Attributes:
      scores: `[n]`, the last evaluation of each configuration, float; NaN where it diverged.
      states: n states, of those that were kept; None for the others. Sliced out of the population when they are read.
      configs: the n configurations.
      curves: `[n, e]`, the score at each of the steps in `evaluated`; NaN where a configuration was no longer trained.
      evaluated: the e steps after which all that were alive were evaluated.
      metrics: `[n, e]` by name, the mean of each of the step's metrics since the evaluation before.
      best: the index of the best score; None if there is no finite one.
      engines: how each group of equal shapes was run.
    """

    scores: np.ndarray
    states: Sequence[PyTree | None]
    configs: Sequence[Any]
    curves: np.ndarray
    evaluated: tuple[int, ...]
    metrics: dict[str, np.ndarray]
    best: int | None
    engines: tuple[str, ...]


def takes_config(evaluate: Callable[..., Any], *, beside: int = 1) -> bool:
    """Whether an evaluation asks for the configuration beside the state, or beside so many arguments."""
    try:
        parameters = inspect.signature(evaluate).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return len(positional) > beside


def takes_shared(function: Callable[..., Any]) -> bool:
    """Whether a function has a parameter `shared`."""
    try:
        return "shared" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def sharing(function: Callable[..., Any], shared: PyTree) -> Callable[..., Any]:
    """A function of a trial with what all configurations share filled in, if it takes that and there is any.

    >>> sharing(lambda state, shared: state * shared, 3)(2), sharing(lambda state: state, 3)(2)
    (6, 2)
    """
    return functools.partial(function, shared=shared) if shared is not None and takes_shared(function) else function


def scalar_score(value: Any) -> Array:
    """A score as a float scalar.

    Raises:
      TypeError: it is no number.
      ValueError: it is an array of more than no axes.

    >>> float(scalar_score(2))
    2.0
    """
    try:
        score = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"evaluate returned {value!r}; it must return one number") from error
    if score.shape:
        raise ValueError(f"evaluate returned an array of shape {score.shape}; it must return one number")
    if not jnp.issubdtype(score.dtype, jnp.number) and score.dtype != jnp.bool_:
        raise TypeError(f"evaluate returned {score.dtype}; it must return one number")
    return score.astype(jnp.result_type(float))


def check_trial(trial: Any) -> None:
    """Refuses what is no `Trial`, by the part that is amiss."""
    if not isinstance(trial, Trial):
        raise TypeError(f"trial must be a search.Trial(init, step, evaluate); got {type(trial).__name__}")
    for name, part in zip(trial._fields, trial, strict=True):
        if not callable(part):
            raise TypeError(f"trial.{name} must be a function; got {type(part).__name__}")


def check_shared(trial: Trial, shared: PyTree) -> None:
    """Refuses what no function of a trial takes, and a function that takes what is not there."""
    taking = [name for name, part in zip(trial._fields, trial, strict=True) if takes_shared(part)]
    if shared is not None and not taking:
        raise TypeError("shared is given, and none of init, step and evaluate has a parameter `shared`; add it, or leave it out")
    for name in taking if shared is None else ():
        if inspect.signature(getattr(trial, name)).parameters["shared"].default is inspect.Parameter.empty:
            raise TypeError(f"trial.{name} takes shared, and there is none; give shared=...")


def check_batches(batches: Any) -> None:
    """Refuses what is no function."""
    if not callable(batches):
        raise TypeError(f"batches must be a function batches(step) -> batch; got {type(batches).__name__}")


def check_typed_key(key: Any) -> None:
    """Refuses what is no typed key."""
    if not jnp.issubdtype(getattr(key, "dtype", float), jax.dtypes.prng_key):
        raise TypeError(f"key must be a typed key, as jax.random.key(seed) gives; got {getattr(key, 'dtype', type(key).__name__)}")
