"""The pair of pure functions: modes, random streams, batch statistics, and what comes back."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_lab import compress, nets
from jaxopt_lab.nets.batch_statistics import layer_moments

KEY = jax.random.key(3)
X = jax.device_put(np.random.default_rng(1).normal(1.0, 2.0, (6, 5)))


class Trained(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True, use_running_average=True):
        x = nn.BatchNorm(momentum=0.9)(nn.Dense(4)(x), use_running_average)
        return nn.Dropout(0.5)(x, deterministic)


class Setup(nn.Module):
    def setup(self):
        self.dense, self.norm, self.drop = nn.Dense(4), nn.BatchNorm(momentum=0.9, use_fast_variance=False), nn.Dropout(0.5)

    def __call__(self, x, *, train=False):
        return self.drop(self.norm(self.dense(x), not train), not train)


class Graph(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 4, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.drop(self.norm(x))


MODELS = {
    "train": nets.from_linen(Trained()),
    "deterministic": nets.from_linen(Deterministic()),
    "setup": nets.from_linen(Setup()),
    "nnx": nets.from_nnx(Graph),
}
each = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@each
def test_evaluation_is_predict_and_leaves_the_state_alone(model):
    variables = model.init(KEY, X)
    outputs, state = model.apply(variables, X)
    np.testing.assert_array_equal(outputs, model.predict(variables, X))
    rest = {name: value for name, value in variables.items() if name != "params"}
    assert jax.tree.structure(state) == jax.tree.structure(rest)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, rest))


@each
def test_training_moves_the_running_statistics_as_by_hand(model):
    variables = model.init(KEY, X)
    _, state = model.apply(variables, X, train=True, key=KEY)
    dense = jax.tree.leaves(variables["params"], is_leaf=lambda v: isinstance(v, dict) and "kernel" in v)
    dense = next(v for v in dense if isinstance(v, dict))
    z = np.asarray(X, np.float64) @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"], np.float64)
    mean, var = jax.tree.leaves(state)
    np.testing.assert_allclose(mean, 0.1 * z.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(var, 0.9 + 0.1 * z.var(0), rtol=1e-4)


@each
def test_padding_does_not_count_in_training(model):
    variables = model.init(KEY, X)
    padded = jnp.concatenate([X, jnp.full((2, 5), 100.0)])
    weight = jnp.array([1.0] * 6 + [0.0] * 2)
    plain, plain_state = model.apply(variables, X, train=True, key=KEY)
    outputs, state = jax.jit(lambda v, x, w: model.apply(v, x, train=True, key=KEY, weight=w))(variables, padded, weight)
    np.testing.assert_allclose(outputs[:6], plain, rtol=2e-5, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), state, plain_state)


@each
def test_statistics_are_those_of_every_device_and_no_padding(model):
    variables = model.init(KEY, X)
    padded = jnp.concatenate([X, jnp.full((2, 5), 100.0)]).reshape(4, 2, 5)
    weight = jnp.array([1.0] * 6 + [0.0] * 2).reshape(4, 2)
    _, plain = model.apply(variables, X, train=True, key=KEY)

    def local(x, w):
        return model.apply(variables, x, train=True, key=KEY, axis_name="d", weight=w)[1]

    state = jax.jit(jax.vmap(local, axis_name="d"))(padded, weight)
    for device in range(4):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[device], b, rtol=2e-6, atol=1e-6), state, plain)  # noqa: B023


@each
def test_gradients_flow_through_the_whole_batch_statistics(model):
    """The statistics computed here differentiate like the layer's own."""
    variables = model.init(KEY, X)
    state = {name: value for name, value in variables.items() if name != "params"}

    @jax.jit
    def gradient(params, weight):
        return jax.grad(total)(params, weight)

    def total(params, weight):
        outputs, _ = model.apply({"params": params, **state}, X, train=True, key=KEY, weight=weight)
        return (outputs * jnp.arange(24.0).reshape(6, 4)).sum()

    own = gradient(variables["params"], None)
    ours = gradient(variables["params"], jnp.ones(6))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, own)


@each
def test_dropout_follows_the_key_and_only_in_training(model):
    variables = model.init(KEY, X)
    one, two = (model.apply(variables, X, train=True, key=jax.random.key(k))[0] for k in (0, 1))
    again = model.apply(variables, X, train=True, key=jax.random.key(0))[0]
    assert ((one == 0) != (two == 0)).any()
    np.testing.assert_array_equal(one, again)
    assert not (model.predict(variables, X) == 0).any()


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        return nn.Dropout(0.5, deterministic=not training)(x)


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, *, is_training):
        return nn.Dropout(0.5, deterministic=not is_training)(x)


class Residual(nn.Module):
    """Written without a mode in mind."""

    inner: nn.Module

    def __call__(self, x):
        return x + self.inner(x)


class Wrapped(nn.Module):
    """Knows the mode, and cannot tell it through `nn.Sequential`."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Sequential([Training()])(x)


class Repeated(nn.Module):
    """`nn.scan` over a block that takes no mode and holds a layer that does."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, carry, _):
                return nn.Dropout(0.5)(carry), None

        return nn.scan(Block, split_rngs={"dropout": True, "params": True}, length=2)()(x, None)[0]


TOLD = {
    "training": Training(),
    "is_training": IsTraining(),
    "layer": nn.Dropout(0.5),
    "sequential": nn.Sequential([nn.tanh, Training()]),
    "nested": nn.Sequential([Residual(nn.Sequential([nn.Dropout(0.5)]))]),
    "own_block": Residual(Training()),
    "knowing": Wrapped(),
    "remat": nn.remat(Training)(),
    "inner_remat": nn.Sequential([nn.remat(IsTraining)()]),
    "jit": nn.Sequential([nn.jit(Training)()]),
    "scan": Repeated(),
    "attention": nn.MultiHeadDotProductAttention(1, dropout_rate=0.5),
}


@pytest.mark.parametrize("module", TOLD.values(), ids=TOLD)
def test_every_module_inside_is_told_the_mode(module):
    model = nets.from_linen(module)
    variables = model.init(KEY, X)
    # In turn: `nn.jit` keeps what it traced, and must not mix the modes.
    before, trained, after = (
        jax.jit(partial(model.apply, train=train, key=KEY))(variables, X)[0] for train in (False, True, False)
    )
    assert (trained != before).any()
    np.testing.assert_array_equal(before, after)


def test_layers_that_need_a_mode_work_in_a_sequence():
    model = nets.from_linen(nn.Sequential([nn.BatchNorm(momentum=0.9), nn.Dropout(0.5)]))
    variables = model.init(KEY, X)
    _, state = model.apply(variables, X, train=True, key=KEY)
    np.testing.assert_allclose(state["batch_stats"]["layers_0"]["mean"], 0.1 * X.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.predict({**variables, **state}, X) == 0, np.zeros_like(X, bool))


def test_spectral_norm_is_told_when_to_update():
    model = nets.from_linen(nn.Sequential([nn.SpectralNorm(nn.Dense(3))]))
    variables = model.init(KEY, X)
    # A kernel comes out of the initialisation divided by its norm: doubled, it has another.
    doubled = variables | {"params": jax.tree.map(lambda leaf: 2 * leaf, variables["params"])}
    _, state = model.apply(doubled, X, train=True, key=KEY)
    moved = jax.tree.map(lambda a, b: bool((abs(a - b) > 1e-3).any()), state["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


class Probe(nn.Module):
    """A head on a backbone that shall not train."""

    how: str

    @nn.compact
    def __call__(self, x):
        if self.how == "call":
            return Training()(x, training=False)
        if self.how == "positional":
            return Training()(x, False)
        return nn.Dropout(0.5, deterministic=True)(x)


class Knowing(nn.Module):
    """Takes a mode, and leaves one part to its default."""

    @nn.compact
    def __call__(self, x, train=False):
        return Training()(x)


FROZEN = {**{how: Probe(how) for how in ("call", "positional", "constructor")}, "knowing": Knowing()}


@pytest.mark.parametrize("module", FROZEN.values(), ids=FROZEN)
def test_a_mode_that_the_author_has_decided_stays(module):
    model = nets.from_linen(module)
    np.testing.assert_array_equal(model.apply(model.init(KEY, X), X, train=True, key=KEY)[0], X)


def test_a_wrong_call_keeps_its_own_error():
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Training()(x, 1, 2, 3)

    with pytest.raises(TypeError, match="positional arguments"):
        nets.from_linen(Wrong()).init(KEY, X)


def test_every_random_collection_draws_from_the_key():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return x + jax.random.normal(self.make_rng("noise"), x.shape) + nn.Dropout(0.5, deterministic=not train)(x)

    model = nets.from_linen(Noisy())
    outputs, state = model.apply({"params": {}}, X, train=True, key=KEY)
    assert outputs.shape == X.shape
    assert state == {}


def test_a_module_keeps_its_own_axis_and_mask():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            mask = (jnp.arange(x.shape[0]) % 2 == 0)[:, None]
            return nn.BatchNorm(use_running_average=not train, momentum=0.0, axis_name="own")(x, mask=mask)

    model = nets.from_linen(Masked())
    variables = model.init(KEY, X[:2])
    both = jax.jit(jax.vmap(lambda x, w: model.apply(variables, x, train=True, weight=w)[1], axis_name="own"))
    state = both(X[:4].reshape(2, 2, 5), jnp.array([[1.0, 1.0], [0.0, 1.0]]))
    # Rows 1 and 3 are masked by the module, row 2 is padding: only row 0 counts, on both devices.
    np.testing.assert_allclose(jax.tree.leaves(state)[0], np.stack([X[0]] * 2), rtol=1e-6)


AXES = {
    "first": (0, (2, 4, 3), (1, 2)),
    "last_by_default": (-1, (4, 3, 2), (0, 1)),
    "middle": (1, (4, 2, 3), (0, 2)),
    "two": ((0, -1), (2, 4, 3), (1,)),
}


@pytest.mark.parametrize(
    ("world", "name"),
    # nnx.BatchNorm is made for one number of features.
    [*(("linen", name) for name in AXES), *(("nnx", name) for name in AXES if name != "two")],
)
def test_statistics_are_kept_along_the_axes_of_the_layer(world, name):
    axis, shape, averaged = AXES[name]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if world == "linen":
        layer = nn.BatchNorm(momentum=0.0, axis=axis, use_bias=False, use_scale=False)
    else:
        layer = nnx.BatchNorm(shape[axis], momentum=0.0, axis=axis, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))
    mean, variance = layer_moments(layer, jnp.asarray(x), axis_name=None)
    np.testing.assert_allclose(mean, x.mean(averaged), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, x.var(averaged), rtol=1e-4)
    # And through the layer, spread over two devices along an axis that is averaged over.
    model = (nets.from_linen if world == "linen" else nets.from_nnx)(layer)
    variables = model.init(KEY, x)
    halves = np.stack(np.split(x, 2, axis=averaged[0]))
    apply = partial(model.apply, variables, train=True, axis_name="d")
    _, state = jax.jit(jax.vmap(apply, axis_name="d"))(halves)
    np.testing.assert_allclose(jax.tree.leaves(state)[0][0], x.mean(averaged), rtol=1e-5, atol=1e-6)


def test_subclasses_of_nnx_batch_norm_are_synchronised_too():
    class Own(nnx.BatchNorm):
        pass

    model = nets.from_nnx(lambda rngs: Own(5, momentum=0.0, rngs=rngs))
    variables = model.init(KEY)
    state = jax.vmap(lambda x: model.apply(variables, x, train=True, axis_name="d")[1], axis_name="d")(X.reshape(2, 3, 5))
    np.testing.assert_allclose(state["state"]["mean"], np.stack([X.mean(0)] * 2), rtol=1e-5)


def test_nnx_instances_keep_their_weights_and_are_left_alone():
    module = Graph(nnx.Rngs(7))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Param, nnx.BatchStat)[0]))
    model = nets.from_nnx(module)
    variables = model.init(KEY)
    model.apply(variables, X, train=True, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], before)
    module.eval()
    np.testing.assert_allclose(module(X), model.predict(variables, X), rtol=1e-6)


def test_nnx_without_a_key_says_so():
    model = MODELS["nnx"]
    with pytest.raises(ValueError, match="random streams"):
        model.apply(model.init(KEY), X, train=True)


@each
def test_compressed_leaves_go_through_lift(model):
    variables = model.init(KEY, X)
    stored = {**variables, "params": compress.quantize(variables["params"], where="**/kernel")}
    outputs = jax.jit(compress.lift(model.predict))(stored, X)
    np.testing.assert_allclose(outputs, model.predict(compress.decompress(stored), X), rtol=1e-4, atol=1e-4)
    trained, _ = compress.lift(lambda v, x: model.apply(v, x, train=True, key=KEY))(stored, X)
    assert trained.shape == outputs.shape
    for call in (model.predict, model.apply, jax.jit(model.predict)):
        with pytest.raises(
            TypeError, match=r"^params/\S*kernel is stored as Quantized; call compress\.lift\(model\.predict\)"
        ) as caught:
            call(stored, X)
        assert "\n" not in str(caught.value)


def test_linen_takes_no_other_module():
    with pytest.raises(TypeError, match="from_nnx"):
        nets.from_linen(lambda x: x)
    with pytest.raises(TypeError, match="constructor"):
        nets.from_nnx(3)


def test_functions_get_the_keywords_they_name():
    seen = {}

    def apply(params, x, *, train, key):
        seen.update(train=train, key=key)
        return x * params

    model = nets.from_functions(lambda key, x: jnp.float32(2), apply)
    variables = model.init(KEY, X)
    outputs, state = model.apply(variables, X, train=True, key=KEY, axis_name="d", weight=jnp.ones(6))
    np.testing.assert_array_equal(outputs, X * 2)
    assert state == {}
    assert seen == {"train": True, "key": KEY}


def test_functions_may_name_the_mode_otherwise():
    model = nets.from_functions(
        lambda key, x: jnp.float32(2), lambda w, x, is_training, deterministic: (is_training, deterministic)
    )
    variables = model.init(KEY, X)
    assert model.apply(variables, X, train=True)[0] == (True, False)
    assert model.predict(variables, X) == (False, True)


def test_stateful_functions_return_their_state_in_training_only():
    def apply(variables, x, train=False):
        return x * variables["params"], {"count": variables["count"] + 1}

    model = nets.from_functions(lambda key, x: {"params": jnp.float32(2), "count": 0}, apply, stateful=True)
    variables = model.init(KEY, X)
    assert model.apply(variables, X, train=True)[1] == {"count": 1}
    assert model.apply(variables, X)[1] == {"count": 0}
    with pytest.raises(ValueError, match="params"):
        nets.from_functions(lambda key: {"w": 1}, apply, stateful=True).init(KEY)


def test_padding_needs_the_batch_as_leading_axis():
    class Folded(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.BatchNorm(use_running_average=not train)(x.reshape(-1, 1)[:7])

    model = nets.from_linen(Folded())
    with pytest.raises(ValueError, match="leading axis"):
        model.apply(model.init(KEY, X), X, train=True, weight=jnp.ones(6))
