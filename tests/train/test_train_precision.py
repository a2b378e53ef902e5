"""16-bit numbers in the model alone, a loss scale that only small gradients notice, and the forward pass computed again."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import compress, nets, parallel, prune, train
from jaxopt_lab.train import guard
from jaxopt_lab.train.precision import cast

KEY = jax.random.key(2)
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((8, 3), dtype=np.float32), RNG.standard_normal(8, dtype=np.float32)
BATCH = {"x": X, "y": Y}
LINEAR = nets.from_functions(lambda key, x: {"w": jax.random.normal(key, (3,))}, lambda p, x: x @ p["w"])
SCALAR = nets.from_functions(lambda key, x: {"w": jnp.ones(())}, lambda p, x: p["w"] * x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.Dropout(0.2, deterministic=not train)(nn.relu(x)))[:, 0]


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)[:, 0]


NET, DENSE = nets.from_linen(Net()), nets.from_linen(Dense())


def squared(outputs, batch):
    return (outputs - batch["y"]) ** 2


def penalty(params):
    return 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def close(one, other, tolerance=1e-6):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other)


@pytest.mark.parametrize("dtype", [jnp.float16, "bfloat16"])
def test_who_sees_which_type(dtype):
    seen = {}

    def apply(variables, x, ids, train):
        params, stats = variables["params"], variables["stats"]
        seen.update(w=params["w"].dtype, x=x.dtype, ids=ids.dtype, mean=stats["mean"].dtype)
        return x * params["w"][ids], {"stats": {"mean": x.mean(), "steps": stats["steps"] + 1}}

    def loss(outputs, batch):
        seen.update(outputs=outputs.dtype, target=batch["y"].dtype)
        return outputs

    def update(updates, state, params):
        seen.update(gradient=updates["w"].dtype)
        return updates, state

    def regular(params):
        seen.update(penalty=params["w"].dtype)
        return jnp.sum(params["w"])

    first = {"params": {"w": jnp.ones(4)}, "stats": {"mean": jnp.zeros(()), "steps": jnp.int32(0)}}
    model = nets.from_functions(lambda key, x, ids: first, apply, stateful=True)
    tx = optax.GradientTransformation(lambda params: (), update)
    batch = {"x": (X[:, 0], np.arange(8, dtype=np.int32) % 4), "y": Y}
    state = train.init(model, tx, KEY, batch)
    new, _ = train.make_step(model, loss, tx, penalty=regular, precision=dtype)(state, batch)
    narrow, full = jnp.dtype(dtype), jnp.dtype("float32")
    floats = {"w": narrow, "x": narrow, "mean": full, "outputs": full, "target": full, "gradient": full, "penalty": full}
    assert seen == {**floats, "ids": jnp.int32}
    assert jax.tree.map(lambda leaf: leaf.dtype, new) == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert int(new.model_state["stats"]["steps"]) == 1
    # The mean of numbers of 8 or 11 bits.
    np.testing.assert_allclose(new.model_state["stats"]["mean"], X[:, 0].mean(), atol=0.02)


def test_masters_gather_what_16_bits_would_lose():
    batch = {"x": np.ones(2, np.float32), "y": np.zeros(2, np.float32)}
    tx = optax.sgd(2.0**-10)
    step = jax.jit(train.make_step(SCALAR, lambda out, batch: out, tx, precision=jnp.bfloat16))
    state = train.init(SCALAR, tx, KEY, batch)
    for k in range(1, 5):
        # 1 - 2^-10 is 1 in bfloat16, whose next smaller number is 1 - 2^-8.
        state, metrics = step(state, batch)
        assert float(state.params["w"]) == 1 - k * 2.0**-10
        # What the model sees: the master before this step, rounded, half to even.
        assert float(metrics["loss"]) == (1.0 if k < 4 else 1 - 2.0**-8)


def test_near_the_step_in_full_precision():
    tx = optax.sgd(0.1)
    state = train.init(NET, tx, KEY, X)
    full, half = (jax.jit(train.make_step(NET, squared, tx, precision=dtype))(state, BATCH)[0] for dtype in (None, jnp.bfloat16))
    close((full.params, full.model_state), (half.params, half.model_state), 20 * 2.0**-8)
    assert any((a != b).any() for a, b in zip(*(jax.tree.leaves(s.params) for s in (full, half)), strict=True))
    assert {leaf.dtype for leaf in jax.tree.leaves((half.params, half.model_state))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("precision", [jnp.int8, "half-ish", jnp.float8_e4m3fn, jnp.complex64, np.float64])
def test_no_type_to_compute_in(precision):
    with pytest.raises(ValueError, match=r"^precision must be jnp\.bfloat16, jnp\.float16, jnp\.float32 or None .*; got"):
        train.make_step(LINEAR, squared, optax.sgd(0.1), precision=precision)


def test_compressed_leaves_are_not_cast():
    params = compress.quantize({"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, where="kernel")
    narrow = cast(params, jnp.dtype("float16"))
    assert narrow["bias"].dtype == jnp.float16
    assert narrow["kernel"] is params["kernel"]


def test_the_scale_by_hand():
    tx = train.loss_scaled(optax.sgd(1.0, momentum=0.5), initial=4.0, factor=4.0, every=2, minimum=2.0)
    state = tx.init({"w": jnp.zeros(2)})
    rows = []
    for value in (4, 4, 16, np.inf, np.nan, np.nan, 2, 2):
        update, state = jax.jit(tx.update)({"w": jnp.array([1.0, value])}, state)
        rows.append((float(state.scale), int(state.good), int(state.overflows), np.asarray(update["w"]).tolist()))
    assert rows == [
        (4, 1, 0, [-0.25, -1]),
        (16, 0, 0, [-0.375, -1.5]),
        (16, 1, 0, [-0.25, -1.75]),
        (4, 0, 1, [0, 0]),
        (2, 0, 2, [0, 0]),
        (2, 0, 3, [0, 0]),
        # The momentum is that before the overflows, halved.
        (2, 1, 3, [-0.625, -1.875]),
        (8, 0, 3, [-0.8125, -1.9375]),
    ]


def test_the_scale_stays_finite():
    tx = train.loss_scaled(optax.sgd(1.0), initial=2.0**127, every=1)
    state = tx.init(jnp.ones(()))
    for _ in range(3):
        _, state = tx.update(jnp.float32(1.0), state)
    assert float(state.scale) == 2.0**127


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 0.0}, "initial of loss_scaled must be finite and above 0; got 0.0"),
        ({"minimum": float("nan")}, "minimum of loss_scaled must be finite and above 0; got nan"),
        ({"factor": 1.0}, "factor of loss_scaled must be finite and above 1; got 1.0"),
        ({"every": 0}, "every of loss_scaled must be at least 1; got 0"),
    ],
)
def test_a_scale_that_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        train.loss_scaled(optax.sgd(0.1), **options)


@pytest.mark.parametrize("wrap", [lambda tx: optax.chain(optax.clip(1.0), tx), lambda tx: optax.MultiSteps(tx, 2)])
def test_a_scale_inside_of_another_transform_is_refused(wrap):
    tx = wrap(train.loss_scaled(optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"loss_scaled must be the outermost transform.*inside of a (tuple|MultiStepsState)"):
        train.make_step(LINEAR, squared, tx)(train.init(LINEAR, tx, KEY, X), BATCH)
    assert train.loss_scale(optax.adam(0.1).init(jnp.ones(2))) is None


def searched(seen):
    """Gradient descent along the gradient of `value_fn`, at half the rate if the value is above 0."""

    def update(updates, state, params, *, value, grad, value_fn):
        seen.update(value=value, grad=grad, updates=updates)
        return jax.tree.map(lambda g: -0.1 * g, jax.grad(value_fn)(params)), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


OPTIMISERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "clip": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "sparsify": prune.sparsify(optax.sgd(0.1), 0.5, begin=0, end=3, every=1, where="**"),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1), 2),
    "line_search": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(8)),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_scale_is_invisible_where_nothing_overflows(name):
    plain, scaled = OPTIMISERS[name], train.loss_scaled(OPTIMISERS[name], every=2)
    one, other = (train.init(LINEAR, each, KEY, X) for each in (plain, scaled))
    steps = [jax.jit(train.make_step(LINEAR, squared, each, penalty=penalty)) for each in (plain, scaled)]
    for _ in range(3):
        one, metrics = steps[0](one, BATCH)
        other, scaled_metrics = steps[1](other, BATCH)
    close((one.params, one.opt_state, metrics), (other.params, other.opt_state.inner_state, scaled_metrics), 3e-6)
    assert float(train.loss_scale(other.opt_state)) == 2.0**16
    if name == "sparsify":
        close(prune.masks(other.opt_state), prune.masks(one.opt_state))


def test_what_the_optimiser_gets_is_not_scaled():
    seen = {}
    tx = train.loss_scaled(searched(seen))
    state = train.init(LINEAR, tx, KEY, X)
    new, metrics = train.make_step(LINEAR, squared, tx, penalty=penalty)(state, BATCH)
    close(seen["value"], metrics["loss"] + metrics["penalty"])
    close(seen["grad"], seen["updates"])
    w = np.asarray(state.params["w"], np.float64)
    close(new.params["w"], w - 0.1 * (2 * ((X @ w - Y)[:, None] * X).mean(0) + 0.2 * w))


def test_a_scale_with_compressed_leaves():
    variables = {"params": compress.fake_quantize(jax.jit(DENSE.init)(KEY, X)["params"], where="**/kernel")}
    tx = optax.adamw(0.1)
    states = []
    for each in (tx, train.loss_scaled(tx), train.loss_scaled(compress.optimizer(tx))):
        state = train.init(DENSE, each, KEY, X, variables=variables)
        states.append(jax.jit(train.make_step(DENSE, squared, each))(state, BATCH)[0].params)
    close(states[0], states[1], 3e-6)
    close(states[0], states[2], 3e-6)


# float16 has no number between 0 and 6e-8. The gradient of the output is 1e-4, that of the weight 1e-8.
SMALL = {"x": np.full(2, 1e-4, np.float32)}


@pytest.mark.parametrize("scaled", [False, True])
def test_a_scale_saves_small_gradients(scaled):
    tx = optax.sgd(1e7)
    tx = train.loss_scaled(tx) if scaled else tx
    state = train.init(SCALAR, tx, KEY, SMALL)
    new, metrics = jax.jit(train.make_step(SCALAR, lambda out, batch: 1e-4 * out, tx, precision=jnp.float16))(state, SMALL)
    np.testing.assert_allclose(new.params["w"], 1 - 1e7 * 1e-8 if scaled else 1.0, rtol=1e-3)
    np.testing.assert_allclose(metrics["loss"], 1e-8, rtol=1e-3)


@pytest.mark.parametrize("on_many", [False, True])
def test_an_overflow_is_passed_over_and_the_scale_falls(on_many):
    tx = train.loss_scaled(optax.sgd(0.1, momentum=0.9), initial=2.0**23)
    options = {"precision": jnp.float16, "guard": True, "axis_name": "d" if on_many else None}
    step = train.make_step(SCALAR, lambda out, batch: out, tx, **options)
    run = parallel.pmap(step) if on_many else jax.jit(step)
    batch = {"x": np.eye(8, dtype=np.float32)[0]}
    state = start = train.init(SCALAR, tx, KEY, batch)
    scales, skipped, overflowed = [], [], []
    for _ in range(6):
        state, metrics = run(state, batch)
        scales.append(float(train.loss_scale(state.opt_state)))
        skipped.append(float(metrics["skipped"]))
        overflowed.append(float(metrics["overflowed"]))
        if overflowed[-1]:
            assert float(state.params["w"]) == 1
            assert guard.offender(state, metrics["nonfinite"]) == "gradient of w"
    # In float16 the gradient of one row of eight is scale / 8, on however many devices, and 2^16 is infinite.
    assert scales == [2.0**22, 2.0**21, 2.0**20, 2.0**19, 2.0**18, 2.0**18]
    assert (overflowed, skipped) == ([1, 1, 1, 1, 1, 0], [0] * 6)
    np.testing.assert_allclose(state.params["w"], 1 - 0.1 / 8, rtol=1e-6)
    assert int(state.opt_state.overflows) == 5
    assert int(state.step) == 6
    assert float(start.params["w"]) == 1


def test_only_what_the_scale_does_not_account_for_is_a_skip():
    """A scale that finds its place in three steps, two batches that are bad, and gradients too large for the least scale."""
    tx = train.loss_scaled(optax.sgd(0.1), initial=2.0**18, every=100, minimum=2.0**12)
    step = train.make_step(SCALAR, lambda out, batch: out, tx, precision=jnp.float16, guard=True)
    one, huge, bad = (np.float32([v]) for v in (1, 60_000, np.nan))
    # 60,000 * 2^12 is infinite in float16, and 1 * 2^15 is not.
    batches = [one] * 4 + [bad] * 2 + [one] + [huge] * 3 + [one] + [huge] * 2
    state = train.init(SCALAR, tx, KEY, {"x": one})
    result = train.fit(
        step, state, lambda t: {"x": batches[t]}, steps=len(batches), skips=3, log_every=1, check=False, progress=False, chunk=1
    )
    rows = result.history
    assert [row["overflowed"] for row in rows] == [1, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4]
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6]
    assert int(result.state.opt_state.overflows) == 10
    # Three at the least scale in a row are too many, and the six that lower it to there are not; chunks count alike.
    for chunk in (1, 5):
        with pytest.raises(train.NonFiniteError, match=r"3 steps in a row were skipped, the last of them step 9: gradient of w"):
            train.fit(
                step, state, lambda t: {"x": (one if t == 0 else huge)}, steps=30, skips=3, check=False, progress=False, chunk=chunk
            )


def test_a_step_that_fails_otherwise_does_not_reach_the_inner_state():
    # The gradient is finite, and the parameter is not: the loss scale alone would let the momentum go on.
    tx = train.loss_scaled(optax.chain(optax.trace(0.9), optax.scale(-3e38)))
    batch = {"x": np.full(2, 4.0, np.float32)}
    state = train.init(SCALAR, tx, KEY, batch)
    new, metrics = jax.jit(train.make_step(SCALAR, lambda out, batch: out, tx, guard=True))(state, batch)
    assert float(metrics["skipped"]) == 1
    close((new.params, new.opt_state.inner_state), (state.params, state.opt_state.inner_state), 0)


@pytest.mark.parametrize("remat", [True, jax.checkpoint_policies.dots_saveable], ids=["all", "policy"])
def test_the_forward_pass_computed_again(remat):
    tx = optax.sgd(0.1)
    variables = {"params": compress.quantize(jax.jit(DENSE.init)(KEY, X)["params"], where="**/kernel")}
    for model, given in ((DENSE, variables), (NET, None)) if remat is True else ((NET, None),):
        state = train.init(model, tx, KEY, X, variables=given)
        step = train.make_step(model, squared, tx, remat=remat)
        plain, metrics = jax.jit(train.make_step(model, squared, tx))(state, BATCH)
        again, again_metrics = jax.jit(step)(state, BATCH)
        close((plain.params, plain.model_state, metrics), (again.params, again.model_state, again_metrics))
        assert "remat" in str(jax.make_jaxpr(step)(state, BATCH))
