"""Floor 1: networks with width and depth as fields, and `Model`, the pair of pure functions that everything else takes."""

from jaxopt_lab.nets import initializers
from jaxopt_lab.nets.bert import BERT
from jaxopt_lab.nets.decoder import Decoder
from jaxopt_lab.nets.densenet import DenseNet
from jaxopt_lab.nets.describe import Description, Layer, describe
from jaxopt_lab.nets.inception import Inception
from jaxopt_lab.nets.lenet import LeNet
from jaxopt_lab.nets.mixer import Mixer
from jaxopt_lab.nets.mlp import MLP
from jaxopt_lab.nets.mobilenet import MobileNetV2
from jaxopt_lab.nets.model import Model, from_functions, from_linen, from_nnx
from jaxopt_lab.nets.recurrent import Recurrent
from jaxopt_lab.nets.resnet import ResNet
from jaxopt_lab.nets.resnet_imagenet import ImageNetResNet
from jaxopt_lab.nets.transformer import VisionTransformer
from jaxopt_lab.nets.unet import UNet
from jaxopt_lab.nets.vgg import VGG

__all__ = [
    "BERT",
    "MLP",
    "VGG",
    "Decoder",
    "DenseNet",
    "Description",
    "ImageNetResNet",
    "Inception",
    "Layer",
    "LeNet",
    "Mixer",
    "MobileNetV2",
    "Model",
    "Recurrent",
    "ResNet",
    "UNet",
    "VisionTransformer",
    "describe",
    "from_functions",
    "from_linen",
    "from_nnx",
    "initializers",
]
