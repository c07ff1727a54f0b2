"""Warnings before a run: which settings have one, and that the committed measurements say what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowvar.data import load
from lowvar.train import cautions, config_from, fit

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "training.json"
LOSSES = "importance, losses + stable + cross + stratified"
NORMS = "importance, gradient norms + stable + cross + stratified"


def rows(method: str, moments: tuple[str, ...] = ("start", "middle", "end")) -> dict[str, dict[str, Any]]:
    """Rows of a method by `cell moment`."""
    cells = json.loads(RESULTS.read_text())["cells"]
    return {
        f"{c['cell']} {c['moment']}": row
        for c in cells
        for row in c["rows"]
        if row["method"] == method and c["moment"] in moments
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"variance_reduction": "auto", "prediction": "epsilon"}, []),
        ({"times": "loss-second-moment", "target": "stable"}, []),
        ({"times": "loss-second-moment", "prediction": "epsilon"}, []),
        ({"times": "loss-second-moment", "target": "stable", "prediction": "epsilon"}, ["times loss-second-moment"]),
        ({"times": "entropy-rate"}, ["times entropy-rate"]),
    ],
)
def test_which_settings_are_warned_of(settings: dict[str, Any], said: list[str]) -> None:
    found = cautions(config_from(settings))
    assert len(found) == len(said)
    assert all(sentence.startswith(begin) for sentence, begin in zip(found, said, strict=True))


def test_the_measurements_say_so() -> None:
    entropy = rows("importance, entropy rate")
    assert len(entropy) == 18
    assert all(row["high"] < 1 for row in entropy.values())
    losses, norms = rows(LOSSES, ("end",)), rows(NORMS, ("end",))
    noise = [cell for cell in losses if "-eps " in cell]
    assert len(noise) == 2
    assert sum(losses[cell]["low"] < 1 for cell in noise) == 1
    assert all(norms[cell]["low"] > 2 for cell in noise)
    others = [row["low"] for cell, row in losses.items() if cell not in noise]
    assert min(others) > 1  # no warning for other predictions


def test_fit_warns_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    config = config_from({"updates": 1, "batch_size": 2, "network": {"width": 8}, "times": "entropy-rate"})
    fit(load("digits"), config, device="cpu")
    assert capsys.readouterr().err.count("warning: times entropy-rate left the gradient more variance") == 1
    fit(load("digits"), config, device="cpu", progress=False)
    assert "warning" not in capsys.readouterr().err
