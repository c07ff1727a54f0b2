r"""Class-conditional training with dropout of the condition (Ho & Salimans 2022, "Classifier-free diffusion guidance").

Sample i of training has the class y of its image, or with probability p the null class K, the number after the last:

    y_i = K  if u_i < p,  else the class;    u_i uniform, a function of the sample's number.

So one network learns the law of every class and of their mixture. Validation is of the conditional loss: no class is
dropped there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        train: class numbers of the training split, (N,) int64.
        calibration: class numbers of the calibration split.
        dropout: p.
        seed: of what is dropped.

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

    def labels(self, number: Tensor, image: Tensor) -> Tensor:
        """The classes that samples are trained with, int64 (n,).

        Args:
            number: sample numbers, (n,).
            image: numbers of their images, (n,).
        """
        u = Independent(self.seed).uniform(number, (), draw=_DRAW, dtype=torch.float64)
        return torch.where(u < self.dropout, self.count, self.train[image])

    def known(self, number: Tensor, image: Tensor) -> Tensor:
        """As `labels`, and -1 where the class was dropped."""
        labels = self.labels(number, image)
        return torch.where(labels == self.count, -1, labels)


def classes_of(data: Any, dropout: float, seed: int = 0) -> Classes:
    """The classes of a data set.

    Raises:
        UserError: if it has none, or fewer than two in its training split.
    """
    train, calibration = (getattr(split, "labels", None) for split in (data.train, data.calibration))
    if train is None or calibration is None or len(train.unique()) < 2:
        raise UserError(
            "conditional is true, and the data have no classes; give images in one folder a class, a data set with a "
            "label, or a table with a column called label"
        )
    count = max(int(max(train.max(), calibration.max())) + 1, len(getattr(data, "classes", ())))
    return Classes(count, train, calibration, dropout, seed)


def of_classes(denoiser: NetworkDenoiser, labels: Tensor) -> NetworkDenoiser:
    """The denoiser with the classes of a batch, (B,)."""
    made = copy.copy(denoiser)
    made.conditioning = {**denoiser.conditioning, "class_labels": labels}
    return made
