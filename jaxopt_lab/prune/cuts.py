"""When masks change, and how many units stay then."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxopt_lab.core.types import Array, Schedule
from jaxopt_lab.prune.distributions import Distribution
from jaxopt_lab.prune.growth import Growth
from jaxopt_lab.prune.patterns import Pattern, unit_count
from jaxopt_lab.prune.selection import keep_largest

__all__ = ["Cuts"]

_LONGEST_TABLE = 10_000_000
_MANY_STEPS = 256


class Cuts(NamedTuple):
    """What is cut and when, checked as it is built.

    Attributes:
      sparsity: a number or a schedule, or None where pattern or distribution decide.
      fractions: the sparsity at each mask update, float64 `[updates]` on the host; None where it is traced or there is none.
      begin, end, every: the updates at which masks change.
      distribution, pattern: how the cut is shared, and which weights go together.
    """

    sparsity: float | Schedule | None
    fractions: np.ndarray | None
    begin: int
    end: int
    every: int
    distribution: Distribution
    pattern: Pattern

    @classmethod
    def of(
        cls,
        sparsity: float | Schedule | None,
        begin: int,
        end: int | None,
        every: int,
        distribution: Distribution,
        pattern: Pattern,
    ) -> "Cuts":
        """Checks the options against each other, and evaluates the sparsity at every mask update."""
        for name, value in (("begin", begin), ("end", begin if end is None else end), ("every", every)):
            if not isinstance(value, (int, np.integer)):
                raise TypeError(f"sparsify: {name} counts updates and must be an int; got {value!r}")
        if isinstance(sparsity, str):
            raise TypeError(f"sparsify: sparsity must be a number or a schedule; got {sparsity!r}")
        if every < 1 or begin < 0 or (end is not None and end < begin):
            raise ValueError(f"sparsify: needs 0 <= begin <= end and every >= 1; got begin={begin}, end={end}, every={every}")
        if (callable(sparsity) or callable(distribution.below)) and end is None:
            raise ValueError("sparsify: a schedule of what is cut needs `end`, the last update at which masks change")
        if pattern.fixed is not None and distribution.below is not None:
            raise ValueError("sparsify: a fixed pattern and an absolute threshold both decide what is cut; choose one")
        decided = pattern.fixed is not None or distribution.below is not None
        if decided and sparsity is not None:
            raise ValueError(f"sparsify: this pattern or threshold sets its own sparsity; drop sparsity={sparsity}")
        if not decided and sparsity is None:
            raise ValueError("sparsify: give a sparsity from 0 to 1, or a schedule of one")
        last = begin if end is None else end
        fractions = None if sparsity is None else _on_host(sparsity, [*range(begin, last, every), last])
        return cls(sparsity, fractions, begin, last, every, distribution, pattern)

    def check_growth(self, growth: Growth) -> None:
        """Refuses growth where no count decides, and a fraction that is none."""
        if self.sparsity is None:
            raise ValueError("sparsify: growth needs a sparsity; a fixed pattern or an absolute threshold leaves no room for it")
        if not callable(growth.fraction) and not isinstance(growth.fraction, Tracer) and not 0 <= growth.fraction <= 1:
            raise ValueError(f"sparsify: growth exchanges a fraction from 0 to 1; got {growth.fraction}")

    def due(self, count: Array) -> Array:
        """Whether masks change at the update numbered `count`."""
        inside = (count >= self.begin) & (count <= self.end)
        return inside & (((count - self.begin) % self.every == 0) | (count == self.end))

    def masks(
        self, scores: Sequence[Array], old: Sequence[Array], count: Array, growth: tuple[Sequence[Array], Array] | None = None
    ) -> list[Array]:
        """The masks that the scores `[...]` of each leaf give at an update where masks change.

        `growth` is the scores of each leaf for coming back, and the fraction of live units to exchange.
        """
        # A cut weight ranks below every live one: otherwise a live weight that happens to be zero could change places with it.
        if self.pattern.fixed is not None:
            return [self.pattern.fixed(jnp.where(mask, score, -jnp.inf)) for score, mask in zip(scores, old, strict=True)]
        alive = [self.pattern.units(mask.astype(score.dtype)) > 0 for score, mask in zip(scores, old, strict=True)]
        units = [jnp.where(live, self.pattern.units(score), -jnp.inf) for score, live in zip(scores, alive, strict=True)]
        below, joint = self.distribution.below, self.distribution.joint
        if below is None:
            keep = self.keep([score.shape for score in scores], count)
            kept = keep_largest(units, keep, joint=joint) if growth is None else self._exchanged(units, alive, keep, *growth)
        else:
            tau = below(count) if callable(below) else below
            kept = [unit >= tau for unit in units]
        return [self.pattern.expand(unit, score.shape) for unit, score in zip(kept, scores, strict=True)]

    def _exchanged(
        self, units: Sequence[Array], alive: Sequence[Array], keep: Array, growth: Sequence[Array], fraction: Array
    ) -> list[Array]:
        """Keeps the best of the live units, and fills up with those of the others that rank highest for coming back."""
        joint = self.distribution.joint
        live = jnp.stack([jnp.sum(units_alive, dtype=jnp.uint32) for units_alive in alive])
        live = jnp.sum(live, dtype=jnp.uint32)[None] if joint else live
        staying = jnp.minimum(keep - jnp.round(fraction * keep).astype(jnp.uint32), live)
        kept = keep_largest(units, staying, joint=joint)
        others = [jnp.where(mask, -jnp.inf, self.pattern.units(score)) for mask, score in zip(kept, growth, strict=True)]
        back = keep_largest(others, keep - staying, joint=joint)
        return [mask | new for mask, new in zip(kept, back, strict=True)]

    def keep(self, shapes: Sequence[tuple[int, ...]], count: Array) -> Array:
        """How many units stay at an update: `[1]` over all leaves where they compete, else `[leaves]`."""
        units = np.array([unit_count(self.pattern, shape) for shape in shapes], dtype=np.int64)
        sizes = units.sum(keepdims=True) if self.distribution.joint else units
        allocate = self.distribution.allocate or (lambda shapes, sparsity: (sparsity,))
        if self.fractions is None:
            fraction = self.sparsity(count) if callable(self.sparsity) else self.sparsity
            try:
                shares = jnp.stack(allocate(shapes, jnp.asarray(fraction, jnp.float32)))
            except jax.errors.ConcretizationTypeError as error:
                raise ValueError("sparsify: this distribution is solved on the host and takes no traced sparsity") from error
            return jnp.asarray(sizes, jnp.uint32) - jnp.round(shares * sizes.astype(np.float32)).astype(jnp.uint32)
        if len(self.fractions) * len(sizes) > _LONGEST_TABLE:
            raise ValueError(
                f"sparsify: {len(self.fractions)} mask updates of {len(sizes)} leaves are too many to plan; make `every` larger"
            )
        shares = np.array([allocate(shapes, fraction) for fraction in self.fractions.tolist()])
        table = sizes - np.rint(shares * sizes).astype(np.int64)
        # The last update may come early, off the grid of `every`: hence the rounding up.
        return jnp.asarray(table.astype(np.uint32))[(count - self.begin + self.every - 1) // self.every]


def _on_host(sparsity: float | Schedule, steps: Sequence[int]) -> np.ndarray | None:
    with jax.ensure_compile_time_eval():
        values = _evaluate(sparsity, steps) if callable(sparsity) else [sparsity] * len(steps)
    if any(isinstance(value, Tracer) for value in values):
        return None
    fractions = np.array([_decimal(value) for value in values])
    for step, fraction in zip(steps, fractions, strict=True):
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"sparsify: a sparsity is a fraction from 0 to 1; got {fraction} at update {step}")
    return fractions


def _evaluate(schedule: Schedule, steps: Sequence[int]) -> Sequence[Any]:
    """The schedule at each step: in one vectorised call where there are many steps and it takes an array of them."""
    if len(steps) > _MANY_STEPS:
        try:
            values = np.asarray(schedule(np.asarray(steps)))
            if values.shape == (len(steps),) and values[-1] == schedule(steps[-1]) and values[0] == schedule(steps[0]):
                return list(values)
        except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
            pass
    return [schedule(step) for step in steps]


def _decimal(value: Any) -> float:
    """A float32 is read as its shortest decimal: a schedule computed in float32 that says 0.9 means 0.9."""
    array = np.asarray(value)
    return float(str(array[()])) if array.dtype.itemsize < 8 and np.issubdtype(array.dtype, np.floating) else float(array)
