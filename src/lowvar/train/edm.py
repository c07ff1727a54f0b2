r"""EDM's loss weighting and noise distribution (Karras et al. 2022, Table 1).

With s = sigma / alpha the noise level of y = x_t / alpha and sd the standard deviation of the data,

    weight      lambda(s) = (s^2 + sd^2) / (s sd)^2 = snr + 1 / sd^2    on ||x_0 - x0_hat||^2
    noise       log s ~ N(P_mean, P_std^2),  P_mean = -1.2, P_std = 1.2

lambda makes the loss of the raw network F a plain squared error at every level, so it equals `Simple` for
`prediction="edm"`. The noise distribution comes without weights: both change the objective. With `weighted` the law's
probabilities of K bins of the objective's own times, with a uniform share, are a density with weights, and the
objective is left as it is (see `piecewise`). For other training densities see `timesteps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.process.denoiser import Prediction
from lowvar.process.schedule import Schedule
from lowvar.train.objectives import Label, Weighting, log_error_factor
from lowvar.train.piecewise import GivenTimes
from lowvar.train.timesteps import TimeDraw

__all__ = ["EDM", "LognormalTimes"]


@dataclass(frozen=True)
class EDM(Weighting):
    """w = snr + 1 / sd^2.

    Args:
        sigma_data: sd, standard deviation of the data.

    Example:
        >>> round(float(EDM(0.5).target_weight(torch.tensor(1.3), "edm", 0.5)), 12)
        1.0
    """

    sigma_data: float = 0.5
    label: ClassVar[Label] = "changes the objective"

    def __post_init__(self) -> None:
        """Refuses a standard deviation that is not positive."""
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data is {self.sigma_data}; give a number above 0")

    def log_weight(self, logsnr: Tensor, prediction: Prediction, sigma_data: float = 0.5) -> Tensor:
        """See the base class."""
        return log_error_factor("edm", logsnr, self.sigma_data)


@dataclass(frozen=True)
class LognormalTimes(GivenTimes):
    """Times at which sigma / alpha is lognormal, limited to what the schedule reaches from t_min to 1.

    Further arguments as of `GivenTimes`.

    Args:
        schedule: the schedule.
        mean, std: of log(sigma / alpha).

    Raises:
        ValueError: for parameters out of range.

    Example:
        >>> from lowvar.process import CosineVP, Independent
        >>> drawn = LognormalTimes(CosineVP()).draw(Independent(0), range(1000))
        >>> -1.4 < float((-0.5 * CosineVP().logsnr(drawn.t)).mean()) < -1.0
        True
    """

    schedule: Schedule
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        """Refuses parameters out of range."""
        super().__post_init__()
        if self.std <= 0:
            raise ValueError(f"std is {self.std}; give a number above 0")

    def cdf(self, v: Tensor) -> Tensor:
        """See the base class."""
        v = v.double()
        t = v if self.plain.steps is not None else self.plain.t_min + (1 - self.plain.t_min) * v
        return torch.special.ndtr((-self.schedule.logsnr(t) / 2 - self.mean) / self.std)

    def unweighted(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        logsnr = -2 * (self.mean + self.std * torch.special.ndtri(u))
        low, high = float(self.schedule.logsnr(1.0)), float(self.schedule.logsnr(self.schedule.t_min))
        t = self.schedule.time(logsnr.clamp(low, high)).clamp_min(self.schedule.t_min)
        return TimeDraw(t, torch.ones_like(t), torch.zeros_like(t, dtype=torch.int64))
