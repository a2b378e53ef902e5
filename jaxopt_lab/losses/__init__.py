"""Losses: arrays in, one value per example out. Where Optax has a loss, use Optax's; here is what it lacks.

supervised    cross_entropy (class ids or distributions, label smoothing), accuracy
distill       soft targets of a teacher, whole, binary, or kept as the top k
mixing        mixup and cutmix of a batch
compose       from a loss on arrays to a loss on (outputs, batch), and sums of those
"""

from jaxopt_lab.losses import distill
from jaxopt_lab.losses.compose import BatchLoss, combine, per_example
from jaxopt_lab.losses.mixing import cutmix, mixup
from jaxopt_lab.losses.supervised import accuracy, cross_entropy

__all__ = ["BatchLoss", "accuracy", "combine", "cross_entropy", "cutmix", "distill", "mixup", "per_example"]
