r"""C from the network's own Jacobian, without training: what a reverse step costs more, and what it gets.

Second-order Tweedie: C = (sigma^2 / alpha) J, J = d x0_hat / d x_t. Two forms of it as a `Denoiser`, whose `nfe` counts
the products (a forward evaluation 1, a Jacobian-vector product 1 more, a vector-Jacobian product 2):

    JacobianTrace        tr C / d by Hutchinson's estimate, (sigma^2 / alpha) mean of z^T J z / d over m sign probes: an
                         isotropic covariance a sample. Unbiased over probes; variance 2 sum_{i != j} C_ij^2 / (m d^2)
                         for symmetric C, so small where d is large. 1 + m evaluations.
    JacobianCovariance   (in `process.denoiser`) C by its products; the noise (lambda^2 I + kappa^2 C)^1/2 z by k
                         Lanczos steps. 1 + k evaluations, 1 + 3 k symmetrised.

A diagonal is not offered from one probe: its relative error is of order 300% on correlated covariances (see OCM, which
learns its mean instead). A network's Jacobian need not be positive: a negative trace becomes 0.

Source: M. Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor

from lowvar.calibrate.claims import Claims
from lowvar.process.covariance import Isotropic, dot, wide
from lowvar.process.denoiser import Denoiser
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level

__all__ = ["JacobianTrace"]

_Products = tuple[Tensor, Tensor, tuple[Tensor, ...]]


class JacobianTrace(Denoiser):
    """A denoiser with the isotropic covariance of its Jacobian's estimated trace.

    Args:
        denoiser: a differentiable denoiser.
        probes: m >= 1.
        noise: of the probes: row i of a batch has the probes of sample i, drawn anew at every scalar level.

    Raises:
        ValueError: if there is no probe.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis
        >>> twin = GaussianTwin(torch.zeros(3), PixelBasis((3,)), torch.tensor([1.0, 2.0, 3.0]))
        >>> JacobianTrace(twin.denoiser(CosineVP())).probes
        1
    """

    declares: ClassVar[Claims] = Claims(
        "Hutchinson 1989", "posterior", "tr C / d in expectation over probes", "the Jacobian's error", nfe=1
    )

    def __init__(self, denoiser: Denoiser, probes: int = 1, noise: NoiseSource | None = None) -> None:
        if probes < 1:
            raise ValueError(f"probes is {probes}; a trace needs at least 1")
        self.denoiser, self.probes = denoiser, probes
        self.noise = Independent(0) if noise is None else noise
        self.schedule = denoiser.schedule
        self.nfe = denoiser.nfe * (1 + probes)

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class; `probes` Jacobian-vector products."""

        def mean(state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            posterior = self.denoiser(state, level)
            return posterior.mean, () if posterior.fraction is None else (posterior.fraction,)

        x = x.contiguous()  # forward mode refuses expanded batches
        first = 0 if level.t.ndim else round(float(level.t) * (1 << 20))
        total = torch.zeros((), device=x.device)
        value, rest = x, ()
        for k in range(self.probes):
            z = self.noise.normal(range(len(x)), x.shape[1:], draw=first + (k << 21), device=x.device)
            z = torch.where(z < 0, -1.0, 1.0).to(x)
            value, product, rest = cast("_Products", torch.func.jvp(mean, (x,), (z,), has_aux=True))
            total = total + dot(wide(z), wide(product)) / self.probes
        trace = (level.sigma**2 / level.alpha).to(total) * total
        return Posterior(value, Isotropic(trace / x[0].numel(), x.shape[1:]), rest[0] if rest else None)
