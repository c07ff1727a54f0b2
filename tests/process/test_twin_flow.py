"""The twin's flow: exact on its own law, of order 1 or 2 on any other, and far ahead at few evaluations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from lowvar.calibrate import path_moments
from lowvar.metrics import energy_distance
from lowvar.process.basis import MatrixBasis
from lowvar.process.flow import FlowPlan, TwinFlow
from lowvar.process.grid import trailing
from lowvar.process.kernel import ReverseKernel
from lowvar.process.mixture import MixtureTwin
from lowvar.process.multistep import MultistepSolver
from lowvar.process.noise import Independent
from lowvar.process.schedule import VE, CosineVP, Flow, Level, LinearVP, Schedule
from lowvar.process.twin import GaussianTwin
from lowvar.sample import generate, trajectory
from lowvar.testing import mixture2, mixture8, rotation

BASIS = MatrixBasis(rotation(3, 1), (3,))
GAUSSIAN = GaussianTwin(
    torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64), BASIS, torch.tensor([4.0, 0.25, 1e-3], dtype=torch.float64)
)
SCHEDULES = [CosineVP(), VE(), Flow()]


def run(schedule: Schedule, solver: TwinFlow, denoiser: object, times: list[float], z: Tensor) -> Tensor:
    grid = torch.tensor(times, dtype=torch.float64)
    x = solver.initial(z, schedule.at(1.0), schedule.at(grid[0]))
    for state, _ in trajectory(denoiser, solver, grid, x):  # type: ignore[arg-type]
        x = state.x
    return x


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("times", [[1.0, 0.0], [0.6, 0.0], [0.8, 0.5, 0.01, 0.0]])
def test_exact_on_gaussian_data_in_any_number_of_steps(schedule: Schedule, times: list[float]) -> None:
    z = torch.cat([torch.eye(3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)])
    x = run(schedule, TwinFlow(GAUSSIAN), GAUSSIAN.denoiser(schedule), times, z)
    B = BASIS.matrix()
    root = B @ torch.diag(GAUSSIAN.spectrum.sqrt()) @ B.T
    torch.testing.assert_close(x, GAUSSIAN.mean + z @ root, rtol=0, atol=1e-10)


def test_closed_form_of_the_end_is_the_limit_of_small_noise() -> None:
    """A constant remainder, frozen with its trend, integrated to the end in closed form and by a Runge-Kutta method."""
    schedule, c, m, r = CosineVP(), 0.3, 0.7, 0.4
    twin = GaussianTwin(torch.tensor([m]), MatrixBasis(torch.eye(1), (1,)), torch.tensor([c]))
    t = schedule.at(0.4)
    x = torch.tensor([[1.1]], dtype=torch.float64)
    posterior = twin.posterior(x, t)
    posterior = type(posterior)(posterior.mean + r)
    solver, levels = TwinFlow(twin), schedule.at(torch.tensor([0.4, 0.0], dtype=torch.float64))
    state, _ = solver.step(solver.prepare(levels), 0, solver.start(x), posterior, None)
    l_t = float(t.logsnr) / 2
    v_t = 1 + c * math.exp(2 * l_t)

    def rate(l: float, y: np.ndarray) -> np.ndarray:
        u = math.exp(l)
        v = 1 + c * u * u
        centred = y - u * m
        return u * (m + c * u / v * centred + r * math.sqrt(v_t / v))

    y = solve_ivp(rate, (l_t, 14.0), (x / t.sigma).numpy().ravel(), method="LSODA", rtol=1e-11, atol=1e-11).y[0, -1]
    assert abs(float(state.x) - y * math.exp(-14.0)) < 2e-6


@pytest.mark.parametrize("schedule", [CosineVP(), Flow()], ids=lambda s: type(s).__name__)
def test_with_the_mixture_itself_only_substeps_are_left(schedule: Schedule) -> None:
    """r = 0: one step equals many, and the error falls with the square of the substep."""
    weight, mean = torch.tensor([0.4, 0.6]), torch.tensor([[-1.0, 0.0, 0.5], [1.5, 0.3, 0.0]], dtype=torch.float64)
    twin = MixtureTwin(weight, mean, torch.full((2, 3), 0.04, dtype=torch.float64), BASIS)

    class Exact:
        nfe = 1

        def __init__(self) -> None:
            self.schedule = schedule

        def __call__(self, x: Tensor, level: object) -> object:
            return twin.posterior(x, level)  # type: ignore[arg-type]

    z = Independent(2).normal(range(16), (3,), dtype=torch.float64)
    fine = run(schedule, TwinFlow(twin, spacing=0.05), Exact(), [0.5, 0.0], z)
    errors = [
        float((run(schedule, TwinFlow(twin, spacing=s), Exact(), [0.5, 0.0], z) - fine).norm()) for s in (0.4, 0.2)
    ]
    assert errors[1] < errors[0] / 2.5
    assert errors[0] < 0.05 * float(fine.norm())
    many = run(schedule, TwinFlow(twin, spacing=0.05), Exact(), [0.7, 0.3, 0.1, 0.0], z)
    torch.testing.assert_close(many, fine, rtol=0, atol=2e-3)


@pytest.mark.parametrize("measured", [False, True])
def test_order_on_a_mixture(measured: bool) -> None:
    """1, and 2 with path moments, against the flow without them at two fine grids, extrapolated."""
    target, schedule = mixture2(), CosineVP()
    denoiser = target.denoiser(schedule, None)
    paths = path_moments(denoiser, target.twin, 64, 40, dtype=torch.float64)
    z = Independent(3).normal(range(8), (2,), dtype=torch.float64)
    plain = TwinFlow(target.twin)

    def at(solver: TwinFlow, steps: int) -> Tensor:
        logsnr = torch.linspace(float(paths.logsnr[0]), float(paths.logsnr[-1]), steps + 1, dtype=torch.float64)
        return run(schedule, solver, denoiser, [*schedule.time(logsnr).tolist(), 0.0], z)

    truth = 2 * at(plain, 320) - at(plain, 160)
    solver, steps = TwinFlow(target.twin, paths) if measured else plain, (10, 20, 40, 80)
    errors = [float((at(solver, n) - truth).norm()) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - solver.order) < 0.25, errors
    assert solver.order == 1 + measured


def test_three_evaluations_are_ahead_of_five() -> None:
    """8-d mixture, one Gaussian for a control variate, against first- and second-order methods on the same score."""
    target, schedule, n = mixture8(), LinearVP(), 2048
    denoiser, truth = target.denoiser(schedule, None), target.sample(range(50_000, 50_000 + n)).float()
    paths = path_moments(denoiser, target.twin)
    ours = generate(denoiser, TwinFlow(target.twin, paths), paths.grid(schedule, 3), (8,), n, batch_size=n)
    distance = energy_distance(ours, truth)
    assert distance < 0.002  # n samples of the target itself have 0 +- .001
    for solver in (ReverseKernel(0.0, "small"), MultistepSolver(None, 2, 2)):
        theirs = generate(denoiser, solver, trailing(schedule, 5), (8,), n, batch_size=n)
        assert energy_distance(theirs, truth) > 0.02


def test_the_remainder_before_takes_most_of_the_error_of_a_step() -> None:
    """8-d mixture: mean square distance to the flow at 40 levels, with the remainder before and without it."""
    target, schedule, n = mixture8(), LinearVP(), 256
    denoiser = target.denoiser(schedule, None)
    paths = path_moments(denoiser, target.twin, dtype=torch.float64)

    class Alone(TwinFlow):
        def prepare(self, levels: Level) -> FlowPlan:
            return FlowPlan([self._piece(levels[k], levels[k + 1]) for k in range(len(levels) - 1)])

    def samples(solver: TwinFlow, steps: int) -> Tensor:
        grid = paths.grid(schedule, steps)
        return generate(denoiser, solver, grid, (8,), n, Independent(5), batch_size=n, dtype=torch.float64)

    fine = samples(TwinFlow(target.twin, paths), 40)
    for steps, gain in ((5, 0.5), (20, 0.1)):
        errors = [
            float((samples(kind(target.twin, paths), steps) - fine).square().mean()) for kind in (TwinFlow, Alone)
        ]
        assert errors[0] < gain * errors[1]


def test_a_plan_is_run_from_its_first_step() -> None:
    target, schedule = mixture2(), CosineVP()
    denoiser = target.denoiser(schedule, None)
    solver = TwinFlow(target.twin, path_moments(denoiser, target.twin, 8, 8, dtype=torch.float64))
    levels = schedule.at(torch.tensor([0.6, 0.3, 0.0], dtype=torch.float64))
    plan, x = solver.prepare(levels), torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="run a plan from its first step"):
        solver.step(plan, 1, solver.start(x), denoiser(x, levels[1]), None)


def test_spacing_is_checked() -> None:
    with pytest.raises(ValueError, match="spacing is 0"):
        TwinFlow(GAUSSIAN, spacing=0.0)
