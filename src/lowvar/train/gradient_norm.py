r"""Times by the norm of the gradient: the density of least gradient variance.

With m2(t) = E ||g||^2 given t, g the gradient of one sample's unweighted loss, and weights p / q,

    E_q ||(p / q) g||^2 = integral of p^2 m2 / q dt    is least for    q*(t) proportional to p(t) sqrt(m2(t)),

and the variance falls by (E_p m2 - ||mu||^2) / ((E_p sqrt m2)^2 - ||mu||^2), mu = E g. m2 is known from running means
of squared norms in K bins of the time axis (`piecewise`), so q is constant on the bins; until each bin has `least`
values it is uniform, and a uniform share m bounds the weights.

Squared norms cost a backward pass of a single sample; a training loop measures one sample an update or so. An exact
norm is not needed: an unbiased sketch of it, or norms of a part of the weights, give a density nearly as good, and the
weights keep any density unbiased.

Sources: Zhao & Zhang 2015; Katharopoulos & Fleuret 2018 (importance sampling by gradient norms).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.train.objectives import Label
from lowvar.train.piecewise import RunningMeans, continuous, floored, piecewise_times
from lowvar.train.timesteps import Learns, TimeDraw, Times, UniformTimes

__all__ = ["GradientNormTimes"]


@dataclass(frozen=True, eq=False)
class GradientNormTimes(Times):
    """Importance sampling by the gradient's second moments, unbiased.

    Args:
        plain: the times that are weighted for: a table's, or continuous ones.
        bins: K.
        uniform: m; weights are at most 1 / m.
        decay: d of the running means a visit.
        least: values each bin needs before the density is used.
        sums, counts: what was seen (see `piecewise`), (K,) float64 and int64. Default: nothing.

    Raises:
        ValueError: for parameters out of range.

    Example:
        >>> times = GradientNormTimes(bins=2, uniform=0.5, least=1)
        >>> times.updated(torch.tensor([0, 1]), torch.tensor([9.0, 1.0])).probabilities().tolist()
        [0.625, 0.375]
    """

    plain: UniformTimes = field(default_factory=continuous)
    bins: int = 20
    uniform: float = 0.1
    decay: float = 0.95
    least: int = 5
    sums: Tensor = field(default=None)  # type: ignore[assignment]
    counts: Tensor = field(default=None)  # type: ignore[assignment]
    label: ClassVar[Label] = "unbiased"
    learns_from: ClassVar[Learns] = "squared gradient norms"

    def __post_init__(self) -> None:
        """Fills in an empty history; refuses parameters out of range."""
        empty = RunningMeans.empty(self.bins, self.decay)
        if self.sums is None:
            object.__setattr__(self, "sums", empty.sums)
        if self.counts is None:
            object.__setattr__(self, "counts", empty.counts)
        if self.sums.shape != (self.bins,) or self.counts.shape != (self.bins,):
            raise ValueError(f"the state is of {len(self.sums)} bins, not of {self.bins}")
        if self.least < 1 or not 0 < self.uniform <= 1:
            raise ValueError(
                f"least is {self.least} and uniform {self.uniform}; need least >= 1, uniform in (0, 1]: without a "
                "uniform share the weights have no bound"
            )

    @property
    def warm(self) -> bool:
        """Whether every bin has enough values."""
        return bool((self.counts >= self.least).all())

    @property
    def _means(self) -> RunningMeans:
        return RunningMeans(self.sums, self.counts, self.decay)

    def probabilities(self) -> Tensor:
        """q, (K,) float64."""
        values = self._means.mean.clamp_min(0).sqrt() if self.warm else torch.zeros_like(self.sums)
        return floored(values, self.uniform)

    def at(self, u: Tensor) -> TimeDraw:
        """See the base class."""
        return piecewise_times(self.probabilities(), self.plain, u)

    def updated(self, bins: Tensor, losses: Tensor) -> GradientNormTimes:
        """The density after squared gradient norms `losses` (n,), of unweighted losses, were seen at bins (n,)."""
        means = self._means.updated(bins, losses)
        return replace(self, sums=means.sums, counts=means.counts)

    def state(self) -> dict[str, Tensor]:
        """See the base class."""
        return {"sums": self.sums, "counts": self.counts}

    def restored(self, state: Mapping[str, Tensor]) -> GradientNormTimes:
        """See the base class."""
        return replace(self, sums=state["sums"].double(), counts=state["counts"].long())
