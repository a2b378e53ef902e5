"""The first batch of a training, looked at before anything is compiled."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.rows import inputs
from jaxopt_lab.core.tree import any_compressed
from jaxopt_lab.core.types import PyTree
from jaxopt_lab.data.checks import check_finite, check_labels
from jaxopt_lab.train.state import variables

__all__ = ["check_batch"]


def check_batch(step: Callable, state: Any, batch: PyTree) -> None:
    """Raises a named error if a batch cannot be trained on: it is empty, a number is not finite, a label is out of range.

    Rows whose "weight" is 0 are passed over. Labels are integers "y" of the shape of the model's outputs but for the last axis,
    whose length says how many classes there are; only of a step of `make_step` is the model known.

    Args:
      step: what the batch is for.
      state: the training state.
      batch: of any structure; of a dict the entries are named.

    Raises:
      ValueError: as above; the message names the entry, the index and the value.

    >>> check_batch(lambda state, batch: None, None, {"x": np.array([[1.0], [np.nan]])})
    Traceback (most recent call last):
      ...
    ValueError: the first batch: x holds nan at index (1, 0); repair that example or leave it out
    """
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the array"
        if not jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.extended):
            found[name] = _here(leaf)
    weight = found.get("weight")
    try:
        for name, array in found.items():
            if array.ndim and not len(array):
                raise ValueError(f"{name} has no rows; its shape is {array.shape}")
            if array.ndim and array.dtype.kind not in "biu":
                check_finite(name, _counted(array, weight))
        classes = _classes(step, state, batch)
        if classes is not None:
            check_labels({"y": _counted(found["y"], weight)}, classes)
    except ValueError as error:
        raise ValueError(f"the first batch: {error}") from None


def _here(leaf: Any) -> np.ndarray:
    """The array; of one that several processes hold together the rows that lie here."""
    if getattr(leaf, "is_fully_addressable", True):
        return np.asarray(leaf)
    return np.concatenate(list({str(part.index): np.asarray(part.data) for part in leaf.addressable_shards}.values()))


def _counted(array: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    """The array, with zeros in the rows that do not count."""
    if weight is None or weight.all() or len(weight) != len(array):
        return array
    return np.where((weight != 0).reshape(-1, *[1] * (array.ndim - 1)), array, np.zeros((), array.dtype))


def _classes(step: Callable, state: Any, batch: PyTree) -> int | None:
    """How many classes the labels of a batch can be of; None if they are no labels, or it cannot be told."""
    model = getattr(getattr(step, "step", step), "model", None)
    labels = batch.get("y") if isinstance(batch, Mapping) else None
    if model is None or not jnp.issubdtype(getattr(labels, "dtype", float), jnp.integer):
        return None
    predict = model.predict
    if any_compressed(state.params):
        from jaxopt_lab import compress

        predict = compress.lift(predict)
    try:
        outputs = jax.eval_shape(predict, variables(state), *inputs(batch))
    except Exception:
        return None
    shape = getattr(outputs, "shape", ())
    return shape[-1] if shape[:-1] == jnp.shape(labels) and shape[-1:] > (1,) else None
