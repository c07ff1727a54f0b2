r"""Gaussian mixtures: targets with several modes whose posterior is exact at every noise level.

    x_0 ~ sum_k w_k N(m_k, S_k),   S_k = V_k diag(c_k) V_k^T,   x_t = alpha x_0 + sigma eps.

Given x_t the posterior is a mixture again: with v_k = alpha^2 c_k + sigma^2 and y_k = V_k^T (x_t - alpha m_k),

    w_k(x_t)  propto  w_k prod_j v_kj^-1/2 exp(-y_kj^2 / 2 v_kj)            (responsibilities, by log-sum-exp)
    mu_k      = m_k + V_k (alpha c_k / v_k) y_k,     P_k = V_k diag(c_k sigma^2 / v_k) V_k^T
    x0_hat    = sum_k w_k(x_t) mu_k
    C         = sum_k w_k(x_t) (P_k + (mu_k - x0_hat)(mu_k - x0_hat)^T).

The components are diagonalised once, so that x0_hat costs O(K d^2) a sample and nothing is ever inverted. At alpha = 0
the posterior is the prior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from lowvar.process.basis import MatrixBasis
from lowvar.process.covariance import BasisDiagonal, Covariance, Diagonal, Isotropic
from lowvar.process.denoiser import Denoiser
from lowvar.process.matrix import Dense
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule
from lowvar.process.twin import GaussianTwin
from lowvar.testing.gaussian import rotation

__all__ = [
    "MixtureCovariance",
    "MixtureDenoiser",
    "MixtureTarget",
    "mixture2",
    "mixture8",
    "mixture64",
    "random_mixture",
]

MixtureCovariance = Literal["dense", "pca-diagonal", "diagonal", "isotropic"]


@dataclass(frozen=True)
class _Components:
    """The posterior of each component: responsibilities (B, K), means (B, K, d), variances along V_k (B or 1, K, d)."""

    log_density: Tensor
    weight: Tensor
    mean: Tensor
    variance: Tensor


class MixtureTarget:
    """A mixture of Gaussians over events of any shape; all parameters float64, states float32 or float64.

    Args:
        weights: w, (K,), positive; normalised.
        means: m, (K, *event_shape).
        covariances: S, (K, d, d).

    Raises:
        ValueError: if shapes disagree, a weight is not positive or a matrix is no covariance.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> eye = torch.eye(2).expand(2, 2, 2) * 0.01
        >>> target = MixtureTarget(torch.ones(2), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), eye)
        >>> level = CosineVP().at(0.5)
        >>> posterior = target.posterior(torch.zeros(1, 2), level, "dense")
        >>> [round(v, 6) for v in posterior.mean[0].tolist()]
        [0.0, 0.0]
        >>> round(float(posterior.covariance.diagonal()[0, 0]), 2)  # which of the two modes is open
        0.99
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        count, d = len(means), means[0].numel()
        if weights.shape != (count,) or covariances.shape != (count, d, d):
            raise ValueError(
                f"weights {tuple(weights.shape)}, means {tuple(means.shape)} and covariances {tuple(covariances.shape)}"
                f" do not fit: {count} components of {d} numbers need ({count},) and ({count}, {d}, {d})"
            )
        if not bool((weights > 0).all()):
            raise ValueError(f"weights must be positive, got {weights.tolist()}")
        self.weights = weights.double() / weights.double().sum()
        self.means, self.covariances = means.double(), covariances.double()
        values, self._vectors = torch.linalg.eigh((self.covariances + self.covariances.mT) / 2)
        if bool((values[:, 0] < -1e-10 * values[:, -1].abs()).any()):
            raise ValueError("a covariance has a negative eigenvalue")
        self._values = values.clamp_min(0)  # (K, d)
        self._flat_means = self.means.flatten(1)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of an event."""
        return self.means.shape[1:]

    @property
    def d(self) -> int:
        """Numbers in an event."""
        return self.event_shape.numel()

    @cached_property
    def mean(self) -> Tensor:
        """E x_0, (*event_shape)."""
        return torch.tensordot(self.weights, self.means, dims=1)

    @cached_property
    def covariance(self) -> Tensor:
        """Cov x_0, (d, d)."""
        centred = self._flat_means - self.mean.flatten()
        between = (centred.mT * self.weights) @ centred
        return torch.tensordot(self.weights, self.covariances, dims=1) + between

    @cached_property
    def twin(self) -> GaussianTwin:
        """The Gaussian with the same mean and covariance, in the principal components of the mixture."""
        values, vectors = torch.linalg.eigh(self.covariance)
        basis = MatrixBasis(vectors.flip(1), self.event_shape)
        return GaussianTwin(self.mean, basis, values.flip(0).clamp_min(0).reshape(self.event_shape))

    def _components(self, x: Tensor, level: Level) -> _Components:
        alpha = level.alpha.reshape(-1, 1, 1).to(x.device)
        sigma2 = (level.sigma**2).reshape(-1, 1, 1).to(x.device)
        c, m = self._values.to(x.device), self._flat_means.to(x)
        v64 = alpha**2 * c + sigma2  # (B or 1, K, d), float64
        v, gain, variance = v64.to(x), (alpha * c / v64).to(x), (c * sigma2 / v64).to(x)
        V = self._vectors.to(x)
        centred = x.flatten(1)[:, None] - alpha.to(x) * m
        y = torch.einsum("kij,bki->bkj", V, centred)
        constant = torch.log(self.weights.to(x.device)) - 0.5 * torch.log(2 * math.pi * v64).sum(-1)
        joint = constant.to(x) - 0.5 * (y**2 / v).sum(-1)
        log_density = torch.logsumexp(joint, -1)
        mean = m + torch.einsum("kij,bkj->bki", V, gain * y)
        return _Components(log_density, torch.exp(joint - log_density[:, None]), mean, variance)

    def log_prob(self, x: Tensor, level: Level) -> Tensor:
        """Log density of x_t at states x (B, *event_shape), in nats, (B,)."""
        return self._components(x, level).log_density

    def responsibilities(self, x: Tensor, level: Level) -> Tensor:
        """p(component | x_t), (B, K)."""
        return self._components(x, level).weight

    def posterior(self, x: Tensor, level: Level, covariance: MixtureCovariance | None = "dense") -> Posterior:
        """The exact posterior at states x (B, *event_shape) and a scalar or (B,) level.

        Args:
            x: states.
            level: noise level.
            covariance: C itself ("dense"), or its best member of a smaller family: its diagonal in the data's principal
                components or in the event's own coordinates, the multiple of the identity with its trace; None: no C.
        """
        parts = self._components(x, level)
        mean = torch.einsum("bk,bki->bi", parts.weight, parts.mean)
        posterior_mean = mean.reshape(x.shape)
        if covariance is None:
            return Posterior(posterior_mean)
        between = parts.mean - mean[:, None]
        return Posterior(posterior_mean, self._covariance(covariance, parts, between))

    def _covariance(self, kind: MixtureCovariance, parts: _Components, between: Tensor) -> Covariance:
        w, V = parts.weight, self._vectors.to(between)
        if kind == "isotropic":
            trace = torch.einsum("bk,bk->b", w, parts.variance.sum(-1) + (between**2).sum(-1))
            return Isotropic(trace / self.d, self.event_shape)
        if kind == "dense":
            if parts.variance.shape[0] == 1:  # one level for all samples: P_k is shared
                within = torch.tensordot(w, (V * parts.variance[0][:, None]) @ V.mT, dims=1)
            else:
                within = torch.einsum("bkj,kij,klj->bil", w[..., None] * parts.variance, V, V)
            return Dense(within + torch.einsum("bk,bki,bkl->bil", w, between, between), self.event_shape)
        if kind == "diagonal":
            rotated, spread = V, between
        elif kind == "pca-diagonal":
            P = self.twin.basis.matrix().to(between)
            rotated, spread = P.mT @ V, between @ P
        else:
            raise ValueError(f"covariance is {kind!r}; allowed: {', '.join(get_args(MixtureCovariance))}, None")
        within = torch.einsum("bkj,kij->bi", w[..., None] * parts.variance, rotated**2)
        variance = (within + torch.einsum("bk,bki->bi", w, spread**2)).reshape(-1, *self.event_shape)
        return Diagonal(variance) if kind == "diagonal" else BasisDiagonal(self.twin.basis, variance)

    def denoiser(self, schedule: Schedule, covariance: MixtureCovariance | None = "dense") -> MixtureDenoiser:
        """The exact posterior under a schedule, with the covariance in one of the forms of `posterior`."""
        return MixtureDenoiser(self, schedule, covariance)

    def sample(
        self,
        index: Sequence[int] | Tensor,
        noise: NoiseSource | None = None,
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Samples x_0 of numbers `index`, (n, *event_shape): component by a uniform number, the rest by normals.

        Example:
            >>> target = mixture2()
            >>> bool((target.sample(range(4))[2:] == target.sample([2, 3])).all())
            True
        """
        source = noise or Independent(0)
        u = source.uniform(index, (1,), draw=draw, dtype=torch.float64)[:, 0]
        k = torch.searchsorted(torch.cumsum(self.weights, 0), u).clamp_max(len(self.weights) - 1)
        scaled = self._values[k].sqrt() * source.normal(index, (self.d,), draw=draw, dtype=torch.float64)
        rows = max(1, 2**22 // self.d**2)  # one product a sample, so that its digits do not depend on the batch
        parts = zip(k.split(rows), scaled.split(rows), strict=True)
        rotated = torch.cat([torch.einsum("bij,bj->bi", self._vectors[c], y) for c, y in parts])
        x = self._flat_means[k] + rotated
        return x.to(dtype).reshape(-1, *self.event_shape)

    def noisy(self, index: Sequence[int] | Tensor, level: Level, noise: NoiseSource | None = None) -> Tensor:
        """Exact samples of x_t at a scalar level, (n, *event_shape), float64; x_0 is `sample` of the same numbers."""
        source = noise or Independent(0)
        eps = source.normal(index, self.event_shape, draw=1, dtype=torch.float64)
        return level.alpha * self.sample(index, source) + level.sigma * eps

    def entropy(self, level: Level, n: int = 4096, noise: NoiseSource | None = None) -> tuple[float, float]:
        """Differential entropy of x_t in nats by Monte Carlo: (estimate, its standard error).

        Example:
            >>> from lowvar.process.schedule import CosineVP
            >>> value, error = mixture2().entropy(CosineVP().at(1.0), n=2048)
            >>> abs(value - (1 + torch.log(torch.tensor(2 * torch.pi)).item())) < 4 * error + 1e-3  # N(0, I_2)
            True
        """
        surprise = -self.log_prob(self.noisy(range(n), level, noise), level)
        return float(surprise.mean()), float(surprise.std() / math.sqrt(n))

    def mmse(self, level: Level, n: int = 4096, noise: NoiseSource | None = None) -> tuple[float, float]:
        """E tr C / d at a scalar level by Monte Carlo over exact x_t: (estimate, its standard error)."""
        covariance = self.posterior(self.noisy(range(n), level, noise), level, "isotropic").covariance
        assert isinstance(covariance, Isotropic)
        return float(covariance.variance.mean()), float(covariance.variance.std() / math.sqrt(n))


class MixtureDenoiser(Denoiser):
    """The exact posterior of a `MixtureTarget`; `nfe` is 1, as if it were a network."""

    def __init__(
        self, target: MixtureTarget, schedule: Schedule, covariance: MixtureCovariance | None = "dense"
    ) -> None:
        if covariance not in (*get_args(MixtureCovariance), None):
            raise ValueError(f"covariance is {covariance!r}; allowed: {', '.join(get_args(MixtureCovariance))}, None")
        self.target, self.schedule = target, schedule
        self.covariance: MixtureCovariance | None = covariance

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class."""
        return self.target.posterior(x, level, self.covariance)


def random_mixture(
    d: int, components: int, seed: int, *, spread: float = 1.0, width: float = 1.0, ratio: float = 30.0
) -> MixtureTarget:
    """An anisotropic mixture fixed by its seed, shifted and scaled to mean 0 and E ||x_0||^2 = d.

    Component k has a weight between 1/2 and 3/2 (before normalisation), a mean N(0, spread^2 I), and in a basis of its
    own standard deviations geometric from width to width / sqrt(ratio).

    Args:
        d: dimensions.
        components: K.
        seed: of an `Independent` source.
        spread: standard deviation of the means before scaling.
        width: largest standard deviation of a component before scaling.
        ratio: largest over smallest variance of a component.

    Example:
        >>> target = random_mixture(3, 2, seed=5)
        >>> round(float(torch.trace(target.covariance)), 9)
        3.0
    """
    source = Independent(seed)
    weights = 0.5 + source.uniform([0], (components,), dtype=torch.float64)[0]
    means = spread * source.normal(range(components), (d,), dtype=torch.float64)
    values = width**2 * torch.exp(torch.linspace(0, -math.log(ratio), d, dtype=torch.float64))
    V = torch.stack([rotation(d, seed * 1000 + k + 1) for k in range(components)])
    raw = MixtureTarget(weights, means, (V * values) @ V.mT)
    scale = math.sqrt(d / float(torch.trace(raw.covariance)))
    return MixtureTarget(weights, scale * (means - raw.mean), scale**2 * raw.covariances)


def mixture2() -> MixtureTarget:
    """The published 2-dimensional target: 4 components, seed 2."""
    return random_mixture(2, 4, seed=2, width=0.35, ratio=10.0)


def mixture8() -> MixtureTarget:
    """The published 8-dimensional target: 6 components, seed 8."""
    return random_mixture(8, 6, seed=8)


def mixture64() -> MixtureTarget:
    """The published 64-dimensional target: 10 components, seed 64."""
    return random_mixture(64, 10, seed=64)
