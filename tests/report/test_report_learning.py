"""What a report says of a training run: still learning, how much is left, the batch, the weighting."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bs4 import BeautifulSoup, Tag

from lowvar.errors import UserError
from lowvar.report import build

ADVICE = "batch 64 is below the noise scale 400 (320 to 500): a doubled batch would need about 0.57 of the updates"
SUMMARY = {
    "command": "train",
    "version": "0.1.0",
    "seed": 0,
    "seconds": 12.0,
    "config": {"lr": 1e-3},
    "updates": 1500,
    "validation_loss": 0.21,
    "low": 0.2,
    "high": 0.22,
}


def records() -> list[dict[str, Any]]:
    found = []
    for update, error in ((500, 0.5), (1000, 0.25), (1500, 0.21)):
        bins = [
            {"logsnr": x, "loss": error, "se": 0.01, "error": error, "error_se": 0.01}
            | {"optimum_low": 0.1 + 0.01 * i, "optimum_high": 0.4}
            for i, x in enumerate(np.linspace(9, -9, 8).tolist())
        ]
        record: dict[str, Any] = {"update": update, "loss": error, "validation_loss": error, "bins": bins}
        record |= {"low": error - 0.01, "high": error + 0.01, "seconds": 1.0, "images_per_second": 100.0}
        record |= {"validation_error": error, "error_low": error - 0.01, "error_high": error + 0.01}
        record |= {"optimum_low": 0.135, "optimum_high": 0.4}
        if update > 500:
            record["change"] = {"since": update - 500, "value": -0.04, "low": -0.045, "high": -0.035}
        if update > 1000:
            record["noise_scale"] = {"value": 400.0, "low": 320.0, "high": 500.0, "advice": ADVICE}
        found.append(record)
    return found


def figures(chosen: str = "min-snr") -> dict[str, Any]:
    x = np.linspace(-8, 8, 9)
    relative = {
        "simple": [1.0] * 9,
        "min-snr": np.minimum(1, 5 * np.exp(-x)).tolist(),
        "p2": (1 / (1 + np.exp(x))).tolist(),
    }
    return {"weighting": {"chosen": chosen, "logsnr": x.tolist(), "relative": relative}}


def words(element: Tag | None) -> str:
    assert element is not None
    return " ".join(element.get_text().split())


def page(folder: Path, write: Any, rows: list[dict[str, Any]], shown: dict[str, Any] | None = None) -> BeautifulSoup:
    return BeautifulSoup(build(write(folder, SUMMARY, figures=shown, records=rows)).read_text(), "html.parser")


def test_sentences(tmp_path: Path, write: Any) -> None:
    found = page(tmp_path, write, records())
    change = (
        "It is still learning: between updates 1,000 and 1,500 the validation loss fell by 0.0400 [0.0350, 0.0450], on "
        "the same images, times and noise."
    )
    assert words(found.select_one("#answer .answer") or found.select_one(".answer")).endswith(change)
    told = words(found.select_one("#training .findings"))
    assert told.startswith(change)
    assert (
        "Its squared error, 0.210 [0.200, 0.220], is at most 0.075 above the least that any network can reach on such "
        "data (which is at least 0.135), and below the best linear denoiser's, 0.400."
    ) in told
    assert told.endswith(
        "Batch 64 is below the noise scale 400 (320 to 500): a doubled batch would need about 0.57 of the updates."
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ((0.02, 0.01, 0.03), "It gets worse on images that it has not seen: between updates 1,000 and 1,500 the"),
        (
            (-0.001, -0.003, 0.001),
            "No change can be told between updates 1,000 and 1,500: the validation loss moved by −0.0010 [−0.0030,",
        ),
    ],
)
def test_other_ends(change: tuple[float, float, float], sentence: str, tmp_path: Path, write: Any) -> None:
    rows = records()
    rows[-1]["change"] |= dict(zip(("value", "low", "high"), change, strict=True))
    rows[-1]["validation_error"] = 0.45
    told = words(page(tmp_path, write, rows).select_one("#training .findings"))
    assert told.startswith(sentence)
    assert "is not below the best linear denoiser's, 0.400: little has been learnt yet." in told


def test_records_that_know_nothing_of_it(tmp_path: Path, write: Any) -> None:
    rows = [
        {k: v for k, v in r.items() if k not in ("change", "noise_scale", "optimum_low", "optimum_high")}
        for r in records()
    ]
    for row in rows:
        row["bins"] = [{k: b[k] for k in ("logsnr", "loss", "se")} for b in row["bins"]]
    found = page(tmp_path, write, rows)
    assert found.select_one(".findings") is None
    titles = [words(h) for h in found.select("#training h3")]
    assert titles == ["Loss by update", "Validation loss by noise level"]


def test_charts_and_what_they_say(tmp_path: Path, write: Any) -> None:
    found = page(tmp_path, write, records(), figures())
    titles = [words(h) for h in found.select("#training h3")]
    assert titles[2:] == ["What is left to learn, by noise level", "What the objective weighs"]
    labels = [str(svg["aria-label"]) for svg in found.select("#training svg.chart")]
    assert labels[2] == (
        "Squared error by logsnr between its bounds, after 1,500 updates. Furthest above the lower bound: 0.11 at "
        "logsnr 9.0."
    )
    assert labels[3] == (
        "Weight of every noise level over the plain loss's, 3 weightings. min-snr (this run): from 0.00168 at logsnr "
        "8.0 to 1.00 at logsnr −8.0."
    )
    keys = [words(p) for p in found.select("#training .legend")]
    assert keys[2] == "this network best linear denoiser no network is below"
    assert keys[3] == "min-snr (this run) simple p2"
    plain = page(tmp_path / "plain", write, records(), figures("simple"))
    assert "simple (this run): the same at every level, 1.00." in str(plain)


def test_what_is_broken_is_named(tmp_path: Path, write: Any) -> None:
    rows = records()
    rows[-1]["change"]["low"] = "a little"
    with pytest.raises(UserError, match=r"metrics\.jsonl is broken: one of since, value, low, high is not a number"):
        page(tmp_path / "a", write, rows)
    with pytest.raises(UserError, match="lacks the chosen weighting 'edm'"):
        page(tmp_path / "b", write, records(), figures("edm"))
    rows = copy.deepcopy(records())
    rows[-1]["bins"][3]["error"] = "much"
    with pytest.raises(UserError, match="the list of bins of update 1500"):
        page(tmp_path / "c", write, json.loads(json.dumps(rows)))
