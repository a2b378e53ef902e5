"""Every distillation loss is one row, against a scalar reimplementation in float64, with what must hold for all."""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.core import tree
from jaxopt_lab.losses import cross_entropy, distill

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (jax.device_put(np.asarray(3 * RNG.normal(size=(3, 2, 5)), np.float32)) for _ in range(2))


def _softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def _kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def _full(s, t, tau):
    return tau**2 * _kl(_softmax(t / tau), _softmax(s / tau))


def _top_2(s, t, tau):
    p, q = _softmax(t / tau), _softmax(s / tau)
    top = np.argsort(-p)[:2]
    return tau**2 * _kl([*p[top], 1 - p[top].sum()], [*q[top], 1 - q[top].sum()])


def _bernoulli(s, t, tau):
    p, q = 1 / (1 + np.exp(-t / tau)), 1 / (1 + np.exp(-s / tau))
    return tau**2 * _kl([p, 1 - p], [q, 1 - q])


class Row(NamedTuple):
    loss: object
    expected: object
    item: int  # trailing axes of one example


ROWS = {
    "soft_targets": Row(distill.soft_targets, _full, 1),
    "binary": Row(distill.soft_targets_binary, _bernoulli, 0),
    "top 2": Row(lambda s, t, tau: distill.soft_targets_top_k(s, distill.top_k_targets(t, 2, tau), tau), _top_2, 1),
    "top 5": Row(lambda s, t, tau: distill.soft_targets_top_k(s, distill.top_k_targets(t, 5, tau), tau), _full, 1),
}


@pytest.fixture(scope="module", params=ROWS)
def row(request):
    return ROWS[request.param]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_values_are_those_of_the_scalar_formula(row, temperature):
    with jax.numpy_dtype_promotion("strict"):
        values = jax.jit(row.loss)(STUDENT, TEACHER, temperature)
    shape = STUDENT.shape[: 3 - row.item]
    assert values.shape == shape
    s, t = np.asarray(STUDENT, np.float64), np.asarray(TEACHER, np.float64)
    expected = [row.expected(s[i], t[i], temperature) for i in np.ndindex(shape)]
    np.testing.assert_allclose(values.ravel(), expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(row.loss(STUDENT, TEACHER, temperature).ravel(), expected, rtol=2e-5, atol=1e-5)
    assert (values > 0).all()


def test_distilling_from_oneself_costs_nothing_and_teaches_nothing(row):
    value, gradient = jax.jit(jax.value_and_grad(lambda s: row.loss(s, STUDENT, 3.0).sum()))(STUDENT)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0.0, atol=2e-6)


def test_no_gradient_flows_to_the_teacher(row):
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda t: row.loss(STUDENT, t, 3.0).sum()))(TEACHER), 0.0)


def test_the_gradient_is_the_difference_of_probabilities_times_the_temperature():
    gradient = jax.jit(jax.grad(lambda s: distill.soft_targets(s, TEACHER, 3.0).sum()))(STUDENT)
    expected = 3.0 * (jax.nn.softmax(STUDENT / 3) - jax.nn.softmax(TEACHER / 3))
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_a_hot_temperature_matches_logits():
    """As the temperature grows the loss becomes half the mean squared difference of centred logits (Hinton et al., section 2.1)."""
    s, t = (z - z.mean(-1, keepdims=True) for z in (STUDENT, TEACHER))
    np.testing.assert_allclose(distill.soft_targets(STUDENT, TEACHER, 300.0), ((s - t) ** 2).mean(-1) / 2, rtol=0.03)


def test_a_sure_teacher_at_temperature_one_is_a_label():
    sure = 1e4 * jax.nn.one_hot(jnp.argmax(TEACHER, -1), 5)
    np.testing.assert_allclose(
        distill.soft_targets(STUDENT, sure, 1.0), cross_entropy(STUDENT, jnp.argmax(TEACHER, -1)), rtol=1e-5, atol=1e-6
    )


def test_one_logit_is_a_softmax_over_it_and_zero():
    s, t = (jnp.stack([jnp.zeros_like(z[..., 0]), z[..., 0]], -1) for z in (STUDENT, TEACHER))
    np.testing.assert_allclose(
        distill.soft_targets_binary(STUDENT[..., 0], TEACHER[..., 0], 2.0), distill.soft_targets(s, t, 2.0), rtol=1e-5, atol=1e-6
    )


def test_what_is_kept_bounds_the_loss_from_below_and_grows_with_k():
    @jax.jit
    def every(student, teacher):
        kept = [distill.top_k_targets(teacher, k, 2.0) for k in range(1, 6)]
        return [distill.soft_targets_top_k(student, each, 2.0) for each in kept]

    losses = every(STUDENT, TEACHER)
    assert all((later >= earlier - 1e-5).all() for earlier, later in pairwise(losses))
    np.testing.assert_allclose(losses[-1], distill.soft_targets(STUDENT, TEACHER, 2.0), rtol=1e-5, atol=1e-5)


def test_top_k_by_hand_and_its_size():
    kept = jax.jit(lambda z: distill.top_k_targets(z, 2, 1.0))(jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]])))
    np.testing.assert_allclose(jnp.exp(kept.log_probabilities), [[0.5, 0.25]], rtol=1e-6)
    np.testing.assert_array_equal(kept.indices, [[1, 3]])
    np.testing.assert_allclose(jnp.exp(kept.log_rest), [0.25], rtol=1e-6)
    assert tree.nbytes(jax.eval_shape(lambda z: distill.top_k_targets(z, 10), jnp.zeros((7, 1000)))) == 7 * (8 * 10 + 4)


def test_the_rest_is_exact_where_the_top_holds_nearly_everything():
    kept = distill.top_k_targets(jnp.array([30.0, 0.0, 0.0]), 1, 1.0)
    np.testing.assert_allclose(kept.log_rest, np.log(2) - 30.0, rtol=1e-6)


def test_sixteen_bit_logits_are_computed_in_float32(row):
    student, teacher = STUDENT.astype(jnp.bfloat16), TEACHER
    with jax.numpy_dtype_promotion("strict"):
        value, gradient = jax.jit(jax.value_and_grad(lambda s: row.loss(s, teacher, 2.0).sum()))(student)
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(value, jax.jit(row.loss)(student.astype(jnp.float32), teacher, 2.0).sum(), rtol=1e-6)


def test_temperatures_may_be_traced_batched_or_one_per_example(row):
    taus = jnp.array([1.0, 2.0, 4.0])
    traced = jax.jit(jax.vmap(row.loss, in_axes=(None, None, 0)))(STUDENT, TEACHER, taus)
    loss = jax.jit(row.loss)
    for k, tau in enumerate((1.0, 2.0, 4.0)):
        np.testing.assert_allclose(traced[k], loss(STUDENT, TEACHER, tau), rtol=1e-5, atol=1e-6)
    slope = jax.jit(jax.grad(lambda tau: row.loss(STUDENT, TEACHER, tau).sum()))(2.0)
    assert jnp.isfinite(slope)


def test_one_temperature_per_example():
    taus = jnp.array([1.0, 2.0, 4.0])
    loss, (student, teacher) = jax.jit(distill.soft_targets), (np.asarray(z[:, 0]) for z in (STUDENT, TEACHER))
    values = loss(student, teacher, taus)
    for k, tau in enumerate((1.0, 2.0, 4.0)):
        np.testing.assert_allclose(values[k], loss(student[k], teacher[k], tau), rtol=1e-5)


def test_classes_that_are_impossible_for_both_are_harmless():
    student, teacher = (z[0, :1].at[:, 2].set(-jnp.inf) for z in (STUDENT, TEACHER))
    value, gradient = jax.jit(jax.value_and_grad(lambda s: distill.soft_targets(s, teacher, 2.0).sum()))(student)
    keep = jnp.array([0, 1, 3, 4])
    np.testing.assert_allclose(value, distill.soft_targets(student[:, keep], teacher[:, keep], 2.0).sum(), rtol=1e-5)
    assert jnp.isfinite(gradient).all()
    assert gradient[0, 2] == 0.0


BAD = {
    "shapes": (
        lambda: distill.soft_targets(jnp.zeros((3, 2)), jnp.zeros((3, 1))),
        "student_logits has shape (3, 2) and teacher_logits (3, 1); they must be equal",
    ),
    "binary": (
        lambda: distill.soft_targets_binary(jnp.zeros(3), jnp.zeros((3, 1))),
        "student_logits has shape (3,) and teacher_logits (3, 1); they must be equal",
    ),
    "temperature": (lambda: distill.soft_targets(jnp.zeros(3), jnp.zeros(3), 0.0), "temperature must be positive; got 0.0"),
    "k": (
        lambda: distill.top_k_targets(jnp.zeros((4, 3)), 5),
        "k must lie between 1 and the number of classes; got k=5 for logits of shape (4, 3)",
    ),
    "top k": (
        lambda: distill.soft_targets_top_k(jnp.zeros((4, 3)), distill.top_k_targets(jnp.zeros((5, 3)), 2)),
        "student_logits has shape (4, 3) and the top k (5, 2); all axes but the last must be equal",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_line(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=r".") as error:
        call()
    assert str(error.value) == message


def test_a_temperature_for_each_example_of_a_sequence():
    student, teacher = (jax.random.normal(jax.random.key(i), (3, 3, 4)) for i in range(2))
    temperatures = jnp.array([1.0, 2.0, 4.0])
    expected = jnp.stack([distill.soft_targets(student[i], teacher[i], t) for i, t in enumerate(temperatures)])
    np.testing.assert_allclose(distill.soft_targets(student, teacher, temperatures), expected, rtol=1e-5)
