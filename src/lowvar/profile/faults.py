r"""What is wrong with a model: noise levels that were not learned, a batch that is too small, a wrong variance.

A fault is told from what could merely be better by a standard that the model fails. The standard of the error is a
linear denoiser's (`lowvar.profile.excess`), which no network is above that saw the level often enough:

    levels     the error is above it somewhere, by a quarter, or by .15 where other levels are below it; and elsewhere
               it is not above at all
    batch      the error is above it on average and nowhere below it by more than .03, and the noise scale is at least 2
               batches: the weights move by noise. A large noise scale alone is no fault: that of a network that is done
               is infinite
    updates    above by a quarter, above everywhere, and the noise scale does not blame the batch
    variance   the sampler's steps, or the network's variance head, are off by a quarter or more from what the residuals
               say, and pay at least .01 bits a dimension for it beside one right number a level

Intervals decide: the lower end must be beyond the standard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowvar.metrics.intervals import Interval
from lowvar.profile.excess import LevelError
from lowvar.profile.reverse import VarianceCheck
from lowvar.profile.verdict import Advice

__all__ = ["OFF", "error_fault", "variance_fault"]

OFF = 1.25
_LEFT = 1.15
_ABOVE = 1.03  # an error that is surely above the linear denoiser's, bound and all
_BELOW, _MEAN = 0.97, 1.02  # an error that learned nothing beyond the linear denoiser
_BATCHES = 2.0
_BITS = 0.01


def _around(i: Interval) -> str:
    return f"{i.value:.2f} ({i.low:.2f} to {i.high:.2f})"


def error_fault(
    levels: Sequence[LevelError], scale: Interval, batch_size: int, own_times: str = "uniform"
) -> Advice | None:
    """The fault of training, or None.

    Args:
        levels: errors by noise level.
        scale: the gradient noise scale.
        batch_size: of the model's training.
        own_times: what the setting `times` is called that the process's own objective has.

    Example:
        >>> def level(at, excess):
        ...     around = Interval(excess, 0.95 * excess, 1.05 * excess, 0.02 * excess)
        ...     return LevelError(at - 1, at + 1, around, 0.0, 1.0, around)
        >>> scale = Interval(300.0, 200.0, 400.0, 50.0)
        >>> error_fault([level(-4, 3.0), level(0, 1.05), level(4, 0.9)], scale, 64).do
        'train at the noise levels that were left out: logsnr -5 to -3'
        >>> error_fault([level(-4, 1.25), level(0, 1.05), level(4, 0.7)], scale, 64).do
        'train at the noise levels that were left out: logsnr -5 to -3'
        >>> error_fault([level(-4, 3.0), level(0, 2.5), level(4, 2.0)], scale, 4).do
        'a batch of 256 instead of 4'
        >>> error_fault([level(-4, 1.1), level(0, 1.15), level(4, 1.1)], scale, 8).do
        'a batch of 256 instead of 8'
        >>> error_fault([level(-4, 0.8), level(0, 1.05), level(4, 0.9)], scale, 4) is None
        True
    """
    learned = any(one.excess.high < 1 for one in levels)
    behind = [one for one in levels if one.excess.low > (_LEFT if learned else OFF)]
    worst = max(levels, key=lambda one: one.excess.low)
    least = min(levels, key=lambda one: one.excess.value)
    above = least.excess.value > _BELOW and sum(one.excess.low for one in levels) > _MEAN * len(levels)
    measured: dict[str, Any] = {
        "factor": worst.excess.value,
        "low": worst.excess.low,
        "high": worst.excess.high,
        "fault": True,
    }
    where = f"{worst.logsnr_low:.3g} to {worst.logsnr_high:.3g}"
    if behind and least.excess.low <= _ABOVE:
        low, high = min(one.logsnr_low for one in behind), max(one.logsnr_high for one in behind)
        return Advice(
            f"train at the noise levels that were left out: logsnr {low:.3g} to {high:.3g}",
            f"the error is {_around(worst.excess)} times a linear denoiser's at logsnr {where}, and "
            f"{least.excess.value:.2f} times where it is least",
            f"in the config of lowvar train: times: {own_times}",
            worth=True,
            settings={"times": own_times},
            **measured,
        )
    everywhere = (
        f"the error is {least.excess.value:.2f} to {_around(worst.excess)} times a linear denoiser's everywhere"
    )
    if above and scale.low > _BATCHES * batch_size:
        likely = scale.value if math.isfinite(scale.value) else scale.low
        n = 2 ** math.floor(math.log2(min(likely, 64.0 * batch_size)))
        known = f"{scale.low:.3g} to {scale.high:.3g}" if math.isfinite(scale.high) else f"at least {scale.low:.3g}"
        return Advice(
            f"a batch of {n} instead of {batch_size}",
            f"{everywhere}, and the noise scale is {known}, {scale.low / batch_size:.3g} batches or more",
            f"lowvar train --batch-size {n}",
            worth=True,
            settings={"batch_size": n},
            **measured,
        )
    if not behind:
        return None
    return Advice(
        "train for longer, or with a lower learning rate",
        f"{everywhere}, and the batch is not to blame",
        "lowvar train --updates N",
        worth=True,
        **measured,
    )


def variance_fault(
    own: VarianceCheck, paid: Interval, words: str, settings: Mapping[str, Any], command: str
) -> Advice | None:
    """The fault of the reverse variance, or None.

    Args:
        own: the sampler's variance, or the head's.
        paid: bits a dimension that it costs more than one right number a level.
        words: what the variance is called.
        settings: of `lowvar calibrate`.
        command: that mends it.
    """
    if paid.low <= _BITS:
        return None
    ratios = own.posterior or own.ratio
    place = max(range(len(ratios)), key=lambda k: _off(ratios[k]))
    one = ratios[place]
    if _off(one) <= math.log(OFF):
        return None
    small = one.value > 1
    deviation = one if small else Interval(1 / one.value, 1 / one.high, 1 / max(one.low, 1e-12), one.se / one.value**2)
    return Advice(
        f"another reverse variance: {words} is too {'small' if small else 'large'}",
        f"off by {_around(deviation)} times at logsnr {own.logsnr[place]:.3g}; {paid.value:.3f} ({paid.low:.3f} to "
        f"{paid.high:.3f}) bits a dimension less with one measured number a level",
        command,
        worth=True,
        part="sampling",
        factor=deviation.value,
        low=deviation.low,
        high=deviation.high,
        fault=True,
        settings=dict(settings),
    )


def _off(ratio: Interval) -> float:
    """How far the near end of a ratio's interval is from 1, on the log scale; 0 where it holds 1."""
    if ratio.low > 1:
        return math.log(ratio.low)
    return -math.log(ratio.high) if 0 < ratio.high < 1 else 0.0
