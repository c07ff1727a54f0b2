r"""Times by the norm of the gradient: the density of least gradient variance.

With m2(t) = E ||g||^2 given t, g the gradient of one sample's unweighted loss, and weights p / q,

    E_q ||(p / q) g||^2 = integral of p^2 m2 / q dt    is least for    q*(t) proportional to p(t) sqrt(m2(t)),

and the variance falls by (E_p m2 - ||mu||^2) / ((E_p sqrt m2)^2 - ||mu||^2), mu = E g. m2 is known from running means
of squared norms in K bins of the time axis (`piecewise`), so q is constant on the bins; until each bin has `least`
values it is uniform, and a uniform share m bounds the weights.

Squared norms cost a backward pass of a single sample; a training loop measures one sample an update until the density
is in use and one every fourth update after that (`due`), the samples of the batch in turn (`place`), each against the
target that training uses. An exact norm is not needed: an unbiased sketch of it, or norms of a part of the weights,
give a density nearly as good, and the weights keep any density unbiased.

Sources: Zhao & Zhang 2015; Katharopoulos & Fleuret 2018 (importance sampling by gradient norms).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowvar.train.piecewise import LearnedBins
from lowvar.train.timesteps import Learns

__all__ = ["GradientNormTimes"]


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientNormTimes(LearnedBins):
    """Importance sampling by the gradient's second moments, unbiased; arguments as of `LearnedBins`.

    `updated` is given squared gradient norms (n,) of unweighted losses.

    Args:
        every: updates between norms once the density is in use.

    Example:
        >>> import torch
        >>> times = GradientNormTimes(bins=2, uniform=0.5, least=1)
        >>> times.updated(torch.tensor([0, 1]), torch.tensor([9.0, 1.0])).probabilities().tolist()
        [0.625, 0.375]
    """

    bins: int = 20
    every: int = 4
    learns_from: ClassVar[Learns] = "squared gradient norms"

    def __post_init__(self) -> None:
        """Refuses what the base class does, and a number of updates below 1."""
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"every is {self.every}; give a whole number of updates of at least 1")

    def due(self, update: int) -> bool:
        """Whether a training loop measures a norm at this update."""
        return not self.warm or update % self.every == 0

    def place(self, batch_size: int) -> int:
        """The sample of a batch whose norm is the next one, in [0, batch_size)."""
        return int(self.means.counts.sum()) % batch_size

    def values(self) -> Tensor:
        """See the base class."""
        return self.means.mean.clamp_min(0).sqrt()
