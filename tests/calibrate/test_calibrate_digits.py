"""A network trained on real digits, calibrated on one split, checked on another."""

from __future__ import annotations

import pytest
import torch

from lowvar.calibrate import calibrate, standardised_residuals
from lowvar.data import load
from lowvar.process import Independent, NetworkDenoiser
from lowvar.train import NetworkConfig, TrainConfig
from lowvar.train.loop import fit


@pytest.mark.slow
def test_residuals_are_standard_on_held_out_digits() -> None:
    """(1/d) (x_0 - x0_hat)^T C^-1 (x_0 - x0_hat) is 1 in every logsnr bin: within 10%, and within 3 standard errors.

    The standard error is that of both splits of 300 images: the held-out ones, and those the table was measured on.
    """
    data = load("digits")
    config = TrainConfig(updates=800, network=NetworkConfig(width=16), validate_every=800, checkpoint_every=800)
    fitted = fit(data, config, progress=False, device="cpu")
    denoiser = NetworkDenoiser(fitted.network, fitted.schedule, config.prediction, config.network_head, clip=1.0)
    calibration = calibrate(
        denoiser,
        lambda: data.calibration.batches(300),
        twin_batches=lambda: data.train.batches(300),
        replicates=4,
        noise=Independent(1),
        bound=1.0,
    )
    level = fitted.schedule.level(calibration.logsnr[::4])
    relative = (calibration.mmse_se / calibration.mmse)[::4]
    for structure in ("isotropic", "pixel", "basis"):
        attached = calibration.attach(denoiser, structure)
        check = standardised_residuals(attached, data.test.batches(300), level, Independent(2), replicates=4)
        error = (check.value - 1).abs()
        assert bool((error < 0.1).all()), (structure, check.value)
        assert bool((error < 3 * torch.sqrt(check.se**2 + relative**2)).all()), (structure, check.value, check.se)
