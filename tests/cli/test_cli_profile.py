"""`lowvar profile`: what stands in its summary and on its page, budgets, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvar.cli.profile import Profile
from lowvar.report import build

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def profiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lowvar.cli import main

    out = tmp_path_factory.mktemp("profiles") / "p"
    words = ["profile", "--model", str(model), "--data", "digits", "--batch-size", "4", "--minutes", "0.01"]
    assert main([*words, "--out", str(out), "--quiet"]) == 0
    return out


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_summary(profiled: Path) -> None:
    """The contract's keys; shares and parts sum to 1; the least work is done however short the budget."""
    found = summary(profiled)
    assert list(found["shares"]) == ["x", "t", "eps", "x,t", "x,eps", "t,eps", "x,t,eps"]
    assert sum(part["value"] for part in found["shares"].values()) == pytest.approx(1)
    assert sum(group["variance"]["value"] for group in found["groups"]) == pytest.approx(1)
    assert len(found["levels"]) == 8
    assert found["levels"][0]["logsnr_high"] > found["levels"][0]["logsnr_low"] > found["levels"][1]["logsnr_low"]
    assert (found["blocks"], found["replicates"]) == (16, 16)
    assert {"name", "vrf", "low", "high", "cost"} <= found["techniques"][0].keys()
    assert {"do", "expect", "command"} <= found["verdict"][0].keys()
    assert found["noise_scale"].keys() == {"value", "low", "high"}
    assert [line["worth"] for line in found["verdict"]] == sorted(
        (line["worth"] for line in found["verdict"]), reverse=True
    )


def test_page(profiled: Path, tmp_path: Path) -> None:
    """Verdict first, then sources and techniques; rebuilding gives the same bytes; nothing is loaded."""
    page = (profiled / "report.html").read_text()
    places = [page.index(f'<section id="{name}"') for name in ("verdict", "sources", "techniques")]
    assert places == sorted(places)
    assert "Where the variance comes from, by noise level" in page
    assert "http" not in page.replace("http-equiv", "")
    build(profiled)
    assert (profiled / "report.html").read_text() == page


@pytest.mark.slow
def test_sketches(lowvar: Any, model: Path, tmp_path: Path) -> None:
    """Where gradients do not fit the memory, directions stand for them, and the page says so."""
    words = [
        "--data",
        "digits",
        "--batch-size",
        4,
        "--minutes",
        0.01,
        "--memory",
        1e-6,
        "--out",
        tmp_path / "p",
        "--json",
    ]
    done = lowvar("profile", "--model", model, *words)
    assert done.status == 0, done.err
    assert done.json["directions"] > 0
    assert "random directions" in (tmp_path / "p" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch-size", 6), "--batch-size is 6; give a multiple of 4, so that pairs and groups fit"),
        (("--batch-size", 0), "--batch-size is 0; give a whole number from 4"),
        (("--minutes", "never"), "--minutes is 'never'; give a number; see `lowvar profile --help`"),
        (("--minutes", 0), "--minutes is 0; give a number above 0"),
        (("--memory", -1), "--memory is -1; give a number above 0"),
        (
            ("--batch-size", 4000),
            "--batch-size is 4000 and the training split has 1197 images; give at most that, or more data",
        ),
    ],
    ids=["groups", "none", "no number", "minutes", "memory", "small data"],
)
def test_refusals(lowvar: Any, model: Path, tmp_path: Path, words: tuple[object, ...], said: str) -> None:
    done = lowvar("profile", "--model", model, "--data", "digits", "--out", tmp_path / "p", *words)
    assert (done.status, done.sentence) == (2, said)
    assert not list(tmp_path.iterdir())


def test_default_budget() -> None:
    assert Profile(model=Path("m"), data="digits", out=Path("p")).minutes == 5
