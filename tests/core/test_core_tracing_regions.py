"""Parts of programs that read given parameters: where they begin and end, what they add, and runs without them or with more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxopt_lab.core.tracing import programs
from jaxopt_lab.core.tracing.levels import inlined, outermost, raw_keys
from jaxopt_lab.core.tracing.products import identity, square
from jaxopt_lab.core.tracing.regions import find, product, stacked
from jaxopt_lab.core.tracing.replaced import Dropped, Repeated, Restacked, replaced
from jaxopt_lab.core.tracing.zeros import added

X = jax.device_put(np.sin(np.arange(12.0)).reshape(3, 4))
P = {name: jax.device_put(np.cos(k + np.arange(16.0)).reshape(4, 4) / 2) for k, name in enumerate("abc")}
KEY = jax.random.key(0)


def traced(apply, *args, params=P):
    return programs.trace(apply, params, *(args or (X,)))


def without(apply, *args, layer="a", params=P):
    """The outputs without a layer."""
    program, inputs = traced(apply, *args, params=params)
    return replaced(program, inputs, [Dropped(find(program, {"layer": [layer]})["layer"])])[0]


def twice(apply, *args, layer="a", params=P):
    """The outputs with a layer twice, the second time with the negative of its parameter."""
    program, inputs = traced(apply, *args, params=params)
    region = find(program, {"layer": [layer]}, twice=True)["layer"]
    return replaced(program, inputs, [Repeated(region, {layer: -params[layer]})])[0]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Each a layer with parameter "a", by the value that enters it.


def _normed(x):
    return (x - x.mean(1, keepdims=True)) / (1 + x.std(1, keepdims=True))


_LAYERS = {
    "a product": lambda w, x: x @ w,
    "a product and its activation": lambda w, x: jnp.tanh(x @ w),
    "a product and a bias of constants": lambda w, x: jax.nn.gelu(x @ w + 1.0),
    "a sum": lambda w, x: x + jnp.tanh(x @ w),
    "a sum with what was normalised": lambda w, x: x + jnp.tanh(_normed(x) @ w),
    "two uses": lambda w, x: x + jnp.tanh(jnp.tanh(x @ w) @ w),
    "compiled": jax.jit(lambda w, x: x + jax.jit(jnp.dot)(x, w)),
    "rematerialised": jax.checkpoint(lambda w, x: x + jnp.tanh(x @ w)),
    "a loop": lambda w, x: lax.scan(lambda x, _: (x + jnp.tanh(x @ w), None), x, None, length=2)[0],
    "cast": lambda w, x: x + (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("name", _LAYERS)
def test_a_layer_is_left_out_and_repeated(name):
    layer = _LAYERS[name]

    def apply(p, x):
        # What lies between them is no activation.
        return jnp.flip(layer(p["c"], jnp.flip(layer(p["a"], jnp.flip(x, 1)), 1)), 1) @ p["b"]

    def by_hand(x):
        return jnp.flip(layer(P["c"], jnp.flip(x, 1)), 1) @ P["b"]

    x = jnp.flip(X, 1)
    close(without(apply)[0], by_hand(x))
    close(twice(apply)[0], by_hand(layer(-P["a"], layer(P["a"], x))))


def test_the_activation_behind_a_sum():
    block = lambda act, w, x: act(x + jnp.tanh(x @ w))  # noqa: E731
    # The one before has it: without the second block there is one.
    both = lambda p, x: block(jax.nn.gelu, p["a"], block(jax.nn.gelu, p["b"], x)) @ p["c"]  # noqa: E731
    close(without(both)[0], block(jax.nn.gelu, P["b"], X) @ P["c"])
    # It does not, or has another one: it stays.
    close(without(lambda p, x: block(jax.nn.gelu, p["a"], x) @ p["b"])[0], jax.nn.gelu(X) @ P["b"])
    close(without(lambda p, x: block(jax.nn.gelu, p["a"], jnp.tanh(x)) @ p["b"])[0], jax.nn.gelu(jnp.tanh(X)) @ P["b"])
    # A layer that runs twice has it each time if twice is once.
    close(
        twice(lambda p, x: block(jax.nn.relu, p["a"], x) @ p["b"])[0],
        block(jax.nn.relu, -P["a"], block(jax.nn.relu, P["a"], X)) @ P["b"],
    )
    inner = X + jnp.tanh(X @ P["a"])
    close(twice(lambda p, x: block(jax.nn.gelu, p["a"], x) @ p["b"])[0], block(jax.nn.gelu, -P["a"], inner) @ P["b"])


def test_of_several_values_that_enter_the_one_that_is_added_to_goes_on():
    memory = jnp.cos(X)
    attend = lambda p, x, memory: jnp.tanh((x @ p["a"]) * (memory @ p["a"]))  # noqa: E731
    rows = [(lambda f: f, (X, memory)), (lambda f: lambda p, m, x: f(p, x, m), (memory, X))]
    for ordered, inputs in rows:
        apply = ordered(lambda p, x, m: jnp.flip(jnp.exp(x) + attend(p, jnp.exp(x), jnp.cosh(m)), 1) @ p["b"])
        close(without(apply, *inputs)[0], jnp.flip(jnp.exp(X), 1) @ P["b"])
        with pytest.raises(ValueError, match=r"several values of shape \(3, 4\) enter it"):
            without(ordered(lambda p, x, m: attend(p, jnp.exp(x), jnp.cosh(m)) @ p["b"]), *inputs)


def _drawn(key, x):
    return jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)


_MASKED = {
    "inside": lambda w, x, key: jnp.tanh(((x @ w) * _drawn(key, x)) @ w),
    "behind": lambda w, x, key: jnp.tanh(jnp.where(_drawn(key, x) > 0, jax.nn.relu(x @ w) / 0.5, 0.0)),
}


@pytest.mark.parametrize("layer", _MASKED.values(), ids=_MASKED)
@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_a_mask_is_drawn_again_and_stands_for_nothing(key, layer):
    apply = lambda p, x, key: layer(p["a"], jnp.cos(x), jax.random.fold_in(key, 7)) @ p["b"]  # noqa: E731
    own = jax.random.fold_in(key, 7)
    # Without the layer no mask is there either.
    close(without(apply, X, key)[0], jnp.cos(X) @ P["b"])
    again = layer(-P["a"], layer(P["a"], jnp.cos(X), own), jax.random.fold_in(own, 1))
    close(twice(apply, X, key)[0], again @ P["b"])


def test_numbers_that_become_keys_are_seen_through_calls_and_loops():
    def apply(p, key, x):
        return lax.scan(
            lambda x, key: (jax.jit(lambda key, x: x + jax.random.uniform(key))(key, x), None), x, jax.random.split(key)
        )[0]

    program, _ = programs.trace(apply, {}, jax.random.PRNGKey(0), jnp.ones(()))
    held = raw_keys(program.jaxpr)
    assert program.jaxpr.jaxpr.invars[0] in held
    (scan,) = (eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan")
    assert any(v in held for v in scan.invars)
    assert not outermost(program).labels[program.jaxpr.jaxpr.invars[0]].plain


def test_what_is_left_out_has_no_effects():
    seen = []

    def apply(p, x):
        h = x @ p["a"]
        jax.debug.callback(lambda h: seen.append("a"), h)
        return jnp.flip(x + jnp.tanh(h)) @ p["b"]

    program, inputs = traced(apply)
    region = find(program, {"a": ["a"]})["a"]
    for edit, count in ((Dropped(region), 0), (Repeated(region, {"a": P["a"]}), 2)):
        seen.clear()
        replaced(program, inputs, [edit])
        jax.effects_barrier()
        assert len(seen) == count


def test_an_output_that_needs_what_is_left_out():
    program, inputs = traced(lambda p, x: (jnp.tanh(jnp.cos(x) @ p["a"]) @ p["b"], jnp.sum(x @ p["c"])))
    region = find(program, {"a": ["a"]})["a"]._replace(equations=tuple(range(len(program.jaxpr.eqns))))
    with pytest.raises(ValueError, match="output 0 needs what is computed inside"):
        replaced(program, inputs, [Dropped(region)])


def test_the_steps_of_a_scan_and_what_else_it_slices():
    def apply(p, x):
        scales = jnp.arange(1.0, 4.0)
        step = lambda x, own: (x + own[1] * jnp.tanh(x @ own[0]), None)  # noqa: E731
        return lax.scan(step, x, (p["w"].astype(x.dtype), scales), reverse=True)[0]

    weights = jnp.stack(list(P.values()))
    program, inputs = traced(apply, params={"w": weights})
    stack = stacked(program, "w", ["w"])
    assert (stack.length, stack.level) == (3, ())
    outputs, _ = replaced(program, [weights[jnp.array([0, 2])], *inputs[1:]], [Restacked(stack, (0, 2))])
    expected = X
    for step in (2, 0):
        expected = expected + (step + 1) * jnp.tanh(expected @ weights[step])
    close(outputs[0], expected)
    # Another number of them than was traced cannot go where their number counts.
    # Of another number of steps than was traced nothing is known that counts them.
    program, inputs = traced(lambda p, x: apply(p, x) + jnp.sum(jnp.flip(p["w"], 0)), params={"w": weights})
    scan = next(k for k, eqn in enumerate(program.jaxpr.eqns) if eqn.primitive.name == "scan")
    with pytest.raises(NotImplementedError, match="rev takes"):
        replaced(program, [weights[:2], X], [Restacked(stack._replace(equation=scan), (0, 1))])


# What is added.

_Z = {**P, "v": X[:1], "s": jnp.ones((1, 4))}
_SUMS = {
    "a branch": (lambda p, x: x + jnp.tanh(x @ p["a"]) @ p["b"], {"b"}),
    "a bias": (lambda p, x: (x @ p["a"] + p["v"]) + x, {"a", "v"}),
    "two branches": (lambda p, x: (h := x + jnp.tanh(x) @ p["a"]) + jnp.tanh(h) @ p["b"], {"a", "b"}),
    "a scale": (lambda p, x: x - p["s"] * jnp.tanh(x @ p["a"]), {"s"}),
    "a normalisation": (lambda p, x: x + (_normed(x @ p["a"]) * (p["s"] / 3.0) + p["v"]), {"s", "v"}),
    "in calls": (jax.jit(lambda p, x: jax.checkpoint(lambda y: x + y)(x @ p["a"])), {"a"}),
    "laid out anew": (lambda p, x: x + (x @ p["a"]).T.reshape(2, 6).sum(0)[:4][None] * jnp.ones((3, 1)), {"a"}),
    "masked": (lambda p, x: x + jnp.where(x > 0, 2 * (x @ p["a"]), 0.0), {"a"}),
    "a loop": (lambda p, x: lax.scan(lambda x, _: (x + jnp.tanh(x) @ p["a"], None), x, None, length=2)[0], {"a"}),
    "an activation at the end": (lambda p, x: x + jnp.tanh(x @ p["a"]), None),
    "a constant": (lambda p, x: x + (x @ p["a"] + 1.0), None),
    "another input": (lambda p, x: x + 2 * x, None),
}  # fmt: skip


@pytest.mark.parametrize("name", _SUMS)
def test_what_is_added_and_with_what_it_is_nothing(name):
    apply, expected = _SUMS[name]
    program, _ = traced(apply, params=_Z)
    level = outermost(program)
    found = added(program, (), (-1, len(program.paths)), level.place(program.jaxpr.jaxpr.outvars[0]))
    assert found.sum
    assert found.zeros == expected
    if expected:
        zero = {path: jnp.zeros_like(value) if path in expected else value for path, value in _Z.items()}
        np.testing.assert_array_equal(apply(zero, X), X)
        gradients = jax.grad(lambda p: jnp.sum(jnp.sin(apply(p, X) + X)))(zero)
        assert all(np.any(gradients[path] != 0) for path in expected)


@pytest.mark.parametrize("apply", [lambda p, x: x @ p["a"], lambda p, x: 2 * x, lambda p, x: jnp.tanh(x + x @ p["a"])])
def test_what_is_no_sum(apply):
    program, _ = traced(apply)
    found = added(program, (), (-1, len(program.paths)), outermost(program).place(program.jaxpr.jaxpr.outvars[0]))
    assert found == (False, None)


# Products.


def _conv(layout, window, inputs=3, outputs=6, **options):
    kernel = jnp.ones([{"O": outputs, "I": inputs}.get(axis) or window["HW".index(axis)] for axis in layout[1]])
    options = {"window_strides": (2,) * len(window), "padding": "VALID", **options}
    return lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=layout, **options), kernel


_IMAGE = ("NHWC", "HWIO", "NHWC")
_CONVS = {
    "plain": (_conv(_IMAGE, (3, 3)), (2, 7, 8, 3)),
    "channels first": (_conv(("NCHW", "OIHW", "NCHW"), (3, 5)), (2, 3, 7, 8)),
    "of even windows": (_conv(_IMAGE, (2, 4)), (2, 7, 8, 3)),
    "dilated": (_conv(_IMAGE, (3, 3), rhs_dilation=(2, 1)), (2, 7, 8, 3)),
    "of a larger map": (_conv(_IMAGE, (3, 3), window_strides=(1, 1), padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)), (2, 7, 8, 3)),
    "in groups": (_conv(_IMAGE, (3, 3), inputs=1, feature_group_count=3), (2, 7, 8, 3)),
    "of sequences": (_conv(("NHC", "HIO", "NHC"), (3,)), (2, 7, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", _CONVS)
def test_a_convolution_that_changes_nothing(name):
    (conv, kernel), shape = _CONVS[name]
    x = jnp.sin(jnp.arange(float(np.prod(shape)))).reshape(shape)
    eqn = jax.make_jaxpr(conv)(x, kernel).eqns[0]
    y = conv(x, kernel * jnp.sin(jnp.arange(float(kernel.size))).reshape(kernel.shape))
    np.testing.assert_array_equal(square(eqn)(y, identity(eqn)), y)
    with pytest.raises(ValueError, match="sin is no dense layer"):
        square(jax.make_jaxpr(jnp.sin)(1.0).eqns[0])
    with pytest.raises(ValueError, match="is no dense layer over the last axis"):
        identity(jax.make_jaxpr(lambda x, w: lax.dot_general(x, w, (((0,), (0,)), ((), ()))))(X, X).eqns[0])


def test_a_product_with_what_follows_it():
    def apply(p, x):
        h = jnp.cos(x) @ p["a"].astype(jnp.float32) + p["v"]
        return jax.nn.relu(_normed(h) * p["s"]) @ p["b"]

    found = product(inlined(traced(jax.jit(apply), params=_Z)[0]), "layer", ["a", "v", "s"])
    assert found.path == "a"
    assert found.region.clamps
    program, inputs = traced(apply, params=_Z)
    program = inlined(program)
    found = product(program, "layer", ["a", "v", "s"])
    own = {"a": jnp.eye(4), "v": _Z["v"], "s": _Z["s"]}
    edit = Repeated(found.region, own, {found.number: square(found.equation)})
    once = jax.nn.relu(_normed(jnp.cos(X) @ _Z["a"] + _Z["v"]) * _Z["s"])
    close(replaced(program, inputs, [edit])[0][0], jax.nn.relu(_normed(once + _Z["v"]) * _Z["s"]) @ _Z["b"])
    for layer, message in (
        (["a", "v"], "no activation"),
        (["a"], "no activation"),
        (["v"], "v is no product"),
        (["b"], "no activation"),
    ):
        with pytest.raises(ValueError, match=message):
            product(program, layer[-1], layer)
    with pytest.raises(ValueError, match="v comes in before the activation"):
        product(inlined(traced(lambda p, x: jax.nn.relu(x @ p["a"] * jnp.exp(p["v"]) * p["s"]), params=_Z)[0]), "a", ["a", "s"])


def test_compiled_functions_in_line_compute_the_same():
    apply = jax.jit(lambda p, x: jax.jit(jnp.tanh)(x @ p["a"]) @ jax.nn.softmax(p["b"]))
    program, inputs = traced(apply)
    (output,), _ = replaced(inlined(program), inputs, [])
    close(output, apply(P, X))
    assert "jit" not in {eqn.primitive.name for eqn in inlined(program).jaxpr.eqns}
