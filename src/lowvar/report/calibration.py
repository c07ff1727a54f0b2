"""The sections on the calibrated variance: error curve, standardised residuals, cost of the steps in bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowvar.report.charts import Chart, curves, keys
from lowvar.report.figures import Style
from lowvar.report.nouns import nouns
from lowvar.report.run import Curve, Run, curve, mapping, number
from lowvar.report.section import Section
from lowvar.report.tables import bars
from lowvar.report.text import bounds, plain

__all__ = ["budget", "error_curve", "mmse_curves", "residuals"]

_FIGURES = "figures.json"


def mmse_curves(run: Run) -> dict[str, Curve] | None:
    """The curves mmse, twin and analytic as far as the run has them; None without the first."""
    found, file = run.figure("mmse"), _FIGURES
    if found is None:
        if "mmse" not in run.summary:
            return None
        file = "summary.json"
        found = {"logsnr": run.summary.get("logsnr"), "mmse": run.summary["mmse"], "se": run.summary.get("mmse_se")}
    found = mapping(run, file, "`mmse`", found)
    lines = {"mmse": curve(run, file, "`mmse`", found.get("logsnr"), found.get("mmse"), found.get("se"))}
    for key in ("twin", "analytic"):
        if found.get(key) is not None:
            lines[key] = curve(run, file, f"`mmse.{key}`", found.get("logsnr"), found[key])
    return lines


def error_curve(run: Run) -> Section | None:
    """The mmse curve with standard errors, beside the twin's and the analytic variance."""
    found = mmse_curves(run)
    if found is None:
        return None
    names = {"mmse": "this network", "twin": "Gaussian twin", "analytic": "analytic variance"}
    styles = [Style("blue", "o"), Style("ink", "", (0, (5, 2))), Style("red", "", (0, (1.2, 1.4)))]
    chosen = [(names[key], style) for key, style in zip(names, styles, strict=True) if key in found]
    legend = keys("mmse", [name for name, _ in chosen], [style for _, style in chosen])
    line, words = found["mmse"], nouns(run)
    label = (
        f"Mean squared error a dimension against logsnr, {len(line.x)} noise levels, from {plain(line.y[0])} to "
        f"{plain(line.y[-1])}."
        if len(line.x)
        else "No values."
    )
    svg = curves("mmse", label, {names[key]: value for key, value in found.items()}, legend, ylabel="error a dimension")
    content = {
        "intro": f"How well the network recovers a clean {words.one} from a noisy one, by noise level. The Gaussian "
        "twin is the best that a Gaussian with the data's mean and covariance can do: where the network is below it, "
        "it knows more than second moments. The analytic variance (Bao et al. 2022) is derived from the size of the "
        "predicted noise. Bars are 95% intervals.",
        "charts": [Chart(svg, "Mean squared error by noise level", tuple(legend))],
        "name": "mmse",
    }
    return Section("mmse", "The error curve", "charts.html.j2", content)


def residuals(run: Run) -> Section | None:
    """Standardised residuals of each calibrated variance, which should be 1."""
    found = mapping(run, _FIGURES, "`standardised`", run.figure("standardised"))
    if not found:
        return None
    lines = {}
    for name, entry in found.items():
        where = f"`standardised.{name}`"
        entry = mapping(run, _FIGURES, where, entry)
        lines[name] = curve(run, _FIGURES, where, entry.get("logsnr"), entry.get("value"), entry.get("se"))
    legend = keys("residuals", lines)
    worst = {name: float(np.nanmax(np.abs(line.y - 1))) for name, line in lines.items() if np.isfinite(line.y).any()}
    label = "Standardised squared residuals against logsnr; 1 is calibrated. " + " ".join(
        f"{name}: at most {plain(100 * off, 2)}% off." for name, off in worst.items()
    )
    values = [float(y) for line in lines.values() for y in line.y if math.isfinite(y)]
    wide = bool(values) and min(values) > 0 and max(values) / min(values) > 4
    svg = curves(
        "residuals", label, lines, legend, ylabel="squared residual / variance", log=wide, level=1.0, within=0.1
    )
    content = {
        "intro": f"Squared error on held-out {nouns(run).many} divided by the variance that was promised for it. "
        "1 means that the variance is right, above 1 that it is too small, below 1 that it is too large. The grey "
        "band is 10% around 1; bars are 95% intervals.",
        "charts": [Chart(svg, "Standardised residuals by noise level", tuple(legend))],
        "facts": [(name, f"at most {plain(100 * off, 2)}% from 1") for name, off in worst.items()],
        "name": "residuals",
    }
    return Section("residuals", "Is the variance right?", "charts.html.j2", content)


_TONES = ("prior", "noisy steps", "middle steps", "clean steps", "decoder")


def _bar(name: str, line: Curve, entry: Mapping[str, Any]) -> tuple[str, list[tuple[str, float]], tuple[str, str]]:
    low, high = (line.x[0], line.x[-1]) if len(line.x) else (0.0, 0.0)
    third = np.clip(np.floor(3 * (line.x - low) / max(high - low, 1e-12)), 0, 2)
    parts = [(_TONES[1 + i], float(np.nansum(line.y[third == i]))) for i in range(3)]
    ends = {key: number(entry.get(key)) for key in ("prior", "decoder")}
    parts = [("prior", ends["prior"] or 0.0), *parts, ("decoder", ends["decoder"] or 0.0)]
    total, se = number(entry.get("total")), number(entry.get("total_se"))
    total = sum(value for _, value in parts if math.isfinite(value)) if total is None or math.isnan(total) else total
    half = 1.959964 * (math.nan if se is None else se)
    return name, parts, bounds(total, total - half, total + half)


DENSITY = (
    " The data have no grey levels, so that the decoder is a density and not the probability of a level: these bits "
    "compare with others on the same data only, and may be negative."
)


def _is_density(run: Run) -> bool:
    """Whether the run says that its data have no levels."""
    data = run.summary.get("data")
    return isinstance(data, Mapping) and "levels" in data and data["levels"] is None


def budget(run: Run) -> Section | None:
    """Where the bits of the likelihood bound go, by step, for each variance."""
    found = mapping(run, _FIGURES, "`budget`", run.figure("budget"))
    if not found:
        return None
    lines, rows = {}, []
    for name, entry in found.items():
        where = f"`budget.{name}`"
        entry = mapping(run, _FIGURES, where, entry)
        lines[name] = curve(run, _FIGURES, where, entry.get("logsnr"), entry.get("bits"), entry.get("se"))
        rows.append(_bar(name, lines[name], entry))
    legend = keys("budget", lines)
    label = "Bits per dimension of every reverse step against logsnr. Totals: " + "; ".join(
        f"{name} {' '.join(total).strip()}" for name, _, total in rows
    )
    svg = curves("budget", label, lines, legend, ylabel="bits per dimension")
    content = {
        "intro": "The bound on the negative log-likelihood is a sum over reverse steps: each pays the divergence "
        "between its Gaussian kernel and the true one. A variance that fits pays less, at the same mean and the same "
        "network. Fewer bits are better." + (DENSITY if _is_density(run) else ""),
        "charts": [Chart(svg, "Cost of each step", tuple(legend))],
        "bars": bars(rows),
        "tones": _TONES,
        "name": "budget",
    }
    return Section("budget", "What each step costs", "charts.html.j2", content)
