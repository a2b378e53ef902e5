"""The studies run, small, and their `--help` answers without JAX."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxopt_lab import cli, data, report

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def _in_a_hurry(monkeypatch):
    """Times two calls where a study times fifty."""
    monkeypatch.setattr(report, "measure", functools.partial(report.measure, repeats=2))


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its own module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in EXPERIMENTS.glob("*.py")))
def test_help_needs_no_jax(name):
    command = [sys.executable, "-X", "importtime", EXPERIMENTS / f"{name}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--seed" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "tyro" in imported
    assert not imported & {"jax", "numpy", "flax", "optax"}


@pytest.mark.usefixtures("_in_a_hurry")
def test_the_main_job(tmp_path, capsys):
    study = load("compress")
    assert cli.main(study.study, study.Config, ["--epochs", "1", "--out", str(tmp_path)]) == 0
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert [stage["name"] for stage in stages] == ["teacher", "student", "distilled", "pruned", "pruned, int8"]
    teacher, student, _, pruned, stored = stages
    assert student["parameters"] < teacher["parameters"] / 20
    # 90 % of the kernels' 6,464 weights are zero, whatever one epoch has taught the rest; 106 biases are not pruned.
    assert stored["nonzeros"] <= pruned["nonzeros"] <= 647 + 106
    assert stored["array_bytes"] <= 0.28 * pruned["array_bytes"]
    assert (tmp_path / "accuracy_against_bytes.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert "pruned" in said.out
    assert "loaded in a fresh process" in said.err
    # Every stage can be evaluated from its directory, the teacher's too, and those of another data set are refused.
    for stage in (teacher, pruned, stored):
        directory = tmp_path / stage["name"].replace(" ", "_").replace(",", "")
        assert cli.main(study.study, study.Config, ["--evaluate", str(directory)]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(stage["accuracy"], abs=1e-6)
    assert cli.main(study.study, study.Config, ["--evaluate", str(tmp_path / "teacher"), "--dataset", "mnist1d"]) == 2
    assert "teacher holds neither the teacher nor the student of mnist1d" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^a fresh process cannot evaluate \S*nowhere: \S*nowhere holds no tree"):
        study.check_in_a_fresh_process(study.Config(), tmp_path / "nowhere", None)


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    study = load("compress")
    (tmp_path / "file").touch()
    # Whatever is wrong is found before anything trains.
    monkeypatch.setattr(study.Lab, "train", lambda *args, **kwargs: pytest.fail("a training began"))
    monkeypatch.delenv("JAXOPT_LAB_DATA", raising=False)
    for arguments, message in (
        (["--dataset", "mnist"], "name a directory"),
        (["--dataset", "mnist", "--data-dir", str(tmp_path)], "train-images-idx3-ubyte"),
        (["--dataset", "mnist", "--data-dir", str(tmp_path / "none")], "none"),
        (["--batch-size", "100000"], "100000"),
        (["--sparsity", "1.2"], "sparsity=1.2 must lie in [0, 1]"),
        (["--temperature", "0"], "temperature=0.0 must be above 0"),
        (["--temperature", "nan"], "temperature=nan must be above 0"),
        (["--teacher-weight", "-0.1"], "teacher_weight=-0.1 must lie in [0, 1]"),
        (["--learning-rate", "0"], "learning_rate=0.0 must be above 0"),
        (["--epochs", "0"], "epochs=0 must be at least 1"),
        (["--out", str(tmp_path / "file")], "file: File exists"),
        (["--out", str(tmp_path / "file" / "out")], "Not a directory"),
        (["--evaluate", str(tmp_path / "none")], "none"),
    ):
        assert cli.main(study.study, study.Config, ["--out", str(tmp_path / "out"), *arguments]) == 2
        said = capsys.readouterr().err.strip()
        assert message in said
        assert said.startswith("error: ")
        assert "\n" not in said


@pytest.mark.slow
@pytest.mark.usefixtures("_in_a_hurry")
def test_lenet_over_seeds(tmp_path, capsys):
    study = load("lenet")
    short = ["--epochs", "1", "--sparse-epochs", "1", "--batch-size", "240", "--seeds", "0"]
    assert cli.main(study.study, study.Config, ["--dataset", "digits", "--out", str(tmp_path), *short]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["stage"] for line in lines] == ["dense", "dense, int8", "sparse", "sparse, int8"]
    assert lines[2]["nonzeros"][0] <= round(0.05 * 21_150) + 236
    assert lines[1]["arrays_to_dense"] <= 0.27


@pytest.mark.slow
@pytest.mark.usefixtures("_in_a_hurry")
def test_formats_of_a_trained_network(tmp_path, capsys):
    study = load("quantize")
    short = ["--epochs", "1", "--fine-epochs", "1", "--batch-size", "240", "--calibration", "32", "--repeats", "1", "--seeds", "0"]
    formats = ["int8, static", "int4, trained", "int3", "mixed, bytes of int3"]
    arguments = ["--dataset", "digits", "--out", str(tmp_path), *short, "--networks", "lenet"]
    assert cli.main(study.study, study.Config, [*arguments, "--formats", *formats]) == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert json.loads((tmp_path / "summary.json").read_text()) == lines
    assert [line["format"] for line in lines] == ["float32", *formats]
    static, trained, three, mixed = lines[1:]
    # Of 21,386 numbers 21,150 are in kernels: a byte each and the scales; half a byte; three eighths.
    assert 0.25 < static["arrays_to_float32"] < 0.28
    assert 0.125 < trained["arrays_to_float32"] < 0.15
    assert mixed["array_bytes"] <= three["array_bytes"] < trained["array_bytes"]
    # The aims are judged, and only where there is one.
    assert [line["aim"] for line in lines] == [None, 0.1, 0.3, None, None]
    for line in (static, trained):
        assert line["missed_by"] == pytest.approx(max(0, -line["aim"] - line["points_mean"]), abs=1e-3)
        assert ("missed by" if line["missed_by"] else "met") in said
    stages = report.from_json(tmp_path / "lenet" / "seed_0" / "stages.json")
    assert all(stage.latency_ms.keys() == {1, 64} for stage in stages)
    assert stages[0].extra["time to float32 at 64"] == 1
    # A name that is none is told before anything trains.
    study.Lab.train = lambda *args: pytest.fail("a training began")
    assert cli.main(study.study, study.Config, [*arguments, "--formats", "int5"]) == 2
    assert "formats='int5' is none of: float32; float32, trained on; bfloat16; int8; " in capsys.readouterr().err


@pytest.mark.parametrize(("side", "bits"), [(8, 2), (28, 4)])
def test_both_ends_of_every_network_keep_more_bits(side, bits):
    study = load("quantize")
    for network in study.networks(side).values():
        lab = study.Lab.__new__(study.Lab)
        lab.network = network
        variables = jax.eval_shape(network.module.init, jax.random.key(0), jax.numpy.ones((1, side, side, 1)))
        found = lab.bits(variables, bits, ends=8)
        first, last = (found[f"params/{layer}/kernel"] for layer in network.ends)
        assert (first, last, sorted(found.values())[:-2]) == (8, 8, [bits] * (len(found) - 2))
        # The last one gives the ten logits.
        assert variables["params"][network.ends[1]]["kernel"].shape[-1] == 10


@pytest.mark.slow
@pytest.mark.usefixtures("_in_a_hurry")
def test_a_slimmed_network_against_its_controls(tmp_path, capsys):
    study = load("slim")
    short = ["--epochs", "1", "--fine-epochs", "1", "--batch-size", "240", "--repeats", "1", "--seeds", "0", "--widths", "8"]
    arguments = ["--dataset", "digits", "--out", str(tmp_path), *short]
    assert cli.main(study.study, study.Config, arguments) == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert json.loads((tmp_path / "summary.json").read_text()) == lines
    stages = ["dense", "slimmed", "slimmed, trained on", "random, trained on", "dense, trained on", "from scratch"]
    assert [line["stage"] for line in lines] == stages
    dense, *smaller = [line for line in lines if line["stage"] != "dense, trained on"]
    # On 8 x 8 pixels three convolutions of 3 x 3, each normalised; then eight features to ten logits.
    assert dense["parameters"] == 9 * (8 + 64 + 64) + 3 * 2 * 8 + 90
    assert dense["macs"] == 64 * 9 * (8 + 64 + 64) + 80
    # All are of one shape, within the budget.
    assert {line["macs"] for line in smaller} == {smaller[0]["macs"]}
    assert {line["parameters"] for line in smaller} == {smaller[0]["parameters"]}
    assert smaller[0]["macs"] <= dense["macs"] // 4
    assert smaller[0]["file_bytes"] < dense["file_bytes"]
    assert [line["aim"] for line in lines] == [None, None, 0.3, None, None, None]
    judged = lines[2]
    assert judged["missed_by"] == pytest.approx(max(0, -0.3 - judged["points_mean"]), abs=1e-3)
    assert ("missed by" if judged["missed_by"] else "met") in said
    stages = report.from_json(tmp_path / "seed_0" / "stages.json")
    assert all(stage.latency_ms.keys() == {1, 64} for stage in stages)
    assert stages[0].extra["time to dense at 64"] == 1
    # What is drawn for the training from scratch has the variance of an initialiser at the slimmed shapes, not at the whole ones.
    lab = study.Lab(study.Config(widths=(64,)), data.digits())
    shapes = jax.eval_shape(lab.model.init, jax.random.key(0), jax.numpy.ones((1, 8, 8, 1)))
    model, small = lab.slim(jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape), shapes))
    kernel = lab.drawn(model, 0)["params"]["Conv_2"]["kernel"]
    assert kernel.shape == small["params"]["Conv_2"]["kernel"].shape < (3, 3, 64, 64)
    assert float(kernel.std()) == pytest.approx((2 / (9 * kernel.shape[2])) ** 0.5, rel=0.05)
    # What is there is taken, and what is wrong is told, before anything trains.
    study.Lab.train = lambda *args, **kwargs: pytest.fail("a training began")
    assert cli.main(study.study, study.Config, [*arguments, "--resume"]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["accuracy_mean"] for line in again] == [line["accuracy_mean"] for line in lines]
    for wrong, message in (("1", "part=1.0 must lie between 0 and 1"), ("nan", "part=nan must lie between 0 and 1")):
        assert cli.main(study.study, study.Config, [*arguments, "--part", wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_labels_are_cleaned_by_hypergradients(tmp_path, capsys):
    study = load("hyper_cleaning")
    short = ["--seeds", "0", "--steps", "20", "--updates", "2", "--out", str(tmp_path)]
    assert cli.main(study.study, study.Config, short) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["stage"] for line in lines] == list(study.STAGES)
    assert json.loads((tmp_path / "summary.json").read_text()) == lines
    found = {line["stage"]: line for line in lines}
    # Half of the labels are wrong, and two updates tell most of them.
    assert found["reverse"]["f1"] > 0.7
    assert found["oracle"]["accuracy_mean"] > found["all"]["accuracy_mean"]
    assert cli.main(study.study, study.Config, [*short, "--steps", "0"]) == 2
    assert "steps=0 must be at least 1" in capsys.readouterr().err
