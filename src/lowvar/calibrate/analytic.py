r"""The analytic estimate of the optimal isotropic variance (Analytic-DPM, Bao, Li, Zhu & Zhang 2022).

For the exact noise predictor, E ||eps_hat||^2 / d = 1 - (alpha^2 / sigma^2) tr C / d averaged over x_t, hence

    tr C / d = (sigma^2 / alpha^2) (1 - E ||eps_hat(x_t)||^2 / d),

from forward passes alone: the clean data enter only through x_t. Bias: the identity holds for the exact predictor; an
imperfect one makes it wrong by a first-order amount, where the residual E (x_0 - x0_hat)^2 stays the right variance
*for that predictor* (see `residual`). At high noise the small difference 1 - E ||eps_hat||^2 / d is multiplied by 1 /
snr; the bounds 0 <= tr C / d <= ((b - a) / 2)^2 of data in [a, b] (their Theorem 2) are applied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvar.calibrate.claims import Claims
from lowvar.process.schedule import Level

__all__ = ["ANALYTIC", "analytic_variance"]

ANALYTIC = Claims(
    "Bao et al. 2022a, Analytic-DPM",
    "posterior",
    "the average over x_t of tr C / d",
    "first order in the error of eps_hat",
    per_sample=False,
)
"""What the estimate claims."""


def analytic_variance(noise_power: Tensor, level: Level, bound: float | None = None) -> Tensor:
    """tr C / d from the mean square of the predicted noise.

    Args:
        noise_power: E ||eps_hat||^2 / d at the levels, float64 (n,).
        level: the levels.
        bound: b of data in [-b, b], limiting the variance to b^2; None: no upper bound.

    Returns:
        Variances (n,), not negative.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> level = CosineVP().at(torch.tensor([0.5]))
        >>> analytic_variance(level.sigma**2, level).allclose(level.sigma**2)  # unit-variance Gaussian data
        True
    """
    variance = torch.exp(-level.logsnr) * (1 - noise_power)
    return variance.clamp(min=0.0, max=None if bound is None else bound**2)
