"""Coverage and allocation on chains: linear-Gaussian data through the real sampler, whose law is known exactly.

The sampler's own law is that of the exact twin's shadow, an affine map of the noise. Its designs get a twin and a
mixture that are wrong, so that they have something left to estimate. Replicates are vectorised (`test_coverage`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from scipy.stats import t as t_quantiles
from tests.expect.test_coverage import sums_of
from torch import Tensor

from lowvar.expect import ChainSampler, estimates
from lowvar.expect.catalogue import Catalogue
from lowvar.expect.design import allocation
from lowvar.expect.integrand import Integrand
from lowvar.expect.multilevel import ladder
from lowvar.expect.shadow import _Given
from lowvar.expect.sums import effective_freedom
from lowvar.metrics import Statistic
from lowvar.process import CosineVP, GaussianTwin, MixtureTwin, ReverseKernel
from lowvar.process.grid import trailing
from lowvar.testing import anisotropic_gaussian
from lowvar.testing.quadrature import hermite

TARGET, SCHEDULE, SHAPE = anisotropic_gaussian((3,), ratio=9.0), CosineVP(), torch.Size((3,))
KERNELS = {"ODE": ReverseKernel(0.0, "small"), "SDE": ReverseKernel(1.0, "small")}
DIRECTION = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
DESIGNS = ("independent", "antithetic", "twin", "antithetic+twin", "mixture", "antithetic+mixture")
DESIGNS += ("sobol", "few-step", "few-step+antithetic", "multilevel", "multilevel+antithetic")
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": lambda x: x.square().sum(1),
    "sigmoid": lambda x: torch.sigmoid(x @ DIRECTION),
}


def chain(kernel: str, steps: int = 8) -> ChainSampler:
    """The chain on exact denoisers, with a twin and a mixture that are off in mean and spread."""
    twin = GaussianTwin(TARGET.twin.mean + 0.3, TARGET.twin.basis, 1.4 * TARGET.twin.spectrum)
    middle, spread = twin.basis.forward(twin.mean[None])[0], twin.spectrum
    two = MixtureTwin(
        torch.ones(2), torch.stack([middle - 0.5, middle + 0.7]), torch.stack([spread, spread / 2]), twin.basis
    )
    denoiser, grid = TARGET.denoiser(SCHEDULE), trailing(SCHEDULE, steps)
    return ChainSampler(denoiser, KERNELS[kernel], grid, SHAPE, twin=twin, mixture=two, dtype=torch.float64)


def truth(sampler: ChainSampler, statistic: str) -> float:
    """E f exactly: x is N(b, B diag(std^2) B^T), and the sigmoid is of one normal number."""
    law = replace(sampler, twin=TARGET.twin, mixture=None).shadow
    assert law is not None
    if statistic == "norm":
        return float((law.mean**2).sum() + (law.std**2).sum())
    size = float((law.basis.forward(DIRECTION[None])[0] * law.std).norm())
    nodes, weights = hermite(80)
    return float((weights * torch.sigmoid(law.mean @ DIRECTION + size * nodes)).sum() / weights.sum())


def covered(name: str, kernel: str, statistic: str, replicates: int) -> tuple[float, float]:
    """Share of intervals that hold the truth, and the mean's distance from it in its own standard errors."""
    sampler = chain(kernel)
    controls = tuple(c for c in ("twin", "mixture") if c in name.split("+"))
    catalogue = Catalogue(sampler, Integrand(Statistic(statistic, STATISTICS[statistic]), torch.Size(())), controls)
    design = catalogue.design(name, points=8)
    combined = design.combined(sums_of(design, 24 if name == "sobol" else 96, replicates, 3))
    assert combined is not None
    shares = torch.stack([p.share for p in combined.parts])
    own = torch.stack([effective_freedom(p.leave_out, p.freedom) for p in combined.parts])
    freedom = shares.sum(0) ** 2 / (shares**2 / own).sum(0)
    t = torch.tensor(t_quantiles.ppf(0.975, freedom.numpy()))
    off, exact = combined.mean.mean() - truth(sampler, statistic), truth(sampler, statistic)
    inside = (combined.mean - exact).abs() <= t * combined.var.sqrt() + 1e-12
    return float(inside.double().mean()), float(off / (combined.mean.std() / replicates**0.5))


@pytest.mark.slow
@pytest.mark.parametrize("statistic", list(STATISTICS))
@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("name", DESIGNS)
def test_intervals_cover_the_exact_expectation(name: str, kernel: str, statistic: str) -> None:
    """2,000 replicates: the share's standard error is half a percent."""
    share, off = covered(name, kernel, statistic, 2000)
    assert 0.93 <= share <= 0.97
    assert abs(off) < 4


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_intervals_cover_a_few(kernel: str) -> None:
    share, off = covered("multilevel", kernel, "sigmoid", 100)
    assert share >= 0.88
    assert abs(off) < 4


@pytest.mark.parametrize("tol", [0.04, 0.02])
def test_a_multilevel_run_spends_what_the_best_allocation_costs(tol: float) -> None:
    """Coupled Gaussian chains are affine, so the levels' variances are sums over gains, and the optimum is known."""
    sampler = replace(chain("ODE", 16), twin=None, mixture=None)
    given = torch.zeros(1, 4, 3, dtype=torch.float64)
    given[0, :3] = torch.eye(3, dtype=torch.float64)
    levels = ladder(sampler)
    gains = [(x[:-1] - x[-1]) for x in (s(torch.arange(4), _Given(given))[:, 0] for s in levels)]
    variances = [float((gains[0] ** 2).sum()), *(float(((b - a) ** 2).sum()) for a, b in pairwise(gains))]
    costs = [float(s.nfe) for s in levels[:1]] + [float(a.nfe + b.nfe) for a, b in pairwise(levels)]
    *_, last = estimates(sampler, lambda x: x[:, 0], tol=tol, design="multilevel", batch_size=4096)
    units = list(last.state.plain["next"].values())
    assert len(units) == len(levels)
    reached = sum(v / n for v, n in zip(variances, units, strict=True))
    best = allocation(variances, costs, variance=reached)
    spent, least = (sum(n * c for n, c in zip(ns, costs, strict=True)) for ns in (units, best))
    assert last.nfe == spent + 2 * sampler.nfe  # two samples find the statistic's shape
    assert spent <= 1.1 * least
    assert 1.96 * reached**0.5 == pytest.approx(tol, rel=0.05)
