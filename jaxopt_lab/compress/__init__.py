"""Compressed leaves: parameters that store fewer bytes, and `lift`, the same function on a compressed tree."""

from jaxopt_lab.compress.leaf import Leaf
from jaxopt_lab.compress.lift import Stored, decompress, lift, summary
from jaxopt_lab.compress.quantized import Quantized, quantize
from jaxopt_lab.compress.training import merge, optimizer, trainable

__all__ = ["Leaf", "Quantized", "Stored", "decompress", "lift", "merge", "optimizer", "quantize", "summary", "trainable"]
