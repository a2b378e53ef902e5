"""Compressed leaves: parameters that store fewer bytes, and `lift`, the same function on a compressed tree.

arrays      the mathematics, on bare arrays
leaf        what a leaf is; rules and trace hand JAX's primitives to its methods
leaves      a file each: the leaf, and the function that puts it into a tree
lift        the same function on a compressed tree, and the ways out
watched     what of a function runs on the stored form, and for what it becomes dense
training    any optimiser on leaves: what trains, what decays, what a schedule moves
folded      weights rounded as they will be stored once BatchNorm is folded into them
post        for models that are trained already: calibration and rounding by a few batches
budget      which form each weight takes, under a budget of bytes
storage     how small it gets once entropy-coded
"""

from jaxopt_lab.compress.arrays import kmeans, observers
from jaxopt_lab.compress.arrays.factor import by_energy, by_evidence
from jaxopt_lab.compress.budget import Allocation, allocate, allocate_bits
from jaxopt_lab.compress.folded import rounded_as_folded
from jaxopt_lab.compress.leaf import Leaf
from jaxopt_lab.compress.leaves.clustered import Clustered, cluster
from jaxopt_lab.compress.leaves.dense import Dense, Frozen
from jaxopt_lab.compress.leaves.dynamic import DynamicQuantized, StaticQuantized, dynamic, static
from jaxopt_lab.compress.leaves.fake_inputs import PACT, DynamicInputs, FakeInputs, LearnedInputs, fake_quantize_inputs
from jaxopt_lab.compress.leaves.fake_quantized import DoReFa, FakeQuantized, LearnedStep, StraightThrough, fake_quantize, freeze
from jaxopt_lab.compress.leaves.float8 import Float8, quantize_float
from jaxopt_lab.compress.leaves.low_rank import LowRank, low_rank
from jaxopt_lab.compress.leaves.masked import Masked, store_sparse
from jaxopt_lab.compress.leaves.n_of_m import NM, store_n_of_m
from jaxopt_lab.compress.leaves.normal_float import NormalFloat, quantize_normal
from jaxopt_lab.compress.leaves.quantized import Quantized, bits_for_range, quantize
from jaxopt_lab.compress.leaves.sum import Sum, add_low_rank, split_low_rank
from jaxopt_lab.compress.leaves.transformed import InputScaled, Rotated
from jaxopt_lab.compress.leaves.tucker import Tucker2, tucker2
from jaxopt_lab.compress.lift import Stored, decompress, lift, summary
from jaxopt_lab.compress.post import calibrate
from jaxopt_lab.compress.post.rounding import adaround, awq, bias_correct, equalize, gptq, rotate, smooth
from jaxopt_lab.compress.storage import huffman_nbytes
from jaxopt_lab.compress.training import AnnealState, Trained, anneal, merge, optimizer, trainable
from jaxopt_lab.compress.watched import Ran, ran

__all__ = [
    "NM",
    "PACT",
    "Allocation",
    "AnnealState",
    "Clustered",
    "Dense",
    "DoReFa",
    "DynamicInputs",
    "DynamicQuantized",
    "FakeInputs",
    "FakeQuantized",
    "Float8",
    "Frozen",
    "InputScaled",
    "Leaf",
    "LearnedInputs",
    "LearnedStep",
    "LowRank",
    "Masked",
    "NormalFloat",
    "Quantized",
    "Ran",
    "Rotated",
    "StaticQuantized",
    "Stored",
    "StraightThrough",
    "Sum",
    "Trained",
    "Tucker2",
    "adaround",
    "add_low_rank",
    "allocate",
    "allocate_bits",
    "anneal",
    "awq",
    "bias_correct",
    "bits_for_range",
    "by_energy",
    "by_evidence",
    "calibrate",
    "cluster",
    "decompress",
    "dynamic",
    "equalize",
    "fake_quantize",
    "fake_quantize_inputs",
    "freeze",
    "gptq",
    "huffman_nbytes",
    "kmeans",
    "lift",
    "low_rank",
    "merge",
    "observers",
    "optimizer",
    "quantize",
    "quantize_float",
    "quantize_normal",
    "ran",
    "rotate",
    "rounded_as_folded",
    "smooth",
    "split_low_rank",
    "static",
    "store_n_of_m",
    "store_sparse",
    "summary",
    "trainable",
    "tucker2",
]
