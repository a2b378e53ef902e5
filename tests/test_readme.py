"""The README's samples run as they stand, one after another, and do what the text around them says."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_samples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sample, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
    assert "accuracy" in capsys.readouterr().out

    assert any("lab.parallel.pmap" in other for other in others)
    for other in others:
        exec(other.replace('"steps": 200', '"steps": 40').replace("steps=300", "steps=20"), names)
    masked = names["lab"].surgery.mask(names["variables"], names["plan"])
    np.testing.assert_allclose(names["slim_logits"], jax.jit(names["model"].predict)(masked, digits.test["x"]), atol=1e-4)
    assert names["begun_anew"] == ()
    for kind in ("wide", "deep"):
        grown = jax.jit(names[f"{kind}_model"].predict)(names[f"{kind}_variables"], digits.test["x"])
        np.testing.assert_allclose(grown, dense, atol=1e-4)
        assert lab.tree.size(names[f"{kind}_variables"]) > 1.3 * lab.tree.size(names["variables"])
    assert "Dense_0/kernel" in capsys.readouterr().out
    assert [trial.state.name for trial in names["study"].trials] == ["COMPLETE"] * 32
    chance = np.log(10)
    assert names["study"].best_value < chance / 3
    assert names["halved"].scores[names["halved"].best] < chance / 3
    assert int(names["state"].step) == int(state.step) + 2
    kernel = names["state"].params["Dense_0"]["kernel"]
    assert {part.data.nbytes for part in kernel.addressable_shards} == {kernel.nbytes // jax.device_count()}
    assert int(names["resumed"].state.step) == 20
    assert lab.checkpoint.Checkpoints("runs/digits/checkpoints").latest() == 20
