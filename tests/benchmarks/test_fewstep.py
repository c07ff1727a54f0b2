"""The few-step benchmark's own mathematics: DPM-Solver-v3, the exact networks, intervals and crossings."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from fewstep_page import markdown  # type: ignore[import-not-found]
from fewstep_report import crossing, estimate  # type: ignore[import-not-found]
from fewstep_targets import TARGETS, Mixture, replicates_at  # type: ignore[import-not-found]
from fewstep_v3 import ModelStatistics, Settings, measure, sample  # type: ignore[import-not-found]

from lowvar.metrics.intervals import jackknife
from lowvar.process import Independent, LinearVP, MatrixBasis
from lowvar.process.schedule import VE, Level
from lowvar.process.twin import GaussianTwin
from lowvar.testing import mixture2, mixture8
from lowvar.testing.gaussian import rotation

SCHEDULE = LinearVP()


def epsilon_of(posterior):
    def epsilon(x, level: Level):
        return (x - level.alpha * posterior(x.double(), level)) / level.sigma

    return epsilon


def test_v3_is_exact_for_a_gaussian_along_its_axes() -> None:
    """f is then affine along the ODE entry by entry, the statistics say so, and three steps of order 1 are exact."""
    twin = GaussianTwin(
        torch.tensor([0.4, -0.2]), MatrixBasis(torch.eye(2).double(), (2,)), torch.tensor([0.5, 0.02]).double()
    )
    epsilon = epsilon_of(lambda x, level: twin.posterior(x, level).mean)
    data = twin.sample(Independent(1).normal(range(512), (2,), dtype=torch.float64))
    statistics = measure(epsilon, SCHEDULE, data, knots=192)
    x = Independent(2).normal(range(64), (2,), dtype=torch.float64)
    found = sample(epsilon, SCHEDULE, statistics, x, 3, how=Settings(1, False))
    start, end = SCHEDULE.at(1.0), SCHEDULE.at(SCHEDULE.t_min)
    std = [(level.alpha**2 * twin.spectrum + level.sigma**2).sqrt() for level in (start, end)]
    exact = end.alpha * twin.mean + std[1] / std[0] * (x - start.alpha * twin.mean)
    assert float((found - exact).abs().max()) < 0.01  # knots are 0.05 apart; plain DPM-Solver++ is off by more than 0.1
    plain = ModelStatistics(
        statistics.knots, torch.ones_like(statistics.l), torch.zeros_like(statistics.s), torch.zeros_like(statistics.b)
    )
    assert float((sample(epsilon, SCHEDULE, plain, x, 3, how=Settings(1, False)) - exact).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("how", "order"),
    [
        (Settings(1, False, lower_order_final=False), 1),
        (Settings(2, False, lower_order_final=False), 2),
        (Settings(3, False, lower_order_final=False), 3),
        (Settings(2, True, lower_order_final=False), 2),
        (Settings(3, True, True, True, lower_order_final=False), 2),  # divided differences of least order: 2 at most
    ],
)
def test_v3_order(how: Settings, order: int) -> None:
    """Measured on a rotated mixture with smooth tables l = 1.2, s = 0.3, b = 0.1, whatever the best ones are.

    The first two steps have fewer values, hence a little less than 3; the corrector adds up to one half.
    """
    law = mixture8()
    epsilon = epsilon_of(lambda x, level: law.posterior(x, level, None).mean)
    knots = torch.linspace(float(SCHEDULE.logsnr(1.0)) / 2, float(SCHEDULE.logsnr(SCHEDULE.t_min)) / 2, 97).double()
    one = torch.ones(97, 8, dtype=torch.float64)
    statistics = ModelStatistics(knots, 1.2 * one, 0.3 * one, 0.1 * one)
    x = Independent(1).normal(range(32), (8,), dtype=torch.float64)
    best = sample(epsilon, SCHEDULE, statistics, x, 384, how=Settings(3, True, lower_order_final=False))
    errors = [float((sample(epsilon, SCHEDULE, statistics, x, k, how=how) - best).norm(dim=1).mean()) for k in (48, 96)]
    assert order - 0.5 < math.log2(errors[0] / errors[1]) < order + 0.6, errors


def test_v3_statistics_by_hand() -> None:
    """l = E diag(sigma d eps / dx) for a rotated Gaussian, where the Jacobian does not depend on x."""
    V = rotation(3, 4)
    twin = GaussianTwin(torch.zeros(3), MatrixBasis(V, (3,)), torch.tensor([1.0, 0.3, 0.05]).double())
    epsilon = epsilon_of(lambda x, level: twin.posterior(x, level).mean)
    data = twin.sample(Independent(1).normal(range(4096), (3,), dtype=torch.float64))
    found = measure(epsilon, SCHEDULE, data, knots=4)
    level = SCHEDULE.level(2 * found.knots[2])
    jacobian = level.sigma**2 * (V / (level.alpha**2 * twin.spectrum + level.sigma**2)) @ V.mT
    assert torch.allclose(found.l[2], jacobian.diagonal(), atol=0.05)


@pytest.mark.parametrize("name", ["mixture2", "mixture64"])
def test_exact_networks(name: str) -> None:
    """As an epsilon network under DDPM's schedule and as EDM's F, a mixture gives its own posterior mean."""
    target = TARGETS[name]
    assert isinstance(target, Mixture)
    x = Independent(5).normal(range(4), target.shape)
    for denoiser in (target.denoiser(0), target.edm()):
        level = denoiser.schedule.at(0.4)
        exact = target.target.posterior(x.double(), level, None).mean
        assert torch.allclose(denoiser(x, level).mean.double(), exact, atol=2e-4)
    assert isinstance(target.edm().schedule, VE)


def test_estimate_is_the_paired_jackknife() -> None:
    """Of a difference of two means in one stratum it is the metrics' own paired interval; strata add up."""
    a = Independent(1).normal(range(320), (), dtype=torch.float64)
    b = a + 0.1 * Independent(2).normal(range(320), (), dtype=torch.float64)
    pair = {"a": jackknife(a), "b": jackknife(b)}
    e, known = estimate(lambda v: v["a"] - v["b"], [pair]), pair["a"].minus(pair["b"]).interval()
    assert e.value == pytest.approx(known.value)
    assert e.high == pytest.approx(known.high)
    two = estimate(lambda v: v["a"], [{"a": pair["a"]}, {"a": pair["b"]}])
    assert two.value == pytest.approx((float(a.mean()) + float(b.mean())) / 2)
    assert two.half == pytest.approx(
        (pair["a"].interval().high - float(a.mean())) / 2**0.5, rel=0.1
    )  # half of the root of the sum of two equal variances
    floor = estimate(lambda v: v["a"] - v["floor"], [pair, {"floor": jackknife(b)}])
    assert floor.half > 5 * e.half  # the floor is not paired


def test_crossing() -> None:
    assert crossing([3, 5, 8], [1.0, 0.5, 0.1], 2.0) == 3
    assert crossing([3, 5, 8], [1.0, 0.5, 0.1], 0.5) == pytest.approx(5)
    assert crossing([2, 8], [1.0, 0.0], 0.5) == pytest.approx(4)
    assert crossing([3, 5, 8], [1.0, 0.5, 0.1], 0.05) == math.inf


def test_bias_is_brought_to_another_n() -> None:
    """The plug-in variance has the bias -var / n exactly; the jackknife knows it."""
    from lowvar.metrics.intervals import Replicates

    law = mixture2()
    x = law.sample(range(640))[:, 0]
    parts = x.split(20)
    without = torch.stack([torch.cat(parts[:j] + parts[j + 1 :]).var(correction=0) for j in range(32)])
    r = Replicates(float(x.var(correction=0)), without, torch.full((32,), 20))
    moved = replicates_at(r, 10**9)
    assert moved.value - r.value == pytest.approx(float(x.var()) - r.value, rel=0.5)
    assert replicates_at(r, 640).value == r.value


def test_the_page_is_made_from_the_results_file() -> None:
    """So targets whose cells are no longer at hand stay on it."""
    root = Path(__file__).resolve().parents[2]
    results = json.loads((root / "benchmarks" / "results" / "fewstep.json").read_text())
    assert (root / "docs" / "results" / "fewstep.md").read_text() == markdown(results)
