r"""Immiscible noise: each image gets the nearest of k noises.

    eps_i = argmin over k candidates z_1, .., z_k ~ N(0, I) of ||x_i - z||

so that images diffuse to parts of the noise space that overlap less. It is the rule of the improved method (k nearest
neighbours in place of the assignment within a batch), which needs no other sample and so does not depend on the
batch. The assignment of the first paper, which makes the sum of distances least within a batch, is
`optimal_transport` up to the square. The noises of an image are no longer N(0, I) given the image, nor on average over
the images (the chosen one leans towards the data): label `changes the objective`.

Sources: Li et al. 2024 ("Immiscible Diffusion"), Li et al. 2025 ("Improved Immiscible Diffusion", KNN noise selection).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource
from lowvar.train.objectives import Label

__all__ = ["Immiscible", "nearest_noise"]


def nearest_noise(x0: Tensor, candidates: Tensor) -> Tensor:
    """The nearest candidate of each image, (n, *event_shape).

    Args:
        x0: images, (n, *event_shape).
        candidates: k noises an image, (k, n, *event_shape).

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> nearest_noise(torch.tensor([[1.0], [-1.0]]), torch.tensor([[[0.0], [0.0]], [[0.5], [4.0]]])).tolist()
        [[0.5], [0.0]]
    """
    if candidates.shape[1:] != x0.shape:
        raise ValueError(f"candidates are {tuple(candidates.shape)}, images {tuple(x0.shape)}; give (k, *images.shape)")
    distance = torch.stack([((z.double() - x0) ** 2).flatten(1).sum(1) for z in candidates])
    return candidates[distance.argmin(0), torch.arange(len(x0), device=x0.device)]


@dataclass(frozen=True)
class Immiscible:
    """The coupling as a part of a draw plan: candidate j of sample i is draw j of its stream of normal numbers.

    Args:
        candidates: k.

    Raises:
        ValueError: if there are fewer than 2 candidates.

    Example:
        >>> from lowvar.process import Independent
        >>> Immiscible(4).choose(Independent(0), torch.arange(3), torch.zeros(3, 1, 2, 2)).shape
        torch.Size([3, 1, 2, 2])
    """

    candidates: int = 8
    label: ClassVar[Label] = "changes the objective"

    def __post_init__(self) -> None:
        """Refuses a choice of one."""
        if self.candidates < 2:
            raise ValueError(f"candidates is {self.candidates}; give at least 2 (of 1 there is no nearest)")

    def choose(self, source: NoiseSource, number: Tensor, x0: Tensor) -> Tensor:
        """The noises of the samples `number` (n,) with images x0 (n, *event_shape), float32."""
        shape = x0.shape[1:]
        drawn = [source.normal(number, shape, draw=j, device=x0.device) for j in range(self.candidates)]
        return nearest_noise(x0, torch.stack(drawn))
