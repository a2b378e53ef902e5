"""Networks made wider: the same function, in every kind of network, and what becomes of gradients, plans and optimisers."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxopt_lab import nets
from jaxopt_lab.core import tree
from jaxopt_lab.surgery import Plan, slim, widen

KEY = jax.random.key(0)
TOKENS = jax.device_put(np.arange(10).reshape(2, 5) % 11)


def _normal(*shape, seed=0):
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


# Where a normalisation takes a mean over units, each has to be copied as often as the others.
ZOO = {
    "lenet": (nets.LeNet((4, 6), (8,), classes=3), _normal(2, 12, 12, 1), 1.5),
    "resnet": (nets.ResNet(depth=6, widths=(4, 6), classes=3), _normal(2, 8, 8, 3), 1.5),
    "densenet": (nets.DenseNet((((6, 4), (6, 4)), ((6, 4),)), stem=4, classes=3), _normal(2, 16, 16, 3), 1.5),
    "mobilenet": (nets.MobileNetV2((((4,),), ((12, 6), (12, 6))), (1, 2), 6, 8, classes=3), _normal(2, 16, 16, 3), 1.5),
    "gru": (nets.Recurrent((6,), classes=3, cell=nn.GRUCell, vocabulary=11, embedding=4), TOKENS, 1.5),
    "vit": (nets.VisionTransformer(4, 8, 2, 2, 8, classes=3), _normal(2, 8, 8, 3), 2),
    "decoder": (nets.Decoder(11, 8, 8, 1, 4, mlp_width=8, tied=False), TOKENS, 2),
}


# The others with `scripts/test -m slow`.
_OFTEN = ("mobilenet", "decoder")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in _OFTEN else pytest.mark.slow) for name in ZOO])
def test_the_function_stays(name):
    module, x, factor = ZOO[name]
    model = nets.from_linen(module)
    variables = jax.jit(model.init)(KEY, x)
    # Positive, so that every unit of a few is seen.
    variables = jax.tree.map(lambda leaf: leaf + 0.01, variables)
    wide_model, wide, plan = widen(model, variables, x, width=factor, key=KEY)
    assert tree.size(wide) > 1.4 * tree.size(variables)
    once = jnp.concatenate([x, x[:1]])
    got, want = jax.jit(wide_model.predict)(wide, once), jax.jit(model.predict)(variables, x)
    np.testing.assert_allclose(got[:2], want, rtol=1e-5, atol=1e-5)
    assert jax.tree.map(jnp.shape, plan.cut(variables)) == jax.tree.map(jnp.shape, wide)


PARAMS = {"a": _normal(3, 4), "b": _normal(4, 5, seed=1), "c": _normal(5, 2, seed=2), "r": _normal(8, 2, seed=4)}
X = _normal(6, 3, seed=3)


def _perceptron(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]


def test_units_by_name_and_the_shares_of_copies():
    _, wide, plan = widen(_perceptron, PARAMS, X, width={"b[0]": 6})
    assert plan.kept["a"][1].tolist() == [0, 0, 1, 1, 2, 3]
    np.testing.assert_array_equal(wide["b"][0], PARAMS["b"][0] / 2)
    np.testing.assert_array_equal(wide["b"][4], PARAMS["b"][2])
    np.testing.assert_array_equal(wide["c"], PARAMS["c"])
    _, drawn, plan = widen(_perceptron, PARAMS, X, width={"a[1]": 9}, key=KEY)
    assert np.bincount(plan.kept["a"][1]).tolist().count(3) == 1
    shares = plan.shares["b"][0]
    np.testing.assert_allclose([shares[plan.kept["b"][0] == u].sum() for u in range(4)], 1)
    assert len(np.unique(np.asarray(drawn["b"]), axis=0)) == 9


def test_copies_part_in_training_where_their_shares_differ():
    def gradient(key):
        wide_apply, wide, _ = widen(_perceptron, PARAMS, X, width=2, key=key)
        loss = lambda params: jnp.mean((wide_apply(params, X) - 1) ** 2)  # noqa: E731
        return np.asarray(jax.jit(jax.grad(loss))(wide)["a"]).reshape(3, 4, 2)

    alike, apart = gradient(None), gradient(KEY)
    np.testing.assert_allclose(alike[..., 0], alike[..., 1], rtol=1e-5, atol=1e-7)
    assert (np.abs(apart[..., 0] - apart[..., 1]).max(0) > 1e-3).all()


def test_under_vmap_and_at_other_lengths():
    def apply(params, x):
        carry = jnp.zeros((x.shape[0], 4))
        step = lambda h, x: (jnp.tanh(x @ params["a"] + h @ params["h"]), None)  # noqa: E731
        return jax.lax.scan(step, carry, x.swapaxes(0, 1))[0] @ params["b"]

    params = {"a": _normal(3, 4), "h": _normal(4, 4, seed=1), "b": _normal(4, 2, seed=2)}
    wide_apply, wide, _ = widen(apply, params, jax.ShapeDtypeStruct((2, 5, 3), jnp.float32), width=1.5, key=KEY)
    assert wide["h"].shape == (6, 6)
    x = _normal(4, 1, 7, 3)
    got = jax.jit(jax.vmap(functools.partial(wide_apply, wide)))(x)
    np.testing.assert_allclose(got, jax.jit(jax.vmap(functools.partial(apply, params)))(x), rtol=1e-5, atol=1e-5)


def test_an_nnx_module():
    graph, state = nnx.split(nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1))))
    apply = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    wide_apply, wide, _ = widen(apply, state, X, width=2)
    assert tree.size(wide) > 1.5 * tree.size(state)
    np.testing.assert_allclose(wide_apply(wide, X), apply(state, X), rtol=1e-5, atol=1e-6)


def test_the_optimiser_follows():
    tx = optax.chain(optax.scale_by_adam(), optax.contrib.schedule_free_sgd(0.1))
    grads = jax.grad(lambda params: jnp.mean(_perceptron(params, X) ** 2))
    state = tx.init(PARAMS)
    updates, state = jax.jit(tx.update)(grads(PARAMS), state, PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    wide_apply, wide, plan = widen(_perceptron, params, X, width=2, key=KEY)
    wide_state, begun = plan.cut_state(tx, state, params)
    assert begun == ()
    adam, free = wide_state
    old, old_free = state
    np.testing.assert_array_equal(adam.mu["a"], np.repeat(old.mu["a"], 2, axis=1))
    np.testing.assert_array_equal(adam.nu["b"], old.nu["b"][np.ix_(*plan.kept["b"])])
    # The iterates that it averages are parameters: copies share them.
    np.testing.assert_array_equal(free.z["b"], plan.cut({**params, "b": old_free.z["b"]})["b"])
    loss = lambda params: jnp.mean((wide_apply(params, X) - 1) ** 2)  # noqa: E731
    updates, _ = jax.jit(tx.update)(jax.grad(loss)(wide), wide_state, wide)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, wide)


def test_a_plan_is_saved_and_composes(tmp_path):
    wide_apply, wide, plan = widen(_perceptron, PARAMS, X, width=2, key=KEY)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    jax.tree.map(np.testing.assert_array_equal, loaded.cut(PARAMS), wide)
    np.testing.assert_array_equal(loaded.bind(_perceptron)(wide, X), wide_apply(wide, X))
    small_apply, small, second = slim(wide_apply, wide, X, ratio=0.25)
    both = plan.then(second)
    jax.tree.map(np.testing.assert_array_equal, both.cut(PARAMS), small)
    np.testing.assert_allclose(both.bind(_perceptron)(small, X), small_apply(small, X), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^a\[1\]: the plan copies units"):
        plan.scatter(wide)


def _branching(params, x):
    h = x @ params["a"]
    return jnp.where(x[:, :1] > 9, jnp.abs(h).sum(-1, keepdims=True), 0.0) + jnp.where(
        x.sum() < 0, x[:, :1], h.sum(-1, keepdims=True)
    )


def _unit_columns(params, x):
    return (
        jax.nn.relu(x @ params["a"])
        @ params["b"]
        @ (params["c"] / jnp.linalg.norm(params["c"], axis=0, keepdims=True))
        * (x != 0).any()
    )


def _repeated(params, x):
    h = jnp.tanh(x @ params["a"])[:, :, None] * jnp.ones((1, 1, 2))
    return h.reshape(-1, 8) @ params["r"]


def _normed(params, x):
    h = jnp.tanh(x @ params["a"])
    return (h - h.mean(-1, keepdims=True)) @ params["b"] @ params["c"]


@pytest.mark.parametrize(
    ("apply", "width", "message"),
    [
        (_perceptron, 0.5, "width=0.5 must be a factor of at least 1; slim makes models narrower"),
        (_perceptron, {"a[1]": 3}, r"width=3 of a\[1\]: it has 4 units"),
        (_perceptron, {"z[1]": 3}, r"width names z\[1\], which is in no group"),
        (lambda p, x: x @ p["a"], 2, "nothing can be made wider: no group of units"),
        (_normed, {"a[1]": 6}, r"6 units instead of 4 in the group of a\[1\] make another function of it"),
        # What an example does not show: a branch that it does not take, outputs that are all 0, or whole numbers.
        (_branching, {"a[1]": 6}, r"6 units instead of 4 in the group of a\[1\] make another function of it"),
        (_unit_columns, {"b[1]": 10}, r"10 units instead of 5 in the group of b\[1\] make another function of it"),
        (
            lambda p, x: (jnp.abs(x @ p["a"]).sum(-1) > 6).astype(int),
            2,
            r"8 units instead of 4 in the group of a\[1\] make another",
        ),
        (
            lambda p, x: jnp.sqrt(15 - jnp.abs(p["a"]).sum()) * x[:, :1],
            2,
            r"in the group of a\[0\] make another function of it, by inf",
        ),
        (_repeated, 2, r"in the group of a\[1\] cannot be: a reshape of"),
        (lambda p, x: x @ p["a"] @ p["b"] @ p["b"].T @ p["a"].T, 2, r"a\[1\] is contracted in one place and free in another"),
    ],
)
def test_what_cannot_be_widened_is_said(apply, width, message):
    with pytest.raises(ValueError, match=message):
        widen(apply, PARAMS, X, width=width)


def test_a_mean_stays_where_all_are_copied_alike():
    _, wide, _ = widen(_normed, PARAMS, X, width={"a[1]": 8})
    assert wide["a"].shape == (3, 8)


def _sliced(params, x):
    h = x @ params["a"]
    return jnp.concatenate([jnp.tanh(h[:, :2]) * jax.nn.sigmoid(h[:, 2:])[:, ::-1], h[:, 1::2]], axis=1) @ params["c"]


def _heads(params, x):
    h = jnp.tanh(x @ params["a"]).reshape(-1, 2, 2)
    scores = jnp.einsum("nhd,mhd->hnm", h, h)
    return jnp.einsum("hnm,mhd->nhd", jax.nn.softmax(scores), h).reshape(-1, 4) @ params["b"]


@pytest.mark.parametrize(("apply", "c"), [(_sliced, _normal(4, 2)), (_heads, _normal(5, 2))])
@pytest.mark.parametrize("factor", [1.5, 3])
def test_copies_through_slices_and_heads(apply, c, factor):
    params = {**PARAMS, "c": c}
    wide_apply, wide, _ = widen(apply, params, X, width={"a[1]": int(2 * factor)}, key=KEY)
    assert wide["a"].shape == (3, int(2 * factor) * 2)
    np.testing.assert_allclose(jax.jit(wide_apply)(wide, X), apply(params, X), rtol=1e-5, atol=1e-5)


def test_widened_and_slimmed_back_to_the_old_size():
    wide_apply, wide, first = widen(_perceptron, PARAMS, X, width=2, key=KEY)
    small_apply, small, second = slim(wide_apply, wide, X, ratio=0.5)
    both = first.then(second)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, PARAMS)
    np.testing.assert_allclose(both.bind(_perceptron)(small, X), small_apply(small, X), rtol=1e-6)


def test_a_module_of_equinox():
    net = eqx.nn.MLP(3, 2, 4, 1, key=KEY)
    apply = lambda net, x: jax.vmap(net)(x)  # noqa: E731
    wide_apply, wide, _ = widen(apply, net, X, width=2, key=KEY)
    assert wide.layers[0].weight.shape == (8, 3)
    np.testing.assert_allclose(wide_apply(wide, X), apply(net, X), rtol=1e-5, atol=1e-6)
