r"""Importance sampling as a change of the uniform number: densities that are constant on K bins of [0, 1).

The plain time is t = T(v) with v ~ U(0, 1) (`UniformTimes`, a table or continuous). Let v have the density K q_k on bin
[k / K, (k + 1) / K) instead, and weight by the inverse:

    u in bin k of the cumulated q,   v = (k + (u - Q_k) / q_k) / K,   weight = 1 / (K q_k),   Q_k = q_0 + .. + q_(k-1)

Then E[weight f(T(v))] = integral of f(T(v)) dv exactly, for any q > 0 and any T, with steps or without: unbiased. The
map u -> v increases, so strata of u are strata of v. A share m of the uniform density, q >= m / K, bounds every weight
by 1 / m. A smooth density enters by its probabilities of the bins; what that loses is efficiency, not exactness.

What a density learns comes from running means by bin, of values y seen at bin k one visit after the other,

    s_k <- d s_k + (1 - d) y,    mean_k = s_k / (1 - d^(c_k)),    c_k visits

(several visits within one update count with their average).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowvar.train.timesteps import TimeDraw, UniformTimes

__all__ = ["RunningMeans", "continuous", "floored", "piecewise_times"]


def continuous() -> UniformTimes:
    """Continuous uniform times from 0.001, the least time of most schedules, to 1.

    Example:
        >>> continuous().at(torch.tensor([0.0, 0.5])).t.tolist()
        [0.001, 0.5005]
    """
    return UniformTimes(None, t_min=1e-3)


def floored(values: Tensor, uniform: float) -> Tensor:
    """Probabilities (1 - m) values / sum + m / K, (K,) float64; uniform where all values are 0.

    Args:
        values: (K,), nonnegative.
        uniform: m, in (0, 1].

    Raises:
        ValueError: if m is out of range or a value negative or not finite.

    Example:
        >>> floored(torch.tensor([3.0, 1.0]), 0.5).tolist()
        [0.625, 0.375]
    """
    if not 0 < uniform <= 1:
        raise ValueError(f"uniform is {uniform}; give a share in (0, 1]: it bounds the weights by 1 / uniform")
    values = values.double()
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError("a density has a value that is negative or not finite; give nonnegative numbers")
    flat = torch.full_like(values, 1 / len(values))
    total = values.sum()
    return flat if float(total) == 0 else (1 - uniform) * values / total + uniform * flat


def piecewise_times(probabilities: Tensor, plain: UniformTimes, u: Tensor) -> TimeDraw:
    """Times of the uniform numbers u in [0, 1), (n,), with weights and the numbers k of the bins.

    Args:
        probabilities: q, (K,) float64, positive, of sum 1.
        plain: the times that are weighted for.
        u: uniform numbers.

    Example:
        >>> drawn = piecewise_times(torch.tensor([0.75, 0.25]).double(), UniformTimes(None), torch.tensor([0.375, 0.9]))
        >>> drawn.t.round(decimals=6).tolist(), drawn.weight.round(decimals=6).tolist(), drawn.bin.tolist()
        ([0.25, 0.8], [0.666667, 2.0], [0, 1])
    """
    q, u = probabilities.double(), u.double().cpu()
    bins = len(q)
    upper = q.cumsum(0)
    k = torch.searchsorted(upper, u, right=True).clamp_max(bins - 1)
    inside = ((u - (upper - q)[k]) / q[k]).clamp(0, 1 - 2.0**-30)  # rounding stays within the bin
    return TimeDraw(plain.at((k + inside) / bins).t, 1 / (bins * q[k]), k)


@dataclass(frozen=True, eq=False)
class RunningMeans:
    """Exponential running means of values by bin.

    Args:
        sums: s, (K,) float64.
        counts: c, (K,) int64.
        decay: d, in [0, 1).

    Raises:
        ValueError: if the decay is out of range or the shapes differ.

    Example:
        >>> means = RunningMeans.empty(2, 0.5).updated(torch.tensor([0, 0, 1]), torch.tensor([1.0, 3.0, 5.0]))
        >>> means.mean.tolist(), means.counts.tolist()
        ([2.0, 5.0], [2, 1])
    """

    sums: Tensor
    counts: Tensor
    decay: float

    def __post_init__(self) -> None:
        """Refuses parameters out of range."""
        if not 0 <= self.decay < 1 or self.sums.shape != self.counts.shape or self.sums.dim() != 1:
            raise ValueError(
                f"decay is {self.decay}, the state of {tuple(self.sums.shape)} sums and {tuple(self.counts.shape)} "
                "counts; need a decay in [0, 1) and one sum and one count a bin"
            )

    @classmethod
    def empty(cls, bins: int, decay: float) -> RunningMeans:
        """Nothing seen yet."""
        if bins < 1:
            raise ValueError(f"bins is {bins}; give a whole number of at least 1")
        return cls(torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.int64), decay)

    @property
    def mean(self) -> Tensor:
        """The means, (K,) float64; 0 where nothing was seen."""
        seen = 1 - self.decay ** self.counts.double()
        return torch.where(self.counts > 0, self.sums / seen.clamp_min(1e-300), torch.zeros_like(self.sums))

    def updated(self, bins: Tensor, values: Tensor) -> RunningMeans:
        """After values (n,) were seen at bins (n,) in one update."""
        bins, values = bins.cpu(), values.detach().cpu().double()
        k = len(self.sums)
        visits = torch.bincount(bins, minlength=k)
        average = torch.zeros_like(self.sums).index_add(0, bins, values) / visits.clamp_min(1)
        kept = self.decay ** visits.double()
        return replace(self, sums=kept * self.sums + (1 - kept) * average, counts=self.counts + visits)
