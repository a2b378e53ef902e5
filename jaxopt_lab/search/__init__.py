"""Floor 4: search over hyper-parameters, with Optuna's study as the record.

A space is a tree of dimensions, a trial three pure functions of a configuration, and a population of trials one compiled program
for all that share their shapes. Optuna is imported where a study is asked or told, and not before.
"""

from jaxopt_lab.search.engines import Engine, looped, scanned, vmapped
from jaxopt_lab.search.evolution import Evolved, evolve, perturb
from jaxopt_lab.search.halving import Hyperband, halving_rungs, hyperband, successive_halving
from jaxopt_lab.search.population import population
from jaxopt_lab.search.spaces import choice, configs, from_unit, grid, integer, log_uniform, sample, uniform, when
from jaxopt_lab.search.study import Asked, ask, from_distributions, open_study, suggest, tell, to_distributions
from jaxopt_lab.search.trial import Result, Trial

__all__ = [
    "Asked",
    "Engine",
    "Evolved",
    "Hyperband",
    "Result",
    "Trial",
    "ask",
    "choice",
    "configs",
    "evolve",
    "from_distributions",
    "from_unit",
    "grid",
    "halving_rungs",
    "hyperband",
    "integer",
    "log_uniform",
    "looped",
    "open_study",
    "perturb",
    "population",
    "sample",
    "scanned",
    "successive_halving",
    "suggest",
    "tell",
    "to_distributions",
    "uniform",
    "vmapped",
    "when",
]
