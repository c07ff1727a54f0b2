"""The first section: the answer in sentences and one small table, for a reader who reads nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowvar.report.calibration import mmse_curves
from lowvar.report.estimate import estimated
from lowvar.report.learning import still_learning
from lowvar.report.run import Run, number
from lowvar.report.scores import Board, Comparison, board, steps_text
from lowvar.report.section import Section
from lowvar.report.text import bounds, count, metric, plain, spoken
from lowvar.report.tune import tuned

__all__ = ["answer"]


def _value(run: Run, key: str) -> float:
    found = number(run.summary.get(key))
    if found is None:
        raise run.wrong("summary.json", f"`{key}` is {run.summary.get(key)!r}, not a number")
    return found


def _names(found: list[Comparison], verdict: str) -> str:
    return steps_text(c.steps for c in found if c.verdict == verdict)


def _ranking(scores: Board) -> dict[str, Any]:
    key = scores.metrics[0]
    found = scores.comparisons(key)
    sentences = []
    told = {verdict: _names(found, verdict) for verdict in ("ahead", "level", "behind")}
    if any(c.verdict == "ahead" for c in found):
        clear = [c for c in found if c.verdict == "ahead"]
        first = clear[0]
        assert first.best is not None
        assert first.peer is not None
        by = f"{plain(first.ratio, 2)} times lower than" if math.isfinite(first.ratio) else "below"
        sentences.append(
            f"At {steps_text([first.steps])} {scores.label(first.best)} has a {metric(key).name} of "
            f"{plain(first.best.value)}, {by} the best peer's ({scores.label(first.peer)}, {plain(first.peer.value)})."
        )
        every = "at every number of steps" if len(clear) == len(found) and len(found) > 1 else f"at {told['ahead']}"
        sentences.append(f"The best of lowvar's samplers is clearly ahead of the best peer {every}.")
    if any(c.verdict == "level" for c in found):
        sentences.append(f"At {told['level']} the two are level within their intervals.")
    if any(c.verdict == "behind" for c in found):
        sentences.append(f"At {told['behind']} the best peer is ahead.")
    if not any(c.peer for c in found) and found:
        last = min((c.best for c in found if c.best), key=lambda score: score.value)
        sentences.append(
            f"The lowest {metric(key).name} is {spoken(last.value, last.low, last.high)}: "
            f"{scores.label(last)} at {steps_text([last.steps])}."
        )
    rows = []
    for c in found:
        cells = [
            None if s is None else (scores.label(s), *bounds(s.value, s.low, s.high), count(s.nfe))
            for s in (c.best, c.peer)
        ]
        ratio = ""
        if math.isfinite(c.ratio):
            times = max(c.ratio, 1 / c.ratio)
            ratio = (
                "same value"
                if times < 1.005
                else f"{plain(times, 2 if times >= 1.1 else 3)}× {'lower' if c.ratio >= 1 else 'higher'}"
            )
        rows.append({"steps": count(c.steps), "best": cells[0], "peer": cells[1], "ratio": ratio, "verdict": c.verdict})
    twin = next((s for s in scores.scores if s.is_twin_alone and s.metric == key), None)
    floor = scores.floor.get(key)
    return {
        "sentences": sentences,
        "rows": rows,
        "metric": metric(key),
        "has_peers": any(c.peer for c in found),
        "paired": all(c.paired for c in found if c.peer and c.best),
        "floor": None if floor is None else spoken(*floor),
        "twin": None if twin is None else spoken(twin.value, twin.low, twin.high),
    }


def _trained(run: Run) -> list[str]:
    if "validation_loss" not in run.summary or "updates" not in run.summary:
        return []
    value, low, high = (_value(run, key) for key in ("validation_loss", "low", "high"))
    sentence = f"After {count(_value(run, 'updates'))} updates the validation loss is {spoken(value, low, high)}"
    first = next(
        (r for r in run.records if "validation_loss" in r and number(r.get("validation_loss")) is not None), None
    )
    if first is not None:
        before, after = (number(first.get(key)) for key in ("validation_loss", "update"))
        sentence += f"; it was {plain(before or math.nan)} after {count(after or math.nan)}"
    more = [f"Bits per dimension: {plain(_value(run, 'bits_per_dim'))}."] if "bits_per_dim" in run.summary else []
    return [sentence + ".", *still_learning(run), *more]


def _calibrated(run: Run) -> list[str]:
    found = mmse_curves(run)
    if found is None or not len(found["mmse"].x):
        return []
    line, twin = found["mmse"], found.get("twin")
    first, last = (f"{plain(line.y[i])} at logsnr {plain(line.x[i])}" for i in (0, -1))
    sentences = [f"The network's mean squared error a dimension falls from {first} to {last}."]
    if twin is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(line.y > 0, np.interp(line.x, twin.x, twin.y) / line.y, np.nan)
        if np.isfinite(ratio).any():
            i = int(np.nanargmax(ratio))
            sentences.append(
                f"It gains most on the Gaussian twin at logsnr {plain(line.x[i], 2)}: {plain(ratio[i], 2)} times lower."
            )
    return sentences


def _recommended(choice: Any) -> dict[str, str] | None:
    """What the run recommends, as {sampler, grid, steps} in words; a plain string names the sampler."""
    if isinstance(choice, str) and choice:
        choice = {"sampler": choice}
    if not isinstance(choice, Mapping) or not choice.get("sampler"):
        return None
    return {key: str(choice[key]) if choice.get(key) else "" for key in ("sampler", "grid", "steps")}


def answer(run: Run) -> Section | None:
    """What a reader wants to know first, in sentences and one small table; a profile has its verdict there."""
    if run.command == "profile":
        return None
    scores = board(run)
    content: dict[str, Any] = {"ranking": None if scores is None else _ranking(scores)}
    ranked = content["ranking"]["sentences"] if content["ranking"] else _trained(run)
    content["sentences"] = [*estimated(run), *tuned(run), *(_calibrated(run) if "mmse" in run.summary else []), *ranked]
    notes = run.summary.get("notes")
    content["notes"] = [str(note) for note in notes] if isinstance(notes, list) else []
    choice = run.summary.get("recommended")
    content["recommended"] = _recommended(choice)
    if not content["sentences"] and content["recommended"] is None:
        return None
    return Section("answer", "In short", "answer.html.j2", content)
