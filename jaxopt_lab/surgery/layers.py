"""Whole layers left out, or run twice: shallower and deeper models by the traced program."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.coupling.primitives import taken
from jaxopt_lab.core.tracing.levels import inlined, next_values
from jaxopt_lab.core.tracing.products import square
from jaxopt_lab.core.tracing.programs import Program, trace
from jaxopt_lab.core.tracing.regions import find, product, stacked
from jaxopt_lab.core.tracing.replaced import Dropped, Edit, Repeated, Restacked, replaced
from jaxopt_lab.core.tracing.substitution import needed
from jaxopt_lab.core.types import PyTree, Where
from jaxopt_lab.surgery.edits import GONE, by_path, edited, keys
from jaxopt_lab.surgery.states import Source, beginning, state_of

__all__ = [
    "Copies",
    "LayerPlan",
    "Layers",
    "Left",
    "Steps",
    "Twice",
    "applied",
    "bound",
    "chosen",
    "copies_of",
    "drop_layers",
    "length",
    "noted",
    "predict_of",
    "reads",
    "stack_layers",
    "traced",
]

Layers = Where | Sequence[Where] | Mapping[str, Sequence[int]]
"""A selector of the parameters of one layer, several such, or by the selector of stacked parameters the steps of their scan."""


class Left(NamedTuple):
    """A layer that is left out.

    Attributes:
      name: for messages.
      paths: of its parameters.
    """

    name: str
    paths: tuple[str, ...]


class Twice(NamedTuple):
    """A layer that runs twice, the second time with copies of its parameters.

    Attributes:
      name: for messages.
      paths: of its parameters.
      product: it is a product with what follows it, and runs again as one that keeps the shape.
      bare: it runs again before the activation that follows it.
      new: the copies begin anew.
    """

    name: str
    paths: tuple[str, ...]
    product: bool = False
    bare: bool = False
    new: bool = False

    def holds(self, place: str) -> bool:
        """Whether the parameters at and below a place are its own."""
        return any(path == place or path.startswith(f"{place}/") for path in self.paths)


class Steps(NamedTuple):
    """A scan over layers, whose steps are others.

    Attributes:
      name: for messages.
      paths: of its stacked parameters.
      order: the numbers of the old steps, in the new order.
      fresh: the places in that order of layers that begin anew.
    """

    name: str
    paths: tuple[str, ...]
    order: tuple[int, ...]
    fresh: tuple[int, ...] = ()


class Copies(NamedTuple):
    """Where the copies of parameters go.

    Attributes:
      paths: by the path of a copy, that of the parameter.
      keys: by the place of a mapping's entry, the key of its copy in the same mapping.
    """

    paths: Mapping[str, str]
    keys: Mapping[str, Any]

    def beside(self, place: str) -> str:
        """The place of the copy of what stands at a place."""
        return f"{place[: place.rfind('/') + 1]}{self.keys[place]}"


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What becomes of whole layers, and of their parameters; it prints as a list.

    Attributes:
      shapes: by path, the shape and dtype of every parameter before.
      structure: of their tree.
      changes: by layer.
      dropped: paths that the tree loses.
      copies: those that it gains.
      values: by path, what a copy begins with instead, or stands in the fresh steps of a scan instead; None for zeros.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]
    structure: Any
    changes: tuple[Left | Twice | Steps, ...]
    dropped: tuple[str, ...] = ()
    copies: Copies = dataclasses.field(default_factory=lambda: Copies({}, {}))
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        rows = []
        for change in self.changes:
            if isinstance(change, Steps):
                new = f", new in place {_listed(change.fresh)}" if change.fresh else ""
                told = f"steps {_listed(change.order, 12)} of {self.shapes[change.paths[0]].shape[0]}{new}"
            elif isinstance(change, Twice):
                copies = [self.copies.beside(place) for place in self.copies.keys if change.holds(place)]
                told = f"{'a new layer behind it' if change.new else 'twice'}, with {_listed(copies)}"
            else:
                told = f"left out, with {_listed(path for path in change.paths if path in self.dropped) or 'no parameter'}"
            rows.append(f"{change.name}: {told}")
        return "\n".join(rows)

    def cut(self, params: PyTree) -> PyTree:
        """The tree of the changed function.

        Args:
          params: a tree of the paths and shapes that the plan was made for; or a subtree of it, such as the parameters without the
            running statistics. Compressed leaves become dense. Copies of random keys are folded with 1.

        Raises:
          ValueError: a path is unknown, has another shape, or could be of several subtrees.
        """
        names, leaves, treedef = tree.flatten(decompress(params))
        begin, out = beginning(names, self.shapes), []
        held = {begin + name: leaf for name, leaf in zip(names, leaves, strict=True)}
        for path, leaf in held.items():
            if jnp.shape(leaf) != self.shapes[path].shape:
                raise ValueError(f"{path} has shape {jnp.shape(leaf)}, and the plan is for {self.shapes[path].shape}")
            out.append(GONE if path in self.dropped else self._stepped(path, leaf))
        new = {copy: self._begun(copy, held[old]) for copy, old in self.copies.paths.items() if old in held}
        cut = jax.tree.unflatten(treedef, out)
        return _grown(edited(cut) if self.dropped else cut, begin, self.copies.keys, new)

    def bind(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        """The function of the changed tree: `plan.bind(apply)(plan.cut(params), *args)`.

        The function is traced anew in each call, at the shapes of its arguments: batch and length are free. Jit it. Any function of
        the same parameters will do, so `plan.bind(model.apply)` trains what was changed by `model.predict`; an output that is a
        parameter's next value (running statistics) leaves or is doubled together with that.

        Raises:
          ValueError: in a call, when the layers are no layers in this function, or the tree is not the changed one.
        """

        @functools.wraps(apply, updated=())
        def changed_apply(changed: PyTree, *args: Any, **kwargs: Any) -> Any:
            own = by_path(decompress(changed), self.after(), "changed")
            for path, shape in self.after().items():
                if jnp.shape(own[path]) != shape:
                    raise ValueError(f"{path} has shape {jnp.shape(own[path])}, and the plan leaves {shape}: pass plan.cut(params)")
            program, inputs = traced(apply, jax.tree.unflatten(self.structure, self._before(own)), *args, **kwargs)
            inputs[: len(program.paths)] = [own.get(path, was) for path, was in zip(program.paths, inputs, strict=False)]
            function, given = _needed(program, self, inputs, {path: own[path] for path in self.copies.paths})
            absent = {id(value): path for path, value in zip(program.paths, inputs, strict=False) if path in self.dropped}
            if odd := [absent[id(value)] for value in given if id(value) in absent]:
                raise ValueError(f"{odd[0]} was dropped, and in this function it is read outside of its layer")
            return self._returned(program, *function(*given))

        return changed_apply

    def cut_state(self, tx: optax.GradientTransformation, state: PyTree, params: PyTree) -> tuple[PyTree, tuple[str, ...]]:
        """The state of an optimiser for the changed tree.

        What belongs to a dropped parameter leaves, that of a copied one is copied, that of steps goes with them, and that of a new
        layer is what `tx.init` makes it. Arrays are found as in `Plan.cut_state`.

        Args:
          tx: the optimiser.
          state: of it, before.
          params: before, as the optimiser sees them.

        Returns:
          The state, and the paths of what begins anew.

        Raises:
          ValueError: the state is not one of this optimiser on these parameters.
        """
        begin = beginning(tree.paths(params), self.shapes)
        sources: dict[str, Source | None] = {}
        copies = {old: new for new, old in self.copies.paths.items()}
        for change, path in ((own, path) for own in self.changes for path in own.paths):
            own, rest = path[len(begin) :], [np.arange(n) for n in self.shapes[path].shape]
            if isinstance(change, Twice):
                sources[copies[path][len(begin) :]] = None if change.new else Source(own, rest)
            elif isinstance(change, Steps):
                sources[own] = Source(own, [np.array(change.order), *rest[1:]], change.fresh)
        return state_of(tx, state, params, self.cut(params), sources)

    def _steps(self, path: str) -> Steps | None:
        return next((change for change in self.changes if isinstance(change, Steps) and path in change.paths), None)

    def _stepped(self, path: str, leaf: Any) -> Any:
        """A stacked parameter with its steps in the new order."""
        change = self._steps(path)
        if change is None:
            return leaf
        steps = taken(jnp.asarray(leaf), [np.array(change.order), *(np.arange(n) for n in jnp.shape(leaf)[1:])])
        return steps.at[np.array(change.fresh)].set(0) if path in self.values and change.fresh else steps

    def _begun(self, copy: str, leaf: Any) -> Any:
        """What a copy begins with."""
        if copy in self.values:
            return jnp.zeros_like(leaf) if self.values[copy] is None else jnp.asarray(self.values[copy], jnp.result_type(leaf))
        typed = jax.dtypes.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        # Another array, not the same one: a step that donates its arguments takes each once.
        return jax.random.fold_in(leaf, 1) if typed else jnp.array(leaf)

    def after(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the changed tree, by path."""
        after = {path: struct.shape for path, struct in self.shapes.items() if path not in self.dropped}
        for path in after:
            if (change := self._steps(path)) is not None:
                after[path] = (len(change.order), *after[path][1:])
        for copy, old in self.copies.paths.items():
            value = self.values.get(copy)
            after[copy] = self.shapes[old].shape if value is None else np.shape(value)
        return after

    def _before(self, own: Mapping[str, Any]) -> list[Any]:
        """The leaves of the old tree: shapes, where the changed one has none of that path or shape."""
        # A tree in another precision is one as a whole.
        kinds = {struct.dtype: jnp.result_type(own[path]) for path, struct in self.shapes.items() if path in own}
        return [
            jax.ShapeDtypeStruct(struct.shape, kinds.get(struct.dtype, struct.dtype))
            if path not in own or jnp.shape(own[path]) != struct.shape
            else own[path]
            for path, struct in self.shapes.items()
        ]

    def _returned(self, program: Program, out: Sequence[Any], again: Mapping[int, Any]) -> PyTree:
        """What the changed function returns: state of dropped parameters is gone, that of copies stands beside the other."""
        names, _, treedef = tree.flatten(program.outputs)
        ends = next_values(program)
        unwanted = {k for k, own in ends.items() if program.paths[own] in self.dropped}
        whole = jax.tree.unflatten(treedef, [GONE if k in unwanted else value for k, value in enumerate(out)])
        if unwanted:
            whole = edited(whole)
        fronts = {names[k][: len(names[k]) - len(program.paths[ends[k]])] for k in again if k in ends}
        copies = {old: copy for copy, old in self.copies.paths.items()}
        for front in fronts:
            own = {
                front + copies[program.paths[ends[k]]]: value
                for k, value in again.items()
                if k in ends and names[k] == front + program.paths[ends[k]]
            }
            whole = _grown(whole, "", {front + place: key for place, key in self.copies.keys.items()}, own)
        return whole


def _needed(
    program: Program, plan: LayerPlan, inputs: Sequence[Any], copies: Mapping[str, Any]
) -> tuple[Callable[..., tuple[list[Any], dict[int, Any]]], list[Any]]:
    """The run of a program with changed layers, without what nothing comes of, and which of the arrays it takes then.

    What it gives are the outputs, and by their number those of second runs.
    """
    ends = next_values(program)
    unwanted = {k for k, own in ends.items() if program.paths[own] in plan.dropped}

    def run(given: tuple[Sequence[Any], Mapping[str, Any]]) -> tuple[list[Any], dict[int, Any]]:
        out, runs = replaced(program, given[0], _edits(program, plan, given[1]), unwanted)
        again = {k: value for second in runs for k, value in second.items()}
        copied = plan.copies.paths.values()
        if lost := [k for k in again if k not in ends or program.paths[ends[k]] not in copied]:
            raise ValueError(
                f"output {tree.paths(program.outputs)[lost[0]]} is made of parameters of a layer that runs twice, and is not the "
                "next value of one of them; leave it out of what the function returns"
            )
        return out, again

    return needed(run, (inputs, copies))


def _edits(program: Program, plan: LayerPlan, copies: Mapping[str, Any]) -> list[Edit]:
    """What changes in a program; the layers are looked for in it anew."""
    left = {change.name: change.paths for change in plan.changes if isinstance(change, Left)}
    edits: list[Edit] = [Dropped(region) for region in find(program, left).values()] if left else []
    for change in plan.changes:
        if isinstance(change, Steps):
            edits.append(Restacked(stacked(program, change.name, change.paths), change.order))
        elif isinstance(change, Twice):
            own = {old: copies[copy] for copy, old in plan.copies.paths.items() if old in change.paths}
            if change.product:
                found = product(program, change.name, change.paths)
                edits.append(Repeated(found.region, own, {found.number: square(found.equation)}))
            else:
                region = find(program, {change.name: change.paths}, twice=True)[change.name]
                edits.append(Repeated(region.without_activation() if change.bare else region, own))
    return edits


def _listed(parts: Iterable[Any], most: int = 4) -> str:
    parts = list(map(str, parts))
    return ", ".join(parts[:most]) + (f" and {len(parts) - most} more" if len(parts) > most else "")


# Trees that gain entries.


def copies_of(params: PyTree, layers: Sequence[Sequence[str]]) -> Copies:
    """Where the copies of some parameters go: beside them, in the mapping that holds all of the layer there.

    The entry that is copied is the outermost that holds nothing else; of a tree with `params` among its collections it lies within
    one of those. Its copy's key ends in `_copy`, and in a number if there is such a one; numbers go on behind the last.

    Args:
      params: the tree.
      layers: the paths of each.

    Raises:
      ValueError: no mapping lies around a parameter.

    >>> copies = copies_of({"a": {"kernel": 0.0}, "b": [{"w": 0.0}, {"w": 0.0}]}, [["a/kernel", "b/1/w"]])
    >>> copies.paths, copies.keys
    ({'a_copy/kernel': 'a/kernel', 'b/1/w_copy': 'b/1/w'}, {'a': 'a_copy', 'b/1/w': 'w_copy'})
    """
    ways, paths, keys_of_copies = keys(params), {}, {}
    first = 1 if isinstance(params, Mapping) and "params" in params else 0
    for own in layers:
        for path in own:
            parts = [jax.tree_util.keystr((key,), simple=True) for key in ways[path]]
            # The box of an NNX variable is no part of its path.
            parts = parts if "/".join(parts) == path else parts[:-1]
            for length in range(1 + first, len(parts) + 1):
                place, key = "/".join(parts[:length]), ways[path][length - 1]
                held = [other for other in ways if other == place or other.startswith(f"{place}/")]
                if isinstance(key, jax.tree_util.DictKey) and all(other in own for other in held):
                    break
            else:
                raise ValueError(f"{path} lies in no mapping that could hold a copy beside it; put the layer into a dictionary")
            if place not in keys_of_copies:
                front = place[: len(place) - len(parts[length - 1])]
                there = {way[length - 1].key for name, way in ways.items() if name.startswith(front) and len(way) >= length}
                there |= {new for other, new in keys_of_copies.items() if other[: other.rfind("/") + 1] == front}
                keys_of_copies[place] = _free(key.key, there)
            paths["/".join([*parts[: length - 1], str(keys_of_copies[place]), *parts[length:]])] = path
    return Copies(paths, keys_of_copies)


def _free(key: Any, there: set[Any]) -> Any:
    """The key of a copy among those that are there."""
    if not isinstance(key, str):
        return max(there) + 1
    names = (f"{key}_copy" if k == 1 else f"{key}_copy_{k}" for k in itertools.count(1))
    return next(name for name in names if name not in there)


def _grown(node: PyTree, front: str, copied: Mapping[str, Any], leaves: Mapping[str, Any]) -> PyTree:
    """A tree with copies of some of its entries.

    Args:
      node: the tree.
      front: what stands before its paths.
      copied: by the place of an entry, the key of its copy.
      leaves: those of the copies, by path.
    """
    if not copied or jax.tree_util.all_leaves([node]):
        return node
    keyed, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    places = [front + jax.tree_util.keystr(key, simple=True) for key, _ in keyed]
    grown = [_grown(child, f"{place}/", copied, leaves) for place, (_, child) in zip(places, keyed, strict=True)]
    if not isinstance(node, Mapping):
        return jax.tree.unflatten(treedef, grown)
    more = {}
    for place, (_, child) in zip(places, keyed, strict=True):
        start = f"{front}{copied.get(place)}"
        names, _, below = tree.flatten(child)
        new = [leaves.get(f"{start}/{name}" if name else start) for name in names]
        if place in copied and new and all(leaf is not None for leaf in new):
            more[copied[place]] = jax.tree.unflatten(below, new)
    return type(node)({**{key[0].key: child for (key, _), child in zip(keyed, grown, strict=True)}, **more})


# The surgeries.


def chosen(params: PyTree, layers: Layers) -> tuple[PyTree, list[tuple[str, tuple[str, ...], tuple[int, ...] | None]]]:
    """The dense tree, and the name, the paths and the steps of each layer that is chosen.

    Raises:
      ValueError: nothing matches, or two layers have a parameter in common.

    >>> chosen({"a": 1.0, "b": {"c": 2.0}}, ["a", "b/**"])[1]
    [('a', ('a',), None), ('b/**', ('b/c',), None)]
    """
    dense = decompress(params)
    if isinstance(layers, Mapping):
        given = [(where, steps) for where, steps in layers.items()]
    elif isinstance(layers, list | tuple):
        given = [(where, None) for where in layers]
    else:
        given = [(layers, None)]
    found, owners = [], {}
    for k, (where, steps) in enumerate(given):
        paths = tuple(tree.selected(dense, list(where) if isinstance(where, tuple) else where))
        name = where if isinstance(where, str) else ", ".join(where) if isinstance(where, list | tuple) else f"layer {k}"
        if twice := [path for path in paths if path in owners]:
            raise ValueError(f"{twice[0]} belongs to {owners[twice[0]]} and to {name}; give both as one layer")
        owners |= dict.fromkeys(paths, name)
        found.append((name, paths, None if steps is None else tuple(map(int, steps))))
    if not found:
        raise ValueError("no layer is chosen: give a selector of its parameters")
    return dense, found


def noted(params: PyTree, changes: Sequence[Left | Twice | Steps]) -> LayerPlan:
    """A plan of changes, with copies of the parameters of layers that run twice.

    >>> noted({"a": jnp.ones(2)}, [Twice("a", ("a",))]).copies.paths
    {'a_copy': 'a'}
    """
    names, leaves, structure = tree.flatten(params)
    shapes = {name: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for name, leaf in zip(names, leaves, strict=True)}
    copies = copies_of(params, [change.paths for change in changes if isinstance(change, Twice)])
    return LayerPlan(shapes, structure, tuple(changes), copies=copies)


def reads(plan: LayerPlan, apply: Any, params: PyTree, *example: Any) -> set[str]:
    """The parameters that a changed function still reads; it is traced, and raises what its call would.

    >>> params = {"a": jnp.eye(2), "b": jnp.eye(2)}
    >>> plan = noted(params, [Left("a", ("a",))])
    >>> reads(plan, lambda p, x: jnp.sin(x @ p["a"]) @ p["b"], params, jnp.ones((1, 2)))
    {'b'}
    """
    program, _ = traced(predict_of(apply), params, *example)
    after = plan.after()
    inputs = [jax.ShapeDtypeStruct(own.shape, own.dtype) for own in program.jaxpr.in_avals]
    for k, path in enumerate(program.paths):
        inputs[k] = jax.ShapeDtypeStruct(after.get(path, inputs[k].shape), inputs[k].dtype)
    kinds = {copy: plan.shapes[old].dtype for copy, old in plan.copies.paths.items()}
    given = _needed(program, plan, inputs, {copy: jax.ShapeDtypeStruct(after[copy], kind) for copy, kind in kinds.items()})[1]
    read = {id(value) for value in given}
    return {path for path, value in zip(program.paths, inputs, strict=False) if id(value) in read}


def traced(apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> tuple[Program, list[Any]]:
    """`programs.trace`, with compiled functions in line.

    >>> len(traced(jax.jit(lambda p, x: jnp.sin(x) + p), 1.0, jnp.ones(()))[0].jaxpr.eqns)
    2
    """
    program, inputs = trace(apply, params, *args, **kwargs)
    return inlined(program), inputs


def predict_of(apply: Any) -> Callable[..., Any]:
    """The function that is walked: `predict` of a model, or the function itself.

    >>> predict_of(jnp.sin) is jnp.sin
    True
    """
    return getattr(apply, "predict", apply)


def applied(plan: LayerPlan, params: PyTree) -> PyTree:
    """`plan.cut(params)`, or its shapes where that is what `params` are.

    >>> applied(noted({"a": jnp.ones(2)}, [Twice("a", ("a",))]), {"a": jax.ShapeDtypeStruct((2,), "float32")})["a_copy"].shape
    (2,)
    """
    of_shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    return jax.eval_shape(plan.cut, params) if of_shapes else plan.cut(params)


def bound(apply: Any, plan: LayerPlan) -> Any:
    """The function, or the model, of the changed tree.

    >>> bound(lambda p, x: x, noted({"a": jnp.ones(2)}, []))({"a": jnp.ones(2)}, jnp.ones(1)).tolist()
    [1.0]
    """
    if not hasattr(apply, "predict"):
        return plan.bind(apply)
    init = lambda *args, **kwargs: plan.cut(apply.init(*args, **kwargs))  # noqa: E731
    return apply._replace(init=init, apply=plan.bind(apply.apply), predict=plan.bind(apply.predict))


def length(params: PyTree, name: str, paths: Sequence[str], steps: Sequence[int]) -> int:
    """How many steps the scan over some stacked parameters has.

    Raises:
      ValueError: they have several lengths, or a step is out of range.

    >>> length({"w": jnp.ones((3, 2))}, "w", ["w"], [0, 2])
    3
    """
    leaves = tree.selected(params, lambda path, _: path in paths)
    lengths = {path: jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for path, leaf in leaves.items()}
    n = lengths[paths[0]]
    if odd := [path for path, own in lengths.items() if own != n or not own]:
        raise ValueError(f"{name}: {odd[0]} has {lengths[odd[0]]} steps and {paths[0]} has {n}; choose the parameters of one scan")
    if not steps or any(not 0 <= step < n for step in steps):
        raise ValueError(f"{name}: give steps of 0 to {n - 1}; got {_listed(steps, 12) or 'none'}")
    return n


def drop_layers(apply: Callable[..., Any], params: PyTree, *example: Any, layers: Layers) -> tuple[Any, PyTree, LayerPlan]:
    r"""Leaves whole layers out: of :math:`f_n \circ \cdots \circ f_1` those that are not chosen.

    Nothing is known of layers: one is what lies between a value `x` that enters and a value `y` of the same shape and dtype that
    leaves, where all that depends on the parameters chosen, or on `x`, goes through `y` (see `core.tracing.regions`). `x` takes the
    place of `y`. With a dense layer or a convolution goes the activation behind it; with a residual block that behind its sum,
    where the block before has it as well. If of a block one branch is chosen, with its normalisation, the sum becomes what it was
    added to. Axes are told apart by their lengths: give an example whose batch, length and width differ.

    The steps of a scan over stacked parameters are left out of the scan, and the parameters get shorter.

    Args:
      apply: `apply(params, *inputs) -> outputs`; or a `nets.Model`, whose `predict` is walked, and which comes back as a model.
      params: any tree, with running statistics; compressed leaves become dense, and shapes stay shapes.
      example: inputs, arrays or shapes. Batch and length stay free.
      layers: the parameters of the layer (`"**/block_2/**"`, see `tree.select`); a list of such selectors, one for each layer (a
        list inside is one layer); or by the selector of stacked parameters the numbers of the steps to leave out.

    Returns:
      `(small_apply, small_params, plan)`: a pure function that jits, differentiates, maps and trains on; the tree without the
      parameters that nothing else reads; and the plan, which cuts other trees and the optimiser's state likewise.

    Raises:
      ValueError: nothing matches a selector, a layer changes the shape or is used inside from outside, or reads what only it reads
        and was not chosen; steps are out of range, or none is left.

    >>> params = {"a": jnp.eye(2), "b": 2 * jnp.eye(2), "c": jnp.ones((2, 1))}
    >>> apply = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    >>> small_apply, small, plan = drop_layers(apply, params, jnp.ones((1, 2)), layers="b")
    >>> print(plan)
    b: left out, with b
    >>> list(small), small_apply(small, jnp.ones((3, 2))).tolist()
    (['a', 'c'], [[2.0], [2.0], [2.0]])

    Source: Fan, Grave and Joulin, "Reducing transformer depth on demand with structured dropout", 2020; Sajjad et al., "On the
    effect of dropping layers of pre-trained transformer models", 2023.
    """
    dense, found = chosen(params, layers)
    changes: list[Left | Twice | Steps] = []
    for name, paths, steps in found:
        if steps is None:
            changes.append(Left(name, paths))
            continue
        n = length(dense, name, paths, steps)
        order = tuple(k for k in range(n) if k not in {*steps})
        if not order:
            raise ValueError(f"{name}: all {n} steps would be left out; drop the layer as a whole, by its selector alone")
        changes.append(Steps(name, paths, order))
    selected = tuple(path for change in changes if isinstance(change, Left) for path in change.paths)
    plan = dataclasses.replace(noted(dense, changes), dropped=selected)
    read = reads(plan, apply, dense, *example)
    plan = dataclasses.replace(plan, dropped=tuple(path for path in selected if path not in read))
    return bound(apply, plan), applied(plan, dense), plan


def stack_layers(apply: Callable[..., Any], params: PyTree, *example: Any, layers: Layers) -> tuple[Any, PyTree, LayerPlan]:
    r"""Runs whole layers twice in a row, the second time with a copy of their parameters: a deeper model to train on.

    .. math:: \cdots \circ f_k(\theta_k) \circ \cdots \mapsto \cdots \circ f_k(\theta'_k) \circ f_k(\theta_k) \circ \cdots, \qquad
              \theta'_k = \theta_k

    What a layer is says `drop_layers`; with a residual block goes any activation behind its sum that doing twice is doing once
    (ReLU). The function is another one at first. Random keys that enter the layer are folded with 1 for its second run, and
    running statistics get copies of their own.

    Args:
      apply, params, example: as in `drop_layers`.
      layers: the parameters of the layer, or a list of selectors, one for each layer, as in `drop_layers`. All blocks chosen as one
        layer are run again as a whole. Or by the selector of stacked parameters the order of the steps of their scan, each of them
        at least once: `{"**/blocks/**": [0, 0, 1, 1, 2, 2]}`, or `[0, 1, 2, 0, 1, 2]`.

    Returns:
      `(deep_apply, deep_params, plan)`. The copy of `block_1` is `block_1_copy`, beside it in the same mapping.

    Raises:
      ValueError: as in `drop_layers`; or no mapping lies around a parameter.

    >>> params = {"a": 2 * jnp.eye(2), "c": jnp.ones((2, 1))}
    >>> deep_apply, deep, plan = stack_layers(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["c"], params, jnp.ones((1, 2)), layers="a")
    >>> print(plan)
    a: twice, with a_copy
    >>> deep_apply(deep, jnp.ones((1, 2))).tolist(), deep_apply({**deep, "a_copy": jnp.eye(2)}, jnp.ones((1, 2))).tolist()
    ([[8.0]], [[4.0]])

    Source: Gong et al., "Efficient training of BERT by progressively stacking", 2019.
    """
    dense, found = chosen(params, layers)
    changes: list[Left | Twice | Steps] = []
    for name, paths, steps in found:
        if steps is not None and {*steps} != {*range(n := length(dense, name, paths, steps))}:
            raise ValueError(f"{name}: the order {_listed(steps, 12)} lacks some of its {n} steps; drop_layers leaves steps out")
        changes.append(Twice(name, paths) if steps is None else Steps(name, paths, tuple(steps)))
    plan = noted(dense, changes)
    reads(plan, apply, dense, *example)
    return bound(apply, plan), applied(plan, dense), plan
