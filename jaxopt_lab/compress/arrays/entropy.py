"""Canonical Huffman codes of bytes, in numpy: how long they are, writing them, and reading many of them at once."""

import heapq
from collections.abc import Sequence

import numpy as np

__all__ = ["code_lengths", "code_words", "coded_nbytes", "decode", "encode"]

_LONGEST = 12
"""Codes of at most 12 bits: a table of all ways to begin is 8 kB, and 256 bytes of equal count need 8."""

_CHUNK = 4096
_TABLE_NBYTES = 128
_AT_ONCE = 2**14


def code_lengths(counts: Sequence[int] | np.ndarray, longest: int = _LONGEST) -> np.ndarray:
    r"""The lengths of a prefix code that is the shortest for these counts, of all codes with no word beyond `longest` bits.

    .. math:: \min_\ell \sum_i n_i \ell_i \quad \text{such that} \quad \sum_{n_i > 0} 2^{-\ell_i} \le 1, \; \ell_i \le L

    By package-merge; without a word that would be longer it is Huffman's code.

    Args:
      counts: how often each symbol occurs, `[k]`.
      longest: the limit :math:`L`.

    Returns:
      uint8 `[k]`: 0 for a symbol that does not occur, 1 for one that is alone.

    Raises:
      ValueError: there are more symbols than words of `longest` bits.

    >>> code_lengths([5, 0, 2, 1, 1])
    array([1, 0, 2, 3, 3], dtype=uint8)

    Source: Huffman, "A method for the construction of minimum-redundancy codes", 1952; Larmore and Hirschberg, "A fast algorithm
    for optimal length-limited Huffman codes", 1990.
    """
    counts = np.asarray(counts)
    (symbols,) = np.nonzero(counts)
    lengths = np.zeros(counts.shape, np.uint8)
    if len(symbols) > 2**longest:
        raise ValueError(f"{len(symbols)} symbols have no code of at most {longest} bits")
    if len(symbols) < 2:
        lengths[symbols] = 1
        return lengths
    # A coin is a count, and the symbols whose coins it is made of. From the longest words up, a level has one coin a symbol and the
    # pairs of the level before; a symbol's word is as long as it has coins among the cheapest 2 k - 2 of the last.
    singles = sorted((int(counts[s]), i) for i, s in enumerate(symbols))
    coins: list[tuple[int, tuple[int, ...]]] = [(count, (i,)) for count, i in singles]
    level = coins
    for _ in range(longest - 1):
        pairs = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = list(heapq.merge(coins, pairs, key=lambda coin: coin[0]))
    held = np.concatenate([np.asarray(coin[1]) for coin in level[: 2 * len(symbols) - 2]])
    lengths[symbols] = np.bincount(held, minlength=len(symbols))
    return lengths


def code_words(lengths: np.ndarray) -> np.ndarray:
    """The canonical words of these lengths: in order of length, then of symbol, each the next number.

    Args:
      lengths: uint8 `[k]`, 0 for no word.

    Returns:
      uint32 `[k]`.

    Raises:
      ValueError: no prefix code has these lengths.

    >>> code_words(np.array([1, 0, 2, 3, 3])).tolist()
    [0, 0, 2, 6, 7]
    """
    words = np.zeros(len(lengths), np.uint32)
    word, before = 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        length = int(lengths[symbol])
        if length:
            word <<= length - before
            if word >> length:
                raise ValueError("no prefix code has these lengths")
            words[symbol], before = word, length
            word += 1
    return words


def coded_nbytes(symbols: np.ndarray) -> int:
    """How many bytes `encode` makes of these, without making them: the lengths of the words and the index of the chunks included.

    Args:
      symbols: uint8 `[n]`.

    >>> symbols = np.repeat(np.array([0, 7], np.uint8), [4000, 1000])
    >>> coded_nbytes(symbols), len(encode(symbols))
    (757, 757)
    """
    lengths = code_lengths(np.bincount(symbols, minlength=256))
    return _TABLE_NBYTES + sum(2 + -(-int(lengths[chunk].sum(dtype=np.int64)) // 8) for chunk in _chunks(symbols))


def encode(symbols: np.ndarray) -> bytes:
    """Writes bytes in their canonical Huffman code: lengths of words, lengths of chunks, chunks.

    Chunks of 4096 symbols begin at a byte each, so that they can be read side by side.

    Args:
      symbols: uint8 `[n]`.

    >>> len(encode(np.zeros(10_000, np.uint8)))  # 128 + 3 chunks of 2 bytes + 10,000 bits
    1384
    """
    lengths = code_lengths(np.bincount(symbols, minlength=256))
    words = code_words(lengths)
    pieces = [_written(words[chunk], lengths[chunk]) for chunk in _chunks(symbols)]
    table = lengths[::2] | lengths[1::2] << 4
    index = np.array([len(piece) for piece in pieces], "<u2")
    return b"".join([table.tobytes(), index.tobytes(), *pieces])


def decode(sections: Sequence[tuple[bytes, int]]) -> list[np.ndarray]:
    """Reads what `encode` wrote; many sections at once cost little more than the longest chunk among them.

    Chunks are read in lockstep, a symbol of each at a time.

    Args:
      sections: for each its bytes, and how many symbols are in it.

    Returns:
      uint8 `[n]` for each.

    Raises:
      ValueError: a section is not such a code, or not of so many symbols; known before they are allocated.

    >>> decode([(encode(np.array([3, 1, 1, 2], np.uint8)), 4), (encode(np.array([], np.uint8)), 0)])
    [array([3, 1, 1, 2], dtype=uint8), array([], dtype=uint8)]
    """
    parts, out = [], []
    for data, n in sections:
        table, index, stream = _parsed(data, n)
        out.append(np.empty(n, np.uint8))
        ends = np.concatenate([[0], np.cumsum(index, dtype=np.int64)])
        for a in range(0, len(index), _AT_ONCE):
            b = min(a + _AT_ONCE, len(index))
            parts.append((table, index[a:b], stream[ends[a] : ends[b]], out[-1][a * _CHUNK : b * _CHUNK]))
    while parts:
        # As many as stay within the limit, and one at least.
        chunks = np.cumsum([len(index) for _, index, _, _ in parts])
        most = max(int(np.searchsorted(chunks, _AT_ONCE, side="right")), 1)
        _read(parts[:most])
        parts = parts[most:]
    return out


def _chunks(symbols: np.ndarray) -> list[np.ndarray]:
    return [symbols[a : a + _CHUNK] for a in range(0, len(symbols), _CHUNK)]


def _written(words: np.ndarray, lengths: np.ndarray) -> bytes:
    """Words one behind the other, the first bit in the highest place of a byte."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts, nbytes = ends - lengths, -(-int(ends[-1]) // 8)
    # A word lies within three bytes from the one where it begins. No two share a bit: sums are unions, and exact in float64.
    shifted = words.astype(np.int64) << (24 - lengths - (starts & 7))
    begun = np.bincount(starts >> 3, shifted, minlength=nbytes + 2).astype(np.uint32)
    out = (begun >> 16).astype(np.uint8)
    out[1:] |= (begun[:-1] >> 8).astype(np.uint8)
    out[2:] |= begun[:-2].astype(np.uint8)
    return out[:nbytes].tobytes()


def _parsed(data: bytes, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The table of a section, the bytes of each chunk, and the chunks."""
    chunks = -(-n // _CHUNK)
    head = _TABLE_NBYTES + 2 * chunks
    # A symbol takes one bit at least.
    if len(data) < head or n > 8 * (len(data) - head):
        raise ValueError(f"a coded section of {len(data)} bytes cannot hold {n} symbols")
    packed = np.frombuffer(data, np.uint8, _TABLE_NBYTES)
    lengths = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    index = np.frombuffer(data, "<u2", chunks, _TABLE_NBYTES)
    stream = np.frombuffer(data, np.uint8, offset=head)
    if lengths.max(initial=0) > _LONGEST or index.sum(dtype=np.int64) != len(stream):
        raise ValueError(f"a coded section of {len(data)} bytes has a damaged head")
    return _table(lengths), index, stream


def _table(lengths: np.ndarray) -> np.ndarray:
    """For every way that 12 bits can begin, the symbol in the low byte and the length of its word in the high one."""
    words, table = code_words(lengths), np.zeros(2**_LONGEST, np.uint16)
    for symbol in np.nonzero(lengths)[0]:
        free = _LONGEST - int(lengths[symbol])
        first = int(words[symbol]) << free
        table[first : first + 2**free] = int(lengths[symbol]) << 8 | int(symbol)
    return table


def _read(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Fills the last of each `(table, bytes of each chunk, chunks, symbols)`."""
    index = np.concatenate([index for _, index, _, _ in parts]).astype(np.int64)
    sizes = np.concatenate([np.minimum(_CHUNK, len(to) - _CHUNK * np.arange(len(own))) for _, own, _, to in parts])
    owners = np.repeat(np.arange(len(parts)), [len(own) for _, own, _, _ in parts])
    tables = np.concatenate([table for table, _, _, _ in parts])
    # What a damaged chunk may read beyond the end.
    spare = np.zeros(_CHUNK * _LONGEST // 8 + 3, np.uint8)
    stream = np.concatenate([*(stream for _, _, stream, _ in parts), spare]).astype(np.uint32)
    windows = stream[:-2] << 16 | stream[1:-1] << 8 | stream[2:]
    ends = np.cumsum(index)
    # The longest first: those that still have a symbol to come are then the first so many.
    order = np.argsort(-sizes, kind="stable")
    left = np.searchsorted(-sizes[order], -np.arange(sizes.max(initial=0)), side="left")
    at, base = 8 * (ends - index)[order], owners[order] << _LONGEST
    read = np.empty((len(left), len(sizes)), np.uint8)
    for step, active in enumerate(left):
        here = at[:active]
        begun = windows[here >> 3] >> (24 - _LONGEST - (here & 7)).astype(np.uint32) & (2**_LONGEST - 1)
        found = tables[base[:active] + begun]
        read[step, :active] = found & 255
        here += found >> 8
    if not np.array_equal((at + 7) >> 3, ends[order]):
        raise ValueError("a coded section is damaged: a chunk does not end where the next begins")
    symbols = np.empty_like(read.T)
    symbols[order] = read.T
    first = 0
    for _, own, _, to in parts:
        to[:] = symbols[first : first + len(own)].reshape(-1)[: len(to)]
        first += len(own)
