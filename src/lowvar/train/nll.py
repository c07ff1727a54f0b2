r"""The Gaussian likelihood of the data given a state, which trains a head for Cov[x_0 | x_t].

    NLL = -log N(x_0; x0_hat, C) / d = [(x_0 - x0_hat)^T C^-1 (x_0 - x0_hat) + logdet C + d log 2 pi] / (2 d)

in bits a dimension, with the C of any head of `lowvar.process.head` but `range`. Given x_t its minimum is, over all
diagonal C, C_ii = E (x_0 - x0_hat)_i^2; over all C diagonal in a basis, the same along its directions; over all C,
E (x_0 - x0_hat)(x_0 - x0_hat)^T: the posterior covariance where the mean is the posterior mean (Kendall & Gal 2017; for
diffusion posteriors Bao et al. 2022b), and with it the square of the mean's own error elsewhere. Values of different
heads compare: the lower, the more of C the head's family holds. Unlike the bound of a step the likelihood does not
depend on the grid, so the head serves any number of reverse steps.

With the mean not detached (`Objective.detach_mean`) errors of the mean count relative to C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lowvar.process.denoiser import NetworkDenoiser, from_prediction
from lowvar.process.head import COVARIANCE_HEADS, covariance_of
from lowvar.process.kernel import Gaussian
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.train.objectives import VarianceTerm

__all__ = ["PosteriorNLL", "posterior_of"]


def posterior_of(denoiser: NetworkDenoiser, x: Tensor, level: Level, out: Tensor, head: Tensor) -> Posterior:
    """The posterior that a prediction and a raw covariance head stand for, unclipped, float64.

    Raises:
        ValueError: if the network's head is not one for Cov[x_0 | x_t].
    """
    if denoiser.head is None or denoiser.head not in COVARIANCE_HEADS:
        raise ValueError(
            f"this likelihood trains the heads {', '.join(COVARIANCE_HEADS)}, the network has {denoiser.head!r}"
        )
    mean = from_prediction(denoiser.prediction, x, out, level, denoiser.sigma_data)
    covariance = covariance_of(denoiser.head, head.double(), level, x.shape[1], denoiser.spectrum)
    return Posterior(mean.double(), covariance)


@dataclass(frozen=True)
class PosteriorNLL(VarianceTerm):
    """weight * NLL for networks with a head for Cov[x_0 | x_t].

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
        """See the base class; float64."""
        posterior = posterior_of(denoiser, x, level, out, head)
        assert posterior.covariance is not None
        law = Gaussian(posterior.mean, posterior.covariance)
        return -law.log_prob(x0.double()) / (x0[0].numel() * math.log(2.0))
