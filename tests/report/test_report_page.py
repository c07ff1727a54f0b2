"""The page as a reader gets it: what it says, that it says it right, and that it needs nothing from outside."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import pytest
from bs4 import BeautifulSoup, Tag

from lowvar.report import build
from lowvar.report.text import bounds


class Browser(Protocol):
    def dom(self, page: Path) -> str: ...
    def console(self, page: Path) -> list[str]: ...
    def screenshot(self, page: Path, png: Path, width: int = 1280, height: int = 1600) -> Path: ...


def parse(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


def words(element: Tag | None) -> str:
    assert element is not None
    return " ".join(element.get_text().split())


@pytest.fixture(scope="module")
def page(demo_run: Path) -> BeautifulSoup:
    return parse(demo_run / "report.html")


def test_sections_of_a_full_run_in_order(page: BeautifulSoup) -> None:
    assert [words(h) for h in page.find_all("h1")] == ["demo"]
    titles = "In short; Samples; Quality against cost; All scores; The error curve; Is the variance right?; "
    titles += "What each step costs; Training; To run it again"
    assert "; ".join(words(h) for h in page.find_all("h2")) == titles
    levels = [int(h.name[1]) for h in page.find_all(["h1", "h2", "h3"])]
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_header_says_what_was_run(page: BeautifulSoup) -> None:
    facts = {words(dt): words(dt.find_next("dd")) for dt in page.select("header dt")}
    assert facts["Data"] == "digits · 1 × 8 × 8 · 1,197 train / 300 calibration / 300 test"
    assert facts["Network"] == "UNet2DModel · 421,586 parameters"
    assert (facts["Schedule"], facts["Seed"], facts["Time"]) == ("cosine", "0", "7 min 42 s")
    assert facts["Scored with"] == "classifier, 98.3% right · 5b1f09c2d7a9"
    assert facts["Versions"] == "lowvar 0.1.0, python 3.11.9, torch 2.13.0, diffusers 0.42.1"


def test_every_row_is_in_the_table_with_its_numbers(page: BeautifulSoup, summary: dict[str, Any]) -> None:
    shown = {}
    for table in page.select("table.scores"):
        heads = [words(th) for th in table.select("thead th")]
        for row in table.select("tbody tr"):
            name = words(row.find("th"))
            for head, cell in zip(heads[2:], row.find_all("td")[1:], strict=True):
                shown[words(table.caption), name, head] = words(cell)
    names = {"frechet": "Frechet distance", "kernel": "Kernel distance", "energy": "Energy distance"}
    names["sliced_wasserstein"] = "Sliced Wasserstein"
    for row in summary["rows"]:
        group = f"{row['steps']} steps" if row["steps"] else "Without a network"
        expected = " ".join(bounds(row["value"], row["low"], row["high"]))
        assert shown.pop((group, row["sampler"], names[row["metric"]])) == expected
    assert shown.pop(("Without a network", "floor: data against data", "Frechet distance")) == "0.060 [0.050, 0.070]"
    assert {group for group, _, _ in shown} == {"Without a network"}  # nothing else but the rest of the floor
    assert len(shown) == 3


def test_best_of_a_group_is_bold_and_only_that(page: BeautifulSoup, summary: dict[str, Any]) -> None:
    for table in page.select("table.scores"):
        steps = words(table.caption).split()[0]
        if steps == "Without":
            assert not table.select("strong")
            continue
        for k, metric in enumerate(("frechet", "kernel", "energy", "sliced_wasserstein")):
            rows = [r for r in summary["rows"] if r["steps"] == int(steps) and r["metric"] == metric]
            best = min(rows, key=lambda r: r["value"])["sampler"]
            bold = [words(r.th) for r in table.select("tbody tr") if r.find_all("td")[1 + k].strong is not None]
            assert bold == [best]


def test_answer_names_the_best_and_the_margin(page: BeautifulSoup, summary: dict[str, Any]) -> None:
    rows = [r for r in summary["rows"] if r["metric"] == "frechet" and r["steps"] == 3]
    ours = min((r for r in rows if ":" not in r["sampler"]), key=lambda r: r["value"])
    peer = min((r for r in rows if ":" in r["sampler"]), key=lambda r: r["value"])
    text = words(page.select_one(".answer"))
    assert text.startswith(f"At 3 steps {ours['sampler']} has a Frechet distance of {ours['value']:.3f}, ")
    assert f"{peer['value'] / ours['value']:.1f} times lower than the best peer's ({peer['sampler']}, " in text
    assert "clearly ahead of the best peer at 3 and 5 steps." in text
    assert "--sampler twin-ode --grid trailing --steps 10" in words(page.select_one(".advice code"))


def test_nothing_is_loaded_and_nothing_runs(page: BeautifulSoup) -> None:
    assert not page.find_all(["script", "iframe", "object", "embed", "audio", "video", "source"])
    for element in page.find_all(True):
        for name, value in element.attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert str(value).startswith(("#", "data:")), f"{element.name} {name}={value}"
    text = str(page)
    assert not re.search(r"@import|url\((?!#|data:)", text)
    assert "http:" not in text
    assert "https:" not in text


def test_ids_are_unique_and_references_resolve(page: BeautifulSoup) -> None:
    ids = [str(element["id"]) for element in page.find_all(id=True)]
    assert len(ids) == len(set(ids))
    targets = [str(e["href"])[1:] for e in page.find_all(href=re.compile("^#"))]
    targets += re.findall(r"url\(#([^)]+)\)", str(page))
    targets += [str(e["aria-labelledby"]) for e in page.select("[aria-labelledby]")]
    assert set(targets) <= set(ids)


def test_page_is_accessible(page: BeautifulSoup) -> None:
    assert page.html is not None
    assert page.html["lang"] == "en"
    assert page.select_one('meta[name="viewport"]') is not None
    images = page.find_all("img")
    assert len(images) == 27
    assert images[0]["alt"] == "24 images: real data, held out"
    assert all(image["alt"] and image.find_next("figcaption") for image in images)
    assert images[1]["alt"] == "24 images: ddpm-small, 5 steps"
    for svg in page.find_all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg["role"] == "img" and len(str(svg["aria-label"])) > 30)
    for figure in page.find_all("figure"):
        assert figure.figcaption is not None
    for table in page.find_all("table"):
        assert table.caption is not None or table.find_parent("figure") is not None
        assert all(th.get("scope") in ("row", "col") for th in table.find_all("th"))
    for label in page.select("label.key"):
        assert words(label)
        assert label.find("input") is not None


def test_charts_describe_what_they_show(page: BeautifulSoup) -> None:
    labels = [str(svg["aria-label"]) for svg in page.select("svg.chart")]
    assert len(labels) == 9
    assert labels[0].startswith("Frechet distance against network evaluations for 13 samplers; lower is better.")
    assert "Lowest at 3 steps: twin-ode, 0.262." in labels[0]
    assert any("learned: at most 55% off." in label for label in labels)


def test_drawings_follow_the_page(page: BeautifulSoup) -> None:
    """Colours are the page's variables, so that dark mode reaches them; each sampler can be pointed out."""
    for svg in page.select("svg"):
        drawn = re.findall(r"(?:fill|stroke): ?([^;\"]+)", str(svg))
        assert {colour.split("(")[0].strip() for colour in drawn} <= {"none", "var", "url"}, svg.get("aria-label")
    numbers = {c for g in page.select("#quality svg.chart g[class]") for c in g["class"]}
    assert numbers == {f"series-{k}" for k in range(15)}
    assert len(page.select("#quality fieldset input[type=checkbox]")) == 15


def test_ticks_are_not_cut(page: BeautifulSoup) -> None:
    ticks = [words(t) for t in page.select("#quality svg.chart")[1].find_all("text")]
    assert {"0", "0.001", "0.01", "0.1", "3", "5", "10", "20", "50"} <= set(ticks)


def test_metrics_are_defined(page: BeautifulSoup) -> None:
    terms = [words(dt) for dt in page.select("#quality dl.about dt")]
    for term in ("Frechet distance", "Kernel distance", "Energy distance", "Sliced Wasserstein", "Floor"):
        assert term in terms


def test_every_metric_of_the_package_is_described() -> None:
    from lowvar.metrics import METRICS
    from lowvar.report import text

    assert tuple(text.METRICS) == METRICS


def test_rebuild_gives_the_same_bytes(demo_run: Path, tmp_path: Path) -> None:
    """Again in this process, in another, and under another name of the folder."""
    first = (demo_run / "report.html").read_bytes()
    other = tmp_path / "renamed.partial"
    other.mkdir()
    for file in demo_run.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "report.html").unlink()
    assert build(other).read_bytes() == first
    (other / "report.html").unlink()
    code = "import sys; from pathlib import Path; from lowvar.report import build; build(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(other)], check=True, timeout=120)
    assert (other / "report.html").read_bytes() == first
    assert sorted(file.name for file in other.iterdir()) == sorted(file.name for file in demo_run.iterdir())


def test_page_is_small(demo_run: Path) -> None:
    assert (demo_run / "report.html").stat().st_size < 800_000


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}$x_1$"


def test_hostile_names_stay_text(tmp_path: Path, write: Any, summary: dict[str, Any]) -> None:
    for row in summary["rows"]:
        row["sampler"] = row["sampler"].replace("twin-ode", HOSTILE)
        row["metric"] = row["metric"].replace("energy", HOSTILE)
        row["grid"] = HOSTILE
    summary |= {"command": HOSTILE, "version": HOSTILE, "seed": HOSTILE}
    summary["config"] = {HOSTILE: HOSTILE, "schedule": HOSTILE}
    summary["floor"][HOSTILE] = 0.1
    summary["recommended"] = {"sampler": HOSTILE, "grid": HOSTILE, "steps": HOSTILE}
    curve = {"logsnr": [0, 1], "value": [1, 2], "bits": [1, 2], "prior": 0, "decoder": 0}
    figures = {"standardised": {HOSTILE: curve}, "budget": {HOSTILE: curve}, "about": {HOSTILE: HOSTILE}}
    page = parse(build(write(tmp_path, summary, figures)))
    assert not page.find_all(["script", "img"])
    assert not [e for e in page.find_all(True) if any(name.startswith("on") for name in e.attrs)]
    assert words(page.h1) == HOSTILE
    assert any(HOSTILE in words(th) for th in page.select("table.scores th"))
    assert HOSTILE in words(page.select_one("table.plain th"))
    assert "49" not in words(page.h1)


@pytest.mark.parametrize("command", ["train", "calibrate", "evaluate", "estimate"])
def test_sections_appear_with_their_data(
    command: str, tmp_path: Path, write: Any, demo_run: Path, summary: dict[str, Any]
) -> None:
    rows, floor = summary.pop("rows"), summary.pop("floor")
    summary["command"] = command
    summary.pop("recommended")
    records = [json.loads(line) for line in (demo_run / "metrics.jsonl").read_text().splitlines()]
    expected = ["To run it again"]
    if command == "train":
        summary |= {"updates": 4000, "loss": 0.05, "validation_loss": 0.0525, "low": 0.05, "high": 0.055}
        expected = ["In short", "Training", *expected]
    if command == "calibrate":
        summary |= {"logsnr": [-5, 0, 5], "mmse": [0.2, 0.1, 0.01], "mmse_se": [0.01, 0.01, None]}
        summary["recommended"] = "ddpm-basis"
        expected = ["In short", "The error curve", *expected]
    if command == "evaluate":
        summary |= {"rows": rows, "floor": floor}
        expected = ["In short", "Quality against cost", "All scores", *expected]
    page = parse(build(write(tmp_path, summary, records=records if command == "train" else None)))
    assert [words(h) for h in page.find_all("h2")] == expected
    answer = words(page.select_one(".answer")) if command in ("train", "calibrate") else ""
    if command == "train":
        assert answer == "After 4,000 updates the validation loss is 0.0525 [0.0500, 0.0550]; it was 0.364 after 500."
    if command == "calibrate":
        assert "falls from 0.200 at logsnr −5.00 to 0.0100 at logsnr 5.00." in answer
        assert words(page.select_one(".advice")).startswith("Recommended: ddpm-basis. lowvar sample")


def test_a_run_without_peers_and_with_one_row(tmp_path: Path, write: Any, summary: dict[str, Any]) -> None:
    row = {"sampler": "ddim", "grid": None, "steps": 1, "nfe": 2, "metric": "my_score", "value": 0.5}
    summary |= {"rows": [row], "floor": {}, "recommended": None}
    page = parse(build(write(tmp_path, summary)))
    assert words(page.select_one(".answer")) == "The lowest my score is 0.500: ddim at 1 step."
    assert [words(td) for td in page.select("table.scores td")] == ["2", "0.500"]
    assert "peer" not in words(page.select_one("table.best"))


def test_missing_values_are_shown_as_missing(tmp_path: Path, write: Any, summary: dict[str, Any]) -> None:
    """A sampler that diverged keeps its row, is nowhere best, and breaks no figure."""
    for row in summary["rows"]:
        if row["sampler"] == "ddim":
            row["value"] = row["low"] = row["high"] = None
        if row["sampler"] == "twin-sde":
            row |= {"value": float("inf"), "low": float("nan"), "high": float("inf")}
    page = parse(build(write(tmp_path, summary, records=[{"update": 1, "loss": None}, {"update": 2, "loss": None}])))
    rows = {words(r.th): [words(td) for td in r.find_all("td")] for r in page.select("table.scores tbody tr")}
    assert rows["ddim"][1:] == ["–"] * 4
    assert rows["twin-sde"][1:] == ["∞"] * 4
    assert "Loss by update" in words(page.select_one("#training"))


def test_the_stable_target_has_a_line(tmp_path: Path, write: Any, summary: dict[str, Any]) -> None:
    record = {"update": 1, "loss": 0.2, "target": {"ess": 3.21, "alone": 0.71, "warning": "it memorises"}}
    text = words(parse(build(write(tmp_path, summary, records=[record]))).select_one("#training"))
    assert "mean of 3.21 training images (effective sample size); 71% of the targets are one image" in text
    assert "Warning: it memorises" in text
    odd = [record | {"target": {"ess": None, "alone": "x"}}]
    assert "Stable target" not in words(parse(build(write(tmp_path, summary, records=odd))).select_one("#training"))


def test_a_sampler_on_two_grids_is_two_rows(tmp_path: Path, write: Any, summary: dict[str, Any]) -> None:
    rows = [{"sampler": "ddim", "steps": 5, "nfe": 5, "metric": "energy"} for _ in range(2)]
    rows[0] |= {"grid": "karras", "value": 0.2}
    rows[1] |= {"grid": "trailing", "value": 0.1}
    page = parse(build(write(tmp_path, summary | {"rows": rows, "floor": {}})))
    names = [words(th) for th in page.select("table.scores tbody th")]
    assert names == ["ddim (trailing) trailing", "ddim (karras) karras"]


@pytest.mark.browser
def test_browser_shows_the_page_without_complaint(demo_run: Path, tmp_path: Path, chromium: Browser) -> None:
    from PIL import Image

    page = demo_run / "report.html"
    assert chromium.console(page) == []
    dom = BeautifulSoup(chromium.dom(page), "html.parser")
    assert len(dom.select("svg.chart path")) > 200
    assert len(dom.select("table.scores tbody tr")) == 67
    picture = Image.open(chromium.screenshot(page, tmp_path / "page.png")).convert("L")
    assert picture.size == (1280, 1600)
    low, high = picture.getextrema()
    assert (low, high) != (high, low)  # not a blank page


def probed(page: Path, script: str) -> str:
    """The page with a script that leaves what it measured in the title."""
    return page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")


def title(dom: str) -> str:
    return words(BeautifulSoup(dom, "html.parser").title)


@pytest.mark.browser
def test_phone_never_scrolls_sideways(demo_run: Path, tmp_path: Path, chromium: Browser) -> None:
    """At 390 px only tables scroll, within themselves."""
    probe = probed(demo_run / "report.html", "document.title = document.documentElement.scrollWidth")
    content = probe.replace("&", "&amp;").replace('"', "&quot;")
    report = "onload=\"document.title = document.querySelector('iframe').contentDocument.title\""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<!doctype html><iframe width=390 height=900 style="border:0" {report} srcdoc="{content}"></iframe>'
    )
    assert int(title(chromium.dom(frame))) <= 390


@pytest.mark.browser
def test_samplers_are_hidden_without_a_script(demo_run: Path, tmp_path: Path, chromium: Browser) -> None:
    script = (
        "document.getElementById('quality-show-0').checked = false; document.title = [0, 1].map("
        "k => getComputedStyle(document.querySelector('.chart .series-' + k)).display).join(' ')"
    )
    probe = tmp_path / "probe.html"
    probe.write_text(probed(demo_run / "report.html", script), encoding="utf-8")
    assert title(chromium.dom(probe)) == "none inline"


def test_wall_clock_notes_and_intervals_of_the_floor(tmp_path: Path, write: Any, summary: dict[str, Any]) -> None:
    summary["rows"] = [row | {"seconds": 1.25} for row in summary["rows"] if row["steps"] == 5]
    summary["floor"] = {"frechet": 0.06}
    summary["floor_rows"] = [{"metric": "frechet", "value": 0.06, "low": 0.05, "high": 0.07}]
    summary["notes"] = ["ddpm-large@3 diverged"]
    page = parse(build(write(tmp_path, summary)))
    floor, steps = page.select("table.scores")
    assert [words(td) for td in floor.select("tbody td")][:3] == ["–", "–", "0.060 [0.050, 0.070]"]
    assert words(steps.select("thead th")[2]) == "Seconds"
    assert {words(row.find_all("td")[1]) for row in steps.select("tbody tr")} == {"1.2"}
    assert [words(li) for li in page.select("#answer li")] == ["ddpm-large@3 diverged"]
