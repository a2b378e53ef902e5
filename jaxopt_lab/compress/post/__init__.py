"""Methods for models that are trained already: they look at some batches, and give a tree like any other."""

from jaxopt_lab.compress.post.calibration import calibrate

__all__ = ["calibrate"]
