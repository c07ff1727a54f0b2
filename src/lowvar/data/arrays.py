r"""Arrays in one file (.npy, .npz, .safetensors): latents that an autoencoder has made, or images of 8 bits.

    float16, bfloat16, float32 (n, C, H, W)    latents z, which are continuous and have no bound:  x = f z
    uint8 (n, C, H, W), C = 1 or 3             images with grey levels g of 256:                   x = 2 g / 255 - 1

f = 1 / std(z) is the scaling factor of Rombach et al. 2022, App. G: one number, measured on the training split and
rounded to 6 digits; what a model of latents makes is divided by it. In .npz and .safetensors the array is called
`latents` or `images`, and `labels` (n,) are class numbers, if any. Nothing is unpickled.

A .npy file is mapped into memory, not read: a set may be larger than memory. The file must stay while it is used. Rows
that are evenly spread over it, 16,384 at most, are looked at when it is opened; others when they are asked for. Row i
goes to a split by the hash of its number, as image files go by their name.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowvar.data.folder import split_of
from lowvar.data.images import Data, Images
from lowvar.errors import UserError

__all__ = ["SUFFIXES", "ArrayImages", "load_arrays"]

SUFFIXES = (".npy", ".npz", ".safetensors")
_NAMES = ("latents", "images")
_LOOKED_AT = 16_384
_BLOCK = 1024


class ArrayImages(Images):
    """Rows of an array, in memory or mapped from a file.

    Args:
        array: (n, C, H, W), uint8 or floating point.
        numbers: which rows, int64 (m,).
        scaling_factor: f of latents; None for images of 8 bits.
        labels: class numbers of these rows, (m,), or None.

    Example:
        >>> rows = ArrayImages(np.full((3, 4, 2, 2), 0.5, dtype=np.float16), torch.tensor([2, 0]), scaling_factor=0.25)
        >>> len(rows), rows.shape, float(rows.images([1]).max())
        (2, (4, 2, 2), 0.125)
    """

    def __init__(
        self, array: Any, numbers: Tensor, scaling_factor: float | None = None, labels: Tensor | None = None
    ) -> None:
        """Keeps the array; reads nothing."""
        self._array, self._numbers, self._factor, self._labels = array, numbers, scaling_factor, labels

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one row."""
        return tuple(self._array.shape[1:])

    @property
    def labels(self) -> Tensor | None:
        """Class numbers (m,) or None."""
        return self._labels

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._numbers)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The rows numbered `indices`, float32 (n, C, H, W): images in [-1, 1], latents scaled.

        Raises:
            UserError: naming the row, if a latent is not finite.
        """
        rows = self._numbers[torch.as_tensor(indices, dtype=torch.int64)]
        values = _rows(self._array, rows).float()
        if self._factor is None:
            return values / 127.5 - 1
        bad = ~torch.isfinite(values).flatten(1).all(1)
        if bool(bad.any()):
            raise UserError(f"row {int(rows[bad][0])} of the latents is not finite; take it out or encode it again")
        return values * self._factor

    def rescaled(self, scaling_factor: float) -> ArrayImages:
        """The same latents with another factor."""
        return ArrayImages(self._array, self._numbers, scaling_factor, self._labels)


def _rows(array: Any, rows: Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array[rows]
    return torch.from_numpy(np.ascontiguousarray(array[rows.numpy()]))


def _read(path: Path) -> tuple[Any, Any]:
    """The array, and labels or None.

    Raises:
        UserError: if the file does not read, or has none of the names.
    """
    from safetensors import SafetensorError

    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False), None
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in (*_NAMES, "labels") if name in file.files}
                names: Sequence[str] = file.files
        else:
            from safetensors.torch import load_file

            tensors = load_file(path)
            found, names = tensors, list(tensors)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the array {path} ({reason}); write it again, without pickled objects") from None
    name = next((name for name in _NAMES if name in found), None)
    if name is None:
        raise UserError(f"{path} has no array called latents or images (it has {', '.join(names)}); rename it")
    return found[name], found.get("labels")


def _kind(path: Path, array: Any) -> bool:
    """Whether these are latents, not images.

    Raises:
        UserError: for another type or number of dimensions.
    """
    shape, kind = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    if len(shape) != 4 or 0 in shape:
        raise UserError(
            f"the array in {path} has shape {shape}; latents and images are (n, channels, height, width), and rows of "
            "numbers come as a table (CSV, parquet)"
        )
    if kind == "uint8" and shape[1] not in (1, 3):
        raise UserError(f"the images in {path} have {shape[1]} channels; give (n, 1 or 3, height, width)")
    if kind not in ("uint8", "float16", "bfloat16", "float32"):
        raise UserError(f"the array in {path} is of type {kind}; latents are float16 or float32, images uint8")
    return kind != "uint8"


def _labels(path: Path, labels: Any, n: int) -> Tensor | None:
    if labels is None:
        return None
    found = labels if isinstance(labels, Tensor) else torch.from_numpy(np.asarray(labels))
    whole = not found.is_floating_point() and not found.is_complex() and found.dtype != torch.bool
    if not whole or found.shape != (n,) or int(found.min()) < 0:
        raise UserError(
            f"labels in {path} are {str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}; give one "
            f"whole number from 0 for each of the {n} rows"
        )
    return found.long()


def _factor(latents: ArrayImages, path: Path) -> float:
    """1 / std of the latents, to 6 digits."""
    some = torch.arange(0, len(latents), -(-len(latents) // _LOOKED_AT))
    count, total, square = 0, 0.0, 0.0
    for part in some.split(_BLOCK):
        z = latents.images(part).double()
        count, total, square = count + z.numel(), total + float(z.sum()), square + float((z**2).sum())
    variance = square / count - (total / count) ** 2
    if not variance > 1e-12 * max(1.0, square / count):
        raise UserError(f"all latents in {path} are equal; there is nothing to learn")
    return float(f"{1 / math.sqrt(variance):.6g}")


def load_arrays(path: Path, *, size: int | None = None, seed: int = 0, channels: int | None = None) -> Data:
    """Latents or 8-bit images of a file as `Data`.

    Args:
        path: .npy, .npz or .safetensors.
        size, channels: None: arrays are taken as they are.
        seed: which rows are calibration and test.

    Returns:
        `Data` with 256 levels (images), or without levels and with `scaling_factor` (latents).

    Raises:
        UserError: for a file that does not read, another shape or type, too few rows for three splits, latents that are
            not finite or all equal.
    """
    for name, given in (("size", size), ("channels", channels)):
        if given is not None:
            raise UserError(f"{name} is {given}, and {path} is an array, which is taken as it is; leave {name} out")
    array, labels = _read(path)
    is_latent = _kind(path, array)
    n = len(array)
    classes = _labels(path, labels, n)
    where = torch.tensor([split_of(str(i), seed) for i in range(n)])
    parts = [torch.nonzero(where == k)[:, 0] for k in range(3)]
    for numbers, name in zip(parts, ("train", "calibration", "test"), strict=True):
        if len(numbers) < 2:
            raise UserError(f"{path} has {n} rows, of which {len(numbers)} fall to the {name} split; give more rows")

    digest = hashlib.sha256(repr((tuple(array.shape), str(array.dtype), seed)).encode())
    seen = ArrayImages(array, torch.arange(n), 1.0 if is_latent else None)
    for rows in torch.arange(0, n, -(-n // _LOOKED_AT)).split(_BLOCK):
        digest.update(seen.images(rows).numpy().tobytes())
    if classes is not None:
        digest.update(classes.numpy().tobytes())

    factor = _factor(ArrayImages(array, parts[0], 1.0), path) if is_latent else None
    train, calibration, test = (
        ArrayImages(array, rows, factor, None if classes is None else classes[rows]) for rows in parts
    )
    levels = None if is_latent else 256
    return Data(str(path), train, calibration, test, levels, digest.hexdigest()[:16], scaling_factor=factor)
