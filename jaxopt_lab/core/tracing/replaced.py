"""Running a program without some of its regions, with some twice in a row, or with the steps of a scan in another order."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal, jaxpr_as_fun

from jaxopt_lab.core.tracing.levels import CALLS, body_of, carry_of, elementwise, is_key, opened, raw_keys, variables
from jaxopt_lab.core.tracing.programs import FORMS, Program
from jaxopt_lab.core.tracing.regions import Region, Stack

__all__ = ["Dropped", "Edit", "Repeated", "Restacked", "replaced"]

Address = tuple[int, ...]


class Dropped(NamedTuple):
    """The value that enters a region stands for the one that leaves it.

    Attributes:
      place: the region.
    """

    place: Region


class Repeated(NamedTuple):
    """A region runs again, on the value that leaves it, with other parameters. Keys that enter it are folded with 1 for that.

    Attributes:
      place: the region.
      params: by path, those that are others.
      instead: by the number of an equation, what takes its operands in the second run instead, and gives its result.
    """

    place: Region
    params: Mapping[str, Any]
    instead: Mapping[int, Callable[..., Any]] = {}


class Restacked(NamedTuple):
    """The steps of a scan in another order, some left out or several times; in the second time keys are folded with 1, and so on.

    Attributes:
      place: the scan. Its stacked parameters are given in the new order already; what else it slices is put into it.
      order: the numbers of the steps.
    """

    place: Stack
    order: tuple[int, ...]


Edit = Dropped | Repeated | Restacked


def replaced(
    program: Program, inputs: Sequence[Any], edits: Sequence[Edit], unwanted: Collection[int] = ()
) -> tuple[list[Any], list[dict[int, Any]]]:
    """Runs a program with some of it replaced.

    Primitives that hold something to be replaced are opened, the others are bound unchanged.

    Args:
      program: as `programs.trace` gives it.
      inputs: what it takes.
      edits: what is replaced, each apart from the others or wholly inside of a dropped one.
      unwanted: outputs that may be missing.

    Returns:
      The outputs, None for those that are unwanted; and for each edit the outputs of its second run, of those that depend on it
      otherwise than through `y`, such as running statistics.

    Raises:
      ValueError: an output needs the inside of what was dropped.
      NotImplementedError: something is done with parameters in a new order that asks for their number.

    >>> from jaxopt_lab.core.tracing import programs, regions
    >>> params = {"a": jnp.eye(2), "b": jnp.ones((2, 1))}
    >>> program, inputs = programs.trace(lambda p, x: jax.nn.relu(x @ p["a"] + x) @ p["b"], params, jnp.ones((1, 2)))
    >>> region = regions.find(program, {"a": ["a"]})["a"]
    >>> replaced(program, inputs, [Dropped(region)])[0][0].tolist()
    [[2.0]]
    >>> replaced(program, inputs, [Repeated(region, {"a": 2 * jnp.eye(2)})])[0][0].tolist()
    [[12.0]]
    """
    names = {str(k): edit for k, edit in enumerate(edits)}
    places = {path: k for k, path in enumerate(program.paths)}
    states = {
        _into(name, places[path]): value
        for name, edit in names.items()
        if isinstance(edit, Repeated)
        for path, value in edit.params.items()
    }
    outputs, states = _Run(names).level((), program.jaxpr, inputs, states)
    missing = [k for k, out in enumerate(outputs) if out is None and k not in unwanted]
    if missing:
        raise ValueError(f"output {missing[0]} needs what is computed inside of what was dropped")
    out_of = [{k: states[_out_of(name, k)] for k in range(len(outputs)) if _out_of(name, k) in states} for name in names]
    return [None if k in unwanted else out for k, out in enumerate(outputs)], out_of


# What runs again is taken along as states: by the name of the edit and the number of the operand, or of the result.


def _into(name: str, operand: int) -> str:
    return f"{name}<{operand}"


def _out_of(name: str, result: int) -> str:
    return f"{name}>{result}"


class _Run(NamedTuple):
    """A run of a program.

    Attributes:
      edits: by name.
    """

    edits: Mapping[str, Edit]

    def level(
        self, address: Address, jaxpr: Any, values: Sequence[Any], states: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Runs one level: its results, None where they are missing, and the states with what came out of second runs."""
        constants, inputs, eqns, results = opened(jaxpr)
        env = dict(constants) | {v: value for v, value in zip(inputs, values, strict=True) if value is not None}
        below = [name for name, edit in self.edits.items() if edit.place.level[: len(address)] == address]
        again = {name: {v: states[_into(name, k)] for k, v in enumerate(inputs) if _into(name, k) in states} for name in below}
        here = {name: self.edits[name] for name in below if self.edits[name].place.level == address}
        dropped = {k for edit in here.values() if isinstance(edit, Dropped) for k in edit.place.equations}
        for number, eqn in enumerate(eqns):
            inner = (*address, number, 0)
            held = [name for name in below if self.edits[name].place.level[: len(inner)] == inner]
            runs = number not in dropped and all(v in env for v in variables(eqn))
            with eqn.ctx.manager:
                if held and runs:
                    self._open(inner, eqn, held, env, again)
                elif runs:
                    steps = [edit for edit in here.values() if isinstance(edit, Restacked) and edit.place.equation == number]
                    given = _given(eqn, env)
                    out = _restacked(eqn, given, steps[0], raw_keys(jaxpr)) if steps else _bound(eqn, given)
                    env.update(zip(eqn.outvars, out, strict=True))
                    # What other parameters go through before they meet the inputs, and second results behind the region.
                    for name, own in again.items():
                        outside = name not in here or number not in getattr(here[name].place, "equations", ())
                        if outside and not own.keys().isdisjoint(variables(eqn)):
                            own.update(zip(eqn.outvars, _bound(eqn, _given(eqn, env | own)), strict=True))
            for name, edit in here.items():
                if not isinstance(edit, Restacked) and edit.place.y[0] == number:
                    x, y = _value(jaxpr, edit.place.x), _value(jaxpr, edit.place.y)
                    if isinstance(edit, Repeated):
                        env[y] = _run_again(jaxpr, edit, env, again[name])
                    elif x in env:
                        env[y] = env[x]
        new = {_out_of(name, k): own[v] for name, own in again.items() for k, v in enumerate(results) if _is_in(v, own)}
        return [v.val if isinstance(v, Literal) else env.get(v) for v in results], {**states, **new}

    def _open(self, inner: Address, eqn: Any, held: list[str], env: dict[Any, Any], again: dict[str, dict[Any, Any]]) -> None:
        """Runs an equation whose program holds edits, and takes the second operands and results along."""
        states = {_into(name, k): again[name][v] for name in held for k, v in enumerate(eqn.invars) if _is_in(v, again[name])}
        body, scanned = body_of(eqn), eqn.primitive.name == "scan"
        _, inputs, _, results = opened(body)
        sliced = [outer.aval.shape != own.aval.shape for outer, own in zip(eqn.invars, inputs, strict=True)]
        left = [outer.aval.shape != own.aval.shape for outer, own in zip(eqn.outvars, results, strict=True)]
        stacked = {_into(name, k) for name in held for k, yes in enumerate(sliced) if yes}
        stacked |= {_out_of(name, k) for name in held for k, yes in enumerate(left) if yes}

        missing: set[int] = set()

        def inside(_, jaxpr, values, own):
            out, new = self.level(inner, jaxpr, values, own)
            missing.update(k for k, value in enumerate(out) if value is None)
            # What runs is a function of arrays: zeros stand for what is missing, until it is out.
            out = [jnp.zeros(v.aval.shape, v.aval.dtype) if o is None else o for v, o in zip(results, out, strict=True)]
            return out, {name: value for name, value in new.items() if not scanned or name in stacked or name in own}

        run = FORMS[eqn.primitive.name].run
        assert run is not None
        out, new = run(eqn, _given(eqn, env), states, inside, stacked)
        env.update((v, value) for k, (v, value) in enumerate(zip(eqn.outvars, out, strict=True)) if k not in missing)
        for name in held:
            again[name].update((v, new[_out_of(name, k)]) for k, v in enumerate(eqn.outvars) if _out_of(name, k) in new)


def _value(jaxpr: Any, place: tuple[int, int]) -> Any:
    """The variable at a place, as a region names it."""
    _, inputs, eqns, _ = opened(jaxpr)
    number, index = place
    return inputs[index] if number < 0 else eqns[number].outvars[index]


def _is_in(value: Any, held: Mapping[Any, Any]) -> bool:
    return not isinstance(value, Literal) and value in held


def _given(eqn: Any, env: Mapping[Any, Any]) -> list[Any]:
    return [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]


def _bound(eqn: Any, given: Sequence[Any]) -> Sequence[Any]:
    """The results of an equation on values, which may have another shape where that is the operation's own."""
    as_written = all(jnp.shape(value) == v.aval.shape for v, value in zip(eqn.invars, given, strict=True))
    if not as_written and eqn.primitive.name in CALLS:
        return _Run({}).level((), body_of(eqn), given, {})[0]
    if not as_written and not elementwise(eqn):
        raise NotImplementedError(
            f"{eqn.primitive.name} takes {jnp.shape(given[0])} instead of {eqn.invars[0].aval.shape}, and what it makes of another "
            "number of steps or channels is not known; do this inside of the layer, or leave the layer as it is"
        )
    out = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def _run_again(jaxpr: Any, edit: Repeated, env: Mapping[Any, Any], own: dict[Any, Any]) -> Any:
    """The value that leaves a region in its second run; what else is made there goes into `own`."""
    eqns, keys = opened(jaxpr)[2], raw_keys(jaxpr)
    x, y = _value(jaxpr, edit.place.x), _value(jaxpr, edit.place.y)
    values, folded = {**env, **own, x: env[y]}, set(own)
    for number in edit.place.equations:
        eqn = eqns[number]
        for v in variables(eqn):
            if v not in folded and (is_key(v) or v in keys):
                values[v] = _folded(values[v], 1, keys.get(v))
            folded.add(v)
        given = _given(eqn, values)
        with eqn.ctx.manager:
            out = [edit.instead[number](*given)] if number in edit.instead else _bound(eqn, given)
        made = dict(zip(eqn.outvars, out, strict=True))
        values |= made
        own |= made
        folded.update(made)
    return own.pop(y)


def _restacked(eqn: Any, given: Sequence[Any], edit: Restacked, keys: Mapping[Any, Any]) -> Sequence[Any]:
    """The results of a scan whose steps are others."""
    carried, values = carry_of(eqn), list(given)
    for k, v in enumerate(eqn.invars):
        # What is sliced stands last; stacked parameters are in order.
        if k >= carried.stop and k not in edit.place.operands:
            values[k] = values[k][np.asarray(edit.order)]
            if is_key(v) or _is_in(v, keys):
                values[k] = _folded_again(values[k], edit.order, keys.get(v))
    consts, carry, xs = values[: carried.start], values[carried.start : carried.stop], values[carried.stop :]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        out = jaxpr_as_fun(body_of(eqn))(*consts, *carry, *xs)
        return out[: len(carry)], out[len(carry) :]

    length, unroll = len(edit.order), eqn.params["unroll"]
    carry, ys = lax.scan(body, carry, xs, length, eqn.params["reverse"], min(unroll, length))
    return [*carry, *ys]


# Keys of random numbers.


def _folded(key: Any, data: int, impl: Any = None) -> Any:
    """Keys, of any shape, with a number folded in; `impl` is that of those that are stored as plain numbers."""
    typed = key if impl is None else jax.random.wrap_key_data(key, impl=impl)
    flat = jax.vmap(lambda one: jax.random.fold_in(one, data))(typed.reshape(-1)).reshape(typed.shape)
    return flat if impl is None else jax.random.key_data(flat)


def _folded_again(keys: Any, order: Sequence[int], impl: Any) -> Any:
    """Keys of steps, those that come again folded with how often they came before."""
    seen: Counter[int] = Counter()
    parts = []
    for k, step in enumerate(order):
        parts.append(_folded(keys[k], seen[step], impl) if seen[step] else keys[k])
        seen[step] += 1
    return jnp.stack(parts)
