"""Entropy coding: the shortest code there is, streams that come back, and sizes that are those of the bytes written."""

import itertools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import compress
from jaxopt_lab.compress import storage
from jaxopt_lab.compress.arrays import entropy, packing
from jaxopt_lab.core import tree


def _shortest(counts: list[int], longest: int) -> int:
    """The fewest bits of all prefix codes: every set of lengths that the Kraft inequality allows."""
    allowed = (
        lengths
        for lengths in itertools.product(range(1, longest + 1), repeat=len(counts))
        if sum(2.0**-length for length in lengths) <= 1
    )
    return min(sum(n * length for n, length in zip(counts, lengths, strict=True)) for lengths in allowed)


@pytest.mark.parametrize("counts", [[1, 1], [5, 1, 1], [1, 1, 2, 3, 5], [8, 8, 8, 8, 7], [100, 20, 9, 4, 2], [1, 2, 4, 8, 16]])
def test_no_prefix_code_is_shorter(counts):
    for longest in (3, 4, 12):
        lengths = entropy.code_lengths(counts, longest)
        assert sum(2.0**-length for length in lengths.tolist()) == 1
        assert lengths.max() <= longest
        assert int(np.dot(counts, lengths)) == _shortest(counts, min(longest, len(counts) - 1) if longest > 4 else longest)


def test_lengths_are_huffman_s_and_within_a_bit_of_the_entropy():
    # Fibonacci's numbers make the longest words of all: one bit each for the largest, the next, and so on.
    counts = [1, 1, 2, 3, 5, 8, 13, 21]
    assert entropy.code_lengths(counts).tolist() == [7, 7, 6, 5, 4, 3, 2, 1]
    assert entropy.code_lengths([0, 9, 0]).tolist() == [0, 1, 0]
    assert entropy.code_lengths([0, 0]).tolist() == [0, 0]
    assert entropy.code_lengths([3] * 256).tolist() == [8] * 256
    random = np.random.default_rng(0)
    for skew in (0.3, 1.0, 3.0):
        counts = (1 + 1e4 * random.random(200) ** (4 * skew)).astype(int)
        lengths, share = entropy.code_lengths(counts), counts / counts.sum()
        assert np.sum(2.0 ** -lengths.astype(float)) == 1
        bound = float(-np.sum(share * np.log2(share)))
        assert bound <= float(np.dot(share, lengths)) < bound + 1
    with pytest.raises(ValueError, match=r"5 symbols have no code of at most 2 bits"):
        entropy.code_lengths([1] * 5, longest=2)


def test_words_are_canonical_and_none_begins_another():
    lengths = entropy.code_lengths(np.random.default_rng(1).integers(0, 50, 40))
    words = entropy.code_words(lengths)
    written = sorted(f"{word:0{length}b}" for word, length in zip(words.tolist(), lengths.tolist(), strict=True) if length)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(written))
    ordered = sorted((length, symbol) for symbol, length in enumerate(lengths.tolist()) if length)
    in_order = [int(words[symbol]) << (12 - length) for length, symbol in ordered]
    assert in_order == sorted(in_order)
    with pytest.raises(ValueError, match=r"no prefix code has these lengths"):
        entropy.code_words(np.array([1, 1, 1]))


def _read_bit_by_bit(data: bytes, n: int) -> list[int]:
    """What a plain reader makes of a section."""
    table = np.frombuffer(data[:128], np.uint8)
    lengths = np.stack([table & 15, table >> 4], axis=1).reshape(-1)
    symbols = {f"{w:0{k}b}": s for s, (w, k) in enumerate(zip(entropy.code_words(lengths).tolist(), lengths, strict=True)) if k}
    chunks = -(-n // 4096)
    sizes, out, at = np.frombuffer(data[128 : 128 + 2 * chunks], "<u2").tolist(), [], 128 + 2 * chunks
    for chunk, size in enumerate(sizes):
        bits, word, left = "".join(f"{byte:08b}" for byte in data[at : at + size]), "", min(4096, n - 4096 * chunk)
        for bit in bits:
            word += bit
            if left and word in symbols:
                out.append(symbols[word])
                word, left = "", left - 1
        at += size
    return out


def test_streams_come_back_whatever_their_length():
    random = np.random.default_rng(2)
    streams = [np.clip(random.normal(128, 10, n), 0, 255).astype(np.uint8) for n in (1, 2, 4095, 4096, 4097, 3 * 4096, 20_000)]
    streams += [np.zeros(0, np.uint8), np.full(9000, 7, np.uint8), random.integers(0, 256, 5000, np.uint8)]
    streams += [np.where(random.random(9000) < 0.999, 0, random.integers(0, 256, 9000)).astype(np.uint8)]
    sections = [(entropy.encode(stream), len(stream)) for stream in streams]
    for (data, n), stream, read in zip(sections, streams, entropy.decode(sections), strict=True):
        np.testing.assert_array_equal(read, stream)
        assert entropy.coded_nbytes(stream) == len(data)
        assert entropy.encode(read) == data, f"{n} symbols"
    for which in (4, 8):
        assert _read_bit_by_bit(*sections[which]) == streams[which].tolist()


def test_many_sections_are_read_in_batches(monkeypatch):
    random = np.random.default_rng(3)
    streams = [random.integers(0, 4, n).astype(np.uint8) for n in (9000, 10, 30_000, 5000)]
    monkeypatch.setattr(entropy, "_AT_ONCE", 3)
    for read, stream in zip(entropy.decode([(entropy.encode(s), len(s)) for s in streams]), streams, strict=True):
        np.testing.assert_array_equal(read, stream)


def test_damaged_sections_are_refused_before_anything_is_made_of_them():
    data = entropy.encode(np.random.default_rng(4).integers(0, 9, 9000).astype(np.uint8))
    for broken, n, message in [
        (data[:100], 9000, r"a coded section of 100 bytes cannot hold 9000 symbols"),
        (data, 10**15, r"cannot hold 1000000000000000 symbols"),
        (data[:-1], 9000, r"has a damaged head"),
        (b"\xff" * 128 + data[128:], 9000, r"has a damaged head"),
        (b"\x11" * 128 + data[128:], 9000, r"no prefix code has these lengths"),
        (data[:134] + b"\xff" * (len(data) - 134), 9000, r"a chunk does not end where the next begins"),
        (data, 8999, r"a chunk does not end where the next begins"),
        (bytes(128) + data[128:], 9000, r"a chunk does not end where the next begins"),
    ]:
        with pytest.raises(ValueError, match=message):
            entropy.decode([(broken, n)])


def test_reading_is_not_slow():
    # Five million codes a second on a CPU with nothing else to do; a tenth of that here, where others may run.
    stream = np.clip(np.random.default_rng(5).normal(128, 10, 2**20), 0, 255).astype(np.uint8)
    data = entropy.encode(stream)
    begin = time.process_time()
    (read,) = entropy.decode([(data, len(stream))])
    assert len(stream) / (time.process_time() - begin) > 5e5
    np.testing.assert_array_equal(read, stream)


def _arrays() -> list[np.ndarray]:
    random = np.random.default_rng(6)
    normal = random.normal(size=(40, 30)).astype(np.float32)
    return [
        normal,
        np.asarray(jnp.asarray(normal, jnp.bfloat16)),
        np.asarray(jnp.asarray(normal, jnp.float8_e4m3fn)),
        np.where(random.random((100, 90)) < 0.95, 0, 1.5).astype(np.float32),
        random.integers(-9, 9, (70, 70)).astype(np.int8),
        random.integers(0, 300, 3000).astype(np.int32),
        random.random((50, 50)) < 0.1,
        np.array(1 + 2j, np.complex64),
        np.zeros((0, 3), np.uint8),
        np.full((), 3, np.uint32),
    ]


def test_arrays_come_back_to_the_bit():
    arrays = _arrays()
    stored = [storage.to_sections(array) for array in arrays]
    back = storage.from_sections(stored, [a.shape for a in arrays], [a.dtype for a in arrays])
    for array, read, sections in zip(arrays, back, stored, strict=True):
        assert (read.shape, read.dtype) == (array.shape, array.dtype)
        assert read.tobytes() == array.tobytes()
        assert read.flags.writeable
        assert sum(len(s.data) for s in sections) <= array.nbytes
        assert compress.huffman_nbytes(jnp.asarray(array)) == sum(len(s.data) for s in sections)
    with pytest.raises(ValueError, match=r"1 sections are not 3 numbers of float32"):
        storage.from_sections([[storage.Section(False, b"1234")]], [(3,)], [np.dtype(np.float32)])


def test_sizes_lie_between_the_entropy_and_the_packed_bytes():
    # Codes of a normal weight in 16 and in 32 equal steps, as a clustered or quantised leaf stores them.
    random = np.random.default_rng(7)
    for bits in (4, 5, 8):
        top = 2**bits - 1
        codes = np.clip(np.round(random.normal(top / 2, top / 8, (256, 200))), 0, top).astype(np.uint8)
        share = np.unique(codes, return_counts=True)[1] / codes.size
        bound = -np.sum(share * np.log2(share)) * codes.size / 8
        packed = jnp.asarray(codes) if bits == 8 else packing.pack(jnp.asarray(codes), bits)
        nbytes = compress.huffman_nbytes(packed)
        assert bound <= nbytes <= tree.nbytes(packed)
        assert nbytes < 1.03 * bound + 300
    # Uniform codes have no shorter form, and are left as they are.
    uniform = packing.pack(jax.device_put(random.integers(0, 32, (256, 200)).astype(np.uint8)), 5)
    assert storage.codes_together(uniform) is None
    assert compress.huffman_nbytes(uniform) == tree.nbytes(uniform)


def test_the_bits_of_a_code_are_coded_together_where_that_is_shorter():
    # Of 3 and 4, one in four bits and the two lower ones say the same: together one bit a code, apart two.
    codes = jax.device_put(3 + np.random.default_rng(8).integers(0, 2, 8000).astype(np.uint8))
    packed = packing.pack(codes, 3)
    np.testing.assert_array_equal(storage.codes_together(packed), codes)
    assert compress.huffman_nbytes(packed) == entropy.coded_nbytes(np.asarray(codes))
    assert sum(map(compress.huffman_nbytes, packed.planes)) > 1.7 * compress.huffman_nbytes(packed)
    assert storage.codes_together(packing.pack(codes, 4)) is None


def test_a_deep_compressed_layer_takes_a_fraction_of_its_bytes():
    # Pruned to 90 %, and the rest in 15 shared values: an eighth of its bytes in four bits, and a thirtieth once they are coded.
    w = np.random.default_rng(9).normal(size=(300, 100)).astype(np.float32)
    w = jax.device_put(np.where(np.abs(w) > 1.645, w, 0))
    stored = compress.cluster({"kernel": w}, k=16, preserve_zero=True, iterations=5)
    nbytes = compress.huffman_nbytes(stored)
    share = np.unique(np.asarray(packing.unpack(stored["kernel"].indices)), return_counts=True)[1] / w.size
    assert -np.sum(share * np.log2(share)) * w.size / 8 <= nbytes < 0.3 * tree.nbytes(stored)
    assert nbytes < w.nbytes / 30
    assert compress.huffman_nbytes(stored["kernel"]) == nbytes


def test_what_counts_and_what_does_not():
    key = jax.random.key(3)
    params = {"key": key, "steps": 7, "name": "x", "none": None, "w": np.ones(3, np.float32)}
    assert compress.huffman_nbytes(params) == 8 + 12
    assert math.isclose(compress.huffman_nbytes({}), 0)
    with pytest.raises(ValueError, match=r"an array is traced: call it outside jit"):
        jax.jit(compress.huffman_nbytes)({"w": jnp.ones(3)})
