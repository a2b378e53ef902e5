"""Where parameters meet products: by hand, by brute force over indices, and by what the layers themselves say they were given."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_lab.core import tracing, tree
from jaxopt_lab.core.tracing import Reducer, programs, views, walks


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


def _linen(module: nn.Module, *inputs):
    """A module's apply and the shapes of its variables, no weight made."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return module.apply, shapes


def _said(site: tracing.Site):
    axes = None if site.axes is None else (site.axes.contracted, site.axes.free, site.axes.batch, site.axes.picked)
    return site.name, axes, site.macs * site.repeats


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 4)
        return embed.attend(nn.Dense(4)(embed(tokens)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4)(nn.tanh(nn.Dense(8)(x))), None


def _layers(length: int) -> nn.Module:
    return nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=length)()


_X = _f32(2, 5, 4)
_DENSE = ((0,), (1,), (), ())
_MODELS = {
    "dense": lambda: (_linen(nn.Dense(3), _X), (_X,), [("params/kernel", _DENSE, 2 * 5 * 4 * 3)]),
    "grouped convolution": lambda: (
        _linen(nn.Conv(6, (3, 3), feature_group_count=3), _f32(2, 8, 8, 9)),
        (_f32(2, 8, 8, 9),),
        [("params/kernel", ((0, 1, 2), (3,), (), ()), 2 * 8 * 8 * 9 * 9 * 6 // 3)],
    ),
    # Of the 10 * 3 taps half meet a zero between two inputs.
    "transposed convolution": lambda: (
        _linen(nn.ConvTranspose(3, (3,), strides=(2,), transpose_kernel=True), _X),
        (_X,),
        [("params/kernel", ((0, 2), (1,), (), ()), 2 * (5 * 3) * 4 * 3)],
    ),
    "local convolution": lambda: (
        _linen(nn.ConvLocal(3, (3,)), _X), (_X,), [("params/kernel", ((1,), (2,), (0,), ()), 2 * 5 * 12 * 3)],
    ),
    "tied embedding": lambda: (
        _linen(Tied(), jax.ShapeDtypeStruct((2, 5), jnp.int32)),
        (jax.ShapeDtypeStruct((2, 5), jnp.int32),),
        [
            ("params/Embed_0/embedding", ((), (1,), (), (0,)), 0),
            ("params/Dense_0/kernel", _DENSE, 2 * 5 * 4 * 4),
            ("params/Embed_0/embedding#2", ((1,), (0,), (), ()), 2 * 5 * 4 * 11),
        ],
    ),
    "attention": lambda: (
        _linen(nn.MultiHeadDotProductAttention(2), _X),
        (_X,),
        [(f"params/{name}/kernel", ((0,), (1, 2), (), ()), 160) for name in ("query", "key", "value")]
        + [("params/out/kernel", ((0, 1), (2,), (), ()), 160)],
    ),
    # The four kernels of the gates are concatenated; each is a site, and costs its own share.
    "LSTM": lambda: (
        _linen(nn.RNN(nn.OptimizedLSTMCell(7)), _X),
        (_X,),
        [(f"params/cell/h{gate}/kernel", _DENSE, 5 * 2 * 7 * 7) for gate in "ifgo"]
        + [(f"params/cell/i{gate}/kernel", _DENSE, 5 * 2 * 4 * 7) for gate in "ifgo"],
    ),
    "scan over rematerialised layers": lambda: (
        _linen(_layers(3), _X, None),
        (_X, None),
        [("params/Dense_1/kernel", ((1,), (2,), (), (0,)), 3 * 320), ("params/Dense_0/kernel", ((1,), (2,), (), (0,)), 3 * 320)],
    ),
    "ensemble": lambda: (
        _linen(nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)(3), _X),
        (_X,),
        [("params/kernel", ((1,), (2,), (0,), ()), 120)],
    ),
    "Equinox": lambda: (
        (lambda mlp, x: jax.vmap(mlp)(x), eqx.filter_eval_shape(eqx.nn.MLP, 4, 3, 8, 1, key=jax.random.key(0))),
        (_f32(5, 4),),
        [("layers/0/weight", ((1,), (0,), (), ()), 160), ("layers/1/weight", ((1,), (0,), (), ()), 120)],
    ),
    "fused projections": lambda: (
        (lambda w, x: [x @ part for part in jnp.split(w["qkv"], 3, axis=1)], {"qkv": _f32(4, 6)}),
        (_f32(5, 4),),
        [("qkv", _DENSE, 40), ("qkv#2", _DENSE, 40), ("qkv#3", _DENSE, 40)],
    ),
    "heads": lambda: (
        (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w["w"].astype(jnp.bfloat16).reshape(4, 2, 3)), {"w": _f32(4, 6)}),
        (jax.ShapeDtypeStruct((5, 4), jnp.bfloat16),),
        [("w", _DENSE, 5 * 4 * 6)],
    ),
    # A sum over the size of the heads alone is over no axis of the stored weight.
    "half an axis": lambda: (
        (lambda w, x: jnp.einsum("bd,ihd->bih", x, w["w"].reshape(4, 2, 3)), {"w": _f32(4, 6)}),
        (_f32(5, 3),),
        [("w", None, 5 * 24)],
    ),
    "indexed layers": lambda: (
        (lambda w, x: lax.fori_loop(0, 3, lambda k, x: x @ w["w"][k], x), {"w": _f32(3, 4, 4)}),
        (_f32(5, 4),),
        [("w", ((1,), (2,), (), (0,)), 3 * 80)],
    ),
    "derivative inside": lambda: (
        (lambda w, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w["w"])))(x), {"w": _f32(4, 4)}),
        (_f32(5, 4),),
        [("w", _DENSE, 80), ("w#2", ((1,), (0,), (), ()), 80)],
    ),
    "learned input": lambda: (
        (lambda w, x: w["latents"] @ w["w"] + x, {"latents": _f32(2, 4), "w": _f32(4, 4)}),
        (_f32(2, 4),),
        [("latents", ((1,), (0,), (), ()), 32), ("w", _DENSE, 32)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _MODELS)
def test_sites_are_those_read_off_by_hand(name):
    (apply, params), inputs, expected = _MODELS[name]()
    found = tracing.walk(apply, params, *inputs)
    assert [_said(site) for site in found.sites] == expected
    assert not found.unknown


def test_a_model_too_large_to_make_is_walked_by_its_shapes():
    (site,) = tracing.sites(lambda w, x: x @ w["w"], {"w": _f32(10**6, 10**6)}, _f32(8, 10**6))
    assert (site.macs, site.input.shape, site.weight.shape, site.output.shape) == (
        8 * 10**12,
        (8, 10**6),
        (10**6, 10**6),
        (8, 10**6),
    )


def test_a_fixed_argument_is_not_traced():
    def apply(w, x, *, train, scale=None):
        return x @ w if train and scale is None else x

    assert len(tracing.sites(apply, _f32(3, 3), _f32(2, 3), train=True)) == 1
    assert not tracing.sites(apply, _f32(3, 3), _f32(2, 3), train=False)


# Axes, against a walk over the indices themselves.


def _brute(steps, shape: tuple[int, ...], contracted: tuple[int, ...]):
    """The parameter's axes by role, from where each entry of an array of indices ends up; None where that is not one role."""
    roles: dict[int, set[str]] = {axis: set() for axis in range(len(shape))}
    indices = [steps(np.broadcast_to(np.arange(n).reshape([-1 if a == b else 1 for b in range(len(shape))]), shape))
               for a, n in enumerate(shape)]  # fmt: skip
    for own, index in enumerate(indices):
        for axis in range(index.ndim):
            if (index != np.take(index, [0], axis=axis)).any():
                roles[own].add("contracted" if axis in contracted else "free")
    if any(len(role) > 1 for role in roles.values()):
        return None
    return tuple(tuple(axis for axis in roles if roles[axis] == {way}) for way in ("contracted", "free"))


@pytest.mark.parametrize("seed", range(8))
def test_axes_agree_with_where_the_indices_end_up(seed):
    random = np.random.default_rng(seed)
    size, moves = (4, 8, 2), []
    for _ in range(4):
        if random.random() < 0.5:
            moves.append(("transpose", tuple(map(int, random.permutation(len(size))))))
            size = tuple(size[axis] for axis in moves[-1][1])
        else:
            size = [(4, 16), (64,), (2, 32), (8, 8), (2, 2, 16), (32, 2), (4, 8, 2), (2, 2, 4, 2, 2)][random.integers(8)]
            moves.append(("reshape", size))
    contracted = tuple(int(axis) for axis in np.flatnonzero(random.random(len(size)) < 0.5))

    def steps(w):
        for kind, how in moves:
            w = w.transpose(how) if kind == "transpose" else w.reshape(how)
        return w

    def apply(w, x):
        return lax.dot_general(x, steps(w), ((tuple(range(len(contracted))), contracted), ((), ())))

    (site,) = tracing.sites(apply, _f32(4, 8, 2), _f32(*(size[axis] for axis in contracted), 2))
    expected = _brute(steps, (4, 8, 2), contracted)
    assert (None if site.axes is None else site.axes[:2]) == expected


def test_axes_that_are_cut_where_they_do_not_divide_are_given_up():
    apply = lambda w, x: x @ w.reshape(6, 4)  # noqa: E731
    (site,) = tracing.sites(apply, _f32(4, 6), _f32(2, 6))
    assert site.axes is None


def test_the_check_of_axes_can_fail():
    assert _brute(lambda w: w.reshape(2, 2, 3), (4, 3), (1,)) is None
    assert _brute(lambda w: w.transpose(1, 0), (4, 3), (1,)) == ((0,), (1,))


@pytest.mark.parametrize(
    "look",
    [
        lambda w: jnp.flip(w.astype(jnp.bfloat16), 0).T,
        lambda w: jnp.split(w, [2], axis=1)[1],
        lambda w: w.reshape(2, 2, 6)[1].T,
        lambda w: jnp.broadcast_to(w[:, None, 1:4], (4, 2, 3)).reshape(8, 3),
    ],
)
def test_a_view_is_replayed_from_its_steps(look):
    w = _normal(4, 6)
    x = jnp.ones((1, jax.eval_shape(look, w).shape[0]))
    (site,) = tracing.sites(lambda w, x: x @ look(w), w, x)

    def replayed(value):
        for step in site.view:
            out = step.operation.bind(value, **step.params)
            value = out[step.output] if step.operation.multiple_results else out
        return value

    expected, value = jax.jit(lambda w: (look(w), replayed(w)))(w)
    assert (value.dtype, value.shape) == (site.weight.dtype, site.weight.shape)
    np.testing.assert_array_equal(value, expected)


# Programs within programs.


def _custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


def _custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda *args: (f(*args), args), lambda args, ct: jax.vjp(f, *args)[1](ct))
    return g


def _custom_vmap(f):
    g = jax.custom_batching.custom_vmap(f)
    g.def_vmap(lambda size, batched, *args: (jax.vmap(f, [0 if b else None for b in batched])(*args), True))
    return g


def _once(f):
    return lambda w, x: lax.scan(lambda x, _: (f(w, x), None), x, None, length=1)[0]


def _until(f):
    return lambda w, x: lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, f(w, c[1])), (0, x))[1]


def _if(f):
    return lambda w, x: lax.cond(jnp.sum(x) < 1e9, f, lambda w, x: x, w, x)


def _on_platform(f):
    return lambda w, x: lax.platform_dependent(w, x, cpu=f, default=lambda w, x: x)


_WRAPPERS = {
    "jit": jax.jit, "remat": jax.checkpoint, "custom_jvp": _custom_jvp, "custom_vjp": _custom_vjp, "custom_vmap": _custom_vmap,
    "scan": _once, "while": _until, "cond": _if, "platform": _on_platform,
    "all of them": lambda f: jax.jit(_once(jax.checkpoint(_if(_custom_vjp(_until(jax.jit(_custom_jvp(f)))))))),
}  # fmt: skip


@pytest.mark.parametrize("name", _WRAPPERS)
def test_a_site_is_found_and_tapped_inside_whatever_holds_it(name):
    wrap = _WRAPPERS[name]

    def plain(w, x):
        return jnp.tanh(x @ w["a"].T) @ w["b"]

    def apply(w, x):
        return wrap(plain)(w, x) + 1

    w, x = {"a": _normal(3, 4), "b": _normal(3, 4, seed=1)}, _normal(2, 4, seed=2)
    found = tracing.walk(apply, w, x)
    assert [(site.name, site.path, site.axes[:2]) for site in found.sites] == [("a", "a", ((1,), (0,))), ("b", "b", ((0,), (1,)))]
    assert not found.unknown
    assert all(site.sometimes == (name in ("while", "cond", "platform", "all of them")) for site in found.sites)

    (outputs, taps), plain_outputs = jax.jit(lambda w, x: (tracing.tapped(apply, lambda _, live: live)(w, x), apply(w, x)))(w, x)
    np.testing.assert_allclose(outputs, plain_outputs, rtol=1e-6)
    (w, x) = jax.tree.map(np.asarray, (w, x))
    hidden = np.tanh(x @ w["a"].T)
    for site, expected in (("a", (x, w["a"].T, x @ w["a"].T)), ("b", (hidden, w["b"], hidden @ w["b"]))):
        assert taps[site].times.size == 1
        assert int(taps[site].times.reshape(())) == 1
        for value, other in zip(taps[site].value, expected, strict=True):
            np.testing.assert_allclose(value.reshape(other.shape), other, rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(6, (3, 3))(x)))
        x = nn.gelu(nn.Conv(6, (3, 3), strides=2, feature_group_count=6)(x))
        x = nn.Dropout(0.5, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        x = nn.remat(nn.Dense)(8)(x)
        head = self.param("head", nn.initializers.lecun_normal(), (8, 3))
        return jax.vmap(lambda row: nn.relu(row) @ head)(x)


def test_linen_layers_say_what_they_were_given():
    """In training mode, with vmap inside, dropout and batch statistics: against Flax's own interception of its layers."""
    x, key = _normal(10, 8, 8, 3), jax.random.key(5)

    def apply(variables, x, train):
        return Net().apply(variables, x, train=train, mutable=["batch_stats"], rngs={"dropout": key})

    def both(x):
        variables = Net().init(jax.random.key(0), x, train=False)
        given = {}

        def interceptor(call, args, kwargs, context):
            if isinstance(context.module, nn.Conv) and context.method_name == "__call__":
                given["/".join(("params", *context.module.path, "kernel"))] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(interceptor):
            expected = apply(variables, x, True)
        tap = tracing.tapped(apply, lambda site, live: live.input, where=("**/kernel", "**/head"))
        got, taps = tap(variables, x, train=True)
        kernel = variables["params"]["CheckpointDense_0"]["kernel"]
        return expected, got, given, taps, nn.relu(taps["params/CheckpointDense_0/kernel"].value @ kernel)

    expected, got, given, taps, head = jax.jit(both)(x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)
    assert set(taps) == {"params/Conv_0/kernel", "params/Conv_1/kernel", "params/CheckpointDense_0/kernel", "params/head"}
    for name in ("params/Conv_0/kernel", "params/Conv_1/kernel"):
        np.testing.assert_allclose(taps[name].value, given[name], rtol=1e-4, atol=1e-5)
    assert taps["params/head"].value.shape == (10, 8)
    np.testing.assert_allclose(taps["params/head"].value, head, rtol=1e-4, atol=1e-5)


def test_an_nnx_module_that_is_merged():
    def both(x):
        module = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 3, rngs=nnx.Rngs(1)))
        graph, state = nnx.split(module)
        tap = tracing.tapped(lambda state, x: nnx.merge(graph, state)(x), lambda site, live: live.input)
        return (module(x), nnx.relu(module.layers[0](x))), tap(state, x)

    (expected, hidden), (outputs, taps) = jax.jit(both)(_normal(5, 4))
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    assert list(taps) == ["layers/0/kernel", "layers/2/kernel"]
    np.testing.assert_allclose(taps["layers/2/kernel"].value, hidden, rtol=1e-6)


# Loops and branches.


def _stack(w, x):
    """Layers scanned over, the last first, each with two steps of a shared recurrence."""

    def layer(x, own):
        x, _ = lax.scan(lambda x, _: (jnp.tanh(x @ w["shared"]), None), x, None, length=2)
        return x @ own, None

    return lax.scan(layer, x, w["layers"], reverse=True)[0]


def _by_hand(w, x):
    shared, layers = [], [None] * 3
    for k in (2, 1, 0):
        for _ in range(2):
            shared.append(x)
            x = jnp.tanh(x @ w["shared"])
        layers[k] = x
        x = x @ w["layers"][k]
    return jnp.stack(layers), jnp.stack(shared)


def test_a_scan_stacks_what_is_tapped():
    w, x = {"shared": _normal(3, 3), "layers": _normal(3, 3, 3, seed=1)}, _normal(2, 3, seed=2)
    sites = {site.name: site for site in tracing.sites(_stack, w, x)}
    assert [tuple(scan) for scan in sites["shared"].scans] == [(3, False), (2, False)]
    assert [tuple(scan) for scan in sites["layers"].scans] == [(3, True)]
    _, taps = jax.jit(tracing.tapped(_stack, lambda site, live: live.input))(w, x)
    layers, shared = jax.jit(_by_hand)(w, x)
    np.testing.assert_allclose(taps["layers"].value, layers, rtol=1e-5, atol=1e-6)
    # Entry k is the step that took entry k of the layers: under a reversed scan the last one ran first.
    expected = np.asarray(shared).reshape(3, 2, 2, 3)[::-1]
    np.testing.assert_allclose(taps["shared"].value, expected, rtol=1e-5, atol=1e-6)
    assert taps["shared"].times.tolist() == [[1, 1]] * 3


_SUM = Reducer(lambda site, live: jnp.zeros(live.input.shape[-1:]), lambda site, state, live: state + jnp.sum(live.input, axis=0))


def test_a_scan_keeps_a_state_for_each_layer_and_one_for_what_they_share():
    w, x = {"shared": _normal(3, 3), "layers": _normal(3, 3, 3, seed=1)}, _normal(2, 3, seed=2)
    init, update = tracing.reducing(_stack, _SUM)
    states = init(w, x)
    assert jax.tree.map(jnp.shape, states) == {"shared": (3,), "layers": (3, 3)}
    outputs, states = jax.jit(update)(states, w, x)
    expected, (layers, shared) = jax.jit(lambda w, x: (_stack(w, x), _by_hand(w, x)))(w, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(states["layers"], np.sum(layers, axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(states["shared"], np.sum(shared, axis=(0, 1)), rtol=1e-5, atol=1e-5)


def test_a_branch_that_is_not_taken_gives_zeros():
    def apply(w, x):
        return lax.switch(jnp.int32(x[0, 0]), [lambda: x, lambda: x @ w["a"], lambda: (2 * x) @ w["b"] @ w["b"]])

    w = {"a": jnp.eye(2), "b": jnp.eye(2)}
    call = jax.jit(tracing.tapped(apply, lambda site, live: live.input))
    for index, times in ((0, [0, 0, 0]), (1, [1, 0, 0]), (2, [0, 1, 1])):
        x = jnp.full((1, 2), float(index))
        outputs, taps = call(w, x)
        np.testing.assert_allclose(outputs, apply(w, x))
        assert [int(taps[name].times) for name in ("a", "b", "b#2")] == times
        for name, factor in (("a", 1), ("b", 2), ("b#2", 2)):
            np.testing.assert_array_equal(taps[name].value, factor * x * taps[name].times)


def test_a_while_loop_gives_its_last_input_and_counts():
    def apply(w, x):
        return lax.while_loop(lambda x: jnp.sum(x) < 50, lambda x: x @ w["w"], x)

    w, x = {"w": 2 * jnp.eye(2)}, jnp.ones((1, 2))
    outputs, taps = jax.jit(tracing.tapped(apply, lambda site, live: live.input))(w, x)
    assert outputs.tolist() == [[32.0, 32.0]]
    assert (taps["w"].value.tolist(), int(taps["w"].times)) == ([[16.0, 16.0]], 5)
    init, update = tracing.reducing(apply, _SUM)
    assert jax.jit(update)(init(w, x), w, x)[1]["w"].tolist() == [31.0, 31.0]


def test_a_tapped_function_is_mapped_and_differentiated_like_any_other():
    def apply(w, x):
        return jnp.sum(lax.scan(lambda x, own: (jnp.tanh(x @ own), None), x, w["w"])[0])

    call = tracing.tapped(apply, lambda site, live: jnp.max(jnp.abs(live.input)))
    w, x = {"w": _normal(2, 3, 3)}, _normal(4, 2, 3, seed=1)
    (outputs, taps), expected = jax.jit(lambda w, x: (jax.vmap(call, (None, 0))(w, x), [apply(w, row) for row in x]))(w, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(taps["w"].value[:, 0], np.max(np.abs(x), axis=(1, 2)), rtol=1e-6)
    (gradient, _), expected = jax.jit(lambda w, x: (jax.grad(call, has_aux=True)(w, x), jax.grad(apply)(w, x)))(w, x[0])
    np.testing.assert_allclose(gradient["w"], expected["w"], rtol=1e-5, atol=1e-6)


def test_sharded_arrays_and_asked_for_shardings():
    mesh = Mesh(np.array(jax.devices()), ("d",))
    rows = NamedSharding(mesh, PartitionSpec("d"))

    def apply(w, x):
        inner = jax.jit(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], out_shardings=rows)
        return inner(w, x)

    w, x = {"a": _normal(3, 4), "b": _normal(4, 2, seed=1)}, jax.device_put(_normal(16, 3, seed=2), rows)
    outputs, taps = jax.jit(tracing.tapped(apply, lambda site, live: live.input.T @ live.input))(w, x)
    assert outputs.sharding.is_equivalent_to(rows, 2)
    np.testing.assert_allclose(taps["a"].value, x.T @ x, rtol=1e-5, atol=1e-5)


def test_double_precision_stays_double():
    with jax.enable_x64(True):
        w, x = {"w": jnp.eye(2, dtype=jnp.float64)}, jnp.array([[1.0, 1e-12]])
        _, taps = tracing.tapped(lambda w, x: jnp.sin(x) @ w["w"], lambda site, live: live.input)(w, x)
        assert taps["w"].value.dtype == jnp.float64


# What cannot be followed is told.


def _choice(w, x):
    return x @ lax.cond(x[0, 0] > 0, lambda: w["a"], lambda: w["b"])


def _kept(w, x):
    ref = jax.new_ref(w["a"])
    return x @ ref[...]


_UNKNOWN = {
    "scaled": (lambda w, x: x @ (w["a"] * 2.0), [("a", "mul", "dot_general")]),
    "low-rank update": (
        lambda w, x: x @ (w["a"] + w["b"] @ w["b"]), [("a", "add", "dot_general"), ("b", "dot_general", "dot_general")],
    ),
    "chosen by an input": (_choice, [("a", "cond", "dot_general"), ("b", "cond", "dot_general")]),
    "where": (
        lambda w, x: x @ jnp.where(x > 0, w["a"], w["b"]), [("a", "select_n", "dot_general"), ("b", "select_n", "dot_general")],
    ),
    "expert": (lambda w, x: x @ jnp.stack([w["a"], w["b"]])[jnp.int32(x[0, 0])], None),
    "summed over in parts": (
        lambda w, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([w["a"], w["b"]], 0),
        [("a", "concatenate", "dot_general"), ("b", "concatenate", "dot_general")],
    ),
    "ragged": (lambda w, x: lax.ragged_dot(x, w["a"][None], jnp.array([3])), [("a", "ragged_dot_general", None)]),
    "kept in a mutable array": (_kept, [("a", "new_ref", None), ("a", "new_ref", "dot_general")]),
    "solved for": (lambda w, x: jnp.linalg.solve(w["a"], x), [("a", "custom_linear_solve", None)]),
    "changed in a loop": (
        lambda w, x: lax.scan(lambda c, _: ((c[0] @ c[1], c[1].T), None), (x, w["a"]), None, length=2)[0][0],
        [("a", "scan", "dot_general")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _UNKNOWN)
def test_what_the_walk_cannot_follow_is_told_and_refused(name):
    apply, expected = _UNKNOWN[name]
    w, x = {"a": _f32(3, 3), "b": _f32(3, 3)}, _f32(3, 3)
    unknown = [tuple(entry) for entry in tracing.walk(apply, w, x).unknown]
    if expected is None:
        assert {path for path, _, _ in unknown} == {"a", "b"}
    else:
        assert sorted(unknown, key=str) == sorted(expected, key=str)
    call = tracing.tapped(apply, lambda site, live: live.input, where=unknown[0][0])
    with pytest.raises(ValueError, match=f"^{unknown[0][0]} (meets|reaches)"):
        jax.eval_shape(call, w, x)


def test_a_row_that_is_looked_up_is_an_input_not_a_weight():
    def apply(w, tokens):
        return w["table"][tokens] @ w["kernel"]

    found = tracing.walk(apply, {"table": _f32(7, 3), "kernel": _f32(3, 2)}, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert [site.name for site in found.sites] == ["table", "kernel"]
    assert not found.unknown


def test_biases_scales_and_modulated_weights_are_listed_by_what_they_meet():
    def apply(w, x):
        return (x * w["scale"][None] + w["bias"][None]) @ (w["kernel"] * x[0, 0])

    w = {"scale": _f32(3), "bias": _f32(3), "kernel": _f32(3, 3)}
    found = tracing.walk(apply, w, _f32(2, 3))
    assert found.others == {"scale": ("mul",), "bias": ("add",), "kernel": ("mul",)}
    with pytest.raises(ValueError, match=r"kernel meets no product \(it meets mul\)"):
        jax.eval_shape(tracing.tapped(apply, lambda site, live: live.input, where="kernel"), w, _f32(2, 3))


def test_under_shard_map_sites_are_found_but_nothing_is_handed_out():
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))

    def apply(w, x):
        spec = PartitionSpec("d")
        return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(PartitionSpec(None, "d"), spec), out_specs=spec)(w["w"], x)

    w, x = {"w": _f32(3, 4)}, _f32(4, 3)
    (site,) = tracing.sites(apply, w, x)
    assert (site.axes[:2], site.weight.shape, site.around) == (((0,), (1,)), (3, 2), ("shard_map",))
    with pytest.raises(NotImplementedError, match="w lies under shard_map"):
        jax.eval_shape(tracing.tapped(apply, lambda site, live: live.input), w, x)


def test_what_cannot_be_done_is_refused_by_name():
    w, x = {"w": jnp.eye(2)}, jnp.ones((1, 2))
    tap = lambda site, live: live.input  # noqa: E731

    def condition(w, x):
        return lax.while_loop(lambda x: jnp.sum(x @ w["w"]) < 9, lambda x: 2 * x, x)

    with pytest.raises(NotImplementedError, match="w lies in the condition of a while loop"):
        jax.eval_shape(tracing.tapped(condition, tap), w, x)
    with pytest.raises(ValueError, match="nothing matches where='kernel'"):
        tracing.tapped(lambda w, x: x @ w["w"], tap, where="kernel")(w, x)
    with pytest.raises(ValueError, match="no parameter that was chosen meets a product"):
        tracing.tapped(lambda w, x: x + w["w"], tap)(w, x)
    init, update = tracing.reducing(lambda w, x: x @ w["w"], Reducer(lambda *_: jnp.zeros(()), lambda *_: jnp.zeros(2)))
    with pytest.raises(TypeError, match="the update of w must return a state like"):
        update(init(w, x), w, x)
    with pytest.raises(ValueError, match="there is no site v"):
        tracing.reducing(lambda w, x: x @ w["w"], _SUM).update({"v": jnp.zeros(2)}, w, x)

    class Codes:
        def materialise(self):
            return jnp.ones(2)

    with pytest.raises(TypeError, match="w is stored as Codes"):
        tracing.walk(lambda w, x: x, {"w": Codes()}, x)


# A calibration set.

_HESSIAN = Reducer(
    lambda site, live: None if site.primitive == "gather" else jnp.zeros((live.input.shape[-1],) * 2),
    lambda site, state, live: state + live.input.T @ live.input,
)


def _chain(w, x):
    return jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) @ w["c"] + w["bias"][None]


def _chain_set():
    w = {"a": _normal(3, 4), "b": _normal(4, 5, seed=1), "c": _normal(5, 2, seed=2), "bias": jnp.ones(2)}
    x = np.asarray(_normal(11, 3, seed=3))
    return w, x, [{"x": x[:4]}, {"x": x[4:8]}, {"x": x[8:]}]


@pytest.mark.parametrize("max_bytes", [None, 4 * (16 + 25), 4 * 25])
def test_passes_within_a_bound_give_what_one_pass_gives(max_bytes):
    w, x, batches = _chain_set()
    traced = []

    def apply(w, x):
        traced.append(x.shape)
        return _chain(w, x)

    states = tracing.collect(apply, w, batches, _HESSIAN, where=("a", "b", "c"), max_bytes=max_bytes)
    hidden = {"a": x, "b": np.tanh(x @ w["a"]), "c": np.tanh(np.tanh(x @ w["a"]) @ w["b"])}
    assert list(states) == ["a", "b", "c"]
    for name, state in states.items():
        np.testing.assert_allclose(state, hidden[name].T @ hidden[name], rtol=1e-4, atol=1e-5)
    # 9 + 16 + 25 entries: in one pass, as (a, b) and (c), or as (a, b) within 25 and (c). Each pass sees two shapes.
    passes = 1 if max_bytes is None else 2
    assert len(traced) == 1 + 2 * passes


def test_a_bound_that_is_too_small_and_an_iterator_that_is_spent_are_refused():
    w, _, batches = _chain_set()
    collect = functools.partial(tracing.collect, _chain, w, reducer=_HESSIAN, where=("a", "b", "c"))
    with pytest.raises(ValueError, match="the state of b alone takes 64 bytes, more than max_bytes=50"):
        collect(batches=batches, max_bytes=50)
    with pytest.raises(ValueError, match="needs 2 passes"):
        collect(batches=iter(batches), max_bytes=100)
    with pytest.raises(ValueError, match="`batches` is empty"):
        collect(batches=[])
    for one in (batches[0], batches[0]["x"]):
        with pytest.raises(TypeError, match=r"put the one (dict|ndarray) into a list"):
            collect(batches=one)
    assert set(collect(batches=iter(batches))) == {"a", "b", "c"}


def test_batches_must_be_alike():
    w, _, batches = _chain_set()
    with pytest.raises(ValueError, match=r"batch 1, whose inputs are \(4, 2\), is not like the first, whose inputs are \(4, 3\)"):
        tracing.collect(_chain, w, [batches[0], np.ones((4, 2), np.float32)], _HESSIAN, where=("a", "b", "c"))
    with pytest.raises(TypeError) as caught:
        tracing.collect(_chain, w, [np.ones((4, 2), np.float32)], _HESSIAN, where=("a", "b", "c"))
    assert any("first batch, whose inputs are (4, 2)" in note for note in caught.value.__notes__)


def test_collecting_from_a_module_that_holds_functions():
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    x = _normal(6, 3)
    states = tracing.collect(lambda mlp, x: jax.vmap(mlp)(x), mlp, [x], _HESSIAN, where="**/weight")
    np.testing.assert_allclose(states["layers/0/weight"], x.T @ x, rtol=1e-5, atol=1e-6)


# Costs.


def test_multiplications_by_hand():
    apply, shapes = _linen(nn.MultiHeadDotProductAttention(2), _X)
    costs = tracing.count(apply, shapes, _X)
    assert costs.paths["params/query/kernel"] == (2 * 5 * 4 * 4, 16, 4 * 2 * 5 * 4)
    assert costs.paths["params/query/bias"] == (0, 4, 0)
    # Scores and their use: two products of [5, 2] and [2, 5] for each of 2 heads and 2 examples.
    assert costs.others == 2 * (2 * 2 * 5 * 5 * 2)
    assert costs.macs == 4 * 160 + costs.others
    assert costs.parameters == 4 * 16 + 4 * 4
    # Four dense layers, the scores, and what is made with them.
    assert costs.activation_bytes == 4 * (4 * 2 * 5 * 4 + 2 * 2 * 5 * 5 + 2 * 5 * 4)


class _Bottleneck(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.width, (3, 3), self.stride, use_bias=False)(nn.Conv(self.width, (1, 1), use_bias=False)(x))
        y = nn.Conv(4 * self.width, (1, 1), use_bias=False)(y)
        return y + (x if x.shape == y.shape else nn.Conv(4 * self.width, (1, 1), self.stride, use_bias=False)(x))


class _ResNet50(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.Conv(64, (7, 7), 2, use_bias=False)(x), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate([3, 4, 6, 3]):
            for block in range(blocks):
                x = _Bottleneck(64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(1000)(jnp.mean(x, axis=(1, 2)))


def test_a_well_known_network_costs_what_is_published():
    """ResNet-50 with its strides in the 3 x 3 convolutions: 4.09 G multiplications; 53,120 of its parameters are in BatchNorm."""
    x = _f32(1, 224, 224, 3)
    apply, shapes = _linen(_ResNet50(), x)
    costs = tracing.count(apply, shapes, x)
    assert (round(costs.macs / 1e9, 2), costs.others) == (4.09, 0)
    assert costs.parameters == 25_557_032 - 53_120


def test_a_product_of_two_parameters_counts_once_in_all():
    costs = tracing.count(lambda w, x: x @ w["a"] @ (w["b"] @ w["c"]), {k: _f32(4, 4) for k in "abc"}, _f32(2, 4))
    assert {path: count.macs for path, count in costs.paths.items()} == {"a": 32, "b": 64, "c": 64}
    assert (costs.macs, costs.others) == (32 + 64 + 32, 32)


def test_a_scan_counts_by_its_length_and_parts_of_a_fused_product_share_what_it_puts_out():
    def apply(w, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w["stack"])[0]
        return x @ jnp.concatenate([w["a"], w["b"]], axis=1)

    costs = tracing.count(apply, {"stack": _f32(3, 4, 4), "a": _f32(4, 2), "b": _f32(4, 6)}, _f32(5, 4))
    assert costs.paths["stack"] == (3 * 5 * 4 * 4, 48, 3 * 5 * 4 * 4)
    assert (costs.paths["a"], costs.paths["b"]) == ((5 * 4 * 2, 8, 5 * 2 * 4), (5 * 4 * 6, 24, 5 * 6 * 4))
    assert costs.activation_bytes == 3 * 5 * 4 * 4 + 5 * 8 * 4


def test_paths_and_names_are_those_of_the_tree():
    (apply, params), inputs, _ = _MODELS["LSTM"]()
    assert {site.path for site in tracing.sites(apply, params, *inputs)} <= set(tree.paths(params))
    assert list(tracing.count(apply, params, *inputs).paths) == tree.paths(params)


def test_a_table_row_is_all_that_a_primitive_needs(monkeypatch):
    """`ragged_dot_general` is unknown above; with a row of its own it is a site."""
    row = walks.Product({1: 0}, lambda params, operand: walks.Roles([1], [0]), lambda *_: 0)
    monkeypatch.setitem(walks.PRODUCTS, "ragged_dot_general", row)
    (site,) = tracing.sites(lambda w, x: lax.ragged_dot(x, w["w"], jnp.array([3, 2])), {"w": _f32(2, 3, 4)}, _f32(5, 3))
    assert site.axes == ((1,), (2,), (0,), ())
    assert programs.FORMS.keys().isdisjoint(views.VIEWS)
