r"""Validation loss on fixed noise, by noise level.

Image i of N is evaluated at 4 times, one in each quarter of [0, 1],

    u_{i,r} = (r + (pi_r(i) + 1/2) / N) / 4,      r = 0 .. 3,

with pi_r seeded permutations, so that all timesteps are covered evenly; noise and times are the same in every
validation and every run. The estimate is the mean over images of an image's mean loss, its standard error that of a
mean over images. The 8 bins are the times' eighths: an image has at most one evaluation in a bin, so a bin's standard
error is that of a plain mean. Stratification is not credited to either: both are on the safe side.

Times are uniform whatever times are trained on, so that runs compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.noise import Independent
from lowvar.process.schedule import Schedule
from lowvar.train.conditional import of_classes
from lowvar.train.draws import ImageSource
from lowvar.train.objectives import Objective
from lowvar.train.timesteps import UniformTimes

__all__ = ["BINS", "Bin", "ValidationLoss", "ValidationSet", "logsnr_edges"]

BINS = 8
_STRATA = 4
_SEED = 0x6C76  # one for all runs: validation losses of different runs are on common noise
_EDGE = 30.0


def logsnr_edges(schedule: Schedule) -> list[float]:
    """Edges of the 8 bins in logsnr, decreasing, 9 numbers within +-30: the logsnr at times 0, 1/8, .., 1."""
    logsnr = schedule.logsnr(torch.linspace(0, 1, BINS + 1, dtype=torch.float64))
    return logsnr.clamp(-_EDGE, _EDGE).tolist()


@dataclass(frozen=True)
class Bin:
    """The validation loss at one range of noise levels.

    Attributes:
        logsnr_low, logsnr_high: the range.
        n: evaluations.
        loss, se: mean and standard error.
        variance, variance_se: of the head's term in bits a dimension; None without head.
    """

    logsnr_low: float
    logsnr_high: float
    n: int
    loss: float
    se: float
    variance: float | None = None
    variance_se: float | None = None

    @property
    def logsnr(self) -> float:
        """The middle of the range."""
        return (self.logsnr_low + self.logsnr_high) / 2


@dataclass(frozen=True)
class ValidationLoss:
    """A validation.

    Attributes:
        loss: mean objective.
        low, high: 95% interval over images.
        error: mean squared error of the prediction target, unweighted.
        variance: the head's term in bits a dimension; None without head.
        bins: by noise level, from little noise to much.
    """

    loss: float
    low: float
    high: float
    error: float
    variance: float | None
    bins: tuple[Bin, ...]


def _mean_se(values: Tensor) -> tuple[float, float]:
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    return float(values.mean()), float(values.std() / math.sqrt(n)) if n > 1 else math.nan


class ValidationSet:
    """The fixed images, times and noise.

    Args:
        images: the calibration split.
        schedule: noise schedule.
        times: the uniform times that are trained on (a table's length, or continuous).
        limit: images used of a larger split.
        batch_size: evaluations at once.
    """

    def __init__(
        self, images: ImageSource, schedule: Schedule, times: UniformTimes, limit: int = 1024, batch_size: int = 256
    ) -> None:
        self.images, self.schedule, self.times, self.batch_size = images, schedule, times, batch_size
        self.n = min(len(images), limit)
        self._noise = Independent(_SEED)
        ranks = [
            torch.argsort(torch.argsort(self._noise.uniform(range(self.n), (), draw=1 + r, dtype=torch.float64)))
            for r in range(_STRATA)
        ]
        position = (torch.stack(ranks).double() + 0.5) / self.n
        self._u = ((torch.arange(_STRATA)[:, None] + position) / _STRATA).flatten()  # stratum by stratum

    def __len__(self) -> int:
        """Number of evaluations."""
        return len(self._u)

    def values(
        self,
        denoiser: NetworkDenoiser,
        objective: Objective,
        part: int = 0,
        parts: int = 1,
        device: torch.device | str = "cpu",
        labels: Tensor | None = None,
    ) -> Tensor:
        """(loss, error, variance term) of every evaluation, (len, 3) float64; zeros where another part evaluates.

        `labels` are the images' class numbers, for a network that is conditioned on them.
        """
        table = torch.zeros(len(self), 3, dtype=torch.float64)
        for rows in torch.arange(part, len(self), parts).split(self.batch_size):
            x0 = self.images.images(rows % self.n).to(device)
            eps = self._noise.normal(rows, x0.shape[1:], draw=0, device=device)
            level = self.schedule.at(self.times.at(self._u[rows]).t).to(device)
            with torch.no_grad():
                own = denoiser if labels is None else of_classes(denoiser, labels[rows % self.n].to(device))
                losses = objective.losses(own, x0, eps, level)
            columns = [losses.loss, losses.error, losses.loss * 0 if losses.variance is None else losses.variance]
            table[rows] = torch.stack(columns, 1).double().cpu()
        return table

    def summary(self, values: Tensor, has_variance: bool) -> ValidationLoss:
        """Means, intervals and bins of a table of values."""
        per_image = values.reshape(_STRATA, self.n, 3).mean(0)
        loss, se = _mean_se(per_image[:, 0])
        edges = logsnr_edges(self.schedule)
        bins = []
        for k in range(BINS):
            inside = values[(self._u * BINS).long().clamp_max(BINS - 1) == k]
            variance = _mean_se(inside[:, 2]) if has_variance else (None, None)
            bins.append(Bin(edges[k + 1], edges[k], len(inside), *_mean_se(inside[:, 0]), *variance))
        reach = 1.96 * se
        variance = float(per_image[:, 2].mean()) if has_variance else None
        return ValidationLoss(loss, loss - reach, loss + reach, float(per_image[:, 1].mean()), variance, tuple(bins))
