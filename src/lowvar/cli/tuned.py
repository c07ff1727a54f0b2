"""What a tuning run leaves: what its pilot measured, samples along the way, the tuned pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvar.cli.models import Model
from lowvar.reward import Choice
from lowvar.schedulers import ReverseVarianceScheduler

__all__ = ["SHOWN", "about_choice", "read_samples", "save_samples", "save_tuned"]

SHOWN = 24  # samples of a check that the report shows


def about_choice(choice: Choice, why: str) -> dict[str, Any]:
    """What a pilot measured, and why it chose."""
    report = choice.report
    rows = [
        {
            "estimator": name,
            "bias": row.claim.label,
            "variance": row.variance,
            "low": row.low,
            "high": row.high,
            "evaluations": row.evaluations,
            "work": row.work,
        }
        for name, row in report.rows.items()
    ]
    return {"estimator": choice.estimator.name, "why": why, "rows": rows, "left_out": dict(report.left_out)}


def save_samples(partial: Path, update: int, samples: Tensor) -> None:
    """Keeps the first samples of a check in the unfinished run's folder."""
    import numpy as np

    folder = partial / "samples"
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{update:07d}.npy", samples[:SHOWN].numpy())


def read_samples(partial: Path) -> dict[str, Tensor]:
    """What `save_samples` kept, by what the report calls it."""
    import numpy as np

    files = sorted((partial / "samples").glob("*.npy"))
    return {f"after {int(f.stem)} updates": torch.from_numpy(np.load(f)) for f in files}


def save_tuned(model: Model, folder: Path, eta: float) -> None:
    """The tuned pipeline. Our scheduler gets the sampler that was tuned; a stock one stays as it is.

    Calibrated tables are of the network before, and are left out.
    """
    import diffusers

    pipeline, scheduler = model.pipeline, model.pipeline.scheduler
    if isinstance(scheduler, ReverseVarianceScheduler):
        fields: dict[str, Any] = {"sampler": "kernel", "variance": "small", "eta": eta, "grid": "trailing"}
        fields |= {"start_with_twin": False}
        made = ReverseVarianceScheduler.from_scheduler(scheduler, None, **fields)
        pipeline.register_modules(scheduler=made)
    assert isinstance(pipeline, diffusers.DiffusionPipeline)
    pipeline.save_pretrained(str(folder), safe_serialization=True)
