"""The report of `lowvar estimate`: what it says for numbers, images and comparisons, and for broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bs4 import BeautifulSoup

from lowvar.errors import UserError
from lowvar.report import build

CANDIDATES = [
    {"design": "antithetic+twin", "gain": 12.3, "nfe": 1626.0, "note": "chosen"},
    {"design": "independent", "gain": 1.0, "nfe": 20000.0, "note": "baseline"},
    {"design": "sobol<i>", "gain": 0.7, "nfe": 28571.0, "note": "harmful: declined"},
    {"design": "multilevel", "gain": None, "nfe": None, "note": "declined: the statistic takes few values"},
]


def summary(**more: Any) -> dict[str, Any]:
    return {
        "command": "estimate",
        "version": "0.1.0",
        "seed": 0,
        "seconds": 3.0,
        "config": {"model": "runs/a", "steps": 16, "sampler": None, "statistic": "brightness"},
        "scheduler": {"sampler": "kernel"},
        "statistic": "brightness",
        "value": -0.3847,
        "low": -0.3866,
        "high": -0.3827,
        "half_width": 0.00197,
        "nfe": 3328,
        "samples": 414,
        "design": "antithetic+twin",
        "vrf": 7.8,
        "vrf_low": 5.3,
        "vrf_high": 11.6,
        "nfe_independent": 25966.2,
        "reached": True,
        "undercovers": None,
        "tol": 0.002,
        "shape": [],
        "decision": {"sentence": "it was the best", "candidates": CANDIDATES},
        **more,
    }


def records(*, number: bool = True) -> list[dict[str, Any]]:
    found = []
    for nfe, half in ((528, 0.0039), (1040, 0.0032), (3328, 0.00197)):
        line: dict[str, Any] = {"nfe": nfe, "samples": nfe // 8, "design": "antithetic", "half_width": half}
        found.append(line | ({"value": -0.385, "low": -0.385 - half, "high": -0.385 + half} if number else {}))
    return found


def text(page: Path) -> str:
    return " ".join(BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").get_text(" ").split())


def test_a_number(write, tmp_path: Path) -> None:
    page = build(write(tmp_path / "run", summary(), records=records()))
    said = text(page)
    assert "The mean of brightness is −0.3847 [−0.3866, −0.3827], for 3,328 network evaluations" in said
    assert "Independent sampling would need 25,966 for the same interval: a factor of 7.8 [5.3, 11.6]." in said
    assert "It was the best." in said
    for row in (
        "antithetic+twin 12.3 1,626 chosen",
        "sobol<i> 0.700 28,571 harmful: declined",
        "multilevel – – declined:",
    ):
        assert row in said, row
    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    titles = [h.get_text() for h in soup.select("#estimate h3")]
    assert titles == ["The estimate as it narrowed", "How the interval narrowed", "What was compared, and why"]
    assert len(soup.select("#estimate svg.chart[aria-label]")) == 2
    assert build(tmp_path / "run").read_bytes() == page.read_bytes()


def test_an_image_shows_its_error(write, tmp_path: Path) -> None:
    more = {"value": None, "low": None, "high": None, "shape": [3, 4, 4], "statistic": "mean", "reached": False}
    folder = write(tmp_path / "run", summary(**more), records=records(number=False))
    value = np.linspace(-1, 1, 48).reshape(3, 4, 4)
    np.savez(folder / "estimate.npz", value=value, low=value - 0.1, high=value + 0.1, se=np.full((3, 4, 4), 0.05))
    page = build(folder)
    said = text(page)
    assert "The mean of the samples, 3 × 4 × 4 numbers, is known to within 0.00197" in said
    assert "The budget ended the run before the tolerance was reached." in said
    assert "from 0 (dark) to 0.0500 (bright)" in said
    assert page.read_text().count("data:image/png;base64,") == 2


def test_a_difference_and_a_declared_shortfall(write, tmp_path: Path) -> None:
    more = {"against": "runs/b", "value_a": 0.5, "value_b": 0.4, "factor": 31.0, "undercovers": "it is heavy-tailed"}
    said = text(build(write(tmp_path / "run", summary(**more))))
    assert "The difference in brightness to runs/b is" in said
    assert "The two values are 0.500 and 0.400. Independent runs of both would need 31 times the samples." in said
    assert "The interval may cover less than it says: it is heavy-tailed." in said


def test_no_variance_at_all(write, tmp_path: Path) -> None:
    """An exact design: infinite factors are null in JSON, and the page does without them."""
    gone = dict.fromkeys(("vrf", "vrf_low", "vrf_high", "nfe_independent"))
    zero = [{**record, "half_width": 0.0} for record in records()]
    said = text(
        build(write(tmp_path / "run", summary(**gone, half_width=0.0, low=-0.3847, high=-0.3847), records=zero))
    )
    assert "Independent sampling would need" not in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": "high"}, r"summary\.json is broken: `value` is 'high', not a number"),
        ({"nfe": [1]}, "`nfe` is"),
        ({"decision": 3}, "`decision` is not an object"),
        ({"decision": {"candidates": [3]}}, "the candidates of `decision` are not a list of objects"),
    ],
    ids=["value", "nfe", "decision", "candidates"],
)
def test_broken_figures_are_named(write, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(write(tmp_path / "run", summary(**change), records=records()))


def test_a_broken_array_file_is_named(write, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", summary(), records=records())
    (folder / "estimate.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"estimate\.npz is not an \.npz file"):
        build(folder)
    (folder / "estimate.npz").unlink()
    (folder / "metrics.jsonl").write_text(json.dumps({"nfe": "many", "half_width": 1.0}) + "\n")
    with pytest.raises(UserError, match="`nfe` is not a number in every record"):
        build(folder)
