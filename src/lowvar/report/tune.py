"""What `lowvar tune` found: the gain and its price in sentences, reward against KL, the gradient's noise, the choice.

Reward, KL and held-out quality come from checks, all on the same runs, which training never saw; their intervals are
those of each by itself, the gain's is of the difference. The gradient's signal-to-noise ratio is measured in every
update from its parts; the chart shows means over windows of updates with 95% intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lowvar.report.charts import Chart, keys
from lowvar.report.figures import COLOURS, MUTED, Style, draw, value_axis
from lowvar.report.nouns import nouns
from lowvar.report.run import Run, mapping, number
from lowvar.report.section import Section
from lowvar.report.text import bounds, count, plain, spoken

__all__ = ["choice", "tuned", "tuning"]

Ends = tuple[float, float, float]
_WINDOWS = 12


def _is_tune(run: Run) -> bool:
    return run.command == "tune" and "reward_before" in run.summary


def _ends(run: Run, where: str, entry: Any) -> Ends:
    found = [number(mapping(run, where, "an interval", entry).get(k)) for k in ("value", "low", "high")]
    if any(x is None for x in found):
        raise run.wrong(where, f"{entry!r} is no interval")
    value, low, high = (math.nan if x is None else x for x in found)
    return value, low, high


def _summary(run: Run, key: str) -> Ends:
    return _ends(run, "summary.json", run.summary.get(key))


def _checks(run: Run) -> list[tuple[float, Mapping[str, Any]]]:
    """Updates done and intervals of every check, the model as it was first."""
    first: dict[str, Any] = {"reward": run.summary["reward_before"], "quality": run.summary.get("quality_before")}
    first["kl"] = {"value": 0.0, "low": 0.0, "high": 0.0}
    found: list[tuple[float, Mapping[str, Any]]] = [(0.0, first)]
    for record in run.records:
        at = number(record.get("update"))
        if isinstance(record.get("check"), Mapping) and at is not None:
            found.append((at + 1, record["check"]))
    return found


def tuned(run: Run) -> list[str]:
    """The result in sentences: gain, KL, quality, cost."""
    if not _is_tune(run):
        return []
    before, after, gain = (_summary(run, key) for key in ("reward_before", "reward_after", "gain"))
    name, updates = str(run.summary.get("reward")), count(number(run.summary.get("updates")) or 0.0)
    word = "rose" if gain[1] > 0 else "fell" if gain[2] < 0 else ""
    size = spoken(*gain) if gain[0] >= 0 else spoken(-gain[0], -gain[2], -gain[1])
    if word:
        first = f"The mean of {name} {word} by {size}: from {spoken(*before)} to {spoken(*after)}"
    else:
        first = f"No change of {name} can be told: it went from {spoken(*before)} to {spoken(*after)}"
    sentences = [f"{first}, in {updates} updates, by samples that training did not see."]
    kl = tuple(number(run.summary.get(k)) for k in ("kl", "kl_low", "kl_high"))
    if all(x is not None and math.isfinite(x) for x in kl):
        value, low, high = (x or 0.0 for x in kl)
        sentences.append(f"The tuned sampler is {spoken(value, low, high)} nats (KL) from the one before.")
    sentences += _quality(run)
    calls = number(run.summary.get("reward_calls"))
    if calls is not None:
        how = run.summary.get("estimator")
        sentences.append(f"It took {count(calls)} calls of the reward, by the gradient estimator “{how}”.")
    ended = {"kl": "the KL's bound", "quality": "the bound on held-out quality"}.get(str(run.summary.get("ended")))
    if ended:
        sentences.append(f"Tuning ended at {ended}.")
    return sentences


def _quality(run: Run) -> list[str]:
    if not isinstance(run.summary.get("quality_before"), Mapping):
        return []
    before, after = _summary(run, "quality_before"), _summary(run, "quality_after")
    told = f"went from {spoken(*before)} to {spoken(*after)}"
    if after[1] > before[2]:
        hacked = "part of the gain is bought with samples unlike the data, so look at them below"
        return [f"Its distance to held-out data {told}: {hacked}."]
    return [f"Its distance to held-out data {told}, which is no clear change."]


def _bars(axes: Axes, number_: int, style: Style, x: NDArray[np.float64], ends: NDArray[np.float64]) -> None:
    y, low, high = ends
    reach = np.clip(np.nan_to_num(np.stack([y - low, high - y])), 0, None)
    drawn = axes.errorbar(x, y, yerr=reach, capsize=0, elinewidth=1.1, **style.line())  # pyright: ignore[reportArgumentType]
    for i, part in enumerate([drawn.lines[0], *drawn.lines[2]]):
        if part is not None:
            part.set_gid(f"series-{number_}-{i}")


def _against_kl(run: Run) -> Chart | None:
    checks = [(at, c) for at, c in _checks(run) if c.get("kl") is not None]
    ends = [(at, _ends(run, "metrics.jsonl", c["kl"]), _ends(run, "metrics.jsonl", c["reward"])) for at, c in checks]
    ends = [entry for entry in ends if math.isfinite(entry[1][0])]
    if len(ends) < 2:
        return None
    x, y = np.array([kl for _, kl, _ in ends]), np.array([reward for _, _, reward in ends])
    style = Style("blue", "o")
    legend = keys("tune-kl", ("a check, with 95% intervals",), (style,))

    def paint(axes: Axes) -> None:
        across = np.clip(np.stack([x[:, 0] - x[:, 1], x[:, 2] - x[:, 0]]), 0, None)
        axes.errorbar(x[:, 0], y[:, 0], xerr=across, fmt="none", ecolor=COLOURS["blue"], elinewidth=1.1)
        _bars(axes, 0, style, x[:, 0], y.T)
        for i in (0, len(ends) - 1):
            text = "before" if i == 0 else f"after {count(ends[i][0])}"
            axes.annotate(text, (x[i, 0], y[i, 0]), (6, -11), textcoords="offset points", color=MUTED, fontsize=8.5)
        axes.set(xlabel="KL to the model before, nats a run", ylabel="reward")
        axes.margins(x=0.09, y=0.12)

    told = f"Reward against KL at {len(ends)} checks, from {plain(y[0, 0])} at 0 to {plain(y[-1, 0])} at "
    return Chart(draw("tune-kl", f"{told}{plain(x[-1, 0])} nats.", paint), "Reward against KL", tuple(legend))


def _held_out(run: Run) -> Chart | None:
    checks = [(at, c) for at, c in _checks(run) if isinstance(c.get("quality"), Mapping)]
    if len(checks) < 2:
        return None
    x = np.array([at for at, _ in checks])
    y = np.array([_ends(run, "metrics.jsonl", c["quality"]) for _, c in checks])
    labels, styles = ["tuned samples"], [Style("red", "s")]
    floor = run.summary.get("quality_floor")
    shown = isinstance(floor, Mapping) and (_summary(run, "quality_floor")[0] > 0 or float(y[:, 0].min()) <= 0)
    if shown:
        labels.append("data against data")
        styles.append(Style("muted", "", (0, (8, 2, 1.2, 2)), width=1.3))
    legend = keys("tune-quality", labels, styles)

    def paint(axes: Axes) -> None:
        _bars(axes, 0, styles[0], x, y.T)
        if shown:
            level = axes.axhline(_summary(run, "quality_floor")[0], **{**styles[1].line(), "marker": "None"})  # pyright: ignore[reportArgumentType]
            level.set_gid("series-1-0")
        value_axis(axes, [float(v) for v in y[:, 0]], float(np.abs(y[:, 0]).max()) / 10 or None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="update", ylabel="kernel distance (lower is better)")

    told = f"Distance to held-out data at {len(x)} checks, from {plain(y[0, 0])} to {plain(y[-1, 0])}."
    return Chart(draw("tune-quality", told, paint), "Held-out quality", tuple(legend))


def _along(run: Run) -> Chart | None:
    """Mean reward of the runs of each update."""
    found = [(number(r.get("update")), number(r.get("reward"))) for r in run.records]
    rows = [(u, v) for u, v in found if u is not None and v is not None]
    if len(rows) < 2:
        return None
    x, y = np.array(rows).T
    checks = [(at, _ends(run, "metrics.jsonl", c["reward"])) for at, c in _checks(run)]
    styles = (Style("muted", "", width=1.1), Style("blue", "o"))
    legend = keys("tune-reward", ("runs of the update, as trained", "checks"), styles)

    def paint(axes: Axes) -> None:
        (line,) = axes.plot(x + 1, y, **styles[0].line())  # pyright: ignore[reportArgumentType]
        line.set_gid("series-0-0")
        _bars(axes, 1, styles[1], np.array([at for at, _ in checks]), np.array([e for _, e in checks]).T)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="update", ylabel="reward")

    told = f"Mean reward of {len(x)} updates, from {plain(y[0])} to {plain(y[-1])}, with {len(checks)} checks."
    return Chart(draw("tune-reward", told, paint), "Reward along training", tuple(legend))


def _noise(run: Run) -> Chart | None:
    """Gradient-to-noise ratio in windows of updates."""
    found = [(number(r.get("update")), number(r.get("snr"))) for r in run.records]
    rows = [(u, s) for u, s in found if u is not None and s is not None and math.isfinite(s)]
    if len(rows) < 4:
        return None
    windows = np.array_split(np.array(rows), min(_WINDOWS, len(rows) // 4 or 1))
    x = np.array([w[:, 0].mean() + 1 for w in windows])
    mean = np.array([w[:, 1].mean() for w in windows])
    half = np.array([1.96 * w[:, 1].std(ddof=1) / math.sqrt(len(w)) for w in windows])
    style = Style("green", "^")
    legend = keys("tune-noise", ("mean of some updates, with its 95% interval",), (style,))

    def paint(axes: Axes) -> None:
        axes.axhline(0, color=MUTED, linewidth=0.9, zorder=1.2)
        _bars(axes, 0, style, x, np.stack([mean, mean - half, mean + half]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="update", ylabel="|gradient|² / its variance")

    told = f"Gradient-to-noise ratio along training, {plain(mean[0])} at first and {plain(mean[-1])} at the end."
    return Chart(draw("tune-noise", told, paint), "Gradient-to-noise ratio of a batch", tuple(legend))


def tuning(run: Run) -> Section | None:
    """How the tuning went."""
    if not _is_tune(run):
        return None
    charts = [chart for chart in (_against_kl(run), _held_out(run), _along(run), _noise(run)) if chart is not None]
    if not charts:
        return None
    config = mapping(run, "summary.json", "`config`", run.summary.get("config"))
    sampler = mapping(run, "summary.json", "`sampler`", run.summary.get("sampler"))
    facts = [
        ("Reward", str(run.summary.get("reward"))),
        ("Sampler", f"{sampler.get('kind')}, {sampler.get('steps')} steps"),
        ("Runs an update", str(config.get("batch_size"))),
        ("Learning rate", f"{config.get('lr')}"),
        ("Weights tuned", "all" if config.get("lora") is None else f"low-rank adapters, rank {config.get('lora')}"),
    ]
    content: dict[str, Any] = {
        "intro": "A reward that rises says little by itself: a policy finds what the reward forgot. So the reward "
        f"stands against the KL to the model before and beside the distance to held-out {nouns(run).many}. Checks run "
        "the sampler as it will be used; in training the last step has noise, so that it has a density. A ratio of "
        "gradient to noise above 1 says that a batch knows the direction; far below, most of an update is noise.",
        "facts": facts,
        "charts": charts,
        "name": "tuning",
    }
    return Section("tuning", "What it cost", "charts.html.j2", content)


def choice(run: Run) -> Section | None:
    """What the pilot measured, and what "auto" chose."""
    found = run.summary.get("choice")
    if not _is_tune(run) or not isinstance(found, Mapping):
        return None
    rows = found.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise run.wrong("summary.json", "`choice`.rows is no list of objects")
    shown, least = [], _least(rows)
    for row in rows:
        value, around = bounds(*_ends(run, "summary.json", {**row, "value": row.get("variance")}))
        work = number(row.get("work"))
        shown.append(
            {
                "name": str(row.get("estimator")),
                "chosen": str(row.get("estimator")) == str(found.get("estimator")),
                "bias": str(row.get("bias")),
                "value": value,
                "interval": around,
                "evaluations": plain(number(row.get("evaluations")) or math.nan, 3),
                "work": "–" if work is None or not least else plain(work / least, 3),
            }
        )
    out = mapping(run, "summary.json", "`choice`.left_out", found.get("left_out"))
    content = {
        "rows": shown,
        "left_out": [(str(name), str(reason)) for name, reason in out.items()],
        "intro": "Every estimator ran on the same noise. All that may be chosen are unbiased, so they have one mean, "
        "and what ranks them is variance times network evaluations: what a fixed accuracy costs. Intervals are 95%; "
        "where they overlap the pilot cannot tell two estimators apart, and either will do.",
    }
    return Section("choice", "Which gradient estimator, and why", "choice.html.j2", content)


def _least(rows: list[Any]) -> float:
    works = [w for w in (number(row.get("work")) for row in rows) if w is not None and w > 0]
    return min(works, default=0.0)
