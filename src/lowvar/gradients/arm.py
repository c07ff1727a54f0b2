r"""ARM: augment, REINFORCE, merge. Binary sites with logits phi, p = sigmoid(phi), one uniform number an element.

    grad_phi E f(b) = E [(f(1[u > 1 - p]) - f(1[u < p])) (u - 1/2)],

all elements together: d elements cost two evaluations of f. Both values have the site's law, so both are main branches.
One element, D = f(1) - f(0), q = 1 - p: variance D^2 (2/3 (1/8 - (max(p, q) - 1/2)^3) - p^2 q^2).

Source: M. Yin, M. Zhou, "ARM: augment-REINFORCE-merge gradient for stochastic binary networks", 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from lowvar.gradients.distributions import base
from lowvar.gradients.estimator import (
    BaseNoise,
    Between,
    Branch,
    GradientLabel,
    SiteDraw,
    SiteRecord,
    SiteState,
    Stateless,
    element_sum,
    zero,
)

__all__ = ["ARM", "CoupledBits", "bernoulli"]


def bernoulli(d: Distribution, who: str) -> td.Bernoulli:
    """The Bernoulli inside.

    Raises:
        ValueError: if the site is another one.
    """
    d = base(d)
    if not isinstance(d, td.Bernoulli):
        raise ValueError(
            f"{who} is for Bernoulli sites, not {type(d).__name__}; allowed there: Score, MultiSample, Enumerate"
        )
    return d


class CoupledBits(Stateless):
    """Binary samples 1[u > 1 - p] and 1[u < p] of one uniform number an element, both main branches."""

    between: ClassVar[Between]
    broadcasts: ClassVar[bool] = True

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """A uniform number an element."""
        return {"u": BaseNoise("uniform", bernoulli(d, type(self).__name__).batch_shape, self.between)}

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """At p and 1 - p."""
        p = bernoulli(d, type(self).__name__).probs.detach()
        return {"u": torch.stack([p, 1 - p], -1)}

    def branches(self, d: Distribution) -> tuple[Branch, ...]:
        """Two."""
        return ("main", "main")

    def value(self, record: SiteRecord, costs: Tensor) -> Tensor:
        """The mean."""
        return costs.mean(-2)


@dataclass(frozen=True)
class ARM(CoupledBits):
    """Two coupled binary samples, weighted by u - 1/2.

    Example:
        >>> draw = ARM().draw(td.Bernoulli(torch.tensor(0.3)), {"u": torch.tensor(0.2)}, {})
        >>> draw.values.tolist()  # 1[u < p], 1[u > 1 - p]
        [1.0, 0.0]
    """

    label: ClassVar[GradientLabel] = "unbiased"
    source: ClassVar[str] = "Yin & Zhou 2019"
    between: ClassVar[Between] = "linear"

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """Both samples."""
        d, u = bernoulli(d, "ARM"), noise["u"]
        p = d.probs.detach()
        values = torch.stack([(u < p).to(p.dtype), (u > 1 - p).to(p.dtype)])
        return SiteDraw(values, {"term": (u - 0.5) * zero(d.logits)})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """Mean surrogate + (f_1 - f_0) sum (u - 1/2) zero(phi)."""
        term = element_sum(record["term"], costs)
        return live.mean(-2) + (costs.select(-2, 1) - costs.select(-2, 0)) * term.unsqueeze(-1)
