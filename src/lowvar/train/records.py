"""What a training run reports: typed, frozen records."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvar.train.noise_scale import NoiseScaleEstimate
from lowvar.train.optimum import OptimumBounds
from lowvar.train.validation import ValidationLoss

__all__ = ["Change", "Record", "Sampled", "Saved", "TargetRecord", "Update", "Validation"]


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
class TargetRecord:
    """What the weights of target `stable` were like since the last validation.

    Attributes:
        ess: mean effective sample size of the references.
        alone: share of the targets that were one image (see `StableInfo`).
        warning: a sentence where the targets memorise.
    """

    ess: float
    alone: float
    warning: str | None = None


@dataclass(frozen=True)
class Change:
    """By how much the validation loss changed.

    Attributes:
        since: update of the validation before.
        value: the difference; below 0 the loss fell.
        low, high: 95% interval, over times and noise on the same images.
    """

    since: int
    value: float
    low: float
    high: float


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
        optimum: bounds of the least error that any network can have on such data (`optimum`), against which
            `validation.error` is read.
        change: of the validation loss since the last validation, on common noise; None at the first.
        target: about the targets of the updates since then, where there were any and the target is `stable`.
    """

    update: int
    loss: float
    validation: ValidationLoss
    seconds: float
    images_per_second: float
    noise_scale: NoiseScaleEstimate | None = None
    optimum: OptimumBounds | None = None
    change: Change | None = None
    target: TargetRecord | None = None

    def record(self) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        v = self.validation
        found: dict[str, Any] = {
            "update": self.update,
            "loss": self.loss,
            "validation_loss": v.loss,
            "low": v.low,
            "high": v.high,
            "population_low": v.population_low,
            "population_high": v.population_high,
            "validation_error": v.error,
            "error_low": v.error_low,
            "error_high": v.error_high,
            "validation_variance": v.variance,
            "bins": [{"logsnr": b.logsnr} | dataclasses.asdict(b) for b in v.bins],
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 1),
        }
        if self.optimum is not None:
            found |= {"optimum_low": self.optimum.low, "optimum_high": self.optimum.high}
            for row, (low, high) in zip(found["bins"], self.optimum.bins, strict=True):
                row |= {"optimum_low": low, "optimum_high": high}
        if self.change is not None:
            found["change"] = dataclasses.asdict(self.change)
        if self.noise_scale is not None:
            scale = {k: _finite(x) for k, x in dataclasses.asdict(self.noise_scale).items()}
            found["noise_scale"] = scale | {"advice": self.noise_scale.advice}
        if self.target is not None:
            found["target"] = dataclasses.asdict(self.target)
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


@dataclass(frozen=True)
class Sampled:
    """Samples of the averaged weights were drawn.

    Attributes:
        update: updates done.
        path: their picture.
    """

    update: int
    path: Path


Record = Update | Validation | Saved | Sampled
