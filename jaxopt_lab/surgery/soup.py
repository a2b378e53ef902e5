"""Several trees of one network, made one: averages, and differences that are added."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core import tree
from jaxopt_lab.core.checks import require
from jaxopt_lab.core.numerics import wide
from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.prune.selection import kth_largest

__all__ = ["add_tasks", "greedy_soup", "merge_tasks", "soup", "task_vector"]


def soup(candidates: Sequence[PyTree], weights: Sequence[float] | Array | None = None) -> PyTree:
    r"""The mean of several trees, leaf by leaf.

    .. math:: \theta = \frac{\sum_i c_i \theta_i}{\sum_i c_i}

    It is taken in at least float32 and stored in the first one's dtype. What is not floating (integers, keys) is that of the first.
    Networks that were fine-tuned from one start average well; others are aligned first (`align`), and running statistics that no
    longer fit are taken anew (`reestimate`).

    Args:
      candidates: trees of the same structure and shapes; compressed leaves are refused, since codes do not average.
      weights: one number of at least 0 for each; None for equal ones.

    Raises:
      ValueError: there is no candidate, two differ in a path or shape, or the weights are of another number, negative, or all 0.
      TypeError: a leaf is compressed.

    >>> soup([{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 6.0])}])["w"].tolist()
    [2.0, 4.0]
    >>> soup([{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 6.0])}], [3.0, 1.0])["w"].tolist()
    [1.5, 3.0]

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
    inference time", 2022.
    """
    _check_alike("candidate", candidates)
    shares = np.ones(len(candidates)) if weights is None else weights
    if np.shape(shares) != (len(candidates),):
        raise ValueError(f"weights must be one number for each of {len(candidates)} candidates; got shape {np.shape(shares)}")
    require(lambda c: (c >= 0) & np.any(c > 0), "be at least 0, and not all 0", weights=shares)
    shares = jnp.asarray(shares) / jnp.sum(jnp.asarray(shares))

    def mean(first: Any, *others: Any) -> Any:
        terms = [share * wide(leaf) for share, leaf in zip(shares, (first, *others), strict=True)]
        return sum(terms[1:], terms[0]).astype(jnp.result_type(first))

    return _on_floats(mean, *candidates)


def greedy_soup(candidates: Sequence[PyTree], score: Callable[[PyTree], Any]) -> tuple[PyTree, tuple[int, ...]]:
    """The mean of those candidates that help, tried from the best on: each stays if the score does not fall.

    Args:
      candidates: as for `soup`.
      score: `params -> scalar`, the higher the better, on data held out for this choice. It is called on each candidate and on each
        mean that is tried: jit what is costly inside.

    Returns:
      The mean, which scores no less than the best candidate; and which ones are in it, in the order in which they came.

    Raises:
      ValueError, TypeError: as `soup`; a score is not a number.

    >>> candidates = [{"w": jnp.array(value)} for value in (3.0, 0.0, 9.0, 1.5)]
    >>> params, chosen = greedy_soup(candidates, lambda params: -abs(params["w"] - 2.0))
    >>> float(params["w"]), chosen
    (2.25, (3, 0))

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
    inference time", 2022, recipe 1.
    """
    _check_alike("candidate", candidates)
    scores = [_scored(score, params, f"candidate {k}") for k, params in enumerate(candidates)]
    first, *others = sorted(range(len(candidates)), key=lambda k: -scores[k])
    chosen, best, params = [first], scores[first], candidates[first]
    for k in others:
        tried = soup([candidates[j] for j in (*chosen, k)])
        if (now := _scored(score, tried, f"the mean with candidate {k}")) >= best:
            chosen, best, params = [*chosen, k], now, tried
    return params, tuple(chosen)


def task_vector(fine: PyTree, base: PyTree) -> PyTree:
    r"""What fine-tuning has changed: :math:`\tau = \theta_{fine} - \theta_{base}`, in at least float32.

    What is not floating is left empty: `add_tasks` keeps the base's.

    Args:
      fine, base: trees of the same structure and shapes.

    Raises:
      ValueError, TypeError: as `soup`.

    >>> task_vector({"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([1.0, 2.0])})["w"].tolist()
    [0.0, 3.0]

    Source: Ilharco et al., "Editing models with task arithmetic", 2023.
    """
    _check_alike("tree", [fine, base])
    return jax.tree.map(lambda a, b: wide(a) - wide(b) if _is_inexact(a) else jnp.zeros(0), fine, base)


def add_tasks(base: PyTree, vectors: Sequence[PyTree], scale: float | Array | Sequence[float] = 1.0) -> PyTree:
    r"""The base moved by several tasks: :math:`\theta = \theta_{base} + \sum_i \lambda_i \tau_i`, in the base's dtype.

    Args:
      base: any tree.
      vectors: as `task_vector` or `merge_tasks` gives them.
      scale: one number for all, or one for each; below 0 a task is unlearned.

    Raises:
      ValueError: there is no vector, one has another path or shape than the base, or there are more or fewer scales.
      TypeError: a leaf is compressed.

    >>> add_tasks({"w": jnp.array([1.0, 2.0])}, [{"w": jnp.array([0.0, 3.0])}, {"w": jnp.array([4.0, 0.0])}], 0.5)["w"].tolist()
    [3.0, 3.5]

    Source: Ilharco et al., "Editing models with task arithmetic", 2023.
    """
    _check_alike("vector", vectors, like=base)
    if np.shape(scale) not in ((), (len(vectors),)):
        raise ValueError(f"scale must be a number or one for each of {len(vectors)} vectors; got shape {np.shape(scale)}")
    scales = jnp.broadcast_to(jnp.asarray(scale), (len(vectors),))

    def moved(leaf: Any, *deltas: Any) -> Any:
        terms = [by * delta for by, delta in zip(scales, deltas, strict=True)]
        return sum(terms, wide(leaf)).astype(jnp.result_type(leaf))

    return _on_floats(moved, base, *vectors)


def merge_tasks(vectors: Sequence[PyTree], density: float = 0.2) -> PyTree:
    r"""One task vector out of several that interfere: trimmed, agreed on signs, averaged over those that agree.

    Of each vector the entries of largest magnitude are kept, over all leaves together; each entry takes the sign of
    :math:`\sum_i \tau_i`; and the mean is over those that are not 0 and have that sign.

    Args:
      vectors: as `task_vector` gives them.
      density: the part of the entries that is kept, in (0, 1]; at least one, and ties with the last one stay.

    Raises:
      ValueError, TypeError: as `soup`; `density` is out of range.

    >>> vectors = [{"w": jnp.array([4.0, 0.1, -2.0, 1.0])}, {"w": jnp.array([2.0, 0.2, 3.0, 0.1])}]
    >>> merge_tasks(vectors, density=0.75)["w"].tolist()
    [3.0, 0.20000000298023224, 3.0, 1.0]

    Source: Yadav et al., "TIES-Merging: resolving interference when merging models", 2023.
    """
    _check_alike("vector", vectors)
    require(lambda density: (density > 0) & (density <= 1), "lie in (0, 1]", density=density)
    trimmed = [_trimmed(vector, density) for vector in vectors]

    def elected(*deltas: Array) -> Array:
        stacked = jnp.stack(deltas)
        agree = (stacked != 0) & (jnp.sign(stacked) == jnp.sign(jnp.sum(stacked, axis=0, keepdims=True)))
        count = jnp.sum(agree, axis=0)
        return jnp.sum(jnp.where(agree, stacked, 0), axis=0) / jnp.where(count > 0, count, 1)

    return jax.tree.map(elected, *trimmed)


def _trimmed(vector: PyTree, density: float) -> PyTree:
    """The entries of largest magnitude of a whole tree; 0 elsewhere."""
    magnitudes = jax.tree.map(jnp.abs, vector)
    threshold = kth_largest(magnitudes, max(1, round(density * tree.size(vector))))
    return jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) >= threshold, leaf, 0), vector)


def _scored(score: Callable[[PyTree], Any], params: PyTree, name: str) -> float:
    value = float(score(params))
    if np.isnan(value):
        raise ValueError(f"the score of {name} is not a number: give one of which higher is better")
    return value


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _on_floats(function: Callable[..., Any], first: PyTree, *others: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, *rest: function(leaf, *rest) if _is_inexact(leaf) else leaf, first, *others)


def _check_alike(kind: str, trees: Sequence[PyTree], like: PyTree | None = None) -> None:
    """Raises unless all are of one structure and of the same shapes, and dense."""
    if not trees:
        raise ValueError(f"give at least one {kind}")
    named = [(f"{kind} {k}", one) for k, one in enumerate(trees)]
    named = named if like is None else [("the base", like), *named]
    first, (wanted, reference, structure) = named[0][0], tree.flatten(named[0][1])
    for name, one in named:
        names, leaves, treedef = tree.flatten(one)
        if odd := [path for path, leaf in zip(names, leaves, strict=True) if tree.is_compressed(leaf)]:
            raise TypeError(f"{odd[0]} of {name} is stored in codes, which do not add up: compress.decompress(params) first")
        if odd := sorted(set(names) ^ set(wanted)):
            raise ValueError(f"{name} has other paths than {first}; first of {len(odd)}: {odd[0]}")
        if treedef != structure:
            raise ValueError(f"{name} has the paths of {first} in other containers: {str(treedef)[:200]}")
        for path, leaf, other in zip(names, leaves, reference, strict=True):
            free = like is not None and not _is_inexact(other)
            if jnp.shape(leaf) != jnp.shape(other) and not free:
                raise ValueError(f"{path} has shape {jnp.shape(leaf)} in {name}, and {jnp.shape(other)} in {first}")
