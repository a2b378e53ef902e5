"""Layers left out, run twice, and put in: against networks built by hand that way, in values, gradients, state and training."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

from jaxopt_lab import nets, tracing
from jaxopt_lab.core import tree
from jaxopt_lab.surgery.deepen import deepen
from jaxopt_lab.surgery.layers import drop_layers, stack_layers

TOKENS = jax.device_put(np.arange(10).reshape(2, 5) % 7)
IMAGES = jax.device_put(np.sin(np.arange(2.0 * 8 * 8 * 3)).reshape(2, 8, 8, 3))
ROWS = jax.device_put(np.sin(np.arange(12.0)).reshape(3, 4))
STEPS = jax.device_put(np.cos(np.arange(3.0 * 4 * 4)).reshape(3, 4, 4) / 2)


def drawn(model, *example):
    """Variables of a model without running its initialisers: none is zero, and variances are positive."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), *example))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        structure, [jax.device_put(np.asarray(rng.uniform(0.1, 0.6, leaf.shape), leaf.dtype)) for leaf in leaves]
    )


def mixed(variables, seed=1):
    """The same with signs."""
    rng = np.random.default_rng(seed)
    signed = lambda path, leaf: leaf if path[-1].key == "var" else leaf * rng.choice([-1.0, 1.0], leaf.shape).astype(leaf.dtype)  # noqa: E731
    return jax.tree_util.tree_map_with_path(signed, variables)


def close(a, b, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4)


def of(kind, /, **fields):
    return nets.from_linen(kind(**fields))


# Whole networks of modules: by depth, with an example and one of another batch and length, and the names of their blocks.

_DECODER = {"vocabulary": 7, "positions": 9, "width": 6, "heads": 2, "mlp_width": 5}
_LSTM = {"classes": 3, "vocabulary": 7, "embedding": 4}
NETS = {
    "decoder": (lambda depth: of(nets.Decoder, depth=depth, remat=True, **_DECODER), "block_{}"),
    "LSTM": (lambda depth: of(nets.Recurrent, widths=(4,) * depth, **_LSTM), "layer_{}"),
}
OTHER = TOKENS[:1, :3]


def rebuilt(variables, name, blocks):
    """Variables of a network whose blocks are those of the given names, in this order."""
    beginning = name.format("")
    params = {key: value for key, value in variables["params"].items() if not key.startswith(beginning)}
    return {"params": params | {name.format(k): variables["params"][block] for k, block in enumerate(blocks)}}


def compared(ours, params, theirs, by_hand, x, other):
    """Values of two functions on another example, which must be the same, and their gradients on the first."""

    @jax.jit
    def both(*trees):
        loss = lambda predict, p: jnp.sum(predict(p, x) ** 2)  # noqa: E731
        return [
            (predict(p, other), jax.grad(functools.partial(loss, predict))(p))
            for predict, p in zip((ours, theirs), trees, strict=True)
        ]

    (a, gradient), (b, expected) = both(params, by_hand)
    close(a, b)
    return gradient, expected


@pytest.mark.parametrize("name", ["decoder", pytest.param("LSTM", marks=pytest.mark.slow)])
def test_a_network_without_a_block_is_the_one_built_without_it(name):
    net, block = NETS[name]
    variables, layer = mixed(drawn(net(2), TOKENS)), block.format(0)
    small, params, plan = drop_layers(net(2), variables, TOKENS, layers=f"**/{layer}/**")
    names = [block.format(1)]
    by_hand = rebuilt(variables, block, names)
    gradient, expected = compared(small.predict, params, net(1).predict, by_hand, TOKENS, OTHER)
    close(rebuilt(gradient, block, names), expected)
    assert set(tree.paths(variables)) - set(tree.paths(params)) == set(plan.dropped) == set(plan.changes[0].paths)
    assert str(plan).startswith(f"**/{layer}/**: left out, with params/{layer}/")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_a_block_that_runs_twice_is_two_with_the_same_parameters(name):
    net, block = NETS[name]
    variables, layer = mixed(drawn(net(1), TOKENS)), block.format(0)
    deep, params, plan = stack_layers(net(1), variables, TOKENS, layers=f"**/{layer}/**")
    assert str(plan) == f"**/{layer}/**: twice, with params/{layer}_copy"
    close(params["params"][f"{layer}_copy"], variables["params"][layer], atol=0)
    # Another copy shows which is which, and that each has its gradient.
    params["params"][f"{layer}_copy"] = jax.tree.map(lambda leaf: 0.7 * leaf + 0.01, params["params"][layer])
    names = [layer, f"{layer}_copy"]
    by_hand = rebuilt(params, block, names)
    gradient, expected = compared(deep.predict, params, net(2).predict, by_hand, TOKENS, OTHER)
    close(rebuilt(gradient, block, names), expected)


# Bare functions.


def _residual(p, x, names="abcd"):
    for name in names:
        x = x + jnp.tanh(x @ p[name]["w"]) @ p[name]["v"]
    return jnp.sin(x)


_BLOCKS = {name: {"w": STEPS[k % 3] + k / 9, "v": STEPS[k % 3].T - k / 9} for k, name in enumerate("abcd")}


def test_several_layers_and_shapes_for_an_example():
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    small, params, plan = drop_layers(_residual, _BLOCKS, x, layers=["b/**", "d/**"])
    close(small(params, ROWS), _residual(_BLOCKS, ROWS, "ac"))
    assert str(plan) == "b/**: left out, with b/v, b/w\nd/**: left out, with d/v, d/w"
    shapes = jax.eval_shape(lambda: _BLOCKS)
    fewer = drop_layers(_residual, shapes, x, layers="b/**")[1]
    assert fewer == {name: shapes[name] for name in "acd"}
    # As one they run again as a whole.
    deep, params, _ = stack_layers(_residual, _BLOCKS, x, layers=[("b/**", "c/**")])
    close(deep(params, ROWS), _residual(_BLOCKS, ROWS, "abcbcd"))
    deep, params, _ = stack_layers(_residual, _BLOCKS, x, layers=["b/**", "c/**"])
    close(deep(params, ROWS), _residual(_BLOCKS, ROWS, "abbccd"))


def test_compiled_mapped_and_counted():
    small, params, _ = drop_layers(_residual, _BLOCKS, ROWS, layers="b/**")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), params)
    mapped = jax.jit(jax.vmap(small, in_axes=(0, None)))(stacked, ROWS)
    close(mapped, jnp.stack([_residual(own, ROWS, "acd") for own in (params, jax.tree.map(jnp.negative, params))]))
    # What was left out is not computed either.
    assert tracing.count(small, params, ROWS).macs == 6 * 3 * 4 * 4


def _plain(p, x, names="abc"):
    for name in names:
        x = jnp.tanh(x @ p[name])
    return x @ p["head"]


def test_a_plain_layer_goes_with_its_activation():
    params = {name: STEPS[k] for k, name in enumerate("abc")} | {"head": ROWS.T}
    for k, name in enumerate("abc"):
        small, fewer, _ = drop_layers(_plain, params, ROWS, layers=name)
        close(small(fewer, ROWS), _plain(params, ROWS, "abc".replace(name, "")))
        deep, more, _ = stack_layers(_plain, params, ROWS, layers=name)
        close(deep(more, ROWS), _plain(params, ROWS, "abc"[: k + 1] + "abc"[k:]))


def test_an_activation_behind_a_sum_stays_unless_the_one_before_had_it():
    block = lambda w, x: jax.nn.gelu(x + jnp.tanh(x @ w))  # noqa: E731
    apply = lambda p, x: block(p["b"], block(p["a"], x)) @ p["c"]  # noqa: E731
    small, params, _ = drop_layers(apply, {name: STEPS[k] for k, name in enumerate("abc")}, ROWS, layers="b")
    close(small(params, ROWS), block(STEPS[0], ROWS) @ STEPS[2])
    small, params, _ = drop_layers(apply, {name: STEPS[k] for k, name in enumerate("abc")}, ROWS, layers="a")
    close(small(params, ROWS), block(STEPS[1], jax.nn.gelu(ROWS)) @ STEPS[2])


# Scans over layers.


def _scanned(p, x):
    block = jax.checkpoint(lambda x, own: (x + jnp.tanh(x @ own["w"]) @ own["v"], None))
    return jax.jit(lambda p, x: jnp.sin(lax.scan(block, x, p)[0]))(p, x)


def test_steps_of_a_scan_are_left_out_and_repeated():
    params = {"w": STEPS, "v": STEPS[::-1]}
    at = lambda order: jax.tree.map(lambda leaf: leaf[jnp.array(order)], params)  # noqa: E731
    rows = [
        (drop_layers, [1], [0, 2]),
        (stack_layers, [0, 0, 1, 2, 2], [0, 0, 1, 2, 2]),
        (stack_layers, [0, 1, 2] * 2, [0, 1, 2] * 2),
    ]
    rows.append((stack_layers, [2, 0, 1], [2, 0, 1]))
    for surgery, steps, order in rows:
        changed, new, plan = surgery(_scanned, params, ROWS, layers={"*": steps})
        close(new, at(order), atol=0)
        close(changed(new, ROWS[:1]), _scanned(at(order), ROWS[:1]))
        assert str(plan) == f"*: steps {', '.join(map(str, order))} of 3"
    # Without steps, the scan is one layer.
    changed, new, _ = stack_layers(_scanned, params, ROWS, layers="*")
    close(changed(new, ROWS), _scanned(at([0, 1, 2] * 2), ROWS))


def test_a_scan_of_modules_and_a_part_of_each_step():
    net = of(nets.Decoder, depth=3, scan=True, remat=True, **_DECODER)
    variables = mixed(drawn(net, TOKENS))
    two, both, _ = drop_layers(net, variables, TOKENS, layers={"**/blocks/**": [1]})
    part, without, plan = drop_layers(net, variables, TOKENS, layers=[("**/*mlp*/**", "**/hidden/**")])
    assert len(plan.dropped) == 6
    # A perceptron whose last layer is zero adds nothing.
    blocks = without["params"]["blocks"] | {name: variables["params"]["blocks"][name] for name in ("norm_mlp", "hidden")}
    blocks["mlp_out"] = jax.tree.map(jnp.zeros_like, variables["params"]["blocks"]["mlp_out"])
    whole = {"params": without["params"] | {"blocks": blocks}}

    @jax.jit
    def values(both, without, whole):
        hand = of(nets.Decoder, depth=2, scan=True, **_DECODER)
        return [two.predict(both, OTHER), part.predict(without, OTHER)], [hand.predict(both, OTHER), net.predict(whole, OTHER)]

    close(*values(both, without, whole))


# State and random numbers.


class Step(nn.Module):
    """A residual layer with BatchNorm, of a scan."""

    train: bool

    @nn.compact
    def __call__(self, x, _):
        norm = nn.BatchNorm(use_running_average=not self.train, name="norm")
        return x + nn.Dense(4, name="out")(nn.relu(norm(nn.Dense(4, name="in")(x)))), None


class Looped(nn.Module):
    """Such layers in a loop."""

    depth: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        axes = {"params": 0, "batch_stats": 0}
        return nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=self.depth)(train, name="steps")(x, None)[0]


def test_running_statistics_go_with_their_steps():
    model = of(Looped, depth=3)
    variables = mixed(drawn(model, ROWS))
    small, params, _ = drop_layers(model, variables, ROWS, layers={"**/steps/**": [1]})
    close(params, jax.tree.map(lambda leaf: leaf[::2], variables), atol=0)
    close(*jax.jit(lambda p: [net.apply(p, ROWS, train=True) for net in (small, of(Looped, depth=2))])(params))
    # As one layer, the loop has statistics of both runs.
    deep, params, _ = stack_layers(model, variables, ROWS, layers="**/steps/**")
    state = jax.jit(functools.partial(deep.apply, train=True))(params, ROWS)[1]["batch_stats"]
    first = model.apply(variables, ROWS, train=True)
    second = model.apply(variables, first[0], train=True)
    close(state, {"steps": first[1]["batch_stats"]["steps"], "steps_copy": second[1]["batch_stats"]["steps"]})


_BLOCK = ("**/Conv_3/**", "**/Conv_4/**", "**/BatchNorm_3/**", "**/BatchNorm_4/**")


def resnet(depth):
    return of(nets.ResNet, depth=depth, widths=(4,), classes=3)


def test_a_residual_block_and_its_running_statistics():
    variables = mixed(drawn(resnet(6), IMAGES))
    small, fewer, plan = drop_layers(resnet(6), variables, IMAGES, layers=[_BLOCK])
    assert len(plan.dropped) == 10
    deep, more, _ = stack_layers(resnet(6), variables, IMAGES, layers=[_BLOCK])
    number = {
        "Conv_3_copy": "Conv_5",
        "Conv_4_copy": "Conv_6",
        "BatchNorm_3_copy": "BatchNorm_5",
        "BatchNorm_4_copy": "BatchNorm_6",
    }
    named = lambda whole: {part: {number.get(k, k): v for k, v in own.items()} for part, own in whole.items()}  # noqa: E731

    @jax.jit
    def values(fewer, more):
        rows = [(small, fewer), (deep, more)], [(resnet(4), fewer), (resnet(8), named(more))]
        return [[(net.predict(p, IMAGES[:1]), *net.apply(p, IMAGES, train=True)) for net, p in row] for row in rows]

    (ours, twice), theirs = values(fewer, more)
    close([ours, (*twice[:2], named(twice[2]))], theirs)
    close(deep.apply(more, IMAGES)[1], {"batch_stats": more["batch_stats"]}, atol=0)


def _dropped_out(key, x):
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["typed", "raw"])
def test_the_second_run_draws_its_own_numbers(key):
    again = lambda key: jax.random.fold_in(key, 1)  # noqa: E731
    params = {"a": STEPS[0], "b": STEPS[1]}

    def block(w, x, key):
        return x + _dropped_out(key, jnp.tanh(x @ w))

    def apply(p, x, key):
        return jax.jit(lambda p, x, key: jnp.sin(block(p["a"], x, jax.random.fold_in(key, 5)) @ p["b"]))(p, x, key)

    deep, params, _ = stack_layers(apply, params, ROWS, key, layers="a")
    inner = jax.random.fold_in(key, 5)
    twice = block(params["a"], block(params["a"], ROWS, inner), again(inner))
    close(jax.jit(deep)(params, ROWS, key), jnp.sin(twice @ params["b"]))

    def scanned(p, x, key):
        return lax.scan(lambda x, own: (block(own[0], x, own[1]), None), x, (p["w"], jax.random.split(key, 3)))[0]

    deep, params, _ = stack_layers(scanned, {"w": STEPS}, ROWS, key, layers={"w": [0, 1, 1, 2, 1]})
    keys, x = jax.random.split(key, 3), ROWS
    for step, times in ((0, 0), (1, 0), (1, 1), (2, 0), (1, 2)):
        x = block(STEPS[step], x, jax.random.fold_in(keys[step], times) if times else keys[step])
    close(deep(params, ROWS, key), x)


def test_dropout_of_a_module_in_training():
    model = of(nets.Decoder, depth=1, **_DECODER | {"dropout": 0.5})
    variables = mixed(drawn(model, TOKENS))
    deep, params, _ = stack_layers(model, variables, TOKENS, layers="**/block_0/**")
    train = jax.jit(lambda key: deep.apply(params, TOKENS, train=True, key=key)[0])
    one, same, other = train(jax.random.key(1)), train(jax.random.key(1)), train(jax.random.key(2))
    close(one, same, atol=0)
    assert not np.allclose(one, other)


# New layers.


class Plain(nn.Module):
    """A convolution of a kind, its activation, and a head."""

    kind: object
    activation: object = nn.relu

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(self.activation(self.kind(name="layer")(x)).reshape(x.shape[0], -1))


def _conv(*args, **options):
    return functools.partial(nn.Conv, *args, **options)


_NEW = {
    "scan": (of(nets.Decoder, depth=2, scan=True, **_DECODER), {"**/blocks/**": [0, 1]}, TOKENS, OTHER),
    "rematerialised": (of(nets.Decoder, depth=1, remat=True, **_DECODER), "**/block_0/**", TOKENS, OTHER),
    "ResNet": (resnet(6), [_BLOCK], IMAGES, IMAGES[:1]),
    "dense": (of(Plain, kind=functools.partial(nn.Dense, 5)), "**/layer/**", IMAGES, IMAGES[:1]),
    "strided, ReLU6": (of(Plain, kind=_conv(5, (3, 2), 2), activation=nn.relu6), "**/layer/**", IMAGES, IMAGES[:1]),
    "in groups, dilated": (
        of(Plain, kind=_conv(6, (3, 3), kernel_dilation=2, feature_group_count=3, use_bias=False)),
        "**/layer/**", IMAGES, IMAGES[:1],
    ),
    "in bfloat16": (of(Plain, kind=functools.partial(nn.Dense, 5, dtype=jnp.bfloat16)), "**/layer/**", IMAGES, IMAGES[:1]),
    "NNX": (nets.from_nnx(lambda rngs: nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), nnx.relu, nnx.Linear(5, 2, rngs=rngs))),
        "**/layers/0/**", ROWS, ROWS[:1]),
}  # fmt: skip


_SLOW = {"scan", "in bfloat16"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW)) for name in _NEW])
def test_a_new_layer_changes_nothing_and_can_be_trained(name):
    model, after, x, other = _NEW[name]
    variables = mixed(drawn(model, x))
    deep, params, plan = deepen(model, variables, x, after=after)
    assert tree.size(params) > tree.size(variables)

    @jax.jit
    def values(variables, params):
        gradient = jax.grad(lambda p: jnp.sum(deep.predict(p, x) ** 2))(params)
        return model.predict(variables, other), deep.predict(params, other), gradient

    before, after, gradient = values(variables, params)
    close(before, after)
    # All moves that begins anew; what stands before a kernel of zeros follows a step later.
    gradient = dict(zip(tree.paths(params), jax.tree.leaves(gradient), strict=True))
    assert plan.values
    assert all(np.any(gradient[path] != 0) for path in plan.values)


class Normalised(nn.Module):
    """A convolution, BatchNorm and a ReLU."""

    options: object

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.0, name="norm", **self.options)
        return nn.Dense(2, name="head")(nn.relu(norm(nn.Conv(5, (3, 3), name="conv")(x))).mean((1, 2)))


_LAYER = [("**/conv/**", "**/norm/**")]


def test_a_normalisation_of_a_new_layer_does_nothing_at_the_statistics_of_the_example():
    # With no momentum the running statistics are those of the last batch.
    model = of(Normalised, options={})
    variables = mixed(drawn(model, IMAGES))
    variables |= jax.jit(functools.partial(model.apply, train=True))(variables, IMAGES)[1]
    deep, params, plan = deepen(model, variables, IMAGES, after=_LAYER)
    assert str(plan).endswith("with batch_stats/norm_copy, params/conv_copy, params/norm_copy")

    @jax.jit
    def values(variables, params):
        evaluated = [model.predict(variables, IMAGES[:1]), deep.predict(params, IMAGES[:1])]
        return evaluated, model.apply(variables, IMAGES, train=True), deep.apply(params, IMAGES, train=True)

    evaluated, (expected, _), (out, state) = values(variables, params)
    close(*evaluated)
    # In training, too; and there they stay.
    close(out, expected)
    close(state, {"batch_stats": params["batch_stats"]})
    # Of shapes there are no statistics: those of the layer before are copied, and undone.
    deep, params, _ = deepen(model, variables, jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype), after=_LAYER)
    close(params["batch_stats"]["norm_copy"], variables["batch_stats"]["norm"], atol=0)
    close(deep.predict(params, IMAGES), model.predict(variables, IMAGES))


@pytest.mark.parametrize("without", [["use_scale"], ["use_bias"], ["use_scale", "use_bias"]], ids="-".join)
def test_a_normalisation_without_a_scale_or_shift_is_undone_all_the_same(without):
    model = of(Normalised, options=dict.fromkeys(without, False))
    variables = mixed(drawn(model, IMAGES))
    deep, params, _ = deepen(model, variables, IMAGES, after=_LAYER)
    close(*jax.jit(lambda v, p: [deep.predict(p, IMAGES[:1]), model.predict(v, IMAGES[:1])])(variables, params))


def test_a_deeper_network_trains_on():
    deep, params, plan = deepen(_residual, _BLOCKS, ROWS, after="b/**")
    tx, loss = optax.adam(1e-2), lambda p: jnp.mean((deep(p, ROWS) - 1) ** 2)
    state, begun = plan.cut_state(tx, tx.init(_BLOCKS), _BLOCKS)
    assert begun

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    losses, before = [], params["b_copy"]
    for _ in range(10):
        params, state, value = step(params, state)
        losses.append(value)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses[0], jnp.mean((_residual(_BLOCKS, ROWS) - 1) ** 2), rtol=1e-6)
    # The branch of the new layer has come to life, to its first weight.
    assert all(np.all(params["b_copy"][name] != before[name]) for name in "wv")


# States of optimisers.


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(1e-3), optax.sgd(0.1, momentum=0.9), optax.adafactor(min_dim_size_to_factor=2)],
    ids=["adamw", "momentum", "adafactor"],
)
def test_the_state_goes_with_its_parameters(tx):
    apply = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"]) @ p["c"]["w"]) @ p["d"]["w"]  # noqa: E731
    square = {"w": STEPS[0]}
    params = {"a": {**square, "b": ROWS[:1]}, "c": square, "d": {"w": ROWS.T}}
    old = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7.0) if jnp.ndim(leaf) else leaf, tx.init(params))
    for surgery, keyword in ((drop_layers, "layers"), (stack_layers, "layers"), (deepen, "after")):
        _, new, plan = surgery(apply, params, ROWS, **{keyword: "a/**"})
        state, begun = plan.cut_state(tx, old, params)
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(new))
        assert [jnp.shape(leaf) for leaf in jax.tree.leaves(state)] == [jnp.shape(leaf) for leaf in jax.tree.leaves(tx.init(new))]
        assert bool(begun) == (surgery is deepen)
        assert all("a_copy" in path for path in begun)
        fresh = dict(zip(tree.paths(state), jax.tree.leaves(tx.init(new)), strict=True))
        for path, leaf in zip(fresh, jax.tree.leaves(state), strict=True):
            if jnp.ndim(leaf):
                np.testing.assert_array_equal(leaf, fresh[path] if path in begun else 7.0)


def test_the_state_of_steps_goes_with_them():
    apply = lambda p, x: lax.scan(lambda x, w: (x + jnp.tanh(x @ w["a"]) @ w["b"], None), x, p)[0]  # noqa: E731
    params, tx = {"a": STEPS, "b": STEPS}, optax.adam(1e-3)
    moments = jnp.arange(3.0)[:, None, None] + jnp.ones((3, 4, 4))
    state = tx.init(params)
    old = (state[0]._replace(mu={"a": moments, "b": moments}), *state[1:])
    first = lambda state: state[0].mu["a"][:, 0, 0].tolist()  # noqa: E731
    assert first(drop_layers(apply, params, ROWS, layers={"*": [1]})[2].cut_state(tx, old, params)[0]) == [1, 3]
    assert first(stack_layers(apply, params, ROWS, layers={"*": [0, 1, 2, 1]})[2].cut_state(tx, old, params)[0]) == [1, 2, 3, 2]
    deep, new, plan = deepen(apply, params, ROWS, after={"*": [0, 2]})
    assert first(plan.cut_state(tx, old, params)[0]) == [1, 0, 2, 3, 0]
    assert str(plan) == "*: steps 0, 0, 1, 2, 2 of 3, new in place 1, 4"
    assert not new["b"][jnp.array([1, 4])].any()
    assert new["a"][1].any()
    close(deep(new, ROWS), apply(params, ROWS))


def test_a_subtree_of_parameters_and_of_state():
    model, variables = resnet(6), mixed(drawn(resnet(6), IMAGES))
    plan = stack_layers(model, variables, IMAGES, layers=[_BLOCK])[2]
    params = plan.cut(variables["params"])
    close(params, plan.cut(variables)["params"], atol=0)
    tx = optax.sgd(0.1, momentum=0.9)
    state, begun = plan.cut_state(tx, tx.init(variables["params"]), variables["params"])
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    assert not begun


# Trees of all kinds.


def _chain(p, x, layers):
    for layer in layers(p):
        x = jnp.tanh(x @ layer["w"])
    return x


@pytest.mark.parametrize(
    ("params", "layers", "layer", "place"),
    [
        ({"a": {"w": STEPS[0]}, "b": {"w": STEPS[1]}}, lambda p: [p["a"], p["b"]], "a/**", "a_copy/w"),
        ({0: {"w": STEPS[0]}, 1: {"w": STEPS[1]}}, lambda p: [p[0], p[1]], "0/**", "2/w"),
        ([{"w": STEPS[0]}, {"w": STEPS[1]}], lambda p: p, "0/**", "0/w_copy"),
        ({"params": {"w": STEPS[0]}}, lambda p: [p["params"]], "**", "params/w_copy"),
        (nnx.State({"a": {"w": nnx.Param(STEPS[0])}, "b": {"w": nnx.Param(STEPS[1])}}),
            lambda p: [{"w": p[k]["w"][...]} for k in "ab"], "a/**", "a_copy/w"),
    ],
    ids=["mapping", "numbers", "list", "only one", "NNX state"],
)  # fmt: skip
def test_a_copy_lies_beside_the_other(params, layers, layer, place):
    apply = functools.partial(_chain, layers=layers)
    deep, new, _ = stack_layers(apply, params, ROWS, layers=layer)
    assert set(tree.paths(new)) == {*tree.paths(params), place}
    ours = [own["w"] for own in layers(params)]
    by_hand = [{"w": w} for w in (ours[0], *ours)]
    close(deep(new, ROWS), _chain(None, ROWS, lambda _: by_hand))
    # Once more: of a copy, and beside one.
    deeper, newer, _ = stack_layers(deep, new, ROWS, layers=place)
    assert len(tree.paths(newer)) == len(tree.paths(new)) + 1
    close(deeper(newer, ROWS), _chain(None, ROWS, lambda _: [{"w": ours[0]}, *by_hand]))
    # And back.
    small, fewer, _ = drop_layers(deep, new, ROWS, layers=place)
    close(small(fewer, ROWS), apply(params, ROWS))


def test_another_precision_is_one_of_the_whole_tree():
    apply = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])  # noqa: E731
    small, params, _ = drop_layers(apply, {"a": STEPS[0], "b": STEPS[1]}, ROWS, layers="a")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, ROWS))
    assert small(*half).dtype == jnp.bfloat16


# What cannot be done is said by name.


def _two(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def _scan(p, x):
    return lax.scan(lambda x, own: (jnp.tanh(x @ own["a"]) @ own["b"], x), x, p)


def _first(p, x):
    return _scan(p, x)[0]


_P = {"a": STEPS[0], "b": STEPS[1], "c": STEPS[2]}
_S = {"a": STEPS, "b": STEPS}
_ERRORS = {
    "changes the shape": (drop_layers, _two, {**_P, "c": ROWS.T}, "c", r"c: no value of shape \(3, 4\) .* leaves it, \(3, 3\)"),
    "is used outside": (
        drop_layers, lambda p, x: ((h := jnp.tanh(x @ p["a"])) @ p["b"], h), _P, [("a", "b")], "a, b: what it computes leaves",
    ),
    "its input is used outside": (drop_layers, lambda p, x: (jnp.tanh(x @ p["a"]), x + 1), _P, "a", "a: no value of shape"),
    "holds another": (drop_layers, lambda p, x: x + jnp.tanh(x @ p["a"]) @ p["b"], _P, "a", "a: to drop it would drop b as well"),
    "holds another, twice": (
        stack_layers, lambda p, x: x + jnp.tanh(x @ p["a"]) @ p["b"], _P, "a", "a: to run it twice would run b twice as well",
    ),
    "is tied": (drop_layers, lambda p, x: _two(p, x) @ p["a"].T, _P, "a", "a: to drop it would drop b and 1 more as well"),
    "is tied to an output": (stack_layers, lambda p, x: (_two(p, x), jnp.sum(p["b"] ** 2)), _P, "b", "b: what it computes leaves"),
    "is any of two": (
        drop_layers, lambda p, x: jnp.tanh((x + 1) @ p["a"]) * jnp.cos((2 * x) @ p["a"]), _P, "a",
        r"a: several values of shape \(3, 4\) enter it",
    ),
    "is not there": (drop_layers, _two, _P, "**/block_9/**", "nothing matches .*block_9"),
    "is not read": (drop_layers, _two, {**_P, "d": ROWS}, "d", "d: nothing of what this function does with it"),
    "is two": (drop_layers, _two, _P, ["a", "*"], r"a belongs to a and to \*"),
    "is none": (drop_layers, _two, _P, [], "no layer is chosen"),
    "lies in no mapping": (stack_layers, lambda p, x: jnp.tanh(x @ p[0]), [STEPS[0]], "0", "0 lies in no mapping"),
    "is no scan": (drop_layers, _two, _P, {"a": [1]}, "a is not handed entry by entry .* it meets dot_general"),
    "is part of a scan": (drop_layers, _first, _S, {"a": [1]}, "a: the steps of its scan take an entry each of b"),
    "has no such step": (drop_layers, _first, _S, {"*": [3]}, r"\*: give steps of 0 to 2; got 3"),
    "has no step left": (drop_layers, _first, _S, {"*": [0, 1, 2]}, r"\*: all 3 steps would be left out"),
    "lacks a step": (stack_layers, _first, _S, {"*": [0, 1]}, r"\*: the order 0, 1 lacks some of its 3 steps"),
    "hands out its steps": (drop_layers, _scan, _S, {"*": [1]}, r"\*: what the 3 steps of its scan leave, float32\[3,3,4\]"),
    "has parts of several lengths": (drop_layers, _two, {**_P, "b": STEPS}, {"*": [0]}, r"\*: b has 3 steps and a has 4"),
    "is no residual": (deepen, _two, _P, "a", "behind a would change .* no activation that doing twice"),
    "is no residual scan": (deepen, _first, _S, {"*": [1]}, r"\*: a step of its scan does not hand on"),
    "lacks its bias": (deepen, lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][:1]), _P, "a", "no activation that doing twice"),
    "is no product": (deepen, lambda p, x: jax.nn.relu(x * p["a"][:3]), _P, "a", "a is no product of a value with one of its"),
}  # fmt: skip


@pytest.mark.parametrize("name", _ERRORS)
def test_a_layer_that(name):
    surgery, apply, params, layer, message = _ERRORS[name]
    with pytest.raises(ValueError, match=message):
        surgery(apply, params, ROWS, **{"after" if surgery is deepen else "layers": layer})


def test_a_tree_or_a_function_that_is_another():
    small, params, plan = drop_layers(_two, _P, ROWS, layers="b")
    with pytest.raises(ValueError, match=r"not the changed tree; first of 1 paths .*: b"):
        small(_P, ROWS)
    with pytest.raises(ValueError, match=r"a has shape \(3, 4, 4\), and the plan leaves \(4, 4\)"):
        small({**params, "a": STEPS}, ROWS)
    with pytest.raises(ValueError, match=r"a has shape \(3, 4, 4\), and the plan is for \(4, 4\)"):
        plan.cut({**_P, "a": STEPS})
    with pytest.raises(ValueError, match="d is no parameter of the plan"):
        plan.cut({"d": ROWS})
    with pytest.raises(ValueError, match="b: what it computes leaves it in several ways"):
        plan.bind(lambda p, x: (_two(p, x), p["b"]))(params, ROWS)
    with pytest.raises(ValueError, match="the state is not one of this optimiser"):
        plan.cut_state(optax.adam(1.0), optax.sgd(1.0, momentum=0.9).init(_P), _P)
    penalised = lambda p, x: (_two(p, x), jnp.sum(p["b"] ** 2))  # noqa: E731
    deep = stack_layers(_two, _P, ROWS, layers="b")[2]
    with pytest.raises(ValueError, match="b: what it computes leaves it in several ways"):
        deep.bind(penalised)(deep.cut(_P), ROWS)
