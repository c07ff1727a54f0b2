r"""REBAR: the score function, with the same program run on a relaxed sample as control variate.

    grad E f(b) = E [(f(b) - eta f(s(z))) grad log p(b) + eta grad f(s(z)) - eta grad f(s(z~))],

z the continuous number behind b, z~ a draw of it given b, s(z) = sigmoid(z / lambda) or softmax (see `relaxed`). It is
unbiased for any eta and lambda that do not know the sample, but only if z~ is differentiated through the condition. The
program must accept values between the discrete ones.

**One number, two derivatives.** z and z~ may share their noise (Tucker et al., appendix): then z~ = z, and only their
derivatives in the logits phi differ, dz = dphi against dz~ through the condition,

    eta grad f(s(z)) - eta grad f(s(z~)) = eta f'(s) s'(z) (dz - dz~).

What f takes from the parameters directly (a decoder's weights) has the same derivative in both and cancels *exactly*:
it enters by the discrete sample alone, so the relaxed samples add no variance to it. With noise of their own both terms
would be right on average only. Here one relaxed branch carries f' and a second one, a constant, takes the direct part
away again: three branches. For the logits themselves shared noise is a draw: on one to three bits their exact variance
is within 13% of that with noise of their own, either way.

**Tuning.** The identity holds for each logit on its own, so eta may be a number or a tensor, an entry an element of the
site. eta and lambda may be tensors with a gradient: the surrogate's gradient in them is 0, that of `second_moment` is
the slope of the estimate's own variance.

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

from lowvar.gradients.distributions import base, natural
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


@dataclass(frozen=True, eq=False)
class REBAR(Stateless):
    """Relaxed samples as control variate of the discrete one.

    Args:
        eta: coefficient of the control variate, a number or a tensor that broadcasts to the site's elements.
        temperature: lambda > 0, a number or a tensor of one.

    Raises:
        ValueError: if the temperature is not positive.

    Example:
        >>> from torch.distributions import Bernoulli
        >>> noise = {"u": torch.tensor(0.9), "v": torch.tensor(0.5)}
        >>> b, z, same = REBAR().draw(Bernoulli(torch.tensor(0.5)), noise, {}).values
        >>> float(b), bool(z == same)
        (1.0, True)
    """

    label: ClassVar[GradientLabel] = "unbiased"
    source: ClassVar[str] = "Tucker et al. 2017"
    smooth: ClassVar[bool] = True

    eta: float | Tensor = 1.0
    temperature: float | Tensor = 0.5

    def __post_init__(self) -> None:
        """Checks the temperature."""
        _checked(self.temperature if not isinstance(self.temperature, Tensor) else 1.0)

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """For b, and for z given it."""
        _checked(self.temperature)
        noise = relaxed_noise(d, "REBAR")
        shape = base(d).batch_shape
        if isinstance(self.eta, Tensor) and not _fits(self.eta.shape, shape):
            raise ValueError(f"eta has shape {tuple(self.eta.shape)}; give a number, or one an element, {tuple(shape)}")
        return {"u": noise["u"], "v": noise["v"]}

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """Those of b."""
        return relaxed_breaks(d)

    def branches(self, d: Distribution) -> tuple[Branch, ...]:
        """b, the relaxed value with the derivative of z less that of z~, and the same value without."""
        return ("main", "live", "live")

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """The three values; log p of each element, times eta as well."""
        b = hard(d, noise)
        logits = natural(d)["logits"]
        given = conditional(d, logits, b, noise["v"])
        both = zero(free(d, logits, b, noise["v"])) - zero(given)
        log_p = base(d).log_prob(b)
        eta = torch.as_tensor(self.eta, dtype=logits.dtype, device=logits.device).expand(log_p.shape)
        each = eta if both.ndim == eta.ndim else eta[..., None]  # an element, whatever its classes
        values = torch.stack(
            [b, relax(d, given.detach() + each * both, self.temperature), relax(d, given.detach(), self.temperature)]
        )
        return SiteDraw(values, {"log_prob": log_p.sum(), "scaled": (eta * zero(log_p)).sum()})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """See the module."""
        relaxed = zero(live[..., 1, :]) - zero(live[..., 2, :])
        c = costs[..., 2, :] + zero(live[..., 2, :])  # with its slope in lambda, times 0 for the first derivative
        score = costs[..., 0, :] * zero(record["log_prob"])[..., None] - c * record["scaled"][..., None]
        return live[..., 0, :] + score + relaxed

    def value(self, record: SiteRecord, costs: Tensor) -> Tensor:
        """f(b)."""
        return costs[..., 0, :]


def _checked(temperature: float | Tensor) -> None:
    number = float(temperature.detach()) if isinstance(temperature, Tensor) else temperature
    if number <= 0:
        raise ValueError(f"temperature is {number:g}; give a number above 0")


def _fits(own: torch.Size, shape: torch.Size) -> bool:
    tail = shape[len(shape) - len(own) :] if len(own) <= len(shape) else None
    return tail is not None and all(a in (1, b) for a, b in zip(own, tail, strict=True))
