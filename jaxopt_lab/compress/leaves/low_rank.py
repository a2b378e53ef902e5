"""Weights as a product of two thin factors: the leaf, and `low_rank`, which puts it into a tree."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray

from jaxopt_lab.compress.arrays import factor
from jaxopt_lab.compress.leaf import Leaf, checked, fills_with_nan
from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import naming
from jaxopt_lab.core.shapes import equal_blocks
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = [
    "LowRank",
    "MatrixView",
    "factorised",
    "low_rank",
    "matrix_view",
    "pointwise",
    "shrunk",
]


_RANK = -1


class _Factor(NamedTuple):
    """One of the factors, with a name for each axis: the weight's own axis, counted from its front, or the rank."""

    array: Array
    names: tuple[int, ...]


class LowRank(Leaf):
    r"""A weight stored as the product of two factors, which both train.

    .. math:: W_{\beta,\rho,\kappa} = \sum_k A_{\beta,\rho,k} \; B_{\beta,k,\kappa}

    Each axis of the weight is a row or a column: an axis of `a` or one of `b`, in the order that they have in the weight. A kernel
    (height, width, inputs, outputs) with the layout `"rrrc"` is the matrix of patches by outputs; with `"rcrc"` it is a vertical
    filter and then a horizontal one. Axes before those that the layout names number the weights of a stack; both factors have them.

    A product runs as two thin ones, in the cheaper order. So does a convolution, each with the places of its own factor; a factor
    without any only mixes channels. A look-up reads one factor. What lies between has the dtype of the operands.

    Attributes:
      a: `[..., *rows, r]`.
      b: `[..., r, *columns]`.
      layout: `r` or `c` for each axis of the weight, or for the last ones of a stack (static).
      dense_dtype: the dtype of the weight that it stands for (static).

    >>> w = LowRank(jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 4.0]]))
    >>> w.materialise()
    Array([[3., 4.],
           [6., 8.]], dtype=float32)
    """

    a: Array
    b: Array
    layout: str = eqx.field(static=True, default="rc")
    dense_dtype: Any = eqx.field(static=True, default=jnp.float32, converter=jnp.dtype)
    trains: ClassVar[tuple[str, ...]] = ("a", "b")

    def __check_init__(self):
        stacked, rows, columns = self._stacked, self.layout.count("r"), self.layout.count("c")
        fits = rows + columns == len(self.layout) and 0 <= stacked == self.b.ndim - 1 - columns
        if not fits or self.a.shape[:stacked] + self.a.shape[-1:] != self.b.shape[: stacked + 1]:
            raise ValueError(
                f"factors {self.a.shape} and {self.b.shape} do not fit layout={self.layout!r}: they are [..., *rows, rank] and "
                "[..., rank, *columns], with the same axes before rows and columns"
            )

    def aval(self):
        sizes = self._sizes()
        return ShapedArray(tuple(sizes[axis] for axis in range(len(self._labels))), self.dense_dtype)

    def materialise(self) -> Array:
        return self._product(self._rows, self._columns, range(len(self._labels)))

    def format(self) -> str:
        return f"{self.a.dtype} rank {self.a.shape[-1]}"

    def stepwise(self, length):
        return self if self._stacked else NotImplemented

    def dot_general(self, x, *, dimension_numbers, precision, preferred_element_type, out_sharding=None):
        (x_contract, contract), (x_batch, batch) = dimension_numbers
        if out_sharding is not None:
            return NotImplemented
        axes = range(len(self._labels))
        own = dict(zip((*x_contract, *x_batch), (*contract, *batch), strict=True))
        x_names = [own.get(axis, len(axes) + axis) for axis in range(x.ndim)]
        free = [name for name in x_names if name >= len(axes)]
        names = [*batch, *free, *(axis for axis in axes if axis not in own.values())]
        sizes = self._sizes() | dict(zip(x_names, x.shape, strict=True))

        def cost(*operands: Iterable[int]) -> int:
            return math.prod(sizes[name] for name in set().union(*operands))

        def between(first: _Factor, second: _Factor) -> list[int]:
            return [name for name in dict.fromkeys((*x_names, *first.names)) if name in names or name in second.names]

        def thin(order: tuple[_Factor, _Factor]) -> int:
            return cost(x_names, order[0].names) + cost(between(*order), order[1].names)

        first, second = order = min((self._rows, self._columns), (self._columns, self._rows), key=thin)
        # Where the factors are not thin, or what they share with x is little, the product of the factors comes first.
        if thin(order) > cost(self._rows.names, self._columns.names) + cost(x_names, axes):
            return NotImplemented
        dtype, h_names = jnp.promote_types(x.dtype, self.dense_dtype), between(first, second)
        a, b = (each.array.astype(dtype) for each in order)
        h = factor.contract(x.astype(dtype), x_names, a, first.names, h_names, dtype=dtype, precision=precision)
        out = preferred_element_type or dtype
        return factor.contract(h, h_names, b, second.names, names, dtype=out, precision=precision)

    def conv_general_dilated(self, x, *, dimension_numbers, feature_group_count, batch_group_count, **params):
        lhs_spec, (outputs, inputs, *places), out_spec = dimension_numbers
        first, second = (self._rows, self._columns) if inputs in self._rows.names else (self._columns, self._rows)
        grouped = max(feature_group_count, batch_group_count) > 1
        if grouped or self._stacked or outputs in first.names or params.get("out_sharding") is not None:
            return NotImplemented

        def convolve(x: Array, by: _Factor, ends: tuple[int, int], specs: tuple, dtype: Any) -> Array:
            """A convolution with the places of one factor, from axis `ends[0]` of it to axis `ends[1]`."""
            kernel, own = by.array.astype(x.dtype), [place in by.names for place in places]
            if not any(own):
                x = lax.transpose(x, [specs[0][specs[1].index(axis)] for axis in range(x.ndim)])
                return pointwise(x, kernel, specs[1][1], by.names.index(ends[0]), dtype=dtype, precision=params["precision"])
            names = [*by.names, *(place for place in places if place not in by.names)]
            spec = tuple(names.index(name) for name in (*ends[::-1], *places))
            plain = {"window_strides": 1, "padding": (0, 0), "lhs_dilation": 1, "rhs_dilation": 1}
            along: dict[str, Any] = {
                key: tuple(given if mine else default for given, mine in zip(params[key], own, strict=True))
                for key, default in plain.items()
            }
            return lax.conv_general_dilated(
                x,
                kernel.reshape(*kernel.shape, *(1,) * (len(names) - kernel.ndim)),
                dimension_numbers=lax.ConvDimensionNumbers(specs[0], spec, specs[1]),
                precision=params["precision"],
                preferred_element_type=dtype,
                **along,
            )

        # A factor without places keeps the axes of what it is given in order.
        middle = lhs_spec if any(place in second.names for place in places) else out_spec
        h = convolve(x, first, (inputs, _RANK), (lhs_spec, middle), None)
        return convolve(h, second, (_RANK, outputs), (middle, out_spec), params["preferred_element_type"])

    def gather(self, indices, *, dimension_numbers, slice_sizes, fill_value, **params):
        indexed, collapsed = dimension_numbers.start_index_map, dimension_numbers.collapsed_slice_dims
        # NaN in place of what is out of bounds makes its products NaN, as in a dense table; another number would not stay itself.
        filled = not fills_with_nan(fill_value)
        if not indexed or self._stacked or dimension_numbers.operand_batching_dims or filled:
            return NotImplemented
        (read, names), other = (self._rows, self._columns)[:: 1 if indexed[0] in self._rows.names else -1]
        sizes = self._sizes()
        whole = all(slice_sizes[axis] == sizes[axis] for axis in other.names if axis != _RANK)
        if not whole or not {*indexed, *collapsed} <= set(names):
            return NotImplemented
        loose = [_RANK - 1 - axis for axis in range(indices.ndim - 1)]
        kept = [name for name in names if name not in collapsed]
        found = lax.gather_p.bind(
            read,
            indices,
            dimension_numbers=lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(loose), len(loose) + len(kept))),
                collapsed_slice_dims=tuple(sorted(names.index(axis) for axis in collapsed)),
                start_index_map=tuple(names.index(axis) for axis in indexed),
            ),
            slice_sizes=tuple(sizes[name] if name == _RANK else slice_sizes[name] for name in names),
            fill_value=fill_value,
            **params,
        )
        window, batch = (axis for axis in range(len(self.layout)) if axis not in collapsed), iter(loose)
        width = len(loose) + len(self.layout) - len(collapsed)
        out = [next(window if axis in dimension_numbers.offset_dims else batch) for axis in range(width)]
        return self._product(_Factor(found, (*loose, *kept)), other, out)

    def convert_element_type(self, *, new_dtype, **params):
        if not jnp.issubdtype(new_dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, dense_dtype=new_dtype)

    def transpose(self, *, permutation):
        old = dict(enumerate(permutation)) | {_RANK: _RANK}
        return self._rebuilt(
            "".join(self._labels[axis] for axis in permutation),
            lambda each, names: lax.transpose(each.array, [each.names.index(old[name]) for name in names]),
        )

    def reshape(self, *, new_sizes, dimensions, sharding=None):
        labels = None if dimensions is not None or sharding is not None else _relabelled(self.aval().shape, self._labels, new_sizes)
        return NotImplemented if labels is None else self._resized(labels, new_sizes)

    def squeeze(self, *, dimensions):
        kept = [axis for axis in range(len(self._labels)) if axis not in dimensions]
        sizes = self._sizes()
        return self._resized("".join(self._labels[axis] for axis in kept), [sizes[axis] for axis in kept])

    def broadcast_in_dim(self, *, shape, broadcast_dimensions, sharding=None):
        if sharding is not None:
            return NotImplemented
        old = dict(zip(broadcast_dimensions, self._labels, strict=True))
        place = dict(enumerate(broadcast_dimensions)) | {_RANK: _RANK}
        # A new axis in front of a stack makes it a larger one; elsewhere it makes more rows, and leaves the columns alone.
        last = max((axis for axis, label in old.items() if label == "s"), default=-1)
        labels = "".join(old.get(axis, "s" if axis < last else "r") for axis in range(len(shape)))

        def spread(each: _Factor, names: Sequence[int]) -> Array:
            sizes = [each.array.shape[each.names.index(_RANK)] if name == _RANK else shape[name] for name in names]
            return lax.broadcast_in_dim(each.array, sizes, [names.index(place[name]) for name in each.names])

        return self._rebuilt(labels, spread)

    @property
    def _stacked(self) -> int:
        return self.a.ndim - 1 - self.layout.count("r")

    @property
    def _labels(self) -> str:
        """What each axis of the weight is: of the stack, a row, a column."""
        return "s" * self._stacked + self.layout

    @property
    def _rows(self) -> _Factor:
        return _Factor(self.a, _names(self._labels, "r"))

    @property
    def _columns(self) -> _Factor:
        return _Factor(self.b, _names(self._labels, "c"))

    def _sizes(self) -> dict[int, int]:
        """The size of each axis of the weight, and the rank."""
        return {name: size for array, names in (self._rows, self._columns) for name, size in zip(names, array.shape, strict=True)}

    def _product(self, x: _Factor, y: _Factor, names: Sequence[int]) -> Array:
        """A piece of the dense weight, summed in at least float32 and rounded once."""
        dtype, precision = jnp.promote_types(self.a.dtype, jnp.float32), lax.Precision.HIGHEST
        return factor.contract(*x, *y, names, dtype=dtype, precision=precision).astype(self.dense_dtype)

    def _rebuilt(self, labels: str, fn: Callable[[_Factor, Sequence[int]], Array]) -> "LowRank":
        """The leaf with other axes: `fn` makes each factor, given the names of its axes then."""
        layout = labels.lstrip("s")
        if "s" in layout:
            return NotImplemented
        a, b = fn(self._rows, _names(labels, "r")), fn(self._columns, _names(labels, "c"))
        return dataclasses.replace(self, a=a, b=b, layout=layout)

    def _resized(self, labels: str, sizes: Sequence[int]) -> "LowRank":
        rank = self.a.shape[-1]
        return self._rebuilt(
            labels, lambda each, names: each.array.reshape([rank if name == _RANK else sizes[name] for name in names])
        )


def _names(labels: str, kind: str) -> tuple[int, ...]:
    """The axes of a factor: the rank is the last of `a`, and comes after the stack in `b`."""
    stack, own = labels.count("s"), [axis for axis, label in enumerate(labels) if label == kind]
    return (*range(stack), *own, _RANK) if kind == "r" else (*range(stack), _RANK, *own)


def _relabelled(old: Sequence[int], labels: str, new: Sequence[int]) -> str | None:
    """What the axes are once a weight of shape `old` has shape `new`; None if rows merge with columns or with a stack.

    Axes of length 1 are whatever suits.
    """
    blocks = equal_blocks(old, new)
    if blocks is None:
        return None
    found = ""
    for before, after in blocks:
        kinds = {label for label, n in zip(labels[before], old[before], strict=True) if n > 1}
        if len(kinds) > 1:
            return None
        found += (kinds.pop() if kinds else "1") * (after.stop - after.start)
    stack = found.rfind("s") + 1
    return found[:stack].replace("1", "s") + found[stack:].replace("1", "r")


def pointwise(x: Array, matrix: Array, channel: int, side: int, *, dtype: Any = None, precision: Any = None) -> Array:
    r"""Mixes channels at each place: a convolution of size 1, as a product.

    On one CPU thread it takes 0.7 of the time of the convolution for images in NHWC, 0.9 in NCHW (28 x 28, 128 channels to 32).

    Args:
      x: any shape.
      matrix: its axis `side` has the channels of `x`, the other one those of the result.
      channel: the axis of `x` that is mixed; the result has the others where `x` has them.
      side: 0 or 1.
      dtype: of the result, or None for that of the operands.
      precision: as `lax.dot_general` takes it.

    >>> pointwise(jnp.ones((1, 3, 5, 5)), jnp.ones((3, 2)), 1, 0).shape
    (1, 2, 5, 5)
    """
    out = lax.dot_general(x, matrix, (((channel,), (side,)), ((), ())), precision=precision, preferred_element_type=dtype)
    return jnp.moveaxis(out, -1, channel)


class MatrixView(NamedTuple):
    """A weight seen as matrices, inputs by outputs.

    Attributes:
      stack: the sizes of the leading axes that number the matrices.
      rows: those of the input axes.
      columns: those of the output axes.
      order: the axes in that order.
      layout: what each axis after the stack is, as in `LowRank`.
    """

    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]
    layout: str

    @property
    def shape(self) -> tuple[int, int]:
        """Of each matrix."""
        return math.prod(self.rows), math.prod(self.columns)


def matrix_view(shape: Sequence[int], axis: int | tuple[int, ...] = -1, stacked: int = 0) -> MatrixView:
    """How a weight is seen as matrices.

    Args:
      shape: of the weight.
      axis: the output axes; all others are inputs.
      stacked: how many leading axes number separate weights.

    Raises:
      ValueError: an axis lies outside the weight or in the stack, or no input axis is left.

    >>> view = matrix_view((3, 3, 8, 16))
    >>> view.shape, view.layout
    ((72, 16), 'rrrc')
    """
    ndim, given = len(shape), axis if isinstance(axis, tuple) else (axis,)
    columns = {a % ndim for a in given if -ndim <= a < ndim}
    rows = [a for a in range(stacked, ndim) if a not in columns]
    if stacked < 0 or len(columns) < len(given) or not columns or min(columns) < stacked or not rows:
        raise ValueError(f"axis={axis} and stacked={stacked} leave no matrix: name the output axes, and leave an input axis")
    order = (*range(stacked), *rows, *sorted(columns))
    stack, inputs, outputs = (tuple(shape[a] for a in axes) for axes in (range(stacked), rows, sorted(columns)))
    return MatrixView(stack, inputs, outputs, order, "".join("c" if a in columns else "r" for a in range(stacked, ndim)))


def factorised(
    w: Array,
    rank: factor.Rank,
    axis: int | tuple[int, ...] = -1,
    stacked: int = 0,
    moment: Array | None = None,
    dtype: Any = None,
) -> LowRank:
    """One weight as a `LowRank` leaf.

    Args:
      w: a weight of two axes or more.
      rank: a number, or a rule of the singular values.
      axis: the output axes.
      stacked: how many leading axes number the weights of a stack.
      moment: as in `factor.factorise`.
      dtype: of the factors, and of what they stand for; None for that of `w`.

    Raises:
      TypeError: the rank is a rule, and the weight is traced.
      ValueError: the rank, the axes or the moment do not fit.

    >>> factorised(jnp.ones((3, 3, 8, 16)), 2).a.shape
    (3, 3, 8, 2)
    """
    view, dtype = matrix_view(w.shape, axis, stacked), dtype or w.dtype
    a, b = factor.factorise(lax.transpose(w, view.order).reshape(*view.stack, *view.shape), rank, moment)
    a, b = a.reshape(*view.stack, *view.rows, -1), b.reshape(*view.stack, b.shape[-2], *view.columns)
    return LowRank(a.astype(dtype), b.astype(dtype), view.layout, dtype)


def low_rank(
    params: PyTree,
    rank: factor.Rank | Mapping[str, factor.Rank] | None = None,
    energy: float | None = None,
    axis: int | tuple[int, ...] = -1,
    stacked: int = 0,
    moments: Mapping[str, Array] | None = None,
    where: Where = "**/kernel",
) -> PyTree:
    r"""Stores the chosen weights as products of two thin factors, cut from their singular values.

    .. math:: W \approx A B, \qquad A = U_r \sqrt{\Sigma_r}, \; B = \sqrt{\Sigma_r} V_r^\top

    A weight :math:`[m, n]` that would not shrink, as :math:`r (m + n) \ge m n`, stays dense; `summary` shows which. The factors
    train: give the result to `optimizer`, and call the model on it with `lift`.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      rank: for all; or by path, where weights without one stay dense; or a rule such as `by_evidence`.
      energy: instead of a rank, the share in (0, 1] of the squared singular values that each weight keeps, in the fewest of them.
      axis: the output axes; all others are inputs. -1 is right for Flax's kernels (those of convolutions are patches by outputs)
        and for embeddings; 0 for weights stored as (out, in); (-2, -1) for the kernels of queries, keys and values.
      stacked: how many leading axes number separate weights, as those stacked for a scan over layers; they share one rank, the
        largest that one of them needs.
      moments: by path, the second moment :math:`X^\top X` of the layer's inputs, `[..., m, m]`. Then what is smallest is the error
        of the outputs :math:`\lVert X (W - AB) \rVert_F`, and `energy` is a share of theirs.
      where: which leaves (see `tree.select`).

    Returns:
      `params` with `LowRank` leaves.

    Raises:
      ValueError: rank and energy are both given or neither, one is out of range, no weight would shrink, one with a rank of its own
        would not, axes or moments do not fit, a weight is not finite, a path is unknown, or nothing matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already; or it is traced, and the rank left to its
        singular values: that choice is made on the host.

    >>> params = {"Dense_0": {"kernel": jnp.outer(jnp.arange(3.0), jnp.ones(4)), "bias": jnp.zeros(4)}}
    >>> low_rank(params, energy=0.99)["Dense_0"]["kernel"]
    LowRank(a=f32[3,1], b=f32[1,4], layout='rc', dense_dtype=dtype('float32'))

    Source: Denton et al., "Exploiting linear structure within convolutional networks for efficient evaluation", 2014; for
    `moments`, Izenman, "Reduced-rank regression for the multivariate linear model", 1975.
    """
    if (rank is None) == (energy is None):
        raise ValueError("low_rank takes a rank or an energy: give one of them")
    chosen = tree.selected(params, where)
    ranks = tree.by_path("rank", rank if energy is None else factor.by_energy(energy), chosen)

    def store(path: str, leaf: Any) -> Any:
        w, moment = checked(leaf, path), None
        if path not in ranks:
            return leaf
        if moments is not None and (moment := moments.get(path)) is None:
            raise ValueError(f"moments lack {path}: give its second moment, or leave it out of `where`")
        own = ranks[path]
        with naming(path, w.shape):
            rows, columns = matrix_view(w.shape, axis, stacked).shape
            most = (rows * columns - 1) // (rows + columns)
            if not callable(own) and own > most:
                if isinstance(rank, Mapping):
                    raise ValueError(f"rank={own} stores no fewer numbers than the weight; up to rank {most} does")
                return leaf
            stored = factorised(w, ranks[path], axis, stacked, moment)
        return stored if stored.a.shape[-1] <= most else leaf

    stored = {path: store(path, leaf) for path, leaf in chosen.items()}
    shrunk(stored, f"energy={energy}" if rank is None else f"rank={rank}")
    return tree.replaced(params, stored)


def shrunk(stored: Mapping[str, Any], asked: str) -> None:
    """Raises a one-line ValueError if every chosen weight stayed dense.

    Args:
      stored: the chosen leaves by path, compressed or not.
      asked: the setting, for the message.

    >>> shrunk({"kernel": jnp.ones((2, 2))}, "rank=2")
    Traceback (most recent call last):
      ...
    ValueError: with rank=2 none of the 1 chosen weights would shrink: kernel (2, 2)
    """
    if not any(map(tree.is_compressed, stored.values())):
        shapes = ", ".join(f"{path} {tuple(leaf.shape)}" for path, leaf in list(stored.items())[:5])
        raise ValueError(f"with {asked} none of the {len(stored)} chosen weights would shrink: {shapes}")
