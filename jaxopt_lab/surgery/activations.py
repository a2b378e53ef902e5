"""How large the inputs are that each weight of a model meets, on data."""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab.core import tracing
from jaxopt_lab.core.tracing import Live, Reducer, Site, Step
from jaxopt_lab.core.types import Array, PyTree, Where

__all__ = ["mean_inputs"]


def mean_inputs(apply: Callable[..., Any], params: PyTree, batches: Iterable[Any], where: Where | None = None) -> dict[str, Array]:
    r"""For every weight the mean size of what it is multiplied with.

    .. math:: a_i = \frac{1}{|P_i|} \sum_{p \in P_i} |x_p|

    over all products :math:`w_i x_p` in which weight i takes part: every position of a convolution but where it meets padding,
    every step of a scan, every example. A product is linear in its weights: the sum is the derivative of what it makes of |x|.

    Args:
      apply: `apply(params, *inputs)`, such as `model.predict`.
      params: dense.
      batches: as `tracing.collect` takes them.
      where: which weights (see `tree.select`); None is all that meet a product.

    Returns:
      By path, arrays of the parameters' shapes; 0 for entries that met nothing. A weight that only a lookup meets is left out, and
      so is one that reaches its product concatenated with others or by an index.

    Raises:
      ValueError, TypeError: what `tracing.collect` raises.

    >>> apply, x = lambda p, x: x @ p["w"], jnp.array([[1.0, -2.0], [3.0, 0.0]])
    >>> mean_inputs(apply, {"w": jnp.ones((2, 1))}, [x])["w"].tolist()
    [[2.0], [1.0]]

    Source: Sun et al., "A simple and effective pruning approach for large language models", 2024, section 3 (by means of sizes).
    """
    met: dict[str, Site] = {}

    def init(site: Site, live: Live) -> tuple[Array, Array] | None:
        if site.primitive == "gather" or not all(step.operation is not None or step.primitive == "scan" for step in site.view):
            return None
        met[site.name] = site
        return jnp.zeros(live.weight.shape), jnp.zeros(live.weight.shape)

    def update(site: Site, state: tuple[Array, Array], live: Live) -> tuple[Array, Array]:
        total, times = state

        def product(weight: Array, x: Array) -> Array:
            return jnp.sum(site._replace(params={**site.params, "preferred_element_type": None}).product(x, weight))

        weight, x = jnp.zeros(live.weight.shape), jnp.abs(live.input.astype(jnp.float32))
        return total + jax.grad(product)(weight, x), times + jax.grad(product)(weight, jnp.ones_like(x))

    states = tracing.collect(apply, params, batches, Reducer(init, update), where, strict=where is not None)
    sums: dict[str, list[tuple[Array, Array]]] = {}
    for name, state in states.items():
        site = met[name]
        sums.setdefault(site.path, []).append(tuple(_stored(site.view, value, site.parameter.shape) for value in state))  # pyright: ignore
    totals = {path: jax.tree.map(lambda *each: functools.reduce(operator.add, each), *own) for path, own in sums.items()}
    return {path: total / jnp.maximum(times, 1) for path, (total, times) in totals.items()}


def _stored(steps: Sequence[Step], value: Array, shape: tuple[int, ...]) -> Array:
    """What was gathered for an operand, laid out as the parameter that the operand is a view of."""
    scan = next((k for k, step in enumerate(steps) if step.primitive == "scan"), len(steps))
    # A cast would round what was gathered.
    plain = [step for step in steps[:scan] if step.primitive not in ("convert_element_type", "reduce_precision")]

    def view(stored: Array) -> Array:
        for step in plain:
            out = step.operation.bind(stored, **step.params)
            stored = out[step.output] if step.operation.multiple_results else out
        return stored

    whole = jax.ShapeDtypeStruct(shape, jnp.float32)
    if scan < len(steps):
        inner = functools.partial(_stored, steps[scan + 1 :], shape=jax.eval_shape(view, whole).shape[1:])
        value = jax.vmap(inner)(value)
    return jax.linear_transpose(view, whole)(value)[0]
