"""A split of images and a data set of three splits.

Notation: a grey level g in {0, ..., L - 1} is stored as x = 2 g / (L - 1) - 1 in [-1, 1]. Neighbouring levels are
2 / (L - 1) apart, so the likelihood bin of a level is x +- 1 / (L - 1), open-ended at -1 and 1. L = `Data.levels` is a
property of the data (17 for the digits, 256 for 8-bit files), not a constant of the likelihood.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowvar.data.columns import Columns

__all__ = ["Data", "Images", "Subset", "TensorImages"]


class Images(ABC):
    """A map-style set of images: `len(images)`, `images[i]`, `images.images(indices)`.

    A subclass supplies `__len__`, `shape` and `images`; it overrides nothing else. Any `torch.utils.data.DataLoader`
    takes it, because `images[i]` is one image (C, H, W).
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image, (d,) of one row of a table."""

    @property
    def labels(self) -> Tensor | None:
        """Class numbers, LongTensor (n,), or None where the set has no classes."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images numbered `indices` (n,), each in [0, len): float32 (n, C, H, W) in [-1, 1], latents unbounded."""

    def __getitem__(self, index: int) -> Tensor:
        """Image number `index`, float32 (C, H, W); raises IndexError outside [0, len), which ends iteration."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.images([index])[0]

    def all(self) -> Tensor:
        """Every image at once, float32 (len, C, H, W): for sets that fit memory."""
        return torch.cat(list(self.batches(1024)))

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[Tensor]:
        """One pass over the set in batches (at most `batch_size`, C, H, W), in `order` if given, the last one shorter.

        Raises:
            ValueError: if `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give a whole number of at least 1")
        order = torch.arange(len(self)) if order is None else order
        for part in order.split(batch_size):
            yield self.images(part)


class TensorImages(Images):
    """Images, or rows of a table, held in memory.

    Args:
        values: (n, C, H, W) or rows (n, d) in [-1, 1], n >= 1; kept as float32.
        labels: class numbers (n,) or None.

    Raises:
        ValueError: for another number of dimensions, an empty tensor, values outside [-1, 1], or labels of another
            length.

    Example:
        >>> set_ = TensorImages(torch.linspace(-1, 1, 16).reshape(4, 1, 2, 2))
        >>> len(set_), set_.shape, [tuple(b.shape) for b in set_.batches(3)]
        (4, (1, 2, 2), [(3, 1, 2, 2), (1, 1, 2, 2)])
    """

    def __init__(self, values: Tensor, labels: Tensor | None = None) -> None:
        """Checks shape and range."""
        if values.ndim not in (2, 4) or values.numel() == 0:
            raise ValueError(
                f"values have shape {tuple(values.shape)}; images are (n, C, H, W), rows (n, d), with n at least 1"
            )
        if not bool((values.abs() <= 1).all()):
            raise ValueError("values leave [-1, 1] or are not finite; scale the images to [-1, 1] first")
        if labels is not None and labels.shape != (len(values),):
            raise ValueError(f"labels have shape {tuple(labels.shape)} for {len(values)} images; give one an image")
        self._values = values.to(torch.float32)
        self._labels = None if labels is None else labels.to(torch.int64)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image, (d,) of one row."""
        return tuple(self._values.shape[1:])

    @property
    def labels(self) -> Tensor | None:
        """Class numbers (n,) or None."""
        return self._labels

    def __len__(self) -> int:
        """Number of images."""
        return len(self._values)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """A copy of the images or rows numbered `indices`, float32."""
        return self._values[torch.as_tensor(indices, dtype=torch.int64)]

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any value, label or the shape."""
        digest = hashlib.sha256(repr(tuple(self._values.shape)).encode())
        digest.update(self._values.contiguous().numpy().tobytes())
        if self._labels is not None:
            digest.update(self._labels.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class Subset(Images):
    """Some images of another set, in the order given.

    Args:
        base: the set.
        indices: numbers of its images, (m,), m >= 1.

    Raises:
        ValueError: if there are no indices.

    Example:
        >>> base = TensorImages(torch.linspace(-1, 1, 16).reshape(4, 1, 2, 2), labels=torch.tensor([0, 1, 0, 1]))
        >>> odd = Subset(base, torch.tensor([1, 3]))
        >>> len(odd), odd.labels
        (2, tensor([1, 1]))
    """

    def __init__(self, base: Images, indices: Tensor) -> None:
        """Checks that there is an image."""
        if not len(indices):
            raise ValueError("there are no indices; a set has at least 1 image")
        self._base, self._indices = base, indices

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image, as in the base."""
        return self._base.shape

    @property
    def labels(self) -> Tensor | None:
        """Class numbers (m,) or None."""
        return None if self._base.labels is None else self._base.labels[self._indices]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._indices)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images numbered `indices`, as the base has them."""
        return self._base.images(self._indices[torch.as_tensor(indices, dtype=torch.int64)])


@dataclass(frozen=True)
class Data:
    """Three disjoint splits of one data set, all of the same shape.

    Attributes:
        name: what `load` was given.
        train: what the network learns from.
        calibration: what tables, the twin and validation losses are fitted and computed on.
        test: held out; every score is computed against all of it.
        levels: number of grey levels L of the source; the likelihood bin's half-width is 1 / (L - 1). None for a
            table, whose likelihood is a density.
        fingerprint: 16 hexadecimal digits of content and split; goes into checkpoints and reports.
        classes: names of the classes 0, 1, .. of `labels`, where they have names; () otherwise.
        columns: of a table, to read its rows with; None for images.
        scaling_factor: of latents: what they were multiplied by, so that their variance is about 1; they have no
            bound, and no grey levels. None for everything else, which lies in [-1, 1].

    Raises:
        ValueError: if the splits' shapes differ, `levels` is below 2, or latents have levels.

    Example:
        >>> from lowvar.data import load
        >>> digits = load("digits")
        >>> digits.shape, digits.levels, len(digits.train), len(digits.calibration), len(digits.test)
        ((1, 8, 8), 17, 1197, 300, 300)
    """

    name: str
    train: Images
    calibration: Images
    test: Images
    levels: int | None
    fingerprint: str
    columns: Columns | None = None
    classes: tuple[str, ...] = ()
    scaling_factor: float | None = None

    def __post_init__(self) -> None:
        """Checks that the splits agree."""
        shapes = {self.train.shape, self.calibration.shape, self.test.shape}
        if len(shapes) != 1:
            raise ValueError(f"the splits have different shapes {sorted(shapes)}; give all of them one shape")
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels is {self.levels}; images have at least 2 grey levels")
        if self.levels is not None and self.scaling_factor is not None:
            raise ValueError(f"levels is {self.levels}, and latents have a density: give levels None with a factor")

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image, (d,) of one row of a table."""
        return self.train.shape

    @property
    def bound(self) -> float | None:
        """b of data in [-b, b]: 1, and None for latents."""
        return 1.0 if self.scaling_factor is None else None

    def of_class(self, number: int) -> Data:
        """The images of one class alone, in all three splits.

        Raises:
            ValueError: if the data has no labels, or a split no image of that class.

        Example:
            >>> from lowvar.data import load
            >>> threes = load("digits").of_class(3)
            >>> threes.test.labels.unique(), len(threes.test) < 40
            (tensor([3]), True)
        """
        splits: dict[str, Images] = {}
        for name, split in (("train", self.train), ("calibration", self.calibration), ("test", self.test)):
            if split.labels is None:
                raise ValueError(f"{self.name} has no labels, so it has no class {number}; give data with classes")
            found = torch.nonzero(split.labels == number)[:, 0]
            if not len(found):
                raise ValueError(
                    f"the {name} split of {self.name} has no image of class {number}; give more data of it"
                )
            splits[name] = Subset(split, found)
        return replace(self, **splits, fingerprint=f"{self.fingerprint}/{number}")

    @property
    def half_width(self) -> float:
        """Half-width 1 / (levels - 1) of a likelihood bin in [-1, 1]; 0 without levels."""
        return 0.0 if self.levels is None else 1.0 / (self.levels - 1)
