"""One image file to one tensor, by Pillow.

x = 2 g / 255 - 1 for 8-bit levels g; 16-bit grey files keep their upper byte. A palette or an alpha channel is
converted (alpha is dropped, not blended), the orientation that a camera wrote into the file is applied. With a target
size s the shorter side is scaled to s (Lanczos) and the centre s x s is kept.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lowvar.errors import UserError

__all__ = ["check_arguments", "decode", "display", "header", "pixels"]

_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 exchange width and height
_GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F"}


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """The opened image; every way of being unreadable becomes one sentence that names the file."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except UserError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]
        raise UserError(f"cannot read the image {name} ({reason}); repair it or take it out of the data") from None


def check_arguments(size: int | None, channels: int | None) -> None:
    """Raises UserError unless `size` is None or at least 1 and `channels` is None, 1 or 3."""
    if size is not None and size < 1:
        raise UserError(f"size is {size}; give a whole number of pixels from 1")
    if channels not in (None, 1, 3):
        raise UserError(f"channels is {channels}; give 1 (grey) or 3 (colour)")


def header(source: Path | bytes, name: str) -> tuple[int, int, int]:
    """(channels 1 or 3, height, width) from the file's header, without decoding the pixels.

    Raises:
        UserError: if the file is no readable image.
    """
    with _opened(source, name) as image:
        width, height = image.size
        # Pillow would decode a whole PNG to look for EXIF data behind the pixels
        if ("exif" in image.info or image.format == "TIFF") and image.getexif().get(_ORIENTATION, 1) >= 5:
            width, height = height, width
        return (1 if image.mode in _GREY else 3), height, width


def decode(source: Path | bytes, name: str, *, channels: int, size: int | None = None) -> Tensor:
    """The image as float32 (channels, H, W) in [-1, 1].

    Args:
        source: a path, or the file's content.
        name: what to call the file in an error.
        channels: 1 (luminance) or 3.
        size: None keeps the file's size; else the result is size x size.

    Raises:
        UserError: if the file is no readable image, or its pixels are floating point numbers.

    Example:
        >>> import io
        >>> buffer = io.BytesIO()
        >>> Image.new("L", (6, 4), 255).save(buffer, "png")
        >>> x = decode(buffer.getvalue(), "white.png", channels=3, size=2)
        >>> tuple(x.shape), x.min().item()
        ((3, 2, 2), 1.0)
    """
    with _opened(source, name) as image:
        image.load()
        return pixels(image, name, channels=channels, size=size)


def pixels(image: Image.Image, name: str, *, channels: int | None = None, size: int | None = None) -> Tensor:
    """An image in memory, as `decode`; `channels` None: 1 if it is grey, else 3.

    Raises:
        UserError: if its pixels are floating point numbers.

    Example:
        >>> pixels(Image.fromarray(np.full((1, 2), 65535, np.uint16)), "white").tolist()
        [[[1.0, 1.0]]]
    """
    if image.mode == "F":
        raise UserError(f"the image {name} holds floating point numbers; save it with 8 or 16 bits a channel")
    if channels is None:
        channels = 1 if image.mode in _GREY else 3
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    x = torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1
    return x[None] if channels == 1 else x.permute(2, 0, 1).contiguous()


def display(path: str | os.PathLike[str], folder: Path) -> str:
    """The path as seen from `folder`, for messages and for hashing."""
    return Path(os.path.relpath(path, folder)).as_posix()
