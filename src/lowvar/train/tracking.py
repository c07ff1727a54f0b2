"""Trackers and pictures of a run: what is logged, and grids of samples.

Trackers are accelerate's (TensorBoard: RUN/tracking, read with `tensorboard --logdir RUN`). Every update logs the loss,
the learning rate and the gradient's norm before clipping; every validation its loss with both ends of the interval, the
error, the bounds of the least error, the loss by noise level, the noise scale and the throughput.

A grid of samples is drawn from the averaged weights by DPM-Solver++(2M) in 20 steps from noise that is the same every
time, so pictures of different updates compare place by place; classes, where the network has them, go round.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowvar.errors import UserError
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.dpm_solver_pp import DPMSolverPP
from lowvar.process.grid import trailing
from lowvar.process.noise import Independent
from lowvar.sample import generate
from lowvar.train.conditional import of_classes
from lowvar.train.records import Update, Validation

__all__ = [
    "check_pictures",
    "check_trackers",
    "contact_sheet",
    "draw_picture",
    "draw_samples",
    "save_picture",
    "scalars",
    "start_trackers",
    "stop_trackers",
]

SIDE = 6  # pictures along a side of the grid
_STEPS = 20


def check_trackers(names: Sequence[str], folder: Path | None) -> None:
    """Refuses trackers that are not installed, or have no folder to write to.

    Raises:
        UserError: one sentence.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"trackers names {name}, which is not installed; pip install 'lowvar[track]', or leave trackers out"
            )
        if folder is None:
            raise UserError(f"trackers names {name}, and the run has no folder for its files; give one")


def check_pictures(shape: Sequence[int], folder: Path | None, *, latent: bool = False) -> None:
    """Refuses grids of samples where there is no folder, or the data are no pictures.

    Raises:
        UserError: one sentence.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(
            f"sample_every draws pictures of 1 or 3 channels, and the data have shape {tuple(shape)}; leave it out"
        )
    if latent:
        raise UserError("sample_every draws pictures, and the data are latents, which are none; leave it out")
    if folder is None:
        raise UserError("sample_every writes pictures, and the run has no folder for them; give one")


def scalars(record: Update | Validation) -> dict[str, float]:
    """What a record is in a tracker, without numbers that are not finite.

    Example:
        >>> scalars(Update(3, 0.5, 1.25, 1e-3))
        {'train/loss': 0.5, 'train/gradient norm': 1.25, 'train/lr': 0.001}
    """
    if isinstance(record, Update):
        found = {"train/loss": record.loss, "train/gradient norm": record.grad_norm, "train/lr": record.lr}
    else:
        v = record.validation
        found = {
            "validation/loss": v.loss,
            "validation/loss low": v.low,
            "validation/loss high": v.high,
            "validation/error": v.error,
            "train/images a second": record.images_per_second,
        }
        found |= {f"validation by logsnr/{b.logsnr:+.1f}": b.loss for b in v.bins}
        if record.optimum is not None:
            found |= {"optimum/low": record.optimum.low, "optimum/high": record.optimum.high}
        if record.noise_scale is not None:
            scale = record.noise_scale
            found |= {"noise scale/value": scale.value, "noise scale/low": scale.low, "noise scale/high": scale.high}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def draw_samples(
    denoiser: NetworkDenoiser, shape: Sequence[int], seed: int, classes: int | None, device: torch.device | str
) -> Tensor:
    """The samples of a grid, (36, C, H, W) in [-1, 1], on the CPU."""
    n = SIDE**2
    own = denoiser if classes is None else of_classes(denoiser, torch.arange(n, device=device) % classes)
    grid = trailing(denoiser.schedule, _STEPS)
    return generate(own, DPMSolverPP(), grid, shape, n, Independent(seed), batch_size=n, clip=1.0, device=device)


def draw_picture(
    accelerator: Any,
    denoiser: NetworkDenoiser,
    path: Path,
    update: int,
    shape: Sequence[int],
    seed: int,
    classes: int | None,
) -> None:
    """Draws a grid of samples to `path` and to the trackers.

    Args:
        accelerator: of the run.
        denoiser: of the averaged weights.
        path: of the PNG.
        update: updates done.
        shape: of a sample.
        seed: of the noise.
        classes: their number; None without.
    """
    with accelerator.autocast():
        picture = contact_sheet(draw_samples(denoiser, shape, seed, classes, accelerator.device))
    save_picture(path, picture)
    for tracker in accelerator.trackers:
        tracker.log_images({"samples": picture[None]}, step=update, dataformats="NHWC")


def contact_sheet(images: Tensor) -> NDArray[np.uint8]:
    """Pictures (n, C, H, W) in [-1, 1] as one, row by row with a gap of a pixel: (height, width, C) uint8.

    Example:
        >>> contact_sheet(torch.zeros(36, 1, 8, 8)).shape
        (53, 53, 1)
    """
    n, channels, height, width = images.shape
    rows = math.ceil(n / SIDE)
    page = np.full((rows * (height + 1) - 1, SIDE * (width + 1) - 1, channels), 255, dtype=np.uint8)
    values = torch.nan_to_num(images, 0.0, 1.0, -1.0).clamp(-1, 1)
    tiles = ((values + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    for i, tile in enumerate(tiles):
        y, x = (i // SIDE) * (height + 1), (i % SIDE) * (width + 1)
        page[y : y + height, x : x + width] = tile
    return page


def save_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Writes a PNG, there entirely or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    from PIL import Image

    partial = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture if picture.shape[2] == 3 else picture[:, :, 0]).save(partial, format="PNG")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write the samples {path} ({error.strerror or error}); make room, then go on with --resume"
        ) from None


def start_trackers(accelerator: Any, update: int) -> None:
    """Begins to log after `update` updates; what was logged of later ones before an interruption is dropped."""
    accelerator.init_trackers("tracking", init_kwargs={"tensorboard": {"purge_step": update + 1}})


def stop_trackers(accelerator: Any) -> None:
    """Ends the logging; the processes stay together."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
