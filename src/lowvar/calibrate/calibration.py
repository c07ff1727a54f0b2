r"""A calibration: what one pass over data tells about a denoiser, as one value that can be saved and plugged in.

It holds, at knots of logsnr, the mmse curve with standard errors, the analytic variance (Bao et al. 2022a), residual
tables (isotropic, channel, pixel, basis), and the Gaussian twin whose basis the tables share; trained heads and tables
by class where there are any; and the fingerprint of the schedule it was made for, because a table read against another
schedule's logsnr would still be a table of this network but its levels would not be those the network was asked at.

`to_json` gives numbers as lists (they go into a scheduler's config) and everything above 64k numbers, and every dense
basis, as tensors (they go into a safetensors file beside it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lowvar.calibrate.analytic import analytic_variance
from lowvar.calibrate.conditional import ConditionalTable
from lowvar.calibrate.convert import Converted
from lowvar.calibrate.estimator import HeadEstimator
from lowvar.calibrate.heads import HEADS, read_head, write_head
from lowvar.calibrate.mean import fit_mean
from lowvar.calibrate.mixture import COMPONENTS, fit_mixture
from lowvar.calibrate.path import LEVELS, PATHS, SHARED, path_moments, remainder_share
from lowvar.calibrate.residual import ResidualMoments, residual_moments
from lowvar.calibrate.shrinkage import shrink
from lowvar.calibrate.table import CovarianceTable, Structure
from lowvar.calibrate.twin import fit_twin
from lowvar.errors import UserError
from lowvar.process.basis import Basis, DCTBasis, MatrixBasis, PixelBasis
from lowvar.process.corrected import CorrectedDenoiser, MeanCorrection
from lowvar.process.covariance import BasisDiagonal
from lowvar.process.denoiser import CovarianceModel, Denoiser, WithCovariance
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.path import PathMoments
from lowvar.process.schedule import Schedule
from lowvar.process.twin import GaussianTwin

__all__ = ["JSON_LIMIT", "Calibration", "calibrate", "default_logsnr", "missing_covariance"]

JSON_LIMIT = 65536
_PATHS = ("logsnr", "moments", "variance", "size")


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


def default_logsnr(schedule: Schedule, knots: int = 49) -> Tensor:
    """Equally spaced logsnr from the schedule's noisiest level (not below -12) to its t_min, (knots,).

    Example:
        >>> from lowvar.process.schedule import Flow
        >>> default_logsnr(Flow(), 3).shape
        torch.Size([3])
    """
    low = max(float(schedule.logsnr(1.0)), -12.0)
    return torch.linspace(low, float(schedule.logsnr(schedule.t_min)), knots, dtype=torch.float64)


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
        conditional: tables by class, by structure.
        levels: grey levels of the data, where they have any.
        mean: correction of the denoiser's mean that everything else was measured with, or None (see `corrected`).
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
    mean: MeanCorrection | None = None

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
        """The denoiser with its mean corrected, where a correction was fitted, and the covariance of a structure.

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
        return WithCovariance(self.corrected(denoiser), self.model(structure, labels), clip)

    def corrected(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser that was measured: with its mean corrected, or as it is where it is so or nothing was fitted.

        Args:
            denoiser: the denoiser that was calibrated, with the same clipping.

        Raises:
            UserError: if the schedule is another one.
        """
        self.require(denoiser.schedule)
        done = self.mean is None or isinstance(denoiser, CorrectedDenoiser)
        return denoiser if done or self.mean is None else CorrectedDenoiser(denoiser, self.mean)

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
        """JSON-ready fields, and the tensors that do not belong there (float32; curves stay float64 in the fields)."""
        tensors: dict[str, Tensor] = {}

        def put(name: str, value: Tensor) -> Any:
            if value.numel() <= JSON_LIMIT:
                return _short(value.tolist())
            tensors[name] = value.float().contiguous()
            return {"tensor": name}

        tables = {}
        for structure, table in self.tables.items():
            tables[structure] = {"variance": put(f"variance.{structure}", table.variance)}
            if table.se is not None:
                tables[structure]["se"] = put(f"se.{structure}", table.se)

        def keep(name: str, value: Tensor) -> Any:
            tensors[name] = value.detach().cpu().float().contiguous()
            return {"tensor": name}

        basis = self.twin.basis
        if isinstance(basis, MatrixBasis):
            tensors["basis"] = basis.directions.float().contiguous()
        fields = {
            "fingerprint": self.fingerprint,
            "event_shape": list(self.event_shape),
            "n": self.n,
            "levels": self.levels,
            "logsnr": self.logsnr.tolist(),
            "mmse": self.mmse.tolist(),
            "mmse_se": self.mmse_se.tolist(),
            "analytic": self.analytic.tolist(),
            "tables": tables,
            "twin": {
                "basis": basis.name,
                "mean": put("twin.mean", self.twin.mean),
                "spectrum": put("twin.spectrum", self.twin.spectrum),
            },
        }
        if self.mixture is not None:
            parts = {name: put(f"mixture.{name}", getattr(self.mixture, name)) for name in ("mean", "spectrum")}
            fields["mixture"] = {"weight": self.mixture.weight.tolist(), **parts}
        if self.paths is not None:
            fields["paths"] = {k: put(f"paths.{k}", getattr(self.paths, k)) for k in _PATHS}
            if self.paths.share is not None:
                fields["paths"]["share"] = put("paths.share", self.paths.share)
        if self.mean is not None:
            fields["mean"] = {
                "logsnr": self.mean.logsnr.tolist(),
                "clip": self.mean.clip,
                "coefficient": put("mean.coefficient", self.mean.coefficient),
            }
        if self.heads:
            fields["heads"] = {name: write_head(head, keep) for name, head in self.heads.items()}
        if self.conditional:
            fields["conditional"] = {
                structure: keep(f"conditional.{structure}", torch.stack([t.variance for t in table.tables]))
                for structure, table in self.conditional.items()
            }
        if self.converted is not None:
            fields["converted"] = self.converted.to_json()
        return fields, tensors

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
        """The calibration that `to_json` wrote.

        Raises:
            UserError: if a part is missing or does not fit.
        """
        try:
            return cls._read(fields, tensors)
        except (KeyError, TypeError, IndexError, RuntimeError) as error:
            raise UserError(
                f"the calibration is incomplete ({error}): make it again with `lowvar calibrate`"
            ) from error

    @classmethod
    def _read(cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
        def get(value: Any) -> Tensor:
            value = tensors[value["tensor"]] if isinstance(value, Mapping) else value
            return torch.as_tensor(value, dtype=torch.float64)

        shape = tuple(fields["event_shape"])
        name = fields["twin"]["basis"]
        basis: Basis
        if name == "dct":
            basis = DCTBasis(shape)
        elif name == "pixel":
            basis = PixelBasis(shape)
        else:
            basis = MatrixBasis(tensors["basis"].double(), shape, name)
        logsnr = get(fields["logsnr"])
        tables: dict[Structure, CovarianceTable] = {}
        for structure, table in fields["tables"].items():
            se = get(table["se"]) if "se" in table else None
            own = basis if structure == "basis" else None
            tables[structure] = CovarianceTable(structure, logsnr, get(table["variance"]), shape, own, se)
        twin = GaussianTwin(get(fields["twin"]["mean"]), basis, get(fields["twin"]["spectrum"]))
        mixture = paths = None
        if "mixture" in fields:
            parts = [get(fields["mixture"][k]) for k in ("weight", "mean", "spectrum")]
            mixture = MixtureTwin(parts[0], parts[1], parts[2], basis)
        if "paths" in fields:
            share = get(fields["paths"]["share"]) if "share" in fields["paths"] else None
            paths = PathMoments(*(get(fields["paths"][k]) for k in _PATHS), share=share)
        mean = None
        if "mean" in fields and mixture is not None:
            part = fields["mean"]
            mean = MeanCorrection(mixture, get(part["logsnr"]), get(part["coefficient"]), part["clip"])
        mmse, mmse_se, analytic = (get(fields[k]) for k in ("mmse", "mmse_se", "analytic"))
        heads = {name: read_head(name, head, get, twin) for name, head in fields.get("heads", {}).items()}
        converted = Converted.from_json(fields["converted"], tables["pixel"]) if "converted" in fields else None
        conditional = {
            structure: ConditionalTable(tuple(replace(tables[structure], variance=v, se=None) for v in get(values)))
            for structure, values in fields.get("conditional", {}).items()
        }
        n = int(fields["n"])
        measured = (logsnr, mmse, mmse_se, analytic, tables, twin, n)
        more = (mixture, paths, heads, converted, conditional, fields.get("levels"), mean)
        return cls(fields["fingerprint"], *measured, *more)


def _short(numbers: Any) -> Any:
    """Nested lists with 7 significant digits: float32's, which is more than any calibration knows."""
    return [_short(v) for v in numbers] if isinstance(numbers, list) else float(f"{numbers:.7g}")


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
    correct: bool = False,
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
        correct: fit a correction of the mean first (`lowvar.calibrate.fit_mean`; as many evaluations as the tables) and
            measure everything else on the corrected denoiser. Off by default: tables are then those of the network as
            it is; `twin-flow` has its own share of the remainder either way.
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
    mixture = mean = None
    if correct:
        mixture = _mixture(batches, twin_batches, twin, components)
        mean = fit_mean(denoiser, mixture, batches(), level, source, replicates, bound).correction
        denoiser = CorrectedDenoiser(denoiser, mean)
    moments = residual_moments(denoiser, batches(), level, source, twin.basis, replicates)
    mixture = _mixture(batches, twin_batches, twin, components) if mixture is None else mixture
    like = next(iter(batches()))
    place = {"dtype": like.dtype, "device": like.device}
    table = None
    if paths:
        share = None if correct else remainder_share(denoiser, mixture, _first(batches(), SHARED, progress), noise)
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
        mean=mean,
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
