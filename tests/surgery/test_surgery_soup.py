"""Averages of networks by numpy, and alignment: renumbered networks come back, and what must not be renumbered stays."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import compress, data, nets
from jaxopt_lab.core import tree
from jaxopt_lab.surgery import coupled_channels
from jaxopt_lab.surgery.align import Alignment, align
from jaxopt_lab.surgery.soup import add_tasks, greedy_soup, merge_tasks, soup, task_vector

KEY = jax.random.key(0)


def _tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jax.device_put(np.asarray(rng.normal(size=shape), dtype))  # noqa: E731
    return {"a": {"kernel": draw(3, 4), "bias": draw(4)}, "steps": jnp.int32(seed), "key": jax.random.key(seed)}


# Soup.


def test_a_soup_by_numpy():
    several, weights = [_tree(seed) for seed in range(3)], [1.0, 0.5, 2.5]
    mixed = jax.jit(soup)(several, jnp.asarray(weights))
    for name in ("kernel", "bias"):
        rows = np.stack([np.asarray(one["a"][name], np.float64) for one in several])
        np.testing.assert_allclose(mixed["a"][name], np.tensordot(np.array(weights) / 4.0, rows, 1), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(soup(several)["a"][name], rows.mean(0), rtol=1e-6, atol=1e-7)
    assert int(mixed["steps"]) == 0
    assert mixed["key"] == jax.random.key(0)


def test_half_precision_is_averaged_in_single():
    """256 + 1 is 256 in bfloat16: a sum in it would lose all but the first."""
    values = [256.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 10.0]
    mixed = soup([{"w": jnp.array([value], jnp.bfloat16)} for value in values])
    assert mixed["w"].dtype == jnp.bfloat16
    assert mixed["w"].tolist() == [34.0]


def test_what_cannot_be_averaged_is_named():
    one = _tree(0)
    with pytest.raises(ValueError, match=r"^a/bias has shape \(3,\) in candidate 1, and \(4,\) in candidate 0$"):
        soup([one, {**one, "a": {**one["a"], "bias": jnp.ones(3)}}])
    with pytest.raises(ValueError, match=r"^candidate 2 has other paths than candidate 0; first of 1: a/bias$"):
        soup([one, one, {**one, "a": {"kernel": one["a"]["kernel"]}}])
    with pytest.raises(ValueError, match="give at least one candidate"):
        soup([])
    with pytest.raises(ValueError, match="weights must be at least 0, and not all 0"):
        soup([one, one], [1.0, -1.0])
    with pytest.raises(ValueError, match=r"weights must be one number for each of 2 candidates; got shape \(3,\)"):
        soup([one, one], [1.0, 1.0, 1.0])
    with pytest.raises(TypeError, match="a/kernel of candidate 1 is stored in codes"):
        soup([one, compress.quantize(one, where="a/kernel")])


def test_a_greedy_soup_never_scores_less():
    several = [jax.tree.map(lambda leaf: leaf, {"w": jax.random.normal(jax.random.key(k), (4,))}) for k in range(5)]
    score = lambda params: -float(jnp.sum(params["w"] ** 2))  # noqa: E731
    params, chosen = greedy_soup(several, score)
    assert score(params) >= max(map(score, several))
    assert score(several[chosen[0]]) == max(map(score, several))
    np.testing.assert_allclose(params["w"], np.mean([several[k]["w"] for k in chosen], axis=0), rtol=1e-5)
    # One more of those that were left out would not have been better.
    for k in set(range(5)) - {*chosen}:
        assert score(soup([several[j] for j in (*chosen, k)])) < score(params)
    with pytest.raises(ValueError, match="the score of candidate 0 is not a number"):
        greedy_soup(several, lambda params: float("nan"))


def test_tasks_come_and_go():
    base, one, two = (_tree(seed) for seed in range(3))
    first, second = task_vector(one, base), task_vector(two, base)
    there = add_tasks(base, [first])
    np.testing.assert_allclose(there["a"]["kernel"], one["a"]["kernel"], rtol=1e-6, atol=1e-6)
    assert int(there["steps"]) == 0
    assert there["key"] == base["key"]
    back = add_tasks(there, [first], -1.0)
    np.testing.assert_allclose(back["a"]["bias"], base["a"]["bias"], rtol=1e-6, atol=1e-6)
    both = jax.jit(add_tasks)(base, [first, second], jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(both["a"]["bias"], soup([one, two])["a"]["bias"], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"scale must be a number or one for each of 1 vectors; got shape \(2,\)"):
        add_tasks(base, [first], [1.0, 2.0])
    with pytest.raises(ValueError, match="vector 0 has other paths than the base"):
        add_tasks(base, [first["a"]])


def test_ties_by_numpy():
    vectors = [
        {"b": row[:5], "w": row[5:].reshape(3, 5)} for row in np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    ]
    flat = np.stack([np.concatenate([vector["b"], vector["w"].ravel()]) for vector in vectors])
    expected = np.zeros(20)
    for i in range(20):
        kept = [row[i] for row in flat if abs(row[i]) in sorted(abs(row))[-8:]]
        agreeing = [value for value in kept if np.sign(value) == np.sign(sum(kept))]
        expected[i] = np.mean(agreeing) if agreeing else 0.0
    got = jax.jit(functools.partial(merge_tasks, density=0.4))(vectors)
    np.testing.assert_allclose(np.concatenate([got["b"], got["w"].ravel()]), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]; got 1.5"):
        merge_tasks(vectors, 1.5)


# Alignment.


class Recurrent(nn.Module):
    """Attention in heads, a recurrent cell of gates, two activations side by side."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(6)(x)
        h = h + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(h))
        h = nn.RNN(nn.GRUCell(5))(nn.relu(h))[:, -1]
        left, right = jnp.split(nn.Dense(8, name="two")(h), 2, axis=-1)
        return nn.Dense(3)(jnp.concatenate([nn.relu(left), nn.tanh(right)], axis=-1))


class Residual(nn.Module):
    """A stream that a block adds to, with running statistics."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda: nn.BatchNorm(use_running_average=not train)  # noqa: E731
        x = nn.relu(norm()(nn.Conv(5, (3, 3))(x)))
        x = nn.relu(x + norm()(nn.Conv(5, (3, 3))(nn.relu(nn.Conv(4, (1, 1))(x)))))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


_MODELS = {
    "perceptron": (lambda: nets.MLP(features=(12, 9), classes=4), (6, 5)),
    "residual": (Residual, (3, 4, 4, 2)),
    "recurrent": (Recurrent, (4, 5, 3)),
}


@functools.lru_cache
def _made(name):
    module, shape = _MODELS[name]
    model, x = nets.from_linen(module()), jax.random.normal(jax.random.key(7), shape)
    shapes = jax.eval_shape(model.init, KEY, x)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda s: jax.device_put(rng.uniform(0.5, 1.5, s.shape) * (rng.normal(size=s.shape) if s.ndim > 1 else 1)), shapes
    )
    return model.predict, jax.tree.map(lambda a: a.astype(jnp.float32), variables), x


def _shuffled(apply, params, x, seed, without=()):
    """The same network with every unit in another place."""
    rng = np.random.default_rng(seed)
    groups = [g for g in coupled_channels(apply, params, x).groups if g.units > 1 and g.name not in without]
    shapes = {name: leaf.shape for name, leaf in zip(*tree.flatten(params)[:2], strict=True)}
    return Alignment(shapes, tuple(groups), tuple(rng.permutation(g.units) for g in groups), {}, (0, 0)).renumber(params)


@pytest.mark.parametrize("name", ["residual", "recurrent"])
def test_shuffled_units_come_back(name):
    apply, params, x = _made(name)
    mixed = ["params/two/kernel[1]"] if name == "recurrent" else []
    other = _shuffled(apply, params, x, 0, without=mixed)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (other, params)), strict=True)) > 0.5
    aligned, alignment = align(apply, params, other, x, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, aligned, params)
    assert sorted(alignment.left) == mixed
    assert alignment.similarity[0] < alignment.similarity[1]
    if name == "recurrent":
        np.testing.assert_allclose(jax.jit(apply)(other, x), jax.jit(apply)(params, x), rtol=1e-4, atol=1e-3)
    assert "units moved" in str(alignment)


def test_aligned_is_the_same_function_as_before():
    apply, params, x = _made("perceptron")
    other = jax.tree.map(lambda a: jnp.flip(a, 0) + 0.1, params)
    aligned, alignment = align(apply, params, other, x, key=KEY)
    assert any(np.any(order != np.arange(len(order))) for order in alignment.order)
    np.testing.assert_allclose(jax.jit(apply)(aligned, x), jax.jit(apply)(other, x), rtol=1e-4, atol=1e-4)
    # What moved is the inner product that was asked for.
    inner = lambda a: sum(float(jnp.vdot(p, q)) for p, q in zip(*map(jax.tree.leaves, (a, params)), strict=True))  # noqa: E731
    np.testing.assert_allclose(alignment.similarity, [inner(other), inner(aligned)], rtol=1e-4)
    assert alignment.similarity[1] > alignment.similarity[0]


def test_units_that_a_constant_tells_apart_stay():
    params = {"a": jax.random.normal(KEY, (3, 6)), "b": jax.random.normal(KEY, (6, 2))}
    other = {"a": params["a"][:, ::-1], "b": params["b"][::-1]}
    scales = np.linspace(1.0, 2.0, 6, dtype=np.float32)[None]
    shape = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    aligned, _ = align(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, other, shape, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, aligned, params)
    aligned, alignment = align(lambda p, x: jnp.tanh(x @ p["a"] * scales) @ p["b"], params, other, shape, key=KEY)
    assert alignment.left == {"a[1]": "the outputs change with the order of its units"}
    jax.tree.map(np.testing.assert_array_equal, aligned, other)


def test_what_cannot_be_aligned_is_named():
    apply, params, x = _made("perceptron")
    kernel = params["params"]["Dense_0"]["kernel"]
    with pytest.raises(ValueError, match=r"params/Dense_0/kernel: reference has \(4, 12\), params \(5, 12\) there"):
        align(apply, tree.replaced(params, {"params/Dense_0/kernel": kernel[:4]}), params, x, key=KEY)
    with pytest.raises(ValueError, match="no units can be renumbered"):
        align(lambda p, x: x @ p, kernel, kernel, x, key=KEY)
    alignment = align(apply, params, params, x, key=KEY)[1]
    with pytest.raises(ValueError, match="the alignment is for other parameters; first of 12 paths"):
        alignment.renumber(params["params"])


def test_aligned_networks_can_be_averaged():
    """Two perceptrons trained apart: half way between them the loss is high, and once they are aligned it is not."""
    digits = data.digits()
    x, y = (jnp.asarray(digits.train[name]) for name in ("x", "y"))
    model = nets.from_linen(nets.MLP(features=(64,), classes=10))
    tx = optax.adam(3e-3)

    def loss(variables, rows=slice(None)):
        logits = model.predict(variables, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def trained(key):
        def step(carry, key):
            variables, state = carry
            grads = jax.grad(loss)(variables, jax.random.choice(key, len(x), (64,)))
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(variables, updates), state), None

        variables = model.init(key, x[:1])
        return jax.lax.scan(step, (variables, tx.init(variables)), jax.random.split(key, 300))[0][0]

    both = jax.jit(jax.vmap(trained))(jax.random.split(KEY, 2))
    one, two = (jax.tree.map(lambda leaf, k=k: leaf[k], both) for k in range(2))
    aligned, _ = align(model.predict, one, two, x[:16], key=KEY)
    held = jax.jit(loss)
    ends = (float(held(one)) + float(held(two))) / 2
    before, after = (float(held(soup([one, other]))) - ends for other in (two, aligned))
    assert ends < 0.2
    np.testing.assert_allclose(float(held(aligned)), float(held(two)), rtol=1e-4)
    assert after < before / 4


def _gated(params, x):
    return (jax.nn.relu(x @ params["a"]) * np.arange(1, 9, dtype=np.float32)[None]) @ params["b"]


@pytest.mark.parametrize(
    ("apply", "x"),
    [
        (_gated, jnp.zeros((2, 3))),
        (lambda p, x: jnp.argmax(_gated(p, x), axis=1), jnp.ones((2, 3))),
        (lambda p, x: jax.lax.cond(x.sum() > 0, lambda: _gated(p, x), lambda: x @ p["c"]), -jnp.ones((2, 3))),
    ],
)
def test_what_an_example_does_not_show_is_tried(apply, x):
    params, other = (
        {name: jax.random.normal(jax.random.key(seed + k), shape) for k, (name, shape) in enumerate(SIDES.items())}
        for seed in (0, 7)
    )
    aligned, alignment = align(apply, params, other, x, key=KEY)
    assert alignment.left == {"a[1]": "the outputs change with the order of its units"}
    jax.tree.map(np.testing.assert_array_equal, aligned, other)


SIDES = {"a": (3, 8), "b": (8, 4), "c": (3, 4)}


def test_complex_numbers_are_averaged():
    assert soup([{"w": jnp.array([1 + 1j])}, {"w": jnp.array([3 - 1j])}])["w"].tolist() == [2 + 0j]
