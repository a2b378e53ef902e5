"""Which indices of a function's parameters can only be cut together, and the function with some of them cut.

labels      a label for every index of every axis, and which labels are one
values      the labels of a value, by axis or by axes that were one
primitives  a row for each of JAX's operations: what it does to labels, and how it runs on fewer indices
walk        the labels of a whole program, and the program on fewer indices
"""
