"""Cross-validation: against plain loops over folds, nested, folds of unequal size, what is compiled, bad input."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.model_selection import TimeSeriesSplit

from jaxopt_lab import data, losses, nets, train
from jaxopt_lab.search.engines import looped, scanned, vmapped
from jaxopt_lab.search.selection.cross_validation import (
    CrossValidation,
    cross_validate,
    nested_cross_validate,
    one_standard_error,
)
from jaxopt_lab.search.selection.folds import Fold, check_folds, grouped, kfold, stratified
from jaxopt_lab.search.selection.learning_curve import learning_curve
from jaxopt_lab.search.selection.supervised import supervised
from jaxopt_lab.search.trial import Trial

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
N = 23
X = RNG.normal(size=(N, 3)).astype(np.float32)
DATA = {"x": X, "y": (X @ np.array([1.0, -2.0, 0.5]) + 0.3 * RNG.normal(size=N)).astype(np.float32)}
CONFIGS = [{"rate": 0.05, "decay": 0.0}, {"rate": 0.02, "decay": 0.1}]
FOLDS = kfold(N, 4, jax.random.key(5))


def mean_error(params, rows):
    return jnp.sum(rows["weight"] * (rows["x"] @ params - rows["y"]) ** 2) / jnp.sum(rows["weight"])


def chain(config):
    return optax.adamw(config["rate"], weight_decay=config["decay"])


def init(key, config):
    params = jax.random.normal(key, (3,))
    return {"params": params, "opt": chain(config).init(params)}


def step(state, batch, config):
    value, grads = jax.value_and_grad(mean_error)(state["params"], batch)
    updates, opt = chain(config).update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, {"loss": value}


def evaluate(state, rows):
    return mean_error(state["params"], rows)


TRIAL = Trial(init, step, evaluate)


def plain(config, fold, number, key, steps, batch_size):
    """One configuration on one fold by a loop that knows nothing of padding."""
    start, order = jax.random.split(jax.random.fold_in(key, number))
    own = {name: array[fold.train] for name, array in DATA.items()}
    size = None if batch_size is None or batch_size > len(fold.train) else batch_size
    stream = data.batches(own, size, seed=int(jax.random.bits(order, (), "uint32")))
    state = init(start, config)
    for t in range(steps):
        batch = stream(t)
        state = take(state, {**batch, "weight": np.ones(len(batch["y"]), np.float32)}, config["rate"], config["decay"])
    rows = {name: array[fold.test] for name, array in DATA.items()}
    return float(np.mean((rows["x"] @ np.asarray(state["params"]) - rows["y"]) ** 2))


@jax.jit
def take(state, batch, rate, decay):
    return step(state, batch, {"rate": rate, "decay": decay})[0]


@functools.cache
def looped_over(batch_size):
    return np.array([[plain(c, fold, f, KEY, 9, batch_size) for f, fold in enumerate(FOLDS)] for c in CONFIGS])


@pytest.mark.parametrize(
    ("engine", "batch_size"),
    [
        (None, 5),
        (vmapped(3), 5),
        (looped(), 5),
        (scanned(), None),
        (vmapped(2), 18),
        pytest.param(vmapped(), None, marks=pytest.mark.slow),
        pytest.param(scanned(), 18, marks=pytest.mark.slow),
    ],
)
def test_it_is_a_plain_loop_over_folds(engine, batch_size):
    # Folds train on 17 and on 18 rows: a whole fold, and a batch of 18, are filled up where there are 17.
    found = cross_validate(TRIAL, DATA, CONFIGS, folds=FOLDS, key=KEY, steps=9, batch_size=batch_size, engine=engine)
    expected = looped_over(batch_size)
    np.testing.assert_allclose(found.scores, expected, rtol=2e-4)
    np.testing.assert_allclose(found.mean, expected.mean(axis=1), rtol=2e-4)
    np.testing.assert_allclose(found.standard_error, expected.std(axis=1, ddof=1) / 2, rtol=2e-3)
    assert found.best == int(expected.mean(axis=1).argmin())
    assert (found.corrected_error > found.standard_error).all()


@pytest.mark.parametrize("engine", [vmapped(4), looped()])
def test_a_long_run_is_fed_in_blocks(engine, monkeypatch):
    crew = importlib.import_module("jaxopt_lab.search.population")
    monkeypatch.setattr(crew, "_BLOCK_BYTES", 4 * 5 * 4 * 4)  # Four steps of five rows in four folds: 9 = 4 + 4 + 1.
    found = cross_validate(TRIAL, DATA, CONFIGS, folds=FOLDS, key=KEY, steps=9, batch_size=5, engine=engine)
    np.testing.assert_allclose(found.scores, looped_over(5), rtol=2e-4)


def test_folds_and_repeated_calls_share_their_programs():
    """Folds train on 17 and on 18 rows, with the whole fold a batch: once to find the shapes, and once to compile."""
    traces = []

    def watched(name, part):
        return lambda *args: traces.append(name) or part(*args)

    parts = [watched("init", init), watched("step", step), lambda state, rows: traces.append("evaluate") or evaluate(state, rows)]
    options = {"steps": 3, "batch_size": None, "engine": vmapped(4)}
    cross_validate(Trial(*parts), DATA, CONFIGS, folds=FOLDS, key=KEY, **options)
    assert sorted(traces) == ["evaluate"] * 2 + ["init"] * 2 + ["step"] * 2
    changed = [{"rate": 0.5, "decay": 1.0}, {"rate": 0.1, "decay": 0.3}]
    other = {**DATA, "y": -DATA["y"]}
    # Equal to the one above: the functions are what counts.
    found = cross_validate(Trial(*parts), other, changed, folds=FOLDS, key=jax.random.key(9), **options)
    assert len(traces) == 6
    afresh = cross_validate(TRIAL, other, changed, folds=FOLDS, key=jax.random.key(9), **options)
    np.testing.assert_array_equal(found.scores, afresh.scores)


def test_a_width_makes_a_program_of_its_own():
    def wide(key, config):
        return jnp.full(config["width"], config["rate"])

    trial = Trial(wide, lambda state, batch, config: (state + 1, {}), lambda state, rows, config: state.sum() + config["rate"])
    configs = [{"width": 2, "rate": 0.5}, {"width": 3, "rate": 0.25}, {"width": 2, "rate": 1.0}]
    found = cross_validate(trial, DATA, configs, folds=kfold(N, 2), key=KEY, steps=2, batch_size=4, keep=True)
    assert found.scores.tolist() == [[5.5, 5.5], [7.0, 7.0], [7.0, 7.0]]
    assert [len(states[1]) for states in found.states] == [2, 3, 2]


def test_rows_that_only_fill_up_weigh_nothing_and_the_datas_own_weights_count():
    weight = RNG.uniform(1, 2, N).astype(np.float32)
    trial = Trial(
        lambda key, config: jnp.zeros(()),
        lambda state, batch, config: (state + jnp.sum(batch["weight"]), {}),
        lambda state, rows: state + 1000 * jnp.sum(rows["weight"]),
    )
    folds = [Fold(np.arange(20), np.array([20])), Fold(np.arange(7), np.arange(7, 16))]
    found = cross_validate(trial, {**DATA, "weight": weight}, folds=folds, key=KEY, steps=2, batch_size=None)
    expected = [2 * weight[fold.train].sum() + 1000 * weight[fold.test].sum() for fold in folds]
    np.testing.assert_allclose(found.scores[0], expected, rtol=1e-5)


def test_a_configuration_that_diverges_is_reported_and_not_chosen():
    configs = [{"rate": 1e30, "decay": 1e30}, CONFIGS[0]]
    found = cross_validate(TRIAL, DATA, configs, folds=FOLDS, key=KEY, steps=4, batch_size=5)
    assert found.diverged.tolist() == [[True] * 4, [False] * 4]
    assert not np.isfinite(found.mean[0])
    assert found.best == 1 == one_standard_error(found, [0, 1])
    alone = cross_validate(TRIAL, DATA, configs[:1], folds=FOLDS, key=KEY, steps=4, batch_size=5)
    assert alone.best is None
    assert one_standard_error(alone, [0]) is None


@pytest.mark.parametrize("engine", [scanned(), pytest.param(vmapped(), marks=pytest.mark.slow)])
def test_a_model_by_its_own_step_and_evaluation(engine):
    digits = data.digits().train
    some = {"x": digits["x"][:200].reshape(200, 64), "y": digits["y"][:200]}
    model = nets.from_linen(nets.MLP(features=(32,)))
    loss, accuracy = losses.per_example(losses.cross_entropy), losses.per_example(losses.accuracy)
    trial = supervised(model, loss, lambda config: optax.adam(config["rate"]), some["x"][:1], metric=accuracy)
    folds = stratified(some["y"], 3, jax.random.key(1))
    configs = [{"rate": 3e-2}, {"rate": 1e-5}]
    found = cross_validate(
        trial, some, configs, folds=folds, key=KEY, steps=30, batch_size=32, maximize=True, engine=engine, keep=True
    )
    assert found.best == 0
    assert found.mean[0] > 0.6 > found.mean[1]
    start, order = jax.random.split(jax.random.fold_in(KEY, 2))
    stream = data.batches(
        {name: array[folds[2].train] for name, array in some.items()}, 32, seed=int(jax.random.bits(order, (), "uint32"))
    )
    tx = optax.adam(3e-2)
    take = jax.jit(train.make_step(model, loss, tx))
    state = train.init(model, tx, start, some["x"][:1])
    for t in range(30):
        state, _ = take(state, stream(t))
    held = {name: array[folds[2].test] for name, array in some.items()}
    assert abs(train.evaluate(model, state, held)["accuracy"] - found.scores[0, 2]) < 0.02
    for mine, its in zip(jax.tree.leaves(found.states[0][2].params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(mine, its, atol=2e-3)


def test_a_model_takes_an_optimiser_as_it_is_and_says_what_a_metric_must_return():
    model = nets.from_linen(nets.MLP(features=(), classes=2))
    trial = supervised(model, lambda outputs, batch: outputs, optax.sgd(0.1), np.ones((1, 4)))
    rows = {"x": np.ones((3, 4)), "weight": np.ones(3)}
    with pytest.raises(ValueError, match=r"one value per row, \(3,\); it returned \(3, 2\)"):
        trial.evaluate(trial.init(KEY, {}), rows)
    with pytest.raises(TypeError):
        supervised(nets.MLP(), lambda outputs, batch: outputs, optax.sgd(0.1), np.ones((1, 4)))


def by_hand(scores, maximize=False):
    scores = np.array(scores, float)
    sign = -1 if maximize else 1
    mean = scores.mean(axis=1)
    order = [i for i in np.argsort(sign * mean, kind="stable") if np.isfinite(mean[i])]
    error = scores.std(axis=1, ddof=1) / np.sqrt(scores.shape[1])
    return CrossValidation(scores, mean, error, error, ~np.isfinite(scores), order[0], scores, (), (), maximize)


def test_one_standard_error_by_hand():
    scores = [[5.0, 5.0, 5.0], [2.1, 2.2, 2.3], [1.0, 2.0, 3.0], [2.5, 2.6, 2.7]]
    # The best is 2.0 with an error of 1 / sqrt 3 = 0.577: 2.2 is within it, 2.6 is not.
    found = by_hand(scores)
    assert found.best == 2
    assert one_standard_error(found, [1, 2, 3, 0]) == 1
    assert one_standard_error(found, [1, 2, 2, 0]) == 2  # Of equally simple ones the better.
    assert one_standard_error(by_hand(-np.array(scores), maximize=True), [1, 2, 3, 0]) == 1
    assert one_standard_error(by_hand([[np.nan, 1, 1], [1.0, 2.0, 3.0]]), [0, 1]) == 1
    for complexity in ([1, 2], [1, 2, 3, np.nan]):
        with pytest.raises(ValueError, match="one finite number for each of 4 configurations"):
            one_standard_error(found, complexity)
    with pytest.raises(ValueError, match="single fold"):
        one_standard_error(found._replace(scores=found.scores[:, :1]), [1, 2, 3, 4])


def test_nested_folds_choose_without_what_scores_them():
    keys = jax.random.split(KEY, 3)
    found = nested_cross_validate(
        TRIAL, DATA, CONFIGS, folds=FOLDS, inner=lambda rows, key: kfold(len(rows), 3, key), key=KEY, steps=9, batch_size=5
    )
    number, expected = 0, []
    for f, fold in enumerate(FOLDS):
        inner = kfold(len(fold.train), 3, jax.random.fold_in(keys[2], f))
        scores = np.array(
            [
                [plain(c, Fold(fold.train[g.train], fold.train[g.test]), number + k, keys[0], 9, 5) for k, g in enumerate(inner)]
                for c in CONFIGS
            ]
        )
        np.testing.assert_allclose(found.inner[f].scores, scores, rtol=1e-3)
        number += len(inner)
        chosen = int(scores.mean(axis=1).argmin())
        assert found.chosen[f] == chosen
        expected.append(plain(CONFIGS[chosen], fold, f, keys[1], 9, 5))
        assert not np.intersect1d(np.concatenate([np.concatenate(g) for g in found.inner[f].folds]), fold.test).size
    np.testing.assert_allclose(found.scores, expected, rtol=1e-3)
    np.testing.assert_allclose([found.mean, found.standard_error], [np.mean(expected), np.std(expected, ddof=1) / 2], rtol=1e-3)


def test_the_best_of_many_guesses_looks_good_until_it_is_nested():
    """40 rules that know nothing: the best of them is 'better than chance' on the folds that chose it."""
    rows = 60
    coins = {"x": RNG.integers(0, 2, (rows, 40)), "y": RNG.integers(0, 2, rows)}
    trial = Trial(
        lambda key, config: jnp.zeros(()),
        lambda state, batch, config: (state, {}),
        lambda state, held, config: (
            jnp.sum(held["weight"] * (jnp.take(held["x"], config["rule"], axis=1) != held["y"])) / jnp.sum(held["weight"])
        ),
    )
    configs = [{"rule": rule} for rule in range(40)]
    options = {"key": KEY, "steps": 0, "batch_size": 1}
    flat = cross_validate(trial, coins, configs, folds=kfold(rows, 5), **options)
    rates = (coins["x"] != coins["y"][:, None]).mean(axis=0)
    np.testing.assert_allclose(flat.mean, rates, atol=1e-6)
    nested = nested_cross_validate(
        trial, coins, configs, folds=kfold(rows, 5), inner=lambda held, key: kfold(len(held), 4), choose=lambda f: f.best, **options
    )
    assert flat.mean[flat.best] < 0.4
    assert nested.mean > flat.mean[flat.best] + 0.03
    none = nested_cross_validate(
        trial,
        coins,
        configs[:2],
        folds=kfold(rows, 2),
        inner=lambda held, key: kfold(len(held), 2),
        choose=lambda f: None,
        **options,
    )
    assert none.chosen == (None, None)
    assert np.isnan(none.scores).all()
    with pytest.raises(ValueError, match="choose returned 7"):
        nested_cross_validate(
            trial, coins, configs[:2], folds=kfold(rows, 2), inner=lambda h, k: kfold(len(h), 2), choose=lambda f: 7, **options
        )


def test_splits_keep_what_they_promise():
    labels = np.repeat([0, 1, 2], [30, 12, 6])
    for folds in (kfold(48, 5, KEY), stratified(labels, 5, KEY), kfold(48, 48)):
        assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(48))
        assert all(sorted(np.concatenate(fold).tolist()) == list(range(48)) for fold in folds)
    for fold in stratified(labels, 6, KEY):
        assert np.bincount(labels[fold.test]).tolist() == [5, 2, 1]
    groups = np.arange(48) % 7
    for labelled in (None, labels):
        for fold in grouped(groups, 3, KEY, labels=labelled):
            assert not set(groups[fold.train]) & set(groups[fold.test])
    repeated = kfold(48, 4, KEY, repeats=3)
    assert len(repeated) == 12
    assert repeated[0].test.tolist() != repeated[4].test.tolist()
    same = kfold(48, 4, KEY, repeats=3)
    assert all((one.test == other.test).all() for one, other in zip(repeated, same, strict=True))
    assert len(check_folds(TimeSeriesSplit(5).split(X), N)) == 5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: kfold(4, 5), ValueError, "got 5 folds and 4 rows"),
        (lambda: kfold(4, 1), ValueError, "got 1 folds and 4 rows"),
        (lambda: kfold(4, 2, repeats=2), ValueError, "2 repeats without a key"),
        (lambda: kfold(4, 2, KEY, repeats=0), ValueError, "repeats must be at least 1"),
        (lambda: stratified([0, 0, 0, 7], 2), ValueError, "class 7 has 1 members and there are 2 folds"),
        (lambda: stratified(np.zeros((4, 2)), 2), ValueError, r"one a row, \[N\]; got shape \(4, 2\)"),
        (lambda: grouped([0, 0, 1, 1], 3), ValueError, "got 3 folds and 2 groups"),
        (lambda: grouped([0, 1, 2], 2, labels=[0, 0]), ValueError, "2 labels and 3 groups"),
        (lambda: grouped([0, 1, 2], 2, labels=[0, 0, 1]), ValueError, "leave labels out"),
        (lambda: check_folds([], 3), ValueError, "there are no folds"),
        (lambda: check_folds([([], [1])], 3), ValueError, "fold 0: train is empty"),
        (lambda: check_folds([([0], [3])], 3), ValueError, "test holds row 3, and the data has 3 rows"),
        (lambda: check_folds([([0], [1]), ([0, 2], [2])], 3), ValueError, "fold 1: row 2 is both"),
        (lambda: check_folds([([True, False], [1])], 3), TypeError, "row numbers"),
    ],
)
def test_bad_folds_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trial": Trial(init, step, lambda state, rows: rows["weight"])}, ValueError, r"array of shape \(\d+,\)"),
        ({"trial": Trial(init, step, lambda state: 0.0)}, TypeError, r"\(state, rows\) or \(state, rows, config\)"),
        ({"trial": (init, step, evaluate)}, TypeError, "must be a search.Trial"),
        ({"trial": TRIAL._replace(step=lambda state, batch, config: (state, 3))}, TypeError, "metrics a dict"),
        ({"data": {"x": X, "y": np.full(len(X), "a")}}, TypeError, "data/y is of <U1"),
        ({"data": {"x": X, "y": X[:4]}}, ValueError, "y has 4 rows"),
        ({"data": {}}, ValueError, "no arrays"),
        ({"data": X}, TypeError, "a dict of arrays"),
        ({"configs": []}, ValueError, "no configuration"),
        ({"configs": [*CONFIGS, {"rate": 0.1, "decay": {0.1}}]}, TypeError, r"configs\[2\]: decay is a set"),
        ({"static": ["rate", "(fold)"]}, ValueError, r"static names \(fold\); the configurations have decay, rate$"),
        ({"key": jnp.zeros(2, jnp.uint32)}, TypeError, "typed key"),
        ({"steps": -1}, ValueError, "steps must not be negative"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_bad_input_is_refused_by_name(changes, error, message):
    given = {"trial": TRIAL, "data": DATA, "configs": CONFIGS, "key": KEY, "steps": 2, "batch_size": 4, **changes}
    trial, arrays, configs = (given.pop(name) for name in ("trial", "data", "configs"))
    with pytest.raises(error, match=message):
        cross_validate(trial, arrays, configs, folds=FOLDS, **given)


MEAN = Trial(
    lambda key, config: jnp.float32(0),
    lambda state, batch, config: (jnp.sum(batch["weight"] * batch["x"]) / jnp.sum(batch["weight"]), {}),
    lambda state, rows: jnp.sum(rows["weight"] * (rows["x"] - state) ** 2) / jnp.sum(rows["weight"]),
)


@pytest.mark.parametrize("batch_size", [None, 1000])
def test_a_learning_curve_is_that_of_the_mean(batch_size):
    r"""The mean of n draws of variance 1 errs by 1 + 1/n on new ones."""
    draws = np.random.default_rng(4).normal(size=4000).astype(np.float32)
    folds = kfold(4000, 20, jax.random.key(2))
    sizes = [1, 2, 4, 3800]
    found = learning_curve(MEAN, {"x": draws}, sizes, folds=folds, key=KEY, steps=1, batch_size=batch_size, engine=vmapped())
    assert found.scores.shape == (1, 4, 20)
    last = 3800 if batch_size is None else 1000
    for size, mean, error in zip([1, 2, 4, last], found.mean[0], found.standard_error[0], strict=True):
        assert abs(mean - 1 - 1 / size) < 4 * error
    if batch_size is None:
        whole = [np.mean((draws[fold.test] - draws[fold.train].mean()) ** 2) for fold in folds]
        np.testing.assert_allclose(found.scores[0, -1], whole, rtol=1e-4)


def test_bad_sizes_are_refused_by_name():
    for sizes, message in (([], "rise"), ([4, 2], "rise"), ([0, 2], "rise"), ([2, 18], "fold 0 trains on 17 rows")):
        with pytest.raises(ValueError, match=message):
            learning_curve(TRIAL, DATA, sizes, CONFIGS, folds=FOLDS, key=KEY, steps=1, batch_size=2)
