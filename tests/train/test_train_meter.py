"""The loss meter: exact expectations of the control variates, coverage of both targets, less variance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lowvar.calibrate import fit_twin
from lowvar.data import load
from lowvar.process import CosineVP, Flow, Independent
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.schedule import Schedule
from lowvar.train import MinSNR, NetworkConfig, Objective, Simple, UniformTimes, ValidationSet, build_network
from lowvar.train.linear_loss import LinearLoss, bin_nodes
from lowvar.train.meter import Measured, allocation, make_design, measure

SCHEDULE = CosineVP()


class TensorImages:
    """A split held in a tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def images(self, indices: Tensor) -> Tensor:
        return self.x[indices]


def second_moment_points(d: int) -> Tensor:
    """2 d points with mean 0 and covariance I exactly: any quadratic has its normal expectation on them."""
    return torch.cat([torch.eye(d), -torch.eye(d)]).double() * math.sqrt(d)


# ---------------------------------------------------------------------------------------------------- the linear loss


@pytest.mark.parametrize("basis", ["pca", "dct"])
@pytest.mark.parametrize(("schedule", "weighting"), [(SCHEDULE, Simple()), (Flow(), MinSNR(3.0))])
def test_linear_loss_is_known_exactly_on_the_set(basis: str, schedule: Schedule, weighting: Simple) -> None:
    images = load("digits").calibration.images(torch.arange(23)).double()
    linear = LinearLoss(fit_twin([images], basis), "epsilon", weighting)  # pyright: ignore[reportArgumentType]
    eps = second_moment_points(64).reshape(-1, 1, 8, 8)
    for t in (0.05, 0.5, 0.9):
        level = schedule.at(torch.full((len(images) * len(eps),), t, dtype=torch.float64))
        x0 = images.repeat_interleave(len(eps), 0)
        noise = eps.repeat(len(images), 1, 1, 1)
        parts = linear.features(x0, noise, level)[:, :3].sum(1)
        one = schedule.at(t)
        assert float(parts.mean()) == pytest.approx(float(linear.mean(one)), rel=1e-10)
        a, s = float(one.alpha), float(one.sigma)  # and the parts are the error of the twin's denoiser
        x = a * x0 + s * noise
        error = ((linear.twin.posterior(x, one).mean - x0) ** 2).flatten(1).mean(1)
        weight = weighting.log_weight(one.logsnr, "epsilon").exp()
        torch.testing.assert_close(parts, weight * error, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("steps", [50, 96])
def test_expectation_given_the_image(steps: int) -> None:
    images = load("digits").calibration.images(torch.arange(5)).double()
    linear, times = LinearLoss.of([images], "v_prediction"), UniformTimes(steps)
    expected = linear.given_image(images, SCHEDULE, times, 8)
    fine = (torch.arange(8 * steps, dtype=torch.float64) + 0.5) / (8 * steps)  # cuts every timestep and every bin
    eps = second_moment_points(64).reshape(-1, 1, 8, 8)
    for i in (0, 3):
        rows = []
        for u in fine[:: 1 if steps == 50 else 7]:
            level = SCHEDULE.at(times.at(u).t.expand(len(eps)))
            rows.append(linear.features(images[i : i + 1].expand(len(eps), -1, -1, -1), eps, level).mean(0))
        if steps == 50:
            by_bin = torch.stack(rows).reshape(8, steps, 4).mean(1)
            torch.testing.assert_close(expected[i], by_bin, rtol=1e-9, atol=1e-12)
    assert expected.shape == (5, 8, 4)


def test_continuous_times_by_quadrature() -> None:
    u, weight = bin_nodes(UniformTimes(None, 1e-3), 4)
    found = (weight * torch.exp(2 * u)).sum(1)
    edge = torch.arange(5, dtype=torch.float64) / 4
    torch.testing.assert_close(found, 4 * torch.diff(torch.exp(2 * edge) / 2), rtol=1e-12, atol=0)


def test_spread_is_the_standard_deviation() -> None:
    images = load("digits").calibration.images(torch.arange(200)).double()
    linear = LinearLoss.of([images], "epsilon")
    spread = linear.spread(images, SCHEDULE, UniformTimes(None), 4, nodes=1)
    rows = torch.arange(20000)
    eps = Independent(3).normal(rows, (1, 8, 8), dtype=torch.float64)
    for b in (0, 2):
        level = SCHEDULE.at(torch.full((len(rows),), (b + 0.5) / 4, dtype=torch.float64))
        sample = linear.features(images[rows % 200], eps, level)[:, :3].sum(1)
        assert float(spread[b]) == pytest.approx(float(sample.std()), rel=0.03)


# ------------------------------------------------------------------------------------------------------------- design


def test_design_covers() -> None:
    density = allocation(torch.tensor([4.0, 1, 1, 2, 1, 1, 1, 1]))
    design = make_design(40, density, Independent(1))
    assert float(density.mean()) == pytest.approx(1.0)
    counts = torch.bincount(design.bin, minlength=8)
    assert int((counts - 160 / 8 * density).abs().max()) <= 4  # two replicates, whose strata a bin's edges cut
    assert float((1 / design.q).sum()) == pytest.approx(160, rel=0.03)
    assert torch.equal((design.u * 8).long(), design.bin)
    flat = make_design(40, torch.ones(8), Independent(1))
    assert torch.bincount(flat.bin).tolist() == [20] * 8
    for half in flat.u.reshape(2, 80):  # a replicate has one time in each of its 80 strata
        assert torch.equal((half * 80).long().sort().values, torch.arange(80))


def test_allocation_refuses_and_survives() -> None:
    with pytest.raises(ValueError, match="floor is 0"):
        allocation(torch.ones(3), 0)
    assert allocation(torch.tensor([math.nan, 1.0])).tolist() == [1, 1]
    assert allocation(torch.zeros(2)).tolist() == [1, 1]


# ------------------------------------------------------------------------- an analytic denoiser: coverage and variance

_NODE, _WEIGHT = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(48))
_WEIGHT = _WEIGHT / _WEIGHT.sum()
_T = 60
_LEVEL = SCHEDULE.at(torch.arange(1, _T + 1, dtype=torch.float64) / _T)


def loss(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Squared error of the posterior mean for data +-1: not linear, not optimal for other data."""
    return (torch.tanh(alpha * (alpha * x + sigma * eps) / sigma**2) - x) ** 2


def exact(x: Tensor) -> Tensor:
    """L_i of numbers x (n,), by quadrature over the noise and the sum over timesteps."""
    at = loss(x[:, None, None], _NODE, _LEVEL.alpha[:, None], _LEVEL.sigma[:, None])
    return (at @ _WEIGHT).mean(1)


def numbers(seed: int, n: int) -> Tensor:
    """Data: +-1 and a bit."""
    z = Independent(seed).normal(range(n), (2,), dtype=torch.float64)
    return torch.sign(z[:, 0]) + 0.4 * z[:, 1]


def metered(x: Tensor, seed: int, density: Tensor, broken: bool = False) -> tuple[Measured, Tensor]:
    n, times = len(x), UniformTimes(_T)
    design = make_design(n, density, Independent(seed))
    level = SCHEDULE.at(times.at(design.u).t)
    eps = Independent(seed).normal(range(4 * n), (1,), dtype=torch.float64)
    x0 = x[design.image][:, None]
    linear = LinearLoss.of([x[:, None]], "sample")
    expected = linear.given_image(x[:, None], SCHEDULE, times, 8)
    if broken:  # forgets that the noise part has a mean
        expected[..., 2] = 0
    values = loss(x0[:, 0], eps[:, 0], level.alpha, level.sigma)
    return measure(design, values, linear.features(x0, eps, level), expected), values


@pytest.mark.slow
def test_coverage_of_both_targets() -> None:
    """1,200 replicates of fresh numbers, times and noise: 95% within 3 standard errors (1.9%); se^2 is the variance."""
    R, n = 1200, 80
    everywhere = torch.cat([s + 0.4 * _NODE for s in (-1.0, 1.0)])
    population = float((exact(everywhere) * torch.cat([_WEIGHT, _WEIGHT]) / 2).sum())
    density = allocation(torch.linspace(3, 1, 8))
    inside = torch.zeros(R, 2)
    z = torch.zeros(R, dtype=torch.float64)
    for r in range(R):
        x = numbers(10_000 + r, n)
        total = metered(x, r, density)[0].total
        target = float(exact(x).mean())
        inside[r, 0] = float(total.interval[0] < target < total.interval[1])
        inside[r, 1] = float(total.population[0] < population < total.population[1])
        z[r] = (total.value - target) / total.se
    assert abs(float(inside[:, 0].mean()) - 0.95) < 0.019
    assert abs(float(inside[:, 1].mean()) - 0.95) < 0.019
    assert abs(float(z.mean())) < 3 / R**0.5
    assert 0.9 < float(z.std()) < 1.1


def test_less_variance_without_bias() -> None:
    """Mean of 60 meters within 3 standard errors; variance below a third of plain evaluation at the same cost."""
    x = numbers(1, 120)
    target, density = float(exact(x).mean()), torch.ones(8, dtype=torch.float64)
    found = [metered(x, r, density)[0].total for r in range(60)]
    value = torch.tensor([f.value for f in found], dtype=torch.float64)
    assert abs(float(value.mean()) - target) < 3 * float(value.std()) / 60**0.5
    rows = torch.arange(120 * 400)
    u = Independent(5).uniform(rows, (), dtype=torch.float64)
    level = SCHEDULE.at(UniformTimes(_T).at(u).t)
    plain = loss(x[rows % 120], Independent(6).normal(rows, (), dtype=torch.float64), level.alpha, level.sigma)
    within = float(plain.reshape(400, 120).var(0).mean()) / (4 * 120)
    assert float(value.var()) < within / 3
    assert sum(f.se**2 for f in found) / 60 < within / 3


def test_a_forgotten_expectation_is_found() -> None:
    x = numbers(1, 120)
    found = metered(x, 0, torch.ones(8), broken=True)[0].total
    assert abs(found.value - float(exact(x).mean())) > 10 * found.se


def test_bins_average_to_the_total() -> None:
    found = metered(numbers(2, 90), 0, allocation(torch.linspace(1, 2, 8)))[0]
    assert float(found.bins[:, 0].mean()) == pytest.approx(found.total.value, rel=1e-12)
    assert int(found.bins[:, 2].sum()) == 360


def test_measure_refuses() -> None:
    design = make_design(4, torch.ones(8), Independent(0))
    with pytest.raises(ValueError, match="4 values an image"):
        measure(design, torch.zeros(15), torch.zeros(16, 0), torch.zeros(4, 8, 0))


# ---------------------------------------------------------------------------------------------------------- validation


def test_validation_is_stratified_fixed_and_split_free() -> None:
    network = build_network((1, 8, 8), NetworkConfig(width=8)).eval()
    denoiser = NetworkDenoiser(network, SCHEDULE)
    data = TensorImages(load("digits").calibration.images(torch.arange(24)))
    objective = Objective(Simple())
    validation = ValidationSet(data, SCHEDULE, UniformTimes(), batch_size=32)
    values = validation.values(denoiser, objective)
    other = ValidationSet(data, SCHEDULE, UniformTimes(), batch_size=7)
    halves = other.values(denoiser, objective, 0, 2) + other.values(denoiser, objective, 1, 2)
    torch.testing.assert_close(values, halves, atol=1e-4, rtol=1e-4)
    summary = validation.summary(values, has_variance=False)
    assert sum(b.n for b in summary.bins) == 96
    assert summary.bins[0].logsnr_low == pytest.approx(float(SCHEDULE.logsnr(1 / 8)))
    assert all(a.logsnr_low == b.logsnr_high for a, b in zip(summary.bins, summary.bins[1:], strict=False))
    assert sum(b.loss for b in summary.bins) / 8 == pytest.approx(summary.loss)
    assert summary.population_low <= summary.low < summary.loss < summary.high <= summary.population_high
    assert summary.variance is None


def test_validation_of_a_constant_prediction() -> None:
    """A prediction of 0 has loss |eps|^2 / d of mean 1, whatever the images."""
    data = TensorImages(load("digits").calibration.images(torch.arange(300)))
    validation = ValidationSet(data, SCHEDULE, UniformTimes())
    denoiser = NetworkDenoiser(lambda x, t: torch.zeros_like(x), SCHEDULE)
    summary = validation.summary(validation.values(denoiser, Objective(Simple())), has_variance=False)
    assert summary.low < 1 < summary.high
    plain = (
        1.97 * (2 / (64 * 1200)) ** 0.5
    )  # half-width of a plain mean: no control, and the times suit trained networks
    assert (summary.high - summary.low) / 2 < 1.4 * plain


def test_validation_needs_two_images() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        ValidationSet(TensorImages(torch.zeros(1, 1, 4, 4)), SCHEDULE, UniformTimes())
