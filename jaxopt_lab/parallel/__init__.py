"""Floor 3: the same step on many devices, on the same ordinary state."""

from jaxopt_lab.parallel.pmapped import Pmapped, pmap
from jaxopt_lab.parallel.rows import split_rows

__all__ = ["Pmapped", "pmap", "split_rows"]
