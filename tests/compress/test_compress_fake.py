"""Weights that train as if they were stored in few bits: values and gradients by hand, what freezes to what, and schedules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import compress, nets, prune, train
from jaxopt_lab.compress.arrays import fake


def test_the_gradient_passes_inside_the_range_and_not_outside():
    w = jnp.array([0.24, -0.26, 1.5, -1.74, -1.76, 7.0])
    values, pullback = jax.vjp(lambda w: fake.straight_through_codes(w, jnp.array([0.5]), 3), w)
    np.testing.assert_allclose(values, [0.0, -0.5, 1.5, -1.5, -1.5, 1.5])
    np.testing.assert_array_equal(pullback(jnp.arange(1.0, 7.0))[0], [1, 2, 3, 4, 0, 0])


def test_learned_steps_have_the_gradient_of_the_paper():
    w = np.array([[0.3, -0.9, 2.2, 0.5], [-7.0, 1.24, 0.0, -1.5]], np.float32)
    step, high = np.array([[0.5], [0.4]], np.float32), 3
    seed = np.array([[1.0, -2.0, 0.5, 3.0], [2.0, 1.0, -1.0, 0.5]], np.float32)
    values, pullback = jax.vjp(lambda w, s: fake.learned_step(w, s, high), jnp.asarray(w), jnp.asarray(step))
    dw, ds = pullback(jnp.asarray(seed))
    for i in range(2):
        total = 0.0
        for j in range(4):
            v = w[i, j] / step[i, 0]
            inside = -high <= v <= high
            code = round(float(v)) if inside else int(np.sign(v)) * high
            assert values[i, j] == pytest.approx(code * step[i, 0], rel=1e-6)
            assert dw[i, j] == pytest.approx(seed[i, j] if inside else 0.0, rel=1e-6)
            total += seed[i, j] * (code - v if inside else code)
        assert ds[i, 0] == pytest.approx(total / np.sqrt(4 * high), rel=1e-5)


def test_activations_clip_at_a_trained_ceiling():
    x = jnp.array([-1.0, 0.3, 1.4, 2.0, 5.0])
    values, pullback = jax.vjp(lambda x, a: fake.pact(x, a, 2), x, jnp.array([2.0]))
    np.testing.assert_allclose(values, [0.0, 0.0, 4 / 3, 2.0, 2.0], rtol=1e-6)
    dx, dalpha = pullback(jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    np.testing.assert_array_equal(dx, [0, 2, 3, 0, 0])
    np.testing.assert_array_equal(dalpha, [9])


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_dorefa_weights_take_equally_spaced_values_without_zero(bits):
    w = jax.random.normal(jax.random.key(0), (200,))
    values = np.unique(np.asarray(fake.dorefa(w, bits)).round(6))
    np.testing.assert_allclose(values, np.linspace(-1, 1, 2**bits), atol=1e-6)
    slope = jax.grad(lambda w: fake.dorefa(w, bits).sum())(w)
    largest = float(jnp.max(jnp.abs(jnp.tanh(w))))
    middling = jnp.abs(w) < 1.5
    np.testing.assert_allclose(slope[middling], ((1 - jnp.tanh(w) ** 2) / largest)[middling], rtol=1e-4)


def test_rounding_at_random_keeps_the_mean():
    x = jnp.full(20_000, 2.3)
    rounded = fake.stochastic_round(x, jax.random.key(0))
    assert set(np.unique(rounded)) == {2.0, 3.0}
    # Five deviations of the mean of a Bernoulli draw.
    assert float(rounded.mean()) == pytest.approx(2.3, abs=5 * np.sqrt(0.3 * 0.7 / 20_000))


def _params():
    return {"kernel": jax.random.normal(jax.random.key(1), (6, 5)), "bias": jnp.ones(5)}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("leaf", [compress.StraightThrough, compress.LearnedStep])
def test_what_is_frozen_is_what_was_trained(leaf, bits):
    params = compress.fake_quantize(_params(), bits, where="kernel", leaf=leaf)
    stored = compress.freeze(params)
    assert isinstance(stored["kernel"], compress.Quantized)
    np.testing.assert_allclose(stored["kernel"].materialise(), params["kernel"].materialise(), rtol=1e-6)
    if leaf is compress.StraightThrough:
        np.testing.assert_array_equal(
            stored["kernel"].materialise(), compress.quantize(_params(), bits, where="kernel")["kernel"].materialise()
        )
    assert params["kernel"].format() == f"{leaf.__name__} of float32, {bits} bits"


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_squashed_weights_freeze_to_a_codebook(bits):
    params = compress.fake_quantize(_params(), bits, where="kernel", leaf=compress.DoReFa)
    stored = compress.freeze(params)["kernel"]
    assert isinstance(stored, compress.Clustered)
    assert stored.codebook.size == 2**bits
    np.testing.assert_allclose(stored.materialise(), params["kernel"].materialise(), atol=1e-6)


@pytest.mark.parametrize("axis", [-1, 0, None, (0, 1)])
def test_every_channel_has_its_scale(axis):
    params = compress.fake_quantize(_params(), 4, axis, where="kernel", leaf=compress.LearnedStep)
    plain = compress.quantize(_params(), 8, axis, where="kernel")
    assert params["kernel"].step.shape == plain["kernel"].scale.shape


@pytest.mark.slow
def test_half_precision_stays_and_the_lifted_product_has_its_gradient():
    params = compress.fake_quantize({"kernel": _params()["kernel"].astype(jnp.bfloat16)}, 4, where="kernel")
    assert params["kernel"].materialise().dtype == jnp.bfloat16
    x = jnp.ones((3, 6), jnp.bfloat16)
    loss = compress.lift(lambda p: jnp.sum((x @ p["kernel"]).astype(jnp.float32)))
    grads = jax.grad(loss, allow_int=True)(params)
    np.testing.assert_array_equal(grads["kernel"].w, jnp.full((6, 5), 3, jnp.bfloat16))


def test_the_amount_mixes_and_schedules_land_without_compiling_again():
    w = _params()["kernel"]
    half = compress.fake_quantize({"kernel": w}, 2, where="kernel", amount=0.5)["kernel"].materialise()
    whole = compress.fake_quantize({"kernel": w}, 2, where="kernel")["kernel"].materialise()
    np.testing.assert_allclose(half, (w + whole) / 2, rtol=1e-6)

    params = compress.fake_quantize({"kernel": w}, 8, where="kernel", amount=0.0, key=jax.random.key(3))
    tx = compress.anneal(optax.adamw(1e-2), amount=lambda count: count / 3, bits=lambda count: 8 - 2 * count)
    compilations = 0

    @jax.jit
    def step(params, state):
        nonlocal compilations
        compilations += 1
        grads = jax.grad(compress.lift(lambda p: jnp.sum(jnp.sin(p["kernel"]))), allow_int=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, seeds = tx.init(params), [np.asarray(params["kernel"].seed)]
    for count in (1, 2, 3):
        params, state = step(params, state)
        leaf = params["kernel"]
        assert float(leaf.amount) == pytest.approx(count / 3)
        assert float(leaf.bits) == 8 - 2 * count
        assert leaf.seed.dtype == jnp.uint32
        seeds.append(np.asarray(leaf.seed))
    assert compilations == 1
    assert float(leaf.amount) == 1.0
    assert len({seed.tobytes() for seed in seeds}) == 4
    assert len(np.unique(np.asarray(leaf.quantized()) / np.asarray(leaf.scale))) <= 3
    assert compress.optimizer(tx) is tx


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


@pytest.mark.slow
@pytest.mark.parametrize("leaf", [compress.StraightThrough, compress.LearnedStep])
def test_training_in_few_bits_fits_and_what_is_sparse_stays_sparse(leaf):
    x = jax.random.normal(jax.random.key(0), (64, 4))
    batch = {"x": x, "y": jnp.argmax(x[:, :3] + x[:, 1:], axis=1)}
    model = nets.from_linen(Net())
    variables = model.init(jax.random.key(1), x)
    variables["params"] = compress.fake_quantize(variables["params"], 3, leaf=leaf)
    tx = prune.sparsify(optax.adam(2e-2), 0.5, begin=20)
    loss = lambda outputs, batch: optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])  # noqa: E731
    state = train.init(model, tx, jax.random.key(2), batch, variables)
    step = jax.jit(train.make_step(model, loss, tx))
    losses = []
    for _ in range(80):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]

    assert float(prune.sparsity(state.params).total) >= 0.5
    masks = prune.masks(state.opt_state)
    stored = compress.freeze(state.params)
    for name in ("Dense_0", "Dense_1"):
        weights = stored[name]["kernel"].materialise()
        assert weights.shape == masks[name]["kernel"].shape
        assert not bool(jnp.any(weights[~masks[name]["kernel"]]))
        assert len(np.unique(np.asarray(stored[name]["kernel"].codes))) <= 7
    dense = {"params": state.params}
    np.testing.assert_allclose(
        jax.jit(compress.lift(model.predict))({"params": stored}, x),
        jax.jit(compress.lift(model.predict))(dense, x),
        rtol=1e-4,
        atol=1e-5,
    )


def test_bad_input_is_named():
    for options, message in (
        ({"bits": 1}, r"^bits=1: StraightThrough trains weights of 2 to 8 bits"),
        ({"bits": 9}, r"^bits=9"),
        ({"amount": 1.5}, r"^amount=1\.5 must lie in \[0, 1\]"),
        ({"leaf": compress.LearnedStep, "key": jax.random.key(0)}, r"^key: LearnedStep rounds to nearest"),
        ({"axis": 2}, r"^axis=2 does not name distinct axes"),
        ({"where": "nothing"}, r"^nothing matches where='nothing'"),
    ):
        with pytest.raises(ValueError, match=message):
            compress.fake_quantize(_params(), **{"where": "kernel", **options})
    with pytest.raises(ValueError, match=r"^kernel of shape \(2,\) holds NaN or infinite weights"):
        compress.fake_quantize({"kernel": jnp.array([1.0, jnp.nan])}, where="kernel")
    with pytest.raises(TypeError, match=r"^kernel has dtype int32"):
        compress.fake_quantize({"kernel": jnp.arange(3)}, where="kernel")
    with pytest.raises(TypeError, match=r"^kernel is compressed already, as Quantized"):
        compress.fake_quantize(compress.quantize(_params(), where="kernel"), where="kernel")
    with pytest.raises(ValueError, match=r"^freeze needs to know how many bits"):
        jax.jit(compress.freeze)(compress.fake_quantize(_params(), where="kernel"))
