"""What units matter by, how many go of each group, and budgets."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import nets, surgery, tracing
from jaxopt_lab.core import tree
from jaxopt_lab.surgery import Group, Member, coupled_channels, mask, slim


def _normal(*shape, seed=0):
    # NumPy compiles no program for each shape.
    return jax.device_put(np.random.default_rng((seed, *shape)).normal(size=shape))


PARAMS = {"a": _normal(3, 6), "b": _normal(6, 8, seed=1), "c": _normal(8, 2, seed=2)}
X, Y = _normal(16, 3, seed=3), _normal(16, 2, seed=4)


def _apply(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]


def _loss(params, x, y):
    return jnp.sum((_apply(params, x) - y) ** 2)


def _gates(group):
    """The loss of each example as a function of a gate on every unit of a group."""

    def loss(gates, x, y):
        params = dict(PARAMS)
        for path, axis, indices in group.members:
            scale = jnp.ones(params[path].shape[axis]).at[indices[:, 0]].set(gates)
            params[path] = params[path] * (scale[None] if axis else scale[:, None])
        return _loss(params, x[None], y[None])

    return loss


def test_scores_are_derivatives_by_gates():
    """Taylor and Fisher scores against the derivatives by a gate on the member that they are of."""
    grads = jax.grad(_loss)(PARAMS, X, Y)
    each = jax.jit(jax.vmap(jax.grad(_loss), (None, 0, 0)))(PARAMS, X[:, None], Y[:, None])
    for group in coupled_channels(_apply, PARAMS, X).groups:
        for member in group.members:
            alone = Group((member,))
            by_gate = jax.jit(jax.vmap(jax.grad(_gates(alone)), (None, 0, 0)))(jnp.ones(group.units), X, Y)
            first, second = jnp.abs(by_gate.sum(0)), jnp.mean(by_gate**2, axis=0)
            np.testing.assert_allclose(surgery.taylor(grads)(alone, PARAMS), first / first.mean(), rtol=1e-4)
            np.testing.assert_allclose(surgery.fisher(each)(alone, PARAMS), second / second.mean(), rtol=1e-4)
    with pytest.raises(ValueError, match=r"the gradients of a have shape \(3, 6\), and must be \[examples"):
        surgery.fisher(grads)(group._replace(members=(Member("a", 1, np.arange(6)[:, None]),)), PARAMS)


class _Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = x.reshape(*x.shape[:-1], 2, 2)
        x = nn.DenseGeneral((2, 3), axis=(-2, -1))(x).reshape(*x.shape[:-2], 6)
        return nn.Dense(3)(nn.RNN(nn.SimpleCell(5))(x.reshape(x.shape[0], -1, 6)))


def test_inputs_are_those_that_weights_meet():
    """Every product again, one weight at a time: the derivative of the outputs' sum with respect to it is its input's."""
    x = _normal(2, 6, 6, 2)
    params = _Stack().init(jax.random.key(0), x)
    met = surgery.mean_inputs(_Stack().apply, params, [x, 2 * x])
    assert {path: leaf.shape for path, leaf in met.items()} == {
        path: leaf.shape for path, leaf in tree.selected(params, "**/kernel").items()
    }
    # By hand: the input of the convolution, in patches, and that of the last layer.
    numbers = ("NHWC", "HWIO", "NHWC")
    sums, times = (
        jax.lax.conv_general_dilated_patches(own, (3, 3), (2, 2), "SAME", dimension_numbers=numbers).sum((0, 1, 2))
        for own in (jnp.abs(x), jnp.ones_like(x))
    )
    by_hand = 1.5 * (sums / times).reshape(2, 3, 3).transpose(1, 2, 0)
    np.testing.assert_allclose(met["params/Conv_0/kernel"], jnp.broadcast_to(by_hand[..., None], (3, 3, 2, 4)), rtol=1e-5)
    _, seen = _Stack().apply(params, x, capture_intermediates=True)
    _, twice = _Stack().apply(params, 2 * x, capture_intermediates=True)
    hidden = [jnp.abs(own["intermediates"]["RNN_0"]["__call__"][0]).mean((0, 1)) for own in (seen, twice)]
    np.testing.assert_allclose(met["params/Dense_0/kernel"], jnp.broadcast_to(sum(hidden)[:, None] / 2, (5, 3)), rtol=1e-5)


def test_a_stacked_parameter_meets_the_inputs_of_its_own_step():
    params = {"w": _normal(3, 4, 4), "b": _normal(4, 2)}
    apply = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, p["w"])[0] @ p["b"]  # noqa: E731
    x, met = _normal(5, 4), surgery.mean_inputs(apply, params, [_normal(5, 4)])
    for k in range(3):
        np.testing.assert_allclose(met["w"][k], jnp.broadcast_to(jnp.abs(x).mean(0), (4, 4)), rtol=1e-5)
        x = jnp.tanh(x @ params["w"][k].T)
    np.testing.assert_allclose(met["b"][:, 0], jnp.abs(x).mean(0), rtol=1e-5)


def test_a_unit_that_is_silent_on_data_goes_first():
    params = {**PARAMS, "a": PARAMS["a"].at[:, 2].set(0.01)}
    met = surgery.mean_inputs(_apply, params, [X])
    params["b"] = params["b"].at[2].mul(5.0)
    _, _, plan = slim(_apply, params, X, keep={"a[1]": 5}, criterion=surgery.activation(met))
    assert plan.kept["a"][1].tolist() == [0, 1, 3, 4, 5]


def test_scales_of_a_normalisation():
    model = nets.from_linen(nets.ResNet(depth=6, widths=(4, 6), classes=3))
    x = _normal(2, 8, 8, 3)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    scales = variables["params"]["BatchNorm_1"]["scale"].at[jnp.array([0, 3])].set(1e-3)
    variables["params"]["BatchNorm_1"]["scale"] = -scales
    _, _, plan = slim(model, variables, x, ratio=0.2, criterion=surgery.scales(), ranking=surgery.global_(normalize=False))
    assert plan.kept["params/BatchNorm_1/scale"][0].tolist() == [1, 2]
    assert mask(variables, plan)["params"]["BatchNorm_1"]["scale"][0] == 0
    with pytest.raises(ValueError, match=r"the group of a\[1\] holds no scale: exclude a"):
        slim(_apply, {**PARAMS, "scale": jnp.ones(2)}, X, ratio=0.5, criterion=surgery.scales("**/scale"))
    _, small, _ = slim(
        _apply, {**PARAMS, "scale": jnp.ones(2)}, X, ratio=0.5, criterion=surgery.scales("**/scale", others=surgery.magnitude())
    )
    assert small["a"].shape == (3, 3)


def test_groups_that_are_built_alike_are_ranked_together():
    """Two feed-forward layers and a head each: what is cut of the ones does not depend on the others."""
    model = nets.from_linen(nets.VisionTransformer(4, 8, 2, 2, 8, classes=3))
    x = _normal(2, 8, 8, 3)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    hidden = variables["params"]["block_1"]["hidden"]
    hidden["kernel"] = 0.01 * hidden["kernel"]
    variables["params"]["block_1"]["mlp_out"]["kernel"] *= 0.01
    _, _, plan = slim(model, variables, x, ratio=0.5, ranking=surgery.isomorphic(normalize=False), criterion=_plain)
    left = [len(plan.kept[f"params/block_{k}/hidden/kernel"][1]) for k in range(2)]
    assert left == [8, 1]


def _plain(group, weights):
    """The size of the weights, as it is."""
    return sum(
        jnp.sum(jnp.moveaxis(weights[m.path], m.axis, 0)[m.indices].reshape(group.units, -1) ** 2, axis=1) for m in group.members
    )


def test_budgets_are_kept_to():
    whole = tracing.count(_apply, PARAMS, X).macs
    small_apply, small, _ = slim(_apply, PARAMS, X, budget=[surgery.macs(part=0.5), surgery.parameters(40)])
    assert tracing.count(small_apply, small, X).macs <= 0.5 * whole
    assert tree.size(small) <= 40
    # The measured time of anything is below a second, and above a nanosecond.
    assert slim(_apply, PARAMS, X, budget=surgery.milliseconds(1e3, repeats=1))[2].kept == {}
    with pytest.raises(ValueError, match=r"the smallest slimming still takes .* milliseconds, and 1e-06 are the most"):
        slim(_apply, PARAMS, X, budget=surgery.milliseconds(1e-6, repeats=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (surgery.macs, "macs: give the most, or a part of the whole: exactly one of the two"),
        (lambda: surgery.parameters(3, part=0.5), "parameters: give the most"),
        (lambda: surgery.macs(0), "macs: the most must be above 0; got 0"),
        (lambda: surgery.macs(float("nan")), "macs: the most must be above 0; got nan"),
        (lambda: surgery.milliseconds(part=1.5), r"milliseconds: a part must lie in \(0, 1\]; got 1.5"),
        (lambda: surgery.milliseconds(1, repeats=0), "repeats=0 must be at least 1"),
    ],
)
def test_budgets_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_budgets_of_a_module_that_holds_functions():
    net = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    apply = lambda net, x: jax.vmap(net)(x)  # noqa: E731
    budgets = [surgery.macs(part=0.5), surgery.parameters(part=0.6), surgery.milliseconds(1e3, repeats=1)]
    small_apply, small, _ = slim(apply, net, X, budget=budgets)
    assert tracing.count(small_apply, small, X).macs == 0.5 * tracing.count(apply, net, X).macs
    with pytest.raises(ValueError, match="milliseconds runs the model: give params and the example as arrays"):
        slim(apply, net, jax.ShapeDtypeStruct((1, 3), jnp.float32), budget=surgery.milliseconds(1.0))
    with pytest.raises(ValueError, match="slim looks at weights to choose among them: give arrays"):
        slim(_apply, jax.eval_shape(lambda: PARAMS), X, ratio=0.5)
