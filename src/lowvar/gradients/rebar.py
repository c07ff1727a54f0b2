r"""REBAR: the score function, with the same program run on a relaxed sample as control variate.

    grad E f(b) = E [(f(b) - eta f(s(z~))) grad log p(b) + eta grad f(s(z)) - eta grad f(s(z~))],

z the continuous number behind b, z~ a second draw of it given b, s(z) = sigmoid(z / lambda) or softmax (see `relaxed`).
It is unbiased for any eta and lambda, but only if z~ is differentiated through the condition. The program must accept
values between the discrete ones. Costs three branches, two of them differentiated for the control variate alone.

Source: G. Tucker, A. Mnih, C. Maddison, D. Lawson, J. Sohl-Dickstein, "REBAR: low-variance, unbiased gradient estimates
for discrete latent variable models", 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.distributions import log_prob, natural
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
from lowvar.gradients.relaxed import conditional, free, hard, relax, relaxed_breaks, relaxed_noise

__all__ = ["REBAR"]


@dataclass(frozen=True)
class REBAR(Stateless):
    """Relaxed samples as control variate of the discrete one.

    Args:
        eta: coefficient of the control variate.
        temperature: lambda > 0.

    Raises:
        ValueError: if the temperature is not positive.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> noise = {"u": torch.tensor(0.9), "v": torch.tensor(0.5), "w": torch.tensor(0.2)}
        >>> REBAR().draw(Bernoulli(torch.tensor(0.5)), noise, {}).values[0].tolist()
        1.0
    """

    label: ClassVar[GradientLabel] = "unbiased"
    source: ClassVar[str] = "Tucker et al. 2017"
    smooth: ClassVar[bool] = True
    apart: ClassVar[tuple[str, ...]] = ("v", "w")

    eta: float = 1.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        """Checks the temperature."""
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; give a number above 0")

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """For b, z and z~."""
        return relaxed_noise(d, "REBAR")

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """Those of b."""
        return relaxed_breaks(d)

    def branches(self, d: Distribution) -> tuple[Branch, ...]:
        """b, and the relaxed z and z~."""
        return ("main", "live", "live")

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """The three values."""
        b = hard(d, noise)
        logits = natural(d)["logits"]
        z, given = free(d, logits, b, noise["v"]), conditional(d, logits, b, noise["w"])
        values = torch.stack([b, relax(d, z, self.temperature), relax(d, given, self.temperature)])
        return SiteDraw(values, {"log_prob": log_prob(d, b)})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """See the module."""
        f, c = costs[..., 0, :], self.eta * costs[..., 2, :]
        score = (f - c) * zero(record["log_prob"])[..., None]
        return live[..., 0, :] + score + self.eta * (zero(live[..., 1, :]) - zero(live[..., 2, :]))

    def value(self, record: SiteRecord, costs: Tensor) -> Tensor:
        """f(b)."""
        return costs[..., 0, :]
