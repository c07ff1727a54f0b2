"""A folder of image files, found by `datasets` and decoded by Pillow when asked for.

Splits. With sub folders train/, validation/ (or val/, valid/) and test/ these are train, calibration and test; a
missing one is taken out of train. Otherwise image f goes by its name alone: u = sha256(seed : f) / 2^256 is uniform in
[0, 1); u < .8 trains, u < .9 calibrates, the rest is held out. So an image keeps its split when others are added or
removed. Where the images lie in class folders, the folders in alphabetical order are the labels 0, 1, ...

Only names are held in memory. Headers of the first 20,000 images are read at once to find the shape and report mixed
sizes and unreadable files early; later files are checked when they are decoded.
"""

from __future__ import annotations

import glob
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowvar.data.decode import check_arguments, decode, display, header
from lowvar.data.images import Data, Images
from lowvar.errors import UserError

__all__ = ["FileImages", "load_folder", "split_of"]

_SPLITS = {
    "train": ("train", "training"),
    "calibration": ("calibration", "validation", "valid", "val"),
    "test": ("test", "testing"),
}
_HEADERS = 20_000


class FileImages(Images):
    """Image files, decoded when asked for.

    Args:
        folder: what error messages name the files from.
        paths: the files, n >= 1.
        shape: (C, H, W) that every file has, or is brought to if `resize`.
        resize: scale and crop to H = W instead of refusing other sizes.
        labels: class numbers (n,) or None.
    """

    def __init__(
        self, folder: Path, paths: Sequence[str], shape: tuple[int, int, int], resize: bool, labels: Tensor | None
    ) -> None:
        """Keeps the names; opens nothing."""
        self._folder, self._paths, self._shape, self._resize, self._labels = folder, paths, shape, resize, labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self._shape

    @property
    def labels(self) -> Tensor | None:
        """Class numbers (n,) or None."""
        return self._labels

    def __len__(self) -> int:
        """Number of files."""
        return len(self._paths)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images numbered `indices`, float32 (n, C, H, W) in [-1, 1].

        Raises:
            UserError: naming the file, if one cannot be read or has another size.
        """
        channels, height, _ = self._shape
        parts = []
        for i in torch.as_tensor(indices, dtype=torch.int64).tolist():
            path = Path(str(self._paths[i]))
            name = display(path, self._folder)
            x = decode(path, name, channels=channels, size=height if self._resize else None)
            if x.shape != self._shape:
                raise UserError(_mixed(name, (x.shape[1], x.shape[2]), self._shape[1:]))
            parts.append(x)
        return torch.stack(parts) if parts else torch.empty(0, *self._shape)


def _mixed(name: str, size: tuple[int, int], expected: tuple[int, int]) -> str:
    return (
        f"the images have mixed sizes: {name} is {size[1]}x{size[0]} and others are {expected[1]}x{expected[0]} "
        "pixels; give a size to scale and crop them all to, or one size of image"
    )


def split_of(name: str, seed: int, shares: tuple[float, float] = (0.8, 0.9)) -> int:
    """0 (train), 1 (calibration) or 2 (test) from the hash of an image's name.

    Example:
        >>> [split_of(f"{i}.png", seed=0) for i in range(12)]
        [0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 1, 0]
    """
    u = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2.0**64
    return 0 if u < shares[0] else 1 if u < shares[1] else 2


def _find(folder: Path) -> list[tuple[str, str | None]]:
    """(path, class name or None) of every image below `folder`, sorted; hidden files and other types are skipped."""
    import datasets

    with tempfile.TemporaryDirectory(prefix="lowvar-") as cache:  # `datasets` leaves a lock file there
        pattern = {"images": glob.escape(str(folder)) + "/**"}
        found = datasets.load_dataset("imagefolder", data_files=pattern, streaming=True, cache_dir=cache)["images"]
        features = found.features or {}
        names = features["label"].names if "label" in features else None
        rows = found.cast_column("image", datasets.Image(decode=False)) if "image" in features else []
        result = []
        for row in rows:
            label = row.get("label")
            result.append((str(row["image"]["path"]), None if names is None or label is None else names[label]))
    return sorted(result)


def _split(folder: Path, seed: int) -> list[list[tuple[str, str | None]]]:
    """The files of train, calibration and test."""
    splits: list[list[tuple[str, str | None]]]
    train, calibration, test = (
        next((folder / name for name in names if (folder / name).is_dir()), None) for names in _SPLITS.values()
    )
    if train is None:
        calibration = test = None
    files = _find(folder if train is None else train)
    splits = [[], [] if calibration is None else _find(calibration), [] if test is None else _find(test)]
    share = 1.0 - 0.1 * ((calibration is None) + (test is None))  # of these files that stay in train
    shares = (share, share + 0.1 * (calibration is None))
    for path, label in files:
        splits[split_of(display(path, folder), seed, shares)].append((path, label))
    return splits


def load_folder(folder: Path, *, size: int | None = None, seed: int = 0, channels: int | None = None) -> Data:
    """A folder of images as `Data` with 256 levels.

    Args:
        folder: searched with its sub folders.
        size: scale every image's shorter side to this and crop the centre; None: all images have one size already.
        seed: which images are calibration and test, where no sub folders say so.
        channels: 1 or 3; None: 1 if all images are grey, else 3.

    Raises:
        UserError: for a folder without images, an unreadable image, mixed sizes without `size`, a split without
            images, or arguments outside these.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as d:
        ...     for i in range(40):
        ...         Image.new("RGB", (6, 6), (i, 2 * i, 3 * i)).save(f"{d}/{i}.png")
        ...     data = load_folder(Path(d))
        ...     data.shape, len(data.train) + len(data.calibration) + len(data.test)
        ((3, 6, 6), 40)
    """
    check_arguments(size, channels)
    folder = folder.resolve()
    splits = _split(folder, seed)
    files = [file for part in splits for file in part]
    if not files:
        raise UserError(f"the folder {folder} has no images; give a folder with png, jpeg, webp, bmp or tiff files")
    for part, name in zip(splits, _SPLITS, strict=True):
        if not part:
            raise UserError(
                f"the folder {folder} has {len(files)} images and none falls into the {name} split; "
                "add images, or sort them into the sub folders train, validation and test"
            )

    heads = [header(Path(path), display(path, folder)) for path, _ in files[:_HEADERS]]
    if size is None:
        for (path, _), (_, height, width) in zip(files, heads, strict=False):
            if (height, width) != heads[0][1:]:
                raise UserError(_mixed(display(path, folder), (height, width), heads[0][1:]))
    colours = channels if channels is not None else max(head[0] for head in heads)
    shape = (colours, *heads[0][1:]) if size is None else (colours, size, size)

    classes = sorted({label for _, label in files if label is not None})
    labelled = len(classes) > 1 and all(label is not None for _, label in files)
    digest = hashlib.sha256(repr((shape, classes if labelled else None)).encode())
    sets = []
    for part in splits:
        labels = torch.tensor([classes.index(str(label)) for _, label in part]) if labelled else None
        sets.append(FileImages(folder, [path for path, _ in part], shape, size is not None, labels))
        digest.update(repr([(display(path, folder), Path(path).stat().st_size) for path, _ in part]).encode())
    train, calibration, test = sets
    names = tuple(classes) if labelled else ()
    return Data(str(folder), train, calibration, test, 256, digest.hexdigest()[:16], classes=names)
