"""Patches of the two colour photographs that ship with scikit-learn (427 x 640 pixels each).

Each photograph is cut into a grid of tiles at least as large as a patch. Tile (row r, column c) of photograph p
belongs to the class (c + 2 r + p) mod 5: classes 0, 1, 2 are for training, 3 for calibration, 4 is held out. Along a
row and along a column the classes follow each other, so each split sees sky, roof, flower and leaf alike, and a patch
lies inside one tile: no pixel of a training patch occurs in a calibration or held-out patch.

All positions inside the tiles of a split are listed, shuffled by the seed, and the first `limit` are kept, so no patch
occurs twice. Patches overlap and neighbouring ones are alike: intervals over them are narrower than intervals over
independent photographs would be. Patches are cut when they are asked for; a split costs 24 bytes a patch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lowvar.data.images import Data, Images
from lowvar.errors import UserError
from lowvar.process.noise import Independent

__all__ = ["Patches", "load_photos"]

_LIMITS = (20_000, 4_000, 10_000)
_CLASSES = ((0, 1, 2), (3,), (4,))
_LARGEST = 213  # two rows and three columns of tiles still hold every class


class Patches(Images):
    """Square patches of a stack of photographs, cut when asked for.

    Args:
        photos: uint8 (p, C, H, W).
        corners: int64 (n, 3): photograph, row and column of each patch's upper left pixel.
        size: side of a patch in pixels.
    """

    def __init__(self, photos: Tensor, corners: Tensor, size: int) -> None:
        """Keeps a view of the photographs and the corners."""
        self._windows = photos.unfold(2, size, 1).unfold(3, size, 1)  # (p, C, rows, columns, size, size), a view
        self.corners = corners
        self.size = size

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, size, size)."""
        return self._windows.shape[1], self.size, self.size

    def __len__(self) -> int:
        """Number of patches."""
        return len(self.corners)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The patches numbered `indices`, float32 (n, C, size, size) in [-1, 1]."""
        p, i, j = self.corners[torch.as_tensor(indices, dtype=torch.int64)].unbind(1)
        return self._windows[p, :, i, j].to(torch.float32) / 127.5 - 1


def _corners(count: int, height: int, width: int, size: int, classes: Sequence[int]) -> Tensor:
    """Every corner (photograph, row, column) whose patch lies inside one tile of `classes`."""
    side = max(64, size, min(2 * size, 128))
    rows, columns = height // side, width // side
    parts = []
    for p in range(count):
        for r in range(rows):
            for c in range(columns):
                if (c + 2 * r + p) % 5 in classes:
                    i = torch.arange(r * height // rows, (r + 1) * height // rows - size + 1)
                    j = torch.arange(c * width // columns, (c + 1) * width // columns - size + 1)
                    parts.append(torch.cartesian_prod(torch.tensor([p]), i, j))
    return torch.cat(parts)


def load_photos(*, size: int | None = None, seed: int = 0, channels: int | None = None) -> Data:
    """Patches as `Data`: float32 (n, C, size, size) in [-1, 1], 256 levels, no labels.

    Args:
        size: side of a patch, 1 to 213; 16 if None. At most 20,000 / 4,000 / 10,000 patches; fewer where the tiles
            have fewer positions.
        seed: which patches are drawn and in which order; the regions do not depend on it.
        channels: 3 (None) or 1, the luminance (299 R + 587 G + 114 B) / 1000.

    Raises:
        UserError: for a size or number of channels outside these.

    Example:
        >>> data = load_photos(size=12, channels=1)
        >>> data.shape, len(data.train), len(data.calibration), len(data.test)
        ((1, 12, 12), 20000, 4000, 10000)
    """
    size = 16 if size is None else size
    if not 1 <= size <= _LARGEST:
        raise UserError(f"size is {size}; patches of the photos are 1 to {_LARGEST} pixels wide")
    if channels not in (None, 1, 3):
        raise UserError(f"channels is {channels}; the photos have 3, or 1 for grey")
    from sklearn.datasets import load_sample_images  # 1 s of import, so only where it is needed

    photos = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    photos = photos.permute(0, 3, 1, 2)
    if channels == 1:
        weights = torch.tensor([299.0, 587.0, 114.0])[None, :, None, None] / 1000
        photos = (photos * weights).sum(1, keepdim=True).round().to(torch.uint8)
    photos = photos.contiguous()

    count, _, height, width = photos.shape
    digest = hashlib.sha256(repr((size, seed)).encode() + photos.numpy().tobytes())
    splits = []
    for number, (classes, limit) in enumerate(zip(_CLASSES, _LIMITS, strict=True)):
        corners = _corners(count, height, width, size, classes)
        key = Independent(seed).uniform(range(len(corners)), (), draw=number, dtype=torch.float64)
        corners = corners[torch.argsort(key)[:limit]]
        digest.update(corners.numpy().tobytes())
        splits.append(Patches(photos, corners, size))
    train, calibration, test = splits
    return Data(f"photos:{size}", train, calibration, test, levels=256, fingerprint=digest.hexdigest()[:16])
