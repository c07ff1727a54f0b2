"""Heun: EDM's algorithms written in sigma, diffusers' scheduler, levels and their count, churn on a Gaussian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.grid import karras, trailing
from lowvar.process.heun import Heun
from lowvar.process.noise import Independent
from lowvar.process.schedule import VE, CosineVP, Flow, Schedule
from lowvar.sample import generate, trajectory
from lowvar.testing import Moments, affine_law, anisotropic_gaussian, mixture2

TARGET = mixture2()
X = Independent(3).normal(range(5), (2,), dtype=torch.float64)


def edm(schedule: Schedule, grid: Tensor, x: Tensor, settings: tuple[float, float, float, float]) -> Tensor:
    """Karras et al. 2022, Algorithm 2, in y = x / alpha and s = sigma / alpha, no churn in the first step."""
    churn, s_min, s_max, s_noise = settings
    s = torch.exp(-schedule.at(grid).logsnr / 2).tolist()
    y = x / schedule.at(grid[0]).alpha

    def D(y: Tensor, s: float) -> Tensor:
        level = schedule.level(torch.tensor(-2 * math.log(s), dtype=torch.float64))
        return TARGET.posterior(y * level.alpha, level, None).mean

    for i in range(len(s) - 1):
        gamma = min(churn / (len(s) - 1), math.sqrt(2) - 1) if i and s_min <= s[i] <= s_max else 0.0
        z = Independent(8).normal(range(5), (2,), draw=2 * i, dtype=torch.float64)
        hat = s[i] * (1 + gamma)
        y = y + s_noise * math.sqrt(hat**2 - s[i] ** 2) * z
        d = (y - D(y, hat)) / hat
        new = y + (s[i + 1] - hat) * d
        if s[i + 1] > 0:
            new = y + (s[i + 1] - hat) * (d + (new - D(new, s[i + 1])) / s[i + 1]) / 2
        y = new
    return y * schedule.at(grid[-1]).alpha


@pytest.mark.parametrize("schedule", [VE(), CosineVP(), schedule_from_diffusers({})], ids=["ve", "cosine", "table"])
@pytest.mark.parametrize("churn", [(0.0, 0.0, math.inf, 1.0), (2.0, 0.1, 10.0, 1.003), (40.0, 0.0, math.inf, 1.0)])
def test_is_the_papers_algorithm(schedule: Schedule, churn: tuple[float, float, float, float]) -> None:
    solver = Heun(*churn, schedule=schedule)
    for grid in (karras(schedule, 6), karras(schedule, 6)[:-1]):
        x = X * float(schedule.at(grid[0]).sigma)
        *_, (state, _) = trajectory(TARGET.denoiser(schedule, None), solver, grid, x, Independent(8))
        torch.testing.assert_close(state.x, edm(schedule, grid, x, churn), rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' own, under NumPy 2
def test_is_diffusers_heun() -> None:
    from diffusers import HeunDiscreteScheduler

    schedule = schedule_from_diffusers({})
    indices = [999, 800, 700, 450, 300, 199, 120, 40]
    grid = (torch.tensor(indices, dtype=torch.float64) + 1) / 1000
    levels = schedule.at(grid)
    s = torch.exp(-levels.logsnr / 2)
    scheduler = HeunDiscreteScheduler(prediction_type="sample")
    scheduler.sigmas = torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:], s[-1:]])
    scheduler._step_index, scheduler.prev_derivative, scheduler.dt = 0, None, None
    at, y = Heun().evaluations(levels), X / levels.alpha[0]
    for k in range(len(at)):
        mean = TARGET.posterior(y * at.alpha[k], at[k], None).mean
        y = scheduler.step(mean, float(k), y, return_dict=False)[0]
    *_, (state, _) = trajectory(TARGET.denoiser(schedule, None), Heun(), grid, X)
    torch.testing.assert_close(state.x, y * levels.alpha[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [VE(), CosineVP(), Flow(3.0)], ids=lambda s: s.family)
def test_evaluations_are_counted_where_they_are_made(schedule: Schedule) -> None:
    """2 K - 1, in the trajectory, in the progress of `generate`, and at levels the denoiser is asked at; from pure
    noise (flow) too, where the first step keeps Euler's value."""
    asked: list[float] = []

    class Counting(type(TARGET.denoiser(schedule))):  # type: ignore[misc]
        def __call__(self, x: Tensor, level):
            asked.append(float(level.logsnr))
            return super().__call__(x, level)

    denoiser, solver, grid = Counting(TARGET, schedule, None), Heun(), trailing(schedule, 4)
    done: list[int] = []
    samples = generate(denoiser, solver, grid, (2,), 6, batch_size=4, progress=done.append)
    assert bool(torch.isfinite(samples).all())
    assert solver.nfe(4) == 7
    assert done == [4] * 7 + [2] * 7
    levels = schedule.at(grid).logsnr.tolist()
    assert asked[:7] == [levels[0], levels[1], levels[1], levels[2], levels[2], levels[3], levels[3]]


def test_churned_levels_are_the_schedules() -> None:
    """s_hat = (1 + gamma) s, never beyond the noisiest level, with the time a network is conditioned on."""
    schedule = CosineVP()
    solver, levels = Heun(1.2, schedule=schedule), schedule.at(trailing(schedule, 4))
    at = solver.evaluations(levels)
    ratio = torch.exp((at.logsnr[1::2] - at.logsnr[2::2]) / 2)
    torch.testing.assert_close(ratio, torch.full((3,), 1.3, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.at(at.t).logsnr, at.logsnr, rtol=1e-9, atol=1e-9)
    near = schedule.at(torch.tensor([1.0, 0.9999, 0.5], dtype=torch.float64))
    assert float(Heun(40.0, schedule=schedule).evaluations(near).logsnr.min()) == float(near.logsnr[0])


def test_churn_keeps_the_marginal() -> None:
    """On a Gaussian the law converges with churn, to the marginal of the forward process; with too little noise it does
    not."""
    schedule, target = CosineVP(), anisotropic_gaussian((3,))
    grid = schedule.time(torch.linspace(-4, 4, 81, dtype=torch.float64))
    start, end = (target.marginal(schedule.at(t)) for t in (grid[0], grid[-1]))
    errors = {
        s_noise: affine_law(
            target.denoiser(schedule), Heun(5.0, s_noise=s_noise, schedule=schedule), grid, start
        ).distance(Moments.of(end))
        for s_noise in (1.0, 0.7)
    }
    assert errors[1.0] < 0.02 < 0.2 < errors[0.7]


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="not be negative"):
        Heun(-1.0)
    with pytest.raises(ValueError, match="schedule=schedule"):
        Heun(1.0)
