r"""Measurements that calibrate and demo share: the calibration itself, and the curves of the report.

    mmse          E (x_0 - x0_hat)^2 a dimension by logsnr, with the twin's closed form as the upper bound
    standardised  (1/d) (x_0 - x0_hat)^T C^-1 (x_0 - x0_hat) on the held-out split: 1 for a calibrated covariance
    budget        terms of the variational bound in bits/dim by step, for a choice of reverse variances

Covariances are not limited to the data's range here: a limit of 0 at a saturated pixel has no density.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lowvar.calibrate import Calibration, calibrate, standardised_residuals
from lowvar.calibrate.path import LEVELS, PATHS, SHARED
from lowvar.cli.console import Progress
from lowvar.data import Data, Images
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.grid import trailing
from lowvar.process.kernel import ReverseKernel
from lowvar.process.noise import Independent
from lowvar.sample.likelihood import vlb

__all__ = ["budget", "calibrate_on", "mmse_figure", "standardised", "with_progress"]

_KNOTS = 49
_TWIN_IMAGES = 20_000
_NO_VARIANCE = 1e6


def with_progress(
    images: Images, most: int, batch_size: int, device: torch.device, bar: Progress | None = None, each: int = 1
) -> Iterator[Tensor]:
    """One pass over the first `most` images; the bar moves by `each` an image when the next batch is asked for."""
    order = torch.arange(min(most, len(images)))
    for batch in images.batches(batch_size, order):
        yield batch.to(device)
        if bar is not None:
            bar.update(len(batch) * each)


def calibrate_on(
    denoiser: NetworkDenoiser,
    data: Data,
    progress: Callable[[float, str], AbstractContextManager[Progress]],
    *,
    most: int = 1024,
    replicates: int = 4,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device,
) -> Calibration:
    """Calibrates on the first `most` images of the calibration split; the twin takes up to 20,000 training images.

    Args:
        denoiser: the network.
        data: the data set.
        progress: makes a bar from (total, what).
        most, replicates: images, and noises an image and knot.
        seed: of the noise.
        batch_size, device: of the network's evaluations.
    """
    n = min(most, len(data.calibration))
    paths = PATHS * LEVELS + min(n, SHARED) * (LEVELS // 2)
    with progress(n * _KNOTS * replicates + paths, "calibrating") as bar:
        first = iter([bar])  # the pass that asks the network; others read the images only
        return calibrate(
            denoiser,
            lambda: with_progress(data.calibration, n, batch_size, device, next(first, None), _KNOTS * replicates),
            twin_batches=lambda: with_progress(data.train, _TWIN_IMAGES, 1024, torch.device("cpu")),
            replicates=replicates,
            noise=Independent(seed + 1),
            bound=denoiser.clip,
            levels=data.levels,
            progress=bar.update,
        )


def mmse_figure(calibration: Calibration, denoiser: NetworkDenoiser) -> dict[str, Any]:
    """The mmse curve with its standard errors, the twin's, and the analytic estimate."""
    level = denoiser.schedule.level(calibration.logsnr)
    return {
        "logsnr": calibration.logsnr,
        "mmse": calibration.mmse,
        "se": calibration.mmse_se,
        "twin": calibration.twin.mmse(level),
        "analytic": calibration.analytic,
    }


def standardised(
    denoiser: NetworkDenoiser,
    calibration: Calibration,
    data: Data,
    structures: Sequence[str],
    *,
    most: int = 512,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device,
    bar: Progress | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Standardised residuals on the held-out split at every second knot, {structure: {logsnr, value, se}}.

    Where an estimate is a variance of 0 (the analytic one at high noise) there is no residual to speak of: NaN.
    """
    level = denoiser.schedule.level(calibration.logsnr[::2])
    found = {}
    for structure in structures:
        attached = calibration.attach(denoiser, structure)
        batches = with_progress(data.test, most, batch_size, device, bar, len(level))
        r = standardised_residuals(attached, batches, level, Independent(seed + 2))
        sensible = r.value < _NO_VARIANCE
        found[structure] = {
            "logsnr": r.logsnr,
            "value": torch.where(sensible, r.value, torch.nan),
            "se": torch.where(sensible, r.se, torch.nan),
        }
    return found


def budget(
    denoiser: NetworkDenoiser,
    calibration: Calibration,
    data: Data,
    variances: Sequence[str],
    *,
    steps: int = 20,
    most: int = 512,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device,
    bar: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """The variational bound of ancestral sampling by step on the held-out split, bits/dim, by variance.

    Args:
        denoiser: the network.
        calibration: its calibration.
        data: the data set; its grey levels are the likelihood's bins.
        variances: small, large, learned, or calibrated structures.
        steps: of the trailing grid.
        most, seed, batch_size, device, bar: images of the split, noise, evaluations, progress.

    Returns:
        {variance: {logsnr, bits, se (by step), total, total_se, prior, decoder}}.
    """
    grid = trailing(denoiser.schedule, steps)
    logsnr = denoiser.schedule.logsnr(grid[: steps - 1])
    found: dict[str, dict[str, Any]] = {}
    for variance in variances:
        fixed = variance in ("small", "large", "learned")
        attached = denoiser if fixed else calibration.attach(denoiser, variance)
        kernel = ReverseKernel(1.0, variance if fixed else "posterior", "decoder")  # type: ignore[arg-type]
        terms, first = [], 0
        for x0 in with_progress(data.test, most, batch_size, device, bar, steps):
            index = torch.arange(first, first + len(x0))
            first += len(x0)
            bound = vlb(attached, kernel, grid, x0, data.levels, Independent(seed + 3), index)
            terms.append(bound.terms.cpu())
        rows = torch.cat(terms)  # (n, steps + 1): prior, kl, decoder
        se, total = rows.std(0) / len(rows) ** 0.5, rows.sum(1)
        found[variance] = {
            "logsnr": logsnr,
            "bits": rows[:, 1:-1].mean(0),
            "se": se[1:-1],
            "total": total.mean(),
            "total_se": total.std() / len(total) ** 0.5,
            "prior": rows[:, 0].mean(),
            "decoder": rows[:, -1].mean(),
        }
    return found
