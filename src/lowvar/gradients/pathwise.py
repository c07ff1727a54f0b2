r"""Pathwise derivatives (reparameterisation): x = g(e, theta) with noise e that does not know theta.

    grad E f(x) = E [grad_theta f(g(e, theta))]

Explicit transforms hold for derivatives of any order. Distributions without one (Gamma, Beta, Dirichlet, Student's t,
von Mises, mixtures) are differentiated implicitly, for first derivatives: F(x; theta) = u gives
dx / dtheta = -(dF / dtheta) / p(x), see `implicit`.

For N(mu, sigma^2) and f = (x - k)^2, delta = mu - k: Var_mu = 4 sigma^2, Var_sigma = 8 sigma^2 + 4 delta^2.

Sources: D. Kingma, M. Welling, "Auto-encoding variational Bayes", 2014; M. Figurnov, S. Mohamed, A. Mnih, "Implicit
reparameterization gradients", 2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.distributions import breaks, is_discrete, noise_of, sample
from lowvar.gradients.estimator import BaseNoise, GradientLabel, OneBranch, SiteDraw, SiteRecord, SiteState, Stateless

__all__ = ["Pathwise"]


@dataclass(frozen=True)
class Pathwise(OneBranch, Stateless):
    """The derivative of the sample itself; what follows must be differentiable in it.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> mu = torch.tensor(1.0, requires_grad=True)
        >>> x = Pathwise().draw(Normal(mu, 2.0), {"z": torch.tensor(0.5)}, {}).values[0]
        >>> (x**2).backward()
        >>> float(mu.grad)
        4.0
    """

    label: ClassVar[GradientLabel] = "unbiased"
    source: ClassVar[str] = "Kingma & Welling 2014"
    smooth: ClassVar[bool] = True
    orders: ClassVar[int] = 0
    broadcasts: ClassVar[bool] = True

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """That of the distribution's transform."""
        if is_discrete(d):
            raise ValueError(
                f"{d} takes separate values and has no pathwise derivative; allowed: Score, MultiSample, Enumerate"
            )
        return noise_of(d)

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """Those of the sample."""
        return breaks(d)

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """One sample with its gradient."""
        from lowvar.gradients.implicit import attached, is_implicit

        x = attached(d, sample(d, noise), noise) if is_implicit(d) else sample(d, noise)
        return SiteDraw(x[None], {})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """The branch's own."""
        return live[..., 0, :]
