"""The parts of a profile beside the training gradient: reverse process, statistics, a reward's gradient, promises.

Where a share of ||C||_F^2 is above 1 or below 0, which is noise of its estimate, it is drawn at that end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowvar.report.charts import Chart, curves, keys
from lowvar.report.figures import Style
from lowvar.report.run import Curve, Run, curve, mapping, number
from lowvar.report.section import Section
from lowvar.report.text import bounds, count, plain

__all__ = ["profile_against", "profile_errors", "profile_grids", "profile_others", "profile_steps", "profile_structure"]

_FAMILIES = {
    "isotropic": ("one number", Style("muted", "v", (0, (1.2, 1.4)))),
    "pixel": ("a number a pixel", Style("orange", "s", (0, (5, 2)))),
    "dct": ("diagonal in the DCT", Style("green", "^", (0, (6, 2, 1.2, 2)))),
    "pca": ("diagonal in the data's principal components", Style("blue", "o")),
    "low-rank": ("a number and directions of the state's own", Style("purple", "D", (0, (9, 3)))),
}


def _rows(run: Run, where: str, value: Any) -> Sequence[Mapping[str, Any]]:
    found = value or []
    if not isinstance(found, list) or not all(isinstance(row, Mapping) for row in found):
        raise run.wrong("summary.json", f"{where} is not a list of objects")
    return found


def _three(run: Run, where: str, value: Any) -> tuple[float, float, float]:
    found = [number(mapping(run, "summary.json", where, value).get(k)) for k in ("value", "low", "high")]
    a, b, c = (math.nan if v is None else v for v in found)
    return a, b, c


def _reverse(run: Run) -> Mapping[str, Any]:
    return mapping(run, "summary.json", "`reverse`", run.summary.get("reverse")) if run.command == "profile" else {}


def _line(x: Sequence[float], found: Sequence[tuple[float, float, float]], clip: bool = False) -> Curve:
    order = np.argsort(np.array(x, dtype=np.float64))
    y = np.array([v for v, _, _ in found], dtype=np.float64)
    se = np.array([(high - low) / 2 / 1.959964 for _, low, high in found], dtype=np.float64)
    y = np.clip(y, 0, 1) if clip else y
    return Curve(np.array(x, dtype=np.float64)[order], y[order], se[order])


def profile_errors(run: Run) -> Section | None:
    """Errors by noise level over a linear denoiser's."""
    rows = _rows(run, "`errors`", run.summary.get("errors")) if run.command == "profile" else []
    if not rows:
        return None
    x, y = [], []
    for row in rows:
        low, high = number(row.get("logsnr_low")), number(row.get("logsnr_high"))
        x.append(((low or 0.0) + (high or 0.0)) / 2)
        y.append(_three(run, "`errors`.excess", row.get("excess")))
    legend = keys("excess", ["this network"], [Style("blue", "o")])
    worst = max(range(len(y)), key=lambda k: y[k][0])
    label = (
        f"Error over a linear denoiser's by logsnr, {len(x)} noise levels; at most {plain(y[worst][0], 2)}, at logsnr "
        f"{plain(x[worst], 2)}. Below 1 the network knows more than second moments."
    )
    svg = curves("excess", label, {"this network": _line(x, y)}, legend, ylabel="error over a linear one's", level=1.0)
    intro = (
        "A denoiser that was trained well enough at a noise level is at least as good there as the linear one. Above "
        "1 it is not: the level was left out of training, or the weights have not settled. Bars are 95% intervals."
    )
    content = {"intro": intro, "charts": [Chart(svg, "Was every noise level learned?")], "name": "excess"}
    return Section("errors", "Errors by noise level", "charts.html.j2", content)


def profile_structure(run: Run) -> Section | None:
    """What families of covariances catch of C, by noise level."""
    rows = _rows(run, "`reverse`.structures", _reverse(run).get("structures"))
    if not rows:
        return None
    x = [number(row.get("logsnr")) or 0.0 for row in rows]
    charts = []
    titles = {"state": "The covariance of every state", "table": "One covariance for all states of a level"}
    for sense, title in titles.items():
        shares = [mapping(run, "summary.json", f"`structures`.{sense}", row.get(sense)) for row in rows]
        names = [name for name in _FAMILIES if all(name in s for s in shares)]
        found = {name: [_three(run, f"`structures`.{name}", s[name]) for s in shares] for name in names}
        legend = keys(f"structure-{sense}", [_FAMILIES[n][0] for n in names], [_FAMILIES[n][1] for n in names])
        middle = len(x) // 2
        told = ", ".join(f"{_FAMILIES[n][0]} {plain(found[n][middle][0], 2)}" for n in names)
        label = f"Share of the squared covariance that is caught, by logsnr. At logsnr {plain(x[middle], 2)}: {told}."
        lines = {_FAMILIES[n][0]: _line(x, found[n], clip=True) for n in names}
        svg = curves(f"structure-{sense}", label, lines, legend, ylabel="share caught", log=False)
        charts.append(Chart(svg, title, tuple(legend)))
    states = number(rows[0].get("states"))
    content = {
        "intro": f"How much of ||C||² a family of covariances catches, from {count(states or math.nan)} states a noise "
        "level: that share of what steps without a covariance lose, it saves. What is caught of every state but not by "
        "a table takes a head that knows the state. Bars are 95% intervals.",
        "charts": charts,
        "name": "structure",
    }
    return Section("structure", "The shape of the covariance", "charts.html.j2", content)


def profile_steps(run: Run) -> Section | None:
    """What every step costs with each variance."""
    found = mapping(run, "figures.json", "`steps`", run.figure("steps")) if run.command == "profile" else {}
    if not found:
        return None
    lines, told = {}, []
    for name, entry in found.items():
        entry = mapping(run, "figures.json", f"`steps`.{name}", entry)
        where = f"`steps.{name}`"
        lines[name] = curve(run, "figures.json", where, entry.get("logsnr"), entry.get("bits"), entry.get("se"))
        total, se = number(entry.get("total")), number(entry.get("total_se"))
        half = 1.959964 * (math.nan if se is None else se)
        total = math.nan if total is None else total
        told.append((name, " ".join(bounds(total, total - half, total + half)).strip() + " bits a dimension"))
    legend = keys("steps", lines)
    label = "Bits a dimension of every reverse step by logsnr. In all: " + "; ".join(f"{n} {t}" for n, t in told) + "."
    svg = curves("steps", label, lines, legend, ylabel="bits a dimension")
    steps = number(_reverse(run).get("steps"))
    content = {
        "intro": f"Each of {count(steps or math.nan)} steps pays the divergence between its Gaussian and the one that "
        "the data ask for. All lines have the same network and the same states; the last step, to clean data, has no "
        "noise and is left out.",
        "facts": told,
        "charts": [Chart(svg, "Cost of each step", tuple(legend))],
        "name": "steps",
    }
    return Section("steps", "What each step costs", "charts.html.j2", content)


def profile_grids(run: Run) -> Section | None:
    """Path KL by number of steps, predicted."""
    rows = _rows(run, "`reverse`.predicted", _reverse(run).get("predicted"))
    if not rows:
        return None
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value, steps = number(row.get("bits")), number(row.get("steps"))
        name = f"{row.get('variance')}, grid {row.get('grid')}"
        lines.setdefault(name, []).append((steps or math.nan, math.nan if value is None else value))
    made = {}
    for name, points in lines.items():
        x, y = (np.array(v, dtype=np.float64) for v in zip(*points, strict=True))
        made[name] = Curve(x, y, np.full(len(x), math.nan))
    legend = keys("grids", made)
    last = {name: points[-1] for name, points in lines.items()}
    told = "; ".join(f"{name} {plain(y, 2)} at {count(x)} steps" for name, (x, y) in last.items())
    label = f"Predicted path KL in bits a dimension by number of steps: {told}."
    svg = curves("grids", label, made, legend, ylabel="bits above continuous time", xlabel="reverse steps")
    content = {
        "intro": "What noisy steps are predicted to lose beside continuous time, from the error curve alone: with the "
        "usual grid, and with a covariance table and the grid that is made for it. Measured scores are above.",
        "charts": [Chart(svg, "Predicted cost by number of steps", tuple(legend))],
        "name": "grids",
    }
    return Section("grids", "How many steps", "charts.html.j2", content)


def profile_others(run: Run) -> Section | None:
    """Designs for statistics, and estimators of a reward's gradient."""
    if run.command != "profile":
        return None
    tables = []
    for row in _rows(run, "`statistics`", run.summary.get("statistics")):
        lines = []
        for c in _rows(run, "`statistics`.candidates", row.get("candidates")):
            gain = number(c.get("gain"))
            lines.append([str(c.get("design")), plain(math.nan if gain is None else gain, 3), str(c.get("note"))])
        vrf, low, high = (number(row.get(k)) for k in ("vrf", "low", "high"))
        value, around = bounds(*(math.nan if v is None else v for v in (vrf, low, high)))
        caption = f"Mean of {row.get('name')}: {row.get('design')}, {value} {around} times fewer evaluations"
        tables.append({"caption": caption, "head": ["Design", "Gain in the pilot", ""], "rows": lines})
    reward = mapping(run, "summary.json", "`reward`", run.summary.get("reward"))
    lines = []
    for row in _rows(run, "`reward`.rows", reward.get("rows")):
        found = [number(row.get(k)) for k in ("variance", "low", "high", "seconds", "snr", "factor")]
        v, low, high, seconds, snr, factor = (math.nan if f is None else f for f in found)
        around = " ".join(bounds(v, low, high)).strip()
        lines.append(
            [str(row.get("name")), str(row.get("claim")), around, *(plain(f, 3) for f in (seconds, snr, factor))]
        )
    if lines:
        head = ["Estimator", "", "Variance of a run", "Seconds a batch", "Signal to noise", "Factor"]
        tables.append({"caption": f"Gradient of reward {reward.get('reward')}", "head": head, "rows": lines})
    if not tables:
        return None
    return Section("others", "Statistics and rewards", "parts.html.j2", {"intro": "", "tables": tables})


def profile_against(run: Run) -> Section | None:
    """What an earlier profile promised, and what became of it."""
    found = mapping(run, "summary.json", "`against`", run.summary.get("against")) if run.command == "profile" else {}
    rows = _rows(run, "`against`.rows", found.get("rows"))
    if not rows:
        return None
    lines = []
    for row in rows:
        cells = []
        for key in ("before", "expected", "measured"):
            value = row.get(key)
            cells.append("–" if value is None else " ".join(bounds(*_three(run, f"`against`.{key}", value))).strip())
        lines.append([str(row.get("what")), *cells, "yes" if row.get("met") else "no"])
    met = sum(bool(row.get("met")) for row in rows)
    intro = f"{met} of {len(rows)} promises of the earlier profile were kept: the measured interval reaches them."
    head = ["Figure", "Then", "Promised", "Now", "Kept"]
    table = {"caption": "The earlier verdict beside this one's figures", "head": head, "rows": lines}
    return Section("against", "Was it as promised?", "parts.html.j2", {"intro": intro, "tables": [table]})
