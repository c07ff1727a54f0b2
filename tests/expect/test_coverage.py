"""Coverage of the 95% interval over 2,000 replicates, each design, on a map whose expectations are known exactly.

Replicates are vectorised: replicate r is number r of a statistic of 2,000 numbers, with units of its own.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import t as t_quantiles
from torch import Tensor

from lowvar.expect import estimate
from lowvar.expect.catalogue import Catalogue
from lowvar.expect.design import Design
from lowvar.expect.integrand import Integrand
from lowvar.expect.run import quantile
from lowvar.expect.sums import Sums, effective_freedom, fit
from lowvar.metrics import Statistic
from lowvar.process import Independent
from lowvar.testing.expectations import expectation, smooth_map

STATISTICS = {
    "coordinate": lambda x: x[:, 0],
    "norm": lambda x: x.square().sum(1),
    "sigmoid": lambda x: torch.sigmoid(2 * x[:, 0] - x[:, 1]),
}
ONE = [
    "independent",
    "antithetic",
    "twin",
    "features",
    "antithetic+twin+features",
    "mixture",
    "antithetic+mixture",
    "sobol",
    "sobol+twin",
    "few-step",
    "few-step+antithetic",
    "multilevel",
    "multilevel+antithetic",
]
REPLICATES = 2000


def apart(values: tuple[Tensor, Tensor | None], n: int, size: int) -> Sums:
    """Units of R replicates in a row as n units of R numbers."""
    f, h = values
    R = len(f) // (n * size)
    x = f.reshape(R, n * size).T
    c = None if h is None or h.shape[-1] == 0 else h.reshape(R, n * size, -1).transpose(0, 1)
    return Sums.of(x, c, torch.arange(n), size)


def sums_of(design: Design, n: int, replicates: int, seed: int) -> dict[str, Sums]:
    found = {}
    for stream in design.streams:
        units = 32 if "alone" in stream.key and not stream.nfe else n
        numbers = torch.arange(units * replicates)
        found[stream.key] = apart(stream.values(Independent(seed), numbers, 1 << 20), units, stream.size)
    return found


def covered(name: str, statistic: str, n: int, replicates: int = REPLICATES) -> tuple[float, float]:
    """Share of intervals that hold the truth, and the mean's distance from it in its own standard errors."""
    f = STATISTICS[statistic]
    integrand = Integrand(Statistic(statistic, f), torch.Size(()))
    catalogue = Catalogue(smooth_map(), integrand, ("twin", "mixture", "features"))
    if not set(name.split("+")) & {"twin", "mixture", "features"}:
        catalogue = Catalogue(smooth_map(), integrand, ())
    design = catalogue.design(name, points=16)
    combined = design.combined(sums_of(design, n, replicates, 1))
    assert combined is not None
    truth, se = expectation(f), combined.var.sqrt()
    shares = torch.stack([p.share for p in combined.parts])
    freedom = torch.stack([effective_freedom(p.leave_out, p.freedom) for p in combined.parts])
    freedom = shares.sum(0) ** 2 / (shares**2 / freedom).sum(0).clamp_min(1e-300)
    t = torch.tensor(t_quantiles.ppf(0.975, freedom.clamp_min(1).numpy()))
    inside = (combined.mean - truth).abs() <= t * se + 1e-12  # some designs are exact on some statistics
    off = float((combined.mean.mean() - truth) / (combined.mean.std() / replicates**0.5).clamp_min(1e-12))
    return float(inside.double().mean()), off


@pytest.mark.slow
@pytest.mark.parametrize("statistic", list(STATISTICS))
@pytest.mark.parametrize("name", ONE)
def test_intervals_cover_and_means_are_unbiased(name: str, statistic: str) -> None:
    """256 units: fewer leave the skewness of squares in a t interval. The share's standard error is half a percent."""
    n = 24 if "sobol" in name else 256
    share, off = covered(name, statistic, n)
    if "features" in name or "sobol+" in name:
        assert share > 0.9  # declared
    else:
        assert 0.93 <= share <= 0.97 or share == 1  # 1: exact
    assert abs(off) < 4


@pytest.mark.parametrize("name", ["independent", "antithetic+mixture", "multilevel"])
def test_intervals_cover_a_few(name: str) -> None:
    share, off = covered(name, "norm", 64, 300)
    assert 0.90 <= share <= 0.99
    assert abs(off) < 4


def test_degrees_of_freedom_that_ignore_the_tails_cover_too_little() -> None:
    """The bug that the jackknife's degrees prevent, put back: n - 1, whatever the units' law (a cube of a normal)."""
    n, replicates = 48, 3000
    f = Independent(3).normal(range(n * replicates), (1,), dtype=torch.float64)[:, 0] ** 2
    found = fit(Sums.of((f**1.5).reshape(replicates, n).T, None, torch.arange(n)))
    own = effective_freedom(found.leave_out, found.freedom)
    truth = 2 * (2 / math.pi) ** 0.5  # E |z|^3
    inside = [
        float(
            ((found.mean - truth).abs() <= torch.tensor(t_quantiles.ppf(0.975, k)) * found.var.sqrt()).double().mean()
        )
        for k in (own.numpy(), found.freedom)
    ]
    assert float(own.median()) < found.freedom / 2
    assert inside[0] > 0.91
    assert inside[1] < inside[0] - 0.015


def test_a_beta_that_has_seen_its_own_units_covers_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug that cross-fitting prevents, put back: coefficients from all folds, the residual's own among them."""
    import lowvar.expect.sums as module

    right = module._coefficients

    def leaking(sums: Sums) -> Tensor:
        whole = dict(sums.state().items())
        for key in ("n", "f", "h", "hh", "fh"):
            v = whole[key]
            whole[key] = torch.cat([torch.zeros_like(v[:1]), v.sum(0, keepdim=True), v[1:] * 0])
        return right(Sums.restored({**whole, "m": sums.m, "cc": sums.cc}))[:1].expand(len(sums.n), -1, -1)

    def narrow(n: int) -> float:
        z = Independent(5).normal(range(n * 400), (10,), dtype=torch.float64)
        f = (z[:, 0] ** 2).reshape(400, n).T
        sums = Sums.of(f, z[:, 1:].reshape(400, n, 9).transpose(0, 1), torch.arange(n))
        found = module.fit(sums)
        return float(((found.mean - 1).abs() <= quantile(0.95, n - 1) * found.var.sqrt()).double().mean())

    honest = narrow(32)
    monkeypatch.setattr(module, "_coefficients", leaking)
    assert narrow(32) < honest - 0.03


@pytest.mark.slow
@pytest.mark.parametrize("statistic", ["coordinate", "norm", "sigmoid"])
def test_the_planner_stops_where_its_interval_still_covers(statistic: str) -> None:
    """Whole runs to a tolerance, 2,000 seeds: standard error of the share half a percent."""
    f, hits = STATISTICS[statistic], 0
    truth = expectation(f)
    for seed in range(2000):
        found = estimate(smooth_map(), f, tol={"norm": 0.2}.get(statistic, 0.03), noise=Independent(1000 + seed))
        hits += bool(found.low <= truth <= found.high)
    assert 0.93 <= hits / 2000 <= 0.98
