r"""Quadrature rules, float64: nodes and weights that integrate against a law.

hermite(n)      sum w f(z) = E f(Z), Z ~ N(0, 1), exact for polynomials of degree 2 n - 1
legendre(n)     sum w f(u) = int_0^1 f(u) du, exact for polynomials of degree 2 n - 1
tanh_sinh(n)    the same integral by u = sigmoid(pi sinh t): converges exponentially also where f has singularities
at the ends, such as log u (Takahasi & Mori 1974)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["hermite", "legendre", "tanh_sinh"]


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
