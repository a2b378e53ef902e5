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
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import compress
from jaxopt_lab.core import tree

LEAVES = {
    "int8 per channel": functools.partial(compress.quantize),
    "int8 per tensor": functools.partial(compress.quantize, axis=None),
    "int8 asymmetric": functools.partial(compress.quantize, symmetric=False),
    "int8 by first axis": functools.partial(compress.quantize, axis=0),
}


class Case(NamedTuple):
    apply: Callable[..., jax.Array]
    variables: Any
    x: jax.Array
    where: str


class LeNetish(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.Conv(4, (3, 3), feature_group_count=2)(nn.relu(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class MLP(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dtype=self.dtype)(nn.gelu(nn.Dense(5, dtype=self.dtype)(x)))


# Hundreds of small programs run once each: the time goes into compiling, so compile carelessly.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


def _linen(module: nn.Module, x: jax.Array, where: str = "**/kernel") -> Case:
    return Case(module.apply, _jit(module.init)(jax.random.key(0), x), x, where)


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


def _nnx() -> Case:
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    graph, state = nnx.split(Network(nnx.Rngs(0)))
    return Case(lambda state, x: nnx.merge(graph, state)(x), state, _normal(8, 6), "**/kernel")


def _pure() -> Case:
    """A tuple of dicts: an embedding, a tied read-out, a weight in (out, in) layout as the left operand."""
    table, mix = _normal(7, 6), jax.random.normal(jax.random.key(2), (5, 6))

    def apply(params, tokens):
        first, second = params
        h = jnp.take(first["table"], tokens, axis=0)
        h = jax.vmap(jax.vmap(lambda v: second["mix"] @ v))(h)
        return jnp.tanh(h) @ (second["mix"] @ first["table"].T)

    return Case(apply, ({"table": table}, {"mix": mix}), jnp.arange(16).reshape(8, 2) % 7, "**")


MODELS = {
    "mlp": lambda: _linen(MLP(), _normal(8, 6)),
    "mlp in bfloat16": lambda: _linen(MLP(jnp.bfloat16), _normal(8, 6)),
    "convolutions": lambda: _linen(LeNetish(), _normal(8, 6, 6, 2)),
    "lstm": lambda: _linen(nn.RNN(nn.LSTMCell(4)), _normal(8, 3, 4)),
    "attention": lambda: _linen(nn.MultiHeadDotProductAttention(2, qkv_features=4), _normal(8, 3, 4)),
    "embedding": lambda: _linen(nn.Embed(7, 4), jnp.arange(16).reshape(8, 2) % 7, "**/embedding"),
    "nnx": _nnx,
    "pure": _pure,
}


@functools.cache
def _case(name: str) -> Case:
    return MODELS[name]()


def _loss(apply, variables, x):
    y = apply(variables, x)
    return jnp.sum(jnp.sin(y.astype(jnp.float32)) ** 2), y.astype(jnp.float32)


@functools.cache
def _dense_program(name: str):
    """The dense model and its gradient: one program for all leaves."""
    return _jit(jax.value_and_grad(functools.partial(_loss, _case(name).apply), has_aux=True))


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("model", MODELS)
def test_lifted_equals_dense(model: str, leaf: str):
    apply, variables, x, where = _case(model)
    compressed = LEAVES[leaf](variables, where=where)
    lifted, rough = compress.lift(apply), "bfloat16" in model
    close = functools.partial(np.testing.assert_allclose, rtol=0.03 if rough else 2e-5, atol=0.03 if rough else 2e-5)

    @_jit
    def everything(variables, x):
        """Value and gradient under jit, and one example at a time under vmap."""
        out = jax.value_and_grad(functools.partial(_loss, lifted), has_aux=True, allow_int=True)(variables, x)
        return out, jax.vmap(lambda v, x: lifted(v, x[None])[0].astype(jnp.float32), in_axes=(None, 0))(variables, x)

    ((_, y), grads), mapped = everything(compressed, x)
    (_, expected), dense_grads = _dense_program(model)(compress.decompress(compressed), x)
    close(y, expected)
    close(mapped, expected)

    # Gradients of what stayed dense are those of the dense model; a scale's gradient is the dense one, projected.
    for got, want, stored in zip(*(tree.flatten(t)[1] for t in (grads, dense_grads, compressed)), strict=True):
        if not tree.is_compressed(stored):
            close(got, want)
            continue
        assert got.codes.dtype == jax.dtypes.float0
        integers = compress.decompress(stored).astype(jnp.float32) / stored.scale
        shared = tuple(a for a, n in enumerate(stored.scale.shape) if n == 1)
        projected = jnp.sum(want * integers, axis=shared, keepdims=True)
        close(got.scale, projected, rtol=2e-2 if rough else 1e-3, atol=2e-1 if rough else 1e-4)

    # The batch spread over eight devices.
    mesh = Mesh(np.array(jax.devices()), ("d",))
    placed = jax.device_put(compressed, NamedSharding(mesh, PartitionSpec()))
    spread = _jit(lifted)(placed, jax.device_put(x, NamedSharding(mesh, PartitionSpec("d"))))
    assert len(spread.sharding.device_set) == 8
    assert spread.dtype == jax.eval_shape(apply, compress.decompress(compressed), x).dtype
    close(spread.astype(jnp.float32), expected)


@pytest.mark.parametrize("leaf", LEAVES)
def test_trees_stacked_for_vmap_keep_their_leaves(leaf: str):
    apply, variables, x, where = _case("mlp")
    compressed = LEAVES[leaf](variables, where=where)
    many = jax.tree.map(lambda a: jnp.stack([a, a]), compressed)
    y = jax.vmap(compress.lift(apply), in_axes=(0, None))(many, x)
    np.testing.assert_allclose(y, jnp.stack([apply(compress.decompress(compressed), x)] * 2), rtol=1e-5, atol=1e-5)
