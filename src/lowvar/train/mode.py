r"""Times with a mode in the middle and tails that do not vanish (Esser et al. 2024, Eq. 20).

    v = u - s (sin^2(pi u / 2) - u),    -1 <= s <= 2 / (pi - 2),    t = T(v) as for uniform v (`UniformTimes`)

(their formula at 1 - u, so that v increases). s > 0 favours the middle, s < 0 the ends, s = 0 is uniform. Without
weights this changes the objective; with `weighted` see `piecewise`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowvar.train.piecewise import GivenTimes
from lowvar.train.timesteps import TimeDraw

__all__ = ["ModeTimes"]


def _times(u: Tensor, scale: float) -> Tensor:
    return (u - scale * (torch.sin(math.pi / 2 * u) ** 2 - u)).clamp(0, 1)


@lru_cache(maxsize=8)
def _cdf(scale: float, bins: int) -> Tensor:
    """The probability of v below the edges k / K, (K + 1,) float64, by bisection of the increasing `_times`."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    low, high = torch.zeros_like(edges), torch.ones_like(edges)
    for _ in range(53):
        middle = (low + high) / 2
        below = _times(middle, scale) < edges
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    high[0], high[-1] = 0, 1
    return high


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

    def law(self) -> Tensor:
        """See the base class."""
        return _cdf(self.scale, self.bins).diff().clamp_min(0)

    def unweighted(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        return self.plain.at(_times(u, self.scale).clamp_max(1 - 2.0**-53))
