r"""The sources of the training gradient's variance, for a network and its data.

Crossed blocks (`lowvar.profile.crossed`) are drawn by number: block b has the images floor(N u) of two uniform numbers
u, two times by the inverse cdf of the recipe's density (importance weights are part of the gradient), and two noises.
So a run goes on where it stopped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.noise import NoiseSource
from lowvar.profile.crossed import CELLS, Crossed, cell_numbers
from lowvar.profile.inner import InnerProducts
from lowvar.train import Objective, Times
from lowvar.train.draws import ImageSource

__all__ = ["CrossedDraws", "crossed_blocks"]


@dataclass(frozen=True, eq=False)
class CrossedDraws:
    """Draws of crossed blocks, by number.

    Attributes:
        images: the training split.
        times: density of training times.
        noise: source; images of draw 0, times of draw 1, noises of draw 2, samples 2 b and 2 b + 1 of block b.
    """

    images: ImageSource
    times: Times
    noise: NoiseSource

    def of(self, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image numbers (2,), times t (2,) and weights (2,), noises (2, *event_shape).

        Args:
            block: number of the block.
        """
        index = [2 * block, 2 * block + 1]
        u = self.noise.uniform(index, (), draw=0, dtype=torch.float64)
        image = (u * len(self.images)).long()
        when = self.times.at(self.noise.uniform(index, (), draw=1, dtype=torch.float64))
        shape = self.images.images(image[:1]).shape[1:]
        return image, when.t, when.weight, self.noise.normal(index, shape, draw=2)


def crossed_blocks(
    denoiser: NetworkDenoiser,
    objective: Objective,
    draws: CrossedDraws,
    inner: InnerProducts,
    edges: Sequence[float],
    *,
    begin: int = 0,
    labels: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[Crossed]:
    """Crossed blocks one after the other, without end.

    Args:
        denoiser: the network, whose parameters `inner` has.
        objective: what is minimised.
        draws: images, times and noises.
        inner: inner products of gradients.
        edges: of the noise-level bins in logsnr, decreasing (`lowvar.train.validation.logsnr_edges`).
        begin: number of the first block.
        labels: classes of the images, (N,), for a network that is conditioned on them.
        device: of the network.

    Yields:
        One block each; join them with `Crossed.joined`.

    Example:
        >>> from itertools import islice
        >>> from torch import nn
        >>> from lowvar.data import TensorImages
        >>> from lowvar.process import CosineVP, Independent
        >>> from lowvar.profile.inner import Exact, parameter_groups
        >>> from lowvar.train import Objective, Simple, UniformTimes
        >>> class Line(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(2, 2)
        ...     def forward(self, x, timestep):
        ...         return self.layer(x)
        >>> net, schedule = Line(), CosineVP()
        >>> draws = CrossedDraws(TensorImages(torch.tensor([[0.5, -1.0], [0.0, 1.0]])), UniformTimes(), Independent(0))
        >>> inner = Exact(parameter_groups(net))
        >>> denoiser = NetworkDenoiser(net, schedule, "epsilon")
        >>> blocks = crossed_blocks(denoiser, Objective(Simple()), draws, inner, [9, 0, -9])
        >>> [tuple(block.terms.shape) for block in islice(blocks, 2)]
        [(1, 7, 1), (1, 7, 1)]
    """
    cells, inside = cell_numbers(), -torch.tensor(edges[1:-1], dtype=torch.float64)
    block = begin
    while True:
        image, t, weight, eps = draws.of(block)
        x0 = draws.images.images(image)[cells[:, 0]].to(device)
        noise = eps[cells[:, 2]].to(device)
        level = denoiser.schedule.at(t[cells[:, 1]]).to(device)
        factor, classes = weight[cells[:, 1]].to(device), None if labels is None else labels[image][cells[:, 0]]

        def losses(
            rows: slice,
            x0: Tensor = x0,
            noise: Tensor = noise,
            level: object = level,
            factor: Tensor = factor,
            classes: Tensor | None = classes,
        ) -> Tensor:
            own = denoiser
            if classes is not None:
                own = copy.copy(denoiser)
                own.conditioning = {**denoiser.conditioning, "class_labels": classes[rows].to(device)}
            loss = objective.losses(own, x0[rows], noise[rows], level[rows]).loss  # type: ignore[index]
            return loss * factor[rows].to(loss)

        grams = inner.of(losses, CELLS, CELLS, block).cpu()
        logsnr = denoiser.schedule.at(t).logsnr.double().cpu()
        bins = torch.bucketize(-logsnr, inside)
        yield Crossed.of(grams, bins[None])
        block += 1
