"""A network trained on real digits, calibrated on one split, checked on another."""

from __future__ import annotations

import pytest
import torch

from lowvar.calibrate import Calibration, FitConfig, add_head, calibrate, standardised_residuals
from lowvar.data import Data, load
from lowvar.process import Independent, NetworkDenoiser
from lowvar.train import NetworkConfig, TrainConfig, fit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained() -> tuple[Data, NetworkDenoiser, Calibration]:
    data = load("digits")
    config = TrainConfig(updates=800, network=NetworkConfig(width=16), validate_every=800, checkpoint_every=800)
    fitted = fit(data, config, progress=False, device="cpu")
    fitted.network.eval().requires_grad_(False)
    denoiser = NetworkDenoiser(fitted.network, fitted.schedule, config.prediction, config.network_head, clip=1.0)
    calibration = calibrate(
        denoiser,
        lambda: data.calibration.batches(300),
        twin_batches=lambda: data.train.batches(300),
        replicates=4,
        noise=Independent(1),
        bound=1.0,
    )
    return data, denoiser, calibration


def test_residuals_are_standard_on_held_out_digits(trained: tuple[Data, NetworkDenoiser, Calibration]) -> None:
    """(1/d) (x_0 - x0_hat)^T C^-1 (x_0 - x0_hat) is 1 in every logsnr bin: within 10%, and within 3 standard errors.

    The standard error is that of both splits of 300 images: the held-out ones, and those the table was measured on.
    """
    data, denoiser, calibration = trained
    level = denoiser.schedule.level(calibration.logsnr[::2])
    relative = (calibration.mmse_se / calibration.mmse)[::2]
    for structure in ("isotropic", "pixel", "basis"):
        attached = calibration.attach(denoiser, structure)
        check = standardised_residuals(attached, data.test.batches(300), level, Independent(2), replicates=4)
        error = (check.value - 1).abs()
        assert bool((error < 0.1).all()), (structure, check.value)
        assert bool((error < 3 * torch.sqrt(check.se**2 + relative**2)).all()), (structure, check.value, check.se)


def test_a_head_gains_on_held_out_digits(trained: tuple[Data, NetworkDenoiser, Calibration]) -> None:
    """NPR in principal components: better by more than three standard errors on its own held-out images, and in mean
    on the test split, which nothing of the calibration has seen.
    """
    data, denoiser, calibration = trained
    images = data.calibration.all()
    config = FitConfig(rounds=6, pool=2048, epochs=6)
    found, report = add_head(calibration, denoiser, images, "npr", Independent(3), basis="pca", config=config)
    assert report.gain > 3 * report.gain_se > 0, report
    x0, level = data.test.all(), denoiser.schedule.level(calibration.logsnr[::8])
    gains = []
    for k in range(len(level)):
        eps = Independent(4).normal(range(len(x0)), x0.shape[1:], draw=k)
        x = level.alpha[k].float() * x0 + level.sigma[k].float() * eps
        with torch.no_grad():
            posterior = denoiser(x, level[k])
            residual = x0 - posterior.mean
            value = [
                -(C.logdet() + C.inverse_quadratic(residual)) / (2 * 64)
                for C in (m(x, level[k], posterior) for m in (found.model("npr"), found.model("basis")))
            ]
        gains.append(float((value[0] - value[1]).mean()))
    assert sum(gains) > 0, gains
