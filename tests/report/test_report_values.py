"""What the page is made from: reading and refusing files, ranking, rounding, contact sheets."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowvar.errors import UserError
from lowvar.report import build
from lowvar.report.grids import sheet, sheets
from lowvar.report.run import read
from lowvar.report.scores import board
from lowvar.report.text import bounds, duration, plain

SUMMARY: dict[str, Any] = {"command": "evaluate", "version": "0", "seed": 0, "seconds": 1.0, "config": {}}


def row(sampler: str, value: float, half: float = 0.1, steps: int = 5, metric: str = "frechet") -> dict[str, Any]:
    ends = {"value": value, "low": value - half, "high": value + half}
    return {"sampler": sampler, "grid": "trailing", "steps": steps, "nfe": steps, "metric": metric, **ends}


def test_no_run_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"is not a run folder: it has no summary\.json; give a folder"):
            build(folder)
    assert list(tmp_path.iterdir()) == []


BROKEN: list[tuple[str, str, str]] = [
    ("summary.json", "{", r"summary\.json is not valid JSON \(.* at line 1, column 2\)"),
    ("summary.json", "[]", r"summary\.json holds a list where an object belongs"),
    ("summary.json", "{}", r"summary\.json is broken: it does not name its command"),
    ("summary.json", json.dumps(SUMMARY | {"rows": 3}), r"summary\.json is broken: `rows` is not a list"),
    ("summary.json", json.dumps(SUMMARY | {"rows": [{"metric": "x"}]}), r"row 1 of `rows` has no sampler"),
    (
        "summary.json",
        json.dumps(SUMMARY | {"rows": [row("a", 1.0) | {"value": "low"}]}),
        r"`value` in row 1 of `rows` is 'low', not a number",
    ),
    ("summary.json", json.dumps(SUMMARY | {"rows": [row("a", 1.0)], "floor": {"x": "y"}}), r"the floor of x is not"),
    ("summary.json", json.dumps(SUMMARY | {"logsnr": [1], "mmse": [1, 2]}), r"summary\.json .* equally long lists"),
    ("summary.json", json.dumps(SUMMARY | {"logsnr": 1, "mmse": 1}), r"summary\.json .* equally long lists"),
    ("metrics.jsonl", '{"update": 1, "loss": 1}\n{"upd', r"metrics\.jsonl \(line 2\) is not valid JSON"),
    ("metrics.jsonl", '{"update": 1, "loss": "x"}', r"metrics\.jsonl is broken: `loss` is not a number"),
    ("metrics.jsonl", '{"update": 1, "loss": 1, "bins": 3}', r"metrics\.jsonl is broken: the bins of update 1"),
    ("figures.json", "null", r"figures\.json holds a NoneType"),
    ("figures.json", '{"standardised": []}', r"figures\.json is broken: `standardised` is not an object"),
    ("figures.json", '{"budget": {"a": {"logsnr": [1], "bits": []}}}', r"figures\.json .*`budget\.a` is not made of"),
    ("figures.json", '{"mmse": {"logsnr": [1], "mmse": [true]}}', r"figures\.json .*`mmse` is not made of"),
    ("grids.npz", "not a zip", r"grids\.npz is not an \.npz file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_file_is_named_in_one_sentence(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
    assert "run the command again" in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_arrays_that_would_run_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    np.savez(tmp_path / "grids.npz", data=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"grids\.npz is not"):
        build(tmp_path)


def test_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        build(tmp_path)
    assert not (tmp_path / "report.html.partial").exists()


def made(tmp_path: Path, rows: list[dict[str, Any]], paired: list[dict[str, Any]] | None = None) -> Any:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY | {"rows": rows}))
    (tmp_path / "figures.json").write_text(json.dumps({"paired": paired or []}))
    found = board(read(tmp_path))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("ours", "peer", "verdict"),
    [(1.0, 2.0, "ahead"), (2.0, 1.0, "behind"), (1.0, 1.1, "level"), (1.0, math.nan, "open")],
)
def test_verdict_by_intervals(ours: float, peer: float, verdict: str, tmp_path: Path) -> None:
    rows = [row("a", ours), row("worse", 9.0), row("diffusers:b", peer), row("diffusers:c", 9.0 if peer > 0 else peer)]
    assert made(tmp_path, rows).compare(5, "frechet").verdict == verdict


def test_paired_interval_decides_where_there_is_one(tmp_path: Path) -> None:
    """On common noise a small difference may be clear although the two intervals overlap."""
    pair = {"steps": 5, "metric": "frechet", "sampler": "a", "against": "diffusers:b", "low": -0.15, "high": -0.05}
    found = made(tmp_path, [row("a", 1.0), row("diffusers:b", 1.1)], [pair]).compare(5, "frechet")
    assert (found.verdict, found.paired) == ("ahead", True)
    assert found.ratio == pytest.approx(1.1)


def test_twin_alone_takes_part_in_no_ranking(tmp_path: Path) -> None:
    rows = [row("Gaussian twin alone", 0.1, steps=5), row("a", 1.0), row("diffusers:b", 2.0)]
    found = made(tmp_path, rows)
    assert found.compare(5, "frechet").best.sampler == "a"
    assert found.labels == ("a", "diffusers:b")


def test_acceptance_metric_comes_first(tmp_path: Path) -> None:
    rows = [row("a", 1.0, metric=metric) for metric in ("own", "energy", "kernel", "frechet")]
    assert made(tmp_path, rows).metrics == ("frechet", "kernel", "energy", "own")


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.0, "0"), (9.996, "10.0"), (0.00012, "0.000120"), (1e-6, "1.00·10⁻⁶"), (-2e9, "−2.00·10⁹"), (999.6, "1,000")],
)
def test_plain(x: float, text: str) -> None:
    assert plain(x) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.21342, 0.20111, 0.22573), ("0.213", "[0.201, 0.226]")),
        ((1234.5, 1000.0, 1469.0), ("1,234", "[1,000, 1,469]")),
        ((-0.00002, -0.0002, 0.0002), ("−0.00002", "[−0.00020, 0.00020]")),
        ((1e-9, 0.5e-9, 1.5e-9), ("1.00·10⁻⁹", "[5.00·10⁻¹⁰, 1.50·10⁻⁹]")),
        ((1.0, 1.0, 1.0), ("1.00", "")),
        ((-0.0001, -0.5, 0.5), ("0.00", "[−0.50, 0.50]")),
    ],
)
def test_bounds(values: tuple[float, float, float], text: tuple[str, str]) -> None:
    assert bounds(*values) == text


@pytest.mark.parametrize(("s", "text"), [(59.4, "59 s"), (59.7, "1 min 0 s"), (3599.9, "1 h 0 min")])
def test_duration(s: float, text: str) -> None:
    assert duration(s) == text


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_sheet_shows_the_pixels(tmp_path: Path) -> None:
    images = np.linspace(-1, 1, 7 * 4 * 4, dtype=np.float32).reshape(7, 1, 4, 4)
    found = sheet("a", images)
    assert found is not None
    picture = np.asarray(decoded(found.uri))
    assert picture.shape == (9, 29, 2)  # 6 columns, 2 rows, a gap of one pixel; grey and opacity
    assert picture[0, 0, 0] == 0
    assert np.array_equal(picture[5:9, 0:4, 0], np.round((images[6, 0] + 1) * 127.5))
    assert (picture[4, :, 1] == 0).all()
    assert (picture[5:, 5:, 1] == 0).all()
    assert (found.width, found.height) == (29 * 6, 9 * 6)


def test_sheet_says_what_is_not_finite() -> None:
    images = np.zeros((3, 3, 8, 8), dtype=np.float32)
    images[1, 0, 0, 0] = np.nan
    found = sheet("a", images)
    assert found is not None
    assert found.note == "1 of 3 not finite"


def test_large_images_are_reduced_and_tables_left_out() -> None:
    found = sheet("a", np.zeros((2, 3, 200, 100), dtype=np.float32))
    assert found is not None
    assert (found.width, found.height) == (97, 96)
    assert sheet("table", np.zeros((5, 3))) is None
    assert sheet("latent", np.zeros((5, 4, 8, 8))) is None
    assert sheet("empty", np.zeros((0, 1, 8, 8))) is None


def test_sheets_by_steps_with_ours_first() -> None:
    image = np.zeros((1, 1, 4, 4))
    data, groups = sheets({f"{name}": image for name in ("diffusers:b@10", "a@10", "a@3@karras", "data")})
    assert data is not None
    assert [(g.steps, [s.label for s in g.sheets]) for g in groups] == [
        (3.0, ["a (karras)"]),
        (10.0, ["a", "diffusers:b"]),
    ]
