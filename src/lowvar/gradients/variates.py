r"""Control variates of a site: functions h of the sample whose mean under the site's law is known.

    (f - beta (h(x) - m)) grad log p(x) + beta grad m(theta),      m(theta) = E h(x)

is unbiased for any beta that does not know x: a constant, or a regression over the other samples (cross-fitted: each
sample has the coefficient of the n - 1 others). Without the second term it is not: E[h grad log p] = grad m.

    Regression     any h with a known mean; a share 1 - rho^2 of the variance of f is left
    Taylor         the delta method: h = f'(mu) (x - mu) + 1/2 (x - mu)^T f''(mu) (x - mu), whose mean needs Var x only

Sources: J. Paisley, D. Blei, M. Jordan, "Variational Bayesian inference with stochastic search", 2012 (delta method);
R. Ranganath, S. Gerrish, D. Blei, "Black box variational inference", 2014.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import grad, hessian

from lowvar.gradients.baselines import StatelessBaseline, Subtracted
from lowvar.gradients.controlled import _coefficient
from lowvar.gradients.distributions import base
from lowvar.gradients.estimator import SiteRecord, SiteState, zero

__all__ = ["Regression", "Taylor", "Variate"]


class Variate(StatelessBaseline):
    """A control variate of k functions; `coefficient` None is fitted to the other samples."""

    knows: ClassVar[bool] = True

    coefficient: float | None
    ridge: float

    @abstractmethod
    def deviation(self, d: Distribution, x: Tensor) -> tuple[Tensor, Tensor]:
        """h(x) - m without gradient, (k,), and zero(m), (k,)."""

    @property
    def fits(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the coefficient is fitted."""
        return self.coefficient is None

    def record(self, d: Distribution, x: Tensor, state: SiteState) -> dict[str, Tensor]:
        """Both."""
        deviation, mean = self.deviation(d, x)
        return {"deviation": deviation.detach().reshape(-1), "mean": mean.reshape(-1)}

    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        """Beta (h - m), and beta zero(m)."""
        deviation, mean = record["deviation"], record["mean"]
        if self.coefficient is not None:
            return Subtracted(self.coefficient * deviation.sum(-1), self.coefficient * mean.sum(-1))
        theirs = others["deviation"].detach()
        rows = torch.cat([torch.ones_like(costs)[..., None], costs[..., None], theirs], -1).to(torch.float64)
        beta = _coefficient(torch.einsum("n...i,n...j->...ij", rows, rows), self.ridge).to(costs)
        return Subtracted((beta * deviation).sum(-1), (beta * mean).sum(-1))

    def auxiliary(self, record: SiteRecord, costs: Tensor) -> Tensor | None:
        """None."""
        return None


def _checked(coefficient: float | None, ridge: float) -> None:
    if ridge < 0:
        raise ValueError(f"ridge is {ridge}; give a number >= 0 (samples that say beta = 0)")


@dataclass(frozen=True)
class Regression(Variate):
    """A feature of the sample with a known mean.

    Args:
        feature: h, from a sample to a scalar or (k,).
        mean: from the site's distribution to E h, differentiable in its parameters.
        coefficient: beta, or None to fit it to the other samples.
        ridge: of the fit, a number of samples that say beta = 0 (see `controlled`).

    Raises:
        ValueError: if the ridge is negative.

    Example:
        >>> from torch.distributions import Normal
        >>> rule = Regression(lambda x: x, lambda d: d.mean, coefficient=2.0)
        >>> record = rule.record(Normal(torch.tensor(1.0), 1.0), torch.tensor(1.5), {})
        >>> rule.subtracted({k: v[None] for k, v in record.items()}, torch.zeros(1), {}).value.tolist()
        [1.0]
    """

    feature: Callable[[Tensor], Tensor]
    mean: Callable[[Distribution], Tensor]
    coefficient: float | None = None
    ridge: float = 1.0

    def __post_init__(self) -> None:
        """Checks the ridge."""
        _checked(self.coefficient, self.ridge)

    def deviation(self, d: Distribution, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        mean, feature = self.mean(base(d)), self.feature(x)
        if mean.shape != feature.shape:
            raise ValueError(
                f"Regression's feature has shape {tuple(feature.shape)} and its mean {tuple(mean.shape)}; give "
                "a number a function, and the mean of each"
            )
        return feature - mean, zero(mean)


@dataclass(frozen=True)
class Taylor(Variate):
    """The delta method: the expansion of a function that resembles the cost around the site's mean.

    Args:
        function: from a sample to a scalar; twice differentiable at the mean for order 2.
        order: 1 or 2.
        coefficient: beta, or None to fit it to the other samples.
        ridge: of the fit.

    Raises:
        ValueError: if the order is another one or the ridge negative.

    Example:
        >>> from torch.distributions import Normal
        >>> record = Taylor(lambda x: x**2).record(Normal(torch.tensor(1.0), 2.0), torch.tensor(1.5), {})
        >>> record["deviation"].tolist()  # 2 (x - mu) + (x - mu)^2 - sigma^2
        [-2.75]
    """

    function: Callable[[Tensor], Tensor]
    order: Literal[1, 2] = 2
    coefficient: float | None = 1.0
    ridge: float = 1.0

    def __post_init__(self) -> None:
        """Checks order and ridge."""
        _checked(self.coefficient, self.ridge)
        if self.order not in (1, 2):
            raise ValueError(f"order is {self.order}; allowed: 1, 2")

    def deviation(self, d: Distribution, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        d = base(d)
        mean, centre = d.mean, d.mean.detach()
        slope = grad(self.function)(centre).detach()
        h, m = (slope * (x - centre)).sum(), (slope * (mean - centre)).sum()
        if self.order == 2:
            size = centre.numel()
            bend = hessian(self.function)(centre).detach().reshape(size, size)
            away, moved = (x - centre).reshape(-1), (mean - centre).reshape(-1)
            h = h + 0.5 * away @ bend @ away
            m = m + 0.5 * ((bend.diagonal() * d.variance.reshape(-1)).sum() + moved @ bend @ moved)
        return h - m, zero(m)
