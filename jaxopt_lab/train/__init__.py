"""Floor 3: one state, one pure step, the loop around it, and evaluation."""

from jaxopt_lab.train.evaluation import evaluate
from jaxopt_lab.train.loop import Result, fit
from jaxopt_lab.train.record import EarlyStopping
from jaxopt_lab.train.state import State, init, variables
from jaxopt_lab.train.step import Step, make_step

__all__ = ["EarlyStopping", "Result", "State", "Step", "evaluate", "fit", "init", "make_step", "variables"]
