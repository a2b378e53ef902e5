r"""Functions whose derivative stays finite where a root or a quotient in them has none.

Adam divides by :math:`\sqrt{v}`, a norm is a root of a sum, clipping divides by a norm: at zero their values are fine, and their
derivatives are :math:`0 \cdot \infty`, NaN.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params

from jaxopt_lab.core.tracing.levels import OWN_DERIVATIVE
from jaxopt_lab.core.tracing.programs import FORMS
from jaxopt_lab.core.types import Array

__all__ = ["mended"]

# By primitive: which operand makes it singular, and where.
_SINGULAR: dict[str, tuple[int, Callable[..., Array]]] = {
    "sqrt": (0, lambda x: x == 0),
    "rsqrt": (0, lambda x: x == 0),
    "cbrt": (0, lambda x: x == 0),
    "log": (0, lambda x: x == 0),
    "div": (1, lambda x, y: y == 0),
    "pow": (0, lambda x, y: (x == 0) & (y < 1)),
}


def mended(function: Callable[..., Any]) -> Callable[..., Any]:
    r"""The same function, with derivative 0 wherever a root, a quotient, a logarithm or a power in it has an infinite one.

    Values are those of the function, bit for bit: the same operations in the same order. Where a derivative does not exist:

    - The root of zero has the derivative 0, and so has what is divided by it, or by it and a small number. That is Adam's update
      :math:`u = m / (\sqrt{v} + \epsilon)` of a weight of which all gradients have been zero, :math:`m = v = 0`: the weight counts
      as one that does not move. This is exact if the hyper-parameters have no part in its gradients, as where an input is always
      0 or a unit is dead. (Otherwise the derivative is :math:`\partial m / \epsilon`: true within :math:`\epsilon` of zero, of no
      use to anyone beyond, and a factor of 10^8 for each step on the way back.)
    - A norm at zero gets the subgradient 0.
    - A quotient by zero is harmless only in a branch of a `where` that is not taken, and gets the 0 that the branch deserves; so
      does a product of it.

    What is inside of `jax.custom_jvp`, `jax.custom_vjp`, `custom_vmap` and `shard_map` is left as it is.

    Args:
      function: any function of trees of arrays.

    >>> norm = lambda x: jnp.sqrt(jnp.sum(x**2))
    >>> jax.grad(norm)(jnp.zeros(2)), jax.grad(mended(norm))(jnp.zeros(2))
    (Array([nan, nan], dtype=float32), Array([0., 0.], dtype=float32))
    >>> jax.grad(mended(norm))(jnp.array([3.0, 4.0]))
    Array([0.6, 0.8], dtype=float32)

    Source: the trap is optax issue 882; `eps_root`, its usual mend, changes the training itself.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        program, shape = jax.make_jaxpr(lambda *flat: function(*jax.tree.unflatten(structure, flat)), return_shape=True)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), _run(program, [*map(jnp.asarray, leaves)]))

    return call


def _run(jaxpr: Any, values: Sequence[Any]) -> list[Any]:
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    env = dict(zip([*inner.constvars, *inner.invars], [*getattr(jaxpr, "consts", ()), *values], strict=True))
    # Of a quotient 0 / 0 that a `where` will leave out, products are NaN as well, and so are their derivatives by the other factor.
    odd: set[Any] = set()
    # Where a value is the root of zero, give or take what was added.
    roots: dict[Any, Array] = {}
    for eqn in inner.eqns:
        name, own = eqn.primitive.name, [not isinstance(v, Literal) and v in odd for v in eqn.invars]
        given = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        if (name in _SINGULAR and name != "sqrt") or (name in _PASSING and any(own)):
            odd.update(eqn.outvars)
        if name == "sqrt":
            roots[eqn.outvars[0]] = given[0] == 0
        for v in eqn.invars if name in _ADDING else ():
            if not isinstance(v, Literal) and v in roots and roots[v].shape == eqn.outvars[0].aval.shape:
                roots[eqn.outvars[0]] = roots[v]
        below = None if name != "div" or isinstance(eqn.invars[1], Literal) else roots.get(eqn.invars[1])
        with eqn.ctx.manager:
            env.update(zip(eqn.outvars, _bound(eqn, given, own, below), strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in inner.outvars]


_PASSING = frozenset(("mul", "neg", "convert_element_type", "broadcast_in_dim", "reshape", "squeeze"))
"""Operations that hand on what is not finite, and that quotients are put through."""

_ADDING = frozenset(("add", "add_any", "max", "convert_element_type", "copy"))
"""Operations that a root goes through before it divides."""


def _bound(eqn: Any, given: Sequence[Any], odd: Sequence[bool], below: Array | None) -> Sequence[Any]:
    name, form = eqn.primitive.name, FORMS.get(eqn.primitive.name)
    if form is not None and form.run is not None and name not in _CLOSED and any(map(_is_singular, jaxprs_in_params(eqn.params))):
        out, _ = form.run(eqn, given, {}, lambda k, jaxpr, values, states: (_run(jaxpr, values), states), set())
        return out
    bind = functools.partial(eqn.primitive.bind, **eqn.primitive.get_bind_params(eqn.params))
    if _is_mendable(eqn):
        at, singular = _SINGULAR[name]
        there = singular(*given)
        return [_mended(bind, at)(there if below is None else there | below, *given)]
    if name == "mul" and any(odd):
        at = odd.index(True)
        return [_mended(bind, at)(~jnp.isfinite(given[at]), *given)]
    out = bind(*given)
    return out if eqn.primitive.multiple_results else [out]


_CLOSED = OWN_DERIVATIVE | {"custom_vmap_call"}


def _is_mendable(eqn: Any) -> bool:
    return eqn.primitive.name in _SINGULAR and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)


def _is_singular(jaxpr: Any) -> bool:
    """Whether a program holds an operation to mend."""
    return any(
        _is_mendable(eqn) or (eqn.primitive.name not in _CLOSED and any(map(_is_singular, jaxprs_in_params(eqn.params))))
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns
    )


def _mended(bind: Callable[..., Array], at: int) -> Callable[..., Array]:
    """An operation of a mask, where its derivative is to be 0, and of its operands, of which number `at` is singular there."""

    @jax.custom_jvp
    def call(there, *operands):
        del there
        return bind(*operands)

    @call.defjvp
    def call_jvp(primals, tangents):
        there, *operands = primals
        safe = [jnp.where(there, jnp.ones_like(x), x) if k == at else x for k, x in enumerate(operands)]
        _, tangent = jax.jvp(bind, tuple(safe), tuple(tangents[1:]))
        return call(*primals), jnp.where(there, jnp.zeros_like(tangent), tangent)

    return call
