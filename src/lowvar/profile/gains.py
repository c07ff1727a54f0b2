r"""What pays outside of training: a sampler, a covariance, an expectation design, an estimator of a reward's gradient.

Scores are compared at equal network evaluations or fewer, by the ratio of the scores less their floor (that of data
against data, which no sampler can be expected below); intervals of the two scores are combined as if they were
independent, which common noise makes them less than, so the ratio's is on the wide side.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lowvar.metrics.intervals import Interval
from lowvar.profile.reverse import VarianceCheck
from lowvar.profile.rewards import RewardProfile
from lowvar.profile.statistics import StatisticProfile
from lowvar.profile.verdict import Advice

__all__ = ["covariance_gain", "reward_gain", "sampler_gain", "score_ratio", "statistic_gain"]


def _text(value: float, low: float, high: float, digits: int = 3) -> str:
    return f"{value:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


def score_ratio(a: Mapping[str, Any], b: Mapping[str, Any], floor: float) -> Interval:
    """A score over another, both less the floor; without an upper end where the lower may be at the floor.

    Args:
        a, b: rows with value, low and high.
        floor: of the metric.

    Example:
        >>> a, b = ({"value": v, "low": 0.9 * v, "high": 1.1 * v} for v in (4.0, 1.0))
        >>> found = score_ratio(a, b, 0.0)
        >>> round(found.value, 6), 3 < found.low < 4 < found.high < 5
        (4.0, True)
    """
    over = [{k: row[k] - floor for k in ("value", "low", "high")} for row in (a, b)]
    x, y = over
    if y["low"] <= 0 or x["value"] <= 0:
        low = max(x["low"], 0.0) / y["high"] if y["high"] > 0 else math.inf
        value = x["value"] / y["value"] if y["value"] > 0 else math.inf
        return Interval(max(value, 0.0), low, math.inf, math.inf)
    value = x["value"] / y["value"]
    down = math.hypot(math.log(x["value"] / max(x["low"], 1e-300)), math.log(y["high"] / y["value"]))
    up = math.hypot(math.log(x["high"] / x["value"]), math.log(y["value"] / y["low"]))
    return Interval(value, value * math.exp(-down), value * math.exp(up), value * (up + down) / (2 * 1.96))


def sampler_gain(
    rows: Sequence[Mapping[str, Any]],
    current: Mapping[str, Any],
    recommended: Mapping[str, Any],
    metric: str,
    floor: float,
    command: str,
) -> Advice:
    """What the recommended sampler brings beside the current one.

    Args:
        rows: scores, records of `lowvar evaluate`.
        current, recommended: sampler, grid and steps of both.
        metric: that decides.
        floor: of it.
        command: of the recommended one.
    """

    def of(cell: Mapping[str, Any]) -> Mapping[str, Any]:
        keys = ("sampler", "grid", "steps")
        return next(r for r in rows if r["metric"] == metric and all(r[k] == cell[k] for k in keys))

    a, b = of(current), of(recommended)
    if a is b:
        said = (
            f"the best that was measured, {metric} {_text(b['value'], b['low'], b['high'])} in {b['nfe']} evaluations"
        )
        return Advice(f"another sampler than {a['sampler']}", said, "", worth=False, part="sampling")
    ratio = score_ratio(a, b, floor)
    do = f"sampler {b['sampler']} with grid {b['grid']} in {b['steps']} steps"
    expect = (
        f"{metric} {_text(b['value'], b['low'], b['high'])} in {b['nfe']} evaluations, instead of "
        f"{_text(a['value'], a['low'], a['high'])} in {a['nfe']} by {a['sampler']}"
    )
    cheaper = a["nfe"] / b["nfe"]
    worth = ratio.low > 1 or (cheaper > 1 and ratio.high > 1)
    best = ratio if ratio.low > 1 else Interval(cheaper, cheaper, cheaper, 0.0)
    return Advice(
        do,
        expect if worth else f"nothing that can be told: {expect}",
        command if worth else "",
        worth=worth,
        part="sampling",
        factor=best.value,
        low=best.low,
        high=best.high,
        settings={k: b[k] for k in ("sampler", "grid", "steps")} if worth else {},
    )


def covariance_gain(best: VarianceCheck, number: VarianceCheck, saved: Interval, command: str) -> Advice:
    """What a covariance table saves the steps beside one number a level.

    Args:
        best: with the table.
        number: with the number.
        saved: bits a dimension, paired.
        command: that makes and keeps the table.
    """
    text = f"{saved.value:.3f} ({saved.low:.3f} to {saved.high:.3f}) bits a dimension"
    factor = number.total.value / best.total.value if best.total.value > 0 else math.inf
    if saved.low <= 0:
        worth = f"nothing that can be told: {text} less"
        return Advice(f"covariance table {best.name} for noisy steps", worth, "", worth=False, part="sampling")
    spread = [number.total.value / max(number.total.value - v, 1e-12) for v in (saved.low, saved.high)]
    return Advice(
        f"covariance table {best.name} for noisy steps",
        f"{text} less than one number a level, of {number.total.value:.3f}",
        command,
        worth=True,
        part="sampling",
        factor=factor,
        low=min(spread[0], factor),
        high=max(spread[1], factor),
    )


def statistic_gain(found: StatisticProfile, command: str) -> Advice:
    """Whether a design pays for a statistic.

    Example:
        >>> found = StatisticProfile("brightness", 0.0, 0.1, "antithetic", 8.0, 6.0, 11.0, (), 256, 2560)
        >>> statistic_gain(found, "lowvar estimate").expect
        '8 (6 to 11) times fewer evaluations than independent samples'
    """
    around = _text(found.vrf, found.low, found.high)
    measured: dict[str, Any] = {"part": "statistics", "factor": found.vrf, "low": found.low, "high": found.high}
    if found.design == "independent" or found.low <= 1:
        said = "none was ahead in the pilot" if found.design == "independent" else f"nothing that can be told: {around}"
        return Advice(f"a design for the mean of {found.name}", said, "", worth=False, **measured)
    expect = f"{around} times fewer evaluations than independent samples"
    return Advice(
        f"{found.design} for the mean of {found.name}",
        expect,
        command,
        True,
        settings={"design": found.design},
        **measured,
    )


def reward_gain(found: RewardProfile, command: str = "lowvar tune") -> Advice:
    """What the recommended estimator of a reward's gradient brings.

    Args:
        found: the part.
        command: that tunes, to which the reward is added.
    """
    row = next(r for r in found.rows if r.name == found.recommended)
    measured: dict[str, Any] = {
        "part": "reward",
        "factor": row.factor,
        "low": row.factor_low,
        "high": row.factor_high,
    }
    batch = "" if math.isnan(found.runs) else f"; its noise scale is {found.runs:.3g} runs an update"
    if found.recommended == found.plain:
        return Advice(
            f"another estimator than {found.plain} for reward {found.reward}",
            f"none had less variance x time{batch}",
            "",
            worth=False,
            **measured,
        )
    worth = row.factor_low > 1
    around = _text(row.factor, row.factor_low, row.factor_high)
    return Advice(
        f"estimator {found.recommended} for reward {found.reward}",
        f"{'' if worth else 'nothing that can be told: '}{around} times less variance x time than {found.plain}{batch}",
        f"{command} --reward {shlex.quote(found.reward)} --estimator auto" if worth else "",
        worth=worth,
        **measured,
    )
