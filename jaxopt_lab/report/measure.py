"""One stage of a model, measured: accuracy on held-out data, what it stores, how long a call takes. Nothing is inferred."""

import math
import os
import stat
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core import tree
from jaxopt_lab.core.types import PyTree
from jaxopt_lab.nets.model import Model, predictor
from jaxopt_lab.train import State, evaluate
from jaxopt_lab.train import variables as variables_of

__all__ = ["Stage", "accuracy_interval", "directory_bytes", "in_turns", "latency", "measure"]


class Stage(NamedTuple):
    """One row of a report: a model at one stage of its compression. Built by `measure`."""

    name: str
    accuracy: float
    """The share of held-out examples that it gets right, in `[0, 1]`."""
    interval: tuple[float, float]
    """The 95 % confidence interval of the accuracy."""
    examples: int
    """How many held-out examples there were."""
    parameters: int
    """Numbers stored in `params`; a compressed leaf's codes, scales and codebooks included."""
    nonzeros: int
    """Weights that are not zero; a compressed leaf counts those of the array that it stands for."""
    array_bytes: int
    """Bytes of the arrays of all variables as stored, uncompressed."""
    directory_bytes: int | None
    """Bytes of the checkpoint's directory as written; None if it was not saved."""
    latency_ms: dict[int, float]
    """Milliseconds a call by batch size: the median after warm-up."""
    seconds: float | None = None
    """Seconds of training that led from the stage before to this one."""
    extra: Mapping[str, float] = MappingProxyType({})
    """Further columns by title."""


def accuracy_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""The Wilson score interval of a share of successes; never outside `[0, 1]`, and of positive width at 0 and 1 too.

    .. math::
       \frac{1}{1 + z^2 / n} \left( \hat p + \frac{z^2}{2 n} \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4 n^2}} \right)

    with :math:`\hat p` the share and :math:`z` the quantile of the normal distribution (1.96 for 95 %).

    Args:
      correct: successes, between 0 and `total`.
      total: :math:`n`, trials; at least 1.
      confidence: in `(0, 1)`.

    Raises:
      ValueError: the numbers are out of range.

    >>> low, high = accuracy_interval(90, 100)
    >>> round(low, 4), round(high, 4)
    (0.8256, 0.9448)

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} correct of {total}: give 0 <= correct <= total, and at least one trial")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, such as 0.95")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share, z2 = correct / total, z * z / total
    centre = (share + z2 / 2) / (1 + z2)
    half = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total)) / (1 + z2)
    # At the ends the formula gives exactly 0 and 1, and rounding may not.
    return (0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half)


def latency(fn: Callable[..., Any], *args: Any, repeats: int = 50) -> float:
    """Seconds of one call of `fn(*args)`: the median over `repeats` calls, each waited for, after three that compile and warm up.

    Args:
      fn: as a rule jitted.
      args: best on the device already, so that no transfer is timed.
      repeats: calls that are timed, at least 1.

    Raises:
      ValueError: `repeats` is below 1.

    >>> 0 < latency(jax.jit(lambda x: x + 1), jnp.zeros(3)) < 1
    True
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; a median needs at least 1 call")
    for _ in range(3):
        jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def directory_bytes(path: str | Path) -> int:
    """Bytes of all files below a directory as written; links are not followed, and count nothing.

    Raises:
      FileNotFoundError: there is no such directory.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "weights").write_bytes(b"12345")
    >>> directory_bytes(folder)
    5
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path} to measure; save the stage there first")
    files = (os.lstat(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)
    return sum(found.st_size for found in files if stat.S_ISREG(found.st_mode))


def measure(
    name: str,
    model: Model | Callable[..., Any],
    state: State | PyTree,
    arrays: Mapping[str, Any],
    *,
    directory: str | Path | None = None,
    seconds: float | None = None,
    extra: Mapping[str, float] | None = None,
    batch_sizes: tuple[int, ...] = (1, 64),
    repeats: int = 50,
) -> Stage:
    """Measures one stage of a model.

    An example whose logits are not finite counts as wrong.

    Args:
      name: what the report calls the stage.
      model: a `Model`, or `predict(variables, x) -> logits [B, K]`; compiled here, and lifted over compressed leaves.
      state: a training state, the variables `{"params": ..., <state collections>}`, or the parameters alone.
      arrays: held-out data: `{"x": [N, ...], "y": [N] integers}`.
      directory: where this stage was saved.
      seconds: how long its training took.
      extra: further columns by title.
      batch_sizes: those at which a call is timed; the data is repeated where it has fewer examples.
      repeats: calls timed at each.

    Raises:
      TypeError: as `train.evaluate`.
      ValueError: `arrays` lacks "x" or "y".

    >>> predict = lambda variables, x: x @ variables["params"]["w"]
    >>> arrays = {"x": np.eye(2, dtype=np.float32), "y": np.array([0, 0])}
    >>> stage = measure("dense", predict, {"params": {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}}, arrays, repeats=1)
    >>> stage.accuracy, stage.parameters, stage.nonzeros, stage.array_bytes
    (0.5, 4, 2, 16)
    """
    if missing := [f'"{key}"' for key in ("x", "y") if key not in arrays]:
        raise ValueError(f'arrays must hold the labels "y" of the inputs "x"; they lack {" and ".join(missing)}')
    predict, variables = predictor(model), variables_of(state) if isinstance(state, State) else state
    examples = len(arrays["y"])
    found = evaluate(predict, variables, {"x": arrays["x"], "y": arrays["y"]})
    correct = round(found["accuracy"] * examples)
    params = variables["params"] if isinstance(variables, Mapping) and "params" in variables else variables
    return Stage(
        name=name,
        accuracy=correct / examples,
        interval=accuracy_interval(correct, examples),
        examples=examples,
        parameters=tree.size(params),
        nonzeros=sum(map(_nonzeros, tree.flatten(params)[1])),
        array_bytes=tree.nbytes(variables),
        directory_bytes=None if directory is None else directory_bytes(directory),
        latency_ms=_latencies(predict, variables, arrays["x"], batch_sizes, repeats),
        seconds=seconds,
        extra=dict(extra or {}),
    )


def _nonzeros(leaf: Any) -> int:
    return int(jnp.count_nonzero(leaf.materialise() if tree.is_compressed(leaf) else leaf))


def _latencies(predict, variables: PyTree, x: Any, batch_sizes: tuple[int, ...], repeats: int) -> dict[int, float]:
    if tree.any_compressed(variables):
        from jaxopt_lab import compress

        predict = compress.lift(predict)
    compiled, on_device = jax.jit(predict), jax.device_put(variables)
    inputs = {size: jnp.asarray(np.asarray(x[: min(size, len(x))])[np.arange(size) % len(x)]) for size in batch_sizes}
    return {size: 1e3 * latency(compiled, on_device, batch, repeats=repeats) for size, batch in inputs.items()}


def in_turns(calls: Mapping[str, Callable[[Any], Any]], x: Any, size: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call on a batch, after a warm-up; they take turns, so that what else runs here slows all alike.

    Args:
      calls: compiled functions of a batch, by name.
      x: examples, of which the first `size` are the batch, over again where there are fewer.
      size: of the batch.
      repeats: how many turns are timed.

    Raises:
      ValueError: there are no examples.

    >>> times = in_turns({"a": jax.jit(jnp.sum), "b": jax.jit(jnp.max)}, np.ones((3, 2)), 4, 2)
    >>> {name: len(own) for name, own in times.items()}
    {'a': 2, 'b': 2}
    """
    if not len(x):
        raise ValueError("there are no examples to time a call on")
    batch = jax.device_put(np.asarray(x)[np.arange(size) % len(x)])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-2, repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(batch))
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times
