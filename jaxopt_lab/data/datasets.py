"""Data sets: digits, MNIST-1D, MNIST from its files, and a user's own arrays."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxopt_lab.data.checks import validate
from jaxopt_lab.data.idx import read_idx
from jaxopt_lab.data.synthetic import mnist1d_arrays

__all__ = ["Dataset", "digits", "from_arrays", "held_out_of_training", "load", "mnist", "mnist1d"]

_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_WHERE_FROM = (
    f"put {', '.join(name for names in _MNIST_FILES.values() for name in names)} there, as they come (.gz) or unpacked, from "
    "https://ossci-datasets.s3.amazonaws.com/mnist"
)


class Dataset(NamedTuple):
    """A data set in memory: examples to learn from, and examples held out."""

    name: str
    train: dict[str, np.ndarray]
    """`{"x": [N, ...] float32, "y": [N] int32}`."""
    test: dict[str, np.ndarray]
    """The same keys and shapes, of other examples."""
    classes: int
    """Labels lie in `[0, classes)`."""


def from_arrays(train: Mapping[str, Any], test: Mapping[str, Any], *, classes: int, name: str = "arrays") -> Dataset:
    """A data set of the user's own arrays, checked.

    Args:
      train: `{"x": [N, ...], "y": [N]}`, numpy or JAX arrays; further keys are kept as they are.
      test: the same keys; another number of examples.
      classes: the number of classes; labels are integers below it.
      name: what reports call it.

    Returns:
      The arrays with `x` as float32 and `y` as int32.

    Raises:
      ValueError, TypeError: as in `validate`, with the half it happened in; or the halves differ in keys or shapes.

    >>> half = {"x": np.zeros((4, 2)), "y": np.array([0, 1, 1, 0])}
    >>> dataset = from_arrays(half, half, classes=2)
    >>> dataset.train["x"].dtype, dataset.test["y"].dtype
    (dtype('float32'), dtype('int32'))
    """
    halves = {}
    for half, arrays in (("train", train), ("test", test)):
        if missing := {"x", "y"} - set(arrays):
            raise ValueError(
                f"{name}, {half}: the data lacks {', '.join(sorted(missing))}; it has {', '.join(arrays) or 'no keys'}"
            )
        try:
            checked = validate(arrays, classes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}, {half}: {error}") from None
        halves[half] = {
            **checked,
            "x": np.ascontiguousarray(checked["x"], np.float32),
            "y": np.ascontiguousarray(checked["y"], np.int32),
        }
    shapes = {half: {key: array.shape[1:] for key, array in arrays.items()} for half, arrays in halves.items()}
    if shapes["train"] != shapes["test"]:
        raise ValueError(f"{name}: an example of train has shapes {shapes['train']}, one of test {shapes['test']}; they must agree")
    return Dataset(name, halves["train"], halves["test"], classes)


def digits(*, seed: int = 0) -> Dataset:
    """Handwritten digits of 8 x 8 pixels, as scikit-learn ships them: 1437 to learn from, 360 held out.

    Args:
      seed: of the split, which keeps the share of every class.

    Returns:
      `x` of shape `[N, 8, 8, 1]` in `[0, 1]`; 10 classes.

    >>> digits().train["x"].shape, digits().test["x"].shape
    ((1437, 8, 8, 1), (360, 8, 8, 1))

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI, 1998.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    x = (pixels / 16).reshape(-1, 8, 8, 1)
    train, test = train_test_split(np.arange(len(x)), test_size=360, random_state=seed, stratify=labels)
    return from_arrays({"x": x[train], "y": labels[train]}, {"x": x[test], "y": labels[test]}, classes=10, name="digits")


def mnist1d(*, seed: int = 42) -> Dataset:
    """MNIST-1D: 4000 generated signals of 40 points to learn from, 1000 held out; small, and far from linear.

    A linear model reaches about 32 % of the held-out signals, a small convolutional network about 94 %.

    Args:
      seed: of the generator; the default makes the paper's own set.

    Returns:
      `x` of shape `[N, 40]`, of mean 0 and deviation 1 over both halves; 10 classes.

    >>> [half["x"].shape for half in mnist1d()[1:3]]
    [(4000, 40), (1000, 40)]

    Source: Greydanus, "Scaling down deep learning", 2020.
    """
    x, y = mnist1d_arrays(5000, seed)
    return from_arrays({"x": x[:4000], "y": y[:4000]}, {"x": x[4000:], "y": y[4000:]}, classes=10, name="mnist1d")


def mnist(directory: str | Path) -> Dataset:
    """MNIST, or another set of ten classes in its format (Fashion-MNIST, say), from the four idx files in a directory.

    Args:
      directory: holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same with `t10k`, plain or with `.gz`.

    Returns:
      `x` of shape `[N, 28, 28, 1]` in `[0, 1]` (the shape that the files state), 60,000 and 10,000 examples; 10 classes.

    Raises:
      FileNotFoundError: the directory or one of the files is missing; the message says where to get them.
      ValueError: a file is damaged, a label is above 9, or images and labels do not match.

    >>> mnist("/no/such/folder")
    Traceback (most recent call last):
      ...
    FileNotFoundError: there is no directory /no/such/folder; put train-images-idx3-ubyte, ...

    Source: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}; {_WHERE_FROM}")
    files = {half: [_mnist_file(directory, name) for name in names] for half, names in _MNIST_FILES.items()}
    halves = {}
    for half, (images, labels) in files.items():
        x, y = read_idx(images, ndim=3), read_idx(labels, ndim=1)
        if len(x) != len(y):
            raise ValueError(f"{images} holds {len(x)} images and {labels} {len(y)} labels: they are of different sets")
        if (y > 9).any():
            first = int(np.argmax(y > 9))
            raise ValueError(
                f"{labels} holds the label {y[first]} at index {first}, and labels must lie in [0, 10); fetch it again"
            )
        halves[half] = {"x": x[..., None].astype(np.float32) / np.float32(255), "y": y}
    return from_arrays(halves["train"], halves["test"], classes=10, name="mnist")


def _mnist_file(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{directory} holds no {name} (nor {name}.gz); {_WHERE_FROM}")


def load(name: str, directory: str | Path | None = None) -> Dataset:
    """The data set that a command line names: `digits`, `mnist1d`, or `mnist` from `directory`.

    Raises:
      ValueError: the name is unknown, or `mnist` was asked for without a directory.
      FileNotFoundError, ValueError: as in `mnist`.

    >>> load("minst")
    Traceback (most recent call last):
      ...
    ValueError: unknown data set 'minst'; there are digits, mnist, mnist1d
    """
    if name == "digits":
        return digits()
    if name == "mnist1d":
        return mnist1d()
    if name == "mnist":
        if directory is None:
            raise ValueError(f"mnist is read from files: name a directory (--data-dir, or JAXOPT_LAB_DATA) and {_WHERE_FROM}")
        return mnist(directory)
    raise ValueError(f"unknown data set {name!r}; there are digits, mnist, mnist1d")


def held_out_of_training(loaded: Dataset, part: float = 1 / 6) -> Dataset:
    """The data set with the last part of its training examples in the place of the test set: settings are chosen by these.

    Args:
      loaded: any data set.
      part: of the training examples, in (0, 1).

    Raises:
      ValueError: `part` is out of range, or leaves one side empty.

    >>> first = held_out_of_training(digits())
    >>> len(digits().train["x"]), len(first.train["x"]), len(first.test["x"])
    (1437, 1197, 240)
    """
    n = len(loaded.train["x"])
    kept = n - round(part * n) if 0 < part < 1 else 0
    if not 0 < kept < n:
        raise ValueError(f"part={part} of {n} training examples leaves one side empty; give a number between 0 and 1")
    first, last = ({key: array[own] for key, array in loaded.train.items()} for own in (slice(kept), slice(kept, None)))
    return loaded._replace(train=first, test=last)
