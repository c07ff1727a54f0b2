r"""DiCE: the score function for derivatives of any order.

Each cost is multiplied by box(x) = exp(L - stop(L)), L = log p_theta(x), whose value is 1 and whose derivatives of all
orders are those of p_theta / stop(p_theta). So every derivative of the surrogate is an unbiased estimate of that
derivative of E f, where all sites are DiCE or explicit pathwise ones. A baseline b of the first derivative is
b (1 - box). Of E x^3, x ~ N(mu, sigma^2), the second derivative is 6 mu.

Source: J. Foerster et al., "DiCE: the infinitely differentiable Monte Carlo estimator", 2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.distributions import breaks, element_log_prob, noise_of, sample
from lowvar.gradients.estimator import (
    BaseNoise,
    GradientLabel,
    OneBranch,
    SiteDraw,
    SiteRecord,
    SiteState,
    Stateless,
    element_sum,
    zero,
)

__all__ = ["DiCE"]


@dataclass(frozen=True)
class DiCE(OneBranch, Stateless):
    """The cost times exp(log p - stop(log p)).

    Args:
        baseline: a constant b.

    Example:
        >>> from torch.distributions import Normal
        >>> mu = torch.tensor(2.0)
        >>> def surrogate(mu):
        ...     rule = DiCE()
        ...     draw = rule.draw(Normal(mu, 1.0), {"z": torch.tensor(0.5)}, {})
        ...     cost = (draw.values[0] ** 3).reshape(1, 1, 1)
        ...     return rule.surrogate({"log_prob": draw.record["log_prob"].reshape(1)}, cost, cost.detach(), {}).sum()
        >>> float(torch.func.grad(surrogate)(mu)), float(torch.func.grad(torch.func.grad(surrogate))(mu))
        (7.8125, -11.71875)
    """

    label: ClassVar[GradientLabel] = "unbiased"
    source: ClassVar[str] = "Foerster et al. 2018"
    orders: ClassVar[int] = 0
    broadcasts: ClassVar[bool] = True

    baseline: float = 0.0

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """That of the sample."""
        return noise_of(d)

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """Those of the sample."""
        return breaks(d)

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """One sample without a gradient, and the log p of its elements."""
        x = sample(d, noise).detach()
        return SiteDraw(x[None], {"log_prob": element_log_prob(d, x)})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """(S_main - b) box + b."""
        box = torch.exp(zero(element_sum(record["log_prob"], costs)))[..., None]
        b = self.baseline / costs.shape[-1]
        return (live[..., 0, :] - b) * box + b
