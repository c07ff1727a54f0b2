"""What a step of the scheduler returns."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor

__all__ = ["ReverseVarianceSchedulerOutput"]


@dataclass
class ReverseVarianceSchedulerOutput(BaseOutput):
    """What `step` returns.

    Attributes:
        prev_sample: x at the next, less noisy level: the network's next input.
        pred_original_sample: x0_hat of this step, clipped where `clip_sample` is set.
    """

    __module__ = "lowvar.schedulers"  # its one public path

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
