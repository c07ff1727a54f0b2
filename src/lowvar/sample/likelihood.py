r"""The variational bound on the negative log-likelihood, step by step, in bits a dimension.

For a chain t_0 > t_1 > ... > t_K = 0 and a reverse kernel p(x_s | x_t) = N(a x_t + kappa x0_hat, S),

    -log p(x_0)  <=  KL(q(x_{t_0} | x_0) || N(0, (alpha^2 + sigma^2) I))                          prior
                     + sum_{k=0}^{K-2} E KL(q(x_{t_{k+1}} | x_{t_k}, x_0) || p(x_{t_{k+1}} | x_{t_k}))  kl
                     - E log p(x_0 | x_{t_{K-1}})                                                  decoder

with q(x_s | x_t, x_0) = N(a x_t + kappa x_0, lambda^2 I), a, kappa, lambda those of the kernel at its eta (Ho et al.
2020, Eq. 5, for eta = 1; Song et al. 2020, Theorem 1, for any eta > 0). The means differ by kappa (x_0 - x0_hat)
only, so that

    KL = 1/2 [ kappa^2 (x_0 - x0_hat)^T S^-1 (x_0 - x0_hat) + sum_i (1/m_i - 1 + log m_i) ]

with the eigenvalues m of S / lambda^2, which is computed in this form: nothing of size |x_t| cancels. With
S = lambda^2 I and the exact denoiser the expected KL is (snr_s - snr_t) tr C / 2.

Decoder. Data with L grey levels in [-1, 1] have bins of half-width 1 / (L - 1), open at both ends:

    P(x) = Phi((x + 1/(L-1) - m) / s) - Phi((x - 1/(L-1) - m) / s),      Phi(inf) = 1, Phi(-inf) = 0,

in logarithms throughout, so that it neither underflows nor needs a floor (Ho et al. 2020, Eq. 13; improved-diffusion
approximates Phi by a tanh and clamps at 1e-12). A decoder with a full covariance has no cheap bin probability: its
entries are taken as independent with the diagonal of S, which is a decoder of its own and so a valid bound. With
`levels=None` the decoder is the density, and the bound is one on the differential entropy (comparable for continuous
data only).

Only at eta = 1 is the forward process a Markov chain, and the bound tight for the exact kernel; below it is a valid but
looser bound, and none at eta = 0.

Sources: Ho et al. 2020; Nichol & Dhariwal 2021, Sec. 2 (bits/dim, learned variances).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.covariance import BasisDiagonal, Covariance, Diagonal, Isotropic
from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.kernel import ReverseKernel, step_coefficients
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level

__all__ = ["VLB", "decoder_bits", "discretised_log_prob", "kl_bits", "prior_bits", "step_bits", "vlb"]


@dataclass(frozen=True)
class VLB:
    """The terms of the bound for n samples, bits a dimension, float64; a sample's bound is the sum of its terms.

    Attributes:
        prior: (n,).
        kl: (n, K - 1), the steps in the order they are taken.
        decoder: (n,).

    Example:
        >>> bound = VLB(torch.tensor([0.1, 0.3]), torch.ones(2, 4), torch.zeros(2))
        >>> round(float(bound.mean), 6), round(float(bound.se), 6), tuple(bound.terms.shape)
        (4.2, 0.1, (2, 6))
    """

    prior: Tensor
    kl: Tensor
    decoder: Tensor

    @property
    def terms(self) -> Tensor:
        """(n, K + 1): prior, the KL terms, decoder."""
        return torch.cat([self.prior[:, None], self.kl, self.decoder[:, None]], 1)

    @property
    def total(self) -> Tensor:
        """The bound of each sample, (n,)."""
        return self.terms.sum(1)

    @property
    def mean(self) -> Tensor:
        """The mean bound, ()."""
        return self.total.mean()

    @property
    def se(self) -> Tensor:
        """Standard error of the mean bound over samples, () (nan for one sample)."""
        return self.total.std() / math.sqrt(len(self.total)) if len(self.total) > 1 else self.total.sum() * math.nan


def discretised_log_prob(x: Tensor, mean: Tensor, std: Tensor, levels: int) -> Tensor:
    """Log probability (nats, entry by entry) of x's bin under N(mean, std^2); the outer bins are open.

    Args:
        x: data on the levels 2 g / (L - 1) - 1, g = 0 .. L - 1.
        mean, std: of the Gaussian, broadcast against x.
        levels: L >= 2.

    Raises:
        ValueError: if levels is below 2.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
        >>> p = discretised_log_prob(x, torch.zeros(3), torch.ones(3), levels=3).exp()
        >>> round(float(p.sum()), 12)
        1.0
    """
    if levels < 2:
        raise ValueError(f"levels is {levels}; data have at least 2 grey levels")
    half = 1 / (levels - 1)
    centred = x - mean
    upper, lower = (centred + half) / std, (centred - half) / std
    # The difference of two cdfs, taken in the tail where both are small: Phi(b) - Phi(a) = Phi(-a) - Phi(-b)
    flip = centred > 0
    a, b = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    high, low = torch.special.log_ndtr(b), torch.special.log_ndtr(a)
    tiny = torch.finfo(high.dtype).tiny
    inner = high + torch.log((-torch.expm1(low - high)).clamp_min(tiny))
    at_least, at_most = x < -1 + half, x > 1 - half
    return torch.where(
        at_least, torch.special.log_ndtr(upper), torch.where(at_most, torch.special.log_ndtr(-lower), inner)
    )


def _bits(nats: Tensor, d: int) -> Tensor:
    return nats / (d * math.log(2.0))


def _dimensions(x: Tensor) -> int:
    return x[0].numel()


def prior_bits(x0: Tensor, level: Level) -> Tensor:
    """KL(q(x_t | x_0) || N(0, (alpha^2 + sigma^2) I)) at the chain's first level, bits a dimension, (n,) float64."""
    alpha2, sigma2 = (level.alpha**2).to(x0.device), (level.sigma**2).to(x0.device)
    ratio = sigma2 / (alpha2 + sigma2)
    square = (x0.double() ** 2).flatten(1).mean(1)
    # 1/2 (ratio - 1 - log ratio) with ratio - 1 = -alpha^2 / (alpha^2 + sigma^2)
    shape = -alpha2 / (alpha2 + sigma2) - torch.log(ratio)
    return 0.5 * (shape + alpha2 / (alpha2 + sigma2) * square) / math.log(2.0)


def kl_bits(x0: Tensor, posterior: Posterior, covariance: Covariance, kappa: Tensor, lambda2: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)), bits a dimension, (B,).

    Args:
        x0: data, (B, *event_shape).
        posterior: at x_t; its mean x0_hat enters.
        covariance: S of the reverse kernel.
        kappa, lambda2: of the step, scalar or (B,).
    """
    gap = expand(kappa, x0) * (x0 - posterior.mean)
    lambda2 = lambda2.to(gap.device)
    if isinstance(covariance, Isotropic | Diagonal | BasisDiagonal):
        # one eigenvalue an entry: in float64 (m is close to 1 where steps are small), which a float32 table survives
        variance = covariance.variance.double()
        m = variance / lambda2.reshape(-1, *([1] * (variance.ndim - 1)))
        rows = (1 / m - 1 + torch.log(m)).reshape(m.shape[0], -1)
        mismatch = rows.mean(1) * covariance.d
    else:
        own = Isotropic(lambda2.to(x0.dtype).expand(x0.shape[0]), x0.shape[1:])
        mismatch = covariance.inverse_trace(own) - covariance.d + covariance.logdet() - own.logdet()
    return _bits(0.5 * (covariance.inverse_quadratic(gap) + mismatch), _dimensions(x0))


def decoder_bits(
    x0: Tensor, mean: Tensor, covariance: Covariance, levels: int | None, where: Tensor | None = None
) -> Tensor:
    """-log p(x_0 | x_t) of the last step, bits a dimension, (B,): bin probabilities, or the density for levels None.

    Args:
        x0: data, (B, *event_shape).
        mean, covariance: of the decoder.
        levels: grey levels of the data, or None.
        where: (B,), samples whose step is the last; the others get a value without meaning, and no gradient.

    Bin probabilities are computed in float64: the float32 derivative of log Phi is wrong below about -1e3, which a
    step's small variance reaches, and would put NaN into a training gradient.
    """
    if levels is None:
        quadratic = covariance.inverse_quadratic(x0 - mean)
        nats = 0.5 * (quadratic + covariance.logdet() + covariance.d * math.log(2 * math.pi))
        return _bits(nats, _dimensions(x0))
    variance = covariance.diagonal()
    if where is not None:
        chosen = where.to(x0.device).reshape(-1, *([1] * (x0.ndim - 1)))
        mean, variance = torch.where(chosen, mean, x0), torch.where(chosen, variance, torch.ones_like(variance))
    log_prob = discretised_log_prob(x0.double(), mean.double(), variance.double().sqrt(), levels)
    return _bits(-log_prob.flatten(1).sum(1), _dimensions(x0))


def step_bits(
    x0: Tensor,
    x: Tensor,
    posterior: Posterior,
    kernel: ReverseKernel,
    t: Level,
    s: Level,
    before: Level | None = None,
    levels: int | None = None,
) -> Tensor:
    """The bound's term for the step t -> s, bits a dimension, (B,): the decoder where s is clean data, else the KL.

    Args:
        x0: data, (B, *event_shape).
        x: states x_t.
        posterior: the denoiser's answer at x.
        kernel: a kernel with `last="decoder"`.
        t, s: levels, both scalar or both (B,).
        before: the level before t (see `ReverseKernel`).
        levels: grey levels of the data, or None for a density.

    Raises:
        ValueError: if the kernel has no density: `last="mean"`, or eta = 0.
    """
    if kernel.last != "decoder":
        raise ValueError("a likelihood needs a density at the last step: give a kernel with last='decoder'")
    if kernel.eta == 0:
        raise ValueError("eta is 0: a deterministic chain has no variational bound; give eta in (0, 1]")
    law = kernel(x, posterior, t, s, before)
    clean = s.sigma == 0
    if bool(clean.all()):
        return decoder_bits(x0, posterior.mean, law.covariance, levels)
    c = step_coefficients(t, s, kernel.eta, kernel.last, before)
    if not bool(clean.any()):
        return kl_bits(x0, posterior, law.covariance, c.kappa, c.lambda2)
    safe = torch.where(clean, torch.ones_like(c.lambda2), c.lambda2)
    kl = kl_bits(x0, posterior, law.covariance, c.kappa, safe)
    return torch.where(clean.to(x0.device), decoder_bits(x0, posterior.mean, law.covariance, levels, clean), kl)


@torch.no_grad()
def vlb(
    denoiser: Denoiser,
    kernel: ReverseKernel,
    grid: Tensor,
    x0: Tensor,
    levels: int | None,
    noise: NoiseSource | None = None,
    index: Sequence[int] | Tensor | None = None,
) -> VLB:
    """The bound of a reverse chain, one draw of each x_t a sample (an unbiased estimate of every term).

    Costs K network evaluations a sample.

    Args:
        denoiser: network and schedule.
        kernel: a reverse kernel of any variance with `last="decoder"` and eta > 0.
        grid: decreasing times (K + 1,) that end at 0, K >= 1.
        x0: data, (n, *event_shape).
        levels: grey levels of the data (its likelihood bins), or None for a density.
        noise: source of x_t's noise, draw k for step k (default `Independent(0)`).
        index: sample numbers (default 0 .. n - 1).

    Returns:
        The terms, float64.

    Raises:
        ValueError: if the grid does not end at 0 or the kernel has no density.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis
        >>> from lowvar.process.grid import uniform
        >>> schedule = CosineVP()
        >>> twin = GaussianTwin(torch.zeros(3), PixelBasis((3,)), torch.ones(3))
        >>> kernel = ReverseKernel(last="decoder")
        >>> bound = vlb(twin.denoiser(schedule), kernel, uniform(schedule, 4), torch.zeros(2, 3), levels=None)
        >>> tuple(bound.kl.shape)
        (2, 3)
    """
    if len(grid) < 2 or float(grid[-1]) != 0:
        raise ValueError("a likelihood needs a grid of at least one step that ends at t = 0")
    noise = Independent(0) if noise is None else noise
    index = torch.arange(x0.shape[0]) if index is None else torch.as_tensor(index)
    points = denoiser.schedule.at(grid)
    columns = []
    for k in range(len(grid) - 1):
        t, s = points[k], points[k + 1]
        eps = noise.normal(index, x0.shape[1:], draw=k, dtype=x0.dtype, device=x0.device)
        x = expand(t.alpha, x0) * x0 + expand(t.sigma, x0) * eps
        before = points[k - 1] if k else None
        columns.append(step_bits(x0, x, denoiser(x, t), kernel, t, s, before, levels).double())
    n = x0.shape[0]
    terms = [c.expand(n) for c in columns]
    kl = torch.stack(terms[:-1], 1) if len(terms) > 1 else torch.zeros(n, 0, dtype=torch.float64, device=x0.device)
    return VLB(prior_bits(x0, points[0]).expand(n), kl, terms[-1])
