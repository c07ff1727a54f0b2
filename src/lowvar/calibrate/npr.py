r"""NPR: the squared noise prediction residual (Bao, Li, Sun, Zhu & Zhang 2022b, Sec. 4.2).

A network g regresses (eps - eps_hat)^2 on x_t, entry by entry, and C = (sigma^2 / alpha^2) g. Since x_0 - x0_hat =
-(sigma / alpha)(eps - eps_hat), that is the regression of the squared residual itself,

    C_ii = E[(x_0 - x0_hat)_i^2 | x_t],

taken here so, because it stays right when x0_hat is clipped and along any orthonormal basis. With x0_hat = m + delta
and m the posterior mean it equals Var[x_0i | x_t] + delta_i^2: the variance a kernel around an imperfect mean should
have.

Target T = (x_0 - x0_hat)_i^2 / v_i >= 0, loss h + T e^-h (see `estimator`): twice the negative
Gaussian log likelihood of the residual, up to a constant. The paper's loss is the square of the difference of g; both
have the same minimiser. C = v e^h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowvar.calibrate.claims import Claims
from lowvar.calibrate.estimator import DiagonalHead, Draw, proportional_loss
from lowvar.process.denoiser import Denoiser

__all__ = ["NPR"]


@dataclass(frozen=True, eq=False)
class NPR(DiagonalHead):
    """C = v e^h, h regressing the squared residual in the head's basis."""

    name: ClassVar[str] = "npr"
    declares: ClassVar[Claims] = Claims(
        "Bao et al. 2022b, NPR",
        "network",
        "the diagonal of E[(x0 - x0_hat)(x0 - x0_hat)^T | x_t] in the head's basis",
        "none beyond the head's fit",
        training_nfe=1,
    )

    def target(self, denoiser: Denoiser, draw: Draw, variance: Tensor) -> Tensor:
        """See the base class."""
        return self.basis.forward(draw.x0 - draw.mean) ** 2 / variance

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """See the base class."""
        return proportional_loss(output[:, 0], target)
