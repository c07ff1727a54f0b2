r"""Logit-normal times (Esser et al. 2024, Sec. 3.1).

    v = sigmoid(mean + std z),  z ~ N(0, 1),    t = T(v) as for uniform v (`UniformTimes`)

so the middle of the time axis is trained on most (mean > 0: more noise). Without weights this changes the objective;
with `weighted` the density is the law's probability of each of K bins with a uniform share m, and the weights make the
expected gradient that of the objective's own times (see `piecewise`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.train.piecewise import GivenTimes
from lowvar.train.timesteps import TimeDraw

__all__ = ["LogitNormalTimes"]


@dataclass(frozen=True)
class LogitNormalTimes(GivenTimes):
    """Logit-normal times; further arguments as of `GivenTimes`.

    Args:
        mean, std: of logit v.

    Raises:
        ValueError: for parameters out of range.

    Example:
        >>> times = LogitNormalTimes(0.0, 1.0)
        >>> times.at(torch.tensor([0.1587, 0.5])).t.round(decimals=2).tolist(), times.label
        ([0.27, 0.5], 'changes the objective')
        >>> LogitNormalTimes(weighted=True).label
        'unbiased'
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        """Refuses parameters out of range."""
        super().__post_init__()
        if self.std <= 0:
            raise ValueError(f"std is {self.std}; give a number above 0")

    def cdf(self, v: Tensor) -> Tensor:
        """See the base class."""
        return torch.special.ndtr((torch.logit(v.double()) - self.mean) / self.std)

    def unweighted(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        return self.plain.at(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)))
