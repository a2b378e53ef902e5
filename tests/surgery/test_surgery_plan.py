"""The function of a smaller tree where it is to run: exported, mapped and sharded; and what it may not be bound to."""

import json
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import nets
from jaxopt_lab.surgery import Plan, coupled_channels, mask, slim


def _normal(*shape, seed=0):
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


PARAMS = {"a": _normal(3, 8), "b": _normal(8, 2, seed=1)}
X = _normal(8, 3, seed=2)


def _apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def test_exported_with_a_free_batch():
    small_apply, small, _ = slim(_apply, PARAMS, X, ratio=0.5)
    (batch,) = export.symbolic_shape("batch")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), small)
    exported = export.export(jax.jit(small_apply))(shapes, jax.ShapeDtypeStruct((batch, 3), jnp.float32))
    for n in (1, 5):
        np.testing.assert_allclose(exported.call(small, X[:n]), small_apply(small, X[:n]), rtol=1e-5, atol=1e-6)


def _exported(model, variables, x, shape):
    small_model, small, _ = slim(model, variables, x, ratio=0.5)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), small)
    exported = export.export(jax.jit(small_model.predict))(shapes, jax.ShapeDtypeStruct(shape, x.dtype))
    return exported.call(small, x[:1]), jax.jit(small_model.predict)(small, x[:1])


def test_networks_exported_with_a_free_batch():
    (batch,) = export.symbolic_shape("batch")
    model, x = nets.from_linen(nets.LeNet((4, 6), (8,), classes=3)), _normal(2, 12, 12, 1)
    got, want = _exported(model, jax.jit(model.init)(jax.random.key(0), x), x, (batch, 12, 12, 1))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    model, x = nets.from_linen(nets.Decoder(11, 16, 8, 1, 2, mlp_width=8)), jnp.arange(10).reshape(2, 5)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    got, want = _exported(model, variables, x, (batch, 5))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    # Positions are counted: a length that is a symbol makes that another operation.
    with pytest.raises(ValueError, match="at sizes length the function is another program than at 2: call or export it at fixed"):
        _exported(model, variables, x, (2, *export.symbolic_shape("length", constraints=["length <= 16"])))


def test_under_pmap_and_sharded():
    small_apply, small, _ = slim(_apply, PARAMS, X, ratio=0.5)
    want = small_apply(small, X)
    mapped = jax.pmap(small_apply, in_axes=(None, 0), devices=jax.devices()[:4])(small, X.reshape(4, 2, 3))
    np.testing.assert_allclose(mapped.reshape(8, 2), want, rtol=1e-5, atol=1e-6)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    rules = {"a": PartitionSpec(None, "model"), "b": PartitionSpec("model")}
    placed = {name: jax.device_put(leaf, NamedSharding(mesh, rules[name])) for name, leaf in small.items()}
    got = jax.jit(small_apply)(placed, jax.device_put(X, NamedSharding(mesh, PartitionSpec("data"))))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_whole_tree_that_is_sharded_is_cut_where_it_lies():
    _, small, plan = slim(_apply, PARAMS, X, ratio=0.5)
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    placed = jax.device_put(
        PARAMS, {"a": NamedSharding(mesh, PartitionSpec(None, "model")), "b": NamedSharding(mesh, PartitionSpec("model"))}
    )
    jax.tree.map(np.testing.assert_array_equal, plan.cut(placed), small)


def _experts(top):
    """A softmax over four experts, or over those that `top_k` chooses, and a feed-forward layer in each."""

    def apply(params, x):
        scores = x @ params["router"]
        hidden = jax.nn.relu(jnp.einsum("bi,eih->beh", x, params["up"]))
        outs = jnp.einsum("beh,eho->beo", hidden, params["down"])
        if top is None:
            return jnp.einsum("be,beo->bo", jax.nn.softmax(scores), outs)
        best, which = jax.lax.top_k(scores, top)
        gates = jnp.sum(jax.nn.one_hot(which, scores.shape[1]) * jax.nn.softmax(best)[..., None], axis=1)
        return jnp.einsum("be,beo->bo", gates, outs)

    return apply


@pytest.mark.parametrize("top", [None, 2])
def test_experts_are_cut_where_they_are_forced(top, tmp_path):
    params = {"router": _normal(3, 4), "up": _normal(4, 3, 5, seed=1), "down": _normal(4, 5, 2, seed=2)}
    apply = _experts(top)
    assert not any(group.name == "router[1]" for group in coupled_channels(apply, params, X).groups)
    forced = coupled_channels(apply, params, X, force="router")
    (experts,) = [group for group in forced.groups if group.name == "router[1]"]
    assert {(member.path, member.axis) for member in experts.members} == {("router", 1), ("up", 0), ("down", 0)}
    small_apply, small, plan = slim(apply, params, X, keep={"router[1]": 3}, force="router")
    kept = plan.kept["router"][1]
    by_hand = {"router": params["router"][:, kept], "up": params["up"][kept], "down": params["down"][kept]}
    jax.tree.map(np.testing.assert_array_equal, small, by_hand)
    np.testing.assert_allclose(small_apply(small, X), _experts(top)(by_hand, X), rtol=1e-5, atol=1e-6)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").forced == ("router",)
    if top:
        small_apply, small, _ = slim(apply, params, X, keep={"router[1]": 1}, force="router")
        with pytest.raises(ValueError, match="top_k chooses 2 of 4, and 1 are left: keep 2"):
            small_apply(small, X)


def test_a_module_of_equinox_with_its_functions_among_the_leaves():
    net = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
    apply = lambda net, x: jax.vmap(net)(x)  # noqa: E731
    small_apply, small, plan = slim(apply, net, X, ratio=0.5)
    assert small.layers[0].weight.shape == (4, 3)
    np.testing.assert_allclose(small_apply(small, X), apply(mask(net, plan), X), rtol=1e-5, atol=1e-5)


SCRIPT = """
import sys
import jax, jax.numpy as jnp
from jaxopt_lab.surgery import Plan

plan = Plan.load(sys.argv[1])
params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
small = plan.cut(params)
for x in (jnp.ones((5, 3)), jnp.ones((1, 3))):
    print(plan.bind(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])(small, x).shape)
try:
    plan.bind(lambda p, x: jax.nn.sigmoid(x @ p["a"]) @ p["b"])(small, jnp.ones((5, 3)))
except ValueError as error:
    print("is not the function that the plan was made for" in str(error))
print(plan.bind(lambda p, x: jax.nn.sigmoid(x @ p["a"]) @ p["b"], same=False)(small, jnp.ones((5, 3))).shape)
"""


def test_a_fresh_process_binds_the_same_function_and_no_other(tmp_path):
    _, _, plan = slim(_apply, PARAMS, X, ratio=0.5)
    plan.save(tmp_path / "plan.json")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "plan.json")], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["(5, 2)", "(1, 2)", "True", "(5, 2)"]


def test_the_same_function_is_no_other_where_it_is_compiled_mapped_or_differentiated():
    _, small, plan = slim(_apply, PARAMS, X, ratio=0.5)
    want = plan.bind(_apply)(small, X)
    for got in (
        jax.jit(plan.bind(_apply))(small, X),
        plan.bind(jax.jit(_apply))(small, X),
        jax.vmap(plan.bind(_apply), (None, 0))(small, X[:, None])[:, 0],
        jax.lax.scan(lambda carry, x: (carry, plan.bind(_apply)(small, x)), 0, X[:, None])[1][:, 0],
        plan.bind(_apply)(small, np.asarray(X)),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.isfinite(jax.grad(lambda small: plan.bind(_apply)(small, X).sum())(small)["a"]).all()
    for other in (lambda p, x: _apply(p, 2 * x), lambda p, x: _apply(p, x) + 1e-3, lambda p, x: jnp.sin(x @ p["a"]) @ p["b"]):
        with pytest.raises(ValueError, match="is not the function that the plan was made for"):
            plan.bind(other)(small, X)


def test_a_plan_for_predict_binds_apply():
    model = nets.from_linen(nets.ResNet(depth=6, widths=(4, 6), classes=3))
    x = _normal(2, 8, 8, 3)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    _, small, plan = slim(model, variables, x, ratio=0.5)
    outputs, state = plan.bind(model.apply)(small, x, train=True)
    assert outputs.shape == (2, 3)
    assert jax.tree.map(jnp.shape, state["batch_stats"]) == jax.tree.map(jnp.shape, small["batch_stats"])
    other = nets.from_linen(nets.ResNet(depth=6, widths=(4, 6), classes=3, activation=jnp.tanh))
    with pytest.raises(ValueError, match="is not the function that the plan was made for"):
        plan.bind(other.predict)(small, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: whole | {"format": 1}, "format 1, and this version reads 2"),
        (lambda whole: whole | {"kept": {"a": [[0, 1, 2], [9]]}}, r"what is kept of a is no part of \(3, 8\)"),
        (lambda whole: whole | {"kept": {"a": [[0, 1, 2], []]}}, r"what is kept of a is no part of \(3, 8\)"),
        (lambda whole: whole | {"shares": {"a": {"1": [0.5]}}}, r"there are 1 shares of a\[1\] for 4 indices"),
        (lambda whole: {key: value for key, value in whole.items() if key != "forced"}, "forced"),
        (lambda whole: [], "is no plan"),
    ],
)
def test_files_that_are_no_plan(tmp_path, change, message):
    _, _, plan = slim(_apply, PARAMS, X, ratio=0.5)
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        Plan.load(path)


def _counting():
    """A function that keeps something outside of itself."""
    seen = []

    def apply(params, x):
        seen.append(x)
        return _apply(params, x) * len(seen)

    return apply


def _branching(params, x):
    return _apply(params, x) if x[0, 0] > 0 else x


@pytest.mark.parametrize(
    ("apply", "x", "error", "message"),
    [
        (_counting(), X, ValueError, "is another program each time it is traced: it reads or changes something outside of itself"),
        (
            lambda p, x: _apply(p, x[x[:, 0] > 0]),
            X,
            jax.errors.NonConcreteBooleanIndexError,
            r"of shapes \(8, 3\): what it does",
        ),
        (_branching, X, jax.errors.TracerBoolConversionError, "depends on numbers: use jnp.where"),
        (_apply, X[0, 0], ValueError, r"while tracing the function on inputs of shapes \(\): it takes other inputs"),
    ],
)
def test_functions_that_cannot_be_traced(apply, x, error, message):
    with pytest.raises(error, match=message):
        slim(apply, PARAMS, x, ratio=0.5)


def test_dropout_drops_of_what_is_left_what_it_would_have_dropped():
    model = nets.from_linen(nets.MLP((8, 8), classes=3, dropout=0.5))
    variables = jax.jit(model.init)(jax.random.key(0), X)
    small_model, small, plan = slim(model, variables, X, ratio=0.5)
    key = jax.random.key(7)
    got, _ = jax.jit(lambda small: small_model.apply(small, X, train=True, key=key))(small)
    want, _ = jax.jit(lambda variables: model.apply(variables, X, train=True, key=key))(mask(variables, plan))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(got - small_model.predict(small, X)).max()) > 0.01
