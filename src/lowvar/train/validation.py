r"""Validation loss on fixed images, times and noise, by noise level, with an interval that can be believed.

The images are the first of the calibration split; each is evaluated four times, at the times of a `meter` design whose
density follows the spread of the linear denoiser's loss on these images, so it depends on the data alone: times and
noise are the same in every validation and every run on the same data, and validations compare on common noise. The
parts of the linear denoiser's loss (`linear_loss`), known exactly for every image, are the control variates.

What is estimated is the plain mean over uniform times, whatever times are trained on, so that runs compare. `low` and
`high` are a 95% interval for the loss *on these images*, over all times and noise; `population_low` and
`population_high` are for all such images. The 8 bins are the times' eighths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.denoiser import NetworkDenoiser, Prediction
from lowvar.process.noise import Independent
from lowvar.process.schedule import Schedule
from lowvar.train.conditional import of_classes
from lowvar.train.draws import ImageSource
from lowvar.train.linear_loss import FEATURES, LinearLoss
from lowvar.train.meter import Measured, allocation, make_design, measure
from lowvar.train.objectives import Objective, Weighting
from lowvar.train.timesteps import UniformTimes

__all__ = ["BINS", "Bin", "ValidationLoss", "ValidationSet", "logsnr_edges"]

BINS = 8
_SEED = 0x6C76  # one for all runs: validation losses of different runs are on common noise
_EDGE = 30.0
_CHUNK = 256  # of the passes over the images alone: the design does not depend on the batch size


def logsnr_edges(schedule: Schedule, t_min: float = 0.0) -> list[float]:
    """Edges of the 8 bins in logsnr, decreasing, 9 numbers within +-30: the logsnr at the eighths of [t_min, 1]."""
    logsnr = schedule.logsnr(t_min + (1 - t_min) * torch.linspace(0, 1, BINS + 1, dtype=torch.float64))
    return logsnr.clamp(-_EDGE, _EDGE).tolist()


@dataclass(frozen=True)
class Bin:
    """The validation loss at one range of noise levels.

    Attributes:
        logsnr_low, logsnr_high: the range.
        n: evaluations.
        loss, se: mean, and standard error given the images.
        error, error_se: likewise, of the unweighted squared error of the prediction target.
        variance, variance_se: of the head's term in bits a dimension; None without head.
    """

    logsnr_low: float
    logsnr_high: float
    n: int
    loss: float
    se: float
    error: float
    error_se: float
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
        low, high: 95% interval for the loss on these images, over times and noise.
        population_low, population_high: 95% interval for all such images.
        error: mean squared error of the prediction target, unweighted.
        error_low, error_high: 95% interval for it on these images.
        variance: the head's term in bits a dimension; None without head.
        bins: by noise level, from little noise to much.
    """

    loss: float
    low: float
    high: float
    population_low: float
    population_high: float
    error: float
    error_low: float
    error_high: float
    variance: float | None
    bins: tuple[Bin, ...]


class ValidationSet:
    """The fixed images, times and noise.

    Args:
        images: the calibration split.
        schedule: noise schedule.
        times: the uniform times that are trained on (a table's length, or continuous).
        limit: images used of a larger split.
        batch_size: evaluations at once.
        prediction, weighting, sigma_data: of the loss that is expected; another one is measured as correctly, with a
            wider interval.
        seed: of times and noise.
        density: of the times by bin, (8,), for example `allocation(measured.residual)` of an earlier validation;
            default: from the images.

    Raises:
        ValueError: if there are fewer than two images.

    Example:
        >>> from lowvar.data import load
        >>> from lowvar.train.objectives import Simple
        >>> from lowvar.process import CosineVP
        >>> data = ValidationSet(load("digits").calibration, CosineVP(), UniformTimes(), limit=64)
        >>> denoiser = NetworkDenoiser(lambda x, t: torch.zeros_like(x), CosineVP())
        >>> found = data.summary(data.values(denoiser, Objective(Simple())), has_variance=False)
        >>> found.low < 1.0 < found.high, len(found.bins)
        (True, 8)
    """

    def __init__(
        self,
        images: ImageSource,
        schedule: Schedule,
        times: UniformTimes,
        limit: int = 1024,
        batch_size: int = 256,
        *,
        prediction: Prediction = "epsilon",
        weighting: Weighting | None = None,
        sigma_data: float = 0.5,
        seed: int = _SEED,
        density: Tensor | None = None,
    ) -> None:
        self.images, self.schedule, self.times, self.batch_size = images, schedule, times, batch_size
        self.n = min(len(images), limit)
        if self.n < 2:
            raise ValueError(f"there are {self.n} validation images; a validation needs at least 2")
        self._noise = Independent(seed)
        self.linear = LinearLoss.of(self.batches(), prediction, weighting, sigma_data)
        spread = torch.zeros(BINS, dtype=torch.float64)
        expected = []
        for x0 in self.batches():
            expected.append(self.linear.given_image(x0, schedule, times, BINS))
            spread += self.linear.spread(x0, schedule, times, BINS) ** 2 * (len(x0) / self.n)
        self._expected = torch.cat(expected)
        self.design = make_design(self.n, allocation(spread.sqrt()) if density is None else density, self._noise)

    def batches(self) -> Iterator[Tensor]:
        """The images."""
        for rows in torch.arange(self.n).split(_CHUNK):
            yield self.images.images(rows)

    def __len__(self) -> int:
        """Number of evaluations."""
        return len(self.design)

    def values(
        self,
        denoiser: NetworkDenoiser,
        objective: Objective,
        part: int = 0,
        parts: int = 1,
        device: torch.device | str = "cpu",
        labels: Tensor | None = None,
    ) -> Tensor:
        """(loss, error, variance term, control variates) of every evaluation, (len, 7) float64.

        Rows that another part evaluates are zeros. `labels` are the images' class numbers, for a network that is
        conditioned on them.
        """
        table = torch.zeros(len(self), 3 + len(FEATURES), dtype=torch.float64)
        for rows in torch.arange(part, len(self), parts).split(self.batch_size):
            x0 = self.images.images(rows % self.n)
            level = self.schedule.at(self.times.at(self.design.u[rows]).t)
            eps = self._noise.normal(rows, x0.shape[1:], draw=0, device=device)
            with torch.no_grad():
                own = denoiser if labels is None else of_classes(denoiser, labels[rows % self.n].to(device))
                losses = objective.losses(own, x0.to(device), eps, level.to(device))
            columns = [losses.loss, losses.error, losses.loss * 0 if losses.variance is None else losses.variance]
            table[rows, :3] = torch.stack(columns, 1).double().cpu()
            table[rows, 3:] = self.linear.features(x0, eps.cpu(), level)
        return table

    def measured(self, values: Tensor, column: int = 0) -> Measured:
        """What the meter says of a column of a table of values."""
        return measure(self.design, values[:, column], values[:, 3:], self._expected)

    def change(self, before: Tensor, after: Tensor) -> tuple[float, float, float]:
        """By how much the loss changed between two tables of values, with a 95% interval: on common noise.

        The noise, times and images are the same, so the interval is that of the differences, evaluation by evaluation.
        """
        total = measure(self.design, (after - before)[:, 0], after[:, 3:], self._expected).total
        return total.value, *total.interval

    def summary(self, values: Tensor, has_variance: bool) -> ValidationLoss:
        """Means, intervals and bins of a table of values."""
        loss, error = self.measured(values), self.measured(values, 1)
        variance = self.measured(values, 2) if has_variance else None
        edges = logsnr_edges(self.schedule, self.times.t_min)
        bins = []
        for k in range(BINS):
            value, se, count = loss.bins[k].tolist()
            head = (None, None) if variance is None else variance.bins[k, :2].tolist()
            bins.append(Bin(edges[k + 1], edges[k], int(count), value, se, *error.bins[k, :2].tolist(), *head))
        return ValidationLoss(
            loss.total.value,
            *loss.total.interval,
            *loss.total.population,
            error.total.value,
            *error.total.interval,
            None if variance is None else variance.total.value,
            tuple(bins),
        )
