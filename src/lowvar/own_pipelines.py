r"""Pipelines that diffusers has no class for: rows of a table, images of a class or of any noise schedule, latents.

They are pipelines of diffusers: `save_pretrained` writes a folder with model_index.json and safetensors weights, and
the class's `from_pretrained` (or `lowvar.pipelines.open_pipeline`, which knows them) reads it.

A network with classes 0 .. K - 1 was trained with its class now and then replaced by the null class K (Ho & Salimans
2022), so it also knows the mixture of all classes, and guidance of scale w asks it twice:

    out = out(K) + w (out(class) - out(K)).

w = 1 is the conditional model, at one evaluation. The outputs of all predictions are affine in x0_hat, so that this is
the guidance of x0_hat too. Of a variance head the channels are the conditional ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from lowvar.data.columns import Columns
from lowvar.errors import UserError
from lowvar.models import null_class
from lowvar.process.noise import TorchGenerators

__all__ = [
    "ClassConditionalPipeline",
    "ClassGuided",
    "ImagePipeline",
    "LatentOutput",
    "LatentPipeline",
    "TableOutput",
    "TablePipeline",
    "class_number",
    "null_class",
]

Generators = torch.Generator | list[torch.Generator] | None


def class_number(label: int | str, classes: Sequence[str]) -> int:
    """The number of a class that is given by its name or number.

    Args:
        label: a name in `classes`, or a number.
        classes: names of the classes.

    Raises:
        UserError: for one that is not there.

    Example:
        >>> class_number("dog", ["cat", "dog"]), class_number("0", ["cat", "dog"])
        (1, 0)
    """
    if str(label) in classes:
        return list(classes).index(str(label))
    if str(label).isdecimal() and int(label) < len(classes):
        return int(label)
    some = ", ".join(classes[:12]) + (", .." if len(classes) > 12 else "")
    raise UserError(f"the class is {label!r}; allowed: {some}, or a number from 0 to {len(classes) - 1}")


class ClassGuided(nn.Module):
    """A class-conditional network under guidance, called as the network is; two evaluations in one batch.

    Args:
        network: with a null class.
        scale: w.

    Raises:
        UserError: if the network has no classes.
    """

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        null = null_class(network)
        if null is None:
            raise UserError(f"guidance needs a network with classes, and {type(network).__name__} has none")
        self.network, self.scale, self.null = network, float(scale), null

    @property
    def config(self) -> Any:
        """The network's."""
        return cast("Any", self.network).config

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """The guided output (B, channels, ..)."""
        B, C = sample.shape[:2]
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(B)
        labels = torch.cat([class_labels, torch.full_like(class_labels, self.null)])
        out = self.network(torch.cat([sample, sample]), torch.cat([t, t]), class_labels=labels).sample
        conditional, unconditional = out[:B], out[B:]
        mean = unconditional[:, :C] + self.scale * (conditional[:, :C] - unconditional[:, :C])
        return torch.cat([mean, conditional[:, C:]], 1)


def _labels(network: Any, given: int | Sequence[int] | Tensor | None, n: int, device: Any) -> dict[str, Tensor]:
    """The keyword argument `class_labels` (n,) of a network, the null class unless others are given.

    Raises:
        UserError: for numbers that are no classes.
    """
    null = null_class(network)
    if null is None:
        if given is not None:
            raise UserError("class_labels were given, and the model has no classes; leave them out")
        return {}
    labels = torch.as_tensor(null if given is None else given, dtype=torch.long, device=device).reshape(-1)
    if len(labels) not in (1, n) or not bool(((labels >= 0) & (labels <= null)).all()):
        raise UserError(
            f"class_labels is {labels.tolist()}; give one number from 0 to {null - 1}, or one for each of {n} samples"
        )
    return {"class_labels": labels.expand(n)}


def _known(network: Any, given: dict[str, Tensor]) -> Tensor | None:
    """The classes (n,), or None where some sample is of all classes."""
    labels = given.get("class_labels")
    return None if labels is None or bool((labels == null_class(network)).any()) else labels


def _sampled(
    pipeline: Any,
    shape: Sequence[int],
    n: int,
    steps: int,
    labels: int | Sequence[int] | Tensor | None,
    scale: float,
    generator: Generators,
    bound: float | None = 1.0,
) -> Tensor:
    """Samples (n, *shape) in [-bound, bound] by the scheduler's steps, as diffusers' own pipelines make them."""
    scheduler, device = pipeline.scheduler, pipeline._execution_device
    network: nn.Module = pipeline.components.get("unet") or pipeline.components["network"]
    given = _labels(network, labels, n, device)
    called: Callable[..., Any] = network if scale == 1 else ClassGuided(network, scale)
    if hasattr(scheduler, "keep_classes"):  # ours, whose module stands above this one
        scheduler.keep_classes(_known(network, given), scale)
    x = TorchGenerators(generator).normal(range(n), shape, device=device).to(cast("Any", network).dtype)
    scheduler.set_timesteps(steps, device=device)
    x = x * scheduler.init_noise_sigma
    for t in pipeline.progress_bar(scheduler.timesteps):
        out = called(scheduler.scale_model_input(x, t), t.expand(n), **given)  # DiT takes one time a sample
        out = out if isinstance(out, Tensor) else out.sample
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    pipeline.maybe_free_model_hooks()
    return x if bound is None else x.clamp(-bound, bound)


@dataclass
class TableOutput(BaseOutput):
    """Samples of a table.

    Attributes:
        table: values in their own units by header, lists of n.
        samples: the rows in [-1, 1], (n, d).
    """

    table: dict[str, list[Any]]
    samples: Tensor


class TablePipeline(DiffusionPipeline):
    """Rows of a table.

    Args:
        network: a `lowvar.models.ResidualMLP`.
        scheduler: a scheduler of diffusers or ours.
        columns: what `Columns.config` returned: how numbers become values.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> from lowvar.data.columns import Number
        >>> from lowvar.models import ResidualMLP
        >>> columns = Columns((Number("age", (20.0, 70.0), (0.0, 1.0)),))
        >>> pipeline = TablePipeline(ResidualMLP(1, width=8, blocks=1), DDPMScheduler(), columns.config())
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> ages = pipeline(3, num_inference_steps=2).table["age"]
        >>> len(ages), all(20 <= age <= 70 for age in ages)
        (3, True)
    """

    model_cpu_offload_seq = "network"

    def __init__(self, network: Any, scheduler: Any, columns: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)
        self.register_to_config(columns=columns)

    @property
    def columns(self) -> Columns:
        """The columns.

        Raises:
            UserError: if the folder describes none.
        """
        return Columns.restored(cast("Any", self.config)["columns"])

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 20,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> TableOutput:
        """Samples rows.

        Args:
            batch_size: n.
            generator: of the noise.
            num_inference_steps: reverse steps.
            class_labels: of a conditional model: one class number, or one a row; None: all classes.
            guidance_scale: w.

        Raises:
            UserError: for classes that the model does not have.
        """
        columns = self.columns
        x = _sampled(self, (columns.width,), batch_size, num_inference_steps, class_labels, guidance_scale, generator)
        return TableOutput(columns.decode(x), x)


class ClassConditionalPipeline(DiffusionPipeline):
    """Images of a class.

    Args:
        unet: a UNet2DModel with `num_class_embeds` K + 1, the last of them the null class, or a DiTTransformer2DModel.
        scheduler: a scheduler of diffusers or ours.
        classes: names of the K classes; an empty list for a network that was trained on its null class alone.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: Any, scheduler: Any, classes: list[str] | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(classes=classes)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; their numbers where the folder has no names."""
        names = cast("Any", self.config)["classes"]
        return tuple(map(str, range(null_class(cast("Any", self).unet) or 0)) if names is None else names)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 20,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Samples images.

        Args:
            batch_size, generator, num_inference_steps, class_labels, guidance_scale: as of `TablePipeline`.
            output_type: `pil`, `np` (n, H, W, C) or `pt` (n, C, H, W), the arrays in [0, 1].
        """
        return _images(self, batch_size, num_inference_steps, class_labels, guidance_scale, generator, output_type)


class ImagePipeline(DiffusionPipeline):
    """Images, by the whole of the scheduler's protocol.

    diffusers' DDPMPipeline starts from noise of variance 1 and gives the network the state as it is, which is right for
    variance-preserving and flow schedules. EDM's scheduler has a start of another size (`init_noise_sigma`) and scales
    what the network is given (`scale_model_input`).

    Args:
        unet: a UNet2DModel.
        scheduler: a scheduler of diffusers or ours.

    Example:
        >>> from diffusers import EDMEulerScheduler, UNet2DModel
        >>> shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,)}
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
        >>> pipeline = ImagePipeline(UNet2DModel(**shape, **blocks), EDMEulerScheduler())
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> tuple(pipeline(2, num_inference_steps=2, output_type="pt").images.shape)
        (2, 1, 8, 8)
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 20,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Samples images.

        Args:
            batch_size, generator, num_inference_steps: as of `TablePipeline`.
            output_type: as of `ClassConditionalPipeline`.
        """
        return _images(self, batch_size, num_inference_steps, None, 1.0, generator, output_type)


@dataclass
class LatentOutput(BaseOutput):
    """Samples of a pipeline of latents.

    Attributes:
        latents: (n, C, H, W) in the units of the latents that were trained on.
    """

    latents: Tensor


class LatentPipeline(DiffusionPipeline):
    """Latents, for the autoencoder that made the training data to decode.

    The network works on z times `scaling_factor`, whose variance is about 1; what comes out is divided by it.

    Args:
        unet: a UNet2DModel or DiTTransformer2DModel, with or without classes (then as of `ClassConditionalPipeline`).
        scheduler: a scheduler of diffusers or ours, which does not clip.
        scaling_factor: f.
        classes: names of the classes; None for a network without.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> shape = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8,)}
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
        >>> pipeline = LatentPipeline(UNet2DModel(**shape, **blocks), DDPMScheduler(clip_sample=False), 0.18215)
        >>> pipeline.set_progress_bar_config(disable=True)
        >>> tuple(pipeline(2, num_inference_steps=2).latents.shape)
        (2, 4, 8, 8)
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self, unet: Any, scheduler: Any, scaling_factor: float = 1.0, classes: list[str] | None = None
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(scaling_factor=float(scaling_factor), classes=classes)

    @property
    def scaling_factor(self) -> float:
        """f."""
        return float(cast("Any", self.config)["scaling_factor"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, if any."""
        return tuple(cast("Any", self.config)["classes"] or ())

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 20,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> LatentOutput:
        """Samples latents; arguments as of `TablePipeline`."""
        shape = _shape(cast("Any", self).unet)
        x = _sampled(self, shape, batch_size, num_inference_steps, class_labels, guidance_scale, generator, None)
        return LatentOutput(x / self.scaling_factor)


def _shape(network: Any) -> tuple[int, int, int]:
    """(C, H, W) of what a network of diffusers makes."""
    config = network.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def _images(
    pipeline: Any,
    n: int,
    steps: int,
    labels: int | Sequence[int] | Tensor | None,
    scale: float,
    generator: Generators,
    output_type: str,
) -> ImagePipelineOutput:
    """Samples of a pipeline with a `unet` as images."""
    x = _sampled(pipeline, _shape(pipeline.unet), n, steps, labels, scale, generator)
    images: Any = (x / 2 + 0.5).clamp(0, 1).cpu()
    if output_type != "pt":
        images = images.permute(0, 2, 3, 1).numpy()
        images = pipeline.numpy_to_pil(images) if output_type == "pil" else images
    return ImagePipelineOutput(images=images)
