r"""Draw plans: what each training sample is, as a function of its number.

Update u (counted from 0) uses the samples u B, .., u B + B - 1. Sample i has

    x_0    image pi_e(i mod N) in epoch e = floor(i / N), pi_e a seeded permutation
    t      from one uniform number (draw 1 of sample i) by the times' inverse cdf, with its weight
    eps    draw 0 of sample i

so the draws depend neither on the number of processes nor on how a batch is split, and an interrupted run goes on
from the update's number alone (times that learn bring their explicit state).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.schedule import Level, Schedule
from lowvar.train.timesteps import Times

__all__ = ["DrawPlan", "Draws", "ImageSource"]


class ImageSource(Protocol):
    """What a plan needs of a data split: `lowvar.data.Images` has it."""

    def __len__(self) -> int: ...

    def images(self, indices: Tensor) -> Tensor:
        """The images numbered `indices`, float32 (n, C, H, W)."""
        ...


@dataclass(frozen=True)
class Draws:
    """Training samples of one batch, or of one process's share.

    Attributes:
        number: sample numbers, (n,) int64.
        image: numbers of the images, (n,) int64.
        x0: data, (n, C, H, W).
        eps: noise, same shape.
        level: noise levels, (n,).
        weight: factors of the losses, (n,) float64.
        bin: timestep numbers, (n,) int64.
    """

    number: Tensor
    image: Tensor
    x0: Tensor
    eps: Tensor
    level: Level
    weight: Tensor
    bin: Tensor


class DrawPlan:
    """Samples by number.

    Args:
        images: the training split.
        schedule: noise schedule.
        batch_size: B, over all processes.
        seed: of the data's order and, by default, of the noise.
        noise: source of eps and times (default `Independent(seed)`).

    Raises:
        ValueError: if there is no image or no batch.

    Example:
        >>> from lowvar.data import load
        >>> from lowvar.process import CosineVP
        >>> from lowvar.train.timesteps import UniformTimes
        >>> plan = DrawPlan(load("digits").train, CosineVP(), batch_size=4)
        >>> whole = plan.draws(7, UniformTimes())
        >>> half = plan.draws(7, UniformTimes(), part=1, parts=2)
        >>> torch.equal(whole.eps[2:], half.eps), half.number.tolist()
        (True, [30, 31])
    """

    def __init__(
        self, images: ImageSource, schedule: Schedule, batch_size: int, seed: int = 0, noise: NoiseSource | None = None
    ) -> None:
        if batch_size < 1 or len(images) < 1:
            raise ValueError(
                f"batch_size is {batch_size} and the data have {len(images)} images; both must be at least 1"
            )
        self.images, self.schedule, self.batch_size = images, schedule, batch_size
        self._order = Independent(seed)
        self.noise = Independent(seed) if noise is None else noise
        self._epochs: dict[int, Tensor] = {}  # a memo of the last two permutations

    def permutation(self, epoch: int) -> Tensor:
        """The order of the images in an epoch, int64 (N,)."""
        if epoch not in self._epochs:
            u = self._order.uniform(range(len(self.images)), (), draw=2 + epoch, dtype=torch.float64)
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            self._epochs[epoch] = torch.argsort(u, stable=True)
        return self._epochs[epoch]

    def numbers(self, update: int, part: int = 0, parts: int = 1) -> Tensor:
        """Sample numbers of an update, int64; part k of `parts` equal parts.

        Raises:
            ValueError: if the batch does not divide into that many parts.
        """
        if self.batch_size % parts or not 0 <= part < parts:
            raise ValueError(f"part {part} of {parts}: batch_size {self.batch_size} must divide by the number of parts")
        share = self.batch_size // parts
        return update * self.batch_size + part * share + torch.arange(share)

    def draws(
        self, update: int, times: Times, part: int = 0, parts: int = 1, device: torch.device | str = "cpu"
    ) -> Draws:
        """The samples of an update (or a part of it), with tensors but numbers, weights and bins on `device`."""
        number = self.numbers(update, part, parts)
        n = len(self.images)
        epoch = number // n
        image = torch.empty_like(number)
        for e in epoch.unique().tolist():
            image = torch.where(epoch == e, self.permutation(e)[number % n], image)
        x0 = self.images.images(image).to(device)
        when = times.draw(self.noise, number, draw=1)
        eps = self.noise.normal(number, x0.shape[1:], draw=0, device=device)
        return Draws(number, image, x0, eps, self.schedule.at(when.t).to(device), when.weight, when.bin)
