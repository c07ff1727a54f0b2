r"""The spectrum that a basis head is relative to, from the training data.

The variances c of the training images along the directions of the 2-D DCT, or of their principal components (the
Gaussian twin's fit, `lowvar.calibrate.fit_twin`), from the first `IMAGES` images at most. They are rounded to float32
before they are used, so that what a folder or a checkpoint holds is what was trained with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from lowvar.calibrate import fit_twin
from lowvar.errors import UserError
from lowvar.process.basis import DCTBasis, MatrixBasis
from lowvar.process.head import Spectrum

if TYPE_CHECKING:
    from lowvar.train.draws import ImageSource

__all__ = ["IMAGES", "PCA_DIMENSIONS", "make_spectrum", "restored", "stored"]

IMAGES = 16384
PCA_DIMENSIONS = 4096  # the basis is a matrix: 64 MiB in float32, a minute to find
_BATCH = 1024


def _batches(images: ImageSource) -> Iterator[Tensor]:
    for rows in torch.arange(min(len(images), IMAGES)).split(_BATCH):
        yield images.images(rows)


class Looked(Protocol):
    """What a spectrum needs of the data: `lowvar.data.Data` has it."""

    @property
    def train(self) -> ImageSource: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def make_spectrum(data: Looked, basis: Literal["dct", "pca"]) -> Spectrum:
    """The spectrum of the training split.

    Args:
        data: the data set.
        basis: `dct` or `pca`.

    Raises:
        UserError: for `dct` of a table, if the images are too large for principal components, there are fewer than two,
            or all are equal.

    Example:
        >>> from lowvar.data import load
        >>> spectrum = make_spectrum(load("digits"), "dct")
        >>> tuple(spectrum.variance.shape), spectrum.basis.name
        ((1, 8, 8), 'dct')
    """
    d = torch.Size(data.shape).numel()
    if basis == "dct" and len(data.shape) == 1:
        raise UserError("basis dct is of images, and the data are rows of a table; give basis: pca")
    if basis == "pca" and d > PCA_DIMENSIONS:
        raise UserError(
            f"basis pca is a matrix of {d} x {d} for data of {d} numbers, and the limit is {PCA_DIMENSIONS}; "
            "give basis: dct"
        )
    try:
        twin = fit_twin(_batches(data.train), basis)
        own = twin.basis
        if isinstance(own, MatrixBasis):
            own = MatrixBasis(own.directions.float().contiguous(), own.event_shape, own.name)
        return Spectrum(own, twin.spectrum.float())
    except ValueError as error:
        raise UserError(f"head basis needs data that differ ({error}); give another head or more data") from error


def stored(spectrum: Spectrum) -> dict[str, Tensor]:
    """The spectrum as tensors: `variance`, and `directions` unless its basis is a formula."""
    tensors = {"variance": spectrum.variance}
    return tensors | ({"directions": spectrum.basis.directions} if isinstance(spectrum.basis, MatrixBasis) else {})


def restored(tensors: Mapping[str, Tensor], like: Spectrum) -> Spectrum:
    """The spectrum that `stored` gave; `like` has its shape and kind of basis."""
    shape = like.basis.event_shape
    known = "directions" in tensors
    return Spectrum(
        MatrixBasis(tensors["directions"], shape, like.basis.name) if known else DCTBasis(shape), tensors["variance"]
    )
