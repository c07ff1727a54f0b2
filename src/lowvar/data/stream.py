r"""Streams: data that can be gone through, but not looked into by number.

A stream is anything that can be iterated again and again: a `torch.utils.data.IterableDataset`, an `IterableDataset` of
Hugging Face, or a function of the epoch that returns an iterator. It is given an order by places p = 0, 1, 2, .., which
go on from epoch to epoch, through a buffer of B items:

    j_p = floor(u_p |buffer|),    place p has buffer[j_p], whose slot takes the next item (at the end: the last one),

u_p uniform, a function of p. In an epoch every item comes once; none more than B - 1 places too early. That is no
random permutation: images that stand close in the stream stay close, on the scale of B, so a stream that is sorted
(by class, say) needs a B that spans it or a shuffle of its own.

What stands at a place is a function of p, the seed and the stream, provided that the stream gives the same items in the
same order whenever an epoch is begun (one with `set_epoch` is told the epoch first). So a run resumes exactly: `state`
holds where the epochs began, the last one is begun again, and what was seen of it is skipped. Skipped items are read,
not decoded. Several processes read the whole stream each and decode their own share.

A file that is mapped into memory (`lowvar.data.arrays`) is no stream: it can be looked into.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowvar.data.arrays import ArrayImages
from lowvar.data.decode import pixels
from lowvar.data.images import Images
from lowvar.errors import UserError
from lowvar.process.noise import Independent

__all__ = ["FIRST", "Stream", "StreamData", "image_of"]

FIRST = 1024

_SEED = 0x53545245 << 32  # the buffer's random numbers are no other ones of the same seed
_BLOCK = 1024  # random numbers at a time


def image_of(item: Any) -> Tensor:
    """An item as an image, float32 (C, H, W) in [-1, 1].

    Args:
        item: a floating point tensor or array in [-1, 1], taken as it is; one of uint8; a PIL image, read as a file's
            (16-bit grey keeps its upper byte, the camera's orientation is applied); a mapping with such a value under
            `image`; or a tuple or list that begins with one.

    Raises:
        UserError: for anything else, or an image of floating point numbers.

    Example:
        >>> image_of({"image": torch.tensor([[[0, 255]]], dtype=torch.uint8), "label": 3}).tolist()
        [[[-1.0, 1.0]]]
    """
    import numpy as np
    from PIL import Image

    if isinstance(item, Mapping) and "image" in item:
        return image_of(item["image"])
    if isinstance(item, tuple | list) and item:
        return image_of(item[0])
    if isinstance(item, Image.Image):
        return pixels(item, "that the stream gave")
    x = torch.from_numpy(item) if isinstance(item, np.ndarray) else item
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.uint8):
        raise UserError(
            f"an item of the stream is a {type(item).__name__}, which is not read as an image; give decode, a function "
            "from an item to a float tensor (C, H, W) in [-1, 1]"
        )
    return x.float() if x.is_floating_point() else x.float() / 127.5 - 1


class Stream:
    """Places of a stream, by number.

    Args:
        source: an iterable that can be iterated again, or a function of the epoch that returns an iterator.
        shape: of a decoded item, (C, H, W), or (d,).
        decode: from an item to a tensor of this shape.
        buffer: B; 1 keeps the stream's own order.
        seed: of the buffer's order.
        label: from an item to its class number, a whole number from 0; None: the items have no classes.
        starts: places where epochs 0, 1, .. began, as far as they are known.

    Raises:
        UserError: if the source can be gone through once only.
        ValueError: if `buffer` is below 1.

    Example:
        >>> stream = Stream([torch.full((1,), k / 4) for k in range(4)], (1,), buffer=2)
        >>> sorted(stream.images(range(4)).flatten().tolist()), sorted(stream.images(range(4, 8)).flatten().tolist())
        ([0.0, 0.25, 0.5, 0.75], [0.0, 0.25, 0.5, 0.75])
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[int], Iterable[Any]],
        shape: Sequence[int],
        *,
        decode: Callable[[Any], Tensor] = image_of,
        buffer: int = 1024,
        seed: int = 0,
        label: Callable[[Any], int] | None = None,
        starts: Sequence[int] = (0,),
    ) -> None:
        """Keeps the source; reads nothing."""
        if buffer < 1:
            raise ValueError(f"buffer is {buffer}; give at least 1 item")
        if isinstance(source, Iterator):
            raise UserError(
                f"the stream is a {type(source).__name__}, which can be gone through once; give a function of the "
                "epoch that returns such an iterator"
            )
        self.source, self.shape, self.decode = source, tuple(shape), decode
        self.buffer, self.seed, self.label = buffer, seed, label
        self._noise = Independent(seed ^ _SEED)
        self._starts = list(starts)
        # what follows is a memo: where the reading stands
        self._epoch, self._place = -1, 0
        self._items: Iterator[Any] = iter(())
        self._held: list[Any] = []
        self._recent: dict[int, Any] = {}
        self._floor = 0
        self._block: tuple[int, list[float]] = (-1, [])

    def images(self, places: Tensor | Sequence[int]) -> Tensor:
        """What stands at places (n,), float32 (n, *shape).

        Quick where places increase from call to call; going back more than one call begins an epoch again.

        Raises:
            UserError: if the stream is empty, or an item has another shape.
        """
        wanted: list[int] = torch.as_tensor(places, dtype=torch.int64).tolist()
        if not wanted:
            return torch.empty(0, *self.shape)
        lowest = min(wanted)
        if lowest not in self._recent and (self._epoch < 0 or lowest < self._place):  # what is skipped is not kept
            self._recent, self._floor = {}, lowest
        decoded = {place: self._decoded(place, self._item(place)) for place in sorted(set(wanted))}
        self._recent = {place: item for place, item in self._recent.items() if place >= self._floor}
        self._floor = lowest
        return torch.stack([decoded[place] for place in wanted])

    def classes(self, places: Tensor | Sequence[int]) -> Tensor:
        """Class numbers of what stands at places (n,), int64; quick for the places that `images` was asked for last.

        Raises:
            ValueError: if the stream has no `label`.
            UserError: if one is no whole number from 0.
        """
        wanted: list[int] = torch.as_tensor(places, dtype=torch.int64).tolist()
        return torch.tensor([self._class(place, self._item(place)) for place in wanted], dtype=torch.int64)

    @cached_property
    def first(self) -> ArrayImages:
        """The first 1,024 places as a set in memory, fewer where an epoch is shorter, with their classes."""
        parts: list[Tensor] = []
        classes: list[int] = []
        for place in range(FIRST):
            item = self._item(place)
            if len(self._starts) > 1 and place >= self._starts[1]:
                break
            parts.append(self._decoded(place, item))
            if self.label is not None:
                classes.append(self._class(place, item))
        self._recent = {}
        labels = None if self.label is None else torch.tensor(classes)
        return ArrayImages(torch.stack(parts), torch.arange(len(parts)), 1.0, labels)

    def state(self) -> dict[str, Tensor]:
        """Where the epochs began."""
        return {"starts": torch.tensor(self._starts)}

    def restored(self, state: Mapping[str, Tensor]) -> Stream:
        """The stream that knows where its epochs began."""
        starts = state["starts"].tolist()
        more: dict[str, Any] = {"decode": self.decode, "buffer": self.buffer, "seed": self.seed}
        more["label"] = self.label
        return Stream(self.source, self.shape, starts=starts, **more)

    def _begin(self, epoch: int) -> None:
        source: Any = self.source
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        self._items = iter(source if hasattr(source, "__iter__") else source(epoch))
        self._epoch, self._place = epoch, self._starts[epoch]
        self._held = list(itertools.islice(self._items, self.buffer))
        if not self._held:
            raise UserError("the stream is empty; give one with at least one item an epoch")

    def _item(self, place: int) -> Any:
        """The item at a place, not decoded."""
        if place in self._recent:
            return self._recent[place]
        if self._epoch < 0 or place < self._place:
            self._begin(bisect.bisect_right(self._starts, place) - 1)
        item = None
        while self._place <= place:
            at, item = self._place, self._taken()
            if at >= self._floor:
                self._recent[at] = item
        return item

    def _taken(self) -> Any:
        """The item at the next place."""
        if not self._held:
            if self._epoch + 1 == len(self._starts):
                self._starts.append(self._place)
            self._begin(self._epoch + 1)
        j = int(self._uniform(self._place) * len(self._held))
        item, last = self._held[j], object()
        after = next(self._items, last)
        if after is last:
            after = self._held.pop()
        if j < len(self._held):
            self._held[j] = after
        self._place += 1
        return item

    def _uniform(self, place: int) -> float:
        block = place // _BLOCK
        if self._block[0] != block:
            numbers = range(block * _BLOCK, (block + 1) * _BLOCK)
            self._block = block, self._noise.uniform(numbers, (), dtype=torch.float64).tolist()
        return self._block[1][place % _BLOCK]

    def _class(self, place: int, item: Any) -> int:
        if self.label is None:
            raise ValueError("the stream has no label; give one, a function from an item to its class number")
        found: Any = self.label(item)
        single: Any = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
        try:
            number = operator.index(single)
        except TypeError:
            number = -1
        if number < 0:
            raise UserError(
                f"the item at place {place} of the stream has class {found!r}; give label, a function from an item to "
                "a whole number from 0"
            )
        return number

    def _decoded(self, place: int, item: Any) -> Tensor:
        x = self.decode(item)
        if tuple(x.shape) != self.shape:
            raise UserError(
                f"the item at place {place} of the stream has shape {tuple(x.shape)} and the stream {self.shape}; "
                "bring all to one shape in decode"
            )
        return x.float()


@dataclass(frozen=True)
class StreamData:
    """A stream to train on, with a held-out set that can be looked into: what `lowvar.train.Trainer` takes as data.

    Attributes:
        train: the stream.
        calibration: held out, for validation.
        name: of the data.
        levels: grey levels of images; None for latents.
        scaling_factor: of latents: what `decode` multiplied them by, as in `Data`.
        classes: names of the classes, in order of their numbers; () where there are none or they have no names.

    Raises:
        ValueError: if the shapes differ.
    """

    train: Stream
    calibration: Images
    name: str = "stream"
    levels: int | None = 256
    scaling_factor: float | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks shapes."""
        if self.train.shape != self.calibration.shape:
            raise ValueError(f"the stream has shape {self.train.shape}, what is held out {self.calibration.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return self.train.shape

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the order and of the first items; later ones are unknown."""
        digest = hashlib.sha256(repr((self.name, self.shape, self.train.buffer, self.train.seed)).encode())
        digest.update(self.train.first.images(range(min(16, len(self.train.first)))).numpy().tobytes())
        if self.train.first.labels is not None:
            digest.update(repr((self.classes, self.train.first.labels.tolist())).encode())
        digest.update(self.calibration.images(range(min(16, len(self.calibration)))).numpy().tobytes())
        return digest.hexdigest()[:16]
