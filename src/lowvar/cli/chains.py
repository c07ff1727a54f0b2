"""A model as a `ChainSampler`: what `lowvar sample` draws, as a function of noise."""

from __future__ import annotations

import torch

from lowvar.cli.models import Model
from lowvar.evaluation import check_steps
from lowvar.expect import ChainSampler
from lowvar.process.denoiser import WithCovariance
from lowvar.schedulers import ReverseVarianceScheduler

__all__ = ["chain_of"]


def chain_of(model: Model, scheduler: ReverseVarianceScheduler, steps: int, device: torch.device) -> ChainSampler:
    """The chain of a model's scheduler, with the calibrated twin where there is one.

    Args:
        model: the model.
        scheduler: of the model, with the noise of its grid (`noise_ready`).
        steps: reverse steps.
        device: where the network is.

    Raises:
        UserError: for a number of steps that the schedule does not have, or a missing calibration.
    """
    check_steps(steps, model.denoiser.schedule)
    scheduler.set_timesteps(steps)
    solver, covariance = scheduler.parts
    denoiser = model.denoiser if covariance is None else WithCovariance(model.denoiser, covariance)
    twin = None if model.calibration is None else model.calibration.twin
    return ChainSampler(denoiser, solver, scheduler.times, model.shape, twin=twin, clip=model.bound, device=device)
