"""The README's sample runs as it stands, and does what the text around it says."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_sample_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample, many_devices = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # The sample trains as it says; its length is not what is tested.
    shorter = sample.replace("steps=1500", "steps=1100")
    assert shorter != sample
    names: dict = {}
    exec(shorter, names)
    lab, state, digits = names["lab"], names["state"], names["digits"]
    weights = 64 * 64 + 64 * 32 + 32 * 10
    assert float(lab.prune.sparsity(state.params).total) == pytest.approx(round(0.9 * weights) / weights, abs=1e-6)
    dense = jax.jit(names["model"].predict)(names["variables"], digits.test["x"])
    np.testing.assert_allclose(names["logits"], dense, atol=0.35)
    assert lab.train.evaluate(names["model"], names["small"], digits.test)["accuracy"] > 0.9
    assert lab.tree.nbytes(names["small"]) < 0.3 * lab.tree.nbytes(names["variables"])

    exec(many_devices, names)
    assert int(names["state"].step) == int(state.step) + 1
    assert len(names["state"].params["Dense_0"]["kernel"].sharding.device_set) == jax.device_count()
    assert "accuracy" in capsys.readouterr().out
