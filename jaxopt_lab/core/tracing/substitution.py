"""Running a program with other values at the two ends of its channelwise affine chains, and what those chains amount to."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.tracing.chains import Affine, find
from jaxopt_lab.core.tracing.programs import Program, Seen, run, trace
from jaxopt_lab.core.types import Array, PyTree

__all__ = ["Coefficients", "amounts", "coefficients", "needed", "substituted"]


class Coefficients(NamedTuple):
    """A and B of a chain, each `[channels]`.

    Attributes:
      scale: what the output of the product is multiplied by.
      shift: what is added then.
    """

    scale: Array
    shift: Array


def coefficients(apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> dict[str, Coefficients]:
    """A and B of every chain that `affine` finds, by the path of its weight: a pure function of the parameters.

    Only what they depend on is computed, and none of the inputs: shapes will do for those. They are computed as the program does,
    in its own precision, and handed out in at least float32.

    Args:
      apply, params, args, kwargs: as in `walk`.

    Raises:
      TypeError: `params` holds a compressed leaf.
      ValueError: the function prints or calls back, which asks for its inputs, and they are shapes.

    >>> params = {"kernel": jnp.ones((3, 2)), "mean": jnp.ones((1, 2)), "var": jnp.array([[1.0, 4.0]])}
    >>> normalised = lambda p, x: (x @ p["kernel"] - p["mean"]) / jnp.sqrt(p["var"])
    >>> coefficients(normalised, params, jax.ShapeDtypeStruct((5, 3), "float32"))["kernel"]
    Coefficients(scale=Array([1. , 0.5], dtype=float32), shift=Array([-1. , -0.5], dtype=float32))
    """
    program, inputs = trace(apply, params, *args, **kwargs)
    return amounts(program, inputs, find(program))


def amounts(program: Program, inputs: Sequence[Any], chains: Iterable[Affine]) -> dict[str, Coefficients]:
    """`coefficients` of some chains, of a program that is traced already.

    Args:
      program, inputs: as `programs.trace` gives them.
      chains: of this very program, each with a formula.

    >>> from jaxopt_lab.core.tracing import programs
    >>> params = {"b": jnp.ones((1, 1)), "w": jnp.ones((1, 1))}
    >>> program, inputs = programs.trace(lambda p, x: x @ p["w"] - p["b"], params, jnp.ones((1, 1)))
    >>> amounts(program, inputs, find(program))["w"].shift.tolist()
    [-1.0]
    """
    chains = {chain.site.path: chain for chain in chains}

    def ends(arrays: Sequence[Any], t: Array) -> dict[str, Array]:
        _, ended = substituted(
            program,
            arrays,
            chains.values(),
            lambda chain, y: jnp.broadcast_to(t.astype(y.dtype), y.shape),
            lambda chain, y, z: jnp.zeros_like(z),
        )
        return {path: _line(z, chains[path].axis) for path, z in ended.items()}

    def both(arrays: Sequence[Any]) -> dict[str, Coefficients]:
        # At y = 0 the value is B and the derivative is A, neither of which is rounded for the other's sake.
        shifts, scales = jax.jvp(functools.partial(ends, arrays), (jnp.zeros(()),), (jnp.ones(()),))
        return {path: Coefficients(wide(scales[path]), wide(shift)) for path, shift in shifts.items()}

    run_both, given = needed(both, inputs)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in given):
        raise ValueError("the function prints or calls back on its way: give it arrays instead of shapes, or take that out")
    return run_both(*given)


def needed(function: Callable[[PyTree], PyTree], inputs: PyTree) -> tuple[Callable[..., PyTree], list[Any]]:
    """A function of a tree without the operations that nothing comes of, and the arrays in that tree that it still takes.

    >>> run_needed, given = needed(lambda arrays: (arrays[0] @ arrays[1], arrays[0] + 1)[1], [jnp.ones((1, 1)), jnp.ones((1, 1))])
    >>> len(given), run_needed(*given).tolist(), len(jax.make_jaxpr(run_needed)(*given).eqns)
    (1, [[2.0]], 1)
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(inputs)
    alive, used = partial_eval.dce_jaxpr(closed.jaxpr, True)
    flat = jaxpr_as_fun(ClosedJaxpr(alive, closed.consts))
    given = [x for x, yes in zip(jax.tree.leaves(inputs), used, strict=True) if yes]
    return lambda *arrays: jax.tree.unflatten(jax.tree.structure(shapes), flat(*arrays)), given


def _line(z: Array, axis: int) -> Array:
    """The entries along one axis, at the first place of all others."""
    return z[tuple(slice(None) if a == axis else 0 for a in range(z.ndim))]


def substituted(
    program: Program,
    inputs: Sequence[Any],
    chains: Iterable[Affine],
    y: Callable[[Affine, Array], Array],
    z: Callable[[Affine, Array, Array], Array],
) -> tuple[list[Any], dict[str, Array]]:
    """Runs a program with other values at the two ends of its chains.

    Args:
      program, inputs: as `programs.trace` gives them.
      chains: of this very program.
      y: `(chain, y) -> value` that goes on instead of the product.
      z: `(chain, value, z) -> value` that goes on after the chain; `value` is what `y` gave.

    Returns:
      The outputs, and for each path of a weight what came out of its chain.

    >>> from jaxopt_lab.core.tracing import programs
    >>> params = {"a": 3.0 * jnp.ones((1, 1)), "w": jnp.ones((1, 1))}
    >>> program, inputs = programs.trace(lambda p, x: jnp.exp(x @ p["w"] * p["a"]), params, 2.0 * jnp.ones((1, 1)))
    >>> outputs, ended = substituted(program, inputs, find(program), lambda chain, y: y + 1, lambda chain, y, z: 0 * z)
    >>> float(outputs[0][0, 0]), float(ended["w"][0, 0])
    (1.0, 9.0)
    """
    by_path = {chain.site.path: chain for chain in chains}
    names = {address: [path] for path, chain in by_path.items() for address in (chain.site.address, chain.end)}

    def look(path: str, state: tuple, operands: Sequence[Any], output: Array) -> tuple:
        del operands
        # A chain meets its product first and its end next: what is put last stands first.
        return (z(by_path[path], state[0], output), output) if state else (y(by_path[path], output),)

    seen = Seen(names, look, lambda path, depth: False, lambda path, state, output: state[0])
    outputs, states = run(program.jaxpr, inputs, dict.fromkeys(by_path, ()), seen)
    return outputs, {path: state[1] for path, state in states.items()}
