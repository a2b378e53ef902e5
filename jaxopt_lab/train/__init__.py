"""Floor 3: one state, one pure step, the loop around it, and evaluation."""

from jaxopt_lab.train import guard
from jaxopt_lab.train.evaluation import evaluate
from jaxopt_lab.train.loop import Result, fit
from jaxopt_lab.train.precision import LossScaleState, loss_scale, loss_scaled
from jaxopt_lab.train.record import EarlyStopping
from jaxopt_lab.train.rewind import RateScale, Rewind, rate_scale
from jaxopt_lab.train.run import Run
from jaxopt_lab.train.signals import Stopped
from jaxopt_lab.train.state import State, init, variables
from jaxopt_lab.train.step import Step, make_step
from jaxopt_lab.train.stepping import NonFiniteError

__all__ = [
    "EarlyStopping",
    "LossScaleState",
    "NonFiniteError",
    "RateScale",
    "Result",
    "Rewind",
    "Run",
    "State",
    "Step",
    "Stopped",
    "evaluate",
    "fit",
    "guard",
    "init",
    "loss_scale",
    "loss_scaled",
    "make_step",
    "rate_scale",
    "variables",
]
