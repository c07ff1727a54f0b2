"""Heun: EDM's algorithms written in sigma, diffusers' scheduler, levels and their count, churn on a Gaussian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.grid import karras, trailing
from lowvar.process.heun import Heun
from lowvar.process.noise import Independent
from lowvar.process.schedule import VE, CosineVP, Flow, Level, Schedule
from lowvar.process.solver import State
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


SCHEDULES = [VE(), CosineVP(), Flow(), Flow(3.0), schedule_from_diffusers({})]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["ve", "cosine", "flow", "flow shift 3", "table"])
def test_churned_levels_are_the_schedules(schedule: Schedule) -> None:
    """s_hat = (1 + gamma) s, never beyond the noisiest level, with the time a network is conditioned on."""
    solver, levels = Heun(1.2, schedule=schedule), schedule.at(trailing(schedule, 4))
    at = solver.evaluations(levels)
    ratio = torch.exp((at.logsnr[1::2] - at.logsnr[2::2]) / 2)
    torch.testing.assert_close(ratio, torch.full((3,), 1.3, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.at(at.t).logsnr, at.logsnr, rtol=1e-9, atol=1e-9)
    near = schedule.at(torch.tensor([1.0, 0.9999, 0.5], dtype=torch.float64))
    assert float(Heun(40.0, schedule=schedule).evaluations(near).logsnr.min()) == float(near.logsnr[0])


GAUSSIAN = anisotropic_gaussian((3,), ratio=50.0, seed=2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["ve", "cosine", "flow", "flow shift 3", "table"])
def test_the_network_sees_the_raised_noise(schedule: Schedule) -> None:
    """Algorithm 2 line by line on an anisotropic Gaussian, the network given the time of s_hat and nothing else: it
    knows its level from its timestep only, in float32 as diffusers' networks do."""
    seen: list[float] = []

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(float(timestep[0]))
        level = schedule.at(schedule.time_of(timestep[0].double()).clamp(0, 1))
        return GAUSSIAN.twin.posterior(x, level).mean

    grid, (churn, s_min, s_max, s_noise) = trailing(schedule, 6)[1:], (3.0, 0.2, 20.0, 1.01)
    solver, start = Heun(churn, s_min, s_max, s_noise, schedule), schedule.at(grid[0])
    x = Independent(3).normal(range(5), (3,), dtype=torch.float64) * float(start.sigma)
    *_, (state, _) = trajectory(NetworkDenoiser(network, schedule, "sample"), solver, grid, x, Independent(8))

    s, y, times = torch.exp(-schedule.at(grid).logsnr / 2).tolist(), x / start.alpha, []
    for i in range(len(s) - 1):
        gamma = min(churn / (len(s) - 1), math.sqrt(2) - 1) if i and s_min <= s[i] <= s_max else 0.0
        z = s_noise * Independent(8).normal(range(5), (3,), draw=2 * i, dtype=torch.float64)
        hat = s[i] + gamma * s[i]
        y_hat = y + math.sqrt(hat**2 - s[i] ** 2) * z
        at, end = (schedule.level(torch.tensor(-2 * math.log(v), dtype=torch.float64)) for v in (hat, s[i + 1] or 1.0))
        times.append(float(schedule.timestep(at.t)))
        d = (y_hat - GAUSSIAN.twin.posterior(y_hat * at.alpha, at).mean) / hat
        y = y_hat + (s[i + 1] - hat) * d
        if s[i + 1] != 0:
            times.append(float(schedule.timestep(end.t)))
            slope = (y - GAUSSIAN.twin.posterior(y * end.alpha, end).mean) / s[i + 1]
            y = y_hat + (s[i + 1] - hat) * (d + slope) / 2
    assert seen == pytest.approx(times, rel=1e-6, abs=1e-5)
    expected = y * schedule.at(grid[-1]).alpha
    torch.testing.assert_close(state.x, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' own, under NumPy 2
def test_churn_and_first_half_are_diffusers_edm_euler() -> None:
    """Its noise and its Euler step are the first half of ours, to float32, in which it works. diffusers' Heun has no
    churn, and its EDM network sees the level before churn: x0_hat is handed to it here."""
    from diffusers import EDMEulerScheduler

    settings = (3.0, 0.1, 40.0, 1.01)
    scheduler, schedule = EDMEulerScheduler(), VE()
    scheduler.set_timesteps(6)
    s = scheduler.sigmas.double()
    levels = schedule.level(-2 * torch.log(s[:-1]))
    levels = Level(*(torch.cat([getattr(levels, f), getattr(schedule.at(0.0), f)[None]]) for f in vars(levels)))
    solver, state, churned = Heun(*settings, schedule), State(80 * X), 0
    plan, at = solver.prepare(levels), solver.evaluations(levels)
    for i in range(6):
        gamma = min(settings[0] / 6, math.sqrt(2) - 1) if settings[1] <= float(s[i]) <= settings[2] else 0.0
        before, z = state.x, None
        if i:  # the second half of the step before, without and with its noise
            z = torch.randn(X.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float32).double()
            half, last = state, TARGET.posterior(state.x, at[2 * i - 1], None)
            before = solver.step(plan, 2 * i - 1, half, last, None)[0].x
            state = solver.step(plan, 2 * i - 1, half, last, z if gamma else None)[0]
        churned += gamma > 0
        posterior = TARGET.posterior(state.x, at[2 * i], None)
        new, _ = solver.step(plan, 2 * i, state, posterior, None)
        scheduler.is_scale_input_called, scheduler._step_index = True, i
        theirs = scheduler.step(
            torch.zeros(X.shape, dtype=torch.float32),
            scheduler.timesteps[i],
            before,
            *settings,
            generator=torch.Generator().manual_seed(i),
            return_dict=False,
            pred_original_sample=posterior.mean.float(),
        )[0]
        torch.testing.assert_close(new.x.float(), theirs, rtol=1e-5, atol=2e-5)
        state = new
    assert churned == 3


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
