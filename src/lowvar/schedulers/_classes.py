"""The classes that a pipeline samples: which tables of a calibration belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.calibrate.calibration import Calibration
from lowvar.errors import UserError

__all__ = ["EVERY", "Classes"]


@dataclass(frozen=True, eq=False)
class Classes:
    """Classes of the samples of a batch.

    Attributes:
        labels: (n,) on the CPU, of n samples or a whole multiple of n; None: all classes.
        guidance: scale of classifier-free guidance.
    """

    labels: Tensor | None = None
    guidance: float = 1.0

    @classmethod
    def of(
        cls, labels: int | Sequence[int] | Tensor | None, guidance: float, calibration: Calibration | None
    ) -> Classes:
        """Classes as a caller gives them.

        Raises:
            UserError: for a class that the calibration has no table of, where it has tables by class.
        """
        if labels is None:
            return cls(None, float(guidance))
        given = torch.as_tensor(labels).detach().cpu().long().reshape(-1)
        count = 0 if calibration is None else calibration.classes
        if not len(given):
            raise UserError("class_labels is empty; give one class number, or one for each sample")
        if count and bool(((given < 0) | (given >= count)).any()):
            raise UserError(f"class_labels is {given.tolist()}; calibrated classes: 0 to {count - 1}")
        return cls(given, float(guidance))

    @property
    def several(self) -> bool:
        """Whether the samples are of more than one class."""
        return self.labels is not None and bool((self.labels != self.labels[0]).any())

    def tables(self, calibration: Calibration) -> tuple[Calibration, Tensor | None]:
        """The calibration to read and, where samples of several classes have tables of their own, the labels."""
        if self.labels is None:
            return calibration, None
        found = calibration.reading(int(self.labels[0]), self.guidance)
        if found is calibration:
            return calibration, None
        return (calibration, self.labels) if self.several else (found, None)


EVERY = Classes()
