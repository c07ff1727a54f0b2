r"""Was the expectation met? Two profiles side by side: what the first one's verdict promised, what the second measures.

Of every line of the first verdict that the second profile has the figure for:

    fault of training    the largest error over a linear denoiser's, promised to be below 1.25
    fault of a variance  the worst ratio of the sampler's or head's variance, promised to be within 1.25 of 1
    sampler              its score, promised for the sampler that is in use now
    technique, design,
    estimator            its factor, promised to be what it is at the new weights

An estimator's is asked of the same reward only. A promise is met where the measured interval reaches what was promised,
or is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowvar.metrics.intervals import Interval
from lowvar.profile.faults import OFF

__all__ = ["Promise", "promises"]


@dataclass(frozen=True)
class Promise:
    """A line of the first verdict, and what became of it.

    Attributes:
        what: the figure.
        before: as it was in the first profile; None where it had none.
        expected: as it was promised.
        measured: as it is.
        met: whether the promise was kept.
    """

    what: str
    before: Interval | None
    expected: Interval
    measured: Interval
    met: bool


def _interval(value: Any) -> Interval | None:
    """A summary's {value, low, high}; null is no number, and an upper end that is missing has none."""
    if not isinstance(value, Mapping) or value.get("value") is None or value.get("low") is None:
        return None
    high = value.get("high")
    return Interval(float(value["value"]), float(value["low"]), math.inf if high is None else float(high), math.nan)


def promises(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Promise, ...]:
    """What the first profile promised and the second can tell.

    Args:
        first, second: summaries of `lowvar profile`.

    Example:
        >>> def summary(vrf):
        ...     found = {"name": "auto", "vrf": vrf, "low": vrf - 0.2, "high": vrf + 0.2}
        ...     line = {"do": "auto", "worth": True, "part": "training", "factor": vrf, "settings": {"x": 1}}
        ...     return {"techniques": [found], "verdict": [line]}
        >>> [(p.what, p.met) for p in promises(summary(1.8), summary(1.6))]
        [('variance reduction of auto', True)]
        >>> promises(summary(1.8), summary(1.1))[0].met
        False
    """
    return tuple(_found(first, second))


def _found(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Promise]:
    lines = [line for line in first.get("verdict") or [] if line.get("worth")]
    if any(line.get("fault") and line.get("part") == "training" for line in lines):
        before, now = _worst_error(first), _worst_error(second)
        if now is not None:
            expected = Interval(1.0, 0.0, OFF, math.nan)
            yield Promise("largest error over a linear denoiser's", before, expected, now, now.low <= OFF)
    if any(line.get("fault") and line.get("part") == "sampling" for line in lines):
        before, now = _worst_ratio(first), _worst_ratio(second)
        if now is not None:
            met = now.low <= OFF and now.high >= 1 / OFF
            expected = Interval(1.0, 1 / OFF, OFF, math.nan)
            yield Promise("worst ratio of squared residual and variance", before, expected, now, met)
    if any(line.get("part") == "sampling" and (line.get("settings") or {}).get("sampler") for line in lines):
        before, expected = _score(first, "current"), _score(first, "recommended")
        now = _score(second, "current")
        same = first.get("metric") == second.get("metric")
        if expected is not None and now is not None and same:
            what = f"{first.get('metric')} of the sampler in use"
            yield Promise(what, before, expected, now, now.low <= expected.high)
    names = {line["do"] for line in lines if line.get("part") == "training"}
    yield from _factors(first, second, "techniques", "variance reduction of {}", names)
    chosen = {r["name"] for r in first.get("statistics") or [] if (r.get("low") or 0) > 1}
    yield from _factors(first, second, "statistics", "factor of the design for {}", chosen)
    one, other = first.get("reward") or {}, second.get("reward") or {}
    if one.get("reward") == other.get("reward"):
        yield from _factors(one, other, "rows", "factor of the estimator {}", {one.get("recommended")})


def _factors(
    first: Mapping[str, Any], second: Mapping[str, Any], key: str, words: str, names: set[Any]
) -> Iterator[Promise]:
    now = {row["name"]: row for row in second.get(key) or []}
    for row in first.get(key) or []:
        if row["name"] not in names or row["name"] not in now:
            continue
        pair = []
        for r in (row, now[row["name"]]):
            names_of = ("vrf", "low", "high") if "vrf" in r else ("factor", "factor_low", "factor_high")
            pair.append(_interval(dict(zip(("value", "low", "high"), (r.get(n) for n in names_of), strict=True))))
        expected, measured = pair
        if expected is not None and measured is not None:
            yield Promise(words.format(row["name"]), None, expected, measured, measured.high >= expected.low)


def _worst_error(summary: Mapping[str, Any]) -> Interval | None:
    found = [_interval(row.get("excess")) for row in summary.get("errors") or []]
    known = [i for i in found if i is not None]
    return max(known, key=lambda i: i.low) if known else None


def _worst_ratio(summary: Mapping[str, Any]) -> Interval | None:
    reverse = summary.get("reverse") or {}
    own = next((v for v in reverse.get("variances") or [] if v.get("name") == reverse.get("own")), None)
    if own is None:
        return None
    known = [i for i in (_interval(v) for v in own.get("posterior") or own.get("ratio") or []) if i is not None]
    return max(known, key=lambda i: max(i.low, 1 / max(i.high, 1e-12))) if known else None


def _score(summary: Mapping[str, Any], which: str) -> Interval | None:
    cell, metric = summary.get(which), summary.get("metric")
    if not cell:
        return None
    for row in summary.get("rows") or []:
        if row["metric"] == metric and all(row[k] == cell[k] for k in ("sampler", "grid", "steps")):
            return _interval(row)
    return None
