"""The idx files in which MNIST and its relatives come: a magic number, the dimensions, the bytes."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

__all__ = ["read_idx"]

_LARGEST = 1 << 31
"""Bytes: a header that promises more is taken for damage rather than believed."""


def read_idx(path: str | Path, ndim: int) -> np.ndarray:
    """Reads one idx file of unsigned bytes, plain or gzipped, and believes nothing that it does not find.

    The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian 32-bit
    integer, then the values in row-major order and nothing after them.

    Args:
      path: the file; a name that ends in `.gz` is gzipped.
      ndim: how many dimensions it must have: 3 for images `[N, rows, columns]`, 1 for labels `[N]`.

    Returns:
      A uint8 array of the dimensions that the file states.

    Raises:
      ValueError: the magic number is another, a dimension is 0, or the file is shorter or longer than its header says.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "labels-idx1-ubyte"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2]) + bytes([7, 9]))
    >>> read_idx(path, ndim=1)
    array([7, 9], dtype=uint8)

    Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits", 1998.
    """
    path = Path(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            magic = file.read(4)
            if magic != bytes([0, 0, 8, ndim]):
                raise ValueError(
                    f"{path} is no idx file of {ndim}-dimensional bytes: it begins with {magic.hex() or 'nothing'}, not "
                    f"{bytes([0, 0, 8, ndim]).hex()}; fetch it again"
                )
            header = file.read(4 * ndim)
            if len(header) < 4 * ndim:
                raise ValueError(f"{path} is truncated: it ends within its header; fetch it again")
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4"))
            expected = math.prod(shape)
            if not 0 < expected <= _LARGEST:
                raise ValueError(f"{path} states the shape {shape}, which is not of 1 to {_LARGEST} bytes; fetch it again")
            # One byte more than promised is asked for, so that a longer file shows and a compressed bomb is never unpacked.
            body = file.read(expected + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); fetch it again") from None
    if len(body) != expected:
        found = "more" if len(body) > expected else str(len(body))
        raise ValueError(f"{path} should hold {expected} bytes, {shape}, after its header, and holds {found}; fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape)
