"""Matplotlib drawings as inline SVG that takes part in the page: its colours, its type, its dark mode.

A figure is drawn in the light palette. Afterwards each colour becomes a CSS variable of the page (the light value stays
behind as fallback), text takes the page's own font, and a group drawn with `artist.set_gid("series-3-...")` becomes
`<g class="series-3">`, so that the page can hide and point out series without a script. No word that comes from the run
is drawn: names stand in the HTML around the figure, where they are escaped.

The same drawing gives the same bytes: fixed style sheet, fixed hash salt, no dates.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lowvar.report.text import plain

__all__ = ["COLOURS", "Style", "draw", "log_axis", "nfe_axis", "swatch", "value_axis"]

# Okabe and Ito's palette, darkened until lines keep a contrast of 3:1 on white; style.css has the dark twins.
COLOURS = {
    "ink": "#1c2128",
    "muted": "#68707b",
    "grid": "#dfe3e8",
    "page": "#fffffe",
    "blue": "#0069ad",
    "sky": "#2f93cc",
    "green": "#00805c",
    "orange": "#b67800",
    "red": "#cf5600",
    "purple": "#a94f86",
}
INK, MUTED, GRID, PAGE = (COLOURS[name] for name in ("ink", "muted", "grid", "page"))
_BASE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Style:
    """How a series is drawn: told apart by colour, marker and line alike.

    Attributes:
        colour: a name in `COLOURS`.
        marker: of Matplotlib; "" for none.
        dash: line style of Matplotlib.
        hollow: markers are outlines.
        width: of the line.
    """

    colour: str
    marker: str = "o"
    dash: str | tuple[int, tuple[float, ...]] = "-"
    hollow: bool = False
    width: float = 1.6

    def line(self) -> dict[str, object]:
        """Keyword arguments of `Axes.plot` and `Axes.errorbar`."""
        colour = COLOURS[self.colour]
        return {
            "color": colour,
            "marker": self.marker,
            "linestyle": self.dash,
            "linewidth": self.width,
            "markerfacecolor": PAGE if self.hollow else colour,
            "markeredgecolor": colour,
        }


def _tidy(svg: str, name: str, label: str) -> Markup:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style type=.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<g id="(series-\d+)[^"]*"', r'<g class="\1"', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{name}-", svg)
    for key, colour in COLOURS.items():
        svg = re.sub(re.escape(colour), f"var(--{key},{colour})", svg, flags=re.I)
    svg = re.sub(r"(font: (?:\S+ )*?\d[\d.]*px) [^;\"]*", r"\1 sans-serif", svg)
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(-?\d+\.\d{2})\d+", r"\1", tag[0]), svg)  # a hundredth of a point
    svg = re.sub(r">\s+<", "><", svg)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, label)
    if not label:
        head = Markup('<svg class="swatch" viewBox="0 0 {} {}" aria-hidden="true" focusable="false">').format(
            width, height
        )
    return head + Markup(svg[svg.index(">") + 1 :].strip())  # drawn by Matplotlib from numbers; no text of the run


def draw(
    name: str, label: str, paint: Callable[[Axes], None], *, width: float = 4.5, height: float = 3.1, bare: bool = False
) -> Markup:
    """A figure as an `<svg>` element.

    Args:
        name: prefix of every id in it; different for every figure of a page; letters, digits and hyphens.
        label: what a reader who cannot see it is told; "" hides it from them.
        paint: draws on the axes.
        width: in inches of 72 points; the page scales the figure to its column.
        height: likewise.
        bare: axes without frame that fill the figure.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_BASE)
        mpl.rcParams["svg.hashsalt"] = f"lowvar-{name}"
        figure = Figure((width, height), layout=None if bare else "constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0, 0, 1, 1)) if bare else figure.add_subplot()
        if bare:
            axes.set_axis_off()
        paint(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return _tidy(text.getvalue(), name, label)


def swatch(name: str, style: Style) -> Markup:
    """A short piece of the series' line with its marker, for legends."""

    def paint(axes: Axes) -> None:
        axes.add_line(Line2D([0.04, 0.5, 0.96], [0.5, 0.5, 0.5], **{**style.line(), "markevery": [1]}))  # pyright: ignore[reportArgumentType]
        axes.set(xlim=(0, 1), ylim=(0, 1))

    return draw(name, "", paint, width=0.5, height=0.18, bare=True)


def _ticks(axis_low: float, axis_high: float) -> tuple[float, ...]:
    return (1.0, 2.0, 5.0) if axis_high / axis_low < 60 else (1.0,)


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain labels, at 1, 2 and 5 where it spans little."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, subs=_ticks(low, high), numticks=12))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: plain(y, 1).removeprefix("1·")))


def value_axis(axes: Axes, values: list[float], scale: float | None = None) -> str:
    """Logarithmic where the values allow and need it, else linear around 0 and logarithmic beyond `scale`.

    Returns:
        The name of the scale, for the figure's description.
    """
    low, high = min(values, default=1.0), max(values, default=1.0)
    if low > 0 and high < 4 * low:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: plain(y, 3)))
        return "linear"
    if low > 0:
        log_axis(axes)
        return "logarithmic"
    if high <= 0:
        return "linear"
    threshold = max(scale or 0.0, -low, high * 1e-3)
    axes.set_yscale("symlog", linthresh=threshold, linscale=0.6)
    powers = [10.0**k for k in range(-8, 9) if threshold <= 10.0**k <= 2 * high]
    ticks = [0.0, *(powers or [high])]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: plain(y, 1).removeprefix("1·")))
    return "logarithmic, linear near 0"


def nfe_axis(axes: Axes, values: list[float]) -> None:
    """A logarithmic x axis with a tick at every number of network evaluations."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: plain(x, 3).removesuffix(".00").removesuffix(".0")))
    axes.set_xlabel("network evaluations a sample (NFE)")
