"""Data sets and their files: what is read is what was written, and what is damaged is named in one line."""

import gzip
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import data
from jaxopt_lab.data.synthetic import mnist1d_arrays

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def files() -> dict[str, bytes]:
    """A tiny MNIST: 3 and 2 images of 4 x 5 pixels, the k-th pixel of the file being k."""
    return {
        NAMES[0]: idx(np.arange(60).reshape(3, 4, 5)),
        NAMES[1]: idx(np.array([7, 0, 9])),
        NAMES[2]: idx(np.full((2, 4, 5), 255)),
        NAMES[3]: idx(np.array([1, 2])),
    }


def write(directory, files: dict[str, bytes], compress: bool = False) -> None:
    for name, body in files.items():
        (directory / (f"{name}.gz" if compress else name)).write_bytes(gzip.compress(body) if compress else body)


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_reads_what_was_written(tmp_path, files, compress):
    write(tmp_path, files, compress)
    dataset = data.mnist(tmp_path)
    assert dataset.train["x"].shape == (3, 4, 5, 1)
    assert dataset.train["x"].dtype == np.float32
    assert dataset.train["y"].dtype == np.int32
    np.testing.assert_array_equal(dataset.train["x"].ravel(), np.arange(60, dtype=np.float32) / np.float32(255))
    np.testing.assert_array_equal(dataset.train["y"], [7, 0, 9])
    assert dataset.test["x"].min() == dataset.test["x"].max() == 1.0
    assert dataset.classes == 10
    assert data.load("mnist", tmp_path).train["y"].tolist() == [7, 0, 9]


def test_mnist_follows_links(tmp_path, files):
    (tmp_path / "real").mkdir()
    write(tmp_path / "real", files)
    (tmp_path / "linked").mkdir()
    for name in NAMES:
        (tmp_path / "linked" / name).symlink_to(tmp_path / "real" / name)
    np.testing.assert_array_equal(data.mnist(tmp_path / "linked").train["y"], [7, 0, 9])


# Each row: which file, what becomes of it, and what the error must say beside the file's name.
DAMAGE = {
    "truncated body": (0, lambda b: b[:-1], "should hold 60 bytes, .3, 4, 5., after its header, and holds 59"),
    "too long": (0, lambda b: b + b"\0", "and holds more"),
    "empty file": (1, lambda b: b"", "begins with nothing"),
    "truncated header": (2, lambda b: b[:9], "truncated: it ends within its header"),
    "wrong magic": (0, lambda b: b"\x89PNG" + b[4:], "begins with 89504e47, not 00000803"),
    "floats, not bytes": (1, lambda b: bytes([0, 0, 13, 1]) + b[4:], "begins with 00000d01, not 00000801"),
    "labels for images": (0, lambda b: idx(np.arange(3)), "begins with 00000801, not 00000803"),
    "no images": (0, lambda b: idx(np.zeros((0, 4, 5))), r"states the shape \(0, 4, 5\)"),
    "absurd size": (0, lambda b: b[:4] + b"\xff" * 12, "not of 1 to 2147483648 bytes"),
    "label out of range": (
        1,
        lambda b: idx(np.array([1, 10, 3])),
        r"holds the label 10 at index 1, and labels must lie in \[0, 10\)",
    ),
    "counts differ": (1, lambda b: idx(np.array([1, 2])), "labels: they are of different sets"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("compress", [False, True])
def test_a_damaged_file_is_named(tmp_path, files, case, compress):
    which, spoil, message = DAMAGE[case]
    write(tmp_path, files | {NAMES[which]: spoil(files[NAMES[which]])}, compress)
    with pytest.raises(ValueError, match=message) as caught:
        data.mnist(tmp_path)
    assert NAMES[which] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:-6], lambda b: b[:12], lambda b: b"no gzip at all", lambda b: b[:-8] + bytes(4) + b[-4:]]
)
def test_a_damaged_gzip_is_named(tmp_path, files, spoil):
    write(tmp_path, files, compress=True)
    path = tmp_path / f"{NAMES[0]}.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{NAMES[0]}\.gz is truncated or damaged .*; fetch it again"):
        data.mnist(tmp_path)


def test_images_of_other_sizes_are_refused(tmp_path, files):
    write(tmp_path, files | {NAMES[2]: idx(np.zeros((2, 5, 4)))})
    with pytest.raises(ValueError, match=r"an example of train has shapes .*\(4, 5, 1\).* they must agree"):
        data.mnist(tmp_path)


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path, files):
    with pytest.raises(
        FileNotFoundError, match=r"there is no directory .*nowhere; put train-images-idx3-ubyte, .* from https://ossci"
    ):
        data.mnist(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"holds no {NAMES[0]} \(nor {NAMES[0]}\.gz\); put train-images"):
        data.mnist(tmp_path)
    write(tmp_path, files)
    (tmp_path / NAMES[3]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"holds no {NAMES[3]} "):
        data.mnist(tmp_path)


def test_load_names_what_there_is():
    with pytest.raises(ValueError, match="unknown data set 'cifar'; there are digits, mnist, mnist1d"):
        data.load("cifar")
    with pytest.raises(ValueError, match=r"mnist is read from files: name a directory \(--data-dir, or JAXOPT_LAB_DATA\)"):
        data.load("mnist")


def test_digits_is_split_by_class_and_seed():
    dataset = data.load("digits")
    assert (dataset.train["x"].min(), dataset.train["x"].max()) == (0.0, 1.0)
    share = np.bincount(dataset.train["y"]) / len(dataset.train["y"])
    held = np.bincount(dataset.test["y"]) / len(dataset.test["y"])
    np.testing.assert_allclose(share, held, atol=2 / 360)
    rows = {half.tobytes() for half in np.concatenate([dataset.train["x"], dataset.test["x"]]).reshape(1797, 64)}
    from sklearn.datasets import load_digits

    assert rows == {row.tobytes() for row in (load_digits().data / 16).astype(np.float32)}
    np.testing.assert_array_equal(data.digits(seed=0).test["y"], dataset.test["y"])
    assert (data.digits(seed=1).test["y"] != dataset.test["y"]).any()


def test_mnist1d_is_the_published_set():
    dataset = data.load("mnist1d")
    # The first and last values of the set that the paper's generator makes with its default arguments.
    np.testing.assert_allclose(
        dataset.train["x"][0, :6], [-0.332006, -0.47191, -0.778697, -1.009741, -0.882353, 0.103935], atol=2e-6
    )
    np.testing.assert_allclose(dataset.test["x"][-1, -4:], [0.447233, 0.659876, 0.877734, 1.193152], atol=2e-6)
    assert dataset.train["y"][:10].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]
    assert dataset.test["y"][-5:].tolist() == [2, 5, 9, 6, 4]
    both = np.concatenate([dataset.train["x"], dataset.test["x"]])
    assert abs(both.mean()) < 1e-5
    assert abs(both.std() - 1) < 1e-5


def test_mnist1d_is_a_function_of_its_seed():
    (x, y), (again, _), (_, other) = (mnist1d_arrays(100, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(x, again)
    assert (y != other).any()


def test_from_arrays_takes_jax_arrays_and_keeps_other_keys():
    half = {"x": jnp.ones((2, 3), jnp.bfloat16), "y": jnp.array([0, 1]), "weight": jnp.array([0.5, 1.0])}
    dataset = data.from_arrays(half, half, classes=2, name="mine")
    assert dataset.name == "mine"
    assert dataset.train["x"].dtype == np.float32
    assert dataset.train["weight"].tolist() == [0.5, 1.0]


X, Y = np.ones((3, 2), np.float32), np.array([0, 1, 2])


def holding(value, dtype=np.float32):
    x = np.ones((3, 2), dtype)
    x[1, 0] = value
    return x


# Each row: the arrays, the error and its words; labels are of 3 classes.
BAD = {
    "no arrays": ({}, ValueError, "the data has no arrays"),
    "empty": ({"x": X[:0], "y": Y[:0]}, ValueError, r"no examples: x has shape \(0, 2\), y has shape \(0,\)"),
    "lengths": ({"x": X, "y": Y[:2]}, ValueError, "disagree on the number of examples: x has 3, y has 2"),
    "scalar": ({"x": np.float32(1), "y": Y}, ValueError, "x is a scalar"),
    "nan": ({"x": holding(np.nan), "y": Y}, ValueError, r"x holds nan at index \(1, 0\)"),
    "inf": ({"x": holding(-np.inf), "y": Y}, ValueError, r"x holds -inf at index \(1, 0\)"),
    "nan in bfloat16": ({"x": jnp.asarray(holding(np.nan), jnp.bfloat16), "y": Y}, ValueError, r"x holds nan at index \(1, 0\)"),
    "nan in a vector": ({"x": np.array([0.0, 1.0, np.nan]), "y": Y}, ValueError, "x holds nan at index 2"),
    "text": ({"x": np.array(["a", "b", "c"]), "y": Y}, TypeError, "x holds <U1, not numbers"),
    "objects": ({"x": np.array([None, 1, 2]), "y": Y}, TypeError, "x holds object, not numbers"),
    "label too high": (
        {"x": X, "y": np.array([0, 3, 4])},
        ValueError,
        r"y holds the label 3 at index 1, .* \[0, 3\); 2 of 3 do not",
    ),
    "label negative": ({"x": X, "y": np.array([0, 1, -1])}, ValueError, "y holds the label -1 at index 2"),
    "label fractional": (
        {"x": X, "y": np.array([0.0, 1.0, 2.0])},
        TypeError,
        "y holds float64, and labels of 3 classes must be integers",
    ),
    "no labels": ({"x": X}, ValueError, "3 classes, but no labels: the arrays are x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named(case):
    arrays, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        data.validate(arrays, classes=3)
    assert "\n" not in str(caught.value)


def test_the_index_is_right_beyond_the_first_chunk(monkeypatch):
    monkeypatch.setattr("jaxopt_lab.data.checks._CHUNK", 4)
    x = np.ones((9, 2))
    x[7, 1] = np.inf
    with pytest.raises(ValueError, match=r"x holds inf at index \(7, 1\)"):
        data.validate({"x": x})


def test_good_data_passes_uncopied():
    checked = data.validate({"x": X, "y": Y}, classes=3)
    assert checked["x"] is X


def test_from_arrays_says_which_half():
    good = {"x": X, "y": Y}
    with pytest.raises(ValueError, match=r"mine, test: x holds nan at index \(1, 0\)"):
        data.from_arrays(good, good | {"x": holding(np.nan)}, classes=3, name="mine")
    with pytest.raises(ValueError, match="arrays, train: the data lacks y; it has x"):
        data.from_arrays({"x": X}, good, classes=3)
