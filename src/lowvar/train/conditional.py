r"""Class-conditional training with dropout of the condition (Ho & Salimans 2022, "Classifier-free diffusion guidance").

Sample i of training has the class y of its image, or with probability p the null class K, the number after the last:

    y_i = K  if u_i < p,  else the class;    u_i uniform, a function of the sample's number.

So one network learns the law of every class and of their mixture. Validation is of the conditional loss: no class is
dropped there. Of a stream the class comes with the item; how many there are must be known before: by their names, or
from the held-out set and the first places.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvar.data.stream import Stream
from lowvar.errors import UserError
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.noise import Independent

__all__ = ["Classes", "classes_of", "of_classes"]

_DRAW = 2**30  # of the uniform numbers that drop classes; times, noise and data order have others


@dataclass(frozen=True)
class Classes:
    """The classes of a data set in training.

    Attributes:
        count: K.
        train: class numbers of the training split, (N,) int64; of a stream those of its first places.
        calibration: class numbers of the calibration split.
        dropout: p.
        seed: of what is dropped.
        stream: where the classes of training come from, if it is a stream.

    Example:
        >>> classes = Classes(3, torch.tensor([0, 1, 2]), torch.tensor([1]), dropout=0.5)
        >>> classes.labels(torch.arange(6), torch.arange(6) % 3).tolist()
        [0, 3, 2, 0, 1, 3]
    """

    count: int
    train: Tensor
    calibration: Tensor
    dropout: float
    seed: int = 0
    stream: Stream | None = None

    def labels(self, number: Tensor, image: Tensor) -> Tensor:
        """The classes that samples are trained with, int64 (n,).

        Args:
            number: sample numbers, (n,).
            image: numbers of their images, (n,), or places of the stream.

        Raises:
            UserError: if an item of a stream has a class beyond K.
        """
        own = self.train[image] if self.stream is None else self._of_stream(self.stream, image)
        u = Independent(self.seed).uniform(number, (), draw=_DRAW, dtype=torch.float64)
        return torch.where(u < self.dropout, self.count, own)

    def _of_stream(self, stream: Stream, place: Tensor) -> Tensor:
        own = stream.classes(place)
        beyond = (own >= self.count).nonzero()[:, 0]
        if len(beyond):
            at = int(beyond[0])
            raise UserError(
                f"the item at place {int(place[at])} of the stream has class {int(own[at])}, and there are "
                f"{self.count} classes, 0 to {self.count - 1}; name all of them in StreamData(classes=...)"
            )
        return own

    def known(self, number: Tensor, image: Tensor) -> Tensor:
        """As `labels`, and -1 where the class was dropped."""
        labels = self.labels(number, image)
        return torch.where(labels == self.count, -1, labels)


def classes_of(data: Any, dropout: float, seed: int = 0) -> Classes:
    """The classes of a data set.

    Raises:
        UserError: if it has none, or fewer than two in its training split (of a stream: its first places).
    """
    stream = data.train if isinstance(data.train, Stream) else None
    calibration = getattr(data.calibration, "labels", None)
    if stream is not None and (stream.label is None or calibration is None):
        lacks = "the stream has no label" if stream.label is None else "what is held out has no classes"
        raise UserError(
            f"conditional is true, and {lacks}; give Stream(label=...), a function from an item to its class number, "
            "and held-out images with labels"
        )
    train = getattr(data.train if stream is None else stream.first, "labels", None)
    if train is None or calibration is None or len(train.unique()) < 2:
        raise UserError(
            "conditional is true, and the data have no classes; give images in one folder a class, a data set with a "
            "label, or a table with a column called label"
        )
    count = max(int(max(train.max(), calibration.max())) + 1, len(getattr(data, "classes", ())))
    return Classes(count, train, calibration, dropout, seed, stream)


def of_classes(denoiser: NetworkDenoiser, labels: Tensor) -> NetworkDenoiser:
    """The denoiser with the classes of a batch, (B,)."""
    made = copy.copy(denoiser)
    made.conditioning = {**denoiser.conditioning, "class_labels": labels}
    return made
