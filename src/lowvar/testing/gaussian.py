r"""A Gaussian target with everything in closed form.

    x_0 ~ N(m, S),   S = B diag(c) B^T,   x_t = alpha x_0 + sigma eps ~ N(alpha m, alpha^2 S + sigma^2 I),
    E[x_0 | x_t]   = m + G (x_t - alpha m),   G = alpha S (alpha^2 S + sigma^2 I)^-1,
    Cov[x_0 | x_t] = sigma^2 S (alpha^2 S + sigma^2 I)^-1.

It is the oracle of everything that is exact on Gaussian data: the reverse kernels with full covariance, the twin's
solver, the linear chain of `lowvar.testing.chain`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lowvar.process.basis import MatrixBasis
from lowvar.process.denoiser import Denoiser
from lowvar.process.kernel import Gaussian
from lowvar.process.matrix import Dense
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule
from lowvar.process.twin import GaussianTwin

__all__ = ["GaussianDenoiser", "GaussianTarget", "anisotropic_gaussian", "rotation"]


def rotation(d: int, seed: int = 0) -> Tensor:
    """A rotation or reflection of R^d, (d, d) float64, uniform (Haar) and fixed by the seed.

    Example:
        >>> B = rotation(3, seed=1)
        >>> torch.allclose(B.T @ B, torch.eye(3, dtype=torch.float64))
        True
    """
    Q, R = torch.linalg.qr(Independent(seed).normal([0], (d, d), dtype=torch.float64)[0])
    return Q * torch.sign(torch.diagonal(R))


class GaussianTarget:
    """N(mean, covariance) over events of any shape.

    Args:
        mean: m, (*event_shape).
        covariance: S, (d, d), symmetric positive semi-definite.

    Raises:
        ValueError: if shapes disagree or the matrix is not a covariance.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> target = GaussianTarget(torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
        >>> denoiser = target.denoiser(CosineVP())
        >>> posterior = denoiser(torch.ones(3, 2), denoiser.schedule.at(0.5))
        >>> posterior.mean.shape, posterior.covariance.trace().shape
        (torch.Size([3, 2]), torch.Size([1]))
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.covariance = mean.double(), covariance.double()
        d = mean.numel()
        if covariance.shape != (d, d):
            raise ValueError(f"covariance has shape {tuple(covariance.shape)}, a mean of {d} numbers needs ({d}, {d})")
        if not torch.allclose(self.covariance, self.covariance.mT, atol=1e-10):
            raise ValueError("the covariance is not symmetric")
        values, vectors = torch.linalg.eigh((self.covariance + self.covariance.mT) / 2)
        if float(values[0]) < -1e-10 * float(values[-1].abs()):
            raise ValueError(f"the covariance has the negative eigenvalue {float(values[0]):.3g}")
        basis = MatrixBasis(vectors, mean.shape)
        self.twin = GaussianTwin(self.mean, basis, values.clamp_min(0).reshape(mean.shape))

    @property
    def event_shape(self) -> torch.Size:
        """Shape of an event."""
        return self.mean.shape

    def marginal(self, level: Level) -> Gaussian:
        """The law of x_t, batch size 1, float64."""
        return self.twin.marginal(level)

    def log_prob(self, x: Tensor, level: Level) -> Tensor:
        """Log density of x_t at states x (B, *event_shape), in nats, (B,)."""
        return self.marginal(level).log_prob(x.double()).to(x)

    def entropy(self, level: Level) -> float:
        """Differential entropy of x_t in nats; exact."""
        variance = self.twin.marginal_variance(level, self.mean)
        return 0.5 * float((torch.log(variance) + math.log(2 * math.pi) + 1).sum())

    def sample(
        self,
        index: Sequence[int] | Tensor,
        noise: NoiseSource | None = None,
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Samples x_0 of numbers `index`, (n, *event_shape), from the source's normal numbers at `draw`.

        Example:
            >>> target = anisotropic_gaussian((1, 2, 2))
            >>> target.sample(range(3)).shape
            torch.Size([3, 1, 2, 2])
        """
        z = (noise or Independent(0)).normal(index, self.event_shape, draw=draw, dtype=dtype)
        return self.twin.sample(z)

    def denoiser(self, schedule: Schedule, covariance: Literal["basis", "dense"] | None = "basis") -> GaussianDenoiser:
        """The exact posterior under a schedule.

        Args:
            schedule: any schedule.
            covariance: the form of C: diagonal in the eigenbasis, a dense matrix, or not handed on.
        """
        return GaussianDenoiser(self, schedule, covariance)


class GaussianDenoiser(Denoiser):
    """The exact posterior of a `GaussianTarget`; `nfe` is 1, as if it were a network."""

    def __init__(self, target: GaussianTarget, schedule: Schedule, covariance: str | None = "basis") -> None:
        if covariance not in ("basis", "dense", None):
            raise ValueError(f"covariance is {covariance!r}; allowed: 'basis', 'dense', None")
        self.target, self.schedule, self.covariance = target, schedule, covariance

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class."""
        posterior = self.target.twin.posterior(x, level)
        if self.covariance == "dense" and posterior.covariance is not None:
            return Posterior(posterior.mean, Dense(posterior.covariance.dense(), self.target.event_shape))
        return posterior if self.covariance == "basis" else Posterior(posterior.mean)


def anisotropic_gaussian(event_shape: Sequence[int] = (4,), ratio: float = 100.0, seed: int = 0) -> GaussianTarget:
    """A Gaussian off the origin, its eigenvalues geometric from 1/sqrt(ratio) to sqrt(ratio), in a random basis.

    Example:
        >>> target = anisotropic_gaussian((5,), ratio=16.0)
        >>> values = torch.linalg.eigvalsh(target.covariance)
        >>> round(float(values[-1] / values[0]), 9)
        16.0
    """
    shape = torch.Size(event_shape)
    d = shape.numel()
    half = math.log(ratio) / 2
    values = torch.exp(torch.linspace(-half, half, d, dtype=torch.float64))
    B = rotation(d, seed)
    mean = Independent(seed).normal([1], shape, dtype=torch.float64)[0]
    return GaussianTarget(mean, (B * values) @ B.T)
