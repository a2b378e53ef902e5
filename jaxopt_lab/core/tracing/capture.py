"""What parameters meet when a function runs: their inputs, live, inside the compiled program."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_lab.core import tree
from jaxopt_lab.core.tracing.programs import Seen, arrays_of, run, trace
from jaxopt_lab.core.tracing.walks import Site, Walk, follow
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["Live", "Reducer", "Tap", "collect", "reducing", "tapped"]


class Live(NamedTuple):
    """The operands and the result of a product at a site (in `Reducer.init`, their shapes and dtypes).

    Attributes:
      input: what the parameter met.
      weight: the operand that is, or holds, the parameter.
      output: the product.
    """

    input: Array
    weight: Array
    output: Array


class Tap(NamedTuple):
    """What a tap gave at one site.

    Attributes:
      value: what it returned; with a leading axis for each scan around the site, from the outside. Zeros where the site never ran;
        from its last run where a `while` loop ran it more than once.
      times: how often the site ran, int32, with the same leading axes: 1, unless it lies under a `cond` or a `while`.
    """

    value: PyTree
    times: Array


class Reducer(NamedTuple):
    """A statistic that is gathered over many inputs: a state, and how an input changes it.

    Attributes:
      init: `(site, live) -> state`, from shapes and dtypes; None leaves the site out.
      update: `(site, state, live) -> state` of the same shapes and dtypes.
    """

    init: Callable[[Site, Live], PyTree]
    update: Callable[[Site, PyTree, Live], PyTree]


def tapped(
    apply: Callable[..., Any],
    tap: Callable[[Site, Live], PyTree],
    where: Where | None = None,
    *,
    strict: bool = True,
) -> Callable[..., tuple[Any, dict[str, Tap]]]:
    """The same function, which also returns what `tap` makes of every input that a chosen parameter meets.

    It is a pure function like `apply`: jit it, since eager it keeps every intermediate. The bodies that hold a site are run in
    forward form: a `custom_jvp` or `custom_vjp` among them loses its own derivative.

    Args:
      apply: any function `apply(params, *args, **kwargs)`.
      tap: `(site, live) -> tree of arrays`; None leaves the site out.
      where: which parameters (see `tree.select`); None is all that meet a product.
      strict: refuse chosen parameters that meet no product, or reach one in a way that the walk cannot follow.

    Returns:
      `(params, *args, **kwargs) -> (outputs, {name of the site: Tap})`.

    Raises:
      TypeError: the parameters hold a compressed leaf.
      ValueError: nothing matches `where`, or `strict` finds something that a tap would miss; the message names the path.
      NotImplementedError: a chosen site lies under `shard_map` or in the condition of a `while` loop.

    >>> params = {"kernel": jnp.array([[1.0, 2.0], [0.0, 1.0]])}
    >>> largest = tapped(lambda params, x: x @ params["kernel"], lambda site, live: jnp.max(jnp.abs(live.input)))
    >>> outputs, taps = jax.jit(largest)(params, jnp.array([[1.0, -3.0]]))
    >>> outputs.tolist(), float(taps["kernel"].value)
    ([[1.0, -1.0]], 3.0)
    """

    def call(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tap]]:
        program, inputs = trace(apply, params, *args, **kwargs)
        chosen = _chosen(follow(program), params, where, strict)
        shapes = {name: jax.eval_shape(lambda live, site=site: tap(site, live), _shapes(site)) for name, site in chosen.items()}
        kept = {name: chosen[name] for name, shape in shapes.items() if shape is not None}
        states = {}
        for name, site in kept.items():
            lead = tuple(scan.length for scan in site.scans)
            value = jax.tree.map(lambda leaf, lead=lead: jnp.zeros((*lead, *leaf.shape), leaf.dtype), shapes[name])
            states[name] = Tap(value, jnp.zeros(lead, jnp.int32))

        def look(name: str, state: Tap, operands: Sequence[Any], output: Any) -> Tap:
            return Tap(tap(kept[name], _live(kept[name], operands, output)), state.times + 1)

        out, states = run(program.jaxpr, inputs, states, Seen(_addresses(kept), look, lambda name, depth: True))
        return jax.tree.unflatten(jax.tree.structure(program.outputs), out), states

    return call


class Reducing(NamedTuple):
    """A statistic of a function's inputs, as a pair of pure functions.

    Attributes:
      init: `(params, *args, **kwargs) -> states` by name of the site, from shapes and dtypes alone.
      update: `(states, params, *args, **kwargs) -> (outputs, states)`.
    """

    init: Callable[..., dict[str, PyTree]]
    update: Callable[..., tuple[Any, dict[str, PyTree]]]


def reducing(apply: Callable[..., Any], reducer: Reducer, where: Where | None = None, *, strict: bool = True) -> Reducing:
    """The same function, which carries a statistic of every input that a chosen parameter meets from call to call.

    A scan whose steps each take their own entry of a stacked parameter keeps one state for each, along a leading axis; one whose
    steps share the parameter carries a single state through all of them, and so does a `while` loop. A `cond` changes the states of
    the branch it takes.

    Args:
      apply, where, strict: as in `tapped`.
      reducer: the statistic.

    Raises:
      TypeError: an update does not return the shapes and dtypes of the state that it was given; the message names the site.
      ValueError, NotImplementedError: as `tapped`.

    >>> total = Reducer(lambda site, live: jnp.zeros(()), lambda site, state, live: state + jnp.sum(live.input))
    >>> params = {"kernel": jnp.ones((2, 1))}
    >>> init, update = reducing(lambda params, x: x @ params["kernel"], total)
    >>> states = init(params, jnp.ones((3, 2)))
    >>> for x in (jnp.ones((3, 2)), jnp.ones((3, 2))):
    ...     _, states = jax.jit(update)(states, params, x)
    >>> float(states["kernel"])
    12.0
    """

    def init(params: PyTree, *args: Any, **kwargs: Any) -> dict[str, PyTree]:
        program, _ = trace(apply, params, *args, **kwargs)
        return _initial(_chosen(follow(program), params, where, strict), reducer)

    def update(states: Mapping[str, PyTree], params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, PyTree]]:
        program, inputs = trace(apply, params, *args, **kwargs)
        sites = {site.name: site for site in follow(program).sites}
        if missing := [name for name in states if name not in sites]:
            raise ValueError(
                f"there is no site {missing[0]} in this call; the states are those of another function or of other shapes"
            )
        kept = {name: sites[name] for name in states}

        def look(name: str, state: PyTree, operands: Sequence[Any], output: Any) -> PyTree:
            return _like(name, state, reducer.update(kept[name], state, _live(kept[name], operands, output)))

        def stacked(name: str, depth: int) -> bool:
            return _sliced(kept[name], depth)

        out, new = run(program.jaxpr, inputs, dict(states), Seen(_addresses(kept), look, stacked))
        return jax.tree.unflatten(jax.tree.structure(program.outputs), out), new

    return Reducing(init, update)


def collect(
    apply: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    reducer: Reducer,
    where: Where | None = None,
    *,
    max_bytes: int | None = None,
    strict: bool = True,
) -> dict[str, PyTree]:
    """A statistic of every input that a chosen parameter meets, over a set of batches.

    Where the states of all sites together would exceed `max_bytes`, the batches are gone over several times, each time for as many
    sites as fit, in the order of the program. There is one compilation a pass, and one more for each further shape of a batch.

    Args:
      apply: `apply(params, *inputs) -> outputs`.
      params: dense arrays.
      batches: each a dict with "x" (an array, or a tuple of several inputs), or the input itself. All alike but for their leading
        axes.
      reducer: the statistic.
      where, strict: as in `tapped`.
      max_bytes: of states at once; None is no limit.

    Returns:
      The states by name of the site, in the order of the program.

    Raises:
      ValueError: there are no batches, a batch is not like the first, a single state exceeds `max_bytes`, or `batches` is an
        iterator (which can be gone over once) and more passes are needed; and what `tapped` and `reducing` raise.
      TypeError: `batches` is a single batch; and what `reducing` raises.

    >>> squares = Reducer(
    ...     lambda site, live: jnp.zeros(live.input.shape[-1]),
    ...     lambda site, state, live: state + jnp.sum(live.input**2, axis=0),
    ... )
    >>> batches = [{"x": jnp.array([[1.0, 2.0]])}, {"x": jnp.array([[3.0, 0.0], [0.0, 1.0]])}]
    >>> collect(lambda params, x: x @ params["kernel"], {"kernel": jnp.ones((2, 1))}, batches, squares)
    {'kernel': Array([10.,  5.], dtype=float32)}
    """
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        raise TypeError(
            f"`batches` must be a list or another iterable of batches; put the one {type(batches).__name__} into a list"
        )
    once = iter(batches) is batches
    rest = iter(batches)
    try:
        first = next(rest)
    except StopIteration:
        raise ValueError("`batches` is empty: there is nothing to collect from") from None
    try:
        walk = follow(trace(apply, params, *_inputs(first))[0])
    except Exception as error:
        error.add_note(f"while tracing `apply` on the first batch, {_described(first)}")
        raise
    groups = _groups(_chosen(walk, params, where, strict), reducer, max_bytes)
    if once and len(groups) > 1:
        raise ValueError(
            f"max_bytes={max_bytes} needs {len(groups)} passes, but `batches` is an iterator: pass a list, or allow more bytes"
        )
    arrays, rebuilt = arrays_of(params)
    collected: dict[str, PyTree] = {}
    for number, group in enumerate(groups):
        update = jax.jit(_on_arrays(reducing(apply, reducer, where, strict=strict).update, rebuilt), donate_argnums=0)
        states = _initial(group, reducer)
        for k, batch in enumerate(_chained(first, rest) if number == 0 else batches):
            _check_alike(batch, first, k)
            states = update(states, arrays, *_inputs(batch))
        collected |= states
    return collected


def _on_arrays(update: Callable, rebuilt: Callable) -> Callable:
    """`update` as a function that can be compiled: of the arrays of the parameters, giving the states alone."""

    def states_after(states, arrays, *inputs):
        return update(states, rebuilt(arrays), *inputs)[1]

    return states_after


def _chained(first: Any, rest: Iterable[Any]) -> Iterable[Any]:
    yield first
    yield from rest


def _inputs(batch: Any) -> tuple[Any, ...]:
    x = batch["x"] if isinstance(batch, Mapping) and "x" in batch else batch
    return x if isinstance(x, tuple) else (x,)


def _described(batch: Any) -> str:
    return "whose inputs are " + ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(_inputs(batch)))


def _check_alike(batch: Any, first: Any, k: int) -> None:
    kinds = [
        (jax.tree.structure(inputs), [(jnp.shape(leaf)[1:], jnp.result_type(leaf)) for leaf in jax.tree.leaves(inputs)])
        for inputs in (_inputs(batch), _inputs(first))
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"batch {k}, {_described(batch)}, is not like the first, {_described(first)}: "
            "all batches must agree in everything but the leading axis"
        )


def _groups(chosen: Mapping[str, Site], reducer: Reducer, max_bytes: int | None) -> list[dict[str, Site]]:
    """The sites that have a state, in groups whose states fit into `max_bytes`."""
    groups: list[dict[str, Site]] = [{}]
    room = max_bytes
    for name, site in chosen.items():
        state = jax.eval_shape(lambda site=site: _initial({site.name: site}, reducer))
        if not state:
            continue
        nbytes = tree.nbytes(state)
        if max_bytes is not None and nbytes > max_bytes:
            raise ValueError(f"the state of {name} alone takes {nbytes} bytes, more than max_bytes={max_bytes}")
        if room is not None and max_bytes is not None:
            if nbytes > room:
                groups.append({})
                room = max_bytes
            room -= nbytes
        groups[-1][name] = site
    return groups


def _initial(chosen: Mapping[str, Site], reducer: Reducer) -> dict[str, PyTree]:
    states = {}
    for name, site in chosen.items():
        state = reducer.init(site, _shapes(site))
        if state is None:
            continue
        lead = tuple(scan.length for scan in site.scans if scan.sliced)
        # Each in a buffer of its own, so that it can be donated.
        states[name] = jax.tree.map(lambda leaf, lead=lead: jnp.array(jnp.broadcast_to(leaf, (*lead, *jnp.shape(leaf)))), state)
    return states


def _sliced(site: Site, depth: int) -> bool:
    """Whether the program at `depth` around the site is a scan whose steps each take their own entry of the parameter."""
    return site.around[depth] == "scan" and site.scans[site.around[:depth].count("scan")].sliced


def _chosen(walk: Walk, params: PyTree, where: Where | None, strict: bool) -> dict[str, Site]:
    paths = None if where is None else set(tree.selected(params, where))
    chosen = {site.name: site for site in walk.sites if paths is None or site.path in paths}
    if strict:
        lost = [unknown for unknown in walk.unknown if paths is None or unknown.path in paths]
        if lost:
            path, primitive, product = lost[0]
            how = f"meets {primitive}, which may hide a product" if product is None else f"reaches {product} through {primitive}"
            raise ValueError(f"{path} {how}, where its input cannot be told; leave it out of `where`, or pass strict=False")
        met = {site.path for site in chosen.values()}
        if idle := sorted((paths or set()) - met):
            others = ", ".join(walk.others.get(idle[0], ())) or "nothing"
            raise ValueError(f"{idle[0]} meets no product (it meets {others}); leave it out of `where`, or pass strict=False")
    if not chosen:
        raise ValueError("no parameter that was chosen meets a product")
    return chosen


def _addresses(chosen: Mapping[str, Site]) -> dict[tuple[int, ...], list[str]]:
    addresses: dict[tuple[int, ...], list[str]] = {}
    for name, site in chosen.items():
        addresses.setdefault(site.address, []).append(name)
    return addresses


def _shapes(site: Site) -> Live:
    return Live(site.input, site.weight, site.output)  # pyright: ignore[reportArgumentType] (shapes stand for arrays)


def _live(site: Site, operands: Sequence[Any], output: Any) -> Live:
    return Live(operands[site.other], operands[site.operand], output)


def _like(name: str, state: PyTree, new: PyTree) -> PyTree:
    """The new state, once it is seen to have the shapes and dtypes of the old one."""
    old = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), state)
    got = jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), new)
    if old != got:
        raise TypeError(f"the update of {name} must return a state like the one it is given, {old}; it returns {got}")
    # A weak type would be a change of type to a loop.
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.result_type(leaf)), new)
