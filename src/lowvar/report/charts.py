"""The charts of a report, each a figure with its key and its description in words.

Series are told apart by colour, marker and line style. Samplers of one family (the name up to its first hyphen) share
colours; peers are drawn in ink, dashed, with hollow markers. Error bars and bands are 95% intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from lowvar.report.figures import COLOURS, GRID, MUTED, Style, draw, log_axis, nfe_axis, swatch, value_axis
from lowvar.report.run import Curve
from lowvar.report.scores import Board, steps_text
from lowvar.report.text import METRICS, metric, plain

__all__ = ["Chart", "Key", "curves", "keys", "quality", "sampler_keys", "updates"]

_NORMAL = 1.959964
_FAMILIES = {
    "twin": ("blue", "sky"),
    "ddpm": ("red", "orange"),
    "ddim": ("green",),
    "adams": ("purple",),
}
_COLOURS = ("blue", "red", "green", "purple", "orange", "sky")
_MARKERS = "osD^vPX<>ph*"
_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    (0, (5, 2)),
    (0, (1.2, 1.4)),
    (0, (6, 2, 1.2, 2)),
    (0, (9, 3)),
    (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)),
)


@dataclass(frozen=True)
class Key:
    """An entry of a legend: `number` is the class `series-number` in the figures that it speaks of."""

    number: int
    label: str
    style: Style
    swatch: Markup
    is_peer: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure of the page: the drawing, its title and its own key, where it does not share one."""

    svg: Markup
    title: str
    keys: tuple[Key, ...] = ()


def keys(name: str, labels: Iterable[str], styles: Sequence[Style] = ()) -> list[Key]:
    """A key a label, in the palette's order where no styles are given."""
    found = []
    for i, label in enumerate(labels):
        style = styles[i] if i < len(styles) else Style(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
        found.append(Key(i, label, style, swatch(f"{name}-key-{i}", style)))
    return found


def sampler_keys(board: Board) -> list[Key]:
    """Samplers, peers, then the twin alone and the floor where the run has them."""
    peers = {board.label(score) for score in board.scores if score.is_peer}
    found: list[tuple[str, Style, bool]] = []
    in_family: dict[str, int] = {}
    for label in board.labels:
        if label in peers:
            i = sum(is_peer for _, _, is_peer in found)
            style = Style("ink", _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)], hollow=True, width=1.3)
        else:
            i = len(found)
            family = label.partition("-")[0]
            colours = _FAMILIES.get(family, (_COLOURS[i % len(_COLOURS)],))
            nth = in_family[family] = in_family.get(family, -1) + 1
            style = Style(colours[nth % len(colours)], _MARKERS[i % len(_MARKERS)])
        found.append((label, style, label in peers))
    if any(score.is_twin_alone for score in board.scores):
        found.append(("Gaussian twin alone, 0 NFE", Style("blue", "", (0, (1.2, 1.6)), width=1.8), False))
    if board.floor:
        found.append(("floor: data against data", Style("muted", "", (0, (8, 2, 1.2, 2)), width=1.3), False))
    return [Key(i, *entry[:2], swatch(f"key-{i}", entry[1]), entry[2]) for i, entry in enumerate(found)]


def _level(axes: Axes, key: Key, value: float, low: float, high: float) -> None:
    line = axes.axhline(value, **{**key.style.line(), "marker": "None", "zorder": 1.5})  # pyright: ignore[reportArgumentType]
    line.set_gid(f"series-{key.number}-line")
    if math.isfinite(low) and math.isfinite(high):
        band = axes.axhspan(low, high, color=COLOURS[key.style.colour], alpha=0.13, linewidth=0)
        band.set_gid(f"series-{key.number}-band")


def _bars(axes: Axes, key: Key, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """A line with markers and, where bounds are finite, error bars."""
    reach = np.clip(np.stack([y - low, high - y]), 0, None)
    reach = np.where(np.isfinite(reach), reach, 0.0)
    drawn = axes.errorbar(x, y, yerr=reach, capsize=0, elinewidth=1.1, **key.style.line())  # pyright: ignore[reportArgumentType]
    parts = [drawn.lines[0], *drawn.lines[2]]
    for i, part in enumerate(parts):
        if part is not None:
            part.set_gid(f"series-{key.number}-{i}")


def _describe(board: Board, key: str) -> str:
    name = metric(key).name
    parts = [f"{name} against network evaluations for {len(board.labels)} samplers; lower is better."]
    for steps in board.steps:
        best = board.best(steps, key)
        if best is not None:
            parts.append(f"Lowest at {steps_text([steps])}: {board.label(best)}, {plain(best.value)}.")
    return " ".join([*parts, "All values are in the table of scores."])


def quality(board: Board, key: str, legend: Sequence[Key]) -> Chart:
    """A metric against NFE: one line a sampler with 95% intervals, the floor and the twin alone as levels."""
    level = [s for s in board.scores if s.is_twin_alone and s.sampler.startswith("Gaussian")]
    twins = [s for s in level if s.metric == key and math.isfinite(s.value)]
    floor = board.floor.get(key)
    series = [(entry, board.of(entry.label, key)) for entry in legend]
    series = [(entry, found) for entry, found in series if found]
    values = [score.value for _, found in series for score in found] + [score.value for score in twins]
    values += [floor[0]] if floor is not None and math.isfinite(floor[0]) else []

    def paint(axes: Axes) -> None:
        for i, (entry, found) in enumerate(series):
            # Side by side by a few per cent, so that the error bars of neighbours can be told apart.
            shift = 1.1 ** ((i + 0.5) / len(series) - 0.5)
            x, y, low, high = (np.array([getattr(s, name) for s in found]) for name in ("nfe", "value", "low", "high"))
            _bars(axes, entry, np.maximum(x, 0.5) * shift, y, low, high)
        for entry in legend:
            if entry.label.startswith("Gaussian twin alone") and twins:
                _level(axes, entry, twins[0].value, twins[0].low, twins[0].high)
            if entry.label.startswith("floor:") and floor is not None and math.isfinite(floor[0]):
                _level(axes, entry, *floor)
        positive = [value for value in values if value > 0]
        scale = value_axis(axes, values, min(positive, default=None))
        if values and min(values) > 0:
            top, bottom = max(values), min(values)
            axes.set_ylim(bottom / 1.5, top * 1.4) if scale == "logarithmic" else None
        nfe_axis(axes, sorted({max(score.nfe, 0.5) for _, found in series for score in found}))
        axes.set_ylabel(METRICS[key].name if key in METRICS else "score")

    svg = draw(f"quality-{board.metrics.index(key)}", _describe(board, key), paint)
    return Chart(svg, metric(key).name)


def curves(
    name: str,
    label: str,
    found: Mapping[str, Curve],
    legend: Sequence[Key],
    *,
    ylabel: str,
    xlabel: str = "logsnr: noise on the left, data on the right",
    log: bool = True,
    level: float | None = None,
    within: float = 0.0,
) -> Markup:
    """Lines by logsnr with 95% error bars, where the curve has standard errors.

    Args:
        name: of the figure.
        label: description for those who cannot see it.
        found: curves by label of the key.
        legend: keys.
        ylabel: of the y axis.
        xlabel: of the x axis.
        log: logarithmic y axis (where all values are above 0).
        level: a horizontal line that the curves should keep to.
        within: half-width of the band around it, as a share.
    """
    by_label = {entry.label: entry for entry in legend}

    def paint(axes: Axes) -> None:
        values: list[float] = []
        if level is not None:
            axes.axhspan(level * (1 - within), level * (1 + within), color=MUTED, alpha=0.16, linewidth=0)
            axes.axhline(level, color=MUTED, linewidth=1.1, zorder=1.5)
            values.append(level)
        for text, line in found.items():
            if text not in by_label:
                continue
            half = _NORMAL * np.nan_to_num(line.se)
            _bars(axes, by_label[text], line.x, line.y, line.y - half, line.y + half)
            values += [float(y) for y in line.y if math.isfinite(y)]
        if log and values and min(values) > 0:
            axes.set_ylim(min(values) / 1.35, max(values) * 1.35)
            log_axis(axes)
        axes.set(xlabel=xlabel, ylabel=ylabel)

    return draw(name, label, paint)


def updates(
    name: str,
    label: str,
    loss: Curve,
    validation: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    legend: Sequence[Key],
) -> Markup:
    """Training and validation loss by update; `validation` is x, y, low, high."""

    def paint(axes: Axes) -> None:
        (line,) = axes.plot(loss.x, loss.y, **legend[0].style.line())  # pyright: ignore[reportArgumentType]
        line.set_gid("series-0-0")
        if len(validation[0]):
            _bars(axes, legend[1], *validation)
        values = [float(y) for y in [*loss.y, *validation[1]] if math.isfinite(y)]
        if values and min(values) > 0:
            log_axis(axes)
        axes.set(xlabel="update", ylabel="loss")
        axes.grid(visible=True, color=GRID)

    return draw(name, label, paint)
