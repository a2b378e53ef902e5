"""How the members of a population are run: how many at once, and whether the loop over steps is compiled.

    looped()     one at a time, a Python loop over one compiled step
    scanned()    one at a time, the loop compiled
    vmapped(w)   w at a time, the loop compiled or not

Over several devices each runs that many. All give the same numbers to rounding. Which is the fastest depends on the shapes: a
compiled loop saves what a Python loop pays for its dispatch, vmap makes small products larger, and XLA on a CPU runs convolutions
slower inside of a compiled loop than outside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab.core.types import Array, PyTree
from jaxopt_lab.search.grouping import Member

__all__ = ["Engine", "looped", "scanned", "single", "vmapped"]

_AXIS = "members"


@dataclass(frozen=True)
class Engine:
    """How members are run; of `looped`, `scanned` or `vmapped`.

    Attributes:
      width: how many at a time on each device; None for as many as memory allows.
      compiled: whether the loop over steps is compiled.
    """

    width: int | None = 1
    compiled: bool = True

    def __post_init__(self):
        if self.width is not None and self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}")

    def __str__(self) -> str:
        if self.width == 1:
            return "scanned" if self.compiled else "looped"
        return f"vmapped({self.width}{'' if self.compiled else ', compiled=False'})"


def looped() -> Engine:
    """One member at a time, by a Python loop over one compiled step.

    >>> print(looped())
    looped
    """
    return Engine(1, False)


def scanned() -> Engine:
    """One member at a time, by a compiled loop over steps.

    >>> print(scanned())
    scanned
    """
    return Engine(1, True)


def vmapped(width: int | None = None, *, compiled: bool = True) -> Engine:
    """Many members at a time, by `jax.vmap`.

    Args:
      width: how many on each device; None for as many as memory allows.
      compiled: whether the loop over steps is compiled as well.

    >>> print(vmapped(8))
    vmapped(8)
    """
    return Engine(width, compiled)


class Programs(NamedTuple):
    """The compiled functions of a member, each over an axis `[c]` of members, c = devices x width.

    Attributes:
      init: `(key, indices, traced) -> states`: member i from `fold_in(key, i)`.
      step: `(states, sums, batch, traced) -> (states, sums)`; sums are of the metrics.
      advance: `(states, sums, block, count, traced) -> (states, sums)`: steps over the first `count` batches of a block
        `[k, ...]`, by one compiled loop.
      evaluate: `(states, traced) -> [c]`.
      place: where arrays with the axis lie.
    """

    init: Callable[..., PyTree]
    step: Callable[..., tuple[PyTree, dict[str, Array]]]
    advance: "Measured"
    evaluate: Callable[..., Array]
    place: Any


@lru_cache(maxsize=64)
def programs(member: Member, engine: Engine, devices: tuple[jax.Device, ...]) -> Programs:  # pyright: ignore[reportInvalidTypeForm]
    """The compiled functions of a member on these devices."""
    over = single if engine.width == 1 else jax.vmap
    stepped = over(member.step, (0, None, 0))

    def one_step(states, sums, batch, traced):
        states, metrics = stepped(states, batch, traced)
        return states, {name: sums[name] + metrics[name] for name in metrics}

    def advance(states, sums, block, count, traced):
        def body(k, carry):
            batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), block)
            return one_step(*carry, batch, traced)

        return jax.lax.fori_loop(0, count, body, (states, sums))

    evaluate = over(member.evaluate, (0, 0))

    def begin(key, given):
        index, traced = given
        return member.init(jax.random.fold_in(key, index), traced)

    def init(key, indices, traced):
        # What draws random numbers takes a CPU long to compile, and twice as long over an axis, but runs only once.
        if devices[0].platform == "cpu":
            return jax.lax.map(lambda given: begin(key, given), (indices, traced))
        return jax.vmap(lambda *given: begin(key, given))(indices, traced)

    step, place = one_step, devices[0]
    if len(devices) > 1:
        mesh = Mesh(np.array(devices), (_AXIS,))
        own, shared = PartitionSpec(_AXIS), PartitionSpec()
        place = NamedSharding(mesh, own)

        def spread(function, *specs):
            # Each device goes its own way: nothing is exchanged, and nothing need be checked to be equal.
            return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)

        init, evaluate = spread(init, shared, own, own), spread(evaluate, own, own)
        step, advance = spread(one_step, own, own, shared, own), spread(advance, own, own, shared, shared, own)
    donating = {"donate_argnums": (0, 1)}
    return Programs(jax.jit(init), jax.jit(step, **donating), Measured(jax.jit(advance, **donating)), jax.jit(evaluate), place)


class Measured:
    """A jitted function that is compiled ahead of its calls, so that what it takes is known before it runs."""

    def __init__(self, function: Callable):
        self._function = function
        self._compiled: dict[Any, Any] = {}

    def nbytes(self, *args: Any) -> int:
        """How many bytes a call takes on each device: arguments, results and what it needs in between."""
        analysis = self._of(args).memory_analysis()
        taken = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return taken + analysis.temp_size_in_bytes

    def __call__(self, *args: Any) -> Any:
        return self._of(args)(*args)

    def _of(self, args: tuple) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        key = (treedef, *((jnp.shape(x), jnp.result_type(x)) for x in leaves))
        if key not in self._compiled:
            self._compiled[key] = self._function.lower(*args).compile()
        return self._compiled[key]


def single(function: Callable, in_axes: tuple[int | None, ...]) -> Callable:
    """As `vmap` over an axis of one, but the program is that of a single member.

    >>> single(lambda x, y: x + y, (0, None))(jnp.ones(1), 2.0).tolist()
    [3.0]
    """

    def call(*args):
        given = (jax.tree.map(lambda x: x[0], arg) if axis == 0 else arg for arg, axis in zip(args, in_axes, strict=True))
        return jax.tree.map(lambda x: x[None], function(*given))

    return call
