r"""Size of a sample as a JPEG file: the reward "compressibility".

    f(x) = - bytes of the JPEG file of quality 95 of x, rounded to 8 bits,

images under 32 pixels enlarged 4 times first, each pixel to a square, since a file of 8x8 pixels is mostly its header.
Larger is more compressible. f takes whole numbers, so it has no derivative and jumps by a byte; its spread over samples
is tens of bytes for digits and hundreds for photos, far above the jumps.

Source: K. Black, M. Janner, Y. Du, I. Kostrikov, S. Levine, "Training diffusion models with reinforcement learning",
ICLR 2024, Section 5.1 (there in kilobytes, at 512 pixels).
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from lowvar.errors import UserError

__all__ = ["jpeg"]

_QUALITY = 95
_SMALL, _FACTOR = 32, 4


def jpeg(samples: Tensor, **columns: Any) -> Tensor:
    """Minus the bytes of each image as a JPEG file, (n,) float32.

    Args:
        samples: images (n, 1 or 3, h, w) in [-1, 1]; values outside are clipped.
        columns: not read.

    Raises:
        UserError: for other shapes.

    Example:
        >>> flat, noisy = torch.zeros(1, 1, 8, 8), torch.linspace(0, 99, 64).sin().reshape(1, 1, 8, 8)
        >>> bool(jpeg(flat) > jpeg(noisy))
        True
    """
    from PIL import Image

    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise UserError(
            f"statistic 'jpeg' is of images (n, 1 or 3, h, w), and the samples have shape {tuple(samples.shape)}"
        )
    pixels = ((samples.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if min(samples.shape[2:]) < _SMALL:
        pixels = pixels.repeat_interleave(_FACTOR, 2).repeat_interleave(_FACTOR, 3)
    sizes = []
    for image in pixels:
        file = io.BytesIO()
        array = image[0] if len(image) == 1 else image.permute(1, 2, 0).contiguous()
        Image.fromarray(array.numpy()).save(file, format="JPEG", quality=_QUALITY)
        sizes.append(-file.tell())
    return torch.tensor(sizes, dtype=torch.float32, device=samples.device)
