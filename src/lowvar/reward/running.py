r"""Rewards of earlier batches, by prompt (Black et al. 2024, "per-prompt stat tracking").

A buffer a prompt holds its last `buffer` rewards. Mean and standard deviation come from the buffer once it has
`minimum` of them; before, from the whole batch. Black et al. put the batch into the buffers first, so that a reward
meets a mean and a deviation that it is part of (biased); `before` reads the buffers without it.

Source: K. Black, M. Janner, Y. Du, I. Kostrikov, S. Levine, "Training diffusion models with reinforcement learning",
2024, Appendix (buffer 16 or 32, minimum count 16).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["RunningStatistics"]


@dataclass(frozen=True)
class RunningStatistics:
    """Buffers of rewards; groups are numbers that mean the same prompt in every batch.

    Args:
        buffer: rewards kept a prompt.
        minimum: rewards before a prompt's own statistics are used.
        history: rewards by prompt, oldest first.
        count, mean, square: number of all rewards so far, their mean and sum of squared deviations.

    Raises:
        ValueError: if buffer or minimum are below 1, or the minimum is never reached.

    Example:
        >>> past = RunningStatistics(buffer=4, minimum=2)
        >>> past = past.updated(torch.tensor([7, 7, 7]), torch.tensor([1.0, 2.0, 6.0]))
        >>> mean, std, own = past.before(torch.tensor([7, 8]))
        >>> mean[0].item(), own.tolist()
        (3.0, [True, False])
    """

    buffer: int = 16
    minimum: int = 16
    history: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    count: int = 0
    mean: float = 0.0
    square: float = 0.0

    def __post_init__(self) -> None:
        """Checks the sizes."""
        if not 1 <= self.minimum <= self.buffer:
            raise ValueError(f"buffer is {self.buffer}, minimum {self.minimum}; need 1 <= minimum <= buffer")

    @property
    def std(self) -> float:
        """Standard deviation of all rewards so far; 0 before there are two."""
        return (self.square / self.count) ** 0.5 if self.count > 1 else 0.0

    def updated(self, groups: Tensor, rewards: Tensor) -> RunningStatistics:
        """With a batch."""
        history = dict(self.history)
        for g, r in zip(groups.tolist(), rewards.tolist(), strict=True):
            history[g] = (*history.get(g, ()), r)[-self.buffer :]
        values = rewards.detach().double()
        n, m = len(values), float(values.mean())
        count = self.count + n
        shift = m - self.mean
        square = self.square + float((values - m).square().sum()) + shift**2 * self.count * n / count
        return replace(self, history=history, count=count, mean=self.mean + shift * n / count, square=square)

    def before(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of each sample's prompt, (n,) float64, and which have enough rewards, (n,)."""
        mean, std, own = {}, {}, {}
        for g in set(groups.tolist()):
            kept = torch.tensor(self.history.get(g, ()), dtype=torch.float64)
            own[g] = len(kept) >= self.minimum
            mean[g] = float(kept.mean()) if own[g] else 0.0
            std[g] = float(kept.std(correction=0)) if own[g] else 0.0
        each = groups.tolist()
        return (
            torch.tensor([mean[g] for g in each], dtype=torch.float64, device=groups.device),
            torch.tensor([std[g] for g in each], dtype=torch.float64, device=groups.device),
            torch.tensor([own[g] for g in each], device=groups.device),
        )
