"""Whether a part of a program adds to what enters it, and with which parameters at zero it adds nothing."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

from jaxopt_lab.core.tracing.levels import CALLS, CASTS, OWN_DERIVATIVE, body_of, carry_of, opened
from jaxopt_lab.core.tracing.programs import Program

__all__ = ["Added", "added"]

Address = tuple[int, ...]
Place = tuple[int, int]
Paths = frozenset[str] | None

# Operations of one operand that are linear in it, and those of several that are so in each.
_LINEAR = frozenset(
    (
        "broadcast_in_dim", "convert_element_type", "copy", "cumsum", "name", "neg", "reduce_precision", "reduce_sum", "reshape",
        "rev", "slice", "squeeze", "transpose",
    )
)  # fmt: skip
_PRODUCTS = frozenset(("conv_general_dilated", "dot_general", "mul"))
_TOGETHER = frozenset(("add", "add_any", "concatenate", "pad", "sub"))


class Added(NamedTuple):
    """What a value has to do with one that it is made of.

    Attributes:
      sum: whether it is that, and something added.
      zeros: the parameters with which at zero it is just that, whatever else is what; None where there are none such.
    """

    sum: bool
    zeros: Paths


class _Label(NamedTuple):
    """What makes a value simple: parameters that have to be zero for it, or None where that is not known to be possible.

    Attributes:
      zero: with which it is zero.
      same: with which it is the value that enters.
      sum: whether it is the value that enters, and what is added to that.
      data: whether it depends on the inputs.
    """

    zero: Paths = None
    same: Paths = None
    sum: bool = False
    data: bool = False


def added(program: Program, level: Address, x: Place, y: Place) -> Added:
    """Whether the value `y` is the value `x` and something added, and with which parameters at zero that is nothing.

    Followed are sums, products and what moves entries about. Of a product one factor is to be zero, a parameter if there is one,
    and not both: so its gradient is not.

    Args:
      program: as `programs.trace` gives it.
      level, x, y: as in `regions.Region`. The level may be the body of a scan.

    >>> import jax.numpy as jnp
    >>> from jaxopt_lab.core.tracing import programs
    >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "c": jnp.ones((1, 2))}
    >>> program, _ = programs.trace(lambda p, x: x + (jnp.tanh(x @ p["a"]) @ p["b"] + p["c"]), params, jnp.ones((1, 2)))
    >>> found = added(program, (), (-1, 3), (4, 0))
    >>> found.sum, sorted(found.zeros)
    (True, ['b', 'c'])
    """
    paths = [_Label(zero=frozenset([path])) for path in program.paths]
    count = len(opened(program.jaxpr)[1])
    label = _follow(program.jaxpr, [*paths, *[_Label(data=True)] * (count - len(paths))], level, x, y)
    return Added(label.sum, label.same)


def _follow(jaxpr: Any, labels: Sequence[_Label], level: Address, x: Place, y: Place) -> _Label:
    """The label of a value in one of the programs inside."""
    _, inputs, eqns, _ = opened(jaxpr)
    if not level:
        return _labelled(jaxpr, labels, x)[(inputs if y[0] < 0 else eqns[y[0]].outvars)[y[1]]]
    number, _, *rest = level
    env = _labelled(jaxpr, labels, end=number)
    eqn = eqns[number]
    body = body_of(eqn)
    given = [_read(v, env) for v in eqn.invars]
    if eqn.primitive.name == "scan":
        # An entry of zeros is zeros; of what is carried nothing is known.
        for k in carry_of(eqn):
            given[k] = _Label(data=True)
    return _follow(body, given, tuple(rest), x, y)


def _labelled(jaxpr: Any, labels: Iterable[_Label], x: Place | None = None, end: int | None = None) -> dict[Any, _Label]:
    """The labels of a program's variables, from those of its inputs, where `x` is the value that enters."""
    constants, inputs, eqns, _ = opened(jaxpr)
    env = {v: _Label() for v, _ in constants} | dict(zip(inputs, labels, strict=True))

    def start(number: int, variables: Sequence[Any]) -> None:
        if x is not None and x[0] == number:
            env[variables[x[1]]] = _Label(same=frozenset(), sum=True, data=True)

    start(-1, inputs)
    for number, eqn in enumerate(eqns[:end]):
        env.update(zip(eqn.outvars, _after(eqn, [_read(v, env) for v in eqn.invars]), strict=True))
        start(number, eqn.outvars)
    return env


def _read(value: Any, env: dict[Any, _Label]) -> _Label:
    if not isinstance(value, Literal):
        return env[value]
    return _Label(zero=frozenset() if np.all(value.val == 0) else None)


def _all(parts: Iterable[Paths]) -> Paths:
    """What makes all of some values simple."""
    found: frozenset[str] = frozenset()
    for part in parts:
        if part is None:
            return None
        found |= part
    return found


def _after(eqn: Any, given: list[_Label]) -> list[_Label]:
    """The labels of the results of an equation."""
    name, data = eqn.primitive.name, any(label.data for label in given)
    if name in CALLS | OWN_DERIVATIVE:
        body = body_of(eqn)
        env = _labelled(body, given)
        return [_read(v, env) for v in opened(body)[3]]
    if name == "scan":
        return _after_steps(eqn, given)
    zero = same = None
    summed = False
    if name in _TOGETHER:
        zero = _all(label.zero for label in given)
        if name in ("add", "add_any", "sub"):
            first, second = given
            ways = [_all([first.same, second.zero])] + ([] if name == "sub" else [_all([first.zero, second.same])])
            same = next((way for way in ways if way is not None), None)
            summed = first.sum or (second.sum and name != "sub")
    elif name in _PRODUCTS:
        zero = next((label.zero for label in sorted(given, key=lambda label: label.data) if label.zero is not None), None)
    elif name in ("div", *_LINEAR):
        zero = given[0].zero
        kept = name in ("copy", "name") or (
            name == "convert_element_type" and eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype
        )
        same, summed = given[0].same if kept else None, given[0].sum and name in CASTS
    elif name == "select_n":
        zero, same = _all(label.zero for label in given[1:]), _all(label.same for label in given[1:])
        summed = all(label.sum for label in given[1:])
    return [_Label(zero, same, summed, data)] * len(eqn.outvars)


def _after_steps(eqn: Any, given: list[_Label]) -> list[_Label]:
    """The labels of what a scan leaves: what it carries is the value that enters still if it is so after each step."""
    body, carried = body_of(eqn), carry_of(eqn)
    before = list(given)
    for k in carried:
        enters = given[k].same is not None
        before[k] = _Label(same=frozenset() if enters else None, sum=given[k].sum, data=True)
    env = _labelled(body, before)
    after = [_read(v, env) for v in opened(body)[3]]
    kept = [
        _Label(None, _all((given[k].same, own.same)), given[k].sum and own.sum, True)
        for k, own in zip(carried, after, strict=False)
    ]
    return [*kept, *[_Label(data=True)] * (len(after) - len(kept))]
