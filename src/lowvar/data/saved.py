"""A data set on disk that `datasets` opens: a `save_to_disk` folder or a parquet file, with an image column.

Rows stay in memory-mapped Arrow files; an image is decoded by Pillow when it is asked for. Splits called train,
validation and test are taken as they are; otherwise row i goes by the hash of its number, as files go by their name.
A parquet file is converted once into a temporary folder that lives as long as the data does.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvar.data.decode import check_arguments, decode, header
from lowvar.data.folder import split_of
from lowvar.data.images import Data, Images
from lowvar.errors import UserError

__all__ = ["RowImages", "load_saved"]

_HEADERS = 20_000


class RowImages(Images):
    """Rows of an Arrow table with an undecoded image column.

    Args:
        rows: a `datasets.Dataset`.
        column: the image column, whose values are {"bytes", "path"}.
        numbers: which rows, int64 (n,).
        shape: (C, H, W) that every image has, or is brought to if `resize`.
        resize: scale and crop to H = W instead of refusing other sizes.
        labels: class numbers (n,) or None.
        keep: kept alive with this object (the temporary folder under the rows).
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        numbers: Tensor,
        shape: tuple[int, int, int],
        resize: bool,
        labels: Tensor | None = None,
        keep: object = None,
    ) -> None:
        """Keeps the rows; decodes nothing."""
        self._rows, self._column, self._numbers, self._keep = rows, column, numbers, keep
        self._shape, self._resize, self._labels = shape, resize, labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self._shape

    @property
    def labels(self) -> Tensor | None:
        """Class numbers (n,) or None."""
        return self._labels

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._numbers)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images numbered `indices`, float32 (n, C, H, W) in [-1, 1].

        Raises:
            UserError: naming the row, if its image cannot be read or has another size.
        """
        channels, height, width = self._shape
        numbers = self._numbers[torch.as_tensor(indices, dtype=torch.int64)].tolist()
        parts = []
        for number, value in zip(numbers, self._rows[numbers][self._column] if numbers else [], strict=True):
            x = decode(*_source(value, number), channels=channels, size=height if self._resize else None)
            if x.shape != self._shape:
                raise UserError(
                    f"the images have mixed sizes: row {number} is {x.shape[2]}x{x.shape[1]} and others are "
                    f"{width}x{height} pixels; give a size to scale and crop them all to"
                )
            parts.append(x)
        return torch.stack(parts) if parts else torch.empty(0, *self._shape)


class _Temporary:
    """A folder that goes when the last object that uses it goes, or with the process."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="lowvar-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _source(value: dict[str, Any] | None, number: int) -> tuple[Path | bytes, str]:
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise UserError(f"row {number} has no image; take the row out of the data")
    content = value.get("bytes")
    return (Path(value["path"]) if content is None else content), f"in row {number}"


def _open(path: Path) -> tuple[dict[str, Any], object]:
    """Splits by name, undecoded, and what has to be kept alive under them."""
    import datasets
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    broken = (OSError, ValueError, RuntimeError, pa.ArrowException, DatasetsError)
    try:
        if path.is_dir():
            found, keep = datasets.load_from_disk(str(path)), None
        else:
            keep = _Temporary()
            found = datasets.load_dataset("parquet", data_files={"rows": str(path)}, cache_dir=keep.path)
    except broken as error:
        raise UserError(f"cannot open the data set {path} ({str(error).splitlines()[0]}); write it again") from None
    return ({str(name): rows for name, rows in found.items()} if isinstance(found, dict) else {"rows": found}), keep


def load_saved(path: Path, *, size: int | None = None, seed: int = 0, channels: int | None = None) -> Data:
    """A data set on disk as `Data` with 256 levels; arguments as in `load`.

    Raises:
        UserError: for a broken file, a data set without an image column, without rows in a split, with mixed sizes and
            no `size`, or with an unreadable image.
    """
    import datasets

    check_arguments(size, channels)
    tables, keep = _open(path)
    first = next(iter(tables.values()))
    column = next((name for name, kind in first.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise UserError(f"{path} has no image column (it has {', '.join(first.features)}); give a data set of images")
    tables = {name: table.cast_column(column, datasets.Image(decode=False)) for name, table in tables.items()}
    first = next(iter(tables.values()))
    label = next((name for name, kind in first.features.items() if isinstance(kind, datasets.ClassLabel)), None)

    picked: list[tuple[Any, Tensor]] = []
    names = ("train", "validation", "test")
    if all(name in tables for name in names):
        picked = [(tables[name], torch.arange(len(tables[name]))) for name in names]
    else:
        table = tables.get("train", first)
        where = torch.tensor([split_of(str(i), seed) for i in range(len(table))])
        picked = [(table, torch.nonzero(where == k)[:, 0]) for k in range(3)]
    for (_, numbers), name in zip(picked, names, strict=True):
        if len(numbers) == 0:
            raise UserError(f"{path} has no row in the {name} split; give more rows, or the splits {', '.join(names)}")

    heads = []
    for table, numbers in picked:
        for i in numbers[:_HEADERS].tolist():
            heads.append(header(*_source(table[i][column], i)))
            if size is None and heads[-1][1:] != heads[0][1:]:
                a, b = heads[0], heads[-1]
                raise UserError(
                    f"the images have mixed sizes: row {i} is {b[2]}x{b[1]} and others are {a[2]}x{a[1]} pixels; "
                    "give a size to scale and crop them all to"
                )
    colours = channels if channels is not None else max(head[0] for head in heads)
    shape = (colours, *heads[0][1:]) if size is None else (colours, size, size)

    digest = hashlib.sha256(repr(shape).encode())
    sets = []
    for table, numbers in picked:
        labels = None if label is None else torch.tensor(table[label])[numbers]
        sets.append(RowImages(table, column, numbers, shape, size is not None, labels, keep))
        first_image, _ = _source(table[int(numbers[0])][column], int(numbers[0]))
        digest.update(repr((len(table), numbers.tolist(), first_image)).encode())
    train, calibration, test = sets
    return Data(str(path), train, calibration, test, levels=256, fingerprint=digest.hexdigest()[:16])
