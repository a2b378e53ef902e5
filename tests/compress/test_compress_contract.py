"""Every leaf through every kind of model and every transformation: the lifted function equals the function of the dense tree.

A new leaf costs one row in `LEAVES`, a new kind of model one in `MODELS`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import checkpoint, compress, nets

LEAVES = {
    "int8 per channel": compress.quantize,
    "int8 per tensor": functools.partial(compress.quantize, axis=None),
    "int8 asymmetric": functools.partial(compress.quantize, symmetric=False),
    "int8 by first axis": functools.partial(compress.quantize, axis=0),
    "int4": functools.partial(compress.quantize, bits=4),
    "int3 asymmetric in groups": functools.partial(compress.quantize, bits=3, symmetric=False, group=2),
    "int2 swapped": functools.partial(compress.quantize, bits=2, swapped=True),
    "float8": compress.quantize_float,
    "NF4": functools.partial(compress.quantize_normal, block=2),
    "low rank": functools.partial(compress.low_rank, rank=1),
    "low rank of (out, in)": functools.partial(compress.low_rank, rank=1, axis=0),
    "added factors": functools.partial(compress.add_low_rank, rank=1, key=jax.random.key(3)),
    "clustered": functools.partial(compress.cluster, k=5),
    "sparse": compress.store_sparse,
    "fake int4": functools.partial(compress.fake_quantize, bits=4),
    "learned step": functools.partial(compress.fake_quantize, bits=3, leaf=compress.LearnedStep),
    "low rank and int4": functools.partial(
        compress.split_low_rank, rank=1, rest=functools.partial(compress.quantize, bits=4, where="**")
    ),
}


class Case(NamedTuple):
    apply: Callable[..., jax.Array]
    variables: Any
    x: jax.Array
    where: str


class Residual(nn.Module):
    """What a residual network is made of: a strided convolution, BatchNorm, a grouped convolution, a sum, a read-out."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3), strides=2)(x))
        x = x + nn.Conv(4, (3, 3), feature_group_count=2)(nn.relu(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Block(nn.Module):
    """A layer of a Transformer: attention and a feed-forward net, each after a LayerNorm and beside a sum."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=4)(nn.LayerNorm()(x))
        return x + nn.Dense(4)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))


class MLP(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dtype=self.dtype)(nn.gelu(nn.Dense(6, dtype=self.dtype)(x)))


def _linen(module: nn.Module, x: jax.Array, where: str = "**/kernel") -> Case:
    return Case(module.apply, jax.jit(module.init)(jax.random.key(0), x), x, where)


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


def _nnx() -> Case:
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(6, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    graph, state = nnx.split(Network(nnx.Rngs(0)))
    return Case(lambda state, x: nnx.merge(graph, state)(x), state, _normal(8, 6), "**/kernel")


def _pure() -> Case:
    """A tuple of dicts: an embedding, a tied read-out, a weight in (out, in) layout as the left operand."""
    table, mix = _normal(8, 6), jax.random.normal(jax.random.key(2), (4, 6))

    def apply(params, tokens):
        first, second = params
        h = jnp.take(first["table"], tokens, axis=0)
        h = jax.vmap(jax.vmap(lambda v: second["mix"] @ v))(h)
        return jnp.tanh(h) @ (second["mix"] @ first["table"].T)

    return Case(apply, ({"table": table}, {"mix": mix}), jnp.arange(16).reshape(8, 2) % 7, "**")


MODELS = {
    "mlp": lambda: _linen(MLP(), _normal(8, 6)),
    "mlp in bfloat16": lambda: _linen(MLP(jnp.bfloat16), _normal(8, 6)),
    "lenet": lambda: _linen(nets.LeNet(), 0.1 * _normal(8, 8, 8, 2)),
    "residual": lambda: _linen(Residual(), _normal(8, 6, 6, 2)),
    "lstm": lambda: _linen(nn.RNN(nn.LSTMCell(4)), _normal(8, 3, 4)),
    "transformer": lambda: _linen(Block(), _normal(8, 3, 4)),
    "embedding": lambda: _linen(nn.Embed(8, 4), jnp.arange(16).reshape(8, 2) % 7, "**/embedding"),
    "nnx": _nnx,
    "pure": _pure,
}


@functools.cache
def _case(name: str) -> Case:
    return MODELS[name]()


def _stored(variables: Any, where: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The variables in each of the forms, made by one program; a sparse one has to count its zeros outside of it."""

    @jax.jit
    def traced(variables):
        return {name: LEAVES[name](variables, where=where) for name in names if name != "sparse"}

    found = traced(variables)
    return {name: LEAVES[name](variables, where=where) if name == "sparse" else found[name] for name in names}


def _loss(apply, variables, x):
    y = apply(variables, x)
    return jnp.sum(jnp.sin(y.astype(jnp.float32)) ** 2), y.astype(jnp.float32)


# Every leaf on one model and every model with one leaf each time; the rest of the table with `scripts/test -m slow`.
_ALWAYS = (("pure",), ("int8 per channel",))
# Each is another leaf of these but for one setting, and has tests of its own.
_AGAIN = ("int8 per tensor", "int8 asymmetric", "int8 by first axis", "int4")
_TABLE = [
    pytest.param(model, leaf, marks=() if (model in _ALWAYS[0] and leaf not in _AGAIN) or leaf in _ALWAYS[1] else pytest.mark.slow)
    for model in MODELS
    for leaf in LEAVES
]


@pytest.mark.parametrize(("model", "leaf"), _TABLE)
def test_lifted_equals_dense(model: str, leaf: str):
    apply, variables, x, where = _case(model)
    compressed = _stored(variables, where, (leaf,))[leaf]
    lifted, rough = compress.lift(apply), "bfloat16" in model
    close = functools.partial(np.testing.assert_allclose, rtol=0.03 if rough else 2e-5, atol=0.03 if rough else 2e-5)

    @jax.jit
    def everything(variables, x):
        """Value and gradient under jit, one example at a time under vmap, and what the dense tree gives for both."""
        out = jax.value_and_grad(functools.partial(_loss, lifted), has_aux=True, allow_int=True)(variables, x)
        mapped = jax.vmap(lambda v, x: lifted(v, x[None])[0].astype(jnp.float32), in_axes=(None, 0))(variables, x)
        dense, carry_back = jax.vjp(compress.decompress, variables)
        (_, expected), grads = jax.value_and_grad(functools.partial(_loss, apply), has_aux=True)(dense, x)
        return out, mapped, expected, carry_back(grads)[0]

    ((_, y), grads), mapped, expected, carried_back = everything(compressed, x)
    close(y, expected)
    close(mapped, expected)

    # The gradient of whatever a leaf holds is that of the dense weight, carried back through what the leaf stands for.
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(carried_back), strict=True):
        assert got.dtype == want.dtype
        if got.dtype != jax.dtypes.float0:
            close(got, want, rtol=2e-2 if rough else 1e-3, atol=2e-2 * float(jnp.max(jnp.abs(want))) if rough else 1e-4)

    # The batch spread over eight devices.
    mesh = Mesh(np.array(jax.devices()), ("d",))
    placed = jax.device_put(compressed, NamedSharding(mesh, PartitionSpec()))
    spread = jax.jit(lifted)(placed, jax.device_put(x, NamedSharding(mesh, PartitionSpec("d"))))
    assert len(spread.sharding.device_set) == 8
    assert spread.dtype == jax.eval_shape(lambda v, x: apply(compress.decompress(v), x), compressed, x).dtype
    close(spread.astype(jnp.float32), expected)


@pytest.mark.slow
@pytest.mark.parametrize("leaf", LEAVES)
def test_trees_stacked_for_vmap_keep_their_leaves(leaf: str):
    apply, variables, x, where = _case("mlp")
    compressed = LEAVES[leaf](variables, where=where)
    many = jax.tree.map(lambda a: jnp.stack([a, a]), compressed)
    y = jax.vmap(compress.lift(apply), in_axes=(0, None))(many, x)
    np.testing.assert_allclose(y, jnp.stack([apply(compress.decompress(compressed), x)] * 2), rtol=1e-5, atol=1e-5)


def test_a_scan_takes_rows_of_a_square_weight_and_no_others():
    """Along which axis of its fields a leaf can be cut, no shape tells."""
    w, x = _normal(4, 4), _normal(4)
    leaves = {name: stored["kernel"] for name, stored in _stored({"kernel": w}, "**", tuple(LEAVES)).items()}
    leaves["a full rank"] = compress.LowRank(w, w)
    halved = jnp.tile(jnp.array([1.0, 0.0, 0.0, 2.0]), (4, 1))
    leaves["two of four"] = compress.store_n_of_m({"kernel": halved}, 2, 4, axis=-1)["kernel"]
    leaves["rounded inputs"] = compress.dynamic({"kernel": w})["kernel"]

    @jax.jit
    def rows(leaves, x):
        scanned = compress.lift(lambda w: jax.lax.scan(lambda c, row: (c, 2 * row + c), x, w)[1])
        return {name: (scanned(leaf), 2 * leaf.materialise() + x[None]) for name, leaf in leaves.items()}

    for got, want in rows(leaves, x).values():
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_every_leaf_and_its_optimiser_survive_the_disk(tmp_path):
    _, variables, x, where = _case("mlp")
    trees = {name: stored["params"] for name, stored in _stored(variables, where, tuple(LEAVES)).items()}
    trees["convolution"] = compress.tucker2(_case("residual").variables, ranks=(1, 1), where="**/Conv_0/kernel")["params"]
    trees["two of four"] = compress.store_n_of_m({"kernel": jnp.tile(jnp.array([1.0, 0.0, 0.0, 2.0]), 2)[:, None]}, 2, 4)
    trees["rounded inputs"] = compress.dynamic(variables["params"])
    state = jax.jit(compress.optimizer(optax.contrib.schedule_free_adamw(0.1)).init)(trees)
    kept = {"trees": trees, "state": state}
    checkpoint.save_tree(tmp_path / "kept", kept)
    back = checkpoint.load_tree(tmp_path / "kept")
    assert jax.tree.structure(back) == jax.tree.structure(kept)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(kept), strict=True):
        assert got.dtype == want.dtype
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    lifted = jax.jit(compress.lift(_case("mlp").apply))
    y, expected = (lifted({"params": t["int4"]}, x) for t in (back["trees"], trees))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.slow
@pytest.mark.parametrize("leaf", ["int8 per channel", "int4", "float8", "NF4", "low rank", "clustered"])
def test_a_lookup_of_an_embedding_never_makes_the_table_dense(leaf: str):
    table = nn.Embed(32, 8)
    variables = {"params": {"embedding": _normal(32, 8)}}
    stored = LEAVES[leaf](variables, where="**/embedding")
    program = jax.make_jaxpr(compress.lift(table.apply))(stored, jnp.arange(3))
    whole = [v.aval for e in program.jaxpr.eqns for v in e.outvars if v.aval.shape == (32, 8) and v.aval.dtype == jnp.float32]
    assert not whole
    # Out of bounds is NaN, as in a table of floats.
    rows = compress.lift(table.apply)(stored, jnp.array([1, 40]))
    np.testing.assert_allclose(rows[0], compress.decompress(stored)["params"]["embedding"][1], rtol=1e-5)
    assert bool(jnp.isnan(rows[1]).all())
