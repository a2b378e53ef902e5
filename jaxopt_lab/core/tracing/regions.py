"""Parts of a program that lie between one value and another of the same shape, and read given parameters: whole layers.

Nothing is known of layers. Everything that depends on some parameters, or on the value `x` that enters what is done with them,
leaves it through one value `y`: so `x` can take the place of `y`, or all of it can run again on `y`.
"""

import functools
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend.core import Literal

from jaxopt_lab.core.tracing.levels import CALLS, CASTS, Level, Segment, body_of, next_values, outermost, segment_after, variables
from jaxopt_lab.core.tracing.programs import Program
from jaxopt_lab.core.tracing.zeros import added

__all__ = ["Product", "Region", "Stack", "find", "product", "stacked"]

Address = tuple[int, ...]


class Region(NamedTuple):
    """A part of a program, by numbers that are the same in every trace of the same function at the same shapes.

    Attributes:
      level: where the program stands that holds it: equation, body, ..., equation, body; () is the outermost.
      x: the value that enters it: the number of the equation and of its result; of an input of the level, -1 and its number.
      y: the value that leaves it, likewise.
      bare: `y` before the activation, where one belongs to the region; `y` itself otherwise.
      clamps: whether doing that activation twice is doing it once.
      equations: those up to `y` that depend on `x` or bring the parameters together with the inputs, and those that draw random
        numbers that only they use.
    """

    level: Address
    x: tuple[int, int]
    y: tuple[int, int]
    bare: tuple[int, int]
    clamps: bool
    equations: tuple[int, ...]

    def without_activation(self) -> "Region":
        """The same up to `bare`."""
        return self._replace(y=self.bare, clamps=False, equations=tuple(k for k in self.equations if k <= self.bare[0]))


class Product(NamedTuple):
    """A product with a parameter, and what follows it up to a clamping activation.

    Attributes:
      region: from what is multiplied to what the activation gives; their shapes may differ.
      number: of the equation of the product.
      path: of the parameter that is multiplied with.
      equation: the product itself.
    """

    region: Region
    number: int
    path: str
    equation: Any


class Stack(NamedTuple):
    """A scan that hands each of its steps one entry of stacked parameters.

    Attributes:
      level: as in `Region`.
      equation: the number of the scan.
      length: how many steps it has.
      operands: which of its operands the parameters are.
    """

    level: Address
    equation: int
    length: int
    operands: tuple[int, ...]


def find(program: Program, layers: Mapping[str, Collection[str]], *, twice: bool = False) -> dict[str, Region]:
    """The region of each layer.

    `y` is the first value through which everything goes that depends on the layer's parameters, and for which there is a value `x`
    that does not, that enters what does, has the shape and dtype of `y`, and goes through `y` alone. Of several, where all others
    come of one, it is that one, and otherwise the one that is added to. Where an earlier `x` has a later `y` and nothing but the
    layer lies between them, as between a residual stream and a copy of it that was normalised, it is those. The activation behind
    `y` belongs to the region; where `y` is a sum of `x` and something else, only if `x` comes out of the same one. Axes are told
    apart by their lengths.

    Nested calls (`jit`, rematerialisation, a scan) are gone into where other parameters go in as well, or nothing is found outside.

    Args:
      program: as `programs.trace` gives it.
      layers: the paths of the parameters of each, by a name for messages.
      twice: find what is to run twice in a row: regions must not hold other layers, and a clamping activation behind `y` (ReLU)
        belongs to it, whatever made `x`.

    Returns:
      The regions by name, without the layers that lie in those of others.

    Raises:
      ValueError: a layer has no region, several values could be `x`, or a region reads what nothing outside of it and no layer
        does.

    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.core.tracing import programs
    >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    >>> apply = lambda p, x: jnp.tanh(x + jnp.sin(x @ p["a"])) @ p["b"]
    >>> find(programs.trace(apply, params, jnp.ones((1, 2)))[0], {"a": ["a"]})
    {'a': Region(level=(), x=(-1, 2), y=(2, 0), bare=(2, 0), clamps=False, equations=(0, 1, 2))}
    """
    level = outermost(program, next_values(program))
    bits = {name: _bits(program, paths) for name, paths in layers.items()}
    given = functools.reduce(operator.or_, bits.values(), 0)
    found, failed, held = {}, {}, 0
    for name, own in bits.items():
        try:
            found[name], reads = _Search(program, name, own, own if twice else given, twice).region(level)
            held |= reads
        except ValueError as error:
            failed[name] = error
    for name, error in failed.items():
        if bits[name] & ~held:
            raise error
    return found


def stacked(program: Program, name: str, paths: Collection[str]) -> Stack:
    """The scan whose steps take an entry each of some parameters, where that is all that is done with those.

    Args:
      program: as `programs.trace` gives it.
      name: for messages.
      paths: of the parameters.

    Raises:
      ValueError: something else is done with one of them, or what the steps leave behind is used.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.core.tracing import programs
    >>> apply = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    >>> program, _ = programs.trace(apply, {"w": jnp.ones((3, 2, 2))}, jnp.ones((1, 2)))
    >>> stacked(program, "w", ["w"])
    Stack(level=(), equation=0, length=3, operands=(1,))
    """
    bits = _bits(program, paths)
    level = outermost(program, {output for output, own in next_values(program).items() if bits >> own & 1})
    own = {v for v in level.inputs if level.labels[v].params & bits}
    while True:
        users = []
        for number in level.live:
            if not own.isdisjoint(variables(level.eqns[number])):
                if level.eqns[number].primitive.name in CASTS:
                    own.update(level.eqns[number].outvars)
                else:
                    users.append(number)
        names = sorted({level.eqns[k].primitive.name for k in users})
        if len(users) != 1 or names[0] not in CALLS | {"scan"} or any(v in level.results and v in level.last for v in own):
            raise ValueError(
                f"{name} is not handed entry by entry to one scan alone: it meets {', '.join(names) or 'nothing'}; give a mapping "
                "for parameters that a scan slices along their leading axis, and other layers as a sequence of selectors"
            )
        operands = tuple(k for k, v in enumerate(level.eqns[users[0]].invars) if v in variables(level.eqns[users[0]]) and v in own)
        if names == ["scan"]:
            return _steps(level, users[0], name, operands, program.paths)
        level = level.inner(users[0])
        own = {level.inputs[k] for k in operands}


def _steps(level: Level, number: int, name: str, operands: tuple[int, ...], paths: Sequence[str]) -> Stack:
    eqn = level.eqns[number]
    body, length = body_of(eqn).jaxpr, eqn.params["length"]
    for k, (outer, inner) in enumerate(zip(eqn.invars, body.invars, strict=True)):
        label = level.label(outer)
        if outer.aval.shape != inner.aval.shape and label.params and not label.data and k not in operands:
            others = [path for number, path in enumerate(paths) if label.params >> number & 1]
            raise ValueError(f"{name}: the steps of its scan take an entry each of {others[0]}, too: choose that as well")
    for k in operands:
        if eqn.invars[k].aval.shape == body.invars[k].aval.shape:
            raise ValueError(f"{name}: a parameter of shape {eqn.invars[k].aval.shape} goes whole into each step of its scan")
    for outer, inner in zip(eqn.outvars, body.outvars, strict=True):
        if outer in level.last and outer.aval.shape != inner.aval.shape:
            raise ValueError(
                f"{name}: what the {length} steps of its scan leave, {outer.aval.str_short()}, is used behind the scan, and there "
                "would be another number of it; let the function return what it makes of the carry alone"
            )
    return Stack(level.address, number, length, operands)


def product(program: Program, name: str, paths: Collection[str]) -> Product:
    """The product that some parameters are for, with what follows it: a bias, a normalisation, an activation that clamps.

    Args:
      program: as `programs.trace` gives it.
      name: for messages.
      paths: of the parameters, one of which is multiplied with, and the others meet what comes of that.

    Raises:
      ValueError: there is none, other parameters or values come in between, or what follows is no activation that doing twice is
        doing once.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.core.tracing import programs
    >>> apply = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"])
    >>> program, _ = programs.trace(apply, {"w": jnp.ones((3, 2)), "b": jnp.ones((1, 2))}, jnp.ones((1, 3)))
    >>> found = product(program, "w", ["w", "b"])
    >>> found.path, found.number, found.region.x, found.region.bare
    ('w', 0, (-1, 2), (1, 0))
    """
    own, level = _bits(program, paths), outermost(program, next_values(program))
    while True:
        reads = [k for k in level.live if level.met([k]) & own]
        if len(reads) != 1 or level.eqns[reads[0]].primitive.name not in CALLS:
            break
        level = level.inner(reads[0])
    gate = next((found for found in level.gates(_seeds(level, own)) if level.labels[found[1]].data), None)
    if gate is None:
        raise ValueError(f"{name}: what it computes leaves it in several ways, and not through one value")
    (end, bare, depend), eqn = gate, level.eqns[reads[0]]
    source = _origin(level, eqn.invars[1]) if eqn.primitive.name in ("dot_general", "conv_general_dilated") else None
    if source is None or not own >> source & 1 or not level.label(eqn.invars[0]).data:
        raise ValueError(f"{name} is no product of a value with one of its parameters as it is stored, and what follows that")
    if _entries(level, end, depend) != [eqn.invars[0]]:
        raise ValueError(
            f"{name}: other values of the inputs than what is multiplied with {program.paths[source]} enter it as well"
        )
    segment = segment_after(level, bare)
    if segment is None or not segment.clamps:
        raise ValueError(f"{name}: behind it there is no activation that doing twice is doing once, as a ReLU")
    equations, inside = [], set(depend)
    for k, other in enumerate(level.eqns[: segment.number + 1]):
        if _uses(level, k, inside) and any(level.labels[v].data for v in variables(other)):
            equations.append(k)
            inside.update(other.outvars)
    if foreign := level.met(k for k in equations if k in level.live) & ~own:
        others = [path for k, path in enumerate(program.paths) if foreign >> k & 1]
        raise ValueError(f"{name}: {others[0]} comes in before the activation: give both as one layer")
    places = map(level.place, (eqn.invars[0], segment.value, bare))
    return Product(Region(level.address, *places, True, tuple(equations)), reads[0], program.paths[source], eqn)


def _origin(level: Level, value: Any) -> int | None:
    """The number of the parameter that a value is, but for what it is stored in; None where it is none."""
    while not isinstance(value, Literal) and value in level.labels:
        made = next((eqn for eqn in level.eqns if value in eqn.outvars), None)
        if made is not None and made.primitive.name in CASTS:
            value = made.invars[0]
        elif made is not None or value not in level.inputs:
            return None
        elif level.outer is None:
            return list(level.inputs).index(value)
        else:
            value, level = level.outer.eqns[level.address[-2]].invars[list(level.inputs).index(value)], level.outer
    return None


def _bits(program: Program, paths: Collection[str]) -> int:
    places = {path: k for k, path in enumerate(program.paths)}
    return functools.reduce(operator.or_, (1 << places[path] for path in paths if path in places), 0)


class _Found(NamedTuple):
    """A pair of values: the number of the equation that makes the second, both, the equations, and what only those read."""

    number: int
    x: Any
    y: Any
    equations: tuple[int, ...]
    reads: int


class _Search(NamedTuple):
    """The search for the region of one layer.

    Attributes:
      program: that is searched.
      name: for messages.
      own: the parameters of the layer, one bit each.
      allowed: those that the region may read though nothing else does.
      twice: as in `find`.
    """

    program: Program
    name: str
    own: int
    allowed: int
    twice: bool

    def region(self, level: Level) -> tuple[Region, int]:
        """The region, and the parameters that nothing outside of it reads."""
        reads = [k for k in level.live if level.met([k]) & self.own]
        if not reads:
            raise ValueError(f"{self.name}: nothing of what this function does with it reaches an output")
        inside = len(reads) == 1 and level.eqns[reads[0]].primitive.name in CALLS | {"scan"}
        if inside and level.met(reads) & ~self.own:
            return self.region(level.inner(reads[0]))
        try:
            found = self._here(level)
        except ValueError:
            if not inside:
                raise
            return self.region(level.inner(reads[0]))
        y, equations, clamps = self._activated(level, found)
        return Region(level.address, *map(level.place, (found.x, y, found.y)), clamps, equations), found.reads

    def _activated(self, level: Level, found: _Found) -> tuple[Any, tuple[int, ...], bool]:
        """The value behind the activation that belongs to a layer, the equations up to there, and whether that clamps.

        To a product belongs all that is done entry by entry behind it. To a sum belongs an activation that the sum before it had,
        too, or that done twice is done once.
        """
        y, end, clamps = found.y, found.number, False
        plain = not self._adds(level, found.x, found.y)
        while (segment := segment_after(level, y)) is not None:
            if level.met(segment.equations) or segment.value.aval.dtype != y.aval.dtype:
                break
            if not (plain or (self.twice and segment.clamps) or _ends_alike(level, found.x, y, segment)):
                break
            clamps = segment.clamps and (clamps or y is found.y)
            y, end = segment.value, segment.number
            if not plain:
                break
        return y, self._between(level, found.x, end, y), clamps

    def _here(self, level: Level) -> _Found:
        found: _Found | None = None
        foreign, first, unsure = 0, None, None
        for number, y, depend in level.gates(_seeds(level, self.own)):
            if not level.labels[y].data:
                continue
            first = first or (y, _entries(level, number, depend))
            if found is not None and level.met(k for k in level.live if k <= number and _uses(level, k, depend)) & ~self.own:
                break
            alike = [v for v in _entries(level, number, depend) if (v.aval.shape, v.aval.dtype) == (y.aval.shape, y.aval.dtype)]
            for x in alike:
                behind = _behind(level, [x], number, y)
                if behind is None or (found is not None and (found.x is x or found.x not in behind)):
                    continue
                if any(v is not x and v not in behind for v in alike) and not self._adds(level, x, y):
                    unsure = unsure or y
                    continue
                equations = self._between(level, x, number, y)
                reads = _alone(level, equations)
                if reads & ~(self.allowed if found is None else self.own):
                    foreign = foreign or reads & ~self.allowed
                    continue
                found = _Found(number, x, y, equations, reads)
                break
        if found is None:
            raise ValueError(self._none(foreign, first, unsure))
        return found

    def _adds(self, level: Level, x: Any, y: Any) -> bool:
        """Whether `y` is `x` and something added: of several values that enter, `x` is the one that goes on."""
        return added(self.program, level.address, level.place(x), level.place(y)).sum

    def _between(self, level: Level, x: Any, number: int, y: Any) -> tuple[int, ...]:
        """The equations of the region between `x` and the equation of that number, which makes `y`."""
        inside, found = {x}, []
        for k, eqn in enumerate(level.eqns[: number + 1]):
            data = any(level.labels[v].data for v in variables(eqn))
            if data and (_uses(level, k, inside) or level.met([k]) & self.own or _draws(level, k, x, number, y)):
                found.append(k)
                inside.update(eqn.outvars)
        return tuple(found)

    def _none(self, foreign: int, first: tuple[Any, list[Any]] | None, unsure: Any) -> str:
        if foreign:
            others = [path for k, path in enumerate(self.program.paths) if foreign >> k & 1]
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            way, both = ("run {} twice", "both as one layer") if self.twice else ("drop {}", "both")
            return f"{self.name}: to {way.format('it')} would {way.format(f'{others[0]}{more}')} as well: give {both}"
        if unsure is not None:
            told = f"several values of shape {unsure.aval.shape} enter it, and any could stand for what leaves it"
            return f"{self.name}: {told}; call it with inputs of different lengths, or leave it as it is"
        if first is None:
            told = "what it computes leaves it in several ways, not through one value"
            return f"{self.name}: {told}: it can be neither dropped nor repeated"
        y, entries = first
        shapes = ", ".join(dict.fromkeys(str(v.aval.shape) for v in entries)) or "()"
        told = f"no value of shape {shapes} that enters it, and is used nowhere else, could stand for one that leaves it"
        return (
            f"{self.name}: {told}, {y.aval.shape} at first; a layer that changes the shape, or whose insides are used outside, can "
            "be neither dropped nor repeated"
        )


def _seeds(level: Level, own: int) -> list[Any]:
    """The inputs of a level that are some parameters, or made of them alone."""
    return [v for v in level.inputs if level.labels[v].params & own and not level.labels[v].data]


def _uses(level: Level, number: int, values: set[Any]) -> bool:
    return not values.isdisjoint(variables(level.eqns[number]))


def _entries(level: Level, number: int, depend: set[Any]) -> list[Any]:
    """The values of the inputs that what depends on a layer reads up to an equation, and that do not depend on it themselves."""
    users = [k for k in level.live if k <= number and (_uses(level, k, depend))]
    values = {v for k in users for v in variables(level.eqns[k]) if v not in depend and level.labels[v].plain}
    return sorted(values, key=level.place)


def _behind(level: Level, seeds: list[Any], number: int, y: Any) -> set[Any] | None:
    """What depends on some values up to an equation, where all of it goes through the result `y` of that; None where not."""
    depend, reach = set(seeds), max(level.last.get(v, -1) for v in seeds)
    for k in level.live:
        if k > number:
            break
        if _uses(level, k, depend):
            made = [v for v in level.eqns[k].outvars if v is not y and v in level.last]
            depend.update(made)
            reach = max([reach, *(level.last[v] for v in made)])
    return depend if reach <= number else None


def _alone(level: Level, equations: Collection[int]) -> int:
    """The parameters that some equations read and nothing else does."""
    own = set(level.live).intersection(equations)
    others = set(level.live) - own
    return level.met(own) & ~(level.met(others) | level.returned() | level.elsewhere)


def _draws(level: Level, number: int, x: Any, last: int, y: Any) -> bool:
    """Whether an equation makes something of a key that goes into the region and nowhere else."""
    eqn = level.eqns[number]
    if not any(map(level.is_key, variables(eqn))) or any(map(level.is_key, eqn.outvars)) or number not in level.live:
        return False
    behind = _behind(level, list(eqn.outvars), last, y)
    return behind is not None and x not in behind


# Whether what a layer is followed by is what the layer before it was followed by.


def _ends_alike(level: Level, x: Any, y: Any, segment: Segment) -> bool:
    made = {v: k for k, eqn in enumerate(level.eqns) for v in eqn.outvars}
    starts, seen = [x], set()
    for _ in segment.equations:
        starts = [v for start in starts if start in made for v in variables(level.eqns[made[start]]) if level.labels[v].data]
        seen.update(starts)
    wanted = _written(level, y, segment)
    return any(
        (other := segment_after(level, start)) is not None and other.value is x and _written(level, start, other) == wanted
        for start in seen
    )


def _written(level: Level, start: Any, segment: Segment) -> list[tuple[str, ...]]:
    """A segment in words that are the same for another one that does the same."""
    names = {start: "x"}
    return [tuple(_words(level.eqns[k], names)) for k in segment.equations]


def _words(eqn: Any, names: dict[Any, str]) -> Iterator[str]:
    yield eqn.primitive.name
    yield str(body_of(eqn) if "jaxpr" in eqn.params or "call_jaxpr" in eqn.params else eqn.params)
    for v in eqn.invars:
        yield names.get(v, f"other {id(v)}") if v in variables(eqn) else str(v.val)
    names |= {v: f"{len(names)}.{k}" for k, v in enumerate(eqn.outvars)}
