"""Reports call the data what they are: images, rows of a table, latents."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bs4 import BeautifulSoup

from lowvar.report import build

SHAPES: dict[str, dict[str, Any]] = {
    "images": {"shape": [1, 8, 8], "levels": 17},
    "rows": {"shape": [5], "levels": None},
    "latents": {"shape": [4, 8, 8], "levels": None, "scaling_factor": 0.2},
}


def words(demo_run: Path, folder: Path, data: dict[str, Any]) -> str:
    """The text of the made-up demo's page, with other data and two sentences more."""
    summary = json.loads((demo_run / "summary.json").read_text()) | {"data": {"name": "d", **data}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "figures.json").write_text((demo_run / "figures.json").read_text())
    found = [json.loads(line) for line in (demo_run / "metrics.jsonl").read_text().splitlines()]
    found[-1]["target"] = {"ess": 3.0, "alone": 0.4, "warning": None}
    found[-1]["change"] = {"since": 3500, "value": 0.04, "low": 0.03, "high": 0.05}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    page = BeautifulSoup(build(folder).read_text(), "html.parser")
    for style in page.find_all(["style", "svg"]):
        style.decompose()
    return " ".join(page.get_text(" ").split())


@pytest.mark.parametrize("kind", SHAPES)
def test_the_page_uses_the_words_of_the_data(kind: str, demo_run: Path, tmp_path: Path) -> None:
    text, one = words(demo_run, tmp_path, SHAPES[kind]), kind.removesuffix("s")
    for sentence in (
        f"held-out {kind}",
        f"recovers a clean {one} from",
        f"The training {kind} scored as if",
        f"{kind} a second (median)",
        f"3.00 training {kind} (effective sample size); 40% of the targets are one {one}",
        f"It gets worse on {kind} that it has not seen",
        f"on the same {kind}, times and noise",
    ):
        assert sentence in text
    others = {"images": "held-out rows|latent", "rows": r"\bimages?\b|pixel vectors|latent"}
    others["latents"] = r"\bimages?\b|pixel vectors|held-out rows"
    assert not re.search(others[kind], text)
    assert ("the decoder is a density" in text) == (kind != "images")
    assert ("vectors of features in" in text) == (kind == "rows")


def test_metrics_are_described_without_gaps() -> None:
    from lowvar.report.nouns import IMAGES, LATENTS, ROWS
    from lowvar.report.text import METRICS

    for entry in METRICS.values():
        for noun in (IMAGES, ROWS, LATENTS):
            assert "{" not in entry.about.format(**vars(noun))
