"""The labels of a whole program, and the program on fewer indices."""

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxopt_lab.core.coupling.labels import Labels
from jaxopt_lab.core.coupling.primitives import PRIMITIVES, Cut, taken, unknown
from jaxopt_lab.core.coupling.values import Field, Value, counted, fixed, fresh, kept, separated, united
from jaxopt_lab.core.tracing.programs import FORMS, Place, Program, Rules, flow

__all__ = ["Walked", "cut", "walk"]

Address = tuple[int, ...]


class Noted(NamedTuple):
    """What the walk keeps of an equation.

    Attributes:
      given: the labels of its operands.
      made: those of its results.
      constant: which operands are constants of an inner program, which come whole.
      derivative: of a function with its own derivative, the program of that.
    """

    given: list[Value]
    made: list[Value]
    constant: list[bool]
    derivative: Any = None


class Walked(NamedTuple):
    """A program whose values have labels.

    Attributes:
      program: that was walked.
      labels: which indices are one, and which are fixed.
      inputs: the labels of the constants and the inputs of the program, in order.
      outputs: those of its outputs.
      places: by the address of an equation.
    """

    program: Program
    labels: Labels
    inputs: list[Value]
    outputs: list[Value]
    places: Mapping[Address, Noted]

    @property
    def params(self) -> dict[str, Value]:
        """The labels of the parameters, by path."""
        consts = len(self.program.jaxpr.consts)
        return dict(zip(self.program.paths, self.inputs[consts:], strict=False))


_CONSTANT = Value((), ())
"""What is known of a constant inside a program, until an operation says of which shape it is."""


def walk(program: Program, tied: Mapping[int, int] | None = None, forced: Container[str] = ()) -> Walked:
    """Gives labels to every index of every axis in a program, and unites those that can only be cut together.

    Args:
      program: as `programs.trace` gives it.
      tied: outputs that are the next value of an input, such as running statistics: output -> input. All other outputs are fixed,
        and so are all inputs but the parameters.
      forced: paths of parameters whose units are cut though each of them counts for something: a maximum, a choice or a sum to
        which zeros add is then of those that are left.

    >>> from jaxopt_lab.core.tracing import programs
    >>> params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 4))}
    >>> program, _ = programs.trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((5, 3)))
    >>> walked = walk(program)
    >>> a, b = walked.params["a"].labels(1), walked.params["b"].labels(0)
    >>> bool((walked.labels.root(a) == walked.labels.root(b)).all()), walked.labels.reason(walked.params["a"].labels(0)[0])
    (True, 'it is input 0')
    """
    labels = Labels()
    places: dict[Address, Noted] = {}
    jaxpr = program.jaxpr
    given = _given(labels, program, forced)
    consts = len(jaxpr.consts)
    rules = _rules(labels, places)
    outputs = flow(_opened(jaxpr), given, rules)
    outputs = [_of(labels, value, variable.aval.shape) for value, variable in zip(outputs, jaxpr.jaxpr.outvars, strict=True)]
    for k, value in enumerate(outputs):
        counted(labels, value)
        for field in value.fields:
            labels.use(field.labels)
        if tied and k in tied:
            united(labels, [given[consts + tied[k]], value])
        else:
            fixed(labels, value, f"it is output {k}")
    # Of an axis of which only a slice is read, as of positions, the rest may be read in another call.
    for value in given[consts : consts + len(program.paths)]:
        for field in value.fields:
            labels.fix(field.labels[~labels.is_used(field.labels)], "this function does not read it at these shapes")
    # Where several axes still have labels together, what is kept of them has to be a rectangle.
    for noted in places.values():
        for value in (*noted.given, *noted.made):
            separated(labels, value)
    return Walked(program, labels, given, outputs, places)


def _given(labels: Labels, program: Program, forced: Container[str]) -> list[Value]:
    """The labels of what a program takes: its constants, its parameters, its inputs."""
    jaxpr = program.jaxpr
    given = [fresh(labels, variable.aval.shape) for variable in (*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars)]
    consts, params = len(jaxpr.consts), len(program.paths)
    read = {v for eqn in jaxpr.jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)}
    for k, (path, variable) in enumerate(zip(program.paths, jaxpr.jaxpr.invars, strict=False), consts):
        given[k] = dataclasses.replace(given[k], zero=frozenset(range(len(given[k].shape))))
        for _, own in given[k].fields:
            labels.own(own)
            if path in forced:
                labels.force(own)
        if jax.dtypes.issubdtype(variable.aval.dtype, jax.dtypes.prng_key):
            fixed(labels, given[k], "it holds keys")
        if variable not in read and variable not in jaxpr.jaxpr.outvars:
            fixed(labels, given[k], "this function does not read it")
    for k, value in enumerate(given[consts + params :]):
        fixed(labels, value, f"it is input {k}")
    return given


def cut(walked: Walked, copies: np.ndarray, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a program on fewer indices, or on more.

    Args:
      walked: the program.
      copies: for every label how many there are of it, `[labels]`: 0 where it is cut. Alike for labels that are one, and 1 for
        those that are fixed.
      inputs: as the program takes them, its parameters cut already (`Walked.params` and `values.kept` say how).

    >>> from jaxopt_lab.core.tracing import programs
    >>> params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 1))}
    >>> program, inputs = programs.trace(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 3)))
    >>> walked = walk(program)
    >>> copies = np.ones(len(walked.labels), int)
    >>> copies[walked.labels.root(np.arange(len(copies))) == walked.labels.root(walked.params["a"].labels(1))[1]] = 0
    >>> cut(walked, copies, [jnp.ones((3, 1)), jnp.ones((1, 1)), jnp.ones((1, 3))])[0].tolist()
    [[3.0]]
    """
    cache: dict[int, tuple[Value, list[np.ndarray]]] = {}

    def indices(value: Value) -> list[np.ndarray]:
        if id(value) not in cache:
            cache[id(value)] = value, kept(walked.labels, copies, value)
        return cache[id(value)][1]

    consts = walked.program.jaxpr.consts
    whole = [taken(const, indices(value)) for const, value in zip(consts, walked.inputs, strict=False)]
    return _run(_opened(walked.program.jaxpr), [*whole, *inputs], walked, indices, Place())


class _Open(NamedTuple):
    """A program whose constants are its first inputs."""

    invars: list[Any]
    eqns: Sequence[Any]
    outvars: Sequence[Any]
    constvars: tuple[()] = ()


def _opened(jaxpr: Any) -> _Open:
    inner = jaxpr.jaxpr
    return _Open([*inner.constvars, *inner.invars], inner.eqns, inner.outvars)


def _run(jaxpr: Any, values: Sequence[Any], walked: Walked, indices: Any, place: Place) -> list[Any]:
    consts, inner = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    env = dict(zip([*inner.constvars, *inner.invars], [*consts, *values], strict=True))
    for number, eqn in enumerate(inner.eqns):
        given = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        here = Place((*place.address, number), place.frames)
        with eqn.ctx.manager:
            out = _run_equation(eqn, given, walked, indices, here)
        env.update(zip(eqn.outvars, out, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in inner.outvars]


def _run_equation(eqn: Any, given: list[Any], walked: Walked, indices: Any, here: Place) -> Sequence[Any]:
    form, noted = FORMS.get(eqn.primitive.name), walked.places.get(here.address)

    def inside(k: int, jaxpr: Any, values: Sequence[Any], states: dict) -> tuple[list[Any], dict]:
        return _run(jaxpr, values, walked, indices, Place((*here.address, k))), states

    if noted is not None and noted.derivative is not None:
        own = _DERIVATIVES[eqn.primitive.name]
        same = all(v.aval.shape == value.shape for v, value in zip(eqn.invars, noted.given, strict=True))
        derivative = noted.derivative if same else own.program(eqn)
        return own.run(eqn, given, derivative, lambda k, jaxpr, xs: inside(k, jaxpr, xs, {})[0])
    if form is not None:
        if form.run is None:
            return eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
        return form.run(eqn, given, {}, inside, set())[0]
    assert noted is not None
    known, one = PRIMITIVES.get(eqn.primitive.name), Cut(eqn, noted.given, noted.made, indices)
    if not one.touched:
        return one.bind(*given)
    given = [
        taken(array, indices(value)) if whole else array
        for array, value, whole in zip(given, noted.given, noted.constant, strict=True)
    ]
    return one.bind(*given) if known is None or known.run is None else known.run(one, given)


def _rules(labels: Labels, places: dict[Address, Noted]) -> Rules:
    def equation(eqn: Any, given: list[Value], place: Place, settled: bool) -> list[Value]:
        operands, derivative = [_of(labels, value, v.aval.shape) for value, v in zip(given, eqn.invars, strict=True)], None
        if (own := _DERIVATIVES.get(eqn.primitive.name)) is not None:
            derivative = own.program(eqn)
            out = flow(eqn.params["call_jaxpr"], operands, rules, Place((*place.address, 0), place.frames), settled)
            out = [_of(labels, value, v.aval.shape) for value, v in zip(out, eqn.outvars, strict=True)]
            before, after = own.labelled(eqn, operands, out)
            # What calls such a function in its own derivative has no further one: it is walked as it is.
            others = flow(derivative, before, rules._replace(closed=()), Place((*place.address, 1), place.frames), settled)
            for a, b in zip(after, others, strict=True):
                join(a, b, eqn.primitive.name)
        else:
            known = PRIMITIVES.get(eqn.primitive.name)
            if known is None or not known.keeps(eqn, operands):
                for value in operands:
                    counted(labels, value)
            out = list((known.label if known else unknown)(labels, eqn, operands))
            for value in out if eqn.primitive.name == "slice" else operands:
                use(value)
        if settled:
            places[place.address] = Noted(operands, out, [value is _CONSTANT for value in given], derivative)
        return out

    def use(value: Value) -> None:
        for field in value.fields:
            labels.use(field.labels)

    def join(a: Value, b: Value, name: str) -> Value:
        for value in (a, b):
            counted(labels, value)
        if a is _CONSTANT or b is _CONSTANT:
            for value in (a, b):
                fixed(labels, value, f"{name} may put a constant in its place")
            return a if b is _CONSTANT else b
        both = united(labels, [a, b])
        same = [field.axes for field in both.fields] == [field.axes for field in a.fields]
        return a if same and not a.summed and a.zero == both.zero and a.numbers is None else both

    def part(value: Value, depth: int) -> Value:
        del depth
        if value is _CONSTANT:
            return value
        counted(labels, value)
        value = separated(labels, value, [0])
        fixed(labels, value, "its entries are the steps of a scan", [0])
        fields = [Field(tuple(a - 1 for a in axes), own) for axes, own in value.fields if axes != (0,)]
        return Value(value.shape[1:], tuple(fields), (), frozenset(a - 1 for a in value.zero if a))

    def whole(value: Value, name: str, length: int | None) -> Value:
        del name
        if value is _CONSTANT or length is None:
            return value
        counted(labels, value)
        steps = labels.fresh(length)
        labels.fix(steps, "its entries are the steps of a scan")
        fields = [Field((0,), steps), *(Field(tuple(a + 1 for a in axes), own) for axes, own in value.fields)]
        return Value((length, *value.shape), tuple(fields), (), frozenset(a + 1 for a in value.zero))

    def shard(value: Value, shape: tuple[int, ...]) -> Value:
        local = fresh(labels, shape)
        counted(labels, value)
        for each in (value, local):
            fixed(labels, each, "a shard_map divides it among devices")
        return local

    rules = Rules(equation, join, lambda label, by, name: label, part, whole, shard, _CONSTANT, frozenset(_DERIVATIVES))
    return rules


def _of(labels: Labels, value: Value, shape: Sequence[int]) -> Value:
    return fresh(labels, shape) if value is _CONSTANT else value


# Functions with derivatives of their own: the derivative is a program like any other, and is cut like it.


class _Derivative(NamedTuple):
    """A primitive whose derivative is its own.

    Attributes:
      program: `(eqn) -> closed jaxpr` of the derivative.
      labelled: `(eqn, operands, results) -> (labels that it takes, labels that it gives)`.
      run: `(eqn, values, derivative, inside) -> results`; `inside(k, jaxpr, values)` runs the function (0) or its derivative (1).
    """

    program: Callable[[Any], Any]
    labelled: Callable[[Any, list[Value], list[Value]], tuple[list[Value], list[Value]]]
    run: Callable[..., Sequence[Any]]


def _moving(variables: Sequence[Any], consts: int = 0) -> list[int]:
    """Which of some variables have a derivative: numbers, but for those that a function closes over."""
    return [k for k, v in enumerate(variables) if k >= consts and jnp.issubdtype(v.aval.dtype, jnp.inexact)]


def _along(eqn: Any, values: Sequence[Any]) -> tuple[Callable[..., Sequence[Any]], list[Any]]:
    """The function of those operands that have a derivative, and those; its results are those that have one."""
    ins, outs = _moving(eqn.invars, eqn.params["num_consts"]), _moving(eqn.outvars)

    def fn(*moving: Any) -> list[Any]:
        given = dict(zip(ins, moving, strict=True))
        every = [given.get(k, value) for k, value in enumerate(values)]
        out = eqn.primitive.bind(*every, **eqn.primitive.get_bind_params(eqn.params))
        return [out[k] for k in outs]

    return fn, [values[k] for k in ins]


def _shapes(variables: Sequence[Any], which: Sequence[int] | None = None) -> list[Any]:
    return [
        jax.ShapeDtypeStruct(variables[k].aval.shape, variables[k].aval.dtype)
        for k in (range(len(variables)) if which is None else which)
    ]


def _pushed(eqn: Any) -> Any:
    """The derivative in a direction: operands and their tangents in, tangents of the results out."""

    def push(values: Sequence[Any], tangents: Sequence[Any]) -> Sequence[Any]:
        fn, moving = _along(eqn, values)
        return jax.jvp(fn, moving, list(tangents))[1]

    return jax.make_jaxpr(push)(_shapes(eqn.invars), _shapes(eqn.invars, _moving(eqn.invars, eqn.params["num_consts"])))


def _run_pushed(eqn: Any, values: Sequence[Any], derivative: Any, inside: Any) -> Sequence[Any]:
    ins, outs = _moving(eqn.invars, eqn.params["num_consts"]), _moving(eqn.outvars)
    fn = jax.custom_jvp(lambda *values: tuple(inside(0, eqn.params["call_jaxpr"], values)))

    @fn.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
        out = fn(*primals)
        moved = iter(inside(1, derivative, [*primals, *(tangents[k] for k in ins)]))
        zeros = [np.zeros(np.shape(y), jax.dtypes.float0) for y in out]
        return out, tuple(next(moved) if k in outs else zero for k, zero in enumerate(zeros))

    return fn(*values)


def _pulled(eqn: Any) -> Any:
    """The derivative pulled back: operands and the cotangents of the results in, cotangents of the operands out."""

    def pull(values: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
        fn, moving = _along(eqn, values)
        return jax.vjp(fn, *moving)[1](list(cotangents))

    return jax.make_jaxpr(pull)(_shapes(eqn.invars), _shapes(eqn.outvars, _moving(eqn.outvars)))


def _run_pulled(eqn: Any, values: Sequence[Any], derivative: Any, inside: Any) -> Sequence[Any]:
    ins, outs = _moving(eqn.invars, eqn.params["num_consts"]), _moving(eqn.outvars)
    fn = jax.custom_vjp(lambda *values: tuple(inside(0, eqn.params["call_jaxpr"], values)))

    def back(values: tuple, cotangents: tuple) -> tuple:
        moved = iter(inside(1, derivative, [*values, *(cotangents[k] for k in outs)]))
        zeros = [np.zeros(np.shape(x), jax.dtypes.float0) for x in values]
        return tuple(next(moved) if k in ins else zero for k, zero in enumerate(zeros))

    fn.defvjp(lambda *values: (fn(*values), values), back)
    return fn(*values)


_DERIVATIVES: dict[str, _Derivative] = {
    "custom_jvp_call": _Derivative(
        _pushed,
        lambda eqn, given, made: (
            [*given, *(given[k] for k in _moving(eqn.invars, eqn.params["num_consts"]))],
            [made[k] for k in _moving(eqn.outvars)],
        ),
        _run_pushed,
    ),
    "custom_vjp_call": _Derivative(
        _pulled,
        lambda eqn, given, made: (
            [*given, *(made[k] for k in _moving(eqn.outvars))],
            [given[k] for k in _moving(eqn.invars, eqn.params["num_consts"])],
        ),
        _run_pulled,
    ),
}
