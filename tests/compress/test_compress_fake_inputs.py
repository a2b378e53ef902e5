"""Inputs that are rounded in training: values and gradients by hand, what freezes to what, and every way to a product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxopt_lab import checkpoint, compress, prune
from jaxopt_lab.compress import PACT, DynamicInputs, LearnedInputs, fake_quantize, fake_quantize_inputs, freeze, lift


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


def _times(p, x):
    return x @ p["kernel"]


SIGNED, POSITIVE = {"kernel": (-1.5, 2.0)}, {"kernel": (0.0, 2.0)}
LEAVES = {
    "dynamic": functools.partial(fake_quantize_inputs, leaf=DynamicInputs),
    "learned": functools.partial(fake_quantize_inputs, leaf=LearnedInputs, ranges=SIGNED),
    "learned from 0": functools.partial(fake_quantize_inputs, leaf=LearnedInputs, ranges=POSITIVE),
    "ceiling": functools.partial(fake_quantize_inputs, leaf=PACT, ranges=POSITIVE),
}


def test_a_learned_step_has_the_gradient_of_the_paper():
    x, w = np.array([[0.3, -0.9, 2.2], [-7.0, 1.24, 0.0]], np.float32), np.array([[1.0], [-2.0], [0.5]], np.float32)
    leaf = fake_quantize_inputs({"kernel": jnp.asarray(w)}, 3, "kernel", leaf=LearnedInputs, ranges={"kernel": (-1.5, 1.0)})
    step = 0.5  # 1.5 over the largest code, 3
    np.testing.assert_allclose(leaf["kernel"].step, [[step]])
    values, pullback = jax.vjp(lift(_times), leaf, jnp.asarray(x))
    grads, dx = pullback(jnp.ones((2, 1)))
    codes, ds = np.zeros((2, 3)), 0.0
    for i in range(2):
        for j in range(3):
            v = x[i, j] / step
            inside = -3 <= v <= 3
            codes[i, j] = round(float(v)) if inside else 3 * np.sign(v)
            ds += w[j, 0] * (codes[i, j] - v if inside else codes[i, j])
            assert dx[i, j] == (w[j, 0] if inside else 0)
    np.testing.assert_allclose(values, codes * step @ w, rtol=1e-6)
    np.testing.assert_allclose(grads["kernel"].inner.weight[:, 0], (codes * step).sum(0), rtol=1e-6)
    # Three inputs an example share the step.
    np.testing.assert_allclose(grads["kernel"].step, [[ds / np.sqrt(3 * 3)]], rtol=1e-5)


def test_a_ceiling_is_moved_by_what_it_cuts_off():
    leaf = fake_quantize_inputs({"kernel": jnp.array([[1.0], [3.0]])}, 2, "kernel", leaf=PACT, ranges={"kernel": (0.0, 1.5)})
    values, pullback = jax.vjp(lift(_times), leaf, jnp.array([[0.4, 5.0], [-1.0, 1.2]]))
    grads, dx = pullback(jnp.ones((2, 1)))
    np.testing.assert_allclose(values, [[0.5 + 3 * 1.5], [3 * 1.0]])
    np.testing.assert_allclose(dx, [[1, 0], [0, 3]])
    np.testing.assert_allclose(grads["kernel"].ceiling, [[3.0]])


def test_each_row_has_a_scale_of_its_own_and_the_gradient_passes():
    leaf = fake_quantize_inputs({"kernel": jnp.array([[1.0], [10.0]])}, 2, "kernel")
    values, dx = jax.value_and_grad(lambda x: lift(_times)(leaf, x).sum())(jnp.array([[4.0, 1.0], [0.2, 0.5]]))
    assert float(values) == 4.0 + 5.0
    np.testing.assert_array_equal(dx, [[1, 10], [1, 10]])


def _apply(p, x):
    """A convolution, one in groups and a product, each of the input: all that rounds it."""
    convolve = functools.partial(lax.conv_general_dilated, x, window_strides=(1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    grouped = convolve(p["grouped"], padding="VALID", feature_group_count=2)
    return convolve(p["conv"], padding="SAME"), grouped, x.reshape(x.shape[0], -1) @ p["dense"]


def _convolutional():
    params = {"conv": _normal(3, 3, 2, 4), "grouped": _normal(2, 2, 1, 4, seed=1), "dense": _normal(18, 3, seed=2)}
    return params, jnp.abs(_normal(4, 3, 3, 2, seed=3))


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAVES)
def test_what_is_frozen_is_what_was_trained(name):
    params, x = _convolutional()
    ranges = dict.fromkeys(params, next(iter(SIGNED.values() if name == "learned" else POSITIVE.values())))
    make = functools.partial(LEAVES[name], **({} if name == "dynamic" else {"ranges": ranges}))
    for bits in (3, 8):
        trained = make(fake_quantize(params, 4, where="*", leaf=compress.LearnedStep), bits, "*")
        stored = freeze(trained)
        kind = compress.DynamicQuantized if name == "dynamic" else compress.StaticQuantized
        assert {type(leaf) for leaf in stored.values()} == {kind}
        assert {leaf.input_bits for leaf in stored.values()} == {bits}
        run = jax.jit(lift(_apply))
        for got, want, dense in zip(run(stored, x), run(trained, x), _apply(params, x), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
            assert float(jnp.abs(want - dense).max()) > 1e-2


@pytest.mark.parametrize("inner", [compress.quantize, functools.partial(compress.low_rank, rank=1), compress.cluster, lambda p: p])
def test_other_weights_go_on_rounding_their_inputs(inner):
    params = inner({"kernel": _normal(6, 4)})
    trained = fake_quantize_inputs(params, 2, amount=0.5)
    stored, x = freeze(trained), _normal(3, 6, seed=1)
    rounded = np.abs(x).max(1, keepdims=True) * np.round(x / np.abs(x).max(1, keepdims=True))
    weight = compress.decompress(params)["kernel"]
    np.testing.assert_allclose(lift(_times)(trained, x), (x + rounded) / 2 @ weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lift(_times)(stored, x), rounded @ weight, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", LEAVES)
def test_no_way_to_a_product_loses_the_rounding(name):
    # Inputs that half precision holds.
    w, x = _normal(6, 4), jnp.abs(_normal(2, 6, seed=1)).astype(jnp.bfloat16).astype(jnp.float32)
    leaf = LEAVES[name]({"kernel": w}, 2)["kernel"]
    want = lift(lambda w, x: x @ w)(leaf, x)
    assert float(jnp.abs(want - x @ w).max()) > 0.1
    turned = LEAVES[name]({"kernel": w.T}, 2)["kernel"]
    ways = {
        "transposed": lift(lambda w, x: x @ w.T)(turned, x),
        "on the left": lift(lambda w, x: (w @ x.T).T)(turned, x),
        "cast": lift(lambda w, x: x @ w.astype(jnp.float64 if jax.config.jax_enable_x64 else jnp.float32))(leaf, x),
        "reshaped": lift(lambda w, x: jnp.einsum("bi,ijk->bjk", x, w.reshape(6, 2, 2)).reshape(2, 4))(leaf, x),
        "by an axis more": lift(lambda w, x: jnp.squeeze(x[None] @ w[None], 0))(leaf, x),
        "mapped": lift(lambda w, x: jax.vmap(lambda x: x @ w)(x[:, None])[:, 0])(leaf, x),
        "in half precision": lift(lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))(leaf, x),
    }
    for way, got in ways.items():
        rough = way == "in half precision"
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0.03 if rough else 1e-5, atol=0.03 if rough else 1e-5)


def _layers(weights, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]


@pytest.mark.parametrize("weights", ["dense", "rounded together", "rounded each"])
def test_layers_of_a_scan_have_ranges_of_their_own(weights):
    params, x = {"kernel": _normal(3, 4, 4)}, _normal(5, 4, seed=1)
    ranges = compress.calibrate(lambda p, x: _layers(p["kernel"], x), params, [x])
    assert ranges["kernel"].low.shape == (3,)
    if weights != "dense":
        params = fake_quantize(params, 8, axis=(0, -1) if weights == "rounded each" else None)
    trained = fake_quantize_inputs(params, 4, leaf=LearnedInputs, ranges=ranges)["kernel"]
    assert trained.step.shape == (3, 1, 1)

    def by_hand(weight, x):
        for w, (low, high) in zip(weight, np.stack([ranges["kernel"].low, ranges["kernel"].high], 1), strict=True):
            step = max(-low, high) / 7
            x = np.tanh(np.clip(np.round(x / step), -7, 7) * step @ w)
        return x

    want = by_hand(np.asarray(trained.materialise()), np.asarray(x))
    np.testing.assert_allclose(lift(_layers)(trained, x), want, rtol=1e-4, atol=1e-5)
    if weights == "rounded each":
        stored = freeze({"kernel": trained})["kernel"]
        program = str(jax.make_jaxpr(lift(_layers))(stored, x))
        assert "preferred_element_type=int32" in program
        np.testing.assert_allclose(lift(_layers)(stored, x), want, rtol=1e-4, atol=1e-5)
        # The same as calibrated and stored at once; and all layers on one input.
        quantized = compress.quantize({"kernel": trained.inner.w}, axis=(0, -1))
        static = compress.static(quantized, ranges, symmetric=True, input_bits=4)["kernel"]
        np.testing.assert_allclose(lift(_layers)(static, x), want, rtol=1e-4, atol=1e-5)
    each = lift(lambda w, x: jax.vmap(lambda w: x @ w)(w))(trained, x)
    steps, x = trained.step.ravel().tolist(), np.asarray(x)
    alone = [np.clip(np.round(x / s), -7, 7) * s @ w for s, w in zip(steps, np.asarray(trained.materialise()), strict=True)]
    np.testing.assert_allclose(each, np.stack(alone), rtol=1e-4, atol=1e-5)


def test_optimisers_move_weights_and_steps_and_decay_the_weights_alone():
    params = fake_quantize_inputs(
        fake_quantize({"kernel": _normal(8, 4), "bias": jnp.ones(4)}, 8), 8, leaf=LearnedInputs, ranges={"kernel": (-2.0, 2.0)}
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = compress.optimizer(optax.adamw(0.1, weight_decay=0.5))
    updates, _ = tx.update(zeros, tx.init(params), params)
    moved = optax.apply_updates(params, updates)["kernel"]
    np.testing.assert_allclose(moved.inner.w, params["kernel"].inner.w * 0.95, rtol=1e-6)
    np.testing.assert_array_equal(moved.step, params["kernel"].step)
    grads = jax.grad(lambda p, x: (lift(_times)(p, x) ** 2).sum(), allow_int=True)(params, _normal(3, 8, seed=2))
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = optax.apply_updates(params, updates)["kernel"]
    assert float(jnp.abs(moved.step - params["kernel"].step).max()) > 0.05
    assert float(jnp.abs(moved.inner.w / params["kernel"].inner.w - 0.95).min()) > 1e-3

    tx = compress.optimizer(prune.sparsify(optax.adamw(0.1), 0.5, begin=0, end=2, every=1))
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert float((params["kernel"].inner.w == 0).mean()) == 0.5
    assert float((freeze(params)["kernel"].signed_codes() == 0).mean()) >= 0.5


def test_a_schedule_moves_both_amounts():
    params = fake_quantize_inputs(fake_quantize({"kernel": jnp.ones((2, 2))}, amount=0.0), amount=0.0)
    tx = compress.anneal(optax.sgd(0.1), amount=lambda count: count / 4, bits=lambda count: 4)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    leaf = optax.apply_updates(params, updates)["kernel"]
    assert (float(leaf.amount[0, 0]), float(leaf.inner.amount), float(leaf.inner.bits), leaf.bits) == (0.25, 0.25, 4.0, 8)


@pytest.mark.slow
def test_on_disk_and_sharded(tmp_path):
    params = {"kernel": _normal(8, 4)}
    trees = {name: make(fake_quantize(params), 4) for name, make in LEAVES.items()}
    trees["clustered"] = fake_quantize(compress.cluster(params, k=4))
    checkpoint.save_tree(tmp_path / "kept", trees)
    back = checkpoint.load_tree(tmp_path / "kept")
    assert jax.tree.structure(back) == jax.tree.structure(trees)
    x, mesh = jnp.abs(_normal(8, 8, seed=1)), jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))

    def all_of(trees, x):
        return {name: lift(_times)(tree, x) for name, tree in trees.items()}

    for name, got in jax.jit(all_of)(back, spread).items():
        np.testing.assert_allclose(got, lift(_times)(trees[name], x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_is_clustered_stays_clustered_while_its_values_are_rounded():
    w = jnp.where(jnp.abs(_normal(12, 8)) < 0.5, 0.0, _normal(12, 8))
    clustered = compress.cluster({"kernel": w}, k=6, preserve_zero=True)
    params = fake_quantize(clustered, 4, leaf=compress.LearnedStep)
    assert "LearnedStep" in params["kernel"].format()
    x, y = _normal(16, 12, seed=1), _normal(16, 8, seed=2)
    tx = compress.optimizer(optax.chain(optax.add_decayed_weights(10.0), optax.sgd(0.01)))

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((lift(_times)(p, x) - y) ** 2), allow_int=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    leaf, stored = params["kernel"], freeze(params)["kernel"]
    np.testing.assert_array_equal(stored.materialise(), leaf.materialise())
    for before, after in zip(jax.tree.leaves(leaf.indices), jax.tree.leaves(clustered["kernel"].indices), strict=True):
        np.testing.assert_array_equal(before, after)
    values = np.unique(np.asarray(stored.materialise()))
    assert len(values) <= 6
    assert 0.0 in values
    assert bool((stored.materialise() == 0)[clustered["kernel"].materialise() == 0].all())
    assert bool((stored.materialise() == 0)[w == 0].all())
    # On the grid of four bits, as integers times the step that was trained.
    codes = stored.codebook / jnp.abs(leaf.codebook.step)
    np.testing.assert_allclose(codes, jnp.round(codes), atol=1e-5)
    assert float(jnp.abs(codes).max()) <= 7.001
    # A decay of ten a step would have taken all: values are no weights.
    assert float(jnp.abs(leaf.codebook.w).max()) > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: fake_quantize_inputs(p, 1), "bits=1: inputs are rounded to 2 to 8 bits"),
        (lambda p: fake_quantize_inputs(p, amount=1.5), r"amount=1.5 must lie in \[0, 1\]"),
        (lambda p: fake_quantize_inputs(p, leaf=LearnedInputs), r"kernel of shape \(4, 2\): LearnedInputs starts from a range"),
        (lambda p: fake_quantize_inputs(p, leaf=PACT, ranges={}), r"kernel of shape \(4, 2\): ranges has no entry for it"),
        (
            lambda p: fake_quantize_inputs(p, leaf=PACT, ranges={"kernel": (-1.0, 1.0)}),
            "inputs reach down to -1; use LearnedInputs",
        ),
        (lambda p: fake_quantize_inputs(p, leaf=PACT, ranges={"kernel": (0.0, jnp.inf)}), "a range is two finite numbers"),
        (lambda p: fake_quantize_inputs(p, leaf=PACT, ranges={"kernel": (jnp.zeros(3), 1.0)}), "a range is two finite numbers"),
        (
            lambda p: fake_quantize_inputs(fake_quantize_inputs(p)),
            r"kernel of shape \(4, 2\): it is stored as DynamicInputs, which rounds",
        ),
        (
            lambda p: fake_quantize_inputs(compress.dynamic(p)),
            r"kernel of shape \(4, 2\): it is stored as DynamicQuantized, which rounds",
        ),
        (lambda p: compress.dynamic(p, input_bits=1), "input_bits=1: activations are rounded to 2 to 8 bits"),
        (lambda p: fake_quantize(fake_quantize(p)), "kernel is compressed already, as StraightThrough"),
    ],
)
def test_what_cannot_be_is_said(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call({"kernel": _normal(4, 2)})
