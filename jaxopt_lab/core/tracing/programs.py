"""Traced programs: labels that flow forward through them, and their execution with eyes inside.

A traced program is a list of equations, and some equations hold programs of their own: `jit`, `scan`, `cond`, `while`, a
rematerialised function, one with its own derivative. Each of those primitives is one row of `FORMS`, which says how labels pass
through it and how it runs while something that is met inside is handed out. What a first-order equation does to labels is the
caller's: `Rules`.
"""

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import Literal

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import PyTree

__all__ = ["FORMS", "Form", "Frame", "Place", "Program", "Rules", "Seen", "arrays_of", "flow", "like", "run", "trace"]


class Program(NamedTuple):
    """A function, traced.

    Attributes:
      jaxpr: its closed jaxpr; the variables are the arrays among (params, args, kwargs), in order.
      paths: of the parameters, for the first of those variables.
      outputs: shapes and dtypes of what the function returns, as a tree.
    """

    jaxpr: Any
    paths: tuple[str, ...]
    outputs: PyTree


def trace(apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> tuple[Program, list[Any]]:
    """Traces `apply(params, *args, **kwargs)`, and gives the arrays that the program takes.

    What has a shape and a dtype is an input (arrays, `jax.ShapeDtypeStruct`); everything else (`train=True`, None, functions) is
    fixed, as it is where a function closes over it.

    Raises:
      TypeError: `params` holds a compressed leaf; the message names its path.

    >>> program, inputs = trace(lambda params, x: x @ params["kernel"], {"kernel": jax.numpy.ones((3, 2))}, jax.numpy.ones((1, 3)))
    >>> program.paths, len(inputs), program.outputs.shape
    (('kernel',), 2, (1, 2))
    """
    names, leaves, _ = tree.flatten(params)
    for name, leaf in zip(names, leaves, strict=True):
        if tree.is_compressed(leaf):
            raise TypeError(
                f"{name} is stored as {type(leaf).__name__}: tracing walks dense weights; compress.decompress(params) first"
            )
    inputs, rebuilt = arrays_of((params, args, kwargs))

    def flat(*arrays: Any) -> Any:
        p, a, k = rebuilt(arrays)
        return apply(p, *a, **k)

    jaxpr, outputs = jax.make_jaxpr(flat, return_shape=True)(*inputs)
    paths = tuple(name for name, leaf in zip(names, leaves, strict=True) if _is_array(leaf))
    return Program(jaxpr, paths, outputs), inputs


def arrays_of(whole: PyTree) -> tuple[list[Any], Callable[[Sequence[Any]], PyTree]]:
    """The arrays of a tree, and the function that puts others in their places; what has no shape and dtype stays.

    >>> arrays, rebuilt = arrays_of({"activation": "relu", "kernel": jax.ShapeDtypeStruct((2,), "float32")})
    >>> rebuilt([1.0])
    {'activation': 'relu', 'kernel': 1.0}
    """
    leaves, structure = jax.tree.flatten(whole)

    def rebuilt(arrays: Sequence[Any]) -> PyTree:
        rest = iter(arrays)
        return jax.tree.unflatten(structure, [next(rest) if _is_array(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if _is_array(leaf)], rebuilt


def like(array: Any, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    """An array of another shape and of the same kind: of its dtype, and as ready to take that of another.

    >>> like(jax.numpy.full((2,), 1.0), (3,)).weak_type
    True
    """
    return jax.ShapeDtypeStruct(shape, array.dtype, weak_type=bool(getattr(array, "weak_type", False)))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


class Frame(NamedTuple):
    """A primitive around an equation: its name, and the length where it is a scan."""

    primitive: str
    length: int | None = None


class Place(NamedTuple):
    """Where an equation stands: its number in each program around it, from the outside, and the primitives that hold those.

    Attributes:
      address: equation, body, equation, body, ..., equation: the same in every trace of the same function at the same shapes.
      frames: one for each program around it but the outermost.
    """

    address: tuple[int, ...] = ()
    frames: tuple[Frame, ...] = ()


class Rules(NamedTuple):
    """What labels are, and how first-order equations change them.

    A walk visits a loop's body more often than once, until the labels of its carry are settled; `settled` tells the last visit, the
    one to take notes in. Labels must compare equal when they are, and `join` must come to rest.

    Attributes:
      equation: `(eqn, labels, place, settled) -> labels of the results`.
      join: `(a, b, name) -> label` of a value that is one or the other; `name` is the primitive where they meet.
      decided: `(label, by, name) -> label` of a value that a value labelled `by` has chosen among others (`cond`, `while`).
      part: `(label, depth) -> label` of the entry that one step of a scan takes.
      whole: `(label, name, length) -> label` of what the steps of a scan leave, stacked; or of what is left by every device, of
        which the number is None.
      shard: `(label, shape) -> label` of one device's part.
      constant: the label of a literal.
      closed: primitives that hold programs and are given to `equation` all the same, as if they were first-order ones.
    """

    equation: Callable[[Any, list[Any], Place, bool], Sequence[Any]]
    join: Callable[[Any, Any, str], Any]
    decided: Callable[[Any, Any, str], Any]
    part: Callable[[Any, int], Any]
    whole: Callable[[Any, str, int | None], Any]
    shard: Callable[[Any, tuple[int, ...]], Any]
    constant: Any
    closed: Container[str] = frozenset()


class Seen(NamedTuple):
    """What to look at, and what to put in its place, while a program runs.

    States are kept by name and threaded through the program. A scan either carries a state from step to step, or hands each step
    its own entry of a leading axis.

    Attributes:
      names: for every address of an equation that is looked at, the names of its states.
      look: `(name, state, operands, output) -> state`.
      stacked: `(name, depth) -> bool`: whether the scan at that depth hands out entries of this state, rather than to carry it.
      put: `(name, state, output) -> output`: what the program goes on with instead of the result, by the state after the look; None
        leaves all results as they are.
    """

    names: Mapping[tuple[int, ...], Sequence[str]]
    look: Callable[[str, PyTree, Sequence[Any], Any], PyTree]
    stacked: Callable[[str, int], bool]
    put: Callable[[str, PyTree, Any], Any] | None = None

    def below(self, address: tuple[int, ...]) -> list[str]:
        """The states of what stands in the program or programs at an address."""
        return [name for at, names in self.names.items() if at[: len(address)] == address for name in names]


class Form(NamedTuple):
    """A primitive that holds programs.

    Attributes:
      flow: `(eqn, labels, inside, rules, depth) -> labels`, where `inside(k, jaxpr, labels, settled=True, length=None)` walks the
        k-th of its programs and `depth` is theirs.
      run: `(eqn, values, states, inside, stacked) -> (values, states)`, where `inside(k, jaxpr, values, states)` runs the k-th and
        `stacked` names the states whose entries a scan hands out; None where nothing inside can be looked at.
    """

    flow: Callable[..., Sequence[Any]]
    run: Callable[..., tuple[Sequence[Any], dict[str, PyTree]]] | None


def flow(jaxpr: Any, labels: Sequence[Any], rules: Rules, place: Place | None = None, settled: bool = True) -> list[Any]:
    """Walks a program forward: the labels of its results from those of its arguments.

    >>> depends = lambda eqn, labels, place, settled: [any(labels)] * len(eqn.outvars)
    >>> either, same = lambda a, b, name: a or b, lambda label, *_: label
    >>> rules = Rules(depends, either, either, same, same, same, False)
    >>> program = jax.make_jaxpr(jax.jit(lambda x, y: (x + 1, jax.numpy.dot(x, y), 2)))(1.0, 2.0)
    >>> flow(program, [False, True], rules)
    [False, True, False]
    """
    place = Place() if place is None else place
    variables, consts, eqns, results = _opened(jaxpr)
    env = dict(zip(variables, [*[rules.constant] * len(consts), *labels], strict=True))
    for number, eqn in enumerate(eqns):
        given = [rules.constant if isinstance(v, Literal) else env[v] for v in eqn.invars]
        here = Place((*place.address, number), place.frames)
        if (form := FORMS.get(eqn.primitive.name)) is None or eqn.primitive.name in rules.closed:
            out = rules.equation(eqn, given, here, settled)
        else:
            out = form.flow(eqn, given, functools.partial(_flow_inside, rules, here, eqn, settled), rules, len(place.frames))
        env.update(zip(eqn.outvars, out, strict=True))
    return [rules.constant if isinstance(v, Literal) else env[v] for v in results]


def _flow_inside(rules, place, eqn, visit, k, jaxpr, labels, settled=True, length=None):
    frames = (*place.frames, Frame(eqn.primitive.name, length))
    return flow(jaxpr, labels, rules, Place((*place.address, k), frames), settled and visit)


def run(
    jaxpr: Any, values: Sequence[Any], states: dict[str, PyTree], seen: Seen, place: Place | None = None
) -> tuple[list[Any], dict[str, PyTree]]:
    """Runs a program, and the states of what is seen on the way along with it; as it is, unless something is put into it.

    Only primitives that hold something to be seen are opened; the others are bound unchanged.

    >>> program = jax.make_jaxpr(lambda x, y: jax.numpy.dot(x, y) + 1)(2.0, 3.0)
    >>> product = next(k for k, eqn in enumerate(program.eqns) if eqn.primitive.name in ("dot_general", "mul"))
    >>> seen = Seen({(product,): ["dot"]}, lambda name, state, operands, output: state + output, lambda name, depth: False)
    >>> run(program, [2.0, 3.0], {"dot": 10.0}, seen)[1]
    {'dot': Array(16., dtype=float32, weak_type=True)}
    """
    place = Place() if place is None else place
    variables, consts, eqns, results = _opened(jaxpr)
    env = dict(zip(variables, [*consts, *values], strict=True))
    for number, eqn in enumerate(eqns):
        given = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        here = Place((*place.address, number), place.frames)
        name, form = eqn.primitive.name, FORMS.get(eqn.primitive.name)
        with eqn.ctx.manager:
            if form is not None and (inner := seen.below(here.address)):
                if form.run is None:
                    raise NotImplementedError(
                        f"{inner[0]} lies under {name}, where nothing can be handed out; leave it out of `where`"
                    )
                stacked = {state for state in inner if seen.stacked(state, len(place.frames))}
                inside = functools.partial(_run_inside, seen, here, eqn)
                out, new = form.run(eqn, given, {state: states[state] for state in inner}, inside, stacked)
                states = {**states, **new}
            else:
                out = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
                out = out if eqn.primitive.multiple_results else [out]
        for state in seen.names.get(here.address, ()):
            states = {**states, state: seen.look(state, states[state], given, out[0])}
            if seen.put is not None:
                out = [seen.put(state, states[state], out[0]), *out[1:]]
        env.update(zip(eqn.outvars, out, strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in results], states


def _run_inside(seen, place, eqn, k, jaxpr, values, states):
    return run(jaxpr, values, states, seen, Place((*place.address, k), (*place.frames, Frame(eqn.primitive.name))))


def _opened(jaxpr: Any) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Variables (those of constants first), constants, equations and results of a jaxpr, closed or not."""
    consts = getattr(jaxpr, "consts", ())
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return [*inner.constvars, *inner.invars], consts, inner.eqns, inner.outvars


# A call: one program, which takes the arguments and gives the results.


def _call(key: str, around: Callable[[Any, Callable], Callable] | None = None) -> Form:
    """The form of a primitive whose parameter `key` is the program that it calls; `around` wraps the running function."""

    def flow_call(eqn, labels, inside, rules, depth):
        del rules, depth
        return inside(0, eqn.params[key], labels)

    def run_call(eqn, values, states, inside, stacked):
        del stacked
        called = functools.partial(inside, 0, eqn.params[key])
        return (called if around is None else around(eqn, called))(values, states)

    return Form(flow_call, run_call)


def _rematerialised(eqn: Any, called: Callable) -> Callable:
    return jax.checkpoint(called, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])


def _placed(eqn: Any, called: Callable) -> Callable:
    """A jitted function run in line keeps the shardings that it asked for."""

    def constrained(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
        asked = [isinstance(sharding, jax.sharding.Sharding) for sharding in shardings]
        return [
            lax.with_sharding_constraint(value, sharding) if yes else value
            for value, sharding, yes in zip(values, shardings, asked, strict=True)
        ]

    def run_placed(values, states):
        out, states = called(constrained(values, eqn.params["in_shardings"]), states)
        return constrained(out, eqn.params["out_shardings"]), states

    return run_placed


# A scan: the carry's labels are those that hold before and after every step.


def _scan_parts(eqn: Any, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Constants, carry and slices among the arguments of a scan; JAX 0.11 wrote their numbers elsewhere."""
    if "ft_in" in eqn.params:
        consts, carry, _ = (len(part) for part in eqn.params["ft_in"].unpack())
    else:
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    return list(values[:consts]), list(values[consts : consts + carry]), list(values[consts + carry :])


def _settled(carry: list[Any], step: Callable[[list[Any]], Sequence[Any]], rules: Rules, name: str) -> list[Any]:
    """The labels of a carry once a further step changes none of them."""
    while True:
        joined = [rules.join(a, b, name) for a, b in zip(carry, step(carry), strict=True)]
        if joined == carry:
            return carry
        carry = joined


def _flow_scan(eqn, labels, inside, rules, depth):
    consts, carry, xs = _scan_parts(eqn, labels)
    xs = [rules.part(label, depth) for label in xs]

    def body(carry: list[Any], settled: bool) -> Sequence[Any]:
        return inside(0, eqn.params["jaxpr"], [*consts, *carry, *xs], settled, eqn.params["length"])

    carry = _settled(carry, lambda carry: body(carry, settled=False)[: len(carry)], rules, "scan")
    out = body(carry, settled=True)
    return [*carry, *(rules.whole(label, "scan", eqn.params["length"]) for label in out[len(carry) :])]


def _run_scan(eqn, values, states, inside, stacked):
    consts, carry, xs = _scan_parts(eqn, values)

    def body(carried, sliced):
        carry, kept = carried
        xs, own = sliced
        out, new = inside(0, eqn.params["jaxpr"], [*consts, *carry, *xs], {**kept, **own})
        handed = {name: state for name, state in new.items() if name in stacked}
        rest = {name: state for name, state in new.items() if name not in stacked}
        return (out[: len(carry)], rest), (out[len(carry) :], handed)

    kept = {name: state for name, state in states.items() if name not in stacked}
    own = {name: state for name, state in states.items() if name in stacked}
    length, reverse, unroll = eqn.params["length"], eqn.params["reverse"], eqn.params["unroll"]
    (carry, kept), (ys, own) = lax.scan(body, (carry, kept), (xs, own), length, reverse, unroll)
    return [*carry, *ys], {**kept, **own}


# A while loop: as a scan, but how often its body runs is decided inside.


def _while_parts(eqn: Any, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Constants of the condition, constants of the body, and carry."""
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    return list(values[:first]), list(values[first : first + second]), list(values[first + second :])


def _flow_while(eqn, labels, inside, rules, depth):
    del depth
    of_cond, of_body, carry = _while_parts(eqn, labels)
    start = list(carry)
    body, cond = eqn.params["body_jaxpr"], eqn.params["cond_jaxpr"]
    carry = _settled(carry, lambda carry: inside(1, body, [*of_body, *carry], settled=False), rules, "while")
    (goes_on,) = inside(0, cond, [*of_cond, *carry])
    inside(1, body, [*of_body, *carry])
    # What no step changes is what it was; a constant may stand for a count of steps.
    kept = [after == before != rules.constant for before, after in zip(start, carry, strict=True)]
    return [label if same else rules.decided(label, goes_on, "while") for label, same in zip(carry, kept, strict=True)]


def _run_while(eqn, values, states, inside, stacked):
    del stacked
    of_cond, of_body, carry = _while_parts(eqn, values)
    body, cond = eqn.params["body_jaxpr"], eqn.params["cond_jaxpr"]

    def goes_on(carried):
        (value,), _ = inside(0, cond, [*of_cond, *carried[0]], _Untouchable("the condition of a while loop"))
        return value

    return lax.while_loop(goes_on, lambda carried: tuple(inside(1, body, [*of_body, *carried[0]], carried[1])), (carry, states))


class _Untouchable(dict):
    """States where none can be kept: asking for one names it."""

    def __init__(self, where: str):
        super().__init__()
        self._where = where

    def __missing__(self, name: str):
        raise NotImplementedError(f"{name} lies in {self._where}, from where nothing can be handed out; leave it out of `where`")


# A conditional: any of its branches may have made the result.


def _flow_cond(eqn, labels, inside, rules, depth):
    del depth
    index, *given = labels
    branches = [inside(k, branch, given) for k, branch in enumerate(eqn.params["branches"])]
    joined = [functools.reduce(lambda a, b: rules.join(a, b, "cond"), results) for results in zip(*branches, strict=True)]
    alike = [all(result == results[0] for result in results) for results in zip(*branches, strict=True)]
    return [label if same else rules.decided(label, index, "cond") for label, same in zip(joined, alike, strict=True)]


def _run_cond(eqn, values, states, inside, stacked):
    del stacked
    index, *given = values
    branches = [functools.partial(inside, k, jaxpr) for k, jaxpr in enumerate(eqn.params["branches"])]
    if (platforms := eqn.params.get("branches_platforms")) is None:
        return lax.switch(index, branches, given, states)
    named = {name: branch for names, branch in zip(platforms, branches, strict=True) for name in names or ()}
    default = next((branch for names, branch in zip(platforms, branches, strict=True) if names is None), None)
    return lax.platform_dependent(given, states, default=default, **named)


# A function over a mesh: each device sees its part.


def _flow_shard_map(eqn, labels, inside, rules, depth):
    del depth
    inner = eqn.params["jaxpr"]
    local = [rules.shard(label, variable.aval.shape) for label, variable in zip(labels, _opened(inner)[0], strict=True)]
    return [rules.whole(label, "shard_map", None) for label in inside(0, inner, local)]


FORMS: dict[str, Form] = {
    "jit": _call("jaxpr", _placed),
    "remat2": _call("jaxpr", _rematerialised),
    "checkpoint": _call("jaxpr", _rematerialised),
    "closed_call": _call("call_jaxpr"),
    "core_call": _call("call_jaxpr"),
    "custom_jvp_call": _call("call_jaxpr"),
    "custom_vjp_call": _call("call_jaxpr"),
    "custom_vmap_call": _call("call"),
    "scan": Form(_flow_scan, _run_scan),
    "while": Form(_flow_while, _run_while),
    "cond": Form(_flow_cond, _run_cond),
    "shard_map": Form(_flow_shard_map, None),
}
