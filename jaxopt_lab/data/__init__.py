"""Floor 2: arrays, data sets, and batches as a pure function of the seed and the step. Plain numpy: no device is touched."""

from jaxopt_lab.data.checks import validate
from jaxopt_lab.data.datasets import Dataset, digits, from_arrays, held_out_of_training, load, mnist, mnist1d
from jaxopt_lab.data.idx import read_idx
from jaxopt_lab.data.streams import Batches, Plan, batches

__all__ = [
    "Batches",
    "Dataset",
    "Plan",
    "batches",
    "digits",
    "from_arrays",
    "held_out_of_training",
    "load",
    "mnist",
    "mnist1d",
    "read_idx",
    "validate",
]
