"""A state cut by rules: the step is that of one device, whatever is cut, and the program exchanges no more than it must."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from test_parallel_pmap import BATCHES, KEY, MODELS, batch_of, close, loss, penalty

from jaxopt_lab import compress, losses, nets, parallel, prune, schedules, train
from jaxopt_lab.core import tree
from jaxopt_lab.parallel.placement import follow

P = PartitionSpec


def line(count=8):
    return Mesh(np.array(jax.devices()[:count]), ("data",))


def grid():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


def halves(path, leaf):
    """Of a matrix the columns, or the rows where these are odd."""
    if leaf.ndim != 2 or all(side % 2 for side in leaf.shape):
        return P()
    return P(None, "model") if leaf.shape[1] % 2 == 0 else P("model")


WAYS = {
    "replicated": (line, parallel.replicated),
    "fsdp": (line, parallel.fsdp("data", min_size=8)),
    "tensor": (grid, [("**/Conv_0/*", P()), ("**/first/kernel", P("model")), ("**", halves)]),
    "both": (grid, {"**/BatchNorm_0/*": P(), "**": parallel.fsdp(("data", "model"), min_size=8)}),
}


@pytest.fixture(scope="module", params=MODELS)
def alone(request):
    """One device's step, jitted and not, and the state that all start from."""
    model, tx = MODELS[request.param], optax.sgd(0.1)
    state = train.init(model, tx, KEY, batch_of(2))
    step = train.make_step(model, loss, tx, penalty=penalty)
    return step, jax.jit(step), state


# What these show, others show as well.
AGAIN = [
    ("mlp_dropout", "replicated"),
    ("mlp_dropout", "tensor"),
    ("nnx", "replicated"),
    ("nnx", "tensor"),
    ("functions", "replicated"),
]
CASES = [
    pytest.param(name, way, marks=[pytest.mark.slow] if (name, way) in AGAIN else [])
    for name in MODELS
    for way in WAYS
    if way != "both" or name == "functions"
]


@pytest.mark.parametrize(("alone", "way"), CASES, indirect=["alone"])
def test_one_sgd_update_equals_that_of_one_device(alone, way):
    step, jitted, state = alone
    mesh, rules = WAYS[way]
    together = parallel.shard(step, mesh(), rules)
    # Both are of thirteen rows, and one program.
    for batch in ("ragged", "padded_already") if state.model_state else ("ragged",):
        one, one_metrics = jitted(state, BATCHES[batch])
        many, many_metrics = together(state, BATCHES[batch])
        close(one.params, many.params)
        close(one.model_state, many.model_state)
        close(one_metrics, many_metrics, 3e-6)
        assert int(many.step) == 1
        assert max(float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (state.params, one.params)), strict=True)) > 1e-3
    wanted = together.place(state)
    assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(many), strict=True))
    cut = [leaf for leaf in jax.tree.leaves(many.params) if not leaf.sharding.is_fully_replicated]
    assert bool(cut) == (way != "replicated")
    assert together._jitted._cache_size() <= 2


@pytest.mark.parametrize("alone", ["functions"], indirect=True)
def test_whole_batches_inside_of_jit_and_under_fit_in_both_loops(alone):
    step, jitted, state = alone
    together = parallel.shard(step, line(), parallel.fsdp(min_size=8))
    one = state
    for _ in range(4):
        one, _ = jitted(one, BATCHES["whole"])
    many = state
    for _ in range(4):
        many, _ = together(many, BATCHES["whole"])
    close(one.params, many.params, 3e-6)
    assert together.place(many).params is many.params
    for chunk in (1, 2):
        many = train.fit(together, state, lambda t: BATCHES["whole"], steps=4, chunk=chunk, progress=False).state
        close(one.params, many.params, 3e-6)
        assert not many.params.sharding.is_fully_replicated
    assert int(state.step) == 0


def digits(rows):
    rng = np.random.default_rng(1)
    return {"x": rng.standard_normal((rows, 16), dtype=np.float32), "y": rng.integers(0, 8, rows).astype(np.int32)}


PERCEPTRON = nets.from_linen(nets.MLP(features=(32,), classes=8))


def sparse(inner):
    return prune.sparsify(inner, schedules.cubic(0.0, 0.8, 5, 30), begin=5, end=30, every=5)


def compiled(tx, mesh, rules, batch):
    """A training of 40 steps on a mesh: the program and where it ends."""
    step = train.make_step(PERCEPTRON, loss, tx)
    together = parallel.shard(step, mesh, rules)
    state = together.place(train.init(PERCEPTRON, tx, KEY, digits(2)))
    batch = together.place_batch(batch)
    program = jax.jit(together).lower(state, batch).compile()
    for _ in range(40):
        # Simulated devices that are many steps behind can keep each other waiting for a thread.
        state, _ = jax.block_until_ready(program(state, batch))
    return program, state


@pytest.fixture(scope="module")
def trainings():
    """Forty steps of momentum, dense and sparse, on one device to eight."""
    inner, batch = optax.sgd(0.05, momentum=0.9), digits(24)
    dense, cut = parallel.replicated, parallel.fsdp(min_size=64)
    cases = {
        ("dense", 1): (inner, line(1), dense),
        ("dense", 2): (inner, line(2), cut),
        ("dense", 4): (inner, line(4), parallel.zero(min_size=64)),
        ("dense", 8): (inner, line(8), cut),
        ("dense", "replicated"): (inner, line(8), dense),
        ("sparse", 1): (sparse(inner), line(1), dense),
        ("sparse", 8): (sparse(inner), line(8), cut),
        ("sparse", "replicated"): (sparse(inner), line(8), dense),
        ("sparse", "tensor"): (sparse(inner), grid(), {"**/Dense_0/kernel": P(None, "model"), "**": P()}),
    }
    return {name: compiled(*case, batch) for name, case in cases.items()}


def test_forty_steps_on_one_to_eight_devices(trainings):
    start = train.init(PERCEPTRON, optax.sgd(0.05), KEY, digits(2)).params
    for kind in ("dense", "sparse"):
        first = trainings[kind, 1][1]
        assert float(optax.tree.norm(optax.tree.sub(first.params, start))) > 0.5
        for name, (_, state) in trainings.items():
            if name[0] == kind:
                close(jax.device_get(first.params), jax.device_get(state.params), 1e-4)
    masks = [prune.masks(trainings["sparse", how][1].opt_state) for how in (1, 8, "replicated", "tensor")]
    zeros = jax.tree.map(lambda mask: int((~mask).sum()), masks[0])
    assert zeros["Dense_0"]["kernel"] + zeros["Dense_1"]["kernel"] == round(0.8 * (16 * 32 + 32 * 8))
    for other in masks[1:]:
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(masks[0]), jax.device_get(other))


def test_data_parallelism_is_one_sum_of_all_gradients(trainings):
    program, state = trainings["dense", "replicated"]
    (found,) = parallel.collectives(program)
    # Every parameter's gradient, and the loss.
    assert found == ("all-reduce", tree.nbytes(state.params) + 4, 1, 5, False, True)
    assert parallel.collectives(trainings["dense", 1][0]) == []


def held(arrays, device):
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(arrays)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[device]
    )


def test_fsdp_holds_an_nth_of_everything(trainings):
    for devices in (2, 8):
        state = trainings["dense", devices][1]
        kernels = {"params": state.params, "moments": state.opt_state}
        kernels = [leaf for leaf in jax.tree.leaves(kernels) if leaf.ndim == 2]
        assert len(kernels) == 4
        assert all(held(kernels, k) * devices == tree.nbytes(kernels) for k in range(devices))
    _, state = trainings["dense", 4]
    assert held(state.params, 0) == tree.nbytes(state.params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 2]
    assert held(moments, 0) * 4 == tree.nbytes(moments)


@pytest.mark.parametrize("how", [8, "replicated"])
def test_sparsify_adds_no_exchange_beyond_scalars_at_its_rare_work(trainings, how):
    dense, pruned = (parallel.collectives(trainings[kind, how][0]) for kind in ("dense", "sparse"))
    plain = [found for found in pruned if not found.conditional]
    assert sorted(plain) == sorted(dense)
    added = [found for found in pruned if found.conditional]
    assert bool(added) == (how == 8)
    assert all(found.kind == "all-reduce" and found.bytes <= 64 for found in added)
    _, state = trainings["sparse", how]
    masks = state.opt_state.masks["Dense_0"]["kernel"]
    assert masks.sharding == state.params["Dense_0"]["kernel"].sharding


def test_a_teacher_is_cut_by_the_same_rules():
    def distilled(logits, batch):
        taught = PERCEPTRON.predict({"params": batch["teacher"]}, batch["x"])
        return losses.distill.soft_targets(logits, taught, temperature=4.0)

    tx, batch = optax.sgd(0.1), digits(13)
    teacher = jax.jit(PERCEPTRON.init)(jax.random.key(9), batch["x"])["params"]
    step, state = train.make_step(PERCEPTRON, distilled, tx), train.init(PERCEPTRON, tx, KEY, batch)
    one, _ = jax.jit(step)(state, {**batch, "teacher": teacher})
    together = parallel.shard(step, line(), parallel.fsdp(min_size=64), beside=["teacher"])
    teacher = together.place(teacher)
    assert held(teacher["Dense_0"]["kernel"], 3) * 8 == tree.nbytes(teacher["Dense_0"]["kernel"])
    placed = together.place_batch({**batch, "teacher": teacher})
    assert all(a is b for a, b in zip(jax.tree.leaves(placed["teacher"]), jax.tree.leaves(teacher), strict=True))
    many, _ = together(state, placed)
    close(one.params, many.params)


def test_compressed_leaves_are_cut_field_by_field():
    params = jax.jit(PERCEPTRON.init)(KEY, digits(2)["x"])["params"]
    params = compress.quantize(params, bits=4, where="**/Dense_0/kernel")
    params = compress.fake_quantize(params, where="**/Dense_1/kernel")
    tx, batch = optax.sgd(0.1, momentum=0.9), digits(13)
    state = train.init(PERCEPTRON, tx, KEY, batch, variables={"params": params})
    step = train.make_step(PERCEPTRON, loss, tx)
    together = parallel.shard(step, line(), parallel.fsdp(min_size=64))
    one, one_metrics = jax.jit(step)(state, batch)
    many, many_metrics = together(state, batch)
    close(one_metrics, many_metrics)
    close(one.params["Dense_0"]["bias"], many.params["Dense_0"]["bias"])
    codes = many.params["Dense_0"]["kernel"].codes.planes[0]
    latent, momentum = many.params["Dense_1"]["kernel"].w, many.opt_state[0].trace["Dense_1"]["kernel"].w
    for array in (codes, latent, momentum):
        assert held(array, 0) * 8 == array.nbytes
    assert (codes == one.params["Dense_0"]["kernel"].codes.planes[0]).all()


def specs(state, mesh, rules):
    found = parallel.shardings(state, mesh, rules)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    return {name: tuple(sharding.spec) for name, sharding in zip(names, jax.tree.leaves(found), strict=True)}


PAIR = {"a": {"kernel": jnp.ones((32, 16)), "bias": jnp.ones(16)}, "b": {"kernel": jnp.ones((16, 16)), "bias": jnp.ones(16)}}
BY_ROWS = {"**/kernel": P("data"), "**": P()}


FOLLOWING = {
    "MultiSteps": (
        optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), 2),
        ["acc_grads", "inner_opt_state/1/0/mu"],
    ),
    "masked": (
        optax.masked(optax.adam(0.1), {"a": True, "b": {"kernel": True, "bias": False}}),
        ["inner_state/0/mu", "inner_state/0/nu"],
    ),
    "partition": (
        optax.partition({"m": optax.sgd(0.1, momentum=0.9)}, lambda params: jax.tree.map(lambda _: "m", params)),
        ["inner_states/m/inner_state/0/trace"],
    ),
    "sparsify": (sparse(optax.adam(0.1)), ["masks", "inner_state/0/mu"]),
    "schedule_free": (optax.contrib.schedule_free_sgd(0.1), ["z"]),
}


@pytest.mark.parametrize(("tx", "wanted"), FOLLOWING.values(), ids=FOLLOWING)
def test_whatever_has_a_parameters_path_follows_it(tx, wanted):
    state = jax.eval_shape(lambda: {"params": PAIR, "opt_state": tx.init(PAIR), "step": 0})
    found = specs(state, line(), BY_ROWS)
    for path in wanted:
        assert found[f"opt_state/{path}/a/kernel"] == found[f"opt_state/{path}/b/kernel"] == ("data",), path
    assert all(spec == () for name, spec in found.items() if "kernel" not in name)


def test_factored_packed_and_stacked_fields():
    found = specs({"params": PAIR, "tx": optax.adafactor(0.1, min_dim_size_to_factor=8).init(PAIR)}, line(), BY_ROWS)
    # Of 32 rows and 16 columns it is plain which is which; of a square it is not.
    assert (found["tx/0/v_col/a/kernel"], found["tx/0/v_row/a/kernel"]) == (("data",), ())
    assert (found["tx/0/v_col/b/kernel"], found["tx/0/v_row/b/kernel"]) == ((), ())
    packed = prune.sparsify(optax.sgd(0.1), 0.5, packed=True, where="**/kernel").init(PAIR)
    found = specs({"params": PAIR, "tx": packed}, line(), BY_ROWS)
    assert found["tx/masks/a/kernel/bits"] == ("data",)
    found = specs({"params": PAIR, "tx": optax.lbfgs(memory_size=3).init(PAIR)}, line(), BY_ROWS)
    assert found["tx/0/diff_params_memory/a/kernel"] == (None, "data")
    # A part of it that does not divide stays whole.
    assert follow(P("data", "model"), (16, 8), (2, 8), {"data": 8, "model": 2}) == P(None, "model")


def test_any_tree():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        kernel: jax.Array
        bias: jax.Array

    params = ({"deep": Layer(jnp.ones((8, 3)), jnp.ones(3))}, [jnp.ones((8, 2))])
    adam = optax.adam(0.1)
    found = specs(
        {"params": params, "opt_state": adam.init(params)}, line(), [("0/deep/kernel", P("data")), ("1/*", P("data")), ("**", P())]
    )
    cut = {name for name, spec in found.items() if spec == ("data",)}
    ends = ("0/deep/kernel", "1/0")
    assert cut == {f"{of}/{end}" for of in ("params", "opt_state/0/mu", "opt_state/0/nu") for end in ends}
    assert specs(jnp.ones((8, 3)), line(), {"**": P("data")}) == {"": ("data",)}
    placed = parallel.place(params, line(), {"**/bias": P(), "**": P("data")})
    assert held(placed[0]["deep"].kernel, 2) == 12


def test_fsdp_chooses_the_longest_dimension_that_divides():
    rule = parallel.fsdp(min_size=16).on(line())
    cases = {
        (7, 16): (None, "data"),
        (24, 16): ("data",),
        (16, 16): (None, "data"),
        (9, 7): (),
        (8,): (),
        (3, 3, 8, 12): (None, None, "data"),
    }
    for shape, wanted in cases.items():
        assert tuple(rule("w", jnp.ones(shape))) == wanted, shape
    assert math.prod(grid().shape.values()) == 8
    assert tuple(parallel.fsdp(("data", "model"), 1).on(grid())("w", jnp.ones((4, 8)))) == (None, ("data", "model"))


def test_rows_go_over_the_axes_that_are_called_so():
    step = train.make_step(MODELS["functions"], loss, optax.sgd(0.1))
    assert parallel.shard(step, grid()).rows == ("data",)
    assert parallel.shard(step, Mesh(np.array(jax.devices()).reshape(2, 4), ("replica", "fsdp"))).rows == ("replica", "fsdp")
    assert parallel.shard(step, Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))).rows == ("x",)
    together = parallel.shard(step, grid(), rows=("data", "model"))
    assert {shard.data.shape[0] for shard in together.place_batch(BATCHES["whole"])["x"].addressable_shards} == {2}


def test_explicit_axes_are_taken_as_auto_and_refused_around():
    step = train.make_step(MODELS["functions"], loss, optax.sgd(0.1))
    state = train.init(MODELS["functions"], optax.sgd(0.1), KEY, batch_of(2))
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Explicit,))
    together = parallel.shard(step, mesh, {"**": P("data")})
    assert together.mesh.axis_types == (AxisType.Auto,)
    new, _ = together(jax.device_put(state, NamedSharding(mesh, P())), BATCHES["whole"])
    assert new.params.sharding.mesh == together.mesh
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"data is Explicit.*AxisType\.Auto"):
        together(state, BATCHES["whole"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"**/bias": P()}, r"no rule covers a/kernel of shape \(32, 16\); the rules are '\*\*/bias'"),
        (lambda path, leaf: None, r"no rule covers a/bias of shape \(16,\)"),
        ({"**": P("rows")}, r"a/bias of shape \(16,\): the mesh has no axis 'rows'; it has data=4, model=2"),
        ({"**": P(None, "model")}, r"a/bias of shape \(16,\) is for 2 dimensions, and it has 1"),
        ({"**/kernel": P("data", "data"), "**": P()}, r"a/kernel of shape \(32, 16\) names an axis twice"),
        (parallel.fsdp("rows"), r"fsdp\('rows'\): the mesh has no axis 'rows'"),
    ],
)
def test_rules_that_do_not_fit_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        parallel.shardings(PAIR, grid(), rules)


def test_a_dimension_that_does_not_divide_is_named():
    message = (
        r"w of shape \(6, 2\): its dimension 0 of length 6 does not divide among 4 devices along 'data' \(mesh data=4, model=2\)"
    )
    with pytest.raises(ValueError, match=message):
        parallel.shardings({"w": jnp.ones((6, 2))}, grid(), {"w": P("data")})


def test_what_is_no_rule_or_mesh_is_refused():
    step = train.make_step(MODELS["functions"], loss, optax.sgd(0.1))
    for rules in ([P("data")], {"**": "data"}, P("data")):
        with pytest.raises(TypeError, match="rule"):
            parallel.shard(step, line(), rules)
    with pytest.raises(TypeError, match=r"must give a jax\.sharding\.PartitionSpec"):
        parallel.shardings(PAIR, line(), lambda path, leaf: "data")
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh"):
        parallel.shard(step, jax.devices())
    with pytest.raises(ValueError, match=r"rows='row': the mesh has no axis 'row'"):
        parallel.shard(step, line(), rows="row")


def test_a_step_with_an_axis_is_refused():
    step = train.make_step(MODELS["functions"], loss, optax.sgd(0.1), axis_name="d")
    with pytest.raises(ValueError, match=r"synchronises over 'd'.*without axis_name=.*parallel\.pmap"):
        parallel.shard(step, line())
