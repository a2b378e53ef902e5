"""What a function costs, by path: multiplications and parameters, from shapes alone."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxopt_lab.core import tree
from jaxopt_lab.core.tracing.walks import walk
from jaxopt_lab.core.types import PyTree

__all__ = ["Count", "Counts", "count"]


class Count(NamedTuple):
    """What one parameter costs in one call of the function.

    Attributes:
      macs: multiplications, each with its addition.
      parameters: numbers stored.
      activation_bytes: of what the products and lookups that it takes part in put out.
    """

    macs: int
    parameters: int
    activation_bytes: int


class Counts(NamedTuple):
    """What a function costs in one call.

    Attributes:
      paths: by path, in tree order; a parameter that meets no product costs no multiplication here.
      others: multiplications of products in which no parameter can be named, such as those of attention.
      macs: of all products together, each counted once even where two parameters meet in it.
      activation_bytes: of what all products and lookups put out, likewise.
    """

    paths: Mapping[str, Count]
    others: int
    macs: int
    activation_bytes: int

    @property
    def parameters(self) -> int:
        """Numbers stored in all."""
        return sum(count.parameters for count in self.paths.values())


def count(apply: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> Counts:
    r"""Multiplications of one call of `apply(params, *args, **kwargs)`, numbers stored and bytes put out, by path.

    A matrix product of `[m, k]` and `[k, n]` counts :math:`m k n`; a convolution the entries of its output times those of one
    filter, padding included; a lookup nothing. The body of a scan counts as often as it runs; that of a `while` loop once, and
    every branch of a `cond`, since shapes do not tell how often they run. Element-wise work is not counted, and its results, which
    compilers fuse with others, take no bytes here.

    Args:
      apply, args, kwargs: as in `walk`.
      params: arrays or `jax.ShapeDtypeStruct`.

    Raises:
      TypeError: `params` holds a compressed leaf.

    >>> import jax
    >>> params = {"kernel": jax.ShapeDtypeStruct((3, 2), "float32"), "bias": jax.ShapeDtypeStruct((1, 2), "float32")}
    >>> costs = count(lambda params, x: x @ params["kernel"] + params["bias"], params, jax.ShapeDtypeStruct((5, 3), "float32"))
    >>> costs.paths["kernel"], costs.paths["bias"], costs.macs
    (Count(macs=30, parameters=6, activation_bytes=40), Count(macs=0, parameters=2, activation_bytes=0), 30)
    """
    found = walk(apply, params, *args, **kwargs)
    macs, nbytes = Counter[str](), Counter[str]()
    for site in found.sites:
        macs[site.path] += site.macs * site.repeats
        # Of what several put out together, as a fused product does, each has its part.
        nbytes[site.path] += found.products[site.address].nbytes * site.size // max(math.prod(site.weight.shape), 1)
    named = {site.address for site in found.sites}
    names, leaves, _ = tree.flatten(params)
    sizes = {name: math.prod(getattr(leaf, "shape", ())) for name, leaf in zip(names, leaves, strict=True)}
    return Counts(
        {name: Count(macs[name], size, nbytes[name]) for name, size in sizes.items()},
        sum(cost.macs for address, cost in found.products.items() if address not in named),
        sum(cost.macs for cost in found.products.values()),
        sum(cost.nbytes for cost in found.products.values()),
    )
