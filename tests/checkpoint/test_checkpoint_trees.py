"""Whatever a run holds comes back as it was: types, structure, dtypes and every bit."""

import collections
import json
from typing import NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

from jaxopt_lab import compress, prune
from jaxopt_lab.checkpoint import load_tree, manifest, save_tree


class Mine(NamedTuple):
    a: jax.Array
    b: object = None


@flax.struct.dataclass
class Struct:
    a: jax.Array
    names: tuple = flax.struct.field(pytree_node=False, default=("x", 2, None, 1.5, jnp.dtype(jnp.bfloat16)))


@chex.dataclass
class Chex:
    b: jax.Array
    a: object = None


class NotATree:
    pass


CLASSES = (Mine, Struct, Chex)


def assert_same(got, want):
    """The same types, structure, dtypes, key implementations and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if isinstance(b, (bool, int, float, str)):
            assert type(a) is type(b)
            assert repr(a) == repr(b)
            continue
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        is_key = jnp.issubdtype(b.dtype, jax.dtypes.prng_key)
        bits = [np.asarray(jax.random.key_data(x) if is_key else x).tobytes() for x in (a, b)]
        assert bits[0] == bits[1]


def through_json(tree, classes=CLASSES):
    structure, arrays = manifest.describe(tree, classes)
    return manifest.rebuild(json.loads(json.dumps(structure, allow_nan=False)), arrays, classes)


def test_every_kind_of_leaf_and_node_survives_the_disk(tmp_path):
    tree = {
        "keys": [jax.random.key(3), jax.random.split(jax.random.key(1, impl="rbg"), 2), jax.random.PRNGKey(0)],
        "dtypes": tuple(
            jnp.array([0, 1, 3], d) for d in (jnp.bfloat16, jnp.float16, jnp.int8, jnp.uint8, jnp.bool_, jnp.complex64)
        ),
        "bits": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "shapes": (jnp.float32(2), jnp.zeros((0, 3), jnp.int8), jnp.ones((1, 0))),
        "python": [True, 3, 2.5, float("nan"), -float("inf"), 10**30, "text"],
        "none": None,
        "empty": ({}, [], (), optax.EmptyState(), optax.MaskedNode()),
        "a": {"b": jnp.ones(2)},
        "a.b": jnp.zeros(3),
        "a/b": jnp.full(3, 2.0),
        7: {0: jnp.ones(1), 1: "x"},
        "classes": (Mine(jnp.ones(2)), Struct(jnp.ones(1)), Chex(b=jnp.ones(1)), freeze({"a": jnp.ones(1)})),
        "ordered": collections.OrderedDict(b=jnp.ones(1), a=jnp.zeros(1)),
        "nnx": nnx.state(nnx.BatchNorm(2, rngs=nnx.Rngs(0))),
        "leaf": compress.quantize({"kernel": jnp.array([[1.0, 2.0]], jnp.bfloat16)}, symmetric=False),
        "numpy": np.arange(3, dtype=np.int32),
    }
    mixed = {str(k): v for k, v in tree.items() if k != 7} | {"numbers": tree[7]}
    save_tree(tmp_path / "t", mixed, classes=CLASSES)
    got = load_tree(tmp_path / "t", classes=CLASSES)
    assert_same(got, mixed)
    assert got["classes"][1].names == Struct(0).names
    assert type(got["ordered"]) is collections.OrderedDict
    assert type(got["nnx"]["mean"]) is nnx.BatchStat
    assert got["leaf"]["kernel"].dtype == jnp.bfloat16


def test_a_tree_without_arrays_survives_too(tmp_path):
    save_tree(tmp_path / "t", {"a": 1, "b": (None, jnp.zeros(0))})
    assert_same(load_tree(tmp_path / "t"), {"a": 1, "b": (None, jnp.zeros(0))})


PARAMS = {"a": {"kernel": jnp.full((4, 3), 0.5), "bias": jnp.ones(3)}, "b": {"kernel": jnp.ones((3, 2), jnp.bfloat16)}}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "lion": optax.lion(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=optax.cosine_decay_schedule(0.1, 10)),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    "masked": optax.masked(optax.adam(0.1), {"a": {"kernel": True, "bias": False}, "b": {"kernel": True}}),
    "partition": optax.partition(
        {"x": optax.adam(0.1), "y": optax.set_to_zero()}, {"a": {"kernel": "x", "bias": "y"}, "b": {"kernel": "x"}}
    ),
    "chain": optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.ema(0.9), optax.sgd(0.1)
    ),
    "lbfgs": optax.lbfgs(memory_size=2),
    "muon": optax.contrib.muon(0.1),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "lookahead-like": optax.contrib.prodigy(),
    "reduce_on_plateau": optax.contrib.reduce_on_plateau(),
    "sparsify": optax.MultiSteps(
        prune.sparsify(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), 0.5, packed=True), 2
    ),
    "compressed": compress.optimizer(optax.adamw(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_state_survives_json(name):
    params = compress.quantize(PARAMS, where="a/kernel") if name == "compressed" else PARAMS
    state = OPTIMIZERS[name].init(params)
    assert_same(through_json(state, classes=()), state)


def test_all_optimiser_states_survive_the_disk_together(tmp_path):
    states = {name: tx.init(PARAMS) for name, tx in OPTIMIZERS.items()}
    save_tree(tmp_path / "t", states)
    assert_same(load_tree(tmp_path / "t"), states)


def test_a_sparse_run_goes_on_with_its_packed_masks():
    tx, gradients = OPTIMIZERS["sparsify"], jax.tree.map(lambda p: jnp.arange(p.size, dtype=p.dtype).reshape(p.shape), PARAMS)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    got = through_json(state, classes=())
    assert_same(got, state)
    masks = prune.masks(got)
    assert [int(jnp.sum(masks[name]["kernel"])) for name in PARAMS] == [3, 6]
    assert any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(got))
    assert_same(tx.update(gradients, got, params), tx.update(gradients, state, params))


@pytest.mark.parametrize(
    ("message", "tree"),
    [
        (r"a/0 is a \S*:Mine, a class that is not allowed in a checkpoint; pass classes=\(Mine,\)", {"a": [Mine(1)]}),
        (r"a is a \S*:NotATree, a class that is not allowed", {"a": NotATree()}),
        (r"a holds a function|a is a builtins:function", {"a": lambda x: x}),
        (r"a is a builtins:set, a class that is not allowed", {"a": {1}}),
        (r"the key \(1, b'x'\) in a holds a bytes", {"a": {(1, b"x"): 2}}),
        (r"a has dtype float64, which JAX narrows", {"a": np.ones(2)}),
        (r"a has dtype <U1, which cannot be stored", {"a": np.array(["x"])}),
        (r"a/names holds a list, which cannot be stored", {"a": Struct(1, names=[1])}),
    ],
)
def test_what_cannot_be_stored_is_named(message, tree):
    with pytest.raises(TypeError, match=message) as caught:
        manifest.describe(tree, (Struct,))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("subprocess:Popen", r"names subprocess:Popen, a class that is not allowed; pass classes=\(Popen,\)"),
        ("optax_evil:State", r"a class that is not allowed"),
        ("optax:no_such", r"names optax:no_such, which does not exist in this installation"),
        ("optax:adam", r"names optax:adam, which is not a class of that name"),
        ("collections:Counter", r"collections:Counter, which is neither a NamedTuple nor a dataclass"),
        ("flax.nnx:Param", r"names flax.nnx:Param, which is not a class of that name"),
    ],
)
@pytest.mark.parametrize("kind", ["namedtuple", "dataclass"])
def test_a_forged_class_is_refused_by_name(name, message, kind):
    with pytest.raises(TypeError, match=message) as caught:
        manifest.rebuild({"format": 1, "arrays": [], "tree": {kind: name, "fields": {}, "static": {}}}, [])
    assert "\n" not in str(caught.value)


def test_a_manifest_of_another_version_or_shape_is_refused():
    structure, arrays = manifest.describe({"a": {"b": jnp.ones((2, 3)), "c": jnp.ones(2)}})
    with pytest.raises(ValueError, match=r"the manifest has format 2; this version reads 1"):
        manifest.rebuild({**structure, "format": 2}, arrays)
    with pytest.raises(ValueError, match=r"manifest: a/b: expected float32\(2, 3\), found float32\(3, 2\); a/c: missing$"):
        manifest.rebuild(structure, [arrays[0].T, None])
    with pytest.raises(ValueError, match=r"a/b: expected float32\(2, 3\), found bfloat16\(2, 3\)"):
        manifest.rebuild(structure, [arrays[0].astype(jnp.bfloat16), arrays[1]])


def test_a_changed_class_is_refused_by_its_fields():
    structure, arrays = manifest.describe(Struct(jnp.ones(1)), CLASSES)
    structure["tree"]["static"]["extra"] = 1
    with pytest.raises(ValueError, match=r"Struct has other fields than this installation's: extra"):
        manifest.rebuild(structure, arrays, CLASSES)


def test_a_saved_tree_is_not_overwritten_unless_told(tmp_path):
    save_tree(tmp_path / "t", {"a": jnp.ones(2)})
    with pytest.raises(FileExistsError, match=r"t exists; pass overwrite=True"):
        save_tree(tmp_path / "t", {"a": jnp.zeros(2)})
    with pytest.raises(TypeError, match=r"b is a builtins:set"):
        save_tree(tmp_path / "t", {"b": {1}}, overwrite=True)
    np.testing.assert_array_equal(load_tree(tmp_path / "t")["a"], [1, 1])
    save_tree(tmp_path / "t", {"a": jnp.zeros(3)}, overwrite=True)
    np.testing.assert_array_equal(load_tree(tmp_path / "t")["a"], [0, 0, 0])
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    with pytest.raises(FileNotFoundError, match=r"u holds no tree that save_tree wrote"):
        load_tree(tmp_path / "u")


def test_numbers_of_numpy(tmp_path):
    save_tree(tmp_path / "tree", {"best": np.float64(0.5), "done": np.bool_(True), "step": np.int32(3)})
    tree = load_tree(tmp_path / "tree")
    assert tree["best"] == 0.5
    assert type(tree["best"]) is float
    assert tree["done"].dtype == bool
    assert int(tree["step"]) == 3
