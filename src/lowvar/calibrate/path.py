r"""Measuring path moments: the remainder of a control variate along a few fine reverse trajectories of the network.

n = 192 chains of the twin's flow at L = 40 levels give M(a, b) = E r(l_a) r(l_b), a mean over chains and over the
directions of a group (`lowvar.process.path` says what it is for): n L evaluations, once for a network and a twin. The
chains step with the remainder's trend v^-1/2, whose error at 40 levels is far below that of the steps to be planned.

Before that the share a(l) of the network's remainder that helps is measured on images it was not trained on, at every
second level (`lowvar.calibrate.mean`: 1 unless the images say otherwise, out of sample, by two standard errors). Where
the network is worse than the twin, as noise-predicting ones are at high noise, the chain is the twin's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lowvar.calibrate.mean import fit_mean
from lowvar.process.corrected import CorrectedDenoiser, MeanCorrection
from lowvar.process.denoiser import Denoiser
from lowvar.process.flow import TwinFlow
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.path import PathMoments, spread_groups
from lowvar.process.schedule import Schedule
from lowvar.process.twin import GaussianTwin

__all__ = ["LEVELS", "PATHS", "SHARED", "path_moments", "remainder_share"]

LEVELS, PATHS = 40, 192
SHARED = 512
"""Images that the share of the remainder is measured on, at half as many levels."""


def _knots(schedule: Schedule, twin: MixtureTwin, levels: int) -> Tensor:
    """Equally spaced logsnr, from where the largest direction is still 99% noise to the schedule's t_min."""
    largest = float(twin.gaussian.spectrum.max())
    low = max(float(torch.log(torch.tensor(0.01 / max(largest, 1e-6)))), float(schedule.logsnr(1.0)))
    return torch.linspace(low, float(schedule.logsnr(schedule.t_min)), levels, dtype=torch.float64)


@torch.no_grad()
def path_moments(
    denoiser: Denoiser,
    twin: GaussianTwin | MixtureTwin,
    n: int = PATHS,
    levels: int = LEVELS,
    noise: NoiseSource | None = None,
    *,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    share: MeanCorrection | None = None,
    progress: Callable[[int], object] | None = None,
) -> PathMoments:
    """Measures a denoiser's remainder along n reverse paths; n x levels evaluations.

    Args:
        denoiser: the network, with the clipping it will be used with.
        twin: the control variate.
        n: paths.
        levels: L, from almost pure noise to the schedule's t_min.
        noise: source of the starts (default `Independent(1)`).
        batch_size, dtype, device: of the states.
        share: the share of the remainder that is kept, measured with the same twin (`remainder_share`), or all of it.
        progress: called with the number of evaluations made.

    Raises:
        ValueError: if there are fewer than two levels or no paths.

    Example:
        >>> from lowvar.testing import mixture2
        >>> from lowvar.process import CosineVP
        >>> target, schedule = mixture2(), CosineVP()
        >>> moments = path_moments(target.denoiser(schedule, None), target.twin, n=16, levels=12, dtype=torch.float64)
        >>> moments.grid(schedule, 3).shape
        torch.Size([4])
    """
    if levels < 2 or n < 1:
        raise ValueError(f"{n} paths at {levels} levels: at least 1 and 2")
    schedule, solver = denoiser.schedule, TwinFlow(twin)
    within = solver.mixture.within.flatten().double().cpu()
    points = schedule.at(schedule.time(_knots(schedule, solver.mixture, levels)))
    if share is not None:
        denoiser = CorrectedDenoiser(denoiser, share)
    prior, plan = schedule.at(1.0), solver.prepare(points)
    noise = Independent(1) if noise is None else noise
    groups = spread_groups(within)
    G = int(groups.max()) + 1
    size = torch.bincount(groups, minlength=G).double()
    moments = torch.zeros(G, levels, levels, dtype=torch.float64)
    for index in torch.arange(n).split(batch_size):
        z = noise.normal(index, solver.mixture.event_shape, dtype=dtype, device=device)
        state, rows = solver.start(solver.initial(z, prior, points[0])), []
        for k in range(levels):
            posterior = denoiser(state.x, points[k])
            rows.append(solver.remainder(state.x, posterior, points[k]))
            if k + 1 < levels:
                state, _ = solver.step(plan, k, state, posterior, None)
            if progress is not None:
                progress(len(index))
        r = torch.stack(rows).flatten(2).double().cpu()  # (L, b, d)
        for g in range(G):
            part = r[:, :, groups == g].flatten(1)
            moments[g] += part @ part.T / (n * size[g])
    c = torch.zeros(G, dtype=torch.float64).index_add_(0, groups, within) / size
    kept = None if share is None else torch.stack([share.coefficient_at(float(l)) for l in points.logsnr], 1)
    return PathMoments(points.logsnr, moments, c, size, kept)


def remainder_share(
    denoiser: Denoiser,
    twin: GaussianTwin | MixtureTwin,
    batches: Iterable[Tensor],
    noise: NoiseSource | None = None,
    levels: int = LEVELS // 2,
) -> MeanCorrection | None:
    """The share of a denoiser's remainder that is worth keeping on its paths; `levels` evaluations an image.

    Args:
        denoiser: the network, with the clipping it will be used with.
        twin: the control variate.
        batches: images (b, *event_shape) that neither was fitted to; fewer than four say nothing.
        noise: source of the noise (default `Independent(2)`).
        levels: number of levels, from almost pure noise to the schedule's t_min.

    Returns:
        The correction that `path_moments` takes, or None where all of the remainder is.
    """
    schedule, solver = denoiser.schedule, TwinFlow(twin)
    images = torch.cat(list(batches))
    if len(images) < 4:
        return None
    level = schedule.at(schedule.time(_knots(schedule, solver.mixture, levels)))
    noise = Independent(2) if noise is None else noise
    fit = fit_mean(denoiser, solver.mixture, images.split(256), level, noise)
    return fit.correction if bool(fit.used.any()) else None
