"""Samples as contact sheets: PNG data URIs that the browser enlarges without smoothing.

A sheet shows the first images of an array, row by row, with a gap of a pixel between them. Image i of every sampler
was started from the same noise, so the same place on two sheets shows what two samplers made of the same start.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Sheet", "SheetGroup", "sheet", "sheets"]

_LARGEST = 96  # pixels along the longer side of an image; larger ones are reduced
_TILE = 26  # pixels on the page that a small image is enlarged to


@dataclass(frozen=True)
class Sheet:
    """A contact sheet.

    Attributes:
        label: whose samples.
        uri: the picture as a data URI.
        width: on the page, in CSS pixels.
        height: likewise.
        alt: what is seen, for those who cannot see it.
        note: what is wrong with the samples, or "".
        is_peer: whether the sampler is another library's.
    """

    label: str
    uri: str
    width: int
    height: int
    alt: str
    note: str = ""
    is_peer: bool = False


@dataclass(frozen=True)
class SheetGroup:
    """The sheets of one number of steps."""

    steps: float
    sheets: tuple[Sheet, ...]


def _bytes(x: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.round((np.clip(np.nan_to_num(x, nan=0.0, posinf=1.0, neginf=-1.0), -1, 1) + 1) * 127.5).astype(np.uint8)


def sheet(label: str, images: NDArray[np.floating], steps: float = math.inf, *, is_peer: bool = False) -> Sheet | None:
    """The first images (n, C, H, W) in [-1, 1] as a sheet; None for arrays that are no pictures.

    Example:
        >>> found = sheet("data", np.zeros((9, 1, 8, 8), dtype=np.float32))
        >>> found.width, found.alt, found.uri[:22]
        (159, '9 images: data', 'data:image/png;base64,')
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        return None
    side = max(images.shape[2:])
    columns = 6 if side <= 32 else 4 if side <= 64 else 3
    shown = images[: columns * (4 if columns == 6 else 3)]
    broken = int((~np.isfinite(shown)).any(axis=(1, 2, 3)).sum())
    tiles = [
        Image.fromarray(tile if tile.shape[2] == 3 else tile[:, :, 0]) for tile in _bytes(shown).transpose(0, 2, 3, 1)
    ]
    if side > _LARGEST:
        for tile in tiles:
            tile.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    width, height = tiles[0].size
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    mode = "LA" if images.shape[1] == 1 else "RGBA"
    page = Image.new(mode, (columns * (width + 1) - 1, rows * (height + 1) - 1))  # gaps stay transparent
    for i, tile in enumerate(tiles):
        page.paste(tile.convert(mode), ((i % columns) * (width + 1), (i // columns) * (height + 1)))
    file = io.BytesIO()
    page.save(file, format="PNG", optimize=True)
    scale = max(1, round(_TILE / max(width, height)))
    return Sheet(
        label,
        "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"),
        scale * page.width,
        scale * page.height,
        f"{len(tiles)} images: {label}" + ("" if math.isinf(steps) else f", {steps:g} steps"),
        f"{broken} of {len(tiles)} not finite" if broken else "",
        is_peer,
    )


def _parts(name: str) -> tuple[str, float]:
    """The sampler, with its grid in brackets where the name has one, and the number of steps."""
    sampler, steps, grid = (*name.split("@"), "", "")[:3]
    try:
        return f"{sampler} ({grid})" if grid else sampler, float(steps)
    except ValueError:
        return name, math.inf


def sheets(grids: Mapping[str, NDArray[np.floating]]) -> tuple[Sheet | None, list[SheetGroup]]:
    """The sheet of the data, and the samplers' sheets by number of steps, ours before the peers."""
    data = sheet("real data, held out", grids["data"]) if "data" in grids else None
    found: dict[float, list[Sheet]] = {}
    for name in grids:
        if name == "data":
            continue
        sampler, steps = _parts(name)
        made = sheet(sampler, grids[name], steps, is_peer=sampler.startswith("diffusers:"))
        if made is not None:
            found.setdefault(steps, []).append(made)
    return data, [
        SheetGroup(steps, tuple(sorted(group, key=lambda made: made.is_peer))) for steps, group in sorted(found.items())
    ]
