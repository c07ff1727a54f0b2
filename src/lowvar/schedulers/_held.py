"""What a scheduler holds beside its config: tensors, and the calibration and spectrum that they and the config make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lowvar.calibrate.calibration import Calibration
from lowvar.errors import UserError
from lowvar.process.head import Spectrum
from lowvar.process.schedule import Schedule
from lowvar.schedulers._storage import CALIBRATION_FILE, names_tensors, spectrum_from_json, spectrum_to_json

__all__ = ["Held"]


class Held:
    """Values as they were given, or as the fields of a config say, read when they are first asked for.

    Args:
        calibration: a `Calibration`, the JSON fields of one, or None.
        spectrum: a `Spectrum`, the JSON fields of one, or None.

    Attributes:
        fields: JSON fields of what was given as values, for the config.
        tensors: of the file beside the config.
    """

    def __init__(self, calibration: Any, spectrum: Any) -> None:
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._calibration: Calibration | None = None
        if isinstance(calibration, Calibration):
            self.fields["calibration"], self.tensors = calibration.to_json()
            self._calibration = calibration
        if isinstance(spectrum, Spectrum):
            self.fields["spectrum"], tensors = spectrum_to_json(spectrum)
            self.tensors = {**self.tensors, **tensors}

    def is_complete(self, fields: Mapping[str, Any] | None) -> bool:
        """Whether these fields, of a calibration or a spectrum, can be read: the tensors they name are there."""
        return bool(self.tensors) or fields is None or not names_tensors(fields)

    def calibration(self, config: Mapping[str, Any]) -> Calibration | None:
        """The calibration, or None.

        Raises:
            UserError: if the config came without the tensors beside it, or does not fit together.
        """
        fields = config.get("calibration")
        if self._calibration is None and fields is not None:
            if not self.is_complete(fields):
                raise UserError(
                    f"this scheduler's config came without {CALIBRATION_FILE}, which holds the calibrated basis: load "
                    "it with from_pretrained, or give the calibration to ReverseVarianceScheduler.from_scheduler"
                )
            self._calibration = Calibration.from_json(fields, self.tensors)
        return self._calibration

    def spectrum(self, config: Mapping[str, Any]) -> Spectrum | None:
        """The spectrum of head basis, or None.

        Raises:
            UserError: if the config came without the tensors beside it, or does not fit together.
        """
        fields = config.get("spectrum")
        if fields is None:
            return None
        if not self.is_complete(fields):
            raise UserError(
                f"this scheduler's config came without {CALIBRATION_FILE}, which holds the basis of its head: load it "
                "with from_pretrained"
            )
        return spectrum_from_json(fields, self.tensors)

    def require_schedule(self, config: Mapping[str, Any], schedule: Schedule) -> None:
        """Refuses a calibration that was made for another schedule.

        Raises:
            UserError: naming both fingerprints.
        """
        fields = config.get("calibration")
        made_for = schedule.fingerprint if fields is None else fields.get("fingerprint")
        if made_for != schedule.fingerprint:
            raise UserError(
                f"the calibration of this scheduler was made for a noise schedule with fingerprint {made_for}, its own "
                f"has {schedule.fingerprint}: calibrate again with `lowvar calibrate --model MODEL --data DATA`"
            )
