r"""DisARM (also U2G): ARM with the uniform number integrated out given both samples. Binary sites with logits phi.

    b = 1[u > 1 - p],   b~ = 1[u < p],
    grad_phi_e E f(b) = E [1/2 (f(b) - f(b~)) (-1)^{b~_e} 1[b_e != b~_e] sigmoid(|phi_e|)].

One element, D = f(1) - f(0), q = 1 - p: variance D^2 (p q max(p, q) / 2 - p^2 q^2), never above ARM's.

Sources: Z. Dong, A. Mnih, G. Tucker, "DisARM: an antithetic gradient estimator for binary latent variables", 2020;
M. Yin, N. Ho, B. Yan, X. Qian, M. Zhou, "Probabilistic best subset selection via gradient-based optimization", 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.arm import CoupledBits, bernoulli
from lowvar.gradients.estimator import (
    Between,
    GradientLabel,
    SiteDraw,
    SiteRecord,
    SiteState,
    element_sum,
    zero,
)

__all__ = ["DisARM"]


@dataclass(frozen=True)
class DisARM(CoupledBits):
    """Two antithetic binary samples.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> draw = DisARM().draw(Bernoulli(torch.tensor(0.3)), {"u": torch.tensor(0.9)}, {})
        >>> draw.values.tolist()
        [1.0, 0.0]
    """

    label: ClassVar[GradientLabel] = "unbiased"
    source: ClassVar[str] = "Dong, Mnih & Tucker 2020"
    between: ClassVar[Between] = "constant"

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """Both samples."""
        d, u = bernoulli(d, "DisARM"), noise["u"]
        p = d.probs.detach()
        b, mirror = (u > 1 - p).to(p.dtype), (u < p).to(p.dtype)
        weight = 0.5 * (b - mirror) * torch.sigmoid(d.logits.detach().abs())  # (-1)^b~ 1[b != b~] = b - b~
        return SiteDraw(torch.stack([b, mirror]), {"term": weight * zero(d.logits)})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """Mean surrogate + (f(b) - f(b~)) sum of weights zero(phi)."""
        term = element_sum(record["term"], costs)
        return live.mean(-2) + (costs.select(-2, 0) - costs.select(-2, 1)) * term.unsqueeze(-1)
