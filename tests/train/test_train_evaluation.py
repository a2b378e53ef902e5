"""Weighted means over a data set, however it is cut."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxopt_lab import data, losses, nets, train

RNG = np.random.default_rng(1)
X, Y = RNG.standard_normal((11, 4), dtype=np.float32), RNG.integers(0, 3, 11)
W = RNG.standard_normal((4, 3), dtype=np.float32)
WEIGHT = np.linspace(0.5, 3, 11, dtype=np.float32)
VARIABLES = {"params": W}
traces = []


def predict(variables, x):
    traces.append(x.shape)
    return x @ variables["params"]


def cross_entropy(outputs, batch):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])


METRICS = {"accuracy": losses.per_example(losses.accuracy), "loss": cross_entropy}


def by_hand(weight):
    logits = X.astype(np.float64) @ W
    right = [float(np.argmax(z) == y) for z, y in zip(logits, Y, strict=True)]
    loss = [np.log(np.exp(z).sum()) - z[y] for z, y in zip(logits, Y, strict=True)]
    return {"accuracy": np.average(right, weights=weight), "loss": np.average(loss, weights=weight)}


def cut(size, weighted):
    for k in range(0, 11, size):
        batch = {"x": X[k : k + size], "y": Y[k : k + size]}
        yield {**batch, "weight": WEIGHT[k : k + size]} if weighted else batch


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [1, 4, 11, 100])
@pytest.mark.parametrize("batches", [False, True])
def test_means_are_those_by_hand(size, weighted, batches):
    arrays = {"x": X, "y": Y, **({"weight": WEIGHT} if weighted else {})}
    data = cut(size, weighted) if batches else arrays
    result = train.evaluate(predict, VARIABLES, data, metrics=METRICS, batch_size=size)
    expected = by_hand(WEIGHT if weighted else np.ones(11))
    assert result == pytest.approx(expected, rel=1e-5)


def test_one_compilation_for_a_ragged_end_and_for_the_next_time():
    traces.clear()
    for _ in range(2):
        train.evaluate(predict, VARIABLES, {"x": X[:10], "y": Y[:10]}, batch_size=3)
    assert len(traces) <= 1


def test_a_model_and_a_state():
    model = nets.from_functions(lambda key, x: jnp.asarray(W), lambda w, x: x @ w)
    state = train.State(jnp.asarray(W), {}, (), 0, None)
    expected = {"accuracy": pytest.approx(by_hand(np.ones(11))["accuracy"])}
    assert train.evaluate(model, state, {"x": X, "y": Y}) == expected
    assert train.evaluate(model, VARIABLES, {"x": X, "y": Y}) == expected


def test_a_row_of_no_weight_may_be_nan():
    arrays = {"x": np.where(np.arange(11)[:, None] == 2, np.nan, X), "y": Y, "weight": (np.arange(11) != 2).astype(np.float32)}
    assert np.isfinite(train.evaluate(predict, VARIABLES, arrays, metrics={"loss": cross_entropy})["loss"])


def test_logits_that_are_not_finite_are_wrong_by_default():
    arrays = {"x": X, "y": np.zeros(11, np.int32)}
    for broken in (np.nan, np.inf, -np.inf):
        assert train.evaluate(lambda w, x: x @ w * 0 + broken, W, arrays) == {"accuracy": 0.0}  # noqa: B023


def test_what_is_no_model_is_named():
    for module, way in ((nets.MLP(), "from_linen"), (nnx.Linear(4, 3, rngs=nnx.Rngs(0)), "from_nnx"), ("mlp", "from_functions")):
        with pytest.raises(TypeError, match=rf"this {type(module).__name__} becomes one by nets\.{way}\(") as error:
            train.evaluate(module, VARIABLES, {"x": X, "y": Y})
        assert "\n" not in str(error.value)


def test_a_stream_without_an_end_is_refused():
    with pytest.raises(TypeError, match="no end"):
        train.evaluate(predict, VARIABLES, data.batches({"x": X, "y": Y}, 4, seed=0))


def test_bad_data_is_named():
    with pytest.raises(ValueError, match='"x"; this one has y'):
        train.evaluate(predict, VARIABLES, {"y": Y})
    with pytest.raises(ValueError, match="no rows"):
        train.evaluate(predict, VARIABLES, {"x": X[:0], "y": Y[:0]})
    with pytest.raises(ValueError, match=r"metric mean must return one value per example, \(11,\); it returned \(\)"):
        train.evaluate(predict, VARIABLES, {"x": X, "y": Y}, metrics={"mean": lambda outputs, batch: outputs.mean()})
