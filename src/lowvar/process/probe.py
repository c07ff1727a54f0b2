r"""One-probe estimates of posterior moments from derivatives of the denoiser along random directions.

With J = d x0_hat / d x_t, second-order Tweedie gives products C z = (sigma^2 / alpha) J z, and one more derivative the
third cumulant: kappa_3[z, w] = (sigma^2 / alpha)^2 d^2 x0_hat[z, w]. For independent standard normal z and w,

    E ||C z - V z||^2        = ||C - V||_F^2     for any V (0, a calibrated table): R of a kernel whose noise has V
    E ||kappa_3[z, w]||^2    = ||kappa_3||_F^2   (what limits the full covariance)

The first is taken at run time, on any network, and so by a difference quotient over h = sigma / 64: forward-mode
differentiation fails in attention and in group norms of the usual U-Nets. It costs one evaluation more than the mean,
and its relative error is of order h / sigma. The second uses nested forward-mode products, for targets that have them.
For a network, J is its own Jacobian, which is that of a posterior mean only as far as the network is one.

Why R: a step dsnr from x_t with noise lambda^2 I + kappa^2 V costs more than continuous time by (1/4) dsnr^2 R to
leading order, whatever V is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvar.process.denoiser import Denoiser, WithCovariance, expand
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level

__all__ = ["squared_deviation", "third_cumulant"]


_RELATIVE_STEP = 1 / 64


def squared_deviation(denoiser: Denoiser, x: Tensor, level: Level, z: Tensor) -> tuple[Posterior, Tensor]:
    """The posterior at x and the estimate ||C z - V z||^2 of R, (B,) float64; costs two evaluations.

    Without signal, alpha = 0, x0_hat does not depend on x and there is nothing to read C off: R is NaN.

    Args:
        denoiser: any denoiser. With `WithCovariance` V is what was attached to it, otherwise 0.
        x: states, (B, *event_shape).
        level: noise level, scalar or (B,).
        z: standard normal, of x's shape.

    Example:
        >>> from lowvar.process import BasisDiagonal, CosineVP, GaussianTwin, PixelBasis, WithCovariance
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([1.0, 4.0]))
        >>> schedule, x = CosineVP(), torch.ones(1, 2)
        >>> denoiser = twin.denoiser(schedule)
        >>> exact = WithCovariance(denoiser, lambda x, level, posterior: twin.posterior(x, level).covariance)
        >>> level = schedule.at(0.5)
        >>> [float(squared_deviation(d, x, level, x)[1]) > 1e-9 for d in (exact, denoiser)]
        [False, True]
    """
    inner = denoiser.denoiser if isinstance(denoiser, WithCovariance) else denoiser
    mean, h = inner(x, level).mean, expand(_RELATIVE_STEP * level.sigma, x)
    product = (inner(x + h * z, level).mean - mean) / h
    gap = expand(level.sigma**2 / level.alpha, x) * product
    posterior = Posterior(mean)
    if isinstance(denoiser, WithCovariance):
        posterior = Posterior(mean, denoiser.model(x, level, posterior))
        posterior = posterior if denoiser.clip is None else posterior.clip(denoiser.clip)
        assert posterior.covariance is not None
        gap = gap - posterior.covariance.matvec(z)
    R = (gap.double() ** 2).flatten(1).sum(1)
    return posterior, torch.where(level.alpha.to(R.device) > 0, R, torch.nan)


def third_cumulant(denoiser: Denoiser, x: Tensor, level: Level, z: Tensor, w: Tensor) -> Tensor:
    """The estimate ||kappa_3[z, w]||^2 of T = ||kappa_3||_F^2, (B,) float64.

    Args:
        denoiser: twice differentiable.
        x: states, (B, *event_shape).
        level: noise level, scalar or (B,).
        z, w: independent standard normal, of x's shape.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([1.0, 4.0]))
        >>> schedule, x = CosineVP(), torch.ones(1, 2)
        >>> float(third_cumulant(twin.denoiser(schedule), x, schedule.at(0.5), x, x))  # a Gaussian has none
        0.0
    """

    def along(state: Tensor) -> Tensor:
        return torch.func.jvp(lambda y: denoiser(y, level).mean, (state,), (z,))[1]

    second = torch.func.jvp(along, (x,), (w,))[1]
    scaled = expand((level.sigma**2 / level.alpha) ** 2, x) * second
    return (scaled.double() ** 2).flatten(1).sum(1)
