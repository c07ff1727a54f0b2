"""A model folder as the commands use it: network, schedule, calibration, shape, and its scheduler as ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvar.calibrate import Calibration
from lowvar.calibrate.deficit import describe
from lowvar.data import ArrayImages, Columns, Data
from lowvar.errors import UserError
from lowvar.evaluation import check_steps, deficit_of, event_shape_of, resolve
from lowvar.own_pipelines import class_number, null_class
from lowvar.pipelines import (
    ClassConditionalPipeline,
    ImagePipeline,
    LatentPipeline,
    TablePipeline,
    denoiser_of,
    network_of,
    open_pipeline,
)
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.discrete import DiscreteVP
from lowvar.process.noise import NoiseSource
from lowvar.sample import SAMPLERS
from lowvar.schedulers import ReverseVarianceScheduler

__all__ = [
    "Model",
    "default_samplers",
    "fitting",
    "model_of",
    "noise_ready",
    "open_model",
    "require_shape",
    "run_scheduler",
    "save_model",
    "scheduler_of",
]


OWN_PIPELINES = (ClassConditionalPipeline, ImagePipeline, LatentPipeline, TablePipeline)


@dataclass(frozen=True)
class Model:
    """An opened model.

    Attributes:
        pipeline: the diffusers pipeline.
        denoiser: its network with schedule and prediction.
        calibration: of its scheduler, or None; of a class, with the tables of that class where they were measured
            under the same guidance.
        shape: (C, H, W) of the images it makes, (d,) of rows of a table.
    """

    pipeline: Any
    denoiser: NetworkDenoiser
    calibration: Calibration | None
    shape: tuple[int, ...]

    @property
    def columns(self) -> Columns | None:
        """Of a table; None for images."""
        return self.pipeline.columns if isinstance(self.pipeline, TablePipeline) else None

    @property
    def scaling_factor(self) -> float | None:
        """Of latents; None for images and tables, which lie in [-1, 1]."""
        return self.pipeline.scaling_factor if isinstance(self.pipeline, LatentPipeline) else None

    @property
    def bound(self) -> float | None:
        """b of what it makes, in [-b, b]; None for latents."""
        return 1.0 if self.scaling_factor is None else None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of a conditional model, () of any other."""
        pipeline = self.pipeline
        if not isinstance(pipeline, ClassConditionalPipeline | LatentPipeline | TablePipeline):
            return ()
        if null_class(network_of(pipeline)) is None:
            return ()
        return tuple(pipeline.columns.classes if isinstance(pipeline, TablePipeline) else pipeline.classes)

    @property
    def about(self) -> dict[str, Any]:
        """What stands in a report about the network."""
        network: Any = network_of(self.pipeline)
        parameters = sum(p.numel() for p in network.parameters()) if hasattr(network, "parameters") else None
        return {
            "name": type(network).__name__,
            "parameters": parameters,
            "prediction": self.denoiser.prediction,
            "head": self.denoiser.head,
            "schedule": type(self.denoiser.schedule).__name__,
            "fingerprint": self.denoiser.schedule.fingerprint,
        }


def _class_of(pipeline: Any, label: str) -> int:
    """The number of a class of a model."""
    conditional = isinstance(pipeline, ClassConditionalPipeline | LatentPipeline | TablePipeline)
    if not conditional or null_class(network_of(pipeline)) is None:
        raise UserError(
            f"--label is {label!r}, and the model has no classes; leave it out, or train with --conditional"
        )
    names = pipeline.columns.classes if isinstance(pipeline, TablePipeline) else pipeline.classes
    if not names:
        raise UserError(f"--label is {label!r}, and the model was trained without classes; leave it out")
    return class_number(label, names)


def model_of(pipeline: Any, device: torch.device, label: str | None = None, guidance: float = 1.0) -> Model:
    """An opened pipeline as a `Model` on a device.

    Args:
        pipeline: the pipeline.
        device: where to put it.
        label: class, by name or number; None: all classes.
        guidance: scale of classifier-free guidance.

    Raises:
        UserError: if it works on latents, or its network is not one that is called with images alone.
    """
    for name in ("vae", "vqvae", "movq"):
        if getattr(pipeline, name, None) is not None:
            raise UserError(
                f"{type(pipeline).__name__} makes latents, and the command line works on images; in a program put "
                "lowvar.schedulers.ReverseVarianceScheduler into the pipeline"
            )
    pipeline.to(device)
    number = None if label is None else _class_of(pipeline, label)
    denoiser = denoiser_of(pipeline, class_labels=number, guidance=guidance)
    network: Any = denoiser.network
    if hasattr(network, "eval"):
        network.eval().requires_grad_(False)
    calibration = getattr(pipeline.scheduler, "calibration", None)
    if calibration is not None:
        calibration.require(denoiser.schedule)
        calibration = calibration.reading(number, guidance)
    return Model(pipeline, denoiser, calibration, event_shape_of(pipeline))


def open_model(folder: Path, device: torch.device, label: str | None = None, guidance: float = 1.0) -> Model:
    """A pipeline folder as a `Model`; arguments as of `model_of`.

    Raises:
        UserError: if it is no pipeline folder, holds pickles, or its calibration is of another schedule.
    """
    from diffusers.utils import logging

    logging.disable_progress_bar()
    return model_of(open_pipeline(folder), device, label, guidance)


def fitting(model: Model, data: Data) -> Data:
    """The data as the network takes them: latents with the factor that it was trained with.

    Raises:
        UserError: if the network takes others.
    """
    require_shape(model, data.shape)
    factor = model.scaling_factor
    if (factor is None) != (data.scaling_factor is None):
        kinds = ("latents", "images") if factor is not None else ("images", "latents")
        raise UserError(f"the network takes {kinds[0]} and the data are {kinds[1]}; give data that fit")
    if factor is None or factor == data.scaling_factor:
        return data
    splits = (data.train, data.calibration, data.test)
    made = [split.rescaled(factor) for split in splits if isinstance(split, ArrayImages)]
    assert len(made) == len(splits), "latents come from arrays"
    return replace(data, train=made[0], calibration=made[1], test=made[2], scaling_factor=factor)


def require_shape(model: Model, shape: Sequence[int]) -> None:
    """Raises UserError unless images or rows of this shape are what the network takes."""
    if len(shape) != len(model.shape):
        kinds = ["rows of a table" if len(s) == 1 else "images" for s in (model.shape, shape)]
        raise UserError(f"the network takes {kinds[0]} and the data are {kinds[1]}; give data that fit")
    if len(shape) == 1 and tuple(shape) != model.shape:
        raise UserError(
            f"the network takes rows of {model.shape[0]} numbers and the table has {shape[0]}; give the table it was "
            "trained on, or one with the same columns"
        )
    if tuple(shape) != model.shape:
        wanted, given = ("x".join(map(str, s)) for s in (model.shape, shape))
        hint = ""
        if model.bound is not None and shape[0] == model.shape[0] and model.shape[1] == model.shape[2]:
            hint = f", for example --size {model.shape[1]}"
        many = "images" if model.scaling_factor is None else "latents"
        raise UserError(
            f"the network takes {many} of {wanted} (channels x height x width) and the data has {given}; "
            f"give data that fits{hint}"
        )


USUAL = (
    *("ddpm-small", "ddpm-large", "ddpm-learned", "ddpm-isotropic", "ddpm-basis", "ddim", "ddim-basis"),
    *("unipc-basis", "adams-ode", "twin-ode", "twin-sde", "twin-flow"),
)
"""Samplers that `lowvar evaluate` runs unless others are asked for."""


def default_samplers(model: Model) -> list[str]:
    """The usual samplers that the model has what it takes for, and those of trained heads and noise that it holds."""
    held = () if model.calibration is None else model.calibration.state_covariances
    heads = [name for name in held if name != "convert" or model.denoiser.head == "range"]
    kept = () if model.calibration is None else {d.solver for d in model.calibration.deficits}
    return [
        name
        for name, sampler in SAMPLERS.items()
        if (name in USUAL or sampler.covariance in heads or (sampler.noise and describe(sampler.solver) in kept))
        and (sampler.covariance is None or model.calibration is not None or sampler.covariance == "learned")
        and (sampler.covariance != "learned" or model.denoiser.head is not None)
        and (not (sampler.needs_twin or sampler.noise) or model.calibration is not None)
    ]


def save_model(
    model: Model, folder: Path, calibration: Calibration, *, sampler: str | None = None, grid: str | None = None
) -> None:
    """Writes the model's pipeline with our scheduler in the place of its own.

    Args:
        model: the model.
        folder: to write into.
        calibration: for the scheduler to hold.
        sampler, grid: of the scheduler; None: what the model's scheduler stands for.
    """
    import diffusers

    given = {"sampler": sampler, "grid": grid, "head": model.denoiser.head}
    fields = {name: value for name, value in given.items() if value is not None}
    if isinstance(model.pipeline, OWN_PIPELINES):  # they call scale_model_input, which DDPMPipeline does not
        fields["start_with_twin"] = "input"
    scheduler = ReverseVarianceScheduler.from_scheduler(model.pipeline.scheduler, calibration, **fields)
    pipeline = model.pipeline
    if isinstance(pipeline, diffusers.DDIMPipeline):  # it would turn any scheduler into a DDIMScheduler
        pipeline = diffusers.DDPMPipeline(pipeline.unet, scheduler)  # type: ignore[arg-type]
    else:
        pipeline.register_modules(scheduler=scheduler)
    pipeline.save_pretrained(str(folder), safe_serialization=True)


def scheduler_of(
    model: Model,
    sampler: str | None = None,
    *,
    covariance: str | None = None,
    eta: float | None = None,
    tau: float | None = None,
    grid: str | None = None,
) -> ReverseVarianceScheduler:
    """The folder's scheduler as ours, with what was asked for instead of its own settings.

    Args:
        model: the model.
        sampler: a name of `lowvar.sample.SAMPLERS`; None keeps the folder's.
        covariance: of the first-order kernels: small, large, learned, or one that the calibration holds.
        eta: of the first-order kernels.
        tau: of the multistep samplers.
        grid: name of a step grid; None keeps the folder's, or the named sampler's own.

    Raises:
        UserError: for an unknown name, a setting that does not belong to the sampler, or a missing calibration.
    """
    fields: dict[str, Any] = {} if model.denoiser.head is None else {"head": model.denoiser.head}
    if sampler is not None:
        if sampler not in SAMPLERS:
            raise UserError(f"sampler is {sampler!r}; allowed: {', '.join(SAMPLERS)}")
        if SAMPLERS[sampler].covariance == "learned" and model.denoiser.head is None:
            raise UserError(f"sampler {sampler} needs a network with a variance head, and this one has none")
        fields |= {"sampler": sampler, "grid": SAMPLERS[sampler].grid}
    given = {"variance": covariance, "eta": eta, "tau": tau, "grid": grid}
    fields |= {name: value for name, value in given.items() if value is not None}
    fields["start_with_twin"] = True
    made = ReverseVarianceScheduler.from_scheduler(model.pipeline.scheduler, model.calibration, **fields)
    kernel = made.config["sampler"] == "kernel"
    if tau is not None and kernel:
        raise UserError("--tau belongs to adams-* and twin-* samplers; ddpm-* and ddim-* take --eta")
    if (eta is not None or covariance is not None) and not kernel:
        raise UserError("--eta and --covariance belong to ddpm-* and ddim-* samplers; adams-* and twin-* take --tau")
    return made


def noise_ready(
    model: Model, scheduler: ReverseVarianceScheduler, steps: int, *, batch_size: int, device: torch.device
) -> tuple[ReverseVarianceScheduler, int]:
    """A scheduler whose sampler adds calibrated noise, with that of its grid; any other as it is.

    Args:
        model: the model.
        scheduler: of the model.
        steps: reverse steps.
        batch_size, device: of the network's evaluations.

    Returns:
        The scheduler, and chains that the noise was measured on now: 0 where it was kept.
    """
    named = SAMPLERS.get(scheduler.config["sampler"])
    calibration = scheduler.calibration
    if named is None or not named.noise or calibration is None:
        return scheduler, 0
    scheduler.set_timesteps(steps)
    _, attached = resolve(named.name, model.denoiser, calibration)
    found = deficit_of(attached, named.solver, scheduler.times, calibration, batch_size=batch_size, device=device)
    if any(found is kept for kept in calibration.deficits):
        return scheduler, 0
    return ReverseVarianceScheduler.from_scheduler(scheduler, calibration.with_deficit(found)), found.n


@torch.no_grad()
def run_scheduler(
    model: Model,
    scheduler: ReverseVarianceScheduler,
    steps: int,
    n: int,
    noise: NoiseSource,
    *,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Samples 0 .. n - 1 through the scheduler, as a pipeline would, but with noise a sample.

    Returns:
        float32 (n, *shape) in [-1, 1], latents without bound and scaled, on the CPU.

    Raises:
        UserError: for a number of steps that the schedule does not have.
    """
    check_steps(steps, model.denoiser.schedule)
    network: Any = model.denoiser.network
    scheduler.set_timesteps(steps, device=device)
    discrete = isinstance(model.denoiser.schedule, DiscreteVP)
    parts = []
    for index in torch.arange(n).split(batch_size):
        x = scheduler.start(noise.normal(index, model.shape, draw=0, device=device))
        for t in scheduler.timesteps:
            timestep = t if discrete else t.float()
            entry = scheduler.scale_model_input(x, t)
            out = network(entry, timestep.expand(len(x)), **model.denoiser.conditioning)
            out = out if isinstance(out, Tensor) else (out[0] if isinstance(out, tuple) else out.sample)
            x = scheduler.step(out, t, x, generator=noise, index=index).prev_sample
            if progress is not None:
                progress(len(index))
        parts.append((x.float() if model.bound is None else x.float().clamp(-model.bound, model.bound)).cpu())
    return torch.cat(parts)
