"""Batches as a pure function of the seed and the step: the state of a stream is one integer."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import numpy as np

from jaxopt_lab.data.checks import check_lengths, validate

__all__ = ["Batches", "Plan", "batches"]


class Plan(Protocol):
    """A batch size that changes with the step, as `schedules` makes them."""

    def __call__(self, step: int) -> int:
        """How many examples the batch of `step` holds."""
        ...

    def offset(self, step: int) -> int:
        """How many examples the batches before `step` hold together."""
        ...

    def run(self, step: int) -> int | None:
        """How many steps from `step` on have this size; None: all of them."""
        ...


@dataclass(frozen=True, eq=False)
class Batches:
    """A stream of batches: `batches(step)` is a dict of arrays `[B, ...]`, and so is `batches.stack(step, k)` with `[k, B, ...]`.

    Nothing is remembered from call to call, so a run that is resumed at any step sees the very batches that an unbroken one would
    see. The examples are drawn without replacement: the stream is one shuffled pass over the data after another, cut into batches
    across their borders, so each pass holds every example exactly once and no remainder is dropped. (A batch across a border can
    hold an example twice, once from either pass.) It has no end, and so it cannot be iterated over: `for step in range(steps)`.
    """

    arrays: dict[str, np.ndarray]
    """`[N, ...]` by key."""
    batch_size: int | Plan | None
    """Examples a step; a plan if it changes; None for the whole data in order: plain gradient descent."""
    seed: int
    """The key of the shuffling."""
    _pass: Callable[[int], np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # The last two passes are kept for speed alone: each is a function of the seed and its number.
        object.__setattr__(self, "_pass", functools.lru_cache(maxsize=2)(functools.partial(_shuffled, self.seed, self.examples)))

    def __reduce__(self) -> tuple[Any, ...]:
        # To other processes it goes without the passes that are kept.
        return type(self), (self.arrays, self.batch_size, self.seed)

    @property
    def examples(self) -> int:
        """The number of examples in the data."""
        return len(next(iter(self.arrays.values())))

    @property
    def steps_per_epoch(self) -> int:
        """Steps, from the first, until every example has been seen."""
        if self.batch_size is None:
            return 1
        if isinstance(self.batch_size, int):
            return -(-self.examples // self.batch_size)
        high = 1
        while self.batch_size.offset(high) < self.examples:
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.batch_size.offset(middle) >= self.examples else (middle, high)
        return high

    def size(self, step: int) -> int:
        """How many examples the batch of `step` holds.

        Raises:
          ValueError: more than there are in the data.
        """
        if self.batch_size is None:
            return self.examples
        if isinstance(self.batch_size, int):
            return self.batch_size
        size = int(self.batch_size(step))
        if not 1 <= size <= self.examples:
            raise ValueError(f"the plan asks for a batch of {size} at step {step}, and the data has {self.examples} examples")
        return size

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of one step: arrays `[B, ...]`."""
        _check_step(step)
        if self.batch_size is None:
            return dict(self.arrays)
        indices = self._indices(self._offset(step), self.size(step))
        return {key: array.take(indices, axis=0) for key, array in self.arrays.items()}

    def rows(self, step: int, which: np.ndarray) -> dict[str, np.ndarray]:
        """Some rows of the batch of one step, without gathering the others: `batches(step)` at `which`, arrays `[R, ...]`.

        Raises:
          ValueError: a row is not in `[0, size(step))`.
        """
        _check_step(step)
        which, size = np.asarray(which), self.size(step)
        if which.size and not 0 <= which.min() <= which.max() < size:
            raise ValueError(f"rows {which.min()} to {which.max()} were asked for, and the batch of step {step} has {size}")
        indices = which if self.batch_size is None else self._indices(self._offset(step), size)[which]
        return {key: array.take(indices, axis=0) for key, array in self.arrays.items()}

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "a stream of batches has no end; ask for the batch of a step: "
            "for step in range(batches.steps_per_epoch): batch = batches(step)"
        )

    def stack(self, step: int, count: int) -> dict[str, np.ndarray]:
        """The batches of the steps `step, step + 1, ...` as arrays `[k, B, ...]`, for a compiled loop over them.

        Args:
          step: the first step.
          count: the most steps; `k` is less where the batch size changes before.

        Raises:
          ValueError: `count` is below 1.
        """
        _check_step(step)
        if count < 1:
            raise ValueError(f"count={count} steps; a stack needs at least 1")
        if self.batch_size is None:
            return {key: np.broadcast_to(array, (count, *array.shape)) for key, array in self.arrays.items()}
        if not isinstance(self.batch_size, int) and (lasts := self.batch_size.run(step)) is not None:
            count = min(count, lasts)
        size = self.size(step)
        indices = self._indices(self._offset(step), count * size)
        return {key: array.take(indices, axis=0).reshape(count, size, *array.shape[1:]) for key, array in self.arrays.items()}

    def _offset(self, step: int) -> int:
        if self.batch_size is None:
            return step * self.examples
        return step * self.batch_size if isinstance(self.batch_size, int) else int(self.batch_size.offset(step))

    def _indices(self, start: int, count: int) -> np.ndarray:
        """Examples `start ... start + count` of the stream."""
        first, begin = divmod(start, self.examples)
        if begin + count <= self.examples:
            return self._pass(first)[begin : begin + count]
        last = (start + count - 1) // self.examples
        joined = np.concatenate([self._pass(number) for number in range(first, last + 1)])
        return joined[begin : begin + count]


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step={step}; steps count from 0")


def _shuffled(seed: int, examples: int, number: int) -> np.ndarray:
    """The order of pass `number`: ranks of the raw words of a counter-based generator, which no version of numpy may change."""
    words = np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(examples)
    return np.argsort(words, kind="stable")


def batches(arrays: Mapping[str, Any], batch_size: int | Plan | None, *, seed: int) -> Batches:
    """A stream of shuffled batches as a pure function of the seed and the step.

    Args:
      arrays: numpy or JAX arrays by key, `[N, ...]` each; checked as by `validate`.
      batch_size: examples a step; or a plan from `schedules`; or None for the whole data at every step, in order.
      seed: of the shuffling, in `[0, 2**64)`.

    Raises:
      ValueError: a batch, or the largest of a plan that lists its `sizes`, is larger than the data or below 1; the seed is out of
        range; or as in `validate`.

    >>> stream = batches({"x": np.arange(6)}, 4, seed=0)
    >>> sorted(np.concatenate([stream(step)["x"] for step in range(3)]).tolist())
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    >>> stream.stack(7, 2)["x"].tolist() == [stream(7)["x"].tolist(), stream(8)["x"].tolist()]
    True
    """
    checked = validate(arrays)
    examples = check_lengths(checked)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} is out of range; give one in [0, 2**64)")
    if isinstance(batch_size, (int, np.integer)):
        batch_size = int(batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; a batch needs at least 1 example, and None takes them all")
        if batch_size > examples:
            raise ValueError(
                f"batch_size={batch_size} is larger than the data, which has {examples} examples; take fewer, or None for all"
            )
    # A plan may be any function of the step; one that lists its sizes is judged now and not in the middle of a run.
    elif (largest := max(getattr(batch_size, "sizes", ()), default=0)) > examples:
        raise ValueError(f"the plan asks for batches of up to {largest}, and the data has {examples} examples; cap the plan there")
    return Batches(checked, batch_size, int(seed))
