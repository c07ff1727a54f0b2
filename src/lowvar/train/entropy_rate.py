r"""Times by the rate at which noise takes information about the image.

For x_t = alpha x_0 + sigma eps the conditional entropy H(x_0 | x_t) grows at the rate (I-MMSE)

    dH = -1/2 mmse(snr) dsnr,    mmse = E ||x_0 - E[x_0 | x_t]||^2,

and its density over time, q(t) proportional to mmse |dsnr / dt| = snr mmse |dlogsnr / dt|, spends samples where
something is decided about the image. The losses that training computes anyway estimate mmse: with an objective
loss = w(logsnr) ||x_0 - x0_hat||^2 / d, on bin k of the time axis (`piecewise`)

    q_k proportional to (running mean of the losses)_k snr_k / w_k (logsnr at the bin's start - at its end),

uniform until each bin has `least` losses, with a uniform share m. With weights 1 / (K q_k) it is unbiased whatever the
estimate: unlike gradient norms it is no optimum for the gradient's variance, but it costs nothing.

Sources: Guo, Shamai & Verdu 2005 (I-MMSE); InfoNoise (arXiv 2602.18647).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.process.denoiser import Prediction
from lowvar.process.schedule import Schedule
from lowvar.train.objectives import Label, Simple, Weighting
from lowvar.train.piecewise import RunningMeans, continuous, floored, piecewise_times
from lowvar.train.timesteps import TimeDraw, Times, UniformTimes

__all__ = ["EntropyRateTimes"]


@dataclass(frozen=True, eq=False)
class EntropyRateTimes(Times):
    """Importance sampling by the conditional entropy's rate, unbiased.

    Args:
        schedule: noise schedule.
        prediction: what the network predicts: the plain loss is the squared error of that.
        weighting: of the objective whose losses come back.
        plain: the times that are weighted for: a table's, or continuous ones.
        sigma_data: standard deviation of the data, for prediction `edm`.
        bins: K.
        uniform: m; weights are at most 1 / m.
        decay: d of the running means a visit.
        least: losses each bin needs before the density is used.
        sums, counts: what was seen (see `piecewise`), (K,) float64 and int64. Default: nothing.

    Raises:
        ValueError: for parameters out of range, or a weighting of 0.

    Example:
        >>> from lowvar.process import CosineVP
        >>> times = EntropyRateTimes(CosineVP(), "epsilon", bins=4, least=1)
        >>> times = times.updated(torch.arange(4), torch.ones(4))
        >>> bool(times.probabilities()[0] > times.probabilities()[1])  # where logsnr falls fastest
        True
    """

    schedule: Schedule
    prediction: Prediction
    weighting: Weighting = field(default_factory=Simple)
    plain: UniformTimes = field(default_factory=continuous)
    sigma_data: float = 0.5
    bins: int = 64
    uniform: float = 0.1
    decay: float = 0.98
    least: int = 5
    sums: Tensor = field(default=None)  # type: ignore[assignment]
    counts: Tensor = field(default=None)  # type: ignore[assignment]
    label: ClassVar[Label] = "unbiased"

    def __post_init__(self) -> None:
        """Fills in an empty history; refuses parameters out of range."""
        empty = RunningMeans.empty(self.bins, self.decay)
        if self.sums is None:
            object.__setattr__(self, "sums", empty.sums)
        if self.counts is None:
            object.__setattr__(self, "counts", empty.counts)
        if self.sums.shape != (self.bins,) or self.counts.shape != (self.bins,):
            raise ValueError(f"the state is of {len(self.sums)} bins, not of {self.bins}")
        if self.least < 1 or not 0 < self.uniform <= 1:
            raise ValueError(
                f"least is {self.least} and uniform {self.uniform}; need least >= 1, uniform in (0, 1]: without a "
                "uniform share the weights have no bound"
            )
        if not bool(torch.isfinite(self._factor()).all()):
            raise ValueError(
                f"{type(self.weighting).__name__} gives the squared error no weight, so that losses say nothing of it; "
                "give another weighting or other times"
            )

    def _factor(self) -> Tensor:
        """What a bin's loss is multiplied by, (K,) float64."""
        least = max(self.schedule.t_min, self.plain.t_min)
        v = torch.arange(2 * self.bins + 1, dtype=torch.float64) / (2 * self.bins)
        t = self.plain.t_min + (1 - self.plain.t_min) * v if self.plain.steps is None else v
        logsnr = self.schedule.logsnr(t.clamp_min(least)).clamp(-60, 60)
        ends, middle = logsnr[::2], logsnr[1::2]
        log_w = self.weighting.log_weight(middle, self.prediction, self.sigma_data)
        return torch.exp(middle - log_w) * (ends[:-1] - ends[1:]).clamp_min(0)

    @property
    def warm(self) -> bool:
        """Whether every bin has enough losses."""
        return bool((self.counts >= self.least).all())

    def probabilities(self) -> Tensor:
        """q, (K,) float64."""
        means = RunningMeans(self.sums, self.counts, self.decay).mean.clamp_min(0)
        return floored(means * self._factor() if self.warm else torch.zeros_like(means), self.uniform)

    def at(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        return piecewise_times(self.probabilities(), self.plain, u)

    def updated(self, bins: Tensor, losses: Tensor) -> EntropyRateTimes:
        """See the base class."""
        means = RunningMeans(self.sums, self.counts, self.decay).updated(bins, losses)
        return replace(self, sums=means.sums, counts=means.counts)

    def state(self) -> dict[str, Tensor]:
        """See the base class."""
        return {"sums": self.sums, "counts": self.counts}

    def restored(self, state: Mapping[str, Tensor]) -> EntropyRateTimes:
        """See the base class."""
        return replace(self, sums=state["sums"].double(), counts=state["counts"].long())
