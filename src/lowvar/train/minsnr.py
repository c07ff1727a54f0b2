r"""Min-SNR weighting (Hang et al. 2023, "Efficient diffusion training via Min-SNR weighting strategy").

    w = min(snr, gamma) on ||x_0 - x0_hat||^2,

so min(snr, gamma) / snr on the epsilon loss and min(snr, gamma) / (snr + 1) on the v loss. Label: changes the
objective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowvar.process.denoiser import Prediction
from lowvar.train.objectives import Label, Weighting

__all__ = ["MinSNR"]


@dataclass(frozen=True)
class MinSNR(Weighting):
    """w = min(snr, gamma).

    Args:
        gamma: > 0; the paper's 5.

    Example:
        >>> import torch
        >>> logsnr = torch.log(torch.tensor([1.0, 20.0]))
        >>> [round(v, 4) for v in MinSNR().target_weight(logsnr, "epsilon").tolist()]
        [1.0, 0.25]
    """

    gamma: float = 5.0
    label: ClassVar[Label] = "changes the objective"

    def __post_init__(self) -> None:
        """Refuses a gamma that is not positive."""
        if self.gamma <= 0:
            raise ValueError(f"gamma is {self.gamma}; give a number above 0 (the paper's is 5)")

    def log_weight(self, logsnr: Tensor, prediction: Prediction, sigma_data: float = 0.5) -> Tensor:
        """See the base class."""
        return logsnr.double().clamp_max(math.log(self.gamma))
