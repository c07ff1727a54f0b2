r"""Importance sampling as a change of the uniform number: densities that are constant on K bins of [0, 1).

The plain time is t = T(v) with v ~ U(0, 1): T is the inverse cdf of the objective's own times, uniform ones (a table or
continuous) or EDM's lognormal ones, say. Let v have the density K q_k on bin [k / K, (k + 1) / K) instead, and weight
by the inverse (times the plain weight, where T has one):

    u in bin k of the cumulated q,   v = (k + (u - Q_k) / q_k) / K,   weight = 1 / (K q_k),   Q_k = q_0 + .. + q_(k-1)

Then E[weight f(T(v))] = integral of f(T(v)) dv exactly, for any q > 0 and any T, with steps or without: unbiased. The
map u -> v increases, so strata of u are strata of v. A share m of the uniform density, q >= m / K, bounds every weight
by 1 / m. A smooth density enters by its probabilities of the bins; what that loses is efficiency, not exactness.

What a density learns comes from running means by bin, of values y seen at bin k one visit after the other,

    s_k <- d s_k + (1 - d) y,    mean_k = s_k / (1 - d^(c_k)),    c_k visits

(several visits within one update count with their average).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from lowvar.train.objectives import Label
from lowvar.train.timesteps import FixedTimes, TimeDraw, Times, UniformTimes, floored

__all__ = ["GivenTimes", "LearnedBins", "RunningMeans", "continuous", "piecewise_times"]


def continuous() -> UniformTimes:
    """Continuous uniform times from 0.001, the least time of most schedules, to 1.

    Example:
        >>> continuous().at(torch.tensor([0.0, 0.5])).t.tolist()
        [0.001, 0.5005]
    """
    return UniformTimes(None, t_min=1e-3)


def piecewise_times(probabilities: Tensor, plain: FixedTimes, u: Tensor) -> TimeDraw:
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
    drawn = plain.at((k + inside) / bins)
    return TimeDraw(drawn.t, drawn.weight / (bins * q[k]), k)


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


@dataclass(frozen=True, eq=False, kw_only=True)
class LearnedBins(Times):
    """Importance sampling by running means: a density of K bins that is uniform until each bin has seen enough.

    Args:
        plain: the objective's own times, which are weighted for.
        bins: K.
        uniform: m; weights are at most 1 / m.
        decay: d of the running means a visit.
        least: values each bin needs before the density is used.
        means: what was seen. Default: nothing.

    Raises:
        ValueError: for parameters out of range.
    """

    plain: FixedTimes = field(default_factory=continuous)
    bins: int = 32
    uniform: float = 0.1
    decay: float = 0.95
    least: int = 5
    means: RunningMeans = field(default=None)  # type: ignore[assignment]
    label: ClassVar[Label] = "unbiased"

    def __post_init__(self) -> None:
        """Fills in an empty history; refuses parameters out of range."""
        if self.means is None:
            object.__setattr__(self, "means", RunningMeans.empty(self.bins, self.decay))
        if self.means.sums.shape != (self.bins,):
            raise ValueError(f"the state is of {len(self.means.sums)} bins, not of {self.bins}")
        if self.least < 1 or not 0 < self.uniform <= 1:
            raise ValueError(
                f"least is {self.least} and uniform {self.uniform}; need least >= 1, uniform in (0, 1]: without a "
                "uniform share the weights have no bound"
            )

    @abstractmethod
    def values(self) -> Tensor:
        """What the density is proportional to, (K,) nonnegative float64, once it is warm."""

    @property
    @final
    def warm(self) -> bool:
        """Whether every bin has seen enough."""
        return bool((self.means.counts >= self.least).all())

    @final
    def probabilities(self) -> Tensor:
        """q, (K,) float64."""
        return floored(self.values() if self.warm else torch.zeros_like(self.means.sums), self.uniform)

    @final
    def at(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        return piecewise_times(self.probabilities(), self.plain, u)

    @final
    def updated(self, bins: Tensor, losses: Tensor) -> Self:
        """See the base class."""
        return replace(self, means=self.means.updated(bins, losses))

    @final
    def state(self) -> dict[str, Tensor]:
        """See the base class."""
        return {"sums": self.means.sums, "counts": self.means.counts}

    @final
    def restored(self, state: Mapping[str, Tensor]) -> Self:
        """See the base class."""
        return replace(self, means=RunningMeans(state["sums"].double(), state["counts"].long(), self.decay))


@dataclass(frozen=True, kw_only=True)
class GivenTimes(FixedTimes):
    """Times of a given law: as they are they change the objective, with weights they do not.

    Args:
        weighted: whether weights make it unbiased for the objective's own times.
        uniform: m of the weighted density; weights are at most 1 / m.
        plain: the uniform times v -> t in whose v the law is given: a table's, or continuous ones.
        own: the objective's own times, where they are not `plain`: those that are weighted for, and in whose uniform
            number the bins are. None: `plain`.
        bins: K of the weighted density.

    Raises:
        ValueError: for parameters out of range.
    """

    weighted: bool = False
    uniform: float = 0.1
    plain: UniformTimes = field(default_factory=continuous)
    own: FixedTimes | None = None
    bins: int = 256

    def __post_init__(self) -> None:
        """Refuses parameters out of range."""
        if not 0 < self.uniform <= 1 or self.bins < 1:
            raise ValueError(f"uniform is {self.uniform}, bins {self.bins}; need uniform in (0, 1] and at least 1 bin")
        if self.own is not None and self.plain.steps is not None:
            raise ValueError(f"own is {self.own}, and plain is a table of {self.plain.steps} steps; leave own out")

    @abstractmethod
    def cdf(self, v: Tensor) -> Tensor:
        """The law's probability of numbers below v in [0, 1], same shape, float64, in the inner points; increasing."""

    @final
    def law(self) -> Tensor:
        """The law's probabilities of the bins, (K,) float64; what is beyond the ends goes to the end bins."""
        v = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64)[1:-1]
        if self.own is not None:
            v = ((self.own.at(v).t - self.plain.t_min) / (1 - self.plain.t_min)).clamp(0, 1)
        return torch.cat([torch.zeros(1), self.cdf(v), torch.ones(1)]).diff().clamp_min(0)

    @abstractmethod
    def unweighted(self, u: Tensor) -> TimeDraw:
        """Times of the law itself at uniform numbers u, (n,) float64."""

    @property
    @final
    def label(self) -> Label:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`unbiased` with weights."""
        return "unbiased" if self.weighted else "changes the objective"

    @cached_property
    def _probabilities(self) -> Tensor:
        return floored(self.law(), self.uniform)

    @final
    def probabilities(self) -> Tensor:
        """q of the weighted density, (K,) float64."""
        return self._probabilities.clone()

    @final
    def at(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        if not self.weighted:
            return self.unweighted(u.double())
        return piecewise_times(self._probabilities, self.plain if self.own is None else self.own, u)
