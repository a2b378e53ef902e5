"""A program inside a program, with what its values depend on and where they are used last."""

import functools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from jaxopt_lab.core import tree
from jaxopt_lab.core.tracing.programs import FORMS, Program

__all__ = [
    "CALLS",
    "CASTS",
    "OWN_DERIVATIVE",
    "Label",
    "Level",
    "Segment",
    "body_of",
    "carry_of",
    "elementwise",
    "inlined",
    "is_key",
    "next_values",
    "opened",
    "outermost",
    "raw_keys",
    "segment_after",
    "variables",
]

Address = tuple[int, ...]

CALLS = frozenset(("jit", "remat2", "checkpoint", "closed_call", "core_call"))
"""Primitives that call one program, once, and mean by it what the program says."""

OWN_DERIVATIVE = frozenset(("custom_jvp_call", "custom_vjp_call"))
"""Primitives that call one program, and mean by it another derivative."""

CASTS = frozenset(("convert_element_type", "copy", "name"))
"""Operations that change what a value is stored in, and nothing else."""

# Operations on each entry by itself.
_ELEMENTWISE = frozenset(
    (
        "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp",
        "convert_element_type", "copy", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
        "floor", "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul",
        "name", "ne", "neg", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh",
        "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
    )
)  # fmt: skip

_CLAMPS = frozenset(("clamp", "copy", "max", "min"))


class Label(NamedTuple):
    """What a value depends on.

    Attributes:
      data: on the inputs.
      params: on which parameters, one bit each.
      plain: on inputs that are no random keys.
    """

    data: bool = False
    params: int = 0
    plain: bool = False


class Level(NamedTuple):
    """One program among those that a traced program consists of.

    Attributes:
      address: where it stands: equation, body, ..., equation, body; () is the outermost.
      inputs: its variables, without those of constants.
      eqns: its equations.
      results: what it returns.
      labels: by variable.
      live: the numbers of the equations that something comes of, in order.
      last: by variable, the last of those that uses it; the number of all equations where the program returns it.
      raw: variables that are keys stored as plain numbers (`raw_keys`).
      elsewhere: the parameters that are read outside of this program, too.
      outer: the level around it.
    """

    address: Address
    inputs: Sequence[Any]
    eqns: Sequence[Any]
    results: Sequence[Any]
    labels: Mapping[Any, Label]
    live: Sequence[int]
    last: Mapping[Any, int]
    raw: Mapping[Any, Any]
    elsewhere: int = 0
    outer: Any = None

    def is_key(self, value: Any) -> bool:
        """Whether a variable holds keys of random numbers, in either form."""
        return is_key(value) or value in self.raw

    def label(self, value: Any) -> Label:
        """Of a variable, or of a literal."""
        return Label() if isinstance(value, Literal) else self.labels[value]

    def met(self, numbers: Iterable[int]) -> int:
        """The parameters, one bit each, that some equations are the first to bring together with the inputs."""
        found = 0
        for number in numbers:
            labels = [self.label(v) for v in self.eqns[number].invars]
            if any(label.data for label in labels):
                found |= _either(label.params for label in labels if not label.data)
        return found

    def returned(self) -> int:
        """The parameters, one bit each, that leave without having met the inputs."""
        labels = [self.label(v) for v in self.results if not isinstance(v, Literal) and v in self.last]
        return _either(label.params for label in labels if not label.data)

    def inner(self, number: int) -> "Level":
        """The program of a call or of a scan."""
        eqn = self.eqns[number]
        # What a loop carries comes round, whether or not it is used behind it.
        used = [v in self.last or eqn.primitive.name == "scan" for v in eqn.outvars]
        elsewhere = self.elsewhere | self.returned() | self.met(k for k in self.live if k != number)
        labels = [self.label(v) for v in eqn.invars]
        while True:
            level = _level((*self.address, number, 0), body_of(eqn), labels, used, elsewhere, self)
            around = zip(carry_of(eqn), level.results, strict=False) if eqn.primitive.name == "scan" else ()
            joined = {k: _joined([labels[k], level.label(v)]) for k, v in around}
            if all(labels[k] == label for k, label in joined.items()):
                return level
            labels = [joined.get(k, label) for k, label in enumerate(labels)]

    def place(self, value: Any) -> tuple[int, int]:
        """Where a variable comes from: the number of the equation and of its result; of an input, -1 and its number."""
        if value in self.inputs:
            return -1, list(self.inputs).index(value)
        return next((k, list(eqn.outvars).index(value)) for k, eqn in enumerate(self.eqns) if value in eqn.outvars)

    def value(self, place: tuple[int, int]) -> Any:
        """The variable at a place."""
        number, index = place
        return self.inputs[index] if number < 0 else self.eqns[number].outvars[index]

    def gates(self, seeds: Iterable[Any]) -> Iterator[tuple[int, Any, set[Any]]]:
        """The values through which everything goes that depends on some others, in order.

        Yields:
          The number of the equation, the value, and what depends on the seeds up to there, themselves included; one set, which
          grows.
        """
        depend = set(seeds)
        reach = max((self.last.get(v, -1) for v in depend), default=-1)
        for number in self.live:
            if depend.isdisjoint(variables(self.eqns[number])):
                continue
            used = [v for v in self.eqns[number].outvars if v in self.last]
            depend.update(used)
            if len(used) == 1 and reach <= number:
                yield number, used[0], depend
            reach = max([reach, *(self.last[v] for v in used)])


def _either(bits: Iterable[int]) -> int:
    return functools.reduce(operator.or_, bits, 0)


def _joined(labels: Sequence[Label]) -> Label:
    """Of what depends on several values."""
    return Label(any(own.data for own in labels), _either(own.params for own in labels), any(own.plain for own in labels))


def variables(eqn: Any) -> list[Any]:
    """The operands of an equation that are no literals.

    >>> len(variables(jax.make_jaxpr(lambda x: x + 1)(1.0).eqns[0]))
    1
    """
    return [v for v in eqn.invars if not isinstance(v, Literal)]


def body_of(eqn: Any) -> Any:
    """The program of a call or of a scan.

    >>> import jax.numpy as jnp
    >>> len(body_of(jax.make_jaxpr(jax.jit(lambda x: jnp.sin(x) + 1))(1.0).eqns[0]).eqns)
    2
    """
    return next(eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params)


def carry_of(eqn: Any) -> range:
    """Which operands of a scan it carries; its first results are what becomes of those.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> carry_of(jax.make_jaxpr(lambda w, x, ys: jax.lax.scan(lambda x, y: (x * w + y, x), x, ys))(1.0, 2.0, jnp.ones(3)).eqns[0])
    range(1, 2)
    """
    _, inputs, _, results = opened(body_of(eqn))
    # What is sliced and stacked has an axis of steps outside.
    count = sum(outer.aval.shape == own.aval.shape for outer, own in zip(eqn.outvars, results, strict=True))
    first = sum(outer.aval.shape == own.aval.shape for outer, own in zip(eqn.invars, inputs, strict=True)) - count
    return range(first, first + count)


def opened(jaxpr: Any) -> tuple[list[Any], list[Any], Sequence[Any], Sequence[Any]]:
    """The constants of a program, closed or not, by variable, and its other inputs, its equations and its results.

    >>> constants, inputs, eqns, results = opened(jax.make_jaxpr(lambda x: x + 1)(1.0))
    >>> constants, len(inputs), len(eqns), len(results)
    ([], 1, 1, 1)
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    constants = list(zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=True))
    return constants, list(inner.invars), inner.eqns, inner.outvars


def is_key(value: Any) -> bool:
    """Whether a variable holds keys of random numbers, and says so by its type.

    >>> import jax
    >>> [is_key(v) for v in jax.make_jaxpr(jax.random.bits)(jax.random.key(0)).jaxpr.invars]
    [True]
    """
    return jax.dtypes.issubdtype(value.aval.dtype, jax.dtypes.prng_key)


def raw_keys(jaxpr: Any) -> dict[Any, Any]:
    """The variables of a program that become keys as they are, there or in the programs inside, with the implementation.

    >>> program = jax.make_jaxpr(lambda key: jax.random.bits(key))(jax.random.PRNGKey(0))
    >>> [(v in program.jaxpr.invars, impl.name) for v, impl in raw_keys(program).items()]
    [(True, 'threefry2x32')]
    """
    found: dict[Any, Any] = {}
    for eqn in opened(jaxpr)[2]:
        if eqn.primitive.name == "random_wrap":
            found[eqn.invars[0]] = eqn.params["impl"]
        elif eqn.primitive.name in CALLS | {"scan"}:
            inner = raw_keys(body := body_of(eqn))
            found |= {v: inner[own] for v, own in zip(eqn.invars, opened(body)[1], strict=True) if own in inner}
    return {v: impl for v, impl in found.items() if not isinstance(v, Literal)}


def outermost(program: Program, tied: Collection[int] = ()) -> Level:
    """The outermost level of a program.

    Args:
      program: as `programs.trace` gives it.
      tied: outputs that do not count as uses.

    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.core.tracing import programs
    >>> program, _ = programs.trace(lambda p, x: x * p["a"], {"a": jnp.ones(()), "b": jnp.ones(())}, jnp.ones(()))
    >>> level = outermost(program)
    >>> level.label(level.results[0]), level.live
    (Label(data=True, params=1, plain=True), [0])
    """
    own, inner = len(program.paths), program.jaxpr.jaxpr
    keys = raw_keys(program.jaxpr)
    plain = [not is_key(v) and v not in keys for v in inner.invars]
    labels = [Label(params=1 << k) if k < own else Label(True, 0, plain[k]) for k in range(len(plain))]
    return _level((), program.jaxpr, labels, [k not in tied for k in range(len(inner.outvars))])


def _level(
    address: Address, jaxpr: Any, given: Sequence[Label], used: Sequence[bool], elsewhere: int = 0, outer: Level | None = None
) -> Level:
    constants, inputs, eqns, results = opened(jaxpr)
    labels = {v: Label() for v, _ in constants} | dict(zip(inputs, given, strict=True))
    for eqn in eqns:
        of = [labels[v] for v in variables(eqn)]
        labels |= dict.fromkeys(eqn.outvars, _joined(of))
    last = {v: len(eqns) for v, yes in zip(results, used, strict=True) if yes and not isinstance(v, Literal)}
    live = []
    for number in reversed(range(len(eqns))):
        if eqns[number].effects or any(v in last for v in eqns[number].outvars):
            live.append(number)
            for v in variables(eqns[number]):
                last.setdefault(v, number)
    return Level(address, inputs, eqns, results, labels, live[::-1], last, raw_keys(jaxpr), elsewhere, outer)


def inlined(program: Program) -> Program:
    """The same program without calls of compiled functions: what they call stands in their place.

    So a function is the same, compiled or not.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.core.tracing import programs
    >>> program, _ = programs.trace(jax.jit(lambda p, x: jnp.sin(x) + p), jnp.ones(()), jnp.ones(()))
    >>> len(program.jaxpr.eqns), [eqn.primitive.name for eqn in inlined(program).jaxpr.eqns]
    (1, ['sin', 'add'])
    """
    jaxpr = jax.make_jaxpr(lambda *arrays: _in_line(program.jaxpr, arrays)[0])(*program.jaxpr.in_avals)
    return program._replace(jaxpr=jaxpr)


def _in_line(jaxpr: Any, values: Sequence[Any], states: Any = None) -> tuple[list[Any], Any]:
    constants, inputs, eqns, results = opened(jaxpr)
    env = dict(constants) | dict(zip(inputs, values, strict=True))
    for eqn in eqns:
        given = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        with eqn.ctx.manager:
            if eqn.primitive.name == "jit":
                run = FORMS["jit"].run
                assert run is not None
                out, _ = run(eqn, given, states, lambda _, jaxpr, values, states: _in_line(jaxpr, values, states), set())
            else:
                out = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
                out = out if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in results], states


def next_values(program: Program) -> dict[int, int]:
    """Outputs that are the next value of a parameter, such as running statistics: output -> parameter.

    They are told by their path, which ends as that of the parameter does, in two names or more, and by their shape.

    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.core.tracing import programs
    >>> params = {"norm": {"mean": jnp.ones(2)}}
    >>> program, _ = programs.trace(lambda p, x: (x, {"norm": {"mean": p["norm"]["mean"] + x}}), params, jnp.ones(2))
    >>> next_values(program)
    {1: 0}
    """
    places = {path: k for k, path in enumerate(program.paths)}
    found = {}
    for k, (name, out) in enumerate(zip(*tree.flatten(program.outputs)[:2], strict=True)):
        parts = name.split("/")
        # A single name may be the same by accident.
        for start in range(len(parts) - 1):
            own = places.get("/".join(parts[start:]))
            if own is not None and program.jaxpr.in_avals[own].shape == out.shape:
                found[k] = own
                break
    return found


# Operations on each entry by itself.


class Segment(NamedTuple):
    """Elementwise operations between a value and the next one through which all goes that depends on it.

    Attributes:
      number: of the last equation.
      value: its result.
      equations: all of them.
      clamps: it is made of maxima and minima alone, so that doing it twice is doing it once.
    """

    number: int
    value: Any
    equations: tuple[int, ...]
    clamps: bool


def segment_after(level: Level, value: Any) -> Segment | None:
    """The elementwise operations behind a value; None where it leaves, meets other data, or something else is done with it.

    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.core.tracing import programs
    >>> level = outermost(programs.trace(lambda p, x: jnp.sum(x * jax.nn.sigmoid(x)), {}, jnp.ones(3))[0])
    >>> segment = segment_after(level, level.inputs[0])
    >>> segment.number, segment.equations, segment.clamps, segment_after(level, segment.value)
    (1, (0, 1), False, None)
    """
    found = next(level.gates([value]), None)
    if found is None:
        return None
    number, end, depend = found
    equations = tuple(k for k in level.live if k <= number and not depend.isdisjoint(variables(level.eqns[k])))
    for eqn in (level.eqns[k] for k in equations):
        # What was drawn at random, to drop entries, say, is not other data.
        foreign = any(v not in depend and level.labels[v].plain for v in variables(eqn))
        if foreign or not elementwise(eqn) or any(v.aval.shape != value.aval.shape for v in eqn.outvars):
            return None
    names = [name for k in equations for name in _names(level.eqns[k])]
    clamps = end.aval.dtype == value.aval.dtype and all(name in _CLAMPS for name in names) and not level.met(equations)
    return Segment(number, end, equations, clamps)


def elementwise(eqn: Any) -> bool:
    """Whether an equation is an operation on each entry by itself, or a call of such.

    >>> import jax.numpy as jnp
    >>> [elementwise(eqn) for eqn in jax.make_jaxpr(lambda x: jnp.sum(jax.nn.relu(x)))(jnp.ones(3)).eqns]
    [True, False]
    """
    name = eqn.primitive.name
    if name in CALLS | OWN_DERIVATIVE:
        inner = opened(body_of(eqn))[2]
        return all(elementwise(e) or (e.primitive.name == "broadcast_in_dim" and not e.invars[0].aval.shape) for e in inner)
    return name in _ELEMENTWISE


def _names(eqn: Any) -> list[str]:
    """The operations of an equation, those in the programs that it holds instead of itself."""
    if eqn.primitive.name in CALLS | OWN_DERIVATIVE:
        return [name for e in opened(body_of(eqn))[2] for name in _names(e)]
    return [eqn.primitive.name]
