r"""Logit-normal times (Esser et al. 2024, Sec. 3.1).

    v = sigmoid(mean + std z),  z ~ N(0, 1),    t = T(v) as for uniform v (`UniformTimes`)

so the middle of the time axis is trained on most (mean > 0: more noise). Without weights this changes the objective;
with `weighted` the density is the law's probability of each of K bins with a uniform share m, and the weights make the
expected gradient that of uniform times (see `piecewise`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowvar.train.objectives import Label
from lowvar.train.piecewise import continuous, piecewise_times
from lowvar.train.timesteps import FixedTimes, TimeDraw, UniformTimes, floored

__all__ = ["LogitNormalTimes"]


@dataclass(frozen=True)
class LogitNormalTimes(FixedTimes):
    """Logit-normal times.

    Args:
        mean, std: of logit v.
        weighted: whether weights make it unbiased.
        uniform: m of the weighted density; weights are at most 1 / m.
        plain: what uniform numbers become: a table's times, or continuous ones.
        bins: K of the weighted density.

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
    weighted: bool = False
    uniform: float = 0.1
    plain: UniformTimes = field(default_factory=continuous)
    bins: int = 256

    def __post_init__(self) -> None:
        """Refuses parameters out of range."""
        if self.std <= 0 or not 0 < self.uniform <= 1 or self.bins < 1:
            raise ValueError(
                f"std is {self.std}, uniform {self.uniform}, bins {self.bins}; need std above 0, uniform in (0, 1] and "
                "at least 1 bin"
            )

    @property
    def label(self) -> Label:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`unbiased` with weights."""
        return "unbiased" if self.weighted else "changes the objective"

    def probabilities(self) -> Tensor:
        """q of the weighted density, (K,) float64."""
        edges = torch.logit(torch.linspace(0, 1, self.bins + 1, dtype=torch.float64))
        return floored(torch.special.ndtr((edges - self.mean) / self.std).diff(), self.uniform)

    def at(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        if self.weighted:
            return piecewise_times(self.probabilities(), self.plain, u)
        return self.plain.at(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.double())))
