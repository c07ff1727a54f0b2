r"""Draw plans: what each training sample is, as a function of its number.

Update u (counted from 0) uses the samples u B, .., u B + B - 1. Sample i has

    x_0    image pi_e(i mod N) in epoch e = floor(i / N), pi_e a seeded permutation
    t      from one uniform number (draw 1 of sample i) by the times' inverse cdf, with its weight
    eps    draw 0 of sample i

(of a stream: place i, see `lowvar.data.stream`), so the draws depend neither on the number of processes nor on how a
batch is split, and an interrupted run goes on from the update's number alone (times that learn bring their explicit
state, and a stream where its epochs began).

That is the plain plan. Parts of a plan make the samples of a batch depend on each other, each of them a function of
the sample numbers still:

    pairing      noises, times and images shared or balanced within groups of samples (`pairs`, `sobol`)    unbiased
    stratified   one uniform number an update, spread over the batch's times (`stratified`)                 unbiased
    labels       images in the proportions of their classes or clusters (`strata`)                          unbiased
    coupling     noises chosen by the images (`optimal_transport`, `immiscible`)                changes the objective

With a pairing in which m consecutive samples share an image (or a time) the image is number floor(i / m) of the epoch
(the time that of floor(i / m)), and one of a batch's B / m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
from torch import Tensor

from lowvar.data.stream import Stream
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.schedule import Level, Schedule
from lowvar.train.immiscible import Immiscible
from lowvar.train.objectives import Label
from lowvar.train.optimal_transport import OptimalTransport
from lowvar.train.pairs import IndependentSamples, Pairing
from lowvar.train.sobol import SobolPoints
from lowvar.train.strata import strata_order
from lowvar.train.stratified import stratified_uniforms
from lowvar.train.timesteps import Times

__all__ = ["DrawPlan", "Draws", "ImageSource", "rows_of"]


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
        group: number of the group each sample belongs to, (n,) int64; only samples of different groups are
            independent (images drawn without replacement aside). Default: every sample its own.
    """

    number: Tensor
    image: Tensor
    x0: Tensor
    eps: Tensor
    level: Level
    weight: Tensor
    bin: Tensor
    group: Tensor = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Fills in groups of one."""
        if self.group is None:
            object.__setattr__(self, "group", self.number)


def rows_of(draws: Draws, rows: slice) -> Draws:
    """Some of the draws."""
    return Draws(**{f.name: getattr(draws, f.name)[rows] for f in fields(Draws)})


class DrawPlan:
    """Samples by number.

    Args:
        images: the training split, or a stream (whose places are taken one after the other).
        schedule: noise schedule.
        batch_size: B, over all processes.
        seed: of the data's order and, by default, of the noise.
        noise: source of eps and times (default `Independent(seed)`).
        pairing: how the samples of a group depend on each other (default: not at all).
        stratified: whether the times of a batch are stratified.
        coupling: what chooses the noises by the images; None: nothing.
        labels: classes or clusters of the images, (N,) integers, to hold in proportion in every batch; None: a plain
            permutation.

    Raises:
        ValueError: if there is no image or no batch, the batch does not divide into groups, the labels are not one an
            image, or parts that exclude each other are given.

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
        self,
        images: ImageSource | Stream,
        schedule: Schedule,
        batch_size: int,
        seed: int = 0,
        noise: NoiseSource | None = None,
        *,
        pairing: Pairing | None = None,
        stratified: bool = False,
        coupling: OptimalTransport | Immiscible | None = None,
        labels: Tensor | None = None,
    ) -> None:
        size = 1 if isinstance(images, Stream) else len(images)
        if batch_size < 1 or size < 1:
            raise ValueError(f"batch_size is {batch_size} and the data have {size} images; both must be at least 1")
        self.pairing = IndependentSamples() if pairing is None else pairing
        if batch_size % self.pairing.size:
            raise ValueError(
                f"batch_size is {batch_size} and {type(self.pairing).__name__} makes groups of {self.pairing.size} "
                "samples; give a multiple of it"
            )
        if stratified and isinstance(self.pairing, SobolPoints):
            raise ValueError("SobolPoints stratify the times already; leave stratified out")
        if coupling is not None and not isinstance(self.pairing, IndependentSamples):
            raise ValueError(
                f"{type(coupling).__name__} chooses noises that {type(self.pairing).__name__} has paired; give "
                "one of them"
            )
        if labels is not None and isinstance(images, Stream):
            raise ValueError("labels order the images of a set, and a stream has an order of its own; leave them out")
        if labels is not None and labels.shape != (size,):
            raise ValueError(f"labels are of shape {tuple(labels.shape)}; give one for each of the {size} images")
        self.images, self.schedule, self.batch_size = images, schedule, batch_size
        self.stratified, self.coupling = stratified, coupling
        self.labels = None if labels is None else labels.cpu().long()
        self._order = Independent(seed)
        self.noise = Independent(seed) if noise is None else noise
        self._epochs: dict[int, Tensor] = {}  # a memo of the last two permutations

    def permutation(self, epoch: int) -> Tensor:
        """The order of the images in an epoch, int64 (N,).

        Raises:
            ValueError: for a stream.
        """
        if isinstance(self.images, Stream):
            raise ValueError("a stream has no permutation: its images are taken place by place")
        if epoch not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            if self.labels is None:
                u = self._order.uniform(range(len(self.images)), (), draw=2 + epoch, dtype=torch.float64)
                self._epochs[epoch] = torch.argsort(u, stable=True)
            else:
                self._epochs[epoch] = strata_order(self._order, self.labels, draw=2 + epoch)
        return self._epochs[epoch]

    def numbers(self, update: int, part: int = 0, parts: int = 1) -> Tensor:
        """Sample numbers of an update, int64; part k of `parts` equal parts (processes times accumulation steps).

        Raises:
            ValueError: if the batch does not divide into that many parts, or groups would be split.
        """
        if self.batch_size % parts or not 0 <= part < parts:
            raise ValueError(f"part {part} of {parts}: batch_size {self.batch_size} must divide by the number of parts")
        share = self.batch_size // parts
        if share % self.pairing.size and not self.pairing.splits:
            raise ValueError(
                f"{parts} parts of {share} samples would split the groups of {self.pairing.size} that "
                f"{type(self.pairing).__name__} makes; give a batch_size that is a multiple of "
                f"{parts * self.pairing.size}"
            )
        return update * self.batch_size + part * share + torch.arange(share)

    @property
    def label(self) -> Label:
        """`unbiased` if every part is; the times have their own label."""
        return "unbiased" if self.coupling is None else self.coupling.label

    @property
    def group_size(self) -> int:
        """Consecutive samples that depend on each other: 1, the pairing's, or the whole batch."""
        whole = self.stratified or self.labels is not None or isinstance(self.coupling, OptimalTransport)
        return self.batch_size if whole else self.pairing.size

    def image_numbers(self, number: Tensor) -> Tensor:
        """Numbers of the images of the samples `number`, (n,) int64; places of a stream."""
        position = number // self.pairing.images
        if isinstance(self.images, Stream):
            return position
        n = len(self.images)
        epoch = position // n
        image = torch.empty_like(number)
        for e in epoch.unique().tolist():
            image = torch.where(epoch == e, self.permutation(e)[position % n], image)
        return image

    def draws(
        self, update: int, times: Times, part: int = 0, parts: int = 1, device: torch.device | str = "cpu"
    ) -> Draws:
        """The samples of an update (or a part of it), with tensors but numbers, weights and bins on `device`.

        `OptimalTransport` looks at the whole batch, so each part loads all its images.
        """
        number = self.numbers(update, part, parts)
        image = self.image_numbers(number)
        x0 = self.images.images(image).to(device)
        when = times.at(self._uniform(update, number, x0.shape[1:]))
        eps = self._noises(update, number, x0, part, parts)
        level = self.schedule.at(when.t).to(device)
        return Draws(number, image, x0, eps, level, when.weight, when.bin, number // self.group_size)

    def _uniform(self, update: int, number: Tensor, shape: Sequence[int]) -> Tensor:
        """The uniform numbers of the samples' times."""
        if not self.stratified:
            return self.pairing.uniform(self.noise, number, shape)
        n = self.batch_size // self.pairing.times
        return stratified_uniforms(self.noise, update, n)[number // self.pairing.times - update * n]

    def _noises(self, update: int, number: Tensor, x0: Tensor, part: int, parts: int) -> Tensor:
        """The noises of samples with images x0."""
        if isinstance(self.coupling, Immiscible):
            return self.coupling.choose(self.noise, number, x0)
        if self.coupling is None:
            return self.pairing.normal(self.noise, number, x0.shape[1:], x0.device)
        whole = self.numbers(update)
        images = x0 if parts == 1 else self.images.images(self.image_numbers(whole))
        eps = self.coupling(images, self.pairing.normal(self.noise, whole, x0.shape[1:], x0.device))
        return eps.chunk(parts)[part]
