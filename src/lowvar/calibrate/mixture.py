r"""Fitting the mixture twin: EM in the Gaussian twin's basis; what it may be is chosen by held-out denoising error.

Coordinates are whitened, w = (B^T x - mean) / sqrt(c), so that a diagonal mixture is fitted to directions of one size
and its variances are relative to the data's own (`lowvar.calibrate.em`: components at several scales, shrunk).

Which images belong together is said by the leading directions alone, those that hold a share of the variance. The
others are many and small (of 768 in a patch of 16 x 16 x 3, 668 hold 2%): in the likelihood each weighs as much as
the first, and what they tell apart is the grain of an image. Their means and variances follow from the groups found.

The mixture is for denoising, so K, share and scales are those of the smallest error E ||x_0 - D_mix(x_t)||^2 on images
it was not fitted to, each level relative to the Gaussian twin's, averaged over levels. For a network with the exact
posterior mean that error is its mmse plus E ||r||^2, so the best choice leaves the smallest remainder. No network is
asked. K grows until the error does not fall; share and scales are then tried the other way at that K, and taken where
the error falls by more than two standard errors over images, as the mixture itself is in place of the Gaussian twin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.calibrate.em import em
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.schedule import Level
from lowvar.process.twin import GaussianTwin

__all__ = ["COMPONENTS", "denoising_ratio", "fit_mixture"]

COMPONENTS = (4, 10, 30, 60, 150, 300)
SHARES = (0.98, 1.0)  # of the variance: what the leading directions hold
SQUARES = ((1.0,), (0.5, 1.0, 2.0))  # squared scales
LIMIT, HELD_OUT = 20_480, 1024  # images EM looks at, images to choose by; fewer where they are large:
_NUMBERS = 2**26  # of all of them together
_LEAST = 0.5  # images that a component is of
_SIGNIFICANT = 2.0  # standard errors
_LEVELS = torch.linspace(-6.0, 6.0, 9, dtype=torch.float64)


def _levels() -> Level:
    alpha, sigma = torch.sigmoid(_LEVELS).sqrt(), torch.sigmoid(-_LEVELS).sqrt()
    return Level(torch.full_like(_LEVELS, torch.nan), _LEVELS, alpha, sigma)


def denoising_ratio(twin: MixtureTwin, x0: Tensor, reference: GaussianTwin, noise: NoiseSource | None = None) -> float:
    """E ||x_0 - D_mix||^2 over E ||x_0 - D_lin||^2, averaged over nine levels of logsnr in [-6, 6].

    Args:
        twin: the mixture.
        x0: images it was not fitted to, (n, *event_shape).
        reference: the Gaussian twin.
        noise: source of the noise (default `Independent(0)`).
    """
    return float(_ratios(twin, x0, reference, noise).mean())


@torch.no_grad()
def _ratios(twin: MixtureTwin, x0: Tensor, reference: GaussianTwin, noise: NoiseSource | None = None) -> Tensor:
    """Each image's share of the ratio, (n,); their mean is it."""
    noise, levels = Independent(0) if noise is None else noise, _levels()
    total = torch.zeros(len(x0), dtype=torch.float64)
    for k in range(len(levels)):
        level = levels[k]
        eps = noise.normal(range(len(x0)), x0.shape[1:], draw=k, dtype=torch.float64)
        x = float(level.alpha) * x0.double() + float(level.sigma) * eps
        own, linear = (
            ((x0 - p.mean) ** 2).flatten(1).mean(1) for p in (twin.posterior(x, level), reference.posterior(x, level))
        )
        total += own / linear.mean() / len(levels)
    return total


def _gather(batches: Iterable[Tensor], most: int) -> Tensor:
    parts: list[Tensor] = []
    left = most
    for batch in batches:
        left = min(left, max(_NUMBERS // batch[0].numel(), 1)) if not parts else left
        parts.append(batch[:left].detach().double().cpu())
        left -= len(parts[-1])
        if left <= 0:
            break
    if not parts:
        raise ValueError("there are no images to fit a mixture to")
    return torch.cat(parts)


def _falls(before: Tensor, after: Tensor) -> bool:
    """Whether an error over images falls by more than two standard errors."""
    gain = before - after
    return float(gain.mean()) > _SIGNIFICANT * float(gain.std()) / len(gain) ** 0.5


def fit_mixture(
    batches: Iterable[Tensor],
    held_out: Iterable[Tensor],
    twin: GaussianTwin,
    components: Sequence[int] = COMPONENTS,
    seed: int = 0,
) -> MixtureTwin:
    """The mixture twin of data; the Gaussian twin itself, as one component, where no mixture denoises better.

    Args:
        batches: images to fit to, tensors (b, *event_shape); the first 20,480 are used.
        held_out: images to choose by, likewise; the first 1,024.
        twin: the data's Gaussian twin, whose basis is taken.
        components: numbers of components to try, increasing; those above a twentieth of
            the images are left out.
        seed: of EM's start.

    Returns:
        The mixture, float64, on the CPU.

    Raises:
        ValueError: if there are no images.

    Example:
        >>> from lowvar.calibrate.twin import fit_twin
        >>> sides = torch.where(Independent(1).uniform(range(400), (1,)) < 0.5, -1.0, 1.0)
        >>> data = sides + 0.1 * Independent(2).normal(range(400), (1,))
        >>> fit_mixture([data[:300]], [data[300:]], fit_twin([data[:300]]), (2,)).components
        2
    """
    x0, test = _gather(batches, LIMIT), _gather(held_out, HELD_OUT)
    whitened = _Whitened.of(twin)
    rows = whitened.rows(x0)
    gaussian = MixtureTwin.of(twin)
    best, least, chosen, tried = gaussian, torch.zeros(0), 0, math.inf
    for K in components:
        if len(x0) // 20 < K:
            continue
        found = whitened.fitted(rows, K, SHARES[0], SQUARES[0], seed)
        ratios = _ratios(found, test, twin)
        if float(ratios.mean()) >= tried:
            break
        best, least, chosen, tried = found, ratios, K, float(ratios.mean())
    if not chosen or not _falls(_ratios(gaussian, test, twin), least):
        return gaussian
    seen: set[tuple[int, tuple[float, ...]]] = {(whitened.leading(SHARES[0]), SQUARES[0])}
    for share in SHARES:
        for squares in SQUARES:
            if (kind := (whitened.leading(share), squares)) in seen:
                continue
            seen.add(kind)
            found = whitened.fitted(rows, chosen, share, squares, seed)
            ratios = _ratios(found, test, twin)
            if _falls(least, ratios):
                best, least = found, ratios
    return best


@dataclass(frozen=True)
class _Whitened:
    """The coordinates of EM: directions in the order of their variance, each in units of its standard deviation."""

    twin: GaussianTwin
    centre: Tensor  # (d,)
    std: Tensor  # (d,), 1 where the variance is 0
    order: Tensor  # (d,)

    @classmethod
    def of(cls, twin: GaussianTwin) -> _Whitened:
        c = twin.spectrum.double().cpu().flatten()
        centre = twin.basis.forward(twin.mean.double().cpu()[None])[0].flatten()
        return cls(twin, centre, torch.where(c > 0, c, 1.0).sqrt(), torch.argsort(c, descending=True, stable=True))

    def rows(self, x0: Tensor) -> Tensor:
        """float32: the likelihood of one image is off by less than .01."""
        rows = torch.cat([self.twin.basis.forward(part).flatten(1) for part in x0.split(1024)])
        return ((rows - self.centre) / self.std)[:, self.order].float()

    def leading(self, share: float) -> int:
        """How many directions hold a share of the variance."""
        held = self.twin.spectrum.double().cpu().flatten()[self.order].cumsum(0)
        return int((held < share * held[-1] * (1 - 1e-12)).sum()) + 1

    def fitted(self, rows: Tensor, K: int, share: float, squares: Sequence[float], seed: int) -> MixtureTwin:
        directions = None if share == 1 else self.leading(share)
        *_, last = em(rows, K, squares, directions=directions, seed=seed)
        mean, variance = torch.zeros_like(last.mean).double(), torch.zeros_like(last.variance).double()
        mean[:, self.order], variance[:, self.order] = last.mean.double(), last.variance.double()
        mean, variance = mean * self.std + self.centre, variance * self.twin.spectrum.double().cpu().flatten()
        k, j = torch.nonzero(last.weight * len(rows) > _LEAST, as_tuple=True)
        shape = (-1, *self.twin.spectrum.shape)
        spectrum = last.squares.double()[j, None] * variance[k]
        return MixtureTwin(last.weight[k, j], mean[k].reshape(shape), spectrum.reshape(shape), self.twin.basis)
