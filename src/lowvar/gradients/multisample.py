r"""Several draws of one site, each with the mean cost of the others as its baseline.

    grad E f = E [1/K sum_j (f_j - 1/(K-1) sum_{i != j} f_i) grad log p_theta(x_j)].

As `Score(LeaveOneOut())` with n = K samples of the program, but only what comes after the site runs K times. A mean
that includes f_j would scale the gradient by 1 - 1/K.

Source: W. Kool, H. van Hoof, M. Welling, "Buy 4 REINFORCE samples, get a baseline for free!", 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import vmap

from lowvar.gradients.distributions import breaks, log_prob, noise_of, sample
from lowvar.gradients.estimator import (
    BaseNoise,
    Branch,
    GradientLabel,
    SiteDraw,
    SiteRecord,
    SiteState,
    Stateless,
    zero,
)

__all__ = ["MultiSample"]


@dataclass(frozen=True)
class MultiSample(Stateless):
    """K draws of the site with leave-one-out baselines.

    Args:
        samples: K >= 2.

    Raises:
        ValueError: if K < 2.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> draw = MultiSample(2).draw(Bernoulli(torch.tensor(0.3)), {"u": torch.tensor([0.2, 0.9])}, {})
        >>> draw.values.tolist()
        [0.0, 1.0]
    """

    label: ClassVar[GradientLabel] = "unbiased"
    source: ClassVar[str] = "Kool, van Hoof & Welling 2019"

    samples: int = 2

    def __post_init__(self) -> None:
        """Checks K."""
        if self.samples < 2:
            raise ValueError(f"samples is {self.samples}; leaving one out needs at least 2")

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """K times that of the sample."""
        own = noise_of(d)
        return {k: BaseNoise(e.kind, torch.Size([self.samples, *e.shape]), e.between) for k, e in own.items()}

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """Those of the sample."""
        return {name: x.expand(self.samples, *x.shape) for name, x in breaks(d).items()}

    def branches(self, d: Distribution) -> tuple[Branch, ...]:
        """K."""
        return ("main",) * self.samples

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """K samples without a gradient."""
        x = vmap(lambda e: sample(d, e))(dict(noise)).detach()
        return SiteDraw(x, {"log_prob": vmap(lambda v: log_prob(d, v))(x)})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """Mean surrogate + mean of (f_j - mean of others) zero(log p_j)."""
        others = (costs.sum(-2, keepdim=True) - costs) / (self.samples - 1)
        return (live + (costs - others) * zero(record["log_prob"])[..., None]).mean(-2)

    def value(self, record: SiteRecord, costs: Tensor) -> Tensor:
        """The mean."""
        return costs.mean(-2)
