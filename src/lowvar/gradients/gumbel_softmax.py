r"""Gumbel-softmax (concrete): a relaxed sample in place of the discrete one. Biased: it optimises another program.

    Bernoulli          sigmoid((phi + log u - log(1 - u)) / lambda)
    OneHotCategorical  softmax((phi - log(-log u)) / lambda)

The bias goes with lambda and the variance grows as it does.

Sources: E. Jang, S. Gu, B. Poole, "Categorical reparameterization with Gumbel-softmax", 2017; C. Maddison, A. Mnih,
Y. W. Teh, "The concrete distribution", 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from lowvar.gradients.distributions import base, natural
from lowvar.gradients.estimator import BaseNoise, GradientLabel, OneBranch, SiteDraw, SiteRecord, SiteState, Stateless
from lowvar.gradients.relaxed import relax, relaxed_noise

__all__ = ["GumbelSoftmax", "concrete"]


def concrete(d: Distribution, u: Tensor, temperature: float) -> Tensor:
    """The relaxed sample from uniform numbers of the site's full shape."""
    logits = natural(d)["logits"]
    noise = torch.log(u) - torch.log1p(-u) if isinstance(base(d), td.Bernoulli) else -torch.log(-torch.log(u))
    return relax(d, logits + noise, temperature)


@dataclass(frozen=True)
class GumbelSoftmax(OneBranch, Stateless):
    """The relaxed sample, differentiated.

    Args:
        temperature: lambda > 0.

    Raises:
        ValueError: if the temperature is not positive.

    Example:
        >>> draw = GumbelSoftmax(1.0).draw(td.Bernoulli(torch.tensor(0.3)), {"v": torch.tensor(0.5)}, {})
        >>> round(float(draw.values[0]), 6)
        0.3
    """

    label: ClassVar[GradientLabel] = "biased"
    source: ClassVar[str] = "Jang, Gu & Poole 2017"
    smooth: ClassVar[bool] = True
    broadcasts: ClassVar[bool] = True

    temperature: float = 0.5

    def __post_init__(self) -> None:
        """Checks the temperature."""
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; give a number above 0")

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """A uniform number an entry."""
        return {"v": relaxed_noise(d, "GumbelSoftmax")["v"]}

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """None."""
        return {}

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """The relaxed sample."""
        return SiteDraw(concrete(d, noise["v"], self.temperature)[None], {})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """The branch's own."""
        return live[..., 0, :]
