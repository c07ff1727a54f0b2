r"""The Gaussian twin: a Gaussian with the data's mean m and covariance B diag(c) B^T, everything in closed form.

With x_t = alpha x_0 + sigma eps and per basis direction (centred at alpha m), its

    denoiser            D_lin = m + alpha c / (alpha^2 c + sigma^2) (x - alpha m)           (the Wiener filter)
    posterior variance  c sigma^2 / (alpha^2 c + sigma^2)
    marginal variance   alpha^2 c + sigma^2
    flow map t -> s     x_s - alpha_s m = sqrt(w_s / w_t) (x_t - alpha_t m), w the marginal variance
    mmse                mean over directions of the posterior variance
    noise loss          E ||eps - eps_lin||^2 / d = (alpha^2 / sigma^2) mmse

D_lin is the best *linear* denoiser of any data with these moments, so the mmse of the twin bounds the data's from
above, and E ||D_lin - x_0||^2 is known exactly for the data themselves. The twin is the control variate of this
package: a term correlated with what a network computes, whose own integral, loss or expectation needs no network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.basis import Basis
from lowvar.process.covariance import BasisDiagonal
from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.kernel import Gaussian
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule

__all__ = ["GaussianTwin", "TwinDenoiser"]


@dataclass(frozen=True, eq=False)
class GaussianTwin:
    """A Gaussian in an orthonormal basis.

    Attributes:
        mean: m, (*event_shape).
        basis: the orthonormal basis B.
        spectrum: c, variances along its directions, (*event_shape), >= 0.

    Raises:
        ValueError: if shapes differ or a variance is negative.

    Example:
        >>> from lowvar.process.basis import PixelBasis
        >>> from lowvar.process.schedule import CosineVP
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([4.0, 0.25]))
        >>> level = CosineVP().at(0.0)
        >>> float(twin.mmse(level))
        0.0
    """

    mean: Tensor
    basis: Basis
    spectrum: Tensor

    def __post_init__(self) -> None:
        """Checks shapes and signs."""
        if self.mean.shape != self.spectrum.shape or self.mean.shape != self.basis.event_shape:
            raise ValueError(
                f"mean {tuple(self.mean.shape)}, spectrum {tuple(self.spectrum.shape)} and basis "
                f"{tuple(self.basis.event_shape)} must have one shape"
            )
        if bool((self.spectrum < 0).any()):
            raise ValueError("the spectrum holds negative variances")

    def rotate(self, x: Tensor, level: Level) -> Tensor:
        """Centred coefficients B^T (x - alpha m), (B, *event_shape)."""
        return self.basis.forward(x - expand(level.alpha, x) * self.mean.to(x))

    def unrotate(self, c: Tensor, level: Level) -> Tensor:
        """The inverse of `rotate`."""
        return self.basis.inverse(c) + expand(level.alpha, c) * self.mean.to(c)

    def marginal_variance(self, level: Level, like: Tensor) -> Tensor:
        """alpha^2 c + sigma^2 along the directions, (1 or B, *event_shape), in the dtype of `like`."""
        return expand(level.alpha**2, like) * self.spectrum.to(like) + expand(level.sigma**2, like)

    def posterior(self, x: Tensor, level: Level) -> Posterior:
        """The exact posterior of the Gaussian at states x (B, *event_shape)."""
        c = self.spectrum.to(x)
        total = self.marginal_variance(level, x)
        safe = torch.where(total > 0, total, torch.ones_like(total))  # c = sigma = 0: nothing is unknown there
        mean = self.mean.to(x) + self.basis.inverse(expand(level.alpha, x) * c / safe * self.rotate(x, level))
        variance = c * expand(level.sigma**2, x) / safe
        return Posterior(
            mean, BasisDiagonal(self.basis, variance.expand(1, *c.shape) if variance.ndim == c.ndim else variance)
        )

    def marginal(self, level: Level) -> Gaussian:
        """The law of x_t, N(alpha m, alpha^2 C + sigma^2 I), batch size 1."""
        variance = self.marginal_variance(level, self.spectrum)[None]
        return Gaussian(level.alpha.to(self.mean) * self.mean[None], BasisDiagonal(self.basis, variance))

    def flow(self, x: Tensor, t: Level, s: Level) -> Tensor:
        """The probability-flow map from level t to level s, exact; s = 0 gives samples of the Gaussian."""
        ratio = self.marginal_variance(s, x) / self.marginal_variance(t, x)
        return self.unrotate(ratio.sqrt() * self.rotate(x, t), s)

    def sample(self, z: Tensor) -> Tensor:
        """Samples m + B sqrt(c) B^T z from standard normal z (B, *event_shape)."""
        return self.mean.to(z) + self.basis.inverse(self.spectrum.to(z).sqrt() * self.basis.forward(z))

    def mmse(self, level: Level) -> Tensor:
        """E ||x_0 - D_lin||^2 / d, float64, shape of the level: exact for any data with these moments."""
        c = self.spectrum.double().flatten()
        sigma2, alpha2 = level.sigma[..., None] ** 2, level.alpha[..., None] ** 2
        total = alpha2 * c + sigma2
        return torch.where(total > 0, c * sigma2 / total.clamp_min(1e-300), 0.0).mean(-1)

    def noise_loss(self, level: Level) -> Tensor:
        """E ||eps - eps_lin||^2 / d = (alpha^2 / sigma^2) mmse, float64; its limit at sigma = 0 is not taken."""
        return torch.exp(level.logsnr) * self.mmse(level)

    def denoiser(self, schedule: Schedule) -> TwinDenoiser:
        """The twin as a denoiser of a schedule (it costs no network evaluation)."""
        return TwinDenoiser(self, schedule)


class TwinDenoiser(Denoiser):
    """The Wiener filter as a `Denoiser`; `nfe` is 0."""

    nfe = 0

    def __init__(self, twin: GaussianTwin, schedule: Schedule) -> None:
        self.twin, self.schedule = twin, schedule

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class."""
        return self.twin.posterior(x, level)
