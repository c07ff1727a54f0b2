r"""Residual tables: the second moment of x_0 - x0_hat by noise level, entry by entry.

    v(logsnr) = E (x_0 - x0_hat(x_t))^2

over data and noise, in pixels or along basis directions. For the exact posterior mean this is E C_ii; for a network
it is C plus its own squared error, which is the variance a kernel around that network's mean should have. Unbiased
for a given network on data it was not trained on; standard errors are over images (replicates of noise are averaged
within one).

The calibration of a covariance is checked by standardised residuals: mean of (x_0 - x0_hat)^2 / v, which should be 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.basis import Basis
from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.noise import NoiseSource
from lowvar.process.schedule import Level

__all__ = ["ResidualMoments", "StandardisedResiduals", "residual_moments", "standardised_residuals"]


class _Mean:
    """Streaming mean and standard error over images."""

    def __init__(self) -> None:
        self.n, self.total, self.square = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        rows = rows.double().cpu()
        self.n += rows.shape[0]
        self.total = self.total + rows.sum(0)
        self.square = self.square + (rows**2).sum(0)

    @property
    def mean(self) -> Tensor:
        return self.total / self.n

    @property
    def se(self) -> Tensor:
        variance = (self.square / self.n - self.mean**2).clamp_min(0) * self.n / max(self.n - 1, 1)
        return (variance / self.n).sqrt()


@dataclass(frozen=True)
class ResidualMoments:
    """Moments of a denoiser's residual at L noise levels; float64, on the CPU.

    Attributes:
        level: the levels, (L,).
        n: number of images.
        mmse, mmse_se: mean square a dimension and its standard error, (L,).
        pixel, pixel_se: per entry, (L, *event_shape).
        basis, basis_se: per basis direction, (L, *event_shape), or None without a basis.
        noise_power: E ||eps_hat||^2 / d, (L,), for the analytic estimate.
    """

    level: Level
    n: int
    mmse: Tensor
    mmse_se: Tensor
    pixel: Tensor
    pixel_se: Tensor
    basis: Tensor | None
    basis_se: Tensor | None
    noise_power: Tensor


def _states(x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps


@torch.no_grad()
def residual_moments(
    denoiser: Denoiser,
    batches: Iterable[Tensor],
    level: Level,
    noise: NoiseSource,
    basis: Basis | None = None,
    replicates: int = 1,
) -> ResidualMoments:
    """Residual moments by one pass over the data in constant memory; L x replicates evaluations an image.

    Args:
        denoiser: the denoiser (its clipping included).
        batches: clean data (b, *event_shape); image i of the pass has noise number i at every level.
        level: the noise levels, (L,), sigma > 0.
        noise: source of the noise.
        basis: also collect moments along its directions.
        replicates: noises an image and level.

    Raises:
        ValueError: if there are no data.
    """
    if replicates < 1:
        raise ValueError(f"replicates is {replicates}; at least 1")
    L = len(level)
    total, pixel, rotated, power = ([_Mean() for _ in range(L)] for _ in range(4))
    first = 0
    for x0 in batches:
        index = torch.arange(first, first + x0.shape[0])
        first += x0.shape[0]
        for k in range(L):
            squares, spectrum, energy = torch.zeros(()), torch.zeros(()), torch.zeros(())
            for r in range(replicates):
                eps = noise.normal(index, x0.shape[1:], draw=k * replicates + r, dtype=x0.dtype, device=x0.device)
                x = _states(x0, eps, level[k])
                mean = denoiser(x, level[k]).mean
                residual = x0 - mean
                squares = squares + residual.double() ** 2 / replicates
                predicted = (x - expand(level.alpha[k], x) * mean) / expand(level.sigma[k], x)
                energy = energy + (predicted.double() ** 2).flatten(1).mean(1) / replicates
                if basis is not None:
                    spectrum = spectrum + basis.forward(residual).double() ** 2 / replicates
            total[k].add(squares.flatten(1).mean(1))
            pixel[k].add(squares)
            power[k].add(energy)
            if basis is not None:
                rotated[k].add(spectrum)
    if first == 0:
        raise ValueError("there are no data to calibrate on")

    def stack(parts: list[_Mean], name: str) -> Tensor:
        return torch.stack([getattr(p, name) for p in parts])

    return ResidualMoments(
        level,
        first,
        stack(total, "mean"),
        stack(total, "se"),
        stack(pixel, "mean"),
        stack(pixel, "se"),
        None if basis is None else stack(rotated, "mean"),
        None if basis is None else stack(rotated, "se"),
        stack(power, "mean"),
    )


@dataclass(frozen=True)
class StandardisedResiduals:
    """Mean over entries of (x_0 - x0_hat)^2 / v by level: `value` and its standard error over images, both (L,)."""

    logsnr: Tensor
    value: Tensor
    se: Tensor


@torch.no_grad()
def standardised_residuals(
    denoiser: Denoiser, batches: Iterable[Tensor], level: Level, noise: NoiseSource, replicates: int = 1
) -> StandardisedResiduals:
    """(1 / d) E (x_0 - x0_hat)^T C^-1 (x_0 - x0_hat), which is 1 for a calibrated covariance.

    Args:
        denoiser: a denoiser whose posterior has a covariance.
        batches: held-out clean data.
        level: noise levels, (L,).
        noise: source of the noise.
        replicates: noises an image and level.

    Raises:
        ValueError: if the posterior has no covariance.
    """
    parts = [_Mean() for _ in range(len(level))]
    first = 0
    for x0 in batches:
        index = torch.arange(first, first + x0.shape[0])
        first += x0.shape[0]
        for k in range(len(level)):
            ratio = torch.zeros(())
            for r in range(replicates):
                eps = noise.normal(index, x0.shape[1:], draw=k * replicates + r, dtype=x0.dtype, device=x0.device)
                posterior = denoiser(_states(x0, eps, level[k]), level[k])
                if posterior.covariance is None:
                    raise ValueError("the denoiser's posterior has no covariance to be checked")
                quadratic = posterior.covariance.inverse_quadratic(x0 - posterior.mean)
                ratio = ratio + quadratic.double() / x0[0].numel() / replicates
            parts[k].add(ratio)
    return StandardisedResiduals(level.logsnr, torch.stack([p.mean for p in parts]), torch.stack([p.se for p in parts]))
