"""Floor 0: what every other floor stands on. It knows trees and arrays, and nothing of models or training."""

from jaxopt_lab.core import numerics, random, rows, tree, types

__all__ = ["numerics", "random", "rows", "tree", "types"]
