r"""A learned noise schedule: the monotone map from uniform numbers to times that makes the loss vary least.

The continuous bound does not depend on the schedule between its ends, only its estimator's variance does (Kingma et al.
2021, Sec. 5.1 and App. H: the interior of gamma(t) is trained by gradient descent on the variance). Here the map is
piecewise linear, u -> v(u) with slope 1 / (K q_k) on bin k (`piecewise`), the weights 1 / (K q_k) carry its derivative,
and with l the unweighted loss

    V(theta) = E (weight l)^2 = sum_k m2_k / (K^2 q_k),    q = (1 - m) s + m / K,    s = softmax(theta)

differs from the variance by a constant. With y_i = (weight_i l_i)^2 of an update's samples, k_i their bins,

    dV/dtheta_j = -E [ y (1 - m) s_k / q_k (1[k = j] - s_j) ],    theta <- theta - rate dV/dtheta / (running mean of y).

Its fixed point is that of second moments of the loss, q_k proportional to sqrt(m2_k), reached by small steps instead of
a table. Whatever theta is, the expected gradient is that of uniform times: label `unbiased`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.train.objectives import Label
from lowvar.train.piecewise import continuous, piecewise_times
from lowvar.train.timesteps import FixedTimes, TimeDraw, Times, floored

__all__ = ["LearnedScheduleTimes"]


@dataclass(frozen=True, eq=False)
class LearnedScheduleTimes(Times):
    """Times of a learned monotone map, unbiased.

    Args:
        plain: the objective's own times, which are weighted for.
        bins: K.
        uniform: m; weights are at most 1 / m.
        rate: of the gradient descent.
        decay: of the running mean of y an update, in [0, 1).
        theta: (K,) float64. Default: zeros, uniform times.
        scale: running mean of y, () float64. Default: 0, nothing seen.

    Raises:
        ValueError: for parameters out of range.

    Example:
        >>> times = LearnedScheduleTimes(bins=2).updated(torch.tensor([0, 1]), torch.tensor([3.0, 1.0]))
        >>> q = times.probabilities()
        >>> bool(q[0] > q[1])
        True
    """

    plain: FixedTimes = field(default_factory=continuous)
    bins: int = 32
    uniform: float = 0.1
    rate: float = 1.0
    decay: float = 0.9
    theta: Tensor = field(default=None)  # type: ignore[assignment]
    scale: Tensor = field(default=None)  # type: ignore[assignment]
    label: ClassVar[Label] = "unbiased"

    def __post_init__(self) -> None:
        """Fills in the start; refuses parameters out of range."""
        if self.bins < 1 or not 0 < self.uniform <= 1 or self.rate <= 0 or not 0 <= self.decay < 1:
            raise ValueError(
                f"bins is {self.bins}, uniform {self.uniform}, rate {self.rate}, decay {self.decay}; need at least 1 "
                "bin, uniform in (0, 1], rate above 0 and decay in [0, 1)"
            )
        if self.theta is None:
            object.__setattr__(self, "theta", torch.zeros(self.bins, dtype=torch.float64))
        if self.scale is None:
            object.__setattr__(self, "scale", torch.zeros((), dtype=torch.float64))
        if self.theta.shape != (self.bins,):
            raise ValueError(f"the state is of {len(self.theta)} bins, not of {self.bins}")

    def probabilities(self) -> Tensor:
        """q, (K,) float64."""
        return floored(torch.softmax(self.theta, 0), self.uniform)

    def at(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        return piecewise_times(self.probabilities(), self.plain, u)

    def updated(self, bins: Tensor, losses: Tensor) -> LearnedScheduleTimes:
        """See the base class."""
        bins, losses = bins.cpu(), losses.detach().cpu().double()
        s, q = torch.softmax(self.theta, 0), self.probabilities()
        y = (losses / (self.bins * q[bins])) ** 2
        mean = y.mean()
        scale = mean if float(self.scale) == 0 else self.decay * self.scale + (1 - self.decay) * mean
        if float(scale) == 0:
            return self
        pull = y * (1 - self.uniform) * (s / q)[bins]
        at_bin = torch.zeros_like(s).index_add(0, bins, pull)
        gradient = -(at_bin - pull.sum() * s) / len(y)
        return replace(self, theta=self.theta - self.rate * gradient / scale, scale=scale)

    def state(self) -> dict[str, Tensor]:
        """See the base class."""
        return {"theta": self.theta, "scale": self.scale}

    def restored(self, state: Mapping[str, Tensor]) -> LearnedScheduleTimes:
        """See the base class."""
        return replace(self, theta=state["theta"].double(), scale=state["scale"].double())
