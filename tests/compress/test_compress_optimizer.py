"""Optimisers on trees with compressed leaves: what is frozen stays bit for bit, what trains moves, and only latents decay."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import compress, prune, regularize
from jaxopt_lab.core import tree

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "lion": lambda: optax.lion(0.1, weight_decay=0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "adafactor": lambda: optax.adafactor(0.1),
    "clip and chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.trace(0.9), optax.scale(-0.1)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(0.1), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(0.1, 0.0, 9)),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.1),
    "masked": lambda: optax.masked(optax.sgd(0.1), lambda p: jax.tree.map(lambda _: True, p)),
}


class Factored(compress.Leaf):
    """A product of two trained factors: nothing of the weight's own shape."""

    a: jax.Array
    b: jax.Array
    trains: ClassVar[tuple[str, ...]] = ("a", "b")

    def aval(self):
        return jax.core.ShapedArray((self.a.shape[0], self.b.shape[1]), self.a.dtype)

    def materialise(self):
        return self.a @ self.b


class Stepped(compress.Leaf):
    """A latent weight, a trained step and a frozen mask."""

    w: jax.Array
    step: jax.Array
    mask: jax.Array
    trains: ClassVar[tuple[str, ...]] = ("w", "step")
    latent: ClassVar[str | None] = "w"

    def aval(self):
        return jax.core.ShapedArray(self.w.shape, self.w.dtype)

    def materialise(self):
        return self.w * self.step * self.mask


def _tree(seed: int = 0):
    key = jax.random.key(seed)
    return {"a": {"kernel": jax.random.normal(key, (4, 3)), "bias": jnp.ones(3)}, "b": {"kernel": jnp.ones((3, 2))}}


def _loss(params, x):
    return jnp.sum(jnp.square(jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None]) @ params["b"]["kernel"]))


X = jax.random.normal(jax.random.key(5), (6, 4))
_grad = jax.jit(jax.grad(compress.lift(_loss), allow_int=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_codes_are_frozen_and_the_rest_trains(name):
    # A trained kernel beside the stored one: the updates of what is plain are those of the bare transform on the plain part.
    params = compress.quantize(_tree(), where="a/kernel")
    tx, bare = compress.optimizer(OPTIMIZERS[name]()), OPTIMIZERS[name]()
    state, bare_state = tx.init(params), bare.init(compress.trainable(params))
    start, plain = params, compress.trainable(params)

    @jax.jit
    def step(params, state, plain, bare_state):
        grads = jax.grad(compress.lift(_loss), allow_int=True)(params, X)
        updates, state = tx.update(grads, state, params)
        bare_updates, bare_state = bare.update(compress.trainable(grads), bare_state, plain)
        return optax.apply_updates(params, updates), state, optax.apply_updates(plain, bare_updates), bare_state

    for _ in range(4):
        params, state, plain, bare_state = step(params, state, plain, bare_state)
    stored, original = params["a"]["kernel"], start["a"]["kernel"]
    assert stored.codes.dtype == jnp.int8
    np.testing.assert_array_equal(stored.codes, original.codes)
    np.testing.assert_array_equal(stored.scale, original.scale)
    assert jax.tree.structure(params) == jax.tree.structure(start)
    assert bool((params["a"]["bias"] != start["a"]["bias"]).all())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), compress.trainable(params), plain)
    assert jax.tree.structure(state) == jax.tree.structure(bare_state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_leaves_it_is_the_transform_itself(name):
    params = _tree()
    tx, bare = compress.optimizer(OPTIMIZERS[name]()), OPTIMIZERS[name]()
    grads = jax.tree.map(lambda p: 0.1 * p + 1, params)
    got, want = tx.update(grads, tx.init(params), params), bare.update(grads, bare.init(params), params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_only_what_is_declared_trains_and_only_latents_decay():
    params = {
        "plain": jnp.full(2, 2.0),
        "factored": Factored(jnp.full((3, 1), 2.0), jnp.full((1, 2), 2.0)),
        "stepped": Stepped(jnp.full(2, 2.0), jnp.array(2.0), jnp.array([1.0, 0.0])),
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = compress.optimizer(optax.adamw(0.5, weight_decay=0.5))
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["plain"], [-0.5, -0.5])
    np.testing.assert_allclose(updates["stepped"].w, [-0.5, -0.5])
    np.testing.assert_array_equal(updates["stepped"].step, 0)
    np.testing.assert_array_equal(updates["factored"].a, jnp.zeros((3, 1)))

    ones = jax.tree.map(jnp.ones_like, params)
    moved, _ = compress.optimizer(optax.sgd(1.0)).update(ones, compress.optimizer(optax.sgd(1.0)).init(params), params)
    np.testing.assert_array_equal(moved["factored"].b, -jnp.ones((1, 2)))
    np.testing.assert_array_equal(moved["stepped"].step, -1)
    np.testing.assert_array_equal(moved["stepped"].mask, [0, 0])


# Each optimiser with a weight decay of its argument.
DECAYING = {
    "sgd": lambda decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1)),
    "momentum": lambda decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "adam": lambda decay: optax.chain(optax.add_decayed_weights(decay), optax.adam(0.1)),
    "adamw": lambda decay: optax.adamw(0.1, weight_decay=decay),
    "lion": lambda decay: optax.lion(0.1, weight_decay=decay),
    "muon": lambda decay: optax.contrib.muon(0.1, weight_decay=decay, adam_weight_decay=decay),
    "clip and chain": lambda decay: optax.chain(
        optax.clip(0.2), optax.trace(0.9), optax.add_decayed_weights(decay), optax.scale(-0.1)
    ),
    "MultiSteps": lambda decay: optax.MultiSteps(optax.adamw(0.1, weight_decay=decay), 2),
    "schedule_free": lambda decay: optax.contrib.schedule_free_adamw(0.1, weight_decay=decay),
}


def _leaves():
    values = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    return {
        "factored": Factored(values(0, 3, 2), values(1, 2, 3)),
        "plain": values(2, 3),
        "stepped": Stepped(values(3, 2, 2), jnp.array(2.0), jnp.array([[1.0, 0.0], [1.0, 1.0]])),
    }


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("lion", "momentum", "adam") else ()) for n in DECAYING]
)
def test_what_is_no_weight_trains_as_it_would_without_decay(name):
    start = _leaves()
    fields = lambda p: {"a": p["factored"].a, "b": p["factored"].b, "step": p["stepped"].step}  # noqa: E731
    weights = lambda p: {"plain": p["plain"], "w": p["stepped"].w}  # noqa: E731
    tx, free, decayed = compress.optimizer(DECAYING[name](0.3)), DECAYING[name](0.0), DECAYING[name](0.3)
    slope = lambda params: jax.tree.map(lambda x: jnp.sin(3 * x) + 0.2, params)  # noqa: E731

    @jax.jit
    def run(params):
        """The tree of leaves; its fields as bare arrays without decay; its weights as bare arrays with it."""

        def trained(optimizer, values):
            state = optimizer.init(values)
            for _ in range(4):
                updates, state = optimizer.update(slope(values), state, values)
                values = optax.apply_updates(values, updates)
            return values

        return trained(tx, params), trained(free, fields(params)), trained(decayed, weights(params))

    moved, fields_moved, weights_moved = run(start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fields(moved), fields_moved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), weights(moved), weights_moved)
    np.testing.assert_array_equal(moved["stepped"].mask, start["stepped"].mask)
    assert float(jnp.abs(moved["factored"].a - start["factored"].a).max()) > 0.1


@pytest.mark.parametrize(
    "name", ["adamw", "muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("MultiSteps", "schedule_free"))]
)
def test_sparsify_acts_on_the_latent_weight_at_the_path_of_the_leaf(name):
    params = _leaves()
    tx = compress.optimizer(prune.sparsify(DECAYING[name](0.3), 0.5, where="stepped"))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(lambda x: jnp.sin(3 * x) + 0.2, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
        assert int(jnp.sum(params["stepped"].w == 0)) == 2
    masks = prune.masks(state)
    np.testing.assert_array_equal(masks["stepped"], params["stepped"].w != 0)
    masked = prune.apply_masks(_leaves(), masks)
    np.testing.assert_array_equal(masked["stepped"].w == 0, params["stepped"].w == 0)
    assert [path.rpartition("/")[2] for path in prune.moments(state, params).cleared].count("stepped") >= (name != "muon")


def test_penalties_act_on_the_latent_weight_at_the_path_of_the_leaf():
    params = _leaves()
    zero = jax.tree.map(jnp.zeros_like, params)
    shrink = optax.chain(optax.sgd(1.0), regularize.proximal(regularize.prox.soft_threshold, 0.5, 1.0, where="stepped"))
    for inner, expected in (
        (optax.chain(regularize.add_l1(0.5, where="stepped"), optax.sgd(1.0)), -0.5 * jnp.sign(params["stepped"].w)),
        (shrink, regularize.prox.soft_threshold(params["stepped"].w, 0.5) - params["stepped"].w),
    ):
        tx = compress.optimizer(inner)
        updates, _ = tx.update(zero, tx.init(params), params)
        np.testing.assert_allclose(updates["stepped"].w, expected, rtol=1e-6)
        np.testing.assert_array_equal(updates["stepped"].step, 0)
        np.testing.assert_array_equal(updates["factored"].a, 0)


def test_a_leaf_without_a_latent_weight_is_refused_by_its_path():
    params = compress.quantize(_tree(), where="a/kernel")
    with pytest.raises(TypeError, match=r"^a/kernel is stored as Quantized, which has no latent weight to act on"):
        compress.optimizer(prune.sparsify(optax.adam(0.1), 0.5)).init(params)
    tx = compress.optimizer(regularize.proximal(regularize.prox.soft_threshold, 0.5, 1.0, where="factored"))
    with pytest.raises(TypeError, match=r"^factored is stored as Factored, which has no latent weight to act on"):
        tx.update(_leaves(), tx.init(_leaves()), _leaves())


def test_lbfgs_searches_on_the_trained_part():
    params = compress.quantize(_tree(), where="a/kernel")
    tx = compress.optimizer(optax.lbfgs(memory_size=2))
    value_fn = lambda p: compress.lift(_loss)(p, X)  # noqa: E731

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(value_fn, allow_int=True)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, value

    moved, state, first = step(params, tx.init(params))
    moved, state, second = step(moved, state)
    assert float(second) < float(first)
    np.testing.assert_array_equal(moved["a"]["kernel"].codes, params["a"]["kernel"].codes)


def test_trained_parts_come_apart_and_together():
    params = compress.quantize(_tree(), where="a/kernel")
    part = compress.trainable(params)
    assert tree.paths(part) == ["a/bias", "a/kernel", "b/kernel"]
    assert len(jax.tree.leaves(part)) == 2
    whole = compress.merge(params, jax.tree.map(lambda p: p + 1, part))
    np.testing.assert_array_equal(whole["a"]["kernel"].codes, params["a"]["kernel"].codes)
    np.testing.assert_array_equal(whole["a"]["bias"], params["a"]["bias"] + 1)


def test_parameters_are_needed_and_the_error_says_so():
    params = compress.quantize(_tree(), where="a/kernel")
    tx = compress.optimizer(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"compress\.optimizer needs the parameters to update compressed leaves"):
        tx.update(_grad(params, X), tx.init(params))
