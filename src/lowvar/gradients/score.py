r"""The score function (REINFORCE), with a baseline or any control variate.

    grad E f(x) = E [(f(x) - b) grad log p_theta(x)],      b independent of x, since E grad log p = 0.

For N(mu, sigma^2) and f = (x - k)^2, delta = mu - k, b = 0:
Var_mu = 15 sigma^2 + 14 delta^2 + delta^4 / sigma^2, Var_sigma = 74 sigma^2 + 60 delta^2 + 2 delta^4 / sigma^2.

Source: R. Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.baselines import Baseline, Nothing, Recordless
from lowvar.gradients.distributions import breaks, element_log_prob, noise_of, sample
from lowvar.gradients.estimator import (
    BaseNoise,
    GradientLabel,
    OneBranch,
    SiteDraw,
    SiteRecord,
    SiteState,
    element_sum,
    zero,
)
from lowvar.gradients.own_sample import refuse_own_sample

__all__ = ["Score"]

_NOTHING = Nothing()


@dataclass(frozen=True, init=False)
class Score(OneBranch):
    """f times the gradient of log p; holds for any distribution with a log_prob.

    Args:
        baseline: what is subtracted from the cost; baselines add up (`LeaveOneOut() + Regression(h, mean)`).

    Example:
        >>> import torch
        >>> from torch.distributions import Bernoulli
        >>> draw = Score().draw(Bernoulli(torch.tensor(0.3)), {"u": torch.tensor(0.9)}, {})
        >>> float(draw.values[0]), round(float(draw.record["log_prob"].exp()), 3)
        (1.0, 0.3)
    """

    label: ClassVar[GradientLabel] = "unbiased"
    source: ClassVar[str] = "Williams 1992"

    baseline: Baseline

    def __init__(self, baseline: Baseline | None = None) -> None:
        """None is `Nothing()`."""
        object.__setattr__(self, "baseline", _NOTHING if baseline is None else baseline)

    @property
    def broadcasts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where the baseline keeps nothing of a sample."""
        return isinstance(self.baseline, Recordless)

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """That of the sample."""
        return noise_of(d)

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """Those of the sample."""
        return breaks(d)

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """One sample without a gradient, the log p of its elements and what the baseline needs."""
        x = sample(d, noise).detach()
        return SiteDraw(x[None], {"log_prob": element_log_prob(d, x), **self.baseline.record(d, x, state)})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """S_main + stop(f - b) zero(log p) + the baseline's own gradient."""
        f = costs[..., 0, :]
        b = self.baseline.subtracted(record, f.sum(-1), state)
        groups = f.shape[-1]  # the baseline is of the groups' sum: each takes its share
        score = zero(element_sum(record["log_prob"], costs))
        term = (f - (b.value.detach() / groups)[..., None]) * score[..., None]
        return live[..., 0, :] + term + (b.known / groups)[..., None]

    def start(self, d: Distribution) -> SiteState:
        """The baseline's, once it is seen to leave its own sample alone.

        Raises:
            ValueError: if the baseline depends on the sample it is subtracted from.
        """
        refuse_own_sample(self.baseline, d)
        return self.baseline.start(d)

    def updated(self, state: SiteState, record: SiteRecord, costs: Tensor) -> SiteState:
        """The baseline's."""
        return self.baseline.updated(state, record, costs[..., 0, :].sum(-1))

    def auxiliary(self, record: SiteRecord, costs: Tensor, state: SiteState) -> Tensor | None:
        """The baseline's."""
        return self.baseline.auxiliary(record, costs[..., 0, :].sum(-1))
