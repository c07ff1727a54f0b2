"""What stops a run before it reaches the weights: a loss or a gradient that is not finite, in one sentence."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.train.config import TrainConfig
from lowvar.train.draws import Draws
from lowvar.train.validation import BINS, ValidationSet, logsnr_edges

__all__ = ["NonFiniteError"]


class NonFiniteError(UserError):
    """The loss or its gradient stopped being finite; the sentence names the update and the noise levels."""

    @classmethod
    def of_losses(
        cls, losses: Tensor, draws: Draws, validation: ValidationSet, update: int, config: TrainConfig, kept: str
    ) -> Self:
        """For losses (n,) of draws, some of them not finite.

        Args:
            losses: of this process's samples.
            draws: the samples.
            validation: whose bins are named.
            update: updates done before.
            config: settings.
            kept: what is said of checkpoints.
        """
        bad = ~torch.isfinite(losses).cpu()
        least = validation.times.t_min
        edges = logsnr_edges(validation.schedule, least)
        place = (draws.level.t.cpu()[bad] - 1e-9 - least) / (1 - least)
        numbers = sorted({min(max(int(v * BINS), 0), BINS - 1) for v in place.tolist()})
        where = ", ".join(f"{edges[k + 1]:.2g} to {edges[k]:.2g}" for k in numbers) or "of another process"
        return cls(
            f"the loss is not finite at update {update + 1} in the logsnr bin {where} ({int(bad.sum())} of "
            f"{len(bad)} samples); lower lr (now {config.lr:g}) or train with mixed_precision no{kept}"
        )

    @classmethod
    def of_gradient(cls, update: int, config: TrainConfig, kept: str) -> Self:
        """For a gradient whose norm is not finite.

        Args:
            update: updates done before.
            config: settings.
            kept: what is said of checkpoints.
        """
        return cls(
            f"the gradient is not finite at update {update + 1}; lower lr (now {config.lr:g}) or "
            f"clip_grad (now {config.clip_grad:g}), or train with mixed_precision no{kept}"
        )
