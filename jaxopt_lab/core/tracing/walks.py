"""Where parameters meet products: a walk over the traced program, by shapes alone.

A label says what a value is: whether it depends on the inputs, of which parameters it is a view, and from which others it was
computed. A product that has a view among its operands is a site. What the walk cannot follow is told, not dropped.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import jaxprs_in_params

from jaxopt_lab.core.tracing import views
from jaxopt_lab.core.tracing.programs import Place, Program, Rules, flow, trace
from jaxopt_lab.core.tracing.views import Axes, Step, View
from jaxopt_lab.core.types import PyTree

__all__ = ["PRODUCTS", "Cost", "Product", "Roles", "Scan", "Site", "Unknown", "Walk", "follow", "sites", "walk"]


class Scan(NamedTuple):
    """A scan around a site: its length, and whether each step takes its own entry of the parameter's leading axis."""

    length: int
    sliced: bool


class Site(NamedTuple):
    """A place where a parameter meets a product.

    Attributes:
      name: the path, and from the second meeting on a count: `Embed_0/embedding#2`. Stable for one function at one set of shapes.
      path: of the parameter.
      primitive: "dot_general", "conv_general_dilated" or "gather".
      params: those of the equation: dimension numbers, strides, groups, ...
      operand: which operand the parameter is.
      other: which operand the input is.
      axes: the parameter's own axes by what the product does with them; None where that is not well defined.
      view: what was done to the stored parameter to make it the operand, in order.
      parameter: shape and dtype as stored.
      weight: of the operand. Where it was concatenated from several parameters, each is a site, and `size` tells its own entries.
      input: of the other operand; of a `gather`, the indices.
      output: of the result.
      size: how many entries of the operand are this parameter's.
      macs: multiplications and additions of pairs of numbers, those with padding among them, in one run of the product.
      scans: the scans around it, from the outside.
      sometimes: it lies under a `cond` or `while`, and may run never, once or often.
      around: the primitives that hold it, from the outside.
      address: where the equation stands in the traced program; sites of one product share it.
    """

    name: str
    path: str
    primitive: str
    params: Mapping[str, Any]
    operand: int
    other: int
    axes: Axes | None
    view: tuple[Step, ...]
    parameter: jax.ShapeDtypeStruct
    weight: jax.ShapeDtypeStruct
    input: jax.ShapeDtypeStruct
    output: jax.ShapeDtypeStruct
    size: int
    macs: int
    scans: tuple[Scan, ...]
    sometimes: bool
    around: tuple[str, ...]
    address: tuple[int, ...]

    @property
    def repeats(self) -> int:
        """How often it runs for certain: the product of the lengths of the scans around it."""
        return math.prod(scan.length for scan in self.scans)

    def product(self, input: Any, weight: Any) -> Any:
        """What it makes of other operands, or of operands of other shapes; of a matrix product or a convolution."""
        operands = {self.other: input, self.operand: weight}
        primitive = lax.dot_general_p if self.primitive == "dot_general" else lax.conv_general_dilated_p
        return primitive.bind(operands[0], operands[1], **self.params)


class Cost(NamedTuple):
    """What a product costs in one call, the scans around it counted by their lengths.

    Attributes:
      primitive: its name.
      macs: multiplications, each with its addition.
      nbytes: of its result.
    """

    primitive: str
    macs: int
    nbytes: int


class Unknown(NamedTuple):
    """A parameter that the walk lost sight of.

    Attributes:
      path: of the parameter.
      primitive: what made of it more than a view of it.
      product: the product that the result met; None where the primitive itself may hide one.
    """

    path: str
    primitive: str
    product: str | None


class Walk(NamedTuple):
    """What became of the parameters.

    Attributes:
      sites: where they meet products, in the order of the program.
      unknown: those that reach a product otherwise than as a view, or an operation that may hide one.
      others: by path, the other operations in which they meet the inputs: `add` of a bias, `mul` of a scale.
      products: by address, every product, those of two inputs among them.
    """

    sites: tuple[Site, ...]
    unknown: tuple[Unknown, ...]
    others: Mapping[str, tuple[str, ...]]
    products: Mapping[tuple[int, ...], Cost]


def sites(apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> tuple[Site, ...]:
    """Where the parameters of `apply(params, *args, **kwargs)` meet products, by shapes alone; see `walk` for what it cannot
    follow.

    >>> params = {"kernel": jax.ShapeDtypeStruct((3, 2), "float32"), "bias": jax.ShapeDtypeStruct((1, 2), "float32")}
    >>> (site,) = sites(lambda params, x: x @ params["kernel"] + params["bias"], params, jax.ShapeDtypeStruct((5, 3), "float32"))
    >>> site.name, site.primitive, site.axes.contracted, site.axes.free, site.macs
    ('kernel', 'dot_general', (0,), (1,), 30)
    """
    return walk(apply, params, *args, **kwargs).sites


def walk(apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> Walk:
    """Follows every parameter of `apply(params, *args, **kwargs)` to the products, matrix or convolution or lookup, that it meets.

    The walk looks into `jit`, `scan`, `cond`, `while`, `shard_map`, rematerialised functions and those with derivatives or batching
    of their own, and takes transposes, reshapes, slices, concatenations and casts for views. Nothing is computed.

    Args:
      apply: any function; a Linen `module.apply`, one that merges an NNX module, a bare function.
      params: its first argument, dense arrays or `jax.ShapeDtypeStruct`.
      args, kwargs: the others. What has no shape (`train=True`) is fixed.

    Raises:
      TypeError: `params` holds a compressed leaf.

    >>> params = {"kernel": jax.numpy.ones((3, 2)), "scale": jax.numpy.ones((1, 2))}
    >>> found = walk(lambda params, x: x @ (params["kernel"] * params["scale"]), params, jax.numpy.ones((5, 3)))
    >>> [(unknown.path, unknown.primitive, unknown.product) for unknown in found.unknown]
    [('kernel', 'mul', 'dot_general'), ('scale', 'mul', 'dot_general')]
    """
    return follow(trace(apply, params, *args, **kwargs)[0])


def follow(program: Program) -> Walk:
    """`walk` of a program that is traced already.

    >>> from jaxopt_lab.core.tracing import programs
    >>> program, _ = programs.trace(lambda params, x: x @ params, jax.numpy.ones((3, 2)), jax.numpy.ones((1, 3)))
    >>> [site.primitive for site in follow(program).sites]
    ['dot_general']
    """
    notes = _Notes()
    inputs = [_shaped(variable.aval) for variable in program.jaxpr.jaxpr.invars]
    parameters = [_Label(views=(views.stored(path, aval),)) for path, aval in zip(program.paths, inputs, strict=False)]
    flow(program.jaxpr, [*parameters, *[_INPUT] * (len(inputs) - len(parameters))], _rules(notes))
    others = {path: tuple(dict.fromkeys(names)) for path, names in notes.others.items()}
    return Walk(tuple(notes.sites), tuple(dict.fromkeys(notes.unknown)), others, notes.products)


# The products. A new one is a row.


class Roles(NamedTuple):
    """The axes of an operand by what a product does with them; those not named are free.

    Attributes:
      contracted, batch, picked: as in `Axes`.
      parted: free axes whose entries meet a part of the input each, as in a convolution of several groups.
    """

    contracted: Sequence[int] = ()
    batch: Sequence[int] = ()
    picked: Sequence[int] = ()
    parted: Sequence[int] = ()


class Product(NamedTuple):
    """A primitive that multiplies a parameter with an input, or looks it up.

    Attributes:
      others: for each operand that may be the parameter, the one that is then the input.
      roles: `(params, operand) -> Roles`; None where they are not well defined.
      macs: `(params, shapes of the operands, shape of the result) -> int`.
    """

    others: Mapping[int, int]
    roles: Callable[[Mapping[str, Any], int], Roles | None]
    macs: Callable[[Mapping[str, Any], Sequence[tuple[int, ...]], tuple[int, ...]], int]


def _dot_roles(params: Mapping[str, Any], operand: int) -> Roles:
    contract, batch = params["dimension_numbers"]
    return Roles(contract[operand], batch[operand])


def _dot_macs(params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], out: tuple[int, ...]) -> int:
    (contracted, _), _ = params["dimension_numbers"]
    return math.prod(out) * math.prod(shapes[0][axis] for axis in contracted)


def _conv_roles(params: Mapping[str, Any], operand: int) -> Roles | None:
    # As the image, a parameter is summed over in windows: its spatial axes are neither summed over nor kept.
    if operand == 0:
        return None
    features, *contracted = params["dimension_numbers"].rhs_spec
    grouped = params["feature_group_count"] > 1 or params["batch_group_count"] > 1
    return Roles(contracted, parted=[features] if grouped else [])


def _conv_macs(params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], out: tuple[int, ...]) -> int:
    numbers = params["dimension_numbers"]
    total = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * shapes[1][numbers.rhs_spec[1]]
    for k, (of_out, of_kernel) in enumerate(zip(numbers.out_spec[2:], numbers.rhs_spec[2:], strict=True)):
        stride, hole, dilation = params["window_strides"][k], params["rhs_dilation"][k], params["lhs_dilation"][k]
        low, _ = params["padding"][k]
        # A dilated input has zeros between its entries, which nobody would multiply.
        total *= sum((o * stride + w * hole - low) % dilation == 0 for o in range(out[of_out]) for w in range(shapes[1][of_kernel]))
    return total


def _gather_roles(params: Mapping[str, Any], operand: int) -> Roles:
    del operand
    numbers = params["dimension_numbers"]
    return Roles((), numbers.operand_batching_dims, sorted({*numbers.start_index_map, *numbers.collapsed_slice_dims}))


PRODUCTS: dict[str, Product] = {
    "dot_general": Product({0: 1, 1: 0}, _dot_roles, _dot_macs),
    "conv_general_dilated": Product({0: 1, 1: 0}, _conv_roles, _conv_macs),
    "gather": Product({0: 1}, _gather_roles, lambda params, shapes, out: 0),
}

# Operations in which a parameter may meet an input without a product being hidden in them.
_PLAIN = frozenset(
    (
        "add", "add_any", "and", "atan2", "broadcast_in_dim", "clamp", "complex", "concatenate", "div", "dynamic_slice",
        "dynamic_update_slice", "eq", "eq_to", "ge", "get", "gt", "le", "le_to", "lt", "lt_to", "max", "min", "mul", "ne",
        "nextafter", "or", "pad", "pow", "random_bits", "random_fold_in", "random_wrap", "rem", "reshape", "rev", "scatter",
        "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub", "select_n", "shift_left",
        "shift_right_arithmetic", "shift_right_logical", "slice", "sort", "split", "squeeze", "sub", "threefry2x32",
        "transpose", "xor",
    )
)  # fmt: skip

# Operations with one result for each operand, which it equals.
_EACH = frozenset(("optimization_barrier", "device_put"))

# Operations that choose among the entries of their operands; which operands those are.
_CHOICES = {"gather": slice(0, 1), "dynamic_slice": slice(0, 1), "select_n": slice(1, None)}


# The labels.


class _Label(NamedTuple):
    """What a value is.

    Attributes:
      data: it depends on the inputs.
      views: the parameters that it is a view of; several where it is a concatenation.
      made: `(path, primitive)` of the parameters it was computed from otherwise, with what first made it more than a view. Together
        with `data`, the inputs have only chosen among them.
    """

    data: bool = False
    views: tuple[View, ...] = ()
    made: frozenset[tuple[str, str]] = frozenset()

    def through(self, primitive: str) -> frozenset[tuple[str, str]]:
        return self.made | {(view.path, primitive) for view in self.views}

    @property
    def active(self) -> bool:
        """Whether it is computed from the inputs, rather than chosen by them."""
        return self.data and not self.made


_CONSTANT = _Label()
_INPUT = _Label(data=True)


class _Notes:
    """What a walk finds."""

    def __init__(self):
        self.sites: list[Site] = []
        self.unknown: list[Unknown] = []
        self.others: dict[str, list[str]] = {}
        self.products: dict[tuple[int, ...], Cost] = {}
        self.met: Counter[str] = Counter()


def _rules(notes: _Notes) -> Rules:
    def equation(eqn: Any, labels: list[_Label], place: Place, settled: bool) -> list[_Label]:
        noted = notes if settled else _Notes()
        name = eqn.primitive.name
        if name in PRODUCTS:
            _note_product(noted, eqn, labels, place)
        if name in _EACH:
            return labels
        seen = _concatenated(eqn, labels) if name == "concatenate" else _viewed(eqn, labels)
        return [_mixed(noted, eqn, labels)] * len(eqn.outvars) if seen is None else seen

    return Rules(equation, _join, _decided, _part, _whole, _shard, _CONSTANT)


def _viewed(eqn: Any, labels: list[_Label]) -> list[_Label] | None:
    """The labels of what comes out, where the operation only looks at its operands otherwise; None where it does more."""
    name = eqn.primitive.name
    rule = views.gathered if name == "gather" else views.VIEWS.get(name)
    if rule is None:
        return None
    first, *indices = labels
    # A view of what the inputs chose from parameters is still that.
    if first.data and first.made and not indices:
        return [first] * len(eqn.outvars)
    if not first.views or any(label != _CONSTANT for label in indices):
        return None
    out = []
    for k, variable in enumerate(eqn.outvars):
        looked = [rule(view, eqn.params, variable.aval.shape) for view in first.views]
        if any(view is None for view in looked):
            return None
        step = Step(name, eqn.params, k, None if indices else eqn.primitive)
        out.append(_Label(views=tuple(view._replace(steps=(*view.steps, step)) for view in looked if view is not None)))
    return out


def _concatenated(eqn: Any, labels: list[_Label]) -> list[_Label] | None:
    if any(label.data or label.made or not label.views for label in labels):
        return None
    joined = views.concatenated([label.views for label in labels], eqn.params["dimension"], eqn.outvars[0].aval.shape)
    return None if joined is None else [_Label(views=joined)]


def _mixed(notes: _Notes, eqn: Any, labels: list[_Label]) -> _Label:
    """The label of what is computed from the operands, whichever way."""
    name = eqn.primitive.name
    data = any(label.data for label in labels)
    made = frozenset().union(*(label.through(name) for label in labels))
    # A primitive that holds a program, or mixes parameters with inputs in a way that is not listed, may multiply them; and what is
    # put into a mutable array comes out of it unlabelled.
    foreign = name not in _PLAIN and name not in PRODUCTS
    hides = any(jaxprs_in_params(eqn.params)) or any(hasattr(v.aval, "inner_aval") for v in (*eqn.invars, *eqn.outvars))
    if made and foreign and (hides or (data and len(labels) > 1)):
        notes.unknown += [Unknown(path, name, None) for path, _ in sorted(made)]
    if not data:
        return _Label(made=made)
    if name in _CHOICES and not any(label.active for label in labels[_CHOICES[name]]):
        return _Label(data=True, made=made)
    if name not in PRODUCTS:
        for path, _ in sorted(made):
            notes.others.setdefault(path, []).append(name)
    return _INPUT


def _note_product(notes: _Notes, eqn: Any, labels: list[_Label], place: Place) -> None:
    name, avals = eqn.primitive.name, [_shaped(v.aval) for v in (*eqn.invars, *eqn.outvars)]
    product = PRODUCTS[name]
    macs = product.macs(eqn.params, [aval.shape for aval in avals[:-1]], avals[-1].shape)
    lengths = [frame.length for frame in place.frames]
    times, out = math.prod(n for n in lengths if n is not None), avals[-1]
    notes.products[place.address] = Cost(name, macs * times, math.prod(out.shape) * out.dtype.itemsize * times)
    for operand, other in product.others.items():
        label, roles = labels[operand], product.roles(eqn.params, operand)
        for view in label.views:
            # Concatenated along an axis that shares out the input, a parameter meets a part of it only.
            if any(roles is None or any(axis in held for held in roles) for axis, _ in view.joined):
                notes.unknown.append(Unknown(view.path, "concatenate", name))
                continue
            notes.met[view.path] += 1
            count = notes.met[view.path]
            notes.sites.append(
                Site(
                    name=view.path if count == 1 else f"{view.path}#{count}",
                    path=view.path,
                    primitive=name,
                    params=eqn.params,
                    operand=operand,
                    other=other,
                    axes=None if roles is None else view.axes(roles.contracted, roles.batch, roles.picked),
                    view=view.steps,
                    parameter=view.parameter,
                    weight=avals[operand],
                    input=avals[other],
                    output=avals[-1],
                    size=view.size,
                    macs=macs * view.size // max(math.prod(view.shape), 1),
                    scans=tuple(Scan(n, depth in view.scans) for depth, n in enumerate(lengths) if n is not None),
                    sometimes=any(frame.primitive in ("cond", "while") for frame in place.frames),
                    around=tuple(frame.primitive for frame in place.frames),
                    address=place.address,
                )
            )
        against = labels[other]
        # A row that an input has looked up is itself an input to another parameter; against anything else it may be a weight.
        if label.made and not (label.data and (against.views or (against.made and not against.data))):
            notes.unknown += [Unknown(path, primitive, name) for path, primitive in sorted(label.made)]


def _join(a: _Label, b: _Label, name: str) -> _Label:
    if a == b:
        return a
    if a.active or b.active:
        return _INPUT
    return _Label(a.data or b.data, (), a.through(name) | b.through(name))


def _decided(label: _Label, by: _Label, name: str) -> _Label:
    return _Label(True, (), label.through(name)) if by.data else label


def _part(label: _Label, depth: int) -> _Label:
    parts = [views.step_of_scan(view, depth) for view in label.views]
    if any(view is None for view in parts):
        return _Label(label.data, (), label.through("scan"))
    return label._replace(views=tuple(view for view in parts if view is not None))


def _whole(label: _Label, name: str, length: int | None) -> _Label:
    del length
    return _Label(label.data, (), label.through(name)) if label.views else label


def _shard(label: _Label, shape: tuple[int, ...]) -> _Label:
    parts = [views.sharded(view, shape) for view in label.views]
    if any(view is None for view in parts):
        return _Label(label.data, (), label.through("shard_map"))
    return label._replace(views=tuple(view for view in parts if view is not None))


def _shaped(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
