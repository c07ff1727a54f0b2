"""The verdict of a profile: what to do, what to expect of it, the words that do it, and what is not worth doing.

A technique is recommended by its factor at equal *time*, its reduction factor over the time of a batch, where that is
ahead of 1 by its interval; the largest first. The batch is advised by the gradient noise scale B = V / ||mu||^2: with n
samples an update the squared error of the gradient is B / n of its square, so that a batch far below B pays when it is
doubled, and one far above B wastes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowvar.metrics.intervals import Interval
from lowvar.profile.crossed import Decomposition
from lowvar.profile.techniques import Reduction

__all__ = ["Advice", "advise", "batch_advice"]


@dataclass(frozen=True)
class Advice:
    """One line of the verdict.

    Attributes:
        do: what to do, or not to.
        expect: what it brings, with its interval.
        command: words that do it; empty where there is nothing to do.
        worth: whether it is worth doing.
    """

    do: str
    expect: str
    command: str
    worth: bool


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
        )
    if scale.high < n / 2:
        growth = (1 + 2 * value / n) / (1 + value / n)
        return Advice(
            f"a batch of {n // 2} instead of {n}",
            f"half the samples an update, and about {growth:.2f} times the updates: the noise scale is {scale.low:.3g} "
            f"to {scale.high:.3g}",
            f"lowvar train --batch-size {n // 2}",
            worth=True,
        )
    told = f"{scale.low:.3g} to {scale.high:.3g}" if math.isfinite(scale.high) else f"at least {scale.low:.3g}"
    near = "nothing much" if scale.low > n / 4 and scale.high < 4 * n else "nothing that can be told"
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
        if r.low / r.cost > 1:
            lines.append(Advice(r.name, _factor(r) + time, r.command, worth=True))
        elif r.low > 1:
            rest.append(Advice(r.name, f"no gain at equal time: {_factor(r)}{time}", "", worth=False))
        elif r.high < 1:
            rest.append(Advice(r.name, f"harm: {_factor(r)}", "", worth=False))
        else:
            rest.append(Advice(r.name, f"nothing that can be told: {_factor(r)}", "", worth=False))
    batch = batch_advice(found.noise_scale, batch_size)
    return (*lines, batch, *rest)
