r"""SN: the squared noise (Bao, Li, Sun, Zhu & Zhang 2022b, Sec. 4.1), without its cancellation.

A network regresses eps^2 on x_t, and since Cov[x_0 | x_t] = (sigma^2 / alpha^2) Cov[eps | x_t],

    C_ii = (sigma^2 / alpha^2) (E[eps_i^2 | x_t] - eps_hat_i^2).

It is the posterior's own variance where eps_hat is E[eps | x_t]; an error delta of eps_hat enters at first order, as
(sigma^2 / alpha^2)(2 eps_hat delta + delta^2). As it stands the difference cancels: where C is small against (sigma^2 /
alpha^2) eps_hat^2 it has fewer digits than its terms, none in bfloat16, and it can be negative.

So the head is put inside: E[eps_i^2 | x_t] is modelled by p = eps_hat_i^2 + (alpha^2 / sigma^2) v_i e^h, C = v e^h, and
nothing is subtracted. With p_0 the value at h = 0, q = eps_hat^2 / p_0 and T = eps^2 / p_0 >= 0,

    loss    log(p / p_0) + T p_0 / p,      p / p_0 = q + (1 - q) e^h.

Its derivative in h, (1 - q) e^h (p_0 / p)(1 - E[T | x_t] p_0 / p), vanishes only where p = E[eps^2 | x_t], and the loss
decreases before and increases after it: the minimiser is SN's C, or as near to 0 as h allows where that is negative. A
factor that fades where (alpha^2 / sigma^2) v << eps_hat^2 multiplies the gradient: draws that know nothing of C say
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.calibrate.claims import Claims
from lowvar.calibrate.estimator import DiagonalHead, Draw
from lowvar.process.denoiser import Denoiser, expand

__all__ = ["SN"]


@dataclass(frozen=True, eq=False)
class SN(DiagonalHead):
    """C = v e^h with eps_hat^2 + (alpha^2 / sigma^2) C regressing the squared noise in the head's basis."""

    name: ClassVar[str] = "sn"
    declares: ClassVar[Claims] = Claims(
        "Bao et al. 2022b, SN",
        "posterior",
        "the diagonal of C in the head's basis",
        "first order in the error of eps_hat",
        training_nfe=1,
    )

    def target(self, denoiser: Denoiser, draw: Draw, variance: Tensor) -> Tensor:
        """See the base class: T and q, (B, 2, *event_shape)."""
        alpha, sigma = expand(draw.level.alpha, draw.x), expand(draw.level.sigma, draw.x)
        known = self.basis.forward((draw.x - alpha * draw.mean) / sigma) ** 2
        start = known + (alpha / sigma) ** 2 * variance
        return torch.stack([self.basis.forward(draw.eps) ** 2 / start, known / start], 1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """See the base class."""
        T, q = target[:, 0], target[:, 1]
        ratio = q + (1 - q) * output[:, 0].exp()
        return (ratio.log() + T / ratio).flatten(1).mean(1)
