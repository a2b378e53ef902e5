"""What each of JAX's operations does to labels, and how it runs on fewer indices: a row of `PRIMITIVES` each.

What is not here is not understood: nothing that it touches is cut.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from jaxopt_lab.core.coupling.labels import Labels
from jaxopt_lab.core.coupling.values import ADDS, Field, Sum, Value, fixed, fresh, reshaped, separated, single, tidy, united
from jaxopt_lab.core.shapes import equal_blocks

__all__ = ["PRIMITIVES", "Cut", "Primitive", "taken", "unknown"]


class Cut(NamedTuple):
    """One equation on fewer indices.

    Attributes:
      eqn: the equation.
      given: the labels of the operands.
      made: the labels of the results.
      kept: `(value) -> indices`, those that are kept along each axis.
    """

    eqn: Any
    given: Sequence[Value]
    made: Sequence[Value]
    kept: Callable[[Value], list[np.ndarray]]

    def shape(self, k: int = 0) -> tuple[int, ...]:
        """The shape of the k-th result: sizes that stay may be those of another call than the labels are of."""
        sizes = zip(self.kept(self.made[k]), self.made[k].shape, self.eqn.outvars[k].aval.shape, strict=True)
        return tuple(size if len(left) == whole else len(left) for left, whole, size in sizes)

    @property
    def touched(self) -> bool:
        """Whether any index of an operand or of a result is cut or copied, or any over which an operand is a sum."""
        terms = [term for value in self.given for term in value.terms]
        return any(
            not np.array_equal(left, np.arange(n))
            for value in (*self.given, *self.made, *terms)
            for left, n in zip(self.kept(value), value.shape, strict=True)
        )

    def bind(self, *arrays: Any, **changed: Any) -> list[Any]:
        """The operation with some of its parameters changed."""
        params = self.eqn.primitive.get_bind_params({**self.eqn.params, **changed})
        out = self.eqn.primitive.bind(*arrays, **params)
        return list(out) if self.eqn.primitive.multiple_results else [out]


class Primitive(NamedTuple):
    """What is known of an operation; a new one is a row of `PRIMITIVES`.

    Attributes:
      label: `(labels, eqn, given) -> labels of the results`.
      run: `(cut, arrays) -> results` on operands that were cut already; None where the operation runs as it is.
      keeps: `(eqn, given) -> bool`: whether what is a sum stays one, or becomes a mean; any other use needs all of its terms.
    """

    label: Callable[[Labels, Any, list[Value]], Sequence[Value]]
    run: Callable[..., list[Any]] | None = None
    keeps: Callable[[Any, Sequence[Value]], bool] = lambda eqn, given: False


def _shape(eqn: Any, k: int = 0) -> tuple[int, ...]:
    return tuple(eqn.outvars[k].aval.shape)


# Operations on each number by itself.


def _elementwise(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    shape = _shape(eqn)
    spread = [_spread(labels, value, shape) for value in given if len(value.shape) == len(shape)]
    if not spread:
        return [fresh(labels, shape)] * len(eqn.outvars)
    if eqn.primitive.name == "eq" and all(value.numbers is not None for value in given):
        # What chose among entries, and what counts them: the same entries.
        a, b = (value.numbers for value in given)
        if a.shape == b.shape:
            labels.unite(a, b)
    # Nothing but a cast leaves a sum, or an index, what it was.
    cast = eqn.primitive.name in _CASTS and len(spread) == 1
    value = spread[0] if len(spread) == 1 else united(labels, spread)
    kept = {"summed": value.summed, "numbers": value.numbers} if cast else {"summed": (), "numbers": None}
    rest = iter(spread)
    operands = [next(rest) if len(one.shape) == len(shape) else one for one in given]
    return [dataclasses.replace(value, zero=_zero(eqn, operands), **kept)] * len(eqn.outvars)


_CASTS = ("convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision", "sharding_constraint")


def _zero(eqn: Any, given: list[Value]) -> frozenset[int]:
    """The axes at whose cut indices an elementwise operation gives 0."""
    name, full = eqn.primitive.name, [value for value in given if value.shape]
    if name in ("mul", "and"):
        return frozenset().union(*(value.zero for value in full))
    if name == "div":
        return given[0].zero
    if name == "select_n":
        rows = zip(given[1:], eqn.invars[1:], strict=True)
        cases = [value for value, variable in rows if not _is_literal_zero(variable)]
        return _both(cases) if cases else frozenset()
    return _both(full) if full and _keeps_zero(eqn, [bool(value.shape) for value in given]) else frozenset()


def _both(values: Iterable[Value]) -> frozenset[int]:
    """The axes at which several values are 0."""
    first, *others = (value.zero for value in values)
    return first.intersection(*others)


_AT_ZERO: Mapping[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "add_any": lambda a, b: a + b,
    "clamp": lambda low, x, high: min(max(x, low), high),
    "max": max,
    "min": min,
    "pow": lambda a, b: 0.0 if a == 0 and b > 0 else 1.0,
    "sub": lambda a, b: a - b,
}
"""What operations give for numbers of which some are 0."""

_ODD = (
    "abs", "asin", "asinh", "atan", "atanh", "bitcast_convert_type", "cbrt", "ceil", "conj", "convert_element_type", "copy",
    "copy_p", "erf", "erf_inv", "expm1", "floor", "imag", "log1p", "neg", "real", "reduce_precision", "round",
    "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "tan", "tanh",
)  # fmt: skip
"""Operations that give 0 for 0."""


def _keeps_zero(eqn: Any, full: list[bool]) -> bool:
    """Whether an operation gives 0 for zeros and its fixed numbers; no, where a number is not known."""
    name = eqn.primitive.name
    if name == "integer_pow":
        return eqn.params["y"] > 0
    if name in _ODD:
        return True
    known = all(yes or isinstance(variable, Literal) for yes, variable in zip(full, eqn.invars, strict=True))
    if name not in _AT_ZERO or not known:
        return False
    return _AT_ZERO[name](*(0.0 if yes else float(v.val) for yes, v in zip(full, eqn.invars, strict=True))) == 0


def _is_literal_zero(variable: Any) -> bool:
    return isinstance(variable, Literal) and not np.any(variable.val)


def _spread(labels: Labels, value: Value, shape: tuple[int, ...]) -> Value:
    """A value whose axes of length 1 are as long as those of what it meets: copies, each with a label of its own."""
    if value.shape == shape:
        return value
    fields = []
    for axes, own in value.fields:
        copied = own.size == 1 and shape[axes[0]] != 1
        if copied:
            single(labels, own)
        fields.append(Field(axes, labels.fresh(shape[axes[0]]) if copied else own))
    zero = frozenset(a for a in value.zero if value.shape[a] == shape[a])
    return Value(shape, tuple(fields), (), zero, value.numbers)


def _reinterpreted(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    """The bits of numbers as others: of the same width, or each as several."""
    return (_elementwise if given[0].shape == _shape(eqn) else unknown)(labels, eqn, given)


def _passed(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    """Several operands, each of which is a result."""
    del labels, eqn
    return list(given)


def _scaled(by: Callable[[int], float]) -> Primitive:
    """A product with, or a division by, a number: where it is that of a sum's terms, the mean is of those that are left."""

    def is_mean(eqn: Any, given: Sequence[Value]) -> bool:
        value, number = given[0], eqn.invars[1]
        if not value.summed or not isinstance(number, Literal) or np.ndim(number.val):
            return False
        n = math.prod(len(own.labels) for own in value.summed)
        # A half is no mean of two as a rule.
        return n > (1 if by(n) >= 1 else 2) and math.isclose(float(number.val), by(n), rel_tol=1e-6)

    def run(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
        if not is_mean(cut.eqn, cut.given):
            return cut.bind(*arrays)
        left = math.prod(len(cut.kept(term)[0]) for term in cut.given[0].terms)
        return cut.bind(arrays[0], np.asarray(by(max(left, 1)), jnp.result_type(arrays[1])))

    return Primitive(_elementwise, run, is_mean)


# Changes of shape.


def _broadcast(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    shape, into = _shape(eqn), eqn.params["broadcast_dimensions"]
    value = given[0]
    spread = [a for a, b in enumerate(into) if value.shape[a] != shape[b]]
    value = separated(labels, value, spread)
    for a in spread:
        single(labels, value.labels(a))
    places = {a: b for a, b in enumerate(into) if a not in spread}
    fields = [Field(tuple(places[a] for a in axes), own) for axes, own in value.fields if axes[0] in places]
    fields += [Field((b,), labels.fresh(shape[b])) for b in range(len(shape)) if b not in places.values()]
    zero = frozenset(places[a] for a in value.zero if a in places)
    return [Value(shape, tuple(sorted(fields, key=lambda field: field.axes)), value.summed, zero, value.numbers)]


def _reshape(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    shape, (value, *_) = _shape(eqn), given
    blocks = equal_blocks(value.shape, shape)
    if eqn.params["dimensions"] is not None or blocks is None:
        return unknown(labels, eqn, given)
    return [reshaped(labels, value, shape, blocks)]


def _squeeze(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    (value,) = given
    left = [a for a in range(len(value.shape)) if a not in eqn.params["dimensions"]]
    for a in eqn.params["dimensions"]:
        single(labels, value.field(a).labels)
    return [dataclasses.replace(_without(labels, value, left, _shape(eqn)), summed=value.summed, numbers=value.numbers)]


def _without(labels: Labels, value: Value, left: Sequence[int], shape: tuple[int, ...]) -> Value:
    """The value with some of its axes left."""
    value = separated(labels, value, [a for a in range(len(value.shape)) if a not in left])
    places = {a: k for k, a in enumerate(left)}
    fields = [Field(tuple(places[a] for a in axes), own) for axes, own in value.fields if axes[0] in places]
    return Value(shape, tuple(fields), (), frozenset(places[a] for a in value.zero if a in places))


def _transpose(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    del labels
    order = list(eqn.params["permutation"])
    return [given[0].moved(_shape(eqn), order.index)]


def _rev(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    value = separated(labels, given[0], eqn.params["dimensions"])
    turned = [Field(axes, own[::-1]) if axes[0] in eqn.params["dimensions"] else Field(axes, own) for axes, own in value.fields]
    return [dataclasses.replace(value, fields=tuple(turned))]


def _iota(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    del given
    out = fresh(labels, _shape(eqn))
    fixed(labels, out, "its indices are counted", [eqn.params["dimension"]], counted=True)
    return [dataclasses.replace(out, numbers=out.labels(eqn.params["dimension"]))]


def _run_iota(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
    del arrays
    (whole,) = cut.bind()
    return [taken(whole, cut.kept(cut.made[0]))]


def taken(array: Any, indices: Sequence[np.ndarray]) -> Any:
    """An array at some indices of each axis, which are fixed numbers.

    >>> taken(jnp.arange(6).reshape(2, 3), [np.array([1]), np.array([0, 2])]).tolist()
    [[3, 5]]
    """
    for axis, own in enumerate(indices):
        n = array.shape[axis]
        if len(own) == n and np.array_equal(own, np.arange(n)):
            continue
        if len(own) and np.array_equal(own, np.arange(own[0], own[0] + len(own))):
            array = lax.slice_in_dim(array, int(own[0]), int(own[-1]) + 1, axis=axis)
        else:
            steps = np.diff(own)
            unique = len(np.unique(own)) == len(own)
            array = jnp.take(array, own, axis=axis, unique_indices=unique, indices_are_sorted=bool((steps >= 0).all()))
    return array


# Parts of axes.


def _slice(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    (value,) = given
    starts, limits, strides = (eqn.params[key] for key in ("start_indices", "limit_indices", "strides"))
    parts = [slice(a, b, c) for a, b, c in zip(starts, limits, strides or [1] * len(starts), strict=True)]
    parted = [a for a, n in enumerate(_shape(eqn)) if n != value.shape[a]]
    value = separated(labels, value, parted, whole=parted)
    fields = []
    for axes, own in value.fields:
        cut = own[tuple(parts[a] for a in axes)]
        fields.append(Field(axes, cut))
    return [tidy(labels, Value(_shape(eqn), tuple(fields), (), value.zero, value.numbers))]


def _run_by_indices(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
    """A part of the operand: for each axis, where the labels of what is kept of the result stand in what is kept of the operand."""
    starts, limits, strides = (cut.eqn.params[key] for key in ("start_indices", "limit_indices", "strides"))
    left, out = cut.kept(cut.given[0]), cut.kept(cut.made[0])
    own = []
    for axis, (start, stride) in enumerate(zip(starts, strides or [1] * len(starts), strict=True)):
        wanted = start + stride * out[axis]
        # Of several copies the first is the first, and so on.
        order, again = np.argsort(left[axis], kind="stable"), np.argsort(wanted, kind="stable")
        ranks = np.searchsorted(left[axis][order], wanted[again]) + np.arange(len(wanted))
        ranks -= np.searchsorted(wanted[again], wanted[again])
        own.append(order[ranks][np.argsort(again, kind="stable")])
    del limits
    return [taken(arrays[0], own)]


def _split(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    (value,), axis, sizes = given, eqn.params["axis"], eqn.params["sizes"]
    ends = np.cumsum([0, *sizes])
    value = separated(labels, value, [axis], whole=[axis])
    outs = []
    for k in range(len(sizes)):
        fields = []
        for axes, own in value.fields:
            part = own.take(range(ends[k], ends[k + 1]), axis=axes.index(axis)) if axis in axes else own
            fields.append(Field(axes, part))
        outs.append(tidy(labels, Value(_shape(eqn, k), tuple(fields), (), value.zero, value.numbers)))
    return outs


def _run_split(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
    axis = cut.eqn.params["axis"]
    return cut.bind(*arrays, sizes=tuple(cut.shape(k)[axis] for k in range(len(cut.made))))


def _concatenate(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    axis, shape = eqn.params["dimension"], _shape(eqn)
    given = [separated(labels, value, [axis]) for value in given]
    joined = np.concatenate([value.labels(axis) for value in given])
    left = [a for a in range(len(shape)) if a != axis]
    rest = united(labels, [_without(labels, value, left, tuple(shape[a] for a in left)) for value in given])
    fields = [Field(tuple(left[a] for a in axes), own) for axes, own in rest.fields]
    fields = sorted([*fields, Field((axis,), joined)], key=lambda field: field.axes)
    return [Value(shape, tuple(fields), (), _both(given))]


def _pad(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    value, config, shape = given[0], eqn.params["padding_config"], _shape(eqn)
    padded = [a for a, (low, high, inside) in enumerate(config) if low or high or inside]
    value = separated(labels, value, padded)
    fields = []
    for axes, own in value.fields:
        if axes[0] not in padded:
            fields.append(Field(axes, own))
            continue
        (a,), (low, high, inside) = axes, config[axes[0]]
        stretched = labels.fresh(max(own.size + inside * (own.size - 1), 0))
        if inside:
            labels.fix(own, "pad puts numbers between its entries")
            labels.fix(stretched, "pad puts numbers between its entries")
        stretched[:: inside + 1] = own
        whole = np.concatenate([labels.fresh(max(low, 0)), stretched[max(-low, 0) :], labels.fresh(max(high, 0))])
        fields.append(Field((a,), whole[: shape[a]]))
    return [Value(shape, tuple(fields), (), value.zero if _is_literal_zero(eqn.invars[1]) else frozenset())]


def _run_pad(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
    config, out, left = [], cut.kept(cut.made[0]), cut.kept(cut.given[0])
    for axis, (low, high, inside) in enumerate(cut.eqn.params["padding_config"]):
        n, m = cut.given[0].shape[axis], cut.made[0].shape[axis]
        if len(left[axis]) == n and len(out[axis]) == m:
            config.append((low, high, inside))
            continue
        before = int((out[axis] < low).sum()) if low > 0 else -int((left[axis] < -low).sum())
        after = int((out[axis] >= m - high).sum()) if high > 0 else -int((left[axis] >= n + high).sum())
        config.append((before, after, inside))
    return cut.bind(*arrays, padding_config=tuple(config))


def _gather(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    value, where = given
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, taken_apart = _shape(eqn), {*numbers.start_index_map, *numbers.collapsed_slice_dims}
    shared = numbers.operand_batching_dims
    parted = [a for a, n in enumerate(value.shape) if a not in shared and (a in taken_apart or sizes[a] != n)]
    value = separated(labels, value)
    fixed(labels, value, "a lookup chooses among its entries", parted)
    kept = [a for a in range(len(value.shape)) if a not in numbers.collapsed_slice_dims and a not in numbers.operand_batching_dims]
    where = separated(labels, where)
    free = [a for a in range(len(where.shape) - 1)]
    loose = [b for b in range(len(shape)) if b not in numbers.offset_dims]
    fields = []
    for a, b in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        labels.unite(value.labels(a), where.labels(b))
    for b, a in zip(loose, free, strict=True):
        fields.append(Field((b,), where.labels(a)))
    fixed(labels, where, "its numbers are indices", [len(where.shape) - 1])
    for b, a in zip(numbers.offset_dims, kept, strict=True):
        own = labels.fresh(shape[b]) if a in parted else value.labels(a)
        if a in parted:
            labels.fix(own, "a lookup chose it")
        fields.append(Field((b,), own))
    zero = frozenset(b for b, a in zip(numbers.offset_dims, kept, strict=True) if a in value.zero and a not in parted)
    return [Value(shape, tuple(sorted(fields, key=lambda field: field.axes)), (), zero)]


def _run_gather(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
    left, whole = cut.kept(cut.given[0]), cut.given[0].shape
    shared = cut.eqn.params["dimension_numbers"].operand_batching_dims
    sizes = [len(left[a]) if size == whole[a] and a not in shared else size for a, size in enumerate(cut.eqn.params["slice_sizes"])]
    return cut.bind(*arrays, slice_sizes=tuple(sizes))


def _dynamic_slice(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    value, shape = given[0], _shape(eqn)
    parted = [a for a, n in enumerate(value.shape) if shape[a] != n]
    value = separated(labels, value, parted)
    fixed(labels, value, "a part of it is chosen by a number", parted)
    fields = [Field(axes, labels.fresh(shape[axes[0]]) if axes[0] in parted else own) for axes, own in value.fields]
    out = Value(shape, tuple(fields), (), value.zero.difference(parted))
    fixed(labels, out, "a number chose it", parted)
    return [out]


def _run_dynamic_slice(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
    return cut.bind(*arrays, slice_sizes=cut.shape())


def _dynamic_update_slice(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    whole, part = given[:2]
    parted = [a for a, n in enumerate(whole.shape) if part.shape[a] != n]
    whole, part = separated(labels, whole), separated(labels, part)
    for value in (whole, part):
        fixed(labels, value, "a number says where a part is put", parted)
    for a in range(len(whole.shape)):
        if a not in parted:
            labels.unite(whole.labels(a), part.labels(a))
    del eqn
    return [dataclasses.replace(whole, summed=(), zero=_both([whole, part]), numbers=None)]


# Sums.


def _reduced(understood: bool) -> Callable[[Labels, Any, list[Value]], list[Value]]:
    def label(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
        axes = eqn.params["axes"]
        outs = []
        for k, value in enumerate(given[: len(eqn.outvars)]):
            own = separated(labels, value, axes, inner=True)
            if not understood:
                fixed(labels, own, f"{eqn.primitive.name} over it would be another", axes, counted=True)
            left = [a for a in range(len(value.shape)) if a not in axes]
            summed = (*value.summed, *(Sum(own.labels(a), a in value.zero) for a in axes)) if understood else ()
            outs.append(dataclasses.replace(_without(labels, own, left, _shape(eqn, k)), summed=summed))
        return outs

    return label


def _along(key: str) -> Callable[[Labels, Any, list[Value]], list[Value]]:
    """Operations in which entries along one axis (or several) meet in order."""

    def label(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
        axes = eqn.params[key]
        axes = axes if isinstance(axes, tuple) else (axes,)
        given = [separated(labels, value, axes) for value in given if value.shape]
        for value in given:
            fixed(labels, value, f"{eqn.primitive.name} along it minds the order", axes)
        out = united(labels, given)
        # The logarithm of a sum of exponentials of zeros is none.
        zero = frozenset() if eqn.primitive.name == "cumlogsumexp" else out.zero
        return [dataclasses.replace(out, zero=zero)] * len(eqn.outvars)

    return label


def _window(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    shape, params = _shape(eqn), eqn.params
    plain = [(1, 1, (0, 0), 1, 1)] * len(shape)
    keys = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    rows = zip(*(params.get(key) or (1,) * len(shape) for key in keys), strict=True)
    moved = [a for a, (row, still) in enumerate(zip(rows, plain, strict=True)) if row[:4] != still[:4]]
    outs = []
    for k, value in enumerate(given[: len(eqn.outvars)]):
        apart = separated(labels, value, moved)
        fixed(labels, apart, "a window moves along it", moved)
        fields = [Field(axes, labels.fresh(shape[axes[0]]) if axes[0] in moved else own) for axes, own in apart.fields]
        # What another window computes of zeros, and begins with, is not known.
        known = eqn.primitive.name in ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
        out = Value(_shape(eqn, k), tuple(fields), (), apart.zero.difference(moved) if known else frozenset())
        fixed(labels, out, "a window moved along it", moved)
        outs.append(out)
    return outs


def _run_chosen(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
    """The number of an entry is the one that it had among all."""
    (axis,) = cut.eqn.params.get("axes") or (len(cut.given[0].shape) - 1,)
    left, k = cut.kept(cut.given[0])[axis], cut.eqn.params.get("k", 1)
    if k > len(left):
        raise ValueError(f"{cut.eqn.primitive.name} chooses {k} of {cut.given[0].shape[axis]}, and {len(left)} are left: keep {k}")
    out = cut.bind(*arrays)
    whole = len(left) == cut.given[0].shape[axis]
    return out if whole else [*out[:-1], jnp.asarray(left, out[-1].dtype)[out[-1]]]


def _top_k(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    last = len(given[0].shape) - 1
    value = separated(labels, given[0], [last])
    fixed(labels, value, "top_k over it would be another", [last], counted=True)
    chosen = labels.fresh(_shape(eqn)[last])
    labels.fix(chosen, "top_k chose it")
    fields = [field for field in value.fields if field.axes != (last,)]
    best = Value(_shape(eqn), (*fields, Field((last,), chosen)))
    return [best, dataclasses.replace(best, numbers=value.labels(last))]


def _chosen(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    (axis,) = eqn.params["axes"]
    (out,) = _reduced(understood=False)(labels, eqn, given)
    own = separated(labels, given[0], [axis], inner=True)
    return [dataclasses.replace(out, zero=frozenset(), numbers=own.labels(axis))]


# Products.


def _dot_general(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    (contract, batch), shape = eqn.params["dimension_numbers"], _shape(eqn)
    left, right = given
    single = [separated(labels, value, [*contract[k], *batch[k]]) for k, value in enumerate((left, right))]
    left, right = single
    for a, b in zip((*contract[0], *batch[0]), (*contract[1], *batch[1]), strict=True):
        labels.unite(left.labels(a), right.labels(b))
    for a, b in zip(*contract, strict=True):
        if not (a in left.zero or b in right.zero):
            labels.fix(left.labels(a), ADDS, counted=True)
    fields = [Field((k,), left.labels(a)) for k, a in enumerate(batch[0])]
    zero = {k for k, (a, b) in enumerate(zip(*batch, strict=True)) if a in left.zero or b in right.zero}
    place = len(batch[0])
    for k, value in enumerate((left, right)):
        own = [a for a in range(len(value.shape)) if a not in (*contract[k], *batch[k])]
        places = {a: place + j for j, a in enumerate(own)}
        fields += [Field(tuple(places[a] for a in axes), labelled) for axes, labelled in value.fields if axes[0] in places]
        zero |= {places[a] for a in value.zero if a in places}
        place += len(own)
    return [Value(shape, tuple(fields), (), frozenset(zero))]


def _convolution(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    shape, (lhs, rhs, out) = _shape(eqn), eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    x, w = separated(labels, given[0]), separated(labels, given[1])
    if eqn.params["batch_group_count"] > 1:
        return unknown(labels, eqn, given)
    fixed(labels, x, "a filter moves along it", lhs[2:])
    fixed(labels, w, "it is the extent of a filter", rhs[2:])
    channels, inputs, outputs = x.labels(lhs[1]), w.labels(rhs[1]), w.labels(rhs[0])
    if inputs.size == 1 and groups > 1:
        # A channel and the filters that it meets alone go together.
        labels.unite(channels.reshape(groups, 1), outputs.reshape(groups, -1))
        labels.fix(inputs, "each filter meets one channel")
    else:
        # Every group keeps as many as the others: the same ones.
        labels.unite(channels.reshape(groups, -1), inputs.reshape(1, -1))
        labels.all_one(outputs.reshape(groups, -1), (0,))
    fields = {out[0]: x.labels(lhs[0]), out[1]: outputs} | {a: labels.fresh(shape[a]) for a in out[2:]}
    alone = inputs.size == 1 and groups > 1
    zero = {out[0]} if lhs[0] in x.zero else set()
    zero |= {out[1]} if rhs[0] in w.zero or (alone and lhs[1] in x.zero) else set()
    value = Value(shape, tuple(Field((a,), fields[a]) for a in range(len(shape))), (), frozenset(zero))
    if not (lhs[1] in x.zero or rhs[1] in w.zero):
        labels.fix(inputs, ADDS, counted=True)
    fixed(labels, value, "a filter moved along it", out[2:])
    return [value]


def _run_convolution(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
    (lhs, rhs, _), groups = cut.eqn.params["dimension_numbers"], cut.eqn.params["feature_group_count"]
    if groups > 1 and cut.given[1].shape[rhs[1]] == 1:
        channels = cut.kept(cut.given[0])[lhs[1]]
        each = cut.given[1].shape[rhs[0]] // groups
        if each > 1 and len(np.unique(channels)) < len(channels):
            raise ValueError(f"a channel that meets {each} filters of its own cannot be copied")
        groups = len(channels)
    return cut.bind(*arrays, feature_group_count=groups)


# What is drawn, chosen and not understood.


def _random_bits(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    keys = given[0]
    fixed(labels, keys, "it numbers keys")
    out = fresh(labels, _shape(eqn))
    for a in range(len(keys.shape)):
        labels.fix(out.labels(a), "it numbers keys")
    return [out]


def _run_random_bits(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
    # All of them, so that those that are left are the same; copies draw their own.
    left, keys = cut.kept(cut.made[0]), len(cut.given[0].shape)
    most = [max(len(own), n) for own, n in zip(left, cut.made[0].shape, strict=True)]
    (whole,) = cut.bind(*arrays, shape=tuple(most[keys:]))
    return [taken(whole, [own if len(own) <= n else np.arange(len(own)) for own, n in zip(left, cut.made[0].shape, strict=True)])]


def unknown(labels: Labels, eqn: Any, given: list[Value]) -> list[Value]:
    """What is done with an operation of which nothing is known: nothing that it takes or gives is cut.

    >>> import jax
    >>> (eqn,) = jax.make_jaxpr(jnp.sin)(jnp.ones(2)).eqns
    >>> labels = Labels()
    >>> value = fresh(labels, (2,))
    >>> out = unknown(labels, eqn, [value])
    >>> labels.reason(value.labels(0)[1])
    'sin is not understood'
    """
    for value in given:
        fixed(labels, value, f"{eqn.primitive.name} is not understood")
    outs = [fresh(labels, _shape(eqn, k)) for k in range(len(eqn.outvars))]
    for value in outs:
        fixed(labels, value, f"{eqn.primitive.name} is not understood")
    return outs


def _run_broadcast(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
    return cut.bind(*arrays, shape=cut.shape())


def _run_reshape(cut: Cut, arrays: Sequence[Any]) -> list[Any]:
    left, out = cut.kept(cut.given[0]), cut.kept(cut.made[0])
    if any(len(np.unique(own)) < len(own) for own in out):
        # Copies stand side by side, and may not do so any more where axes are merged or parted otherwise.
        numbers = [
            np.arange(math.prod(value.shape)).reshape(value.shape)[np.ix_(*own)].reshape(-1)
            for value, own in ((cut.given[0], left), (cut.made[0], out))
        ]
        if not np.array_equal(*numbers):
            raise ValueError(
                f"a reshape of {cut.given[0].shape} to {cut.made[0].shape} merges or parts an axis of which units are copied, in a "
                "way that leaves copies no place side by side"
            )
    return cut.bind(*arrays, new_sizes=cut.shape())


def _always(eqn: Any, given: Sequence[Value]) -> bool:
    del eqn, given
    return True


_ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp",
    "complex", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "eq", "erf", "erf_inv", "erfc", "exp",
    "exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt",
    "max", "min", "ne", "neg", "nextafter", "not", "or", "population_count", "pow", "real", "reduce_precision", "rem", "round",
    "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sharding_constraint", "sign", "sin",
    "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
)  # fmt: skip

PRIMITIVES: Mapping[str, Primitive] = {
    **{name: Primitive(_elementwise) for name in _ELEMENTWISE},
    **{name: Primitive(_elementwise, keeps=_always) for name in _CASTS},
    "bitcast_convert_type": Primitive(_reinterpreted),
    "div": _scaled(float),
    "mul": _scaled(lambda n: 1 / n),
    "optimization_barrier": Primitive(_passed, keeps=_always),
    "broadcast_in_dim": Primitive(_broadcast, _run_broadcast, _always),
    "reshape": Primitive(_reshape, _run_reshape, _always),
    "squeeze": Primitive(_squeeze, keeps=_always),
    "transpose": Primitive(_transpose, keeps=_always),
    "rev": Primitive(_rev),
    "iota": Primitive(_iota, _run_iota),
    "slice": Primitive(_slice, _run_by_indices),
    "split": Primitive(_split, _run_split),
    "concatenate": Primitive(_concatenate),
    "pad": Primitive(_pad, _run_pad),
    "gather": Primitive(_gather, _run_gather),
    "dynamic_slice": Primitive(_dynamic_slice, _run_dynamic_slice),
    "dynamic_update_slice": Primitive(_dynamic_update_slice),
    "reduce_sum": Primitive(_reduced(understood=True), keeps=_always),
    **{
        name: Primitive(_reduced(understood=False))
        for name in ("reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_xor")
    },
    **{name: Primitive(_chosen, _run_chosen) for name in ("argmax", "argmin")},
    "top_k": Primitive(_top_k, _run_chosen),
    **{name: Primitive(_along("axis")) for name in ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum")},
    "sort": Primitive(_along("dimension")),
    **{name: Primitive(_window) for name in ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum")},
    "dot_general": Primitive(_dot_general),
    "conv_general_dilated": Primitive(_convolution, _run_convolution),
    "random_bits": Primitive(_random_bits, _run_random_bits),
}
