"""The verdict of a profile: what to do, what to expect of it, the words that do it, and what is not worth doing.

**Order.** First *faults*: what is wrong with the model as it is, not what could be better (`lowvar.profile.faults`),
those of training before those of sampling: a network that has not learned its noise levels makes every figure that
follows one of a network that will change. Then what is worth doing, by the lower end of its factor over its cost; then
what is not.

**Training.** A technique is recommended by its factor at equal *time*, its reduction factor over the time of a batch,
where that is ahead of 1 by its interval. The batch is advised by the gradient noise scale B = V / ||mu||^2: with n
samples an update the squared error of the gradient is B / n of its square, so that a batch far below B pays when it is
doubled, and one far above B wastes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowvar.metrics.intervals import Interval
from lowvar.profile.crossed import Decomposition
from lowvar.profile.techniques import Reduction

__all__ = ["PARTS", "Advice", "advise", "applied", "batch_advice", "ranked"]

PARTS = ("training", "sampling", "statistics", "reward")
"""Parts of a profile, in the order of their faults."""


@dataclass(frozen=True)
class Advice:
    """One line of the verdict.

    Attributes:
        do: what to do, or not to.
        expect: what it brings, with its interval.
        command: words that do it; empty where there is nothing to do.
        worth: whether it is worth doing.
        part: of `PARTS`, that it is about.
        factor, low, high: what was measured, with its 95% interval: variance, error or evaluations as they are over
            those with it; NaN where no one number says it.
        cost: what it is over, a batch's time with it over a plain one's.
        fault: whether it mends something that is wrong.
        settings: of the command that applies it.
    """

    do: str
    expect: str
    command: str
    worth: bool
    part: str = "training"
    factor: float = math.nan
    low: float = math.nan
    high: float = math.nan
    cost: float = 1.0
    fault: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def _factor(reduction: Reduction) -> str:
    if reduction.vrf > 1000:
        return "leaves next to none of the variance"
    if reduction.high < 1:
        return f"{1 / reduction.vrf:.2f} times the variance ({1 / reduction.high:.2f} to {1 / reduction.low:.2f})"
    return f"{reduction.vrf:.2f} times less variance ({reduction.low:.2f} to {reduction.high:.2f})"


def batch_advice(scale: Interval, batch_size: int) -> Advice:
    """What the noise scale says about a batch.

    Example:
        >>> batch_advice(Interval(400.0, 320.0, 500.0, 40.0), 64).do
        'a batch of 128 instead of 64'
        >>> batch_advice(Interval(9000.0, 192.0, math.inf, math.inf), 64).expect
        'at most 0.62 of the updates: the noise scale is at least 192'
        >>> batch_advice(Interval(20.0, 10.0, 30.0, 5.0), 64).do
        'a batch of 32 instead of 64'
        >>> batch_advice(Interval(70.0, 50.0, 90.0, 10.0), 64).worth
        False
        >>> batch_advice(Interval(0.2, 0.1, 0.3, 0.05), 1).expect  # no batch is smaller
        'nothing much: the noise scale is 0.1 to 0.3'
    """
    n, value = batch_size, scale.value
    if scale.low > 2 * n:
        known = math.isfinite(scale.high)
        least = value if known else scale.low
        saving = (1 + least / (2 * n)) / (1 + least / n)
        bounds = f"{scale.low:.3g} to {scale.high:.3g}" if known else f"at least {scale.low:.3g}"
        return Advice(
            f"a batch of {2 * n} instead of {n}",
            f"{'about' if known else 'at most'} {saving:.2f} of the updates: the noise scale is {bounds}",
            f"lowvar train --batch-size {2 * n}",
            worth=True,
            settings={"batch_size": 2 * n},
        )
    if scale.high < n / 2 and n > 1:
        growth = (1 + 2 * value / n) / (1 + value / n)
        return Advice(
            f"a batch of {n // 2} instead of {n}",
            f"half the samples an update, and about {growth:.2f} times the updates: the noise scale is {scale.low:.3g} "
            f"to {scale.high:.3g}",
            f"lowvar train --batch-size {n // 2}",
            worth=True,
            settings={"batch_size": n // 2},
        )
    told = f"{scale.low:.3g} to {scale.high:.3g}" if math.isfinite(scale.high) else f"at least {scale.low:.3g}"
    near = scale.high < 4 * n and (scale.low > n / 4 or n == 1)
    near = "nothing much" if near else "nothing that can be told"
    return Advice(f"another batch than {n}", f"{near}: the noise scale is {told}", "", worth=False)


def advise(found: Decomposition, reductions: Sequence[Reduction], batch_size: int) -> tuple[Advice, ...]:
    """The verdict, what is worth doing first.

    Args:
        found: the sources of the variance.
        reductions: what techniques were measured to do.
        batch_size: of the model's training.

    Example:
        >>> pairs = Reduction("cross pairs", 1.5, 1.3, 1.7, 1.02, "pairing: cross")
        >>> harmful = Reduction("sobol points", 0.7, 0.6, 0.8, 1.0, "pairing: sobol")
        >>> one = Interval(1.0, 0.5, 2.0, 0.3)
        >>> scale = Interval(70.0, 50.0, 90.0, 10.0)
        >>> found = Decomposition(16, one, one, scale, {}, (), (), ())
        >>> for line in advise(found, [harmful, pairs], 64):
        ...     print(line.worth, "|", line.do, "|", line.expect)
        True | cross pairs | 1.50 times less variance (1.30 to 1.70), a batch takes 1.02 of the time
        False | another batch than 64 | nothing much: the noise scale is 50 to 90
        False | sobol points | harm: 1.43 times the variance (1.25 to 1.67)
    """
    lines, rest = [], []
    for r in sorted(reductions, key=lambda r: -r.vrf / r.cost):
        time = f", a batch takes {r.cost:.2f} of the time"
        measured: dict[str, Any] = {"factor": r.vrf, "low": r.low, "high": r.high, "cost": r.cost}
        if r.low / r.cost > 1:
            lines.append(Advice(r.name, _factor(r) + time, r.command, worth=True, settings=r.settings, **measured))
        elif r.low > 1:
            rest.append(Advice(r.name, f"no gain at equal time: {_factor(r)}{time}", "", worth=False, **measured))
        elif r.high < 1:
            rest.append(Advice(r.name, f"harm: {_factor(r)}", "", worth=False, **measured))
        else:
            rest.append(Advice(r.name, f"nothing that can be told: {_factor(r)}", "", worth=False, **measured))
    batch = batch_advice(found.noise_scale, batch_size)
    return (*lines, batch, *rest)


def ranked(lines: Iterable[Advice]) -> tuple[Advice, ...]:
    """Lines of all parts in the verdict's order (see the module); of equals the first stays first.

    Example:
        >>> a = Advice("pairs", "", "", True, factor=2.0, low=1.8, high=2.2, cost=1.5)
        >>> b = Advice("stratified", "", "", True, factor=1.5, low=1.4, high=1.6)
        >>> c = Advice("variance", "", "", True, "sampling", 4.0, 3.9, 4.1, fault=True)
        >>> [line.do for line in ranked([a, b, Advice("nothing", "", "", False), c])]
        ['variance', 'stratified', 'pairs', 'nothing']
    """

    def place(line: Advice) -> tuple[int, int, float]:
        gain = line.low / line.cost
        gain = 1.0 if math.isnan(gain) else gain
        if line.fault:
            return 0, PARTS.index(line.part), -gain
        return (1, 0, -gain) if line.worth else (2, 0, 0.0)

    return tuple(sorted(lines, key=place))


def applied(lines: Iterable[Mapping[str, Any]], part: str) -> dict[str, Any]:
    """Settings of a command that apply a verdict, as a summary holds it.

    Those of faults, then of the first technique (they exclude each other), then of lines about something else, such as
    the batch.

    Args:
        lines: of the verdict, in its order.
        part: whose settings are wanted.

    Example:
        >>> applied([{"worth": True, "part": "training", "settings": {"batch_size": 128}},
        ...          {"worth": True, "part": "training", "settings": {"pairing": "cross"}},
        ...          {"worth": True, "part": "training", "settings": {"pairing": "same"}}], "training")
        {'batch_size': 128, 'pairing': 'cross'}
    """
    faults: dict[str, Any] = {}
    found: dict[str, Any] = {}
    technique = False
    for line in lines:
        settings = line.get("settings") or {}
        if not line.get("worth") or line.get("part") != part or not settings:
            continue
        if line.get("fault"):
            faults |= {k: v for k, v in settings.items() if k not in faults}
        elif "batch_size" in settings:
            found = settings | found
        elif not technique:
            found |= settings
            technique = True
    return faults | {k: v for k, v in found.items() if not (k == "batch_size" and k in faults)}
