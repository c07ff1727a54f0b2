"""Step grids: values, agreement with diffusers' timesteps, and what the variance-matched grid promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowvar.process import grid as grids
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.schedule import VE, CosineVP, Flow, LinearVP, Schedule
from lowvar.testing import MixtureTarget, mixture2

SCHEDULES: dict[str, Schedule] = {
    "cosine": CosineVP(),
    "linear": LinearVP(),
    "table": schedule_from_diffusers({}),
    "zero terminal snr": schedule_from_diffusers({"rescale_betas_zero_snr": True}),
    "ve": VE(),
    "flow shift 3": Flow(3.0),
}
TABLE = SCHEDULES["table"]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("name", grids.GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_grids_decrease_to_clean_data(schedule: Schedule, name: str, steps: int) -> None:
    grid = grids.make_grid(name, schedule, steps)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float64
    assert float(grid[-1]) == 0
    assert bool((grid.diff() < 0).all())
    assert bool(torch.isfinite(schedule.logsnr(grid[1:-1])).all())
    if name != "leading":
        assert float(grid[0]) == 1


@pytest.mark.parametrize("name", ["uniform", "trailing", "quadratic", "uniform-logsnr", "karras"])
def test_start_below_one(name: str) -> None:
    assert float(grids.GRIDS[name](CosineVP(), 5, 0.7)[0]) == pytest.approx(0.7, abs=1e-15)


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize(
    ("name", "spacing"), [("uniform", "linspace"), ("trailing", "trailing"), ("leading", "leading")]
)
def test_timesteps_are_the_peers(name: str, spacing: str, steps: int) -> None:
    """diffusers rounds to whole timesteps; ours are the same before rounding."""
    from diffusers import DDIMScheduler

    peer = DDIMScheduler(timestep_spacing=spacing, steps_offset=0)  # pyright: ignore[reportArgumentType]
    peer.set_timesteps(steps)
    ours = grids.to_timesteps(TABLE, grids.GRIDS[name](TABLE, steps))
    torch.testing.assert_close(ours, peer.timesteps.double(), rtol=0, atol=0.5 + 1e-9)


def test_timesteps_round_trip() -> None:
    for schedule in SCHEDULES.values():
        grid = grids.trailing(schedule, 7)
        again = grids.from_timesteps(schedule, grids.to_timesteps(schedule, grid))
        torch.testing.assert_close(again, grid, rtol=0, atol=1e-9)


def test_karras_is_edms() -> None:
    """Karras et al. 2022, Eq. 5 with sigma from 80 to 0.002 and rho = 7."""
    schedule, K = VE(80.0), 18
    i = torch.arange(K, dtype=torch.float64)
    sigma = (80 ** (1 / 7) + i / (K - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(schedule.at(grids.karras(schedule, K)[:-1]).sigma, sigma, rtol=1e-9, atol=0)


def test_uniform_logsnr_is_uniform() -> None:
    schedule = LinearVP()
    gaps = schedule.logsnr(grids.uniform_logsnr(schedule, 9)[:-1]).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-6, atol=0)


def test_custom_and_errors() -> None:
    assert grids.custom(Flow(), [0.9, 0.5]).tolist() == [0.9, 0.5, 0.0]
    for times in ([0.5, 0.9], [1.2, 0.5], [], [0.0]):
        with pytest.raises(ValueError, match="decrease"):
            grids.custom(Flow(), times)
    with pytest.raises(ValueError, match="steps is 0"):
        grids.trailing(Flow(), 0)
    with pytest.raises(ValueError, match="t_start is 2"):
        grids.uniform(Flow(), 3, t_start=2.0)
    with pytest.raises(ValueError, match="trailing"):
        grids.make_grid("nope", Flow(), 3)
    with pytest.raises(ValueError, match="three points"):
        grids.variance_matched(Flow(), 3, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5]))


# ----------------------------------------------------------------------------------------------------- variance-matched

LOGSNR = torch.linspace(-10, 12, 221, dtype=torch.float64)


def one_dimensional() -> MixtureTarget:
    return MixtureTarget(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1, 1), 0.01))


def moments_1d(target: MixtureTarget) -> tuple[Tensor, Tensor]:
    """E C and E C^2 of a one-dimensional target at the logsnr values, by quadrature over x_t."""
    means, squares = [], []
    for value in LOGSNR:
        level = CosineVP().level(value)
        x = torch.linspace(-8, 8, 2001, dtype=torch.float64)[:, None]
        density = torch.exp(target.log_prob(x, level))
        covariance = target.posterior(x, level, "isotropic").covariance
        assert covariance is not None
        C, dx = covariance.trace(), 16 / 2000
        means.append((density * C).sum() * dx)
        squares.append((density * C**2).sum() * dx)
    return torch.stack(means), torch.stack(squares)


def cumulative(rate: Tensor) -> Tensor:
    inner = torch.cumsum((rate[1:] + rate[:-1]) / 2 * LOGSNR.diff(), 0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), inner])


def interpolate(x: Tensor, ys: Tensor) -> Tensor:
    i = torch.searchsorted(LOGSNR, x.contiguous()).clamp(1, len(LOGSNR) - 1)
    return torch.lerp(ys[i - 1], ys[i], ((x - LOGSNR[i - 1]) / (LOGSNR[i] - LOGSNR[i - 1])).clamp(0, 1))


def test_variance_matched_takes_equal_shares() -> None:
    """Two components in one dimension: R = E C^2 - (E C)^2 by quadrature; the grid, which sees the mmse curve only,
    must cut the integral of sqrt(R) d snr into equal parts."""
    mmse, square = moments_1d(one_dimensional())
    mass = cumulative(torch.exp(LOGSNR) * (square - mmse**2).clamp_min(0).sqrt())
    schedule, K = CosineVP(), 8
    grid = grids.variance_matched(schedule, K, LOGSNR, mmse, t_end=float(schedule.time(10.0)))
    knots = interpolate(schedule.logsnr(grid[1:-1]), mass)
    total = interpolate(torch.tensor([10.0], dtype=torch.float64), mass)
    shares = torch.cat([knots, total]).diff(prepend=torch.zeros(1, dtype=torch.float64)) / total
    torch.testing.assert_close(shares, torch.full((K,), 1 / K, dtype=torch.float64), rtol=0, atol=0.01)


def test_mmse_slope_is_the_squared_covariance() -> None:
    """d mmse / d snr = -E C^2 (Guo, Shamai, Verdu 2005), which the grid rests on."""
    mmse, square = moments_1d(one_dimensional())
    slope = torch.gradient(mmse, spacing=(LOGSNR,))[0] / torch.exp(LOGSNR)
    inner = (LOGSNR > -6) & (LOGSNR < 8)
    torch.testing.assert_close(-slope[inner], square[inner], rtol=2e-2, atol=1e-4)


def path_kl(schedule: Schedule, knots: Tensor, mmse: Tensor, d: int) -> float:
    """Excess nats of the isotropic kernel, one variance a level: (d/2) (sum log(1 + dsnr mmse) - int mmse d snr)."""
    logsnr = schedule.logsnr(knots)
    dsnr = torch.exp(logsnr).diff()
    cost = d / 2 * torch.log1p(dsnr * interpolate(logsnr[:-1], mmse)).sum()
    ends = interpolate(logsnr[[0, -1]], cumulative(torch.exp(LOGSNR) * mmse))
    return float(cost - d / 2 * (ends[1] - ends[0]))


def test_variance_matched_has_the_smallest_path_kl() -> None:
    """A two-dimensional mixture, 10 steps between the same two levels."""
    schedule, target, K = CosineVP(), mixture2(), 10
    mmse = torch.tensor([target.mmse(schedule.level(v), n=2048)[0] for v in LOGSNR], dtype=torch.float64)
    first, last = float(schedule.time(-6.0)), float(schedule.time(7.0))
    matched = grids.variance_matched(schedule, K, LOGSNR, mmse, t_start=first, t_end=last)
    end = torch.tensor([last], dtype=torch.float64)
    root = torch.linspace(math.exp(3 / 7), math.exp(-3.5 / 7), K + 1, dtype=torch.float64)
    costs = {
        "matched": path_kl(schedule, torch.cat([matched[:-1], end]), mmse, 2),
        "uniform": path_kl(schedule, torch.linspace(first, last, K + 1, dtype=torch.float64), mmse, 2),
        "logsnr": path_kl(schedule, schedule.time(torch.linspace(-6, 7, K + 1, dtype=torch.float64)), mmse, 2),
        "karras": path_kl(schedule, schedule.time(-14 * torch.log(root)), mmse, 2),
    }
    assert costs["matched"] > 0
    assert costs["matched"] < 0.7 * min(v for k, v in costs.items() if k != "matched"), costs
