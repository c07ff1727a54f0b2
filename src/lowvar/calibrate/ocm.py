r"""OCM: optimal covariance matching (Ou, Zhang, Jiang, Li & Barber 2024), in any orthonormal basis.

By second-order Tweedie C = (sigma^2 / alpha) J with J = d x0_hat / d x. For independent signs s_i = +-1 along the
directions of B, and the probe p = B s,

    T_i v_i = (sigma^2 / alpha) s_i (B^T J^T p)_i,     E[T_i v_i | x_t] = (B^T C B)_ii

(the paper's target v * (sigma^2 H v), which is (alpha^2 / sigma^2) of it minus 1), one vector-Jacobian product a draw.
The expectation is over the probe alone: no clean data enter, so the regression has no noise but the probe's, and what
is estimated is the Jacobian of *this* network.

Lower variance. The probe's noise is s_i sum_{j != i} (B^T C B)_ij s_j: nothing in the basis where C is diagonal. In
another basis the same sum of a known matrix R, s_i (B^T R B s)_i - (B^T R B)_ii, has mean zero and nearly the same
value; subtracted, only the off-diagonal entries of C - R are left. R is the calibrated covariance in principal
components. For Gaussian data R = C, and the target has no variance at all.

T can be negative, so the loss is w (T - e^h)^2 (see `estimator`) with w = (q / (1 + q))^2, q = snr v: relative squares
where the posterior has learned from x_t, and the paper's own unit, noise, where it has not. There C is the Jacobian
times sigma^2 / alpha >> 1, its error with it, and without w those levels would be all that counts. The minimiser does
not depend on w, a function of the level. C = v e^h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.calibrate.claims import Claims
from lowvar.calibrate.estimator import DiagonalHead, Draw, square_loss
from lowvar.calibrate.table import CovarianceTable
from lowvar.process.basis import PixelBasis
from lowvar.process.covariance import BasisDiagonal, Covariance
from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.posterior import Posterior

__all__ = ["OCM"]


@dataclass(frozen=True, eq=False)
class OCM(DiagonalHead):
    """C = v e^h, h regressing the diagonal of (sigma^2 / alpha) J by one sign probe a draw.

    Attributes:
        reference: a calibrated covariance in another basis, whose probe noise is subtracted; None: nothing is.
    """

    name: ClassVar[str] = "ocm"
    declares: ClassVar[Claims] = Claims(
        "Ou et al. 2024, OCM",
        "posterior",
        "the diagonal of C in the head's basis",
        "the error of the network's Jacobian; an error of its mean alone is not seen",
        training_nfe=3,
    )
    reference: CovarianceTable | None = None

    def target(self, denoiser: Denoiser, draw: Draw, variance: Tensor) -> Tensor:
        """See the base class: T and w, (B, 2, *event_shape); one vector-Jacobian product."""
        probe = self.basis.inverse(draw.sign)
        with torch.enable_grad():
            x = draw.x.detach().requires_grad_(True)
            mean = denoiser(x, draw.level).mean
            (product,) = torch.autograd.grad(mean, x, probe)
        scale = expand(draw.level.sigma**2 / draw.level.alpha, draw.x)
        target = scale * draw.sign * self.basis.forward(product)
        if self.reference is not None:
            known = self.reference(draw.x, draw.level, Posterior(draw.mean))
            target = target - draw.sign * self.basis.forward(known.matvec(probe)) + self._along(known)
        q = (expand(draw.level.alpha, draw.x) / expand(draw.level.sigma, draw.x)) ** 2 * variance
        return torch.stack([target / variance, (q / (1 + q)) ** 2], 1)

    def _along(self, known: Covariance) -> Tensor:
        """Diagonal of B^T R B for R diagonal in the reference's basis."""
        if isinstance(self.basis, PixelBasis) or not isinstance(known, BasisDiagonal):
            return known.diagonal()
        eye = torch.eye(known.d, dtype=known.variance.dtype, device=known.variance.device)
        directions = known.basis.inverse(eye.reshape(known.d, *known.event_shape))
        mix = self.basis.forward(directions).flatten(1) ** 2
        return (known.variance.flatten(1) @ mix).reshape(known.variance.shape)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """See the base class."""
        return square_loss(output[:, 0], target[:, 0], target[:, 1])
