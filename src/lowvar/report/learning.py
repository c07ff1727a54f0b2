"""Is the network still learning, how much is left, would a larger batch pay: sentences and charts of a training run.

What is said is read off the last validation's record: its change since the validation before, on common noise; its
error beside the bounds of the least error that any network can have; the gradient noise scale. Records of other
versions, which lack them, leave them out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lowvar.report.charts import Chart, curves, keys
from lowvar.report.figures import Style
from lowvar.report.nouns import nouns
from lowvar.report.run import Curve, Run, curve, mapping, number
from lowvar.report.text import count, plain, spoken

__all__ = ["learning", "least_error", "still_learning", "weighting"]

_LOG = "metrics.jsonl"


def _numbers(run: Run, values: Mapping[str, Any], *names: str) -> list[float]:
    found = [number(values.get(name)) for name in names]
    if any(value is None for value in found):
        raise run.wrong(_LOG, f"one of {', '.join(names)} is not a number")
    return [value for value in found if value is not None]


def _change(run: Run, record: Mapping[str, Any]) -> str:
    change = mapping(run, _LOG, "`change`", record.get("change"))
    if not change:
        return ""
    since, value, low, high = _numbers(run, change, "since", "value", "low", "high")
    now = count(number(record.get("update")) or math.nan)
    where = f"between updates {count(since)} and {now}"
    words = nouns(run)
    with_interval = f"on the same {words.many}, times and noise"
    if high < 0:
        return (
            f"It is still learning: {where} the validation loss fell by {spoken(-value, -high, -low)}, {with_interval}."
        )
    if low > 0:
        return (
            f"It gets worse on {words.many} that it has not seen: {where} the validation loss rose by "
            f"{spoken(value, low, high)}, {with_interval}."
        )
    return f"No change can be told {where}: the validation loss moved by {spoken(value, low, high)}, {with_interval}."


def _gap(run: Run, record: Mapping[str, Any]) -> str:
    if record.get("optimum_low") is None or record.get("optimum_high") is None:
        return ""
    error, low, high, least, linear = _numbers(
        run, record, "validation_error", "error_low", "error_high", "optimum_low", "optimum_high"
    )
    told = f"Its squared error, {spoken(error, low, high)}, "
    if error < linear:
        return (
            f"{told}is at most {plain(max(error - least, 0.0), 2)} above the least that any network can reach on such "
            f"data (which is at least {plain(least)}), and below the best linear denoiser's, {plain(linear)}."
        )
    return f"{told}is not below the best linear denoiser's, {plain(linear)}: little has been learnt yet."


def _batch(run: Run, record: Mapping[str, Any]) -> str:
    advice = mapping(run, _LOG, "`noise_scale`", record.get("noise_scale")).get("advice")
    return f"{advice[:1].upper()}{advice[1:]}." if isinstance(advice, str) and advice else ""


def _last(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    checked = [record for record in records if record.get("validation_loss") is not None]
    return checked[-1] if checked else {}


def still_learning(run: Run) -> list[str]:
    """Whether the loss fell between the last two validations, in a sentence; none without two."""
    return [sentence for sentence in [_change(run, _last(run.records))] if sentence]


def learning(run: Run, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the last validation says, in up to three sentences: learning, distance to the optimum, batch size."""
    last = _last(records)
    return [sentence for sentence in (_change(run, last), _gap(run, last), _batch(run, last)) if sentence]


def least_error(run: Run, record: Mapping[str, Any]) -> Chart | None:
    """The error by noise level between the bounds of the least error; None for a record without them."""
    bins = record.get("bins")
    if not isinstance(bins, list) or not all(isinstance(b, Mapping) and "optimum_low" in b for b in bins) or not bins:
        return None
    x = [b.get("logsnr") for b in bins]
    names = ("this network", "best linear denoiser", "no network is below")
    styles = (Style("blue", "o"), Style("ink", "", (0, (5, 2))), Style("green", "", (0, (1.2, 1.4))))
    legend = keys("least", names, styles)
    where = f"the list of bins of update {record.get('update')}"
    columns = [("error", "error_se"), ("optimum_high", ""), ("optimum_low", "")]
    lines: dict[str, Curve] = {}
    for name, (y, se) in zip(names, columns, strict=True):
        lines[name] = curve(run, _LOG, where, x, [b.get(y) for b in bins], [b.get(se) for b in bins] if se else None)
    ratio = lines[names[0]].y - lines[names[2]].y
    label = (
        f"Squared error by logsnr between its bounds, after {count(number(record.get('update')) or math.nan)} updates. "
        + (
            f"Furthest above the lower bound: {plain(float(np.nanmax(ratio)), 2)} at logsnr "
            f"{plain(float(lines[names[0]].x[int(np.nanargmax(ratio))]), 2)}."
            if np.isfinite(ratio).any()
            else "No values."
        )
    )
    svg = curves("least", label, lines, legend, ylabel="squared error of the prediction", log=False)
    return Chart(svg, "What is left to learn, by noise level", tuple(legend))


def weighting(run: Run) -> Chart | None:
    """What the objective weighs every noise level with, beside the other weightings; None where it is not recorded."""
    file = "figures.json"
    found = mapping(run, file, "`weighting`", run.figure("weighting"))
    if not found:
        return None
    relative = mapping(run, file, "`weighting.relative`", found.get("relative"))
    chosen = str(found.get("chosen"))
    if chosen not in relative:
        raise run.wrong(file, f"`weighting.relative` lacks the chosen weighting {chosen!r}")
    names = [chosen, *(name for name in relative if name != chosen)]
    labels = {name: f"{name} (this run)" if name == chosen else name for name in names}
    dashes = ((0, (5, 2)), (0, (1.2, 1.4)), (0, (6, 2, 1.2, 2)), (0, (9, 3)))
    tones = ("ink", "orange", "green", "purple")
    styles = [Style("blue", "", width=2.4)]
    styles += [Style(tones[i % 4], "", dashes[i % 4], width=1.3) for i in range(len(names) - 1)]
    legend = keys("weighting", labels.values(), styles)
    lines = {
        labels[name]: curve(run, file, f"`weighting.relative.{name}`", found.get("logsnr"), relative[name])
        for name in names
    }
    own = lines[labels[chosen]]
    top, bottom = (int(f(own.y)) for f in (np.nanargmax, np.nanargmin)) if np.isfinite(own.y).any() else (0, 0)
    said = (
        f"the same at every level, {plain(float(own.y[0]))}"
        if len(own.y) and own.y[top] - own.y[bottom] < 1e-6
        else f"from {plain(float(own.y[bottom]))} at logsnr {plain(float(own.x[bottom]), 2)} to "
        f"{plain(float(own.y[top]))} at logsnr {plain(float(own.x[top]), 2)}"
        if len(own.y)
        else "no values"
    )
    label = f"Weight of every noise level over the plain loss's, {len(names)} weightings. {chosen} (this run): {said}."
    svg = curves("weighting", label, lines, legend, ylabel="weight / plain loss's")
    return Chart(svg, "What the objective weighs", tuple(legend))
