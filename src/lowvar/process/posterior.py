r"""The posterior of clean data given a noisy state: the interface between networks and reverse processes.

    x_t = alpha_t x_0 + sigma_t eps,     mean = x0_hat(x_t) = E[x_0 | x_t],     C(x_t) = Cov[x_0 | x_t].

Whatever a network predicts, a `Denoiser` turns it into a `Posterior`; kernels and solvers read nothing else.
Second-order Tweedie links the two moments: C = (sigma_t^2 / alpha_t) d x0_hat / d x_t.

Clipping. Data in [-b, b] have |mean| <= b, and a variable of that range with mean m has a variance of at most
(b - m)(b + m) (Bhatia & Davis 2000). `Posterior.clip` applies both, so that mean and covariance stay those of one law.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lowvar.process.covariance import Covariance

__all__ = ["Posterior"]


@dataclass(frozen=True)
class Posterior:
    """Mean and, where known, covariance of p(x_0 | x_t).

    Attributes:
        mean: x0_hat, (B, *event_shape).
        covariance: C, or None where the network says nothing about it and no calibration is attached.
        fraction: f of a learned-range head (Nichol & Dhariwal 2021, Eq. 15), (B, *event_shape), nominally in [0, 1]:
            the variance of a reverse step is exp(f log beta + (1 - f) log beta_tilde). It is a property of a step, not
            of C, so kernels read it only when asked for `variance="learned"`.

    Example:
        >>> import torch
        >>> from lowvar.process.covariance import Isotropic
        >>> posterior = Posterior(torch.tensor([[0.5, 3.0]]), Isotropic(2.0, (2,))).clip(1.0)
        >>> posterior.mean.tolist(), posterior.covariance.trace().tolist()
        ([[0.5, 1.0]], [0.75])
    """

    mean: Tensor
    covariance: Covariance | None = None
    fraction: Tensor | None = None

    def clip(self, bound: float) -> Posterior:
        """The posterior of data known to lie in [-bound, bound]."""
        mean = self.mean.clamp(-bound, bound)
        if self.covariance is None:
            return replace(self, mean=mean)
        return replace(self, mean=mean, covariance=self.covariance.bounded(bound**2 - mean**2))
