"""Steps of their own for every sample: what they reduce to, what they cost, that batches do not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvar.process import (
    CosineVP,
    Flow,
    Independent,
    Isotropic,
    Level,
    Posterior,
    ReverseKernel,
    Schedule,
    WithCovariance,
)
from lowvar.process.cost import CostCurve, monotone
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.grid import uniform_logsnr
from lowvar.process.matched import matched
from lowvar.process.probe import squared_deviation
from lowvar.sample import StepControl, adaptive_generate, generate
from lowvar.testing import mixture8

TARGET, SCHEDULE, K = mixture8(), CosineVP(), 12
LOGSNR = torch.linspace(-8, 8, 33, dtype=torch.float64)


@pytest.fixture(scope="module")
def curve() -> CostCurve:
    mmse = [TARGET.mmse(SCHEDULE.level(v), n=256)[0] for v in LOGSNR]
    return CostCurve(LOGSNR, monotone(torch.tensor(mmse, dtype=torch.float64)[:, None]), 8)


@pytest.fixture(scope="module")
def grid(curve: CostCurve) -> Tensor:
    return matched(curve, SCHEDULE, K, t_end=float(SCHEDULE.time(7.0)))


@pytest.fixture(scope="module")
def denoiser(curve: CostCurve) -> WithCovariance:
    def table(x: Tensor, level: Level, posterior: Posterior) -> Isotropic:
        return Isotropic(curve.variance_at(level.logsnr)[..., 0].to(x), (8,))

    return WithCovariance(TARGET.denoiser(SCHEDULE, None), table)


def test_without_adaptation_it_is_generate(curve: CostCurve, grid: Tensor, denoiser: WithCovariance) -> None:
    """rho = 1: every sample visits every knot with the noise that `generate` takes there."""
    for kernel, used in ((ReverseKernel(), denoiser), (ReverseKernel(1.0, "small"), TARGET.denoiser(SCHEDULE, None))):
        control = StepControl.of(curve, SCHEDULE, grid, rho=1.0)
        made = adaptive_generate(used, kernel, control, (8,), 9, Independent(3), dtype=torch.float64)
        plain = generate(used, kernel, grid, (8,), 9, Independent(3), dtype=torch.float64)
        torch.testing.assert_close(made.samples, plain, rtol=0, atol=1e-8)
        assert made.steps.tolist() == [K] * 9
        assert made.nfe.tolist() == [2 * K - 1] * 9


def test_batches_do_not_matter(curve: CostCurve, grid: Tensor, denoiser: WithCovariance) -> None:
    control = StepControl.of(curve, SCHEDULE, grid, rho=1.8)
    finished: list[int] = []
    made = [
        adaptive_generate(
            denoiser, ReverseKernel(), control, (8,), 23, Independent(5), batch_size=size, dtype=torch.float64,
            progress=finished.append,
        )
        for size in (1, 5, 64)
    ]  # fmt: skip
    assert sum(finished) == 3 * 23
    for other in made[1:]:
        torch.testing.assert_close(other.samples, made[0].samples, rtol=0, atol=1e-9)
        assert torch.equal(other.nfe, made[0].nfe)
    part = adaptive_generate(denoiser, ReverseKernel(), control, (8,), 4, Independent(5), first=7, dtype=torch.float64)
    torch.testing.assert_close(part.samples, made[0].samples[7:11], rtol=0, atol=1e-9)
    steps = made[0].steps
    assert len(steps.unique()) > 2  # samples do take different numbers of steps
    assert int(steps.min()) - 1 + 1 >= (K - 1) / 1.8
    assert int(steps.max()) <= 1.8 * (K - 1) + 2


class _Counting:
    """A denoiser that counts the states it is asked about."""

    def __init__(self) -> None:
        self.inner, self.schedule, self.nfe, self.rows = TARGET.denoiser(SCHEDULE, None), SCHEDULE, 1, 0

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        self.rows += len(x)
        return self.inner(x, level)


def test_nfe_is_what_is_evaluated(curve: CostCurve, grid: Tensor) -> None:
    counting = _Counting()
    control = StepControl.of(curve, SCHEDULE, grid)
    kernel = ReverseKernel(1.0, "small")
    made = adaptive_generate(counting, kernel, control, (8,), 17, batch_size=6)  # type: ignore[arg-type]
    assert counting.rows == int(made.nfe.sum())


def test_rough_states_take_shorter_steps(curve: CostCurve, grid: Tensor) -> None:
    control = StepControl.of(curve, SCHEDULE, grid, rho=2.0)
    u = torch.tensor([3.0, 3.0, 3.0, 3.5, 10.8], dtype=torch.float64)
    reference = torch.exp(torch.log(control.reference)[3:5].mean())
    R = torch.stack(
        [control.reference[3], control.reference[3] * 2.25, torch.tensor(1e9), reference, torch.tensor(1e-9)]
    )
    after = control.advance(u, R)
    torch.testing.assert_close(after[:4], torch.tensor([4.0, 3 + 1 / 1.5, 3.5, 4.5], dtype=torch.float64))
    assert float(after[4]) == control.last == K - 1
    levels = control.level(torch.tensor([0.0, 4.0, 4.5, 11.0]))
    torch.testing.assert_close(levels.t[[0, 1, 3]], grid[[0, 4, 11]], rtol=0, atol=0)
    middle = SCHEDULE.logsnr(grid[4:6]).mean()
    torch.testing.assert_close(levels.logsnr[2], middle, rtol=1e-9, atol=0)


def test_start_without_signal() -> None:
    schedule = schedule_from_diffusers({"rescale_betas_zero_snr": True})
    grid = uniform_logsnr(schedule, 6)
    control = StepControl(schedule, grid, torch.ones(6))
    level = control.level(torch.tensor([0.0, 0.25, 5.0]))
    assert float(level.t[0]) == 1
    assert bool((level.t.diff() < 0).all())
    assert bool(torch.isfinite(level.alpha).all())


@pytest.mark.parametrize("schedule", [Flow(), schedule_from_diffusers({"rescale_betas_zero_snr": True})])
@pytest.mark.parametrize("small", [True, False])
def test_chains_from_pure_noise(schedule: Schedule, small: bool, curve: CostCurve) -> None:
    """At alpha = 0 no derivative tells C: the first step is the grid's, and the next ones are adapted."""
    plain = TARGET.denoiser(schedule, None)

    def table(x: Tensor, level: Level, posterior: Posterior) -> Isotropic:
        return Isotropic(curve.variance_at(level.logsnr)[..., 0].to(x), (8,))

    denoiser = plain if small else WithCovariance(plain, table)
    x, top = Independent(2).normal(range(3), (8,)), schedule.at(1.0)
    assert bool(squared_deviation(denoiser, x, top, x)[1].isnan().all())
    grid = uniform_logsnr(schedule, 8)
    control = StepControl.of(curve, schedule, grid)
    assert float(control.advance(torch.zeros(1, dtype=torch.float64), torch.tensor([torch.nan]))) == 1
    kernel = ReverseKernel(1.0, "small" if small else "posterior")
    made = adaptive_generate(denoiser, kernel, control, (8,), 64, Independent(3))
    assert bool(made.samples.isfinite().all())
    assert len(made.steps.unique()) > 1


def test_refuses(grid: Tensor) -> None:
    with pytest.raises(ValueError, match="at least two steps"):
        StepControl(SCHEDULE, torch.tensor([1.0, 0.0]), torch.ones(1))
    with pytest.raises(ValueError, match="one positive number"):
        StepControl(SCHEDULE, grid, torch.zeros(K))
    with pytest.raises(ValueError, match=r"rho is 0\.5"):
        StepControl(SCHEDULE, grid, torch.ones(K), 0.5)
    control = StepControl(SCHEDULE, grid, torch.ones(K))
    with pytest.raises(ValueError, match="variance is 'large'"):
        adaptive_generate(TARGET.denoiser(SCHEDULE, None), ReverseKernel(1.0, "large"), control, (8,), 2)
