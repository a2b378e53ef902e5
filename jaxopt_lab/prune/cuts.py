"""When masks change, and how many units stay then."""

from collections.abc import Sequence
from numbers import Real
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
      exchange: the fraction that growth exchanges, a number or a schedule; None without growth.
      exchanges: that at each mask update, as `fractions` are kept.
    """

    sparsity: float | Schedule | None
    fractions: np.ndarray | None
    begin: int
    end: int
    every: int
    distribution: Distribution
    pattern: Pattern
    exchange: float | Schedule | None
    exchanges: np.ndarray | None

    @classmethod
    def of(
        cls,
        sparsity: float | Schedule | None,
        begin: int,
        end: int | None,
        every: int,
        distribution: Distribution,
        pattern: Pattern,
        growth: Growth | None = None,
    ) -> "Cuts":
        """Checks the options against each other, and evaluates the schedules at every mask update."""
        for name, value in (("begin", begin), ("end", begin if end is None else end), ("every", every)):
            if not isinstance(value, (int, np.integer)):
                raise TypeError(f"sparsify: {name} counts updates and must be an int; got {value!r}")
        if every < 1 or begin < 0 or (end is not None and end < begin):
            raise ValueError(f"sparsify: needs 0 <= begin <= end and every >= 1; got begin={begin}, end={end}, every={every}")
        if (callable(sparsity) or callable(distribution.below)) and end is None:
            raise ValueError("sparsify: a schedule of what is cut needs `end`, the last update at which masks change")
        if pattern.fixed is not None and distribution.below is not None:
            raise ValueError("sparsify: a fixed pattern and an absolute threshold both decide what is cut; choose one")
        decided = pattern.fixed is not None or distribution.below is not None
        if decided and sparsity is not None:
            raise ValueError(f"sparsify: this pattern or threshold sets its own sparsity; drop sparsity={sparsity}")
        if decided and growth is not None:
            raise ValueError("sparsify: growth needs a sparsity; a fixed pattern or an absolute threshold leaves no room for it")
        if not decided and sparsity is None:
            raise ValueError("sparsify: give a sparsity from 0 to 1, or a schedule of one")
        if end is None and (growth is not None or every != 1):
            given = f"every={every}" if growth is None else "growth"
            raise ValueError(f"sparsify: {given} needs `end`, the last update at which masks change: without it they change once")
        last = begin if end is None else end
        steps = [*range(begin, last, every), last]
        fractions = None if sparsity is None else _on_host("a sparsity is", sparsity, steps)
        exchange = None if growth is None else growth.fraction
        exchanges = None if growth is None else _on_host("growth exchanges", growth.fraction, steps)
        return cls(sparsity, fractions, begin, last, every, distribution, pattern, exchange, exchanges)

    def due(self, count: Array) -> Array:
        """Whether masks change at the update numbered `count`."""
        inside = (count >= self.begin) & (count <= self.end)
        return inside & (((count - self.begin) % self.every == 0) | (count == self.end))

    def masks(
        self, scores: Sequence[Array], old: Sequence[Array], count: Array, back: Sequence[Array] | None = None
    ) -> list[Array]:
        """The masks that the scores `[...]` of each leaf give at an update where masks change.

        `back` is the scores of each leaf for coming back; None without growth.
        """
        # A cut weight ranks below every live one: otherwise a live weight that happens to be zero could change places with it.
        if self.pattern.fixed is not None:
            return [self.pattern.fixed(jnp.where(mask, score, -jnp.inf)) for score, mask in zip(scores, old, strict=True)]
        alive = [self.pattern.units(mask.astype(score.dtype)) > 0 for score, mask in zip(scores, old, strict=True)]
        units = [jnp.where(live, self.pattern.units(score), -jnp.inf) for score, live in zip(scores, alive, strict=True)]
        below, joint = self.distribution.below, self.distribution.joint
        if below is None:
            keep = self.keep([score.shape for score in scores], count)
            kept = keep_largest(units, keep, joint=joint) if back is None else self._exchanged(units, alive, keep, back, count)
        else:
            tau = below(count) if callable(below) else below
            # NaN is not below anything: it stays, as it does where a count decides.
            kept = [~(unit < tau) for unit in units]
        return [self.pattern.expand(unit, score.shape) for unit, score in zip(kept, scores, strict=True)]

    def _exchanged(
        self, units: Sequence[Array], alive: Sequence[Array], keep: Array, back: Sequence[Array], count: Array
    ) -> list[Array]:
        """Keeps the best of the live units, and fills up with those of the others that rank highest for coming back."""
        joint = self.distribution.joint
        live = jnp.stack([jnp.sum(units_alive, dtype=jnp.uint32) for units_alive in alive])
        live = jnp.sum(live, dtype=jnp.uint32)[None] if joint else live
        staying = jnp.minimum(keep - _share(self.exchanged(count), keep), live)
        kept = keep_largest(units, staying, joint=joint)
        others = [jnp.where(mask, -jnp.inf, self.pattern.units(score)) for mask, score in zip(kept, back, strict=True)]
        returned = keep_largest(others, keep - staying, joint=joint)
        return [mask | new for mask, new in zip(kept, returned, strict=True)]

    def exchanged(self, count: Array) -> Array:
        """The fraction of live units that growth exchanges at an update, float32 `[]`."""
        if self.exchanges is None:
            return jnp.asarray(self.exchange(count) if callable(self.exchange) else self.exchange, jnp.float32)
        return jnp.asarray(self.exchanges, jnp.float32)[self._number(count)]

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
            units = jnp.asarray(sizes, jnp.uint32)
            return units - _share(shares, units)
        if len(self.fractions) * len(sizes) > _LONGEST_TABLE:
            raise ValueError(
                f"sparsify: {len(self.fractions)} mask updates of {len(sizes)} leaves are too many to plan; make `every` larger"
            )
        shares = np.array([allocate(shapes, fraction) for fraction in self.fractions.tolist()])
        table = sizes - np.rint(np.clip(shares, 0.0, 1.0) * sizes).astype(np.int64)
        return jnp.asarray(table.astype(np.uint32))[self._number(count)]

    def _number(self, count: Array) -> Array:
        """Which mask update it is, from 0."""
        # The last update may come early, off the grid of `every`: hence the rounding up.
        return (count - self.begin + self.every - 1) // self.every


def _share(fraction: Array, whole: Array) -> Array:
    """A fraction, clipped to 0 to 1, of numbers of units: uint32, never more than the whole."""
    part = jnp.round(jnp.clip(fraction, 0.0, 1.0) * whole.astype(jnp.float32)).astype(jnp.uint32)
    # Above 2**24 the whole may round up to a float32.
    return jnp.minimum(part, whole)


def _on_host(what: str, value: float | Schedule, steps: Sequence[int]) -> np.ndarray | None:
    """The fraction at each step, float64; None where it is traced. `what` begins the message about one that is none."""
    if not callable(value) and not isinstance(value, (Real, np.ndarray, jax.Array)):
        raise TypeError(f"sparsify: {what} a fraction from 0 to 1 or a schedule of one; got {value!r}")
    with jax.ensure_compile_time_eval():
        values = _evaluate(value, steps) if callable(value) else [value] * len(steps)
    if any(isinstance(value, Tracer) for value in values):
        return None
    fractions = np.array([_decimal(value) for value in values])
    for step, fraction in zip(steps, fractions, strict=True):
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"sparsify: {what} a fraction from 0 to 1; got {fraction} at update {step}")
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
