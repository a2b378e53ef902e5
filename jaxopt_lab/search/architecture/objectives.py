"""What a candidate is measured by: objectives, of which the cheap ones are computed first, and bounds on them reject.

An objective is a name, a direction, bounds, and a function of several networks at once. What it costs says when it is computed:
`SHAPES` from the traced program alone, `CALLS` by a few calls of the network, `TRAINING` by training it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jaxopt_lab.core import tree
from jaxopt_lab.core.tracing import Counts, count
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.nets.model import Model, check_model, from_linen

__all__ = [
    "CALLS",
    "SHAPES",
    "TRAINING",
    "Net",
    "Objective",
    "activation_bytes",
    "as_model",
    "bounds",
    "macs",
    "milliseconds",
    "parameter_bytes",
    "scored",
]

SHAPES, CALLS, TRAINING = 0, 1, 2


class Objective(NamedTuple):
    """A value by which candidates are compared.

    Attributes:
      name: of the value.
      measure: `(nets, key) -> values`, a number for each `Net`; the key is that of the search, and `fold_in(key, net.number)` a
        network's own.
      maximize: whether the best is the largest.
      at_most: a bound: a candidate whose value is higher is rejected, and its dearer objectives are not computed.
      at_least: likewise, whose value is lower.
      cost: `SHAPES`, `CALLS` or `TRAINING`; the lower, the earlier it is computed.
      builds: whether it needs the network; otherwise the configuration is enough.
    """

    name: str
    measure: Callable[[Sequence["Net"], Array], Sequence[Any]]
    maximize: bool = False
    at_most: float | None = None
    at_least: float | None = None
    cost: int = TRAINING
    builds: bool = True


class Net:
    """The network of a candidate, as an objective sees it.

    Attributes:
      config: the configuration.
      number: which candidate of the search it is.
      build: `config -> Model`, of the search; also of a configuration whose numbers are traced.
      model: what it builds of this configuration; None in a search without networks.
    """

    def __init__(self, config: dict[str, Any], number: int, build: Callable[[Any], Any] | None, model: Model | None):
        self.config, self.number, self.build, self.model = config, number, build, model
        self._counts: dict[Any, Counts] = {}

    def shapes(self, *example: Any) -> PyTree:
        """The variables for an example, as shapes: no weight is made."""
        return jax.eval_shape(self.model.init, jax.eval_shape(jax.random.key, 0), *example)  # pyright: ignore

    def counts(self, *example: Any) -> Counts:
        """What a call in evaluation costs, as `core.tracing.count` counts; counted once for all objectives."""
        leaves, treedef = jax.tree.flatten(example)
        key = (treedef, *((jax.numpy.shape(leaf), jax.numpy.result_type(leaf)) for leaf in leaves))
        if key not in self._counts:
            self._counts[key] = count(self.model.predict, self.shapes(*example), *example)  # pyright: ignore
        return self._counts[key]


def as_model(made: Any, config: Any) -> Model:
    """What a builder returned, as a `Model`; a Linen module becomes one.

    Raises:
      TypeError: it is neither; the message names the configuration, and how to make a `Model`.

    >>> as_model("resnet", {"depth": 2})
    Traceback (most recent call last):
      ...
    TypeError: build({'depth': 2}): model must be a Model; this str becomes one by nets.from_functions(init, apply)
    """
    if isinstance(made, nn.Module):
        return from_linen(made)
    try:
        check_model(made)
    except TypeError as error:
        raise TypeError(f"build({config}): {error}") from None
    return made


def scored(
    function: Callable[[dict[str, Any]], float],
    *,
    name: str = "score",
    maximize: bool = False,
    at_most: float | None = None,
    at_least: float | None = None,
    cost: int = TRAINING,
) -> Objective:
    """Any function of a configuration: a table, a training of one's own, a measurement on another machine.

    Args:
      function: `config -> float`; NaN where it is not known.
      name, maximize, at_most, at_least, cost: as of `Objective`.

    Raises:
      TypeError: `function` is none, or a bound no number.

    >>> table = {1: 0.7, 2: 0.9}
    >>> scored(lambda config: table[config["depth"]], name="accuracy", maximize=True).name
    'accuracy'
    """
    if not callable(function):
        raise TypeError(f"scored needs a function of a configuration; got a {type(function).__name__}")
    options = bounds(name, at_most, at_least)
    return Objective(name, lambda nets, key: [function(net.config) for net in nets], maximize, *options, cost, builds=False)


def macs(*example: Any, at_most: float | None = None, at_least: float | None = None) -> Objective:
    """Multiplications of a call, each with its addition, counted in the traced program.

    Args:
      example: inputs, arrays or `jax.ShapeDtypeStruct`; per image, a batch of one.
      at_most, at_least: bounds.

    >>> from jaxopt_lab.nets import MLP
    >>> net = Net({}, 0, None, from_linen(MLP(features=(3,), classes=2)))
    >>> macs(jax.ShapeDtypeStruct((1, 4), "float32")).measure([net], jax.random.key(0))
    [18]
    """
    return _counted("macs", lambda net: net.counts(*example).macs, example, at_most, at_least)


def parameter_bytes(*example: Any, at_most: float | None = None, at_least: float | None = None) -> Objective:
    """Bytes of the parameters; running statistics do not count.

    Args:
      example, at_most, at_least: as in `macs`.

    >>> from jaxopt_lab.nets import MLP
    >>> net = Net({}, 0, None, from_linen(MLP(features=(3,), classes=2)))
    >>> parameter_bytes(jax.ShapeDtypeStruct((1, 4), "float32")).measure([net], jax.random.key(0))
    [92]
    """
    return _counted("parameter_bytes", lambda net: tree.nbytes(net.shapes(*example)["params"]), example, at_most, at_least)


def activation_bytes(*example: Any, at_most: float | None = None, at_least: float | None = None) -> Objective:
    """Bytes of what all products and lookups of a call put out.

    Args:
      example, at_most, at_least: as in `macs`.

    >>> from jaxopt_lab.nets import MLP
    >>> net = Net({}, 0, None, from_linen(MLP(features=(3,), classes=2)))
    >>> activation_bytes(jax.ShapeDtypeStruct((1, 4), "float32")).measure([net], jax.random.key(0))
    [20]
    """
    return _counted("activation_bytes", lambda net: net.counts(*example).activation_bytes, example, at_most, at_least)


def milliseconds(*example: Any, repeats: int = 20, at_most: float | None = None, at_least: float | None = None) -> Objective:
    """Milliseconds of a compiled call in evaluation, here and now: the median after a warm-up. Weights are drawn for it.

    Args:
      example: inputs, as arrays.
      repeats: calls timed.
      at_most, at_least: bounds; times vary, so give them a reserve.

    Raises:
      ValueError: `repeats` is below 1; when measured, the example is shapes alone.

    >>> from jaxopt_lab.nets import MLP
    >>> net = Net({}, 0, None, from_linen(MLP(features=(3,), classes=2)))
    >>> milliseconds(jax.numpy.ones((1, 4)), repeats=3).measure([net], jax.random.key(0))[0] > 0
    True
    """
    from jaxopt_lab.surgery import budgets

    cost = budgets.milliseconds(math.inf, repeats=repeats).cost

    def measure(nets: Sequence[Net], key: Array) -> list[float]:
        taken = []
        for net in nets:
            variables = jax.jit(net.model.init)(jax.random.fold_in(key, net.number), *example)  # pyright: ignore
            taken.append(cost(net.model.predict, variables, example))  # pyright: ignore
        return taken

    return Objective("milliseconds", measure, False, *bounds("milliseconds", at_most, at_least), CALLS)


def _counted(name: str, of: Callable[[Net], float], example: Sequence[Any], *given: float | None) -> Objective:
    if not example:
        raise ValueError(f"{name} needs an example: the inputs of a call, as arrays or shapes")
    return Objective(name, lambda nets, key: [of(net) for net in nets], False, *bounds(name, *given), SHAPES)


def bounds(name: str, at_most: float | None, at_least: float | None) -> tuple[float | None, float | None]:
    """The bounds of an objective, each a number or None.

    Raises:
      TypeError: one is something else.

    >>> bounds("macs", 1e6, None)
    (1000000.0, None)
    """
    for word, bound in {"at_most": at_most, "at_least": at_least}.items():
        if bound is not None and (isinstance(bound, (str, bool)) or np.ndim(bound) or math.isnan(bound)):
            raise TypeError(f"{name}: {word} must be a number; got {bound!r}")
    return at_most, at_least
