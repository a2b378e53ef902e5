"""Choosing between models, and how to train them.

folds              which rows are held out: scikit-learn's splitters, with keys
cross_validation   every configuration on every fold by the same compiled programs; nested; the one-standard-error rule
learning_curve     scores against the number of examples
extrapolation      where a curve leads, with the uncertainty that is left; `families` of curves
rate_range         which learning rates a run bears
noise_scale        the noise of the gradient, and the batch that is worth its cost
pruning            ends the trials of a study early: by Optuna's pruners within `train.fit`, and by extrapolation
supervised         a model, a loss and an optimiser as a trial
"""
