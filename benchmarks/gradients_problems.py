"""Problems of one site whose gradient is known exactly, for `gradients.py` and `gradients_peers.py`.

    minimise  E f(x) + k(theta),    x ~ p_theta

- gaussian: N(1, 0.7^2), theta = (mu, sigma), f = (x - 3)^2, cos 2x, exp(-x/2); closed form;
- bits: 4 Bernoulli logits, f = (sum b - 1.3)^2 + cos(b . w), summed over all 16 values;
- toy: 200 Bernoulli logits, f = sum (b - 0.499)^2 / 200 + cos(b . a + 0.7); with the characteristic function
  E exp(i b . a) = prod (1 - p + p exp(i a));
- logistic: Bayesian logistic regression on the breast cancer data of scikit-learn (569 rows, 30 standardised columns
  and a constant), weights N(0, 1), posterior N(m, diag s^2), theta = (m, log s), f the negative log-likelihood of all
  rows, k the divergence from the prior. Given the posterior each row's linear predictor is normal, so E f is a sum of
  one-dimensional integrals (Gauss-Hermite, 64 nodes). Two places: m = 0, s = 0.3 ("start"), and after 300 steps of Adam
  on the exact objective ("fitted").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal
from torch.func import grad

from lowvar.testing.quadrature import hermite

__all__ = ["Problem", "problems"]


@dataclass(frozen=True)
class Problem:
    """f takes (..., d) to (...), `law` theta to p_theta of d elements, `known` is k; truth is the exact gradient."""

    name: str
    theta: Tensor
    law: Callable[[Tensor], Distribution]
    f: Callable[[Tensor], Tensor]
    known: Callable[[Tensor], Tensor]
    truth: Tensor


def _nothing(theta: Tensor) -> Tensor:
    return 0.0 * theta.sum()


def _problem(
    name: str,
    theta: Tensor,
    law: Callable[[Tensor], Distribution],
    f: Callable[[Tensor], Tensor],
    mean: Callable[[Tensor], Tensor],
    known: Callable[[Tensor], Tensor] = _nothing,
) -> Problem:
    """`mean` is E f as a function of theta, float64."""
    truth = grad(lambda th: mean(th) + known(th))(theta.double())
    return Problem(name, theta.float(), law, f, known, truth)


def _gaussian() -> list[Problem]:
    def law(theta: Tensor) -> Distribution:
        return Normal(theta[:1], theta[1:])

    theta = torch.tensor([1.0, 0.7])
    return [
        _problem(
            "gaussian, (x - 3)^2",
            theta,
            law,
            lambda x: (x[..., 0] - 3) ** 2,
            lambda th: (th[0] - 3) ** 2 + th[1] ** 2,
        ),
        _problem(
            "gaussian, cos 2x",
            theta,
            law,
            lambda x: torch.cos(2 * x[..., 0]),
            lambda th: torch.exp(-2 * th[1] ** 2) * torch.cos(2 * th[0]),
        ),
        _problem(
            "gaussian, exp(-x/2)",
            theta,
            law,
            lambda x: torch.exp(-x[..., 0] / 2),
            lambda th: torch.exp(-th[0] / 2 + th[1] ** 2 / 8),
        ),
    ]


def _bits() -> list[Problem]:
    w = torch.tensor([0.4, -1.1, 0.8, 1.7])

    def f(b: Tensor) -> Tensor:
        return (b.sum(-1) - 1.3) ** 2 + torch.cos((b * w.to(b)).sum(-1))

    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)

    def mean(theta: Tensor) -> Tensor:
        p = torch.sigmoid(theta)
        return ((every * p + (1 - every) * (1 - p)).prod(-1) * f(every)).sum()

    direction = torch.sin(torch.arange(200.0) * 1.7) / 5

    def far(b: Tensor) -> Tensor:
        return (b - 0.499).square().mean(-1) + torch.cos((b * direction.to(b)).sum(-1) + 0.7)

    def far_mean(theta: Tensor) -> Tensor:
        p, a = torch.sigmoid(theta), direction.double()
        square = (p * 0.501**2 + (1 - p) * 0.499**2).mean()
        # log of prod (1 - p + p exp(i a)), in modulus and angle
        real, imaginary = 1 - p + p * torch.cos(a), p * torch.sin(a)
        size = 0.5 * torch.log(real**2 + imaginary**2).sum()
        return square + torch.exp(size) * torch.cos(torch.atan2(imaginary, real).sum() + 0.7)

    def law(theta: Tensor) -> Distribution:
        return Bernoulli(logits=theta)

    return [
        _problem("4 bits", torch.tensor([0.3, -1.0, 0.8, 0.1]), law, f, mean),
        _problem("200 bits", torch.linspace(-1.5, 1.5, 200), law, far, far_mean),
    ]


def _logistic() -> list[Problem]:
    from sklearn.datasets import load_breast_cancer

    columns, labels = load_breast_cancer(return_X_y=True)
    x = torch.tensor(columns)
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1, dtype=x.dtype)], 1)
    sign = torch.tensor(2.0 * labels - 1)
    signed, single = sign[:, None] * x, (sign[:, None] * x).float()  # row i of y_i x_i
    d = x.shape[1]
    z, weight = hermite(64)

    def f(w: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-(w @ single.T.to(w))).sum(-1)

    def law(theta: Tensor) -> Distribution:
        return Normal(theta[:d], theta[d:].exp())

    def known(theta: Tensor) -> Tensor:
        m, log_s = theta[:d], theta[d:]
        return 0.5 * (m.square() + (2 * log_s).exp() - 2 * log_s - 1).sum()

    def mean(theta: Tensor) -> Tensor:
        centre = signed @ theta[:d]
        std = (signed.square() @ (2 * theta[d:]).exp()).sqrt()
        return (torch.nn.functional.softplus(-(centre[:, None] + std[:, None] * z)) * weight).sum()

    start = torch.cat([torch.zeros(d), torch.full((d,), 0.3).log()]).double()
    fitted = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([fitted], lr=0.03)
    for _ in range(300):
        optimiser.zero_grad()
        (mean(fitted) + known(fitted)).backward()
        optimiser.step()
    return [
        _problem("logistic, start", start, law, f, mean, known),
        _problem("logistic, fitted", fitted.detach(), law, f, mean, known),
    ]


@lru_cache
def problems() -> dict[str, Problem]:
    """All, by name."""
    return {p.name: p for p in (*_gaussian(), *_bits(), *_logistic())}
