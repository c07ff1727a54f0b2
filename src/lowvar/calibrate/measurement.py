r"""One pass over data, and what it tells about a denoiser: every part of a `Calibration`, measured.

The twin's moments and the mixture come from one set of images, residual tables and the analytic estimate from another;
the moments of the remainder along reverse paths need none. Tables of pixels and directions are shrunk towards the
twin's posterior variance (see `shrinkage`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lowvar.calibrate.analytic import analytic_variance
from lowvar.calibrate.calibration import Calibration
from lowvar.calibrate.mixture import COMPONENTS, fit_mixture
from lowvar.calibrate.path import LEVELS, PATHS, SHARED, path_moments, remainder_share
from lowvar.calibrate.residual import ResidualMoments, residual_moments
from lowvar.calibrate.shrinkage import shrink
from lowvar.calibrate.table import CovarianceTable, Structure
from lowvar.calibrate.twin import fit_twin
from lowvar.process.covariance import BasisDiagonal
from lowvar.process.denoiser import Denoiser
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.schedule import Schedule
from lowvar.process.twin import GaussianTwin

__all__ = ["calibrate", "default_logsnr"]


def default_logsnr(schedule: Schedule, knots: int = 49) -> Tensor:
    """Equally spaced logsnr from the schedule's noisiest level (not below -12) to its t_min, (knots,).

    Example:
        >>> from lowvar.process.schedule import Flow
        >>> default_logsnr(Flow(), 3).shape
        torch.Size([3])
    """
    low = max(float(schedule.logsnr(1.0)), -12.0)
    return torch.linspace(low, float(schedule.logsnr(schedule.t_min)), knots, dtype=torch.float64)


def _tables(moments: ResidualMoments, twin: GaussianTwin) -> dict[Structure, CovarianceTable]:
    """Tables of all structures; pixels and directions are shrunk towards the twin's posterior variance."""
    basis = twin.basis
    logsnr, shape = moments.level.logsnr, tuple(basis.event_shape)
    axes = tuple(range(2, moments.pixel.ndim))
    tables: dict[Structure, CovarianceTable] = {
        "isotropic": CovarianceTable("isotropic", logsnr, moments.mmse, shape, None, moments.mmse_se)
    }
    if axes and shape[0] > 1:
        channel = moments.pixel.mean(axes, keepdim=True)
        tables["channel"] = CovarianceTable("channel", logsnr, channel, shape)
    reference = twin.posterior(torch.zeros_like(moments.pixel), moments.level).covariance
    assert isinstance(reference, BasisDiagonal)
    along = reference.variance
    pixel, pixel_se = shrink(moments.pixel, moments.pixel_se, basis.squared_mix(along))
    tables["pixel"] = CovarianceTable("pixel", logsnr, pixel, shape, None, pixel_se)
    if moments.basis is not None and moments.basis_se is not None:
        rotated, rotated_se = shrink(moments.basis, moments.basis_se, along)
        tables["basis"] = CovarianceTable("basis", logsnr, rotated, shape, basis, rotated_se)
    return tables


def calibrate(
    denoiser: Denoiser,
    batches: Callable[[], Iterable[Tensor]],
    *,
    twin_batches: Callable[[], Iterable[Tensor]] | None = None,
    basis: Literal["auto", "pca", "dct"] = "auto",
    logsnr: Tensor | None = None,
    replicates: int = 2,
    noise: NoiseSource | None = None,
    bound: float | None = None,
    components: Sequence[int] = COMPONENTS,
    paths: int = PATHS,
    levels: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Calibration:
    """Calibrates a denoiser on data it was not trained on.

    Args:
        denoiser: the denoiser, with the clipping it will be used with.
        batches: makes one pass over the calibration images, batches (b, *event_shape).
        twin_batches: makes one pass over the images whose moments the twin takes (default the same); the training
            images may be used here, a mean and a covariance are not over-fitted by the network.
        basis: the twin's and the table's basis; `auto` is PCA up to d = 1024, the DCT above.
        logsnr: knots (default `default_logsnr`).
        replicates: noises an image and knot.
        noise: source of the noise.
        bound: b of data in [-b, b], for the analytic estimate and a corrected mean.
        components: numbers of components the mixture twin may have; none: the Gaussian twin is the mixture. They are
            fitted to `twin_batches` and compared on `batches` (where both are
            the same: three quarters and the rest).
        paths: reverse paths for the statistics of the remainder, `LEVELS` evaluations each, and half as many of each
            of the first `SHARED` images for the share of it that is kept; 0: none.
        levels: grey levels of the data, on which it depends where likelihood grids end.
        progress: called with the number of evaluations made for the paths; the passes over `batches` tell their own.

    Returns:
        The calibration.

    Raises:
        ValueError: if there are no data.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis
        >>> schedule = CosineVP()
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([1.0, 0.25]))
        >>> data = twin.sample(Independent(1).normal(range(64), (2,)))
        >>> calibration = calibrate(twin.denoiser(schedule), lambda: [data])
        >>> sorted(calibration.tables)
        ['basis', 'isotropic', 'pixel']
    """
    schedule = denoiser.schedule
    twin = fit_twin((batches if twin_batches is None else twin_batches)(), basis)
    level = schedule.level(default_logsnr(schedule) if logsnr is None else logsnr)
    source = Independent(0) if noise is None else noise
    moments = residual_moments(denoiser, batches(), level, source, twin.basis, replicates)
    mixture = _mixture(batches, twin_batches, twin, components)
    like = next(iter(batches()))
    place = {"dtype": like.dtype, "device": like.device}
    table = None
    if paths:
        share = remainder_share(denoiser, mixture, _first(batches(), SHARED, progress), noise)
        table = path_moments(denoiser, mixture, paths, LEVELS, noise, share=share, progress=progress, **place)
    return Calibration(
        schedule.fingerprint,
        level.logsnr,
        moments.mmse,
        moments.mmse_se,
        analytic_variance(moments.noise_power, level, bound),
        _tables(moments, twin),
        twin,
        moments.n,
        mixture,
        table,
        levels=levels,
    )


def _first(batches: Iterable[Tensor], most: int, progress: Callable[[int], object] | None) -> Iterator[Tensor]:
    """The first images, with the evaluations that `remainder_share` makes of them told."""
    left = most
    for batch in batches:
        yield batch[:left]
        if progress is not None:
            progress(len(batch[:left]) * (LEVELS // 2))
        left -= len(batch[:left])
        if left <= 0:
            return


def _mixture(
    batches: Callable[[], Iterable[Tensor]],
    twin_batches: Callable[[], Iterable[Tensor]] | None,
    twin: GaussianTwin,
    components: Sequence[int],
) -> MixtureTwin:
    if not components:
        return MixtureTwin.of(twin)
    if twin_batches is not None:
        return fit_mixture(twin_batches(), batches(), twin, components)
    return fit_mixture(
        (x[: -(-3 * len(x) // 4)] for x in batches()), (x[-(len(x) // 4) :] for x in batches()), twin, components
    )
