"""What `lowvar profile` found: the verdict first, then where the variance comes from, then what every technique does.

The stacked bars show E[V_x(t) + V_eps(t) + V_x,eps(t)] by noise level and the times' own share beside them, in parts of
the whole variance: an estimate below 0, which is one of 0 with its noise, is drawn as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from lowvar.report.charts import Chart, keys
from lowvar.report.figures import COLOURS, Style, draw
from lowvar.report.nouns import nouns
from lowvar.report.run import Run, mapping, number
from lowvar.report.section import Section
from lowvar.report.text import bounds, count, plain, spoken

__all__ = ["profile_sources", "profile_techniques", "profile_verdict"]

_NAMES = {"x": "{many}", "t": "times", "eps": "noise"}
_STYLES = {
    "x": Style("blue", "s"),
    "eps": Style("orange", "s"),
    "x,eps": Style("purple", "s"),
    "t": Style("green", "s"),
}


def _is_profile(run: Run) -> bool:
    return run.command == "profile" and isinstance(run.summary.get("verdict"), list)


def _has_shares(run: Run) -> bool:
    return _is_profile(run) and isinstance(run.summary.get("shares"), Mapping)


def _rows(run: Run, key: str) -> Sequence[Mapping[str, Any]]:
    found = run.summary.get(key) or []
    if not isinstance(found, list) or not all(isinstance(row, Mapping) for row in found):
        raise run.wrong("summary.json", f"`{key}` is not a list of objects")
    return found


def _interval(run: Run, where: str, value: Any) -> tuple[float, float, float]:
    """Value, low and high; an end that is missing is none."""
    found = [number(mapping(run, "summary.json", where, value).get(k)) for k in ("value", "low", "high")]
    a, b, c = (math.nan if v is None else v for v in found)
    return a, b, c


def _source(run: Run, u: str) -> str:
    """A set of draws in words."""
    many = nouns(run).many
    return " × ".join(_NAMES[d].format(many=many) for d in u.split(","))


def _scale_in_words(scale: tuple[float, float, float], many: str) -> str:
    value, low, high = scale
    if math.isfinite(value) and math.isfinite(high):
        return f"The gradient noise scale is {spoken(value, low, high)} {many}."
    if low >= 1:
        return f"The gradient noise scale is at least {plain(low, 2)} {many}: the mean gradient is lost in its noise."
    return "The gradient noise scale cannot be told: give it more time."


def profile_verdict(run: Run) -> Section | None:
    """What to do, and what is not worth doing."""
    if not _is_profile(run):
        return None
    lines = _rows(run, "verdict")
    rows = [
        {k: str(line.get(k) or "") for k in ("do", "expect", "command")} | {"worth": bool(line.get("worth"))}
        for line in lines
    ]
    faults = sum(bool(line.get("fault")) for line in lines)
    sentences = (
        [] if not faults else [f"{'One thing is' if faults == 1 else f'{faults} things are'} wrong, named first."]
    )
    if _has_shares(run):
        shares = mapping(run, "summary.json", "`shares`", run.summary.get("shares"))
        largest = max(shares, key=lambda u: _interval(run, f"`shares`.{u}", shares[u])[0])
        value, low, high = _interval(run, f"`shares`.{largest}", shares[largest])
        words = f"{_source(run, largest)}{' together' if ',' in largest else ''}"
        scale = _interval(run, "`noise_scale`", run.summary.get("noise_scale"))
        sentences += [
            f"The largest part of a training gradient's variance is that of {words}: {spoken(value, low, high)} of it.",
            _scale_in_words(scale, nouns(run).many),
        ]
    notes = run.summary.get("notes")
    content = {
        "notes": [str(note) for note in notes] if isinstance(notes, list) else [],
        "sentences": sentences,
        "worth": [row for row in rows if row["worth"]],
        "rest": [row for row in rows if not row["worth"]],
    }
    return Section("verdict", "Verdict", "verdict.html.j2", content)


def _stacked(run: Run) -> Chart:
    levels = _rows(run, "levels")
    sources = ("x", "eps", "x,eps")
    shares = mapping(run, "summary.json", "`shares`", run.summary.get("shares"))
    own = max(_interval(run, "`shares`.t", shares.get("t"))[0], 0.0)
    legend = keys("sources", [_source(run, u) for u in (*sources, "t")], [_STYLES[u] for u in (*sources, "t")])
    heights = {u: [max(_interval(run, f"`levels`.{u}", row.get(u))[0], 0.0) for row in levels] for u in sources}
    edges = [(number(row.get("logsnr_low")), number(row.get("logsnr_high"))) for row in levels]
    labels = ["" if a is None or b is None else f"{plain((a + b) / 2, 2)}" for a, b in edges]

    def paint(axes: Axes) -> None:
        below = [0.0] * len(levels)
        for i, u in enumerate(sources):
            for k, h in enumerate(heights[u]):
                (bar,) = axes.bar(k, h, 0.82, below[k], color=COLOURS[_STYLES[u].colour], linewidth=0)
                bar.set_gid(f"series-{i}-{k}")
                below[k] += h
        (bar,) = axes.bar(len(levels) + 0.5, own, 0.82, color=COLOURS[_STYLES["t"].colour], linewidth=0)
        bar.set_gid("series-3-0")
        axes.set_xticks([*range(len(levels)), len(levels) + 0.5], [*labels, "between"])
        axes.set_xlabel("logsnr: noise at the right, then the times' own share")
        axes.set_ylabel("share of the variance")
        axes.grid(visible=False, axis="x")

    total = {u: sum(heights[u]) for u in sources}
    spoken_total = ", ".join(f"{_source(run, u)} {plain(v, 2)}" for u, v in total.items())
    told = f"Shares of the variance by noise level. In all: {spoken_total}, times {plain(own, 2)}."
    svg = draw("profile-sources", told, paint)
    return Chart(svg, "Where the variance comes from, by noise level", tuple(legend))


def profile_sources(run: Run) -> Section | None:
    """Shares by source, by noise level and by layer group."""
    if not _has_shares(run):
        return None
    shares = mapping(run, "summary.json", "`shares`", run.summary.get("shares"))
    rows = []
    for u in sorted(shares, key=lambda u: -_interval(run, f"`shares`.{u}", shares[u])[0]):
        value, around = bounds(*_interval(run, f"`shares`.{u}", shares[u]))
        rows.append({"name": _source(run, u), "value": value, "interval": around})
    groups = []
    for row in _rows(run, "groups"):
        value, around = bounds(*_interval(run, "`groups`.variance", row.get("variance")))
        parts = mapping(run, "summary.json", "`groups`.shares", row.get("shares"))
        largest = max(parts, key=lambda u: _interval(run, f"`groups`.{u}", parts[u])[0]) if parts else ""
        groups.append(
            {
                "name": str(row.get("name")),
                "value": value,
                "interval": around,
                "most": _source(run, largest) if largest else "–",
            }
        )
    blocks, directions = (number(run.summary.get(k)) for k in ("blocks", "directions"))
    how = "" if not directions else f", projected on {count(directions)} random directions each"
    content = {
        "rows": rows,
        "groups": groups,
        "charts": [_stacked(run)],
        "intro": f"From {count(blocks or math.nan)} crossed blocks of 8 gradients{how}: 2 {nouns(run).many}, 2 times "
        "and 2 noises in all combinations. A share is what a perfect treatment of that source alone would take away; × "
        "is an interaction. Shares sum to 1, and one below 0 is one of 0 with its noise.",
    }
    return Section("sources", "Where the variance comes from", "profile.html.j2", content)


def profile_techniques(run: Run) -> Section | None:
    """Every technique, with its interval and its price."""
    if not _is_profile(run) or not _rows(run, "techniques"):
        return None
    rows = []
    for row in _rows(run, "techniques"):
        found = [number(row.get(k)) for k in ("vrf", "low", "high", "cost")]
        vrf, low, high, cost = (math.nan if v is None else v for v in found)
        value, around = bounds(vrf, low, high)
        rows.append(
            {
                "name": str(row.get("name")),
                "value": value if vrf < 1000 else "above 1,000",
                "interval": around if vrf < 1000 else "",
                "cost": plain(cost, 3),
                "verdict": str(row.get("verdict")),
            }
        )
    replicates = number(run.summary.get("replicates"))
    batch = number(run.summary.get("batch_size"))
    content = {
        "rows": rows,
        "intro": f"Variance of a batch of {count(batch or math.nan)} with plain draws over that with the technique, at "
        f"equal network evaluations, from {count(replicates or math.nan)} batches of each; and the time of a batch "
        "over plain's. All of these leave the expected gradient as it is.",
    }
    return Section("techniques", "What each technique does", "techniques.html.j2", content)
