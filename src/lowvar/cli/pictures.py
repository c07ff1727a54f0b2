"""Samples as a picture."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["write_png"]


def write_png(file: Any, samples: Any, most: int = 64, scale: int = 4) -> None:
    """The first samples (n, C, H, W) in [-1, 1] as a picture, nearly square, small images enlarged without smoothing.

    Args:
        file: open for binary writing.
        samples: float tensor.
        most: how many are shown.
        scale: smallest factor by which images under 64 pixels are enlarged.
    """
    import torch
    from PIL import Image

    x = samples[:most]
    n, c, h, w = x.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    factor = max(1, scale if max(h, w) < 64 else 1)
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    h, w, gap = h * factor, w * factor, 2
    sheet = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    array = sheet.permute(1, 2, 0).numpy() if c == 3 else sheet[0].numpy()
    Image.fromarray(array).save(file, format="PNG")
