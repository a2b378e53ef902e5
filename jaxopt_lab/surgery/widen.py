"""Models made wider: units are copied, and copies share what one of them gave."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxopt_lab.compress.lift import decompress
from jaxopt_lab.core.coupling.primitives import taken
from jaxopt_lab.core.coupling.values import kept
from jaxopt_lab.core.coupling.walk import Walked
from jaxopt_lab.core.tracing.fingerprint import of_program
from jaxopt_lab.core.tracing.programs import arrays_of
from jaxopt_lab.core.tracing.walks import follow
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.surgery.coupled import Group, counts_of, coupling_of, walked
from jaxopt_lab.surgery.plan import Plan, bound
from jaxopt_lab.surgery.probes import apart, numbers, probes

__all__ = ["widen"]

_TOLERANCE = 1e-5


def widen(
    apply: Callable[..., Any],
    params: PyTree,
    *example: Any,
    width: float | Mapping[str, int],
    key: Array | None = None,
) -> tuple[Any, PyTree, Plan]:
    r"""More units that compute the same: Net2WiderNet, for any model whose channels can be followed.

    Units of a group are copied in all of its members, side by side. Where a product sums over units, the c copies of one share its
    weights, so that their sum is what it was:

    .. math:: w'_{ij} = \lambda_{ij} \, w_{u(i) j}, \qquad \sum_{i: u(i) = u} \lambda_{ij} = 1

    with :math:`\lambda = 1/c`, or, given a key, shares drawn from [1/2, 3/2] and normalised: copies then have different gradients
    and part in training, where equal ones would stay equal for ever (but for dropout). That the wider function is the old one is
    seen on the example and on drawn inputs like it: a mean over units, as LayerNorm takes it, is the same only where each is copied
    as often as the others.

    Args:
      apply: `apply(params, *inputs) -> outputs`; or a `nets.Model`, whose `predict` is walked, and which comes back as a model.
      params: any tree, with running statistics; compressed leaves become dense.
      example: inputs, arrays or shapes. Batch and length stay free.
      width: how many units a group shall have, by its name (as `path[axis]` of any of its members); or a factor of at least 1 for
        all groups, rounded down.
      key: a typed PRNG key. Of n' units for n, each is there at least `n' // n` times; which ones are there once more is drawn, and
        so are shares. Without a key it is the first ones.

    Returns:
      `(wide_apply, wide_params, plan)`: as of `slim`; the plan gives the wider optimiser's state (`cut_state`).

    Raises:
      ValueError: a group is unknown or would lose units, a parameter of it is summed over in one place and looked up or kept in
        another (a tied table), or the wider function differs by more than 1e-5 of the largest output.
      Exception: what tracing the function raises, as in `coupled_channels`.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [4.0]])}
    >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> wide_apply, wide, plan = widen(apply, params, jnp.ones((1, 1)), width={"a[1]": 3})
    >>> wide["a"].tolist(), wide["b"].tolist(), wide_apply(wide, jnp.ones((1, 1))).tolist()
    ([[1.0, 1.0, -2.0]], [[1.5], [1.5], [4.0]], [[3.0]])

    Source: Chen, Goodfellow and Shlens, "Net2Net: accelerating learning via knowledge transfer", 2016.
    """
    predict, dense = getattr(apply, "predict", apply), decompress(params)
    found, _ = walked(predict, dense, example)
    groups = list(coupling_of(found).groups)
    if not groups:
        raise ValueError("nothing can be made wider: no group of units; coupled_channels says why")
    if isinstance(width, Mapping):
        wanted = counts_of(groups, width, "width")
        for group, n in zip(groups, wanted, strict=True):
            if n < group.units:
                raise ValueError(f"width={n} of {group.name}: it has {group.units} units; slim makes models narrower")
    else:
        if width < 1:
            raise ValueError(f"width={width} must be a factor of at least 1; slim makes models narrower")
        wanted = [int(width * group.units) for group in groups]
    chosen = [(group, n) for group, n in zip(groups, wanted, strict=True) if n > group.units]
    plan = _plan(found, chosen, key)
    plan = dataclasses.replace(plan, made_of=of_program(found.program, dense, *example))
    _check(predict, dense, example, found, plan, chosen)
    return bound(apply, plan), plan.cut(dense), plan


def _plan(found: Walked, chosen: Sequence[tuple[Group, int]], key: Array | None) -> Plan:
    """The plan in which each group has so many units."""
    ways, labels, copies = _ways(found), found.labels, np.ones(len(found.labels), np.int64)
    drawn: dict[str, dict[int, dict[int, np.ndarray]]] = {}
    for number, (group, n) in enumerate(chosen):
        each, shares = _shared(group.units, n, None if key is None else jax.random.fold_in(key, number))
        for path, axis, indices in group.members:
            copies[labels.root(found.params[path].labels(axis)[indices])] = each[:, None]
            done = ways.get(path, {}).get(axis, set())
            if len(done) > 1:
                raise ValueError(
                    f"{path}[{axis}] is {' in one place and '.join(sorted(done))} in another: copies would have to share what it "
                    f"gives in the one, and to keep it in the other; leave the group of {group.name} as it is"
                )
            if done == {"contracted"}:
                of_index = drawn.setdefault(path, {}).setdefault(axis, {})
                of_index |= {index: shares[unit] for unit, own in enumerate(indices.tolist()) for index in own}
    shapes = {path: value.shape for path, value in found.params.items()}
    left = {path: tuple(kept(labels, copies, value)) for path, value in found.params.items()}
    left = {path: axes for path, axes in left.items() if tuple(map(len, axes)) != shapes[path]}
    fractions = {
        path: {axis: _in_order(left[path][axis], of_index) for axis, of_index in axes.items()} for path, axes in drawn.items()
    }
    return Plan(shapes, left, fractions)


def _in_order(indices: np.ndarray, shares: Mapping[int, np.ndarray]) -> np.ndarray:
    """The shares of indices, the first copy of each with its first one, and so on; 1 for those that have none."""
    rest = {index: iter(own.tolist()) for index, own in shares.items()}
    return np.array([next(rest[index]) if index in rest else 1.0 for index in indices.tolist()])


def _shared(units: int, n: int, key: Array | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """How many there are to be of each unit, n in all, and the share of each copy."""
    each = np.full(units, n // units)
    more = np.arange(n % units) if key is None else np.asarray(jax.random.permutation(key, units))[: n % units]
    each[more] += 1
    if key is None:
        return each, [np.full(c, 1 / c) for c in each]
    drawn = np.asarray(jax.random.uniform(jax.random.fold_in(key, 1), (n,), minval=0.5, maxval=1.5), np.float64)
    return each, [own / own.sum() for own in np.split(drawn, np.cumsum(each)[:-1])]


def _ways(found: Walked) -> dict[str, dict[int, set[str]]]:
    """By path and axis, what products do with it: "contracted", "free", "batch" or "picked"."""
    ways: dict[str, dict[int, set[str]]] = {}
    for site in follow(found.program).sites:
        for way, axes in (site.axes._asdict() if site.axes is not None else {}).items():
            for axis in axes:
                ways.setdefault(site.path, {}).setdefault(axis, set()).add(way)
    return ways


def _check(
    apply: Callable[..., Any],
    params: PyTree,
    example: Sequence[Any],
    found: Walked,
    plan: Plan,
    chosen: Sequence[tuple[Group, int]],
) -> None:
    """Refuses a plan whose function is another, and names the group that makes it one."""
    rng = np.random.default_rng(0)
    (own, rebuilt_params), (arrays, rebuilt_inputs) = arrays_of(params), arrays_of(tuple(example))
    own, tried = [numbers(array, rng) for array in own], probes(arrays, rng)

    def outputs(apply: Callable[..., Any], rebuilt: Callable, own: Sequence[Any]) -> list[Any]:
        run = jax.jit(lambda own, arrays: jax.tree.leaves(apply(rebuilt(own), *rebuilt_inputs(arrays))))
        return [run(own, arrays) for arrays in tried]

    before = outputs(apply, rebuilt_params, own)

    def difference(plan: Plan) -> float:
        copies, (wide, rebuilt_wide) = plan.copies(found), arrays_of(plan.cut(rebuilt_params(own)))
        left = [kept(found.labels, copies, value) for value in found.outputs]
        expected = [[taken(out, indices) for out, indices in zip(outs, left, strict=True)] for outs in before]
        return apart(expected, outputs(plan.bind(apply, same=False), rebuilt_wide, wide))

    def told(plan: Plan) -> str:
        try:
            worst = difference(plan)
        except ValueError as error:
            return f"cannot be: {error}"
        if worst <= _TOLERANCE:
            return ""
        return (
            f"make another function of it, by {worst:.1e} of its largest output: something but a product with a parameter sums "
            "over these units, or takes a mean of them. A whole multiple leaves a mean as it is; or name other groups in `width`"
        )

    if not (whole := told(plan)):
        return
    for group, n in chosen:
        if said := whole if len(chosen) == 1 else told(_plan(found, [(group, n)], None)):
            raise ValueError(f"{n} units instead of {group.units} in the group of {group.name} {said}")
    raise ValueError(f"these widths together {whole}")
