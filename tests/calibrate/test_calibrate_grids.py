"""Grids from a calibration, and the same grids in the hands of diffusers' own schedulers and pipelines."""

from __future__ import annotations

import itertools
import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lowvar.calibrate import Calibration, calibrate, calibrated_grid, cost_curve, fewest_steps_for
from lowvar.calibrate.grids import FAMILIES, STRUCTURES, check_grid, is_calibrated
from lowvar.errors import UserError
from lowvar.process import Independent, NetworkDenoiser, ReverseKernel
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.grid import trailing, whole_timesteps
from lowvar.process.schedule import CosineVP
from lowvar.sample import generate, vlb
from lowvar.testing import random_mixture

# diffusers': it copies a tensor by numpy's old protocol
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULE = schedule_from_diffusers({})  # diffusers' own linear betas
SHAPE = (2, 2, 2)


_MIXTURE = random_mixture(8, 5, seed=3)
_TARGET = type(_MIXTURE)(_MIXTURE.weights, _MIXTURE.means.reshape(-1, *SHAPE), _MIXTURE.covariances)
EXACT = _TARGET.denoiser(SCHEDULE, None)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    data = _TARGET.sample(range(400), Independent(1))
    return calibrate(EXACT, lambda: [data], twin_batches=lambda: [data], logsnr=None, replicates=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_name_gives_a_grid(calibration: Calibration, family: str, structure: str) -> None:
    for levels in (None, 65):
        plan = calibrated_grid(f"{family}:{structure}", calibration, SCHEDULE, 7, levels=levels)
        assert plan.steps == 7
        assert float(plan.grid[0]) == 1
        assert bool((plan.grid.diff() < 0).all())
        assert plan.path_kl > -0.01
    own = calibrated_grid(family, calibration, SCHEDULE, 7, structure, 65)
    torch.testing.assert_close(own.grid, plan.grid, rtol=0, atol=0)


def test_optimal_predicts_the_least(calibration: Calibration) -> None:
    for structure in STRUCTURES:
        found = {
            name: calibrated_grid(name, calibration, SCHEDULE, 9, structure, 65).path_kl
            for name in ("optimal", "variance-matched", "entropic", "trailing", "karras", "uniform")
        }
        assert min(found, key=lambda name: found[name]) == "optimal", found


def test_prediction_is_the_bound(calibration: Calibration) -> None:
    """Total predicted nats of the basis kernel against the bound on fresh data: within 5 % of it (400 images of
    calibration), and the ordering of two grids."""
    x0 = _TARGET.sample(range(1000, 1600), Independent(1))
    curve = cost_curve(calibration, SCHEDULE, "basis").ending_with(calibration.table("basis").variance, None)
    denoiser = calibration.attach(EXACT, "basis")
    totals = []
    for name in ("optimal:basis", "trailing"):
        grid = calibrated_grid(name, calibration, SCHEDULE, 10, "basis", 65).grid
        logsnr = SCHEDULE.logsnr(grid[:-1])
        predicted = float(curve.step(logsnr[:-1], logsnr[1:]).sum())
        bound = vlb(denoiser, ReverseKernel(last="decoder"), grid, x0, None, Independent(7))
        steps = bound.kl.sum(1) * 8 * math.log(2)
        se = float(steps.std()) / math.sqrt(600)
        assert float(steps.mean()) == pytest.approx(predicted, abs=4 * se + 0.05 * predicted)
        totals.append(bound.kl.sum(1) + bound.decoder)
    gain = totals[1] - totals[0]
    assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(600)


@pytest.mark.parametrize("name", ["optimal:basis", "entropic", "trailing"])
def test_fewest_steps(calibration: Calibration, name: str) -> None:
    plan = fewest_steps_for(0.15, name, calibration, SCHEDULE, "basis", 65)
    fewer = calibrated_grid(name, calibration, SCHEDULE, plan.steps - 1, "basis", 65)
    assert plan.path_kl <= 0.15 < fewer.path_kl


def test_refuses(calibration: Calibration) -> None:
    with pytest.raises(UserError, match=r"grid is 'optimal:best'; allowed: uniform, .*optimal:basis"):
        calibrated_grid("optimal:best", calibration, SCHEDULE, 5)
    with pytest.raises(UserError, match="grid is 'nope'"):
        check_grid("nope")
    with pytest.raises(UserError, match="structure is 'full'"):
        cost_curve(calibration, SCHEDULE, "full")
    with pytest.raises(UserError, match="fingerprint"):
        calibrated_grid("optimal", calibration, CosineVP(), 5)
    with pytest.raises(UserError, match="tol is nan"):
        fewest_steps_for(math.nan, "optimal", calibration, SCHEDULE)
    with pytest.raises(UserError, match="reaches"):
        fewest_steps_for(1e-6, "trailing", calibration, SCHEDULE, most=16)
    assert [is_calibrated(name) for name in ("entropic:pixel", "trailing")] == [True, False]


# ------------------------------------------------------------------------------------------- in stock diffusers' hands


class _Unet(torch.nn.Module):
    """The mixture's exact score as diffusers' pipelines call a U-Net; remembers the timesteps it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float] = []
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.config = diffusers.configuration_utils.FrozenDict(in_channels=2, sample_size=2)

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
        self.asked.append(float(torch.as_tensor(t).flatten()[0]))
        level = SCHEDULE.at(SCHEDULE.time_of(torch.as_tensor(t).double().flatten()[0]))
        mean = EXACT(x, level).mean
        noise = (x - level.alpha.to(x) * mean) / level.sigma.to(x)
        return _Output(noise)


class _Output:
    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


def whole(calibration: Calibration, steps: int = 9) -> list[int]:
    return whole_timesteps(SCHEDULE, calibrated_grid("optimal:basis", calibration, SCHEDULE, steps, levels=65).grid)


def test_whole_timesteps(calibration: Calibration) -> None:
    for steps in (1, 9, 200):
        found = whole(calibration, steps)
        assert len(found) == steps
        assert found[0] == 999
        assert found[-1] >= 0
        assert all(a > b for a, b in itertools.pairwise(found))
    assert whole_timesteps(SCHEDULE, trailing(SCHEDULE, 1000)) == list(range(999, -1, -1))
    with pytest.raises(ValueError, match="training timesteps"):
        whole_timesteps(CosineVP(), trailing(CosineVP(), 5))
    with pytest.raises(ValueError, match="training timesteps"):
        whole_timesteps(SCHEDULE, trailing(SCHEDULE, 1001))


def stock(scheduler: Any, timesteps: list[int]) -> tuple[Tensor, list[float]]:
    """Samples of diffusers' own DDPMPipeline with its own scheduler, which is handed the timesteps."""
    unet = _Unet()
    pipeline: Any = diffusers.DDPMPipeline(unet, scheduler)  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    plain = scheduler.set_timesteps
    pipeline.scheduler.set_timesteps = lambda steps: plain(timesteps=timesteps)
    made = pipeline(
        batch_size=6, num_inference_steps=len(timesteps), generator=torch.Generator().manual_seed(2), output_type="np"
    )
    return torch.from_numpy(made.images), unet.asked


def test_stock_pipelines_run_the_grid(calibration: Calibration) -> None:
    """Stock DDPM, DPM-Solver++(2M) and SDE-DPM-Solver++ in a stock pipeline are asked for these timesteps, in order."""
    timesteps = whole(calibration)
    solvers = [
        diffusers.DDPMScheduler(clip_sample=False),
        diffusers.DPMSolverMultistepScheduler(final_sigmas_type="zero"),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", final_sigmas_type="zero"),
    ]
    for scheduler in solvers:
        images, asked = stock(scheduler, timesteps)
        assert asked == timesteps
        assert bool(torch.isfinite(images).all())


def test_stock_ddim_on_the_grid_is_ours(calibration: Calibration) -> None:
    """DDIM is DPM-Solver++ of order 1, which takes timesteps; `DDIMScheduler` steps by T // K whatever it is given."""
    timesteps = whole(calibration)
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=timesteps)
    timed = scheduler.timesteps
    assert timed.tolist() == timesteps
    unet = _Unet()
    x = Independent(4).normal(range(5), SHAPE)
    ours = generate(
        NetworkDenoiser(unet, SCHEDULE, "epsilon"),
        ReverseKernel(0.0, "small"),
        torch.cat([(torch.tensor(timesteps).double() + 1) / 1000, torch.zeros(1).double()]),
        SHAPE,
        5,
        Independent(4),
    )
    for t in timed:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(x, ours, rtol=0, atol=2e-4)
    with pytest.raises(TypeError, match="timesteps"):
        diffusers.DDIMScheduler().set_timesteps(timesteps=timesteps)  # type: ignore[call-arg]
