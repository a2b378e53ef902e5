"""The same function in another shape: `(apply, params, *example) -> (apply, params, plan)`."""

from jaxopt_lab.surgery.coupled import Coupling, Group, Member, Protected, coupled_channels
from jaxopt_lab.surgery.fold import Fold, FoldPlan, fold_batch_norm
from jaxopt_lab.surgery.plan import Plan, mask
from jaxopt_lab.surgery.slim import geometric_median, global_, local, magnitude, random, slim, taylor

__all__ = [
    "Coupling",
    "Fold",
    "FoldPlan",
    "Group",
    "Member",
    "Plan",
    "Protected",
    "coupled_channels",
    "fold_batch_norm",
    "geometric_median",
    "global_",
    "local",
    "magnitude",
    "mask",
    "random",
    "slim",
    "taylor",
]
