"""Numbers and quantities as people read them, and the words that the report explains.

A value with an interval is rounded so that the interval's half-width keeps two significant digits; other numbers keep
three. A minus sign is a minus sign, thousands are parted by commas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["METRICS", "Metric", "bounds", "count", "duration", "flat", "metric", "plain", "spoken"]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Metric:
    """A metric: its key in `rows`, the name people read, and one sentence that defines it.

    The sentence names the data by the fields of `lowvar.report.nouns.Nouns`, in braces.
    """

    key: str
    name: str
    about: str


_ALL = (
    Metric(
        "frechet",
        "Frechet distance",
        "Squared distance between the Gaussians that have the mean and covariance of the samples' and of the held-out "
        "{features}.",
    ),
    Metric(
        "kernel",
        "Kernel distance",
        "Squared maximum mean discrepancy of the same features under a cubic kernel (the formula of KID), without "
        "bias: it may come out slightly below 0.",
    ),
    Metric(
        "energy",
        "Energy distance",
        "2 E|X − Y| − E|X − X′| − E|Y − Y′| between samples X and held-out {many} Y as {vectors}; 0 "
        "exactly if both have the same law.",
    ),
    Metric(
        "sliced_wasserstein",
        "Sliced Wasserstein",
        "Root mean squared 2-Wasserstein distance between the {many}, {vectors}, projected on 128 fixed "
        "random directions.",
    ),
    Metric(
        "mean",
        "Error of the mean",
        "Distance between the mean {one} of the samples and of the data, in units of the data's total standard "
        "deviation.",
    ),
    Metric(
        "spectrum",
        "Error of the spectrum",
        "Error of the samples' variance along the data's principal directions, as a share of the data's total "
        "variance.",
    ),
)
METRICS: Mapping[str, Metric] = {entry.key: entry for entry in _ALL}


def metric(key: str) -> Metric:
    """The metric of a key; one that nobody described is called by its key.

    Example:
        >>> metric("energy").name, metric("my_score").name
        ('Energy distance', 'my score')
    """
    return METRICS.get(key, Metric(key, key.replace("_", " "), "Not described; smaller is taken to be better."))


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _decimals(x: float, places: int) -> str:
    shown = f"{x:,.{places}f}"
    return _signed(shown.lstrip("-") if not any(c in "123456789" for c in shown) else shown)


def plain(x: float, digits: int = 3) -> str:
    """A number with `digits` significant digits.

    Example:
        >>> plain(0.012345), plain(-1.5), plain(12345.6), plain(3.21e-7), plain(float("nan"))
        ('0.0123', '−1.50', '12,346', '3.21·10⁻⁷', '–')
    """
    if math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if x == 0:
        return "0"
    power = math.floor(math.log10(abs(float(f"{x:.{digits - 1}e}"))))
    if not -5 < power < 7:
        return _signed(f"{x / 10**power:.{digits - 1}f}") + "·10" + str(power).translate(_SUPERSCRIPT)
    return _decimals(x, max(0, digits - 1 - power))


def bounds(value: float, low: float, high: float) -> tuple[str, str]:
    """A value and its interval, rounded alike; the interval is empty where there is none.

    Example:
        >>> bounds(0.21342, 0.20111, 0.22573)
        ('0.213', '[0.201, 0.226]')
        >>> bounds(12.0, float("nan"), float("nan"))
        ('12.0', '')
    """
    half = (high - low) / 2
    if not (math.isfinite(value) and math.isfinite(half)) or half <= 0:
        return plain(value), ""
    places = 1 - math.floor(math.log10(float(f"{half:.1e}")))
    if places > 7:
        return plain(value), f"[{plain(low)}, {plain(high)}]"
    shown = [_decimals(x, max(0, places)) for x in (value, low, high)]
    return shown[0], f"[{shown[1]}, {shown[2]}]"


def spoken(value: float, low: float, high: float) -> str:
    """`bounds` as one string."""
    return " ".join(filter(None, bounds(value, low, high)))


def count(n: float) -> str:
    """A whole number with commas.

    Example:
        >>> count(1797.0)
        '1,797'
    """
    return f"{n:,.0f}" if math.isfinite(n) else "–"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that matter.

    Example:
        >>> duration(0.42), duration(62), duration(7384)
        ('0.42 s', '1 min 2 s', '2 h 3 min')
    """
    if not math.isfinite(seconds):
        return "–"
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A JSON value as (dotted key, text) pairs; short lists stay on one line.

    Example:
        >>> flat({"a": {"b": 1, "c": [1, 2]}, "d": None})
        [('a.b', '1'), ('a.c', '1, 2'), ('d', 'none')]
    """
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in flat(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list | tuple):
        if any(isinstance(item, Mapping | list) for item in value):
            return [pair for i, item in enumerate(value) for pair in flat(item, f"{prefix}.{i}")]
        shown = ", ".join(_scalar(item) for item in value[:64])
        return [(prefix, f"{shown}, … ({len(value)} values)" if len(value) > 64 else shown or "empty")]
    return [(prefix, _scalar(value))]


def _scalar(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
