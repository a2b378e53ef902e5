"""Floor 1: networks with width and depth as fields, and `Model`, the pair of pure functions that everything else takes."""

from jaxopt_lab.nets import initializers
from jaxopt_lab.nets.lenet import LeNet
from jaxopt_lab.nets.mlp import MLP
from jaxopt_lab.nets.model import Model, from_functions, from_linen, from_nnx
from jaxopt_lab.nets.resnet import ResNet
from jaxopt_lab.nets.transformer import VisionTransformer

__all__ = ["MLP", "LeNet", "Model", "ResNet", "VisionTransformer", "from_functions", "from_linen", "from_nnx", "initializers"]
