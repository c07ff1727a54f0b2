r"""Features of a picture for baselines and surrogates: how much detail it has, as an image coder pays for it.

A coder spends about log2(|c| / q) bits on a coefficient c above its step q, and next to none below. So with the details
w of 2x2 blocks (Haar: across, down, diagonal) and the differences w of neighbouring blocks' means, sums of

    1/2 log(1 + (w / s)^2),      s = 0.02, 0.1, 0.5,

over the picture say what its file will be like, at steps s that no reward has to name; the details are of blocks at
even places and, a pixel further, at odd ones. A regression finds the weights. They have derivatives, which the size of
a file has not, so a surrogate on them carries a pathwise gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["edges"]

_SCALES = (0.02, 0.1, 0.5)


def edges(x: Tensor) -> Tensor:
    """Sums of details, (n, 21 C).

    Args:
        x: pictures (n, C, H, W) of at least 4 x 4 pixels, in [-1, 1] (beyond it they are clipped).

    Raises:
        ValueError: for other shapes.

    Example:
        >>> flat, stripes = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
        >>> stripes[..., ::2] = -1
        >>> float(edges(flat).sum()), edges(stripes).shape, bool((edges(stripes)[0, :3] > 10).all())
        (0.0, torch.Size([1, 21]), True)
    """
    if x.ndim != 4 or min(x.shape[2:]) < 4:
        raise ValueError(f"edges are of pictures (n, C, H, W) of at least 4 x 4 pixels, not of {tuple(x.shape)}")
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    v, found = x.clamp(-1, 1), list[Tensor]()
    for shift in (0, 1):
        part = v[:, :, shift : height - shift, shift : width - shift]
        a, b = part[:, :, ::2, ::2], part[:, :, ::2, 1::2]
        c, d = part[:, :, 1::2, ::2], part[:, :, 1::2, 1::2]
        details = [(a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2]
        if not shift:
            mean = ((a + b + c + d) / 2).flatten(2)
            details.append(mean[..., 1:] - mean[..., :-1])
        found += [torch.log1p((w / s) ** 2).flatten(2).sum(2) / 2 for w in details for s in _SCALES]
    return torch.stack(found, 2).flatten(1)
