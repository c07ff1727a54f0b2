"""Targets of known laws: the mixture's posterior, and the weight of the clean score on one Gaussian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowvar.process import CosineVP, Flow, NetworkDenoiser
from lowvar.process.basis import PixelBasis
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent
from lowvar.testing.mixture import mixture2
from lowvar.train import Objective, Simple
from lowvar.train.known_posterior import KnownPosterior, ScoreMixture, clean_score_weight

LEVELS = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("schedule", [CosineVP(), Flow()], ids=["vp", "flow"])
@pytest.mark.parametrize("variance", [0.2, 5.0])
def test_one_gaussian_has_no_variance_left(schedule: CosineVP | Flow, variance: float) -> None:
    """c*: T is the posterior mean whatever x_0 was; swapped with 1 - c* it is far from it."""
    mean = 0.7
    level = schedule.at(LEVELS)
    z, eps = (Independent(k).normal(range(4), (3,), dtype=torch.float64) for k in range(2))
    x0 = mean + math.sqrt(variance) * z
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    x = alpha * x0 + sigma * eps
    exact = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)

    def score(x: Tensor) -> Tensor:
        return (mean - x) / variance

    assert torch.allclose(ScoreMixture(score, variance).clean(x0, eps, level), exact, atol=1e-12)
    swapped = ScoreMixture(score, 1 / variance)
    assert not torch.allclose(swapped.clean(x0, eps, level), exact, atol=1e-2)
    assert torch.allclose(
        clean_score_weight(level, variance), (alpha**2 * variance / (alpha**2 * variance + sigma**2))[:, 0]
    )


@pytest.mark.parametrize("variance", [0.0, 0.3, None])
def test_every_weight_is_unbiased_on_a_mixture(variance: float | None) -> None:
    """E[(T - D*) f(x_t)] = 0 within 4 standard errors, for f = 1 and x_t; mixture2 in 2 dimensions."""
    target, n = mixture2(), 20000
    level = CosineVP().at(torch.full((n,), 0.55, dtype=torch.float64))
    x0 = target.sample(range(n))
    eps = Independent(9).normal(range(n), (2,), dtype=torch.float64)
    x = level.alpha[:, None] * x0 + level.sigma[:, None] * eps

    def score(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(target.log_prob(x, CosineVP().at(0.0)).sum(), x)
        return grad

    exact = KnownPosterior(target.denoiser(CosineVP(), None)).clean(x0, eps, level)
    error = ScoreMixture(score, variance).clean(x0, eps, level) - exact
    for product in (error, error * x):
        z = product.mean(0) / (product.std(0) / math.sqrt(n))
        assert float(z.abs().max()) < 4


def test_optimal_loss_by_quadrature() -> None:
    """Oracle 3: the plain loss at D* is E tr Cov(x_0 | x_t) / d; with the known posterior it is 0."""
    m, c, w = (torch.tensor(v, dtype=torch.float64) for v in ([[-1.0], [0.8]], [[0.04], [0.3]], [0.3, 0.7]))
    twin = MixtureTwin(w, m, c, PixelBasis((1,)))
    schedule = CosineVP()
    level = schedule.at(0.5)
    alpha, sigma = float(level.alpha), float(level.sigma)
    grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
    step = float(grid[1] - grid[0])

    denoiser = NetworkDenoiser(lambda x, t: twin.posterior(x, level).mean, schedule, "sample")
    # the joint law of (x_0, eps) on a grid, component by component
    total = torch.zeros((), dtype=torch.float64)
    own = torch.zeros((), dtype=torch.float64)
    known = KnownPosterior(denoiser)
    z = torch.linspace(-8, 8, 161, dtype=torch.float64)
    pdf = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    for k in range(2):
        x0 = (m[k] + c[k].sqrt() * z)[:, None].expand(-1, len(z)).reshape(-1, 1)
        eps = z[None].expand(len(z), -1).reshape(-1, 1)
        chance = w[k] * (pdf[:, None] * pdf[None]).flatten()
        at = schedule.at(torch.full((len(eps),), 0.5, dtype=torch.float64))
        total += (chance * Objective(Simple()).losses(denoiser, x0, eps, at).loss).sum()
        own += (chance * Objective(Simple()).losses(denoiser, x0, eps, at, known).loss).sum()
    # E Cov(x_0 | x_t) = E x_0^2 - E D*^2
    density = sum(
        w[k]
        * torch.exp(-0.5 * (grid - alpha * m[k]) ** 2 / (alpha**2 * c[k] + sigma**2))
        / (2 * math.pi * (alpha**2 * c[k] + sigma**2)).sqrt()
        for k in range(2)
    )
    second = float((w * (m**2 + c)[:, 0]).sum())
    mmse = second - float((density * twin.posterior(grid[:, None], level).mean[:, 0] ** 2).sum()) * step
    assert float(total) == pytest.approx(mmse, abs=1e-9)
    assert float(own) < 1e-20


@pytest.mark.parametrize("variance", [0.0, -1.0])
def test_variances_out_of_range(variance: float) -> None:
    with pytest.raises(ValueError, match="variance"):
        clean_score_weight(CosineVP().at(0.5), variance)
    with pytest.raises(ValueError, match="variance"):
        ScoreMixture(lambda x: x, min(variance, -0.1))
