"""The sections of a report: each a function from a run to a `Section`, or to None where the run has nothing for it.

A new command adds a function and, where the existing ones do not serve, a template; `SECTIONS` is their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowvar.report.answer import answer
from lowvar.report.calibration import budget, error_curve, residuals
from lowvar.report.charts import Chart, curves, keys, quality, sampler_keys, updates
from lowvar.report.estimate import estimation
from lowvar.report.figures import Style
from lowvar.report.grids import sheets
from lowvar.report.learning import learning, least_error, weighting
from lowvar.report.nouns import Nouns, nouns
from lowvar.report.profile import profile_sources, profile_techniques, profile_verdict
from lowvar.report.profile_parts import (
    profile_against,
    profile_errors,
    profile_grids,
    profile_others,
    profile_steps,
    profile_structure,
)
from lowvar.report.run import Curve, Run, curve, mapping, number
from lowvar.report.scores import Board, board, steps_text
from lowvar.report.section import Section
from lowvar.report.tables import groups, metrics_of
from lowvar.report.text import count, flat, plain
from lowvar.report.tune import choice, tuning

__all__ = ["SECTIONS", "samples", "scores_against_nfe", "scores_table", "settings", "training"]


def samples(run: Run) -> Section | None:
    """Contact sheets: data first, then the samplers by number of steps."""
    data, found = sheets(run.grids or {})
    if data is None and not found:
        return None
    shown = [{"title": "" if math.isinf(g.steps) else steps_text([g.steps]), "sheets": g.sheets} for g in found]
    return Section("samples", "Samples", "samples.html.j2", {"data": data, "groups": shown})


def _about(run: Run, scores: Board) -> list[tuple[str, str]]:
    about = mapping(run, "figures.json", "`about`", run.figure("about"))
    return [
        (label, str(about[label.partition(" (")[0]])) for label in scores.labels if label.partition(" (")[0] in about
    ]


def scores_against_nfe(run: Run) -> Section | None:
    """Quality against network evaluations, one panel a metric, and what the metrics mean."""
    scores = board(run)
    if scores is None:
        return None
    legend = sampler_keys(scores)
    content = {
        "intro": "Every panel shows one metric; lower is better on all. Bars are 95% intervals. Lines of lowvar are "
        "solid with filled markers, peers are dashed with hollow ones.",
        "legend": legend,
        "charts": [quality(scores, key, legend) for key in scores.metrics],
        "about": _about(run, scores),
        "metrics": metrics_of(scores, nouns(run)),
        "name": "quality",
    }
    return Section("quality", "Quality against cost", "charts.html.j2", content)


def scores_table(run: Run) -> Section | None:
    """Every score with its interval."""
    scores = board(run)
    if scores is None:
        return None
    grids = sorted({score.grid for score in scores.scores if score.grid and not score.is_twin_alone})
    content = {"groups": groups(scores), "metrics": metrics_of(scores, nouns(run)), "grids": grids}
    content["timed"] = any(math.isfinite(score.seconds) for score in scores.scores)
    return Section("table", "All scores", "table.html.j2", content)


def _logged(run: Run, records: list[Mapping[str, Any]], key: str) -> np.ndarray:
    found = [number(record.get(key)) for record in records]
    if any(value is None for value in found):
        raise run.wrong("metrics.jsonl", f"`{key}` is not a number in every record")
    return np.array([math.nan if value is None or math.isinf(value) else value for value in found])


def _bins(run: Run, record: Mapping[str, Any]) -> Curve:
    entries = record["bins"]
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise run.wrong("metrics.jsonl", f"the bins of update {record.get('update')} are not a list of objects")
    columns = ([entry.get(key) for entry in entries] for key in ("logsnr", "loss", "se"))
    return curve(run, "metrics.jsonl", f"the list of bins of update {record.get('update')}", *columns)


def _targets(records: Sequence[Mapping[str, Any]], words: Nouns) -> list[tuple[str, str]]:
    """About the stable target, as of the last record that says something of it."""
    found = [record["target"] for record in records if isinstance(record.get("target"), Mapping)]
    ess, alone = (number(found[-1].get(key, "")) for key in ("ess", "alone")) if found else (None, None)
    if ess is None or alone is None or not math.isfinite(ess + alone):
        return []
    warning = found[-1].get("warning")
    text = f"mean of {plain(ess)} training {words.many} (effective sample size); {alone:.0%} of the targets are one"
    text = f"{text} {words.one}"
    return [("Stable target", f"{text}. Warning: {warning}" if isinstance(warning, str) else text)]


def training(run: Run) -> Section | None:
    """Loss and validation loss by update, and the validation loss by noise level at three times."""
    records = [record for record in run.records if number(record.get("update", "")) and "loss" in record]
    if not records:
        return None
    x, words = _logged(run, records, "update"), nouns(run)
    legend = keys("training", ("training loss", "validation loss"), (Style("muted", "", width=1.1), Style("blue", "o")))
    checked = [record for record in records if record.get("validation_loss") is not None]
    at, value, low, high = (_logged(run, checked, key) for key in ("update", "validation_loss", "low", "high"))
    last = f" Last validation loss: {plain(value[-1])}." if checked else ""
    label = f"Loss against update, {len(records)} records up to update {count(x[-1])}.{last}"
    no_se = np.full(len(x), math.nan)
    svg = updates("training", label, Curve(x, _logged(run, records, "loss"), no_se), (at, value, low, high), legend)
    charts = [Chart(svg, "Loss by update", tuple(legend))]
    binned = [record for record in records if record.get("bins")]
    if binned:
        chosen = sorted({0, (len(binned) - 1) // 3, len(binned) - 1})
        tones = (Style("purple", "^", (0, (1.2, 1.4))), Style("orange", "s", (0, (5, 2))), Style("blue", "o"))
        styles = tones[-len(chosen) :]
        names = [f"after {count(number(binned[i].get('update')) or math.nan)} updates" for i in chosen]
        lines = {name: _bins(run, binned[i]) for name, i in zip(names, chosen, strict=True)}
        bin_keys = keys("bins", lines, styles)
        text = f"Validation loss by logsnr with 95% intervals, {', '.join(names)}."
        svg = curves("bins", text, lines, bin_keys, ylabel="loss")
        charts.append(Chart(svg, "Validation loss by noise level", tuple(bin_keys)))
    charts += [chart for chart in (least_error(run, binned[-1]) if binned else None, weighting(run)) if chart]
    speed = [value for value in (number(record.get("images_per_second")) for record in records) if value and value > 0]
    facts = [("Speed", f"{count(float(np.median(speed)))} {words.many} a second (median)")] if speed else []
    content = {
        "intro": "One number says little about a diffusion loss, because it is dominated by noise levels at which "
        "nothing can be learnt. So the validation loss, on fixed data and fixed noise, is also shown by noise level. "
        "Bars are 95% intervals.",
        "sentences": learning(run, records),
        "charts": charts,
        "facts": facts + _targets(records, words),
        "name": "training",
    }
    return Section("training", "Training", "charts.html.j2", content)


def settings(run: Run) -> Section | None:
    """Everything that is needed to run it again: configuration, versions, seed."""
    parts = [
        (title, flat(run.summary[key]))
        for title, key in (
            ("Configuration", "config"),
            ("Environment", "environment"),
            ("Network", "network"),
            ("Data", "data"),
        )
        if run.summary.get(key)
    ]
    return Section("settings", "To run it again", "settings.html.j2", {"parts": parts}) if parts else None


SECTIONS: tuple[Callable[[Run], Section | None], ...] = (
    answer,
    estimation,
    tuning,
    choice,
    profile_verdict,
    profile_against,
    profile_sources,
    profile_techniques,
    profile_errors,
    samples,
    scores_against_nfe,
    scores_table,
    error_curve,
    residuals,
    budget,
    profile_steps,
    profile_grids,
    profile_structure,
    profile_others,
    training,
    settings,
)
