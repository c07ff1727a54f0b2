"""On Gaussian data every kernel and the twin's solver are exact in any number of steps.

The law of the output is computed, not sampled: `affine_law` pushes unit vectors through the real code, `kernel_chain`
is the recursion written from the formulas. Where a grid ends at t = 0 exactness needs the last step's noise kappa^2 C
(`last="decoder"`): `last="mean"` returns x0_hat, whose covariance is less by C.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvar.process.covariance import Diagonal, Isotropic
from lowvar.process.denoiser import WithCovariance
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.grid import trailing, uniform
from lowvar.process.kernel import ReverseKernel
from lowvar.process.multistep import MultistepSolver
from lowvar.process.noise import Independent
from lowvar.process.schedule import VE, CosineVP, Flow, LinearVP, Schedule
from lowvar.sample import trajectory
from lowvar.testing import Moments, affine_law, anisotropic_gaussian, kernel_chain

SCHEDULES: dict[str, Schedule] = {
    "cosine": CosineVP(),
    "linear": LinearVP(),
    "table": schedule_from_diffusers({}),
    "cosine table": schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"}),
    "zero terminal snr": schedule_from_diffusers({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}),
    "ve": VE(),
    "flow": Flow(),
    "flow shift 3": Flow(3.0),
}
TARGET = anisotropic_gaussian((2, 1, 2), ratio=1000.0)
SAME = 1e-10


def grids(schedule: Schedule, steps: int) -> list[Tensor]:
    stops = torch.linspace(1.0, 0.05, steps + 1, dtype=torch.float64)  # ends at t > 0: no policy of a last step
    return [trailing(schedule, steps), uniform(schedule, steps), stops]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [2, 4, 16])
@pytest.mark.parametrize("form", ["basis", "dense"])
def test_kernel_is_exact(schedule: Schedule, eta: float, steps: int, form) -> None:
    for grid in grids(schedule, steps):
        start, end = TARGET.marginal(schedule.at(grid[0])), Moments.of(TARGET.marginal(schedule.at(grid[-1])))
        law = affine_law(TARGET.denoiser(schedule, form), ReverseKernel(eta, last="decoder"), grid, start)
        assert law.distance(end) < SAME
        assert kernel_chain(TARGET, schedule, grid, eta)[-1].distance(end) < SAME


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_kernel_with_any_covariance_is_the_recursion(schedule: Schedule, eta: float) -> None:
    """A wrong covariance gives a wrong law, and exactly the one that the closed-form recursion tells."""
    d = TARGET.mean.numel()
    models = {
        "diagonal": (lambda x, level, p: Diagonal(p.covariance.diagonal()), lambda C: torch.diag(torch.diagonal(C))),
        "isotropic": (
            lambda x, level, p: Isotropic(p.covariance.trace() / d, TARGET.event_shape),
            lambda C: torch.trace(C) / d * torch.eye(d, dtype=torch.float64),
        ),
        "small": (lambda x, level, p: Isotropic(x.new_zeros(1), TARGET.event_shape), torch.zeros_like),
    }
    for attached, dense in models.values():
        for last in ("mean", "decoder"):
            denoiser = WithCovariance(TARGET.denoiser(schedule), attached)
            grid = trailing(schedule, 4)
            start = TARGET.marginal(schedule.at(grid[0]))
            law = affine_law(denoiser, ReverseKernel(eta, last=last), grid, start)
            closed = kernel_chain(TARGET, schedule, grid, eta, covariance=dense, last=last)[-1]
            assert law.distance(closed) < SAME
            assert law.distance(Moments(TARGET.mean, TARGET.covariance)) > 1e-3


def test_last_mean_lacks_the_last_posterior_covariance() -> None:
    schedule = CosineVP()
    grid = trailing(schedule, 4)
    start = TARGET.marginal(schedule.at(1.0))
    law = affine_law(TARGET.denoiser(schedule), ReverseKernel(0.5, last="mean"), grid, start)
    last = TARGET.denoiser(schedule, "dense")(TARGET.mean[None], schedule.at(grid[-2])).covariance
    assert last is not None
    assert law.distance(Moments(TARGET.mean, TARGET.covariance - last.dense()[0])) < SAME


def test_wrong_start_stays_wrong() -> None:
    """The chain is exact from the exact marginal only; from N(0, I) with alpha_1 > 0 it is not."""
    schedule = LinearVP(0.1, 5.0)
    grid = torch.tensor([1.0, 0.5, 0.05], dtype=torch.float64)
    exact = TARGET.marginal(schedule.at(1.0))
    off = type(exact)(torch.zeros_like(exact.mean), Isotropic(torch.ones(1, dtype=torch.float64), TARGET.event_shape))
    law = affine_law(TARGET.denoiser(schedule), ReverseKernel(1.0), grid, off)
    assert law.distance(Moments.of(TARGET.marginal(schedule.at(0.05)))) > 1e-2


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampled_chain_has_the_law(eta: float) -> None:
    """100,000 samples through `trajectory`: mean and covariance within 5 standard errors."""
    schedule, n = CosineVP(), 100_000
    grid = torch.linspace(1.0, 0.05, 5, dtype=torch.float64)
    start = TARGET.marginal(schedule.at(1.0))
    noise = Independent(11)
    x = start.sample(noise.normal(range(n), TARGET.event_shape, dtype=torch.float64))
    for state, _ in trajectory(TARGET.denoiser(schedule), ReverseKernel(eta), grid, x, noise):
        x = state.x
    truth = Moments.of(TARGET.marginal(schedule.at(0.05)))
    variance = torch.diagonal(truth.covariance)
    assert bool(((x.mean(0) - truth.mean).flatten().abs() < 5 * (variance / n).sqrt()).all())
    tolerance = 5 * torch.sqrt((variance[:, None] * variance + truth.covariance**2) / n)
    assert bool(((torch.cov(x.flatten(1).mT) - truth.covariance).abs() < tolerance).all())


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_twin_is_exact_in_one_step(schedule: Schedule, tau: float) -> None:
    """Mean and covariance, to any s > 0, from alpha_1 = 0 too."""
    for q, c in ((1, 0), (2, 0), (2, 2), (3, 4)):
        for t, s in ((1.0, 0.5), (1.0, 0.02), (0.6, 0.01)):
            for decay in (0.0, 1.0):
                solver = MultistepSolver(TARGET.twin, q, c, tau, decay)
                grid = torch.tensor([t, s], dtype=torch.float64)
                law = affine_law(TARGET.denoiser(schedule), solver, grid, TARGET.marginal(schedule.at(t)))
                assert law.distance(Moments.of(TARGET.marginal(schedule.at(s)))) < SAME


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_twin_is_exact_over_a_grid(schedule: Schedule, tau: float) -> None:
    grid = torch.linspace(1.0, 0.05, 6, dtype=torch.float64)
    solver = MultistepSolver(TARGET.twin, 2, 3, tau)
    law = affine_law(TARGET.denoiser(schedule), solver, grid, TARGET.marginal(schedule.at(1.0)))
    assert law.distance(Moments.of(TARGET.marginal(schedule.at(0.05)))) < SAME


def test_twin_ode_is_the_flow_map() -> None:
    for schedule in SCHEDULES.values():
        t, s = schedule.at(0.9), schedule.at(0.1)
        x = Independent(0).normal(range(3), TARGET.event_shape, dtype=torch.float64)
        grid = torch.tensor([0.9, 0.1], dtype=torch.float64)
        ((state, _),) = trajectory(TARGET.denoiser(schedule), MultistepSolver(TARGET.twin, 1), grid, x)
        torch.testing.assert_close(state.x, TARGET.twin.flow(x, t, s), rtol=1e-10, atol=1e-10)


def test_affine_law_refuses_what_is_not_affine() -> None:
    from lowvar.testing import mixture2

    schedule, target = CosineVP(), mixture2()
    start = target.twin.marginal(schedule.at(1.0))
    grid = torch.tensor([0.9, 0.3], dtype=torch.float64)
    with pytest.raises(ValueError, match="not affine"):
        affine_law(target.denoiser(schedule, "isotropic"), ReverseKernel(), grid, start)
