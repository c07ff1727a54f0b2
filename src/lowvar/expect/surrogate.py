r"""The mixture twin's chain: a control variate that follows the network's chain round its bends, for no evaluation.

A Gaussian twin's chain is affine in the noise, so its value explains what is affine in f(x). The mixture twin
(`lowvar.process.mixture`), fitted to the same data, has a denoiser in closed form as well; the same solver on the
same noise then ends near the sampler's own sample, in the same mode, and f of it explains most of f(x) where the
mixture describes the data. No network is evaluated: a step costs K d multiplications.

Its expectation E f(x^) has no closed form and is itself estimated, by scrambled nets of the surrogate alone; the
error of that is in the interval (`lowvar.expect.design.OneStream`), and so is the cost, at a rate that stands
for its compute.

Source: this package's own; the idea is that of a surrogate in multifidelity Monte Carlo (Peherstorfer et al. 2016).
"""

from __future__ import annotations

from torch import Tensor

from lowvar.calibrate.table import CovarianceTable
from lowvar.process.denoiser import Denoiser, WithCovariance
from lowvar.process.mixture import MixtureTwin
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level

__all__ = ["SurrogateDenoiser"]


class SurrogateDenoiser(Denoiser):
    """The mixture twin in the place of a network; `nfe` is 0.

    The covariance is the calibrated table of the denoiser it stands for, where that has one, so that both chains get
    the same noise; else that of the mixture's Gaussian.

    Args:
        mixture: the mixture twin.
        denoiser: what it stands for.

    Example:
        >>> import torch
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.ones(2))
        >>> surrogate = SurrogateDenoiser(MixtureTwin.of(twin), twin.denoiser(CosineVP()))
        >>> surrogate(torch.ones(1, 2), CosineVP().at(0.5)).mean.shape
        torch.Size([1, 2])
    """

    nfe = 0

    def __init__(self, mixture: MixtureTwin, denoiser: Denoiser) -> None:
        self.mixture, self.schedule = mixture, denoiser.schedule
        table = denoiser.model if isinstance(denoiser, WithCovariance) else None
        self.table = table if isinstance(table, CovarianceTable) else None

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class."""
        found = self.mixture.posterior(x, level)
        if self.table is not None:
            return Posterior(found.mean, self.table(x, level, found))
        return Posterior(found.mean, self.mixture.gaussian.posterior(x[:1], level).covariance)  # whatever x is
