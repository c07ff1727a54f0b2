r"""Which times are trained on: densities with weights, as values.

The plain objective averages over a uniform time, L = (1/T) sum_n E l_n on a table of T timesteps t = (n + 1) / T (or
the integral over [t_min, 1]). Drawing n from q instead and weighting by 1 / (T q_n) leaves L's gradient as it is in
expectation.

    uniform              q = 1/T
    loss second moment   q_n = (1 - m) r_n / sum r + m / T,  r_n = sqrt(mean of the last 10 losses^2 at n),  m = 0.001;
                         uniform until every n has 10 losses (Nichol & Dhariwal 2021, Sec. 3.3)

Continuous times have no table; there n is a bin of the uniform number behind the time, within which q is constant (see
`piecewise`). Objectives whose own times are not uniform (EDM's are lognormal) are weighted for in the same way, by bins
of the uniform number behind those.

The variance of a weighted loss is E_q[(l / (T q))^2] - L^2, least for q_n proportional to sqrt(E l_n^2). Noise is an
argument: the time of sample i is the inverse cdf of q at the uniform number of sample i (`at`), so that numbers that
are stratified or shared between samples serve every density. What a density has learned
is its explicit state: `updated` returns a new value, nothing is changed in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self, final

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource
from lowvar.train.objectives import Label

__all__ = ["FixedTimes", "Learns", "LossSecondMomentTimes", "TimeDraw", "Times", "UniformTimes", "floored"]

Learns = Literal["losses", "squared gradient norms"]


@dataclass(frozen=True)
class TimeDraw:
    """Times of n training samples.

    Attributes:
        t: times in (0, 1], (n,) float64.
        weight: factor of each sample's loss, (n,) float64.
        bin: number of the timestep, (n,) int64 (0 for continuous times); handed back with the losses to `updated`.
    """

    t: Tensor
    weight: Tensor
    bin: Tensor


class Times(ABC):
    """A density of training times with the weights that go with it."""

    label: ClassVar[Label]
    learns_from: ClassVar[Learns] = "losses"  # what `updated` is to be given, where there is a state

    @abstractmethod
    def at(self, u: Tensor) -> TimeDraw:
        """The times of uniform numbers u in [0, 1), (n,): the inverse cdf, with the weights."""

    @final
    def draw(self, source: NoiseSource, index: Sequence[int] | Tensor, draw: int = 0) -> TimeDraw:
        """Times of the samples `index` (n,), from one uniform number each."""
        return self.at(source.uniform(index, (), draw=draw, dtype=torch.float64))

    @abstractmethod
    def updated(self, bins: Tensor, losses: Tensor) -> Times:
        """The density after losses (n,), unweighted, were seen at timesteps bins (n,), in this order."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What was learned, as tensors; empty where nothing is."""

    @abstractmethod
    def restored(self, state: Mapping[str, Tensor]) -> Times:
        """The density with a state that `state` gave."""


class FixedTimes(Times):
    """Times that learn nothing."""

    @final
    def updated(self, bins: Tensor, losses: Tensor) -> Self:
        """See the base class: the same times."""
        return self

    @final
    def state(self) -> dict[str, Tensor]:
        """See the base class: empty."""
        return {}

    @final
    def restored(self, state: Mapping[str, Tensor]) -> Self:
        """See the base class: the same times."""
        return self


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


@dataclass(frozen=True)
class UniformTimes(FixedTimes):
    """Uniform times, weight 1.

    Args:
        steps: T of a table; None draws continuous times in [t_min, 1].
        t_min: smallest continuous time.

    Example:
        >>> from lowvar.process import Independent
        >>> UniformTimes(steps=4).at(torch.tensor([0.0, 0.3, 0.99])).t.tolist()
        [0.25, 0.5, 1.0]
    """

    steps: int | None = 1000
    t_min: float = 0.0
    label: ClassVar[Label] = "unbiased"

    def __post_init__(self) -> None:
        """Refuses a table without entries."""
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give a whole number of at least 1, or None for continuous times")

    def at(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        u = u.double()
        if self.steps is None:
            return TimeDraw(
                self.t_min + (1 - self.t_min) * u, torch.ones_like(u), torch.zeros_like(u, dtype=torch.int64)
            )
        n = (u * self.steps).long().clamp_max(self.steps - 1)
        return TimeDraw((n + 1).double() / self.steps, torch.ones_like(u), n)


@dataclass(frozen=True, eq=False)
class LossSecondMomentTimes(Times):
    """Importance sampling by the losses' second moments (Nichol & Dhariwal 2021), unbiased.

    Args:
        steps: T.
        history: losses kept a timestep.
        uniform: m, the share of the uniform density.
        losses: (T, history) float64, a ring a row; entry `counts % history` is overwritten next. Default: zeros.
        counts: losses seen a timestep, (T,) int64. Default: zeros.
        plain: continuous times of the objective, which are weighted for; `steps` is then a number of bins. None: the
            uniform times of a table.

    Example:
        >>> times = LossSecondMomentTimes(steps=2, history=1, uniform=0.5)
        >>> times.updated(torch.tensor([0, 1]), torch.tensor([3.0, 1.0])).probabilities().tolist()
        [0.625, 0.375]
    """

    steps: int = 1000
    history: int = 10
    uniform: float = 0.001
    losses: Tensor = field(default=None)  # type: ignore[assignment]
    counts: Tensor = field(default=None)  # type: ignore[assignment]
    plain: FixedTimes | None = None
    label: ClassVar[Label] = "unbiased"

    def __post_init__(self) -> None:
        """Fills in an empty history; refuses parameters out of range."""
        if self.steps < 1 or self.history < 1 or not 0 < self.uniform <= 1:
            raise ValueError(
                f"steps is {self.steps}, history {self.history}, uniform {self.uniform}; need steps and history of at "
                "least 1 and uniform in (0, 1]: without a uniform share a timestep could be lost"
            )
        if self.losses is None:
            object.__setattr__(self, "losses", torch.zeros(self.steps, self.history, dtype=torch.float64))
        if self.counts is None:
            object.__setattr__(self, "counts", torch.zeros(self.steps, dtype=torch.int64))
        if self.losses.shape != (self.steps, self.history) or self.counts.shape != (self.steps,):
            raise ValueError(
                f"the state is of {tuple(self.losses.shape)} losses, not of {self.steps} timesteps and "
                f"{self.history} losses each"
            )

    @property
    def warm(self) -> bool:
        """Whether every timestep has its full history."""
        return bool((self.counts >= self.history).all())

    def probabilities(self) -> Tensor:
        """q, (T,) float64."""
        root = (self.losses**2).mean(1).sqrt()
        return floored(root if self.warm else torch.zeros_like(root), self.uniform)

    def at(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        q = self.probabilities()
        if self.plain is not None:
            from lowvar.train.piecewise import piecewise_times

            return piecewise_times(q, self.plain, u)
        n = torch.searchsorted(q.cumsum(0), u.double().cpu(), right=True).clamp_max(self.steps - 1)
        return TimeDraw((n + 1).double() / self.steps, 1 / (self.steps * q[n]), n)

    def updated(self, bins: Tensor, losses: Tensor) -> LossSecondMomentTimes:
        """See the base class."""
        bins, losses = bins.cpu(), losses.detach().cpu().double()
        bins, order = torch.sort(bins, stable=True)
        losses = losses[order]
        position = torch.arange(len(bins))
        first = torch.searchsorted(bins, bins)  # where a timestep's run begins
        last = torch.searchsorted(bins, bins, right=True)
        kept = last - position <= self.history  # of a longer run only the last `history` losses stay
        slot = (self.counts[bins] + position - first) % self.history
        new = self.losses.clone()
        new[bins[kept], slot[kept]] = losses[kept]
        counts = self.counts + torch.bincount(bins, minlength=self.steps)
        return replace(self, losses=new, counts=counts)

    def state(self) -> dict[str, Tensor]:
        """See the base class."""
        return {"losses": self.losses, "counts": self.counts}

    def restored(self, state: Mapping[str, Tensor]) -> LossSecondMomentTimes:
        """See the base class."""
        return replace(self, losses=state["losses"].double(), counts=state["counts"].long())
