"""Hypergradients against central differences in float64, what they keep in memory, infinite derivatives, ranges, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.search.hypergradient import (
    between,
    forward,
    gate,
    hypergradient,
    implicit,
    mended,
    positive,
    reverse,
    truncated,
    tune,
    unit,
)
from jaxopt_lab.search.trial import Trial

STEPS = 7
RNG = np.random.default_rng(0)
# In float32, which both of JAX's modes take as they are.
X = RNG.normal(size=(24, 3)).astype(np.float32)
Y = np.sin(X.sum(axis=1))
HELD_X = RNG.normal(size=(16, 3)).astype(np.float32)
HELD_Y = np.sin(HELD_X.sum(axis=1))
LABELS = (Y > 0).astype(int)
FIRST, LAST = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=(4, 2)).astype(np.float32)
PARAMS = {"in": {"kernel": 0.5 * FIRST, "bias": np.zeros(4, np.float32)}, "out": {"kernel": 0.5 * LAST}}


def net(params, x):
    return jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None, :]) @ params["out"]["kernel"]


def batches(step):
    rows = (np.arange(8) + 5 * step) % 24
    return {"x": X[rows], "y": Y[rows], "rows": rows}


def squares(params, batch, hyper):
    del hyper
    return jnp.mean((net(params, batch["x"])[:, 0] - batch["y"]) ** 2)


def trial_of(chain, loss=squares):
    """A training of a network by a chain that is built from the hyper-parameters."""

    def init(key, hyper):
        del key
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), PARAMS)
        return {"params": params, "opt": chain(hyper).init(params)}

    def step(state, batch, hyper):
        value, grads = jax.value_and_grad(loss)(state["params"], batch, hyper)
        updates, opt = chain(hyper).update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, {"loss": value}

    def evaluate(state):
        return jnp.mean((net(state["params"], HELD_X)[:, 0] - HELD_Y) ** 2)

    return Trial(init, step, evaluate)


def decayed(hyper):
    """Weight decay of its own for each parameter."""

    def update(updates, state, params):
        return jax.tree.map(lambda u, w, decay: u + decay * w, updates, params, hyper["decay"]), state

    decay = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(hyper["rate"]))


def clipped(hyper):
    return optax.chain(
        optax.clip_by_global_norm(hyper["clip"]),
        optax.trace(hyper["momentum"]),
        optax.add_decayed_weights(hyper["decay"]),
        optax.scale_by_learning_rate(lambda count: hyper["rate"] / (1 + hyper["slow"] * count)),
    )


def weighted(params, batch, hyper):
    """A weight for each of the 24 examples, and L2."""
    wrong = (net(params, batch["x"])[:, 0] - batch["y"]) ** 2
    l2 = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
    return jnp.mean(jax.nn.sigmoid(hyper["weights"][batch["rows"]]) * wrong) + hyper["l2"] * l2


def distilled(params, batch, hyper):
    """Labels, the softened outputs of a teacher, and inputs that noise of some strength is added to."""
    noise = jax.random.normal(jax.random.key(0), batch["x"].shape)
    logits = net(params, batch["x"] + hyper["noise"] * noise)
    fixed = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), params)
    teacher = net(fixed, batch["x"] ** 2)
    soft = jax.nn.softmax(teacher / hyper["temperature"])
    hard = jax.nn.one_hot(LABELS[:8], 2)
    both = hyper["share"] * hard + (1 - hyper["share"]) * soft
    return -jnp.mean(jnp.sum(both * jax.nn.log_softmax(logits / hyper["temperature"]), axis=1))


def thinned(params, batch, hyper):
    """The soft form of a threshold on magnitudes, a strength of pruning."""
    kernel = params["in"]["kernel"]
    kernel = kernel * gate(jnp.abs(kernel), hyper["threshold"], 0.2, hard=False)
    return squares({**params, "in": {**params["in"], "kernel": kernel}}, batch, hyper)


DECAYS = {"in": {"kernel": 0.01, "bias": 0.0}, "out": {"kernel": 0.1}}
SGD = lambda hyper: optax.sgd(0.2)  # noqa: E731
CASES = {
    "sgd": (trial_of(lambda hyper: optax.sgd(hyper["rate"])), {"rate": 0.3}),
    "momentum": (trial_of(lambda h: optax.sgd(h["rate"], h["momentum"], nesterov=True)), {"rate": 0.1, "momentum": 0.8}),
    "adam": (
        trial_of(lambda h: optax.adam(h["rate"], h["b1"], h["b2"], h["eps"])),
        {"rate": 0.03, "b1": 0.8, "b2": 0.95, "eps": 1e-3},
    ),
    "adamw, a decay a layer": (trial_of(decayed), {"rate": 0.03, "decay": DECAYS}),
    "clipping, decay, schedule": (trial_of(clipped), {"clip": 0.5, "momentum": 0.9, "decay": 0.02, "rate": 0.2, "slow": 0.1}),
    "a rate a step": (
        trial_of(lambda hyper: optax.sgd(lambda count: hyper["rates"][count])),
        {"rates": np.linspace(0.4, 0.1, STEPS)},
    ),
    "weights of examples": (trial_of(SGD, weighted), {"weights": RNG.normal(size=24), "l2": 0.01}),
    "distillation, augmentation": (trial_of(SGD, distilled), {"temperature": 2.0, "share": 0.5, "noise": 0.3}),
    "a soft threshold": (trial_of(SGD, thinned), {"threshold": 0.3}),
    "rmsprop": (trial_of(lambda h: optax.rmsprop(h["rate"], h["decay"], centered=True)), {"rate": 0.01, "decay": 0.8}),
}


def flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def differences(function, hyper, width=1e-5):
    """Central differences, all in one call."""
    at, unravel = jax.flatten_util.ravel_pytree(hyper)
    moved = at[None, :] + width * jnp.concatenate([jnp.eye(at.size), -jnp.eye(at.size)])
    up, down = jnp.split(jax.jit(jax.vmap(lambda row: function(unravel(row))))(moved), 2)
    return (up - down) / (2 * width)


SLOW = ("sgd", "adamw, a decay a layer", "momentum", "distillation, augmentation", "a soft threshold", "rmsprop", "nadam, amsgrad")


def rows(table):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in table]


@pytest.mark.parametrize("name", rows(CASES))
def test_gradients_are_central_differences(name):
    trial, hyper = CASES[name]
    with jax.enable_x64(True):
        hyper = jax.tree.map(jnp.asarray, hyper)
        init = functools.partial(trial.init, jax.random.key(0))
        stack = {key: np.stack([batches(t)[key] for t in range(STEPS)]) for key in ("x", "y", "rows")}

        def plain(hyper):
            state, _ = jax.lax.scan(lambda state, batch: (trial.step(state, batch, hyper)[0], None), init(hyper), stack)
            return trial.evaluate(state)

        # 7 steps are 3 segments of 2, and a rest.
        methods = (reverse(1), reverse(3), reverse((2, 3)), forward(), truncated(STEPS))
        many = methods if name == "sgd" else (reverse(), forward())

        @jax.jit
        def found(hyper):
            call = functools.partial(hypergradient, trial.step, trial.evaluate, hyper, init, batches, steps=STEPS)
            return plain(hyper), [call(method=method)[:2] for method in many]

        expected, (plainly, found) = differences(plain, hyper), found(hyper)
        for value, gradient in found:
            assert value == pytest.approx(float(plainly), rel=1e-12)
            assert value.dtype == jnp.float64
            np.testing.assert_allclose(flat(gradient), expected, rtol=1e-4, atol=1e-8 + 1e-6 * np.abs(expected).max())
        for _, gradient in found[1:]:
            np.testing.assert_allclose(flat(gradient), flat(found[0][1]), rtol=1e-9, atol=1e-13)
        assert np.all(np.abs(expected) > 0)


# Weights that never have a gradient: an input that is always 0.
BLANK = {"in": {**PARAMS["in"], "kernel": np.vstack([PARAMS["in"]["kernel"], np.ones((1, 4))])}, "out": PARAMS["out"]}
CHAINS = {
    "adam": lambda h: optax.adam(h["rate"], h["b1"]),
    "nadam, amsgrad": lambda h: optax.chain(optax.scale_by_amsgrad(h["b1"]), optax.nadam(h["rate"])),
    "a clipped norm": lambda h: optax.chain(optax.masked(optax.clip_by_global_norm(h["b1"]), BIAS), optax.sgd(h["rate"])),
}
BIAS = {"in": {"kernel": False, "bias": True}, "out": {"kernel": False}}


@pytest.mark.parametrize("name", rows(CHAINS))
def test_a_weight_without_a_gradient(name):
    chain = CHAINS[name]

    def loss(params, batch, hyper):
        x = jnp.pad(batch["x"], ((0, 0), (0, 1)))
        # A bias without a gradient as well, the only one whose norm is clipped.
        held = {**params, "in": {**params["in"], "bias": jax.lax.stop_gradient(params["in"]["bias"])}}
        return jnp.mean((net(held, x)[:, 0] - batch["y"]) ** 2)

    def step(params_opt, batch, hyper):
        params, opt = params_opt
        updates, opt = chain(hyper).update(jax.grad(loss)(params, batch, hyper), opt, params)
        return optax.apply_updates(params, updates), opt

    def outer(params_opt):
        return jnp.mean((net(params_opt[0], np.pad(HELD_X, ((0, 0), (0, 1)), constant_values=1))[:, 0] - HELD_Y) ** 2)

    with jax.enable_x64(True):
        hyper, params = {"rate": jnp.float64(0.02), "b1": jnp.float64(0.7)}, jax.tree.map(jnp.float64, BLANK)
        state = (params, chain(hyper).init(params))

        @jax.jit
        def found(hyper):
            one = functools.partial(hypergradient, step, outer, hyper, state, batches, steps=4)
            return one(), one(method=forward()), one(mend=False)

        back, along, broken = found(hyper)
        stack = {key: np.stack([batches(t)[key] for t in range(4)]) for key in ("x", "y")}
        expected = differences(
            lambda hyper: outer(jax.lax.scan(lambda state, batch: (step(state, batch, hyper), None), state, stack)[0]), hyper
        )
        np.testing.assert_allclose(flat(back.gradient), expected, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(flat(along.gradient), flat(back.gradient), rtol=1e-9, atol=1e-15)
        # Without the mend there is no gradient, which is said; the training is the same, bit for bit.
        assert np.isnan(flat(broken.gradient)).any()
    assert back.finite
    assert not broken.finite
    jax.tree.map(np.testing.assert_array_equal, back.state, broken.state)
    assert back.value == broken.value


def test_a_weight_that_rests_at_zero_does_not_drown_the_others():
    # Of a weight at 0 that is pulled to 0 Adam's derivative by itself is 1 - 0.1 / 1e-8 at every step, and its gradient 0.
    tx = optax.adam(0.1)

    def step(state, batch, hyper):
        w, opt = state
        updates, opt = tx.update(jnp.stack([w[0] - hyper, w[1]]), opt)
        return w + updates, opt

    start = (jnp.zeros(2), tx.init(jnp.zeros(2)))
    back, along = (
        hypergradient(step, lambda state: state[0].sum(), 2.0, start, jnp.zeros(30), steps=30, method=method)
        for method in (reverse(), forward())
    )
    assert back.gradient == pytest.approx(float(along.gradient), rel=1e-4)
    assert back.gradient > 0.01


def test_what_has_no_derivative_is_named():
    def step(w, batch, hyper):
        return {"w": w["w"] - hyper["rate"] * jnp.sqrt(w["norm"]) * batch, "norm": w["norm"]}

    def call(step=step, outer=lambda state: jnp.sum(state["w"]), rate=0.1, **settings):
        state = {"w": jnp.ones(2), "norm": jnp.zeros(2)}
        return hypergradient(step, outer, {"rate": rate}, state, jnp.ones((5, 2)), steps=5, **settings)

    # The derivative of a root by what is zero is of no consequence as long as that does not depend on the hyper-parameters.
    assert call().gradient["rate"] == 0

    def growing(w, batch, hyper):
        return {"w": w["w"] + jnp.sqrt(w["norm"]), "norm": w["norm"] + hyper["rate"] * (batch - 1)}

    with pytest.raises(
        FloatingPointError, match=r"the gradient of rate is not finite: it begins in step 5 of 5, at .* norm; a root"
    ):
        call(growing, mend=False)
    with pytest.raises(FloatingPointError, match=r"training diverges: w of the state is not finite after step 2 of 5; lower"):
        call(lambda w, batch, hyper: {**w, "w": w["w"] * hyper["rate"] * 1e30})
    with pytest.raises(FloatingPointError, match="outer_loss is nan, though every state"):
        call(outer=lambda state: jnp.log(-state["w"][0]))
    with pytest.raises(FloatingPointError, match=r"it begins in outer_loss, at its derivative with respect to w"):
        call(outer=lambda state: jnp.sqrt(jnp.sum(state["w"] - state["w"])))
    with pytest.raises(FloatingPointError, match=r"on its way back it grows to \de\+3\d by step \d of 5, and then past"):
        # The state stays where it is, and its derivative grows.
        call(lambda w, batch, hyper: {**w, "w": 1e12 * (w["w"] - 1) * (1 + hyper["rate"]) + 1})
    # Under jit nothing can raise; it is a result.
    assert not jax.jit(lambda rate: call(growing, rate=rate, mend=False).finite)(0.1)


def test_mended_values_are_the_same_and_derivatives_finite():
    def function(x):
        inner = jax.checkpoint(lambda x: jnp.sqrt(x) + jnp.where(x > 0, 1 / x, 0.0) + x**0.25)
        looped = jax.lax.scan(lambda c, x: (c + inner(x), jnp.log(x + 1.0)), jnp.float32(0), x)
        return looped[0] + jnp.sum(looped[1]) + jax.lax.cond(x[0] < 1, jnp.linalg.norm, jnp.sum, x)

    @jax.jit
    @jax.vmap
    def both(x):
        return [(f(x), jax.grad(f)(x), jax.hessian(f)(x)) for f in (function, mended(function))]

    # At zero, and above it.
    plain, whole = both(jnp.array([[0.0, 0.0, 0.0], [0.5, 2.0, 3.0]]))
    np.testing.assert_allclose(whole[0], plain[0], rtol=1e-6)
    assert np.isnan(plain[1][0]).all()
    assert all(np.isfinite(each).all() for each in whole)
    np.testing.assert_allclose(whole[1][1], plain[1][1], rtol=1e-6)
    np.testing.assert_allclose(whole[2][1], plain[2][1], rtol=1e-5, atol=1e-6)
    # A derivative of one's own stays.
    own = jax.custom_jvp(jnp.sqrt)
    own.defjvp(lambda primals, tangents: (jnp.sqrt(primals[0]), 7 * tangents[0]))
    assert jax.grad(mended(own))(0.0) == 7


def test_segments_save_memory():
    trial, hyper = CASES["sgd"]
    state, steps = trial.init(None, hyper), 100
    stack = {"x": X.astype(np.float32), "y": Y.astype(np.float32)}

    def step(state, batch, hyper):
        return trial.step(state, stack, hyper)

    def compiled(method):
        def call(hyper):
            return hypergradient(step, trial.evaluate, hyper, state, {"t": np.arange(steps)}, steps=steps, method=method)

        return jax.jit(call).lower(hyper).compile()

    kept, parts, twice, along = (compiled(method) for method in (reverse(1), reverse(), reverse((10, 10)), forward()))
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (kept, parts, twice, along)]
    assert sizes[1] < sizes[0] / 4
    assert sizes[2] < sizes[1] * 0.8
    assert sizes[3] < sizes[2]
    found = [program(hyper).gradient["rate"] for program in (kept, parts, twice, along)]
    np.testing.assert_allclose(found, found[0], rtol=1e-4)


def test_truncation_forgets_the_beginning():
    def step(w, batch, hyper):
        return w - 0.1 * (w - hyper["goal"]) - 0.1 * hyper["start"] * (batch < 2)

    def gradient(last, segments=1):
        method = truncated(last, segments)
        hyper = {"goal": 2.0, "start": 1.0}
        init = lambda hyper: hyper["start"]  # noqa: E731
        return hypergradient(step, lambda w: w, hyper, init, jnp.arange(8.0), steps=8, method=method).gradient

    # dw/dgoal = 1 - 0.9^k.
    for last, segments in ((3, 1), (5, 2), (8, 3)):
        assert gradient(last, segments)["goal"] == pytest.approx(1 - 0.9**last, rel=1e-6)
    assert gradient(6)["start"] == 0
    # The state at first and the first two steps.
    assert gradient(8)["start"] == pytest.approx(0.9**8 - 0.1 * (0.9**7 + 0.9**6), rel=1e-5)


def test_a_trial_as_it_is_again_and_again():
    traces = []
    trial, hyper = CASES["momentum"]

    def step(state, batch, config):
        traces.append(1)
        return trial.step(state, batch, config)

    state = trial.init(jax.random.key(0), hyper)
    data = {key: np.stack([batches(t)[key] for t in range(STEPS)]).astype(np.float32) for key in ("x", "y")}
    call = functools.partial(hypergradient, step, trial.evaluate, steps=STEPS)
    first = call(hyper, state, data)
    count = len(traces)
    # Going on from the state, with other numbers, compiles nothing.
    second = call({**hyper, "rate": 0.2}, first.state, data)
    assert len(traces) == count
    # The state is as the trial's own steps leave it, types and all.
    expected, taken = state, jax.jit(trial.step)
    for t in range(STEPS):
        expected, _ = taken(expected, jax.tree.map(lambda x, t=t: x[t], data), hyper)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), first.state, expected)
    assert first.value == pytest.approx(float(trial.evaluate(expected)), rel=1e-5)
    # Many at once, and through it.
    rates = jnp.array([0.1, 0.2])
    many = jax.jit(jax.vmap(lambda rate: call({**hyper, "rate": rate}, state, data)))(rates)
    assert many.gradient["rate"][0] == pytest.approx(float(first.gradient["rate"]), rel=1e-3)
    assert many.finite.all()
    assert second.value != first.value


def test_batches_that_stack_themselves():
    class Batches:
        def __call__(self, step):
            pytest.fail("asked one by one")

        def stack(self, step, count):
            return np.arange(step, min(step + 2, step + count), dtype=np.float32)

    found = hypergradient(lambda w, b, h: w + h * b, lambda w: w, 0.5, jnp.float32(0), Batches(), steps=5)
    assert (found.value, found.gradient) == (5.0, 10.0)


def test_gate():
    scores = jnp.array([0.1, 0.29, 0.31, 0.8])
    assert gate(scores, 0.3).tolist() == [0, 0, 1, 1]
    for of in range(3):
        arguments = (scores, jnp.float32(0.3), jnp.float32(0.05))
        hard, soft = (jax.jacobian(functools.partial(gate, hard=hard), of)(*arguments) for hard in (True, False))
        np.testing.assert_allclose(hard, soft, rtol=1e-6)
        assert np.abs(hard).max() > 0


def test_descent_within_ranges():
    def step(w, batch, hyper):
        slope = w - jnp.array([1.0, -1.0])
        return w - hyper["rate"] * slope - hyper["share"] * batch

    def outer(w):
        return jnp.sum((w - 0.5) ** 2)

    def gradient(hyper):
        return hypergradient(step, outer, hyper, jnp.zeros(2), jnp.full((6, 2), 0.1), steps=6)

    start = {"rate": 0.01, "share": 0.5}
    tuned = tune(gradient, start, optax.adam(0.2), steps=25, ranges={"*": unit(), "rate": positive()})
    assert len(tuned.values) == len(tuned.path) == 26
    assert tuned.values[0] == pytest.approx(float(gradient(start).value))
    assert tuned.value == tuned.values.min() < 0.8 * tuned.values[0]
    assert float(gradient(tuned.hyper).value) == pytest.approx(tuned.value, rel=1e-6)
    assert all(hyper["rate"] > 0 and 0 < hyper["share"] < 1 for hyper in tuned.path)
    # The first update of Adam is its rate, in the reals behind the range.
    assert jnp.abs(jnp.log(tuned.path[1]["rate"] / 0.01)) == pytest.approx(0.2, rel=1e-3)
    for hyper, message in (
        ({"rate": -1.0, "share": 0.5}, "rate must be positive; got -1"),
        ({"rate": 1.0, "share": 1.5}, "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(gradient, hyper, optax.adam(0.2), steps=1, ranges={"share": unit(), "rate": positive()})
    with pytest.raises(ValueError, match="nothing matches where='rat'"):
        tune(gradient, start, optax.adam(0.2), steps=1, ranges={"rat": unit()})
    with pytest.raises(FloatingPointError, match=r"update 0 of the hyper-parameters: the value \(inf\)"):
        tune(jax.value_and_grad(lambda x: 1 / x), 0.0, optax.adam(0.2), steps=1)
    x = jnp.linspace(-1.9, 4.9, 5)
    np.testing.assert_allclose(between(-2.0, 5.0).onto(between(-2.0, 5.0).back(x)), x, rtol=1e-5)


def test_what_the_result_does_not_depend_on_is_named():
    def step(w, batch, hyper):
        pruned = jnp.where(jnp.abs(w) > hyper["threshold"], w, 0)
        return pruned - hyper["rate"] * (w - batch) + 0 * jax.lax.stop_gradient(hyper["held"])

    hyper = {"rate": 0.1, "threshold": 0.2, "unused": 1.0, "held": 1.0}
    call = functools.partial(hypergradient, step, jnp.sum, hyper, jnp.ones(3), jnp.zeros((4, 3)), steps=4)
    for method in (reverse(), forward(), truncated(2)):
        with pytest.warns(UserWarning, match=r"does not depend on held, threshold, unused, or only through what has no derivative"):
            found = call(method=method)
        assert [found.gradient[name] for name in ("threshold", "unused", "held")] == [0, 0, 0]
        assert found.gradient["rate"] != 0


FOUR = np.zeros((4, 2), np.float32)


def test_bad_input_is_named():
    def step(w, batch, hyper):
        return {"w": w["w"] - hyper["rate"] * batch}

    def call(step=step, outer=lambda state: jnp.sum(state["w"]), hyper=None, batches=FOUR, **settings):
        hyper = {"rate": 0.1} if hyper is None else hyper
        return hypergradient(step, outer, hyper, {"w": jnp.ones(2)}, batches, **{"steps": 4, **settings})

    cases = [
        (
            {"hyper": {"net": {"width": 4}, "rate": 0.1}},
            TypeError,
            r"hyper-parameter net/width is int\d+, which has no gradient; give a",
        ),
        ({"hyper": {"rate": "fast"}}, TypeError, "hyper-parameter rate is str, which has no gradient"),
        ({"hyper": {"rate": True}}, TypeError, "hyper-parameter rate is bool"),
        ({"hyper": {}}, TypeError, "hyper has no leaf"),
        ({"outer": lambda state: state["w"]}, ValueError, r"outer_loss must return one float; got float32\[2\]; take a mean"),
        ({"outer": lambda state: jnp.argmax(state["w"])}, ValueError, r"outer_loss must return one float; got int32\[\]"),
        ({"steps": 3}, ValueError, r"batches has the shape \(4, 2\), and there are 3 steps"),
        ({"steps": 0}, ValueError, "steps must be at least 1; got 0"),
        (
            {"batches": lambda t: np.zeros(2 + t // 3)},
            ValueError,
            r"batches must all have one size; the first has \(2,\), another \(3,\)",
        ),
        (
            {"step": lambda w, b, h: {"w": w["w"][:1] * h["rate"]}},
            ValueError,
            r"inner_step makes w float32\[1\]; it was given float32\[2\]",
        ),
        ({"step": lambda w, b, h: {"w": w["w"], "v": h["rate"]}}, ValueError, "changes the structure of the state at v"),
        ({"method": reverse(5)}, ValueError, "segments=5 are more than the 4 steps"),
        ({"method": reverse((2, 3))}, ValueError, r"segments=\(2, 3\) are more than the 4 steps"),
        ({"method": truncated(5)}, ValueError, r"truncated\(5\) goes back further than the 4 steps"),
    ]
    for settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            call(**settings)
    for wrong in (lambda: reverse(0), lambda: truncated(0), lambda: forward(0), implicit, lambda: between(1.0, 1.0)):
        with pytest.raises(ValueError, match=r"at least|one of inner_loss|needs"):
            wrong()
