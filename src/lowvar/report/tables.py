"""The table of scores: one part a number of steps, the best sampler of the acceptance metric first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lowvar.report.nouns import IMAGES, Nouns
from lowvar.report.scores import Board, Score, steps_text
from lowvar.report.text import Metric, bounds, metric, plain

__all__ = ["Bar", "Entry", "Group", "Line", "Part", "bars", "groups", "metrics_of"]


@dataclass(frozen=True)
class Entry:
    """A value, its interval, and whether it is the best of its group."""

    value: str
    interval: str
    is_best: bool = False


@dataclass(frozen=True)
class Line:
    """A sampler's scores, one cell a metric."""

    label: str
    grid: str
    nfe: str
    seconds: str
    is_peer: bool
    cells: tuple[Entry, ...]


@dataclass(frozen=True)
class Group:
    """All samplers at one number of steps."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Part:
    """A piece of a stacked bar, `width` in per cent of the longest bar."""

    tone: str
    value: str
    width: float


@dataclass(frozen=True)
class Bar:
    """A stacked bar: its name, its parts from left to right, its total with its interval."""

    label: str
    parts: tuple[Part, ...]
    total: tuple[str, str]
    is_best: bool = False


def metrics_of(board: Board, words: Nouns = IMAGES) -> list[Metric]:
    """The metrics of a board, described in the words for the data."""
    found = [metric(key) for key in board.metrics]
    return [replace(entry, about=entry.about.format(**vars(words))) for entry in found]


def _line(board: Board, label: str, scores: Sequence[Score]) -> Line:
    by_metric = {score.metric: score for score in scores}
    first = scores[0]
    cells = []
    for key in board.metrics:
        score = by_metric.get(key)
        shown = ("–", "") if score is None else bounds(score.value, score.low, score.high)
        best = board.best(first.steps, key)
        cells.append(Entry(*shown, score is not None and best is not None and score.value == best.value))
    nfe = sorted({score.nfe for score in scores})
    shown_nfe = " – ".join(plain(n, 4).rstrip("0").rstrip(".") if n % 1 else f"{n:,.0f}" for n in nfe)
    return Line(label, first.grid, shown_nfe, _seconds(first), first.is_peer, tuple(cells))


def _seconds(score: Score) -> str:
    return plain(score.seconds, 2) if math.isfinite(score.seconds) else ""


def _floor(board: Board) -> Line:
    cells = []
    for key in board.metrics:
        value, low, high = board.floor.get(key, (math.nan, math.nan, math.nan))
        cells.append(Entry(*bounds(value, low, high)))
    return Line("floor: data against data", "", "", "", False, tuple(cells))


def groups(board: Board) -> list[Group]:
    """The rows of the table; what needs no network (floor, twin alone) comes first."""
    alone = [score for score in board.scores if score.is_twin_alone]
    head = [_floor(board)] if board.floor else []
    for name in dict.fromkeys(score.sampler for score in alone):
        head.append(_line(board, name, [score for score in alone if score.sampler == name]))
    found = [Group("Without a network", tuple(head))] if head else []
    for steps in board.steps:
        by_label: dict[str, list[Score]] = {}
        for score in board.scores:
            if score.steps == steps and not score.is_twin_alone:
                by_label.setdefault(board.label(score), []).append(score)
        if not by_label:
            continue
        lines = sorted(by_label.items(), key=lambda item: _rank(item[1], board.metrics[0]))
        found.append(Group(steps_text([steps]), tuple(_line(board, label, scores) for label, scores in lines)))
    return found


def _rank(scores: Iterable[Score], key: str) -> float:
    return min((s.value for s in scores if s.metric == key and math.isfinite(s.value)), default=math.inf)


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]], tuple[str, str]]]) -> list[Bar]:
    """Stacked bars on one scale from (label, [(tone, value)], total as from `bounds`); negative parts have no width."""
    lengths = [sum(max(value, 0.0) for _, value in parts if math.isfinite(value)) for _, parts, _ in rows]
    longest = max(lengths, default=0.0) or 1.0
    least = min(lengths, default=0.0)
    return [
        Bar(
            label,
            tuple(
                Part(tone, plain(value), round(100 * max(value, 0.0) / longest, 3) if math.isfinite(value) else 0.0)
                for tone, value in parts
            ),
            total,
            len(rows) > 1 and length == least,
        )
        for (label, parts, total), length in zip(rows, lengths, strict=True)
    ]
