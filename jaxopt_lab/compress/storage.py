"""What a tree's arrays take once they are entropy-coded, and the way there and back; files are `checkpoint.save_packed`'s."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxopt_lab.compress.arrays import entropy, packing
from jaxopt_lab.core.types import Array, PyTree

__all__ = ["Section", "codes_together", "from_sections", "huffman_nbytes", "to_sections"]


class Section(NamedTuple):
    """A run of bytes.

    Attributes:
      coded: whether `arrays.entropy` wrote it, or it is as it was.
      data: the bytes.
    """

    coded: bool
    data: bytes


def codes_together(packed: packing.Packed) -> np.ndarray | None:
    """The codes a byte each, where they are shorter so once they are coded; None where the packed planes are.

    Codes of 3, 5, 6 or 7 bits are packed in planes of their bits, which belong together: coded apart they lose what they tell about
    each other. Those of 1, 2 or 4 bits are coded better as they are, several to a symbol.

    >>> codes = jnp.uint8(3) + jax.random.bernoulli(jax.random.key(0), shape=(4000,))
    >>> codes_together(packing.pack(codes, 3)).shape
    (4000,)
    """
    if len(packed.planes) == 1:
        return None
    codes = np.asarray(packing.unpack(packed))
    return codes if _nbytes(codes) < sum(map(_nbytes, packed.planes)) else None


def to_sections(array: Array | np.ndarray) -> list[Section]:
    """The bytes of an array: as they are, or a section for each byte of its type, coded where that saves more than a sixteenth.

    The first bytes of numbers are much alike (the exponents of weights, the zeros of small integers), the last ones are noise; so
    they are coded apart, and noise is left as it is.

    >>> array = np.arange(4096, dtype=np.int32)
    >>> [(section.coded, len(section.data)) for section in to_sections(array)]
    [(False, 4096), (True, 2178), (True, 642), (True, 642)]
    """
    planes = [np.ascontiguousarray(plane) for plane in _bytes_of(array).T]
    coded = [_is_worth_it(plane) for plane in planes]
    if not any(coded):
        return [Section(False, _bytes_of(array).tobytes())]
    return [Section(yes, entropy.encode(plane) if yes else plane.tobytes()) for yes, plane in zip(coded, planes, strict=True)]


def from_sections(
    stored: Sequence[Sequence[Section]], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype]
) -> list[np.ndarray]:
    """The arrays again: the inverse of `to_sections`, for many at once.

    Args:
      stored: the sections of each array.
      shapes: of each.
      dtypes: of each.

    Raises:
      ValueError: sections do not hold such an array.

    >>> array = np.arange(3, dtype=np.int16)
    >>> from_sections([to_sections(array)], [array.shape], [array.dtype])
    [array([0, 1, 2], dtype=int16)]
    """
    counts = [int(np.prod(shape, dtype=object)) for shape in shapes]
    for sections, count, dtype in zip(stored, counts, dtypes, strict=True):
        apart = len(sections) == dtype.itemsize
        whole = count if apart else count * dtype.itemsize
        fits = apart or (len(sections) == 1 and not sections[0].coded)
        if not fits or any(len(s.data) != whole for s in sections if not s.coded):
            raise ValueError(f"{len(sections)} sections are not {count} numbers of {dtype}")
    coded = [(s.data, count) for sections, count in zip(stored, counts, strict=True) for s in sections if s.coded]
    decoded = iter(entropy.decode(coded))
    arrays = []
    for sections, shape, dtype in zip(stored, shapes, dtypes, strict=True):
        planes = [next(decoded) if s.coded else np.frombuffer(s.data, np.uint8) for s in sections]
        # Copied, since what is read from a file's bytes cannot be written.
        flat = planes[0].copy() if len(planes) == 1 else np.stack(planes, axis=1).reshape(-1)
        arrays.append(flat.view(dtype).reshape(shape))
    return arrays


def huffman_nbytes(params: PyTree) -> int:
    """Bytes of a tree's arrays, entropy-coded wherever that is shorter; tables of codes and codebooks are included.

    It is what `checkpoint.save_packed` writes beside the manifest, to the byte, and needs no file. Python numbers, which are part
    of the manifest, count nothing.

    Args:
      params: any tree, or one leaf of it: its arrays are read, so outside `jit`.

    Raises:
      ValueError: an array is traced.

    >>> huffman_nbytes({"codes": jnp.zeros(100_000, jnp.int8), "bias": jnp.zeros(3)})
    12690

    Source: Han, Mao and Dally, "Deep compression: compressing deep neural networks with pruning, trained quantization and Huffman
    coding", 2016.
    """
    total = 0
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, packing.Packed)):
        arrays = [x for x in jax.tree.leaves(leaf) if isinstance(x, (jax.Array, np.ndarray))]
        if any(isinstance(x, Tracer) for x in arrays):
            raise ValueError("huffman_nbytes reads what is stored, and an array is traced: call it outside jit, grad and vmap")
        together = codes_together(leaf) if isinstance(leaf, packing.Packed) else None
        total += sum(map(_nbytes, arrays)) if together is None else _nbytes(together)
    return total


def _nbytes(array: Array | np.ndarray) -> int:
    """Of the sections of an array, without making them."""
    planes = [np.ascontiguousarray(plane) for plane in _bytes_of(array).T]
    return sum(entropy.coded_nbytes(plane) if _is_worth_it(plane) else len(plane) for plane in planes)


def _bytes_of(array: Array | np.ndarray) -> np.ndarray:
    """The bytes of each number (of a key, of its data), uint8 `[numbers, bytes of one]`."""
    is_key = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    numbers = np.asarray(jax.random.key_data(array) if is_key else array)
    return np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).reshape(-1, numbers.dtype.itemsize)


def _is_worth_it(symbols: np.ndarray) -> bool:
    return 16 * entropy.coded_nbytes(symbols) < 15 * len(symbols)
