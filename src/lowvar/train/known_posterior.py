r"""Targets for data whose law is known: test cases, physical energies, simulators.

Known posterior. T = D*(x_t), the conditional mean itself: no target noise at all.

Known score of the data, s_0(x_0) = grad log p_0(x_0). The score of x_t is the mean, given x_t, of two things,

    denoising   -eps / sigma             varies by (alpha / sigma^2)^2 Cov(x_0 | x_t): bad at little noise
    clean       s_0(x_0) / alpha         the target score identity: bad at much noise

and of every mixture (1 - c) denoising + c clean. Tweedie's formula, x0_hat = (x_t + sigma^2 score) / alpha, turns it
into the target

    T = (1 - c) x_0 + c (x_t + sigma^2 s_0(x_0) / alpha) / alpha.

For one Gaussian N(m, s^2 I) the two errors are proportional, -delta / (alpha s^2) against alpha delta / sigma^2 with
delta = x_0 - D*, and cancel at

    c* = alpha^2 s^2 / (alpha^2 s^2 + sigma^2),

where T = D*. For other data c* of their variance is a guess without bias: any c that depends on x_t and t alone keeps
E[T | x_t] = D*.

Sources: V. De Bortoli, M. Hutchinson, P. Wirnsberger, A. Doucet, "Target score matching", 2024 (arXiv 2402.08667); the
mixture by the control variate's optimal weight: arXiv 2512.20003 (CVSI).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowvar.process.denoiser import Denoiser
from lowvar.process.head import expand
from lowvar.process.schedule import Level
from lowvar.train.targets import Target

if TYPE_CHECKING:
    from lowvar.train.objectives import Label

__all__ = ["KnownPosterior", "ScoreMixture", "clean_score_weight"]


def clean_score_weight(level: Level, variance: float) -> Tensor:
    """c* = alpha^2 s^2 / (alpha^2 s^2 + sigma^2) = 1 / (1 + exp(-logsnr) / s^2), float64, shape of the level.

    Args:
        level: noise levels.
        variance: s^2 > 0, of the data along a direction.

    Raises:
        ValueError: if the variance is not positive.

    Example:
        >>> from lowvar.process import Flow
        >>> float(clean_score_weight(Flow().at(0.5), 3.0))
        0.75
    """
    if variance <= 0:
        raise ValueError(f"variance is {variance}; give the variance of the data, above 0")
    return torch.sigmoid(level.logsnr.double() + torch.log(torch.tensor(variance, dtype=torch.float64)))


@dataclass(frozen=True, eq=False)
class KnownPosterior(Target):
    """T = E[x_0 | x_t].

    Args:
        denoiser: the exact posterior of the data, such as `MixtureTarget.denoiser(schedule)`. Of any other denoiser the
            target distils it: a change of the objective that this class cannot see.

    Example:
        >>> from lowvar.process import CosineVP
        >>> from lowvar.testing.mixture import mixture2
        >>> schedule = CosineVP()
        >>> target = KnownPosterior(mixture2().denoiser(schedule, None))
        >>> target.clean(torch.ones(1, 2), torch.zeros(1, 2), schedule.at(torch.tensor([0.5]))).shape
        torch.Size([1, 2])
    """

    denoiser: Denoiser

    @property
    def label(self) -> Label:
        """See the base class."""
        return "unbiased"

    def clean(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """See the base class."""
        x = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps
        with torch.no_grad():
            return self.denoiser(x, level).mean.to(x0)


@dataclass(frozen=True, eq=False)
class ScoreMixture(Target):
    """T from the mixture of denoising and clean score.

    Args:
        score: s_0, states (B, *event_shape) -> same shape.
        variance: s^2 of c*; 0 gives c = 0, the plain target; None gives c = 1, target score matching.

    Raises:
        ValueError: if the variance is negative.

    Example:
        >>> from lowvar.process import Flow
        >>> level = Flow().at(torch.tensor([0.5]))
        >>> target = ScoreMixture(lambda x: -x / 3.0, 3.0)  # data N(0, 3): the posterior mean is 3/4 x_t / alpha
        >>> float(target.clean(torch.tensor([[2.0]]), torch.tensor([[1.0]]), level))
        2.25
    """

    score: Callable[[Tensor], Tensor]
    variance: float | None

    def __post_init__(self) -> None:
        """Refuses a negative variance."""
        if self.variance is not None and self.variance < 0:
            raise ValueError(f"variance is {self.variance}; give a number >= 0, or None for the clean score alone")

    @property
    def label(self) -> Label:
        """See the base class."""
        return "unbiased"

    def clean(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """See the base class; levels with alpha > 0."""
        if self.variance == 0:
            return x0
        with torch.no_grad():
            c = torch.ones_like(level.logsnr) if self.variance is None else clean_score_weight(level, self.variance)
            ratio = (level.sigma / level.alpha).double()
            # x_t / alpha - x_0 = ratio eps, so that T = x_0 + c (ratio eps + ratio^2 s_0)
            step = expand(ratio, x0) * eps + expand(ratio**2, x0) * self.score(x0)
            return x0 + expand(c, x0) * step
