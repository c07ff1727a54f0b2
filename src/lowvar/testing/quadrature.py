r"""Quadrature rules, float64: nodes and weights that integrate against a law.

hermite(n)             sum w f(z) = E f(Z), Z ~ N(0, 1), exact for polynomials of degree 2 n - 1
legendre(n)            sum w f(u) = int_0^1 f(u) du, exact for polynomials of degree 2 n - 1
smoothed_legendre(n)   the same integral in x, u = x^2 (3 - 2 x): (1 - u)^a is (1 - x)^2a there, so powers and
                       logarithms at the ends converge at twice the order (Korobov's substitution)
tanh_sinh(n)           the same integral by u = sigmoid(pi sinh t): converges exponentially also where f has
                       singularities at the ends, such as log u (Takahasi & Mori 1974)
korobov(n, d)          sum w f(u) = int f(u) du over (0, 1)^d: the points k (1, a, a^2, ..) / n modulo 1, in each of
                       which u = x^3 (10 - 15 x + 6 x^2) makes the integrand periodic with two derivatives; a is the
                       best of 40 by the error in the worst function whose Fourier coefficients are
                       prod 1 / max(1, |h_j|)^2 (Korobov 1959). In five dimensions it needs an eighth of the nodes of a
                       product of smoothed rules for as many digits
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["hermite", "korobov", "legendre", "smoothed_legendre", "tanh_sinh"]


def hermite(n: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite for the standard normal law.

    Example:
        >>> z, w = hermite(5)
        >>> round(float((w * z**4).sum()), 12)
        3.0
    """
    z, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(z), torch.tensor(w / math.sqrt(2 * math.pi))


def legendre(n: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre on [0, 1].

    Example:
        >>> u, w = legendre(2)
        >>> round(float((w * u**3).sum()), 12)
        0.25
    """
    u, w = np.polynomial.legendre.leggauss(n)
    return torch.tensor((u + 1) / 2), torch.tensor(w / 2)


def smoothed_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre in x on (0, 1) with u = x^2 (3 - 2 x), du = 6 x (1 - x) dx.

    Example:
        >>> u, w = smoothed_legendre(12)
        >>> round(float((w * (1 - u) ** 0.7).sum()), 6)  # 1 / 1.7
        0.588235
    """
    x, w = legendre(n)
    return x * x * (3 - 2 * x), w * 6 * x * (1 - x)


def tanh_sinh(n: int) -> tuple[Tensor, Tensor]:
    """Double exponential rule on (0, 1).

    Example:
        >>> u, w = tanh_sinh(60)
        >>> round(float((w * torch.log(u)).sum()), 10)
        -1.0
    """
    end = 0.7 + 0.6 * math.log(n)  # what is cut off is as small as what the step misses
    t = torch.linspace(-end, end, n, dtype=torch.float64)
    u = torch.sigmoid(math.pi * torch.sinh(t))
    w = torch.sigmoid(-math.pi * torch.sinh(t)) * u * math.pi * torch.cosh(t)
    return u.clamp_max(1 - 2.0**-53), w / w.sum()  # the ends are not values of a uniform number


@lru_cache(maxsize=16)
def korobov(n: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """Rank-1 lattice of n points (a prime is best) with periodised ends: nodes (n, d), weights (n,).

    Example:
        >>> u, w = korobov(8191, 5)
        >>> abs(float((w * torch.exp(u - 0.5).prod(1)).sum()) - (2 * math.sinh(0.5)) ** 5) < 1e-4
        True
    """
    k = torch.arange(n, dtype=torch.int64)

    def points(a: int) -> Tensor:
        power = [1]
        for _ in range(dimensions - 1):
            power.append(power[-1] * a % n)
        return (k[:, None] * torch.tensor(power) % n).to(torch.float64) / n

    def worst(a: int) -> float:
        x = points(a)
        return float((1 + 2 * math.pi**2 * (x * x - x + 1 / 6)).prod(1).mean())

    tried = [max(2, int(n / 2 * ((j + 1) * 0.6180339887498949 % 1))) for j in range(40)]
    x = (points(min(tried, key=worst)) + 0.5 / n) % 1
    return x**3 * (10 - 15 * x + 6 * x * x), (30 * x**2 * (1 - x) ** 2).prod(1) / n
