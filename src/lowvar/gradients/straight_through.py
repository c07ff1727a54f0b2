r"""Straight-through: the discrete sample forward, the derivative of its probability backward. Biased.

    x = b + zero(p)

which is exact only where f is linear in b.

Source: Y. Bengio, N. Leonard, A. Courville, "Estimating or propagating gradients through stochastic neurons", 2013.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.distributions import base, breaks, noise_of
from lowvar.gradients.estimator import (
    BaseNoise,
    GradientLabel,
    OneBranch,
    SiteDraw,
    SiteRecord,
    SiteState,
    Stateless,
    zero,
)
from lowvar.gradients.relaxed import hard, relaxed_noise

__all__ = ["StraightThrough"]


@dataclass(frozen=True)
class StraightThrough(OneBranch, Stateless):
    """The sample with its probability's derivative.

    Example:
        >>> import torch
        >>> from torch.distributions import Bernoulli
        >>> p = torch.tensor(0.3, requires_grad=True)
        >>> x = StraightThrough().draw(Bernoulli(p), {"u": torch.tensor(0.9)}, {}).values[0]
        >>> x.backward()
        >>> x.item(), p.grad.item()
        (1.0, 1.0)
    """

    label: ClassVar[GradientLabel] = "biased"
    source: ClassVar[str] = "Bengio, Leonard & Courville 2013"
    smooth: ClassVar[bool] = True
    broadcasts: ClassVar[bool] = True

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """That of the sample."""
        relaxed_noise(d, "StraightThrough")
        return noise_of(d)

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """Those of the sample."""
        return breaks(d)

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """b + zero(p)."""
        probs = base(d).probs  # pyright: ignore[reportAttributeAccessIssue]
        return SiteDraw((hard(d, noise) + zero(probs))[None], {})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """The branch's own."""
        return live[..., 0, :]
