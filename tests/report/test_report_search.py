"""The pictures of a search show what they say: points, scales, limits, names; and what cannot be drawn is named."""

import math
import os
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from matplotlib.colors import to_hex
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from jaxopt_lab import report
from jaxopt_lab.report import canvas
from jaxopt_lab.report.search.contour import draw_contour
from jaxopt_lab.report.search.curves import draw_curves
from jaxopt_lab.report.search.front import draw_front, is_on_front
from jaxopt_lab.report.search.history import draw_history
from jaxopt_lab.report.search.importance import draw_importances
from jaxopt_lab.report.search.parallel import draw_parallel_coordinates
from jaxopt_lab.report.search.slices import draw_slices
from jaxopt_lab.report.search.trials import Dimension, curves_of, extent, trials_of
from jaxopt_lab.search import Result, choice, integer, log_uniform, uniform, when
from jaxopt_lab.search.importance import Importance

optuna.logging.set_verbosity(optuna.logging.ERROR)
ORANGE = canvas.COLOURS[1]
KINDS = {
    "optimizer/rate": FloatDistribution(1e-4, 1.0, log=True),
    "depth": IntDistribution(1, 4),
    "act": CategoricalDistribution(("relu", "gelu", None)),
    "mix": FloatDistribution(0, 1),
}


def told(value=None, state=TrialState.COMPLETE, seen=(), **params):
    params = {name.replace("__", "/"): each for name, each in params.items()}
    values = {} if value is None else {"values": list(value)} if isinstance(value, (list, tuple)) else {"value": value}
    return create_trial(
        state=state, params=params, distributions={name: KINDS[name] for name in params}, intermediate_values=dict(seen), **values
    )


def study_of(*trials, directions=("minimize",)):
    study = optuna.create_study(directions=list(directions))
    study.add_trials(trials)
    return study


@pytest.fixture(scope="module")
def study():
    """Conditional, with a category and a logarithm; one of each that is left out."""
    return study_of(
        told(0.5, optimizer__rate=1e-4, depth=1, act="relu", seen=[(1, 2.0), (3, 0.9)]),
        told(state=TrialState.FAIL, optimizer__rate=0.5, depth=2, act="relu", seen=[(1, 9.0), (3, math.nan)]),
        told(0.2, optimizer__rate=1e-2, depth=4, act="gelu", mix=0.25, seen=[(1, 1.0), (3, 0.4), (9, 0.3)]),
        told(state=TrialState.PRUNED, optimizer__rate=0.1, depth=2, act=None, seen=[(1, 3.0)]),
        told(0.3, optimizer__rate=1e-1, depth=2, act=None, seen=[(1, 1.5), (3, 0.8), (9, 0.35)]),
        told(math.inf, optimizer__rate=1.0, depth=3, act="gelu", mix=0.75),
    )


def population(curves, *, best, configs=None, evaluated=None):
    """A `Result` with these curves; a score is the last number of a curve."""
    curves = np.asarray(curves, float)
    scores = np.array([row[np.isfinite(row)][-1] if np.isfinite(row).any() else np.nan for row in curves])
    configs = configs or [{"k": k} for k in range(len(curves))]
    return Result(scores, (), configs, curves, evaluated or tuple(range(1, curves.shape[1] + 1)), {}, best, ())


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [text.get_text() for text in axes.texts]
    return found


def orange(axes):
    """What is drawn of the best, `[points, 2]`."""
    return [line.get_xydata() for line in axes.lines if to_hex(line.get_color()) == ORANGE]


# What is read.


def test_of_a_study_complete_and_finite_trials_are_read(study):
    trials = trials_of(study)
    assert trials.numbers.tolist() == [0, 2, 4]
    assert trials.scores[:, 0].tolist() == [0.5, 0.2, 0.3]
    assert trials.note == "6 trials: 2 failed or diverged, 1 pruned"
    assert trials.failed == (1, 5)
    assert trials.best() == 1
    assert [(d.path, d.options, d.log, d.integer) for d in trials.dimensions.values()] == [
        ("optimizer/rate", None, True, False), ("depth", None, False, True), ("act", ("relu", "gelu", None), False, False),
        ("mix", None, False, False),
    ]  # fmt: skip


def test_of_a_population_dimensions_are_read_off_the_values_or_the_space():
    configs = [{"rate": r, "net": {"width": w, "act": a}, "weights": np.zeros(3)} for r, w, a in
               [(1e-4, 8, "relu"), (np.float32(0.5), 16, "gelu"), (1e-2, 64, "relu")]]  # fmt: skip
    result = population([[3.0], [2.0], [1.0]], best=2, configs=configs)
    found = trials_of(result).dimensions
    assert [(d.path, d.options, d.log, d.integer) for d in found.values()] == [
        ("rate", None, True, False), ("net/width", None, False, True), ("net/act", ("gelu", "relu"), False, False),
    ]  # fmt: skip
    assert (found["rate"].low, found["rate"].high) == (1e-4, 0.5)
    space = {
        "rate": log_uniform(1e-5, 1.0),
        "net": {"width": integer(8, 512, log=True), "act": choice("relu", "gelu")},
        "mix": when("net/act", "gelu", uniform(0, 1)),
    }
    found = trials_of(result, space).dimensions
    assert list(found) == ["rate", "net/width", "net/act"]
    assert (found["rate"].low, found["net/width"].log, found["net/act"].options) == (1e-5, True, ("relu", "gelu"))


@pytest.mark.parametrize(
    ("curves", "best", "maximize"),
    [
        ([[1.0, 5.0], [1.0, 2.0]], 0, True),
        ([[1.0, 5.0], [1.0, 2.0]], 1, False),
        ([[0.9, 0.4], [0.5, np.nan], [0.6, np.nan]], 0, True),
        ([[0.2, 0.7], [0.5, np.nan], [0.6, np.nan]], 0, False),
        ([[0.2], [np.nan]], 0, False),
        ([[np.nan], [np.nan]], None, False),
    ],
)
def test_a_population_tells_which_end_is_the_good_one_by_its_best(curves, best, maximize):
    result = population(curves, best=best)
    if best is None:
        with pytest.raises(ValueError, match="of 2 trials none has a finite score"):
            trials_of(result)
    else:
        assert trials_of(result).maximize == (maximize,)


def test_what_was_dropped_is_never_the_best_curve():
    """A score of few steps may be below that of all of them."""
    result = population([[3.0, 2.5], [1.0, np.nan], [4.0, 2.0]], best=2)
    assert trials_of(result).best() == 2
    assert orange(draw_history(result).axes[0])[0].tolist() == [[2, 2.0]]
    found = curves_of(result)
    assert (found.best, found.numbers[found.best]) == (2, 2)
    assert found.ended == ("COMPLETE", "PRUNED", "COMPLETE")


@pytest.mark.parametrize(
    ("values", "maximize", "low", "high", "log"),
    [
        ([1.0, 2.0, 3.0], False, 1, 3, False),
        ([*np.linspace(1, 2, 20), 1e9], False, 1, 1.95**1.3, False),
        ([*np.linspace(1, 2, 20), -1e9], True, 0.77, 2, False),
        ([*np.linspace(1, 2, 20), 1e9], True, 1, 1e9, True),
        ([1e-4, 1e-2, 1.0], False, 1e-4, 1.0, True),
        ([0.0, 1e-2, 1e4], False, 0.0, 1e4, False),
    ],
)
def test_an_extent_leaves_out_what_is_far_on_the_bad_side_alone(values, maximize, low, high, log):
    found = extent(values, maximize, margin=0.0)
    assert found.log == log
    assert found.low == pytest.approx(low, rel=0.01)
    assert found.high == pytest.approx(high, rel=0.01)


def test_all_scores_alike_have_an_extent_around_them():
    for value in (0.0, -3.0, 1e9):
        found = extent([value] * 9, False)
        assert found.low < value < found.high


@pytest.mark.parametrize(
    ("low", "high", "most", "labels"),
    [
        (0.99, 0.9901, 5, ["0.990000", "0.990025", "0.990050", "0.990075", "0.990100"]),
        (-1.0, 1.0, 6, ["-1", "-0.5", "0", "0.5", "1"]),
        (1e6, 1.00004e6, 5, ["1000000", "1000010", "1000020", "1000030", "1000040"]),
    ],
)
def test_ticks_are_told_apart(low, high, most, labels):
    assert [label for _, label in Dimension("x", low=low, high=high).ticks(most)] == labels


# What is drawn.


def test_parallel_coordinates_place_each_trial_on_each_axis(study):
    axes = draw_parallel_coordinates(study).axes[0]
    lines = np.array(axes.collections[0].get_segments())
    assert lines.shape == (3, 5, 2)
    assert lines[0, :, 0].tolist() == [0, 1, 2, 3, 4]
    worst, middle, best = lines[:, :, 1]  # of trials 0, 4, 2
    np.testing.assert_allclose([worst[0], middle[0], best[0]], [0, 0.75, 0.5], atol=1e-12)  # in the logarithm
    np.testing.assert_allclose([worst[1], middle[1], best[1]], [0, 1 / 3, 1])
    # Within the share of its option, in the order of the scores.
    np.testing.assert_allclose([worst[2], middle[2], best[2]], [1 / 6 - 0.05, 5 / 6, 3 / 6 + 0.05])
    assert worst[3] == middle[3] < -0.05
    assert best[3] == 0.25
    assert worst[4] > middle[4] > best[4]
    (drawn,) = orange(axes)
    np.testing.assert_allclose(drawn, lines[2])
    shown = texts(axes.figure)
    for text in (
        "optimizer/rate",
        "objective",
        "gelu",
        "None",
        "0.0001",
        "not there",
        "6 trials: 2 failed or diverged, 1 pruned   (best: trial 2, 0.2)",
    ):
        assert any(text == each.replace("\n", "") for each in shown), text


def test_parallel_coordinates_of_chosen_dimensions_in_their_order(study):
    axes = draw_parallel_coordinates(study, params=["depth", "optimizer/rate"]).axes[0]
    assert np.array(axes.collections[0].get_segments())[2, :2, 1].tolist() == pytest.approx([1, 0.5])
    assert "not there" not in texts(axes.figure)
    with pytest.raises(ValueError, match="params names nothing; the trials have optimizer/rate, depth, act, mix"):
        draw_parallel_coordinates(study, params=["nothing"])


def test_slices_have_a_panel_a_dimension_with_its_scale(study):
    figure = draw_slices(study)
    panels = figure.axes[:4]
    assert [axes.get_xlabel() for axes in panels] == ["optimizer/rate", "depth", "act", "mix"]
    assert [axes.get_xscale() for axes in panels] == ["log", "linear", "linear", "linear"]
    assert panels[0].collections[0].get_offsets().tolist() == [[1e-4, 0.5], [1e-2, 0.2], [1e-1, 0.3]]
    low, high = panels[0].get_xlim()
    assert low < 1e-4
    assert high > 1
    assert [label.get_text() for label in panels[2].get_xticklabels()] == ["relu", "gelu", "None"]
    spread = panels[2].collections[0].get_offsets()[:, 0] - [0, 1, 2]
    assert np.abs(spread).max() <= 0.25
    assert len(set(spread.tolist())) == 3
    assert panels[3].collections[0].get_offsets().tolist() == [[0.25, 0.2]]
    assert panels[3].get_title(loc="right") == "1 of 3 have it"
    assert all(np.array_equal(orange(axes)[0][:, 1], [0.2]) for axes in panels)
    assert panels[0].get_ylim() == panels[3].get_ylim()
    assert panels[0].collections[0].get_array().tolist() == [0, 2, 4]


def test_bad_scores_are_triangles_at_the_edge():
    scores = [*np.linspace(0.1, 0.2, 12), 1e6]
    result = population([[s] for s in scores], best=0)
    for figure in (draw_slices(result), draw_history(result)):
        axes = figure.axes[0]
        assert axes.get_ylim()[1] < 1
        (edge,) = [line for line in axes.lines if line.get_marker() == "^"]
        assert edge.get_xydata().tolist() == [[12, axes.get_ylim()[1]]]
        assert len(axes.collections[0].get_offsets()) == 12


def test_history_shows_the_best_so_far_and_what_failed(study):
    axes = draw_history(study).axes[0]
    so_far, best, failed = axes.lines
    assert so_far.get_xydata().tolist() == [[0, 0.5], [2, 0.2], [4, 0.2]]
    assert so_far.get_drawstyle() == "steps-post"
    assert best.get_xydata().tolist() == [[2, 0.2]]
    assert failed.get_xdata().tolist() == [1, 5]
    assert axes.get_xlim()[1] > 5
    assert "best: trial 2, 0.2" in axes.get_legend_handles_labels()[1]
    largest = draw_history(study_of(told(1.0), told(3.0), told(2.0), directions=["maximize"])).axes[0]
    assert largest.lines[0].get_ydata().tolist() == [1, 3, 3]


def test_curves_of_a_study(study):
    axes = draw_curves(study).axes[0]
    drawn = axes.collections[0].get_segments()
    assert [len(line) for line in drawn] == [2, 1, 3, 1, 3]
    assert drawn[2].tolist() == [[1, 1.0], [3, 0.4], [9, 0.3]]
    assert orange(axes)[0].tolist() == drawn[2].tolist()
    handles, labels = axes.get_legend_handles_labels()
    lines = dict(zip(labels, handles, strict=True))
    assert lines["best so far"].get_xydata().tolist() == [[1, 1.0], [3, 0.4], [9, 0.3]]
    # That which failed, at its last number, and that which was pruned; one that is complete after fewer steps is not over.
    assert lines["pruned, dropped or diverged"].get_xydata().tolist() == [[1, 9.0], [1, 3.0]]
    assert [text for text in texts(axes.figure) if text.isdigit()] == ["5", "4", "2"]
    assert axes.get_xticks().tolist() == [1, 3, 9]


def test_curves_of_a_population_with_where_the_best_leads():
    result = population([[4, 2, 1], [5, 3, np.nan], [np.nan] * 3, [6, np.nan, np.nan]], best=0, evaluated=(10, 100, 1000))
    ahead = SimpleNamespace(at=[4000.0, 2000.0], mean=[0.7, 0.8], lower=[0.4, 0.6], upper=[0.9, 0.95])
    axes = draw_curves(result, extrapolations={0: ahead}).axes[0]
    assert axes.get_xscale() == "log"
    assert [text for text in texts(axes.figure) if text.isdigit()] == ["3", "2", "1"]
    band = next(each for each in axes.collections if each.get_label() == "expected: trial 0")
    corners = band.get_paths()[0].vertices
    for corner in ([1000, 1.0], [2000, 0.6], [4000, 0.4], [4000, 0.9]):
        assert (np.abs(corners - corner).max(axis=1) < 1e-12).any()
    assert axes.get_xlim()[1] > 4000
    assert axes.get_ylim()[0] < 0.4
    with pytest.raises(ValueError, match="extrapolations are of the trials 2, which have no curve"):
        draw_curves(result, extrapolations={2: ahead})


def test_a_spike_and_a_gap_leave_the_other_curves_readable():
    curves = 1 / np.arange(1.0, 41)[None, :] + np.linspace(0, 0.2, 10)[:, None]
    curves[3, 20], curves[4, 7] = 1e7, np.nan
    axes = draw_curves(population(curves, best=0)).axes[0]
    assert axes.get_ylim()[1] < 10
    assert axes.get_xscale() == "linear"
    best = orange(axes)[0]
    np.testing.assert_allclose(best[:, 1], curves[0])


def test_a_contour_takes_the_values_of_its_corners(study):
    figure = draw_contour(study)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("optimizer/rate", "depth", "log")
    assert orange(axes)[0].tolist() == [[1e-2, 4]]
    drawn = axes.collections[0]
    assert drawn.zmin >= 0.2
    assert drawn.zmax <= 0.5
    with pytest.raises(ValueError, match="act is a choice, between whose options there are no contours"):
        draw_contour(study, params=["depth", "act"])
    with pytest.raises(ValueError, match=r"three trials that do not lie on one line; 1 trials have both, at 1 places"):
        draw_contour(study, params=["depth", "mix"])


def test_trials_at_one_place_are_one_corner_of_their_mean():
    configs = [{"a": a, "b": b} for a, b in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]]
    axes = draw_contour(population([[0.0], [2.0], [2.0], [4.0]], best=0, configs=configs)).axes[0]
    assert (axes.collections[0].zmin, axes.collections[0].zmax) == (2.0, 2.0)


FRONT = [[0.9, 1000.0], [0.8, 100.0], [0.7, 500.0], [0.85, 100.0], [0.5, 10.0], [0.85, 100.0]]


def test_the_front_is_what_nothing_dominates():
    scores = np.array(FRONT)
    assert is_on_front(scores, (True, False)).tolist() == [True, False, False, True, True, True]
    assert is_on_front(-scores, (False, True)).tolist() == [True, False, False, True, True, True]
    # By the definition, on random numbers with ties.
    scores = np.random.default_rng(0).integers(0, 5, (60, 3)).astype(float)
    by_hand = [not any((o <= s).all() and (o < s).any() for o in scores) for s in scores]
    assert is_on_front(scores, (False,) * 3).tolist() == by_hand


def test_the_front_is_joined_as_steps_and_the_rest_is_faint():
    axes = draw_front(study_of(*map(told, FRONT), directions=["maximize", "minimize"]), names=["accuracy", "bytes"]).axes[0]
    steps, best = axes.lines
    assert steps.get_drawstyle() == "steps-post"
    low, right = axes.get_ylim()[0], axes.get_xlim()[1]
    assert steps.get_xydata().tolist() == [[10, low], [10, 0.5], [100, 0.85], [100, 0.85], [1000, 0.9], [right, 0.9]]
    assert sorted(best.get_xdata().tolist()) == [10, 100, 100, 1000]
    assert axes.collections[0].get_offsets().tolist() == [[100, 0.8], [500, 0.7]]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "bytes", "accuracy")
    assert {"0", "3", "4", "5"} <= set(texts(axes.figure))


def test_three_objectives_are_two_panels():
    trials = [told([a, b, c]) for a, b, c in [(0.9, 10.0, 3.0), (0.8, 5.0, 4.0), (0.7, 7.0, 1.0), (0.6, 8.0, 5.0)]]
    figure = draw_front(study_of(*trials, directions=["maximize", "minimize", "minimize"]))
    assert [axes.get_xlabel() for axes in figure.axes] == ["objective 1", "objective 2"]
    # The third is on the front by its milliseconds alone: behind the steps of the first panel.
    assert sorted(figure.axes[0].lines[1].get_xdata().tolist()) == [5, 7, 10]
    assert [7.0, 0.7] not in figure.axes[0].lines[0].get_xydata().tolist()
    assert figure.texts[-1].get_text() == "3 on the front of 4 trials"


def test_names_on_a_crowded_front_do_not_overlap():
    x = np.geomspace(1e3, 1e6, 60)
    figure = draw_front(study_of(*(told([1 - v**-0.3, v]) for v in x), directions=["maximize", "minimize"]), dpi=80)
    names = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in names]
    assert len(boxes) == 10
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])


def test_importance_bars_have_their_intervals_and_their_parts():
    found = {"b": Importance(0.2, 0.1, 0.4, (0.1, 0.0, 0.2)), "a": Importance(0.7, 0.6, 0.8, (0.5, 0.4, 0.6))}
    axes = draw_importances(found).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [float(bar.get_width()) for bar in axes.patches] == [0.7, 0.2, 0.5, 0.1]
    assert [line.tolist() for line in axes.collections[0].get_segments()] == [[[0.6, 0], [0.8, 0]], [[0.1, 1], [0.4, 1]]]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [text.get_text() for text in axes.texts] == ["0.70", "0.20"]
    many = draw_importances({f"p{k}": 0.5**k for k in range(30)}, most=5)
    assert len(many.axes[0].patches) == 5
    assert many.texts[-1].get_text() == "25 more, none above 0.0312"


def test_dollars_begin_no_formula():
    figure = draw_importances({"$x_{$": 0.5, "y": 0.5}, title="cost in $ and $\\bad{")
    figure.canvas.draw()
    assert figure.texts[0].get_text() == "cost in $ and $\\bad{"


# What cannot be drawn, and the files.

DRAWN = [
    (report.parallel_coordinates, {}),
    (report.slices, {}),
    (report.curves, {}),
    (report.history, {}),
    (report.contour, {}),
]


@pytest.mark.parametrize(("draw", "options"), DRAWN)
def test_the_same_study_gives_the_same_bytes_and_a_study_without_scores_a_named_error(draw, options, study, tmp_path):
    first = draw(study, tmp_path / "made" / "a.png", dpi=40, **options).read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert draw(study, tmp_path / "b.png", dpi=40, **options).read_bytes() == first
    with pytest.raises(ValueError, match=r"nothing to draw|no curve to draw"):
        draw(study_of(told(state=TrialState.FAIL)), tmp_path / "c.png", **options)
    with pytest.raises(TypeError, match="a study of Optuna's or the Result of a population; got list"):
        draw([], tmp_path / "c.png", **options)
    with pytest.raises(ValueError, match="dpi must be positive"):
        draw(study, tmp_path / "c.png", dpi=0, **options)
    assert sorted(os.listdir(tmp_path)) == ["b.png", "made"]


def test_what_cannot_be_drawn_is_named(study, tmp_path):
    with pytest.raises(ValueError, match="objective must be one of 0 to 0; got 1"):
        draw_slices(study, objective=1)
    with pytest.raises(ValueError, match="this has one: see history"):
        draw_front(study)
    two = study_of(told([1.0, 2.0]), directions=["minimize", "minimize"])
    with pytest.raises(ValueError, match="names must be one for each of 2 objectives; got a"):
        draw_front(two, names=["a"])
    with pytest.raises(ValueError, match="2 objectives has no intermediate values"):
        draw_curves(two)
    assert draw_history(two, objective=1).axes[0].lines[0].get_ydata().tolist() == [2]
    with pytest.raises(ValueError, match="no dimension to draw"):
        draw_slices(study_of(told(1.0)))
    many = population([[1.0], [2.0]], best=0, configs=[{f"d{k}": 0.5 for k in range(30)}] * 2)
    with pytest.raises(ValueError, match="30 dimensions are too many for parallel coordinates, which holds 24: name some"):
        draw_parallel_coordinates(many)
    with pytest.raises(ValueError, match="there is no importance to draw"):
        report.importances({}, tmp_path / "a.png")
    with pytest.raises(TypeError, match="rate must have a number or an importance"):
        draw_importances({"rate": "much"})
    with pytest.raises(ValueError, match="importance of rate is not finite"):
        draw_importances({"rate": math.nan})
    with pytest.raises(ValueError, match="three trials that do not lie on one line"):
        draw_contour(population([[1.0], [2.0], [3.0]], best=0, configs=[{"a": float(k), "b": 2.0 * k} for k in range(3)]))


def test_one_trial_of_one_value_is_a_picture(tmp_path):
    one = population([[2.0]], best=0, configs=[{"rate": 0.1, "act": "relu"}])
    for draw in (report.parallel_coordinates, report.slices, report.curves, report.history):
        draw(one, tmp_path / "a.png", dpi=40)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("draw", [draw_parallel_coordinates, draw_slices, draw_curves, draw_history])
def test_nothing_is_clipped_at_the_edge_of_the_page(draw):
    """Long names, many options and large numbers lie within the figure."""
    configs = [
        {"a/very/long/path/of/a/dimension/that/nobody/can/read": 10.0**k, "option": f"an option with a long name, number {k}"}
        for k in range(9)
    ]
    figure = draw(population([[1e5 * k + 1e7] for k in range(9)], best=0, configs=configs), dpi=60, title="A title")
    figure.canvas.draw()
    found = [text for axes in figure.axes for text in axes.texts] + figure.texts
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            low, high = axis.get_view_interval()
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [label for tick in ticks for label in (tick.label1, tick.label2)]
    page = figure.bbox
    for text in found:
        if text.get_text() and text.get_visible():
            box = text.get_window_extent()
            assert box.x0 > -1, text
            assert box.y0 > -1, text
            assert box.x1 < page.width + 1, text
            assert box.y1 < page.height + 1, text
