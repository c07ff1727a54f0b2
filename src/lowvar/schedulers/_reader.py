"""Reading a network's output, with or without a variance head, as a posterior."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.process.denoiser import NetworkDenoiser, Prediction, from_prediction
from lowvar.process.head import HEADS, Head, Spectrum, rank_of
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule

__all__ = ["Reader"]


class Reader:
    """What the output of a network that somebody else calls means.

    Args:
        schedule, prediction, head, clip, sigma_data: as for `NetworkDenoiser`.
        needs_head: whether the head is used; an output without one is then refused.
        levels: at which the network is asked, (N,).
        spectrum: as for `NetworkDenoiser`.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction,
        head: str | None,
        clip: float | None,
        sigma_data: float,
        needs_head: bool,
        levels: Level,
        spectrum: Spectrum | None = None,
    ) -> None:
        kind = cast("Head | None", head)
        self._denoiser = NetworkDenoiser(_nobody, schedule, prediction, kind, clip, sigma_data, spectrum=spectrum)
        self._needs_head, self._levels = needs_head, levels
        self._without_signal: list[bool] = (levels.alpha == 0).tolist()
        # x0_hat is linear in the state and the output
        one, zero = torch.ones_like(levels.alpha), torch.zeros_like(levels.alpha)
        self._of_x = from_prediction(prediction, one, zero, levels, sigma_data).tolist()
        self._of_output = from_prediction(prediction, zero, one, levels, sigma_data).tolist()

    def read(self, x: Tensor, k: int, output: Tensor, kept: Tensor | None = None) -> Posterior:
        """The posterior at states x.

        Args:
            x: states, (B, C, ..), float32 or float64.
            k: number of the evaluation.
            output: C or 2C channels.
            kept: the head's C channels where somebody cut them off the output: for as many samples, or for the two
                halves of a guided batch, of which the second is conditional.

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
        if self._needs_head and head is None and kept is not None:
            head = _rows(kept, x).to(x.dtype)
        if self._needs_head and head is None:
            raise UserError(
                f"variances 'learned' and 'convert' need the network's {2 * C} channels, got {C}: this pipeline cuts "
                "the head off (DiTPipeline and PixArt do); call lowvar.pipelines.keep_head(pipeline), or choose "
                "another variance"
            )
        if self._without_signal[k] and self._denoiser.prediction == "epsilon":
            raise UserError(
                "at zero signal-to-noise ratio a prediction of the noise says nothing about x_0: take a network that "
                "predicts v or x_0, or a grid that starts later (timestep_spacing='leading')"
            )
        if self._needs_head:
            return self._denoiser.interpret(x, self._levels[k], out, head)
        return Posterior(self._mean(x, k, out))

    def _mean(self, x: Tensor, k: int, out: Tensor) -> Tensor:
        a, b, bound = self._of_x[k], self._of_output[k], self._denoiser.clip
        if a == 0 and b == 1:
            return out if bound is None else out.clamp(-bound, bound)
        mean = (x * a).add_(out, alpha=b)
        return mean if bound is None else mean.clamp_(-bound, bound)

    def scale(self, x: Tensor, k: int) -> Tensor:
        """What the network is given for a state: c_in y with `edm` predictions, else the state."""
        if self._denoiser.prediction != "edm":
            return x
        level, data = self._levels[k], self._denoiser.sigma_data
        return x / float(torch.sqrt(level.sigma**2 + (level.alpha * data) ** 2))


def _rows(kept: Tensor, x: Tensor) -> Tensor:
    if kept.shape == x.shape:
        return kept
    if kept.shape[0] == 2 * x.shape[0] and kept.shape[1:] == x.shape[1:]:
        return kept[x.shape[0] :]
    raise UserError(
        f"the kept variance head has shape {tuple(kept.shape)} for a sample {tuple(x.shape)}; needed: one a "
        "sample, or two (unconditional, conditional) with guidance"
    )


def _nobody(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("the network belongs to the pipeline")
