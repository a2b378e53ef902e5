"""Whether two functions are the same program: a digest that is the same in every process, and one of what they were traced at."""

import dataclasses
import enum
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from jaxopt_lab.core import tree
from jaxopt_lab.core.tracing.programs import Program, arrays_of, like, trace
from jaxopt_lab.core.types import PyTree

__all__ = ["Fingerprint", "fingerprint", "of_program", "primitives"]


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a function was when it was traced.

    Attributes:
      jax: the version that traced it: another one may write the same function as another program.
      signature: a digest of everything that it was called with, but for the shapes: structures, dtypes, ranks, fixed arguments.
      shapes: of the arrays among its arguments, the parameters aside, in order.
      program: a digest of the program at those shapes.
    """

    jax: str
    signature: str
    shapes: tuple[tuple[int, ...], ...]
    program: str

    def meets(self, params: PyTree, *args: Any, **kwargs: Any) -> bool:
        """Whether a call is of the kind that was traced, by the same version of JAX: it may differ in shapes, not in ranks.

        >>> seen = fingerprint(lambda p, x: x, {}, np.ones(2))
        >>> seen.meets({}, np.ones(3)), seen.meets({}, np.ones(3, int)), seen.meets({}, np.ones((3, 1)))
        (True, False, False)
        """
        return self.jax == jax.__version__ and self.signature == _signature(params, args, kwargs)

    def differs(self, apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> bool:
        """Whether a function is another program than the one that was traced, at the shapes of that time.

        Args:
          apply: the function.
          params, args, kwargs: of a call that it `meets`.

        >>> params, x = {"w": jax.numpy.ones(2)}, jax.numpy.ones((3, 2))
        >>> seen = fingerprint(lambda p, x: jax.numpy.sin(x) * p["w"][None], params, x)
        >>> seen.differs(lambda p, y: jax.numpy.sin(y) * p["w"][None], params, x[:1])
        False
        >>> seen.differs(lambda p, x: jax.numpy.cos(x) * p["w"][None], params, x[:1])
        True
        """
        arrays, rebuilt = arrays_of((args, kwargs))
        then = [like(array, shape) for shape, array in zip(self.shapes, arrays, strict=True)]
        args, kwargs = rebuilt(then)
        return _program(trace(apply, params, *args, **kwargs)[0]) != self.program


def fingerprint(apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> Fingerprint:
    """A digest of the program that `apply(params, *args, **kwargs)` is at these shapes.

    It minds the operations, what goes into each, their parameters and all numbers, and neither names nor where the code stands.
    What a primitive holds besides (Python functions, devices) is not looked into.

    >>> one, other = (fingerprint(lambda p, x, k=k: k * x, {}, np.ones(2)).program for k in (2.0, 3.0))
    >>> one == other, one == fingerprint(lambda q, y: 2.0 * y, {}, np.ones(2)).program
    (False, True)
    """
    return of_program(trace(apply, params, *args, **kwargs)[0], params, *args, **kwargs)


def of_program(program: Program, params: PyTree, *args: Any, **kwargs: Any) -> Fingerprint:
    """The digest of a function that was traced already, as `fingerprint` gives it.

    >>> program, _ = trace(lambda p, x: x, {}, np.ones(2))
    >>> of_program(program, {}, np.ones(2)).shapes
    ((2,),)
    """
    shapes = tuple(tuple(array.shape) for array in arrays_of((args, kwargs))[0])
    return Fingerprint(jax.__version__, _signature(params, args, kwargs), shapes, _program(program))


def primitives(jaxpr: Any) -> list[str]:
    """The names of all operations in a program, those of the programs inside it behind each.

    >>> primitives(jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0))
    ['jit', 'add']
    """
    found = []
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        found += [eqn.primitive.name, *(name for inner in jaxprs_in_params(eqn.params) for name in primitives(inner))]
    return found


def _signature(params: PyTree, args: Any, kwargs: Any) -> str:
    digest = hashlib.sha256()
    names, leaves, _ = tree.flatten(params)
    for name, leaf in zip(names, leaves, strict=True):
        digest.update(f"{name}: {_argument(leaf)}\n".encode())
    leaves, structure = jax.tree.flatten((args, kwargs))
    digest.update(f"{structure}\n".encode())
    digest.update("\n".join(map(_argument, leaves)).encode())
    return digest.hexdigest()


def _argument(leaf: Any) -> str:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}[{len(leaf.shape)}]"
    return _plain(leaf) or type(leaf).__name__


def _program(program: Program) -> str:
    lines: list[str] = []
    _written(program.jaxpr, lines)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _written(jaxpr: Any, lines: list[str]) -> None:
    """A program as lines, in which values have the numbers in which they come."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    inputs = [str(k) for k in range(len(inner.invars))]
    lines += [f"in {v.aval.str_short()}" for v in inner.invars]
    lines.append(f"return {' '.join(_equations(jaxpr, inputs, lines, itertools.count(len(inputs))))}")


def _equations(jaxpr: Any, inputs: Sequence[str], lines: list[str], numbers: Iterator[int]) -> list[str]:
    """The equations of a program as lines; its results, as its inputs, are numbers or constants."""
    inner, consts = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
    env = dict(zip(inner.constvars, map(_number, consts), strict=False)) | dict(zip(inner.invars, inputs, strict=True))

    def value(v: Any) -> str:
        return _number(v.val) if isinstance(v, Literal) else env[v]

    for eqn in inner.eqns:
        given = [value(v) for v in eqn.invars]
        if eqn.primitive.name == "jit":
            # A function is the same whether or not it, or a part of it, is compiled.
            env.update(zip(eqn.outvars, _equations(eqn.params["jaxpr"], given, lines, numbers), strict=True))
            continue
        lines.append(f"{eqn.primitive.name} {' '.join(given)}")
        for key in sorted(eqn.params):
            _parameter(key, eqn.params[key], lines)
        for v in eqn.outvars:
            env[v] = str(next(numbers))
            lines.append(f"out {v.aval.str_short()}")
    return [value(v) for v in inner.outvars]


def _parameter(key: str, held: Any, lines: list[str]) -> None:
    # Names of functions and of parts of the code say nothing of what is computed.
    if key == "name":
        return
    if hasattr(held, "eqns"):
        lines.append(f"{key} {{")
        _written(held, lines)
        lines.append("}")
    elif isinstance(held, Sequence) and any(hasattr(item, "eqns") for item in held):
        for k, item in enumerate(held):
            _parameter(f"{key} {k}", item, lines)
    elif (text := _plain(held)) is not None:
        lines.append(f"{key}={text}")


def _plain(held: Any) -> str | None:
    """A value as text that is the same in every process; None where it has none."""
    if held is None or isinstance(held, (bool, int, float, complex, str, bytes, np.dtype, enum.Enum)):
        return repr(held)
    if isinstance(held, (np.ndarray, np.generic, jax.Array)):
        return _number(held)
    if isinstance(held, type):
        return held.__name__
    if isinstance(held, (tuple, list)):
        items = [_plain(item) for item in held]
        return None if None in items else f"{type(held).__name__}({', '.join(map(str, items))})"
    return None


def _number(value: Any) -> str:
    """An array or a number: its dtype, its shape and what it holds, where that is known."""
    aval = f"{np.result_type(getattr(value, 'dtype', value))}{list(np.shape(value))}" if not _is_key(value) else str(value.dtype)
    if isinstance(value, jax.core.Tracer):
        return aval
    held = np.asarray(jax.random.key_data(value) if _is_key(value) else value)
    return f"{aval} {held.tolist()}" if held.size <= 4 else f"{aval} {hashlib.sha256(held.tobytes()).hexdigest()}"


def _is_key(value: Any) -> bool:
    return hasattr(value, "dtype") and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
