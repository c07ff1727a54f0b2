r"""Where a network is worse than it need be: its error by noise level over that of a linear denoiser.

Any denoiser that was trained well enough at a noise level is at least as good there as the linear one fitted to the
training images, whose error on the same held-out images is known exactly over the noise (`lowvar.train.optimum`,
`high`). So with E_k the network's mean squared error of its own target in bin k of the times and H_k the linear one's,

    excess_k = (E_k + h) / (H_k + h),    h a tenth of the mean H,

is at most 1 up to noise, or the network has not learned the level. h keeps a level out of which there is next to
nothing to lose, such as the noisiest of a noise-predicting network, from counting as much as one that matters.

What the pattern says: far above 1 at some levels and near it at others, the training times have left these levels out;
above 1 everywhere, the weights are still far from where they settle, for want of updates or because single gradients
are too noisy for the batch and the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.data import Images
from lowvar.metrics.intervals import Interval
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.train import Objective, UniformTimes
from lowvar.train.optimum import optimum_bounds
from lowvar.train.validation import BINS, ValidationSet

__all__ = ["LevelError", "level_errors"]

_NORMAL = 1.959964
_FLOOR = 0.1


@dataclass(frozen=True)
class LevelError:
    """A noise level's error.

    Attributes:
        logsnr_low, logsnr_high: the bin.
        error: of the network, in its own target's units, over times and noise on the same images.
        low, high: bounds of the least error of any network (`lowvar.train.optimum`).
        excess: the error over `high`, both with the floor h.
    """

    logsnr_low: float
    logsnr_high: float
    error: Interval
    low: float
    high: float
    excess: Interval

    @property
    def logsnr(self) -> float:
        """The middle of the bin."""
        return (self.logsnr_low + self.logsnr_high) / 2


def level_errors(
    denoiser: NetworkDenoiser,
    objective: Objective,
    train: Images,
    held_out: Images,
    times: UniformTimes,
    *,
    limit: int = 256,
    labels: Sequence[int] | Tensor | None = None,
    train_labels: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[LevelError, ...]:
    """Errors in 8 bins of the times, little noise first; four evaluations an image.

    None of images that are all alike: a linear denoiser makes no error there, so there is no standard.

    Args:
        denoiser: the network.
        objective: its plain loss.
        train: images that the linear denoiser is fitted to.
        held_out: others.
        times: uniform ones.
        limit: held-out images at most.
        labels, train_labels: classes, for a network that is conditioned on them.
        device: of the network.

    Example:
        >>> from lowvar.data import load
        >>> from lowvar.process import CosineVP
        >>> from lowvar.train import Simple
        >>> data = load("digits")
        >>> lazy = NetworkDenoiser(lambda x, t: torch.zeros_like(x), CosineVP(), "sample")
        >>> found = level_errors(lazy, Objective(Simple()), data.train, data.calibration, UniformTimes(), limit=32)
        >>> found[0].excess.low > found[-1].excess.high > 0.9, len(found)
        (True, 8)
    """
    images = ValidationSet(
        held_out, denoiser.schedule, times, limit, prediction=denoiser.prediction, sigma_data=denoiser.sigma_data
    )
    known = None if labels is None else torch.as_tensor(labels)
    values = images.values(denoiser, objective, device=device, labels=known)
    bins = images.summary(values, has_variance=False).bins
    bounds = optimum_bounds(
        train,
        images.batches(),
        denoiser.schedule,
        times,
        denoiser.prediction,
        sigma_data=denoiser.sigma_data,
        labels=train_labels,
        bins=BINS,
    )
    if not bounds.high > 0:
        return ()
    floor = _FLOOR * bounds.high
    found = []
    for one, (low, high) in zip(bins, bounds.bins, strict=True):
        half = _NORMAL * one.error_se
        error = Interval(one.error, one.error - half, one.error + half, one.error_se)
        value, least, most = ((v + floor) / (high + floor) for v in (error.value, error.low, error.high))
        excess = Interval(value, least, most, one.error_se / (high + floor))
        found.append(LevelError(one.logsnr_low, one.logsnr_high, error, low, high, excess))
    return tuple(found)
