r"""Networks of diffusers' pipelines as denoisers.

`open_pipeline` opens a folder (`lowvar.pipeline_folders`); `denoiser_of` reads off it what the network predicts:

    schedule      the scheduler's, recomputed in float64            (`lowvar.process.schedule_from_diffusers`)
    prediction    the scheduler's `prediction_type`; flow velocity for flow-matching schedulers
    clip          `clip_sample_range` where the scheduler clips and the pipeline has no autoencoder
    head          where the network has more output than input channels; its rank is read off their number
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowvar.errors import UserError
from lowvar.own_pipelines import (
    ClassConditionalPipeline,
    ClassGuided,
    ImagePipeline,
    LatentPipeline,
    TablePipeline,
    null_class,
)
from lowvar.pipeline_folders import one_line, open_pipeline
from lowvar.process.denoiser import Head, NetworkDenoiser, Prediction
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.head import rank_of
from lowvar.process.schedule import Schedule
from lowvar.schedulers import ReverseVarianceScheduler
from lowvar.schedulers._fields import require_edm

__all__ = [
    "ClassConditionalPipeline",
    "ImagePipeline",
    "LatentPipeline",
    "TablePipeline",
    "denoiser_of",
    "keep_head",
    "network_of",
    "open_pipeline",
    "open_weights",
    "schedule_of",
]

_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v_prediction",
    "flow_prediction": "flow",
}


def network_of(pipeline: Any) -> nn.Module:
    """The denoising network of a pipeline: its `unet`, `transformer` or (of tables) `network`.

    Raises:
        UserError: if it has neither.
    """
    for name in ("unet", "transformer", "network"):
        network = getattr(pipeline, name, None)
        if network is not None:
            return network
    raise UserError(f"{type(pipeline).__name__} has neither a unet nor a transformer: its network is not known here")


def schedule_of(scheduler: Any) -> Schedule:
    """The noise schedule of a diffusers scheduler, in float64.

    Raises:
        UserError: if it is not known here.
    """
    if isinstance(scheduler, ReverseVarianceScheduler):
        return scheduler.schedule
    name = type(scheduler).__name__
    try:
        return schedule_from_diffusers({**scheduler.config, "_class_name": name})
    except ValueError as error:
        raise UserError(f"the noise schedule of {name} is not supported: {error}") from error


def denoiser_of(
    pipeline: Any,
    *,
    class_labels: int | Tensor | None = None,
    conditioning: Mapping[str, Any] | None = None,
    clip: float | None = None,
    head: Head | None = None,
    guidance: float = 1.0,
) -> NetworkDenoiser:
    """The network of an opened pipeline as a denoiser, read off the pipeline's scheduler and the network's shape.

    Args:
        pipeline: unconditional (DDPM), class-conditional (DiT) or any other whose network is called as
            network(x, timestep, **conditioning).
        class_labels: one class for every sample, or one a sample (B,); class-conditional networks need it, except in
            `ClassConditionalPipeline`, `LatentPipeline` and `TablePipeline`, whose null class stands for all classes.
        conditioning: further keyword arguments of the network, such as `encoder_hidden_states` of a text-to-image one.
        clip: bound of the data, instead of the scheduler's.
        head: what the output channels beyond the prediction are, instead of the scheduler's or `range`; the spectrum
            of head `basis` is the scheduler's.
        guidance: scale of classifier-free guidance, for pipelines with a null class; 1: none.

    Raises:
        UserError: if the network needs conditioning that is not given, or its channels do not fit.

    Example:
        >>> from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
        >>> shape = {"sample_size": 8, "in_channels": 1, "out_channels": 2, "block_out_channels": (8,)}
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
        >>> pipeline = DDPMPipeline(UNet2DModel(**shape, **blocks), DDPMScheduler())
        >>> denoiser = denoiser_of(pipeline)
        >>> denoiser.prediction, denoiser.head, denoiser.clip
        ('epsilon', 'range', 1.0)
    """
    network, scheduler = network_of(pipeline), pipeline.scheduler
    config, given = dict(cast("Any", network).config), dict(conditioning or {})
    schedule = schedule_of(scheduler)
    if isinstance(pipeline, ClassConditionalPipeline | LatentPipeline | TablePipeline):
        class_labels = null_class(network) if class_labels is None else class_labels
        network = network if guidance == 1 else ClassGuided(network, guidance)
    elif guidance != 1:
        raise UserError(f"guidance is {guidance:g}, and {type(pipeline).__name__} has no null class; leave it out")
    _check_conditioning(network, config, given, class_labels is not None)
    if class_labels is not None:
        given["class_labels"] = class_labels
    found = _head(network, config, scheduler, head)
    latent = getattr(pipeline, "vae", None) is not None
    if clip is None and not latent and scheduler.config.get("clip_sample"):
        clip = float(scheduler.config.get("clip_sample_range", 1.0))
    called: Any = network if _by_position(network) and class_labels is None else _Called(network)
    try:
        prediction, sigma_data = _prediction(scheduler, schedule), float(scheduler.config.get("sigma_data", 0.5))
        spectrum = getattr(scheduler, "spectrum", None) if found == "basis" else None
        denoiser = NetworkDenoiser(called, schedule, prediction, found, clip, sigma_data, given, spectrum)
        denoiser.nfe = 1 if guidance == 1 else 2
        return denoiser
    except ValueError as error:
        raise UserError(f"{type(pipeline).__name__} cannot be read as a denoiser: {error}") from error


def open_weights(folder: str | Path, network: nn.Module) -> NetworkDenoiser:
    """The denoiser that `lowvar train` left of a network that is no model of diffusers.

    Args:
        folder: of the run, with network.safetensors and scheduler/.
        network: one like the one that was trained; it gets the weights, and is put into evaluation mode.

    Returns:
        The denoiser, for samplers, calibration and likelihood; of a conditional network give the classes as
        `conditioning`. Data in [-1, 1] are clipped to that; latents are those of training, times the scaling factor in
        the run's summary.json. A table's columns are in columns.json (`lowvar.data.Columns.restored`).

    Raises:
        UserError: if the files are not there, or belong to another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    path = Path(folder)
    for needed in ("network.safetensors", "scheduler"):
        if not (path / needed).exists():
            raise UserError(f"{path} has no {needed}; give the folder of a run that trained a network of your own")
    try:
        load_model(network, str(path / "network.safetensors"))
        scheduler = ReverseVarianceScheduler.from_pretrained(str(path / "scheduler"))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"the weights in {path} do not fit {type(network).__name__}: {one_line(error)}") from error
    schedule, head = schedule_of(scheduler), cast("Head | None", scheduler.config.get("head"))
    spectrum = scheduler.spectrum if head == "basis" else None
    clip = float(scheduler.config.get("clip_sample_range", 1.0)) if scheduler.config.get("clip_sample") else None
    sigma_data = float(scheduler.config.get("sigma_data", 0.5))
    return NetworkDenoiser(
        network.eval(), schedule, _prediction(scheduler, schedule), head, clip, sigma_data, spectrum=spectrum
    )


@contextmanager
def keep_head(pipeline: Any) -> Iterator[None]:
    """While it is open, the pipeline's scheduler gets the network's variance head even where the pipeline cuts it off.

    DiTPipeline and PixArt hand the scheduler C of the network's 2C channels. A hook on the network, which stays the
    module it is, hands the others to `ReverseVarianceScheduler.keep_head` before; other schedulers are left alone. Of a
    guided batch the conditional half counts, as in `lowvar.process.Guided`.

    Args:
        pipeline: whose scheduler has a `head`; the scheduler may be changed while this is open.

    Raises:
        UserError: if the network has no channels for a head.

    Example:
        >>> from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
        >>> shape = {"sample_size": 8, "in_channels": 1, "out_channels": 2, "block_out_channels": (8,)}
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
        >>> pipeline = DDPMPipeline(UNet2DModel(**shape, **blocks), DDPMScheduler())
        >>> with keep_head(pipeline):
        ...     len(pipeline.unet._forward_hooks)
        1
    """
    network = network_of(pipeline)
    _head(network, dict(cast("Any", network).config), pipeline.scheduler, "range")

    def hand_over(_: nn.Module, inputs: Any, output: Any) -> None:
        out = output if isinstance(output, Tensor) else (output[0] if isinstance(output, tuple) else output.sample)
        if isinstance(pipeline.scheduler, ReverseVarianceScheduler):
            pipeline.scheduler.keep_head(out.chunk(2, dim=1)[1])

    hook = network.register_forward_hook(hand_over)
    try:
        yield
    finally:
        hook.remove()


def _prediction(scheduler: Any, schedule: Schedule) -> Prediction:
    if schedule.family == "flow":
        return "flow"
    if schedule.family == "ve" and not isinstance(scheduler, ReverseVarianceScheduler):
        require_edm(type(scheduler).__name__, scheduler.config)
    if schedule.family == "ve":
        return "edm"
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise UserError(f"prediction_type is {kind!r}; allowed: {', '.join(_PREDICTIONS)}")
    return _PREDICTIONS[kind]


def _head(network: nn.Module, config: Mapping[str, Any], scheduler: Any, asked: Head | None) -> Head | None:
    inputs = int(config.get("in_channels") or 0)
    outputs = int(config.get("out_channels") or inputs)
    if outputs == inputs:
        if asked is not None:
            raise UserError(f"head {asked!r} was asked for, and {type(network).__name__} has no channels for one")
        return None
    head = asked or cast("Head | None", scheduler.config.get("head")) or "range"
    if rank_of(head, inputs, outputs) is None:
        raise UserError(
            f"{type(network).__name__} takes {inputs} channels and returns {outputs}; supported: as many, or with a "
            "variance head twice as many, or with head 'lowrank' and r directions 2 + r times as many (networks that "
            "take a mask or an image beside the state are not)"
        )
    return head


def _check_conditioning(
    network: nn.Module, config: Mapping[str, Any], given: Mapping[str, Any], labelled: bool
) -> None:
    name = type(network).__name__
    by_class = name.startswith("DiTTransformer") or any(
        config.get(k) is not None for k in ("class_embed_type", "num_class_embeds")
    )
    if by_class and not labelled and "class_labels" not in given:
        raise UserError(f"{name} is conditioned on a class: give class_labels, one number for all samples or one each")
    if "ConditionModel" in name and "encoder_hidden_states" not in given:
        raise UserError(f"{name} is conditioned on a text: give conditioning={{'encoder_hidden_states': embeddings}}")


def _by_position(network: nn.Module) -> bool:
    """Whether network(x, timestep) means that."""
    names = list(inspect.signature(network.forward).parameters)
    if "timestep" not in names:
        raise UserError(f"{type(network).__name__} takes no timestep: its network is not known here")
    return names[1] == "timestep"


class _Called(nn.Module):
    """A network called by keyword, whose class labels are spread over the batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def config(self) -> Any:
        return cast("Any", self.network).config

    def forward(self, x: Tensor, timestep: Tensor, **conditioning: Any) -> Any:
        labels = conditioning.pop("class_labels", None)
        if labels is not None:
            labels = torch.as_tensor(labels, dtype=torch.long, device=x.device).reshape(-1).expand(x.shape[0])
            conditioning["class_labels"] = labels
        return self.network(x, timestep=timestep, **conditioning)
