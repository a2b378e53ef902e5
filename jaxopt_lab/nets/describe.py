"""The table of a network's layers: shapes, numbers stored, multiplications."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from textwrap import wrap
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jaxopt_lab.core import tree
from jaxopt_lab.core.tracing import count
from jaxopt_lab.core.tracing.programs import trace
from jaxopt_lab.nets.model import Model, check_model, from_linen

__all__ = ["Description", "Layer", "describe"]

_PATH, _SHAPES = 44, 36
"""The most columns that the first two cells of a row take; what is longer goes on in the next line."""


class Layer(NamedTuple):
    """Parameters that lie together.

    Attributes:
      path: what their paths have in common; a parameter that lies in no layer is one by itself.
      shapes: by the ends of their paths.
      parameters: numbers stored.
      macs: multiplications, each with its addition, in one call.
    """

    path: str
    shapes: Mapping[str, tuple[int, ...]]
    parameters: int
    macs: int


class Description(NamedTuple):
    """A network, layer by layer; it prints as a table.

    Attributes:
      layers: in the order in which a call first reads their parameters.
      others: multiplications of products in which no parameter can be named, such as those of attention.
      macs: of all products together, each counted once even where two parameters meet in it.
      state: numbers in the collections other than the parameters, such as running statistics.
    """

    layers: tuple[Layer, ...]
    others: int
    macs: int
    state: int

    @property
    def parameters(self) -> int:
        """Numbers stored as parameters in all."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        rows = [(layer.path, _shapes(layer), f"{layer.parameters:,}", f"{layer.macs:,}") for layer in self.layers]
        if self.others:
            rows.append(("(products without a parameter)", "", "", f"{self.others:,}"))
        rows.append(("total", "", f"{self.parameters:,}", f"{self.macs:,}"))
        if self.state:
            rows.append(("(state, not in the total)", "", f"{self.state:,}", ""))
        return _aligned([("layer", "shapes", "parameters", "MACs"), *rows])


def describe(model: Model | nn.Module, *example: Any) -> Description:
    """The layers of a network with the shapes of their parameters, how many there are, and what they cost in one call.

    Only shapes are computed: no weight is made. Multiplications are those of matrix products and convolutions in evaluation, for
    the whole example (see `core.tracing.count`); per image, give a batch of one.

    Args:
      model: a `Model` or a Linen module.
      example: inputs, arrays or `jax.ShapeDtypeStruct`.

    Raises:
      TypeError: `model` is neither; the message says how to make a `Model` of it.

    >>> module = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2, use_bias=False)])
    >>> print(describe(module, jax.ShapeDtypeStruct((1, 4), "float32")))
    layer     shapes              parameters  MACs
    layers_0  bias 3, kernel 4x3          15    12
    layers_2  kernel 3x2                   6     6
    total                                 21    18
    """
    if isinstance(model, nn.Module):
        model = from_linen(model)
    check_model(model)
    variables = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0), *example)
    params = variables["params"]
    state = {name: value for name, value in variables.items() if name != "params"}

    def apply(params, state, *inputs):
        return model.predict({"params": params, **state}, *inputs)

    counts = count(apply, params, state, *example)
    reads = _reads(apply, params, state, *example)
    names, leaves, _ = tree.flatten(params)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in zip(names, leaves, strict=True):
        groups.setdefault(path.rpartition("/")[0] or path, {})[path] = leaf.shape
    layers = [
        Layer(
            group,
            {path.rpartition("/")[2]: shape for path, shape in shapes.items()},
            sum(counts.paths[path].parameters for path in shapes),
            sum(counts.paths[path].macs for path in shapes),
        )
        for group, shapes in sorted(groups.items(), key=lambda item: min(reads[path] for path in item[1]))
    ]
    return Description(tuple(layers), counts.others, counts.macs, tree.size(state))


def _reads(apply: Any, params: Any, *args: Any) -> dict[str, float]:
    """By path, when the traced program first reads a parameter; infinity for one that it never reads."""
    program, _ = trace(apply, params, *args)
    jaxpr = program.jaxpr.jaxpr
    read = [id(variable) for equation in jaxpr.eqns for variable in equation.invars]
    first = {variable: k for k, variable in reversed(list(enumerate(read)))}
    # The parameters are the first of the program's variables; the state and the inputs follow.
    return {path: first.get(id(own), math.inf) for path, own in zip(program.paths, jaxpr.invars, strict=False)}


def _shapes(layer: Layer) -> str:
    """`bias 64, kernel 3x3x64x64`; the name is left out where it is the row's. A space that must not be broken is `\\xa0`."""
    cells = {name: "x".join(map(str, shape)) or "()" for name, shape in layer.shapes.items()}
    return ", ".join(cell if name == layer.path else f"{name}\xa0{cell}" for name, cell in cells.items())


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """The rows as lines of text: two columns of words to the left, two of numbers to the right."""
    lines = [line for row in rows for line in _lines(row)]
    widths = [max(len(line[k]) for line in lines) for k in range(4)]
    aligned = (
        "  ".join(
            cell.ljust(width) if k < 2 else cell.rjust(width) for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(line.rstrip().replace("\xa0", " ") for line in aligned)


def _lines(row: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """A row, its long cells wrapped; the numbers stand in the first line."""
    path, shapes, *numbers = row
    for k, (first, second) in enumerate(zip_longest(wrap(path, _PATH) or [""], wrap(shapes, _SHAPES), fillvalue="")):
        yield (first, second, *(numbers if k == 0 else ("", "")))
