"""Floor 4: search over hyper-parameters, with Optuna's study as the record.

A space is a tree of dimensions, a trial three pure functions of a configuration, and a population of trials one compiled program
for all that share their shapes. Optuna is imported where a study is asked or told, and not before.
"""

import importlib
from typing import TYPE_CHECKING

from jaxopt_lab.search.architecture import (
    CALLS,
    SHAPES,
    TRAINING,
    Architectures,
    Candidate,
    Depths,
    History,
    Net,
    Objective,
    Strategy,
    Widths,
    activation_bytes,
    architectures,
    depth_by_cross_validation,
    front,
    grid_search,
    macs,
    milliseconds,
    mutated,
    parameter_bytes,
    random_search,
    regularized_evolution,
    scored,
    trained,
    width_by_grid,
    width_by_random,
)
from jaxopt_lab.search.cluster.engine import Ray, ray
from jaxopt_lab.search.engines import Engine, looped, scanned, vmapped
from jaxopt_lab.search.evolution import Evolved, evolve, perturb
from jaxopt_lab.search.halving import Hyperband, halving_rungs, hyperband, successive_halving
from jaxopt_lab.search.hypergradient import (
    Hypergradient,
    Method,
    Range,
    Solver,
    Tuned,
    between,
    conjugate_gradient,
    forward,
    gate,
    hypergradient,
    implicit,
    mended,
    neumann,
    nystrom,
    positive,
    reverse,
    truncated,
    tune,
    unit,
)
from jaxopt_lab.search.importance import Importance, SobolIndices, importance, sobol_indices
from jaxopt_lab.search.population import population
from jaxopt_lab.search.selection.cross_validation import (
    CrossValidation,
    NestedCrossValidation,
    cross_validate,
    nested_cross_validate,
    one_standard_error,
)
from jaxopt_lab.search.selection.extrapolation import Extrapolation, extrapolate_curve
from jaxopt_lab.search.selection.folds import Fold, grouped, kfold, stratified
from jaxopt_lab.search.selection.learning_curve import LearningCurve, learning_curve
from jaxopt_lab.search.selection.noise_scale import (
    Noise,
    NoiseAverage,
    average_noise,
    batch_for_noise,
    gradient_noise,
    gradient_noise_scale,
    noise_of_axis,
    two_batch_noise,
)
from jaxopt_lab.search.selection.rate_range import RateRange, rate_range_test
from jaxopt_lab.search.selection.supervised import supervised
from jaxopt_lab.search.spaces import choice, configs, from_unit, grid, integer, log_uniform, sample, uniform, when
from jaxopt_lab.search.study import Asked, ask, from_distributions, open_study, suggest, tell, to_distributions
from jaxopt_lab.search.sweep import sweep
from jaxopt_lab.search.trial import Result, Trial

if TYPE_CHECKING:
    from jaxopt_lab.search.gp_sampler import GPSampler
    from jaxopt_lab.search.selection.pruning import CurvePruner, reporting

# Classes of Optuna's: it is imported when one of them is.
_OF_OPTUNA = {"GPSampler": "gp_sampler", "CurvePruner": "selection.pruning", "reporting": "selection.pruning"}

__all__ = [
    "CALLS",
    "SHAPES",
    "TRAINING",
    "Architectures",
    "Asked",
    "Candidate",
    "CrossValidation",
    "CurvePruner",
    "Depths",
    "Engine",
    "Evolved",
    "Extrapolation",
    "Fold",
    "GPSampler",
    "History",
    "Hyperband",
    "Hypergradient",
    "Importance",
    "LearningCurve",
    "Method",
    "NestedCrossValidation",
    "Net",
    "Noise",
    "NoiseAverage",
    "Objective",
    "Range",
    "RateRange",
    "Ray",
    "Result",
    "SobolIndices",
    "Solver",
    "Strategy",
    "Trial",
    "Tuned",
    "Widths",
    "activation_bytes",
    "architectures",
    "ask",
    "average_noise",
    "batch_for_noise",
    "between",
    "choice",
    "configs",
    "conjugate_gradient",
    "cross_validate",
    "depth_by_cross_validation",
    "evolve",
    "extrapolate_curve",
    "forward",
    "from_distributions",
    "from_unit",
    "front",
    "gate",
    "gradient_noise",
    "gradient_noise_scale",
    "grid",
    "grid_search",
    "grouped",
    "halving_rungs",
    "hyperband",
    "hypergradient",
    "implicit",
    "importance",
    "integer",
    "kfold",
    "learning_curve",
    "log_uniform",
    "looped",
    "macs",
    "mended",
    "milliseconds",
    "mutated",
    "nested_cross_validate",
    "neumann",
    "noise_of_axis",
    "nystrom",
    "one_standard_error",
    "open_study",
    "parameter_bytes",
    "perturb",
    "population",
    "positive",
    "random_search",
    "rate_range_test",
    "ray",
    "regularized_evolution",
    "reporting",
    "reverse",
    "sample",
    "scanned",
    "scored",
    "sobol_indices",
    "stratified",
    "successive_halving",
    "suggest",
    "supervised",
    "sweep",
    "tell",
    "to_distributions",
    "trained",
    "truncated",
    "tune",
    "two_batch_noise",
    "uniform",
    "unit",
    "vmapped",
    "when",
    "width_by_grid",
    "width_by_random",
]


def __getattr__(name: str):
    if name in _OF_OPTUNA:
        return getattr(importlib.import_module(f"{__name__}.{_OF_OPTUNA[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
