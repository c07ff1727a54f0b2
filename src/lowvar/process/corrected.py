r"""A corrected mean: how much of what a network adds to a control variate is worth keeping, by level and direction.

With D the denoiser of a twin, known in closed form, and r = x0_hat - D what the network adds to it,

    x0_hat'  =  D + a(l) r        along each direction of the twin's basis,

a the regression of x_0 - D on r: the coefficient of least E (x_0 - x0_hat')^2. The exact posterior mean has a = 1,
whatever the twin, since x_0 - x0_hat is uncorrelated with every function of x_t: nothing is changed. A network whose
remainder is its own error has a = 0, and the twin takes its place. The usual case is a network that predicts noise, at
high noise: x0_hat = (x - sigma eps_hat) / alpha multiplies its error by sigma / alpha, and a falls to 0 with the snr.

Directions are pooled in groups of similar variance (`lowvar.process.path.spread_groups`); between the levels measured a
is linear in logsnr, outside it keeps the value at the end. `lowvar.calibrate.fit_mean` measures it.

A covariance of the network's own is not handed on: it is that of another mean. A corrected denoiser is a denoiser:
what is calibrated on it is of its mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowvar.process.denoiser import Denoiser
from lowvar.process.mixture import MixtureTwin
from lowvar.process.path import spread_groups
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level

__all__ = ["CorrectedDenoiser", "MeanCorrection"]


@dataclass(frozen=True, eq=False)
class MeanCorrection:
    """Coefficients a at levels of noise.

    Attributes:
        twin: the control variate D.
        logsnr: levels, (L,) float64, increasing.
        coefficient: a by group of `spread_groups(twin.within)`, (L, G) float64.
        clip: bound b of data in [-b, b], to which the corrected mean is clipped, or None.

    Raises:
        ValueError: if the shapes do not fit or the levels do not increase.

    Example:
        >>> from lowvar.process.basis import PixelBasis
        >>> from lowvar.process.schedule import CosineVP
        >>> from lowvar.process.twin import GaussianTwin
        >>> twin = MixtureTwin.of(GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.ones(2)))
        >>> correction = MeanCorrection(twin, torch.tensor([-2.0, 2.0]), torch.tensor([[0.0], [1.0]]))
        >>> correction.at(0.0).tolist(), correction.at(-9.0).tolist()
        ([0.5, 0.5], [0.0, 0.0])
    """

    twin: MixtureTwin
    logsnr: Tensor
    coefficient: Tensor
    clip: float | None = None

    def __post_init__(self) -> None:
        """Checks shapes and order."""
        groups = int(self.groups.max()) + 1
        if self.logsnr.ndim != 1 or self.coefficient.shape != (len(self.logsnr), groups):
            raise ValueError(
                f"coefficients are {tuple(self.coefficient.shape)} for {len(self.logsnr)} levels and {groups} groups; "
                "give (levels, groups)"
            )
        if not bool((self.logsnr.diff() > 0).all()):
            raise ValueError("the levels of a mean correction must increase in logsnr")

    @cached_property
    def groups(self) -> Tensor:
        """Group of each direction, (d,)."""
        return spread_groups(self.twin.within)

    def at(self, logsnr: float) -> Tensor:
        """a along the directions at one level, (*event_shape) float64."""
        return self.coefficient_at(logsnr).double()[self.groups].reshape(self.twin.event_shape)

    def coefficient_at(self, logsnr: float) -> Tensor:
        """a by group at one level, (G,)."""
        knots = self.logsnr.double()
        if len(knots) == 1:
            return self.coefficient[0]
        value = torch.tensor(min(max(logsnr, float(knots[0])), float(knots[-1])), dtype=torch.float64)
        right = int(torch.searchsorted(knots, value).clamp(1, len(knots) - 1))
        weight = float((value - knots[right - 1]) / (knots[right] - knots[right - 1]))
        return torch.lerp(self.coefficient[right - 1], self.coefficient[right], weight)

    def mean(self, x: Tensor, level: Level, mean: Tensor) -> Tensor:
        """x0_hat' for a network's x0_hat (B, *event_shape) at states x.

        Args:
            x: states x_t, (B, *event_shape).
            level: noise level, scalar or (B,).
            mean: x0_hat, of x's shape.
        """
        if level.logsnr.numel() > 1:
            made = torch.empty_like(mean)
            for value in level.logsnr.unique():
                rows = torch.nonzero(level.logsnr == value)[:, 0]
                at = rows.to(x.device)
                made[at] = self.mean(x[at], level[int(rows[0])], mean[at])
            return made
        basis, a = self.twin.basis, self.at(float(level.logsnr)).to(x)
        if bool((a == 1).all()):
            return mean
        twin = self.twin.denoise(basis.forward(x), level)
        made = basis.inverse(torch.lerp(twin, basis.forward(mean), a.expand_as(twin)))
        return made if self.clip is None else made.clamp(-self.clip, self.clip)


class CorrectedDenoiser(Denoiser):
    """A denoiser with its mean corrected; as many evaluations as before.

    Args:
        denoiser: the denoiser that the correction was measured for, with the same clipping.
        correction: its coefficients.
    """

    def __init__(self, denoiser: Denoiser, correction: MeanCorrection) -> None:
        self.denoiser, self.correction = denoiser, correction
        self.schedule, self.nfe = denoiser.schedule, denoiser.nfe

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class."""
        posterior = self.denoiser(x, level)
        return Posterior(self.correction.mean(x, level, posterior.mean), None, posterior.fraction)
