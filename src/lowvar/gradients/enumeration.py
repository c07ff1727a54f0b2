r"""Summing over a discrete site: E f(x) = sum_x p_theta(x) f(x), exact in that site.

The surrogate is sum_x p_theta(x) S(x), differentiated through p and through every branch, so it is exact for
derivatives of any order that the other sites' estimators hold for. All elements of the site are summed jointly: k
values and d elements cost k^d branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.distributions import base, support
from lowvar.gradients.estimator import BaseNoise, Branch, GradientLabel, SiteDraw, SiteRecord, SiteState, Stateless

__all__ = ["Enumerate"]


@dataclass(frozen=True)
class Enumerate(Stateless):
    """Every value of the site, weighted by its probability.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> draw = Enumerate().draw(Bernoulli(torch.tensor(0.25)), {}, {})
        >>> draw.values.tolist(), [round(p, 6) for p in draw.record["log_prob"].exp().tolist()]
        ([0.0, 1.0], [0.75, 0.25])
    """

    label: ClassVar[GradientLabel] = "unbiased"
    source: ClassVar[str] = "definition"
    orders: ClassVar[int] = 0

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """None."""
        return {}

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """None."""
        return {}

    def branches(self, d: Distribution) -> tuple[Branch, ...]:
        """One a joint value."""
        return ("main",) * len(support(d))

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """All values and their log p."""
        values = support(d)
        extra = base(d).log_prob(values)
        return SiteDraw(values, {"log_prob": extra.reshape(len(values), -1).sum(1)})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """sum_x p(x) S(x)."""
        return (torch.exp(record["log_prob"])[..., None] * live).sum(-2)

    def value(self, record: SiteRecord, costs: Tensor) -> Tensor:
        """sum_x p(x) f(x)."""
        return (torch.exp(record["log_prob"])[..., None] * costs).sum(-2)
