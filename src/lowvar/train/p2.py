r"""P2 weighting (Choi et al. 2022, "Perception prioritized training of diffusion models", Eq. 8).

    1 / (k + snr)^gamma on the epsilon loss,  so  w = snr / (k + snr)^gamma on ||x_0 - x0_hat||^2.

Label: changes the objective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.process.denoiser import Prediction
from lowvar.train.objectives import Label, Weighting

__all__ = ["P2"]


@dataclass(frozen=True)
class P2(Weighting):
    """w = snr / (k + snr)^gamma.

    Args:
        gamma: >= 0; 0 is the plain epsilon loss, the paper uses 0.5 and 1.
        k: > 0; the paper's 1.

    Example:
        >>> float(P2().target_weight(torch.tensor(0.0), "epsilon"))
        0.5
    """

    gamma: float = 1.0
    k: float = 1.0
    label: ClassVar[Label] = "changes the objective"

    def __post_init__(self) -> None:
        """Refuses parameters out of range."""
        if self.gamma < 0 or self.k <= 0:
            raise ValueError(f"gamma is {self.gamma} and k {self.k}; need gamma >= 0 and k > 0")

    def log_weight(self, logsnr: Tensor, prediction: Prediction, sigma_data: float = 0.5) -> Tensor:
        """See the base class."""
        logsnr = logsnr.double()
        return logsnr - self.gamma * torch.logaddexp(logsnr, torch.full_like(logsnr, math.log(self.k)))
