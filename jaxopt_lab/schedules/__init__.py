"""Curves of the step counter. A schedule is `count -> value`: a learning rate, a sparsity, a temperature; a batch plan likewise.

One rule holds for every curve here. A count that is a Python number, a numpy number or a numpy array is computed by numpy in
float64, so a host loop reads the exact end point, and one call gives the whole curve. A JAX count, traced or not, or a traced
hyper-parameter gives a JAX array: the same function runs under `jit`, `vmap` over counts, and `grad` of its hyper-parameters.
"""

from jaxopt_lab.schedules.batch import (
    BatchPlan,
    batch_from_iterations,
    capped_growth_rate,
    constant_batch,
    full_batch,
    grow_batch,
    piecewise_batch,
    scaled_rate,
)
from jaxopt_lab.schedules.curves import (
    constant,
    cosine,
    exponential,
    join,
    linear,
    linear_cooldown,
    polynomial_decay_to_zero,
    sqrt_cooldown,
    temperature,
    warmup_stable_decay,
)
from jaxopt_lab.schedules.sparsity import cubic

__all__ = [
    "BatchPlan",
    "batch_from_iterations",
    "capped_growth_rate",
    "constant",
    "constant_batch",
    "cosine",
    "cubic",
    "exponential",
    "full_batch",
    "grow_batch",
    "join",
    "linear",
    "linear_cooldown",
    "piecewise_batch",
    "polynomial_decay_to_zero",
    "scaled_rate",
    "sqrt_cooldown",
    "temperature",
    "warmup_stable_decay",
]
