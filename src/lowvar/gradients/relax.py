r"""RELAX: the score function with a learned control variate c(z) of the continuous number behind the discrete value.

    g = (f(b) - c(z~)) grad log p(b) + grad c(z) - grad c(z~)          (z, z~: see `relaxed`)

is unbiased for any function c, and c is trained on the variance of g: as E g does not depend on c, on E |g|^2, here of
the gradient with respect to the site's logits. That loss is `info.auxiliary`; it has a gradient with respect to c only,
and the surrogate has none with respect to c, so `(loss + info.auxiliary).backward()` trains both. Each sample has its
own z~ and its own g: products of one sample's cost with another's control variate would bias it.

Source: W. Grathwohl, D. Choi, Y. Wu, G. Roeder, D. Duvenaud, "Backpropagation through the void", 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributions import Distribution
from torch.func import grad, grad_and_value

from lowvar.gradients.distributions import log_prob, natural, with_natural
from lowvar.gradients.estimator import BaseNoise, GradientLabel, OneBranch, SiteDraw, SiteRecord, SiteState, zero
from lowvar.gradients.relaxed import conditional, free, hard, relaxed_breaks, relaxed_noise

__all__ = ["RELAX"]


@dataclass(frozen=True)
class RELAX(OneBranch):
    """A learned control variate.

    Args:
        control: c, from z (the site's shape) to a scalar; differentiable, such as a module.

    Example:
        >>> import torch
        >>> from torch.distributions import Bernoulli
        >>> noise = {"u": torch.tensor(0.9), "v": torch.tensor(0.5), "w": torch.tensor(0.2)}
        >>> draw = RELAX(lambda z: torch.tanh(z).sum()).draw(Bernoulli(torch.tensor(0.5)), noise, {})
        >>> sorted(draw.record)
        ['control', 'difference', 'log_prob', 'score', 'term']
    """

    label: ClassVar[GradientLabel] = "unbiased"
    source: ClassVar[str] = "Grathwohl et al. 2018"
    apart: ClassVar[tuple[str, ...]] = ("v", "w")

    control: Callable[[Tensor], Tensor]

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """For b, z and z~."""
        return relaxed_noise(d, "RELAX")

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """Those of b."""
        return relaxed_breaks(d)

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """b, and the control variate's values and derivatives in the logits."""
        b = hard(d, noise)
        logits = natural(d)["logits"]
        fixed = logits.detach()
        slope = grad(lambda phi: self.control(free(d, phi, b, noise["v"])).sum())(fixed)
        through = grad_and_value(lambda phi: self.control(conditional(d, phi, b, noise["w"])).sum())
        given, control = through(fixed)
        score = grad(lambda phi: log_prob(with_natural(d, {"logits": phi}), b))(fixed)
        difference = slope - given
        record = {"log_prob": log_prob(d, b), "term": (difference.detach() * zero(logits)).sum()}
        return SiteDraw(b[None], {**record, "control": control, "difference": difference, "score": score})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """See the module."""
        f = costs[..., 0, :]
        c = record["control"].detach()[..., None] / f.shape[-1]
        term = record["term"][..., None] / f.shape[-1]
        return live[..., 0, :] + (f - c) * zero(record["log_prob"])[..., None] + term

    def start(self, d: Distribution) -> SiteState:
        """Empty: the control variate belongs to the user."""
        return {}

    def updated(self, state: SiteState, record: SiteRecord, costs: Tensor) -> SiteState:
        """Still empty."""
        return state

    def auxiliary(self, record: SiteRecord, costs: Tensor, state: SiteState) -> Tensor | None:
        """The mean of |g|^2 over samples, with a gradient with respect to the control variate only."""
        f = costs[..., 0, :].sum(-1)
        left = f - record["control"]
        spread = left.reshape(*left.shape, *[1] * (record["score"].ndim - left.ndim))
        g = spread * record["score"].detach() + record["difference"]
        return g.square().sum() / left.numel()
