r"""Implicit reparameterisation: samples whose inverse CDF has no closed form.

A sample x(theta) = F^-1(u; theta) obeys F(x(theta); theta) = u, so

    dx / dtheta = -(dF / dtheta)(x; theta) / p(x; theta).

The value is the quantile at the uniform number, found without gradient; the derivative is attached to it as
x - (F(x; theta) - stop F) / p: right to first order, which is what `Pathwise` declares for these.

    Gamma(a, rate)      F = P(a, x) = x^a / Gamma(a) int_0^1 c w^(c a - 1) exp(-x w^c) dw by quadrature, c = max(1, 4/a)
    Beta, Dirichlet     g_i / sum g with g_i ~ Gamma(a_i): explicit in the g_i;    Chi2, Student's t likewise
    VonMises            F = int_-pi^x exp(kappa cos t) dt / (2 pi I_0(kappa)), the trapezoidal rule in a Fourier series
    MixtureSameFamily   F = sum_k pi_k F_k(x), for univariate components with a CDF; the value is a draw of a component

d E[x^2] / da = 2 a + 1 for Gamma(a, 1).

Source: M. Figurnov, S. Mohamed, A. Mnih, "Implicit reparameterization gradients", 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from lowvar.gradients.estimator import BaseNoise, zero

__all__ = ["attached", "gamma_cdf", "gamma_quantile", "implicit_noise", "is_implicit", "quantile", "von_mises_cdf"]

_KINDS = (td.Gamma, td.Beta, td.Dirichlet, td.StudentT, td.VonMises, td.MixtureSameFamily)


def is_implicit(d: Distribution) -> bool:
    """Whether `Pathwise` differentiates it implicitly."""
    while isinstance(d, td.Independent):
        d = d.base_dist
    return isinstance(d, _KINDS)


def implicit_noise(d: Distribution) -> dict[str, BaseNoise]:
    """Base noise of the distributions above.

    Raises:
        ValueError: for another distribution.
    """
    shape = d.batch_shape + d.event_shape
    if isinstance(d, td.Beta):
        return {"u": BaseNoise("uniform", shape), "v": BaseNoise("uniform", shape)}
    if isinstance(d, td.StudentT):
        return {"z": BaseNoise("normal", shape), "u": BaseNoise("uniform", shape)}
    if isinstance(d, td.MixtureSameFamily):
        from lowvar.gradients.distributions import noise_of

        if d.event_shape:
            raise ValueError("a mixture of vectors has no implicit derivative here; mix univariate components")
        inner = noise_of(d.component_distribution)
        if len(inner) != 1 or ("u" in inner and inner["u"].kind != "uniform"):
            raise ValueError(f"no sampler of a mixture of {type(d.component_distribution).__name__} here")
        return {
            "u": BaseNoise("uniform", shape, between="constant"),
            "component": BaseNoise(next(iter(inner.values())).kind, shape),
        }
    if isinstance(d, _KINDS):
        return {"u": BaseNoise("uniform", shape)}
    raise ValueError(
        f"{type(d).__name__} cannot be drawn from explicit noise here; allowed: Normal, LogNormal, MultivariateNormal, "
        "Laplace, Exponential, Uniform, Cauchy, Gamma, Beta, Dirichlet, StudentT, VonMises, univariate mixtures, "
        "Bernoulli, Categorical, OneHotCategorical, Poisson, and transforms of them"
    )


@lru_cache(maxsize=8)
def _legendre(n: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1], float64 (Golub & Welsch 1969)."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / torch.sqrt(4 * k**2 - 1)
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (values + 1) / 2, vectors[0] ** 2


def gamma_cdf(a: Tensor, x: Tensor) -> Tensor:
    """P(a, x) of Gamma(a, 1), differentiable in a and x; accurate to 1e-9 for a in [0.05, 200].

    Example:
        >>> a, x = torch.tensor(2.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
        >>> bool(torch.isclose(gamma_cdf(a, x), torch.special.gammainc(a, x), atol=1e-12))
        True
    """
    w, weight = (v.to(x) for v in _legendre(128))
    c = (4 / a.detach()).clamp_min(1)[..., None]
    log_w = torch.log(w)
    inside = (c * a[..., None] - 1) * log_w - x[..., None] * torch.exp(c * log_w)
    log_front = a * torch.log(x) - torch.lgamma(a)
    return (weight * c * torch.exp(inside + log_front[..., None])).sum(-1)


def gamma_quantile(a: Tensor, u: Tensor, steps: int = 60) -> Tensor:
    """x with P(a, x) = u, without gradient: bisection in log x, polished by Newton steps.

    Example:
        >>> u = torch.tensor(0.3, dtype=torch.float64)
        >>> round(float(gamma_quantile(torch.ones_like(u), u) + torch.log1p(-u)), 12)
        0.0
    """
    a, u = a.detach(), u.detach()
    # below: P(a, x) <= x^a / Gamma(a + 1); above: a tail bound far beyond float64
    low = ((torch.log(u) + torch.lgamma(a + 1)) / a).clamp_min(-700.0)
    high = torch.log(a + 40 * torch.sqrt(a) + 80)
    for _ in range(steps):
        middle = (low + high) / 2
        under = torch.special.gammainc(*torch.broadcast_tensors(a, torch.exp(middle))) < u
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return torch.exp((low + high) / 2)


def von_mises_cdf(x: Tensor, concentration: Tensor, terms: int = 64) -> Tensor:
    """F(x) for x in [-pi, pi] around 0: 1/2 + x/(2 pi) + sum_j I_j(kappa)/I_0(kappa) sin(j x) / (pi j).

    The ratios are the Fourier coefficients of the density, by the trapezoidal rule; good for kappa up to 100.

    Example:
        >>> x = torch.tensor([-torch.pi, 0.0, torch.pi], dtype=torch.float64)
        >>> von_mises_cdf(x, torch.tensor(2.0, dtype=torch.float64)).round(decimals=9).tolist()
        [-0.0, 0.5, 1.0]
    """
    t = torch.arange(4 * terms, dtype=x.dtype, device=x.device) * (2 * math.pi / (4 * terms))
    j = torch.arange(1, terms, dtype=x.dtype, device=x.device)
    density = torch.exp(concentration[..., None] * (torch.cos(t) - 1))
    density = density / density.sum(-1, keepdim=True)
    ratio = density @ torch.cos(t[:, None] * j)
    return 0.5 + x / (2 * math.pi) + (ratio * torch.sin(j * x[..., None]) / (math.pi * j)).sum(-1)


def _bisected(cdf: Callable[[Tensor], Tensor], u: Tensor, low: Tensor, high: Tensor, steps: int = 60) -> Tensor:
    for _ in range(steps):
        middle = (low + high) / 2
        under = cdf(middle) < u
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return (low + high) / 2


def _standard_gamma(a: Tensor, u: Tensor) -> Tensor:
    """A Gamma(a, 1) sample with its implicit derivative in a."""
    x = gamma_quantile(a, u)
    log_p = ((a - 1) * torch.log(x) - x - torch.lgamma(a)).detach()
    return x - zero(gamma_cdf(a, x)) * torch.exp(-log_p)


def quantile(d: Distribution, noise: Mapping[str, Tensor]) -> Tensor:
    """The sample, without gradient."""
    return _drawn(d, noise).detach()


def attached(d: Distribution, x: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
    """The sample with its implicit derivative."""
    while isinstance(d, td.Independent):
        d = d.base_dist
    return _drawn(d, noise)


def _drawn(d: Distribution, noise: Mapping[str, Tensor]) -> Tensor:
    if isinstance(d, td.Gamma):
        return _standard_gamma(d.concentration, noise["u"]) / d.rate
    if isinstance(d, td.Beta):
        g = _standard_gamma(d.concentration1, noise["u"])
        return _inside(g / (g + _standard_gamma(d.concentration0, noise["v"])))
    if isinstance(d, td.Dirichlet):
        g = _standard_gamma(d.concentration, noise["u"])
        return _inside(g / g.sum(-1, keepdim=True))
    if isinstance(d, td.StudentT):
        g = _standard_gamma(d.df / 2, noise["u"])
        return d.loc + d.scale * noise["z"] * torch.sqrt(d.df / (2 * g))
    if isinstance(d, td.VonMises):
        kappa, u = d.concentration, noise["u"]
        edge = torch.full_like(u, math.pi)
        y = _bisected(lambda y: von_mises_cdf(y, kappa.detach()), u, -edge, edge)
        log_p = (kappa * (torch.cos(y) - 1) - torch.log(torch.special.i0e(kappa))).detach() - math.log(2 * math.pi)
        turned = d.loc + y - zero(von_mises_cdf(y, kappa)) * torch.exp(-log_p)
        return turned - (2 * math.pi * torch.round(turned / (2 * math.pi))).detach()
    if isinstance(d, td.MixtureSameFamily):
        return _mixed(d, noise)
    raise ValueError(f"{type(d).__name__} has no implicit derivative here")


def _inside(x: Tensor) -> Tensor:
    """In (0, 1) where rounding gave an end, at which log p may be infinite; the derivative stays."""
    ends = torch.finfo(x.dtype)
    return x + (x.detach().clamp(ends.tiny, 1 - ends.eps / 2) - x.detach())


def _mixed(d: td.MixtureSameFamily, noise: Mapping[str, Tensor]) -> Tensor:
    """A component by u, its own sample, and the derivative of the mixture's CDF."""
    from lowvar.gradients.distributions import noise_of, sample

    parts = d.component_distribution
    key = next(iter(noise_of(parts)))
    kinds = parts.batch_shape[-1]
    each = sample(parts, {key: noise["component"][..., None].expand(*noise["component"].shape, kinds)}).detach()
    number = sample(d.mixture_distribution, {"u": noise["u"]})
    x = torch.gather(each, -1, number[..., None])[..., 0]
    cdf = (d.mixture_distribution.probs * parts.cdf(x[..., None])).sum(-1)
    return x - zero(cdf) * torch.exp(-d.log_prob(x).detach())
