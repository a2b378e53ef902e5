"""A laboratory for making JAX models smaller, faster and better tuned without rewriting them.

A model is a pure function `apply` and a tree of parameters. Four kinds of pieces act on the pair, and each is plain JAX:

    update transform   optax.GradientTransformation           how parameters move
    loss               arrays -> one value per example        what they move towards
    compressed leaf    quax.ArrayValue                        how a parameter is stored and multiplied
    surgery            (apply, params, *example) -> (...)     the shape of the model

The floors, each of which imports only lower ones (a test walks the imports):

    0  core          paths and selectors, landing, straight-through, keys of rows, walks over a traced program, coupled channels
    1  schedules     curves of the step counter: rates, sparsity, temperature, batch size
    1  losses        what optax lacks, and distillation
    1  regularize    penalties, proximal operators, their transforms
    1  prune         criterion x distribution x pattern, and the wrapper `sparsify`
    1  compress      compressed leaves, and `lift`: the same function on a compressed tree; calibration, rounding, training
    1  nets          Flax modules with width and depth as fields, and the `Model` pair
    2  surgery       the same function in another shape: slimmed, widened, deepened, folded, merged
    2  checkpoint    trees on Orbax, verified, restored without a target or onto one
    2  data          arrays, data sets, batches as f(seed, step)
    3  train         state, step, loop, evaluation, runs that survive what ends them
    3  parallel      the same step on many devices, and on many hosts
    4  search        spaces, samplers, populations in one program, gradients of hyper-parameters, model selection
    4  report        the table and the picture
    6  cli           the parts of a command line that need no jax
    6  supervise     the processes of one run, started again when one dies

Subpackages load when they are first touched: `import jaxopt_lab` costs nothing by itself.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_CORE = ("numerics", "tracing", "tree")

__all__ = [
    "checkpoint",
    "cli",
    "compress",
    "core",
    "data",
    "losses",
    "nets",
    "numerics",
    "parallel",
    "prune",
    "regularize",
    "report",
    "schedules",
    "search",
    "supervise",
    "surgery",
    "tracing",
    "train",
    "tree",
]

if TYPE_CHECKING:
    from jaxopt_lab import (
        checkpoint,
        cli,
        compress,
        core,
        data,
        losses,
        nets,
        parallel,
        prune,
        regularize,
        report,
        schedules,
        search,
        supervise,
        surgery,
        train,
    )
    from jaxopt_lab.core import numerics, tracing, tree


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"{__name__}.core.{name}" if name in _CORE else f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
