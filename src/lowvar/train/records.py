"""What a training run reports: typed, frozen records."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvar.train.noise_scale import NoiseScaleEstimate
from lowvar.train.validation import ValidationLoss

__all__ = ["Record", "Saved", "Update", "Validation"]


@dataclass(frozen=True)
class Update:
    """One update was made.

    Attributes:
        update: updates done.
        loss: of the batch, over all processes.
        grad_norm: before clipping.
        lr: learning rate used.
    """

    update: int
    loss: float
    grad_norm: float
    lr: float


@dataclass(frozen=True)
class Validation:
    """The averaged weights were validated.

    Attributes:
        update: updates done.
        loss: mean training loss since the last validation.
        validation: validation loss with interval and bins.
        seconds: training time so far, over all resumed parts.
        images_per_second: training throughput since the last validation.
        noise_scale: of the gradient, where it is measured and there are measurements enough.
    """

    update: int
    loss: float
    validation: ValidationLoss
    seconds: float
    images_per_second: float
    noise_scale: NoiseScaleEstimate | None = None

    def record(self) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        v = self.validation
        found = {
            "update": self.update,
            "loss": self.loss,
            "validation_loss": v.loss,
            "low": v.low,
            "high": v.high,
            "population_low": v.population_low,
            "population_high": v.population_high,
            "validation_error": v.error,
            "validation_variance": v.variance,
            "bins": [{"logsnr": b.logsnr} | dataclasses.asdict(b) for b in v.bins],
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 1),
        }
        if self.noise_scale is not None:
            scale = {k: _finite(x) for k, x in dataclasses.asdict(self.noise_scale).items()}
            found["noise_scale"] = scale | {"advice": self.noise_scale.advice}
        return found


def _finite(x: float) -> float | None:
    """JSON has no infinity: null there."""
    return x if math.isfinite(x) else None


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written.

    Attributes:
        update: updates done.
        path: its folder.
    """

    update: int
    path: Path


Record = Update | Validation | Saved
