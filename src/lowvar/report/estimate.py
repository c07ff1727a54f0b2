"""What `lowvar estimate` found: the value in words, how its interval narrowed, the planner's table, error images.

Two charts by evaluations spent: the value with its 95% interval (of a number), and the interval's half width beside
that of independent sampling, h_n = h (n* / n)^(1/2), n* being the evaluations it needs for the same h.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from lowvar.report.charts import Chart, Key, keys
from lowvar.report.figures import COLOURS, MUTED, Style, draw, log_axis
from lowvar.report.grids import Sheet
from lowvar.report.run import Run, mapping, number
from lowvar.report.section import Section
from lowvar.report.text import bounds, count, plain, spoken

__all__ = ["estimated", "estimation"]

_SIDE = 220  # pixels on the page along an image's longer side
_UNITS = "network evaluations spent"


def _is_estimate(run: Run) -> bool:
    return run.command == "estimate" and "statistic" in run.summary


def _is_score(run: Run) -> bool:
    """Whether it is a score that is no mean."""
    return "at_n" in run.summary


def _figure(run: Run, key: str) -> float:
    found = number(run.summary.get(key))
    if found is None:
        raise run.wrong("summary.json", f"`{key}` is {run.summary.get(key)!r}, not a number")
    return found


def _name(run: Run) -> str:
    name, against = str(run.summary.get("statistic", "")), run.summary.get("against")
    if _is_score(run):
        data = mapping(run, "summary.json", "`config`", run.summary.get("config")).get("data")
        return f"the {name} distance to {data}, its bias taken off,"
    name = "the samples" if name == "mean" else name
    return f"the difference in {name} to {against}" if against else f"the mean of {name}"


def estimated(run: Run) -> list[str]:
    """The result in sentences."""
    if not _is_estimate(run):
        return []
    value, low, high, half, nfe = (_figure(run, k) for k in ("value", "low", "high", "half_width", "nfe"))
    name = _name(run)
    if math.isfinite(value):
        first = f"{name[:1].upper()}{name[1:]} is {spoken(value, low, high)}"
    else:
        shape = run.summary.get("shape")
        size = " × ".join(str(n) for n in shape) if isinstance(shape, list) else ""
        first = f"{name[:1].upper()}{name[1:]}, {size} numbers, is known to within {plain(half)}"
    sentences = [f"{first}, for {count(nfe)} network evaluations by the design {run.summary.get('design')}."]
    needed, vrf, vrf_low, vrf_high = (_figure(run, k) for k in ("nfe_independent", "vrf", "vrf_low", "vrf_high"))
    if math.isfinite(needed) and math.isfinite(vrf) and not _is_score(run):
        sentences.append(
            f"Independent sampling would need {count(needed)} for the same interval: a factor of "
            f"{spoken(vrf, vrf_low, vrf_high)}."
        )
    if run.summary.get("reached") is False:
        sentences.append("The budget ended the run before the tolerance was reached.")
    if isinstance(run.summary.get("undercovers"), str):
        sentences.append(f"The interval may cover less than it says: {run.summary['undercovers']}.")
    if run.summary.get("against"):
        a, b, factor = (_figure(run, k) for k in ("value_a", "value_b", "factor"))
        if math.isfinite(a + b):
            sentences.append(f"The two values are {plain(a)} and {plain(b)}.")
        if math.isfinite(factor):
            sentences.append(f"Independent runs of both would need {plain(factor, 2)} times the samples.")
    return sentences


def _column(run: Run, key: str) -> NDArray[np.float64]:
    found = [number(record.get(key)) for record in run.records]
    if any(value is None for value in found):
        raise run.wrong("metrics.jsonl", f"`{key}` is not a number in every record")
    return np.array([math.nan if value is None else value for value in found])


def _spent(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(10, subs=subs, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
    axes.set_xlabel(_UNITS)


def _values(run: Run) -> Chart | None:
    if not all("value" in record for record in run.records):
        return None
    x, y, low, high = (_column(run, k) for k in ("nfe", "value", "low", "high"))
    legend = keys("value", ("estimate with its 95% interval",), (Style("blue", "o"),))

    def paint(axes: Axes) -> None:
        band = axes.fill_between(x, low, high, color=COLOURS["blue"], alpha=0.16, linewidth=0)
        band.set_gid("series-0-band")
        (line,) = axes.plot(x, y, **legend[0].style.line())  # pyright: ignore[reportArgumentType]
        line.set_gid("series-0-0")
        axes.axhline(y[-1], color=MUTED, linewidth=0.9, zorder=1.2)
        _spent(axes)
        axes.set_ylabel("estimate")

    ends = spoken(float(y[-1]), float(low[-1]), float(high[-1]))
    svg = draw("estimate-value", f"The estimate by evaluations spent, {len(x)} records; at the end {ends}.", paint)
    return Chart(svg, "The estimate as it narrowed", tuple(legend))


def _widths(run: Run) -> Chart | None:
    x, h = _column(run, "nfe"), _column(run, "half_width")
    good = h > 0
    if not good.any():  # an exact design: there is no interval to narrow
        return None
    needed, tol = _figure(run, "nfe_independent"), number(run.summary.get("tol"))
    labels = ["half width of the interval"]
    styles = [Style("blue", "o")]
    alone = math.isfinite(needed) and needed > 0
    if alone:
        labels.append("independent sampling, predicted")
        styles.append(Style("red", "", (0, (5, 2))))
    wanted = tol if tol is not None and math.isfinite(tol) else None
    if wanted is not None:
        labels.append("tolerance")
        styles.append(Style("muted", "", (0, (1.2, 1.6)), width=1.3))
    legend: list[Key] = keys("width", labels, styles)

    def paint(axes: Axes) -> None:
        (line,) = axes.plot(x[good], h[good], **styles[0].line())  # pyright: ignore[reportArgumentType]
        line.set_gid("series-0-0")
        shown = list(h[good])
        if alone:
            across = np.geomspace(x[good][0], max(x[good][-1], needed), 32)
            own = h[good][-1] * np.sqrt(needed / across)
            (other,) = axes.plot(across, own, **styles[1].line())  # pyright: ignore[reportArgumentType]
            other.set_gid("series-1-0")
            shown += [float(own[0]), float(own[-1])]
        if wanted is not None:
            level = axes.axhline(wanted, **{**styles[-1].line(), "marker": "None"})  # pyright: ignore[reportArgumentType]
            level.set_gid(f"series-{len(styles) - 1}-0")
            shown.append(wanted)
        axes.set_ylim(min(shown) / 1.3, max(shown) * 1.3)
        log_axis(axes)
        _spent(axes)
        axes.set_ylabel("half width")

    text = f"Half width of the 95% interval by evaluations spent, {plain(float(h[-1]))} at the end."
    return Chart(draw("estimate-width", text, paint), "How the interval narrowed", tuple(legend))


def _picture(label: str, image: NDArray[np.floating], low: float, high: float, alt: str, *, heat: bool) -> Sheet:
    """One image (C, h, w) with its scale, enlarged without smoothing."""
    share = np.clip((np.nan_to_num(image) - low) / max(high - low, 1e-12), 0, 1)
    if heat:
        shown = colormaps["viridis"](share.mean(0))[..., :3]
    else:
        shown = share.transpose(1, 2, 0) if len(share) == 3 else np.repeat(share[0][..., None], 3, -1)
    picture = Image.fromarray(np.round(255 * shown).astype(np.uint8), "RGB")
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    scale = max(1, round(_SIDE / max(picture.size)))
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Sheet(label, uri, scale * picture.width, scale * picture.height, alt)


def _pictures(run: Run) -> list[Sheet]:
    """Value and standard error of an image."""
    arrays = run.estimate or {}
    value, se = arrays.get("value"), arrays.get("se")
    if value is None or se is None or value.ndim != 3 or value.shape[0] not in (1, 3) or value.shape != se.shape:
        return []
    low, high = (-1.0, 1.0) if float(np.abs(value).max()) <= 1 else (float(value.min()), float(value.max()))
    top = float(se.max())
    first = _picture("estimate", value, low, high, "the estimated image", heat=False)
    error = _picture(
        f"standard error, from 0 (dark) to {plain(top)} (bright)",
        se,
        0.0,
        top,
        f"standard errors up to {plain(top)}",
        heat=True,
    )
    return [first, error]


def _rows(run: Run) -> tuple[str, list[dict[str, str]]]:
    """The planner's sentence, and its table."""
    decision = mapping(run, "summary.json", "`decision`", run.summary.get("decision"))
    rows = []
    candidates = decision.get("candidates") or []
    if not isinstance(candidates, list) or not all(isinstance(c, Mapping) for c in candidates):
        raise run.wrong("summary.json", "the candidates of `decision` are not a list of objects")
    for c in candidates:
        gain, nfe = (number(c.get(k)) for k in ("gain", "nfe"))
        rows.append(
            {
                "design": str(c.get("design")),
                "gain": "–" if gain is None or math.isnan(gain) else plain(gain, 3),
                "nfe": "–" if nfe is None or math.isnan(nfe) else count(nfe),
                "note": str(c.get("note")),
            }
        )
    return str(decision.get("sentence") or ""), rows


def estimation(run: Run) -> Section | None:
    """How the estimate came about."""
    if not _is_estimate(run):
        return None
    sentence, rows = _rows(run)
    charts = [chart for chart in (_values(run), _widths(run)) if chart is not None] if run.records else []
    spent = _figure(run, "samples")
    config = mapping(run, "summary.json", "`config`", run.summary.get("config"))
    scheduler = mapping(run, "summary.json", "`scheduler`", run.summary.get("scheduler"))
    sampler = config.get("sampler") or scheduler.get("sampler")
    facts = [
        ("Statistic", str(run.summary.get("statistic"))),
        ("Sampler", f"{sampler}, {config.get('steps')} steps"),
        ("Design", str(run.summary.get("design"))),
        ("Samples", count(spent)),
        ("Half width", bounds(_figure(run, "half_width"), math.nan, math.nan)[0]),
    ]
    content: dict[str, Any] = {
        "facts": facts,
        "charts": charts,
        "sentence": sentence[:1].upper() + sentence[1:],
        "said": _is_score(run),
        "rows": rows,
        "predicted": any(row["nfe"] != "–" for row in rows),
        "pictures": _pictures(run),
    }
    return Section("estimate", "The estimate", "estimate.html.j2", content)
