"""The same function in another shape: `(apply, params, *example) -> (apply, params, plan)`."""

from jaxopt_lab.surgery.activations import mean_inputs
from jaxopt_lab.surgery.align import Alignment, align
from jaxopt_lab.surgery.budgets import Budget, macs, milliseconds, parameters
from jaxopt_lab.surgery.coupled import Coupling, Group, Member, Protected, coupled_channels
from jaxopt_lab.surgery.criteria import Criterion, activation, fisher, geometric_median, magnitude, random, scales, taylor
from jaxopt_lab.surgery.deepen import deepen
from jaxopt_lab.surgery.fold import Fold, FoldPlan, fold_batch_norm
from jaxopt_lab.surgery.layers import LayerPlan, drop_layers, stack_layers
from jaxopt_lab.surgery.merge import Apart, Merge, MergePlan, merge_linear
from jaxopt_lab.surgery.plan import Plan, mask
from jaxopt_lab.surgery.ranking import Ranking, global_, isomorphic, local
from jaxopt_lab.surgery.slim import slim
from jaxopt_lab.surgery.soup import add_tasks, greedy_soup, merge_tasks, soup, task_vector
from jaxopt_lab.surgery.statistics import reestimate
from jaxopt_lab.surgery.transfer import Part, Transfer, transfer
from jaxopt_lab.surgery.widen import widen

__all__ = [
    "Alignment",
    "Apart",
    "Budget",
    "Coupling",
    "Criterion",
    "Fold",
    "FoldPlan",
    "Group",
    "LayerPlan",
    "Member",
    "Merge",
    "MergePlan",
    "Part",
    "Plan",
    "Protected",
    "Ranking",
    "Transfer",
    "activation",
    "add_tasks",
    "align",
    "coupled_channels",
    "deepen",
    "drop_layers",
    "fisher",
    "fold_batch_norm",
    "geometric_median",
    "global_",
    "greedy_soup",
    "isomorphic",
    "local",
    "macs",
    "magnitude",
    "mask",
    "mean_inputs",
    "merge_linear",
    "merge_tasks",
    "milliseconds",
    "parameters",
    "random",
    "reestimate",
    "scales",
    "slim",
    "soup",
    "stack_layers",
    "task_vector",
    "taylor",
    "transfer",
    "widen",
]
