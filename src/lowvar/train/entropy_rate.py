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

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowvar.process.denoiser import Prediction
from lowvar.process.schedule import Schedule
from lowvar.train.objectives import LikelihoodOnly, Simple, Weighting
from lowvar.train.piecewise import LearnedBins
from lowvar.train.timesteps import UniformTimes

__all__ = ["EntropyRateTimes"]


@dataclass(frozen=True, eq=False)
class EntropyRateTimes(LearnedBins):
    """Importance sampling by the conditional entropy's rate, unbiased; further arguments as of `LearnedBins`.

    Args:
        schedule: noise schedule.
        prediction: what the network predicts: the plain loss is the squared error of that.
        weighting: of the objective whose losses come back.
        sigma_data: standard deviation of the data, for prediction `edm`.

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
    sigma_data: float = 0.5
    bins: int = field(default=64, kw_only=True)
    decay: float = field(default=0.98, kw_only=True)

    def __post_init__(self) -> None:
        """Refuses what the base class does, and a weighting that says nothing of the squared error."""
        super().__post_init__()
        if isinstance(self.weighting, LikelihoodOnly):
            raise ValueError(
                "LikelihoodOnly gives the squared error no weight, so that losses say nothing of it; give another "
                "weighting or other times"
            )

    def values(self) -> Tensor:
        """See the base class: a bin's loss times snr / w and the logsnr that it spans."""
        v = torch.arange(2 * self.bins + 1, dtype=torch.float64) / (2 * self.bins)
        table = isinstance(self.plain, UniformTimes) and self.plain.steps is not None
        t = v if table else self.plain.at(v).t
        logsnr = self.schedule.logsnr(t.clamp_min(self.schedule.t_min)).clamp(-60, 60)
        ends, middle = logsnr[::2], logsnr[1::2]
        log_w = self.weighting.log_weight(middle, self.prediction, self.sigma_data)
        factor = torch.exp(middle - log_w) * (ends[:-1] - ends[1:]).clamp_min(0)
        return self.means.mean.clamp_min(0) * factor
