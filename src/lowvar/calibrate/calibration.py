r"""A calibration: what one pass over data tells about a denoiser, as one value that can be saved and plugged in.

It holds, at knots of logsnr, the mmse curve with standard errors, the analytic variance (Bao et al. 2022a), residual
tables (isotropic, channel, pixel, basis), and the Gaussian twin whose basis the tables share; trained heads and tables
by class where there are any; and the fingerprint of the schedule it was made for, because a table read against another
schedule's logsnr would still be a table of this network but its levels would not be those the network was asked at.

`calibrate` measures it (`lowvar.calibrate.measurement`); how it is kept on disk is in `lowvar.calibrate.stored`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowvar.calibrate.conditional import ConditionalTable
from lowvar.calibrate.convert import Converted
from lowvar.calibrate.deficit import MarginalDeficit
from lowvar.calibrate.estimator import HeadEstimator
from lowvar.calibrate.heads import HEADS
from lowvar.calibrate.stored import read, written
from lowvar.calibrate.table import CovarianceTable, Structure
from lowvar.errors import UserError
from lowvar.process.denoiser import CovarianceModel, Denoiser, WithCovariance
from lowvar.process.mixture import MixtureTwin
from lowvar.process.path import PathMoments
from lowvar.process.schedule import Schedule
from lowvar.process.solver import Solver
from lowvar.process.twin import GaussianTwin

__all__ = ["Calibration", "missing_covariance"]


def missing_covariance(name: str, held: Sequence[str]) -> UserError:
    """What is said where a calibration does not hold a covariance: what it holds, and how to get the other.

    Example:
        >>> print(missing_covariance("npr", ("analytic", "isotropic")))
        covariance is 'npr'; calibrated here: analytic, isotropic; train it with `lowvar calibrate --head npr`
    """
    hint = f"; train it with `lowvar calibrate --head {name}`" if name in HEADS else ""
    if name == "convert":
        hint = "; make it of a network with head 'range' by `lowvar calibrate --head convert`"
    return UserError(f"covariance is {name!r}; calibrated here: {', '.join(held)}{hint}")


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured (see the module).

    Attributes:
        fingerprint: of the schedule.
        logsnr, mmse, mmse_se: the curve, (L,) float64; mmse is a dimension.
        analytic: analytic variance, (L,).
        tables: residual tables by structure.
        twin: the Gaussian twin of the data.
        n: images the residuals were measured on.
        mixture: the mixture twin, the control variate of `lowvar.process.TwinFlow`, or None.
        paths: moments of its remainder along reverse paths, which choose that solver's coefficients and grid, or None.
        heads: trained heads by name (see `heads`).
        converted: C from a learned-range head, or None.
        conditional: tables by class, by structure (see `of_class`).
        levels: grey levels of the data, where they have any.
        deficits: calibrated noise of solvers, one a solver and grid (see `deficit`).
        guidance: scale of classifier-free guidance that `conditional` was measured under; everything else is of all
            classes without guidance.
    """

    fingerprint: str
    logsnr: Tensor
    mmse: Tensor
    mmse_se: Tensor
    analytic: Tensor
    tables: Mapping[Structure, CovarianceTable]
    twin: GaussianTwin
    n: int
    mixture: MixtureTwin | None = None
    paths: PathMoments | None = None
    heads: Mapping[str, HeadEstimator] = field(default_factory=dict)
    converted: Converted | None = None
    conditional: Mapping[Structure, ConditionalTable] = field(default_factory=dict)
    levels: int | None = None
    deficits: tuple[MarginalDeficit, ...] = ()
    guidance: float = 1.0

    @property
    def event_shape(self) -> torch.Size:
        """Shape of an event."""
        return self.twin.mean.shape

    @property
    def covariances(self) -> tuple[str, ...]:
        """Names that `model` knows: tables, then what depends on the state (`state_covariances`)."""
        return ("analytic", *self.tables, *self.state_covariances)

    @property
    def state_covariances(self) -> tuple[str, ...]:
        """Names of the covariances that depend on the state: trained heads, and `convert` where there is one."""
        return (*self.heads, *(() if self.converted is None else ("convert",)))

    @property
    def classes(self) -> int:
        """Classes that have tables of their own; 0: none."""
        return len(next(iter(self.conditional.values())).tables) if self.conditional else 0

    def require(self, schedule: Schedule) -> None:
        """Refuses another schedule than the one calibrated.

        Raises:
            UserError: naming both fingerprints.
        """
        if schedule.fingerprint != self.fingerprint:
            raise UserError(
                f"this calibration was made for a schedule with fingerprint {self.fingerprint}, the model's schedule "
                f"has {schedule.fingerprint}: calibrate again with `lowvar calibrate --model MODEL --data DATA --out "
                "RUN`"
            )

    def table(self, structure: str) -> CovarianceTable:
        """The table of a structure; `analytic` is the isotropic table of the analytic estimate.

        Raises:
            UserError: if there is no such table.
        """
        if structure == "analytic":
            return CovarianceTable("isotropic", self.logsnr, self.analytic, tuple(self.event_shape))
        if structure not in self.tables:
            raise missing_covariance(structure, self.covariances)
        return self.tables[structure]  # type: ignore[index]

    def model(self, structure: str, labels: Tensor | None = None) -> CovarianceModel:
        """The covariance model of a name: (x, level, posterior) -> C, as a kernel or a scheduler's step evaluates it.

        Args:
            structure: a table (see `table`), the name of a trained head, or `convert`, which reads a learned-range
                head's fraction off the posterior.
            labels: classes of the samples, (B,) or (), for a table by class.

        Raises:
            UserError: if there is none of that name.
        """
        if labels is not None:
            if structure not in self.conditional:
                known = ", ".join(self.conditional) or "none"
                raise UserError(f"covariance {structure!r} is not calibrated by class; by class: {known}")
            return self.conditional[structure].of(labels)  # type: ignore[index]
        if structure in self.heads:
            return self.heads[structure]
        if structure == "convert" and self.converted is not None:
            return self.converted
        return self.table(structure)

    def attach(
        self,
        denoiser: Denoiser,
        structure: str = "basis",
        clip: float | None = None,
        labels: Tensor | None = None,
    ) -> WithCovariance:
        """The denoiser with the covariance of a structure.

        Args:
            denoiser: the denoiser that was calibrated, with the same clipping.
            structure: see `model`.
            clip: limit the covariance sample by sample to what data in [-clip, clip] allow (`Posterior.clip`). Off by
                default: the table was measured around the clipped mean, and scaling it down again leaves too little
                noise.
            labels: see `model`.

        Raises:
            UserError: if the schedule is another one or there is no such table.
        """
        self.require(denoiser.schedule)
        return WithCovariance(denoiser, self.model(structure, labels), clip)

    def deficit(self, solver: Solver, logsnr: Tensor) -> MarginalDeficit | None:
        """What was measured that a solver's marginals lack on the grid of these levels (K + 1,); None: not measured.

        Example:
            >>> from lowvar.calibrate import calibrate, marginal_deficit
            >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
            >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([1.0, 0.25]))
            >>> denoiser, solver = twin.denoiser(CosineVP()), ReverseKernel(0.0, "small")
            >>> data, grid = twin.sample(Independent(1).normal(range(64), (2,))), torch.tensor([1.0, 0.5, 0.0])
            >>> calibration = calibrate(denoiser, lambda: [data], components=(), paths=0)
            >>> found = marginal_deficit(denoiser, solver, grid, calibration.twin, n=64)
            >>> calibration = calibration.with_deficit(found)
            >>> calibration.deficit(solver, CosineVP().at(grid).logsnr) is found
            True
            >>> calibration.deficit(ReverseKernel(0.5, "small"), CosineVP().at(grid).logsnr) is None
            True
        """
        return next((d for d in self.deficits if d.is_of(solver, logsnr)), None)

    def with_deficit(self, deficit: MarginalDeficit) -> Calibration:
        """With a deficit more, in the place of an older one of the same solver and grid.

        Raises:
            UserError: if it is in another basis than the twin's.
        """
        if not deficit.basis.same_as(self.twin.basis):
            raise UserError(
                f"this deficit was measured in another basis ({deficit.basis.name}) than the calibrated twin's "
                f"({self.twin.basis.name}): measure it with `marginal_deficit(.., twin=calibration.twin)`"
            )
        others = [d for d in self.deficits if not d.is_of(deficit.solver, deficit.logsnr)]
        return replace(self, deficits=(*others, deficit))

    def of_class(self, label: int) -> Calibration:
        """With the tables of a class in the place of those of all classes; twin, heads and grids stay as they are.

        Raises:
            UserError: if there are no tables by class, or none of this one.
        """
        if not self.conditional:
            raise UserError("this calibration has no tables by class: make them by `lowvar calibrate --by-class`")
        tables = dict(self.tables)
        for structure, found in self.conditional.items():
            if not 0 <= label < len(found.tables):
                raise UserError(f"class is {label}; calibrated classes: 0 to {len(found.tables) - 1}")
            tables[structure] = found.tables[label]
        if "channel" in tables and "channel" not in self.conditional:
            pixel = tables["pixel"].variance
            channel = pixel.mean(tuple(range(2, pixel.ndim)), keepdim=True)
            tables["channel"] = replace(tables["channel"], variance=channel, se=None)
        return replace(self, tables=tables, conditional={})

    def reading(self, label: int | None, guidance: float = 1.0) -> Calibration:
        """`of_class` where a class is sampled whose tables were measured under its guidance; else as it is."""
        measured = label is not None and bool(self.conditional) and self.guidance == guidance
        return self.of_class(label) if measured and label is not None else self

    def path_grid(self, schedule: Schedule, steps: int) -> Tensor:
        """The grid of the twin's flow: the best `steps` evaluations by the statistics of its remainder.

        Raises:
            UserError: if the schedule is another one, no paths were measured.
        """
        self.require(schedule)
        if self.paths is None:
            raise UserError("this calibration has no path statistics: calibrate again with `lowvar calibrate`")
        return self.paths.grid(schedule, steps)

    def to_json(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-ready fields, and the tensors that do not belong there (see `lowvar.calibrate.stored`)."""
        return written(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
        """The calibration that `to_json` wrote.

        Raises:
            UserError: if a part is missing or does not fit.
        """
        return cls(**read(fields, tensors))
