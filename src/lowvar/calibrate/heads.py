r"""Heads by name: made for a calibration, trained, written down and read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from lowvar.calibrate.estimator import EVERYWHERE, HeadEstimator, Trust
from lowvar.calibrate.fitting import FitConfig, HeadReport, Round, fit_head
from lowvar.calibrate.head import VarianceHead, spectrum_along
from lowvar.calibrate.lowrank import MAX_RANK, LowRank
from lowvar.calibrate.npr import NPR
from lowvar.calibrate.ocm import OCM
from lowvar.calibrate.residual import residual_moments
from lowvar.calibrate.shrinkage import shrink
from lowvar.calibrate.sn import SN
from lowvar.calibrate.table import CovarianceTable
from lowvar.errors import UserError
from lowvar.process.basis import Basis, DCTBasis, PixelBasis
from lowvar.process.denoiser import Denoiser
from lowvar.process.noise import NoiseSource
from lowvar.process.twin import GaussianTwin

if TYPE_CHECKING:
    from lowvar.calibrate.calibration import Calibration

__all__ = ["HEADS", "HeadBasis", "add_head", "basis_named", "make_head", "read_head", "write_head"]

HeadBasis = Literal["pixel", "dct", "pca"]
HEADS: Mapping[str, type[HeadEstimator]] = {cls.name: cls for cls in (NPR, SN, OCM, LowRank)}
"""Estimators with a head, by name."""


def basis_named(name: str, twin: GaussianTwin) -> Basis:
    """The basis of a name; principal components are the twin's.

    Raises:
        UserError: for another name, or principal components of a twin that has none.

    Example:
        >>> twin = GaussianTwin(torch.zeros(4), DCTBasis((4,)), torch.ones(4))
        >>> basis_named("dct", twin) is twin.basis
        True
    """
    if name not in get_args(HeadBasis):
        raise UserError(f"head basis is {name!r}; allowed: {', '.join(get_args(HeadBasis))}")
    if twin.basis.name == name:
        return twin.basis
    if name == "pca":
        raise UserError(
            f"principal components were not calibrated (events of {twin.mean.numel()} numbers are calibrated in the "
            f"{twin.basis.name} basis): give the head the basis dct or pixel"
        )
    return DCTBasis(twin.basis.event_shape) if name == "dct" else PixelBasis(twin.basis.event_shape)


def make_head(
    name: str,
    table: CovarianceTable,
    twin: GaussianTwin,
    noise: NoiseSource,
    *,
    rank: int = 4,
    width: int = 64,
    reference: CovarianceTable | None = None,
) -> HeadEstimator:
    """An untrained estimator, equal to its table (low rank: nearly).

    Args:
        name: npr, sn, ocm or lowrank.
        table: pixel or basis table it is relative to.
        twin: mean and variances of the data, that scale the head's inputs.
        noise: of the initial weights.
        rank: of `lowrank`, 0 to 16.
        width: of the hidden layers.
        reference: for `ocm`: a calibrated covariance in principal components, to lower the target's variance.

    Raises:
        UserError: for an unknown name or a rank out of range.
    """
    if name not in HEADS:
        raise UserError(f"head is {name!r}; allowed: {', '.join(HEADS)}")
    d = twin.mean.numel()
    if name == "lowrank" and not 0 <= rank <= min(MAX_RANK, d - 1):
        raise UserError(f"rank is {rank}; allowed for events of {d} numbers: 0 to {min(MAX_RANK, d - 1)}")
    basis = PixelBasis(table.event_shape) if table.basis is None else table.basis
    mean, spectrum = twin.mean, spectrum_along(twin, basis).float()
    outputs = 1 + rank if name == "lowrank" else 1
    ends = float(table.logsnr[0]), float(table.logsnr[-1])
    network = VarianceHead(basis, mean, spectrum, outputs, width, noise, *ends)
    if name == "ocm":
        useful = reference is not None and not basis.same_as(reference.basis or basis)
        return OCM(table, network, EVERYWHERE, reference if useful else None)
    return HEADS[name](table, network)


def write_head(head: HeadEstimator, put: Callable[[str, Tensor], Any]) -> dict[str, Any]:
    """JSON-ready fields; `put(name, tensor)` stores a tensor and returns what stands for it."""
    network = head.network
    return {
        "basis": head.basis.name,
        "outputs": network.outputs,
        "width": network.width,
        "range": [network.low, network.high],
        "trust": head.trust.to_json(),
        "logsnr": head.table.logsnr.tolist(),
        "variance": put(f"head.{head.name}.table", head.table.variance),
        "weights": {k: put(f"head.{head.name}.{k}", v) for k, v in network.state_dict().items()},
    }


class _Zeros(NoiseSource):
    """No noise: weights that are about to be read."""

    def normal(self, index: Any, shape: Any, **options: Any) -> Tensor:
        """Zeros."""
        return torch.zeros(len(index), *shape)

    uniform = normal


def read_head(name: str, fields: Mapping[str, Any], get: Callable[[Any], Tensor], twin: GaussianTwin) -> HeadEstimator:
    """The head that `write_head` wrote.

    Raises:
        UserError: for an unknown name or basis.
        KeyError, TypeError: if a part is missing.
        RuntimeError: if weights have other shapes.
    """
    if name not in HEADS:
        raise UserError(f"head is {name!r}; allowed: {', '.join(HEADS)}")
    shape = tuple(twin.mean.shape)
    basis = basis_named(fields["basis"], twin)
    pixel = isinstance(basis, PixelBasis)
    table = CovarianceTable(
        "pixel" if pixel else "basis", get(fields["logsnr"]), get(fields["variance"]), shape, None if pixel else basis
    )
    low, high = fields["range"]
    network = VarianceHead(
        basis, twin.mean, twin.spectrum.float(), int(fields["outputs"]), int(fields["width"]), _Zeros(), low, high
    )
    network.load_state_dict({k: get(v).float() for k, v in fields["weights"].items()})
    network.eval().requires_grad_(False)
    return HEADS[name](table, network, Trust.from_json(fields["trust"]))


def add_head(
    calibration: Calibration,
    denoiser: Denoiser,
    images: Tensor,
    name: str,
    noise: NoiseSource,
    *,
    basis: str = "pixel",
    rank: int = 4,
    width: int = 64,
    config: FitConfig | None = None,
    progress: Callable[[Round], object] | None = None,
) -> tuple[Calibration, HeadReport]:
    """Trains a head on images the network was not trained on, and the calibration with it.

    Args:
        calibration: of the denoiser; its tables are what the head is relative to.
        denoiser: the denoiser that was calibrated, with the same clipping.
        images: (n, *event_shape), n >= 6, on the denoiser's device.
        name: npr, sn, ocm or lowrank; one head of a name is kept.
        noise: of weights and draws.
        basis: coordinates of the head: pixel, dct or pca.
        rank: of `lowrank`.
        width: of the hidden layers.
        config: how it is trained.
        progress: called after every round.

    Returns:
        The calibration with the head, and what the head gained; where it gained nothing it answers with its table.

    Raises:
        UserError: for an unknown name or basis, a rank out of range, or another schedule.
    """
    calibration.require(denoiser.schedule)
    if name not in HEADS:
        raise UserError(f"head is {name!r}; allowed: {', '.join(HEADS)}")
    coordinates = basis_named(basis, calibration.twin)
    table = _table(calibration, denoiser, images, coordinates, noise)
    head = make_head(
        name, table, calibration.twin, noise, rank=rank, width=width, reference=calibration.tables.get("basis")
    )
    head.network.to(images.device)
    fit = fit_head(head, denoiser, images, noise, config, progress=progress)
    return replace(calibration, heads={**calibration.heads, name: fit.estimator}), fit.report


def _table(
    calibration: Calibration, denoiser: Denoiser, images: Tensor, basis: Basis, noise: NoiseSource
) -> CovarianceTable:
    """The calibrated table in a basis; measured here where the calibration's is another."""
    if isinstance(basis, PixelBasis):
        return calibration.table("pixel")
    if basis.same_as(calibration.twin.basis):
        return calibration.table("basis")
    level = denoiser.schedule.level(calibration.logsnr)
    moments = residual_moments(denoiser, images.split(256), level, noise, basis, 2)
    assert moments.basis is not None
    assert moments.basis_se is not None
    c = spectrum_along(calibration.twin, basis)
    reference = torch.stack([c / (torch.exp(k) * c + 1) for k in level.logsnr])  # up to a factor a level
    variance, se = shrink(moments.basis, moments.basis_se, reference)
    return CovarianceTable("basis", level.logsnr, variance, tuple(basis.event_shape), basis, se)
