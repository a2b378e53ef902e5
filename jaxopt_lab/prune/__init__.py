"""Pruning while training: criterion x distribution x pattern, and `sparsify`, which wraps any Optax optimiser."""

from jaxopt_lab.prune.criteria import Criterion, layer_adaptive, magnitude, random, saliency
from jaxopt_lab.prune.distributions import Distribution, erdos_renyi_kernel, global_, threshold, uniform
from jaxopt_lab.prune.growth import Growth, gradient_growth, random_growth
from jaxopt_lab.prune.inner import Moments, moments
from jaxopt_lab.prune.one_shot import one_shot
from jaxopt_lab.prune.patterns import Pattern, block, n_of_m, unstructured
from jaxopt_lab.prune.selection import keep_largest, kth_largest
from jaxopt_lab.prune.sparsify import sparsify
from jaxopt_lab.prune.state import PackedMask, SparsifyState, Sparsity, apply_masks, masks, pack, sparsity, unpack

__all__ = [
    "Criterion",
    "Distribution",
    "Growth",
    "Moments",
    "PackedMask",
    "Pattern",
    "SparsifyState",
    "Sparsity",
    "apply_masks",
    "block",
    "erdos_renyi_kernel",
    "global_",
    "gradient_growth",
    "keep_largest",
    "kth_largest",
    "layer_adaptive",
    "magnitude",
    "masks",
    "moments",
    "n_of_m",
    "one_shot",
    "pack",
    "random",
    "random_growth",
    "saliency",
    "sparsify",
    "sparsity",
    "threshold",
    "uniform",
    "unpack",
    "unstructured",
]
