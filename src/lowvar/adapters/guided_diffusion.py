r"""Checkpoints of guided-diffusion and improved-diffusion as denoisers and as diffusers pipelines.

A checkpoint is a safetensors file with the original's state dict, and the flags it was trained with:

    network       diffusers' UNet2DModel with the checkpoint's weights        (`lowvar.adapters.guided_unet`)
    schedule      linear or cosine, T = diffusion_steps, as `DiscreteVP`      (`lowvar.adapters.guided_flags`)
    prediction    the noise, or x_0 with predict_xstart
    head          `range` with learn_sigma (Nichol & Dhariwal 2021, Eq. 15)
    clip          data in [-1, 1]

Pickled checkpoints (.pt) are refused, because reading one may run code. Where it is trusted, two lines convert it:

    state = torch.load("model.pt", map_location="cpu", weights_only=True)
    safetensors.torch.save_file(state, "model.safetensors")

Sources: Nichol & Dhariwal 2021 (improved-diffusion), Dhariwal & Nichol 2021 (guided-diffusion).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowvar.adapters.guided_flags import GuidedFlags
from lowvar.adapters.guided_unet import unet_from_guided
from lowvar.errors import UserError
from lowvar.process.denoiser import NetworkDenoiser

if TYPE_CHECKING:
    from diffusers import DDPMPipeline, UNet2DModel

__all__ = ["guided_diffusion_denoiser", "guided_diffusion_pipeline"]


def guided_diffusion_denoiser(
    file: str | Path,
    flags: GuidedFlags | Mapping[str, Any],
    *,
    class_labels: int | Tensor | None = None,
    clip: float | None = 1.0,
) -> NetworkDenoiser:
    """A checkpoint as a denoiser.

    Args:
        file: safetensors file with the original's state dict.
        flags: what it was trained with, see `GuidedFlags`.
        class_labels: of a class-conditional model: one class for every sample, or one a sample (B,).
        clip: bound of the data; None leaves the mean unclipped.

    Raises:
        UserError: if the file is no safetensors file or does not fit the flags, the flags make a network that
            diffusers' UNet2DModel cannot hold, or class labels are missing, superfluous or out of range.

    Example:
        >>> try:
        ...     guided_diffusion_denoiser("64x64_diffusion.pt", {"image_size": 64})
        ... except ValueError as error:
        ...     print(str(error)[:53])
        64x64_diffusion.pt is no safetensors file: pickled ch
    """
    flags = flags if isinstance(flags, GuidedFlags) else GuidedFlags.read(flags)
    network = unet_from_guided(_read(Path(file)), flags)
    _check_labels(class_labels, network, flags)
    return NetworkDenoiser(
        _Network(network, flags.timestep_scale),
        flags.schedule,
        "sample" if flags.predict_xstart else "epsilon",
        "range" if flags.learn_sigma else None,
        clip,
        conditioning=None if class_labels is None else {"class_labels": class_labels},
    )


def guided_diffusion_pipeline(file: str | Path, flags: GuidedFlags | Mapping[str, Any]) -> DDPMPipeline:
    """A checkpoint as a diffusers pipeline, whose `save_pretrained` writes the folder that lowvar's commands open.

    diffusers' DDPMPipeline gives its network no class labels; open the folder of a class-conditional model with
    `lowvar.pipelines.open_pipeline` and `denoiser_of(pipeline, class_labels=...)`.

    Args:
        file: safetensors file with the original's state dict.
        flags: what it was trained with, see `GuidedFlags`.

    Raises:
        UserError: as `guided_diffusion_denoiser`; and if the network is conditioned on rescaled timesteps, which a
            pipeline does not have.
    """
    from diffusers import DDPMPipeline, DDPMScheduler

    flags = flags if isinstance(flags, GuidedFlags) else GuidedFlags.read(flags)
    if flags.timestep_scale != 1:
        raise UserError(
            f"rescale_timesteps with diffusion_steps={flags.diffusion_steps} conditions the network on "
            f"{flags.timestep_scale:g} n, which a diffusers pipeline cannot say: use guided_diffusion_denoiser"
        )
    scheduler = DDPMScheduler(
        **flags.scheduler_config,
        variance_type="learned_range" if flags.learn_sigma else "fixed_large",
        prediction_type="sample" if flags.predict_xstart else "epsilon",
        clip_sample=True,
        clip_sample_range=1.0,
    )
    return DDPMPipeline(unet_from_guided(_read(Path(file)), flags), scheduler)


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.suffix != ".safetensors":
        raise UserError(
            f"{file} is no safetensors file: pickled checkpoints may run code when they are read; convert it where you "
            "trust it (torch.load with weights_only=True, then safetensors.torch.save_file) and give that file"
        )
    if not file.is_file():
        raise UserError(f"{file} is not there; give the checkpoint's safetensors file")
    try:
        return load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}): convert or copy it again") from error


def _check_labels(labels: int | Tensor | None, network: UNet2DModel, flags: GuidedFlags) -> None:
    if not flags.class_cond:
        if labels is not None:
            raise UserError("class_labels are given, and the model is not conditioned on a class: leave them out")
        return
    if labels is None:
        raise UserError("the model is conditioned on a class: give class_labels, one for all samples or one each")
    classes = int(network.config["num_class_embeds"])
    values = torch.as_tensor(labels)
    if values.is_floating_point() or not bool(((values >= 0) & (values < classes)).all()):
        raise UserError(f"class_labels are {labels}; allowed: whole numbers from 0 to {classes - 1}")


class _Network(nn.Module):
    """The network with its timesteps scaled and its class labels spread over the batch."""

    def __init__(self, network: UNet2DModel, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    @property
    def config(self) -> Any:
        return self.network.config

    def forward(self, x: Tensor, timestep: Tensor, class_labels: int | Tensor | None = None) -> Tensor:
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels, device=x.device).long().reshape(-1).expand(x.shape[0])
        return self.network(x, timestep * self.scale, class_labels=class_labels).sample
