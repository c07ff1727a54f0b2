r"""The Gaussian likelihood that trains a direct log-variance head.

    NLL = -log N(x_0; x0_hat, C) / d,      C = exp(h) sigma^2 / (alpha^2 + sigma^2) pixel by pixel,

with the mean detached, in bits a dimension. Its minimum over C is C_i = E (x_0 - x0_hat)_i^2 given x_t, the posterior
variance where the mean is the posterior mean (Kendall & Gal 2017; for diffusion posteriors Bao et al. 2022b). Unlike
the bound of a step it does not depend on the grid, so the head serves any number of reverse steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.denoiser import NetworkDenoiser, expand, from_prediction
from lowvar.process.schedule import Level
from lowvar.train.objectives import VarianceTerm

__all__ = ["PosteriorNLL"]


@dataclass(frozen=True)
class PosteriorNLL(VarianceTerm):
    """weight * NLL for networks with `head="logvar"`.

    Args:
        weight: of the term; it trades what head and mean share, not the head's optimum.

    Example:
        >>> from lowvar.process import CosineVP
        >>> PosteriorNLL(0.5).factor(NetworkDenoiser(lambda x, t: x, CosineVP(), head="logvar"))
        0.5
    """

    weight: float = 0.01

    def factor(self, denoiser: NetworkDenoiser) -> float:
        """See the base class."""
        return self.weight

    def bits(self, denoiser: NetworkDenoiser, x0: Tensor, x: Tensor, level: Level, out: Tensor, head: Tensor) -> Tensor:
        """See the base class."""
        if denoiser.head != "logvar":
            raise ValueError(f"this likelihood trains head 'logvar', the network has {denoiser.head!r}")
        mean = from_prediction(denoiser.prediction, x, out, level, denoiser.sigma_data)
        logvar = head.clamp(max=20.0) + expand(torch.log(level.sigma**2 / (level.alpha**2 + level.sigma**2)), head)
        nats = 0.5 * (logvar + (x0 - mean) ** 2 * torch.exp(-logvar) + math.log(2 * math.pi))
        return nats.flatten(1).mean(1) / math.log(2.0)
