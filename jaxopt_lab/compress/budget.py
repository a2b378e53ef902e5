"""Which form each weight is stored in, so that the whole fits into so many bytes and the loss grows least."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxopt_lab.compress.leaves.quantized import quantize
from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["Allocation", "allocate", "allocate_bits"]

Form = Callable[..., PyTree]
"""`form(params, where=...) -> params`: `functools.partial(quantize, bits=4)`, `functools.partial(low_rank, rank=8)`, ..."""


class Allocation(NamedTuple):
    """What `allocate` chose.

    Attributes:
      params: the tree, each chosen weight in its form.
      forms: for each path, the place of its form among those given.
      nbytes: of the whole tree as stored.
      growth: the sum of what each choice alone adds to the loss.
      sensitivity: for each path, what every form alone adds to the loss; `[forms]`.
    """

    params: PyTree
    forms: dict[str, int]
    nbytes: int
    growth: float
    sensitivity: dict[str, np.ndarray]


def allocate(
    loss: Callable[[PyTree], Array], params: PyTree, nbytes: int, forms: Sequence[Form], where: Where = "**/kernel"
) -> Allocation:
    r"""Chooses a form for every weight under a budget of bytes, by what each alone does to the loss.

    .. math:: \min_{f} \sum_l \left( L(w_1, ..., f_l(w_l), ..., w_n) - L(w) \right) \quad \text{so that} \quad
              \sum_l \mathrm{bytes}(f_l(w_l)) \le B

    The sum stands for the loss of all together, to which it is equal as far as the errors of different weights do not meet. The
    choice is exact: an integer program. The loss is compiled once, and evaluated once a weight and form.

    Args:
      loss: of a dense tree like `params`, over data that it holds; a finite scalar.
      params: any tree; what is not chosen counts in the budget as it is.
      nbytes: the budget, of the whole tree as `tree.nbytes` counts it.
      forms: what a weight may be stored in, each a chooser of this package with all but `params` and `where` bound. Give
        `lambda params, where: params` for the dense weight, where that is allowed.
      where: which leaves (see `tree.select`).

    Raises:
      ValueError: no choice fits, the loss is not a finite scalar, there are no forms, or nothing matches `where`.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.linspace(-1.0, 1.0, 64), "b": jnp.linspace(-1.0, 1.0, 64)}
    >>> loss = lambda p: jnp.sum((p["a"] - params["a"]) ** 2) + 100 * jnp.sum((p["b"] - params["b"]) ** 2)
    >>> forms = [partial(quantize, bits=bits, axis=None) for bits in (2, 4)]
    >>> allocate(loss, params, 60, forms, where="*").forms
    {'a': 0, 'b': 1}

    Source: Yao et al., "HAWQ-V3: dyadic neural network quantization", 2021 (the integer program).
    """
    if not forms:
        raise ValueError("there are no forms to choose from")
    chosen = tree.selected(params, where)
    stored = {path: [_of(form, path, params) for form in forms] for path in chosen}
    compiled = jax.jit(loss)
    base = _finite(compiled(params), "of the tree as it is")
    sensitivity = {
        path: np.array([_finite(compiled(_with(params, path, decompress(x))), f"with {path} in form {k}") - base for k, x in rows])
        for path, rows in ((path, list(enumerate(leaves))) for path, leaves in stored.items())
    }
    sizes = {path: np.array([tree.nbytes(leaf) for leaf in leaves]) for path, leaves in stored.items()}
    rest = tree.nbytes(params) - tree.nbytes(list(chosen.values()))
    places = _choose(list(sensitivity.values()), list(sizes.values()), nbytes - rest)
    if places is None:
        least = rest + sum(int(size.min()) for size in sizes.values())
        raise ValueError(f"nbytes={nbytes}: the smallest choice of forms takes {least} bytes; allow more, or give smaller forms")
    picked = dict(zip(chosen, places, strict=True))
    names, leaves, treedef = tree.flatten(params)
    whole = jax.tree.unflatten(
        treedef, [stored[name][picked[name]] if name in picked else leaf for name, leaf in zip(names, leaves, strict=True)]
    )
    growth = float(sum(sensitivity[path][k] for path, k in picked.items()))
    return Allocation(whole, picked, tree.nbytes(whole), growth, sensitivity)


def allocate_bits(
    loss: Callable[[PyTree], Array],
    params: PyTree,
    nbytes: int,
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    axis: int | tuple[int, ...] | None = -1,
    symmetric: bool = True,
    where: Where = "**/kernel",
) -> dict[str, int]:
    """The bits of every chosen weight under a budget of bytes: `allocate` over `quantize`, whose `bits=` takes the answer.

    Args:
      loss, params, nbytes, where: as in `allocate`.
      bits: what may be chosen.
      axis, symmetric: as in `quantize`.

    Raises:
      ValueError: as `allocate` and `quantize`.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.linspace(-1.0, 1.0, 64), "b": jnp.linspace(-1.0, 1.0, 64)}
    >>> loss = lambda p: jnp.sum((p["a"] - params["a"]) ** 2) + 100 * jnp.sum((p["b"] - params["b"]) ** 2)
    >>> allocate_bits(loss, params, 60, bits=(2, 4), axis=None, where="*")
    {'a': 2, 'b': 4}
    """
    forms = [partial(quantize, bits=b, axis=axis, symmetric=symmetric) for b in bits]
    return {path: bits[k] for path, k in allocate(loss, params, nbytes, forms, where).forms.items()}


def _of(form: Form, path: str, params: PyTree) -> Any:
    """One leaf as a form stores it."""
    return tree.selected(form(params, where=lambda name, leaf: name == path), lambda name, leaf: name == path)[path]


def _with(params: PyTree, path: str, value: Any) -> PyTree:
    return tree.map_selected(lambda leaf: value, params, where=lambda name, leaf: name == path)


def _finite(value: Array, of: str) -> float:
    if np.shape(value) != () or not np.isfinite(value):
        raise ValueError(f"the loss {of} must be a finite scalar; it is {np.asarray(value)}")
    return float(value)


def _choose(costs: Sequence[np.ndarray], sizes: Sequence[np.ndarray], budget: int) -> list[int] | None:
    """One form a weight, of the least cost within the budget; None where nothing fits."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    counts = [len(cost) for cost in costs]
    one_each = np.zeros((len(counts), sum(counts)))
    for row, (end, count) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
        one_each[row, end - count : end] = 1
    # In units of the largest, so that the solver's tolerances mean the same whatever the loss is measured in.
    cost = np.concatenate(costs)
    scale = float(np.abs(cost).max()) or 1.0
    solved = milp(
        cost / scale,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.concatenate(sizes)[None], ub=budget)],
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        return None
    return [int(np.argmax(part)) for part in np.split(solved.x, np.cumsum(counts)[:-1])]
