"""What a slimmed model may cost: parameters, multiplications, or the time of a call as measured."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxopt_lab.core import tree
from jaxopt_lab.core.tracing import count
from jaxopt_lab.core.tracing.programs import arrays_of
from jaxopt_lab.core.types import PyTree

__all__ = ["Budget", "macs", "milliseconds", "parameters"]


class Budget(NamedTuple):
    """A limit of one cost; exactly one of `most` and `part` is given.

    Attributes:
      unit: what the cost counts, for messages.
      cost: `(apply, params, example) -> cost`.
      most: the highest cost.
      part: instead, of the cost of the whole model.
      measures: whether `cost` runs the model, on arrays; otherwise it takes shapes.
    """

    unit: str
    cost: Callable[[Callable[..., Any], PyTree, Sequence[Any]], float]
    most: float | None = None
    part: float | None = None
    measures: bool = False

    def limit(self, apply: Callable[..., Any], params: PyTree, example: Sequence[Any]) -> float:
        """The highest cost, in its unit."""
        return self.most if self.most is not None else self.part * self.cost(apply, params, example)  # pyright: ignore


def parameters(most: int | None = None, *, part: float | None = None) -> Budget:
    """At most so many numbers in the tree, running statistics among them.

    Args:
      most: how many.
      part: instead, which part of those of the whole model, in (0, 1].

    Raises:
      ValueError: not exactly one is given, or one is out of range.

    >>> parameters(part=0.25).limit(lambda p, x: x, {"w": jax.numpy.ones(8)}, [])
    2.0
    """
    return Budget("parameters", lambda apply, params, example: tree.size(arrays_of(params)[0]), *_checked("parameters", most, part))


def macs(most: float | None = None, *, part: float | None = None) -> Budget:
    """At most so many multiplications in a call on the example, as `tracing.count` counts.

    Args:
      most, part: as in `parameters`.

    Raises:
      ValueError: as `parameters`.

    >>> macs(100).cost(lambda p, x: x @ p["w"], {"w": jax.numpy.ones((3, 2))}, [jax.numpy.ones((5, 3))])
    30
    """

    def cost(apply: Callable[..., Any], params: PyTree, example: Sequence[Any]) -> int:
        return count(apply, params, *example).macs

    return Budget("multiplications", cost, *_checked("macs", most, part))


def milliseconds(most: float | None = None, *, part: float | None = None, repeats: int = 20) -> Budget:
    """At most so much time of a compiled call on the example, measured here and now: the median over calls, after two to warm up.

    A measurement compiles the model, and slimming takes seven. Times vary: what has to be met everywhere needs a reserve.

    Args:
      most: in milliseconds.
      part: instead, of the time of the whole model.
      repeats: calls timed.

    Raises:
      ValueError: as `parameters`.

    >>> milliseconds(1e6).cost(lambda p, x: x @ p["w"], {"w": jax.numpy.ones((3, 2))}, [jax.numpy.ones((5, 3))]) < 1e6
    True
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")

    def cost(apply: Callable[..., Any], params: PyTree, example: Sequence[Any]) -> float:
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((params, example))):
            raise ValueError("milliseconds runs the model: give params and the example as arrays, and not as shapes")
        arrays, rebuilt = arrays_of((params, tuple(example)))

        @jax.jit
        def compiled(arrays: Sequence[Any]) -> Any:
            params, example = rebuilt(arrays)
            return apply(params, *example)

        times = []
        for k in range(repeats + 2):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(arrays))
            if k > 1:
                times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)

    return Budget("milliseconds", cost, *_checked("milliseconds", most, part), measures=True)


def _checked(name: str, most: float | None, part: float | None) -> tuple[float | None, float | None]:
    if (most is None) == (part is None):
        raise ValueError(f"{name}: give the most, or a part of the whole: exactly one of the two")
    if most is not None and not most > 0:
        raise ValueError(f"{name}: the most must be above 0; got {most}")
    if part is not None and not 0 < part <= 1:
        raise ValueError(f"{name}: a part must lie in (0, 1]; got {part}")
    return most, part
