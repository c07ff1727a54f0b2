"""A pipeline as a sampler of `lowvar.expect`: what it draws, as a function of noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lowvar.errors import UserError
from lowvar.evaluation.cells import check_steps
from lowvar.expect import ChainSampler
from lowvar.pipelines import TablePipeline, denoiser_of, network_of
from lowvar.process.denoiser import NetworkDenoiser, WithCovariance
from lowvar.sample import SAMPLERS
from lowvar.schedulers import ReverseVarianceScheduler

__all__ = ["chain_of", "event_shape_of", "sampler_of"]


def event_shape_of(pipeline: Any) -> tuple[int, ...]:
    """(C, H, W) of the images or latents that a pipeline's network makes, (d,) of rows of a table.

    Raises:
        UserError: if the network's config does not say.
    """
    if isinstance(pipeline, TablePipeline):
        return (pipeline.columns.width,)
    config = getattr(network_of(pipeline), "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise UserError(
            "the network's config does not say what it makes; in_channels and sample_size are needed in its config.json"
        )
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return int(channels), height, width


def chain_of(
    denoiser: NetworkDenoiser,
    scheduler: ReverseVarianceScheduler,
    steps: int,
    shape: tuple[int, ...],
    *,
    clip: float | None = None,
    device: torch.device | str = "cpu",
) -> ChainSampler:
    """The chain of a scheduler on a network, with the calibrated twins where there are some.

    Args:
        denoiser: the network.
        scheduler: of its pipeline.
        steps: reverse steps.
        shape: event shape.
        clip: final clip to [-clip, clip], or None.
        device: where the network is.

    Raises:
        UserError: for a number of steps that the schedule does not have, or a missing calibration.
    """
    check_steps(steps, denoiser.schedule)
    scheduler.set_timesteps(steps)
    solver, covariance = scheduler.parts
    attached = denoiser if covariance is None else WithCovariance(denoiser, covariance)
    held = scheduler.calibration
    twin, mixture = (None, None) if held is None else (held.twin, held.mixture)
    chain = ChainSampler(attached, solver, scheduler.times, shape, twin=twin, mixture=mixture, clip=clip, device=device)
    try:
        _ = chain.shadow
    except ValueError:  # a solver that is not affine in the state (the flow of a mixture) has no Gaussian beside it
        return replace(chain, twin=None)
    return chain


def sampler_of(
    pipeline: Any,
    steps: int = 20,
    *,
    label: int | None = None,
    guidance: float = 1.0,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> ChainSampler:
    """A pipeline's sampler as a function of noise, for `lowvar.expect`.

    Args:
        pipeline: an opened pipeline (`lowvar.pipelines.open_pipeline`), unconditional or with a class.
        steps: reverse steps.
        label: number of a class; None: all classes.
        guidance: scale of classifier-free guidance.
        device: where to run it.
        **settings: fields of `ReverseVarianceScheduler` in the place of the pipeline's own, such as sampler="ddim"
            (with the grid that the name stands for) or eta=0.0.

    Raises:
        UserError: if a setting is not allowed or a calibration is missing.

    Example:
        >>> from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
        >>> net = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,)}
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
        >>> chain = sampler_of(DDPMPipeline(UNet2DModel(**net, **blocks), DDPMScheduler()), steps=4, sampler="ddim")
        >>> chain.nfe, chain.event_shape, chain.draws
        (4, (1, 8, 8), 0)
    """
    pipeline.to(device)
    denoiser = denoiser_of(pipeline, class_labels=label, guidance=guidance)
    network: Any = denoiser.network
    if hasattr(network, "eval"):
        network.eval().requires_grad_(False)
    fields: dict[str, Any] = {} if denoiser.head is None else {"head": denoiser.head}
    if settings.get("sampler") in SAMPLERS:
        settings = {"grid": SAMPLERS[settings["sampler"]].grid, **settings}
    held = getattr(pipeline.scheduler, "calibration", None)
    held = None if held is None else held.reading(label, guidance)
    scheduler = ReverseVarianceScheduler.from_scheduler(
        pipeline.scheduler, held, **fields, **settings, start_with_twin=True
    )
    return chain_of(denoiser, scheduler, steps, event_shape_of(pipeline), clip=denoiser.clip, device=device)
