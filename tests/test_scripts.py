"""The benchmarks run, small, and print a line of JSON a case; and the versions that are declared are those that are pinned."""

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Runs a script in this process, and gives what it printed, line by line."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("benchmark_*.py")))
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        load(name).main()
    assert not stop.value.code
    assert "usage: " in capsys.readouterr().out


def test_the_loop(benchmark):
    rows = benchmark(load("benchmark_loop"), "--steps", "3", "--repeats", "1")
    assert [row["name"] for row in rows] == ["mlp_32_digits_batch_16", "lenet_28x28_batch_64"]
    for row in rows:
        assert row["fit_over_bare"] == pytest.approx(row["fit_steps_per_s"] / row["bare_steps_per_s"], rel=0.2)
        assert row["spread"] == [row["fit_over_bare"]] * 2
        assert row["chunks"] == [1]


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--repeats", "0"), ("--cases", "resnet")])
def test_the_loop_refuses_nonsense(benchmark, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        benchmark(load("benchmark_loop"), *arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_sparsify(benchmark):
    rows = benchmark(load("benchmark_sparsify"), "--sizes", "1000", "--repeats", "1")
    assert {row["case"] for row in rows} >= {"adam", "between, bool masks", "between, packed masks", "mask update, global"}
    assert rows[0]["ratio_to_adam"] == 1
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.slow
def test_leaves(benchmark):
    rows = benchmark(load("benchmark_leaves"), "--side", "64", "--batches", "1", "--repeats", "1")
    assert {row["case"] for row in rows} >= {"float32", "lift, nothing compressed", "int8"}
    assert rows[0]["ratio_to_float32"] == rows[0]["bytes_to_float32"] == 1
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.slow
def test_slim(benchmark):
    rows = benchmark(load("benchmark_slim"), "--tiny", "--batches", "2", "--repeats", "1")
    assert [row["case"] for row in rows] == ["coupling, ResNet-18", "ResNet-18", "Transformer, 6 layers"]
    assert rows[0]["groups"] == 12
    for row in rows[1:]:
        assert 0.2 < row["macs_ratio"] < 0.6
        assert row["time_to_macs"] == pytest.approx(row["time_ratio"] / row["macs_ratio"], rel=1e-2)


@pytest.mark.slow
def test_population(benchmark):
    rows = benchmark(load("benchmark_population"), "--trials", "8", "--steps", "6", "--rebuilt", "1", "--sweeps", "1")
    assert [row["case"] for row in rows] == ["mlp", "lenet", "halving"]
    for row in rows[:2]:
        # The same trials, however they were run.
        assert row["best"] == pytest.approx(row["best_shared"], rel=1e-3)
    assert rows[2]["within_1_percent"] in (0, 1)
    assert rows[2]["cost"] <= 1


def test_pmap(benchmark, tmp_path, monkeypatch):
    script = load("benchmark_pmap")
    monkeypatch.setitem(script.MODELS, "mlp", (script.nets.MLP(features=(16,)), (8,), 10))
    short = ["--models", "mlp", "--batch", "8", "--steps", "1", "--devices", "1", "2", "--precision", "bfloat16"]
    rows = benchmark(script, *short, "--ways", "pmap", "shard", "--out", str(tmp_path))
    assert [(row["way"], row["devices"], row["global_batch"]) for row in rows] == [
        ("pmap", 1, 8), ("pmap", 2, 16), ("shard", 1, 8), ("shard", 2, 16)
    ]  # fmt: skip
    parameters = 8 * 16 + 16 + 16 * 10 + 10
    for row in rows:
        # Devices that one CPU passes for show no scaling, whatever their figures.
        assert row["simulated"]
        assert row["scaling_efficiency"] is None
        if row["devices"] == 2:
            assert 4 * parameters <= row["collective_bytes"]["all-reduce"] <= 4 * parameters + 64
    assert [json.loads(line) for line in (tmp_path / "pmap.jsonl").read_text().splitlines()] == rows
    assert (tmp_path / "pmap.md").read_text().count("| mlp |") == 4
    assert (tmp_path / "pmap.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(script, "simulated", lambda: False)
    one, two = ({**row, "items_per_s_per_device": rate} for row, rate in zip(rows[:2], (100.0, 90.0), strict=True))
    assert script.efficiency(two, [one]) == 0.9
    assert script.efficiency(one, [one]) is None
    assert script.peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert script.peak("TPU v5 lite", "bfloat16") == 197e12
    assert script.peak("cpu", "float32") is None


def test_the_step(benchmark):
    rows = benchmark(load("benchmark_step"), "--nets", "lenet", "--cases", "guard", "--steps", "1", "--repeats", "1")
    assert [row["name"] for row in rows] == ["lenet_28x28_batch_64_guard"]
    assert rows[0]["time_over_plain"] > 0


@pytest.mark.slow
def test_checkpoints(benchmark, tmp_path):
    rows = benchmark(
        load("benchmark_checkpoint"),
        "--cases",
        "blocking",
        "digests",
        "--saves",
        "2",
        "--repeats",
        "1",
        "--directory",
        str(tmp_path),
    )
    assert {row["name"] for row in rows} >= {"blocking_lenet"}
    assert not list(tmp_path.iterdir())


def test_gp(benchmark):
    rows = benchmark(load("benchmark_gp"), "time", "--methods", "ours", "tpe", "--observations", "5", "--repeats", "1")
    assert {row["method"] for row in rows} == {"ours", "tpe"}


@pytest.mark.slow
def test_architectures(benchmark):
    rows = benchmark(load("benchmark_architectures"), "mnist1d", "--seeds", "2")
    assert len(rows) == 2


@pytest.mark.slow
def test_hypergradient(benchmark):
    arguments = ["--tiny", "--budget", "6", "--seeds", "0", "--methods", "random", "reverse", "implicit", "--repeats", "1"]
    rows = benchmark(load("benchmark_hypergradient"), *arguments)
    assert len(rows) == 6


def test_imports(benchmark, monkeypatch):
    module = load("benchmark_import")
    # In fresh processes as it stands, but of modules that cost next to nothing.
    monkeypatch.setattr(module, "CASES", {"base": "import json", "package": "import json; import jaxopt_lab"})
    rows = benchmark(module, "--processes", "2")
    assert [row["case"] for row in rows] == ["base", "package"]
    assert rows[0]["ratio"] == 1
    assert all(0 < row["least"] <= row["seconds"] for row in rows)


def test_what_imports_are_timed():
    cases = load("benchmark_import").CASES
    assert list(cases) == ["base", "package", "sparsify"]
    assert cases["package"] == f"{cases['base']}; import jaxopt_lab"
    names: dict = {}
    exec(cases["sparsify"], names)
    assert callable(names["jaxopt_lab"].prune.sparsify)


def test_lower_bounds_are_the_pinned_versions():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<[\d.]+)?", line).groups() for line in declared)
    assert len(bounds) == len(declared)
    assert bounds == {name: pinned[name] for name in bounds}
