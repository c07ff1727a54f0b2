r"""Baselines that know more of the site: weighted by the score's norm, or learned from what came before it.

The constant b with the least variance of (f - b) s, s = grad log p, is not E f but (of all entries of s together)

    b* = E[|s|^2 f] / E[|s|^2],

estimated from the other samples. A learned baseline predicts f from what the program knows before the site draws; its
loss, mean (f - b)^2, is part of `info.auxiliary`.

Sources: E. Greensmith, P. Bartlett, J. Baxter, "Variance reduction techniques for gradient estimates in reinforcement
learning", 2004; A. Mnih, K. Gregor, "Neural variational inference and learning in belief networks", 2014.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import grad
from torch.utils import _pytree as pytree

from lowvar.gradients.baselines import StatelessBaseline, Subtracted
from lowvar.gradients.distributions import log_prob, natural, with_natural
from lowvar.gradients.estimator import SiteRecord, SiteState

__all__ = ["Learned", "Optimal"]


@dataclass(frozen=True)
class Optimal(StatelessBaseline):
    """The mean of the other samples' costs, weighted by |grad log p|^2 in the site's own parameters; needs n >= 2.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> record = Optimal().record(Bernoulli(torch.tensor(0.25)), torch.tensor(1.0), {})
        >>> round(float(record["weight"]), 4)  # (b - p)^2
        0.5625
    """

    fits: ClassVar[bool] = True

    def record(self, d: Distribution, x: Tensor, state: SiteState) -> dict[str, Tensor]:
        """|score|^2."""
        values = {name: v.detach() for name, v in natural(d).items()}
        score = grad(lambda th: log_prob(with_natural(d, th), x))(values)
        return {"weight": sum((s.square().sum() for s in score.values()), torch.zeros((), device=x.device)).detach()}

    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        """Their weighted mean; where all weights are 0, 0."""
        weight = others["weight"].to(costs)
        b = (weight * costs).sum(0, keepdim=True) / weight.sum(0, keepdim=True).clamp_min(1e-30)
        return Subtracted(b, torch.zeros_like(b))

    def auxiliary(self, record: SiteRecord, costs: Tensor) -> Tensor | None:
        """None."""
        return None


@dataclass(frozen=True)
class Learned(StatelessBaseline):
    """A prediction from what is known before the site draws.

    Args:
        network: from the inputs to a scalar.
        inputs: what it is given, one or several tensors; no gradient goes into them.

    Example:
        >>> rule = Learned(lambda h: h.sum(), torch.ones(3))
        >>> float(rule.record(None, None, {})["value"])
        3.0
    """

    fits: ClassVar[bool] = False

    network: Callable[..., Tensor]
    inputs: Any = ()

    def record(self, d: Distribution | None, x: Tensor | None, state: SiteState) -> dict[str, Tensor]:
        """The prediction; it is not told the sample."""
        inputs = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
        value = self.network(*pytree.tree_map(lambda v: v.detach(), inputs))
        if value.numel() != 1:
            raise ValueError(f"the network of Learned gives shape {tuple(value.shape)}; give one number a sample")
        return {"value": value.reshape(())}

    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        """The prediction."""
        value = record["value"].detach()
        return Subtracted(value, torch.zeros_like(value))

    def auxiliary(self, record: SiteRecord, costs: Tensor) -> Tensor | None:
        """Mean squared error of the prediction."""
        return (costs - record["value"]).square().mean()
