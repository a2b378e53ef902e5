"""Floor 0: what every other floor stands on. It knows trees and arrays, and nothing of models or training."""

from jaxopt_lab.core import checks, numerics, random, rows, tracing, tree, types

__all__ = ["checks", "numerics", "random", "rows", "tracing", "tree", "types"]
