"""Slimming: a zoo of networks against their masked selves, in values and gradients; plans, optimiser states, budgets, criteria."""

import functools
import json
import math
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxopt_lab import compress, data, losses, nets, prune, surgery, tracing, train
from jaxopt_lab.core import tree
from jaxopt_lab.surgery import Plan, coupled_channels, mask, slim

KEY = jax.random.key(0)


def _normal(*shape, seed=0):
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


class Net(nn.Module):
    """A network written as one function of itself and an input."""

    body: object

    @nn.compact
    def __call__(self, x):
        return self.body(self, x)


def _norm(x):
    return nn.BatchNorm(use_running_average=True)(x)


def lenet(_, x):
    x = nn.max_pool(nn.relu(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
    x = nn.avg_pool(nn.tanh(nn.Conv(8, (3, 3), strides=2)(x)), (2, 2), (2, 2))
    return nn.Dense(3)(nn.relu(nn.Dense(10)(x.reshape(x.shape[0], -1))))


def residual(_, x):
    """Stages of basic and bottleneck blocks, with a projection."""
    x = nn.relu(_norm(nn.Conv(6, (3, 3))(x)))
    h = nn.relu(_norm(nn.Conv(5, (3, 3))(x)))
    x = nn.relu(x + _norm(nn.Conv(6, (3, 3))(h)))
    h = nn.relu(nn.Conv(4, (3, 3), strides=2)(nn.relu(nn.Conv(4, (1, 1))(x))))
    x = nn.relu(nn.Conv(8, (1, 1))(h) + nn.Conv(8, (1, 1), strides=2)(x))
    return nn.Dense(3)(x.mean((1, 2)))


def dense_and_inception(_, x):
    """Concatenations of what came before, and of branches."""
    x = nn.Conv(4, (3, 3))(x)
    for _ in range(2):
        x = jnp.concatenate([x, nn.Conv(3, (3, 3))(nn.relu(_norm(x)))], -1)
    x = jnp.concatenate(
        [nn.Conv(4, (1, 1))(x), nn.Conv(5, (3, 3))(nn.relu(nn.Conv(3, (1, 1))(x))), nn.max_pool(x, (3, 3), padding="SAME")], -1
    )
    return nn.Dense(3)(x.mean((1, 2)))


def mobile(_, x):
    """An inverted residual of a depthwise convolution, and squeeze-and-excitation."""
    x = nn.Conv(4, (3, 3))(x)
    h = nn.relu6(nn.Conv(12, (1, 1))(x))
    x = x + nn.Conv(4, (1, 1))(nn.relu6(nn.Conv(12, (3, 3), feature_group_count=12)(h)))
    x = x * nn.sigmoid(nn.Dense(4)(nn.relu(nn.Dense(5)(x.mean((1, 2))))))[:, None, None, :]
    return nn.Dense(3)(x.mean((1, 2)))


def shuffled(_, x):
    """Convolutions in groups, and a shuffle of the channels between them."""
    x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=2)(nn.relu(nn.Conv(8, (1, 1))(x))))
    b, h, w, c = x.shape
    return nn.Dense(3)(nn.Conv(6, (3, 3))(x.reshape(b, h, w, 2, c // 2).swapaxes(-1, -2).reshape(b, h, w, c)).mean((1, 2)))


def unet(_, x):
    a = nn.relu(nn.Conv(4, (3, 3))(x))
    b = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(nn.relu(nn.Conv(6, (3, 3), strides=(2, 2))(a)))
    return nn.Conv(2, (1, 1))(nn.relu(nn.Conv(5, (3, 3))(jnp.concatenate([a, b], -1))))


def padded(_, x):
    """A shortcut that is strided and padded with channels of zeros, as in the first residual networks."""
    x = nn.Conv(4, (3, 3))(x)
    short = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))
    return nn.Dense(3)(nn.relu(nn.Conv(8, (3, 3), strides=2)(x) + short).mean((1, 2)))


def encoder(_, x):
    """Flax's attention, whose weights have an axis of heads and one of their sizes."""
    x = nn.Dense(8)(x)
    x = x + nn.MultiHeadDotProductAttention(4, qkv_features=16)(x)
    return nn.Dense(3)((x + nn.Dense(8)(nn.gelu(nn.Dense(12)(x)))).mean(1))


def _attend(q, k, v):
    weights = nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*q.shape[:2], -1)


def fused(_, x):
    """Queries, keys and values from one weight."""
    x = nn.Dense(8)(x)
    qkv = nn.Dense(60)(x).reshape(*x.shape[:2], 3, 4, 5)
    return nn.Dense(3)((x + nn.Dense(8)(_attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))).mean(1))


def grouped_queries(_, x):
    """Two heads of keys for four of queries, and positions that rotate them."""
    b, t, _ = x.shape
    q, k, v = (nn.Dense(h * 6)(x).reshape(b, t, h, 6) for h in (4, 2, 2))
    angles = jnp.arange(t)[:, None] / 10.0 ** jnp.arange(3)[None]
    sin, cos = jnp.sin(angles)[None, :, None], jnp.cos(angles)[None, :, None]

    def rotated(x):
        one, two = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([one * cos - two * sin, one * sin + two * cos], -1)

    y = _attend(rotated(q), jnp.repeat(rotated(k), 2, axis=2), jnp.repeat(v, 2, axis=2))
    return nn.Dense(3)(nn.Dense(8)(y).mean(1))


def recurrent(_, x):
    """A bidirectional LSTM on a GRU: state carried by scans."""
    h = nn.RNN(nn.GRUCell(5))(x)
    return nn.Dense(3)(nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(4)), nn.RNN(nn.OptimizedLSTMCell(6)))(h)[:, -1])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(nn.relu(nn.Dense(10)(x))), None


def scanned(_, x):
    """Stacked layers under scan, rematerialised, and a branch."""
    x = nn.Dense(8)(x)
    x, _ = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)
    x = jax.lax.cond(x.sum() > 0, lambda x: 2 * x, lambda x: x - 1, x)
    return nn.Dense(3)(x)


def language(self, x):
    """Token and position embeddings, tied to the read-out."""
    table = nn.Embed(11, 8)
    h = table(x) + self.param("positions", nn.initializers.normal(), (5, 8))[None]
    return table.attend(h + nn.Dense(8)(nn.gelu(nn.Dense(12)(h))))


def mixer(_, x):
    x = nn.Dense(8)(x)
    x = x + nn.Dense(5)(nn.gelu(nn.Dense(7)(x.swapaxes(1, 2)))).swapaxes(1, 2)
    return nn.Dense(3)((x + nn.Dense(8)(nn.gelu(nn.Dense(9)(x)))).mean(1))


IMAGES, WORDS, ROWS = (2, 8, 8, 3), (2, 5, 4), (2, 4)
ZOO = {
    lenet: IMAGES, residual: IMAGES, dense_and_inception: IMAGES, mobile: IMAGES, shuffled: IMAGES, unet: IMAGES, padded: IMAGES,
    encoder: WORDS, fused: WORDS, grouped_queries: WORDS, recurrent: WORDS, scanned: ROWS, mixer: WORDS, language: None,
}  # fmt: skip


def _started(net, x):
    """Variables in which no statistic, scale or bias is the 0 or 1 that it starts with, and no two are equal.

    They are drawn by NumPy, with about the variance of an initialiser: to compile the initialisers took half of the time.
    """
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if len(leaf.shape) < 2:
            return jnp.asarray((path[-1].key in ("scale", "var")) + 0.1 * noise, leaf.dtype)
        return jnp.asarray(noise / math.prod(leaf.shape[:-1]) ** 0.5, leaf.dtype)

    return jax.tree_util.tree_map_with_path(drawn, jax.eval_shape(net.init, KEY, x))


@functools.cache
def _case(body):
    net = Net(body)
    x = jnp.arange(10).reshape(2, 5) % 11 if ZOO[body] is None else _normal(*ZOO[body])
    return net.apply, _started(net, x), x


@functools.cache
def _slimmed(body):
    apply, params, x = _case(body)
    small_apply, small, plan = slim(apply, params, x, ratio=0.5)
    return small_apply, small, plan, mask(params, plan)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradient(apply, params, x):
    def loss(params):
        out = apply(params, x)
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return out, grads


# The others with `scripts/test -m slow`, and so most gradients.
_OFTEN = (residual, shuffled, fused, grouped_queries, recurrent, scanned, language, padded)
_ALWAYS = (fused, scanned)


def _zoo(always):
    marked = [pytest.param(body, marks=() if body in always else pytest.mark.slow) for body in ZOO]
    return pytest.mark.parametrize("body", marked, ids=lambda body: body.__name__)


@_zoo(_OFTEN)
def test_slim_equals_masked(body):
    apply, params, x = _case(body)
    small_apply, small, plan, masked = _slimmed(body)
    assert tree.size(small) < 0.6 * tree.size(params)
    assert plan.kept
    got, want = jax.jit(small_apply)(small, x), jax.jit(apply)(masked, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # Nothing is protected without a reason, and whatever is a weight lies in a group or is protected.
    coupling = coupled_channels(apply, params, x)
    assert all(entry.reason for entry in coupling.protected)
    listed = {member.path for group in coupling.groups for member in group.members} | {entry.path for entry in coupling.protected}
    assert listed == set(tree.paths(params))


@_zoo(_ALWAYS)
def test_the_gradient_is_that_of_the_masked_network(body):
    apply, _, x = _case(body)
    small_apply, small, plan, masked = _slimmed(body)
    _, grads = _value_and_gradient(small_apply, small, x)
    _, expected = _value_and_gradient(apply, masked, x)
    for name, a, b in zip(*tree.flatten(grads)[:2], jax.tree.leaves(plan.cut(expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max() + 1e-3), err_msg=name)


def test_other_batches_other_lengths_and_vmap():
    apply, _, _ = _case(encoder)
    small_apply, small, _, masked = _slimmed(encoder)
    run, run_masked = jax.jit(small_apply), jax.jit(apply)
    for batch, length in ((1, 5), (7, 9)):
        inputs = _normal(batch, length, 4, seed=batch)
        np.testing.assert_allclose(run(small, inputs), run_masked(masked, inputs), rtol=1e-5, atol=1e-5)
    many = _normal(3, 2, 5, 4, seed=9)
    mapped = jax.jit(jax.vmap(small_apply, in_axes=(None, 0)))(small, many)
    np.testing.assert_allclose(mapped[1], run_masked(masked, many[1]), rtol=1e-5, atol=1e-5)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), small)
    ensemble = jax.jit(jax.vmap(small_apply, in_axes=(0, None)))(stacked, many[1])
    np.testing.assert_allclose(ensemble[0], mapped[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.LayerNorm, functools.partial(nn.GroupNorm, num_groups=2), nn.RMSNorm])
def test_a_normalisation_over_channels_is_of_those_that_are_left(norm):
    def body(width, _, x):
        return nn.Dense(3)(nn.relu(norm()(nn.Dense(width)(x))))

    wide, narrow = Net(functools.partial(body, 8)), Net(functools.partial(body, 4))
    x = _normal(5, 3)
    params = _started(wide, x)
    small_apply, small, plan = slim(wide.apply, params, x, ratio=0.5)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, narrow.init(KEY, x))
    np.testing.assert_allclose(jax.jit(small_apply)(small, x), jax.jit(narrow.apply)(small, x), rtol=1e-5, atol=1e-6)
    (kept,) = {tuple(axes[0].tolist()) for path, axes in plan.kept.items() if path.endswith("Dense_1/bias")}
    if norm not in (nn.LayerNorm, nn.RMSNorm):
        assert [k - 4 for k in kept if k >= 4] == [k for k in kept if k < 4]


@jax.custom_vjp
def _straight(x):
    return jnp.round(x)


_straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (3 * g,))


@jax.custom_jvp
def _softly(x):
    return jnp.tanh(x)


_softly.defjvp(lambda primals, tangents: (_softly(*primals), 0.5 * tangents[0] * _softly(*primals)))


def test_functions_keep_derivatives_of_their_own():
    params = {"a": _normal(3, 6), "b": _normal(6, 6, seed=1), "c": _normal(6, 2, seed=2)}

    def apply(params, x):
        return _softly(_straight(4 * x @ params["a"]) @ params["b"]) @ params["c"]

    x = _normal(4, 3, seed=3)
    small_apply, small, plan = slim(apply, params, x, ratio=0.5)
    got, grads = _value_and_gradient(small_apply, small, x)
    want, masked_grads = _value_and_gradient(apply, mask(params, plan), x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), grads, plan.cut(masked_grads))
    assert float(jnp.abs(grads["a"]).max()) > 0

    # Forward over reverse, through the derivative's own program.
    def slope(params):
        return jax.grad(lambda params: jnp.sum(small_apply(params, x) ** 2))(params)["c"].sum()

    assert bool(jnp.isfinite(jax.grad(slope)(small)["a"]).all())


def test_nnx_and_bare_functions():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm, self.last = nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x), use_running_average=True)))

    graph, state = nnx.split(Network(nnx.Rngs(0)))
    x = _normal(5, 4)

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    small_apply, small, plan = slim(apply, state, x, ratio=0.25, exclude="last/bias")
    np.testing.assert_allclose(jax.jit(small_apply)(small, x), jax.jit(apply)(mask(state, plan), x), rtol=1e-5, atol=1e-6)
    assert small["first"]["kernel"].get_value().shape == (4, 6)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for width in (4, 6):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)))
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(x.reshape(x.shape[0], -1)))


def test_a_model_trains_on_with_its_statistics_and_its_optimiser():
    digits, model = data.digits(), nets.from_linen(Normalised())
    loss = losses.per_example(losses.cross_entropy)
    tx = prune.sparsify(optax.adamw(3e-3), 0.2, begin=2, end=8, every=2)
    batches = data.batches(digits.train, 32, seed=0)

    def trained(model, state):
        step = jax.jit(train.make_step(model, loss, tx))
        for k in range(10):
            state, metrics = step(state, batches(k))
        assert bool(jnp.isfinite(metrics["loss"]))
        return state

    state = trained(model, train.init(model, tx, KEY, batches(0)))
    variables = train.variables(state)
    small_model, small, plan = slim(model, variables, batches(0)["x"], ratio=0.5)
    x = digits.test["x"][:16]
    expected = jax.jit(model.predict)(mask(variables, plan), x)
    np.testing.assert_allclose(jax.jit(small_model.predict)(small, x), expected, rtol=1e-4, atol=1e-5)
    opt_state, begun = plan.cut_state(tx, state.opt_state, state.params)
    assert begun == ()
    assert prune.sparsity(small["params"]).total > 0.1
    again = train.init(small_model, tx, KEY, batches(0), small)._replace(opt_state=opt_state)
    after = trained(small_model, again)
    assert jax.tree.map(jnp.shape, train.variables(after)) == jax.tree.map(jnp.shape, small)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), train.variables(after)["batch_stats"], small["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 0
    # What sparsify had cut is still cut.
    masked = prune.apply_masks(after.params, prune.masks(opt_state))
    jax.tree.map(np.testing.assert_array_equal, masked, after.params)


def test_resnet_18_at_half_its_channels_has_the_published_size():
    model = nets.from_linen(nets.ImageNetResNet(depth=18))
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros(x.shape)), KEY)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    small_apply, small, _ = slim(model.predict, variables, x, ratio=0.5, round_to=8)
    # As Torch-Pruning counts the parameters, and the multiplications of convolutions and dense layers.
    assert tree.size(small["params"]) == 3_055_880
    assert tracing.count(small_apply, small, x).macs == 483_149_824


OPTIMISERS = {
    "adamw": optax.adamw(0.1),
    "every second step": optax.MultiSteps(optax.lion(0.1), 2).gradient_transformation(),
    "muon": optax.contrib.muon(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "sm3": optax.sm3(0.1),
    "lbfgs": optax.chain(optax.scale_by_lbfgs(memory_size=3), optax.scale(-0.01)),
    "partition": optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)}, {"a": "a", "b": "b", "c": "a"}),
    "sparsify": prune.sparsify(optax.adam(0.1), 0.5, begin=0, end=4, every=1, where="*"),
    "sparsify, packed": prune.sparsify(optax.adam(0.1), 0.5, begin=0, end=4, every=1, where="*", packed=True),
    "schedule free": optax.contrib.schedule_free_adamw(0.1),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "sparsify" else ()) for n in OPTIMISERS])
def test_states_of_optimisers_are_cut_with_their_parameters(name):
    tx = OPTIMISERS[name]
    params = {"a": _normal(3, 6), "b": _normal(6, 8, seed=1), "c": _normal(8, 2, seed=2)}
    x = _normal(4, 3, seed=3)

    def apply(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]

    def step(apply, params, state):
        grads = jax.grad(lambda params: jnp.sum(apply(params, x) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    one = jax.jit(functools.partial(step, apply))
    params, state = one(params, tx.init(params))
    params, state = one(params, state)
    small_apply, small, plan = slim(apply, params, x, ratio=0.5)
    small_state, begun = plan.cut_state(tx, state, params)
    assert begun == ()
    assert jax.tree.structure(small_state) == jax.tree.structure(tx.init(small))
    assert jax.tree.map(jnp.shape, small_state) == jax.tree.map(jnp.shape, tx.init(small))
    for path, leaf in zip(*tree.flatten(small_state)[:2], strict=True):
        assert bool(jnp.isfinite(jnp.asarray(leaf, jnp.float32)).all()), path
    again = jax.jit(functools.partial(step, small_apply))
    moved, _ = again(*again(small, small_state))
    assert float(jnp.abs(moved["a"] - small["a"]).max()) > 0
    if name == "adamw":
        full = {"a": tree.selected(state, "**/mu/a"), "small": tree.selected(small_state, "**/mu/a")}
        (before,), (after,) = full["a"].values(), full["small"].values()
        np.testing.assert_array_equal(after, before[:, plan.kept["a"][1]])


def test_states_are_not_taken_for_those_of_a_parameter_of_that_name():
    tx = optax.adam(0.1)
    params = {"i": _normal(3, 8), "w": _normal(8, 8, seed=1), "mu": {"w": _normal(8, 8, seed=2)}, "o": _normal(8, 2, seed=3)}

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["i"]) @ p["w"]) @ p["mu"]["w"] @ p["o"]

    _, _, plan = slim(apply, params, _normal(4, 3), ratio=0.5)
    _, state = tx.update(params, tx.init(params), params)
    (cut, *_), begun = plan.cut_state(tx, state, params)
    assert begun == ()
    jax.tree.map(np.testing.assert_array_equal, cut.mu, plan.cut(state[0].mu))
    # The paths of a list are numbers, and so are those of what sm3 keeps of each.
    rows = [_normal(n, m, seed=n) for n, m in ((3, 8), (8, 6), (6, 5), (5, 2))]
    tx = optax.sm3(0.1)
    _, small, plan = slim(lambda p, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]) @ p[2]) @ p[3], rows, _normal(4, 3), ratio=0.5)
    _, state = tx.update(rows, tx.init(rows), rows)
    cut, begun = plan.cut_state(tx, state, rows)
    assert begun == ()
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, tx.init(small))


def test_what_cannot_be_cut_begins_anew_and_is_named():
    def init(params):
        return {"histogram": jax.tree.map(lambda w: jnp.zeros(w.size), params), "count": jnp.ones(())}

    tx = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    params = {"a": _normal(3, 4), "b": _normal(4, 2, seed=1)}
    _, _, plan = slim(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 3)), ratio=0.5)
    state, begun = plan.cut_state(tx, {**init(params), "count": jnp.full((), 7.0)}, params)
    assert begun == ("histogram/a", "histogram/b")
    assert (state["histogram"]["a"].shape, float(state["count"])) == ((6,), 7.0)
    with pytest.raises(ValueError, match="the state is not one of this optimiser"):
        plan.cut_state(optax.sgd(0.1), state, params)


def test_plans_compose_and_survive_a_fresh_process(tmp_path):
    apply, params, x = _case(mixer)
    once_apply, once, first, _ = _slimmed(mixer)
    twice_apply, twice, second = slim(once_apply, once, x, ratio=0.5)
    both = first.then(second)
    jax.tree.map(np.testing.assert_array_equal, both.cut(params), twice)
    out = jax.jit(both.bind(apply))(twice, x)
    np.testing.assert_allclose(out, jax.jit(twice_apply)(twice, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out, jax.jit(apply)(mask(params, both), x), rtol=1e-5, atol=1e-5)
    both.save(tmp_path / "plan.json")
    script = (
        "import sys, jax.numpy as jnp\n"
        "from jaxopt_lab.surgery import Plan\n"
        "plan = Plan.load(sys.argv[1])\n"
        "params = {'a': jnp.ones((3, 4)), 'b': jnp.ones((4, 2))}\n"
        "small = plan.bind(lambda p, x: (x @ p['a']) @ p['b'])\n"
        "print(small(plan.cut(params), jnp.ones((5, 3))).tolist()[4])\n"
    )
    Plan({"a": (3, 4), "b": (4, 2)}, {"a": (np.arange(3), np.array([1])), "b": (np.array([1]), np.arange(2))}).save(tmp_path / "p")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "p")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [3.0, 3.0]
    loaded = Plan.load(tmp_path / "plan.json")
    jax.tree.map(np.testing.assert_array_equal, loaded.cut(params), twice)


def test_a_plan_for_another_function_is_refused(tmp_path):
    params = {"a": _normal(3, 4), "b": _normal(4, 2)}
    _, small, plan = slim(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 3)), ratio=0.5)
    with pytest.raises(ValueError, match=r"^a\[1\]: index \d was cut, and in this function it cannot be: it is output 0"):
        plan.bind(lambda p, x: x @ p["a"])(small, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"^b\[1\]: the plan keeps 2 of 2 indices, but they are coupled to others"):
        plan.bind(lambda p, x: (x @ p["a"] @ p["b"]).sum() * (p["a"][0, :2] + p["b"][0]).sum())(small, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"^a has shape \(3, 4\), and \(3, 2\) is kept of it: pass plan.cut"):
        plan.bind(lambda p, x: x @ p["a"] @ p["b"])(params, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"^the plan is for other parameters; first of 1 paths: b"):
        plan.bind(lambda p, x: x @ p["a"])({"a": small["a"]}, jnp.ones((1, 3)))
    shapes = '"shapes": {"a": [3]}'
    texts = ("", "[]", '{"format": 1}', '{"format": 2, "shapes": {}, "kept": {}}')
    for text in (
        *texts,
        f'{{"format": 1, {shapes}, "kept": {{"a": [[5]]}}}}',
        f'{{"format": 1, {shapes}, "kept": {{"a": [[1, 0]]}}}}',
    ):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ValueError, match="is no plan"):
            Plan.load(tmp_path / "bad")


def test_which_units_go_and_how_many():
    params = {"a": jnp.diag(jnp.array([1.0, 4.0, 2.0, 3.0])), "b": jnp.ones((4, 2))}
    apply = lambda p, x: x @ p["a"] @ p["b"]  # noqa: E731
    x = jnp.ones((1, 4))
    kept = lambda **how: slim(apply, params, x, **how)[2].kept["a"][1].tolist()  # noqa: E731
    assert kept(ratio=0.5) == [1, 3]
    assert kept(ratio=0.5, round_to=3) == [1, 2, 3]
    assert kept(ratio=0.99) == [1]
    assert kept(keep={"b[0]": 3}) == [1, 2, 3]
    assert kept(ratio=0.5, criterion=surgery.taylor({"a": jnp.diag(jnp.array([9.0, 1.0, 9.0, 1.0])), "b": jnp.zeros((4, 2))})) == [
        0,
        2,
    ]
    assert kept(budget=surgery.parameters(12)) == [1, 3]
    assert kept(budget=surgery.macs(18)) == kept(budget=surgery.macs(part=0.75)) == [1, 2, 3]
    assert kept(budget=[surgery.macs(18), surgery.parameters(part=0.5), surgery.milliseconds(1e6, repeats=1)]) == [1, 3]
    assert slim(apply, params, x, ratio=0.0)[2].kept == {}
    two = {"a": jnp.array([[1.0, 1.0]]), "b": jnp.ones((2, 3)), "c": jnp.ones((3, 1))}
    _, small, _ = slim(lambda p, x: x @ p["a"] @ p["b"] @ p["c"], two, jnp.ones((1, 1)), ratio=0.4, ranking=surgery.global_())
    assert tree.size(small) < tree.size(two)


def test_compressed_trees_are_slimmed_dense():
    apply, params, x = _case(mixer)
    small_apply, small, _ = slim(apply, compress.quantize(params), x, ratio=0.5)
    got, want = jax.jit(compress.lift(small_apply))(compress.quantize(small), x), jax.jit(small_apply)(small, x)
    np.testing.assert_allclose(got, want, rtol=0.1, atol=0.05)


def test_coupling_prints_legibly():
    params = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "b": jnp.ones((8, 2)), "loose": jnp.ones((2, 5))}

    def apply(params, x):
        h = x @ params["a"]["kernel"] + params["a"]["bias"][None]
        return jnp.concatenate([h, jnp.sort(h, axis=-1)], -1) @ params["b"]

    assert str(coupled_channels(apply, params, jnp.ones((1, 3)))) == (
        "protected\n"
        "    a/bias[0], 4 indices: sort along it minds the order\n"
        "    a/kernel[0], 3 indices: it is input 0\n"
        "    a/kernel[1], 4 indices: sort along it minds the order\n"
        "    b[0], 8 indices: sort along it minds the order\n"
        "    b[1], 2 indices: it is output 0\n"
        "    loose[0], 2 indices: this function does not read it\n"
        "    loose[1], 5 indices: this function does not read it"
    )


def _hidden(p, x):
    return jnp.tanh(x @ p["a"])


def _shifted(p, x):
    h = _hidden(p, x)
    return (h[:, :6] + h[:, 2:]) @ p["b"][:6] + jnp.sort(h[:, 6:]) @ p["b"][:2]


def _one_by_one(p, x):
    h = _hidden(p, x)
    return sum(jnp.outer(h[:, i], p["b"][i]) for i in range(4)) + h[:, 4:] @ p["b"][4:]


def _groups(p, x):
    groups = jnp.split(_hidden(p, x).reshape(5, 4, 2), 4, axis=1)
    return sum(part[:, 0] @ p["b"][2 * k : 2 * k + 2] for k, part in enumerate(groups))


def _moved(p, x):
    h = _hidden(p, x)
    return (jnp.roll(h, 3, 1) + h[:, ::-1] + jnp.tile(h[:, :4], 2)) @ p["b"]


def _branch(p, x):
    h = _hidden(p, x)
    return jax.lax.cond(x.sum() > 0, jnp.tanh, jnp.sin, h - h.mean(0)[None]) @ p["b"]


PROBES = {
    # What is 0 where a unit is masked, or goes with weights that are.
    "an activation that is not 0 at 0": lambda p, x: jnp.cos(x @ p["a"]) @ p["b"],
    "a sum of zeros": lambda p, x: _hidden(p, x).sum(1) + jax.nn.gelu(x @ p["a"]).sum(1),
    "a divisor that is as large by chance": lambda p, x: (_hidden(p, x).sum(1) ** 2) / 8 + (_hidden(p, x).sum(1) + 1) / 8,
    "a divisor in a loop": lambda p, x: jax.lax.fori_loop(0, 3, lambda i, c: c / 8, _hidden(p, x).sum(1)),
    "numbers drawn inside": lambda p, x: jnp.cos(x @ p["a"] + jax.random.uniform(KEY, (1, 8))) @ p["b"],
    "constants along the channels": lambda p, x: (
        (_hidden(p, x) * np.arange(8.0, dtype=np.float32)[None] + np.ones((1, 8))) @ p["b"]
    ),
    "one channel for all": lambda p, x: (_hidden(p, x) * _hidden(p, x)[:, :1] + _hidden(p, x)[:, 1][:, None]) @ p["b"],
    "a lookup along the rows": lambda p, x: jnp.take_along_axis(_hidden(p, x), jnp.argsort(x @ p["a"], axis=0), axis=0) @ p["b"],
    "a derivative of one's own that closes over an array": lambda p, x: _weighted(x @ p["a"]) @ p["b"],
    "the root of a sum of squares": lambda p, x: jnp.sqrt(jnp.sum((x @ p["a"]) ** 2, axis=1)),
    "numbers between": lambda p, x: jax.lax.pad(_hidden(p, x), 0.0, ((0, 0, 0), (1, 0, 1)))[:, 1::2] @ p["b"],
    "shifted sums": _shifted,
    "channels one by one": _one_by_one,
    "groups one by one": _groups,
    "rolled, reversed, tiled": _moved,
    "a mean over rows, and a branch": _branch,
}


@jax.custom_vjp
def _weighted(h):
    return h * np.linspace(1.0, 2.0, 8, dtype=np.float32)[None]


_weighted.defvjp(lambda h: (_weighted(h), None), lambda _, g: (2 * g,))


@pytest.mark.parametrize("name", PROBES)
def test_what_is_cut_is_what_mask_says(name):
    apply, x = PROBES[name], _normal(5, 3)
    params = {"a": _normal(3, 8, seed=1), "b": _normal(8, 2, seed=2), "c": _normal(2, 2, seed=3)}
    if not any(group.units > 1 for group in coupled_channels(apply, params, x).groups):
        # All of it is protected.
        assert name in ("shifted sums", "numbers between", "groups one by one", "rolled, reversed, tiled")
        return
    small_apply, small, plan = slim(apply, params, x, ratio=0.5)
    got, grads = _value_and_gradient(small_apply, small, x)
    want, masked = _value_and_gradient(apply, mask(params, plan), x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), grads, plan.cut(masked))


def _outer(params, x, by):
    h = x @ params["a"]
    return jax.nn.relu(by(h[:, :, None], (x @ params["b"][:3])[:, None, :]))


def _less_its_sum(h):
    return jnp.abs(h - h.sum(-1, keepdims=True))


def _mean_and_sum(h):
    total = h.sum(-1)
    return total / 8 + jnp.sin(total)


def _windows(h):
    return jax.lax.reduce_window(h, 1.0, jax.lax.add, (2, 1), (1, 1), "VALID")


def test_a_sum_over_products_of_two_groups_is_cut_along_either():
    params = {"a": _normal(3, 8), "b": _normal(8, 2, seed=1)}
    apply = lambda p, x: _outer(p, x, jnp.multiply).sum((1, 2))  # noqa: E731
    x = _normal(5, 3)
    small_apply, small, plan = slim(apply, params, x, ratio=0.5)
    assert small["a"].shape == (3, 4)
    np.testing.assert_allclose(small_apply(small, x), apply(mask(params, plan), x), rtol=1e-5, atol=1e-6)


def test_positions_that_this_length_does_not_reach_are_no_units():
    params = {"a": _normal(3, 8), "pos": _normal(9, 8, seed=1), "b": _normal(8, 2, seed=2)}
    apply = lambda p, x: jax.nn.relu(x @ p["a"] + p["pos"][None, : x.shape[1]]) @ p["b"]  # noqa: E731
    assert "pos[0], 6 indices: this function does not read it at these shapes" in str(
        coupled_channels(apply, params, _normal(1, 3, 3))
    )
    small_apply, small, plan = slim(apply, params, _normal(1, 3, 3), ratio=0.5)
    assert small["pos"].shape == (9, 4)
    x = _normal(2, 9, 3)
    np.testing.assert_allclose(small_apply(small, x), apply(mask(params, plan), x), rtol=1e-5, atol=1e-6)


def test_a_choice_between_zeros_is_walked():
    """What a program chooses may be literals alone, as where a mask of no use is traced."""
    params = {"a": _normal(3, 8), "b": _normal(8, 2, seed=1)}
    apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"] + jax.lax.select_n(x[0, 0] > 0, 0.0, 0.0)  # noqa: E731
    x = _normal(5, 3)
    small_apply, small, plan = slim(apply, params, x, ratio=0.5)
    np.testing.assert_allclose(small_apply(small, x), apply(mask(params, plan), x), rtol=1e-5, atol=1e-6)


def test_weakly_typed_numbers_stay_so():
    params = {"a": jnp.full((3, 8), 0.5), "b": jnp.ones((8, 2), jnp.bfloat16)}
    x = _normal(2, 3).astype(jnp.bfloat16)
    apply = lambda p, x: jax.nn.relu((x[..., None] * p["a"][None]).sum(1)) @ p["b"]  # noqa: E731
    small_apply, small, plan = slim(apply, params, x, ratio=0.5)
    assert small_apply(small, x).dtype == apply(small, x).dtype == jnp.bfloat16
    assert plan.bind(jax.jit(apply))(small, x).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (lambda p, x: jnp.exp(x @ p["a"]).sum(1), "a unit of zeros would add to the sum over it"),
        (lambda p, x: jax.nn.softplus(x @ p["a"]).sum(-1), "a unit of zeros would add to the sum over it"),
        (lambda p, x: jnp.exp(x @ p["a"]) @ np.ones((8, 2), np.float32), "a unit of zeros would add to the sum over it"),
        (lambda p, x: jnp.mean((x @ p["a"] - jax.nn.one_hot(jnp.arange(5), 8)) ** 2), "its indices are counted"),
        (lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"], "reduce_max over it would be another"),
        (lambda p, x: jnp.cumsum(x @ p["a"], axis=1) @ p["b"], "cumsum along it minds the order"),
        (lambda p, x: (x @ p["a"]).at[:, 2].set(0.0) @ p["b"], "scatter is not understood"),
        (lambda p, x: (jnp.tanh(x @ p["a"]), x @ p["a"] @ p["b"]), "it is output 0"),
        # A number for all units is none of each: what it adds is there where a unit is cut.
        (lambda p, x: jax.nn.relu(x @ p["a"] + p["one"][None]).sum(-1), "a unit of zeros would add to the sum over it"),
        (lambda p, x: (p["one"][None] * jax.nn.softplus(x @ p["a"])).sum(-1), "a unit of zeros would add to the sum over it"),
        (lambda p, x: _outer(p, x, jnp.add).sum((1, 2)), "a unit of zeros would add to the sum over it"),
        (lambda p, x: _less_its_sum(x @ p["a"]).sum(-1), "a unit of zeros would add to the sum over it"),
        (lambda p, x: jax.lax.cumlogsumexp(x @ p["a"], axis=0).sum(-1), "a unit of zeros would add to the sum over it"),
        (lambda p, x: _windows(x @ p["a"]).sum(-1), "a unit of zeros would add to the sum over it"),
        # That there is a mean as well is no excuse.
        (lambda p, x: (jnp.exp(x @ p["a"]).sum(-1), (x @ p["a"]).mean(-1)), "a unit of zeros would add to the sum over it"),
        (lambda p, x: _mean_and_sum(jnp.exp(x @ p["a"])), "a unit of zeros would add to the sum over it"),
    ],
)
def test_what_would_be_wrong_is_protected(apply, reason):
    params = {"a": _normal(3, 8), "b": _normal(8, 2, seed=1), "one": jnp.ones(1)}
    protected = {(entry.path, entry.axis): entry.reason for entry in coupled_channels(apply, params, _normal(5, 3)).protected}
    assert protected["a", 1] == reason


def test_trees_that_look_alike_are_not_taken_for_each_other():
    net = {"d": {"k": _normal(3, 4)}, "o": _normal(4, 2, seed=1)}
    params = {"params": net, "ema": net}
    apply = lambda p, x: jnp.tanh(x @ p["params"]["d"]["k"]) @ p["params"]["o"]  # noqa: E731
    _, small, plan = slim(apply, params, jnp.ones((1, 3)), ratio=0.5)
    assert small["ema"]["o"].shape == (4, 2)
    assert small["params"]["o"].shape == (2, 2)
    with pytest.raises(ValueError, match=r"^d/k may be ema/d/k or params/d/k: pass the whole tree"):
        plan.cut(net)
    with pytest.raises(ValueError, match=r"^other is no parameter of the plan"):
        plan.cut({"other": net["o"]})
    # An output of a single name is one, whatever it is called.
    assert "it is output 0" in str(coupled_channels(lambda p, x: {"a": jnp.tanh(x @ p["a"])}, {"a": _normal(3, 8)}, _normal(3, 3)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "give exactly one of ratio, keep, budget"),
        ({"ratio": 0.5, "keep": {}}, "give exactly one of"),
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\): at 1 no group would have a unit left; got 1.0"),
        ({"ratio": 0.5, "round_to": 0}, "round_to must be a whole number of at least 1; got 0"),
        ({"ratio": 0.5, "exclude": "a"}, "nothing can be cut: 1 groups, all of one unit or excluded"),
        ({"keep": {"c[0]": 1}}, r"keep names c\[0\], which is in no group that can be cut; there are a\[1\]"),
        ({"keep": {"a[1]": 0}}, r"keep=0 of a\[1\]: give 1 to 4 units"),
        (
            {"budget": surgery.parameters(3)},
            "the smallest slimming still takes 5 parameters, and 3 are the most: give a larger budget",
        ),
        ({"budget": []}, "budget holds none"),
        ({"keep": {"a[1]": 2}, "round_to": 2}, "round_to=2 goes with a ratio or a budget"),
        ({"keep": {"a[1]": 2.5}}, r"keep=2.5 of a\[1\]: give 1 to 4 units"),
        ({"ratio": 0.5, "round_to": 1.5}, "round_to must be a whole number of at least 1; got 1.5"),
    ],
)
def test_what_cannot_be_is_said(how, message):
    params = {"a": _normal(3, 4), "b": _normal(4, 2)}
    with pytest.raises(ValueError, match=message):
        slim(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 3)), **how)
