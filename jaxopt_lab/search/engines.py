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
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxopt_lab.core.types import PyTree
from jaxopt_lab.search.grouping import Member, strong

__all__ = ["SETTINGS", "Engine", "arrays", "looped", "replicated", "scanned", "single", "vmapped"]

_AXIS = "members"
SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
)
"""What JAX computes depends on these settings of its: a program is of the ones that it was compiled under."""
# As NumPy has them: objects, strings, dates.
_NO_NUMBERS = "OSUMm"


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
      init: `(key, indices, traced, shared) -> states`: member i from `fold_in(key, i)`.
      step: `(states, sums, batch, traced, shared) -> (states, sums)`; sums are of the metrics.
      advance: `(states, sums, block, count, traced, shared) -> (states, sums)`: steps over the first `count` batches of a block
        `[k, ...]`, by one compiled loop.
      evaluate: `(states, traced, shared) -> [c]`.
      place: where arrays with the axis lie.
    """

    init: "Measured"
    step: "Measured"
    advance: "Measured"
    evaluate: "Measured"
    place: Sharding


@lru_cache(maxsize=64)
def programs(member: Member, engine: Engine, devices: tuple[jax.Device, ...]) -> Programs:  # pyright: ignore[reportInvalidTypeForm]
    """The compiled functions of a member on these devices."""
    over = single if engine.width == 1 else jax.vmap

    def one_step(state, sums, batch, traced, shared):
        state, metrics = member.step(state, batch, traced, shared)
        return state, {name: sums[name] + metrics[name] for name in metrics}

    # The loop is inside of what is mapped: with single members the other way round costs a fifth of the time on a CPU.
    def one_advance(state, sums, block, count, traced, shared):
        def body(k, carry):
            batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), block)
            return one_step(*carry, batch, traced, shared)

        return jax.lax.fori_loop(0, count, body, (state, sums))

    step, advance = over(one_step, (0, 0, None, 0, None)), over(one_advance, (0, 0, None, None, 0, None))
    evaluate = over(member.evaluate, (0, 0, None))

    def init(key, indices, traced, shared):
        def begin(given):
            index, traced = given
            return member.init(jax.random.fold_in(key, index), traced, shared)

        # What draws random numbers takes a CPU long to compile, and twice as long over an axis, but runs only once.
        return jax.lax.map(begin, (indices, traced)) if devices[0].platform == "cpu" else jax.vmap(begin)((indices, traced))

    def spread(function, *axes):
        if len(devices) == 1:
            return function
        specs = tuple(PartitionSpec() if axis is None else PartitionSpec(_AXIS) for axis in axes)
        # Each device goes its own way: nothing is exchanged, and nothing need be checked to be equal.
        return jax.shard_map(function, mesh=_mesh(devices), in_specs=specs, out_specs=PartitionSpec(_AXIS), check_vma=False)

    return Programs(
        Measured(jax.jit(spread(init, None, 0, 0, None))),
        Measured(jax.jit(spread(step, 0, 0, None, 0, None), donate_argnums=(0, 1))),
        Measured(jax.jit(spread(advance, 0, 0, None, None, 0, None), donate_argnums=(0, 1))),
        Measured(jax.jit(spread(evaluate, 0, 0, None))),
        SingleDeviceSharding(devices[0]) if len(devices) == 1 else NamedSharding(_mesh(devices), PartitionSpec(_AXIS)),
    )


def arrays(tree: PyTree) -> PyTree:
    """The arrays of what all members share, of strong types, where they are.

    Raises:
      TypeError: a leaf is no array; the message names its path.

    >>> arrays({"x": 0.5})
    {'x': array(0.5)}
    """

    def array(path, leaf):
        if not isinstance(leaf, (int, float, complex, np.ndarray, np.generic, jax.Array)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(f"shared holds arrays, which are passed to the programs; {name} is a {type(leaf).__name__}")
        if isinstance(leaf, jax.Array):
            return strong(leaf)
        if (found := np.asarray(leaf)).dtype.kind in _NO_NUMBERS:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(f"shared holds arrays of numbers, which are passed to the programs; {name} is of {found.dtype}")
        return found

    return jax.tree_util.tree_map_with_path(array, tree)


def replicated(tree: PyTree, devices: tuple[jax.Device, ...]) -> PyTree:  # pyright: ignore[reportInvalidTypeForm]
    """Arrays of strong types, as of `arrays`, whole on each of the devices.

    >>> replicated({"x": np.ones(2)}, (jax.devices("cpu")[0],))
    {'x': Array([1., 1.], dtype=float32)}
    """
    return jax.device_put(arrays(tree), devices[0] if len(devices) == 1 else NamedSharding(_mesh(devices), PartitionSpec()))


def _mesh(devices: tuple[jax.Device, ...]) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    return Mesh(np.array(devices), (_AXIS,))


class Measured:
    """A jitted function that is compiled ahead of its calls, so that what it takes is known before it runs."""

    def __init__(self, function: Callable):
        self._function = function
        self._compiled: dict[Any, Any] = {}

    def working_bytes(self, *args: Any) -> int:
        """How many bytes a call takes on each device besides its arguments: what it needs in between, and results of its own."""
        analysis = self.compiled(*args).memory_analysis()
        return analysis.temp_size_in_bytes + max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)(*args)

    def compiled(self, *args: Any) -> Callable[..., Any]:
        """The function for arguments of these shapes and types, which may be given as such."""
        leaves, treedef = jax.tree.flatten(args)
        settings = (getattr(jax.config, name) for name in SETTINGS)
        key = (*settings, treedef, *((x.shape, x.dtype) if hasattr(x, "dtype") else type(x) for x in leaves))
        if key not in self._compiled:
            self._compiled[key] = self._function.lower(*args).compile()
        return self._compiled[key]


def single(function: Callable, in_axes: tuple[int | None, ...]) -> Callable:
    """As `vmap` over an axis of one, but the program is that of a single member.

    >>> single(lambda x, y: x + y, (0, None))(np.ones(1), 2.0).tolist()
    [3.0]
    """

    def call(*args):
        given = (jax.tree.map(lambda x: x[0], arg) if axis == 0 else arg for arg, axis in zip(args, in_axes, strict=True))
        return jax.tree.map(lambda x: x[None], function(*given))

    return call
