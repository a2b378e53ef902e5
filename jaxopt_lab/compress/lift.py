"""The same function on a compressed tree, and the ways out: dense again, or a table of what is stored."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.compress import rules  # noqa: F401 (imported for its effect: it tells quax what to do)
from jaxopt_lab.compress.trace import quaxified
from jaxopt_lab.compress.watched import Ran, ran
from jaxopt_lab.core import tree
from jaxopt_lab.core.types import PyTree

__all__ = ["Stored", "decompress", "lift", "summary"]


def lift(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The same function on a tree with compressed leaves: `lift(apply)(compressed, x)` is `apply(decompress(compressed), x)`.

    Products run on the stored form where the leaf has a rule for them. The outputs are plain arrays. Without compressed leaves
    among the arguments, `lift(apply)` is `apply`: the same program.

    Call it under `jax.jit`: eager, each operation pays for its dispatch. Gradients come with `jax.grad(..., allow_int=True)`,
    since a leaf may hold integers; they have the structure of the tree.

    Args:
      apply: any function of trees of arrays; compressed leaves may stand anywhere in its arguments.

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> params = {"kernel": jnp.array([[1.27, 0.0], [0.0, 2.54]])}
    >>> lift(lambda p, x: x @ p["kernel"])(quantize(params, where="kernel"), jnp.ones(2))
    Array([1.27, 2.54], dtype=float32)
    """

    @functools.wraps(apply, updated=())
    def lifted(*args: Any, **kwargs: Any) -> Any:
        if not tree.any_compressed((args, kwargs)):
            return apply(*args, **kwargs)
        return decompress(quaxified(apply)(*args, **kwargs))

    return lifted


def decompress(params: PyTree) -> PyTree:
    """The dense tree: every compressed leaf becomes the array that it stands for.

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> decompress(quantize({"kernel": jnp.array([[0.5], [-1.27]])}, where="kernel"))
    {'kernel': Array([[ 0.5 ],
           [-1.27]], dtype=float32)}
    """
    return jax.tree.map(lambda leaf: leaf.materialise() if tree.is_compressed(leaf) else leaf, params, is_leaf=tree.is_compressed)


class Stored(NamedTuple):
    """How one leaf is stored.

    Attributes:
      format: in a few words: a dtype, or what the leaf says of itself.
      shape: of the dense weight.
      nbytes: bytes as stored.
      dense_nbytes: bytes of the dense weight.
      rmse: the root mean square error against a reference; None without one.
      ran: what a function did with it; None without one, or where nothing is compressed.
    """

    format: str
    shape: tuple[int, ...]
    nbytes: int
    dense_nbytes: int
    rmse: float | None = None
    ran: Ran | None = None


def summary(
    params: PyTree, reference: PyTree | None = None, *, apply: Callable[..., Any] | None = None, inputs: tuple[Any, ...] = ()
) -> dict[str, Stored]:
    r"""What is stored, leaf by leaf; how far it is from a dense reference; and what a function does with it.

    The error is :math:`\sqrt{\mathrm{mean}((\hat w - w)^2)}`.

    Args:
      params: a tree with compressed leaves among others.
      reference: the dense tree that `params` came from, or None for no error column.
      apply: the function that `lift` is given, to see what of it runs on stored forms and for what they become dense; or None.
      inputs: what it takes besides `params`; shapes and dtypes will do.

    Returns:
      One `Stored` for every path, in tree order.

    Raises:
      ValueError: `reference` has other paths.

    >>> from jaxopt_lab.compress.leaves.quantized import quantize
    >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
    >>> summary(quantize(params, where="kernel"), params)["kernel"]
    Stored(format='int8 per channel 1', shape=(4, 2), nbytes=16, dense_nbytes=32, rmse=0.0, ran=None)
    >>> summary(quantize(params, where="kernel"), apply=lambda p, x: x @ p["kernel"], inputs=(jnp.ones((1, 4)),))["kernel"].ran
    Ran(native=('dot_general',), materialised=())
    """
    names, leaves, _ = tree.flatten(params)
    dense: list[Any] = [None] * len(leaves)
    if reference is not None:
        others, dense, _ = tree.flatten(reference)
        if others != names:
            odd = sorted(set(others) ^ set(names))
            raise ValueError(f"reference has other paths than params; first of {len(odd)}: {', '.join(odd[:3])}")
    seen = {} if apply is None else ran(apply, params, *inputs)
    return {name: _stored(leaf, other, seen.get(name)) for name, leaf, other in zip(names, leaves, dense, strict=True)}


def _stored(leaf: Any, reference: Any, seen: Ran | None) -> Stored:
    dtype = jnp.result_type(leaf.aval().dtype if tree.is_compressed(leaf) else leaf)
    shape = tuple(leaf.shape) if tree.is_compressed(leaf) else np.shape(leaf)
    rmse = None
    if reference is not None:
        error = jnp.asarray(leaf.materialise() if tree.is_compressed(leaf) else leaf) - jnp.asarray(reference)
        rmse = float(jnp.sqrt(jnp.mean(jnp.square(error.astype(jnp.float32)))))
    words = leaf.format() if tree.is_compressed(leaf) else str(dtype)
    return Stored(words, shape, tree.nbytes(leaf), int(np.prod(shape)) * dtype.itemsize, rmse, seen)
