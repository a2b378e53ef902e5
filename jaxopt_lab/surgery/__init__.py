"""Floor 2: models of another shape that compute the same: `(apply, params, *example) -> (apply, params, plan)`."""

from jaxopt_lab.surgery.fold import Fold, FoldPlan, fold_batch_norm

__all__ = ["Fold", "FoldPlan", "fold_batch_norm"]
