"""Tucker-2: kernels with known factors, errors that may only fall, and convolutions that never see the dense kernel."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxopt_lab import compress
from jaxopt_lab.checkpoint import manifest
from jaxopt_lab.compress.arrays import factor
from jaxopt_lab.compress.leaves.tucker import Tucker2, tucker2
from jaxopt_lab.core import tree

_close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


def _array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _product(first, core, last) -> np.ndarray:
    return np.einsum("...ip,...spq,...qo->...sio", first, core, last)


def test_factors_are_those_worked_by_hand():
    # One place more than a matrix: (1, 2) times an outer product of coordinate axes 3 and 1, so both ranks are 1.
    w = np.zeros((2, 4, 3), np.float32)
    w[:, 3, 1] = [1, 2]
    first, core, last = factor.tucker2(w, (1, 1))
    _close(np.abs(first), np.eye(4)[:, 3:])
    _close(np.abs(last), np.eye(3)[1:2])
    _close(np.abs(core)[:, 0, 0], [1, 2])


def test_kernels_of_low_rank_are_found_exactly_and_their_ranks_by_energy():
    w = _product(_array(2, 7, 2), _array(2, 4, 2, 3, seed=1), _array(2, 3, 6, seed=2))
    ranks = (factor.by_energy(1 - 1e-6),) * 2
    first, core, last = factor.tucker2(w, ranks)
    assert (first.shape, core.shape, last.shape) == ((2, 7, 2), (2, 4, 2, 3), (2, 3, 6))
    _close(_product(first, core, last), w, rtol=1e-3, atol=1e-4)
    _close(np.swapaxes(first, 1, 2) @ np.asarray(first), np.broadcast_to(np.eye(2), (2, 2, 2)))


def test_the_error_falls_from_turn_to_turn_and_is_what_the_core_lacks():
    w = _array(9, 8, 7)
    fit = jax.jit(lambda w, turns: factor.tucker2(w, (3, 2), turns))
    errors = []
    for turns in (0, 1, 2, 8):
        first, core, last = fit(w, turns)
        errors.append(np.sum((w - _product(first, core, last)) ** 2))
        _close(errors[-1], np.sum(w**2) - np.sum(core**2), rtol=1e-3)
    assert errors[0] > errors[1] >= errors[2] - 1e-3 >= errors[3] - 2e-3
    # Where it stops, each factor is the best given the other: the leading singular vectors of what the other leaves.
    inner = np.einsum("sio,qo->siq", w, last).transpose(1, 0, 2).reshape(8, -1)
    _close(np.sum(core**2), np.sum(np.linalg.svd(inner, compute_uv=False)[:3] ** 2), rtol=1e-3)
    # The bound of the start, from what its two unfoldings cut.
    cut = [
        np.sum(np.linalg.svd(np.moveaxis(w, k, 0).reshape(w.shape[k], -1), compute_uv=False)[r:] ** 2) for k, r in ((1, 3), (2, 2))
    ]
    assert max(cut) <= errors[-1] * 1.001
    assert errors[0] <= sum(cut) * 1.001


def test_ranks_are_cut_to_what_a_kernel_has():
    first, core, last = factor.tucker2(_array(2, 9, 5), (64, 1))
    assert (first.shape, core.shape, last.shape) == ((9, 2), (2, 2, 1), (1, 5))
    first, core, last = factor.tucker2(_array(3, 4, 5), (64, 64))
    _close(_product(first, core, last), _array(3, 4, 5), atol=1e-5)
    with pytest.raises(ValueError, match="rank=0 does not fit"):
        factor.tucker2(_array(3, 4, 5), (0, 2))


@pytest.mark.parametrize(
    ("spec", "inputs", "outputs", "leafy"),
    [
        (("NHWC", "HWIO", "NHWC"), -2, -1, True),
        (("NCHW", "OIHW", "NHWC"), -3, -4, True),
        (("NHWC", "HWOI", "NCHW"), -2, -1, False),  # read the other way round: dense
    ],
)
def test_convolutions_read_their_layout(spec, inputs, outputs, leafy):
    core = _array(3, 2, 2, 3) if spec[1] != "OIHW" else _array(3, 2, 3, 2)
    leaf = Tucker2(jnp.asarray(_array(6, 2)), jnp.asarray(core), jnp.asarray(_array(3, 5)), inputs, outputs)
    channels = leaf.aval().shape[spec[1].index("I")]
    x = jnp.asarray(_array(2, channels, 6, 7) if spec[0] == "NCHW" else _array(2, 6, 7, channels))
    seen = []

    class Watched(Tucker2):
        def conv_general_dilated(self, x, **params):
            seen.append((out := super().conv_general_dilated(x, **params)) is not NotImplemented)
            return out

    @jax.jit
    def both(fields, x):
        w = Watched(*fields, inputs, outputs)
        options = (
            {"window_strides": (1, 2), "padding": "SAME"},
            {"window_strides": (2, 1), "padding": ((1, 0), (2, 3)), "rhs_dilation": (1, 2), "lhs_dilation": (2, 1)},
        )
        fns = [functools.partial(lax.conv_general_dilated, dimension_numbers=spec, **option) for option in options]
        turned = (spec[0], spec[1][1] + spec[1][0] + spec[1][2:], spec[2])
        fns.append(lambda x, w: lax.conv_general_dilated(x, jnp.swapaxes(w, 0, 1), (1, 1), "SAME", dimension_numbers=turned))
        return [(compress.lift(fn)(x, w), fn(x, w.materialise())) for fn in fns]

    for got, want in both((leaf.first, leaf.core, leaf.last), x):
        _close(got, want, rtol=1e-3, atol=1e-4)
    assert seen == [leafy] * 3


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2)(x))
        return nn.Dense(3)(nn.Conv(6, (3, 3), strides=2)(x).mean((1, 2)))


def test_a_lifted_model_equals_the_dense_one_in_value_and_gradients():
    x = jnp.asarray(_array(2, 6, 6, 3))
    variables = jax.jit(Net().init)(jax.random.key(0), x)
    stored = tucker2(variables, ranks=(2, 3))
    formats = {path: row.format for path, row in compress.summary(stored).items()}
    assert formats == {
        path: "float32 Tucker-2 ranks 2x3" if "Conv" in path and "kernel" in path else "float32" for path in tree.paths(variables)
    }

    def loss(apply, variables, x):
        return jnp.sum(jnp.sin(apply(variables, x)) ** 2)

    @jax.jit
    def everything(stored, x):
        lifted = jax.value_and_grad(functools.partial(loss, compress.lift(Net().apply)), (0, 1))(stored, x)
        dense = jax.value_and_grad(lambda s, x: loss(Net().apply, compress.decompress(s), x), (0, 1))(stored, x)
        one = jax.vmap(compress.lift(lambda v, x: Net().apply(v, x[None])[0]), (None, 0))(stored, x)
        return lifted, dense, one, Net().apply(compress.decompress(stored), x)

    lifted, dense, one, want = everything(stored, x)
    jax.tree.map(functools.partial(_close, rtol=1e-3, atol=1e-4), lifted, dense)
    _close(one, want)


@pytest.mark.slow
def test_stacked_kernels_in_other_layouts_and_types():
    w = jnp.asarray(_array(2, 6, 8, 3, 3)).astype(jnp.bfloat16)
    stored = tucker2({"weight": w}, ranks=(3, 4), inputs=2, outputs=1, stacked=1, where="weight")
    leaf = stored["weight"]
    assert (leaf.first.shape, leaf.core.shape, leaf.last.shape) == ((2, 8, 3), (2, 4, 3, 3, 3), (2, 4, 6))
    assert (leaf.inputs, leaf.outputs, leaf.core.dtype, leaf.aval().shape) == (-3, -4, jnp.bfloat16, w.shape)
    one = tucker2({"weight": w[1]}, ranks=(3, 4), inputs=1, outputs=0, where="weight")["weight"]
    _close(leaf.materialise()[1].astype(jnp.float32), one.materialise().astype(jnp.float32), rtol=0.02, atol=0.02)
    apply = lambda p, x: lax.scan(  # noqa: E731
        lambda h, w: (h, lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))), x, p["weight"]
    )[1]
    x = jnp.asarray(_array(1, 8, 4, 4)).astype(jnp.bfloat16)
    got, want = compress.lift(apply)(stored, x), apply(compress.decompress(stored), x)
    assert got.dtype == want.dtype
    _close(got.astype(jnp.float32), want.astype(jnp.float32), rtol=0.1, atol=0.3)
    assert jax.tree.structure(manifest.rebuild(*manifest.describe(leaf))) == jax.tree.structure(leaf)


@pytest.mark.slow
def test_kernels_that_would_not_shrink_stay_dense():
    params = {"a": {"kernel": _array(3, 3, 8, 8)}, "b": {"kernel": _array(3, 3, 2, 4)}, "c": {"kernel": _array(8, 8)}}
    stored = tucker2(params, ranks=(4, 4), iterations=0)
    assert [tree.is_compressed(stored[name]["kernel"]) for name in "abc"] == [True, False, False]
    rough = tucker2(params, energy=0.5)["a"]["kernel"]
    error = np.sum((params["a"]["kernel"] - np.asarray(rough.materialise())) ** 2) / np.sum(params["a"]["kernel"] ** 2)
    assert 0 < error <= 2 * 0.5
    stored = tucker2(params, ranks={"b/kernel": (1, 2)}, iterations=0)
    assert [tree.is_compressed(stored[name]["kernel"]) for name in "abc"] == [False, True, False]
    by_rule = tucker2(params, ranks=(factor.by_evidence, 2), iterations=0)["a"]["kernel"]
    assert by_rule.first.shape[1] == 1  # of noise


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"takes ranks or an energy: give one", tucker2),
        (ValueError, r"energy=2 is no share", lambda p: tucker2(p, energy=2)),
        (ValueError, r"a/kernel of shape \(3, 3, 4, 4\): rank=0 does not fit", lambda p: tucker2(p, (0, 1))),
        (ValueError, r"with ranks=\(4, 4\) none of the 2 chosen weights would shrink: a/kernel", lambda p: tucker2(p, (4, 4))),
        (ValueError, r"ranks=\(4, 4\) store 176 numbers, no fewer than", lambda p: tucker2(p, {"a/kernel": (4, 4)})),
        (ValueError, r"b/kernel of shape \(4, 4\): .* leave no kernel", lambda p: tucker2(p, {"b/kernel": (1, 1)})),
        (ValueError, r"ranks is given for c, which is no chosen weight", lambda p: tucker2(p, {"c": (1, 1)})),
        (ValueError, r"a/kernel .* inputs=4 and outputs=-1 are no axes of it", lambda p: tucker2(p, (1, 1), inputs=4)),
        (ValueError, r"inputs=-1, outputs=-1 and stacked=0 leave no", lambda p: tucker2(p, (1, 1), inputs=-1)),
        (TypeError, r"a/kernel is compressed already", lambda p: tucker2(tucker2(p, (1, 1)), (1, 1))),
        (TypeError, r"a/kernel of shape .* the rank is chosen on the host", jax.jit(lambda p: tucker2(p, energy=0.5))),
        (ValueError, r"do not fit a core \(3, 1, 2\)", lambda p: Tucker2(jnp.ones((4, 2)), jnp.ones((3, 1, 2)), jnp.ones((2, 5)))),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_name_the_leaf(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call({"a": {"kernel": np.ones((3, 3, 4, 4), np.float32)}, "b": {"kernel": np.ones((4, 4), np.float32)}})
    assert "\n" not in str(caught.value)
