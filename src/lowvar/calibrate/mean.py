r"""Fitting the correction of a mean: one regression coefficient by noise level and group of directions.

Of n images not trained on, with y = x_0 - D and r = x0_hat - D along the directions of a group, each image i gives

    u_i = sum r y,      q_i = sum r^2,      a_ls = sum_i u_i / sum_i q_i,
    se(a)^2 = sum_i (u_i - a q_i)^2 / (sum_i q_i)^2               (images are independent, directions need not be),
    gain_i(a) = |y - r|^2 - |y - a r|^2 = 2 (a - 1) u_i - (a^2 - 1) q_i,

the last being what a saves of the squared error. It needs u and q only, so that the gain of the a of one half of the
images on the other half, and the other way round, costs nothing. The coefficient is

    a = 1 + s (clamp(a_ls, 0, 1) - 1),      s = max(0, 1 - se^2 / (a_ls - 1)^2),

shrunk to the network by the positive part of James and Stein, where the gain on the other half is above twice its
standard error over images, and 1 elsewhere. For an exact posterior mean E u = E q: a_ls is 1 within its error, almost
every entry is 1, and what is not is 1 within a few se. Coefficients above 1, which would extrapolate beyond the
network, are taken as 1.

Sources: the coefficient is that of a control variate (P. Glynn, R. Szechtman, "Some new perspectives on the method of
control variates", MCQMC 2000), with the twin's denoiser as the control; W. James, C. Stein, "Estimation with quadratic
loss", 1961 (the shrinkage). Its use on a denoiser is this package's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.corrected import MeanCorrection
from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import NoiseSource
from lowvar.process.path import spread_groups
from lowvar.process.schedule import Level
from lowvar.process.twin import GaussianTwin

__all__ = ["MeanFit", "fit_mean"]

_SIGNIFICANT = 2.0  # standard errors


@dataclass(frozen=True)
class MeanFit:
    """A fitted correction and what it rests on; all (L, G), float64.

    Attributes:
        correction: the correction.
        raw: a_ls.
        se: its standard error.
        gain: squared error a dimension saved on the other half of the images, averaged over both halves.
        gain_se: its standard error over images.
    """

    correction: MeanCorrection
    raw: Tensor
    se: Tensor
    gain: Tensor
    gain_se: Tensor

    @property
    def used(self) -> Tensor:
        """Where the correction is not 1, (L, G)."""
        return self.correction.coefficient != 1


def _sums(
    denoiser: Denoiser,
    twin: MixtureTwin,
    batches: Iterable[Tensor],
    level: Level,
    noise: NoiseSource,
    replicates: int,
) -> tuple[Tensor, Tensor]:
    """u and q of every image, (n, L, G) float64: means over replicates."""
    groups = spread_groups(twin.within)
    member = torch.nn.functional.one_hot(groups).double()
    rows_u, rows_q, first = [], [], 0
    for x0 in batches:
        index = torch.arange(first, first + len(x0))
        first += len(x0)
        clean = twin.basis.forward(x0)
        u = torch.zeros(len(x0), len(level), member.shape[1], dtype=torch.float64)
        q = torch.zeros_like(u)
        for k in range(len(level)):
            for j in range(replicates):
                draw = k * replicates + j
                eps = noise.normal(index, x0.shape[1:], draw=draw, dtype=x0.dtype, device=x0.device)
                x = expand(level.alpha[k], x0) * x0 + expand(level.sigma[k], x0) * eps
                control = twin.denoise(twin.basis.forward(x), level[k])
                r = (twin.basis.forward(denoiser(x, level[k]).mean) - control).flatten(1).double().cpu()
                y = (clean - control).flatten(1).double().cpu()
                u[:, k] += (r * y) @ member / replicates
                q[:, k] += (r * r) @ member / replicates
        rows_u.append(u)
        rows_q.append(q)
    if first < 4:
        raise ValueError(f"a correction of the mean needs at least 4 images, got {first}")
    return torch.cat(rows_u), torch.cat(rows_q)


def _coefficient(u: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """a_ls and its standard error, (L, G); 1 and 0 where the network adds nothing to the twin."""
    total = q.sum(0)
    known, safe = total > 1e-300, total.clamp_min(1e-300)
    a = torch.where(known, u.sum(0) / safe, torch.ones_like(total))
    se = torch.where(known, ((u - a * q) ** 2).sum(0).sqrt() / safe, torch.zeros_like(total))
    return a, se


def _shrunk(a: Tensor, se: Tensor) -> Tensor:
    off = a - 1
    s = torch.where(off != 0, 1 - se**2 / torch.where(off != 0, off, torch.ones_like(off)) ** 2, 0.0).clamp_min(0)
    return 1 + s * (a.clamp(0, 1) - 1)


@torch.no_grad()
def fit_mean(
    denoiser: Denoiser,
    twin: GaussianTwin | MixtureTwin,
    batches: Iterable[Tensor],
    level: Level,
    noise: NoiseSource,
    replicates: int = 1,
    clip: float | None = None,
) -> MeanFit:
    """The correction of a denoiser's mean; L x replicates evaluations an image.

    Args:
        denoiser: the denoiser, with the clipping it will be used with.
        twin: the control variate, fitted to other images.
        batches: images (b, *event_shape) that neither network nor twin was fitted to.
        level: noise levels, (L,), increasing in logsnr.
        noise: source of the noise; image i has noise number i at every level.
        replicates: noises an image and level.
        clip: bound of the data, to which the corrected mean is clipped when it is used.

    Raises:
        ValueError: if there are fewer than four images, or replicates is below 1.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis
        >>> schedule = CosineVP()
        >>> law, rough = (GaussianTwin(torch.zeros(1), PixelBasis((1,)), torch.tensor([c])) for c in (1.0, 0.5))
        >>> data = law.sample(Independent(1).normal(range(64), (1,)))
        >>> fit_mean(law.denoiser(schedule), rough, [data], schedule.at([0.8, 0.5, 0.2]), Independent(2)).used.sum()
        tensor(0)
    """
    if replicates < 1:
        raise ValueError(f"replicates is {replicates}; at least 1")
    mixture = twin if isinstance(twin, MixtureTwin) else MixtureTwin.of(twin)
    u, q = _sums(denoiser, mixture, batches, level, noise, replicates)
    halves = torch.arange(len(u)) % 2 == 0
    gains = torch.zeros_like(u)
    for half in (halves, ~halves):
        a = _shrunk(*_coefficient(u[half], q[half]))
        gains[~half] = 2 * (a - 1) * u[~half] - (a**2 - 1) * q[~half]
    gain, gain_se = gains.mean(0), gains.std(0) / len(u) ** 0.5
    raw, se = _coefficient(u, q)
    used = gain > _SIGNIFICANT * gain_se
    a = torch.where(used, _shrunk(raw, se), torch.ones_like(raw))
    size = torch.bincount(spread_groups(mixture.within)).double()
    correction = MeanCorrection(mixture, level.logsnr.double().cpu(), a, clip)
    return MeanFit(correction, raw, se, gain / size, gain_se / size)
