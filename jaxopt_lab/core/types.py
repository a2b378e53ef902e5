"""The words the package's signatures are written in."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

Array = jax.Array
PyTree = Any
"""Any tree of arrays: dicts, tuples, dataclasses, NNX states, with or without compressed leaves."""

Schedule = Callable[[Any], Any]
"""`count -> value`. A count that is a Python or numpy number gives numpy (float64); a traced count gives a JAX array."""

Where = str | Sequence[str] | Callable[[str, Any], bool] | PyTree
"""A glob, several globs, a predicate `(path, leaf) -> bool`, or a tree of bool: which leaves a method touches."""
