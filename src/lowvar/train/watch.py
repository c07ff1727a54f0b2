"""What is seen of a run beside its updates: validations, their changes, the bounds of the least error, the targets.

None of it changes an update. What a validation says of the updates before it (their mean loss, their speed, what the
weights of target `stable` were like) is summed between validations, and is part of a checkpoint so that a resumed run
writes the same records.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.schedule import Schedule
from lowvar.train.conditional import Classes
from lowvar.train.config import TrainConfig
from lowvar.train.noise_scale import NoiseScale
from lowvar.train.objectives import Objective
from lowvar.train.optimum import OptimumBounds, optimum_bounds
from lowvar.train.processes import plain_times
from lowvar.train.records import Change, TargetRecord, Validation
from lowvar.train.stable_target import ReferencePlan, memorisation
from lowvar.train.streams import Known
from lowvar.train.together import summed
from lowvar.train.validation import BINS, ValidationSet

__all__ = ["Since", "Watch"]


@dataclass(frozen=True)
class Since:
    """Sums over the updates since the last validation.

    Attributes:
        loss: of their losses.
        updates: their number.
        seconds: their time.
        ess: of the mean effective sample sizes of their targets.
        alone: of the shares of targets that were one image.
    """

    loss: float = 0.0
    updates: int = 0
    seconds: float = 0.0
    ess: float = 0.0
    alone: float = 0.0

    def counted(self, loss: float, seconds: float, ess: float, alone: float) -> Since:
        """With one more update."""
        return Since(self.loss + loss, self.updates + 1, self.seconds + seconds, self.ess + ess, self.alone + alone)


class Watch:
    """The measurements of a run.

    Args:
        data: splits `train`, of which the bounds of the least error are made, and `calibration`, to validate on.
        config: settings.
        schedule: noise schedule.
        objective: what is minimised.
        sigma_data: of process edm.
        classes: of a conditional run.
        references: of target `stable`.
    """

    def __init__(
        self,
        data: Known,
        config: TrainConfig,
        schedule: Schedule,
        objective: Objective,
        sigma_data: float,
        classes: Classes | None,
        references: ReferencePlan | None,
    ) -> None:
        self._data, self._config, self._objective = data, config, objective
        self._classes, self._references = classes, references
        self.validation = ValidationSet(
            data.calibration,
            schedule,
            plain_times(config, schedule),
            prediction=config.prediction,
            weighting=objective.weighting,
            sigma_data=sigma_data,
        )
        self.since = Since()
        self._before: tuple[int, Tensor] | None = None  # update and losses of the last validation

    @functools.cached_property
    def optimum(self) -> OptimumBounds:
        """Bounds of the least error of any network on these data; they depend on the data alone."""
        own = self.validation
        return optimum_bounds(
            self._data.train,
            own.batches(),
            own.schedule,
            own.times,
            self._config.prediction,
            sigma_data=own.linear.sigma_data,
            labels=None if self._classes is None else self._classes.train,
            bins=BINS,
        )

    def validated(
        self, accelerator: Any, denoiser: NetworkDenoiser, update: int, seconds: float, scale: NoiseScale | None
    ) -> Validation:
        """The record of a validation, which all processes make together; the sums begin anew.

        Args:
            accelerator: of the run.
            denoiser: of the averaged weights.
            update: updates done.
            seconds: of all of them.
            scale: the noise scale so far.
        """
        a, since = accelerator, self.since
        with a.autocast():
            values = self.validation.values(
                denoiser,
                self._objective,
                a.process_index,
                a.num_processes,
                a.device,
                None if self._classes is None else self._classes.calibration,
            )
        values = summed(a, values)
        rate = since.updates * self._config.batch_size / since.seconds if since.seconds else math.nan
        record = Validation(
            update,
            since.loss / since.updates if since.updates else math.nan,
            self.validation.summary(values, self._objective.variance is not None),
            seconds,
            rate,
            scale.estimate() if scale is not None and scale.ready else None,
            self.optimum,
            self._change(update, values),
            target=self._about_targets(),
        )
        self.since = Since()
        return record

    def _change(self, update: int, values: Tensor) -> Change | None:
        """The change of the loss since the last validation, which these values replace."""
        before, self._before = self._before, (update, values[:, :1].clone())
        if before is None or before[0] == update:
            return None
        return Change(before[0], *self.validation.change(before[1], values))

    def _about_targets(self) -> TargetRecord | None:
        since = self.since
        if self._references is None or not since.updates:
            return None
        alone = since.alone / since.updates
        noun = "row" if len(self._data.shape) == 1 else "image"
        return TargetRecord(since.ess / since.updates, alone, memorisation(alone, self._references.source, noun))

    def state(self) -> tuple[list[float], dict[str, Tensor]]:
        """What a checkpoint keeps: the sums, and the losses of the last validation."""
        values = {} if self._before is None else {"update": torch.tensor(self._before[0]), "values": self._before[1]}
        return list(astuple(self.since)), values

    def restore(self, since: list[float], values: Mapping[str, Tensor]) -> None:
        """Goes on from a checkpoint's."""
        loss, updates, *rest = since
        self.since = Since(loss, int(updates), *rest)
        if values:
            self._before = int(values["update"]), values["values"]
