"""Reading a network's output, with or without a variance head, as a posterior."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from lowvar.errors import UserError
from lowvar.process.covariance import Covariance
from lowvar.process.denoiser import NetworkDenoiser, Prediction
from lowvar.process.head import HEADS, Head, Spectrum, rank_of
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule

__all__ = ["Reader"]


class Reader:
    """What the output of a network that somebody else calls means.

    Args:
        schedule, prediction, head, clip: as for `NetworkDenoiser`.
        needs_head: whether an output without a head is refused.
        spectrum: as for `NetworkDenoiser`.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction,
        head: str | None,
        clip: float | None,
        needs_head: bool,
        spectrum: Spectrum | None = None,
    ) -> None:
        kind = cast("Head | None", head)
        self._denoiser = NetworkDenoiser(_nobody, schedule, prediction, kind, clip, spectrum=spectrum)
        self._needs_head = needs_head

    def read(self, x: Tensor, level: Level, without_signal: bool, output: Tensor) -> Posterior:
        """The posterior at states x.

        Raises:
            UserError: if the output does not fit the states or what is asked of it.
        """
        out, head, C = output.to(x.dtype), None, x.shape[1]
        if out.shape[1] == 2 * C and self._denoiser.head is None:
            raise UserError(
                f"the network returned {2 * C} channels for {C}: it has a variance head; name it (head="
                f"{', '.join(map(repr, HEADS))})"
            )
        if self._denoiser.head is not None and rank_of(self._denoiser.head, C, out.shape[1]) is not None:
            out, head = out[:, :C], out[:, C:]
        if out.shape != x.shape:
            raise UserError(f"the network returned shape {tuple(output.shape)} for a sample {tuple(x.shape)}")
        if self._needs_head and head is None:
            raise UserError(
                f"variance 'learned' needs the network's {2 * C} channels, got {C}: this pipeline cuts the head off "
                "(DiTPipeline does); choose another variance"
            )
        if without_signal and self._denoiser.prediction == "epsilon":
            raise UserError(
                "at zero signal-to-noise ratio a prediction of the noise says nothing about x_0: take a network that "
                "predicts v or x_0, or a grid that starts later (timestep_spacing='leading')"
            )
        return self._denoiser.interpret(x, level, out, head)

    def attach(self, posterior: Posterior, covariance: Covariance | None) -> Posterior:
        """The posterior with a calibrated covariance: as measured, around the clipped mean.

        Raises:
            UserError: if it is for events of another shape.
        """
        if covariance is None:
            return posterior
        shape = posterior.mean.shape[1:]
        if covariance.event_shape != shape:
            raise UserError(
                f"the calibration is for samples {tuple(covariance.event_shape)}, got {tuple(shape)}: calibrate at "
                "this size"
            )
        return Posterior(posterior.mean, covariance, posterior.fraction)


def _nobody(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("the network belongs to the pipeline")
