r"""Spaces of hyper-parameters: trees of dimensions, of which configurations are drawn as arrays.

A space is a tree of dicts whose leaves are dimensions. Each dimension is a quantile function: it takes a number of the unit
interval to a value, so that one function serves random, low-discrepancy and grid search, and jits:

    uniform(low, high)          a float, evenly spread
    log_uniform(low, high)      a float, its logarithm evenly spread
    integer(low, high)          both ends included, evenly or in the logarithm
    choice(a, b, ...)           one of these; as an array, its index
    when(path, values, space)   any of these, there only while the choice at `path` takes one of `values`

Drawn are arrays `[n]`, one a dimension; `configs` turns them into what a trial gets: dicts of Python values, from which a dimension
that is not active is left out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.types import Array, PyTree

__all__ = [
    "Choice",
    "Float",
    "Integer",
    "When",
    "choice",
    "configs",
    "dimensions",
    "from_unit",
    "grid",
    "integer",
    "log_uniform",
    "sample",
    "uniform",
    "when",
]

Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class Float:
    """A float in `[low, high]`, of `uniform` or `log_uniform`; with a step, `low + k step`."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self):
        _check_range(self.low, self.high, self.log, self.step)
        if self.step is not None and self.log:
            raise ValueError("a logarithmic range takes no step; leave one of the two out")

    @property
    def levels(self) -> int | None:
        """How many values there are; None where they are not counted."""
        return None if self.step is None else math.floor((self.high - self.low) / self.step + 1e-9) + 1

    def quantile(self, u: Array) -> Array:
        """The value below which the part `u` of the values lies; any shape."""
        if self.step is not None:
            return self.low + self.step * jnp.minimum(jnp.floor(u * self.levels), self.levels - 1)
        if self.log:
            return jnp.clip(jnp.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low))), self.low, self.high)
        return jnp.clip(self.low + u * (self.high - self.low), self.low, self.high)

    def value(self, drawn: Any) -> float:
        """The Python value of a drawn number."""
        # What was rounded to float32 on its way must leave neither the range nor the steps.
        exact = float(drawn) if self.step is None else self.low + self.step * round((float(drawn) - self.low) / self.step)
        return min(max(exact, self.low), self.high)


@dataclass(frozen=True)
class Integer:
    """An integer in `[low, high]`, both included, of `integer`."""

    low: int
    high: int
    log: bool = False
    step: int = 1

    def __post_init__(self):
        for name in ("low", "high", "step"):
            if not isinstance(getattr(self, name), (int, np.integer)) or isinstance(getattr(self, name), bool):
                raise TypeError(f"an integer range needs an integer {name}; got {getattr(self, name)!r}")
        _check_range(self.low, self.high, self.log, self.step)
        if self.log and self.step != 1:
            raise ValueError(f"a logarithmic range takes no step; got {self.step}")

    @property
    def levels(self) -> int:
        """How many values there are."""
        return (self.high - self.low) // self.step + 1

    def quantile(self, u: Array) -> Array:
        """The value below which the part `u` of the values lies; int32, any shape."""
        if self.log:
            # Every integer stands for the half on either side of it.
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            return jnp.clip(jnp.round(jnp.exp(low + u * (high - low))), self.low, self.high).astype(jnp.int32)
        return self.low + self.step * jnp.minimum(jnp.floor(u * self.levels), self.levels - 1).astype(jnp.int32)

    def value(self, drawn: Any) -> int:
        """The Python value of a drawn number."""
        return int(drawn)


@dataclass(frozen=True)
class Choice:
    """One of several options, of `choice`."""

    options: tuple[Scalar, ...]

    def __post_init__(self):
        if not self.options:
            raise ValueError("a choice needs at least one option; got none")
        if odd := [option for option in self.options if not isinstance(option, Scalar)]:
            raise TypeError(
                f"a choice is among None, booleans, numbers and strings; got a {type(odd[0]).__name__}: choose among names of it"
            )
        # As of Python, and of a study: there 1, 1.0 and True are one.
        if len(set(self.options)) < len(self.options):
            raise ValueError(f"a choice has an option twice: {self.options}")

    @property
    def levels(self) -> int:
        """How many options there are."""
        return len(self.options)

    def quantile(self, u: Array) -> Array:
        """The index of an option; int32, any shape."""
        return jnp.minimum(jnp.floor(u * self.levels), self.levels - 1).astype(jnp.int32)

    def value(self, drawn: Any) -> Scalar:
        """The option of a drawn index."""
        return self.options[int(drawn)]


@dataclass(frozen=True)
class When:
    """A dimension that is there only while the choice at `path` takes one of `values`; of `when`."""

    path: str
    values: tuple[Scalar, ...]
    dimension: Float | Integer | Choice

    @property
    def levels(self) -> int | None:
        """How many values there are; None where they are not counted."""
        return self.dimension.levels

    def quantile(self, u: Array) -> Array:
        """As of the dimension, active or not."""
        return self.dimension.quantile(u)

    def value(self, drawn: Any) -> Scalar:
        """As of the dimension."""
        return self.dimension.value(drawn)


Dimension = Float | Integer | Choice | When


def uniform(low: float, high: float, *, step: float | None = None) -> Float:
    """A float, evenly spread over `[low, high]`, or over `low, low + step, ...`.

    Raises:
      ValueError: the range is empty or not finite, or the step is not positive.

    >>> uniform(0.0, 1.0)
    Float(low=0.0, high=1.0, log=False, step=None)
    """
    return Float(float(low), float(high), step=None if step is None else float(step))


def log_uniform(low: float, high: float) -> Float:
    """A float whose logarithm is evenly spread over `[log low, log high]`.

    Raises:
      ValueError: the range is empty, not finite, or reaches 0.

    >>> log_uniform(0.0, 1.0)
    Traceback (most recent call last):
      ...
    ValueError: a logarithmic range must lie above 0; got [0.0, 1.0]
    """
    return Float(float(low), float(high), log=True)


def integer(low: int, high: int, *, log: bool = False, step: int = 1) -> Integer:
    """An integer of `low, low + step, ..., high`, evenly spread or in the logarithm.

    Raises:
      TypeError: an end is not an integer.
      ValueError: the range is empty, or a logarithmic one reaches 0 or takes a step.

    >>> integer(1, 4).levels
    4
    """
    return Integer(low, high, log, step)


def choice(*options: Scalar) -> Choice:
    """One of several options, each as likely: None, booleans, numbers or strings.

    Raises:
      TypeError: an option is of another type; a study could not store it.
      ValueError: there is no option, or one stands twice.

    >>> choice("relu", "gelu").options
    ('relu', 'gelu')
    """
    return Choice(options)


def when(path: str, values: Scalar | Sequence[Scalar], space: PyTree) -> PyTree:
    """A dimension, or a space of them, that is there only while the choice at `path` takes one of `values`.

    Args:
      path: the "/"-joined path of a choice (or of an integer) in the whole space; it may itself depend on another.
      values: its value, or several.
      space: a dimension or a tree of them.

    >>> space = {"optimizer": choice("sgd", "adam"), "momentum": when("optimizer", "sgd", uniform(0.0, 0.99))}
    >>> [sorted(config) for config in grid(space, 2)]
    [['momentum', 'optimizer'], ['momentum', 'optimizer'], ['optimizer']]
    """
    values = tuple(values) if isinstance(values, (list, tuple)) else (values,)
    if not values:
        raise ValueError(f"when({path!r}, ...) needs at least one value of {path}; got none")
    if isinstance(space, Mapping):
        return {name: when(path, values, child) for name, child in space.items()}
    if isinstance(space, When):
        raise TypeError(f"{space.path} and {path}: a dimension depends on one other; let {space.path} depend on {path}")
    return When(path, values, _dimension(path, space))


def dimensions(space: PyTree) -> dict[str, Dimension]:
    """The dimensions of a space by their "/"-joined paths, a choice before what depends on it.

    Raises:
      TypeError: the space is no tree of dicts and dimensions.
      ValueError: it is empty; a dimension depends on one that is not there, that is no choice or integer, or that never takes the
        value; or dimensions depend on each other in a circle.

    >>> list(dimensions({"net": {"width": integer(1, 8)}, "rate": log_uniform(1e-4, 1.0)}))
    ['net/width', 'rate']
    """
    found = dict(_walk(space, ()))
    if not found:
        raise ValueError("the space has no dimension")
    for path, dimension in found.items():
        if isinstance(dimension, When):
            _check_parent(path, dimension, found)
    ordered: dict[str, Dimension] = {}
    waiting = dict(found)
    while waiting:
        ready = {path: d for path, d in waiting.items() if not (isinstance(d, When) and d.path in waiting)}
        if not ready:
            raise ValueError(f"{' and '.join(waiting)} depend on each other in a circle")
        ordered |= ready
        waiting = {path: d for path, d in waiting.items() if path not in ready}
    return ordered


def from_unit(space: PyTree, u: Array) -> dict[str, Array]:
    r"""Configurations as arrays from points of the unit cube: :math:`x_{ij} = F_j^{-1}(u_{ij})`.

    Args:
      space: of d dimensions.
      u: `[..., d]` in [0, 1], in the order of `dimensions(space)`; rows of `scipy.stats.qmc.Sobol`, say.

    Returns:
      An array `[...]` for each path: float32, int32, or the int32 index of an option. Inactive dimensions have a value too.

    >>> from_unit({"width": integer(1, 4)}, jnp.array([[0.0], [0.5], [1.0]]))["width"].tolist()
    [1, 3, 4]
    """
    found = dimensions(space)
    if jnp.shape(u)[-1:] != (len(found),):
        raise ValueError(f"u must have a last axis of {len(found)}, one a dimension; got shape {jnp.shape(u)}")
    u = jnp.asarray(u)
    return {path: dimension.quantile(u[..., j]) for j, (path, dimension) in enumerate(found.items())}


def sample(space: PyTree, key: Array, n: int) -> dict[str, Array]:
    """`n` random configurations as arrays `[n]` by path; `configs` makes dicts of them.

    >>> drawn = sample({"rate": log_uniform(1e-3, 1.0)}, jax.random.key(0), 2)
    >>> drawn["rate"].shape
    (2,)
    """
    return from_unit(space, jax.random.uniform(key, (n, len(dimensions(space)))))


def configs(space: PyTree, drawn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configurations of drawn arrays: dicts shaped as the space, of Python values, without what is not active.

    Args:
      space: what was drawn from.
      drawn: of `sample` or `from_unit`: arrays `[n]` by path.

    >>> configs({"net": {"act": choice("relu", "gelu")}}, {"net/act": np.array([1, 0])})
    [{'net': {'act': 'gelu'}}, {'net': {'act': 'relu'}}]
    """
    found = dimensions(space)
    if set(found) != set(drawn):
        raise ValueError(f"drawn must have the paths of the space, {', '.join(found)}; it has {', '.join(drawn)}")
    columns = {path: [dimension.value(x) for x in np.asarray(drawn[path])] for path, dimension in found.items()}
    return [nest(active(found, dict(zip(columns, row, strict=True)))) for row in zip(*columns.values(), strict=True)]


def grid(space: PyTree, points: int | Mapping[str, int] = 5) -> list[dict[str, Any]]:
    """Every combination of a few values of each dimension.

    Args:
      space: of any dimensions; those that count fewer values than `points` give all of them.
      points: how many values of a dimension, evenly spread over its quantiles, ends included; or how many by path.

    Returns:
      The configurations, each once: what is not active has no combinations.

    >>> grid({"rate": log_uniform(0.01, 1.0), "nesterov": choice(False, True)}, 3)[0:2]
    [{'rate': 0.01..., 'nesterov': False}, {'rate': 0.01..., 'nesterov': True}]
    """
    found = dimensions(space)
    if isinstance(points, Mapping) and (unknown := sorted(set(points) - set(found))):
        raise ValueError(f"points names {', '.join(unknown)}; the space has {', '.join(found)}")
    rows: list[dict[str, Any]] = [{}]
    for path, dimension in found.items():
        values = _spread(path, dimension, points.get(path, 5) if isinstance(points, Mapping) else points)
        rows = [more for row in rows for more in ([{**row, path: v} for v in values] if is_active(dimension, row) else [row])]
    return [nest(row) for row in rows]


def is_active(dimension: Dimension, values: Mapping[str, Any]) -> bool:
    """Whether a dimension is there, given the values, by path, of those that are."""
    if not isinstance(dimension, When):
        return True
    return dimension.path in values and values[dimension.path] in dimension.values


def active(found: Mapping[str, Dimension], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values, by path, whose dimensions are there."""
    kept: dict[str, Any] = {}
    for path, dimension in found.items():
        if is_active(dimension, kept):
            kept[path] = values[path]
    return kept


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by path as nested dicts.

    >>> nest({"net/width": 8, "rate": 0.1})
    {'net': {'width': 8}, 'rate': 0.1}
    """
    out: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split("/")
        node = out
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return out


def bare(dimension: Dimension) -> Float | Integer | Choice:
    """The dimension without the condition under which it is there."""
    return dimension.dimension if isinstance(dimension, When) else dimension


def _walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Dimension]]:
    if not isinstance(node, Mapping):
        yield "/".join(path), _dimension("/".join(path) or "the space", node)
        return
    for name, child in node.items():
        if not isinstance(name, str) or "/" in name or not name:
            raise TypeError(f"{'/'.join(path) or 'the space'} has the key {name!r}; keys are strings without a slash")
        yield from _walk(child, (*path, name))


def _dimension(path: str, node: Any) -> Dimension:
    if not isinstance(node, Dimension):
        raise TypeError(
            f"{path} is a {type(node).__name__}; a space is made of dicts and of uniform, log_uniform, integer, choice and when"
        )
    return node


def _check_range(low: float, high: float, log: bool, step: float | None) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"a range must be finite and rise; got [{low}, {high}]")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range must lie above 0; got [{low}, {high}]")
    if step is not None and not (math.isfinite(step) and step > 0):
        raise ValueError(f"a step must be positive; got {step}")


def _check_parent(path: str, dimension: When, found: Mapping[str, Dimension]) -> None:
    parent = found.get(dimension.path)
    if parent is None:
        raise ValueError(f"{path} depends on {dimension.path}, which is not in the space; it has {', '.join(found)}")
    parent = bare(parent)
    if isinstance(parent, Float):
        raise ValueError(f"{path} depends on {dimension.path}, a float; only a choice or an integer can be depended on")
    for value in dimension.values:
        among = parent.options if isinstance(parent, Choice) else range(parent.low, parent.high + 1, parent.step)
        if value not in among:
            raise ValueError(f"{path} depends on {dimension.path} being {value!r}, which it never is: {parent}")


def _spread(path: str, dimension: Dimension, points: int) -> list[Any]:
    """A few values, evenly spread over the quantiles; all of them where there are no more."""
    if points < 1:
        raise ValueError(f"points must be at least 1; got {points} for {path}")
    inner, levels = bare(dimension), dimension.levels
    if isinstance(inner, Choice):
        return list(inner.options)
    if isinstance(inner, Integer) and levels <= points:
        return list(range(inner.low, inner.high + 1, inner.step))
    count = points if levels is None else min(points, levels)
    u = np.linspace(0, 1, count) if count > 1 else np.array([0.5])
    return list(dict.fromkeys(inner.value(x) for x in np.asarray(inner.quantile(jnp.asarray(u)))))
