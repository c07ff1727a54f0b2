r"""Times with a mode in the middle and tails that do not vanish (Esser et al. 2024, Eq. 20).

    v = u - s (sin^2(pi u / 2) - u),    -1 <= s <= 2 / (pi - 2),    t = T(v) as for uniform v (`UniformTimes`)

(their formula at 1 - u, so that v increases). s > 0 favours the middle, s < 0 the ends, s = 0 is uniform. Without
weights this changes the objective; with `weighted` see `piecewise`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.train.piecewise import GivenTimes
from lowvar.train.timesteps import TimeDraw

__all__ = ["ModeTimes"]


def _times(u: Tensor, scale: float) -> Tensor:
    return (u - scale * (torch.sin(math.pi / 2 * u) ** 2 - u)).clamp(0, 1)


@dataclass(frozen=True)
class ModeTimes(GivenTimes):
    """Times with heavy tails and a mode; further arguments as of `GivenTimes`.

    Args:
        scale: s.

    Raises:
        ValueError: for parameters out of range.

    Example:
        >>> ModeTimes(1.29).at(torch.tensor([0.25, 0.5, 0.75])).t.round(decimals=3).tolist()
        [0.384, 0.501, 0.617]
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        """Refuses parameters out of range."""
        super().__post_init__()
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale is {self.scale}; give a number in [-1, 2 / (pi - 2)] = [-1, 1.7519]")

    def cdf(self, v: Tensor) -> Tensor:
        """See the base class: by bisection of the increasing map u -> v."""
        v = v.double()
        low, high = torch.zeros_like(v), torch.ones_like(v)
        for _ in range(53):
            middle = (low + high) / 2
            below = _times(middle, self.scale) < v
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high

    def unweighted(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        return self.plain.at(_times(u, self.scale).clamp_max(1 - 2.0**-53))
