"""Which form each weight is stored in, so that the whole fits into so many bytes and the loss grows least."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.compress.leaves.quantized import quantize
from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import require
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
    loss: Callable[[PyTree], Array],
    params: PyTree,
    nbytes: int,
    forms: Sequence[Form],
    where: Where = "**/kernel",
    *,
    at_once: int = 1,
) -> Allocation:
    r"""Chooses a form for every weight under a budget of bytes, by what each alone does to the loss.

    .. math:: \min_{f} \sum_l \left( L(w_1, ..., f_l(w_l), ..., w_n) - L(w) \right) \quad \text{so that} \quad
              \sum_l \mathrm{bytes}(f_l(w_l)) \le B

    The sum stands for the loss of all together, to which it is equal as far as the errors of different weights do not meet. The
    choice is exact: an integer program. The loss is compiled once, and evaluated once a weight and form, or once for several of
    them (`at_once`), which pays where a single loss leaves the device idle.

    Args:
      loss: of a dense tree like `params`, over data that it holds; a finite scalar.
      params: any tree; what is not chosen counts in the budget as it is.
      nbytes: the budget, of the whole tree as `tree.nbytes` counts it.
      forms: what a weight may be stored in, each a chooser of this package with all but `params` and `where` bound. Give
        `lambda params, where: params` for the dense weight, where that is allowed.
      where: which leaves (see `tree.select`).
      at_once: over how many trees the loss is mapped by `vmap`; that many dense copies of `params` are held.

    Raises:
      ValueError: no choice fits, the loss is not a finite scalar, there are no forms, `at_once` is not positive, or nothing matches
        `where`.

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
    require(lambda n: n >= 1, "be at least 1", at_once=at_once)
    places = [(path, k) for path in stored for k in range(len(forms))]
    trees = (_with(params, path, decompress(stored[path][k])) for path, k in places)
    base, *losses = _losses(loss, itertools.chain([params], trees), at_once)
    _finite(base, "of the tree as it is")
    for (path, k), value in zip(places, losses, strict=True):
        _finite(value, f"with {path} in form {k}")
    sensitivity = dict(zip(stored, np.reshape(losses, (len(stored), len(forms))) - base, strict=True))
    sizes = {path: np.array([tree.nbytes(leaf) for leaf in leaves]) for path, leaves in stored.items()}
    rest = tree.nbytes(params) - tree.nbytes(list(chosen.values()))
    picked = _choose(list(sensitivity.values()), list(sizes.values()), nbytes - rest)
    if picked is None:
        least = rest + sum(int(size.min()) for size in sizes.values())
        raise ValueError(f"nbytes={nbytes}: the smallest choice of forms takes {least} bytes; allow more, or give smaller forms")
    form_of = dict(zip(chosen, picked, strict=True))
    whole = tree.replaced(params, {path: stored[path][k] for path, k in form_of.items()})
    growth = float(sum(sensitivity[path][k] for path, k in form_of.items()))
    return Allocation(whole, form_of, tree.nbytes(whole), growth, sensitivity)


def allocate_bits(
    loss: Callable[[PyTree], Array],
    params: PyTree,
    nbytes: int,
    *,
    bits: Sequence[int] = (2, 3, 4, 8),
    axis: int | tuple[int, ...] | None = -1,
    symmetric: bool = True,
    where: Where = "**/kernel",
    at_once: int = 1,
) -> dict[str, int]:
    """The bits of every chosen weight under a budget of bytes: `allocate` over `quantize`, whose `bits=` takes the answer.

    Args:
      loss, params, nbytes, where, at_once: as in `allocate`.
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
    return {path: bits[k] for path, k in allocate(loss, params, nbytes, forms, where, at_once=at_once).forms.items()}


def _of(form: Form, path: str, params: PyTree) -> Any:
    """One leaf as a form stores it."""
    return tree.selected(form(params, where=lambda name, leaf: name == path), lambda name, leaf: name == path)[path]


def _with(params: PyTree, path: str, value: Any) -> PyTree:
    return tree.map_selected(lambda leaf: value, params, where=lambda name, leaf: name == path)


def _losses(loss: Callable[[PyTree], Array], trees: Iterable[PyTree], at_once: int) -> list[float]:
    """The loss of each tree, by one program, so many trees at a time."""
    compiled = jax.jit(loss if at_once == 1 else jax.vmap(loss))
    found: list[Any] = []
    trees = iter(trees)
    while some := list(itertools.islice(trees, at_once)):
        # The last ones are made up to as many as the program was compiled for.
        full = [*some, *[some[-1]] * (at_once - len(some))]
        values = compiled(some[0] if at_once == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *full))
        shape = (len(full),) if at_once > 1 else ()
        if np.shape(values) != shape:
            raise ValueError(f"the loss must be a scalar; its shape is {np.shape(values)[len(shape) :]}")
        found += np.reshape(values, -1)[: len(some)].tolist()
    return found


def _finite(value: float, of: str) -> None:
    if not np.isfinite(value):
        raise ValueError(f"the loss {of} must be finite; it is {value}")


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
