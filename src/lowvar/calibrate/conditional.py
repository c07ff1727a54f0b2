r"""Tables by class: the residual's variance given the condition, pooled where a class has few images.

For a class-conditional network the residual x_0 - x0_hat(x_t, y) has a variance of its own for every label y. Measured
class by class, v_y of a class with n_y images has a relative standard error of at least sqrt(2 / n_y) an entry, often
more than classes differ. So each class is shrunk towards the table of all classes (see `shrinkage`): within a class and
level, entries share a scale and keep their own ratio to the pooled table only as far as the data insist; the isotropic
values of the classes are shrunk towards each other. A class without images has the pooled table.

Under guidance the mean that is used is the guided one, and the covariance of neither branch belongs to it: hand the
guided denoiser of each class (`process.Guided`) to `calibrate_classes`, and its residuals are what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowvar.calibrate.residual import ResidualMoments, residual_moments
from lowvar.calibrate.shrinkage import shrink
from lowvar.calibrate.table import CovarianceTable, Structure
from lowvar.process.covariance import BasisDiagonal, Covariance, Diagonal, Isotropic
from lowvar.process.denoiser import Denoiser
from lowvar.process.noise import NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level

if TYPE_CHECKING:
    from lowvar.calibrate.calibration import Calibration

__all__ = ["ConditionalTable", "calibrate_classes"]


@dataclass(frozen=True, eq=False)
class ConditionalTable:
    """One table a class, all of one structure.

    Attributes:
        tables: by label 0, 1, ..

    Raises:
        ValueError: if there is none, or structures differ.
    """

    tables: tuple[CovarianceTable, ...]

    def __post_init__(self) -> None:
        """Checks the tables."""
        if not self.tables or len({t.structure for t in self.tables}) > 1:
            raise ValueError("a conditional table needs tables of one structure, one a class")

    def of(self, labels: Tensor) -> Labelled:
        """The covariance model of a batch with these labels, (B,) or a single one ().

        Raises:
            ValueError: for a label without a table.
        """
        labels = torch.as_tensor(labels)
        if bool(((labels < 0) | (labels >= len(self.tables))).any()):
            raise ValueError(f"labels are {labels.tolist()}; calibrated classes: 0 to {len(self.tables) - 1}")
        return Labelled(self, labels.reshape(-1))


@dataclass(frozen=True, eq=False)
class Labelled:
    """A `CovarianceModel`: the table of each sample's class.

    Attributes:
        conditional: the tables.
        labels: (n,), for n states or a whole multiple of n, which repeats them (guided pipelines double their batch).
    """

    conditional: ConditionalTable
    labels: Tensor

    def __call__(self, x: Tensor, level: Level, posterior: Posterior | None = None) -> Covariance:
        """The covariance at states x (B, *event_shape), in their dtype.

        Raises:
            ValueError: if B is no multiple of the number of labels.
        """
        tables, labels = self.conditional.tables, self.labels.cpu()
        if len(x) % len(labels):
            raise ValueError(f"there are {len(labels)} class labels for {len(x)} states; give one, or one each")
        labels, logsnr = labels.repeat(len(x) // len(labels)), level.logsnr.cpu()
        if logsnr.ndim == 0:
            found, where = labels.unique(return_inverse=True)
            variance = torch.stack([tables[label].at(logsnr) for label in found.tolist()])[where]
        else:
            pairs = zip(labels.tolist(), logsnr, strict=True)
            variance = torch.stack([tables[label].at(value) for label, value in pairs])
        variance, first = variance.to(x), tables[0]
        if first.structure == "isotropic":
            return Isotropic(variance, first.event_shape)
        if first.basis is not None:
            return BasisDiagonal(first.basis, variance)
        return Diagonal(variance.expand(-1, *first.event_shape))


def calibrate_classes(
    denoiser: Callable[[int], Denoiser],
    batches: Callable[[int], Iterable[Tensor]],
    classes: int,
    pooled: Calibration,
    noise: NoiseSource,
    replicates: int = 2,
) -> dict[Structure, ConditionalTable]:
    """Tables by class of a conditional model.

    Args:
        denoiser: label -> the denoiser with that condition, guided where it will be.
        batches: label -> one pass over calibration images of the class; may be empty.
        classes: number of labels.
        pooled: calibration over all classes, of the same denoisers; its knots and basis are used.
        noise: source of the noise.
        replicates: noises an image and knot.

    Returns:
        Conditional tables: isotropic, pixel and, where `pooled` has one, basis.

    Raises:
        ValueError: if there are no classes.
        UserError: if a denoiser's schedule is another one than the calibration's.
    """
    if classes < 1:
        raise ValueError(f"classes is {classes}; at least 1")
    found: list[ResidualMoments | None] = []
    for label in range(classes):
        one = denoiser(label)
        pooled.require(one.schedule)
        level = one.schedule.level(pooled.logsnr)
        images = list(batches(label))
        enough = sum(len(b) for b in images) >= 2  # one image has no standard error
        found.append(residual_moments(one, images, level, noise, pooled.twin.basis, replicates) if enough else None)
    tables: dict[Structure, ConditionalTable] = {"isotropic": _isotropic(found, pooled)}
    for structure in ("pixel", "basis"):
        if structure in pooled.tables:
            table = pooled.tables[structure]
            tables[structure] = ConditionalTable(tuple(_entries(m, table, replicates) for m in found))
    return tables


def _entries(moments: ResidualMoments | None, pooled: CovarianceTable, replicates: int) -> CovarianceTable:
    if moments is None:
        return pooled
    variance, se = (
        (moments.pixel, moments.pixel_se) if pooled.structure == "pixel" else (moments.basis, moments.basis_se)
    )
    assert variance is not None
    assert se is not None
    least = (2 / (moments.n * replicates)) ** 0.5  # a standard error from few images is itself uncertain
    variance, se = shrink(variance, torch.maximum(se, least * variance), pooled.variance)
    return replace(pooled, variance=variance, se=se)


def _isotropic(found: list[ResidualMoments | None], pooled: Calibration) -> ConditionalTable:
    base = pooled.table("isotropic")
    known = [m for m in found if m is not None]
    values: Mapping[int, tuple[Tensor, Tensor]] = {}
    if known:
        variance, se = (torch.stack([getattr(m, k) for m in known], 1) for k in ("mmse", "mmse_se"))
        variance, se = shrink(variance, se, torch.ones_like(variance))
        places = [i for i, m in enumerate(found) if m is not None]
        values = {i: (variance[:, k], se[:, k]) for k, i in enumerate(places)}
    return ConditionalTable(
        tuple(replace(base, variance=values[i][0], se=values[i][1]) if i in values else base for i in range(len(found)))
    )
