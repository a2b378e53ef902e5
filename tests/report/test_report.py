"""The report measures what it says: accuracy and its interval, bytes, non-zeros, medians; and its files are whole."""

import math
import os
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxopt_lab import nets, report, train

ARRAYS = {"x": np.eye(4, dtype=np.float32), "y": np.array([0, 1, 2, 0])}
VARIABLES = {"params": {"w": jnp.eye(4), "b": jnp.zeros(4)}, "batch_stats": {"mean": jnp.ones(3)}}


def predict(variables, x):
    return x @ variables["params"]["w"] + variables["params"]["b"][None, :]


def stage(name="a", correct=9, total=10, size=1000, **changes) -> report.Stage:
    row = report.Stage(
        name, correct / total, report.accuracy_interval(correct, total), total, 10, 5, size, size, {1: 0.5, 64: 2.0}, 3.5
    )
    return row._replace(**changes)


# By hand from the formula: 1.96 is the normal quantile to three digits only, hence the tolerance.
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (90, 100, 0.82563, 0.94477),
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (1, 2, 0.09453, 0.90547),
        (9900, 10000, 0.98786, 0.99177),
    ],
)
def test_the_interval_is_wilsons(correct, total, low, high):
    found = report.accuracy_interval(correct, total)
    assert found == pytest.approx((low, high), abs=1e-5)


def test_the_interval_solves_its_equation():
    """Its ends are the shares p with |p_hat - p| = z sqrt(p (1 - p) / n)."""
    z = statistics.NormalDist().inv_cdf(0.95)
    for end in report.accuracy_interval(37, 50, confidence=0.9):
        assert abs(37 / 50 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 50))


@pytest.mark.parametrize(("correct", "total", "confidence"), [(-1, 5, 0.95), (6, 5, 0.95), (0, 0, 0.95), (1, 2, 1.0), (1, 2, 0.0)])
def test_an_impossible_interval_is_refused(correct, total, confidence):
    with pytest.raises(ValueError, match=r"correct|confidence"):
        report.accuracy_interval(correct, total, confidence)


def test_measure_counts():
    row = report.measure("dense", predict, VARIABLES, ARRAYS, repeats=2, seconds=1.5, extra={"rank": 2})
    # The last example's label is wrong; 4 of 20 parameters are not zero; 20 + 3 float32 numbers are stored.
    assert row[:8] == ("dense", 0.75, report.accuracy_interval(3, 4), 4, 20, 4, 92, None)
    assert set(row.latency_ms) == {1, 64}
    assert all(ms > 0 for ms in row.latency_ms.values())
    assert (row.seconds, row.extra) == (1.5, {"rank": 2})


def test_measure_takes_bare_parameters_and_a_directory(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    row = report.measure("dense", lambda w, x: x @ w, jnp.eye(4), ARRAYS, directory=tmp_path, batch_sizes=(2,), repeats=1)
    assert (row.accuracy, row.parameters, row.nonzeros, row.array_bytes, row.directory_bytes) == (0.75, 16, 4, 64, 3)
    assert set(row.latency_ms) == {2}


def test_measure_takes_a_model_and_a_state():
    model = nets.from_functions(lambda key, x: jnp.eye(4), lambda w, x: x @ w)
    state = train.State(jnp.eye(4), {"mean": jnp.ones(3)}, (), jnp.int32(0), jax.random.key(0))
    row = report.measure("dense", model, state, ARRAYS, batch_sizes=(1,), repeats=1)
    plain = report.measure("dense", model.predict, train.variables(state), ARRAYS, batch_sizes=(1,), repeats=1)
    assert row[:8] == plain[:8] == ("dense", 0.75, report.accuracy_interval(3, 4), 4, 16, 4, 76, None)


def test_what_measure_cannot_take_is_named():
    with pytest.raises(TypeError, match=r"this MLP becomes one by nets\.from_linen\(model\)"):
        report.measure("a", nets.MLP(), VARIABLES, ARRAYS)
    with pytest.raises(ValueError, match=r'labels "y" .* they lack "y"'):
        report.measure("a", predict, VARIABLES, {"x": ARRAYS["x"]})


def test_logits_that_are_not_finite_are_wrong():
    nan = jax.tree.map(lambda x: x * jnp.nan, VARIABLES)
    assert report.measure("broken", predict, nan, ARRAYS, batch_sizes=(), repeats=1).accuracy == 0.0


def test_measure_lifts_a_compressed_tree():
    from jaxopt_lab import compress

    dense = report.measure("dense", predict, VARIABLES, ARRAYS, batch_sizes=(), repeats=1)
    stored = VARIABLES | {"params": compress.quantize(VARIABLES["params"], bits=8, where="w")}
    row = report.measure("int8", predict, stored, ARRAYS, batch_sizes=(1,), repeats=1)
    assert row.accuracy == dense.accuracy
    assert row.array_bytes < dense.array_bytes
    # The codes and the scales of a leaf are how it is stored; its zeros are those of the weight.
    assert row.nonzeros == dense.nonzeros == 4


def test_latency_is_the_median_after_warm_up():
    calls = []

    def fn():
        calls.append(len(calls))
        return jnp.zeros(())

    seconds = report.latency(fn, repeats=5)
    assert len(calls) == 8
    assert 0 < seconds < 1
    with pytest.raises(ValueError, match="repeats=0"):
        report.latency(fn, repeats=0)


def test_directory_bytes_counts_files_and_not_links(tmp_path):
    (tmp_path / "outside").write_bytes(b"x" * 1000)
    inside = tmp_path / "saved"
    (inside / "deep").mkdir(parents=True)
    (inside / "a").write_bytes(b"12")
    (inside / "deep" / "b").write_bytes(b"345")
    (inside / "link").symlink_to(tmp_path / "outside")
    (inside / "loop").symlink_to(tmp_path)
    assert report.directory_bytes(inside) == 5
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*nowhere to measure"):
        report.directory_bytes(tmp_path / "nowhere")


def test_the_table_shows_every_stage_in_eighty_columns():
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(report.table([stage("student distilled"), stage("pruned, int8", extra={"rank": 3})], title="Stages"))
    text = console.export_text()
    for words in ("student", "distilled", "pruned", "90.00 %", "59.58-98.21", "1 kB", "rank"):
        assert words in text
    assert "…" not in text


def test_markdown_has_a_line_for_every_stage():
    lines = report.markdown([stage("a|b"), stage("c", directory_bytes=None, seconds=None)]).splitlines()
    assert lines[0] == ("| stage | acc. | 95 % interval | params | non-zeros | arrays | dir | ms at 1 | ms at 64 | train s |")
    assert lines[2] == r"| a\|b | 90.00 % | 59.58-98.21 | 10 | 5 | 1 kB | 1 kB | 0.5 | 2 | 3.5 |"
    assert lines[3] == "| c | 90.00 % | 59.58-98.21 | 10 | 5 | 1 kB | - | 0.5 | 2 | - |"
    assert len(lines) == 4


def test_a_column_that_nobody_fills_is_left_out():
    assert "| dir |" in report.markdown([stage()])
    assert "| dir |" not in report.markdown([stage(directory_bytes=None)])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (177_704, "178 kB"), (999_600, "1e+03 kB"), (1_724_320, "1.72 MB")],
)
def test_bytes_have_three_digits(count, text):
    expected = "1,000 kB" if text == "1e+03 kB" else text
    assert f"| {expected} |" in report.markdown([stage(array_bytes=count)])


def test_json_round_trip_and_numbers_that_are_not_finite(tmp_path):
    rows = [stage("a", extra={"rank": 2}), stage("b", directory_bytes=None)]
    path = report.to_json(rows, tmp_path / "made" / "stages.json")
    assert report.from_json(path) == rows
    report.to_json([stage(seconds=math.nan)], path)
    assert "NaN" not in path.read_text()
    assert report.from_json(path)[0].seconds is None
    assert os.listdir(path.parent) == ["stages.json"]


@pytest.mark.parametrize("body", ["{", "[{}]", '{"a": 1}', "[1]"])
def test_a_foreign_json_file_is_named(tmp_path, body):
    path = tmp_path / "stages.json"
    path.write_text(body)
    with pytest.raises(ValueError, match=r"stages\.json holds no stages of a report") as caught:
        report.from_json(path)
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = report.to_json([stage()], tmp_path / "stages.json")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        report.to_json([], path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["stages.json"]


def test_the_picture_is_a_png_of_the_size_asked_for(tmp_path):
    rows = [stage("a", size=10_000), stage("b", 8, size=10_010), stage("c", 10, size=2_000_000)]
    body = report.picture(rows, tmp_path / "a.png", dpi=50).read_bytes()
    assert body[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(body[16:20]), int.from_bytes(body[20:24])) == (400, 250)
    # Whatever stands on disk, it is the arrays that are drawn.
    assert report.picture([row._replace(directory_bytes=7) for row in rows], tmp_path / "b.png", dpi=50).read_bytes() == body
    with pytest.raises(ValueError, match="at least one stage"):
        report.picture([], tmp_path / "c.png")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("sizes", "order"),
    [
        ([23_500, 22_900], [1, 0]),
        ([10_000, 10_000, 10_000], [0, 1, 2]),
        ([50_000, 20_030, 20_000, 20_000, 20_600, 20_610, 1000], [6, 2, 3, 1, 4, 5, 0]),
    ],
)
def test_points_of_nearly_one_size_stand_apart_in_the_order_of_their_sizes(tmp_path, monkeypatch, sizes, order):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    places = []
    plain = FigureCanvasAgg.print_png

    def recording(canvas, *args, **kwargs):
        plain(canvas, *args, **kwargs)
        places.extend(line.get_transform().transform(line.get_xydata())[0, 0] for line in canvas.figure.axes[0].lines)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", recording)
    report.picture([stage(f"{k}", size=size) for k, size in enumerate(sizes)], tmp_path / "a.png", dpi=72)
    assert sorted(range(len(sizes)), key=lambda k: places[k]) == order
    assert np.diff(sorted(places)).min() > 8


def test_names_in_the_picture_do_not_overlap(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = []
    plain = FigureCanvasAgg.print_png

    def recording(canvas, *args, **kwargs):
        plain(canvas, *args, **kwargs)
        texts = [text for text in canvas.figure.axes[0].texts if text.get_text()]
        drawn.extend(text.get_window_extent(canvas.get_renderer()) for text in texts)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", recording)
    report.picture([stage(f"stage number {k}", 9 - k % 2, size=20_000 + 10 * k) for k in range(6)], tmp_path / "a.png", dpi=60)
    assert len(drawn) == 6
    for k, one in enumerate(drawn):
        assert not any(one.overlaps(other) for other in drawn[:k])
