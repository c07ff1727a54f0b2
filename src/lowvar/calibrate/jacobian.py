r"""C from the network's own Jacobian, without training: what a reverse step costs more, and what it gets.

Second-order Tweedie: C = (sigma^2 / alpha) J, J = d x0_hat / d x_t. Two forms of it as a `Denoiser`, whose `nfe` counts
the products (a forward evaluation 1, a Jacobian-vector product 1 more, a vector-Jacobian product 2). A network whose
attention or group norms have no forward mode is differentiated in reverse, z^T J z = z^T (J^T z):

    JacobianTrace        tr C / d by Hutchinson's estimate, (sigma^2 / alpha) mean of z^T J z / d over m sign probes: an
                         isotropic covariance a sample. Unbiased over probes; variance 2 sum_{i != j} C_ij^2 / (m d^2)
                         for symmetric C, so small where d is large. 1 + m evaluations, or 1 + 2 m in reverse.
    JacobianCovariance   (in `process.jacobian`) C by its products; the noise (lambda^2 I + kappa^2 C)^1/2 z by k
                         Lanczos steps. 1 + 3 k evaluations symmetrised; by ways and prices of that module.

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
from lowvar.process.jacobian import Way, first_supported, plain_attention
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level

__all__ = ["JacobianTrace"]

_WAYS: tuple[Way, ...] = ("forward", "reverse")
_Products = tuple[Tensor, Tensor, tuple[Tensor, ...]]


class JacobianTrace(Denoiser):
    """A denoiser with the isotropic covariance of its Jacobian's estimated trace.

    Args:
        denoiser: a differentiable denoiser.
        probes: m >= 1.
        noise: of the probes: row i of a batch has the probes of sample i, drawn anew at every scalar level.
        way: how products are made; None chooses at the first call what the network supports (one product more, once):
            forward, otherwise reverse.

    Attributes:
        way: the way in use; None before the first call where it was not given.

    Raises:
        ValueError: if there is no probe, or the way is unknown.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis
        >>> twin = GaussianTwin(torch.zeros(3), PixelBasis((3,)), torch.tensor([1.0, 2.0, 3.0]))
        >>> JacobianTrace(twin.denoiser(CosineVP())).probes
        1
    """

    declares: ClassVar[Claims] = Claims(
        "Hutchinson 1989", "posterior", "tr C / d in expectation over probes", "the Jacobian's error", nfe=1
    )

    def __init__(
        self, denoiser: Denoiser, probes: int = 1, noise: NoiseSource | None = None, way: Way | None = None
    ) -> None:
        if probes < 1:
            raise ValueError(f"probes is {probes}; a trace needs at least 1")
        if way not in (None, *_WAYS):
            raise ValueError(f"way is {way!r}; allowed: forward, reverse, or None to choose")
        self.denoiser, self.probes = denoiser, probes
        self.noise = Independent(0) if noise is None else noise
        self.schedule = denoiser.schedule
        self._use(way)

    def _use(self, way: Way | None) -> None:
        self.way: Way | None = way
        self.nfe = self.denoiser.nfe * (1 + self.probes * (2 if way == "reverse" else 1))

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class; `probes` products."""
        first = 0 if level.t.ndim else round(float(level.t) * (1 << 20))
        probes = []
        for k in range(self.probes):
            z = self.noise.normal(range(len(x)), x.shape[1:], draw=first + (k << 21), device=x.device)
            probes.append(torch.where(z < 0, -1.0, 1.0).to(x))
        if self.way is None:
            self._use(first_supported(lambda _: self._forward(x, level, probes[:1]), _WAYS))
        posterior, quadratics = (self._reverse if self.way == "reverse" else self._forward)(x, level, probes)
        total = torch.stack(quadratics).mean(0)
        trace = (level.sigma**2 / level.alpha).to(total) * total
        return Posterior(posterior.mean, Isotropic(trace / x[0].numel(), x.shape[1:]), posterior.fraction)

    def _forward(self, x: Tensor, level: Level, probes: list[Tensor]) -> tuple[Posterior, list[Tensor]]:
        """The posterior without covariance, and z^T (J z), (B,), of each probe."""

        def mean(state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            posterior = self.denoiser(state, level)
            return posterior.mean, () if posterior.fraction is None else (posterior.fraction,)

        x = x.contiguous()  # forward mode refuses expanded batches
        value, rest, found = x, (), []
        for z in probes:
            with plain_attention():
                value, product, rest = cast("_Products", torch.func.jvp(mean, (x,), (z,), has_aux=True))
            found.append(dot(wide(z), wide(product)))
        return Posterior(value, None, rest[0] if rest else None), found

    def _reverse(self, x: Tensor, level: Level, probes: list[Tensor]) -> tuple[Posterior, list[Tensor]]:
        """The same by z^T (J^T z)."""
        with torch.inference_mode(False), torch.enable_grad():
            state = x.detach().clone().requires_grad_()
            posterior = self.denoiser(state, level)
            products = [torch.autograd.grad(posterior.mean, state, z, retain_graph=True)[0] for z in probes]
        fraction = None if posterior.fraction is None else posterior.fraction.detach()
        found = [dot(wide(z), wide(product)) for z, product in zip(probes, products, strict=True)]
        return Posterior(posterior.mean.detach(), None, fraction), found
