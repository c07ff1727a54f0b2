"""Samplers by name: what they need, what they cost, what a pipeline's scheduler cannot hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import Calibration, calibrate
from lowvar.errors import UserError
from lowvar.evaluation import Cell, check_cell, draw, resolve
from lowvar.process import CosineVP, Independent, NetworkDenoiser
from lowvar.sample import SAMPLERS, named_sampler
from lowvar.schedulers import sampler_fields
from lowvar.testing import anisotropic_gaussian

SCHEDULE, TARGET = CosineVP(), anisotropic_gaussian((1, 2, 2), ratio=30.0)
NEW = ("dpmpp-2m", "dpmpp-2m-basis", "dpmpp-2m-sde", "unipc", "sa", "heun")
NEW += ("unipc-basis", "ddim-noise", "dpmpp-2m-noise", "unipc-noise")


def network(x: Tensor, timestep: Tensor) -> Tensor:
    """The exact posterior mean."""
    return TARGET.twin.posterior(x, SCHEDULE.at(SCHEDULE.time_of(timestep[0].double()))).mean


DENOISER = NetworkDenoiser(network, SCHEDULE, "sample")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    data = TARGET.sample(range(2048), Independent(1))
    return calibrate(DENOISER, lambda: [data.float()], logsnr=torch.linspace(-10, 8, 9, dtype=torch.float64))


@pytest.mark.parametrize("name", NEW)
def test_draws_what_it_says_at_its_cost(name: str, calibration: Calibration) -> None:
    cell = Cell(name, 4)
    check_cell(cell, DENOISER, calibration)
    drawn = draw(DENOISER, cell, 64, (1, 2, 2), calibration=calibration)
    assert drawn.nfe == cell.evaluations == (7 if name == "heun" else 4)
    assert bool(torch.isfinite(drawn.samples).all())


@pytest.mark.parametrize("name", ["ddim-noise", "dpmpp-2m-noise", "dpmpp-2m-basis"])
def test_calibrated_noise_restores_variance(name: str, calibration: Calibration) -> None:
    """At 4 steps these means lose variance; the error of the output's total variance is at most half of it with noise
    (2,048 samples: its standard error is .03 of the total)."""
    truth = float(torch.trace(TARGET.covariance))
    plain = name.removesuffix("-noise").removesuffix("-basis")
    total = {
        n: float(draw(DENOISER, Cell(n, 4), 2048, (1, 2, 2), calibration=calibration).samples.var(0).sum())
        for n in (plain, name)
    }
    assert total[plain] < 0.95 * truth
    assert abs(truth - total[name]) < 0.5 * (truth - total[plain]) + 0.03 * truth


def test_what_is_missing_is_said() -> None:
    for name in ("ddim-noise", "unipc-noise"):
        with pytest.raises(ValueError, match="calibrate the model first"):
            named_sampler(name)
    with pytest.raises(UserError, match="as published"):
        resolve("unipc", DENOISER, eta=0.5)
    assert all(sampler_fields(name) for name in SAMPLERS)
