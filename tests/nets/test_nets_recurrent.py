"""Recurrent networks: counts in closed form, numpy's forward pass, lengths, directions, types, initialisers, bad fields."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import nets, tree

KEY = jax.random.key(0)
STEPS = (2, 5, 3)


def lstm_count(inputs, width):
    """Four gates, each of the inputs, of the state and one bias; PyTorch's have two biases."""
    return 4 * (inputs * width + width * width + width)


def gru_count(inputs, width):
    """Three gates; the candidate's product with the state has a bias of its own, since it is scaled by the reset gate."""
    return 3 * (inputs * width + width * width + width) + width


def simple_count(inputs, width):
    return inputs * width + width * width + width


COUNTS = {
    "lstm": (nets.Recurrent(), STEPS, lstm_count(3, 128) + 1290),
    "gru": (nets.Recurrent(cell=nn.GRUCell), STEPS, gru_count(3, 128) + 1290),
    "simple": (nets.Recurrent(cell=nn.SimpleCell), STEPS, simple_count(3, 128) + 1290),
    "deep": (nets.Recurrent((8, 6, 4)), STEPS, lstm_count(3, 8) + lstm_count(8, 6) + lstm_count(6, 4) + 50),
    "both": (
        nets.Recurrent((8, 6), 4, bidirectional=True),
        STEPS,
        2 * (lstm_count(3, 8) + lstm_count(16, 6)) + 12 * 4 + 4,
    ),
    "tokens": (nets.Recurrent((8,), vocabulary=20, embedding=5), (2, 7), 20 * 5 + lstm_count(5, 8) + 90),
    # The medium one of Zaremba, Sutskever and Vinyals, "Recurrent neural network regularization", 2014; PyTorch, with a second bias
    # for each of the 2 x 4 x 650 gates, counts 19,780,400.
    "zaremba": (
        nets.Recurrent((650, 650), 10_000, vocabulary=10_000, embedding=650, every_step=True),
        (1, 35),
        19_780_400 - 2 * 4 * 650,
    ),
}


@pytest.mark.parametrize(("module", "shape", "parameters"), COUNTS.values(), ids=COUNTS)
def test_parameter_counts(module, shape, parameters):
    x = jnp.zeros(shape, float if module.vocabulary is None else int)
    variables = jax.eval_shape(module.init, KEY, x)
    assert tree.size(variables) == parameters
    rows = shape[:2] if module.every_step else shape[:1]
    assert jax.eval_shape(module.apply, variables, x).shape == (*rows, module.classes)


def test_multiplications_are_those_of_every_step():
    found = nets.describe(nets.Recurrent((4,), 2), jax.ShapeDtypeStruct((1, 9, 3), jnp.float32))
    assert found.macs == 9 * 4 * (3 * 4 + 4 * 4) + 4 * 2


SMALL = {
    "lstm": nets.Recurrent((4, 3), 2, dropout=0.5),
    "lstm_both": nets.Recurrent((4, 3), 2, bidirectional=True, every_step=True, dropout=0.5),
    "gru_both": nets.Recurrent((4, 3), 2, cell=nn.GRUCell, bidirectional=True, vocabulary=11, embedding=3, dropout=0.5),
    "simple": nets.Recurrent((4,), 2, cell=nn.SimpleCell, every_step=True, dropout=0.5),
}

# What runs one way, runs both ways as well.
KINDS = [pytest.param(name, marks=pytest.mark.slow if name == "lstm" else ()) for name in SMALL]


def inputs(name):
    draw = np.random.default_rng(1)
    if SMALL[name].vocabulary:
        return jax.device_put(draw.integers(0, 11, (3, 5)))
    return jax.device_put(np.asarray(draw.standard_normal((3, 5, 3)), np.float32))


LENGTHS = jnp.array([5, 3, 1])


def made(name):
    """The model, and its variables with all of them drawn at random: zeros hide faults."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(SMALL[name].init, KEY, inputs(name))
    variables = jax.tree.map(lambda leaf: jax.device_put(np.asarray(0.7 * draw.standard_normal(leaf.shape), leaf.dtype)), shapes)
    return nets.from_linen(SMALL[name]), variables


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dense(layer, x):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def lstm(params, rows):
    width = params["hi"]["bias"].size
    h, c, out = np.zeros(width), np.zeros(width), []
    for x in rows:
        i, f, g, o = (dense(params[f"i{gate}"], x) + dense(params[f"h{gate}"], h) for gate in "ifgo")
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out)


def gru(params, rows):
    h, out = np.zeros(params["hn"]["bias"].size), []
    for x in rows:
        r, z = (sigmoid(dense(params[f"i{gate}"], x) + dense(params[f"h{gate}"], h)) for gate in "rz")
        n = np.tanh(dense(params["in"], x) + r * dense(params["hn"], h))
        h = (1 - z) * n + z * h
        out.append(h)
    return np.stack(out)


def simple(params, rows):
    h, out = np.zeros(params["h"]["kernel"].shape[0]), []
    for x in rows:
        h = np.tanh(dense(params["i"], x) + dense(params["h"], h))
        out.append(h)
    return np.stack(out)


CELLS = {nn.OptimizedLSTMCell: lstm, nn.GRUCell: gru, nn.SimpleCell: simple}


def forward(module, params, x):
    """The outputs of one row, of its own length."""
    if module.vocabulary is not None:
        x = params["tokens"]["embedding"][x]
    run = CELLS[module.cell]
    for k in range(len(module.widths)):
        there = run(params[f"layer_{k}"], x)
        back = [run(params[f"layer_{k}_reverse"], x[::-1])[::-1]] if module.bidirectional else []
        x = np.concatenate([there, *back], 1)
    if not module.every_step:
        width = module.widths[-1]
        x = np.concatenate([x[-1, :width], x[0, width:]])
    return dense(params["head"], x)


@pytest.mark.parametrize("name", KINDS)
def test_as_numpy_computes_it_and_blind_behind_the_lengths(name):
    model, variables = made(name)
    module, x = SMALL[name], inputs(name)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    predict = jax.jit(model.predict)
    found = predict(variables, x, LENGTHS)
    for row, (length, one) in enumerate(zip(LENGTHS, np.asarray(x), strict=True)):
        wanted = forward(module, params, one[:length])
        np.testing.assert_allclose(found[row][: len(wanted)], wanted, rtol=1e-4, atol=1e-5)
    # The same to the bit, whatever lies there.
    read = (jnp.arange(5)[None] < LENGTHS[:, None]).reshape(3, 5, *(1,) * (x.ndim - 2))
    other = predict(variables, jnp.where(read, x, jnp.asarray(7, x.dtype)), LENGTHS)
    kept = np.asarray(read).reshape(3, 5) if module.every_step else np.s_[:]
    np.testing.assert_array_equal(other[kept], found[kept])
    whole = predict(variables, x, jnp.full(3, 5))
    np.testing.assert_allclose(predict(variables, x), whole, rtol=1e-5, atol=1e-6)
    # One direction reads nothing of what comes later in any case.
    assert (np.abs(whole - found)[1:].max() > 1e-3) == (module.bidirectional or not module.every_step)


def test_the_last_of_every_step_is_the_answer():
    module, (model, variables), x = SMALL["lstm"], made("lstm"), inputs("lstm")
    steps = jax.jit(module.clone(every_step=True).apply)(variables, x, LENGTHS)
    found = jax.jit(model.predict)(variables, x, LENGTHS)
    np.testing.assert_allclose(steps[jnp.arange(3), LENGTHS - 1], found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lstm", pytest.param("gru_both", marks=pytest.mark.slow)])
def test_dropout_acts_in_training_only(name):
    model, variables = made(name)
    x = inputs(name)
    train = jax.jit(jax.vmap(lambda key: model.apply(variables, x, LENGTHS, train=True, key=key)[0]))
    outputs = train(jax.random.split(KEY, 2))
    assert (outputs[0] != outputs[1]).any()
    assert not np.allclose(outputs[0], jax.jit(model.predict)(variables, x, LENGTHS))


@pytest.mark.parametrize("name", KINDS)
def test_types_of_parameters_and_of_computation(name):
    half = nets.from_linen(SMALL[name].clone(dtype=jnp.bfloat16, param_dtype=jnp.float16))
    variables = jax.eval_shape(half.init, KEY, inputs(name))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float16)}
    assert jax.eval_shape(half.predict, variables, inputs(name)).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        double = nets.from_linen(SMALL[name].clone(param_dtype=jnp.float64))
        x = inputs(name)
        x = x if SMALL[name].vocabulary else x.astype(jnp.float64)
        variables = jax.eval_shape(double.init, jax.random.key(0), x)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float64)}
        assert jax.eval_shape(double.predict, variables, x).dtype == jnp.float64


def test_16_bit_inputs_and_32_bit_parameters():
    _, variables = made("lstm")
    x = inputs("lstm").astype(jnp.bfloat16)
    assert jax.eval_shape(SMALL["lstm"].apply, variables, x).dtype == jnp.float32


@pytest.mark.parametrize("name", SMALL)
def test_the_initialisers_are_every_kernels(name):
    seen = {"kernel_init": [], "recurrent_init": []}

    def noting(field):
        def zeros(key, shape, dtype):
            seen[field].append(shape)
            return jnp.zeros(shape, dtype)

        return zeros

    module = SMALL[name].clone(**{field: noting(field) for field in seen})
    kernels = tree.selected(jax.eval_shape(module.init, KEY, inputs(name)), "**/kernel")
    met = {"kernel_init": [], "recurrent_init": []}
    for path, leaf in kernels.items():
        layer = path.split("/")[-2]
        met["recurrent_init" if layer.startswith("h") and layer != "head" else "kernel_init"].append(leaf.shape)
    assert {field: sorted(set(shapes)) for field, shapes in seen.items()} == {
        field: sorted(set(shapes)) for field, shapes in met.items()
    }


def test_every_parameter_has_a_gradient():
    model, variables = made("gru_both")
    x = inputs("gru_both")
    grads = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(model.predict(v, x, LENGTHS)))))(variables)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(grads))


WRONG = {
    "shape": ({}, (2, 5), None, r"inputs must be \[B, N, features\], or tokens \[B, N\] and a vocabulary; got \(2, 5\)"),
    "widths": ({"widths": ()}, STEPS, None, "widths must be those of one layer or more; got none"),
    "lengths": ({}, STEPS, (3,), r"lengths must be one a row, \[2\]; got \(3,\)"),
}


@pytest.mark.parametrize(("fields", "shape", "lengths", "message"), WRONG.values(), ids=WRONG)
def test_fields_that_do_not_fit_are_named(fields, shape, lengths, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            nets.Recurrent((4,)).clone(**fields).init, KEY, jnp.ones(shape), None if lengths is None else jnp.ones(lengths, int)
        )
