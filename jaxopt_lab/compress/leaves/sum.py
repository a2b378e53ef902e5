"""Weights as a sum of leaves, such as codes with low-rank factors beside them, and the functions that put those into a tree."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jaxopt_lab.compress.arrays import factor
from jaxopt_lab.compress.leaf import Leaf, checked
from jaxopt_lab.compress.leaves.dense import Frozen
from jaxopt_lab.compress.leaves.low_rank import LowRank, factorised, matrix_view
from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import naming
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["Sum", "add_low_rank", "split_low_rank"]


class Sum(Leaf):
    r"""A weight stored as the sum of leaves of its own shape and dtype: :math:`W = \sum_i W_i`.

    What trains in each part trains. A product is the sum of the products that the parts can do as they are, and of one with the sum
    of those that cannot.

    Attributes:
      parts: at least one leaf.

    >>> part = LowRank(jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 4.0]]))
    >>> Sum((Frozen(jnp.eye(2)), part)).materialise()
    Array([[4., 4.],
           [6., 9.]], dtype=float32)
    """

    parts: tuple[Leaf, ...]
    trains: ClassVar[tuple[str, ...]] = ("parts",)

    def __check_init__(self):
        kinds = [f"{part.aval().dtype}{list(part.aval().shape)}" for part in self.parts]
        if not kinds or len(set(kinds)) > 1:
            raise ValueError(f"a sum needs parts of one shape and dtype: got {', '.join(kinds) or 'none'}")

    def aval(self):
        return self.parts[0].aval()

    def materialise(self) -> Array:
        dtype = self.aval().dtype
        return functools.reduce(operator.add, (_wide(part) for part in self.parts)).astype(dtype)

    def format(self) -> str:
        return " + ".join(part.format() for part in self.parts)

    def stepwise(self, length):
        parts = [(part, part.stepwise(length)) for part in self.parts]
        if all(step is NotImplemented for _, step in parts):
            return NotImplemented
        return Sum(tuple(Frozen(part.materialise()) if step is NotImplemented else step for part, step in parts))

    def freeze(self):
        return Sum(tuple(part.freeze() for part in self.parts))

    def dot_general(self, x, *, preferred_element_type, **params):
        out = preferred_element_type or jnp.promote_types(x.dtype, self.aval().dtype)
        params["preferred_element_type"] = jnp.promote_types(out, jnp.float32) if jnp.issubdtype(out, jnp.floating) else out
        y = self._summed(lambda part: part.dot_general(x, **params), lambda weight: lax.dot_general_p.bind(x, weight, **params))
        return y if y is NotImplemented else y.astype(out)

    def conv_general_dilated(self, x, **params):
        return self._summed(
            lambda part: part.conv_general_dilated(x, **params), lambda weight: lax.conv_general_dilated_p.bind(x, weight, **params)
        )

    def gather(self, indices, **params):
        return self._summed(
            lambda part: part.gather(indices, **params), lambda weight: lax.gather_p.bind(weight, indices, **params)
        )

    def convert_element_type(self, **params):
        if not jnp.issubdtype(params["new_dtype"], jnp.floating):
            return NotImplemented
        return self._mapped("convert_element_type", lax.convert_element_type_p, params)

    def transpose(self, **params):
        return self._mapped("transpose", lax.transpose_p, params)

    def reshape(self, **params):
        return self._mapped("reshape", lax.reshape_p, params)

    def squeeze(self, **params):
        return self._mapped("squeeze", lax.squeeze_p, params)

    def broadcast_in_dim(self, **params):
        return self._mapped("broadcast_in_dim", lax.broadcast_in_dim_p, params)

    def _summed(self, run: Callable[[Leaf], Array], run_dense: Callable[[Array], Array]) -> Array:
        outs = [run(part) for part in self.parts]
        declined = tuple(part for part, out in zip(self.parts, outs, strict=True) if out is NotImplemented)
        if len(declined) == len(outs):
            return NotImplemented
        done = [out for out in outs if out is not NotImplemented]
        return functools.reduce(operator.add, [*done, run_dense(Sum(declined).materialise())] if declined else done)

    def _mapped(self, method: str, primitive: Any, params: dict[str, Any]) -> "Sum":
        """Each part so changed, as it is or dense; at least one of them as it is."""
        outs = [getattr(part, method)(**params) for part in self.parts]
        if all(out is NotImplemented for out in outs):
            return NotImplemented

        def changed(part: Leaf, out: Any) -> Leaf:
            out = primitive.bind(part.materialise(), **params) if out is NotImplemented else out
            return out if tree.is_compressed(out) else Frozen(out)

        return Sum(tuple(map(changed, self.parts, outs)))


def _wide(part: Leaf) -> Array:
    """A part in at least float32, not rounded to its own dtype before it is summed where it knows how not to be."""
    dtype = jnp.promote_types(part.aval().dtype, jnp.float32)
    out = part.convert_element_type(new_dtype=dtype, weak_type=False, sharding=None)
    dense: Any = out if isinstance(out, Array) else (part if out is NotImplemented else out).materialise()
    return dense.astype(dtype)


def split_low_rank(
    params: PyTree,
    rank: factor.Rank | Mapping[str, factor.Rank],
    rest: Callable[[PyTree], PyTree],
    axis: int | tuple[int, ...] = -1,
    stacked: int = 0,
    iterations: int = 1,
    where: Where = "**/kernel",
) -> PyTree:
    r"""Stores the chosen weights as low-rank factors, which train, and the rest as another function stores it.

    .. math:: W \approx Q + A B, \qquad A_t B_t = \mathrm{svd}_r(W - Q_{t-1}), \; Q_t = \mathrm{store}(W - A_t B_t), \; Q_0 = 0

    The factors take what is large in few directions, so that the rest has a smaller range to round in. Of all iterations each
    weight keeps the one with the least :math:`\lVert W - Q_t - A_t B_t \rVert_F`: the error never rises with their number.

    Args:
      params: any tree: parameters, the whole variables of a model, an NNX state.
      rank: of all factors; or by path, where weights without one stay as they are; or a rule such as `by_evidence`.
      rest: stores what remains, such as `lambda p: quantize(p, bits=4)`. It is called with a dict of the chosen weights by path,
        and stores each of them in a leaf.
      axis: the output axes of the factors, as in `low_rank`.
      stacked: how many leading axes number separate weights, as in `low_rank`.
      iterations: how often both are fitted in turns.
      where: which leaves (see `tree.select`).

    Returns:
      `params` with `Sum` leaves of what `rest` gave and `LowRank`.

    Raises:
      ValueError: a rank, an axis or the iterations are out of range, a weight is not finite, a path is unknown, `rest` changes a
        shape or paths, or nothing matches `where`.
      TypeError: a chosen leaf is not a floating-point array, or is compressed already; `rest` leaves one dense; or a weight is
        traced, and the rank left to its singular values.

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> params = {"Dense_0": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}}
    >>> split_low_rank(params, rank=1, rest=quantize)["Dense_0"]["kernel"].format()
    'int8 per channel 1 + float32 rank 1'

    Source: Guo, Greengard, Xing and Kim, "LQ-LoRA: low-rank plus quantized matrix decomposition for efficient language model
    finetuning", 2023; Li et al., "LoftQ: LoRA-fine-tuning-aware quantization for large language models", 2023.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: factors and rest are fitted at least once")
    chosen = tree.selected(params, where)
    ranks = tree.by_path("rank", rank, chosen)
    weights = {path: checked(chosen[path], path) for path in ranks}
    best: dict[str, tuple[Sum, Array]] = {}
    remaining = {path: wide(w) for path, w in weights.items()}
    for _ in range(iterations):
        low = {}
        for path, w in weights.items():
            with naming(path, w.shape):
                low[path] = factorised(remaining[path], ranks[path], axis, stacked, dtype=w.dtype)
        stored = rest({path: (wide(w) - _wide(low[path])).astype(w.dtype) for path, w in weights.items()})
        _check_rest(stored, weights)
        for path, w in weights.items():
            both = Sum((stored[path], low[path]))
            error = jnp.sum(jnp.square(wide(w) - _wide(stored[path]) - _wide(low[path])))
            best[path] = (both, error) if path not in best else _better((both, error), best[path])
            remaining[path] = wide(w) - _wide(stored[path])
    return tree.replaced(params, {path: both for path, (both, _) in best.items()})


def add_low_rank(
    params: PyTree,
    rank: int | Mapping[str, int],
    key: Array,
    axis: int | tuple[int, ...] = -1,
    stacked: int = 0,
    where: Where = "**/kernel",
) -> PyTree:
    r"""Puts low-rank factors that train beside the chosen weights: the function stays as it is until they move.

    .. math:: W + A B, \qquad A_{ij} \sim \mathcal N(0, 1 / m), \; B = 0

    A dense weight no longer trains; a stored one keeps what it is, and what trains in it. With `optimizer`, only the factors and
    the leaves that were not chosen move. A fixed factor :math:`\alpha / r` before the product, as some write it, is left to the
    learning rate.

    Args:
      params: any tree, with compressed leaves or without.
      rank: of all factors; or by path, where weights without one stay as they are.
      key: a PRNG key for `A`.
      axis: the output axes of the factors, as in `low_rank`.
      stacked: how many leading axes number separate weights, as in `low_rank`.
      where: which leaves (see `tree.select`).

    Returns:
      `params` with `Sum` leaves; factors have the weight's dtype.

    Raises:
      ValueError: a rank or an axis is out of range, a weight is not finite, a path is unknown, or nothing matches `where`.
      TypeError: a chosen leaf is not a floating-point array.

    >>> params = {"Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> add_low_rank(params, 2, jax.random.key(0))["Dense_0"]["kernel"].format()
    'float32 frozen + float32 rank 2'

    Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021; Dettmers, Pagnoni, Holtzman and Zettlemoyer,
    "QLoRA: efficient finetuning of quantized LLMs", 2023.
    """
    chosen, added = tree.selected(params, where), {}
    for index, (path, given) in enumerate(tree.by_path("rank", rank, chosen).items()):
        leaf = chosen[path]
        stored = leaf if tree.is_compressed(leaf) else Frozen(checked(leaf, path))
        aval = stored.aval()
        with naming(path, aval.shape):
            view = matrix_view(aval.shape, axis, stacked)
            if not 1 <= given <= min(view.shape):
                raise ValueError(f"rank={given} does not fit a matrix {view.shape}: give 1 to {min(view.shape)}")
        a = jax.random.normal(jax.random.fold_in(key, index), (*view.stack, *view.rows, given)) / view.shape[0] ** 0.5
        b = jnp.zeros((*view.stack, given, *view.columns), aval.dtype)
        parts = stored.parts if isinstance(stored, Sum) else (stored,)
        added[path] = Sum((*parts, LowRank(a.astype(aval.dtype), b, view.layout, aval.dtype)))
    return tree.replaced(params, added)


def _check_rest(stored: Any, weights: dict[str, Array]) -> None:
    if not isinstance(stored, dict) or set(stored) != set(weights):
        raise ValueError(f"rest has to give what it was given, a dict with the paths {', '.join(list(weights)[:5])}")
    for path, w in weights.items():
        if not tree.is_compressed(stored[path]):
            raise TypeError(f"rest leaves {path} dense; give it a `where` that chooses every weight")
        if stored[path].aval().shape != w.shape:
            raise ValueError(f"rest stores {path} of shape {w.shape} as a weight of shape {stored[path].aval().shape}")


def _better(new: tuple[Sum, Array], old: tuple[Sum, Array]) -> tuple[Sum, Array]:
    lower = new[1] < old[1]
    if isinstance(lower, Tracer):
        return jax.tree.map(functools.partial(jnp.where, lower), new, old)
    return new if lower else old
