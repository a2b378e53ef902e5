"""The trained score: candidates trained as one population, all that share their shapes by one compiled program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.nets.model import Model
from jaxopt_lab.search.architecture.candidates import flat
from jaxopt_lab.search.architecture.objectives import TRAINING, Net, Objective, as_model, bounds
from jaxopt_lab.search.population import population
from jaxopt_lab.search.trial import Trial, check_shared, check_trial, sharing, takes_config

__all__ = ["joint", "trained"]

TrialOf = Callable[[Any, Model], Trial]


def trained(
    trial: TrialOf,
    *,
    batches: Callable[[int], Any],
    steps: int,
    trainings: int = 1,
    name: str = "score",
    maximize: bool = False,
    at_most: float | None = None,
    at_least: float | None = None,
    static: Sequence[str] = (),
    **options: Any,
) -> Objective:
    """The score of a candidate after its training, as its trial evaluates it.

    All candidates of a round are trained by one call of `population`. Its integers are part of the program, as shapes are made of
    them; floats are traced wherever the network and the trial can do without their values, so that candidates that differ in
    these alone share a program. Training j of candidate i starts from `fold_in(key, i trainings + j)`; all see the same batches.

    Args:
      trial: `(config, model) -> Trial`; it is called while a program is traced, with a configuration whose floats may be traced.
      batches, steps, options: as of `population`: rungs, engine, memory, devices, shared.
      trainings: how many of each candidate, from weights of their own; the score is the mean.
      name, maximize, at_most, at_least: as of `Objective`.
      static: paths of floats that are part of the program even where they could be traced.

    Raises:
      TypeError: `trial` is no function; when measured, it returned no `Trial`.
      ValueError: `trainings` is below 1; when measured, as for `population`.

    >>> import jax, jax.numpy as jnp
    >>> from jaxopt_lab.nets import from_functions
    >>> def build(config):
    ...     return from_functions(lambda key: {"w": jnp.ones(config["width"])}, lambda params: params["w"].sum())
    >>> def trial(config, model):
    ...     return Trial(
    ...         lambda key, config: model.init(key),
    ...         lambda state, batch, config: (jax.tree.map(lambda w: (1 - config["rate"]) * w, state), {}),
    ...         lambda state: model.predict(state),
    ...     )
    >>> score = trained(trial, batches=lambda step: {}, steps=1)
    >>> nets = [Net(c, i, build, build(c)) for i, c in enumerate([{"width": 2, "rate": 0.5}, {"width": 3, "rate": 0.0}])]
    >>> list(score.measure(nets, jax.random.key(0)))
    [1.0, 3.0]
    """
    if not callable(trial):
        raise TypeError(f"trial must be a function (config, model) -> Trial; got a {type(trial).__name__}")
    if trainings < 1:
        raise ValueError(f"trainings must be at least 1; got {trainings}")
    # One and the same trial in all rounds, so that what one has compiled serves the next.
    together = functools.lru_cache(maxsize=4)(functools.partial(joint, trial))

    def measure(nets: Sequence[Net], key: Array) -> list[float]:
        configs = [net.config for net in nets for _ in range(trainings)]
        found = population(
            together(nets[0].build),
            configs,
            key=key,
            numbers=[net.number * trainings + j for net in nets for j in range(trainings)],
            batches=batches,
            steps=steps,
            maximize=maximize,
            keep=0,
            static=sorted(_static(configs, static)),
            **options,
        )
        return found.scores.reshape(-1, trainings).mean(axis=1).tolist()

    return Objective(name, measure, maximize, *bounds(name, at_most, at_least), TRAINING)


def joint(trial: TrialOf, build: Callable[[Any], Any], *, rows: bool = False) -> Trial:
    """A trial whose network is that of its configuration.

    Args:
      trial: `(config, model) -> Trial`.
      build: `config -> Model`.
      rows: whether it is evaluated on rows, as `cross_validate` has it, rather than as `population` has it.

    >>> from jaxopt_lab.nets import from_functions
    >>> build = lambda config: from_functions(lambda key: config["width"] * [0.0], lambda params: len(params))
    >>> alike = joint(lambda config, model: Trial(lambda key, config: model.init(key), len, model.predict), build)
    >>> alike.evaluate(alike.init(None, {"width": 3}), {"width": 3})
    3
    """

    def of(config: Any, shared: PyTree) -> Trial:
        own = trial(config, as_model(build(config), config))
        check_trial(own)
        check_shared(own, shared)
        return Trial(*(sharing(part, shared) for part in own))

    def init(key: Array, config: Any, shared: PyTree = None) -> PyTree:
        return of(config, shared).init(key, config)

    def step(state: PyTree, batch: Any, config: Any, shared: PyTree = None) -> tuple[PyTree, dict[str, Array]]:
        return of(config, shared).step(state, batch, config)

    def on_rows(state: PyTree, rows: Any, config: Any) -> Any:
        own = of(config, None).evaluate
        return own(state, rows, config) if takes_config(own, beside=2) else own(state, rows)

    def evaluate(state: PyTree, config: Any, shared: PyTree = None) -> Any:
        own = of(config, shared).evaluate
        return own(state, config) if takes_config(own) else own(state)

    return Trial(init, step, on_rows if rows else evaluate)


def _static(configs: Sequence[Any], static: Sequence[str]) -> set[str]:
    """The paths of integers, and those that were asked for, as far as a configuration has them."""
    leaves = [(path, value) for config in configs for path, value in flat(config).items()]
    return {path for path, value in leaves if isinstance(value, int) or path in static}
