"""Restoring onto a target: what differs is listed by path before anything is read, and arrays land where the target's are."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import compress, prune
from jaxopt_lab.checkpoint import Checkpoints


@flax.struct.dataclass
class Mine:
    a: jax.Array
    value: jax.Array
    name: str = flax.struct.field(pytree_node=False, default="x")


def spread(devices: int, *axes: str | None) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("d",)), PartitionSpec(*axes))


def bits(x) -> bytes:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x).tobytes()


def assert_same(got, want):
    """The same structure, types, dtypes, bits and places."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if not isinstance(b, jax.Array):
            assert (type(a), a) == (type(b), b)
            continue
        assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert a.committed == b.committed


def a_run(place):
    """A state with every kind of leaf, its matrices placed by a rule."""
    kernel = jax.random.normal(jax.random.key(0), (16, 8))
    params = {"dense": {"kernel": place(kernel), "bias": place(jnp.arange(8.0))}, "half": place(jnp.ones((8, 4), jnp.bfloat16))}
    tx = prune.sparsify(optax.adamw(0.1), 0.5, packed=True, where="**/kernel")
    return {
        "params": params,
        "leaf": jax.tree.map(place, compress.quantize({"kernel": kernel})),
        "opt": jax.tree.map(lambda x: place(x) if x.ndim else x, tx.init(params)),
        "mask": place(kernel > 0),
        "key": jax.random.key(3),
        "keys": place(jax.random.split(jax.random.key(1, impl="rbg"), 8)),
        "count": jnp.int32(4),
        "empty": jnp.zeros((0, 3)),
        "mine": Mine(jnp.ones(1), jnp.zeros(2)),
        "step": 7,
        "best": 0.5,
        "none": None,
    }


def first_axis(devices: int):
    def place(x):
        axes = ("d",) if x.ndim and x.shape[0] % devices == 0 and x.shape[0] >= devices else ()
        return jax.device_put(x, spread(devices, *axes))

    return place


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run on one device, saved as step 1, and on eight, as step 7; of each an array is donated right afterwards."""
    directory = tmp_path_factory.mktemp("run")
    advance = jax.jit(lambda x: x * 3, donate_argnums=0)
    with Checkpoints(directory, classes=(Mine,)) as checkpoints:
        for step, devices in ((1, 1), (7, 8)):
            state = a_run(first_axis(devices))
            x = state["params"]["dense"]["kernel"] + 1
            of_numpy = np.arange(3, dtype=np.int32)
            fingerprint = {"optimiser": "adamw", "code": "c0de"}
            checkpoints.save(step, {**state, "donated": x, "numpy": of_numpy}, metrics={"loss": 1.0}, fingerprint=fingerprint)
            of_numpy[:] = 0
            for _ in range(5):
                x = advance(x)
            checkpoints.wait()
    return directory


@pytest.fixture
def checkpoints(saved):
    with Checkpoints(saved, classes=(Mine,)) as opened:
        yield opened


def whole(place):
    """What the fixture has saved, its arrays placed by a rule."""
    run = a_run(place)
    return {**run, "donated": run["params"]["dense"]["kernel"] + 1, "numpy": jnp.arange(3)}


@pytest.mark.parametrize(("saved_on", "devices"), [(8, 8), (8, 4), (8, 1), (1, 8), (1, 1)])
def test_a_run_goes_on_over_other_devices(checkpoints, saved_on, devices):
    want = whole(first_axis(devices))
    assert_same(checkpoints.restore({8: 7, 1: 1}[saved_on], like=want), want)


def test_a_target_may_be_abstract_and_its_shardings_are_kept(checkpoints):
    want = a_run(first_axis(8))["params"]
    rows, columns = spread(4, "d"), spread(2, None, "d")
    like = {
        "dense": {
            "kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=columns),
            "bias": jax.ShapeDtypeStruct((8,), jnp.float32),
        },
        "half": jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=rows),
    }
    got = checkpoints.restore(7, part="params", like=like)
    assert got["dense"]["kernel"].sharding == columns
    assert got["half"].sharding == rows
    assert not got["dense"]["bias"].committed
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)
    keys = checkpoints.restore(7, part="keys", like=jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="rbg"), 8)))
    assert bits(keys) == bits(a_run(first_axis(1))["keys"])


def test_a_part_reads_nothing_else(tmp_path, checkpoints):
    kernel = checkpoints.restore(7, part="params/dense/kernel")
    np.testing.assert_array_equal(kernel, a_run(first_axis(1))["params"]["dense"]["kernel"])
    leaf = checkpoints.restore(7, part="leaf")
    assert type(leaf["kernel"]).__name__ == "Quantized"
    assert checkpoints.restore(7, part="step") == 7
    np.testing.assert_array_equal(checkpoints.restore(7, part="mine").value, [0, 0])
    with pytest.raises(ValueError, match=r"the checkpoint has no 'params/conv'; in 'params' there are: dense, half"):
        checkpoints.restore(7, part="params/conv")
    with pytest.raises(ValueError, match=r"wanted: params/dense/kernel: shape \(16, 8\) in the checkpoint, \(8, 16\) wanted$"):
        checkpoints.restore(
            7,
            part="params",
            like={"dense": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(8)}, "half": jnp.ones((8, 4), jnp.bfloat16)},
        )
    with Checkpoints(tmp_path) as others:
        others.save(1, {"a": {"b/c": jnp.ones(1)}, "a/b": {"c": jnp.zeros(1)}, "large": jnp.ones(2**16)})
        # A key with a "/" in it: of two that fit the longer is meant.
        np.testing.assert_array_equal(others.restore(1, part="a/b/c"), [0])
        others.wait()
    with Checkpoints(tmp_path, max_bytes=2**17) as small:
        np.testing.assert_array_equal(small.restore(1, part="a/b/c"), [0])
        with pytest.raises(ValueError, match=r"checkpoint 1 in .* claims 262152 bytes of arrays, and no more than 131072 are read"):
            small.restore(1)


CHANGES = {
    "another shape": (
        lambda run: {**run, "count": jnp.zeros((1,), jnp.int32)},
        r"count: shape \(\) in the checkpoint, \(1,\) wanted",
    ),
    "another dtype": (lambda run: {**run, "count": jnp.uint32(0)}, r"count: dtype int32 in the checkpoint, uint32 wanted"),
    "missing and extra": (
        lambda run: {("other" if name == "count" else name): leaf for name, leaf in run.items()},
        r"count: extra in the checkpoint; other: missing in the checkpoint",
    ),
    "another branch": (
        lambda run: {**run, "params": {**run["params"], "conv": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}}},
        r"wanted: params/conv/kernel: missing in the checkpoint; params/conv/bias: missing in the checkpoint$",
    ),
    "another optimiser": (
        lambda run: {**run, "opt": optax.sgd(0.1, momentum=0.9).init(run["params"])},
        r"opt: \S+:SparsifyState in the checkpoint, tuple wanted",
    ),
    "a leaf of another kind": (lambda run: {**run, "step": jnp.int32(7)}, r"step: a Python int in the checkpoint, an array wanted"),
    "a scalar of another type": (lambda run: {**run, "step": 7.0}, r"step: a Python int in the checkpoint, a Python float wanted"),
    "another key": (
        lambda run: {**run, "key": jax.random.key(0, impl="rbg")},
        r"key: shape \(2,\) in the checkpoint, \(4,\) wanted; key: key threefry2x32 in the checkpoint, rbg wanted",
    ),
    "a raw key": (
        lambda run: {**run, "key": jax.random.PRNGKey(0)},
        r"key: key \S+ in the checkpoint, no key wanted",
    ),
    "another static field": (
        lambda run: {**run, "mine": Mine(jnp.ones(1), jnp.zeros(2), name="y")},
        r"mine: name is x in the checkpoint, y wanted",
    ),
    "a list for a dict": (lambda run: {**run, "params": [1]}, r"params: dict in the checkpoint, list wanted"),
    "None": (lambda run: {**run, "none": jnp.ones(1)}, r"none: none in the checkpoint, an array wanted"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_another_tree_is_refused_by_what_differs(checkpoints, change):
    want = whole(lambda x: x)
    alter, message = CHANGES[change]
    for call in (lambda like: checkpoints.restore(7, like=like), checkpoints.restore_latest):
        with pytest.raises(ValueError, match=message) as caught:
            call(alter(want))
        assert str(caught.value).startswith(f"checkpoint 7 in {checkpoints.directory} is of another tree than the one wanted: ")
        assert "\n" not in str(caught.value)
    assert checkpoints.steps() == (1, 7), "a checkpoint of another tree is not damaged"


def test_adam_is_not_nadam_nor_sgd(tmp_path):
    params = {"kernel": jnp.ones((2, 3))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, optax.adam(0.1).init(params), fingerprint={"optimiser": "adam", "jax": "1"})
        with pytest.raises(ValueError, match=r"0: optax\S*:ScaleByAdamState in the checkpoint, optax\S*:TraceState wanted"):
            checkpoints.restore(1, like=optax.sgd(0.1, momentum=0.9).init(params))
        # The states of adam and nadam have one class: the fingerprint tells them apart.
        nadam = optax.nadam(0.1).init(params)
        checkpoints.restore(1, like=nadam, fingerprint={"optimiser": "adam", "jax": "1"})
        for call in (checkpoints.restore_latest, lambda **given: checkpoints.restore(1, **given)):
            message = r"checkpoint 1 in .* is of another run: data was None and is 'd'; optimiser was 'adam' and is 'nadam'$"
            with pytest.raises(ValueError, match=message):
                call(like=nadam, fingerprint={"optimiser": "nadam", "jax": "1", "data": "d"})


def test_what_stands_beside_the_tree(checkpoints):
    import jaxopt_lab

    assert checkpoints.metadata(7) == {
        "versions": {
            **{name: __import__(name).__version__ for name in ("jax", "flax", "optax")},
            "orbax-checkpoint": __import__("orbax.checkpoint").checkpoint.__version__,
            "jaxopt_lab": jaxopt_lab.__version__,
        }
    }
    assert checkpoints.metrics(7) == {"loss": 1.0}
    for given, message in (
        ({"metadata": {"versions": 1}}, r"metadata of checkpoint 8 has an entry 'versions'"),
        ({"metrics": {"loss": "low"}}, r"the metric 'loss' of checkpoint 8 is 'low', which is no number"),
        ({"fingerprint": {"code": 3}}, r"the fingerprint of checkpoint 8 has 'code': 3, which is not text"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.save(8, {"a": 1}, **given)


def test_an_array_over_the_devices_is_never_whole_on_one(checkpoints, monkeypatch):
    """Of each array each device holds its part alone, also while it is read."""
    seen = []
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *rest, **more: seen.append(np.shape(x)) or put(x, *rest, **more))
    sharding = spread(8, "d")
    kernel = checkpoints.restore(7, part="params/dense/kernel", like=jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding))
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8)}
    assert (16, 8) not in seen
