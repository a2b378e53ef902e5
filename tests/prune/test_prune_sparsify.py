"""`sparsify` around every optimiser and every tree: cut weights are exactly zero after every step, and the counts are exact."""

import functools
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab import prune, schedules

KEY, RNG = jax.random.key(0), np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": jax.device_put(RNG.normal(size=(6, 5))), "bias": jax.device_put(np.full(5, 0.1))},
    "b": {"kernel": jax.device_put(RNG.normal(size=(5, 4))), "bias": jax.device_put(np.full(4, 0.1))},
}
N = 50
CUBIC = schedules.cubic(0.0, 0.9, 2, 9)


def gradient(params, step):
    """Dense gradients that differ at every step, weights at zero included."""
    return jax.tree.map(lambda w: jnp.cos(3 * w + step + 2.4 * jnp.arange(w.size).reshape(w.shape)), params)


def zeros(params):
    return [np.asarray(leaf) == 0 for leaf in jax.tree.leaves(params) if leaf.ndim == 2]


def run(tx, params, steps, **extra):
    """Yields the parameters and the state after every step of a jitted loop."""

    @jax.jit
    def step(params, state, t):
        updates, state = tx.update(gradient(params, t), state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for t in range(steps):
        params, state = step(params, state, jnp.float32(t))
        yield params, state


def sparse(inner, **options):
    options = {"sparsity": CUBIC, "begin": 2, "end": 9, "every": 3} | options
    return prune.sparsify(inner, **options)


OPTIMISERS = {
    "sgd": lambda wrap: wrap(optax.sgd(0.1)),
    "momentum": lambda wrap: wrap(optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "adam": lambda wrap: wrap(optax.adam(0.1)),
    "adamw": lambda wrap: wrap(optax.adamw(0.1, weight_decay=0.1)),
    "clip outside, clip and adamw": lambda wrap: optax.chain(
        optax.clip(0.5), wrap(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)))
    ),
    "MultiSteps inside": lambda wrap: wrap(optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()),
    "lion": lambda wrap: wrap(optax.lion(0.1, weight_decay=0.1)),
    "muon": lambda wrap: wrap(optax.contrib.muon(0.1, weight_decay=0.1)),
    "schedule_free": lambda wrap: wrap(optax.contrib.schedule_free_adamw(0.1, weight_decay=0.1)),
    "inject_hyperparams": lambda wrap: wrap(
        optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.1, 0.0, 20))
    ),
    "adafactor": lambda wrap: wrap(optax.adafactor(0.1, min_dim_size_to_factor=4)),
    "novograd": lambda wrap: wrap(optax.novograd(0.1)),
    "lookahead-like ema": lambda wrap: wrap(optax.chain(optax.adam(0.1), optax.ema(0.9))),
    "in partition": lambda wrap: optax.partition(
        {"sparse": wrap(optax.adam(0.1)), "dense": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda leaf: "sparse" if leaf.ndim == 2 else "dense", params),
    ),
}


@functools.cache
def history(name):
    """The parameters and the state after each of thirteen steps with one of the optimisers."""
    return list(run(OPTIMISERS[name](sparse), PARAMS, 13))


def row(name):
    # Each of these is a part of another row, or the like of one.
    slow = name in {"sgd", "adamw", "novograd", "lookahead-like ema"}
    return pytest.param(name, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("name", [row(name) for name in OPTIMISERS])
def test_cut_weights_stay_exactly_zero(name):
    before = None
    for t, (params, state) in enumerate(history(name)):
        cut = zeros(params)
        masks = prune.masks(state)
        for mask, zero in zip([masks["a"]["kernel"], masks["b"]["kernel"]], cut, strict=True):
            np.testing.assert_array_equal(~np.asarray(mask), zero)
        expected = 0 if t < 2 else round(float(CUBIC(min({2: 2, 3: 2, 4: 2, 5: 5, 6: 5, 7: 5, 8: 8}.get(t, 9), 9))) * N)
        assert sum(zero.sum() for zero in cut) == expected, t
        assert masks["a"]["bias"].shape == ()
        if before is not None:
            assert all((now | ~then).all() for now, then in zip(cut, before, strict=True))
        before = cut
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    # The rest still trains.
    assert (np.asarray(params["a"]["bias"]) != np.asarray(PARAMS["a"]["bias"])).all()


def test_outer_multi_steps():
    tx = optax.MultiSteps(sparse(optax.adam(0.1)), 2)
    *_, (params, state) = run(tx, PARAMS, 24)
    assert sum(zero.sum() for zero in zeros(params)) == 45
    assert sum(int((~mask).sum()) for mask in jax.tree.leaves(prune.masks(state)) if mask.ndim) == 45


def test_schedule_free_evaluation_parameters_are_zero_too():
    for params, state in history("schedule_free"):
        evaluated = optax.contrib.schedule_free_eval_params(state.inner_state, params)
        for trained, kept in zip(zeros(params), zeros(evaluated), strict=True):
            np.testing.assert_array_equal(trained, kept)


def test_moments_of_a_cut_weight_are_cleared_and_the_rest_is_listed():
    for _, state in history("adam"):
        cut = ~prune.masks(state)["a"]["kernel"]
        adam = state.inner_state[0]
        for moment in (adam.mu["a"]["kernel"], adam.nu["a"]["kernel"]):
            assert (np.asarray(moment)[np.asarray(cut)] == 0).all()
            assert (np.asarray(moment)[~np.asarray(cut)] != 0).all()
    assert cut.any()
    listed = prune.moments(state, PARAMS)
    assert listed.cleared == ("0/mu/a/kernel", "0/mu/b/kernel", "0/nu/a/kernel", "0/nu/b/kernel")
    assert listed.left_alone == ()


@pytest.mark.parametrize(
    ("inner", "cleared", "left_alone"),
    [
        (optax.novograd(0.1), {"mu"}, {"nu"}),
        (optax.adafactor(0.1, min_dim_size_to_factor=4), set(), {"v_row", "v_col", "v"}),
        (optax.lbfgs(), {"params", "updates"}, {"diff_params_memory", "diff_updates_memory", "weights_memory"}),
        (optax.sgd(0.1), set(), set()),
        (optax.contrib.schedule_free_adamw(0.1), {"nu", "z"}, set()),
    ],
)
def test_what_is_left_alone_is_listed(inner, cleared, left_alone):
    listed = prune.moments(prune.sparsify(inner, 0.5).init(PARAMS), PARAMS)

    def fields(paths):
        return {part for path in paths for part in path.split("/") if not part.isdigit() and part not in {"a", "b", "kernel"}}

    assert cleared <= fields(listed.cleared)
    assert left_alone <= fields(listed.left_alone)
    assert not fields(listed.cleared) & left_alone


def test_extra_arguments_pass_through():
    tx = sparse(optax.contrib.reduce_on_plateau(factor=0.5, patience=1), sparsity=0.5, begin=0, end=0)
    *_, (_, state) = run(tx, PARAMS, 6, value=1.0)
    assert float(state.inner_state.scale) < 1


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@flax.struct.dataclass
class Struct:
    kernel: jax.Array
    bias: jax.Array


class Net(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(6, 5, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("params", "where"),
    [
        ((PARAMS["a"]["kernel"], jnp.ones(3)), "0"),
        (Pair(PARAMS["a"]["kernel"], jnp.ones(3)), "kernel"),
        (Struct(PARAMS["a"]["kernel"], jnp.ones(3)), "kernel"),
        (nnx.state(Net()), "**/kernel"),
        ([{"kernel": PARAMS["a"]["kernel"].astype(jnp.bfloat16)}, jnp.ones(3)], "**/kernel"),
        (PARAMS["a"]["kernel"], "**"),
    ],
)
def test_any_tree(params, where):
    # Packed masks, nodes in place of leaves, are the harder ones; bool masks in dicts are everywhere else in this file.
    tx = prune.sparsify(optax.adamw(0.1), 0.5, where=where, packed=True)
    *_, (trained, state) = run(tx, params, 2)
    assert jax.tree.structure(trained) == jax.tree.structure(params)
    assert sum(int((leaf == 0).sum()) for leaf in jax.tree.leaves(trained) if leaf.ndim == 2) == 15
    masks = prune.masks(state)
    np.testing.assert_array_equal(
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(prune.apply_masks(trained, masks))]),
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(trained)]),
    )


@pytest.mark.parametrize(
    "distribution", [prune.global_(), prune.uniform(), prune.erdos_renyi_kernel()], ids=["global", "uniform", "erk"]
)
def test_exact_counts(distribution):
    cuts = (0.0, 1 / 3, 0.5, 0.9999, 1.0)
    tx = prune.sparsify(optax.set_to_zero(), lambda count: cuts[count], end=4, distribution=distribution)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for cut in cuts:
        updates, state = update(PARAMS, state, PARAMS)
        masks = prune.masks(state)
        counts = [int(zero.sum()) for zero in zeros(optax.apply_updates(PARAMS, updates))]
        if distribution.allocate is None:
            assert sum(counts) == int(np.rint(cut * N))
        else:
            shares = distribution.allocate([(6, 5), (5, 4)], cut)
            assert counts == [int(np.rint(share * n)) for share, n in zip(shares, (30, 20), strict=True)]
        magnitudes = np.concatenate([np.abs(PARAMS[name]["kernel"]).ravel() for name in "ab"])
        kept = np.concatenate([np.asarray(masks[name]["kernel"]).ravel() for name in "ab"])
        if distribution.joint and kept.any() and not kept.all():
            assert magnitudes[kept].min() > magnitudes[~kept].max()
        if cut == 0.5:
            # A cut from nothing is the one that was reached by way of a smaller one.
            params, once = jax.jit(lambda: prune.one_shot(prune.magnitude(), PARAMS, 0.5, distribution=distribution))()
            jax.tree.map(np.testing.assert_array_equal, once, masks)
            assert [int(zero.sum()) for zero in zeros(params)] == counts


def test_half_is_rounded_to_even_and_ties_keep_the_lowest_index():
    params = {"a": {"kernel": jnp.ones(5)}, "b": {"kernel": jnp.ones(7)}}
    params, masks = prune.one_shot(prune.magnitude(), params, 0.5, distribution=prune.uniform())
    for name, n, expected in (("a", 5, 2), ("b", 7, 4)):
        assert int((params[name]["kernel"] == 0).sum()) == expected
        np.testing.assert_array_equal(masks[name]["kernel"], np.arange(n) < n - expected)


def test_a_fraction_that_float32_cannot_hold():
    # 0.35 of 10^7 is 3,500,000 and not what 0.35 in float32 gives; the plan is made on the host.
    from jaxopt_lab.prune.cuts import Cuts

    for sparsity in (0.35, optax.constant_schedule(0.35)):
        cuts = Cuts.of(sparsity, 0, 0, 1, prune.global_(), prune.unstructured())
        assert int(cuts.keep([(10_000_000,)], jnp.int32(0))[0]) == 6_500_000


@pytest.mark.parametrize("every", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow), 100])
def test_the_target_is_met_whatever_the_period(every):
    tx = sparse(optax.sgd(0.1), every=every)
    *_, (params, _) = run(tx, PARAMS, 11)
    assert sum(zero.sum() for zero in zeros(params)) == 45


def test_fixed_patterns_blocks_and_thresholds():
    tall = {"kernel": jax.random.normal(KEY, (8, 6))}
    tx = prune.sparsify(optax.adam(0.1), pattern=prune.n_of_m(2, 4))
    *_, (params, _) = run(tx, tall, 3)
    assert ((np.asarray(params["kernel"]) != 0).reshape(2, 4, 6).sum(1) == 2).all()

    tx = prune.sparsify(optax.adam(0.1), 0.5, pattern=prune.block(2, 3))
    *_, (params, _) = run(tx, tall, 3)
    tiles = (np.asarray(params["kernel"]) == 0).reshape(4, 2, 2, 3).sum((1, 3))
    assert sorted(tiles.ravel()) == [0] * 4 + [6] * 4

    tx = prune.sparsify(optax.sgd(0.0), distribution=prune.threshold(0.7))
    *_, (params, _) = run(tx, tall, 2)
    np.testing.assert_array_equal(params["kernel"], np.where(np.abs(tall["kernel"]) < 0.7, 0, tall["kernel"]))


def test_a_falling_schedule_lets_weights_come_back():
    tx = prune.sparsify(optax.adam(0.1), lambda count: 0.8 if count < 2 else 0.4, begin=0, end=2, every=2)
    counts = [sum(zero.sum() for zero in zeros(params)) for params, _ in run(tx, PARAMS, 4)]
    assert counts[0] == 40
    assert counts[-1] == 20


@pytest.mark.parametrize(
    ("growth", "distribution"),
    [(prune.gradient_growth(0.4), prune.global_()), (prune.random_growth(KEY, lambda count: 0.4), prune.uniform())],
    ids=["gradient, global", "random, uniform"],
)
def test_growth_exchanges_a_fraction_at_a_constant_count(growth, distribution):
    tx = prune.sparsify(optax.adam(0.05), 0.6, begin=0, end=9, every=3, growth=growth, distribution=distribution)
    before = None
    for t, (_, state) in enumerate(run(tx, PARAMS, 12)):
        live = np.concatenate([np.asarray(prune.masks(state)[name]["kernel"]).ravel() for name in "ab"])
        assert live.sum() == 20
        if before is not None:
            came, went = (live & ~before).sum(), (~live & before).sum()
            assert came == went
            # A weight that was just dropped may be the first to come back, so eight is the most.
            assert (0 < came <= 8) if t in {3, 6, 9} else came == 0
        before = live
        if t % 3 == 0:
            adam, cut = state.inner_state[0], ~prune.masks(state)["a"]["kernel"]
            assert (np.asarray(adam.mu["a"]["kernel"])[np.asarray(cut)] == 0).all()


def test_gradient_growth_by_hand():
    # Of four live weights two stay, the largest; the two with the largest gradients among the others come back.
    weights = jnp.array([0.0, 0.0, 0.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    gradients = jnp.array([9.0, 1.0, 8.0, 0.0, 0.0, 0.0, 0.0, 7.0])
    tx = prune.sparsify(optax.sgd(0.1), 0.5, end=0, where="**", growth=prune.gradient_growth(0.5))
    updates, state = tx.update(gradients, tx.init(weights), weights)
    np.testing.assert_array_equal(prune.masks(state), [True, False, True, True, True, False, False, False])
    np.testing.assert_allclose(weights + updates, [-0.9, 0, -0.8, 4, 3, 0, 0, 0])


def test_a_schedule_of_growth_is_evaluated_at_the_mask_updates_on_the_host():
    weights, fractions = jnp.arange(1.0, 9.0), {0: 0.0, 3: 0.5, 4: 0.75}
    growth = prune.gradient_growth(lambda count: fractions[count])
    tx = prune.sparsify(optax.set_to_zero(), 0.5, end=4, every=3, where="**", growth=growth)
    update, state, live = jax.jit(tx.update), tx.init(weights), {}
    for t in range(5):
        # The smallest weights have the largest gradients.
        _, state = update(weights[::-1], state, weights)
        live[t] = np.asarray(prune.masks(state)).astype(int).tolist()
    # Of four, none change places, then the two smallest, then the three smallest.
    assert live[0] == live[1] == live[2] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert live[3] == [1, 1, 0, 0, 0, 0, 1, 1]
    assert live[4] == [1, 1, 1, 0, 0, 0, 0, 1]


def test_traced_fractions_are_clipped():
    params = {"kernel": jnp.arange(1.0, 9.0)}

    def live(sparsity, **options):
        tx = prune.sparsify(optax.set_to_zero(), sparsity, end=0, **options)
        return prune.masks(tx.update({"kernel": params["kernel"][::-1]}, tx.init(params), params)[1])["kernel"]

    def counts(fn, *fractions):
        return jax.jit(jax.vmap(fn))(jnp.array(fractions)).sum(1).tolist()

    assert counts(live, 0.0, 0.25, 1.0, 1.2, -0.5) == [8, 6, 0, 0, 8]
    # A schedule of a traced number is traced.
    assert counts(lambda fraction: live(lambda count: 1.1 * fraction), 0.5, 0.95) == [4, 0]

    def grown(fraction):
        return live(0.5, growth=prune.gradient_growth(fraction))

    masks = jax.jit(jax.vmap(grown))(jnp.array([-0.5, 0.0, 0.5, 1.0, 1.5]))
    none, half, all_ = np.repeat([0, 1], 4), np.array([1, 1, 0, 0, 0, 0, 1, 1]), np.repeat([1, 0], 4)
    np.testing.assert_array_equal(masks, np.array([none, none, half, all_, all_], bool))


def test_a_traced_cut_of_more_weights_than_float32_counts():
    # 2**24 + 3 rounds up to a float32, and cutting one unit too many would wrap round to keeping all.
    from jaxopt_lab.prune.cuts import Cuts

    def kept(fraction):
        return Cuts.of(fraction, 0, None, 1, prune.global_(), prune.unstructured()).keep([(2**24 + 3,)], jnp.int32(0))

    np.testing.assert_array_equal(jax.vmap(kept)(jnp.array([0.0, 1.0])), [[2**24 + 3], [0]])


def test_oracles_of_torch_prune():
    # Masks of torch.nn.utils.prune.l1_unstructured(amount=0.5) and global_unstructured(amount=0.4) on these weights (torch 2.13).
    first, second = jnp.array([[0.5, -1.5, 0.2], [-0.1, 3.0, -0.7]]), jnp.array([[-0.3, 0.9], [2.0, -0.05]])
    _, masks = jax.jit(lambda: prune.one_shot(prune.magnitude(), {"kernel": first}, 0.5))()
    np.testing.assert_array_equal(masks["kernel"], np.array([[0, 1, 0], [0, 1, 1]], bool))
    _, masks = jax.jit(lambda: prune.one_shot(prune.magnitude(), {"a": {"kernel": first}, "b": {"kernel": second}}, 0.4))()
    np.testing.assert_array_equal(masks["a"]["kernel"], np.array([[1, 1, 0], [0, 1, 1]], bool))
    np.testing.assert_array_equal(masks["b"]["kernel"], np.array([[0, 1], [1, 0]], bool))


def test_vmap_over_configurations_keeps_the_cond():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)

    def one(fraction, params):
        tx = prune.sparsify(optax.adam(0.1), fraction, begin=1)

        def body(t, carry):
            updates, state = tx.update(gradient(carry[0], t), carry[1], carry[0])
            return optax.apply_updates(carry[0], updates), state

        return jax.lax.fori_loop(0, 3, body, (params, tx.init(params)))[0]

    fractions = jnp.array([0.5, 0.9])
    many = jax.vmap(one)
    # That of the mask update, and that of the search among ties inside it.
    assert str(jax.make_jaxpr(many)(fractions, stacked)).count("cond[") == 2
    params = jax.jit(many)(fractions, stacked)
    for i, fraction in enumerate((0.5, 0.9)):
        alone = jax.jit(functools.partial(one, fraction))(jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        for got, expected in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got[i], expected, atol=1e-6)
            np.testing.assert_array_equal(got[i] == 0, expected == 0)


def test_gradient_through_a_step_is_masked():
    tx = prune.sparsify(optax.sgd(0.1, momentum=0.9), 0.5)
    state = tx.init(PARAMS)

    def after(scale):
        updates, new = tx.update(jax.tree.map(lambda w: scale * jnp.ones_like(w), PARAMS), state, PARAMS)
        return optax.apply_updates(PARAMS, updates)["a"]["kernel"].sum(), new

    # Each live weight moves by -0.1 * scale; a cut one stays at zero.
    (_, new), slope = jax.jit(jax.value_and_grad(after, has_aux=True))(1.0)
    np.testing.assert_allclose(slope, -0.1 * int(prune.masks(new)["a"]["kernel"].sum()), rtol=1e-5)
    _, forward = jax.jit(lambda: jax.jvp(lambda s: after(s)[0], (1.0,), (1.0,)))()
    np.testing.assert_allclose(slope, forward, rtol=1e-6)


def test_sharded_and_pmapped_steps_equal_one_device():
    wide = {"kernel": jax.random.normal(KEY, (16, 8)), "bias": jnp.ones(8)}
    tx = sparse(optax.adamw(0.1))
    *_, (expected, _) = run(tx, wide, 11)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharded = {
        "kernel": jax.device_put(wide["kernel"], NamedSharding(mesh, P("d"))),
        "bias": jax.device_put(wide["bias"], NamedSharding(mesh, P())),
    }
    *_, (params, state) = run(tx, sharded, 11)
    np.testing.assert_allclose(params["kernel"], expected["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(params["kernel"] == 0, expected["kernel"] == 0)
    assert state.masks["kernel"].sharding.is_equivalent_to(sharded["kernel"].sharding, 2)

    @jax.pmap
    def many(params):
        state = tx.init(params)

        def body(t, carry):
            updates, new = tx.update(gradient(carry[0], t.astype(jnp.float32)), carry[1], carry[0])
            return optax.apply_updates(carry[0], updates), new

        return jax.lax.fori_loop(0, 11, body, (params, state))[0]

    params = many(jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), wide))
    np.testing.assert_allclose(params["kernel"][1], expected["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(params["kernel"][1] == 0, expected["kernel"] == 0)


def test_saliency_uses_gradients():
    params = {"kernel": jnp.array([1.0, 2.0, 3.0, 4.0])}

    def loss(outputs, batch):
        return outputs * batch["y"]

    # The gradient of sum(w x) y is x y: saliency is |w x y|.
    batches = [{"x": jnp.array([8.0, 1.0, 1.0, 1.0]), "y": jnp.ones(1)}] * 2
    _, masks = prune.one_shot(
        prune.saliency(), params, 0.5, apply=lambda p, x: (p["kernel"] * x).sum()[None], loss=loss, batches=batches
    )
    np.testing.assert_array_equal(masks["kernel"], [True, False, False, True])
    # A padded row does not count, an integer leaf has no gradient, and several inputs are a tuple.
    padded = [{"x": (jnp.array([[8.0, 1, 1, 1], [0, 0, 90, 0]]),), "y": jnp.ones(2), "weight": jnp.array([1.0, 0.0])}] * 2
    params |= {"ids": jnp.arange(3)}
    _, masks = jax.jit(
        lambda: prune.one_shot(prune.saliency(), params, 0.5, apply=lambda p, x: x @ p["kernel"], loss=loss, batches=padded)
    )()
    np.testing.assert_array_equal(masks["kernel"], [True, False, False, True])
    with pytest.raises(ValueError, match="apply=, loss= and batches="):
        prune.one_shot(prune.saliency(), params, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.2}, "from 0 to 1; got 1.2"),
        ({"sparsity": float("nan")}, "from 0 to 1; got nan"),
        ({"sparsity": lambda count: 0.5 * count, "end": 4}, "a sparsity is a fraction from 0 to 1; got 1.5 at update 3"),
        ({"sparsity": CUBIC}, "needs `end`"),
        ({}, "give a sparsity"),
        ({"sparsity": 0.5, "begin": 5, "end": 4}, "begin=5, end=4"),
        ({"sparsity": 0.5, "every": 0}, "every=0"),
        ({"sparsity": 0.5, "begin": 0.5}, "begin counts updates and must be an int; got 0.5"),
        ({"sparsity": 0.5, "end": 1e3}, "end counts updates and must be an int; got 1000.0"),
        ({"sparsity": "0.5"}, "a sparsity is a fraction from 0 to 1 or a schedule of one; got '0.5'"),
        ({"sparsity": optax.sgd(0.1)}, "or a schedule of one; got GradientTransformation"),
        ({"sparsity": 0.5, "end": 9, "growth": prune.gradient_growth("0.3")}, "growth exchanges a fraction from 0 to 1 or .*'0.3'"),
        ({"sparsity": 0.5, "every": 10}, "^sparsify: every=10 needs `end`, the last update at which masks change"),
        ({"sparsity": 0.5, "growth": prune.gradient_growth()}, "^sparsify: growth needs `end`, the last update"),
        ({"sparsity": 0.5, "distribution": prune.uniform}, r"must be a prune.Distribution; got .*; call it: uniform\(\)"),
        ({"sparsity": 0.5, "criterion": prune.magnitude}, r"call it: magnitude\(\)"),
        ({"distribution": prune.threshold(lambda count: 0.1)}, "needs `end`"),
        ({"sparsity": 0.5, "pattern": prune.n_of_m(2, 4)}, "drop sparsity=0.5"),
        ({"sparsity": 0.5, "distribution": prune.threshold(0.1)}, "drop sparsity=0.5"),
        ({"pattern": prune.n_of_m(2, 4), "growth": prune.gradient_growth()}, "growth needs a sparsity"),
        ({"sparsity": 0.5, "end": 9, "growth": prune.gradient_growth(1.5)}, "growth exchanges a fraction from 0 to 1; got 1.5"),
        (
            {"sparsity": 0.5, "end": 9, "every": 4, "growth": prune.gradient_growth(lambda count: 0.2 * count)},
            "growth exchanges a fraction from 0 to 1; got 1.6 at update 8",
        ),
        ({"pattern": prune.n_of_m(2, 4), "distribution": prune.threshold(0.1)}, "choose one"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        prune.sparsify(optax.sgd(0.1), **options)


def test_swapped_arguments():
    with pytest.raises(TypeError, match=r"the optimiser comes first and then the sparsity, .*; got 0.5$"):
        prune.sparsify(0.5, optax.sgd(0.1))


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        (PARAMS, {"where": "**/kernle"}, ValueError, "a/kernel"),
        ({"table": {"kernel": jnp.ones(3, jnp.int32)}}, {}, TypeError, r"table/kernel is int32\[3\]"),
        ({"kernel": jnp.ones(())}, {}, TypeError, "kernel is float32"),
        ({"kernel": jnp.ones((6, 2))}, {"sparsity": None, "pattern": prune.n_of_m(2, 4)}, ValueError, r"kernel has shape \(6, 2\)"),
    ],
)
def test_bad_parameters(params, options, error, message):
    with pytest.raises(error, match=message):
        prune.sparsify(optax.sgd(0.1), **({"sparsity": 0.5} | options)).init(params)


def test_bad_updates():
    tx = prune.sparsify(optax.sgd(0.1), 0.5, where="kernel")
    params = {"kernel": jnp.ones(4)}
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)
    with pytest.raises(ValueError, match=r"the gradient of kernel has shape \(4, 1\), the weight \(4,\)"):
        tx.update({"kernel": jnp.ones((4, 1))}, state, params)
    with pytest.raises(ValueError, match="2 gradients for 1"):
        tx.update({"kernel": jnp.ones(4), "bias": jnp.ones(4)}, state, params)
    with pytest.raises(ValueError, match="no `sparsify` state"):
        prune.masks(optax.adam(0.1).init(params))


def test_traced_sparsity_needs_a_distribution_that_can_be_traced():
    def init_and_step(fraction):
        tx = prune.sparsify(optax.sgd(0.1), fraction, distribution=prune.erdos_renyi_kernel())
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)

    with pytest.raises(ValueError, match="takes no traced sparsity"):
        jax.vmap(init_and_step)(jnp.array([0.5, 0.6]))


def test_sparsity_is_measured():
    measured = jax.jit(prune.sparsity)({"a": {"kernel": jnp.array([0.0, 0.0, 1.0, 2.0])}, "b": {"kernel": jnp.array([0.0, 3.0])}})
    assert measured.total == pytest.approx(0.5)
    assert measured.per_leaf["a/kernel"] == 0.5


def test_sparsity_leaves_empty_leaves_out():
    empty = {"kernel": jnp.zeros((0, 3))}
    measured = prune.sparsity({"a": empty, "b": {"kernel": jnp.array([0.0, 3.0])}})
    assert measured.total == 0.5
    assert list(measured.per_leaf) == ["b/kernel"]
    with pytest.raises(ValueError, match=r"every chosen leaf is empty \(a/kernel, b/kernel\); choose others by `where`$"):
        prune.sparsity({"a": empty, "b": empty})


def test_one_inside_another():
    tx = prune.sparsify(
        prune.sparsify(optax.adam(0.1), pattern=prune.n_of_m(1, 2), where="a/kernel", begin=1), 0.5, where="b/kernel", begin=1
    )
    *_, (params, state) = run(tx, PARAMS, 4)
    masks = prune.masks(state)
    assert [int(zero.sum()) for zero in zeros(params)] == [15, 10]
    for name in "ab":
        np.testing.assert_array_equal(masks[name]["kernel"], params[name]["kernel"] != 0)
    # A mask is no moment: the outer one leaves that of the inner alone.
    assert not any("masks" in path for path in prune.moments(state, PARAMS).cleared)


def test_a_path_that_ends_like_another_is_not_mistaken_for_it():
    params = {"kernel": jnp.array([0.1, 2.0, 0.3, 4.0]), "layer": {"kernel": jnp.arange(5.0, 9.0)}}
    tx = prune.sparsify(optax.adam(1e-3), 0.5, begin=1, where="kernel")
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(2):
        _, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_allclose(state.inner_state[0].mu["layer"]["kernel"], 0.19, rtol=1e-6)
    np.testing.assert_allclose(state.inner_state[0].mu["kernel"], [0, 0.19, 0, 0.19], rtol=1e-6)


def test_partition_by_prefix():
    tx = optax.partition(
        {"sparse": sparse(optax.adam(0.1), where="a/kernel", sparsity=0.5), "dense": optax.sgd(0.1)},
        {"a": "sparse", "b": "dense"},
    )
    *_, (params, state) = run(tx, PARAMS, 11)
    masks = prune.masks(state)
    np.testing.assert_array_equal(masks["a"]["kernel"], params["a"]["kernel"] != 0)
    assert masks["b"].shape == ()
    same = prune.apply_masks(params, masks)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_an_empty_leaf_is_left_alone():
    params = {"a": {"kernel": jnp.ones((0, 4))}, "b": PARAMS["b"]}
    *_, (trained, state) = run(prune.sparsify(optax.adam(0.1), 0.5, packed=True), params, 2)
    assert int((trained["b"]["kernel"] == 0).sum()) == 10
    assert prune.masks(state)["a"]["kernel"].shape == ()


def test_in_double_precision():
    with jax.enable_x64(True):
        params = {"kernel": jnp.linspace(-1.0, 1.0, 9, dtype=jnp.float64), "half": {"kernel": jnp.ones(3, jnp.bfloat16)}}
        assert jax.jit(prune.kth_largest)(params["kernel"], 3) == 0.5
        *_, (trained, _) = run(sparse(optax.adam(0.1), sparsity=schedules.cubic(0.0, 0.5, 2, 9)), params, 11)
        assert trained["kernel"].dtype == jnp.float64
        assert sum(int((leaf == 0).sum()) for leaf in jax.tree.leaves(trained)) == 6
