"""What ran on the stored form and what did not: by hand for each way, and for real models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxopt_lab import compress, nets
from jaxopt_lab.compress import Ran, ran

W = jnp.arange(24.0).reshape(4, 6) - 11


@jax.custom_jvp
def _own(w):
    return 2 * w


_own.defjvp(lambda primals, tangents: (_own(*primals), 2 * tangents[0]))


@pytest.mark.parametrize(
    ("apply", "native", "materialised"),
    [
        (lambda w, x: x @ w, ("dot_general",), ()),
        (lambda w, x: x @ w.T.T, ("transpose", "dot_general"), ()),
        (lambda w, x: w[jnp.array([1, 0])], ("gather",), ()),
        (lambda w, x: x @ w + w.sum(), ("dot_general",), ("reduce_sum",)),
        (lambda w, x: x @ (w * 2), (), ("mul",)),
        (lambda w, x: x @ _own(w), (), ("elsewhere",)),
        (lambda w, x: lax.scan(lambda c, row: (c + row, None), jnp.zeros(6), w)[0], ("scan",), ("add",)),
        (lambda w, x: lax.fori_loop(0, 2, lambda i, w: 2 * w, w), (), ("elsewhere",)),
        (lambda w, x: jax.jit(lambda w: x @ w)(w), ("dot_general",), ()),
        (lambda w, x: lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: (x + 1) @ w, w), ("dot_general",), ()),
        (lambda w, x: x, (), ()),
    ],
)
def test_every_way_is_named(apply, native, materialised):
    stored = compress.quantize({"w": W}, where="w")["w"]
    assert ran(apply, stored, jnp.ones((1, 4))) == {"": Ran(native, materialised)}
    # Watching changes nothing.
    same = compress.lift(apply)(stored, jnp.ones((1, 4)))
    assert jax.tree.structure(same) == jax.tree.structure(apply(W, jnp.ones((1, 4))))


@pytest.mark.slow
def test_a_model_leaf_by_leaf():
    model = nets.from_linen(nets.LeNet())
    x = jnp.zeros((1, 28, 28, 1))
    variables = model.init(jax.random.key(0), x)
    mixed = compress.store_sparse(compress.quantize(variables, where="**/Dense_*/kernel"), where="**/Conv_0/kernel")
    rows = compress.summary(mixed, variables, apply=model.predict, inputs=(jax.ShapeDtypeStruct(x.shape, x.dtype),))
    kernels = {path: row for path, row in rows.items() if row.ran is not None}
    assert set(kernels) == {path for path in rows if path.endswith("kernel")} - {"params/Conv_1/kernel"}
    for path, row in kernels.items():
        dense = "Conv_0" in path
        assert row.ran == (Ran((), ("conv_general_dilated",)) if dense else Ran(("dot_general",), ()))
        assert row.rmse is not None


def test_half_precision_and_a_scan_over_layers():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.scan(
                lambda module, x, _: (jnp.tanh(module(x)), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layer(nn.Dense(4, dtype=jnp.bfloat16), x.astype(jnp.bfloat16), None)[0]

    x = jnp.ones((2, 4))
    variables = Deep().init(jax.random.key(0), x)
    seen = functools.partial(ran, Deep().apply)
    (row,) = seen(compress.quantize(variables), x).values()
    assert row == Ran(("scan", "convert_element_type", "dot_general"), ())
    (row,) = seen(compress.fake_quantize(variables), x).values()
    assert row == Ran((), ("scan",))
    (row,) = seen(compress.fake_quantize_inputs(compress.fake_quantize(variables)), x).values()
    assert row == Ran(("scan", "convert_element_type", "dot_general"), ())
