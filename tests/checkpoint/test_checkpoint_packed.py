"""One file: every leaf comes back to the bit, its size is the one predicted, and whatever is wrong with it is named."""

import hashlib
import json
import os
import struct
import zlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import compress
from jaxopt_lab.checkpoint import load_packed, packed, save_packed
from jaxopt_lab.compress.arrays import packing


@flax.struct.dataclass
class Mine:
    a: jax.Array
    names: tuple = flax.struct.field(pytree_node=False, default=("x", 2, None, jnp.dtype(jnp.bfloat16)))


def assert_same(got, want):
    """The same types, structure, dtypes, key implementations and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if isinstance(b, (bool, int, float, str)):
            assert type(a) is type(b)
            assert repr(a) == repr(b)
            continue
        assert isinstance(a, jax.Array)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        is_key = jnp.issubdtype(b.dtype, jax.dtypes.prng_key)
        bits = [np.asarray(jax.random.key_data(x) if is_key else x).tobytes() for x in (a, b)]
        assert bits[0] == bits[1]


def _normal(*shape: int) -> jax.Array:
    return jax.device_put(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def _codes(bits: int, *shape: int) -> packing.Packed:
    top = 2**bits - 1
    codes = np.clip(np.round(np.random.default_rng(1).normal(top / 2, top / 8, shape)), 0, top)
    return packing.pack(jnp.asarray(codes.astype(np.uint8)), bits, -2)


def test_every_kind_of_leaf_survives_the_file(tmp_path):
    w, sparse = _normal(8, 6), jnp.where(_normal(8, 6) > 1, _normal(8, 6), 0)
    tree = {
        "keys": [jax.random.key(3), jax.random.split(jax.random.key(1, impl="rbg"), 2), jax.random.PRNGKey(0)],
        "dtypes": tuple(
            jnp.array([0, 1, 3], d)
            for d in (
                *(jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int4, jnp.uint4, jnp.int8, jnp.uint8),
                *(jnp.bool_, jnp.uint16, jnp.int32, jnp.complex64),
            )
        ),
        "bits": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "shapes": (jnp.float32(2), jnp.zeros((0, 3), jnp.int8), jnp.ones((1, 0))),
        "python": [True, 3, 2.5, float("nan"), 10**30, "text"],
        "none": None,
        "names": {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}, "numbers": {7: jnp.ones(1)}},
        "large": [_normal(100, 90), _normal(100, 90).astype(jnp.bfloat16), jnp.zeros((100, 90)), _normal(300, 200) > 1],
        "mine": Mine(jnp.ones(1)),
        "int8": compress.quantize({"kernel": w}, symmetric=False),
        "int4": compress.quantize({"kernel": w}, bits=4),
        "clustered": compress.cluster({"kernel": w}, k=5, iterations=1),
        "masked": compress.store_sparse({"kernel": sparse}),
        "n of m": compress.store_n_of_m({"kernel": sparse.at[1::2].set(0)}, 1, 2),
        "low rank": compress.low_rank({"kernel": w}, rank=2),
        "codes": {
            "together": _codes(5, 96, 90),
            "apart": _codes(3, 3, 2),
            "nibbles": [_codes(4, 95, 90)],
            "bits": _codes(1, 99, 9),
        },
        "state": compress.optimizer(optax.adamw(0.1)).init(compress.quantize({"kernel": w})),
    }
    save_packed(tmp_path / "t", tree, classes=(Mine,))
    got = load_packed(tmp_path / "t", classes=(Mine,))
    assert_same(got, tree)
    assert got["mine"].names == Mine(0).names
    # The same tree is the same file.
    before = (tmp_path / "t").read_bytes()
    save_packed(tmp_path / "t", got, overwrite=True, classes=(Mine,))
    assert (tmp_path / "t").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    save_packed(tmp_path / "empty", {"a": 1, "b": ()})
    assert load_packed(tmp_path / "empty") == {"a": 1, "b": ()}


def test_the_file_is_as_large_as_predicted(tmp_path):
    w = _normal(256, 200)
    trees = {
        "float32": {"kernel": w},
        "int8": compress.quantize({"kernel": w}),
        "codes": {"kernel": _codes(5, 256, 200), "bias": jnp.zeros(200)},
        "sparse": compress.store_sparse({"kernel": jnp.where(w > 1.5, w, 0)}),
    }
    for name, tree in trees.items():
        save_packed(tmp_path / name, tree)
        size, predicted = (tmp_path / name).stat().st_size, compress.huffman_nbytes(tree)
        manifest = struct.unpack_from("<16sQQ32s", (tmp_path / name).read_bytes())[2]
        assert size == predicted + 64 + manifest
        assert manifest < 450
        assert size < sum(x.nbytes for x in jax.tree.leaves(tree)) * 1.01 + 450


def test_a_file_is_not_overwritten_unless_told_and_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "er" / "t"
    save_packed(path, {"a": jnp.ones(2)})
    with pytest.raises(FileExistsError, match=r"t exists; pass overwrite=True"):
        save_packed(path, {"a": jnp.zeros(2)})
    with pytest.raises(FileExistsError, match=r"er is a directory"):
        save_packed(path.parent, {"a": jnp.zeros(2)}, overwrite=True)
    with pytest.raises(TypeError, match=r"b is a builtins:set"):
        save_packed(path, {"b": {1}}, overwrite=True)

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            save_packed(path, {"a": jnp.zeros(2)}, overwrite=True)
    np.testing.assert_array_equal(load_packed(path)["a"], [1, 1])
    assert [p.name for p in path.parent.iterdir()] == ["t"]
    save_packed(path, {"a": jnp.zeros(3)}, overwrite=True)
    np.testing.assert_array_equal(load_packed(path)["a"], [0, 0, 0])
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_is_broken_is_named(tmp_path):
    path = tmp_path / "t"
    save_packed(path, {"a": {"kernel": _normal(90, 80)}, "n": 1})
    whole = path.read_bytes()
    for data, message in [
        (b"", r"t is no file that save_packed wrote"),
        (b"PK\x03\x04" + whole[4:], r"t is no file that save_packed wrote"),
        (whole[:40], r"t is no file that save_packed wrote"),
        (whole[:-1], r"t has \d+ bytes and was written with \d+: it is truncated or damaged"),
        (whole + b"\0", r"t has \d+ bytes and was written with \d+: it is truncated"),
        (whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], r"t is damaged: it is not what its SHA-256 says"),
        (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], r"t is damaged: it is not what its SHA-256 says"),
        (whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], r"t is damaged: it is not what its SHA-256 says"),
    ]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            load_packed(path)
        assert "\n" not in str(caught.value)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is no file that save_packed wrote"):
            load_packed(missing)


def _forged(tmp_path, change):
    """A file whose manifest says something else, with a digest to match."""
    path = tmp_path / "t"
    save_packed(path, {"a": jnp.zeros(5000, jnp.int8), "codes": _codes(5, 96, 90), "state": optax.EmptyState()}, overwrite=True)
    data = path.read_bytes()
    nbytes = struct.unpack_from("<16sQQ32s", data)[1]
    payload, structure = data[64 : 64 + nbytes], json.loads(zlib.decompress(data[64 + nbytes :]))
    text = change(structure)
    text = text if isinstance(text, bytes) else zlib.compress(json.dumps(structure).encode())
    path.write_bytes(
        struct.pack("<16sQQ32s", packed._MAGIC, nbytes, len(text), hashlib.sha256(payload + text).digest()) + payload + text
    )
    return path


def _nested(depth):
    """Lists in lists, with blanks at random between them: no text that deflates to next to nothing."""
    blanks = np.random.default_rng(0).integers(0, 4, depth)
    return b"".join(b"[" + b" " * int(n) for n in blanks)


def _replace(structure, node):
    """Another node where the state was."""
    next(pair for pair in structure["tree"]["dict"] if pair[0] == "state")[1] = node


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"Error -3 while decompressing", lambda s: b"not deflated"),
        (r"do not end within", lambda s: zlib.compress(b"[1]")[:-2]),
        (r"do not end within", lambda s: zlib.compress(b"[" * 10**6)),
        (r"Expecting value", lambda s: zlib.compress(b"not json")),
        (r"it lists no arrays", lambda s: zlib.compress(b"[1]")),
        (r"maximum recursion depth|too deep|Recursion", lambda s: zlib.compress(_nested(50_000))),
        (r"it lists no arrays", lambda s: s.pop("sections")),
        (r"argument 2 is", lambda s: s["sections"].pop()),
        (r"its sections are of \d+ bytes, and there are", lambda s: s["sections"][0][0].__setitem__(1, 1)),
        (r"a has the shape \[-5\] and sections", lambda s: s["arrays"][0].update(shape=[-5])),
        (r"coded section of \d+ bytes cannot hold 10{15} symbols", lambda s: s["arrays"][0].update(shape=[10**15])),
        (r"coded section|sections are not", lambda s: s["arrays"][0].update(shape=[10**30, 10**30])),
        (r"sections", lambda s: s["arrays"][0].update(dtype="float32")),
        (r"'object' is no dtype of an array", lambda s: s["arrays"][0].update(dtype="object")),
        (r"'O' is no dtype of an array", lambda s: s["arrays"][0].update(dtype="O")),
        (r"'>i4' is no dtype of an array", lambda s: s["arrays"][0].update(dtype=">i4")),
        (r"'\[\[.*' is no dtype|is no dtype of an array", lambda s: s["arrays"][0].update(dtype=[["a", "i4"]])),
        (r"the manifest has format 9", lambda s: s.update(format=9)),
        (r"list index out of range", lambda s: _replace(s, {"array": 99})),
        (r"node of unknown kind", lambda s: _replace(s, {"what": 1})),
    ],
)
def test_a_forged_manifest_is_refused_in_one_line(message, change, tmp_path):
    path = _forged(tmp_path, change)
    with pytest.raises(ValueError, match=rf"t has no manifest that fits its arrays: .*({message})") as caught:
        load_packed(path)
    assert "\n" not in str(caught.value)


def test_a_forged_class_is_refused_and_forged_codes_too(tmp_path):
    path = _forged(tmp_path, lambda s: _replace(s, {"namedtuple": "subprocess:Popen", "fields": {}}))
    with pytest.raises(TypeError, match=r"names subprocess:Popen, a class that is not allowed"):
        load_packed(path)

    def static(structure):
        return next(node for key, node in structure["tree"]["dict"] if key == "codes")["static"]

    for change in (
        lambda s: static(s).update(width=10**12),
        lambda s: static(s).update(width=97),
        lambda s: static(s).update(axis=5),
        lambda s: static(s).update(bits=9),
        lambda s: static(s).update(bits="x"),
        lambda s: static(s).pop("axis"),
    ):
        with pytest.raises(ValueError, match=r"t has no manifest that fits its arrays: "):
            load_packed(_forged(tmp_path, change))


def test_sharded_arrays_are_written_whole(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    x = jax.device_put(jnp.arange(32.0).reshape(8, 4), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
    save_packed(tmp_path / "t", {"x": x})
    np.testing.assert_array_equal(load_packed(tmp_path / "t")["x"], x)
