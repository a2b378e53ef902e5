"""Floor 3: the same step on many devices, on the same ordinary state."""

from jaxopt_lab.parallel.collectives import Collective, collectives
from jaxopt_lab.parallel.hosts import Hosts, alive, initialize, is_first, local
from jaxopt_lab.parallel.placement import place, shardings
from jaxopt_lab.parallel.pmapped import Pmapped, pmap
from jaxopt_lab.parallel.rows import split_rows
from jaxopt_lab.parallel.rules import FSDP, Zero, fsdp, replicated, zero
from jaxopt_lab.parallel.sharded import Sharded, shard

__all__ = [
    "FSDP",
    "Collective",
    "Hosts",
    "Pmapped",
    "Sharded",
    "Zero",
    "alive",
    "collectives",
    "fsdp",
    "initialize",
    "is_first",
    "local",
    "place",
    "pmap",
    "replicated",
    "shard",
    "shardings",
    "split_rows",
    "zero",
]
